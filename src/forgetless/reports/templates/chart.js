// The core of every chart: axes, marks with a card of numbers, names that keep out of each other's way.
// A chart is defined by what it shows, its scene, in the units of its data:
//   x, y   {title, range, share, log, last}: the axes; no tick stands beyond `last`
//   lines  {points: [[x, y], ...], kind, arm}; without an arm in no arm's colour
//   bars   {arm, x, y}: crosses of two estimates {value, low, high}
//   dots   {arm, x, y}: small, for single seeds
//   bases  {x, y}: the untouched models, with `rules` through them
//   marks  {arm, x, y, size, minor, ring, title, rows}: what answers to the pointer with its rows of [term, value]
//   names  {x, y, text}: put near their places; `ends` {arm, x, y}: names at the right ends of lines
//   follow  a function of a step that gives what the card shows there: {title, rows}
//   heights  the lowest, on narrow screens, and the tallest

function define(id, setup) {
  const figure = byId(`${id}-chart`);
  if (!figure) return;
  const scene = setup(byId(`${id}-tools`));
  const legend = byId(`${id}-legend`);
  if (legend) addLegend(legend);
  const tip = tipFor(figure);
  let width = 0;
  redraws.push(() => width && draw(figure, tip, width, scene()));
  new ResizeObserver(() => {
    const now = Math.floor(figure.clientWidth || figure.parentElement.clientWidth);
    if (now > 160 && now !== width) draw(figure, tip, (width = now), scene(now));
  }).observe(figure.parentElement);
}

function draw(figure, tip, width, { x, y, lines = [], bars = [], dots = [], bases = [], rules, marks = [], names = [], ends = [], follow, heights = [340, 480] }) {
  const height = Math.round(Math.max(heights[0], Math.min(heights[1], (width * heights[1]) / 1070)));
  const wide = width >= 640;
  const right = ends.length && wide ? { ...x, range: [x.range[0], x.range[1] + (x.range[1] - x.range[0]) * 0.16] } : x;
  const chart = axes(figure, width, height, right, y);
  const { svg, box, px, py } = chart;
  if (rules) for (const b of bases) {
    make(svg, "line", { class: "reference", x1: px(b.x), x2: px(b.x), y1: box.top, y2: box.bottom });
    make(svg, "line", { class: "reference", x1: box.left, x2: box.right, y1: py(b.y), y2: py(b.y) });
  }
  for (const { points, kind, arm } of lines) {
    const path = points.map(([a, b]) => `${px(a).toFixed(1)},${py(b).toFixed(1)}`).join(" ");
    make(svg, "polyline", { class: arm === undefined ? kind : `${kind} c${colour(arm)}`, style: "fill:none", points: path });
  }
  for (const d of dots) make(svg, "circle", { class: `minor c${colour(d.arm)}`, cx: px(d.x), cy: py(d.y), r: 2.4 });
  const taken = bars.flatMap((bar) => errorBars(chart, bar));
  for (const p of [...marks, ...bases]) taken.push({ x: px(p.x) - 8, y: py(p.y) - 8, w: 16, h: 16 });
  for (const b of bases) make(svg, "circle", { class: "base", cx: px(b.x), cy: py(b.y), r: 5.5 });
  placeNames(svg, box, names.map((n) => ({ x: px(n.x), y: py(n.y), name: n.text })), taken);
  if (wide) endNames(chart, ends.map(({ arm, x, y }) => ({ arm, x: px(x), at: py(y), y: py(y) })));
  marks.sort((a, b) => a.size - b.size).forEach((m) => drawMark(svg, tip, { ...m, cx: px(m.x), cy: py(m.y) }));
  if (follow) followPointer(chart, tip, [...new Set(lines.flatMap((l) => l.points.map((p) => p[0])))], follow);
}

function niceTicks(from, to, count) {
  const [low, high] = from < to ? [from, to] : [to, from];
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) ticks.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return ticks;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.log10(high);
  const powers = Array.from({ length: Math.max(0, Math.floor(last) - first + 1) }, (_, i) => 10 ** (first + i));
  const ticks = powers.flatMap((p) => [p, 2 * p, 5 * p]).filter((t) => t >= low * 0.999 && t <= high * 1.001);
  return ticks.length > 2 ? ticks : niceTicks(low, high, 5);
}

function scale([low, high], [from, to], isLog = false) {
  const f = isLog ? Math.log10 : (v) => v;
  return (value) => from + ((f(value) - f(low)) / (f(high) - f(low) || 1)) * (to - from);
}

