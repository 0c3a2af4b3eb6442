// A column's heading sorts the rows of each group; without scripts tables stay as they were written.
const minus = "\u2212";

function keyOf(row, column) {
  const cell = row.cells[column];
  if (!cell) return "";
  const text = (cell.querySelector("data")?.value ?? cell.textContent).trim();
  const number = Number.parseFloat(text.replace(minus, "-"));
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b);
  return typeof a === "number" ? -1 : 1;
}

function sortBy(table, heads, column) {
  const down = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  for (const group of table.tBodies) {
    const rows = [...group.rows].filter((row) => !row.querySelector('th[scope="rowgroup"]'));
    const keyed = rows.map((row) => [keyOf(row, column), row]);
    keyed.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
    group.append(...keyed.map(([, row]) => row));
  }
}

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")];
  const rows = [...table.tBodies].map((group) => group.rows.length);
  if (Math.max(0, ...rows) < 3) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, heads, column));
    head.append(button);
  });
}
