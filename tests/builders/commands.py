"""Commands, called in the process of a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from dagster_project.__main__ import main


def exit_code(*arguments: str) -> int:
    """Run a command. Returns its exit code, also for wrong usage."""
    try:
        return main([*arguments])
    except SystemExit as usage:
        return int(usage.code or 0)


def refuse_constant(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


class Done(NamedTuple):
    """A command that has ended, most often `check`."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads(self.out, parse_constant=refuse_constant))

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        return {finding["check"]: finding for finding in self.document["findings"]}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of --show."""
        return list(self.document["shown"])

    @property
    def rendered(self) -> str:
        """The output from the rendered rows on."""
        return self.out[self.out.index("as rendered by ") :]


Check = Callable[..., Done]


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command has printed with --json."""
    return dict(json.loads(capsys.readouterr().out))


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a command with --json. Returns its exit code, and its document if there is one."""
    code = main([*arguments, "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else {}
