// Sorting by a column; what was not measured stays at the end, whichever way round.

document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[table.tBodies.length - 1];
  const buttons = table.querySelectorAll(".sort");
  const key = (row, column) => {
    const cell = row.cells[column], raw = cell.dataset.v;
    if (cell.classList.contains("none")) return null;
    return raw !== undefined && raw !== "" && Number.isFinite(Number(raw)) ? Number(raw) : (raw ?? cell.textContent).toLowerCase();
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  buttons.forEach((button) => button.addEventListener("click", () => {
    const head = button.parentElement, column = Number(button.dataset.column);
    const down = head.getAttribute("aria-sort") !== "descending" && head.classList.contains("num") || head.getAttribute("aria-sort") === "ascending";
    buttons.forEach((other) => other.parentElement.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : (down ? -1 : 1) * compare(a, b)));
    rows.forEach(([, row]) => body.append(row));
  }));
});

redraw();
