"""Class `damage`: every file of data/, .dvc/ and .dagster/, and those at the top, cut short, emptied, with one bit
flipped, replaced by a folder or a link."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import project
from faults.case import Case, Play, Violation

TREES = ("data/", ".dvc/", ".dagster/")
TOP = ("dvc.yaml", "dvc.lock", "params.yaml", "code.lock.yaml", ".gitignore", ".dvcignore", "workspace.yaml")
CHANGES = "data/pages/instructions/changes.json"
FIXED = {
    "data/reports/splits.json": "cut",
    "data/splits/train/records-00000.parquet": "folder",
    ".dvc/tmp/rwlock": "empty",
    "dvc.lock": "loop",
}
"""Files and damage of the fixed part."""


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    at = int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % len(content)
    content[at] ^= 1 << at % 8
    path.write_bytes(bytes(content))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("x")


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


KINDS: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "empty": _empty,
    "flip": _flip,
    "folder": _folder,
    "link": _link,
    "loop": _loop,
}


def cases(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    every = [path for path in sorted(projects.states[project.DONE].files) if path.startswith(TREES) or path in TOP]
    for path in every:
        for kind in KINDS:
            if fixed and FIXED.get(path) != kind:
                continue
            yield Case(f"damage/{kind}/{path}", project.DONE, _damaged(path, kind))


def _damaged(name: str, kind: str) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        path = at_work.root / name
        before = path.read_bytes()
        mode = path.stat().st_mode
        path.chmod(0o644)
        KINDS[kind](path)
        if path.is_file():
            path.chmod(mode)
        said = "".join(at_work.explained(at_work.run("pedigree", *words)).text for words in _looks(name))
        first = at_work.explained(at_work.run("pedigree", "run", "--all"))
        if name.startswith("data/pages/"):  # views, which nothing reads again
            at_work.run("pedigree", "render")
            at_work.also.append(name)
        elif _is_source(name) and first.code == 0:  # other data: a run of its own
            at_work.also += [".dvc/cache/", "data/pages/"]
        if kind == "link":  # DVC writes through the link
            at_work.also.append((path.parent / "nowhere").relative_to(at_work.root).as_posix())
        if name.startswith(".dagster/"):
            _rebuilt(at_work, said)
        elif first.code != 0 or _is_source(name):  # not ours to repair: git has it, and the message names it
            if first.code != 0 and Path(name).name.split(".")[0] not in said + first.text:
                raise Violation(f"no message names {name}:\n{said}{first.text}")
            _put_back(path, before, mode)
        for found in re.finditer(r"next: (?:rm (?:-r )?(\S+), then )?dvc commit (\S+)", said):
            if found[1]:
                _remove(Path(found[1]))
            at_work.run("dvc", "commit", found[2])
        for found in re.finditer(r"next: rm -r (\S+): ", said):
            _remove(Path(found[1]))
            at_work.removed.add(Path(found[1]).relative_to(at_work.root).as_posix())
        if not name.startswith(".dagster/"):
            at_work.runs_again(project.DONE, "pedigree", "run", "--all")
            if name.startswith(".dvc/cache/"):
                _same_version(at_work)
            at_work.is_undisturbed()

    return play


def _same_version(at_work: Play) -> None:
    """A damaged object may make `instructions` run again. It then compares its rows with the version that it recorded
    at the undisturbed run, which had none to compare with: all rows must be found unchanged, and without this
    comparison its page must be the undisturbed one.
    """
    path = at_work.root / CHANGES
    changes = json.loads(path.read_text())
    undisturbed = (at_work.projects.states[project.DONE].root / CHANGES).read_text()
    assert json.loads(undisturbed) is None
    if changes is None:
        return
    if (
        any(changes["findings"].values())
        or any(changes["rows"][kind] for kind in ("added", "removed", "changed"))
        or not changes["rows"]["unchanged"]
    ):
        raise Violation(f"the same rows count as changed: {path.read_text()}")
    path.write_text(undisturbed)
    at_work.run("pedigree", "render")


def _looks(name: str) -> list[tuple[str, ...]]:
    """Commands that read a file without running a stage."""
    if name.startswith(".dagster/"):
        return [("sync",)]
    looks: list[tuple[str, ...]] = [("verify", "--integrity")]
    if name.startswith((".dvc/tmp/", "data/reports/", "dvc.")):
        looks.append(("audit", "tokenized"))
    return looks


def _is_source(name: str) -> bool:
    """Whether a file is input by people: changed content is not damage to the pipeline, but other data."""
    return (
        name in TOP
        or name.startswith((".dvc/config", ".dvc/.gitignore", "data/sources/", "data/keys/", "data/expectations/"))
        or name.endswith(".gitkeep")
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _put_back(path: Path, content: bytes, mode: int) -> None:
    _remove(path)
    path.write_bytes(content)
    path.chmod(mode)


def _rebuilt(at_work: Play, said: str) -> None:
    """Dagster's home is a view: where it is damaged, the message says to delete it, and sync makes it anew."""
    again = at_work.run("pedigree", "sync")
    if again.code:
        if ".dagster" not in said:
            raise Violation(f"no message names .dagster:\n{said}")
        shutil.rmtree(at_work.root / ".dagster")
        again = at_work.run("pedigree", "sync")
    if again.code:
        raise Violation(again.text)
    at_work.is_undisturbed()
