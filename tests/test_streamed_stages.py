"""splits and tokenized: neither the size of the shards that they read nor the
number of processes changes a byte of their output."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders.files import contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagster_project.core import records as record_files
from dagster_project.core import workers
from dagster_project.core.params import parse
from dagster_project.core.records import (
    Report,
    example_id,
    read_records,
    read_table,
    record_schema,
    rich_schema,
    write_ledger,
    write_table,
)
from dagster_project.core.rendering import end_tokens
from dagster_project.core.workers import LocalProcesses
from dagster_project.curation.splitting.split import DROPPED, SPLITS, assign, keep_labels
from dagster_project.stages import splits, tokenized
from dagster_project.training.tokens import packed_file
from dagster_project.training.tokens.blocks import ExampleFacts, RecordFacts
from dagster_project.training.tokens.portable import PortableTokenizer
from dagster_project.training.tokens.tokenized_split import TokenizedSplit, in_order

WORDS = [
    "where",
    "is",
    "my",
    "parcel",
    "kite",
    "kettle",
    "please",
    "send",
    "it",
    "back",
    "today",
    "blue",
    "red",
    "green",
    "letter",
    "invoice",
    "number",
    "order",
    "again",
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
calm = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def some_rows(seed: int, n: int) -> list[dict[str, Any]]:
    """Rows of several sources and categories: conversations of one or two
    turns, plain texts, tools, traces, labels, near-copies, misfits."""
    draw = random.Random(seed)
    found = []
    for i in range(n):
        words = " ".join(draw.choices(WORDS, k=draw.randint(1, 14)))
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": words},
            {"role": "assistant", "content": f"{draw.choice(WORDS)} {i}"},
        ]
        meta: dict[str, Any] = {"customer": draw.choice([None, 1, 2, "2"])}
        tools = None
        kind = draw.randrange(9)
        if kind == 0:
            messages += [
                {"role": "user", "content": "Again?"},
                {"role": "assistant", "content": "Yes. " * draw.randint(1, 9)},
            ]
        elif kind == 1:
            messages, meta["kind"] = [{"role": "assistant", "content": words * draw.randint(1, 6)}], "text"
        elif kind == 2:
            call = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "add", "arguments": {"a": i}}}
            messages[1:] = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "3", "tool_call_id": "a1b2c3d4e", "name": "add"},
                {"role": "assistant", "content": "3"},
            ]
            tools = [TOOL]
        elif kind == 3:
            messages[-1]["reasoning_content"] = "Think."
        elif kind == 4:
            messages = messages[:1]
        elif kind == 5:
            meta["split"] = draw.choice([*SPLITS, "dev"])
        identity = example_id(messages, tools, meta.get("kind") == "text")
        row = {
            "example_id": identity,
            "source": f"data/sources/{draw.choice('ab')}.jsonl",
            "messages": messages,
            "category": draw.choice([None, "bug", "login"]),
            "group_id": identity,
            "meta": json.dumps(meta),
        }
        found.append({**row, **({"tools": tools} if tools else {})})
    return list({row["example_id"]: row for row in found}.values())


def write_shards(folder: Path, rows: Sequence[dict[str, Any]], cuts: Sequence[int]) -> None:
    """Rows in shards that end at these rows."""
    folder.mkdir(parents=True)
    bounds = [0, *sorted(cut % (len(rows) + 1) for cut in cuts), len(rows)]
    stored = [record_files._stored(row) for row in rows]
    for n, (start, stop) in enumerate(pairwise(bounds)):
        write_table(folder / f"records-{n:05d}.parquet", stored[start:stop], rich_schema(record_schema()))


class Runs:
    """Runs of the stage on the same rows in other shards."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.count = folder, model, 0

    def _run(self, processes: int) -> tuple[Path, Any]:
        self.count += 1
        return self.folder / f"{self.count}", (
            workers.using(LocalProcesses(processes)) if processes > 1 else nullcontext()
        )

    def splits(
        self, rows: Sequence[dict[str, Any]], cuts: Sequence[int], params: splits.Params, processes: int = 1
    ) -> tuple[Report, Any]:
        folder, processing = self._run(processes)
        write_shards(folder / "in", rows, cuts)
        lines = [
            {**row, "source_row": i, "outcome": "kept", "why": "", "repaired": ["x"] if i == 3 else None}
            for i, row in enumerate(rows)
        ]
        write_ledger(folder / "in", lines)
        with processing:
            report = splits.produce(folder, params, 7, folder / "in", folder / "out")
        return report, contents(folder / "out")

    def tokenized(
        self, rows: Sequence[dict[str, Any]], cuts: Sequence[int], params: dict[str, Any], processes: int = 1
    ) -> tuple[Report, Any]:
        folder, processing = self._run(processes)
        train, validation = rows[: len(rows) * 3 // 4], rows[len(rows) * 3 // 4 :]
        write_shards(folder / "in/train", train, cuts)
        write_shards(folder / "in/validation", validation, cuts[:1])
        write_ledger(
            folder / "in",
            [{"source": r["source"], "example_id": r["example_id"], "source_row": i} for i, r in enumerate(rows)],
        )
        with processing:
            report = tokenized.produce(
                folder, parse(tokenized.Params, params, "tokenized"), 7, folder / "in", self.model, folder / "out"
            )
        return report, contents(folder / "out")


@pytest.fixture
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("runs"), tiny_model)


