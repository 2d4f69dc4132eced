"""A surface: a part of the project that reads what others wrote, with a way to draw such input and a way to play it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from builders.commands import exit_code, refuse_constant

Case = dict[str, Any]
"""A case is plain JSON, so that it can be kept in the corpus. `files` maps paths to contents (see `as_content`)."""
MODULES = ("data_files", "parameters", "model_folders", "gguf_files", "exported_files", "histories", "endpoints")
STEERS = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a cursor, set colors, ring, or change the direction of text, except the line break."""
LONGEST_LINE = 10_000
"""Characters of a line on stderr."""


@dataclass(frozen=True)
class Surface:
    """One part of the project under test."""

    name: str
    cases: int
    """Cases of a full run."""
    draw: Callable[[random.Random], Case]
    """Draw a case. It reads nothing but its random numbers, so that a seed always gives the same cases."""
    play: Callable[[Case, Path], str]
    """Play a case in an empty folder, the working directory. Returns its outcome, e.g. "refused".

    Raises:
        Exception: whatever the project raises instead of an exit code, or an AssertionError of an oracle: a finding.
    """


def surface(name: str) -> Surface:
    """The surface of a module of this package."""
    found: Surface = import_module(f"fuzz.{name}").SURFACE
    return found


def drawn(surface: Surface, seed: int, number: int) -> Case:
    return surface.draw(random.Random(f"{surface.name} {seed} {number}"))


def as_content(content: bytes) -> str | dict[str, str]:
    """Bytes as JSON: text where they are UTF-8, else base64."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def as_bytes(content: str | Mapping[str, str]) -> bytes:
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else base64.b64decode(content["base64"])


def write_files(case: Case, folder: Path) -> None:
    """Write the files of a case; of a file and a folder with the same name, the folder."""
    files = case.get("files", {})
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    for name in files.keys() - folders:
        content = files[name]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_bytes(content))


def call(*arguments: str) -> tuple[int, str, str]:
    """Run a command of the command line in this process. Returns its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(*arguments)
    return code, out.getvalue(), err.getvalue()


def answered(*arguments: str, codes: tuple[int, ...] = (0, 1, 2), verdict: bool = False) -> tuple[int, Any]:
    """Run a command with --json and check the contract of the command line.

    Args:
        codes: its documented exit codes.
        verdict: exit codes 1 and 2 may also come with a document: "no" and "cannot tell".
    Returns:
        The exit code, and the document; None if it is that of an error.
    Raises:
        AssertionError: another exit code, a message without its next step,
            control characters, or anything but one document on stdout.
    """
    code, out, err = call(*arguments, "--json")
    assert code in codes, f"exit code {code}: {err[-500:]}"
    for text in (out, err):
        found = STEERS.search(text)
        assert not found, f"control character {found[0]!r} in {text[max(0, found.start() - 80) : found.end() + 80]!r}"
    assert "Traceback" not in err, err[-2000:]
    assert max(map(len, err.split("\n"))) < LONGEST_LINE
    assert out, "neither a document nor an error"
    document = json.loads(out.encode(), parse_constant=refuse_constant)
    if isinstance(document, dict) and document.keys() == {"error", "hint"}:
        assert code in (1, 2), f"an error with exit code {code}"
        last = err.rpartition("error: ")
        assert last[1] and last[2].strip() and "\nhint: " in last[2], f"no message with a next step: {err[-500:]!r}"
        return code, None
    assert code < 2 or verdict, f"a document with exit code {code}"
    return code, document


@contextlib.contextmanager
def inside(folder: Path) -> Any:
    """Make a folder the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
