"use strict";
// The page as a whole: runs at the top, light and dark, and news of a run that goes on.

const NEWS_MS = 10000;
const data = JSON.parse(byId("data").textContent);

// First and last value of a metric, each a mean over some steps.
function fromTo(run, name) {
  const values = (run.metrics[name] ?? []).filter(isNumber);
  if (!values.length) return null;
  const some = Math.min(5, Math.ceil(values.length / 2));
  const mean = (part) => part.reduce((sum, value) => sum + value, 0) / part.length;
  return `${number(mean(values.slice(0, some)))} → ${number(mean(values.slice(-some)))}`;
}

function showRuns() {
  const facts = [["reward", "reward"], ["accuracy", "accuracy"], ["cross_entropy", "cross entropy"]];
  const cards = data.runs.map((run, place) => {
    const figures = facts
      .map(([name, label]) => [label, fromTo(run, name)])
      .filter(([, value]) => value)
      .map(([label, value]) => el("span", {}, el("small", {}, label), value));
    const style = data.runs.length > 1 ? `border-left-color: ${colourOf(place)}` : "";
    return el(
      "div",
      { className: "run", style },
      el("b", {}, run.name),
      el("span", {}, run.state),
      ...figures,
      ...run.problems.map((text) => el("span", { className: "problem" }, text)),
    );
  });
  const lost = data.lost_photos ? [el("p", { className: "problem" }, data.lost_photos)] : [];
  const models = new Set(data.runs.map((run) => run.options["model.path"]));
  const apart =
    models.size > 1
      ? [el("p", { className: "problem" }, "These runs began from different models: see Setup.")]
      : [];
  byId("runs").replaceChildren(...cards, ...apart, ...lost);
  byId("made").textContent = `${data.live ? "live, " : ""}${data.made}`;
}

const before = {};

// Whether a part of the page shows something else than before: what is open there stays open.
function changed(part, ...names) {
  const text = JSON.stringify(data.runs.map((run) => names.map((name) => run[name])));
  if (before[part] === text) return false;
  before[part] = text;
  return true;
}

function showAll() {
  showRuns();
  showCurves(data);
  showGroups(data);
  if (changed("confusion", "confusion")) showConfusion(data);
  if (changed("evaluation", "evaluations", "metrics")) showEvaluation(data);
  if (changed("setup", "options", "environment")) showSetup(data);
}

async function news() {
  try {
    const reply = await fetch("data.json", { cache: "no-store" });
    if (reply.ok) {
      Object.assign(data, await reply.json());
      showAll();
    }
  } catch {
    byId("made").textContent = "the report's server does not answer";
  }
  setTimeout(news, NEWS_MS);
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = getComputedStyle(root).getPropertyValue("color-scheme").trim();
  const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.style.colorScheme = (dark === "light dark" ? system : dark) === "dark" ? "light" : "dark";
  redrawCurves();
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCurves);
byId("smooth").addEventListener("input", () => showCurves(data));
byId("more").addEventListener("click", moreCards);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("input", (event) => {
  if (data.live && ["run", "step"].includes(event.target.name)) fetchStep();
  else filterGroups();
});
showAll();
if (data.live) setTimeout(news, NEWS_MS);
