"""`pedigree run STAGE`: the only way a stage ever runs. Guards its inputs, holds its gate, publishes its outputs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dagster_project.core.context import Documents, StageContext
from dagster_project.core.errors import Busy, CheckFailed, InputError, PedigreeError
from dagster_project.core.layout import measured_path, report_of
from dagster_project.core.records import Report, remove, write_json
from dagster_project.orchestration import dvc, integrity, locks
from dagster_project.pipeline import PEDIGREE, Pipeline

log = logging.getLogger("pedigree")


def run_stage(root: Path, address: str, pipeline: Pipeline = PEDIGREE) -> Report:
    """Run one stage on what lies in the workspace.

    The stage writes into a scratch folder; its outputs take their place in one step, after every blocking check has passed and its inputs have
    been found unchanged. Whatever goes wrong before that leaves the earlier outputs as they were (those DVC removed are put back).

    Raises:
        InputError: bad parameters or input.
        CheckFailed: a blocking check failed, or an input is not what its producer recorded, or changed meanwhile.
        Busy: another process runs the stage. Under DVC, which has cleared the way, it is waited for instead.
    """
    stage, variant = pipeline.split_address(address)
    locks.die_with_parent()

    def busy(holder: str) -> None:
        if "DVC_STAGE" not in os.environ:
            raise Busy(f"{address} is being run by {holder}", "wait for it to end, or stop it")
        log.info(f"{address}: waiting for {holder}")

    with locks.hold(root, address, busy):
        scratch = root / ".dvc" / "tmp" / "pedigree" / "scratch" / address
        try:
            before = _guarded(root, address)  # before anything is read that it watches
            values = pipeline.validate(root)
            names = tuple(pipeline.stages)
            ctx = StageContext(
                root, stage, variant, scratch, values, pipeline.variants_of,
                earlier=names[: names.index(stage)], recorded=lambda: dvc.recorded_files(root, address),
            )  # fmt: skip
            remove(scratch)
            ctx.out.mkdir(parents=True)
            report = run_with_pages(ctx, pipeline)
            _hold_gate(root, ctx, report)
            sha256 = integrity.sha256_of(ctx.out)
            changed = [path for path, value in dvc.fingerprint(root, address).now.items() if before[path] != value]
            if changed:
                raise CheckFailed(f"{address}: {', '.join(changed)} changed while the stage ran", "run it again; nothing was recorded")
            _publish(root, ctx, report, sha256)
        except BaseException:
            dvc.restore_outputs(root, address)
            raise
        finally:
            remove(scratch)
    for line in _summary(address, report):
        log.info(line)
    return report


def run_with_pages(ctx: StageContext, pipeline: Pipeline) -> Report:
    """Run the stage with what planning decided for it, and draw its pages, also if a blocking check failed."""
    forecast = pipeline.forecast(ctx)
    report = pipeline.stages[ctx.stage](ctx if forecast is None else replace(ctx, hints=forecast.hints))
    documents = Documents(ctx.root, ctx.address, ctx.out, ctx.pages, report.document())
    if forecast is not None:
        report.measured |= forecast.compared(report.measured)
        if report.measured:
            write_json(ctx.pages / "run.json", {**forecast.document(), "measured": report.measured})
            log.info(f"{ctx.address}: {forecast.text(report.measured)}")
    pipeline.draw(documents)
    return report


def _guarded(root: Path, address: str) -> Mapping[str, str]:
    """Hashes of everything the stage reads, once each input has been found to be what its producer made and recorded."""
    street = dvc.read_street(root)
    if address not in street:
        raise InputError(f"{address} is not a stage of dvc.yaml", f"stages: {', '.join(street)}")
    tampered = integrity.set_tampered_aside(
        root, [street[i.producer] for i in street[address].inputs if i.producer], "DVC_STAGE" in os.environ
    )
    if tampered:
        raise CheckFailed("\n".join(tampered), f"run `dvc repro {address}` again")
    before = dvc.fingerprint(root, address)
    if before.disputed:
        raise CheckFailed("\n".join(f"{address}: {what}" for what, _ in before.disputed), before.disputed[0][1])
    return before.now


def _hold_gate(root: Path, ctx: StageContext, report: Report) -> None:
    """The report and the pages are written always; on a failed blocking check nothing else is."""
    if ctx.pages.exists():
        _put(root, ctx, ctx.pages)
    if not report.failures:
        return
    path = root / report_of(ctx.address)
    write_json(path, {"passed": False, **report.document()})
    worst = "; ".join(
        f"{c.name}: {c.note or f'{c.count} rows'}{' (first: ' + ', '.join(c.rows[:5]) + ')' if c.rows else ''}" for c in report.failures
    )
    raise CheckFailed(
        f"{ctx.address}: {len(report.failures)} blocking check(s) failed. {worst}",
        f"mend the rows, or change params.yaml; all findings are in {path.relative_to(root)}",
    )


def _publish(root: Path, ctx: StageContext, report: Report, sha256: str) -> None:
    """Outputs from the scratch folder to their places, each by one rename; the report with the sha256 of the main one."""
    plots = list((ctx.scratch / "data" / "plots").rglob("*.csv")) if (ctx.scratch / "data" / "plots").exists() else []
    for made in [ctx.out, *plots]:
        _put(root, ctx, made)
    write_json(root / report_of(ctx.address), {"passed": True, "output_sha256": sha256, **report.document()})
    if report.measured:
        write_json(measured_path(root, ctx.address), {"output_sha256": sha256, **report.measured})


def _put(root: Path, ctx: StageContext, made: Path) -> None:
    target = root / made.relative_to(ctx.scratch)
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    made.replace(target)


def _summary(address: str, report: Report) -> list[str]:
    lines = []
    if report.rows_in is not None:
        dropped = ", ".join(f"{name} {n}" for name, n in report.dropped.items())
        lines.append(f"{address}: {report.rows_in} rows in, {report.rows_out} out" + (f", dropped: {dropped}" if dropped else ""))
    lines += [f"{address}: {c.severity}: {c.name}: {c.note or f'{c.count} rows'}" for c in report.checks if not c.passed]
    return lines


@contextmanager
def streaming_to_dagster() -> Iterator[None]:
    """While open, log lines also go to the Dagster run that started this process, if one did."""
    if "DAGSTER_PIPES_CONTEXT" not in os.environ:
        yield
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:

        class ToDagster(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                pipes.log.log(record.levelno, record.getMessage())

        handler = ToDagster()
        log.addHandler(handler)
        try:
            yield
        except PedigreeError as error:
            log.error(str(error))
            raise
        finally:
            log.removeHandler(handler)
