// The layer x head map, and what the chosen head looks at beside the exact attention.

const LEVELS = 15; // of mpass.recall
const DECADES = 4;
const LEAST = `${100 * 10 ** -DECADES}%`;
const MAP_SIDE = 360;
const LABEL = 34;
const AXIS = { left: 46, bottom: 34 };
const chosen = { row: 0, head: 0 };
let cell = { width: 16, height: 16 };

function startHeads() {
  const rows = data.rows;
  if (!rows.length) {
    document.getElementById("heads").hidden = true;
    return;
  }
  const canvas = document.getElementById("map");
  const most = Math.max(...rows.map((row) => row.heads.length));
  canvas.setAttribute("aria-label", `${rows.length} layers by ${most} heads`);
  document.getElementById("metric").value = data.profiled ? "recall" : "pattern";
  document.getElementById("metric").addEventListener("change", drawMap);
  canvas.addEventListener("mousemove", (event) => showTip(event, headTip(headAt(event))));
  canvas.addEventListener("mouseleave", (event) => showTip(event, ""));
  canvas.addEventListener("click", (event) => {
    const at = headAt(event);
    if (at) chooseHead(at.row, at.head);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    chooseHead(chosen.row + step[0], chosen.head + step[1]);
  });
  redrawers.push(drawMap, () => chooseHead(chosen.row, chosen.head));
}

function metricOf(head, metric) {
  return metric === "pattern" ? head.pattern : head[metric];
}

function drawMap() {
  const rows = data.rows;
  if (!rows.length) return;
  const metric = document.getElementById("metric").value;
  const most = Math.max(...rows.map((row) => row.heads.length));
  cell = { width: Math.max(7, Math.min(26, 620 / most)), height: Math.max(8, Math.min(18, 640 / rows.length)) };
  const canvas = document.getElementById("map");
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
    context.fillStyle = color("--soft");
    if (cell.height >= 11 || i % 2 === 0) context.fillText(row.label, 2, y + cell.height / 2);
  });
  context.fillStyle = color("--soft");
  const every = Math.ceil(24 / cell.width);
  for (let h = 0; h < most; h += every) context.fillText(h, LABEL + h * cell.width + 1, 8);
  context.strokeStyle = color("--mark");
  context.lineWidth = 2;
  context.strokeRect(LABEL + chosen.head * cell.width - 1, 18 + chosen.row * cell.height - 1, cell.width + 1, cell.height + 1);
  drawLegend(metric);
}

function metricRange(metric) {
  if (metric !== "recall") return [0, 1];
  const values = data.rows.flatMap((row) => row.heads.map((head) => head.recall)).filter((v) => v !== null);
  return [Math.min(0.95, Math.floor(10 * Math.min(1, ...values)) / 10), 1];
}

function drawLegend(metric) {
  const legend = document.getElementById("legend");
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
  const title = `layer ${row.label}, head ${at.head}: ${head.pattern || "dense"}`;
  const plan = row.ran_because ? "ran dense; planned " : "";
  return row.measured ? `${title}\n${plan}recall ${percent(head.recall)}, density ${percent(head.density)}` : `${title}\n${row.reason}`;
}

async function chooseHead(row, head) {
  if (!data.rows.length) return;
  chosen.row = Math.max(0, Math.min(data.rows.length - 1, row));
  chosen.head = Math.max(0, Math.min(data.rows[chosen.row].heads.length - 1, head));
  drawMap();
  const place = document.getElementById("head");
  const layer = data.rows[chosen.row];
  const facts = layer.heads[chosen.head];
  const title = element("h3", `Layer ${layer.label}, head ${chosen.head}`);
  const list = describe([
    ["module", layer.path],
    ["pattern", facts.pattern || "dense"],
    ["reason", layer.reason],
    ["source", layer.source],
    ["ran", layer.ran_because ? `${layer.lowering}: ${layer.ran_because}` : layer.lowering],
    [layer.ran_because ? "recall as planned" : "recall", layer.measured ? percent(facts.recall) + (layer.all_queries ? "" : ` of ${layer.looked} query blocks`) : ""],
    [layer.ran_because ? "density as planned" : "density", layer.measured ? percent(facts.density) : ""],
    ["predicted cost", facts.predicted === null ? "" : `at most ${percent(facts.predicted)} of dense`],
    ["worst loss", layer.measured && facts.worst[2] > 0 ? `${percent(facts.worst[2])} of query block ${facts.worst[0]} lies on key block ${facts.worst[1]}` : ""],
    ["advice", facts.advice],
    ["index", layer.measured ? bytes(layer.index_bytes) : ""],
  ]);
  if (!layer.measured) {
    place.replaceChildren(title, list);
    return;
  }
  const wanted = `${chosen.row}/${chosen.head}`;
  const maps = await unpackMaps(layer);
  if (wanted !== `${chosen.row}/${chosen.head}`) return; // another head was chosen meanwhile
  const figures = element("div", undefined, { class: "columns" });
  figures.append(
    blockFigure(layer, maps, "computed", "What it computes", ["no key", "every key of the block"]),
    blockFigure(layer, maps, "exact", "Exact attention", [`under ${LEAST}`, "all of it, log scale"]),
  );
  place.replaceChildren(title, list, figures);
}

