"use strict";
// Confusion, evaluations and what the runs were made with, as tables.

const FIRST = ["questions", "dataset", "partition", "mode", "n", "closed", "inclusion", "similarity"];
const ERROR = "error_";
const MOST_PAIRS = 12; // shown at first

function perRun(section, runs, make) {
  const parts = runs.flatMap((run) => {
    const found = make(run);
    if (!found) return [];
    return runs.length > 1 ? [el("h3", {}, run.name), ...found] : found;
  });
  section.replaceChildren(...parts);
  return parts.length > 0;
}

function showConfusion(data) {
  const section = document.querySelector("#confusion div");
  const some = perRun(section, data.runs, (run) => {
    const { periods, pairs } = run.confusion;
    if (!pairs.length) return null;
    const label = ([first, last]) => (first === last ? `${first}` : `${first}–${last}`);
    const header = ["true name", "said instead", "times", ...periods.map(label)];
    const row = (pair) => [
      pair.truth,
      pair.said,
      count(pair.total),
      ...pair.shares.map((share) => {
        const style = share ? `background: rgb(213 94 0 / ${Math.min(0.75, share * 1.5).toFixed(2)})` : "";
        return el("span", { className: "heat", style }, share === null ? "" : `${Math.round(100 * share)} %`);
      }),
    ];
    const numeric = (place) => place > 1;
    const rest = pairs.slice(MOST_PAIRS).map(row);
    const hint =
      "Percent of the responses about the true name that say the other one, by steps of the logged groups.";
    return [
      el("p", { className: "hint" }, hint),
      table(header, pairs.slice(0, MOST_PAIRS).map(row), numeric),
      rest.length
        ? el("details", {}, el("summary", {}, plural(rest.length, "more pair")), table(header, rest, numeric))
        : null,
    ].filter(Boolean);
  });
  if (!some) section.textContent = "No logged response says another known name than the true one.";
}

function percent(row, name) {
  const value = Number(row[name]);
  if (!row[name] || !Number.isFinite(value)) return "";
  const [low, high] = [row[`${name}_low`], row[`${name}_high`]].map(Number);
  const range = row[`${name}_low`] ? ` [${low.toFixed(1)}, ${high.toFixed(1)}]` : "";
  return el("span", {}, value.toFixed(1), el("small", {}, range));
}

function evaluationOf({ title, rows }) {
  if (!rows.length) return [];
  const filled = (name) => rows.some((row) => row[name]);
  const isBound = (name) => /_(low|high|error)$/.test(name);
  const names = Object.keys(rows[0]).filter((name) => filled(name) && !isBound(name));
  const scores = names.filter((name) => !name.startsWith(ERROR));
  const columns = [...FIRST.filter((n) => scores.includes(n)), ...scores.filter((n) => !FIRST.includes(n))];
  const isScore = (name) => filled(`${name}_low`) || ["closed", "inclusion", "similarity"].includes(name);
  const cells = (row) => columns.map((name) => (isScore(name) ? percent(row, name) : row[name] ?? ""));
  const kinds = names.filter((name) => name.startsWith(ERROR));
  const errors = kinds.length
    ? [
        el("p", { className: "hint" }, "Kinds of error, % of answers"),
        table(
          ["questions", "mode", ...kinds.map((name) => name.replace(ERROR, "").replaceAll("_", " "))],
          rows.map((row) => [row.questions ?? "", row.mode ?? "", ...kinds.map((name) => percent(row, name))]),
          (place) => place > 1,
        ),
      ]
    : [];
  const numeric = (place) => isScore(columns[place]) || columns[place] === "n";
  return [el("h4", {}, title), table(columns, rows.map(cells), numeric), ...errors];
}

function duringTraining(run) {
  const names = ["eval_seen", "eval_unseen"].filter((name) => run.metrics[name]);
  const places = (run.metrics.step ?? []).map((_, place) => place);
  const rows = places
    .filter((place) => names.some((name) => isNumber(run.metrics[name][place])))
    .map((place) => [
      String(run.metrics.step[place]),
      ...names.map((name) => {
        const value = run.metrics[name][place];
        return isNumber(value) ? (100 * value).toFixed(1) : "";
      }),
    ]);
  if (!rows.length) return [];
  const header = ["after step", ...names.map((name) => name.replace("eval_", ""))];
  return [el("h4", {}, "Held-out photos during training, % named right"), table(header, rows, () => true)];
}

function showEvaluation(data) {
  const section = document.querySelector("#evaluation div");
  const some = perRun(section, data.runs, (run) => {
    const found = [...duringTraining(run), ...run.evaluations.flatMap(evaluationOf)];
    return found.length ? found : null;
  });
  if (!some) section.textContent = "There is none in the run's folder (run.eval_every, or --evaluations).";
}

function optionsOf(run) {
  const rows = Object.entries(run.options).map(([name, value]) => {
    const changed = run.changed.includes(name);
    return [changed ? el("b", {}, name) : name, changed ? el("b", {}, shown(value)) : shown(value)];
  });
  const label = `${plural(rows.length, "option")}, ${count(run.changed.length)} not at their defaults (bold)`;
  return el("details", {}, el("summary", {}, label), table(["option", "value"], rows));
}

function showSetup(data) {
  const section = document.querySelector("#setup div");
  perRun(section, data.runs, (run) => {
    const facts = Object.entries(run.environment).map(([name, value]) => [name, shown(value)]);
    const changed = run.changed.map((name) => [name, shown(run.options[name])]);
    const tables = [
      facts.length ? table(["environment", ""], facts) : null,
      changed.length ? table(["not at its default", "value"], changed) : null,
    ].filter(Boolean);
    return [el("div", { className: "beside" }, ...tables), optionsOf(run)];
  });
  if (data.runs.length > 1) {
    const header = ["differs", ...data.runs.map((run) => run.name)];
    const rows = data.differences.map((row) => [row.name, ...row.values.map(shown)]);
    const differing = rows.length ? table(header, rows) : el("p", {}, "Nothing that is known differs.");
    section.prepend(el("h3", {}, "What differs"), differing);
  }
}
