// Everything starts.

function fillFacts() {
  byId("tiles").replaceChildren(...data.tiles.map(([value, label]) => {
    const tile = element("div", undefined, { class: "tile" });
    tile.append(element("b", value), element("span", label));
    return tile;
  }));
  byId("summary").textContent = data.summary;
  const known = Object.fromEntries(data.provenance);
  const short = ["model", "prompt", "options", "dtype", "date"].map((name) => known[name]).filter(Boolean);
  byId("provenance-short").textContent = `What was run: ${short.join(", ")}`;
  byId("provenance").replaceChildren(describe(data.provenance));
  byId("provenance-box").hidden = !data.provenance.length;
}

readView();
data = page.runs[view.run];
fillFacts();
startHeads();
startLooks();
startPins();
startExport();
startGraphs();
startTables();
startRuns();
startLinks();
redrawers.push(drawBars, showLinks);
byId("find").value = view.find;
byId("run").value = view.run;
search();
startTheme();
showPins();
let room = document.documentElement.clientWidth;
window.addEventListener("resize", () => {
  if (room === document.documentElement.clientWidth) return;
  room = document.documentElement.clientWidth;
  for (const redraw of redrawers) redraw();
});
