// The two maps of a head: what it computes, and the exact attention.

const LEVELS = 15; // of mpass.inspection.recall
const DECADES = 4;
const LEAST = `${100 * 10 ** -DECADES}%`;
const AXIS = { left: 46, bottom: 34 };

function mapSide() {
  return roomFor(360, AXIS.left + 12);
}

// One byte per cell and head: the computed level above, the exact level below.
async function unpackMaps(layer) {
  layer.unpacked ??= new Uint8Array(await unpack(layer.maps));
  return layer.unpacked;
}

function levelIn(cells, kind, i) {
  return kind === "computed" ? cells[i] >> 4 : cells[i] & 15;
}

function levelInWords(kind, value) {
  if (kind === "computed") return `${percent(value / LEVELS)} of the keys`;
  return value ? `about ${percent(10 ** ((value / LEVELS - 1) * DECADES))} of the attention` : `under ${LEAST} of the attention`;
}

function palette() {
  const shades = ramp(0, LEVELS);
  return Array.from({ length: LEVELS + 1 }, (_, i) => shades(i).match(/\d+/g).map(Number));
}

function paint(canvas, width, height, levelAt) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const colors = palette();
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = colors[levelAt(i)];
    image.data.set([r, g, b, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

function blockFigure(layer, maps, head, kind, caption, ends, size = mapSide()) {
  const side = layer.side;
  const start = head * side * side;
  const level = (y, x) => levelIn(maps, kind, start + y * side + x);
  const name = `${caption}, layer ${layer.label}, head ${head}: queries down, keys across. Arrow keys read cells.`;
  const canvas = element("canvas", undefined, { class: "blocks", "data-kind": kind, role: "img", tabindex: 0, "aria-label": name });
  paint(canvas, side, side, (i) => levelIn(maps, kind, start + i));
  canvas.style.width = canvas.style.height = `${size}px`;
  const run = page.runs.find((each) => each.rows.includes(layer));
  tokensOf(run); // the prompt's text, for the tooltip
  const told = (y, x) => {
    const at = (i, total) => Math.round((i * total) / side);
    const named = (position) => `${position}${phrase(run, position)}`;
    const before = layer.num_keys - layer.num_queries; // cached keys, which stand before the queries
    const query = before + at(y, layer.num_queries);
    return `queries from ${named(query)}\nkeys from ${named(at(x, layer.num_keys))}\n${levelInWords(kind, level(y, x))}`;
  };
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const cellOf = (offset, length) => Math.min(side - 1, Math.max(0, Math.floor((offset / length) * side)));
    showTip(event, told(cellOf(event.clientY - box.top, box.height), cellOf(event.clientX - box.left, box.width)));
  });
  canvas.addEventListener("mouseleave", (event) => showTip(event, ""));
  const place = { y: side - 1, x: 0 };
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    place.y = Math.max(0, Math.min(side - 1, place.y + step[0]));
    place.x = Math.max(0, Math.min(side - 1, place.x + step[1]));
    const box = canvas.getBoundingClientRect();
    const middle = (i, length) => ((i + 0.5) * length) / side;
    showTip({ clientX: box.left + middle(place.x, box.width), clientY: box.top + middle(place.y, box.height) }, told(place.y, place.x));
    announce(told(place.y, place.x));
  });
  canvas.addEventListener("blur", (event) => showTip(event, ""));
  const figure = element("figure");
  const heading = element("figcaption", caption);
  heading.append(scaleBar(...ends));
  figure.append(heading, withAxes(canvas, layer, size));
  return figure;
}

// Both figures of a head.
function figuresOf(layer, maps, head, size) {
  const figures = element("div", undefined, { class: "columns" });
  figures.append(
    blockFigure(layer, maps, head, "computed", layer.ran_because ? "What it was planned to compute" : "What it computes", ["no key", "every key of the block"], size),
    blockFigure(layer, maps, head, "exact", "Exact attention", [`under ${LEAST}`, "all of it, log scale"], size),
  );
  return figures;
}

// A map with the positions of its keys below and of its queries beside it.
function withAxes(canvas, layer, size) {
  const frame = element("div", undefined, { class: "axes" });
  frame.append(canvas);
  const svg = d3.select(frame).append("svg").attr("width", size + AXIS.left + 12).attr("height", size + AXIS.bottom).attr("aria-hidden", "true");
  const draw = (total, make, x, y) => {
    const scale = d3.scaleLinear([0, total], [0, size]);
    const step = 2 ** Math.ceil(Math.log2(total / (size < 250 ? 3 : 6)));
    const ticks = Array.from({ length: Math.floor(total / step) + 1 }, (_, i) => i * step);
    svg.append("g").attr("transform", `translate(${x} ${y})`).call(make(scale).tickValues(ticks).tickFormat(count));
  };
  draw(layer.num_keys, d3.axisBottom, AXIS.left, size + 1);
  draw(layer.num_queries, d3.axisLeft, AXIS.left - 1, 0);
  svg.append("text").attr("x", AXIS.left + size / 2).attr("y", size + AXIS.bottom - 2).text("key");
  svg.append("text").attr("transform", `translate(10 ${size / 2}) rotate(-90)`).text("query");
  return frame;
}
