"""raw_preferences -> preferences.

Every pair is checked, every dropped pair is recorded with its reason, and the splits share no prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from dagster_project.core import row_cache
from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.params import inside
from dagster_project.core.records import (
    Report,
    iter_pairs,
    pair_schema,
    prompt_text,
    read_records,
    read_table,
    response_text,
    subject_text,
    uncollected,
    write_ledger,
    write_records,
)
from dagster_project.core.stored_rows import Selected, StoredRows
from dagster_project.core.strings import StringIndex
from dagster_project.curation.checks import account, findings, references
from dagster_project.curation.checks.check import Action
from dagster_project.curation.checks.checks import Judgement, Rules, checks_of, judge
from dagster_project.curation.checks.overlaps import Link, Overlaps
from dagster_project.curation.checks.review import read_decisions, refuse_missing_files
from dagster_project.curation.checks.token_counts import tokens_of
from dagster_project.curation.similarity.overlap import near_pairs
from dagster_project.curation.sources.benchmarks import Item, read_items
from dagster_project.curation.sources.formats import as_record
from dagster_project.curation.splitting.split import (
    DROPPED,
    SPLITS,
    TEST,
    Copies,
    assign_splits,
    find_copies,
    joined,
    keep_labels,
    verify_splits,
)

CHECK_DESCRIPTIONS = {
    **{name: check.description for name, check in checks_of("preferences").items()},
    "too_long": (
        "Every pair fits into `max_length` tokens: prompt and longer response, as the chat template writes them."
    ),
    "split_leakage": (
        "No prompt, nor a near-copy of it, is in two splits, or is trained on and in the test split of the"
        " instructions."
    ),
    "schema": "Every split has pairs.",
}


class Params(Rules):
    """How strictly preference pairs are checked, and how they are split. See docs/checks.md and docs/splits.md."""

    max_tokens: int = Field(default=1024, ge=16, alias="max_length")
    """Tokens that the prompt and the longer response may have together, in the base model's chat template; never more
    than `base_model.max_length`. Longer pairs are dropped and counted as `too_long`, because trainers would truncate
    them without a message. `policy: {too_long: warn}` keeps them."""
    test: float = Field(default=0.2, ge=0, lt=1)
    """Share of each category's pairs that is held out and never trained on, unless the source labels its splits."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share of pairs that training measures its loss on but does not learn from."""
    benchmarks: list[str] = []
    """Files inside data/sources/benchmarks/ with questions that must not be trained on."""
    review: str | None = None
    """CSV file inside data/sources/review/ with people's decisions on pairs that no rule can decide. See
    docs/checks.md."""

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.test + self.validation >= 1:
            raise ValueError(f"test {self.test} and validation {self.validation} leave nothing to train on")
        return self

    def action(self, name: str) -> Action:
        """Pairs that are too long are dropped here, because later stages drop none."""
        return "drop" if name == "too_long" and name not in self.policy else super().action(name)


def validate(params: Params, ctx: ValidationContext) -> None:
    refuse_missing_files(params, ctx)


def run(ctx: StageContext) -> Report:
    with row_cache.using(ctx.root, "preferences"):
        params, seed = ctx.params("preferences", Params), ctx.compute.seed
        raw, splits, base_model = (ctx.output_of(name) for name in ("raw_preferences", "splits", "base_model"))
        return produce(ctx.root, params, seed, raw, splits, base_model, ctx.out, ctx.pages, ctx.recorded())


