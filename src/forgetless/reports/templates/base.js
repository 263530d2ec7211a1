"use strict";
// What every part of the page uses. Text from the data only ever becomes text nodes, never HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const NONE = "–";
const MARKS = 8;
const hidden = new Set(); // labels of the arms switched off, in the plane and the curves alike
const redraws = [];

const byId = (id) => document.getElementById(id);
const SVG = document.querySelector("svg").namespaceURI;

function make(parent, name, attributes = {}, text = null) {
  const isSvg = parent.namespaceURI === SVG || name === "svg";
  const node = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
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

function number(value, isShare) {
  if (value === null || value === undefined) return NONE;
  if (isShare) return `${(100 * value).toFixed(1)}\u00a0%`;
  return value === 0 || Math.abs(value) >= 0.001 ? value.toFixed(3) : value.toExponential(1);
}

function interval(estimate, isShare) {
  if (!estimate || estimate.low === null) return "";
  const [low, high] = [estimate.low, estimate.high].map((v) => number(v, isShare).replace("\u00a0%", ""));
  return (low + high).includes("-") ? `${low} to ${high}` : `${low}–${high}`;
}

function checkbox(parent, label, checked, change) {
  const wrap = make(parent, "label");
  const box = make(wrap, "input", { type: "checkbox" });
  box.checked = checked;
  wrap.append(label);
  box.addEventListener("change", () => change(box.checked));
}

function choice(parent, label, options, change) {
  if (options.length < 2) return;
  const wrap = make(parent, "label", {}, `${label} `);
  const select = make(wrap, "select");
  options.forEach((option, i) => make(select, "option", { value: i }, option));
  select.addEventListener("change", () => change(Number(select.value)));
}

function segments(parent, label, options, start, change) {
  const group = make(parent, "div", { class: "segments", role: "group", "aria-label": label });
  const buttons = options.map((option, i) => {
    const button = make(group, "button", { type: "button", "aria-pressed": i === start }, option);
    button.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
      change(i);
    });
    return button;
  });
}

// The arms as buttons that switch them on and off everywhere; a double click shows one alone.
function legend(parent) {
  data.arms.forEach((arm, index) => {
    const button = make(parent, "button", { type: "button", title: `show or hide ${arm.label}; double click: show it alone` });
    mark(button, index);
    button.append(arm.label);
    button.addEventListener("click", () => {
      if (!hidden.delete(arm.label)) hidden.add(arm.label);
      redraw();
    });
    button.addEventListener("dblclick", () => {
      const alone = data.arms.every((other) => other === arm || hidden.has(other.label));
      hidden.clear();
      if (!alone) data.arms.forEach((other) => other !== arm && hidden.add(other.label));
      redraw();
    });
    redraws.push(() => button.setAttribute("aria-pressed", !hidden.has(arm.label)));
  });
}

function redraw() {
  redraws.forEach((draw) => draw());
}

// Draw now, and again when the width changes.
function drawn(figure, draw) {
  let width = 0;
  redraws.push(() => width && draw(width));
  const watch = () => {
    const now = Math.floor(figure.clientWidth || figure.parentElement.clientWidth);
    if (now > 160 && now !== width) draw((width = now));
  };
  new ResizeObserver(watch).observe(figure.parentElement);
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
