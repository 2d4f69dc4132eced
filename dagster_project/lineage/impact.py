"""Which models saw this record? Every model in history, merged and aligned ones through their parents, with split and steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.text import visible
from dagster_project.lineage.index import EVIDENCE, Index, Made, record_key
from dagster_project.lineage.lineage import fetch

SHOWN = 12
"""Steps of a model that are shown at a terminal, and records, and outputs that are missing; `--json` has all."""


@dataclass
class Seen:
    """What one model saw by itself of what is asked about."""

    rows: Counter[str] = field(default_factory=Counter)
    """Split -> rows."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """(step, epoch) of each time it learnt from one of them."""
    learnt: tuple[int, int, int] | None = None
    """(records, first step, last step), where not each record is asked about."""
    tells: bool = True
    """Is it known at which steps it learnt from a record?"""

    def plus(self, other: Seen) -> Seen:
        """What it saw of both, where not each record is asked about."""
        learnt = None
        if self.learnt and other.learnt:
            parts = [part for part in (self.learnt, other.learnt) if part[0]] or [self.learnt]
            learnt = (sum(n for n, _, _ in parts), min(first for _, first, _ in parts), max(last for _, _, last in parts))
        return Seen(self.rows + other.rows, learnt=learnt)


def impact(
    root: Path,
    record: str | None = None,
    text: str | None = None,
    source: str | None = None,
    content: str | None = None,
    near: bool = False,
) -> dict[str, Any]:
    """The models that saw a record, a text, a source, or a file or folder by its hash. Just one of the four is given.

    Args:
        text: what a message says, but for case and white space.
        source: a file, or a folder and all in it, as the records name it.
        content: md5 or sha256, or the beginning of one, of a source or of any output or file of one.
        near: also look for near-copies of the record or text (curation/similarity/overlap.py).
    Returns:
        {"asked", "records", "models", "near", "unknown", "shallow"}: `models` in the order of history, each with the splits it saw it in, the steps
        it learnt at, and the model among its parents that did; `unknown` are models of which it cannot be said, with what is missing.
    """
    if near and record is None and text is None:
        raise InputError("--near compares texts", "give --text, or --record")
    index = Index(root)
    index.read_records()
    question = _Question(index)
    asked: dict[str, Any] = {"record": record, "text": text, "source": source, "hash": content}
    copies: list[dict[str, Any]] = []
    if source is not None:
        question.source(source.removeprefix("./"))
    elif content is not None:
        question.content(content)
    else:
        named = [record, *repaired_from(index, record)] if record is not None else []
        keys = [record_key(one) for one in named] if named else index.saying(text or "")
        if near:
            copies = _near(index, keys, text)
            keys = sorted({*keys, *(record_key(copy["example_id"]) for copy in copies)})
        question.records(keys, {record_key(one): one for one in named})
    models = question.models()
    known = {model["md5"] for model in models}
    return {
        "asked": {name: value for name, value in asked.items() if value is not None},
        "records": question.asked,
        "models": models,
        **({"near": copies} if near else {}),
        "unknown": [model for model in question.unknown() if model["md5"] not in known],
        "shallow": index.history.shallow,
    }


def repaired_from(index: Index, source_id: str) -> list[str]:
    """What a source row became where it was repaired: the ids under which ledgers of the whole history have it."""
    import pyarrow.parquet as pq

    found: dict[str, None] = {}
    for out in dict.fromkeys(made.md5 for made in index.made.values() if not made.weights):
        path = index.place(out, "ledger.parquet")
        if path is None or "source_id" not in pq.read_schema(path).names:
            continue
        rows = pq.read_table(path, columns=["example_id"], filters=[("source_id", "==", source_id)])
        found |= dict.fromkeys(rows["example_id"].to_pylist())
    return [*found]


class _Question:
    """What is asked, as rows of shards and steps of evidence; and who is the answer."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.asked: list[str] = []
        """The records, where it is records that are asked about."""
        self._own: dict[int, Seen] = {}
        """Run of a model -> what it saw by itself."""
        self._certain = False
        """Does dvc.lock alone tell the answer?"""

    @cached_property
    def _trained(self) -> list[Made]:
        """The models that learnt something, or may have: those made from data, or with evidence of it."""
        index = self.index
        return [
            made
            for made in index.made.values()
            if made.weights and (index.data(made) or EVIDENCE in (index.files(made.md5) or {})) and not self._copies(made)
        ]

    def _copies(self, made: Made) -> bool:
        """Is it one of the models it was made from, byte for byte? Then all it saw it saw as that."""
        mine = self.index.weights(made.md5)
        return bool(mine) and any(mine <= self.index.weights(parent.md5) for parent in self.index.parents(made))

    def records(self, keys: Sequence[bytes], names: Mapping[bytes, str]) -> None:
        self.asked = [names.get(key, key.hex()) for key in keys]
        shards: dict[str, Counter[str]] = defaultdict(Counter)
        steps: dict[str, list[tuple[int, int]]] = defaultdict(list)
        learnt: Counter[str] = Counter()
        for found in self.index.where(keys):
            if found.split:
                shards[found.out][found.split] += 1
            else:
                steps[found.out] += found.steps
                learnt[found.out] += 1
        for made in self._trained:
            rows = sum((shards[out] for out in self.index.data(made).keys() & shards.keys()), Counter[str]())
            if learnt[made.md5] and not rows["train"]:  # the data set is not here, but the evidence is
                rows["train"] = learnt[made.md5]
            if rows:
                self._own[made.id] = Seen(rows, sorted(steps.get(made.md5, [])), tells=self.index.tells(made))

    def source(self, name: str, only: frozenset[str] | None = None) -> None:
        """Args:
        only: hashes of outputs of which one must be among what the data was made from.
        """
        drawn = self.index.drawn(name)
        for made in self._trained:
            if only is not None and not only & self.index.above(made).keys():
                continue
            rows = sum((Counter(drawn[out]) for out in self.index.data(made).keys() & drawn.keys()), Counter[str]())
            if rows:
                before = self._own.get(made.id)  # of another source with the same bytes
                found = Seen(rows, learnt=self.index.learnt(made, name))
                self._own[made.id] = before.plus(found) if before else found

    def content(self, wanted: str) -> None:
        """Raises:
        InputError: nothing in history has such a hash.
        """
        index, prefix = self.index, wanted.lower()
        if len(prefix) < 6:
            raise InputError(f"--hash {wanted}: too short to mean one thing", "give at least six digits")
        sources = index.drawing(prefix)
        for name, outs in sources.items():
            self.source(name, outs)
        files, outs = index.holding(prefix)
        read = {made.id for made in index.made.values() for _, _, md5 in made.reads if md5.startswith(prefix)}
        self._certain = bool(read or index.starting_with(prefix))
        if not (self._certain or sources or files):
            raise InputError(f"--hash {wanted}: no output, file of one, or source in history has this hash", "see `pedigree audit MODEL`")
        for made in self._trained:
            above = index.above(made)
            shards = index.shards(made)
            whole = any(one.id in read for one in [*above.values(), made]) or any(out.startswith(prefix) for out in above)
            mine = [(split, md5) for _, split, md5 in shards if whole or md5 in files]
            if not (whole or mine or outs & above.keys()):
                continue
            rows = Counter[str]()
            for split, md5 in mine or [(split, md5) for _, split, md5 in shards]:
                rows[split] += index.sizes.get(md5, 0)
            learnt = index.learnt(made, None) if whole or not mine else self._from(made, [md5 for split, md5 in mine if split == "train"])
            self._own[made.id] = Seen(rows, learnt=learnt)
        for made in index.made.values():
            if made.weights and made.md5 in outs and made.id not in self._own:
                self._own[made.id] = Seen()

    def _from(self, made: Made, shards: Sequence[str]) -> tuple[int, int, int] | None:
        """(records, first step, last step) of what a model learnt from some shards; None if that is not known."""
        from dagster_project.core.records import read_table

        places = self.index.texts()
        if not self.index.tells(made) or any(md5 not in places for md5 in shards):
            return None
        keys = {record_key(row["example_id"]) for md5 in shards for row in read_table(places[md5], ["example_id"])}
        found = [one for one in self.index.where(keys) if one.out == made.md5 and one.split is None]
        steps = [step for one in found for step, _ in one.steps]
        return len({one.key for one in found}), min(steps, default=0), max(steps, default=0)

    def models(self) -> list[dict[str, Any]]:
        """The answer: every version of a model that saw it, by itself or through its parents, in the order of history."""
        seen: dict[str, dict[str, Any]] = {}
        reached: dict[int, dict[int, None]] = {}

        def through(made: Made) -> dict[int, None]:
            """Runs, itself or models it was made from, that saw it by themselves."""
            if made.id not in reached:
                reached[made.id] = {}
                own = {made.id: None} if made.id in self._own else {}
                reached[made.id] = own | {one: None for parent in self.index.parents(made) for one in through(parent)}
            return reached[made.id]

        for made in self.index.made.values():
            if not made.weights or not (who := through(made)):
                continue
            one = seen.setdefault(
                made.md5,
                {
                    "stage": made.address,
                    "path": made.path,
                    "md5": made.md5,
                    "commit": self.index.makers[made.md5][0].commit,
                    "also_called": [],
                    "seen": [],
                },
            )
            if made.address != one["stage"] and made.address not in one["also_called"]:
                one["also_called"].append(made.address)
            for by in who:
                told = self._told(self.index.made[by])
                if told not in one["seen"]:
                    one["seen"].append(told)
        return list(seen.values())

    def _told(self, made: Made) -> dict[str, Any]:
        seen = self._own[made.id]
        steps = [step for step, _ in seen.steps]
        told: dict[str, Any] = {"by": made.address, "md5": made.md5, "splits": dict(sorted(seen.rows.items()))}
        if self.asked:
            return {**told, "steps": steps if seen.tells else None, "epochs": [epoch for _, epoch in seen.steps] if seen.tells else None}
        if seen.learnt is None:
            return {**told, "learnt": None}
        return {**told, "learnt": dict(zip(("records", "first_step", "last_step"), seen.learnt, strict=True))}

    def unknown(self) -> list[dict[str, Any]]:
        """Models of which it cannot be said, because something is not here."""
        found: dict[str, dict[str, Any]] = {}
        for made in [] if self._certain else [one for one in self.index.made.values() if one.weights]:
            lost: dict[str, Made] = {}
            waiting = [made]
            while waiting:
                one = waiting.pop()
                waiting += self.index.parents(one)
                lost |= {gone.md5: gone for gone in self.index.unread(one)} if self.index.data(one) else {}
            if lost:
                missing = [{"stage": gone.address, "path": gone.path, "md5": gone.md5} for gone in lost.values()]
                commit = self.index.makers[made.md5][0].commit
                told = {"stage": made.address, "md5": made.md5, "commit": commit, "missing": missing, "fetch": fetch([*lost.values()])}
                found.setdefault(made.md5, told)
        return list(found.values())