@uncollected
def produce(
    root: Path,
    params: Params,
    seed: int,
    raw_preferences: Path,
    splits: Path,
    base_model: Path,
    out: Path,
    pages: Path,
    previous: Mapping[str, Path],
) -> Report:
    """Check all pairs, divide those that are kept into splits, and account for the others.

    Args:
        splits: of the instructions; no pair of their test split may be trained on.
        pages: folder for report.html and review.csv.
        previous: files of the output as recorded before, by relative path; used only for the changes shown on the page.
    """
    benchmarks: list[Item] = []
    for path in params.benchmarks:
        benchmarks += read_items(inside(root, path, "preferences.benchmarks"), path)
    review = inside(root, params.review, "preferences.review") if params.review else None
    decisions = read_decisions(review, checks_of("preferences")) if review else []
    examples = read_records(splits / TEST)
    test = [{**example, "source": "data/splits/test", "source_row": example["example_id"]} for example in examples]
    records = StoredRows(map(as_record, iter_pairs(raw_preferences)), out.parent)
    params = params.model_copy(update={"max_tokens": min(params.max_tokens, _context(base_model))})
    division = Division()

    def divide(judged: Sequence[dict[str, Any]], overlaps: Overlaps, kept: list[int]) -> dict[int, str]:
        nonlocal division
        division = _divide(judged, overlaps, kept, test, params, seed)
        overlaps.links["split_leakage"] += division.links
        return division.dropped

    judged = judge(records, benchmarks, params, tokens_of(base_model), decisions, kind="preferences", divide=divide)
    rows = {name: [i for i, split in division.splits.items() if split == name] for name in SPLITS}
    for name in SPLITS:
        write_records(out / name, Selected(judged.records, rows[name], partial(_pair, division)), pair_schema())
    write_ledger(out, _ledger(judged, division))
    _check_splits(judged, out, division, rows, test, splits / TEST, params)

    held_out = benchmarks + [
        Item(references.place(record), prompt_text(record["messages"]), text=response_text(record["messages"]))
        for record in test
    ]
    account.write_account("preferences", judged, held_out, out, pages, previous, _read_kept)
    of_length = ("chosen_longer_share", "length_rule_accuracy")
    length: dict[str, Any] = {key: judged.profile[key] for key in of_length if key in judged.profile}
    return Report(
        rows_in=len(records),
        rows_out=sum(map(len, rows.values())),
        dropped=judged.dropped,
        fixed=judged.fixed,
        checks=[findings.check_result(verdict, judged, held_out) for verdict in judged.verdicts.values()],
        metrics={
            **{name: len(rows[name]) for name in SPLITS},
            **length,
            "categories": judged.profile["categories"],
            "held_out_questions": len(benchmarks),
            "prompt_groups": len(set(division.groups.values())),
            "waiting_for_review": len({i for i, _ in judged.waiting}),
        },
    )


