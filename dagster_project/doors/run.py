"""`pedigree run STAGE`: the only way a stage ever runs. Guards its inputs, holds its gate, publishes its outputs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dagster_project.doors import dvc, integrity, process
from dagster_project.errors import Busy, CheckFailed, InputError, PedigreeError
from dagster_project.pipeline import PEDIGREE, At, Pipeline
from dagster_project.records import Report, remove, write_json

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
    process.die_with_parent()

    def busy(holder: str) -> None:
        if "DVC_STAGE" not in os.environ:
            raise Busy(f"{address} is being run by {holder}", "wait for it to end, or stop it")
        log.info(f"{address}: waiting for {holder}")

    with process.hold(root, address, busy):
        scratch = root / ".dvc" / "tmp" / "pedigree" / "scratch" / address
        try:
            before = _guarded(root, address)  # before anything is read that it watches
            values = pipeline.validate(root)
            at = At(root, stage, variant, scratch, values, lambda: dvc.recorded_files(root, address))
            remove(scratch)
            at.out.mkdir(parents=True)
            report = pipeline.stages[stage](at)
            _hold_gate(root, at, report)
            sha256 = integrity.sha256_of(at.out)
            changed = [path for path, value in dvc.fingerprint(root, address).now.items() if before[path] != value]
            if changed:
                raise CheckFailed(f"{address}: {', '.join(changed)} changed while the stage ran", "run it again; nothing was recorded")
            _publish(root, at, report, sha256)
        except BaseException:
            dvc.restore_outputs(root, address)
            raise
        finally:
            remove(scratch)
    for line in _summary(address, report):
        log.info(line)
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


def report_path(root: Path, stage: str, variant: str | None) -> Path:
    return root / "data" / "reports" / (f"{stage}/{variant}.json" if variant else f"{stage}.json")


def measured_path(root: Path, stage: str, variant: str | None) -> Path:
    """What the latest run took, with the sha256 of what it made. Not tracked."""
    return root / "data" / "pages" / stage / (variant or "") / "measured.json"


def _hold_gate(root: Path, at: At, report: Report) -> None:
    """The report and the pages are written always; on a failed blocking check nothing else is."""
    if at.pages.exists():
        _put(root, at, at.pages)
    if not report.failures:
        return
    path = report_path(root, at.stage, at.variant)
    write_json(path, {"passed": False, **report.document()})
    worst = "; ".join(
        f"{c.name}: {c.note or f'{c.count} rows'}{' (first: ' + ', '.join(c.rows[:5]) + ')' if c.rows else ''}" for c in report.failures
    )
    raise CheckFailed(
        f"{at.address}: {len(report.failures)} blocking check(s) failed. {worst}",
        f"mend the rows, or change params.yaml; all findings are in {path.relative_to(root)}",
    )


def _publish(root: Path, at: At, report: Report, sha256: str) -> None:
    """Outputs from the scratch folder to their places, each by one rename; the report with the sha256 of the main one."""
    plots = list((at.scratch / "data" / "plots").rglob("*.csv")) if (at.scratch / "data" / "plots").exists() else []
    for made in [at.out, *plots]:
        _put(root, at, made)
    write_json(report_path(root, at.stage, at.variant), {"passed": True, "output_sha256": sha256, **report.document()})
    if report.measured:
        write_json(measured_path(root, at.stage, at.variant), {"output_sha256": sha256, **report.measured})


def _put(root: Path, at: At, made: Path) -> None:
    target = root / made.relative_to(at.scratch)
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
