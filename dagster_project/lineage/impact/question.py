"""Finds the models that have seen a record: every model in history, directly or
through its parents, with splits and steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.records import uncollected
from dagster_project.core.text import visible
from dagster_project.lineage.impact.matching import Matches
from dagster_project.lineage.impact.models import ExposedModels
from dagster_project.lineage.impact.near_copies import near_copies
from dagster_project.lineage.impact.sources import known_source
from dagster_project.lineage.impact.undecided import UndecidedModels
from dagster_project.lineage.index import Index
from dagster_project.lineage.published import erasure_of, missing_keys, record_of
from dagster_project.lineage.registered import registered
from dagster_project.lineage.rows import record_key
from dagster_project.lineage.search import search
from dagster_project.lineage.sources import stages_reading
from dagster_project.lineage.unfinished_erasure import is_unfinished

RECORD_ID = re.compile(r"[0-9a-fA-F]{32}")


@uncollected  # the result has tens of thousands of objects without reference cycles
def impact(
    root: Path,
    record: str | None = None,
    text: str | None = None,
    source: str | None = None,
    content: str | None = None,
    near: bool = False,
    containing: str | None = None,
    regex: bool = False,
) -> dict[str, Any]:
    """The models that saw a record, a text, a source, or a file or folder by its hash. Exactly one of these is given.

    Args:
        text: of a message: content, reasoning, or arguments of a call; case and whitespace are ignored.
        source: a file, or a folder and its contents, as named in the records.
        content: md5 or sha256, or a prefix of one, of a source, an output, or a file of an output.
        near: also search for near-copies of the record or text (curation/similarity/overlap.py).
        containing: part of a message (lineage/search.py); with `regex`, a regular expression.
    Returns:
        The document of `pedigree impact --json` (docs/audit.md).
    Raises:
        InputError: no such source or hash was ever recorded, the id is malformed, or there is nothing to look at.
    """
    _refuse_question(record, text, near, containing, regex)
    index = Index(root)
    index.read_records()
    query = Matches(index)
    given = {"record": record, "text": text, "source": source, "hash": content, "containing": containing}
    asked = {name: value for name, value in given.items() if value is not None}
    copies: list[dict[str, Any]] = []
    matches: list[dict[str, Any]] = []
    published = None
    erased = erasure_of(index, record.lower()) if record is not None else None
    read_by: list[str] = []
    unmapped: list[dict[str, Any]] = []
    if source is not None:
        name = known_source(index, source)
        query.match_sources({name: None})
        read_by = [] if index.knows_source(name) or query.exposures else stages_reading(index, name)
    elif content is not None:
        query.match_content(content)
    else:
        if record is not None and not index.knows_record(record_key(record)):
            published = record_of(index, record)
            record, unmapped = (record, missing_keys(index)) if published is None else (published, [])
        if containing is not None:
            matches = search(index, containing, regex)
            keys = list(dict.fromkeys(record_key(match["example_id"]) for match in matches))
        else:
            keys = [record_key(record)] if record is not None else index.records_with_text(text or "")
        if near:
            copies = near_copies(index, keys, text, record)
            keys = sorted({*keys, *(record_key(copy["example_id"]) for copy in copies)})
        query.searched = near or containing is not None
        query.match_records(
            keys, {record_key(record): record} if record is not None else {}, derived=record is not None
        )
    exposed = ExposedModels(query)
    models, undecided = _models(root, query, exposed)
    unknown = [*undecided, *unmapped]
    complete = not (unknown or index.unreadable or index.history.shallow)
    looked_at = index.looked_at()
    if complete and not looked_at["models"] and not looked_at["data_sets"]:
        raise InputError(
            "nothing has been run here: no model and no data set can be looked at",
            "run it in the project's folder, or `dvc repro` first",
        )
    return {
        "asked": asked,
        **({"published": {"id": asked["record"], "record": published}} if published else {}),
        **({"erased": erased, "erasure": "unfinished" if is_unfinished(root) else "done"} if erased else {}),
        "verdict": "yes" if models else "no" if complete else "cannot tell",
        "records": query.record_ids,
        "models": models,
        **({"watched": watched} if (watched := exposed.watched()) else {}),
        **({"near": copies} if near else {}),
        **({"matches": matches} if containing is not None else {}),
        **({"read_by": read_by} if read_by else {}),
        "unknown": unknown,
        "looked_at": looked_at,
        "unreadable": index.unreadable,
        "shallow": index.history.shallow,
    }


def _models(root: Path, query: Matches, exposed: ExposedModels) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Models that saw what was asked about, and models that cannot be decided."""
    models = exposed.models()
    undecided = {model["md5"]: model for model in UndecidedModels(query).models()}
    for model in models:
        if (partly := undecided.pop(model["md5"], None)) and partly["missing"]:
            model |= {name: partly[name] for name in ("missing", "fetch")}
    versions = registered(root)
    for model in models:
        model |= {"registered": [one.as_dict() for one in versions[model["md5"]]]} if model["md5"] in versions else {}
    return models, [*undecided.values()]


def _refuse_question(record: str | None, text: str | None, near: bool, containing: str | None, regex: bool) -> None:
    if text is not None and not text.strip():
        raise InputError(
            "--text: the text is empty", "give the whole text of a message, or a part of it with --containing"
        )
    if near and record is None and text is None:
        raise InputError("--near needs a text to compare", "use it with --text or --record")
    if regex and containing is None:
        raise InputError("--regex needs an expression", "use it with --containing")
    if record is not None and not RECORD_ID.fullmatch(record):
        raise InputError(
            f"--record {visible(record)}: not the id of a record",
            "an example_id has 32 hexadecimal digits; look a text up with --text",
        )


def _matching(index: Index, ids: Sequence[str]) -> Matches:
    query, names = Matches(index), {record_key(one): one for one in ids}
    query.match_records([*names], names, derived=True)
    return query


def exposed_models(index: Index, ids: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`models` and `unknown` of `impact`, for any of some records and what was made from them.

    Args:
        index: whose records were read.
        ids: `example_id` of each record.
    """
    query = _matching(index, ids)
    models = ExposedModels(query).models()
    decided = {model["md5"] for model in models}
    return models, [model for model in UndecidedModels(query).models() if model["md5"] not in decided]


def exposed_in_workspace(index: Index, ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Addresses of the models in the `dvc.lock` of the workspace that were exposed to any of
    some records and what was made from them, and of those that cannot be decided. Only the
    runs recorded there count: an earlier run, of other data, can have given the same bytes.

    Args:
        index, ids: as for `exposed_models`.
    """
    query = _matching(index, ids)
    reached, undecided = ExposedModels(query), UndecidedModels(query)
    models = [run for run in index.runs.values() if run.in_workspace and run.is_model]
    exposed = {run.address for run in models if reached.exposed_through(run)}
    unknown = {run.address for run in models if undecided.models([run])}
    return sorted(exposed), sorted(unknown - exposed)
