"use strict";
// The questions that fit a filter, the first of them at once.
(() => {
  const at = (id) => document.getElementById(id);
  if (!at("samples")) return;
  const samples = [...at("samples").children];
  const words = samples.map((sample) => sample.textContent.toLowerCase());
  const wrong = samples.map((sample) => new Set(sample.dataset.wrong.split(" ")));
  const size = 10;
  let most = size;

  function show() {
    const wanted = at("by-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [failed, right, category] = ["by-wrong", "by-right", "by-category"].map((id) => at(id)?.value ?? "");
    let found = 0;
    samples.forEach((sample, i) => {
      const fits = (failed === "" || wrong[i].has(failed)) && (right === "" || !wrong[i].has(right)) &&
        (category === "" || sample.dataset.category === category) && wanted.every((word) => words[i].includes(word));
      found += fits;
      sample.hidden = !fits || found > most;
    });
    at("hits").textContent = found ? `${Math.min(found, most)} of ${found} question${found === 1 ? "" : "s"}` : "No question fits the filter";
    at("more").hidden = found <= most;
  }

  at("filter").hidden = at("pager").hidden = false;
  for (const id of ["by-wrong", "by-right", "by-category", "by-text"]) at(id)?.addEventListener("input", () => { most = size; show(); });
  at("more").addEventListener("click", () => { most += size; show(); });
  show();
})();