function tickLabel(value, ticks, isShare) {
  const unit = isShare ? 100 : 1;
  const step = unit * (ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : Math.abs(value) || 1);
  let digits = 0;
  while (digits < 6 && Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits++;
  return (value * unit).toFixed(digits) + (isShare ? "\u00a0%" : "");
}

// The room for what is drawn, with grid and ticks.
function axes(figure, width, height, x, y) {
  figure.querySelector(":scope > svg")?.remove();
  const svg = make(figure, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `${y.title} against ${x.title}` });
  const xTicks = niceTicks(...x.range, Math.max(5, width / 110)).filter((t) => t <= (x.last ?? Infinity));
  const yTicks = y.log ? logTicks(...y.range) : niceTicks(...y.range, height / 75);
  const yLabels = yTicks.map((t) => (y.log ? String(Number(t.toPrecision(2))) : tickLabel(t, yTicks, y.share)));
  const left = 26 + 7.2 * Math.max(...yLabels.map((l) => l.length), 2);
  const box = { left, right: width - (width < 520 ? 16 : 28), top: 46, bottom: height - 54 };
  const px = scale(x.range, [box.left, box.right]);
  const py = scale(y.range, [box.bottom, box.top], y.log);
  yTicks.forEach((t, i) => {
    make(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: py(t), y2: py(t) });
    make(svg, "text", { x: box.left - 10, y: py(t) + 4, "text-anchor": "end" }, yLabels[i]);
  });
  for (const t of xTicks) {
    make(svg, "line", { class: "grid", x1: px(t), x2: px(t), y1: box.top, y2: box.bottom });
    make(svg, "text", { x: px(t), y: box.bottom + 20, "text-anchor": "middle" }, tickLabel(t, xTicks, x.share));
  }
  make(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  make(svg, "text", { class: "title", x: 20, y: 27 }, y.title);
  make(svg, "text", { class: "title", x: box.right, y: height - 14, "text-anchor": "end" }, x.title);
  return { svg, box, px, py };
}

const overlap = (a, b) => Math.max(0, Math.min(a.x + a.w, b.x + b.w) - Math.max(a.x, b.x)) * Math.max(0, Math.min(a.y + a.h, b.y + b.h) - Math.max(a.y, b.y));

function widthOf(name) {
  const canvas = widthOf.canvas ||= document.createElement("canvas").getContext("2d");
  canvas.font = `560 13px ${getComputedStyle(document.body).fontFamily}`;
  return canvas.measureText(name).width;
}

// The name, or as much of its beginning as fits; the legend has it whole.
function fitting(name, room) {
  let length = name.length;
  const cut = () => (length < name.length ? `${name.slice(0, length).trimEnd()}…` : name);
  while (length > 1 && widthOf(cut()) > room) length--;
  return cut();
}

// Put a name beside each {x, y, name}; `taken` are boxes to keep free. Far ones get a thin line.
function placeNames(svg, box, points, taken) {
  for (const point of points) {
    const name = fitting(point.name, (box.right - box.left) / 2);
    const w = widthOf(name) + 4;
    let best = null;
    for (const [ring, distance] of [11, 22, 36, 52].entries()) {
      for (let turn = 0; turn < 12; turn++) {
        const angle = (turn * Math.PI) / 6;
        const cx = point.x + Math.cos(angle) * distance, cy = point.y + Math.sin(angle) * distance;
        const label = { x: cx + (Math.cos(angle) - 1) * w / 2, y: cy - 8 + Math.sin(angle) * 5, w, h: 16 };
        const outside = Math.max(0, box.left - label.x) + Math.max(0, label.x + w - box.right) + Math.max(0, box.top - label.y) + Math.max(0, label.y + 16 - box.bottom);
        const cost = outside * 1000 + taken.reduce((sum, other) => sum + overlap(label, other), 0) + ring * 14 + (Math.cos(angle) < 0 ? 3 : 0) + Math.abs(Math.sin(angle)) * 2;
        if (!best || cost < best.cost) best = { ...label, cost, ring };
      }
    }
    taken.push(best);
    if (best.ring > 1) make(svg, "line", { class: "leader", x1: point.x, y1: point.y, x2: Math.min(Math.max(point.x, best.x), best.x + w), y2: best.y + (best.y > point.y ? 2 : 14) });
    make(svg, "text", { class: "name", x: best.x + 2, y: best.y + 12.5 }, name);
  }
}

