"use strict";
// The browser of groups: filters, photos, responses, tokens shaded by what is known of them.

const PAGE = 5; // cards that are added at once
const ROLES = ["anchor", "positive", "negative"];
const SHADES = {
  photo: {
    label: "where the photo matters",
    full: 3,
    value: (r, k) => difference(r, "logprobs", "neg_logprobs", k),
    meaning: "log π − log π_neg: blue tokens are likelier on the update's photo, orange ones on the negative",
  },
  advantage: {
    label: "advantage",
    full: 2,
    value: (r) => r.advantage,
    meaning: "the response's advantage: blue is made likelier, orange less likely",
  },
  mismatch: {
    label: "sampler against trainer",
    full: 0.2,
    value: (r, k, run) =>
      r.role === "anchor" || run.options["loss.update_on"] === "own"
        ? difference(r, "old_logprobs", "rollout_logprobs", k)
        : null,
    meaning: "the trainer's log-prob − the sampler's, where both are on the photo sampled on",
  },
  none: { label: "nothing", full: 1, value: () => null, meaning: "" },
};
const STATES = {
  "": ["all groups", () => true],
  mixed: ["right and wrong answers", (g) => g.right > 0 && g.right < g.responses.length],
  solved: ["solved: all right", (g) => g.right === g.responses.length],
  wrong: ["all wrong", (g) => g.right === 0],
  lost: ["lost: all wrong, once right", (g) => g.lost],
  several: ["several answers in one", (g) => g.responses.some((r) => r.said.length > 1)],
  cut: ["cut off", (g) => g.responses.some((r) => r.finish === "length")],
  dropped: ["dropped", (g) => !g.kept],
};
const browser = { data: null, groups: [], found: [], visible: PAGE, asked: 0 };

// float16, little-endian, in base64
function floats(text) {
  const raw = atob(text);
  const found = new Float32Array(raw.length / 2);
  for (let k = 0; k < found.length; k++) {
    const bits = raw.charCodeAt(2 * k) | (raw.charCodeAt(2 * k + 1) << 8);
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    found[k] = exponent === 31 ? NaN : bits >> 15 ? -size : size;
  }
  return found;
}

function rowsOf(response, name) {
  response.rows ??= {};
  response.rows[name] ??= response[name] ? floats(response[name]) : [];
  return response.rows[name];
}

function difference(response, one, other, place) {
  const value = rowsOf(response, one)[place] - rowsOf(response, other)[place];
  return Number.isFinite(value) ? value : null;
}

function prepare(groups) {
  const lost = browser.data.runs.map((run) => new Set(run.lost.map(([s, id]) => `${s}/${id}`)));
  for (const group of groups) {
    const marks = group.responses.map((r) => r.correct);
    group.right = marks.includes(null) ? null : marks.filter(Boolean).length;
    group.lost = lost[group.run].has(`${group.step}/${group.id}`);
  }
  return groups.sort((a, b) => b.step - a.step || a.run - b.run || (a.id < b.id ? -1 : 1));
}

function choice(name, label, options) {
  const chosen = byId("filters").elements[name]?.value;
  const made = options.map(([value, text]) => el("option", { value }, text));
  const select = el("select", { name }, ...made);
  if (chosen !== undefined && options.some(([value]) => value === chosen)) select.value = chosen;
  return el("label", {}, label, select);
}

function showGroups(data) {
  browser.data = data;
  if (!data.live) browser.groups = prepare(data.groups);
  const supers = new Set(browser.groups.map((g) => g.super));
  const stepsOf = data.runs.flatMap((run) => run.group_steps);
  const shownSteps = data.live ? stepsOf : browser.groups.map((g) => g.step);
  const steps = [...new Set(shownSteps)].sort((a, b) => b - a).map((s) => [String(s), String(s)]);
  if (!data.live) steps.unshift(["", "all shown"]);
  const text = byId("filters").elements.text?.value ?? "";
  const runs = data.runs.map((run, place) => [String(place), run.name]);
  if (!data.live) runs.unshift(["", "all"]);
  const choices = [
    data.runs.length > 1 ? choice("run", "run", runs) : null,
    choice("step", "step", steps),
    supers.size > 1
      ? choice("super", "super-category", [["", "all"], ...[...supers].sort().map((s) => [s, s])])
      : null,
    choice("state", "groups", Object.entries(STATES).map(([value, [label]]) => [value, label])),
    choice("shade", "shade tokens by", Object.entries(SHADES).map(([v, { label }]) => [v, label])),
    el("label", {}, "text", el("input", { name: "text", type: "search", value: text })),
  ];
  byId("filters").replaceChildren(...choices.filter(Boolean));
  if (!stepsOf.length) {
    byId("filters").replaceChildren();
    byId("count").textContent = "No groups were logged.";
    return;
  }
  if (data.live) fetchStep();
  else filterGroups();
}

function filterGroups() {
  const value = (name) => byId("filters").elements[name]?.value ?? "";
  const wanted = value("text").toLowerCase();
  const holds = (text) => text.toLowerCase().includes(wanted);
  browser.found = browser.groups.filter(
    (group) =>
      (browser.data.live || !value("run") || group.run === Number(value("run"))) &&
      (!value("step") || group.step === Number(value("step"))) &&
      (!value("super") || group.super === value("super")) &&
      STATES[value("state")][1](group) &&
      (!wanted ||
        holds(group.question) ||
        Object.values(group.names).some(holds) ||
        group.responses.some((r) => holds(r.text))),
  );
  browser.visible = PAGE;
  showCards();
}