def _context(base_model: Path) -> int:
    """Tokens of the model's context, as the stage `base_model` writes it."""
    settings = json.loads((base_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    return int(settings["model_max_length"])


@dataclass(frozen=True)
class Division:
    """Split of each pair, by its index."""

    splits: dict[int, str] = field(default_factory=dict)
    groups: dict[int, str] = field(default_factory=dict)
    """Key of the cluster of near-copies of its prompt."""
    labelled: set[int] = field(default_factory=set)
    """Pairs in the split of their source's label."""
    dropped: dict[int, str] = field(default_factory=dict)
    """Dropped pairs of train or validation that belong to held-out ones -> reason."""
    links: list[Link] = field(default_factory=list)
    """Examples of the test split of the instructions that they repeat."""
    copies: Copies | None = None


def _divide(
    records: Sequence[dict[str, Any]],
    overlaps: Overlaps,
    kept: list[int],
    test: Sequence[dict[str, Any]],
    params: Params,
    seed: int,
) -> Division:
    """Assign the kept pairs to splits as `splits` does.

    Labels of the source are kept, and pairs with nearly the same prompt stay together. The test split of the
    instructions counts as pairs labeled test. A pair that belongs to one of its examples goes to test if it has no
    label, and is dropped if its label is train or validation.
    """
    prompts = [subject_text(_prompt(records[i])) for i in kept]
    examples = [subject_text(record["messages"]) for record in test]
    copies = find_copies([*prompts, *examples])
    clusters = [*(records[overlaps.cluster[i]]["example_id"] for i in kept), *(record["group_id"] for record in test)]
    link = joined(copies.links(clusters))
    groups = [link.get(cluster, cluster) for cluster in clusters]
    given = [json.loads(records[i]["meta"]).get("split") for i in kept]
    labels = [label if label in SPLITS else None for label in given]
    split_of, because = keep_labels(groups, [None] * len(groups), [*labels, *[TEST] * len(test)])
    places = [references.place(record) for record in [*(records[i] for i in kept), *test]]
    left = [k for k in range(len(kept)) if split_of[k] != DROPPED]
    dealt = assign_splits(
        [groups[k] for k in left],
        [None] * len(left),
        [split_of[k] or None for k in left],
        [str(records[kept[k]]["category"]) for k in left],
        {"test": params.test, "validation": params.validation},
        seed,
    )
    out = [k for k in range(len(kept)) if split_of[k] == DROPPED]
    dropped: dict[int, str] = {}
    for k in out:
        keeper = f"{places[because[k]]}, which is {split_of[because[k]]}"
        dropped[kept[k]] = f"{labels[k]} by the label of its source, but belongs to {keeper}"
    pairs = near_pairs([prompts[k] for k in out], examples)
    links = [Link(kept[out[p.left]], places[len(kept) + p.right], "prompt", p.rule, p.similarity) for p in pairs]
    return Division(
        splits={kept[k]: split for k, split in zip(left, dealt.splits, strict=True)},
        groups={kept[k]: groups[k] for k in left},
        labelled={kept[left[n]] for n in dealt.labelled if labels[left[n]]},
        dropped=dropped,
        links=links,
        copies=copies,
    )


def _check_splits(
    judged: Judgement,
    out: Path,
    division: Division,
    rows: Mapping[str, Sequence[int]],
    test: Sequence[dict[str, Any]],
    held_out: Path,
    params: Params,
) -> None:
    """Add the results of checks on the finished splits to the verdicts.

    Raises:
        AssertionError: the shards differ from the assigned pairs.
    """
    verdicts = judged.verdicts
    if not judged.records:
        for name, verdict in verdicts.items():
            verdicts[name] = replace(verdict, passed=True, note="raw_preferences.sources names none")
        return
    if division.copies is None:
        return
    assigned = [judged.records[i]["example_id"] for i in division.splits]
    known = StringIndex([*assigned, *(record["example_id"] for record in test)])
    verification = verify_splits(out, division.copies, known, held_out)
    if verification.rows != {name: len(rows[name]) + (len(test) if name == TEST else 0) for name in SPLITS}:
        found = f"{verification.rows} in the shards, {len(test)} of them of the instructions"
        raise AssertionError(f"pairs lost: {rows} assigned, {found}")
    if verification.leaking:
        found = "; ".join(f"{leak.place} and {leak.other}: {leak.why}" for leak in verification.leaks)
        verdicts["split_leakage"] = replace(verdicts["split_leakage"], passed=False, action="fail", note=found)
    wanted = {"train": 1.0, "validation": params.validation, "test": params.test}
    if empty := [name for name in SPLITS if wanted[name] and not rows[name]]:
        verdicts["schema"] = replace(verdicts["schema"], passed=False, note=f"no pairs in: {', '.join(empty)}")


def _prompt(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return list(record["messages"][: record["asked"]])


def _pair(division: Division, i: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """`as_record`, undone, with the key of the pair's cluster of near-copies."""
    sides = {"prompt": _prompt(record), "chosen": record["messages"][record["asked"] :]}
    return {**record, **sides, "group_id": division.groups[i]}


def _ledger(judged: Judgement, division: Division) -> Iterator[dict[str, Any]]:
    """One line for each source row of each pair."""
    for i, (record, reason) in enumerate(zip(judged.records, judged.reason, strict=True)):
        why = account.why(judged, i, record) or ("label of the source" if i in division.labelled else "")
        outcome = f"dropped:{reason}" if reason else division.splits[i]
        line = {key: record[key] for key in ("source", "example_id", "source_id", "repaired") if key in record}
        yield from ({**line, "source_row": row, "outcome": outcome, "why": why} for row in record["source_rows"])


def _read_kept(previous: Mapping[str, Path]) -> list[dict[str, Any]]:
    shards = [previous[name] for name in sorted(previous) if "/records-" in name]
    pairs = {pair["example_id"]: pair for shard in shards for pair in read_table(shard)}
    rows: dict[str, int] = {}
    for line in read_table(previous["ledger.parquet"]):
        if line["outcome"] in SPLITS:
            rows.setdefault(line["example_id"], line["source_row"])
    return [as_record({**pairs[identity], "source_row": row}) for identity, row in rows.items()]