SPLITTING = [
    splits.Params(),
    splits.Params(augment=splits.Augment(typos=0.5, case=0.5)),
    splits.Params(by="key", key="customer", keep_labels=False),
    splits.Params(by="source"),
    splits.Params(stratify_by="source"),
]
RENDERING = [
    {"chat_template": "hermes", "max_length": 120},
    {"chat_template": "hermes", "max_length": 60, "on_too_long": "truncate", "balance": "sqrt", "weigh": "example"},
    {"chat_template": "hermes", "max_length": 90, "on_too_long": "split", "balance": "category", "reasoning": "strip"},
    {"replay": {"sources": ["data/sources/b.jsonl"], "share": 0.2}, "packing": False},
]
cuts = st.lists(st.integers(0, 1000), max_size=6)


@calm
@given(st.integers(0, 1000), st.integers(1, 60), cuts, st.sampled_from(SPLITTING))
def test_the_shards_that_splits_reads_change_nothing(
    runs: Runs, seed: int, n: int, cuts: list[int], params: splits.Params
) -> None:
    rows = some_rows(seed, n)
    if params.by == "key" and all(json.loads(row["meta"])["customer"] is None for row in rows):
        return
    assert runs.splits(rows, cuts, params) == runs.splits(rows, [], params)


@calm
@given(st.integers(0, 1000), st.integers(12, 60), cuts, st.sampled_from(RENDERING))
def test_the_shards_that_tokenized_reads_change_nothing(
    runs: Runs, seed: int, n: int, cuts: list[int], params: dict[str, Any]
) -> None:
    rows = [{**row, "source": f"data/sources/{'ab'[i % 2]}.jsonl"} for i, row in enumerate(some_rows(seed, n))]
    settings = {"on_mismatch": "drop", **params}
    assert runs.tokenized(rows, cuts, settings) == runs.tokenized(rows, [], settings)


@pytest.mark.long
def test_the_number_of_processes_changes_nothing(runs: Runs) -> None:
    rows = some_rows(5, 400)
    cuts = [40, 41, 200, 310]
    assert runs.splits(rows, cuts, SPLITTING[1], processes=2) == runs.splits(rows, cuts, SPLITTING[1])
    settings = {"on_mismatch": "drop", **RENDERING[1]}
    report, files = runs.tokenized(rows, cuts, settings, processes=2)
    assert (report, files) == runs.tokenized(rows, cuts, settings)
    outcomes = {row["outcome"] for row in read_table(runs.folder / "3/out/ledger.parquet")}
    assert {"kept", "truncated", "dropped:no_answer"} <= outcomes, "the set has rows of many kinds"


