"""Histories with damage: `dvc.lock`, reports, records, ledgers and `examples.parquet`
as `audit`, `impact` and `export` read them, from disk and from git."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import yaml
from builders.random_history import Toy, git

from dagster_project.lineage.export.registry import formats
from fuzz.surface import Case, Surface, answered
from fuzz.values import damaged, like, text, value

HISTORIES = 6
"""Different histories, each made once in a worker."""
MODELS = ("adapter@lora", "merged@lora", "adapter@dora", "merged@dora", "release")


# --- what is damaged


def _reports(root: Path) -> list[Path]:
    return sorted(root.glob("data/reports/**/*.json"))


def _objects(suffix: str) -> Callable[[Path], list[Path]]:
    """Objects of DVC's cache: listings of folders (.dir), or files that begin like a suffix's."""
    magic = {"parquet": b"PAR1", "json": b"{", "other": b""}

    def found(root: Path) -> list[Path]:
        files = sorted(file for file in root.glob(".dvc/cache/files/md5/*/*") if file.is_file())
        if suffix == "dir":
            return [file for file in files if file.name.endswith(".dir")]
        return [file for file in files if file.read_bytes()[:4].startswith(magic[suffix])]

    return found


TARGETS: dict[str, Callable[[Path], list[Path]]] = {
    "dvc.lock": lambda root: [root / "dvc.lock"],
    "reports": _reports,
    "listings": _objects("dir"),
    "tables": _objects("parquet"),
    "reports in the cache": _objects("json"),
    "objects": _objects("other"),
    "outputs": lambda root: sorted(
        file for file in root.glob("data/*/**/*") if file.is_file() and "sources" not in file.parts
    ),
    "run cache": lambda root: sorted(file for file in root.glob(".dvc/cache/runs/*/*/*") if file.is_file()),
    "definitions": lambda root: [
        root / "dvc.yaml",
        root / "params.yaml",
        root / ".dvc/config",
        root / "code.lock.yaml",
    ],
    "index": lambda root: sorted(file for file in root.glob(".dvc/tmp/pedigree/**/*") if file.is_file()),
    "git": lambda root: [
        file
        for file in sorted(root.glob(".git/**/*"))
        if file.is_file()
        and (
            file.name in {"HEAD", "index", "config", "packed-refs", "shallow"}
            or {"objects", "refs", "logs"} & set(file.parts)
        )
    ],
}
WEIGHTS = {
    "dvc.lock": 5,
    "reports": 4,
    "listings": 3,
    "tables": 4,
    "reports in the cache": 4,
    "objects": 2,
    "outputs": 2,
    "run cache": 2,
    "definitions": 2,
    "index": 2,
    "git": 2,
}
CHANGES = (
    "like",
    "like",
    "like",
    "damaged",
    "damaged",
    "cut",
    "empty",
    "missing",
    "folder",
    "link",
    "itself",
    "bytes",
    "conflict",
    "value",
)
LOSSES = {"cut", "empty", "missing", "folder", "bytes"}
"""Changes after which the content cannot be read."""


def change(how: str, path: Path, draw: random.Random) -> None:
    """Damage a file. Nothing happens where it does not exist."""
    if not path.is_file() and how not in {"bytes", "value"}:
        return
    content = path.read_bytes() if path.is_file() else b""
    mode = path.stat().st_mode if path.exists() else 0o644
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if how == "missing":
        return
    if how == "folder":
        path.mkdir()
    elif how in {"link", "itself"}:
        path.symlink_to(path.name if how == "itself" else draw.choice(["nowhere", "/etc/hostname", ".."]))
    else:
        path.write_bytes(_changed(how, content, draw))
        path.chmod(mode | 0o200)


def _changed(how: str, content: bytes, draw: random.Random) -> bytes:
    if how == "like":
        return _like(content, draw)
    if how == "damaged":
        return damaged(draw, content)
    if how == "cut":
        return content[: draw.randrange(max(1, len(content)))]
    if how == "empty":
        return b""
    if how == "bytes":
        return b"\xff\xfe" + draw.randbytes(20)
    if how == "value":
        return json.dumps(value(draw)).encode()
    half = content[len(content) // 3 : len(content) // 2]
    return (
        content.replace(half, b"<<<<<<< HEAD\n" + half + b"\n=======\n" + half[: len(half) // 2] + b"\n>>>>>>> x\n", 1)
        if half
        else content
    )


def _like(content: bytes, draw: random.Random) -> bytes:
    """Valid JSON or YAML with other values, or a table with other columns; damaged where it is none of them."""
    rate = draw.choice([0.01, 0.05, 0.2])
    if content[:4] == b"PAR1":
        return _other_table(content, draw)
    with suppress(ValueError):
        return json.dumps(like(draw, json.loads(content), rate)).encode()
    with suppress(yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return yaml.safe_dump(like(draw, yaml.safe_load(content), rate), sort_keys=False).encode(
            "utf-8", "surrogatepass"
        )
    return damaged(draw, content)


def _other_table(content: bytes, draw: random.Random) -> bytes:
    """A table without a column, with one of another type, without rows, or with nulls."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(content))
    name = draw.choice(table.column_names)
    at, how = table.column_names.index(name), draw.choice(["drop", "null", "type", "rows", "values"])
    if how == "drop":
        table = table.drop_columns([name])
    elif how == "null":
        table = table.set_column(at, name, pa.nulls(len(table), table.schema.field(name).type))
    elif how == "type":
        table = table.set_column(at, name, pa.array([draw.choice([1, -1, 2**40])] * len(table)))
    elif how == "rows":
        table = table.slice(0, draw.choice([0, len(table) // 2]))
    else:
        table = table.set_column(
            at, name, pa.array([text(draw).encode(errors="replace").decode() for _ in range(len(table))])
        )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


# --- drawing


def draw(random: random.Random) -> Case:
    damage = [
        {
            "target": random.choices([*WEIGHTS], [*WEIGHTS.values()])[0],
            "pick": random.random(),
            "how": random.choice(CHANGES),
            "seed": random.randrange(2**32),
            "commit": random.random() < 0.3,
        }
        for _ in range(random.choice([1, 1, 1, 2, 4]))
    ]
    return {
        "history": random.randrange(HISTORIES),
        "damage": damage,
        "questions": [_question(random) for _ in range(random.choice([1, 1, 2]))],
    }


def _question(random: random.Random) -> list[str]:
    """A command, with {record} and the like for what only the history knows."""
    model, other = random.choice(MODELS), random.choice(MODELS)
    kind = random.random()
    if kind < 0.25:
        return [
            "audit",
            model,
            *random.choice(
                [
                    [],
                    ["--html", "page.html"],
                    ["--records", "r.csv"],
                    ["--where"],
                    ["--rev", "HEAD"],
                    ["--rev", "HEAD~1"],
                ]
            ),
        ]
    if kind < 0.35:
        return [
            "audit",
            "--diff",
            f"{random.choice(['', 'HEAD:', 'HEAD~1:'])}{model}",
            f"{random.choice(['', 'HEAD:'])}{other}",
        ]
    if kind < 0.5:
        return ["export", model, "--format", random.choice([*formats()]), *random.choice([[], ["--rev", "HEAD"]])]
    return [
        "impact",
        *random.choice(
            [
                ["--record", "{record}"],
                ["--record", "{record}"],
                ["--text", "{text}"],
                ["--source", "{source}"],
                ["--source", "data/sources"],
                ["--hash", "{hash}"],
                ["--containing", "the"],
                ["--containing", "saw.*near", "--regex"],
                ["--record", "{record}", "--near"],
                ["--text", "Nobody wrote this."],
            ]
        ),
    ]


# --- playing


@cache
def _history(folder: Path, number: int) -> tuple[Toy, dict[str, str]]:
    """A history on disk, and what questions about it are about."""
    place = folder / f"history {number}"
    shutil.rmtree(place, ignore_errors=True)  # of an attempt that failed
    toy = Toy(place, number)
    toy.real = False
    toy.play(4 + number)
    toy.do("commit_all")
    toy.do("repro")
    toy.do("commit_all")
    record = sorted(toy.log.steps.values())[0][0][2] if toy.log.steps else "0" * 32
    about = {
        "record": record, "text": toy.log.text_of.get(record, ("x", ""))[0], "source": toy.source_paths()[0],
        "hash": sorted(toy.log.weights)[0] if toy.log.weights else "0" * 32,
    }  # fmt: skip
    if number % 2:  # a damaged project may have an index of its own
        answered("impact", "--record", record, "--project", str(toy.root), verdict=True)
    return toy, about


@cache
def _verdict(folder: Path, number: int, question: Sequence[str]) -> str:
    """The answer about the undamaged history."""
    toy, about = _history(folder, number)
    copy = folder / "undamaged"
    shutil.copytree(toy.root, copy, symlinks=True)
    try:
        _, document = answered(*(part.format(**about) for part in question), "--project", str(copy), verdict=True)
    finally:
        shutil.rmtree(copy)
    return str((document or {}).get("verdict"))


def _copy(source: str, target: str) -> None:
    """Objects of git and of DVC's cache are never written in place."""
    if "/objects/" in source or "/.dvc/cache/" in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def play(case: Case, folder: Path) -> str:
    toy, about = _history(folder.parent, case["history"])
    root = folder / "project"
    shutil.copytree(toy.root, root, symlinks=True, copy_function=_copy)
    lost = True
    for one in case["damage"]:
        draw = random.Random(one["seed"])
        if found := TARGETS[one["target"]](root):
            change(one["how"], found[int(one["pick"] * len(found))], draw)
        lost &= one["how"] in LOSSES and one["target"] in {"listings", "tables", "reports in the cache", "objects"}
        if one["commit"]:
            with suppress(subprocess.CalledProcessError, OSError):
                git(root, "add", "-A")
                git(root, "commit", "-q", "--allow-empty", "-m", "damaged")
    outcomes = []
    for question in case["questions"]:
        _, document = answered(
            *(part.format(**about) for part in question), "--project", str(root), verdict=question[0] == "impact"
        )
        outcomes.append(
            "refused" if document is None else document["verdict"] if question[0] == "impact" else "answered"
        )
        if lost and outcomes[-1] == "no" and question[1] in {"--record", "--text", "--source", "--hash"}:
            assert _verdict(folder.parent, case["history"], tuple(question)) != "yes", (
                "something is lost, and `yes` has become `no`"
            )
    return ", ".join(sorted(set(outcomes)))


SURFACE = Surface("histories", 1_000, draw, play)
