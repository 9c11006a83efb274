/* What the pages do by themselves. Plain, so that it works from file://, too. */
"use strict";

(() => {
  /** Names the column in each cell of a table that site.css stacks, and keeps the roles that display: block takes away. */
  const label = (table) => {
    const columns = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
    table.setAttribute("role", "table");
    for (const row of table.rows) {
      row.setAttribute("role", "row");
      [...row.cells].forEach((cell, index) => {
        cell.setAttribute("role", cell.tagName === "TH" ? "columnheader" : "cell");
        cell.dataset.label = columns[index];
        cell.classList.toggle("empty", !cell.textContent.trim());
      });
    }
  };

  /** Keeps options such as --llama on one line: a hyphen would break them. */
  const short = () => {
    for (const word of document.querySelectorAll("article :not(pre) > code .pre"))
      word.classList.toggle("short", word.textContent.length <= 32);
  };

  /** Marks the columns in which every cell is a figure, such as 8.00 or 1,802 KiB, or says that there is none. */
  const figures = (table) => {
    const rows = [...(table.tBodies[0]?.rows ?? [])];
    const figure = /^([-+±]?[\d.,]+ ?(%|ms|s|B|[KMG]i?B)?|no|)$/;
    const columns = rows.length ? [...rows[0].cells].keys() : [];
    for (const index of columns) {
      const cells = rows.map((row) => row.cells[index]).filter(Boolean);
      const texts = cells.map((cell) => cell.textContent.trim());
      if (texts.every((text) => figure.test(text)) && texts.some((text) => /\d/.test(text)))
        cells.forEach((cell) => cell.classList.add("number"));
    }
  };

  /** Returns the filter that the address asks for: identifiers.html#filter=lion. */
  const asked = () => {
    const found = location.hash.match(/^#filter=(.*)$/);
    return found && decodeURIComponent(found[1].replaceAll("+", " "));
  };

  /** Puts a box above a table that hides the rows in which a word of the box does not occur. */
  const filter = (table) => {
    const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
    const box = document.createElement("div");
    box.className = "filter";
    box.setAttribute("role", "search");
    const name = box.appendChild(document.createElement("label"));
    name.textContent = "Filter";
    const input = box.appendChild(document.createElement("input"));
    input.type = "search";
    input.id = name.htmlFor = "filter";
    input.autocomplete = "off";
    input.spellcheck = false;
    input.placeholder = "lion, 8-bit, torchao, cpu";
    const count = box.appendChild(document.createElement("output"));
    count.htmlFor = "filter";
    count.setAttribute("aria-live", "polite");

    const show = () => {
      const words = input.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
      let shown = 0;
      for (const [row, text] of rows) {
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length}`;
    };
    const follow = () => {
      if (asked() === null) return;
      input.value = asked();
      show();
    };
    input.addEventListener("input", () => {
      show();
      const value = input.value.trim();
      const hash = value ? `#filter=${encodeURIComponent(value)}` : "";
      history.replaceState(null, "", location.pathname + location.search + hash);
    });
    window.addEventListener("hashchange", follow);

    (table.closest(".table-wrapper") ?? table).before(box);
    show();
    follow();
  };

  /** Sections moved from the overview to pages of their own: leads identifiers.html#optim-lion-8bit there. */
  const moved = () => {
    const [page, target] = [location.pathname.split("/").pop(), location.hash.replaceAll("_", "-")];
    if (page !== "identifiers.html" || !target.startsWith("#optim-")) return;
    const link = document.querySelector(`table.filtered a[href$="${CSS.escape(target).replace("\\#", "#")}"]`);
    if (link) location.replace(link.href);
  };

  document.addEventListener("DOMContentLoaded", () => {
    short();
    document.querySelectorAll("article table.docutils").forEach(figures);
    document.querySelectorAll("table.stacked").forEach(label);
    document.querySelectorAll("table.filtered").forEach(filter);
    moved();
    window.addEventListener("hashchange", moved);
  });
})();
