"""How commands print and write their results."""

from __future__ import annotations

import argparse
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster_project.cli.arguments import project
from dagster_project.commands import ending
from dagster_project.core.errors import InputError, PedigreeError

HTML = (".html", ".htm")


def print_result(options: argparse.Namespace, document: Any, as_text: Any, safe: bool = False) -> None:
    """Print a document as JSON or as text. Names and values in it come from
    data, and may contain control characters: they are written out.

    Args:
        safe: whether the text needs no escapes, as they were made earlier, or it is not for a terminal.
    """
    from dagster_project.core.text import json_text, visible, visible_json

    options.printed = True
    encoding = sys.stdout.encoding or "utf-8"
    if options.json:
        text = visible_json(json_text(document))
    else:
        text = as_text(document) if safe else visible(as_text(document))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # the terminal's encoding is not UTF-8, or a file name is not valid UTF-8
        plain = text.encode(encoding, "backslashreplace").decode(encoding)
        text = json_text(document, ensure_ascii=True) if options.json else plain
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, e.g. `head`, closed the pipe; the exit code is kept
        ending.discard(sys.stdout)
    except OSError as error:
        ending.discard(sys.stdout)
        raise PedigreeError(
            f"standard output: {error.strerror}", "free some space on its disk, or write elsewhere"
        ) from None


def print_error(options: argparse.Namespace, error: PedigreeError) -> None:
    """Print an error as the document of `--json`, unless the command has
    printed one. stdout may be full: stderr has the error, too."""
    if options.json and not getattr(options, "printed", False):
        with suppress(PedigreeError):
            texts = {"error": error.what, "hint": error.hint}
            print_result(options, {name: without_credentials(text) for name, text in texts.items()}, str)


def write(option: str, path: Path, text: str) -> None:
    from dagster_project.core.records import write_text

    try:
        # a pipe or a device such as /dev/stdout, which a new file would replace
        if path.exists() and not (path.is_file() or path.is_dir()):
            with path.open("w", encoding="utf-8") as stream:
                stream.write(text)
        else:
            write_text(path.resolve(), text)  # a link stays one
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}", "name a writable file") from None


def require_writable(option: str, path: Path) -> None:
    """Refuse a file that cannot be written, before other files are."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not there.is_dir() or not os.access(path if path.exists() else there, os.W_OK):
        raise InputError(f"{option} {path}: cannot be written", "name a writable file")


def require_suffix(option: str, name: str | None, suffixes: tuple[str, ...]) -> None:
    if name and Path(name).suffix.lower() not in suffixes:
        raise InputError(
            f"{option} {name}: its name must end in {' or '.join(suffixes)}",
            "name a new file: an existing one is replaced",
        )


def without_credentials(text: str) -> str:
    """A message without passwords and tokens in the addresses that it quotes, also where one was read as a path."""
    return PARAMETERS.sub(r"\1***", USER.sub(lambda found: f"{found[1] or found[2]}***@", text))


USER = re.compile(r"""(\bhttps?:/{1,2})[^\s/?#'"]*@|(\b[\w+.-]+:/{1,2}[^\s/?#:@'"]*:)[^\s/?#'"]*@""")
PARAMETERS = re.compile(
    r"""(?i)([?&](?:x-amz-(?:signature|credential|security-token)|sig|signature|(?:access_)?token)=)[^&\s'"]+"""
)
"""Of addresses that are signed in advance, e.g. of S3 and Azure."""


def refuse_page(option: str, name: str | None, options: argparse.Namespace) -> None:
    """Refuse a page with another suffix, or in an output of the project, before it is computed."""
    from dagster_project.lineage.signing.target import refuse_in_output

    require_suffix(option, name, HTML)
    if name:
        refuse_in_output(project(options), option, Path(name), "file")


def visible_lines(text: str) -> str:
    """Text that is safe to print: names come from data, and may contain control characters or be very long."""
    from dagster_project.core.text import visible

    return "\n".join(line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..." for line in visible(text).split("\n"))


MAX_LINE = 2_000
"""Characters of a line that are shown on stderr."""
