"""The project that every case copies: five data stages on 60 rows with a tiny
base model, in a state after each stage; and the comparison with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from builders import warm
from builders.small_pipeline import commit
from builders.tiny_model import make_tiny_model
from dvc.utils import dict_sha256
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

STAGES = ("base_model", "raw_examples", "instructions", "splits", "tokenized")
SOURCE = Path(__file__).resolve().parents[2] / "data/sources/replies_messages.jsonl"
DONE = STAGES[-1]
"""Name of the state in which every stage has run."""
ANY_CONTENT = (".git/", ".dvc/tmp/", ".dagster/", "data/pages/base_model/audit.html")
"""Where files may differ in content: logs of what ran, locks and caches."""
MAY_APPEAR = (
    "dvc.lock.lock",
    ".git/",
    ".dagster/",
    ".dvc/tmp/rwlock",
    ".dvc/tmp/lock",
    ".dvc/tmp/btime",
    ".dvc/tmp/exps",
    ".dvc/tmp/pedigree/locks/",
    ".dvc/tmp/pedigree/sha256.json",
    ".dvc/tmp/pedigree/index.sqlite3",
    ".dvc/tmp/pedigree/seconds/",
    ".dvc/tmp/pedigree/checkpoints/",
    ".dvc/tmp/pedigree/rows/",
    ".dvc/tmp/pedigree/synced.json",
    ".dvc/tmp/pedigree/set_aside/",
    ".dvc/tmp/pedigree/swept",
    "data/pages/base_model/audit.html",
)
"""Where files may appear or be missing that an undisturbed run has or has not: caches, empty files of locks, what was
set aside and named, and the page that sync draws."""


@dataclass(frozen=True)
class State:
    """A project on disk after some stage, and what every file in it holds."""

    root: Path

    @cached_property
    def files(self) -> dict[str, str]:
        return files(self.root)


def files(root: Path) -> dict[str, str]:
    """sha256 of every file, by path; of a link, where it leads to; of dvc.lock, whatever the
    order of its stages: two at once end in any order; of a record of a run in DVC's cache,
    without sizes, which are not in the hash that names it, and which nothing reads."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
            name = path.relative_to(root).as_posix()
            compared = (
                _any_order(content)
                if name == "dvc.lock"
                else _without_sizes(content)
                if name.startswith(".dvc/cache/runs/")
                else content
            )
            found[name] = hashlib.sha256(compared).hexdigest()
    return found


def _without_sizes(record: bytes) -> bytes:
    """What DVC names a record of a run by; a damaged file as it is."""
    try:
        return dict_sha256(YAML(typ="safe").load(record), exclude=["size", "nfiles"]).encode()
    except (YAMLError, ValueError, TypeError, AttributeError):
        return record


def _any_order(lock: bytes) -> bytes:
    """The same bytes for the same stages in another order; a damaged file as it is."""
    try:
        values = YAML(typ="safe").load(lock)
        return json.dumps({**values, "stages": dict(sorted(values["stages"].items()))}).encode()
    except (YAMLError, KeyError, TypeError, AttributeError):
        return lock


def differences(now: dict[str, str], expected: dict[str, str]) -> list[str]:
    """How the files of a project differ from those of an undisturbed run, one line for each file."""
    lines = [f"left behind: {path}" for path in sorted(now.keys() - expected.keys()) if not path.startswith(MAY_APPEAR)]
    lines += [f"missing: {path}" for path in sorted(expected.keys() - now.keys()) if not path.startswith(MAY_APPEAR)]
    both = sorted(now.keys() & expected.keys())
    return lines + [
        f"other content: {path}" for path in both if now[path] != expected[path] and not path.startswith(ANY_CONTENT)
    ]


class Projects:
    """The states of the project, each made once: `""` before the first stage, then one named after each stage."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.states: dict[str, State] = {}
        self.name = ""
        """Begins the names of this process's copies."""
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)

    def make(self) -> None:
        """Run the undisturbed pipeline, stage by stage, and import here what its processes imported."""
        self._preload_model_libraries()
        modules = self.base / "modules"
        if (self.base / "states" / DONE).is_dir():  # of an earlier call
            self.states = {stage: State(self.base / "states" / (stage or "nothing")) for stage in ("", *STAGES)}
            warm.preload(sorted(set(modules.read_text().splitlines())))
            return
        place = self._place("make")
        forked(_make_project, place.root)
        self.keep(place, "")
        with warm.modules_noted(modules) as note:
            for stage in STAGES:
                done = warm.run(place, "dvc", "repro", stage, fault=note, in_stage=note)
                assert done.code == 0, done.text
                if stage == DONE:
                    done = warm.run(place, "pedigree", "verify", "--integrity", fault=note)
                    assert done.code == 0, done.text
                    done = warm.run(place, "pedigree", "sync", fault=note)
                    assert done.code == 0, done.text
                    commit(place.root, "made")
                self.keep(place, stage)
                warm.preload(
                    sorted(set(modules.read_text().splitlines()))
                )  # so that no later process imports them again

    def copy(self, state: str, name: str) -> warm.Place:
        """A project in this state, to be disturbed."""
        place = self._place(name)
        subprocess.run(["cp", "-a", str(self.states[state].root), str(place.root)], check=True)
        owner = place.root / ".dagster" / "pedigree_project"
        if owner.exists():
            owner.write_text(f"{place.root}\n")
        return place

    def _place(self, name: str) -> warm.Place:
        around = self.base / f"{self.name}{name}"
        for folder in ("home", "tmp", "site", "hub"):
            (around / folder).mkdir(parents=True)
        return warm.Place(around / "project", around)

    def keep(self, place: warm.Place, name: str) -> None:
        """Add the state of a project to those that cases begin in, or are compared with."""
        target = self.base / "states" / f"{self.name}{name or 'nothing'}"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier call
        shutil.copytree(place.root, target, symlinks=True)
        self.states[name] = State(target)

    def _preload_model_libraries(self) -> None:
        warm.preload(["torch", "transformers", "tokenizers", "polars", "pandera.polars", "pyarrow.parquet"])


def forked(function: Any, *arguments: Any) -> None:
    pid = os.fork()
    if not pid:
        warm.end(lambda: function(*arguments) or 0)
    assert os.waitpid(pid, 0)[1] == 0


def _make_project(root: Path) -> int:
    """`pedigree init` on 60 rows, reduced to the data stages."""
    from ruamel.yaml import YAML

    from dagster_project.commands.init import init

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(SOURCE.read_text().splitlines(keepends=True)[:60]))
        model = Path(folder) / "tiny"
        model.mkdir()
        make_tiny_model(model)
        init(root, [str(rows)], str(model), "auto", "MIT")
    yaml = YAML(typ="safe")
    document = yaml.load((root / "dvc.yaml").read_text())
    document["stages"] = {name: document["stages"][name] for name in STAGES}
    (root / "dvc.yaml").write_text(json.dumps(document, indent=1))
    commit(root, "start")
    return 0
