"use strict";
// Sorting and filtering. Without it every row is there, in the order of the run directories.
(() => {
  const value = (cell) => cell.dataset.sort ?? cell.textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [Number.parseFloat(a), Number.parseFloat(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    return a.localeCompare(b, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      if ("fixed" in header.dataset) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const falling = header.getAttribute("aria-sort") === "ascending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const sign = falling ? -1 : 1;
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => sign * compare(value(a.cells[column]), value(b.cells[column])));
        table.tBodies[0].append(...rows);
      });
    });
  }
  for (const form of document.querySelectorAll("form.filters")) {
    const rows = [...document.getElementById(form.dataset.for).tBodies[0].rows];
    const { text, benchmark, modality } = form.elements;
    const told = form.querySelector("output");
    const show = () => {
      const wanted = text.value.trim().toLowerCase();
      let count = 0;
      for (const row of rows) {
        row.hidden =
          (benchmark.value && row.dataset.benchmark !== benchmark.value) ||
          (modality.value && row.dataset.modality !== modality.value) ||
          !row.textContent.toLowerCase().includes(wanted);
        count += row.hidden ? 0 : 1;
      }
      told.textContent = `${count} of ${rows.length} questions`;
    };
    form.addEventListener("input", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    show();
  }
  // A link into something folded opens it.
  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    for (let node = target; node; node = node.parentElement) {
      if (node.tagName === "DETAILS") node.open = true;
    }
  };
  addEventListener("hashchange", open);
  open();
})();
