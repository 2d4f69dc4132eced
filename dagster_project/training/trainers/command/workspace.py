"""The folder in which a training command runs, with all that it gets. docs/own-trainer.md documents it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file, sha256_of_text
from dagster_project.core.params import Compute
from dagster_project.core.records import iter_table, remove, write_json, write_table
from dagster_project.training.trainers.command.entry import FOLDER, given, source_of
from dagster_project.training.trainers.harness.params import AdapterParams

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
"""Of the contract: raised if a file, a column or a key changes its meaning."""
SPLITS = ("train", "validation")
INPUTS = "inputs.json"


@dataclass(frozen=True)
class Workspace:
    """Files that a command reads, and folders that it writes."""

    folder: Path
    inputs: Path
    """JSON document with all paths and parameters."""
    output: Path
    """Where the command writes its results."""
    examples: list[tuple[str, int, int]]
    """(example_id, tokens, tokens in the loss) of each row of train.parquet."""


def row_schema() -> pa.Schema:
    """train.parquet and validation.parquet: one row per example."""
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    columns = [
        ("example_id", pa.string()),
        ("input_ids", tokens),
        ("attention_mask", tokens),  # 1 for every token: rows are not padded
        ("labels", tokens),  # -100: not in the loss
        ("weights", pa.list_(pa.float32())),  # weight of each token in the loss
    ]
    return pa.schema(columns)


def examples_of(packed: Path) -> Iterator[dict[str, Any]]:
    """The examples of a split, unpacked, in order.

    The first token of an example has no context, and therefore no label.
    """
    for row in iter_table(packed):
        start = 0
        for identity, length in zip(row["example_ids"], row["lengths"], strict=True):
            ids, labels, weights = (row[name][start : start + length] for name in ("input_ids", "labels", "weights"))
            yield {
                "example_id": identity,
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": [IGNORE, *labels[1:]],
                "weights": [0.0, *weights[1:]],
            }
            start += length


def make_workspace(
    folder: Path, params: AdapterParams, compute: Compute, root: Path, tokenized: Path, base_model: Path, where: str,
    target: Mapping[str, str], checkpoints: Path,
) -> Workspace:  # fmt: skip
    """Write all that a command gets into a new folder.

    Args:
        root: the project's folder.
        where: dotted path of the entry in params.yaml.
        target: {"device", "dtype"} that Pedigree's own trainer would use.
        checkpoints: folder of the variant that survives a killed run.
    Raises:
        InputError: a file of the command is missing, or has the name of one of these files.
    """
    remove(folder)
    output = folder / "output"
    output.mkdir(parents=True)
    examples: list[tuple[str, int, int]] = []

    def noted(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            examples.append((row["example_id"], len(row["labels"]), sum(label != IGNORE for label in row["labels"])))
            yield row

    write_table(folder / "train.parquet", noted(examples_of(tokenized / "train.parquet")), row_schema())
    write_table(folder / "validation.parquet", examples_of(tokenized / "validation.parquet"), row_schema())
    (folder / "base_model").symlink_to(base_model.resolve(), target_is_directory=True)
    for template in tokenized.glob("chat_template.jinja"):
        shutil.copyfile(template, folder / template.name)
    settings = {"parameters": given(params), "seed": compute.seed, "threads": compute.threads}
    document = {"version": VERSION, **settings, **target}
    sources = {path: source_of(root, path, f"{where}.files") for path in params.files}
    taken = {INPUTS, *(path.name for path in folder.iterdir() if path != output)}
    for path, source in sources.items():
        relative = source.relative_to((root / FOLDER).resolve())
        copy = folder / relative
        # base_model is a link: a file in it would be written into the base model
        if copy.exists() or relative.parts[0] in taken:
            problem = f"params.yaml: {where}.files: {path}: the working folder already has a file of this name"
            raise InputError(problem, "rename it")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
    read = [folder / f"{split}.parquet" for split in SPLITS]
    read += [*sorted(base_model.glob("*.safetensors")), base_model / "config.json"]
    identity = [document, params.command, [sha256_of_file(path) for path in (*read, *sources.values())]]
    kept = checkpoints / sha256_of_text(json.dumps(identity, sort_keys=True))[:16]
    for other in checkpoints.glob("*"):
        if other != kept:  # of other inputs, parameters or files
            remove(other)
    kept.mkdir(parents=True, exist_ok=True)
    places = {split: folder / f"{split}.parquet" for split in SPLITS}
    places |= {"base_model": folder / "base_model", "output": output}
    if (folder / "chat_template.jinja").is_file():
        places["chat_template"] = folder / "chat_template.jinja"
    places["checkpoints"] = kept
    write_json(folder / INPUTS, document | {name: str(path.absolute()) for name, path in places.items()})
    return Workspace(folder, folder / INPUTS, output, examples)
