"""Finds the models that have seen a record: every model in history, directly or through its parents, with splits and steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.messages import Messages, field_texts
from dagster_project.core.text import visible
from dagster_project.lineage.index import EVIDENCE, Index, StageRun, record_key
from dagster_project.lineage.lineage import fetch_hint
from dagster_project.lineage.published import record_of

SHOWN = 12
"""Most steps, records and missing outputs shown in the terminal; `--json` lists all."""


@dataclass
class Exposure:
    """The matching rows that one model itself has seen, parents excluded."""

    rows: Counter[str] = field(default_factory=Counter)
    """Split -> rows."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """(step, epoch) of every training step on one of them."""
    training_summary: tuple[int, int, int] | None = None
    """(records, first step, last step), for queries by source or hash; None if unknown."""
    steps_known: bool = True
    """Whether the training steps are known."""

    def plus(self, other: Exposure) -> Exposure:
        """Sum of two exposures, for queries by source or hash."""
        summary = None
        if self.training_summary and other.training_summary:
            parts = [part for part in (self.training_summary, other.training_summary) if part[0]] or [self.training_summary]
            summary = (sum(n for n, _, _ in parts), min(first for _, first, _ in parts), max(last for _, _, last in parts))
        return Exposure(self.rows + other.rows, training_summary=summary)


def impact(
    root: Path,
    record: str | None = None,
    text: str | None = None,
    source: str | None = None,
    content: str | None = None,
    near: bool = False,
) -> dict[str, Any]:
    """The models that saw a record, a text, a source, or a file or folder by its hash. Exactly one of the four is given.

    Args:
        text: text of a message: its content, its reasoning, the arguments of a call as JSON, or one text in them; case and whitespace are ignored.
        source: a file, or a folder and its contents, as named in the records.
        content: md5 or sha256, or a prefix of one, of a source, an output, or a file of an output.
        near: also search for near-copies of the record or text (curation/similarity/overlap.py).
    Returns:
        {"asked", "published", "records", "models", "near", "unknown", "shallow"}. `published`: if a published id was asked for, {"id", "record"}. `models`, in the order of history, have the splits and training steps, and the
        parent that saw the record; `unknown` lists models that cannot be decided, with the outputs that are missing.
    """
    if near and record is None and text is None:
        raise InputError("--near needs a text to compare", "use it with --text or --record")
    index = Index(root)
    index.read_records()
    query = _ImpactQuery(index)
    asked: dict[str, Any] = {"record": record, "text": text, "source": source, "hash": content}
    copies: list[dict[str, Any]] = []
    published = None
    if source is not None:
        query.match_source(source.removeprefix("./"))
    elif content is not None:
        query.match_content(content)
    else:
        ids = [record, *repaired_from(index, record)] if record is not None else []
        if len(ids) == 1 and not index.record_uses([record_key(ids[0])]) and (published := record_of(index, ids[0])):
            ids = [published, *repaired_from(index, published)]
        keys = [record_key(identity) for identity in ids] if ids else index.records_with_text(text or "")
        if near:
            copies = _near_copies(index, keys, text)
            keys = sorted({*keys, *(record_key(copy["example_id"]) for copy in copies)})
        query.match_records(keys, {record_key(identity): identity for identity in ids})
    models = query.models()
    listed = {model["md5"] for model in models}
    return {
        "asked": {name: value for name, value in asked.items() if value is not None},
        **({"published": {"id": record, "record": published}} if published else {}),
        "records": query.record_ids,
        "models": models,
        **({"near": copies} if near else {}),
        "unknown": [model for model in query.unknown() if model["md5"] not in listed],
        "shallow": index.history.shallow,
    }


def repaired_from(index: Index, source_id: str) -> list[str]:
    """Ids of the repaired versions of a source row, from the ledgers of the whole history."""
    import pyarrow.parquet as pq

    ids: dict[str, None] = {}
    for out in dict.fromkeys(run.md5 for run in index.runs.values() if not run.is_model):
        path = index.file_path(out, "ledger.parquet")
        if path is None or "source_id" not in pq.read_schema(path).names:
            continue
        rows = pq.read_table(path, columns=["example_id"], filters=[("source_id", "==", source_id)])
        ids |= dict.fromkeys(rows["example_id"].to_pylist())
    return [*ids]


class _ImpactQuery:
    """Matches a query against shards and training evidence, and collects the models that were exposed."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.record_ids: list[str] = []
        """The queried records; empty for queries by source or hash."""
        self._exposures: dict[int, Exposure] = {}
        """Id of a model's run -> its own exposure."""
        self._complete = False
        """Whether dvc.lock alone determines the result."""

    @cached_property
    def _trained_models(self) -> list[StageRun]:
        """Models that were or may have been trained: those with upstream data or with training evidence."""
        index = self.index
        return [
            run
            for run in index.runs.values()
            if run.is_model and (index.data(run) or EVIDENCE in (index.files(run.md5) or {})) and not self._is_copy(run)
        ]

    def _is_copy(self, run: StageRun) -> bool:
        """Whether the model is a byte-for-byte copy of a parent, which then accounts for all of its exposure."""
        mine = self.index.weights(run.md5)
        return bool(mine) and any(mine <= self.index.weights(parent.md5) for parent in self.index.parents(run))

    def match_records(self, keys: Sequence[bytes], names: Mapping[bytes, str]) -> None:
        self.record_ids = [names.get(key, key.hex()) for key in keys]
        shards: dict[str, Counter[str]] = defaultdict(Counter)
        steps: dict[str, list[tuple[int, int]]] = defaultdict(list)
        trained: Counter[str] = Counter()
        for use in self.index.record_uses(keys):
            if use.split:
                shards[use.out][use.split] += 1
            else:
                steps[use.out] += use.steps
                trained[use.out] += 1
        for run in self._trained_models:
            rows = sum((shards[out] for out in self.index.data(run).keys() & shards.keys()), Counter[str]())
            if trained[run.md5] and not rows["train"]:  # the data set is unavailable, but the evidence is not
                rows["train"] = trained[run.md5]
            if rows:
                self._exposures[run.id] = Exposure(rows, sorted(steps.get(run.md5, [])), steps_known=self.index.knows_steps(run))

    def match_source(self, name: str, outputs: frozenset[str] | None = None) -> None:
        """Match all records of a source.

        Args:
            outputs: hashes; one of them must be upstream of the model's data.
        """
        rows_of = self.index.rows_from_source(name)
        for run in self._trained_models:
            if outputs is not None and not outputs & self.index.ancestors(run).keys():
                continue
            rows = sum((Counter(rows_of[out]) for out in self.index.data(run).keys() & rows_of.keys()), Counter[str]())
            if rows:
                earlier = self._exposures.get(run.id)  # from another source with the same bytes
                exposure = Exposure(rows, training_summary=self.index.training_summary(run, name))
                self._exposures[run.id] = earlier.plus(exposure) if earlier else exposure

    def match_content(self, digest: str) -> None:
        """Match an output, a file or a source by its hash.

        Raises:
            InputError: the prefix is too short, or nothing in history has such a hash.
        """
        index, prefix = self.index, digest.lower()
        if len(prefix) < 6:
            raise InputError(f"--hash {digest}: hash prefix is ambiguous", "give at least six digits")
        sources = index.outputs_by_source_hash(prefix)
        for name, outs in sources.items():
            self.match_source(name, outs)
        files, outs = index.matching_hashes(prefix)
        readers = {run.id for run in index.runs.values() for _, _, md5 in run.inputs if md5.startswith(prefix)}
        self._complete = bool(readers or index.outputs_with_prefix(prefix))
        if not (self._complete or sources or files):
            raise InputError(f"--hash {digest}: no output, file of one, or source in history has this hash", "see `pedigree audit MODEL`")
        for run in self._trained_models:
            ancestors = index.ancestors(run)
            shards = index.shards(run)
            whole = any(upstream.id in readers for upstream in [*ancestors.values(), run]) or any(
                out.startswith(prefix) for out in ancestors
            )
            matching = [(split, md5) for _, split, md5 in shards if whole or md5 in files]
            if not (whole or matching or outs & ancestors.keys()):
                continue
            rows = Counter[str]()
            for split, md5 in matching or [(split, md5) for _, split, md5 in shards]:
                rows[split] += index.shard_sizes.get(md5, 0)
            summary = (
                index.training_summary(run, None)
                if whole or not matching
                else self._summary_of_shards(run, [md5 for split, md5 in matching if split == "train"])
            )
            self._exposures[run.id] = Exposure(rows, training_summary=summary)
        for run in index.runs.values():
            if run.is_model and run.md5 in outs and run.id not in self._exposures:
                self._exposures[run.id] = Exposure()

    def _summary_of_shards(self, run: StageRun, shards: Sequence[str]) -> tuple[int, int, int] | None:
        """(records, first step, last step) of a model's training on some shards; None if unknown."""
        from dagster_project.core.records import read_table

        paths = self.index.shard_paths()
        if not self.index.knows_steps(run) or any(md5 not in paths for md5 in shards):
            return None
        keys = {record_key(row["example_id"]) for md5 in shards for row in read_table(paths[md5], ["example_id"])}
        uses = [use for use in self.index.record_uses(keys) if use.out == run.md5 and use.split is None]
        steps = [step for use in uses for step, _ in use.steps]
        return len({use.key for use in uses}), min(steps, default=0), max(steps, default=0)

    def models(self) -> list[dict[str, Any]]:
        """Every version of a model that was exposed, itself or through its parents, in the order of history."""
        by_hash: dict[str, dict[str, Any]] = {}
        reached: dict[int, dict[int, None]] = {}

        def through(run: StageRun) -> dict[int, None]:
            """Ids of the runs with their own exposure: the model itself and its ancestors."""
            if run.id not in reached:
                reached[run.id] = {}
                own = {run.id: None} if run.id in self._exposures else {}
                reached[run.id] = own | {entry: None for parent in self.index.parents(run) for entry in through(parent)}
            return reached[run.id]

        for run in self.index.runs.values():
            if not run.is_model or not (exposed := through(run)):
                continue
            entry = by_hash.setdefault(
                run.md5,
                {
                    "stage": run.address,
                    "path": run.path,
                    "md5": run.md5,
                    "commit": self.index.runs_by_output[run.md5][0].commit,
                    "also_called": [],
                    "seen": [],
                },
            )
            if run.address != entry["stage"] and run.address not in entry["also_called"]:
                entry["also_called"].append(run.address)
            for by in exposed:
                document = self._exposure_document(self.index.runs[by])
                if document not in entry["seen"]:
                    entry["seen"].append(document)
        return list(by_hash.values())

    def _exposure_document(self, run: StageRun) -> dict[str, Any]:
        exposure = self._exposures[run.id]
        steps = [step for step, _ in exposure.steps]
        document: dict[str, Any] = {"by": run.address, "md5": run.md5, "splits": dict(sorted(exposure.rows.items()))}
        if self.record_ids:
            return {
                **document,
                "steps": steps if exposure.steps_known else None,
                "epochs": [epoch for _, epoch in exposure.steps] if exposure.steps_known else None,
            }
        if exposure.training_summary is None:
            return {**document, "learnt": None}
        return {**document, "learnt": dict(zip(("records", "first_step", "last_step"), exposure.training_summary, strict=True))}

    def unknown(self) -> list[dict[str, Any]]:
        """Models that cannot be decided, because an output is unavailable."""
        unknown: dict[str, dict[str, Any]] = {}
        for run in [] if self._complete else [upstream for upstream in self.index.runs.values() if upstream.is_model]:
            missing: dict[str, StageRun] = {}
            pending = [run]
            while pending:
                upstream = pending.pop()
                pending += self.index.parents(upstream)
                missing |= {absent.md5: absent for absent in self.index.missing(upstream)} if self.index.data(upstream) else {}
            if missing:
                described = [{"stage": absent.address, "path": absent.path, "md5": absent.md5} for absent in missing.values()]
                commit = self.index.runs_by_output[run.md5][0].commit
                entry = {
                    "stage": run.address,
                    "md5": run.md5,
                    "commit": commit,
                    "missing": described,
                    "fetch": fetch_hint([*missing.values()]),
                }
                unknown.setdefault(run.md5, entry)
        return list(unknown.values())