// Names at the ends of the lines of some arms, {arm, x, at, y}, pushed apart so that none covers another.
function endNames({ svg, box }, labels) {
  labels.sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i++) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + 17);
  for (let i = labels.length - 1, limit = box.bottom - 4; i >= 0 && labels[i].y > limit; i--, limit -= 17) labels[i].y = limit;
  for (const { arm, x, at, y } of labels) {
    make(svg, "line", { class: "leader", x1: x + 3, y1: at, x2: x + 15, y2: y });
    make(svg, "use", { class: `c${colour(arm)}`, href: `#mark-${shape(arm)}`, x: x + 17, y: y - 5, width: 10, height: 10 });
    make(svg, "text", { class: "name", x: x + 32, y: y + 4 }, fitting(data.arms[arm], box.right + 16 - (x + 32)));
  }
}

// The intervals of a point on both axes; gives the boxes that they take up.
function errorBars({ svg, px, py }, { arm, x, y }) {
  const lines = [];
  if (x.low !== null) lines.push([px(x.low), py(y.value), px(x.high), py(y.value)]);
  if (y.low !== null) lines.push([px(x.value), py(y.low), px(x.value), py(y.high)]);
  return lines.map(([x1, y1, x2, y2]) => {
    make(svg, "line", { class: `error c${colour(arm)}`, x1, y1, x2, y2 });
    return { x: Math.min(x1, x2) - 2, y: Math.min(y1, y2) - 2, w: Math.abs(x2 - x1) + 4, h: Math.abs(y2 - y1) + 4 };
  });
}

// The mark of an arm that shows its numbers when it is pointed at or focused.
function drawMark(svg, tip, { arm, cx, cy, size, minor, ring, title, rows }) {
  const label = `${title}: ${rows.map((row) => row.join(" ")).join(", ")}`;
  const group = make(svg, "g", { class: `point c${colour(arm)}`, tabindex: 0, role: "img", "aria-label": label });
  make(group, "circle", { cx, cy, r: Math.max(9, size), fill: "transparent" });
  make(group, "circle", { class: "halo", cx, cy, r: 12 });
  if (ring) make(group, "circle", { class: "event", cx, cy, r: ring });
  make(group, "use", { class: minor ? "shape minor" : "shape", href: `#mark-${shape(arm)}`, x: cx - size / 2, y: cy - size / 2, width: size, height: size });
  const show = () => tip.show(cx, cy, { arm, title, rows });
  for (const event of ["pointerenter", "focus", "click"]) group.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) group.addEventListener(event, tip.hide);
  group.addEventListener("keydown", (event) => event.key === "Escape" && tip.hide());
}

// A card of numbers that follows the mark in hand.
function tipFor(figure) {
  const tip = make(figure, "div", { class: "tip", role: "status", hidden: "" });
  return {
    show(x, y, { arm, title, rows }) {
      tip.replaceChildren();
      const name = make(tip, "span", { class: "arm" });
      if (arm !== undefined) mark(name, arm);
      name.append(title);
      const list = make(tip, "dl");
      for (const [term, value] of rows) {
        make(list, "dt", {}, term);
        make(list, "dd", {}, value);
      }
      tip.hidden = false;
      const { offsetWidth: w, offsetHeight: h } = tip, room = figure.clientWidth;
      tip.style.left = `${Math.max(8, Math.min(x + 16 + w > room ? x - w - 16 : x + 16, room - w - 8))}px`;
      tip.style.top = `${Math.max(8, Math.min(y - h / 2, figure.clientHeight - h - 8))}px`;
    },
    hide: () => (tip.hidden = true),
  };
}

// A rule at the step nearest to the pointer, with the card of what stands there.
function followPointer({ svg, box, px }, tip, steps, follow) {
  const rule = make(svg, "line", { class: "axis", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const area = make(svg, "rect", { class: "area", x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top, fill: "transparent" });
  area.addEventListener("pointermove", (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    const step = steps.reduce((a, b) => (Math.abs(px(b) - x) < Math.abs(px(a) - x) ? b : a), steps[0]);
    if (step === undefined) return;
    for (const [name, value] of [["x1", px(step)], ["x2", px(step)], ["visibility", "visible"]]) rule.setAttribute(name, value);
    tip.show(px(step), (box.top + box.bottom) / 2, follow(step));
  });
  area.addEventListener("pointerleave", () => { rule.setAttribute("visibility", "hidden"); tip.hide(); });
}
