"""Shared arguments of commands, and their types."""

from __future__ import annotations

import argparse
import logging
from datetime import date
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.lineage.unfinished_erasure import NOTE, is_unfinished

log = logging.getLogger("pedigree")


def add_command(commands: Any, function: Any, name: str = "") -> argparse.ArgumentParser:
    """Add a command; its help is the docstring of its function."""
    command = commands.add_parser(name or function.__name__, help=function.__doc__, description=function.__doc__)
    command.set_defaults(function=function)
    command.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else")
    command.add_argument(
        "--project",
        type=named,
        default=".",
        metavar="FOLDER",
        help="folder of the project (default: the current folder)",
    )
    return command


def project(options: argparse.Namespace) -> Path:
    from dagster_project.orchestration.special_files import refuse_special_files

    root = Path(options.project).resolve()
    refuse_special_files(root)
    if not (root / "dvc.yaml").is_file():
        raise InputError(
            f"no dvc.yaml in {root}", "run the command from the project's folder, or give --project FOLDER"
        )
    return root


def warn_of_erasure(root: Path) -> None:
    """Log that an erasure is unfinished, if one is: results may still be those with the records."""
    if is_unfinished(root):
        log.warning(NOTE)


def count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def named(text: str) -> str:
    """A name that is not empty. An empty one, e.g. from a shell variable that
    is not set, would act as if the option were absent."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def utf8(text: str) -> str:
    """A text in UTF-8. Tokenizers cannot read other bytes, and a search for them finds nothing."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} has bytes that are not UTF-8") from None
    return text


def day(text: str) -> date:
    try:
        found = date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as 2026-01-31") from None
    if found.year < 1970:  # git has no earlier commit, and some formats no year of three digits
        raise argparse.ArgumentTypeError(f"{text!r} is before 1970")
    return found


SYSTEM: dict[str, Any] = {
    "type": utf8,
    "metavar": "TEXT",
    "help": "system prompt; '' for none (default: that of the training records, if all have the same)",
}
"""The option `--system` of `why` and `chat`."""
