"use strict";
// What every part of the page uses. Text from the data only ever becomes text nodes, never HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const MARKS = 8;
const hidden = new Set(); // labels of the arms switched off, in all charts alike
const redraws = [];
const redraw = () => redraws.forEach((draw) => draw());

const byId = (id) => document.getElementById(id);
const SVG = document.querySelector("svg").namespaceURI;

function make(parent, name, attributes = {}, text = null) {
  const isSvg = parent.namespaceURI === SVG || name === "svg";
  const node = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

const colour = (index) => index % MARKS;
const shape = (index) => (index + Math.floor(index / MARKS)) % MARKS;

function mark(parent, index) {
  const svg = make(parent, "svg", { class: `mark c${colour(index)}`, viewBox: "-8 -8 16 16", "aria-hidden": "true" });
  make(svg, "use", { href: `#mark-${shape(index)}`, x: -8, y: -8, width: 16, height: 16 });
}

// The controls above a chart; each says what it changes, and the charts are drawn again.

function checkbox(parent, label, change, checked = true) {
  const wrap = make(parent, "label");
  const box = make(wrap, "input", { type: "checkbox" });
  box.checked = checked;
  wrap.append(label);
  box.addEventListener("change", () => { change(box.checked); redraw(); });
}

function choice(parent, label, options, change) {
  if (options.length < 2) return;
  const wrap = make(parent, "label", {}, `${label} `);
  const select = make(wrap, "select");
  options.forEach((option, i) => make(select, "option", { value: i }, option));
  select.addEventListener("change", () => { change(Number(select.value)); redraw(); });
}

function segments(parent, label, options, start, change) {
  const group = make(parent, "div", { class: "segments", role: "group", "aria-label": label });
  const buttons = options.map((option, i) => {
    const button = make(group, "button", { type: "button", "aria-pressed": i === start }, option);
    button.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
      change(i);
      redraw();
    });
    return button;
  });
}

// The arms as buttons that switch them on and off everywhere; a double click shows one alone.
function addLegend(parent) {
  data.arms.forEach((label, index) => {
    const button = make(parent, "button", { type: "button", title: `show or hide ${label}; double click: show it alone` });
    mark(button, index);
    button.append(label);
    button.addEventListener("click", () => {
      if (!hidden.delete(label)) hidden.add(label);
      redraw();
    });
    button.addEventListener("dblclick", () => {
      const others = data.arms.filter((other) => other !== label), isAlone = others.every((other) => hidden.has(other));
      hidden.clear();
      if (!isAlone) others.forEach((other) => hidden.add(other));
      redraw();
    });
    redraws.push(() => button.setAttribute("aria-pressed", !hidden.has(label)));
  });
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme ? root.dataset.theme === "dark" : dark) ? "light" : "dark";
});
