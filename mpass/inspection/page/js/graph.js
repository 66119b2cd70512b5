// The graph before and after: boxes in execution order, edges that skip boxes as arcs.

const BOX = { width: 240, height: 36, gap: 14 };

function startGraphs() {
  byId("graph-choice").addEventListener("change", drawGraphs);
  startGraphChoice();
}

function startGraphChoice() {
  const choice = byId("graph-choice");
  choice.replaceChildren(...data.graphs.map((graph, i) => {
    const count = graph.sites.length;
    return element("option", `${i}: ${count} attention${count === 1 ? "" : "s"}`, { value: i });
  }));
  byId("graphs").hidden = !data.graphs.length;
  if (data.graphs.length) drawGraphs();
}

function drawGraphs() {
  const graph = data.graphs[document.getElementById("graph-choice").value || 0];
  drawGraph("#graph-before", graph.before, graph, false);
  drawGraph("#graph-after", graph.after, graph, true);
  fillTable(document.getElementById("ops"), ["call", "before", "after"], graph.ops);
  if (graph.sites.length) showSite(graph, 0);
}

function drawGraph(selector, outline, graph, after) {
  const svg = d3.select(selector);
  svg.selectAll("*").remove();
  const view = svg.append("g");
  const place = (i) => i * (BOX.height + BOX.gap);
  view.selectAll(".edge").data(outline.edges).join("path")
    .attr("class", ([from, to]) => (to - from > 1 ? "edge far" : "edge"))
    .attr("d", ([from, to]) => {
      const start = place(from) + BOX.height;
      const end = place(to);
      if (to - from === 1) return `M ${BOX.width / 2} ${start} V ${end}`;
      const bend = BOX.width + Math.min(120, 14 * (to - from));
      return `M ${BOX.width} ${start - BOX.height / 2} C ${bend} ${start} ${bend} ${end} ${BOX.width} ${end + BOX.height / 2}`;
    });
  // Sites keep their order, also where sparse and dense ones are mixed.
  let attention = 0;
  const boxes = outline.boxes.map((box, i) => ({ ...box, y: place(i), site: box.kind === "attention" ? attention++ : -1 }));
  const groups = view.selectAll(".box").data(boxes).join("g")
    .attr("class", (box) => `box ${box.kind}${after && box.kind === "attention" && box.label.startsWith("minference") ? " sparse" : ""}`)
    .attr("transform", (box) => `translate(0 ${box.y})`)
    .on("mousemove", (event, box) => showTip(event, [box.label, box.text].filter(Boolean).join("\n")))
    .on("mouseleave", (event) => showTip(event, ""))
    .on("click", (event, box) => {
      if (box.site >= 0) showSite(graph, box.site);
    })
    .on("keydown", (event, box) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      if (box.site >= 0) showSite(graph, box.site);
    });
  groups.filter((box) => box.site >= 0).attr("tabindex", 0).attr("role", "button")
    .attr("aria-label", (box) => `${boxTitle(box)}: show its source and proof`);
  groups.append("rect").attr("width", BOX.width).attr("height", BOX.height).attr("rx", 5);
  groups.append("text").attr("x", 8).attr("y", 15).text((box) => shorten(boxTitle(box), 36));
  groups.append("text").attr("class", "small").attr("x", 8).attr("y", 28).text((box) => shorten(box.text, 44));
  const zoom = d3.zoom().scaleExtent([0.05, 4]).on("zoom", (event) => view.attr("transform", event.transform));
  svg.call(zoom).call(zoom.transform, d3.zoomIdentity.translate(20, 20));
}

function boxTitle(box) {
  if (box.kind !== "attention") return box.label || "between layers";
  return box.layer >= 0 ? `layer ${box.layer}: ${box.label}` : box.label;
}

function shorten(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

function showSite(graph, number) {
  const site = graph.sites[number];
  if (!site) return;
  for (const selector of ["#graph-before", "#graph-after"]) {
    d3.select(selector).selectAll(".box").classed("chosen", (box) => box.site === number);
  }
  const proof = element("ul");
  for (const line of site.proof) proof.append(element("li", line));
  document.getElementById("site").replaceChildren(
    element("h3", site.path || `attention ${number}`),
    describe([
      ["planned", site.status], ["ran", site.ran], ["reason", site.reason], ["source", site.source], ["spelling", site.spelling],
      ["query", site.query], ["key", site.key], ["value", site.value], ["scale", String(site.scale)],
      ["patterns", site.patterns], ["patterns from", site.origin], ["mask", site.mask],
      ["predicted cost", site.predicted], ["density", site.density],
    ]),
    element("h4", "Proof of the mask"), proof,
  );
}
