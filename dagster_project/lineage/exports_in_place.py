"""The exports in data/release: files that `pedigree export release --all` writes beside those of the release.

DVC ignores them (.dvcignore), and they are not part of the content of the release: whatever lists, hashes or copies it
leaves them out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dagster_project.core.files import replacing
from dagster_project.core.records import remove

RELEASE = "data/release"
"""The only output that has exports in its folder."""
NAMES = ("exports", "exports.html", "model.sig", "model.intoto.jsonl", "model.pub")
"""A folder, the page, signature, attestations and public key."""
FORMER = ("papers", "papers.html")
"""The folder and the page as earlier versions named them: they are no longer read, and deleted with the others."""
IGNORE_FILE = ".dvcignore"
COMMENT = "# Exports that `pedigree export release --all` writes beside the files of a release: no part of its content."
IGNORE_LINES = tuple(f"/{RELEASE}/{name}{'/' if name == 'exports' else ''}" for name in NAMES)


def is_place(folder: Path) -> bool:
    """Whether a folder is in the place of a release."""
    return any(path.parts[-2:] == PurePosixPath(RELEASE).parts for path in (folder.absolute(), folder.resolve()))


def names_in(folder: Path) -> tuple[str, ...]:
    """Names in a folder that are exports, and not part of its content: none, unless it is in the place of a release."""
    return (*NAMES, *FORMER) if is_place(folder) else ()


def without_exports(folder: Path, files: Iterable[Path]) -> list[Path]:
    """The files in a folder that are its content."""
    exports = names_in(folder)
    return [file for file in files if not exports or file.relative_to(folder).parts[0] not in exports]


def present(root: Path) -> list[str]:
    """Names of the exports that a project has in the folder of its release, whatever they are."""
    return [name for name in (*NAMES, *FORMER) if os.path.lexists(root / RELEASE / name)]


def delete(root: Path) -> None:
    """Delete all of them."""
    for name in (*NAMES, *FORMER):
        remove(root / RELEASE / name)


def missing_lines(root: Path) -> list[str]:
    """Lines of `IGNORE_LINES` that .dvcignore lacks."""
    file = root / IGNORE_FILE
    lines = {line.strip() for line in file.read_bytes().split(b"\n")} if file.is_file() else set()
    return [line for line in IGNORE_LINES if line.encode() not in lines]


def add_lines(root: Path) -> list[str]:
    """Add the lines that .dvcignore lacks, at its end. Returns them."""
    lines, file = missing_lines(root), root / IGNORE_FILE
    if lines:
        before = file.read_bytes() if file.is_file() else b""
        between = b"" if not before or before.endswith(b"\n") else b"\n"
        with replacing(file.resolve()) as scratch:  # a link stays one
            scratch.write_bytes(before + between + "\n".join([COMMENT, *lines, ""]).encode())
            if file.is_file():
                shutil.copymode(file, scratch)
    return lines
