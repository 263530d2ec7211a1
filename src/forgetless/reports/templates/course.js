// Learning against forgetting over the steps of the training: a line an arm, from the base on.

(() => {
  const figure = byId("course-chart");
  if (!figure) return;
  const MAX_NAMED = 12;
  const { learning, forgetting, tracks } = data.course;
  const state = { learned: learning[0], kept: forgetting[0], bars: true };
  const tools = byId("course-tools");
  const set = (key) => (value) => { state[key] = value; redraw(); };
  choice(tools, "Learned", learning.map((t) => t.name), (i) => set("learned")(learning[i]));
  choice(tools, "Kept", forgetting.map((t) => t.name), (i) => set("kept")(forgetting[i]));
  const all = tracks.flatMap((t) => t.moments.flatMap((m) => Object.values(m.scores)));
  if (all.some((estimate) => estimate.low !== null)) checkbox(tools, "intervals", true, set("bars"));
  legend(byId("course-legend"));
  const tip = tipFor(figure);
  const last = Math.max(...tracks.flatMap((t) => t.moments.map((m) => m.step)));

  // The arms in sight, each with its points {step, tokens, x, y}, x and y being estimates.
  function visible() {
    return tracks.filter((track) => !hidden.has(data.arms[track.arm].label)).map((track) => {
      const points = track.moments.map((m) => ({ ...m, x: m.scores[state.kept.name], y: m.scores[state.learned.name] }));
      return { arm: track.arm, points: points.filter((p) => p.x && p.y) };
    }).filter((track) => track.points.length);
  }

  function draw(width) {
    const lines = visible(), { kept, learned } = state;
    const points = lines.flatMap((line) => line.points);
    const reach = (estimate) => (state.bars ? ends(estimate) : [estimate.value]);
    const xs = points.length ? points.flatMap((p) => reach(p.x)) : [0, 1], ys = points.length ? points.flatMap((p) => reach(p.y)) : [0, 1];
    const chart = axes(figure, width, Math.round(Math.max(380, Math.min(600, width * 0.56))),
      { range: taskRange(xs, kept), isShare: kept.share, title: `Kept: ${unit(kept)} →` },
      { range: taskRange(ys, learned), isShare: learned.share, title: `↑ Learned: ${unit(learned)}` });
    const at = (p) => ({ cx: chart.px(p.x.value), cy: chart.py(p.y.value) });
    for (const { arm, points: own } of lines) {
      const path = own.map((p) => `${at(p).cx.toFixed(1)},${at(p).cy.toFixed(1)}`).join(" ");
      make(chart.svg, "polyline", { class: `curve thin c${colour(arm)}`, style: "fill:none", points: path });
    }
    const boxes = [];
    for (const { arm, points: own } of lines) {
      for (const p of own.filter((point) => point.step)) {
        if (state.bars) boxes.push(...errorBars(chart, p.x, p.y, arm));
        boxes.push({ x: at(p).cx - 7, y: at(p).cy - 7, w: 14, h: 14 });
      }
    }
    const base = points.find((p) => p.step === 0);
    const named = lines.length > MAX_NAMED ? [] : lines; // more do not fit; the legend has them all
    const names = named.map(({ arm, points: own }) => ({ x: at(own.at(-1)).cx, y: at(own.at(-1)).cy, name: data.arms[arm].label }));
    if (base) names.push({ x: at(base).cx, y: at(base).cy, name: "base" });
    placeNames(chart.svg, chart.box, names, boxes);
    for (const { arm, points: own } of lines) own.filter((p) => p.step).forEach((p) => drawPoint(chart, arm, p, at(p)));
    if (base) make(chart.svg, "circle", { class: "base", ...at(base), r: 5.5 });
  }

  function drawPoint({ svg }, arm, point, place) {
    const { label } = data.arms[arm];
    const rows = [
      ["step", point.step.toLocaleString("en")],
      ["tokens", point.tokens === null ? "" : Math.round(point.tokens).toLocaleString("en")],
      ["learned", withInterval(point.y, state.learned)],
      ["kept", withInterval(point.x, state.kept)],
      ["seeds", String(point.y.seeds)],
    ];
    armPoint(svg, tip, { index: arm, ...place, size: 9 + 8 * Math.sqrt(point.step / last), title: label, rows });
  }

  drawn(figure, draw);
})();