def test_a_tokenizer_in_another_process_has_the_files_of_this_one(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    here = PortableTokenizer(folder, AutoTokenizer.from_pretrained(folder))
    here.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    data = pickle.dumps(here)
    shutil.rmtree(folder)
    there, again = pickle.loads(data).tokenizer, pickle.loads(data).tokenizer
    assert there is again, "loaded once"
    assert there.chat_template == here.tokenizer.chat_template and there("Hällo <|im_end|>") == here.tokenizer(
        "Hällo <|im_end|>"
    )
    assert end_tokens(there) == ["<|im_end|>", "<|endoftext|>"]
    assert len(data) < 1_000_000, "without the weights"


# --- the assignment, as it is defined


def plain_assign(
    units: Sequence[str], strata: Sequence[str], shares: Mapping[str, float], seed: int, top_up: bool
) -> list[str]:
    size = Counter(units)
    most: dict[str, tuple[int, str]] = {}
    for (unit, stratum), rows in Counter(zip(units, strata, strict=True)).items():
        most[unit] = min(most.get(unit, (0, "")), (-rows, stratum))
    waiting = sorted(size, key=lambda unit: hashlib.sha256(f"{seed}:{unit}".encode()).digest())
    split_of = dict.fromkeys(waiting, "train")

    def fill(name: str, candidates: Sequence[str], room: int) -> None:
        for unit in candidates:
            if size[unit] <= room and split_of[unit] == "train":
                split_of[unit] = name
                room -= size[unit]

    members = {stratum: [unit for unit in waiting if most[unit][1] == stratum] for stratum in sorted(set(strata))}
    exact = {stratum: sum(size[unit] for unit in ids) for stratum, ids in members.items()}
    tolerance = max(2, len(units) // 100)
    for name, share in shares.items():
        wanted, rounded = round(len(units) * share), {stratum: round(rows * share) for stratum, rows in exact.items()}
        misses = abs(sum(rounded.values()) - wanted) > tolerance or (wanted > 0 and not any(rounded.values()))
        for stratum, ids in members.items():
            fill(name, ids, math.floor(exact[stratum] * share) if misses else rounded[stratum])
        if misses:  # the rest of whole rows: one unit of some strata
            first = {most[unit][1]: unit for unit in reversed(waiting) if split_of[unit] == "train"}
            rest = wanted - sum(size[unit] for unit in waiting if split_of[unit] == name)
            fill(name, sorted(first.values(), key=waiting.index), rest)
    for name, share in shares.items():
        target = round(len(units) * share)
        missing = target - sum(size[unit] for unit in waiting if split_of[unit] == name)
        if top_up or missing > tolerance:
            fill(name, waiting, missing)
        left = [unit for unit in waiting if split_of[unit] == "train"]
        if top_up and target and name not in split_of.values() and len(left) > 1:
            split_of[min(left, key=lambda unit: abs(size[unit] - target))] = name
    return [split_of[unit] for unit in units]


assigned = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), max_size=40)


@given(assigned, st.integers(0, 45), st.integers(0, 45), st.integers(0, 100), st.booleans())
@settings(deadline=None, max_examples=150)
def test_rows_are_assigned_as_defined(
    rows: list[tuple[str, str]], test: int, validation: int, seed: int, top_up: bool
) -> None:
    units, strata = [unit for unit, _ in rows], [stratum for _, stratum in rows]
    shares = {"test": test / 100, "validation": validation / 100}
    assert assign(units, strata, shares, seed, top_up) == plain_assign(units, strata, shares, seed, top_up)


