"""Where a stage computes. `run_stage` hands it to an executor; nothing else depends on the machine that a stage runs on.

The driver (run_stage.py) is the process that DVC starts on this host for `python -m dagster_project run STAGE`. It alone checks inputs, holds the
stage's lock, applies the gate and publishes; DVC alone records. Where a stage runs is never part of a result's identity (docs/decisions/018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dagster_project.core.context import StageContext
from dagster_project.pipeline import Pipeline


@dataclass(frozen=True)
class StageJob:
    """One run of one stage, as the driver hands it to an executor."""

    pipeline: Pipeline
    ctx: StageContext
    """The stage, its parameters and its folders. `ctx.scratch` is the working folder of the run: empty but for the folder of the output."""
    inputs: Mapping[str, str]
    """Content hash of everything that the stage reads, by path. With the stage's address it identifies the run: an executor finds
    the job of a driver that was killed by it."""


@dataclass(frozen=True)
class StageResult:
    """How a run ended. Its files are in `ctx.scratch`, at the paths that they will have in the project."""

    exit_code: int
    """Of the stage's command: 0 done, 1 a blocking check failed, 2 bad input."""
    report: Mapping[str, Any] | None
    """The stage's report; None if the run ended before it wrote one."""
    measured: Mapping[str, float]
    """Time and memory of the run (seconds, bytes)."""


class Executor(Protocol):
    """Runs stages in one place: `local` on this host."""

    def run(self, job: StageJob) -> StageResult:
        """Run the stage's command and wait for its end.

        While it runs, each line of its log goes to the logger "pedigree", and its live tables grow in `job.ctx.live` on this host. When it ends,
        also if a blocking check failed, its pages are in `job.ctx.pages`; after exit code 0, its outputs and plots are in `job.ctx.scratch`.

        A KeyboardInterrupt cancels: the executor stops what it started, then lets the interrupt through.

        Raises:
            PedigreeError: the run ended without a report, where its own error is known. The error has its exit code.
        """
        ...
