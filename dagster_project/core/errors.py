"""The ways a command says no: bad input (exit 2), a failed check or somebody at work (exit 1). Each says what, where and what next."""

from __future__ import annotations


class PedigreeError(Exception):
    """Something the user must hear about, in one clear message and without a traceback."""

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        """Args:
        what: what is wrong and where, e.g. "params.yaml: splits.test: must be below 1".
        hint: the next step for the reader, in the imperative.
        """
        super().__init__(f"{what}\nhint: {hint}" if hint else what)
        self.what, self.hint = what, hint


class InputError(PedigreeError):
    """Bad input or usage. Nothing was changed."""

    exit_code = 2


class CheckFailed(PedigreeError):
    """A blocking check failed, or the answer to a question is no."""

    exit_code = 1


class Busy(PedigreeError):
    """Another process is at work on the same thing. Nothing was changed."""

    exit_code = 1
