"use strict";
// One pair at a time. Every text comes in through textContent, so data stays data.
(() => {
  const at = (id) => document.getElementById(id);
  const { ballot, seal, pairs } = JSON.parse(at("ballot-data").textContent);
  const place = `pedigree-ballot-${ballot}`;
  const buttons = [...document.querySelectorAll("[data-vote]")];
  const words = buttons.map((button) => button.textContent);
  const keys = { a: "a", b: "b", t: "tie" };
  const votes = new Map();
  const others = new Map();  // votes on pairs of the ballot that this page does not have: a page may have fewer (--n)
  let now = 0;
  let keeps = true;

  // Read what is kept: a second tab of the ballot may have added to it. Returns the rater.
  function read() {
    try {
      const kept = JSON.parse(localStorage.getItem(place)) ?? {};
      for (const { pair, vote } of kept.votes ?? []) {
        if (!pairs.some(({ id }) => id === pair)) others.set(pair, vote);
        else if (Object.values(keys).includes(vote)) votes.set(pair, vote);
      }
      return typeof kept.rater === "string" ? kept.rater : "";
    } catch { return ""; /* nothing readable was kept: a new ballot */ }
  }

  function restore() {
    at("rater").value = read();
    const open = pairs.findIndex(({ id }) => !votes.has(id));
    now = open < 0 ? pairs.length - 1 : open;
  }

  function sheet() {
    const cast = pairs.filter(({ id }) => votes.has(id)).map(({ id }) => ({ pair: id, vote: votes.get(id) }));
    return { ballot, pairs: pairs.length, seal, rater: at("rater").value.trim(), votes: cast };
  }

  function keep() {
    const found = sheet();
    const unseen = [...others].map(([pair, vote]) => ({ pair, vote }));
    try { localStorage.setItem(place, JSON.stringify({ ...found, votes: [...found.votes, ...unseen] })); } catch { keeps = false; }
  }

  function message([role, content], alone) {
    const made = document.createElement("p");
    made.className = "text";
    if (!alone) made.appendChild(document.createElement("small")).textContent = role;
    const text = made.appendChild(document.createElement("bdi"));
    text.dir = "auto";
    text.textContent = content;
    return made;
  }

  function folded([summary, content, open]) {
    const made = document.createElement("details");
    made.className = "part";
    made.open = open;
    made.appendChild(document.createElement("summary")).textContent = summary;
    made.appendChild(document.createElement("pre")).textContent = content;
    return made;
  }

  function show() {
    const { id, prompt, answers, folds } = pairs[now];
    const left = pairs.length - votes.size;
    at("hits").textContent = `Pair ${now + 1} of ${pairs.length} · ${left ? `${votes.size} voted, ${left} to go` : "all voted: save below"}` +
      (keeps ? "" : " · this browser does not store votes, so save before you close it");
    at("back").disabled = now === 0;
    at("on").disabled = now === pairs.length - 1;
    const [tools, ...of] = folds?.prompt ?? [[]];
    at("prompt").replaceChildren(...tools.map(folded), ...prompt.flatMap((turn, i) => [message(turn, prompt.length === 1), ...(of[i] ?? []).map(folded)]));
    document.querySelectorAll(".side").forEach((side, i) => {
      side.querySelector("bdi").textContent = answers[i];
      side.querySelectorAll("details").forEach((old) => old.remove());
      side.append(...(folds?.answers[i] ?? []).map(folded));
    });
    buttons.forEach((button, i) => {
      const chosen = votes.get(id) === button.dataset.vote;
      button.setAttribute("aria-pressed", chosen);
      button.textContent = (chosen ? "✓ " : "") + words[i];
    });
  }

  function turn(to) {
    now = Math.min(Math.max(to, 0), pairs.length - 1);
    show();
    at("hits").focus({ preventScroll: true });
    at("vote").scrollIntoView({ block: "start" });
  }

  function vote(choice) {
    read();
    votes.set(pairs[now].id, choice);
    keep();
    at("saved").textContent = "";
    if (votes.size === pairs.length && now === pairs.length - 1) {
      show();
      at("rater").focus();
    } else {
      turn(now + 1);
    }
  }

  function save() {
    const found = sheet();
    if (!found.rater) {
      at("saved").textContent = "Give your name or initials first.";
      at("rater").focus();
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(found, null, 1) + "\n"], { type: "application/json" }));
    link.download = `votes-${ballot}-${found.rater.replace(/[^\p{L}\p{N}-]+/gu, "_")}.json`;
    link.click();
    const left = pairs.length - found.votes.length;
    at("saved").textContent = `Saved as ${link.download}. ${left ? `${left} to go: vote on them and save again.` : "Send this file back."}`;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === at("rater")) return;
    const key = event.key.toLowerCase();
    if (Object.hasOwn(keys, key) && !event.repeat) vote(keys[key]);
    else if (event.key === "ArrowLeft") turn(now - 1);
    else if (event.key === "ArrowRight") turn(now + 1);
    else return;
    event.preventDefault();
  });
  buttons.forEach((button) => button.addEventListener("click", () => vote(button.dataset.vote)));
  at("back").addEventListener("click", () => turn(now - 1));
  at("on").addEventListener("click", () => turn(now + 1));
  at("rater").addEventListener("input", () => { read(); keep(); });
  at("rater").addEventListener("keydown", (event) => { if (event.key === "Enter") save(); });
  at("download").addEventListener("click", () => { read(); show(); save(); });
  addEventListener("storage", ({ key }) => { if (key === place) { read(); show(); } });
  restore();
  show();
})();
