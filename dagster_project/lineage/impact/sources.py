"""The source that `--source` names, as records name it."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.text import visible
from dagster_project.lineage.history import is_within
from dagster_project.lineage.index import Index
from dagster_project.lineage.sources import stages_reading

SHOWN = 12
"""Most known sources in a message."""


def known_source(index: Index, source: str) -> str:
    """A source as records name it.

    Raises:
        InputError: no recorded run has read it.
    """
    name, root = source.removeprefix("./"), index.root.absolute()
    path = Path(source).absolute()
    relative = path.relative_to(root).as_posix() if path.is_relative_to(root) else name
    candidates = [candidate for candidate in names_of(source, root) if candidate]
    # "./": of earlier versions
    recorded = (one for candidate in candidates for one in (candidate, f"./{candidate}") if index.knows_source(one))
    read = (candidate for candidate in candidates if stages_reading(index, candidate))
    if found := next(recorded, None) or next(read, None):
        return found
    made = [run for run in index.runs.values() if run.path]
    if outs := [run for run in made if is_within(relative, run.path) or is_within(run.path, relative)]:
        raise InputError(
            f"--source {visible(source)}: an output of {outs[-1].address}, not a source",
            f"ask for one version of it by its md5, such as `--hash {outs[-1].md5}`",
        )
    file = root / name if (root / name).exists() else path
    known = list[str]()
    if len(index.runs) < 1000:
        known = sorted({one for run in index.runs.values() for one in index.sources_of(run) or ()})
    same = sorted(index.outputs_by_source_hash(sha256_of_file(file))) if file.is_file() else []
    if not same and file.exists():
        same = [one for one in known if os.path.realpath(root / one) == os.path.realpath(file)]
    if same:
        raise InputError(
            f"--source {visible(source)}: not a name that a run read it by",
            f"ask for --source {same[0]}, which is or was the same file",
        )
    what = (
        "exists, but no recorded run has read it" if file.exists() else "no recorded run has read such a file or folder"
    )
    hint = f"known: {', '.join(known[:SHOWN])}" if known else "`pedigree audit MODEL` lists the sources of a model"
    raise InputError(f"--source {visible(source)}: {what}", f"{hint}; look texts up with --text or --containing")


def names_of(source: str, root: Path) -> list[str]:
    """What a source may be called in records, as given first: relative to the project, without "a/../", through
    symbolic links, and in either form in which a file name may hold its accents.

    Args:
        root: absolute path of the project.
    """
    given, path = source.removeprefix("./"), Path(source).absolute()
    paths = [path, Path(os.path.normpath(path)), Path(os.path.realpath(path))]
    relative = [
        one.relative_to(base).as_posix()
        for one in paths
        for base in (root, Path(os.path.realpath(root)))
        if one.is_relative_to(base)
    ]
    names = [given, given.rstrip("/"), *relative, *([os.path.normpath(given)] if given else [])]
    return list(
        dict.fromkeys([*names, *(unicodedata.normalize(form, name) for name in names for form in ("NFC", "NFD"))])
    )
