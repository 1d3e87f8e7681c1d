// Sort a table by a column when its head is clicked: numbers as numbers, missing cells last.
document.addEventListener("click", (event) => {
  const head = event.target.closest(".md-typeset th");
  if (!head) return;
  const index = head.cellIndex;
  const body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending";
  head.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[index].textContent.trim();
  const number = (text) => parseFloat(text.replace("\u2212", "-"));
  [...body.rows]
    .sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "\u2013" || y === "\u2013") return (x === "\u2013") - (y === "\u2013");
      const order = isNaN(number(x)) || isNaN(number(y)) ? y.localeCompare(x) : number(y) - number(x);
      return down ? order : -order;
    })
    .forEach((row) => body.append(row));
});
