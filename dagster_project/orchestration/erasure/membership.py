"""Measures the losses of erased records, and of records that were never trained
on, by the models before an erasure and by those made again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.chat import encode_record
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.params import Compute
from dagster_project.core.records import prompt_text, read_preferences, read_records
from dagster_project.core.workers import LocalProcesses
from dagster_project.curation.sources.erased import record_mark
from dagster_project.evaluation.evaluator import EvaluatedModel, Settings
from dagster_project.lineage.erasure.likelihoods import Loss, compare
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import find, trained_on
from dagster_project.lineage.rows import ORDER_UNKNOWN
from dagster_project.orchestration import dvc

BASE_MODEL = "base_model"
MERGED, ALIGNED = "merged", "merged_aligned"
MEASURED = (MERGED, ALIGNED)
"""Stages whose models give likelihoods of texts. Those of `adapter` and
`aligned` are in them, and `release` is a copy of one."""
MOST = 500
"""Controls that are measured, chosen by id."""
CONVERSATIONS, PAIRS = "conversations", "preferred answers of pairs"
DATA = {CONVERSATIONS: "splits", PAIRS: "preferences"}
"""Kind of records -> stage that split them."""


@dataclass(frozen=True)
class Work:
    """What a process measures."""

    compute: Compute
    settings: Settings
    folder: Path
    """Of the model."""
    base_model: Path
    name: str


def trained_records(root: Path, ids: Sequence[str], key: bytes, models: Iterable[str]) -> list[dict[str, Any]]:
    """The records with some ids that models of the workspace were trained on,
    by keyed hash, with these models and what is needed to measure them."""
    wanted = {*ids}
    index = Index(root)
    learned = {address: _learned(index, address) for address in models if address.partition("@")[0] in MEASURED}
    found = []
    for kind in DATA:
        for row in (row for row in _split(root, kind, "train") if row["example_id"] in wanted):
            by = [address for address, those in learned.items() if those is None or row["example_id"] in those]
            if by:
                mark = record_mark(key, row["example_id"])
                found.append({"mark": mark, "kind": kind, "models": by, **_measurable(row)})
    return found


def _learned(index: Index, address: str) -> set[str] | None:
    """Ids of the records in the training steps of a model and of those that it was made from.

    Training can end before others of its split, or leave them out. None if unknown.
    """
    try:
        subject = find(index, address)
    except InputError:  # under another name in the workspace
        return None
    records, missing = trained_on(subject)
    if any(ORDER_UNKNOWN in (index.files(model.md5) or ()) for model in subject.models):
        return None
    return None if records is None or missing else {*records["example_id"].to_list()}


def _split(root: Path, kind: str, name: str) -> list[dict[str, Any]]:
    """Rows of a split; of pairs those with a preferred answer, as conversations that end with it."""
    folder = root / "data" / DATA[kind] / name
    if kind == CONVERSATIONS:
        return read_records(folder)
    return [
        {**row, "messages": [*row["prompt"], *row["chosen"]]}
        for row in read_preferences(folder)
        if row["prompt"] and row["chosen"]
    ]


def _measurable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("messages", "tools", "category", "source")}


def measure(
    root: Path, erased: Sequence[Mapping[str, Any]], ids: Sequence[str], models: Mapping[str, str]
) -> dict[str, Any]:
    """Model -> kind of records -> their losses among those of controls, or why they were not measured.

    Args:
        erased: from `trained_records`.
        ids: of all erased records, which cannot be controls.
        models: address of each model to measure -> hash that its output must have.
    """
    states = dvc.read_stages(root)
    return {
        address: {kind: _measure(root, states, address, md5, kind, erased, ids) for kind in _kinds(address, erased)}
        for address, md5 in models.items()
        if address.partition("@")[0] in MEASURED
    }


def _kinds(address: str, erased: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Kinds of erased records that a model was trained on."""
    kinds = {record["kind"] for record in erased if address in record["models"]}
    yield from (kind for kind in DATA if kind in kinds and (kind == CONVERSATIONS or address.startswith(f"{ALIGNED}@")))


def _measure(
    root: Path,
    states: Mapping[str, dvc.StageState],
    address: str,
    md5: str,
    kind: str,
    erased: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
) -> dict[str, Any]:
    needed = [BASE_MODEL, *DATA.values()]
    for one in (address, *needed):
        if one in states and states[one].output_problem:
            return {"not measured": states[one].output_problem}
    if address not in states or states[address].version != md5:
        return {"not measured": "the model is not in the workspace"}
    records = [record for record in erased if record["kind"] == kind and address in record["models"]]
    controls = _controls(root, address, kind, {*ids})
    try:
        values = params.read(root)
        work = Work(
            params.parse(Compute, values.get("compute"), "compute"),
            params.parse(Settings, values.get("evaluation"), "evaluation"),
            root / states[address].out,
            root / states[BASE_MODEL].out,
            address,
        )
        [losses] = LocalProcesses(1).map(_losses, work, [[_measurable(row) for row in (*records, *controls)]])
    except PedigreeError as error:
        return {"not measured": error.what}
    except (OSError, ValueError, RuntimeError) as error:
        return {"not measured": f"the model cannot be loaded: {type(error).__name__}"}
    of_records, of_controls = losses[: len(records)], losses[len(records) :]
    return compare(
        {record["mark"]: loss for record, loss in zip(records, of_records, strict=True) if loss},
        [loss for loss in of_controls if loss],
    )


def _controls(root: Path, address: str, kind: str, erased: set[str]) -> list[dict[str, Any]]:
    """Rows of the test split of which the model saw neither prompt nor
    relative: neither in training nor in validation, which chose its weights."""
    seen = [row for name in ("train", "validation") for row in _split(root, CONVERSATIONS, name)]
    if address.startswith(f"{ALIGNED}@"):
        seen += [row for name in ("train", "validation") for row in _split(root, PAIRS, name)]
    known = {name for row in seen for name in (row["example_id"], row["group_id"])}
    prompts = {prompt_text(row["messages"]) for row in seen}
    found = [
        row
        for row in _split(root, kind, "test")
        if known.isdisjoint((row["example_id"], row["group_id"]))
        and row["example_id"] not in erased
        and (prompt_text(row["messages"]) or row["example_id"]) not in prompts
    ]
    return sorted(found, key=lambda row: row["example_id"])[:MOST]


def _losses(work: Work, records: Sequence[Mapping[str, Any]]) -> list[Loss | None]:
    """Loss of each record in nats per token of its answers.

    None where the model cannot read it, or no token is an answer.

    Raises:
        InputError: the model predicts labels only.
    """
    model = EvaluatedModel(work.folder, work.compute, work.settings, work.base_model)
    if not model.writes:
        raise InputError("the model predicts labels, and gives no likelihood of a text", "nothing to do")
    readable = [i for i, record in enumerate(records) if _is_readable(model, record)]
    found = dict(zip(readable, model.likelihood([dict(records[i]) for i in readable], work.name), strict=True))
    sums = (found.get(i, (0.0, 0)) for i in range(len(records)))
    return [
        Loss(nats / tokens, record["category"], record["source"]) if tokens else None
        for record, (nats, tokens) in zip(records, sums, strict=True)
    ]


def _is_readable(model: EvaluatedModel, record: Mapping[str, Any]) -> bool:
    try:
        encode_record(model.tokenizer, record)
    except InputError:  # the chat template refuses it, as it does in training
        return False
    return True
