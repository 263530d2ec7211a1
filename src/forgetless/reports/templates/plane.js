// The learning-forgetting plane.

(() => {
  const learning = data.tasks.filter((t) => t.kind === "learning" && data.arms.some((a) => a.settings.some((s) => s.final[t.name])));
  const forgetting = data.tasks.filter((t) => t.kind === "forgetting" && data.arms.some((a) => a.settings.some((s) => s.kept[t.name])));
  const figure = byId("plane-chart");
  if (!figure) return;
  const state = { learned: learning[0], kept: forgetting[0], seeds: true, rates: true, base: true };
  const manySeeds = data.arms.some((a) => a.settings.some((s) => s.seeds.length > 1));
  const manyRates = data.arms.some((a) => a.settings.length > 1);
  const tools = byId("plane-tools");
  const set = (key) => (value) => { state[key] = value; redraw(); };
  choice(tools, "Learned", learning.map((t) => t.name), (i) => set("learned")(learning[i]));
  choice(tools, "Kept", forgetting.map((t) => t.name), (i) => set("kept")(forgetting[i]));
  if (manySeeds) checkbox(tools, "every seed", true, set("seeds"));
  if (manyRates) checkbox(tools, "every learning rate", true, set("rates"));
  checkbox(tools, "base model", true, set("base"));
  legend(byId("plane-legend"));
  const tip = tipFor(figure);

  // The settings in sight: {arm, index, setting, x, y}, x and y being estimates.
  function visible() {
    const found = [];
    data.arms.forEach((arm, index) => {
      if (hidden.has(arm.label)) return;
      for (const setting of arm.settings) {
        const x = setting.kept[state.kept.name], y = setting.final[state.learned.name];
        if (x && y && (setting.best || state.rates)) found.push({ arm, index, setting, x, y });
      }
    });
    return found;
  }

  // Where the untouched bases stand.
  function bases() {
    if (!state.base) return [];
    return data.bases.flatMap((base) => {
      const kept = base.scores[state.kept.name], learned = base.scores[state.learned.name];
      return kept && learned ? [{ name: base.name, x: state.kept.share ? 1 : kept.value, y: learned.value }] : [];
    });
  }

  function front(points) {
    const up = (p) => [p.x.value * (state.kept.higher ? 1 : -1), p.y.value * (state.learned.higher ? 1 : -1)];
    const beats = (a, b) => a[0] >= b[0] && a[1] >= b[1] && (a[0] > b[0] || a[1] > b[1]);
    return points.filter((p) => !points.some((q) => beats(up(q), up(p)))).sort((p, q) => p.x.value - q.x.value);
  }

  function draw(width) {
    const points = visible(), grounds = bases();
    const height = Math.round(Math.max(380, Math.min(600, width * 0.56)));
    const { kept, learned } = state;
    const xs = [...points.flatMap((p) => ends(p.x)), ...grounds.map((b) => b.x)];
    const ys = [...points.flatMap((p) => ends(p.y)), ...grounds.map((b) => b.y)];
    if (!xs.length) [xs[0], ys[0]] = [1, 0.5];
    const chart = axes(figure, width, height,
      { range: taskRange(xs, kept), isShare: kept.share, title: kept.share ? `Kept: share of ${kept.name} →` : `Kept: ${unit(kept)} →` },
      { range: taskRange(ys, learned), isShare: learned.share, title: `↑ Learned: ${unit(learned)}` });
    drawBases(chart, grounds);
    const line = front(points);
    if (line.length > 1) make(chart.svg, "polyline", { class: "front", points: line.map((p) => `${chart.px(p.x.value)},${chart.py(p.y.value)}`).join(" ") });
    if (manyRates && state.rates) drawTracks(chart, points);
    if (state.seeds) points.forEach((p) => drawSeeds(chart, p));
    const boxes = points.flatMap((p) => drawErrors(chart, p));
    const spots = points.map((p) => ({ ...p, cx: chart.px(p.x.value), cy: chart.py(p.y.value) }));
    spots.forEach((p) => boxes.push({ x: p.cx - 8, y: p.cy - 8, w: 16, h: 16 }));
    grounds.forEach((b) => boxes.push({ x: chart.px(b.x) - 8, y: chart.py(b.y) - 8, w: 16, h: 16 }));
    const names = spots.filter((p) => p.setting.best).map((p) => ({ x: p.cx, y: p.cy, name: p.arm.label }));
    grounds.forEach((b) => names.push({ x: chart.px(b.x), y: chart.py(b.y), name: grounds.length > 1 ? `base ${b.name}` : "base" }));
    placeNames(chart.svg, chart.box, names, boxes);
    spots.sort((p, q) => p.setting.best - q.setting.best).forEach((p) => drawPoint(chart, p));
  }

  function drawBases({ svg, box, px, py }, grounds) {
    for (const base of grounds) {
      make(svg, "line", { class: "reference", x1: px(base.x), x2: px(base.x), y1: box.top, y2: box.bottom });
      make(svg, "line", { class: "reference", x1: box.left, x2: box.right, y1: py(base.y), y2: py(base.y) });
      make(svg, "circle", { class: "base", cx: px(base.x), cy: py(base.y), r: 5.5 });
    }
  }

  function drawTracks({ svg, px, py }, points) {
    for (const arm of new Set(points.map((p) => p.arm))) {
      const own = points.filter((p) => p.arm === arm);
      if (own.length > 1) make(svg, "polyline", { class: `track c${colour(own[0].index)}`, style: "fill:none", points: own.map((p) => `${px(p.x.value)},${py(p.y.value)}`).join(" ") });
    }
  }

  function drawSeeds({ svg, px, py }, point) {
    if (point.setting.seeds.length < 2 || (manyRates && !point.setting.best)) return;
    for (const seed of point.setting.seeds) {
      const x = seed.kept[state.kept.name], y = seed.final[state.learned.name];
      if (x === null || y === null) continue;
      make(svg, "circle", { class: `minor c${colour(point.index)}`, cx: px(x), cy: py(y), r: 2.4 });
    }
  }

  function drawErrors({ svg, px, py }, { x, y, index, setting }) {
    if (!setting.best) return [];
    return errorBars({ svg, px, py }, x, y, index);
  }

  function drawPoint({ svg }, point) {
    const { arm, index, setting, cx, cy } = point;
    const kind = setting.best ? { size: 17 } : { size: 11, minor: true };
    armPoint(svg, tip, { ...kind, index, cx, cy, title: arm.label, rows: details(point) });
  }

  function details({ x, y, setting }) {
    const { kept, learned } = state;
    return [
      ["learned", withInterval(y, learned)],
      ["kept", withInterval(x, kept)],
      ["items", [y.n, x.n].map((n) => n?.toLocaleString("en") ?? NONE).join(" / ")],
      ["seeds", String(setting.seeds.length)],
      ["learning rate", setting.rate === null ? "" : String(setting.rate)],
      ["update ‖ΔW‖/‖W‖", setting.update === null ? "" : setting.update.toPrecision(3)],
    ];
  }

  drawn(figure, draw);
})();