// One byte per cell and head: the computed level above, the exact level below.
async function unpackMaps(layer) {
  if (!layer.unpacked) {
    const packed = Uint8Array.from(atob(layer.maps), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    layer.unpacked = new Uint8Array(await new Response(stream).arrayBuffer());
  }
  return layer.unpacked;
}

function blockFigure(layer, maps, kind, caption, ends) {
  const side = layer.side;
  const start = chosen.head * side * side;
  const level = (y, x) => {
    const byte = maps[start + y * side + x];
    return kind === "computed" ? byte >> 4 : byte & 15;
  };
  const shades = ramp(0, LEVELS);
  const palette = Array.from({ length: LEVELS + 1 }, (_, i) => {
    const parts = shades(i).match(/\d+/g).map(Number);
    return parts;
  });
  const canvas = element("canvas", undefined, { class: "blocks", "data-kind": kind, "aria-label": caption });
  canvas.width = canvas.height = side;
  canvas.style.width = canvas.style.height = `${MAP_SIDE}px`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const [r, g, b] = palette[level(y, x)];
      image.data.set([r, g, b, 255], 4 * (y * side + x));
    }
  }
  context.putImageData(image, 0, 0);
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.min(side - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * side)));
    const y = Math.min(side - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * side)));
    const at = (i, total) => Math.round((i * total) / side);
    const value = level(y, x);
    const words =
      kind === "computed"
        ? `${percent(value / LEVELS)} of the keys`
        : value ? `about ${percent(10 ** ((value / LEVELS - 1) * DECADES))} of the attention` : `under ${LEAST} of the attention`;
    showTip(event, `queries from ${at(y, layer.num_queries)}, keys from ${at(x, layer.num_keys)}\n${words}`);
  });
  canvas.addEventListener("mouseleave", (event) => showTip(event, ""));
  const figure = element("figure");
  const heading = element("figcaption", caption);
  heading.append(scaleBar(...ends));
  figure.append(heading, withAxes(canvas, layer));
  return figure;
}

// A map with the positions of its keys below and of its queries beside it.
function withAxes(canvas, layer) {
  const frame = element("div", undefined, { class: "axes" });
  frame.append(canvas);
  const svg = d3.select(frame).append("svg").attr("width", MAP_SIDE + AXIS.left + 12).attr("height", MAP_SIDE + AXIS.bottom);
  const draw = (total, make, x, y) => {
    const scale = d3.scaleLinear([0, total], [0, MAP_SIDE]);
    const step = 2 ** Math.ceil(Math.log2(total / 6));
    const ticks = Array.from({ length: Math.floor(total / step) + 1 }, (_, i) => i * step);
    svg.append("g").attr("transform", `translate(${x} ${y})`).call(make(scale).tickValues(ticks).tickFormat(count));
  };
  draw(layer.num_keys, d3.axisBottom, AXIS.left, MAP_SIDE + 1);
  draw(layer.num_queries, d3.axisLeft, AXIS.left - 1, 0);
  svg.append("text").attr("x", AXIS.left + MAP_SIDE / 2).attr("y", MAP_SIDE + AXIS.bottom - 2).text("key");
  svg.append("text").attr("transform", `translate(10 ${MAP_SIDE / 2}) rotate(-90)`).text("query");
  return frame;
}
