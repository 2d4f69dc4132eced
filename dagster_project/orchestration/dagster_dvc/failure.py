"""What is raised to Dagster. Its UI and logs show the message alone, without a stack trace of this code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from dagster_project.core.errors import InputError
from dagster_project.orchestration.private_api import private_module

_NoTrace = private_module("dagster._core.errors").DagsterUserCodeProcessError
"""The one exception of which Dagster reports a given text (`_text`) instead of where it was raised: it stands for an
error of another process."""


def _text(message: str, name: str) -> list[object]:
    return [private_module("dagster._utils.error").SerializableErrorInfo(f"{message}\n", stack=[], cls_name=name)]


class StageFailure(_NoTrace, dg.Failure):  # type: ignore[misc, valid-type]
    """A stage that failed, or cannot run yet, for a reason that the message explains."""

    def __init__(self, message: str) -> None:
        _NoTrace.__init__(self, message, allow_retries=False, user_code_process_error_infos=_text(message, "Failure"))


class StageRetry(_NoTrace, dg.RetryRequested):  # type: ignore[misc, valid-type]
    """A stage that is to start again later."""

    def __init__(self, message: str, attempts: int, seconds: float) -> None:
        texts = _text(message, "RetryRequested")
        _NoTrace.__init__(self, attempts, seconds_to_wait=seconds, user_code_process_error_infos=texts)


class StageInterrupted(_NoTrace, dg.DagsterExecutionInterruptedError):  # type: ignore[misc, valid-type]
    """A stage whose run was terminated."""

    def __init__(self, message: str) -> None:
        texts = _text(message, dg.DagsterExecutionInterruptedError.__name__)  # executors look for this name
        _NoTrace.__init__(self, message, user_code_process_error_infos=texts)


class LoadFailure(_NoTrace, InputError):  # type: ignore[misc, valid-type]
    """Files of a project from which no definitions can be made."""

    def __init__(self, error: InputError) -> None:
        _NoTrace.__init__(self, error.what, error.hint, user_code_process_error_infos=_text(str(error), "InputError"))


@contextmanager
def load_failures() -> Iterator[None]:
    """Raise a bad input as LoadFailure."""
    try:
        yield
    except InputError as error:
        raise LoadFailure(error) from None