def _near(index: Index, keys: Iterable[bytes], text: str | None) -> list[dict[str, Any]]:
    """Records whose prompt or response is nearly the same as the text, or as that of the records. Reads every shard that is here."""
    from dagster_project.core.records import prompt_text, read_table, response_text
    from dagster_project.curation.similarity.overlap import compare

    wanted = set(keys)
    known: dict[str, dict[str, str]] = {}
    for path in index.texts().values():
        for row in read_table(path):
            spoken = known.setdefault(row["example_id"], {})
            for part in ("messages", "prompt", "chosen", "rejected"):
                turns = row.get(part)
                if isinstance(turns, list):
                    spoken |= {f"{part}, prompt": prompt_text(turns), f"{part}, response": response_text(turns)}
    asked = [text] if text else [said for identity, spoken in known.items() if record_key(identity) in wanted for said in spoken.values()]
    places = [(identity, part, said) for identity, spoken in sorted(known.items()) for part, said in spoken.items() if said]
    best: dict[str, dict[str, Any]] = {}
    for pair in compare(asked, [said for _, _, said in places]).pairs:
        identity, part, said = places[pair.right]
        if record_key(identity) in wanted or best.get(identity, {"similarity": 0})["similarity"] >= pair.similarity:
            continue
        best[identity] = {"example_id": identity, "part": part, "rule": pair.rule, "similarity": pair.similarity, "text": said}
    return sorted(best.values(), key=lambda one: (-one["similarity"], one["example_id"]))


