// What was lost, gained and kept: a list of questions by arm, with a search.

const PAGE_OF_CASES = 12;

document.querySelectorAll(".finder").forEach((finder) => {
  const flips = data.flips.find((f) => f.task === finder.dataset.task);
  if (!flips) return;
  const views = flips.kind === "forgetting" ? ["lost", "gained", "kept"] : ["gained", "lost", "kept"];
  const state = { arm: 0, view: views[0], query: "", shown: PAGE_OF_CASES };
  finder.replaceChildren();
  const pick = make(finder, "div", { class: "pick" });
  const arms = make(pick, "div", { class: "legend", role: "group", "aria-label": "Arm" });
  const tools = make(pick, "div", { class: "tools" });
  const list = make(finder, "ul", { class: "cases" });
  const foot = make(finder, "p", { class: "count", role: "status" });

  // Which arms still know a question, where the lists of lost ones are whole.
  const isWhole = flips.kind === "forgetting" && flips.arms.length > 1 && flips.arms.every((arm) => arm.lost.length === arm.totals.lost);
  const lostBy = flips.arms.map((arm) => new Set(arm.lost.map(([q]) => q)));
  const placeOf = (arm) => data.arms.findIndex((a) => a.label === arm.label);

  const update = (changes) => { Object.assign(state, { shown: PAGE_OF_CASES }, changes); draw(); };
  const buttons = flips.arms.map((arm, i) => {
    const button = make(arms, "button", { type: "button" });
    mark(button, placeOf(arm));
    button.append(arm.label);
    button.addEventListener("click", () => update({ arm: i }));
    return button;
  });
  segments(tools, "What to show", views, 0, (i) => update({ view: views[i] }));
  const search = make(tools, "input", { type: "search", placeholder: "Search questions and answers", "aria-label": "Search questions and answers" });
  search.addEventListener("input", () => update({ query: search.value.trim().toLowerCase() }));

  // The text with what was searched for marked.
  function marked(parent, text) {
    const at = state.query ? text.toLowerCase().indexOf(state.query) : -1;
    if (at < 0) return parent.append(text);
    parent.append(text.slice(0, at));
    make(parent, "mark", {}, text.slice(at, at + state.query.length));
    parent.append(text.slice(at + state.query.length));
  }

  function field(row, key, text, kind) {
    const cell = make(row, "span", { class: kind });
    if (key) make(cell, "span", { class: "key" }, key);
    marked(cell, text === "" ? "(nothing)" : text);
    return cell;
  }

  function draw() {
    const arm = flips.arms[state.arm];
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === state.arm));
    const found = arm[state.view].filter(([q, answer]) => !state.query || [...flips.questions[q], answer ?? ""].some((t) => t.toLowerCase().includes(state.query)));
    list.replaceChildren();
    list.hidden = !found.length;
    const head = make(list, "li", { class: "head", "aria-hidden": "true" });
    const withOthers = isWhole && state.view === "lost";
    list.classList.toggle("with-others", withOthers);
    const heads = ["question", "right answer", state.view === "kept" ? "says" : "says now", ...(withOthers ? ["still known by"] : [])];
    heads.forEach((t) => make(head, "span", {}, t));
    for (const [q, answer, seeds] of found.slice(0, state.shown)) {
      const row = make(list, "li"), [question, expected] = flips.questions[q];
      const cell = field(row, "", question, "");
      if (arm.seeds > 1 && seeds) make(cell, "small", {}, `in ${seeds} of ${arm.seeds} seeds`);
      field(row, "right answer", expected, "");
      field(row, "says now", answer ?? expected, state.view === "lost" ? "wrong" : "right");
      if (withOthers) others(row, q);
    }
    drawFoot(arm, found.length);
  }

  function others(row, q) {
    const knowing = flips.arms.filter((_, i) => !lostBy[i].has(q));
    const cell = make(row, "span", { class: "others", title: knowing.map((arm) => arm.label).join(", ") });
    make(cell, "span", { class: "key" }, "still known by");
    knowing.forEach((arm) => mark(cell, placeOf(arm)));
    make(cell, "span", { class: "unseen" }, knowing.map((arm) => arm.label).join(", "));
    if (!knowing.length) cell.append("no arm");
  }

  function drawFoot(arm, found) {
    const total = arm.totals[state.view], listed = arm[state.view].length;
    const shown = Math.min(state.shown, found);
    const cut = listed < total ? `; ${total.toLocaleString("en")} in all, the rest in the items folder of the run` : "";
    foot.textContent = found ? `${shown} of ${found.toLocaleString("en")}${cut}` : state.query ? "Nothing matches the search." : `${arm.label} has nothing here.`;
    if (found > shown) make(foot, "button", { type: "button", class: "more" }, "Show more").addEventListener("click", () => { state.shown += 4 * PAGE_OF_CASES; draw(); });
  }

  draw();
});