def plain_labels(
    groups: Sequence[str], keys: Sequence[str | None], labels: Sequence[str | None]
) -> tuple[list[str], dict[int, int]]:
    by_label, because = [""] * len(labels), {}
    rows_of: tuple[dict[str | None, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for index, column in zip(rows_of, (groups, keys), strict=True):
        for i, name in enumerate(column):
            if name is not None:
                index[name].append(i)
    for label in ("test", "validation", "train"):
        queue = [i for i, own in enumerate(labels) if own == label and by_label[i] == ""]
        for i in queue:
            by_label[i] = label
        for i in queue:
            for index, column in zip(rows_of, (groups, keys), strict=True):
                for j in index.pop(column[i], ()):
                    if by_label[j] == "" and labels[j] is None:
                        by_label[j] = label
                        queue.append(j)
                    elif by_label[j] == "":
                        by_label[j], because[j] = DROPPED, i
    return by_label, because


labeled = st.lists(
    st.tuples(st.sampled_from("abcde"), st.sampled_from(["1", "2", None]), st.sampled_from([None, *SPLITS])),
    max_size=30,
)


@given(labeled)
@settings(deadline=None, max_examples=150)
def test_labels_are_kept_as_defined(rows: list[tuple[str, str | None, str | None]]) -> None:
    groups, keys, labels = ([row[k] for row in rows] for k in range(3))
    assert keep_labels(groups, keys, labels) == plain_labels(groups, keys, labels)


# --- the packed file


def a_split(seed: int, n: int) -> TokenizedSplit:
    draw, found = random.Random(seed), TokenizedSplit()
    for _ in range(n):
        examples = []
        for _ in range(draw.choice([0, 1, 1, 2])):
            ids = np.array(draw.choices(range(100), k=draw.randint(1, 9)), np.int32)
            data = ids.tobytes() + (ids + 100).tobytes() + (ids / 7).astype(np.float32).tobytes()
            examples.append(ExampleFacts(len(ids), len(ids), True, False, data))
        found.extend([RecordFacts(draw.randbytes(4).hex(), "a", None, "kept", "", 0, None, examples, 0, 0, "")])
    return found


@given(st.integers(0, 100), st.integers(0, 12), st.sampled_from([1, 3, 1 << 20]), st.sampled_from([9, 20, 2**31 - 1]))
@calm
def test_any_row_group_and_array_gives_the_rows_and_the_bytes_of_a_table(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, group: int, tokens: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("packed")
    found = a_split(seed, n)
    copies = [random.Random(seed).choice([1, 2]) * (count > 0) for count in found.counts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_file, "ROW_GROUP", group)
        patch.setattr(record_files, "ROW_GROUP", group)
        patch.setattr(packed_file, "TOKENS", tokens)
        examples, owners = in_order(found, copies)
        rows = packed_file.layout(found, examples, 12)
        schema = tokenized.row_schema()
        packed_file.write_packed(
            tmp_path / "a.parquet", schema, found, examples[rows.order], owners[rows.order], rows.sizes, tmp_path
        )
        plain = []
        order, start = rows.order.tolist(), 0
        for size in rows.sizes.tolist():
            own = [(found.ids[owners[i]], next(iter(found.read([examples[i]])))) for i in order[start : start + size]]
            start += size
            columns = {
                name: [float(x) if name == "weights" else int(x) for _, one in own for x in getattr(one, name)]
                for name in packed_file.TOKEN_COLUMNS
            }
            plain.append(
                {"example_ids": [name for name, _ in own], "lengths": [len(one.input_ids) for _, one in own], **columns}
            )
        write_table(tmp_path / "b.parquet", plain, schema)
    assert read_table(tmp_path / "a.parquet") == plain
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == max(1, -(-len(plain) // group))
    if tokens > 20:  # one array
        assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sum(copies[i] * count for i, count in enumerate(found.counts)) == sum(len(row["lengths"]) for row in plain)


def test_examples_are_in_the_order_of_hashes_and_copies_are_apart() -> None:
    found = a_split(1, 60)
    copies = [2 * (count > 0) for count in found.counts]
    keys = []
    for i, (name, count) in enumerate(zip(found.ids, found.counts, strict=True)):
        for part in range(count):
            for copy in range(copies[i]):
                key = hashlib.sha256(f"{name}:{part}:{copy}".encode()).hexdigest() if part or copy else name
                keys.append((key, len(keys), found.first[i] + part, i))
    expected = [(k, i) for _, _, k, i in sorted(keys)]
    examples, owners = in_order(found, copies)
    assert list(zip(examples.tolist(), owners.tolist(), strict=True)) == expected


def test_read_records_reads_what_splits_wrote(runs: Runs) -> None:
    rows = some_rows(2, 50)
    runs.splits(rows, [9], splits.Params(keep_labels=False))
    found = {row["example_id"]: row for name in SPLITS for row in read_records(runs.folder / "1/out" / name)}
    assert {name: {k: v for k, v in row.items() if k != "split"} for name, row in found.items()} == {
        row["example_id"]: row for row in rows
    }
