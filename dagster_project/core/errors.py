"""Exceptions and exit codes: bad input (2), a failed check or a busy resource (1), an interrupt (130).

Each states what is wrong, where, and the next step.
"""

from __future__ import annotations

LONGEST = 20_000
"""Characters of a message that are shown, whatever it quotes."""
INNER = "PEDIGREE_INNER_COMMAND"
"""Environment variable of a command that another one has started, e.g. of a stage in the scratch copy of `verify`: that
one prints the last line of an interruption."""


class PedigreeError(Exception):
    """An error reported to the user as one clear message, without a traceback."""

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        """Args:
        what: what is wrong and where, e.g. "params.yaml: splits.test: must be below 1".
        hint: the next step for the reader, in the imperative.
        """
        what = what if len(what) <= LONGEST else f"{what[:LONGEST]}…"
        super().__init__(what, hint)  # as it is, so that another process can raise the same error
        self.what, self.hint = what, hint

    def __str__(self) -> str:
        return f"{self.what}\nhint: {self.hint}" if self.hint else self.what


class InputError(PedigreeError):
    """Bad input or usage. Nothing was changed."""

    exit_code = 2


class CheckFailed(PedigreeError):
    """A blocking check failed, or the result is negative."""

    exit_code = 1


class Interrupted(PedigreeError):
    """Ctrl-C, or a request to stop."""

    exit_code = 130


class DamagedIndex(PedigreeError):
    """The file of the index of audits is damaged. It was set aside: the same command makes a new one."""


class Busy(PedigreeError):
    """Another process is using the same resource. Nothing was changed."""

    exit_code = 1