def _near_copies(index: Index, keys: Iterable[bytes], text: str | None) -> list[dict[str, Any]]:
    """Records whose prompt, response, reasoning or arguments of calls nearly equal the text, or that of the given records. Reads every available shard."""
    from dagster_project.core.records import prompt_text, read_table, response_text
    from dagster_project.curation.similarity.overlap import compare

    excluded = set(keys)
    texts_of: dict[str, dict[str, str]] = {}
    for path in index.shard_paths().values():
        for row in read_table(path):
            texts = texts_of.setdefault(row["example_id"], {})
            for part in ("messages", "prompt", "chosen", "rejected"):
                turns = row.get(part)
                if isinstance(turns, list):
                    texts |= {f"{part}, prompt": prompt_text(turns), f"{part}, response": response_text(turns)}
                    texts |= {f"{part}, {name}": text for name, text in _fields(turns).items()}
    queries = (
        [text]
        if text
        else [text_of_part for identity, texts in texts_of.items() if record_key(identity) in excluded for text_of_part in texts.values()]
    )
    candidates = [
        (identity, part, text_of_part)
        for identity, texts in sorted(texts_of.items())
        for part, text_of_part in texts.items()
        if text_of_part
    ]
    best: dict[str, dict[str, Any]] = {}
    for pair in compare(queries, [text_of_part for _, _, text_of_part in candidates]).pairs:
        identity, part, text_of_part = candidates[pair.right]
        if record_key(identity) in excluded or best.get(identity, {"similarity": 0})["similarity"] >= pair.similarity:
            continue
        best[identity] = {"example_id": identity, "part": part, "rule": pair.rule, "similarity": pair.similarity, "text": text_of_part}
    return sorted(best.values(), key=lambda copy: (-copy["similarity"], copy["example_id"]))


