// What was learned and forgotten on the way: by step, or one against the other.

(() => {
  const figure = byId("probes-chart");
  if (!figure) return;
  const names = [...new Set(data.probes.flatMap((run) => Object.keys(run.values)))];
  const [learning, forgetting] = ["learning/", "forgetting/"].map((kind) => names.filter((n) => n.startsWith(kind)));
  const pairs = learning.length && forgetting.length ? [[forgetting[0], learning[0]]] : [];
  const views = [...pairs, ...names];
  const state = { view: views[0] };
  const words = (name) => name.replace("learning/", "Learning: ").replace("forgetting/", "Forgetting: ").replaceAll("_", " ").replace(/: kl$/, ": distance from the base").replace(/: loss$/, ": loss, lower is better");
  const labels = views.map((v) => (Array.isArray(v) ? "Learning against forgetting" : `${words(v)}, by step`));
  choice(byId("probes-tools"), "Show", labels, (i) => { state.view = views[i]; redraw(); });
  const tip = tipFor(figure);

  // Every run in sight as points {step, x, y}.
  function lines() {
    const isPath = Array.isArray(state.view);
    return data.probes.filter((run) => !hidden.has(data.arms[run.arm].label)).map((run) => {
      const ys = run.values[isPath ? state.view[1] : state.view] ?? [];
      const xs = isPath ? new Map(run.values[state.view[0]] ?? []) : null;
      const points = ys.map(([step, y]) => ({ step, y, x: isPath ? xs.get(step) : step })).filter((p) => p.x !== undefined);
      return { ...run, points };
    }).filter((run) => run.points.length);
  }

  function spread(values, isStep) {
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low) * 0.06 || 0.1;
    return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + (isStep ? 0 : pad)];
  }

  function draw(width) {
    const runs = lines(), isPath = Array.isArray(state.view), wide = width >= 640;
    const all = runs.flatMap((run) => run.points);
    const xs = all.length ? all.map((p) => p.x) : [0, 1], ys = all.length ? all.map((p) => p.y) : [0, 1];
    const [left, right] = spread(xs, !isPath);
    const room = wide ? 1.17 : 1.02;
    const chart = axes(figure, width, Math.round(Math.max(320, Math.min(460, width * 0.42))),
      { range: [left, left + (right - left) * room], last: right, title: isPath ? `${words(state.view[0])} →` : "step →" },
      { range: spread(ys), title: `↑ ${words(isPath ? state.view[1] : state.view)}` });
    const ends = new Map();
    for (const run of runs) {
      const { arm, points } = run;
      make(chart.svg, "polyline", { class: `curve c${colour(arm)}`, style: "fill:none", points: points.map((p) => `${chart.px(p.x).toFixed(1)},${chart.py(p.y).toFixed(1)}`).join(" ") });
      points.forEach((point) => drawPoint(chart, run, point));
      ends.set(arm, points.at(-1));
    }
    if (wide) endNames(chart, [...ends].map(([arm, p]) => ({ arm, x: chart.px(p.x), at: chart.py(p.y), y: chart.py(p.y) })));
  }

  function drawPoint({ svg, px, py }, run, point) {
    const cx = px(point.x), cy = py(point.y), isOver = point.step === run.over, isKept = point.step === run.kept;
    const group = make(svg, "g", { class: `point c${colour(run.arm)}` });
    make(group, "circle", { cx, cy, r: 13, fill: "transparent" });
    if (isOver || isKept) make(group, "circle", { class: "event", cx, cy, r: isOver ? 8 : 6 });
    make(group, "circle", { class: "shape", cx, cy, r: 3.4 });
    const show = () => tip.show(cx, cy, (card) => {
      const name = make(card, "span", { class: "arm" });
      mark(name, run.arm);
      name.append(data.arms[run.arm].label);
      const rows = Object.entries(run.values).map(([n, points]) => [words(n), number(points.find((p) => p[0] === point.step)?.[1], false)]);
      const event = isOver && isKept ? "over budget, stopped" : isOver ? "over budget" : isKept ? "went back to here" : "";
      tipRows(card, [["step", String(point.step)], ...rows, ["", ""], ["budget", event]]);
    });
    for (const happening of ["pointerenter", "click"]) group.addEventListener(happening, show);
    group.addEventListener("pointerleave", tip.hide);
  }

  drawn(figure, draw);
})();
