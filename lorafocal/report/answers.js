"use strict";
{
  const entries = [...document.querySelectorAll("article")];
  const form = document.forms.namedItem("filters");
  const count = document.getElementById("count");
  const verdicts = [...form.querySelectorAll("select")];
  const { text, differs } = form.elements;
  let texts = null; // of each entry in small letters, made when first looked for
  let at = null; // the entry that j and k move from

  const textOf = (entry) =>
    [...entry.querySelectorAll(".text")].map((part) => part.textContent).join("\n").toLowerCase();

  function apply() {
    const wanted = text.value.trim().toLowerCase();
    if (wanted && !texts) texts = entries.map(textOf);
    let shown = 0;
    entries.forEach((entry, number) => {
      const kinds = entry.dataset.verdicts.split("|");
      const fits =
        (!differs.checked || "differs" in entry.dataset) &&
        verdicts.every((choice, index) => !choice.value || kinds[index] === choice.value) &&
        (!wanted || texts[number].includes(wanted));
      entry.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${entries.length} prompts`;
  }

  function remember() {
    const state = new URLSearchParams();
    if (text.value) state.set("text", text.value);
    if (differs.checked) state.set("differs", "1");
    for (const choice of verdicts) if (choice.value) state.set(choice.name, choice.value);
    if (at) state.set("at", at.id);
    history.replaceState(null, "", `#${state}`);
  }

  function clear() {
    form.reset();
    apply();
  }

  // Entries out of view have no height of their own until they come near: what lies above moves while one scrolls.
  function settle(frames) {
    at.scrollIntoView({ block: "start" });
    if (frames) requestAnimationFrame(() => settle(frames - 1));
  }

  function show(entry) {
    at?.classList.remove("at");
    at = entry;
    at.classList.add("at");
    settle(4);
  }

  function read() {
    const hash = location.hash.slice(1);
    const state = new URLSearchParams(/^p\d+$/.test(hash) ? { at: hash } : hash);
    text.value = state.get("text") ?? "";
    differs.checked = state.get("differs") === "1";
    for (const choice of verdicts) choice.value = state.get(choice.name) ?? "";
    for (const choice of verdicts) if (choice.selectedIndex < 0) choice.value = "";
    apply();
    const entry = entries.find((each) => each.id === state.get("at"));
    if (entry) show(entry);
  }

  function step(by) {
    const shown = entries.filter((entry) => !entry.hidden);
    if (!shown.length) return;
    const here = shown.indexOf(at);
    const next = here < 0 ? (by > 0 ? 0 : shown.length - 1) : here + by;
    show(shown[Math.min(Math.max(next, 0), shown.length - 1)]);
    remember();
  }

  const keys = { j: () => step(1), k: () => step(-1), "/": () => text.focus() };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      document.activeElement.blur();
      clear();
      remember();
    } else if (!event.ctrlKey && !event.metaKey && !event.altKey && !event.target.matches("input[type=search], select")) {
      if (keys[event.key]) {
        event.preventDefault();
        keys[event.key]();
      }
    }
  });
  form.addEventListener("input", () => {
    apply();
    remember();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  addEventListener("hashchange", read);
  read();
}
