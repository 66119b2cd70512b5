// The layer x head map, and the chosen head beside it.

const LABEL = 34;
let cell = { width: 16, height: 16 };
const METRICS = { recall: "recall", lost: "lost mass", error: "output error", density: "density", pattern: "pattern" };

function startHeads() {
  const rows = data.rows;
  byId("heads").hidden = !rows.length;
  if (!rows.length) return;
  const canvas = byId("map");
  const choice = byId("metric");
  for (const [name, label] of Object.entries(METRICS)) choice.append(element("option", label, { value: name }));
  choice.addEventListener("change", () => {
    view.metric = choice.value;
    drawMap();
    saveView();
  });
  canvas.addEventListener("mousemove", (event) => showTip(event, headTip(headAt(event))));
  canvas.addEventListener("mouseleave", (event) => showTip(event, ""));
  canvas.addEventListener("click", (event) => {
    const at = headAt(event);
    if (at) chooseHead(at.row, at.head);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter") togglePin(view.row, view.head);
    if (!step) return;
    event.preventDefault();
    chooseHead(view.row + step[0], view.head + step[1]);
  });
  redrawers.push(drawMap, () => chooseHead(view.row, view.head, false));
}

function metricNow() {
  return view.metric in METRICS ? view.metric : data.profiled ? "recall" : "pattern";
}

function metricOf(head, metric) {
  return head[metric];
}

function drawMap() {
  const rows = data.rows;
  if (!rows.length) return;
  const metric = metricNow();
  byId("metric").value = metric;
  const most = Math.max(...rows.map((row) => row.heads.length));
  const width = Math.max(4, Math.min(26, Math.floor((roomFor(660) - LABEL) / most)));
  cell = { width, height: Math.max(8, Math.min(18, 640 / rows.length)) };
  const canvas = byId("map");
  canvas.setAttribute("aria-label", `${rows.length} layers by ${most} heads`);
  const context = sizeCanvas(canvas, LABEL + most * cell.width + 2, 18 + rows.length * cell.height + 2);
  const shades = ramp(...metricRange(metric));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  rows.forEach((row, i) => {
    const y = 18 + i * cell.height;
    row.heads.forEach((head, h) => {
      const value = metricOf(head, metric);
      const known = value !== null && value !== "";
      context.fillStyle = !known ? color("--none") : metric === "pattern" ? patternColor(value) : shades(value);
      context.fillRect(LABEL + h * cell.width, y, cell.width - 1, cell.height - 1);
    });
    context.fillStyle = color(row.ran_because ? "--bad" : "--soft");
    if (cell.height >= 11 || i % 2 === 0) context.fillText(row.label, 2, y + cell.height / 2);
  });
  context.fillStyle = color("--soft");
  const every = Math.ceil(24 / cell.width);
  for (let h = 0; h < most; h += every) context.fillText(h, LABEL + h * cell.width + 1, 8);
  const frame = (row, head, name, wide) => {
    context.strokeStyle = color(name);
    context.lineWidth = wide;
    context.strokeRect(LABEL + head * cell.width - 1, 18 + row * cell.height - 1, cell.width + 1, cell.height + 1);
  };
  for (const [row, head] of found) frame(row, head, "--accent", 1);
  for (const [row, head] of view.pins) frame(row, head, "--ink", 2);
  frame(view.row, view.head, "--mark", 2);
  drawLegend(metric);
}

function metricRange(metric) {
  const values = data.rows.flatMap((row) => row.heads.map((head) => head[metric])).filter((v) => typeof v === "number");
  if (metric === "recall") return [Math.min(0.95, Math.floor(10 * Math.min(1, ...values)) / 10), 1];
  if (metric === "lost" || metric === "error") return [0, Math.max(0.05, Math.ceil(10 * Math.max(0, ...values)) / 10)];
  return [0, 1];
}

function drawLegend(metric) {
  const legend = byId("legend");
  legend.replaceChildren();
  if (metric === "pattern") {
    for (const name of data.patterns) {
      const item = element("span", ` ${name}  `);
      item.prepend(element("span", "■", { style: `color:${patternColor(name)}` }));
      legend.append(item);
    }
  } else {
    legend.append(scaleBar(...metricRange(metric).map(percent)));
  }
  if (data.rows.every((row) => row.measured)) return;
  const none = element("span");
  none.append(element("span", "■", { style: "color:var(--none)" }), element("span", " dense, not measured"));
  legend.append(none);
}

function headAt(event) {
  const box = event.target.getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top - 18) / cell.height);
  const head = Math.floor((event.clientX - box.left - LABEL) / cell.width);
  return data.rows[row] && data.rows[row].heads[head] ? { row, head } : null;
}

function headTip(at) {
  if (!at) return "";
  const row = data.rows[at.row];
  const head = row.heads[at.head];
  const title = `layer ${row.label}, head ${at.head}: ${head.shown || "dense"}`;
  if (!row.measured) return `${title}\n${row.reason}`;
  const plan = row.ran_because ? "ran dense; planned " : "";
  return `${title}\n${plan}recall ${percent(head.recall)}, lost mass ${percent(head.lost)}, output error ${percent(head.error)}, density ${percent(head.density)}`;
}

function factsOf(layer, facts) {
  const planned = layer.ran_because ? " as planned" : "";
  const looked = layer.all_queries ? "" : ` of ${layer.looked} query blocks`;
  return describe([
    ["module", layer.path],
    ["pattern", facts.shown || "dense"],
    ["reason", layer.reason],
    ["source", layer.source],
    ["ran", layer.ran_because ? `${layer.lowering}: ${layer.ran_because}` : layer.lowering],
    [`recall${planned}`, layer.measured ? percent(facts.recall) + looked : ""],
    [`lost mass${planned}`, layer.measured ? percent(facts.lost) : ""],
    [`output error${planned}`, layer.measured && facts.error !== null ? percent(facts.error) : ""],
    ["output error as run", layer.measured ? percent(facts.ran_error) : ""],
    [`density${planned}`, layer.measured ? percent(facts.density) : ""],
    ["predicted cost", facts.predicted === null ? "" : `at most ${percent(facts.predicted)} of dense`],
    ["worst loss", layer.measured && facts.worst[2] > 0 ? `${percent(facts.worst[2])} of query block ${facts.worst[0]} lies on key block ${facts.worst[1]}` : ""],
    ["advice", facts.advice],
    ["index", layer.measured ? bytes(layer.index_bytes) : ""],
  ]);
}

async function chooseHead(row, head, tell = true) {
  if (!data.rows.length) return;
  view.row = Math.max(0, Math.min(data.rows.length - 1, row));
  view.head = Math.max(0, Math.min(data.rows[view.row].heads.length - 1, head));
  drawMap();
  saveView();
  const place = byId("head");
  const layer = data.rows[view.row];
  const facts = layer.heads[view.head];
  const title = element("h3", `Layer ${layer.label}, head ${view.head}`);
  const pin = button(isPinned(view.row, view.head) ? "Unpin" : "Pin", () => togglePin(view.row, view.head), { id: "pin" });
  const list = factsOf(layer, facts);
  if (tell) announce(headTip({ row: view.row, head: view.head }));
  if (!layer.measured) {
    place.replaceChildren(title, pin, list);
    byId("looks").hidden = true;
    return;
  }
  const wanted = `${view.run}/${view.row}/${view.head}`;
  const maps = await unpackMaps(layer);
  if (wanted !== `${view.run}/${view.row}/${view.head}`) return; // another head was chosen meanwhile
  place.replaceChildren(title, pin, list, figuresOf(layer, maps, view.head, mapSide()));
  await showBeside(place);
  await showLooks();
}
