// What each chart of the page shows; a chart whose figure is not there is not defined.

const shown = (own) => own.filter((one) => !hidden.has(data.arms[one.arm]));

function extent(values, margin) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low) * margin || Math.abs(high) * 0.1 || 0.1;
  return [low - pad, high + pad];
}

// The axis of a task, from worse to better.
function taskAxis(task, values, title) {
  let [low, high] = extent(values.length ? values : [0, 1], 0.08);
  if (task.share) [low, high] = [Math.max(low, -0.03), Math.min(high, 1.03)];
  return { title, share: task.share, range: task.higher ? [low, high] : [high, low] };
}

// Learned against kept: of every arm and rate in the plane, of every step in the course, of every setting afterwards.
for (const id of ["plane", "course", "aftercare"]) define(id, (tools) => {
  const { learned: learning, kept: forgetting, points } = data[id], isPlane = id === "plane";
  const state = { learned: learning[0], kept: forgetting[0], seeds: true, rates: true, bars: true, base: true };
  const hasRates = points.some((p) => p.minor);
  choice(tools, "Learned", learning.map((t) => t.name), (i) => (state.learned = learning[i]));
  choice(tools, "Kept", forgetting.map((t) => t.name), (i) => (state.kept = forgetting[i]));
  if (points.some((p) => p.seeds.length > 1)) checkbox(tools, "every seed", (on) => (state.seeds = on));
  if (isPlane && hasRates) checkbox(tools, "every learning rate", (on) => (state.rates = on));
  if (!isPlane && points.some((p) => Object.values(p.kept).some((e) => e.low !== null))) checkbox(tools, "intervals", (on) => (state.bars = on));
  if (isPlane) checkbox(tools, "base model", (on) => (state.base = on));

  // The points that no other beats on both axes.
  function front(own) {
    const up = (p) => [p.x * (state.kept.higher ? 1 : -1), p.y * (state.learned.higher ? 1 : -1)];
    const beats = (a, b) => a[0] >= b[0] && a[1] >= b[1] && (a[0] > b[0] || a[1] > b[1]);
    return own.filter((p) => !own.some((q) => beats(up(q), up(p)))).sort((p, q) => p.x - q.x);
  }

  const line = (own, kind, arm) => ({ points: own.map((p) => [p.x, p.y]), kind, arm });

  return () => {
    const { learned, kept } = state;
    const at = (own) => own.filter((p) => p.kept[kept.name] && p.learned[learned.name]).map((p) => {
      const [x, y] = [p.kept[kept.name], p.learned[learned.name]];
      const rows = [["learned", y.text], ["kept", x.text], ["items", `${y.items} / ${x.items}`]];
      return { ...p, ends: { x, y }, x: x.value, y: y.value, rows: [...rows, ...p.rows] };
    });
    const inSight = at(shown(points)).filter((p) => state.rates || !p.minor);
    const bases = state.base ? at(data[id].bases) : [];
    const marks = inSight.filter((p) => p.size), bars = state.bars ? marks.filter((p) => !p.minor) : [];
    const reach = (axis) => [...inSight, ...bases].flatMap((p) => [p[axis], ...(bars.includes(p) ? [p.ends[axis].low, p.ends[axis].high] : [])]).filter((v) => v !== null);
    const arms = [...new Set(inSight.map((p) => p.arm))];
    const lines = arms.map((arm) => line(inSight.filter((p) => p.arm === arm && !p.apart), isPlane ? "track" : "curve thin", arm));
    const best = front(marks);
    if (isPlane && best.length > 1) lines.unshift(line(best, "front"));
    const names = marks.filter((p) => p.named && (isPlane || arms.length <= 12)); // more do not fit; the legend has them all
    return {
      x: taskAxis(kept, reach("x"), kept.title),
      y: taskAxis(learned, reach("y"), learned.title),
      lines, bases, names: [...names.map((p) => ({ ...p, text: data.arms[p.arm] })), ...bases.map((b) => ({ ...b, text: b.title }))],
      rules: isPlane, marks, heights: [380, 600],
      bars: bars.map((p) => ({ arm: p.arm, ...p.ends })),
      dots: state.seeds ? marks.filter((p) => !(hasRates && p.minor)).flatMap((p) => p.seeds.map((s) => ({ arm: p.arm, x: s.kept[kept.name], y: s.learned[learned.name] })).filter((s) => s.x !== null && s.y !== null)) : [],
    };
  };
});

