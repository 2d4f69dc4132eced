"""Where a stage computes.

`run_stage` passes it to an executor; nothing else depends on the machine that a stage runs on.

The driver (run_stage.py) is the process that DVC starts on this host for `python -m dagster_project run STAGE`. Only
the driver verifies inputs, holds the stage's lock, applies the gate and publishes; only DVC records. Where a stage runs
is not part of a result's identity (docs/decisions/018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dagster_project.core.context import StageContext
from dagster_project.pipeline import Pipeline


@dataclass(frozen=True)
class StageJob:
    """One run of one stage, as the driver passes it to an executor."""

    pipeline: Pipeline
    ctx: StageContext
    """The stage, its parameters and its folders. `ctx.scratch`, the working
    folder of the run, has only the empty folder of the output."""
    inputs: Mapping[str, str]
    """Content hash of everything that the stage reads, by path. With the stage's address it identifies the run, so that
    an executor can find the job of a driver that was killed."""


@dataclass(frozen=True)
class StageResult:
    """Result of a run. Its files are in `ctx.scratch`, at the same paths as in the project."""

    exit_code: int
    """Of the stage's command: 0 success, 1 a blocking check failed, 2 bad input."""
    report: Mapping[str, Any] | None
    """The stage's report; None if the run ended before it wrote one."""
    measured: Mapping[str, float]
    """Time and memory of the run (seconds, bytes)."""
    execution: Mapping[str, Any] = field(default_factory=dict)
    """Where it ran, if not on this host: node, resources, times, cost. Shown to
    the user; part of no output or report."""


class Executor(Protocol):
    """Runs stages on one kind of machine: `local` on this host, `ray` on a node of a Ray cluster."""

    def run(self, job: StageJob) -> StageResult:
        """Run the stage's command and wait for its end.

        Meanwhile each line of its log goes to the logger "pedigree", and its live tables grow in `job.ctx.live` on this
        host. Afterwards, also if a blocking check failed, its pages are in `job.ctx.pages`; after exit code 0, its
        outputs and plots are in `job.ctx.scratch`.

        Raises:
            KeyboardInterrupt: the run was canceled, and the executor stopped every process that it had started.
            PedigreeError: the run ended without a report, and its error is known. The error has its exit code.
        """
        ...
