"""`pedigree init`: makes a project in a folder, with parameters that fit the user's files.

Needs neither DVC nor Dagster nor torch.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dagster_project.commands.init_data import Found, examine, read
from dagster_project.commands.init_params import CONTEXT, PLACEHOLDER, SAMPLE_MODEL, params_text
from dagster_project.commands.init_template import examine_for
from dagster_project.commands.new_project import rendered
from dagster_project.commands.pipeline_file import KEEP, current_lock, folders, pipeline_text
from dagster_project.core.errors import InputError
from dagster_project.core.git import git, git_bytes
from dagster_project.core.layout import RECORD_KEY, report_of
from dagster_project.core.records import remove
from dagster_project.curation.sources.hub import HubSplit
from dagster_project.lineage import code_lock
from dagster_project.lineage.exports_in_place import COMMENT, IGNORE_LINES
from dagster_project.lineage.history import LOCK
from dagster_project.pipeline import VARIANTS_OF
from dagster_project.views.texts import text

log = logging.getLogger("pedigree")

LARGE = 10_000_000
"""Bytes of a file or folder above which DVC tracks it, and not git."""
INSTALL = f"pip install '{code_lock.DISTRIBUTION}[all]'"
DVC_FILES = {
    ".dvc/config": "[core]\n    analytics = false\n",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    ".dvcignore": (
        "# Files of editors, Python and operating systems, which must not make a stage stale.\n"
        "__pycache__\n*.pyc\n*.swp\n*~\n.#*\n.DS_Store\n.dagster\n.venv\ndata/live/.gitkeep\n"
        + "\n".join([COMMENT, *IGNORE_LINES, ""])
    ),
}
"""What `dvc init` sets up, and what DVC ignores."""


def init(folder: Path, data: Sequence[str], base_model: str | None, task: str, license: str) -> dict[str, Any]:
    """Make a project. Everything is read and checked before the first file is written.

    Args:
        data: files and folders, which are copied to data/sources/; data sets `hub:org/name@REVISION:split` and objects
            `s3://BUCKET/PREFIX`, which are not copied.
        base_model: `org/name@REVISION` on the Hub, or a folder, which is copied; None: that of the sample project.
        task: auto, labels, json or text.
    Returns:
        {"project", "files", "sources": [{"path", "kind", "layout", "rows"}], "kept", "task", "git": whether git has the
        files, "dvc": large files that DVC tracks instead, "missing": programs, "next": commands}.
    Raises:
        InputError: a file exists or would be ignored by git, or an input cannot be used. Nothing was written.
    """
    try:
        str(folder.resolve()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{str(folder)!r}: its path is not UTF-8, which DVC requires; nothing was written", "use another name"
        ) from None
    model, weights = _base_model(base_model)
    given = read(data)
    found, template = examine_for(weights, given, task) if weights else (examine(given, task), None)
    if template:
        model["chat_template"] = template
    context = min(CONTEXT, _context_of(weights)) if weights else CONTEXT
    files = _files(found, params_text(found, model, license, context), folder.resolve().name)
    copies = {one.place: Path(one.path) for one in found.given if one.is_copied} | (
        {str(model["folder"]): weights} if weights else {}
    )
    _refuse_existing(folder, [*files, *copies, LOCK])
    for name, source in copies.items():
        if source.is_dir() and (folder / name).resolve().is_relative_to(source.resolve()):
            raise InputError(
                f"{source} contains the project {folder}; nothing was written", "name a folder outside of it"
            )
    copied = [path for name, source in copies.items() for path in _paths_in_git(name, source)]
    _refuse_ignored(folder, [*(name for name in files if name != RECORD_KEY), *copied, LOCK, report_of("splits")])
    by_dvc_add = {path for name in copies for path in (folder / f"{name}.dvc", (folder / name).parent / ".gitignore")}
    made = [folder / name for name in (*files, *copies)] + [path for path in by_dvc_add if not path.exists()]
    if not folder.exists():
        made = [folder]
    before = {parent for path in made for parent in path.parents if parent.is_dir()}
    try:
        has_git, large, by_dvc = _write(folder, files, copies)
    except BaseException:  # also Ctrl-C while a large model is copied: the same command can be given again
        _undo(made, before)
        raise
    return {
        "project": str(folder),
        "files": sorted([*files, *copies]),
        "sources": [
            {"path": one.name, "kind": one.kind, "layout": one.layout, "rows": len(one.records)} for one in found.given
        ],
        "kept": found.kept,
        "task": found.task,
        "git": has_git,
        "dvc": by_dvc,
        "missing": [
            *([] if has_git else ["git"]),
            *(name for name in ("dvc", "dagster", "torch") if find_spec(name) is None),
        ],
        "next": _next(folder, bool(found.given), [name for name in large if name not in by_dvc]),
    }


def _write(folder: Path, files: Mapping[str, str], copies: Mapping[str, Path]) -> tuple[bool, list[str], list[str]]:
    """Write a project.

    Args:
        files: path in the project -> content.
        copies: path in the project -> file or folder.
    Returns:
        Whether git has it, the paths that are large, and those of them that DVC tracks.
    """
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch(mode=0o600 if name == RECORD_KEY else 0o666)
        (folder / name).write_text(content, encoding="utf-8")
    for name, source in copies.items():
        _copy(source, folder / name)
    has_git = git(folder, "rev-parse", "--show-toplevel") is not None or git(folder, "init", "-q") is not None
    large = [name for name in copies if _size(folder / name) > LARGE]
    by_dvc = large if has_git and _add_to_dvc(folder, large) else []
    if has_git:
        small = [name for name in [*files, *copies] if name != RECORD_KEY and name not in large]
        ignores = {f"{Path(name).parent}/.gitignore" for name in by_dvc}
        git(folder, "add", "--", *small, *(f"{name}.dvc" for name in by_dvc), *ignores)
    return has_git, large, by_dvc


def _undo(written: Sequence[Path], before: Collection[Path]) -> None:
    """Remove what an unfinished command wrote, and folders that are empty then and were not there before."""
    for path in written:
        remove(path)
        for parent in path.parents:
            if parent in before:
                break
            with suppress(OSError):  # it has other files
                parent.rmdir()


def _base_model(spec: str | None) -> tuple[dict[str, Any], Path | None]:
    """The section `base_model`, and the folder to copy, if it is one.

    Raises:
        InputError: neither a folder with a model nor org/name@REVISION.
    """
    if spec is None:
        return dict(SAMPLE_MODEL), None
    place = Path(spec)
    if place.is_dir():
        if not (place / "config.json").is_file() or not (place / "tokenizer.json").is_file():
            raise InputError(
                f"--base-model {spec}: no config.json or tokenizer.json in this folder",
                "name the folder of a complete model",
            )
        return {"folder": f"models/{place.resolve().name}", "license": "unknown"}, place
    name, at, revision = spec.partition("@")
    if not at or (problem := HubSplit(name, revision, "train").problem):
        raise InputError(
            f"--base-model {spec}: neither a folder nor a model at a commit" + (f": {problem}" if at else ""),
            "use org/name@REVISION with the 40 hex digits of the commit,"
            " or a folder with config.json, tokenizer.json and safetensors files",
        )
    return {"hub": name, "revision": revision, "license": "unknown"}, None


def _context_of(folder: Path) -> int:
    """Tokens that a model can read, according to its config.json."""
    try:
        length = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        raise InputError(
            f"--base-model {folder}: config.json is not a JSON object", "name the folder of a complete model"
        ) from None
    return length if isinstance(length, int) and length >= 16 else CONTEXT


def _files(found: Found, params: str, name: str) -> dict[str, str]:
    """Path in the project -> content."""
    outputs, inputs = folders()
    # read as whole folders, even without variants
    optional = [stage for stage, section in VARIANTS_OF.items() if section == "aligned"]
    whole = [f"data/{stage}" for stage in optional]
    kept = [*whole, *(f"data/reports/{stage}" for stage in optional), "data/live"]
    return {
        "params.yaml": params,
        "dvc.yaml": pipeline_text(),
        code_lock.FILE: current_lock().text(),
        "workspace.yaml": rendered("workspace.yaml"),
        "README.md": rendered(
            "README.md",
            name=name,
            install=INSTALL,
            given=found.given,
            key=RECORD_KEY,
            code_lock=code_lock.FILE,
            placeholder=PLACEHOLDER,
        ),
        ".gitignore": rendered("gitignore", outputs=dict.fromkeys(outputs), kept=whole, keep=KEEP, key=RECORD_KEY),
        ".gitattributes": GITATTRIBUTES,
        **DVC_FILES,
        RECORD_KEY: secrets.token_hex(32) + "\n",
        **{f"{folder}/{KEEP}": "" for folder in sorted({*inputs, *kept})},
    }


GITATTRIBUTES = "# DVC hashes bytes: git must not change line ends in a checkout\n* -text\n"


def _refuse_existing(folder: Path, names: Sequence[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file", "name a folder")
    if present := [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]:
        raise InputError(
            f"{folder} has {', '.join(present[:5])}{' and more' if len(present) > 5 else ''} already;"
            " nothing was written",
            "name an empty folder, or move these files away",
        )


def _paths_in_git(name: str, source: Path) -> list[str]:
    """What git is to have of a file or folder that is copied: it, or its .dvc file."""
    if _size(source) > LARGE:
        return [f"{name}.dvc"]
    return (
        [f"{name}/{path.relative_to(source).as_posix()}" for path in _contents(source)] if source.is_dir() else [name]
    )


def _refuse_ignored(folder: Path, names: Sequence[str]) -> None:
    """Raises:
    InputError: the folder is in a repository of which a rule, such as `data/`,
        makes git ignore files of the project. No commit would have them.
    """
    whole = folder.resolve()
    there = next(place for place in (whole, *whole.parents) if place.is_dir())
    given = "\0".join(str(whole / name) for name in names)
    found = os.fsdecode(
        git_bytes(there, "check-ignore", "--verbose", "-z", "--stdin", given=os.fsencode(given)) or b""
    ).split("\0")
    for file, line, rule, path in zip(*(found[start::4] for start in range(4)), strict=False):
        if not rule.startswith("!"):
            raise InputError(
                f"git ignores {Path(path).relative_to(whole).as_posix()} in {folder},"
                f" by the rule `{rule}` ({file}, line {line}); nothing was written",
                "change the rule, or name a folder in which git does not ignore files of a project",
            )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(target)
    if source.is_dir():
        shutil.copytree(source, target, ignore=lambda _, names: {name for name in names if _stays(name)})
    else:
        shutil.copyfile(source, target)


def _stays(name: str) -> bool:
    """Whether a file or folder in a folder is not copied: hidden ones (git does not
    track the files of a repository within a repository), and those of DVC."""
    return name.startswith(".") or name.endswith(".dvc")


def _contents(folder: Path) -> list[Path]:
    """The files that are copied of a folder."""
    return [
        path for path in folder.rglob("*") if path.is_file() and not any(map(_stays, path.relative_to(folder).parts))
    ]


def _size(path: Path) -> int:
    """Bytes of a file, or of the files that are copied of a folder."""
    return sum(file.stat().st_size for file in (_contents(path) if path.is_dir() else [path]))


def _add_to_dvc(folder: Path, names: Sequence[str]) -> bool:
    """Let DVC track files; whether it does. DVC is a program here, because a project can be made without it."""
    if not names or find_spec("dvc") is None:
        return False
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "-q", *names], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        log.warning(f"dvc add {' '.join(names)}: {done.stderr.strip()}")
    return done.returncode == 0


def _next(folder: Path, has_data: bool, untracked: Sequence[str]) -> list[str]:
    lines = [] if folder.resolve() == Path.cwd() else [f"cd {shlex.quote(str(folder))}"]
    lines += [] if has_data else [f"put your data into {PLACEHOLDER}", f"git add {PLACEHOLDER}"]
    for name in untracked:
        lines += [
            f"dvc add {shlex.quote(name)}",
            shlex.join(["git", "add", f"{name}.dvc", f"{Path(name).parent}/.gitignore"]),
        ]
    return [*lines, "git commit -m 'New project'", "pedigree run --all"]


def as_text(document: Mapping[str, Any]) -> str:
    """The document of `init` as text for the terminal."""
    return text("init", **document, install=INSTALL)
