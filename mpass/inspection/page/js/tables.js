// Time bars, the table of attentions, graph breaks, kernel sources; then everything starts.

function drawBars() {
  const place = byId("bars");
  place.replaceChildren();
  const parts = Object.entries(data.seconds);
  if (parts.length) place.append(element("h3", "One run"), barChart(parts.filter(([, value]) => value > 0).map(([name, value]) => [name, [value]]), ["--pattern-1"], "Seconds of one run by part"));
  const layers = data.rows.filter((row) => row.measured && row.index_seconds + row.attention_seconds > 0);
  if (layers.length) {
    place.append(element("h3", "Per layer"), element("span", "■ index estimation", { class: "key", style: "color:var(--pattern-3)" }),
      element("span", "■ attention", { class: "key", style: "color:var(--pattern-1)" }),
      element("span", "| dense attention on the same inputs, alone", { class: "key", style: "color:var(--mark)" }),
      barChart(layers.map((row) => [row.label, [row.index_seconds, row.attention_seconds], row.dense_seconds]), ["--pattern-3", "--pattern-1"], "Seconds per layer, sparse and dense"));
  }
  const passes = data.graphs.flatMap((graph, i) => Object.entries(graph.seconds).map(([name, value]) => [`graph ${i}: ${name}`, [value]]));
  if (passes.length) place.append(element("h3", "Compiler passes"), barChart(passes.slice(0, 40), ["--pattern-6"], "Seconds of compiler passes"));
  byId("times").hidden = !place.childElementCount;
}

// rows: name, values that stand after each other, and a mark to compare them with.
function barChart(rows, colors, label) {
  const whole = roomFor(860), narrow = whole < 600;
  const left = narrow ? 84 : 150, width = whole - left - 70, height = 15;
  const total = (values) => values.reduce((a, b) => a + b, 0);
  const longest = Math.max(...rows.map(([, values, mark]) => Math.max(total(values), mark ?? 0)), 1e-9);
  const x = d3.scaleLinear([0, longest], [0, width]);
  const svg = d3.select(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  const said = rows.slice(0, 40).map(([name, values]) => `${name} ${duration(total(values))}`).join(", ");
  svg.attr("width", whole).attr("height", rows.length * height + 24).attr("role", "img").attr("aria-label", `${label}: ${said}`);
  rows.forEach(([name, values, mark], i) => {
    let start = 0;
    svg.append("text").attr("x", left - 6).attr("y", i * height + 11).attr("text-anchor", "end").attr("font-size", 11).attr("fill", color("--ink")).text(narrow ? shorten(name, 13) : name);
    values.forEach((value, part) => {
      svg.append("rect").attr("x", left + x(start)).attr("y", i * height + 2).attr("width", x(value)).attr("height", height - 4).attr("fill", color(colors[part]));
      start += value;
    });
    if (mark) svg.append("rect").attr("class", "dense-mark").attr("x", left + x(mark) - 1).attr("y", i * height).attr("width", 2).attr("height", height).attr("fill", color("--mark"));
    svg.append("text").attr("x", left + x(Math.max(start, mark ?? 0)) + 5).attr("y", i * height + 11).attr("font-size", 11).attr("fill", color("--soft")).text(mark ? `${duration(start)}, ${(mark / start).toFixed(1)}x` : duration(start));
  });
  svg.append("g").attr("transform", `translate(${left} ${rows.length * height + 2})`).call(d3.axisBottom(x).ticks(narrow ? 3 : 6).tickFormat(duration));
  return svg.node();
}

function duration(seconds) {
  return seconds >= 1 ? `${+seconds.toFixed(2)} s` : seconds >= 1e-3 ? `${+(seconds * 1e3).toFixed(1)} ms` : `${Math.round(seconds * 1e6)} µs`;
}

function startTables() {
  byId("kernel-choice").addEventListener("change", showKernel);
  fillTables();
}

function fillTables() {
  const heading = ["layer", "planned", "ran", "density", "lost mass", "output error", "sparse time", "dense time", "times dense"];
  fillTable(byId("layer-table"), heading, data.rows.map((row) => {
    if (!row.measured) return [row.label, row.status, row.lowering || "-", "-", "-", "-", "-", "-", "-"];
    const ours = row.index_seconds + row.attention_seconds;
    const timed = row.dense_seconds > 0 && ours > 0;
    const plan = (planned, ran) => (row.ran_because ? `${percent(ran)}, planned ${percent(planned)}` : percent(planned));
    return [row.label, row.status, row.ran_because ? `dense: ${row.ran_because}` : row.lowering, plan(row.planned.density, row.ran.density),
      plan(1 - row.planned.recall, 1 - row.ran.recall), row.error === null ? "-" : plan(row.error, 0),
      ours ? duration(ours) : "-", row.dense_seconds ? duration(row.dense_seconds) : "-", timed ? `${(row.dense_seconds / ours).toFixed(2)}x` : "-"];
  }));
  fillTable(
    byId("site-table"),
    ["graph", "layer", "planned", "ran", "heads", "kv", "dim", "patterns or reason", "source"],
    data.graphs.flatMap((graph, i) => graph.sites.map((site) => [i, site.layer, site.status, site.ran || "-", site.num_heads, site.num_kv_heads, site.head_dim, site.reason || site.patterns, shortPath(site.source)])),
  );
  byId("breaks").replaceChildren(...data.breaks.map((item) => element("p", `graph break: ${item.reason} (${item.source})`, { class: "bad" })));
  byId("sites").hidden = !data.graphs.length && !data.breaks.length;
  byId("layers").hidden = !data.profiled;
  byId("kernel-choice").replaceChildren(...page.kernels.map((kernel, i) => element("option", kernel.name, { value: i })));
  byId("kernels").hidden = !page.kernels.length;
  showKernel();
}

function showKernel() {
  const kernel = page.kernels[byId("kernel-choice").value || 0];
  if (!kernel) return;
  byId("kernel-details").textContent = kernel.details.map(([name, value]) => `${name}: ${value}`).join(", ");
  byId("kernel").innerHTML = kernel.html; // highlighted and escaped when the page was built
}
