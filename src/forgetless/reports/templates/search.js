// The charts of a search. A point is a trial with its scores {value, low, high} by objective; those on the front are large.

const axisOf = (kind) => data.axes.find((axis) => axis.kind === kind);
const arrow = (axis, sign) => `${axis.higher ? sign : sign === "\u2191" ? "\u2193" : "\u2190"} ${axis.title}`;

function range(kind, points) {
  const values = points.flatMap((p) => [p[kind].value, p[kind].low, p[kind].high]).filter((v) => v !== null);
  const [low, high] = extent([...values, data.base[kind]], 0.06);
  return axisOf(kind).higher ? [low, high] : [high, low];
}

const rowsOf = (p) => [
  ["trial", String(p.trial)],
  ...data.axes.map((axis) => [axis.title, `${p[axis.kind].value.toPrecision(4)}${p[axis.kind].n > 1 ? `, ${p[axis.kind].n} seeds` : ""}`]),
  ...p.settings.map((text) => text.split("=", 2).map(String)).map(([name, value]) => [name, value ?? ""]),
];

define("front", () => () => {
  const own = shown(data.points);
  const front = data.points.filter((p) => p.front).sort((a, b) => a.forgetting.value - b.forgetting.value);
  const place = (p) => ({ x: p.forgetting.value, y: p.learning.value });
  return {
    x: { title: `${axisOf("forgetting").title} ${axisOf("forgetting").higher ? "\u2192" : "\u2192 less"}`, range: range("forgetting", data.points) },
    y: { title: arrow(axisOf("learning"), "\u2191"), range: range("learning", data.points) },
    lines: [{ points: front.map((p) => [p.forgetting.value, p.learning.value]), kind: "front" }],
    bars: own.filter((p) => p.front).map((p) => ({ arm: p.arm, x: p.forgetting, y: p.learning })),
    bases: [{ x: data.base.forgetting, y: data.base.learning }],
    names: [{ x: data.base.forgetting, y: data.base.learning, text: "base" }],
    marks: own.map((p) => ({ arm: p.arm, ...place(p), size: p.front ? 14 : 8, minor: !p.front, title: data.arms[p.arm], rows: rowsOf(p) })),
  };
});

define("volume", () => () => {
  const last = Math.max(...data.volume.map(([trial]) => trial));
  return {
    x: { title: "trial \u2192", range: [0, last * 1.02 || 1], last },
    y: { title: "\u2191 Hypervolume, share of the box of all trials", share: true, range: [0, 1] },
    lines: [{ points: data.volume, kind: "curve c0" }],
    follow: (trial) => ({ title: `trial ${trial}`, rows: [["hypervolume", data.volume.find(([t]) => t === trial)[1].toFixed(3)]] }),
    heights: [240, 300],
  };
});

define("slices", (tools) => {
  let [slice] = data.slices, [axis] = data.axes;
  choice(tools, "Setting", data.slices.map((s) => s.title), (i) => (slice = data.slices[i]));
  choice(tools, "against", data.axes.map((a) => a.title), (i) => (axis = data.axes[i]));
  return () => {
    const own = shown(data.points.map((p, i) => ({ ...p, place: slice.places[i] })).filter((p) => p.place !== null));
    const marks = own.map((p) => ({ arm: p.arm, x: p.place, y: p[axis.kind].value, size: p.front ? 14 : 8, minor: !p.front, title: data.arms[p.arm], rows: rowsOf(p) }));
    return { x: { title: `${slice.title} \u2192`, range: extent(marks.length ? marks.map((m) => m.x) : [0, 1], 0.08) }, y: { title: arrow(axis, "\u2191"), range: range(axis.kind, data.points) }, marks };
  };
});

redraw();
