// The numbers and the picture as files.

function download(name, content, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const link = element("a", undefined, { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const COLUMNS = ["run", "layer", "head", "module", "pattern", "planned", "ran", "why_dense", "density", "recall", "lost_mass", "output_error",
  "index_seconds", "attention_seconds", "dense_seconds"];

function records() {
  return page.runs.flatMap((run) => run.rows.flatMap((row) => row.heads.map((head, h) => [
    run.name, row.label, h, row.path, head.pattern || "dense", row.status, row.lowering, row.ran_because || row.reason, head.density, head.recall,
    head.lost, head.error, row.index_seconds ?? null, row.attention_seconds ?? null, row.dense_seconds ?? null,
  ])));
}

function asCsv() {
  const quote = (value) => (value === null ? "" : /[",\n]/.test(value) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
  return [COLUMNS, ...records()].map((line) => line.map(quote).join(",")).join("\r\n") + "\r\n";
}

function asJson() {
  const heads = records().map((line) => Object.fromEntries(COLUMNS.map((name, i) => [name, line[i]])));
  return JSON.stringify({ provenance: page.runs.map((run) => Object.fromEntries(run.provenance)), heads }, null, 1);
}

// The map of heads and the maps of the chosen head, on one canvas with their names.
function picture() {
  const canvases = [byId("map"), ...document.querySelectorAll("#head canvas")];
  const gap = 24, top = 30;
  const sizes = canvases.map((canvas) => canvas.getBoundingClientRect());
  const made = element("canvas");
  const width = sizes.reduce((sum, box) => sum + box.width + gap, gap);
  const context = sizeCanvas(made, width, Math.max(...sizes.map((box) => box.height)) + top + gap);
  context.fillStyle = color("--page");
  context.fillRect(0, 0, width, 4000);
  context.imageSmoothingEnabled = false;
  context.font = "13px system-ui, sans-serif";
  let x = gap;
  const layer = data.rows[view.row];
  const names = [`${data.name}: ${METRICS[metricNow()]}`, `layer ${layer.label}, head ${view.head}: computed`, "exact attention"];
  canvases.forEach((canvas, i) => {
    context.fillStyle = color("--ink");
    context.fillText(shorten(names[i % 3] ?? "", Math.floor(sizes[i].width / 6)), x, 18);
    context.drawImage(canvas, x, top, sizes[i].width, sizes[i].height);
    x += sizes[i].width + gap;
  });
  return made;
}

function startExport() {
  byId("save-csv").addEventListener("click", () => download("heads.csv", asCsv(), "text/csv"));
  byId("save-json").addEventListener("click", () => download("heads.json", asJson(), "application/json"));
  byId("save-picture").addEventListener("click", () => picture().toBlob((blob) => download("heads.png", blob)));
}
