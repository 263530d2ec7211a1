// What was lost, gained and kept: a list of questions by arm, with a search. And the sorting of tables.

const PAGE_OF_CASES = 12;
const PAGE_OF_PICTURES = 24;

document.querySelectorAll(".finder").forEach((finder) => {
  const flips = data.flips.find((f) => f.task === finder.dataset.task);
  if (!flips) return;
  const isOld = flips.kind === "forgetting";
  const views = isOld ? ["lost", "gained", "kept"] : ["gained", "lost", "kept"];
  const words = flips.pictures
    ? { search: "Search classes and files", asked: "file", expected: "class", now: "now taken for" }
    : { search: "Search questions and answers", asked: "question", expected: "right answer", now: "says now" };
  const pictures = flips.pictures, most = pictures ? PAGE_OF_PICTURES : PAGE_OF_CASES;
  const state = { own: flips.arms[0], view: views[0], query: "", most };
  const update = (changes) => { Object.assign(state, { most }, changes); draw(); };
  finder.replaceChildren();
  const pick = make(finder, "div", { class: "pick" });
  const arms = make(pick, "div", { class: "legend", role: "group", "aria-label": "Arm" });
  const tools = make(pick, "div", { class: "tools" });
  const often = make(finder, "p", { class: "note" });
  const list = make(finder, "ul", { class: pictures ? "cases gallery" : "cases" });
  const foot = make(finder, "p", { class: "count", role: "status" });

  const buttons = flips.arms.map((own) => {
    const button = make(arms, "button", { type: "button" });
    mark(button, own.arm);
    button.append(data.arms[own.arm]);
    button.addEventListener("click", () => update({ own }));
    return button;
  });
  segments(tools, "What to show", views, 0, (i) => update({ view: views[i] }));
  const search = make(tools, "input", { type: "search", placeholder: words.search, "aria-label": words.search });
  search.addEventListener("input", () => update({ query: search.value.trim().toLowerCase() }));

  // Which arms still know a question, where the lists of lost ones are whole.
  const isWhole = isOld && flips.arms.length > 1 && flips.arms.every((own) => own.lost.length === own.totals.lost);
  const lostBy = flips.arms.map((own) => new Set(own.lost.map(([q]) => q)));

  function field(row, kind, key, text) {
    const cell = make(row, "span", { class: kind });
    if (key) make(cell, "span", { class: "key" }, `${key} `);
    const at = state.query ? text.toLowerCase().indexOf(state.query) : -1, end = at + state.query.length;
    if (at < 0) cell.append(text === "" ? "(nothing)" : text);
    else {
      cell.append(text.slice(0, at));
      make(cell, "mark", {}, text.slice(at, end));
      cell.append(text.slice(end));
    }
    return cell;
  }

  function others(row, q) {
    const knowing = flips.arms.filter((_, i) => !lostBy[i].has(q)).map((own) => own.arm);
    const names = knowing.map((arm) => data.arms[arm]).join(", ");
    const cell = make(row, "span", { class: "others", title: names });
    make(cell, "span", { class: "key" }, "still known by ");
    knowing.forEach((arm) => mark(cell, arm));
    make(cell, "span", { class: "unseen" }, names);
    if (!knowing.length) cell.append("no arm");
  }

  function picture(row, q) {
    const place = pictures[q];
    if (place !== null) make(make(row, "svg", { class: "picture", viewBox: "0 0 1 1", role: "img", "aria-label": flips.questions[q][1] }), "use", { href: `#picture-${place}` });
  }

  // The classes that an arm takes others for, those of most pictures first.
  function confused(own) {
    const counts = new Map();
    for (const [q, answer] of own.lost) {
      const pair = `${flips.questions[q][1]} for ${answer}`;
      counts.set(pair, (counts.get(pair) ?? 0) + 1);
    }
    const most = [...counts].filter(([, count]) => count > 1).sort(([, a], [, b]) => b - a).slice(0, 5);
    return most.length ? `Most often taken: ${most.map(([pair, count]) => `${pair} (${count})`).join(", ")}.` : "";
  }

  function draw() {
    const { own, view, query } = state, withOthers = isWhole && view === "lost";
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", flips.arms[i] === own));
    const found = own[view].filter(([q, answer]) => [...flips.questions[q], answer ?? ""].some((t) => t.toLowerCase().includes(query)));
    often.textContent = pictures && view === "lost" ? confused(own) : "";
    often.hidden = !often.textContent;
    list.replaceChildren();
    list.hidden = !found.length;
    list.classList.toggle("with-others", withOthers);
    const head = make(list, "li", { class: "head", "aria-hidden": "true" });
    for (const title of [words.asked, words.expected, view === "kept" ? "says" : words.now, ...(withOthers ? ["still known by"] : [])]) make(head, "span", {}, title);
    for (const [q, answer, seeds] of found.slice(0, state.most)) {
      const row = make(list, "li"), [question, expected] = flips.questions[q];
      if (pictures) picture(row, q);
      const asked = field(row, "asked", "", question);
      if (own.seeds > 1 && seeds) make(asked, "small", {}, `in ${seeds} of ${own.seeds} seeds`);
      field(row, "expected", words.expected, expected);
      if (!pictures || view === "lost") field(row, view === "lost" ? "wrong" : "right", words.now, answer ?? expected);
      if (withOthers) others(row, q);
    }
    const all = own.totals[view], cut = own[view].length < all ? `; ${all.toLocaleString("en")} in all, the rest in the items folder of the run` : "";
    const none = query ? "Nothing matches the search." : `${data.arms[own.arm]} has nothing here.`;
    foot.textContent = found.length ? `${Math.min(state.most, found.length)} of ${found.length.toLocaleString("en")}${cut}` : none;
    if (found.length > state.most) make(foot, "button", { type: "button", class: "more" }, "Show more").addEventListener("click", () => { state.most += 4 * most; draw(); });
  }

  draw();
});

// Sorting by a column; what was not measured stays at the end, whichever way round.
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[table.tBodies.length - 1];
  const key = (row, column) => {
    const cell = row.cells[column], raw = cell.dataset.v ?? cell.textContent;
    if (cell.classList.contains("none")) return null;
    return raw !== "" && Number.isFinite(Number(raw)) ? Number(raw) : raw.toLowerCase();
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  table.querySelectorAll(".sort").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, was = head.getAttribute("aria-sort");
    const down = was === "ascending" || (was === "none" && head.classList.contains("num"));
    table.querySelectorAll("[aria-sort]").forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b)));
    rows.forEach(([, row]) => body.append(row));
  }));
});

redraw();