function showCards() {
  const logged = browser.data.runs.reduce((sum, run) => sum + run.groups_logged, 0);
  const here = browser.data.live ? "in this step" : "in this page";
  byId("count").textContent =
    `${plural(browser.found.length, "group")} of ${count(browser.groups.length)} ${here}; ` +
    `${count(logged)} were logged.`;
  const shade = SHADES[byId("filters").elements.shade.value];
  byId("shading").replaceChildren(
    ...(shade.meaning
      ? [
          el("span", { className: "scale" }),
          el("span", {}, `−${shade.full} to +${shade.full}: ${shade.meaning}`),
        ]
      : []),
  );
  byId("cards").replaceChildren(...browser.found.slice(0, browser.visible).map(card));
  byId("more").hidden = browser.found.length <= browser.visible;
}

function moreCards() {
  const next = browser.found.slice(browser.visible, browser.visible + PAGE);
  browser.visible += PAGE;
  byId("cards").append(...next.map(card));
  byId("more").hidden = browser.found.length <= browser.visible;
}

async function fetchStep() {
  const fields = byId("filters").elements;
  const [run, ticket] = [fields.run?.value ?? "0", ++browser.asked];
  let groups = [];
  try {
    const reply = await fetch(`groups/${run}/${fields.step.value}`, { cache: "no-store" });
    groups = reply.ok ? await reply.json() : [];
  } catch {
    byId("count").textContent = "The report's server does not answer any more.";
    return;
  }
  if (ticket !== browser.asked) return;
  const same = (g) => g.map((one) => `${one.run} ${one.step} ${one.id}`).join();
  const fresh = prepare(groups);
  if (browser.groups.length && same(fresh) === same(browser.groups)) return;
  browser.groups = fresh;
  filterGroups();
}

function photo(group, role) {
  const key = group.photos[role];
  const source = browser.data.live ? `photo/${key}` : browser.data.photos[key];
  const name = group.names[role];
  const gone = () => el("div", { className: "gone" }, "photo not there");
  const image = source ? el("img", { src: source, alt: `${role}: ${name}` }) : gone();
  image.addEventListener("error", () => image.replaceWith(gone()));
  const label = name || "name not known";
  return el("figure", {}, image, el("figcaption", {}, el("small", {}, role), label));
}

function card(group) {
  const run = browser.data.runs[group.run];
  const size = group.responses.length;
  const rewards = group.responses.reduce((sum, r) => sum + r.reward, 0) / size;
  const facts = [
    browser.data.runs.length > 1 ? run.name : null,
    `step ${group.step}`,
    group.super || null,
    group.right === null ? null : `${group.right} of ${size} right`,
    `mean reward ${number(rewards)}`,
  ].filter(Boolean);
  const badge = (text, kind) => el("span", { className: `badge ${kind}` }, text);
  return el(
    "article",
    {},
    el(
      "h3",
      {},
      facts.join(" · "),
      badge(group.kept ? "kept" : "dropped", group.kept ? "good" : "bad"),
      group.why && group.why !== "passed" ? badge(group.why, "") : null,
      group.lost ? badge("lost", "bad") : null,
    ),
    el("div", { className: "photos" }, ...ROLES.map((role) => photo(group, role))),
    el("p", { className: "question" }, group.question),
    ...group.responses.map((response) => responseOf(response, group, run)),
  );
}

function responseOf(response, group, run) {
  const [mark, kind] =
    response.correct === null ? ["○", ""] : response.correct ? ["✓ right", "good"] : ["✗ wrong", "bad"];
  const facts = [
    `on the ${response.role}`,
    `reward ${number(response.reward)}`,
    response.advantage === null ? "no advantage" : `advantage ${number(response.advantage, 2)}`,
    plural(response.tokens.length, "token"),
    response.finish === "length" ? "cut off" : null,
    response.said.length ? `said ${response.said.join(", ")}` : "no known name",
  ].filter(Boolean);
  const parts = Object.entries(response.metrics).map(([name, value]) => `${name} ${number(value)}`);
  return el(
    "div",
    { className: "response" },
    el(
      "p",
      { className: "facts", title: parts.join(", ") },
      el("b", { className: kind }, mark),
      ` ${facts.join(" · ")}`,
    ),
    el("p", { className: "text" }, ...tokensOf(response, run)),
  );
}

function tokensOf(response, run) {
  const shade = SHADES[byId("filters").elements.shade.value];
  if (!response.tokens.length) return ["(empty)"];
  return response.tokens.map((token, place) => {
    const value = shade.value(response, place, run);
    const strength = value === null ? 0 : Math.min(1, Math.abs(value) / shade.full);
    const colour = value > 0 ? "0 114 178" : "213 94 0";
    const style = strength > 0.02 ? `background: rgb(${colour} / ${(0.6 * strength).toFixed(2)})` : "";
    return el("span", { style, "data-place": String(place), onclick: () => tell(response, place) }, token);
  });
}

// What is known of one token, at the foot of the screen.
function tell(response, place) {
  const value = (name) => number(rowsOf(response, name)[place], 2);
  const line = byId("token");
  line.hidden = false;
  line.textContent =
    `${JSON.stringify(response.tokens[place])}  log π ${value("logprobs")} · ` +
    `on the negative ${value("neg_logprobs")} · at the step's start ${value("old_logprobs")} · ` +
    `sampler ${value("rollout_logprobs")}`;
}
