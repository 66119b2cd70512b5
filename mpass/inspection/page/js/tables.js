// Time bars, the table of attentions, graph breaks, kernel sources; then everything starts.

function drawBars() {
  const place = document.getElementById("bars");
  place.replaceChildren();
  const parts = Object.entries(data.seconds);
  if (parts.length) place.append(element("h3", "One run"), barChart(parts.filter(([, value]) => value > 0).map(([name, value]) => [name, [value]]), ["--pattern-1"]));
  const layers = data.rows.filter((row) => row.measured && row.index_seconds + row.attention_seconds > 0);
  if (layers.length) {
    place.append(element("h3", "Per layer"), element("span", "■ index estimation", { class: "key", style: "color:var(--pattern-3)" }),
      element("span", "■ attention", { class: "key", style: "color:var(--pattern-1)" }),
      barChart(layers.map((row) => [row.label, [row.index_seconds, row.attention_seconds]]), ["--pattern-3", "--pattern-1"]));
  }
  const passes = data.graphs.flatMap((graph, i) => Object.entries(graph.seconds).map(([name, value]) => [`graph ${i}: ${name}`, [value]]));
  if (passes.length) place.append(element("h3", "Compiler passes"), barChart(passes.slice(0, 40), ["--pattern-6"]));
}

function barChart(rows, colors) {
  const left = 150, width = 620, height = 15;
  const longest = Math.max(...rows.map(([, values]) => values.reduce((a, b) => a + b, 0)), 1e-9);
  const x = d3.scaleLinear([0, longest], [0, width]);
  const svg = d3.create ? d3.create("svg") : d3.select(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  svg.attr("width", left + width + 90).attr("height", rows.length * height + 24);
  rows.forEach(([name, values], i) => {
    let start = 0;
    svg.append("text").attr("x", left - 6).attr("y", i * height + 11).attr("text-anchor", "end").attr("font-size", 11).attr("fill", color("--ink")).text(name);
    values.forEach((value, part) => {
      svg.append("rect").attr("x", left + x(start)).attr("y", i * height + 2).attr("width", x(value)).attr("height", height - 4).attr("fill", color(colors[part]));
      start += value;
    });
    svg.append("text").attr("x", left + x(start) + 5).attr("y", i * height + 11).attr("font-size", 11).attr("fill", color("--soft")).text(duration(start));
  });
  svg.append("g").attr("transform", `translate(${left} ${rows.length * height + 2})`).call(d3.axisBottom(x).ticks(6).tickFormat(duration));
  return svg.node();
}

function duration(seconds) {
  return seconds >= 1 ? `${+seconds.toFixed(2)} s` : seconds >= 1e-3 ? `${+(seconds * 1e3).toFixed(1)} ms` : `${Math.round(seconds * 1e6)} µs`;
}

function startTables() {
  fillTable(
    document.getElementById("site-table"),
    ["graph", "layer", "planned", "ran", "heads", "kv", "dim", "patterns or reason", "source"],
    data.graphs.flatMap((graph, i) => graph.sites.map((site) => [i, site.layer, site.status, site.ran || "-", site.num_heads, site.num_kv_heads, site.head_dim, site.reason || site.patterns, site.source])),
  );
  const breaks = document.getElementById("breaks");
  for (const item of data.breaks) breaks.append(element("p", `graph break: ${item.reason} (${item.source})`, { class: "bad" }));
  const choice = document.getElementById("kernel-choice");
  data.kernels.forEach((kernel, i) => choice.append(element("option", kernel.name, { value: i })));
  if (!data.kernels.length) document.getElementById("kernels").hidden = true;
  else {
    const show = () => {
      const kernel = data.kernels[choice.value || 0];
      document.getElementById("kernel-details").textContent = kernel.details.map(([name, value]) => `${name}: ${value}`).join(", ");
      document.getElementById("kernel").innerHTML = kernel.html; // highlighted and escaped when the page was built
    };
    choice.addEventListener("change", show);
    show();
  }
}

for (const [value, label] of data.tiles) {
  const tile = element("div", undefined, { class: "tile" });
  tile.append(element("b", value), element("span", label));
  document.getElementById("tiles").append(tile);
}
document.getElementById("summary").textContent = data.summary;
startHeads();
startGraphs();
startTables();
redrawers.push(drawBars);
startTheme();
