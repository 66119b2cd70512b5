// What every part uses: the data, the theme's colors, text helpers, the tooltip.

const page = JSON.parse(document.getElementById("data").textContent);
let data = page.runs[0]; // the run that is shown
const redrawers = [];

function byId(id) {
  return document.getElementById(id);
}

// The width that a part may take, so that the page never scrolls sideways.
function roomFor(wanted, taken = 0) {
  return Math.max(160, Math.min(wanted, document.documentElement.clientWidth - 34 - taken));
}

// A sentence for those who listen to the page.
function announce(text) {
  byId("live").textContent = text;
}

// Text that was packed by zlib and base64.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function ramp(low, high) {
  const middle = (low + high) / 2;
  return d3.scaleLinear([low, middle, high], ["--low", "--middle", "--high"].map(color)).clamp(true);
}

function percent(share) {
  return share === null || share === undefined ? "-" : `${(100 * share).toFixed(1)}%`;
}

function bytes(count) {
  const units = ["B", "KB", "MB", "GB"];
  let unit = 0;
  for (; count >= 1024 && unit < 3; unit++) count /= 1024;
  return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
}

function patternName(text) {
  return text.split("(")[0];
}

function patternColor(text) {
  const position = data.patterns.indexOf(patternName(text));
  return position < 0 ? color("--none") : color(`--pattern-${(position % 6) + 1}`);
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function describe(pairs) {
  const list = element("dl");
  for (const [name, value] of pairs) {
    if (value === "" || value === undefined || value === null) continue;
    const text = String(value);
    list.append(element("dt", name), element("dd", shortPath(text), { title: text }));
  }
  return list;
}

// A path without the folder that packages are installed in.
function shortPath(text) {
  return text.replace(/\S*\/(?:site|dist)-packages\//, "");
}

function count(number) {
  return number >= 1024 && number % 1024 === 0 ? `${number / 1024}K` : String(number);
}

// A scale of colors with its ends named.
function scaleBar(low, high) {
  const bar = element("span", undefined, { class: "scale" });
  bar.append(element("span", low), element("i"), element("span", high));
  return bar;
}

function button(text, action, attributes = {}) {
  const made = element("button", text, { type: "button", ...attributes });
  made.addEventListener("click", action);
  return made;
}

function fillTable(table, heads, rows) {
  table.replaceChildren();
  const numeric = heads.map((_, i) => rows.some((row) => typeof row[i] === "number"));
  const line = (cells, tag) => {
    const row = element("tr");
    cells.forEach((cell, i) => {
      const made = element(tag, cell, numeric[i] ? { class: "number" } : {});
      if (tag === "th") made.setAttribute("scope", "col");
      row.append(made);
    });
    table.append(row);
  };
  line(heads, "th");
  for (const row of rows) line(row, "td");
}

// A canvas sharp on every screen; returns its context in CSS pixels.
function sizeCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

function showTip(event, text) {
  const tip = document.getElementById("tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - box.width - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 12, innerHeight - box.height - 8)}px`;
}
