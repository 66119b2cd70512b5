// Two runs beside each other: the same layers and heads of both.

function startRuns() {
  const choice = byId("run");
  byId("run-choice").hidden = page.runs.length < 2;
  byId("compare").hidden = page.runs.length < 2;
  page.runs.forEach((run, i) => choice.append(element("option", shorten(`${"AB"[i]}: ${run.name}`, 60), { value: i })));
  choice.addEventListener("change", () => {
    view.run = Number(choice.value);
    showRun();
    saveView();
  });
  if (page.runs.length > 1) drawComparison();
}

// Everything again for the run that is chosen.
function showRun() {
  data = page.runs[view.run];
  byId("run").value = view.run;
  byId("find").value = view.find;
  fillFacts();
  search();
  startGraphChoice();
  fillTables();
  for (const redraw of redrawers) redraw();
  showPins();
}

// The other run's maps of the same head, below those of the chosen one.
async function showBeside(place) {
  if (page.runs.length < 2) return;
  const other = page.runs[1 - view.run];
  const layer = other.rows[view.row];
  if (!layer || !layer.measured || !layer.heads[view.head]) return;
  const facts = layer.heads[view.head];
  const title = element("h4", `${"AB"[1 - view.run]}: ${other.name}`);
  const told = element("p", `${facts.pattern || "dense"}: recall ${percent(facts.recall)}, output error ${percent(facts.error)}, density ${percent(facts.density)}`, { class: "hint" });
  const maps = await unpackMaps(layer);
  place.append(title, told, figuresOf(layer, maps, view.head, mapSide()));
}

function drawComparison() {
  const [first, second] = page.runs;
  const per = (run, row) => {
    const found = run.rows[row];
    if (!found) return [null, null, null, null];
    const mean = (name) => {
      const known = found.heads.map((head) => head[name]).filter((v) => typeof v === "number");
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    };
    const seconds = found.measured ? found.index_seconds + found.attention_seconds : null;
    return [mean("density"), mean("lost"), mean("error"), seconds];
  };
  const rows = [];
  for (let i = 0; i < Math.max(first.rows.length, second.rows.length); i++) {
    const a = per(first, i), b = per(second, i);
    const cells = [(first.rows[i] ?? second.rows[i]).label];
    for (let k = 0; k < 4; k++) {
      const say = k < 3 ? percent : (seconds) => (seconds === null ? "-" : duration(seconds));
      cells.push(say(a[k]), say(b[k]));
    }
    rows.push(cells);
  }
  const names = ["density", "lost mass", "output error", "time"].flatMap((name) => [`${name} A`, `${name} B`]);
  fillTable(byId("compare-table"), ["layer", ...names], rows);
  const different = (name) => {
    const other = Object.fromEntries(second.provenance);
    return first.provenance.filter(([key, value]) => key !== "date" && other[key] !== value).map(([key, value]) => [key, `A: ${value} | B: ${other[key] ?? "-"}`]);
  };
  byId("compare-facts").replaceChildren(describe(different()));
}
