"""`pedigree sweep`: every combination of some parameter values as a DVC
experiment, several at once, and a table of parameters and metrics."""

from __future__ import annotations

import logging
import secrets
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.core.layout import RECORD_KEY, is_report, report_of
from dagster_project.core.progress import clock
from dagster_project.core.text import listed
from dagster_project.lineage.code import value_at
from dagster_project.lineage.history import is_within, workspace_lock
from dagster_project.optional_stages import has_key
from dagster_project.orchestration import dvc, experiments, processes
from dagster_project.orchestration.experiments import FAILED, QUEUED, RUNNING, SUCCESS

log = logging.getLogger("pedigree")

POLL = 2.0
"""Polling interval of DVC's queue, in seconds."""
LOST = 60.0
"""Seconds after which a trial without a process counts as failed, and workers without one as ended. Until then, DVC's
worker may still collect the result of a trial, or be starting."""
HIDDEN = ("output_sha256", "passed", "environment", "machine")
"""Entries of a report that are not results."""
MAX_COLUMNS = 6


def sweep(
    root: Path,
    section: str,
    overrides: Sequence[str],
    jobs: int,
    to: str | None,
    variants_of: Mapping[str, str],
    validate: Callable[[Path, dict[str, Any]], Any],
) -> dict[str, Any]:
    """Run one trial for each combination of values, `jobs` at a time.

    Args:
        section: "adapter.lora"; keys in `overrides` are relative to it.
        to: the stage at which a trial ends; default: the stage of the section.
        variants_of: stage -> section whose keys name its variants.
        validate: refuses bad values of params.yaml.
    Raises:
        InputError: a bad parameter, DVC's queue is not empty, or DVC cannot run trials here. Nothing was queued.
    """
    if not overrides:
        raise InputError("no parameter to vary", "add -S KEY=VALUE,VALUE, e.g. -S learning_rate=1e-3,2e-3")
    values = params.read(root)
    entry = _section(values, section, {*variants_of.values()})
    choices = dict(map(experiments.choices, overrides))
    if len(choices) < len(overrides):
        raise InputError("a parameter is given twice", "give all values of it in one -S KEY=VALUE,VALUE")
    if twice := next((key for key, found in choices.items() if len(set(map(repr, found))) < len(found)), None):
        raise InputError(f"-S {twice}: a value is given twice", "leave one out: its trial would be the same")
    points = [dict(zip(choices, point, strict=True)) for point in product(*choices.values())]
    for point in points:
        validate(root, _with(values, section, point))
    experiments.refuse_cache_path(root)
    states = dvc.read_stages(root)
    target = _target(states, section, to, variants_of)
    baseline = git(root, "rev-parse", "--verify", "HEAD")
    if not baseline:
        raise InputError(
            "the project has no commit: DVC's experiments start from one", "run `git add -A && git commit`"
        )
    _refuse_untracked(root, [states[name] for name in (*dvc.ancestors(states, target), target)])
    if unfinished := [name for name, trial in experiments.trials(root).items() if trial.status in {QUEUED, RUNNING}]:
        raise InputError(
            f"DVC's queue of experiments is not empty: {', '.join(unfinished)}",
            "wait for them, or remove them with `dvc queue kill NAME` and `dvc queue remove --queued`",
        )
    name = f"sweep-{secrets.token_hex(3)}"
    # a key that params.yaml does not have is added
    arguments = [
        f"{'' if has_key(entry, override.partition('=')[0]) else '+'}{section}.{override}" for override in overrides
    ]
    trials = Trials(
        root,
        {name: points[0]} if len(points) == 1 else {f"{name}-{i + 1}": point for i, point in enumerate(points)},
        jobs,
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the trials as Ctrl-C does
    try:
        experiments.queue(root, name, arguments, target)
        outcome = trials.run()
    except BaseException:  # also an interrupt while DVC fills its queue
        experiments.cancel(root, trials.points, processes.CLEAN_UP)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return {
        "section": section,
        "target": target,
        "jobs": jobs,
        **outcome,
        "trials": trials.table(section, report_of(target), baseline.strip()),
    }


def _section(values: Mapping[str, Any], section: str, with_variants: Collection[str]) -> Mapping[str, Any]:
    """The value of a section of params.yaml.

    Args:
        with_variants: sections whose keys name variants.
    """
    found: Any = values
    for part in section.split("."):
        if not isinstance(found, Mapping) or part not in found:
            names = [
                f"{name}.{key}"
                for name, one in values.items()
                if name in with_variants and isinstance(one, Mapping)
                for key in one
            ]
            others = [name for name in values if name not in with_variants]
            raise InputError(
                f"params.yaml has no {section}", f"variants: {', '.join(names)}; other sections: {', '.join(others)}"
            )
        found = found[part]
    if not isinstance(found, Mapping):
        raise InputError(
            f"params.yaml: {section} is one value", f"sweep its section: {section.rpartition('.')[0] or section}"
        )
    return found


def _with(values: Mapping[str, Any], section: str, point: Mapping[str, Any]) -> dict[str, Any]:
    """params.yaml with the values of one trial."""
    changed: dict[str, Any] = deepcopy(dict(values))
    for key, value in point.items():
        at: Any = changed
        *path, last = f"{section}.{key}".split(".")
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise InputError(f"-S {key}: {part} is one value in params.yaml", "name a key of a mapping")
        at[last] = value
    return changed


def _target(states: Collection[str], section: str, to: str | None, variants_of: Mapping[str, str]) -> str:
    """Address of the stage at which a trial ends."""
    first, _, variant = section.partition(".")
    stage = next((stage for stage, of in variants_of.items() if of == first), first)
    target = to or (f"{stage}@{variant}" if stage in variants_of else stage)
    if target not in states:
        raise InputError(f"{target} is not a stage of dvc.yaml", f"give one with --to: {', '.join(states)}")
    return target


def _refuse_untracked(root: Path, states: Iterable[dvc.StageState]) -> None:
    """Raises:
    InputError: these stages read files that DVC's copies of the workspace do not have, because git does not track them.
    """
    read = {
        path
        for state in states
        for path in (*state.code, *(i.path for i in state.inputs if i.producer is None))
        if not is_report(path) and "://" not in path
    }
    untracked = _others(root, [name for path in sorted(read) for name in (path, f"{path}.dvc")])
    _refuse_missing(untracked, "git does not track", "run `git add` for them; a commit is not needed")
    if not (ignored := _others(root, sorted(read), "--ignored")):
        return
    outs = [out["path"] for entry in workspace_lock(root).values() for out in entry.get("outs", [])]
    carried = [RECORD_KEY, *dvc.tracked_sources(root), *outs]  # outs: of variants that dvc.yaml no longer has
    ignored = [name for name in ignored if not any(is_within(name, path) for path in carried)]
    if ignored:
        seen = {*dvc.files_within(root, read)}
        _refuse_missing(
            [name for name in ignored if name in seen],
            "git ignores",
            "`dvc add` them, or run `git add --force`; a commit is not needed",
        )


def _others(root: Path, paths: Sequence[str], *options: str) -> list[str]:
    """Files at these paths that git does not track."""
    listed = git(
        root, "--literal-pathspecs", "ls-files", "--others", *options, "--exclude-standard", "-z", "--", *paths
    )
    return [name for name in (listed or "").split("\0") if name and "/__pycache__/" not in name]


def _refuse_missing(names: Sequence[str], reason: str, hint: str) -> None:
    if names:
        raise InputError(f"{reason} {listed(names, 5)}: trials would run without what they read there", hint)


class Trials:
    """The trials of one sweep in DVC's queue."""

    def __init__(self, root: Path, points: Mapping[str, Mapping[str, Any]], jobs: int) -> None:
        self.root, self.points, self.jobs = root, points, jobs
        self.status = dict.fromkeys(points, QUEUED)
        self.revs: dict[str, str] = {}
        self.lost_since: dict[str, float] = {}
        """Time at which the process of a running trial was first missing."""
        self.worker_seen = time.monotonic()
        """Time at which a worker was last seen, or started: two of one name would run a trial each."""

    def run(self) -> dict[str, Any]:
        """Run all trials. An interrupt removes the queued ones and ends the running ones."""
        began, interrupted = time.monotonic(), False
        try:
            experiments.start_workers(self.root, self.jobs)
            while not all(status in {SUCCESS, FAILED} for status in self.status.values()):
                time.sleep(POLL)
                self._update(began)
        except KeyboardInterrupt:
            interrupted = True
            log.info("interrupted: removing queued trials, ending running ones; finished ones are kept")
            experiments.cancel(self.root, self.points, processes.CLEAN_UP)
            finished = {name for name, trial in experiments.trials(self.root).items() if trial.status == SUCCESS}
            self.status = {
                name: SUCCESS if name in finished else one if one == FAILED else "Canceled"
                for name, one in self.status.items()
            }
        passed = all(status == SUCCESS for status in self.status.values())
        return {"passed": passed, "interrupted": interrupted, "seconds": round(time.monotonic() - began, 1)}

    def _update(self, began: float) -> None:
        """Read the state of each trial, and log changes."""
        found = experiments.trials(self.root)
        for name in self.points:
            trial = found.get(name)
            status = self.status[name] if trial is None else trial.status
            if trial is not None:
                self.revs[name] = trial.rev
            # without an entry: a worker is taking it from the queue, or the user removed it
            if (trial is None or (status == RUNNING and not trial.alive)) and status not in {SUCCESS, FAILED}:
                if time.monotonic() - self.lost_since.setdefault(name, time.monotonic()) > LOST:
                    status = FAILED
            else:
                self.lost_since.pop(name, None)
            if status != self.status[name] and self.status[name] not in {SUCCESS, FAILED}:
                self.status[name] = status
                log.info(f"{name} ({_point(self.points[name])}): {status.lower()}. {self._progress(began)}")
                if status == FAILED:
                    self._log_failure(name)
        states = self.status.values()
        if QUEUED not in states or RUNNING in states or experiments.workers_alive(self.root):
            self.worker_seen = time.monotonic()
        elif time.monotonic() - self.worker_seen > LOST:
            # the workers were killed, or ended before the first trial was queued
            experiments.start_workers(self.root, self.jobs)
            self.worker_seen = time.monotonic()

    def _progress(self, began: float) -> str:
        count = {status: list(self.status.values()).count(status) for status in (SUCCESS, FAILED, RUNNING, QUEUED)}
        ended = count[SUCCESS] + count[FAILED]
        text = f"{ended} of {len(self.status)} done, {count[RUNNING]} running"
        if ended and ended < len(self.status):
            text += f", about {clock((time.monotonic() - began) / ended * (len(self.status) - ended))} left"
        return text

    def _log_failure(self, name: str) -> None:
        path = experiments.log_of(self.root, self.revs.get(name, name))
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
        log.error("\n".join([*(f"{name} | {line}" for line in lines[-8:]), f"{name}: its log: dvc queue logs {name}"]))

    def table(self, section: str, report: str, baseline: str) -> list[dict[str, Any]]:
        """Parameters and metrics of each trial, from `dvc exp show`.

        Args:
            baseline: the commit from which the trials were queued. The user may have made others meanwhile.
        """
        shown = experiments.shown(self.root, self.points, baseline)
        rows = []
        for name, point in self.points.items():
            row: dict[str, Any] = {
                "name": name,
                "status": self.status[name].lower(),
                "params": dict(point),
                "metrics": {},
            }
            # of one that still runs, DVC shows the metrics that it started with
            if self.status[name] == SUCCESS and (data := shown.get(name)):
                found = data["params"]["params.yaml"]["data"]
                row["params"] = {key: value_at(found, f"{section}.{key}") for key in point}
                row["metrics"] = dict(_leaves(data["metrics"].get(report, {}).get("data") or {}))
            rows.append(row)
        return rows


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in point.items())


