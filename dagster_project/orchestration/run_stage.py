"""`pedigree run STAGE`, the driver: the only way to run a stage.

Verifies inputs, runs the stage by an executor, applies the gate, publishes outputs.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster_project.core import faults, params
from dagster_project.core.context import StageContext
from dagster_project.core.documents import read_report
from dagster_project.core.errors import INNER, Busy, CheckFailed, InputError, PedigreeError
from dagster_project.core.git import git
from dagster_project.core.imports import lean_imports
from dagster_project.core.layout import RECORD_KEY, measured_path, report_of
from dagster_project.core.records import remove, write_json
from dagster_project.core.text import many, number, visible
from dagster_project.core.workers import THIS_PROCESS, LocalProcesses, Workers
from dagster_project.curation.sources.erased import TOMBSTONES
from dagster_project.execution import VARIABLE, WORKER, placement
from dagster_project.lineage import code_lock
from dagster_project.lineage.code import value_at
from dagster_project.lineage.history import is_within, refuse_lost_entries
from dagster_project.orchestration import durations, dvc, dvc_cache, integrity, locks, processes
from dagster_project.orchestration.dvc_errors import MissingParameter
from dagster_project.orchestration.dvc_run import FAILURE
from dagster_project.orchestration.executors import Executor, StageJob, StageResult
from dagster_project.orchestration.executors.local import LocalExecutor
from dagster_project.orchestration.leftovers import remove_leftovers
from dagster_project.pipeline import PEDIGREE, Pipeline

log = logging.getLogger("pedigree")


def run_stage(
    root: Path, address: str, pipeline: Pipeline = PEDIGREE, executor: Executor | None = None
) -> Mapping[str, Any]:
    """Run one stage on the files in the workspace, and return its report.

    The stage writes into a scratch folder. Its outputs are published after every blocking check passed and its inputs
    were verified as unchanged. Otherwise the earlier outputs are kept; those that DVC removed are restored.

    Args:
        executor: where the stage computes; None: according to the section `execution` of params.yaml.
    Raises:
        InputError: bad parameters or input, or the stage's code is not the one recorded in code.lock.yaml.
        CheckFailed: a blocking check failed, an input is not what its producer recorded, or an input changed meanwhile.
        Busy: another process runs the stage. If DVC started this one, it waits: DVC has already removed the outputs.
    """
    _refuse_own(root, address, pipeline)
    stage, variant = pipeline.split_address(address)
    processes.end_with_starter()

    def wait_or_refuse(holder: str) -> None:
        if "DVC_STAGE" not in os.environ:
            raise Busy(f"{address} is being run by {holder}", "wait for it to end, or stop it")
        log.info(f"{address}: waiting for {holder}")

    with locks.hold(root, address, wait_or_refuse):
        began = time.monotonic()
        scratch = root / ".dvc" / "tmp" / "pedigree" / "scratch" / address
        remove_leftovers(root)
        try:
            code_lock.refuse_other_code(root, [stage])
            before, values = _verified(root, address, pipeline)
            if (key := pipeline.rests_on_all.get(stage)) and _is_given(root, values, key) and not _is_inner():
                _refuse_outdated(root, address)
            executor = executor or _executor(root, values, address, pipeline, before)
            names = tuple(pipeline.stages)
            ctx = StageContext(
                root, stage, variant, scratch, values, pipeline.variants_of,
                earlier=names[: names.index(stage)], recorded=lambda: dvc_cache.recorded_files(root, address),
            )  # fmt: skip
            remove(scratch)
            ctx.out.mkdir(parents=True)
            result = executor.run(StageJob(pipeline, ctx, before))
            report = _pass_gate(root, ctx, result)
            sha256 = integrity.sha256_of(ctx.out)
            _refuse_changed_inputs(root, address, before)
            code_lock.refuse_other_code(root, [stage])  # an upgrade while it ran
            _publish(root, ctx, report, sha256, result)
        except BaseException as error:
            known = faults.explained(error, scratch)
            remove(scratch)  # now, because outputs that are restored may need its space
            _restore(root, address, error)
            if known is not None and known is not error:
                raise known from error
            raise
        finally:
            remove(scratch)
    if os.environ.get(VARIABLE) != WORKER:  # the driver of a worker does both
        durations.record(root, address, time.monotonic() - began)
        for line in _summary(address, report):
            log.info(line)
    return report


def _refuse_own(root: Path, address: str, pipeline: Pipeline) -> None:
    """Raises:
    InputError: dvc.yaml has the stage and the pipeline does not: it is the user's own.
    """
    is_known = address.partition("@")[0] in pipeline.stages
    if not is_known and "DVC_STAGE" not in os.environ and address in dvc.read_stages(root):
        raise InputError(
            f"{address} is a stage of dvc.yaml that is not part of Pedigree: only its own command can run it",
            f"`dvc repro {address}` or `pedigree run --all` runs it",
        )


def _verified(root: Path, address: str, pipeline: Pipeline) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """Hashes of everything the stage reads, verified, and the validated parameters."""
    with lean_imports():
        # the driver of a worker has validated them, and the worker has only the sources that this stage reads
        read_params = params.read if os.environ.get(VARIABLE) == WORKER else pipeline.validate
        try:
            before = _verified_inputs(root, address)  # before any of these files is read
        except MissingParameter:
            read_params(root)  # says more about what is missing
            raise
        return before, read_params(root)


def _refuse_changed_inputs(root: Path, address: str, before: Mapping[str, str]) -> None:
    try:
        now = dvc.inputs_now(root, address)
        changed = [
            path if path in before else f"dvc.yaml (new: {path})" for path in now if now[path] != before.get(path)
        ]
    except InputError as error:  # e.g. its variant was renamed
        raise CheckFailed(
            f"{address}: dvc.yaml or params.yaml changed while the stage ran: {error.what}",
            "undo that change and run the stage again: a training goes on from its latest checkpoint;"
            " nothing was recorded",
        ) from None
    if changed:
        raise CheckFailed(
            f"{address}: {', '.join(changed)} changed while the stage ran", "run it again; nothing was recorded"
        )


def _restore(root: Path, address: str, reason: BaseException) -> None:
    """Restore the outputs that DVC removed.

    If even this fails, the error that ended the stage is still the one to report.
    """
    try:
        dvc_cache.restore_outputs(root, address)
    except Exception as error:
        if (known := faults.explained(error, root)) is None:
            raise
        if isinstance(reason, InputError) and "DVC_STAGE" not in os.environ:  # nothing was removed yet
            return
        log.warning(f"{address}: earlier outputs were not restored: {known.what}; `dvc checkout` restores them")


def _executor(
    root: Path, values: Mapping[str, Any], address: str, pipeline: Pipeline, inputs: Iterable[str]
) -> Executor:
    settings, place = placement(values, address, pipeline.stages, pipeline.variants_of)
    if place.on == "local" or INNER in os.environ:  # the scratch copy of `verify` has neither git nor past runs
        return LocalExecutor(_workers(place.workers))
    if _reads_private_key(root, inputs):
        log.info(
            f"{address}: runs on this machine, because it reads {RECORD_KEY},"
            " which git ignores and a job therefore does not get"
        )
        return LocalExecutor(_workers(place.workers))
    from dagster_project.orchestration.executors.ray import RayExecutor

    return RayExecutor(settings, place)


def _reads_private_key(root: Path, inputs: Iterable[str]) -> bool:
    """Whether a stage reads the key of record ids, and git ignores its file.

    Stages that read sources need it to recognize erased records.
    """
    needed = [RECORD_KEY, *([TOMBSTONES] if (root / TOMBSTONES).exists() else [])]
    if not any(is_within(file, path) for path in inputs for file in needed):
        return False
    return git(root, "check-ignore", "--quiet", RECORD_KEY) is not None


def _workers(count: int) -> Workers:
    if count == 1:
        return THIS_PROCESS
    if os.environ.get(VARIABLE) != WORKER:
        return LocalProcesses(count)
    from dagster_project.orchestration.executors.ray_tasks import RayTasks

    return RayTasks(count)


def _verified_inputs(root: Path, address: str) -> Mapping[str, str]:
    """Hashes of everything the stage reads, after each input was compared with the record of its producer.

    Raises:
        InputError: no such stage.
        CheckFailed: an input differs.
    """

    def refuse(producers: Sequence[dvc.StageState]) -> None:
        if tampered := integrity.set_tampered_aside(root, producers, "DVC_STAGE" in os.environ):
            raise CheckFailed("\n".join(tampered), f"run `dvc repro {address}` again")

    before = dvc.verified_fingerprint(root, address, refuse)
    if before.conflicts:
        refuse_lost_entries(root)
        raise CheckFailed("\n".join(f"{address}: {what}" for what, _ in before.conflicts), before.conflicts[0][1])
    if before.leftovers:
        log.warning(
            f"{address} reads a folder with outputs of stages that dvc.yaml no longer has; another clone does not have"
            f" them, and there DVC would call {address} changed. To remove them: rm -r {shlex.join(before.leftovers)}"
        )
    return before.now


def _is_given(root: Path, values: Mapping[str, Any], key: str) -> bool:
    """Whether params.yaml has a value at "SECTION.NAME", or had one when that stage ran, by its report."""
    stage, _, name = key.partition(".")
    if value_at(values, key) is not None:
        return True
    return (root / report_of(stage)).is_file() and name in read_report(root, stage)


def _is_inner() -> bool:
    """Whether this process has no other stages to compare with.

    It is a worker, whose driver has compared them, or in the scratch copy of `verify`, which lacks them.
    """
    return os.environ.get(VARIABLE) == WORKER or INNER in os.environ


def _refuse_outdated(root: Path, address: str) -> None:
    """Refuse to run after a stage upstream that is not up to date.

    Raises:
        CheckFailed: what the stage reads may have been made from other data than reports state.
    """
    states = dvc.read_stages(root)
    outdated = [
        f"{name}: {'; '.join(states[name].changed)}"
        for name in dvc.ancestors(states, address)
        if not states[name].as_recorded  # one that DVC runs each time is never without a change
    ]
    if outdated:
        what = f"{address} judges the use policy by the reports of all stages before it, and these are not up to date:"
        raise CheckFailed("\n".join([what, *outdated]), f"run `dvc repro {address}`, without --single-item")


def _pass_gate(root: Path, ctx: StageContext, result: StageResult) -> Mapping[str, Any]:
    """The report of a successful run. Pages, and the report of a failed run, are written in any case.

    Raises:
        CheckFailed: a blocking check failed, or the stage ended without a report.
        InputError: the stage ended without a report, with exit code 2.
    """
    if ctx.pages.exists():
        _move_to_place(root, ctx, ctx.pages)
    report = result.report or {}
    failed = {
        name: check for name, check in report.get("checks", {}).items() if check["blocking"] and not check["passed"]
    }
    if not failed and result.report is not None and result.exit_code == 0:
        return report
    if not failed:
        raise (InputError if result.exit_code == 2 else CheckFailed)(
            f"{ctx.address} ended with exit code {result.exit_code} and without a report of a failed check",
            "see its own message above; nothing was recorded",
        )
    path = root / report_of(ctx.address)
    write_json(path, {"passed": False, **report})
    details = "; ".join(
        f"{name}: {_count_note(check)}" + (f" (first: {', '.join(check['rows'][:5])})" if "rows" in check else "")
        for name, check in failed.items()
    )
    raise CheckFailed(
        f"{ctx.address}: {len(failed)} blocking check(s) failed. {details}",
        f"fix the rows, or change params.yaml; all findings are in {path.relative_to(root)}",
    )


def _publish(root: Path, ctx: StageContext, report: Mapping[str, Any], sha256: str, result: StageResult) -> None:
    """Move outputs from the scratch folder to the project, each by one rename.

    Write the report with the sha256 of the main output.
    """
    _share_as_their_folders(ctx.out)
    for path in [ctx.out, *(ctx.scratch / "data" / "plots").rglob("*.csv")]:
        _move_to_place(root, ctx, path)
    write_json(root / report_of(ctx.address), {"passed": True, "output_sha256": sha256, **report})
    facts = {**result.measured, **({"execution": result.execution} if result.execution else {})}
    path = measured_path(root, ctx.address)
    # with pages: `render` reads of which output they are
    if facts or any(file != path for file in path.parent.glob("*")):
        write_json(path, {"output_sha256": sha256, **facts})
    else:
        remove(path)  # of an earlier run, perhaps on another machine


def _share_as_their_folders(output: Path) -> None:
    """Let those read files who may read their folder.

    Safetensors writes its files for their owner only, whatever the umask is.
    """
    for file in output.rglob("*"):
        if not file.is_symlink() and file.is_file() and not (mode := file.stat().st_mode) & 0o077:
            file.chmod(mode & 0o777 | file.parent.stat().st_mode & 0o066)


def _move_to_place(root: Path, ctx: StageContext, path: Path) -> None:
    """By a rename, or by a copy where a folder of `data` is a link to another file system."""
    target = root / path.relative_to(ctx.scratch)
    remove(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)


def _summary(address: str, report: Mapping[str, Any]) -> list[str]:
    lines = []
    if "rows_in" in report:
        dropped = ", ".join(f"{name} {n}" for name, n in report["dropped"].items())
        lines.append(
            f"{address}: {many(report['rows_in'], 'row')} in, {number(report['rows_out'])} out"
            + (f", dropped: {dropped}" if dropped else "")
        )
    checks = report.get("checks", {}).items()
    return lines + [
        f"{address}: {check['severity']}: {name}: {_count_note(check)}" for name, check in checks if not check["passed"]
    ]


def _count_note(check: Mapping[str, Any]) -> str:
    return check.get("note") or many(check["count"], "row")


@contextmanager
def streaming_to_dagster() -> Iterator[None]:
    """Send log lines, and the message of an error, also to the Dagster run that started this process, if one did."""
    if "DAGSTER_PIPES_CONTEXT" not in os.environ:
        yield
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:

        class DagsterHandler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                pipes.log.log(record.levelno, visible(record.getMessage()))

        handler = DagsterHandler()
        log.addHandler(handler)
        try:
            yield
        except PedigreeError as error:
            log.error(str(error))
            pipes.report_custom_message({FAILURE: [visible(error.what), visible(error.hint)]})
            raise
        finally:
            log.removeHandler(handler)
