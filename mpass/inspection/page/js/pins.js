// Heads that are kept in sight, and a search for heads.

let found = []; // [row, head] of the heads that the search found

function isPinned(row, head) {
  return view.pins.some(([r, h]) => r === row && h === head);
}

function togglePin(row, head) {
  if (isPinned(row, head)) view.pins = view.pins.filter(([r, h]) => r !== row || h !== head);
  else view.pins.push([row, head]);
  saveView();
  drawMap();
  showPins();
  const pin = byId("pin");
  if (pin) pin.textContent = isPinned(view.row, view.head) ? "Unpin" : "Pin";
  announce(`${view.pins.length} heads are pinned`);
}

async function showPins() {
  const place = byId("pins");
  const cards = [];
  for (const [row, head] of view.pins) {
    const layer = data.rows[row];
    if (!layer || !layer.heads[head]) continue;
    const facts = layer.heads[head];
    const card = element("div", undefined, { class: "card" });
    card.append(
      element("h3", `Layer ${layer.label}, head ${head}`),
      button("Show", () => chooseHead(row, head)),
      button("Unpin", () => togglePin(row, head)),
      element("p", layer.measured ? `${facts.pattern}: recall ${percent(facts.recall)}, density ${percent(facts.density)}` : layer.reason || "dense", { class: "hint" }),
    );
    if (layer.measured) card.append(figuresOf(layer, await unpackMaps(layer), head, Math.min(180, mapSide())));
    cards.push(card);
  }
  place.replaceChildren(...cards);
}

// `3.2` is a head, `layer 3` a layer; `recall<0.9` compares a figure; else part of a pattern's name.
function matcher(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return null;
  const place = wanted.match(/^(\d+)\s*[.,/]\s*(\d+)$/);
  if (place) return (row, head, h) => row.label === place[1] && h === Number(place[2]);
  const layer = wanted.match(/^(layer|head)\s*(\d+)$/);
  if (layer) return (row, head, h) => (layer[1] === "layer" ? row.label : String(h)) === layer[2];
  const figure = wanted.match(/^(recall|density|lost mass|lost|output error|error)\s*([<>])=?\s*([\d.]+)\s*(%?)$/);
  if (figure) {
    const name = { "lost mass": "lost", "output error": "error" }[figure[1]] ?? figure[1];
    const bound = Number(figure[3]) / (figure[4] ? 100 : 1);
    return (row, head) => typeof head[name] === "number" && (figure[2] === "<" ? head[name] <= bound : head[name] >= bound);
  }
  return (row, head) => [head.pattern, row.path, row.reason, row.ran_because, head.advice].join(" ").toLowerCase().includes(wanted);
}

function search() {
  const fits = matcher(view.find);
  found = [];
  if (fits) data.rows.forEach((row, r) => row.heads.forEach((head, h) => fits(row, head, h) && found.push([r, h])));
  const told = byId("found");
  told.replaceChildren();
  if (fits) {
    told.append(element("span", `${found.length} head${found.length === 1 ? "" : "s"} `));
    for (const [row, head] of found.slice(0, 24)) told.append(button(`${data.rows[row].label}.${head}`, () => chooseHead(row, head), { "aria-label": `layer ${data.rows[row].label}, head ${head}` }));
    if (found.length > 24) told.append(element("span", " …"));
  }
  drawMap();
}

function startPins() {
  const box = byId("find");
  box.addEventListener("input", () => {
    view.find = box.value;
    saveView();
    search();
  });
}