def _leaves(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers of a report, and the notes of its checks, by dotted path."""
    for name, value in report.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            if path not in HIDDEN:
                yield from _leaves(value, f"{path}.")
        elif path not in HIDDEN and (
            (isinstance(value, int | float) and not isinstance(value, bool)) or name == "note"
        ):
            yield path, value


def as_text(document: Mapping[str, Any]) -> str:
    """A table: parameters, and the metrics in which the trials differ.

    Of a single trial, its metrics without those of checks and groups.
    """
    trials = document["trials"]
    names = list(dict.fromkeys(name for trial in trials for name in trial["metrics"]))
    measured = [trial for trial in trials if trial["metrics"]]
    differ = [name for name in names if len({str(trial["metrics"].get(name)) for trial in measured}) > 1]
    differ = [name for name in differ if not name.endswith(".count")] or differ
    keys = [*trials[0]["params"]]
    shown = [f"{name} (report)" if name in keys else name for name in differ[:MAX_COLUMNS]]
    header = ["trial", *keys, *shown, "status"]
    rows = []
    for trial in trials:
        metrics = [trial["metrics"].get(name, "") for name in differ[:MAX_COLUMNS]]
        rows.append([trial["name"], *map(_cell, [*trial["params"].values(), *metrics]), trial["status"]])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    if len(differ) > MAX_COLUMNS:
        lines.append(f"{len(differ) - MAX_COLUMNS} more metrics differ: --json has all")
    if len(measured) == 1:
        lines += [
            f"{measured[0]['name']}: {name} {_cell(value)}"
            for name, value in measured[0]["metrics"].items()
            if "." not in name
        ]
    done = sum(trial["status"] == "success" for trial in trials)
    lines.append(
        f"{done} of {len(trials)} trials up to {document['target']}"
        f" in {document['seconds']:.0f} s, jobs: {document['jobs']}"
    )
    if done:
        lines.append("to use one: dvc exp apply TRIAL; to delete: dvc exp remove TRIAL")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
