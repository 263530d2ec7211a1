// Training loss by step.

(() => {
  const figure = byId("curves-chart");
  const curves = data.curves.filter((c) => c.points.length);
  if (!figure) return;
  const smallest = Math.min(...curves.flatMap((c) => c.points.map((p) => p[1])));
  const manyRates = curves.some((c) => !c.best);
  const state = { log: smallest > 0, all: false };
  const tools = byId("curves-tools");
  if (smallest > 0) segments(tools, "Scale of the loss", ["linear", "log"], 1, (i) => { state.log = i === 1; redraw(); });
  if (manyRates) checkbox(tools, "every learning rate", false, (value) => { state.all = value; redraw(); });
  legend(byId("curves-legend"));
  const tip = tipFor(figure);

  const name = (curve) => data.arms[curve.arm].label;
  const shown = () => curves.filter((c) => !hidden.has(name(c)) && (c.best || state.all));

  function draw(width) {
    const lines = shown();
    const height = Math.round(Math.max(340, Math.min(480, width * 0.45)));
    const all = lines.length ? lines.flatMap((c) => c.points) : [[1, 1]];
    const losses = all.map((p) => p[1]), steps = all.map((p) => p[0]);
    const [low, high] = [Math.min(...losses), Math.max(...losses)];
    const range = state.log ? [low / 1.12, high * 1.12] : [Math.min(0, low), high * 1.05];
    const wide = width >= 640;
    const longest = Math.max(...steps);
    const first = Math.min(0, Math.min(...steps));
    const chart = axes(figure, width, height, { range: [first, longest * (wide ? 1.17 : 1.01)], last: longest, title: "step →" }, { range, isLog: state.log, title: `↑ Training loss${state.log ? ", log scale" : ""}` });
    const ends = new Map();
    for (const curve of lines) {
      const points = curve.points.map(([s, l]) => `${chart.px(s).toFixed(1)},${chart.py(l).toFixed(1)}`).join(" ");
      const isThin = lines.filter((c) => c.arm === curve.arm).length > 1;
      make(chart.svg, "polyline", { class: `curve c${colour(curve.arm)}${isThin ? " thin" : ""}`, style: "fill:none", points });
      if (curve.best && !ends.has(curve.arm)) ends.set(curve.arm, curve.points.at(-1));
    }
    if (wide) endNames(chart, [...ends].map(([arm, [step, loss]]) => ({ arm, x: chart.px(step), at: chart.py(loss), y: chart.py(loss) })));
    follow(chart, lines);
  }

  // The losses at the step under the pointer.
  function follow({ svg, box, px }, lines) {
    const rule = make(svg, "line", { class: "axis", y1: box.top, y2: box.bottom, visibility: "hidden" });
    const steps = [...new Set(lines.flatMap((c) => c.points.map((p) => p[0])))];
    const area = make(svg, "rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top, fill: "transparent" });
    area.addEventListener("pointermove", (event) => {
      const x = event.clientX - svg.getBoundingClientRect().left;
      const step = steps.reduce((a, b) => (Math.abs(px(b) - x) < Math.abs(px(a) - x) ? b : a), steps[0]);
      if (step === undefined) return;
      rule.setAttribute("x1", px(step));
      rule.setAttribute("x2", px(step));
      rule.setAttribute("visibility", "visible");
      tip.show(px(step), (box.top + box.bottom) / 2, (card) => fill(card, lines, step));
    });
    area.addEventListener("pointerleave", () => { rule.setAttribute("visibility", "hidden"); tip.hide(); });
  }

  function fill(card, lines, step) {
    make(card, "span", { class: "arm" }, `step ${step}`);
    const losses = new Map();
    for (const curve of lines.filter((c) => c.best)) {
      const point = curve.points.find((p) => p[0] === step);
      if (point) losses.set(curve.arm, [...(losses.get(curve.arm) ?? []), point[1]]);
    }
    const means = [...losses].map(([arm, all]) => [data.arms[arm].label, all.reduce((a, b) => a + b) / all.length]);
    tipRows(card, means.sort((a, b) => a[1] - b[1]).map(([label, loss]) => [label, loss.toFixed(3)]));
  }

  drawn(figure, draw);
})();
