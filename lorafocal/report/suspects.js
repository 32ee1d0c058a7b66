"use strict";
{
  const list = document.getElementById("suspects");
  const entries = [...list.children];
  const form = document.forms.namedItem("filters");
  const count = document.getElementById("count");
  const { text, show, order } = form.elements;
  const marks = entries.map((entry) => entry.querySelector("input[type=checkbox]"));
  let texts = null; // of each entry in small letters, made when first looked for
  let at = null; // the entry that j and k move from

  const textOf = (entry) =>
    [...entry.querySelectorAll(".text")].map((part) => part.textContent).join("\n").toLowerCase();
  const markOf = (entry) => marks[entries.indexOf(entry)];
  const shown = () => [...list.children].filter((entry) => !entry.hidden);

  function sort() {
    const by = {
      suspicion: ({ dataset }) => -dataset.suspicion,
      reference: ({ dataset }) => +dataset.lead,
      length: ({ dataset }) => +dataset.longer,
    };
    const of = by[order.value] ?? by.suspicion;
    list.append(...[...entries].sort((one, other) => of(one) - of(other)));
  }

  function apply() {
    const wanted = text.value.trim().toLowerCase();
    if (wanted && !texts) texts = entries.map(textOf);
    entries.forEach((entry, number) => {
      const kind =
        !show.value ||
        (show.value === "marked" && marks[number].checked) ||
        (show.value === "unmarked" && !marks[number].checked) ||
        (show.value === "reference" && entry.dataset.lead < 0);
      entry.hidden = !kind || Boolean(wanted && !texts[number].includes(wanted));
    });
    tell();
  }

  function tell() {
    const marked = marks.filter((mark) => mark.checked).length;
    count.textContent = `${shown().length} of ${entries.length} shown, ${marked} marked`;
  }

  // Marks as the page brought them are not repeated in the address: only those that a person changed.
  function remember() {
    const state = new URLSearchParams();
    for (const field of [text, show, order]) if (field.value) state.set(field.name, field.value);
    const changed = marks.flatMap((mark, number) => (mark.checked === mark.defaultChecked ? [] : [number + 1]));
    if (changed.length) state.set("changed", changed.join("."));
    if (at) state.set("at", at.id);
    history.replaceState(null, "", `#${state}`);
  }

  function read() {
    const hash = location.hash.slice(1);
    const state = new URLSearchParams(/^p\d+$/.test(hash) ? { at: hash } : hash);
    for (const field of [text, show, order]) field.value = state.get(field.name) ?? "";
    for (const choice of [show, order]) if (choice.selectedIndex < 0) choice.value = "";
    const changed = new Set((state.get("changed") ?? "").split("."));
    marks.forEach((mark, number) => (mark.checked = mark.defaultChecked !== changed.has(String(number + 1))));
    sort();
    apply();
    const entry = entries.find((each) => each.id === state.get("at"));
    if (entry) go(entry);
  }

  // Entries out of view have no height of their own until they come near: what lies above moves while one scrolls.
  function settle(frames) {
    at.scrollIntoView({ block: "start" });
    if (frames) requestAnimationFrame(() => settle(frames - 1));
  }

  function go(entry) {
    at?.classList.remove("at");
    at = entry;
    at.classList.add("at");
    settle(4);
  }

  function step(by) {
    const there = shown();
    if (!there.length) return;
    const here = there.indexOf(at);
    const next = here < 0 ? (by > 0 ? 0 : there.length - 1) : here + by;
    go(there[Math.min(Math.max(next, 0), there.length - 1)]);
    remember();
  }

  function mark() {
    if (!at || at.hidden) return;
    markOf(at).checked = !markOf(at).checked;
    tell();
    remember();
  }

  function download() {
    const lines = entries.filter((entry, number) => marks[number].checked).map((entry) => `${entry.dataset.line}\n`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "text/plain" }));
    link.download = "leave_out.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const keys = { j: () => step(1), k: () => step(-1), x: mark, "/": () => text.focus() };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      document.activeElement.blur();
      text.value = show.value = "";
      apply();
      remember();
      return;
    }
    const typing = event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=search], select");
    if (!typing && keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });
  form.addEventListener("input", () => {
    sort();
    apply();
    remember();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("change", () => {
    tell();
    remember();
  });
  document.getElementById("download").addEventListener("click", download);
  form.hidden = false;
  addEventListener("hashchange", read);
  read();
}
