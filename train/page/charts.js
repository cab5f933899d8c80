"use strict";
// Curves: a Plotly figure for each panel, drawn when it comes into view.

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c"];
const DASHES = {
  solid: "",
  dash: "7 4",
  dot: "2 3",
  dashdot: "7 3 2 3",
  longdash: "12 4",
  longdashdot: "12 3 2 3",
}; // names of Plotly's, and how the legend draws them
const FEW_STEPS = 12; // up to so many are markers too
const drawn = new Set();
const figures = new Map(); // title -> {plot, legend, hidden, make}

function colourOf(place) {
  return COLOURS[place % COLOURS.length];
}

// The mean over the values up to `half` places away; values that are missing do not count.
function runningMean(values, half) {
  return values.map((value, place) => {
    if (!isNumber(value)) return null;
    const near = values.slice(Math.max(0, place - half), place + half + 1).filter(isNumber);
    return near.reduce((sum, one) => sum + one, 0) / near.length;
  });
}

// With several runs the colour tells the run and the dash the metric; else the colour the metric.
function tracesOf(panel, runs, half) {
  const several = runs.length > 1;
  const traces = [];
  runs.forEach((run, runPlace) => {
    panel.series.forEach((series, place) => {
      const y = run.metrics[series.name];
      if (!y || !y.some(isNumber)) return;
      const colour = colourOf(several ? runPlace : place);
      const sparse = y.filter(isNumber).length <= FEW_STEPS;
      const trace = {
        x: run.metrics.step,
        y,
        name: several ? `${run.name}: ${series.label}` : series.label,
        meta: series.name,
        label: series.label,
        mode: sparse ? "lines+markers" : "lines",
        connectgaps: true,
        line: { color: colour, width: 1.6, dash: several ? Object.keys(DASHES)[place % 6] : "solid" },
        hovertemplate: "%{y:.4~g}",
        yaxis: series.right ? "y2" : "y",
      };
      if (!half) {
        traces.push(trace);
        return;
      }
      const mean = { ...trace, y: runningMean(y, half), mode: "lines" };
      traces.push({ ...trace, opacity: 0.25, hoverinfo: "skip" }, mean);
    });
  });
  return traces;
}

function secondsOf(run) {
  return run.phases.map((name, place) => ({
    x: run.metrics.step,
    y: run.metrics[name].map((value) => value ?? 0),
    name: name.replace("seconds_", ""),
    meta: name,
    label: name.replace("seconds_", ""),
    stackgroup: "seconds",
    line: { width: 0.5, color: colourOf(place) },
    hovertemplate: "%{y:.3~g} s",
  }));
}

const COARSE = window.matchMedia("(pointer: coarse)").matches;

// What a colour of the style sheet is now, in light or in dark.
function themed(name) {
  const probe = el("span", { style: `color: var(${name})` });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function layoutOf(panel, traces) {
  const [text, grid, paper] = ["--text", "--line", "--card"].map(themed);
  const axis = {
    gridcolor: grid,
    zerolinecolor: grid,
    linecolor: grid,
    nticks: 6,
    exponentformat: "e",
  };
  const right = traces.some((trace) => trace.yaxis === "y2" && trace.visible);
  const positive = traces.every(({ y }) => y.every((value) => !(value < 0)));
  const rangemode = panel.seconds ? "tozero" : positive ? "nonnegative" : "normal";
  return {
    height: COARSE ? 230 : 260,
    margin: { l: 52, r: right ? 60 : 14, t: COARSE ? 8 : 28, b: 28 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, size: 11, family: "system-ui, sans-serif" },
    hovermode: "x unified",
    hoverlabel: { bgcolor: paper, bordercolor: grid, font: { color: text } },
    // A finger on a chart scrolls the page.
    dragmode: COARSE ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: themed("--soft"), activecolor: text },
    showlegend: false,
    xaxis: { ...axis, tickformat: "d", hoverformat: "d", unifiedhovertitle: { text: "step %{x}" } },
    yaxis: { ...axis, rangemode },
    ...(right ? { yaxis2: rightAxis(axis, panel.right) } : {}),
    uirevision: "kept", // zoom outlives new data
  };
}

