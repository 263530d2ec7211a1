// The course of a sequence: scores, training loss and probes over the steps of all of its tasks.

define("along", (tools) => {
  const arms = [...new Set(data.courses.map((c) => c.arm))], orders = [...new Set(data.courses.map((c) => c.order))];
  const views = [...new Set(data.courses.flatMap((c) => c.lines.map((l) => l.view)))].sort((a, b) => (b === "scores") - (a === "scores"));
  let [arm] = arms, [order] = orders, [view] = views;
  choice(tools, "Show", views, (i) => (view = views[i]));
  choice(tools, "of", arms, (i) => (arm = arms[i]));
  choice(tools, "in the order", orders, (i) => (order = orders[i]));
  return () => {
    const own = data.courses.find((c) => c.arm === arm && c.order === order) ?? data.courses.find((c) => c.arm === arm);
    const lines = shown(own.lines.filter((l) => l.view === view)), last = own.ends.at(-1)[0];
    const [low, high] = extent(lines.length ? lines.flatMap((l) => l.points.map((p) => p[1])) : [0, 1], 0.06);
    const y = view === "scores" ? [-0.03, 1.03] : [low, high];
    const rule = (step) => ({ points: [[step, y[0]], [step, y[1]]], kind: "front" });
    const rows = (l, p) => [["step", String(p[0])], [view, p[1].toFixed(3)], ...own.ends.filter(([step]) => step === p[0]).map(([, task]) => ["after", task])];
    return {
      x: { title: "step →", range: [0, last * 1.01], last },
      y: { title: `↑ ${view}`, share: view === "scores", range: y },
      lines: [...own.ends.map(([step]) => rule(step)), ...lines.map((l) => ({ points: l.points, arm: l.arm, kind: "curve" }))],
      marks: lines.flatMap((l) => l.points.map((p) => ({ arm: l.arm, x: p[0], y: p[1], size: 9, title: data.arms[l.arm], rows: rows(l, p) }))),
    };
  };
});

redraw();
