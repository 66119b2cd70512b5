// What the reader looks at, in the address: a link or a reload shows the same view.

const view = { run: 0, row: 0, head: 0, metric: "", query: -1, theme: "", pins: [], find: "" };
let written = "";

function readView() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of ["run", "row", "head", "query"]) {
    const number = Number.parseInt(given.get(name), 10);
    if (Number.isInteger(number) && number >= 0) view[name] = number;
  }
  for (const name of ["metric", "theme", "find"]) view[name] = given.get(name) ?? view[name];
  const pins = (given.get("pins") ?? "").split(",").map((pin) => pin.split(".").map(Number));
  view.pins = pins.filter(([row, head]) => data.rows[row] && data.rows[row].heads[head]);
  view.run = Math.min(view.run, page.runs.length - 1);
}

function saveView() {
  const kept = new URLSearchParams();
  if (view.run) kept.set("run", view.run);
  kept.set("row", view.row);
  kept.set("head", view.head);
  if (view.metric) kept.set("metric", view.metric);
  if (view.query >= 0) kept.set("query", view.query);
  if (view.theme) kept.set("theme", view.theme);
  if (view.find) kept.set("find", view.find);
  if (view.pins.length) kept.set("pins", view.pins.map((pin) => pin.join(".")).join(","));
  written = `#${kept}`;
  if (location.hash !== written) history.replaceState(null, "", written);
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  for (const redraw of redrawers) redraw();
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme(view.theme || system);
  byId("theme").addEventListener("click", () => {
    view.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    setTheme(view.theme);
    saveView();
  });
}

// Links to sections leave the view in the address alone; sections without content have none.
function showLinks() {
  for (const link of document.querySelectorAll("nav a")) link.hidden = document.querySelector(link.getAttribute("href")).hidden;
}

function startLinks() {
  for (const link of document.querySelectorAll("nav a")) {
    const section = document.querySelector(link.getAttribute("href"));
    link.addEventListener("click", (event) => {
      event.preventDefault();
      section.scrollIntoView();
      section.querySelector("h2").focus();
    });
  }
  window.addEventListener("hashchange", () => {
    if (location.hash === written) return;
    readView();
    showRun();
  });
}