// Training loss by step.
define("curves", (tools) => {
  const positive = data.curves.every((c) => c.points.every((p) => p[1] > 0));
  const state = { log: positive, all: false };
  if (positive) segments(tools, "Scale of the loss", ["linear", "log"], 1, (i) => (state.log = i === 1));
  if (data.curves.some((c) => !c.best)) checkbox(tools, "every learning rate", (on) => (state.all = on), false);
  return () => {
    const own = shown(data.curves).filter((c) => c.best || state.all);
    const all = own.length ? own.flatMap((c) => c.points) : [[1, 1]];
    const steps = all.map((p) => p[0]), losses = all.map((p) => p[1]);
    const [low, high, last] = [Math.min(...losses), Math.max(...losses), Math.max(...steps)];
    const isThin = (curve) => own.some((c) => c !== curve && c.arm === curve.arm);
    const first = new Map(own.filter((c) => c.best).reverse().map((c) => [c.arm, c.points.at(-1)]));
    return {
      x: { title: "step →", range: [Math.min(0, ...steps), last * 1.01], last },
      y: { title: `↑ Training loss${state.log ? ", log scale" : ""}`, log: state.log, range: state.log ? [low / 1.12, high * 1.12] : [Math.min(0, low), high * 1.05] },
      lines: own.map((c) => ({ points: c.points, arm: c.arm, kind: isThin(c) ? "curve thin" : "curve" })),
      ends: [...first].map(([arm, [x, y]]) => ({ arm, x, y })),
      follow(step) {
        const means = data.arms.map((label, arm) => {
          const here = own.filter((c) => c.best && c.arm === arm).flatMap((c) => c.points.filter((p) => p[0] === step).map((p) => p[1]));
          return [label, here.reduce((a, b) => a + b, 0) / here.length];
        });
        const rows = means.filter(([, loss]) => Number.isFinite(loss)).sort((a, b) => a[1] - b[1]);
        return { title: `step ${step}`, rows: rows.map(([label, loss]) => [label, loss.toFixed(3)]) };
      },
    };
  };
});

// Numbers of the updates by block, one kind of module at a time.
define("layers", (tools) => {
  const { rows, titles } = data.layers, names = Object.keys(titles);
  const modules = [...new Set(rows.map((row) => row.module))];
  let [name] = names, [module] = modules;
  choice(tools, "Show", names.map((n) => titles[n]), (i) => (name = names[i]));
  choice(tools, "of", modules, (i) => (module = modules[i]));
  return () => {
    const marks = shown(rows).filter((row) => row.module === module && row.values[name] !== null).map((row) => ({
      arm: row.arm, x: row.block, y: row.values[name], size: 9, title: data.arms[row.arm],
      rows: [["block", String(row.block)], ["module", module], [titles[name], String(Number(row.values[name].toPrecision(3)))]],
    }));
    const values = marks.length ? marks : [{ x: 0, y: 0 }, { x: 1, y: 1 }];
    const [low, high] = extent(values.map((m) => m.y), 0.08), last = Math.max(...values.map((m) => m.x));
    const own = [...new Set(marks.map((m) => m.arm))].map((arm) => marks.filter((m) => m.arm === arm));
    return {
      x: { title: "block →", range: [0, last || 1], last },
      y: { title: `↑ ${titles[name]}`, range: [Math.max(0, low), high] },
      lines: own.map((o) => ({ points: o.map((m) => [m.x, m.y]), arm: o[0].arm, kind: "curve" })),
      marks, ends: own.map((o) => ({ arm: o[0].arm, x: o.at(-1).x, y: o.at(-1).y })),
    };
  };
});

// What was learned and forgotten on the way: by step, or one against the other.
define("probes", (tools) => {
  const { runs, titles } = data.probes, names = Object.keys(titles);
  const [learning, forgetting] = ["learning/", "forgetting/"].map((kind) => names.find((n) => n.startsWith(kind)));
  const views = [...(learning && forgetting ? [[forgetting, learning]] : []), ...names.map((name) => ["", name])];
  let [view] = views;
  const labels = views.map(([x, y]) => (x ? "Learning against forgetting" : `${titles[y]}, by step`));
  choice(tools, "Show", labels, (i) => (view = views[i]));
  const text = (value) => (value && Math.abs(value) < 0.001 ? value.toExponential(1) : value.toFixed(3));
  return () => {
    const [x, y] = view;
    const marks = shown(runs).flatMap((run) => run.points.map((p) => ({
      arm: run.arm, run, x: x ? p.values[x] : p.step, y: p.values[y], size: 9, title: data.arms[run.arm],
      ring: p.ring,
      rows: [["step", String(p.step)], ...names.filter((n) => n in p.values).map((n) => [titles[n], text(p.values[n])]), ...(p.event ? [["budget", p.event]] : [])],
    }))).filter((m) => m.x !== undefined && m.y !== undefined);
    const own = shown(runs).map((run) => marks.filter((m) => m.run === run)).filter((o) => o.length);
    const range = (axis) => {
      const values = marks.length ? marks.map((m) => m[axis]) : [0, 1], [low, high] = extent(values, 0.06);
      return [Math.min(...values) >= 0 ? Math.max(0, low) : low, high];
    };
    return {
      x: { title: x ? `${titles[x]} →` : "step →", range: range("x"), last: Math.max(...marks.map((m) => m.x)) },
      y: { title: `↑ ${titles[y]}`, range: range("y") },
      lines: own.map((o) => ({ points: o.map((m) => [m.x, m.y]), arm: o[0].arm, kind: "curve" })),
      marks, ends: [...new Map(own.map((o) => [o[0].arm, o.at(-1)])).values()].map((m) => ({ arm: m.arm, x: m.x, y: m.y })),
    };
  };
});
