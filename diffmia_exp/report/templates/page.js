"use strict";

// Sorting: a heading's button sorts its table, descending first for numbers, and says so in aria-sort.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    const numbers = heading.classList.contains("n");
    const before = heading.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numbers;
    const compare = numbers ? (a, b) => value(a) - value(b) : (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => (down ? compare(b, a) : compare(a, b))));
  }));
}

// Filtering: what has data-of is shown where it holds every chosen value.
const form = document.getElementById("filters");
if (form) {
  const parts = [...document.querySelectorAll("[data-of]")].map((element) => [element, JSON.parse(element.dataset.of)]);
  const lines = [...document.querySelectorAll("#board tbody tr")];
  const filter = () => {
    const chosen = [...new FormData(form)].filter(([, value]) => value);
    for (const [element, of] of parts) element.hidden = !chosen.every(([key, value]) => of[key].includes(value));
    document.getElementById("count").value = `${lines.filter((line) => !line.hidden).length} of ${lines.length} lines`;
  };
  form.addEventListener("change", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  filter(); // a browser may have kept a choice over a reload
}

// What the mark under the pointer stands for.
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest?.("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${event.clientY > innerHeight / 2 ? event.clientY - tip.offsetHeight - 14 : event.clientY + 18}px`;
});