def as_text(found: Mapping[str, Any]) -> str:
    """The answer for a person at a terminal."""
    ((what, value),) = found["asked"].items()
    versions = len(found["models"])
    lines = [f"{what} {visible(value)}"]
    if found["records"] and found["records"] != [value]:
        lines.append(f"records {_some(found['records'])}")
    for copy in found.get("near", [])[:SHOWN]:
        lines.append(
            f"near    {copy['example_id']}  {copy['part']}, {copy['rule']} {copy['similarity']:.2f}  {visible(' '.join(copy['text'].split())[:80])}"
        )
    lines.append("")
    for model in found["models"]:
        where = f"commit {model['commit'][:12]}" if model["commit"] else "uncommitted"
        also = f", also called {', '.join(model['also_called'])}" if model["also_called"] else ""
        lines.append(f"{model['stage']}  md5 {model['md5'][:12]}  {where}{also}")
        lines += [f"  {_told(seen, model)}" for seen in model["seen"]]
    lines += [""] if versions else []
    none = "no model is known to have seen it" if found["unknown"] or found["shallow"] else "no model saw it"
    lines.append(f"{versions} model version{'' if versions == 1 else 's'} saw it" if versions else none)
    if unknown := found["unknown"]:
        lines.append(f"unknown of {len(unknown)}, because what they were made from is not in the cache:")
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for model in unknown:
            groups[model["fetch"]].append(model)
        for how, models in list(groups.items())[:SHOWN]:
            lines.append("  " + _some([f"{model['stage']} {model['md5'][:12]}" for model in models]))
            lines.append(
                f"    missing: {', '.join(dict.fromkeys(one['path'] for model in models for one in model['missing']))}; fetch: {how}"
            )
    if found["shallow"]:
        lines.append("this clone is shallow: models before its first commit are unknown (`git fetch --unshallow` brings them)")
    return "\n".join(lines)


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


def _told(seen: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    through = f" through {seen['by']} {seen['md5'][:12]}" if seen["md5"] != model["md5"] else ""
    splits = ", ".join(f"{split} {n}" for split, n in seen["splits"].items())
    if not splits:
        return f"made of it{through}" if through else "it is this model"
    if "steps" in seen:
        steps = seen["steps"]
        if "train" not in seen["splits"]:
            at = "not learnt from"
        elif steps is None:
            at = "at steps unknown"
        elif not steps:
            at = "in no step"
        else:
            at = f"step {_some(steps)}"
    elif seen["learnt"] is None:
        at = "at steps unknown"
    else:
        learnt = seen["learnt"]
        at = (
            f"{learnt['records']} records in steps {learnt['first_step']} to {learnt['last_step']}"
            if learnt["records"]
            else "not learnt from"
        )
    return f"{splits}; {at}{through}"
