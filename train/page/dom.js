"use strict";
// Elements and numbers. Texts go in as text nodes, never as HTML.

function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style" || name.startsWith("aria-") || name.startsWith("data-")) {
      made.setAttribute(name, value);
    } else {
      made[name] = value;
    }
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function number(value, digits = 3) {
  if (!isNumber(value)) return "–";
  return Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(1)
    : String(Number(value.toFixed(digits)));
}

function count(value) {
  return value.toLocaleString("en");
}

function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "string" ? value || '""' : JSON.stringify(value);
}

// A table that scrolls sideways on a narrow screen; cells are texts or elements.
function table(header, rows, numeric = () => false) {
  const cell = (tag) => (value, place) =>
    el(tag, { className: numeric(place) ? "number" : "" }, value);
  return el(
    "div",
    { className: "scroll" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...header.map(cell("th")))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td"))))),
    ),
  );
}
