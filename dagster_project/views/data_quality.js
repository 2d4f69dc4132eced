"use strict";
// Pages of pairs under a filter. Every text comes in through textContent, so data stays data.
(() => {
  const at = (id) => document.getElementById(id);
  if (!at("pairs-data")) return;
  const pairs = JSON.parse(at("pairs-data").textContent);
  const words = pairs.map((pair) =>
    [pair.check, ...pair.sides.flatMap((side) => [side.place, side.text.join("")])].join("\n").toLowerCase());
  const size = 20;
  const count = (n) => n.toLocaleString("en-US");
  let found = [];
  let start = 0;

  function article(pair) {
    const made = at("pair").content.cloneNode(true);
    made.querySelector(".score").textContent = pair.score;
    for (const name of ["check", "rule", "part"]) made.querySelector(`.${name} bdi`).textContent = pair[name];
    made.querySelectorAll(".side").forEach((side, i) => {
      const { place, text, cut } = pair.sides[i];
      side.querySelector("code bdi").textContent = place;
      side.querySelectorAll("p bdi > *").forEach((piece, k) => { piece.textContent = text[k]; });
      side.querySelector("small").textContent = cut ? `${count(cut)} character${cut === 1 ? "" : "s"} not shown` : "";
    });
    return made;
  }

  function show() {
    const end = Math.min(start + size, found.length);
    at("hits").textContent = found.length
      ? `${count(start + 1)} to ${count(end)} of ${count(found.length)} pair${found.length === 1 ? "" : "s"}`
      : "No pair fits the filter";
    at("back").disabled = start === 0;
    at("on").disabled = end === found.length;
    at("list").replaceChildren(...found.slice(start, end).map((i) => article(pairs[i])));
  }

  function filter() {
    const check = at("by-check").value;
    const rule = at("by-rule").value;
    const score = Number(at("by-score").value);
    const wanted = at("by-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    found = [...pairs.keys()].filter((i) =>
      (check === "" || pairs[i].number === Number(check)) && (rule === "" || pairs[i].rule === rule) &&
      pairs[i].score >= score && wanted.every((word) => words[i].includes(word)));
    start = 0;
    show();
  }

  function turn(by) {
    start += by;
    show();
    at("hits").focus({ preventScroll: true });
    at("pager").scrollIntoView({ block: "start" });
  }

  function open(hash) {
    const check = /^#pairs-(\d+)$/.exec(hash);
    if (!check) return;
    at("by-check").value = check[1];
    at("by-rule").value = at("by-text").value = "";
    at("by-score").value = 0;
    filter();
    at("pairs").scrollIntoView();
    at("by-check").focus({ preventScroll: true });
  }

  at("plain").remove();
  at("filter").hidden = at("pager").hidden = false;
  for (const id of ["by-check", "by-rule", "by-score", "by-text"]) at(id).addEventListener("input", filter);
  at("back").addEventListener("click", () => turn(-size));
  at("on").addEventListener("click", () => turn(size));
  window.addEventListener("hashchange", () => open(location.hash));
  document.querySelectorAll('a[href^="#pairs-"]').forEach((link) =>
    link.addEventListener("click", () => { if (link.hash === location.hash) open(link.hash); }));
  filter();
  open(location.hash);
})();
