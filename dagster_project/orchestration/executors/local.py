"""Executor `local`: the stage runs in the driver's own process.

So the stage ends with DVC, an interrupt reaches the stage first, and the lock is released when the process dies.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from dagster_project.core.context import Documents, StageContext
from dagster_project.core.records import Report, write_json
from dagster_project.core.workers import THIS_PROCESS, Workers, using
from dagster_project.orchestration.executors import StageJob, StageResult
from dagster_project.orchestration.machine import machine
from dagster_project.pipeline import Pipeline

log = logging.getLogger("pedigree")


@dataclass(frozen=True)
class LocalExecutor:
    workers: Workers = THIS_PROCESS
    """Processes for work on rows."""

    def run(self, job: StageJob) -> StageResult:
        with using(self.workers):
            report = run_with_pages(job.ctx, job.pipeline)
        return StageResult(1 if report.failures else 0, report.document(), report.measured)


def run_with_pages(ctx: StageContext, pipeline: Pipeline) -> Report:
    """Run the stage with the execution hints of planning for this host, record the machine if it computes with
    floating-point numbers, and draw its pages, also if a blocking check failed."""
    forecast = pipeline.forecast(ctx)
    report = pipeline.stages[ctx.stage](ctx if forecast is None else replace(ctx, hints=forecast.hints))
    if ctx.stage in pipeline.floating_point:
        report.metrics["machine"] = machine()
    documents = Documents(ctx.root, ctx.address, ctx.out, ctx.pages, report.document())
    if forecast is not None:
        report.measured |= forecast.compared(report.measured)
        if report.measured:
            write_json(ctx.pages / "run.json", {**forecast.document(), "measured": report.measured})
            log.info(f"{ctx.address}: {forecast.text(report.measured)}")
    pipeline.draw(documents)
    return report
