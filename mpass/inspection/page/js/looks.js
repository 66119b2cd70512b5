// One query token: the keys that the chosen head took of it, and the exact weights.

let words = null; // the prompt's tokens of the run that is shown, once unpacked

async function tokensOf(run) {
  if (!run.tokens) return [];
  run.unpackedTokens ??= new TextDecoder().decode(await unpack(run.tokens)).split("\0");
  return run.unpackedTokens;
}

// Numbers of a layer's queries, in the order of mpass.inspection.page.pack.
async function unpackLooks(layer) {
  const looks = layer.looks;
  if (!looks.read) {
    const buffer = await unpack(looks.data);
    const heads = layer.heads.length, queries = looks.queries.length;
    let at = 0;
    const take = (type, count) => {
      const part = new type(buffer.slice(at, at + count * type.BYTES_PER_ELEMENT));
      at += count * type.BYTES_PER_ELEMENT;
      return part;
    };
    const each = heads * queries;
    looks.read = {
      keys: take(Int32Array, each * looks.keys), count: take(Int32Array, each), weights: take(Uint16Array, each * looks.keys),
      kept: take(Uint16Array, each), taken: take(Uint8Array, each * looks.keys), strip: take(Uint8Array, each * looks.bins),
    };
  }
  return looks.read;
}

async function showLooks() {
  const layer = data.rows[view.row];
  const section = byId("looks");
  section.hidden = !layer || !layer.looks || !layer.looks.queries.length;
  if (section.hidden) return;
  const looks = layer.looks;
  words = await tokensOf(data);
  const numbers = await unpackLooks(layer);
  const last = looks.queries.length - 1;
  const query = view.query < 0 ? last : Math.min(last, view.query);
  const choice = byId("query");
  choice.replaceChildren(...looks.queries.map((position, i) => element("option", `${position}${words.length ? `: ${visible(words[position])}` : ""}`, { value: i })));
  choice.value = query;
  const at = view.head * looks.queries.length + query;
  const position = looks.queries[query];
  byId("query-text").replaceChildren(...excerpt(position, 12, new Map([[position, "query"]])));
  const planned = layer.ran_because ? " (planned; the layer ran dense)" : "";
  byId("query-facts").textContent =
    `takes ${numbers.count[at]} of ${looks.seen[query]} keys${planned}; ${percent(numbers.kept[at] / 65535)} of its exact attention lies on them`;
  drawStrip(layer, looks, numbers, at, position);
  const list = byId("query-keys");
  const rows = [];
  for (let k = 0; k < looks.keys; k++) {
    const key = numbers.keys[at * looks.keys + k];
    if (key < 0) continue;
    const taken = numbers.taken[at * looks.keys + k] === 1;
    const row = element("tr", undefined, taken ? {} : { class: "missed" });
    const weight = numbers.weights[at * looks.keys + k] / 65535;
    const bar = element("span", undefined, { class: "weight", style: `width:${Math.round(80 * weight)}px` });
    const share = element("td", `${(100 * weight).toFixed(2)}% `, { class: "number" });
    share.append(bar);
    const text = element("td");
    text.append(...excerpt(key, 4, new Map([[key, taken ? "taken" : "missed"]])));
    row.append(element("td", String(key), { class: "number" }), share, element("td", taken ? "taken" : "not taken"), text);
    rows.push(row);
  }
  const head = element("tr");
  for (const name of ["key", "exact weight", "by the head", "text"]) head.append(element("th", name, { scope: "col" }));
  list.replaceChildren(element("caption", `The ${rows.length} keys with the largest exact weights`), head, ...rows);
}

// Tokens around a position, some of them marked; positions alone where the text is not known.
function excerpt(position, around, marks) {
  if (!words.length) return [element("mark", `token ${position}`, { class: marks.get(position) })];
  const parts = [];
  const from = Math.max(0, position - around), to = Math.min(words.length, position + around + 1);
  if (from) parts.push(document.createTextNode("…"));
  for (let i = from; i < to; i++) {
    const kind = marks.get(i);
    parts.push(kind ? element("mark", visible(words[i]), { class: kind }) : document.createTextNode(words[i]));
  }
  if (to < words.length) parts.push(document.createTextNode("…"));
  return parts;
}

// The first tokens from a position on, as `: "the quick brown"`; nothing where no text is known.
function phrase(run, position) {
  const tokens = run.unpackedTokens;
  return tokens && tokens.length ? `: “${tokens.slice(position, position + 6).map(visible).join("").trim()}”` : "";
}

// A token that can be seen: breaks and tabs as signs.
function visible(token) {
  return (token ?? "").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, "␣");
}

function drawStrip(layer, looks, numbers, at, position) {
  const place = byId("query-map");
  const start = at * looks.bins;
  const names = { computed: "keys that it takes", exact: "exact attention, log scale" };
  place.replaceChildren();
  for (const kind of ["computed", "exact"]) {
    const canvas = element("canvas", undefined, { class: "strip", "data-kind": `strip-${kind}`, role: "img", "aria-label": `${names[kind]} of query ${position}, over all keys` });
    paint(canvas, looks.bins, 1, (i) => levelIn(numbers.strip, kind, start + i));
    canvas.style.width = `${roomFor(700)}px`;
    canvas.addEventListener("mousemove", (event) => {
      const box = canvas.getBoundingClientRect();
      const i = Math.min(looks.bins - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * looks.bins)));
      const first = Math.ceil((i * layer.num_keys) / looks.bins);
      showTip(event, `keys from ${first}${phrase(data, first)}\n${levelInWords(kind, levelIn(numbers.strip, kind, start + i))}`);
    });
    canvas.addEventListener("mouseleave", (event) => showTip(event, ""));
    place.append(element("span", names[kind], { class: "hint" }), canvas);
  }
}

function startLooks() {
  byId("query").addEventListener("change", (event) => {
    view.query = Number(event.target.value);
    saveView();
    showLooks();
  });
}