def _fields(turns: Messages) -> dict[str, str]:
    """Reasoning and arguments of calls, each as one text, where there are any."""
    found: dict[str, list[str]] = defaultdict(list)
    for field_name, text in (entry for turn in turns for entry in field_texts(turn)):
        if field_name != "content":
            found[field_name].append(text)
    return {field_name: "\n".join(texts) for field_name, texts in found.items()}


def as_text(result: Mapping[str, Any]) -> str:
    """The result as text for the terminal."""
    ((kind, value),) = result["asked"].items()
    versions = len(result["models"])
    lines = [f"{kind} {visible(value)}"]
    if "published" in result:
        lines.append(f"published id of record {result['published']['record']}")
    if result["records"] and result["records"] != [value]:
        lines.append(f"records {_shortened(result['records'])}")
    for copy in result.get("near", [])[:SHOWN]:
        lines.append(
            f"near    {copy['example_id']}  {copy['part']}, {copy['rule']} {copy['similarity']:.2f}  {visible(' '.join(copy['text'].split())[:80])}"
        )
    lines.append("")
    for model in result["models"]:
        where = f"commit {model['commit'][:12]}" if model["commit"] else "uncommitted"
        aliases = f", also called {', '.join(model['also_called'])}" if model["also_called"] else ""
        lines.append(f"{model['stage']}  md5 {model['md5'][:12]}  {where}{aliases}")
        lines += [f"  {_exposure_text(seen, model)}" for seen in model["seen"]]
    lines += [""] if versions else []
    none = "no model is known to have seen it" if result["unknown"] or result["shallow"] else "no model saw it"
    lines.append(f"{versions} model version{'' if versions == 1 else 's'} saw it" if versions else none)
    if unknown := result["unknown"]:
        lines.append(f"unknown for {len(unknown)}, because upstream outputs are not in the cache:")
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for model in unknown:
            groups[model["fetch"]].append(model)
        for command, models in list(groups.items())[:SHOWN]:
            lines.append("  " + _shortened([f"{model['stage']} {model['md5'][:12]}" for model in models]))
            lines.append(
                f"    missing: {', '.join(dict.fromkeys(output['path'] for model in models for output in model['missing']))}; fetch: {command}"
            )
    if result["shallow"]:
        lines.append("this clone is shallow: models before its first commit are unknown (`git fetch --unshallow` brings them)")
    return "\n".join(lines)


def _shortened(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


def _exposure_text(seen: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    through = f" through {seen['by']} {seen['md5'][:12]}" if seen["md5"] != model["md5"] else ""
    splits = ", ".join(f"{split} {n}" for split, n in seen["splits"].items())
    if not splits:
        return f"derived from it{through}" if through else "is this model"
    if "steps" in seen:
        steps = seen["steps"]
        if "train" not in seen["splits"]:
            steps_text = "not trained on"
        elif steps is None:
            steps_text = "at steps unknown"
        elif not steps:
            steps_text = "in no step"
        else:
            steps_text = f"step {_shortened(steps)}"
    elif seen["learnt"] is None:
        steps_text = "at steps unknown"
    else:
        training = seen["learnt"]
        steps_text = (
            f"{training['records']} records in steps {training['first_step']} to {training['last_step']}"
            if training["records"]
            else "not trained on"
        )
    return f"{splits}; {steps_text}{through}"