function rightAxis(axis, text) {
  const own = { overlaying: "y", side: "right", showgrid: false, tickmode: "auto" };
  return { ...axis, ...own, title: { text } };
}

const CONFIG = {
  displaylogo: false,
  displayModeBar: COARSE ? false : "hover",
  responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

function sampleOf(colour, dash) {
  const [picture, line] = ["svg", "line"].map((tag) =>
    document.createElementNS("http://www.w3.org/2000/svg", tag),
  );
  for (const [name, value] of Object.entries({ x2: 28, y1: 5, y2: 5, "stroke-width": 2.5 })) {
    line.setAttribute(name, value);
  }
  line.setAttribute("stroke", colour);
  line.setAttribute("stroke-dasharray", DASHES[dash]);
  picture.append(line);
  return picture;
}

// A button for each curve; with several runs for all runs' curves of a metric, whose dash it shows.
function legendOf(title, traces, hidden) {
  const first = new Map();
  for (const trace of traces) if (!first.has(trace.meta)) first.set(trace.meta, trace);
  return [...first.values()].map((trace) => {
    const several = trace.name !== trace.label;
    const colour = several ? "currentColor" : trace.line.color;
    const pressed = String(!hidden.has(trace.meta));
    const shown = [sampleOf(colour, trace.line.dash ?? "solid"), trace.label];
    const button = el("button", { type: "button", "aria-pressed": pressed }, ...shown);
    button.addEventListener("click", () => {
      if (!hidden.delete(trace.meta)) hidden.add(trace.meta);
      draw(title);
    });
    return button;
  });
}

function draw(title) {
  const { plot, legend, hidden, make } = figures.get(title);
  const { traces, panel } = make();
  drawn.add(title);
  legend.replaceChildren(...legendOf(title, traces, hidden));
  for (const trace of traces) trace.visible = !hidden.has(trace.meta);
  return Plotly.react(plot, traces, layoutOf(panel, traces), CONFIG);
}

const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const title = entry.target.dataset.title;
      if (entry.isIntersecting && !drawn.has(title)) draw(title);
    }
  },
  { rootMargin: "200px" },
);

function addFigure(title, meanings, make) {
  if (!figures.has(title)) {
    const plot = el("div", { className: "plot", "data-title": title });
    const terms = meanings.flatMap(({ label, meaning }) => [
      el("dt", {}, label),
      el("dd", {}, meaning),
    ]);
    const more = el("details", {}, el("summary", {}, "what this is"), el("dl", {}, ...terms));
    const legend = el("div", { className: "legend" });
    const caption = el("figcaption", {}, title);
    byId("panels").append(el("figure", {}, caption, plot, legend, terms.length ? more : null));
    figures.set(title, { plot, legend, hidden: new Set() });
    seen.observe(plot);
  }
  figures.get(title).make = make;
  if (drawn.has(title)) draw(title);
}

function showCurves(data) {
  const half = Number(byId("smooth").value);
  byId("window").textContent = half ? `${2 * half + 1} steps` : "off";
  for (const panel of data.panels) {
    addFigure(panel.title, panel.series, () => ({
      traces: tracesOf(panel, data.runs, half),
      panel,
    }));
  }
  for (const run of data.runs.filter((one) => one.phases.length)) {
    const title = data.runs.length > 1 ? `Seconds a step: ${run.name}` : "Seconds a step";
    const panel = { title, right: "", seconds: true };
    addFigure(title, [], () => ({ traces: secondsOf(run), panel }));
  }
  if (!figures.size) byId("panels").textContent = "No step has been finished yet.";
}

function redrawCurves() {
  for (const title of drawn) draw(title);
}
