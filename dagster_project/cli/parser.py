"""The parser of the command line. `GROUPS` has the files with the commands, in the order of `pedigree --help`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from dagster_project.cli import attribution, checks, erasure, evaluation, exports, lineage, models, running, ui
from dagster_project.core.errors import InputError

GROUPS = (checks, running, lineage, exports, erasure, attribution, evaluation, models, ui)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    whole = _Parser(
        prog="pedigree",
        description="LLM fine-tuning with record-level lineage.",
        epilog=(
            "Exit codes: 0 success, 1 a check failed or the result is negative,"
            " 2 bad input or usage, or cannot tell, 130 interrupted."
        ),
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return whole


def refuse_separators(arguments: Sequence[str]) -> None:
    """Raises:
    InputError: an option has the value `--`, as in `--top=--`, which argparse takes as no value before Python 3.13.
    """
    for argument in arguments:
        if argument == "--":  # what follows are no options
            return
        if found := re.fullmatch(r"(--[a-z-]+)=--", argument):
            raise InputError(f"argument {found[1]}: expected one argument, not '--'", "see `pedigree --help`")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"see `{self.prog} --help`")
