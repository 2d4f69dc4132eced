"""References to rows in a stage's findings -> the rows, from the shards and
benchmark files of the project, for its pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.context import Documents
from dagster_project.core.errors import InputError
from dagster_project.core.frames import read_frame
from dagster_project.core.records import JOINED, LEDGER, ignored_in, loaded, prompt_text, response_text
from dagster_project.curation.checks import quotes
from dagster_project.curation.checks.references import Reference
from dagster_project.curation.checks.token_counts import tokens_of
from dagster_project.curation.sources.benchmarks import Item, read_items
from dagster_project.curation.sources.pairing import as_record
from dagster_project.views.data_quality import READ_BY

TEST, BENCHMARKS = "data/splits/test", "data/sources/benchmarks"
"""Where held-out texts are: findings on pairs name records of the test split as "data/splits/test:example_id"."""


def quoted(documents: Documents, findings: Mapping[str, Any]) -> dict[str, Any]:
    """The findings of a stage with the texts of their rows.

    A row that is missing, or is there in another version, is shown as `quotes.MISSING`.
    """
    base_model = documents.root / "data" / "base_model"
    return quotes.quoted(
        findings,
        lambda wanted: _find(documents, wanted),
        lambda: tokens_of(base_model).special if (base_model / "tokenizer.json").is_file() else (),
    )


def _find(documents: Documents, wanted: set[Reference]) -> quotes.Found:
    """Rows as they were read; of the others those that the stage kept, edited
    or repaired, and those that are held out."""
    found: dict[Reference, Mapping[str, Any] | Item] = {}
    if wanted:
        found |= _as_read(documents.root / "data" / READ_BY[documents.stage], wanted)
    kept = _by_id(
        sorted(documents.out.rglob("records-*.parquet")), {reference.example_id for reference in wanted - found.keys()}
    )
    changed = {record["example_id"]: as_record(record) if "chosen" in record else record for record in kept}
    found |= {
        reference: changed[reference.example_id]
        for reference in wanted - found.keys()
        if reference.example_id in changed
    }
    return found | {Reference.of_item(item): item for item in _held_out(documents.root, wanted - found.keys())}


def _as_read(folder: Path, wanted: set[Reference]) -> dict[Reference, Mapping[str, Any]]:
    """Records of `raw_examples` or `raw_preferences`, with their place and the
    fields that the ledger lists as ignored."""
    import polars as pl

    found: dict[Reference, Mapping[str, Any]] = {}
    try:
        ledger = read_frame(folder / LEDGER, ["source", "source_row", "example_id", "outcome", "why"]).filter(
            pl.col("outcome").ne_missing(JOINED)
        )
        lines = ledger.with_row_index("number").filter(
            pl.col("example_id").is_in([reference.example_id for reference in wanted])
        )
        named = {line["number"]: line for line in lines.iter_rows(named=True)}
        start = 0
        for shard in sorted(folder.glob("records-*.parquet")):
            size = len(read_frame(shard, ["example_id"]))
            if inside := [number for number in named if start <= number < start + size]:
                rows = read_frame(shard)[[number - start for number in inside]].rows(named=True)
                for number, row in zip(inside, map(loaded, rows), strict=True):
                    line = named[number]
                    record = {**row, "source_row": line["source_row"], **ignored_in(line)}
                    found[Reference.of(record)] = as_record(record) if "chosen" in record else record
            start += size
    except (OSError, ValueError, LookupError):  # missing or damaged: the rows of what could be read are shown
        pass
    return {reference: record for reference, record in found.items() if reference in wanted}


def _by_id(shards: Iterable[Path], ids: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The records with these ids, as far as their shards can be read."""
    import polars as pl

    wanted = [*ids]
    for shard in shards if wanted else ():
        try:
            if read_frame(shard, ["example_id"])["example_id"].is_in(wanted).any():
                yield from map(loaded, read_frame(shard).filter(pl.col("example_id").is_in(wanted)).rows(named=True))
        except (OSError, ValueError, LookupError):
            continue


def _held_out(root: Path, wanted: Iterable[Reference]) -> Iterator[Item]:
    """Questions of benchmarks and records of the test split. The caller compares their content."""
    places = [reference.place.rpartition(":")[::2] for reference in wanted]
    for file in sorted({file for file, _ in places if file.startswith(f"{BENCHMARKS}/")}):
        try:
            yield from read_items(params.inside(root, file, "benchmarks"), file)
        except InputError:
            continue
    if ids := [identity for file, identity in places if file == TEST]:
        for record in _by_id(sorted((root / TEST).glob("records-*.parquet")), ids):
            messages = record["messages"]
            yield Item(f"{TEST}:{record['example_id']}", prompt_text(messages), text=response_text(messages))
