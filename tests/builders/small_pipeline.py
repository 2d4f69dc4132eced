"""A small pipeline of real stages that take no time, for tests of the two front
ends: a foreach, a gate, a git source and a .dvc source.

    raw (data/sources/g.txt in git, d.txt under DVC) -> inst (a gate: no row may
    say BAD) -> tok -> adapter@X -> cmp (reads the reports of both, too)

As a script in a project's folder it is that project's command line: `python small_pipeline.py run STAGE`, `run-all
JOBS`, `materialize [ADDRESS...]`, `materialize-at-once [ADDRESS...]`.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import psutil

from dagster_project.core import params, workers
from dagster_project.core.context import StageContext
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.layout import report_of
from dagster_project.core.records import CheckResult, Report, write_text
from dagster_project.orchestration import dvc
from dagster_project.pipeline import Pipeline

STAGES = ("raw", "inst", "tok", "adapter", "cmp", "extra")
LOG = "runs.log"


def _code(ctx: StageContext) -> str:
    """The stage's own code, whose only line is a version."""
    return (ctx.root / "code" / f"{ctx.stage}.py").read_text().strip()


def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n")


def _started(ctx: StageContext) -> None:
    """Note that a command runs, and with LOG_INPUTS whether what it reads
    differs from what dvc.lock says it read before."""
    entry: dict[str, Any] = {"stage": ctx.address, "pid": os.getpid()}
    if os.environ.get("LOG_INPUTS"):
        state = dvc.read_stages(ctx.root)[ctx.address]
        entry["inputs_changed"] = (
            any(i.now != i.recorded for i in state.inputs) or state.definition_now != state.definition_recorded
        )
    with (ctx.root / LOG).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    if os.environ.get("SLOW") == ctx.stage:
        time.sleep(float(os.environ.get("SLOW_SECONDS", "30")))
    _wait_at_gate(ctx, 0)


def hold(root: Path, stage: str, gates: int = 1) -> list[Path]:
    """Let a stage wait, when it starts and after each of its steps, until the test has made a file. By a file, because
    a stage on another machine gets no environment; no stage depends on it.

    Returns:
        The files, in the order in which the stage waits for them.
    """
    paths = [root.parent / f"gate-{stage}-{number}" for number in range(gates)]
    for path in paths:
        path.unlink(missing_ok=True)
    (root / "hold.json").write_text(json.dumps({stage: [*map(str, paths)]}))
    return paths


def _wait_at_gate(ctx: StageContext, number: int) -> None:
    held = ctx.root / "hold.json"
    gates = json.loads(held.read_text()).get(ctx.stage, []) if held.is_file() else []
    until = time.monotonic() + 300
    while number < len(gates) and not Path(gates[number]).exists() and time.monotonic() < until:
        time.sleep(0.05)


def raw(ctx: StageContext) -> Report:
    _started(ctx)
    rows = _lines(ctx.root / "data/sources/g.txt") + _lines(ctx.root / "data/sources/d.txt")
    (ctx.out / "rows.txt").write_text("\n".join([*rows, _code(ctx)]))
    return Report(rows_in=len(rows), rows_out=len(rows))


def inst(ctx: StageContext) -> Report:
    _started(ctx)
    rows = _lines(ctx.root / "data/raw/rows.txt")
    bad = [str(i) for i, row in enumerate(rows) if "BAD" in row]
    (ctx.out / "rows.txt").write_text("\n".join([*rows, f"minlen {ctx.values['minlen']}", _code(ctx)]))
    return Report(
        rows_in=len(rows),
        rows_out=len(rows),
        checks=[CheckResult("no_bad_rows", not bad, blocking=True, count=len(bad), rows=bad)],
    )


def tok(ctx: StageContext) -> Report:
    _started(ctx)
    done = [*workers.current().map(_in_capitals, None, _lines(ctx.root / "data/inst/rows.txt"))]
    if others := {process for _, process in done} - {os.getpid()}:
        print(f"tok: {len(done)} parts in {len(others)} other processes", flush=True)
    (ctx.out / "train.txt").write_text("\n".join(line for line, _ in done) + _code(ctx))
    (ctx.out / "test.txt").write_text(f"test {ctx.values['testseed']}")
    return Report()


def _in_capitals(_: None, line: str) -> tuple[str, int]:
    return line.upper(), os.getpid()


def adapter(ctx: StageContext) -> Report:
    _started(ctx)
    for step in range(int(os.environ.get("STEPS", "0"))):  # live loss and speed, as a training writes them
        write_text(ctx.live / "loss.csv", f"step,loss\n{step + 1},{1 / (step + 1)}\n")
        write_text(ctx.live / "tokens_per_second.csv", f"step,tokens_per_second\n{step + 1},{100 + step}\n")
        for name in ("state.json", "complete.json"):  # a checkpoint, which nothing reads
            write_text(ctx.checkpoints / f"step-{step + 1:08d}" / name, "{}")
        time.sleep(0.5)
        _wait_at_gate(ctx, step + 1)
    recipe = ctx.values["variants"][ctx.variant]
    (ctx.out / "weights.txt").write_text((ctx.root / "data/tok/train.txt").read_text() + str(recipe) + _code(ctx))
    # tokens per second differ from run to run
    return Report(metrics={"loss": 1 / recipe["r"]}, measured={"tokens_per_second": time.monotonic()})


def cmp(ctx: StageContext) -> Report:
    _started(ctx)
    found = [
        path.read_text()
        for name in ctx.values["variants"]
        for path in sorted((ctx.root / "data/adapter" / name).glob("*"))
    ]
    found += [
        (ctx.root / "data/reports" / name).read_text()
        for name in ("tok.json", *(f"adapter/{name}.json" for name in ctx.values["variants"]))
    ]
    (ctx.out / "board.txt").write_text("\n".join([*found, (ctx.root / "data/tok/test.txt").read_text(), _code(ctx)]))
    return Report()


def extra(ctx: StageContext) -> Report:
    _started(ctx)
    (ctx.out / "copy.txt").write_text((ctx.root / "data/tok/test.txt").read_text() + _code(ctx))
    return Report()


def _values(root: Path) -> dict[str, Any]:
    return params.read(root)


PIPELINE = Pipeline(
    {"raw": raw, "inst": inst, "tok": tok, "adapter": adapter, "cmp": cmp, "extra": extra},
    {"adapter": "variants"},
    lambda stage: {"no_bad_rows": "No row says BAD."} if stage == "inst" else {},
    _values,
)


def stage_text(name: str, deps: list[str], params: list[str], note: str = "") -> dict[str, Any]:
    """A stage of dvc.yaml. `note` is a comment in the command and does not change the result."""
    each = "/${key}" if name == "adapter" else ""
    body = {
        "cmd": f"python small_pipeline.py run {name}{'@${key}' if each else ''}{note}",
        "deps": [f"code/{name}.py", *deps],
        "outs": [f"data/{name}{each}"],
        "metrics": [{f"data/reports/{name}{each}.json": {"cache": False}}],
    } | ({"params": params} if params else {})
    return {name: {"foreach": "${variants}", "do": body} if each else body}


def dvc_yaml(note: str = "", with_extra: bool = False, raw_reads_d: bool = True) -> str:
    sources = ["data/sources/g.txt", *(["data/sources/d.txt"] if raw_reads_d else [])]
    stages = (
        stage_text("raw", sources, [])
        | stage_text("inst", ["data/raw"], ["minlen"], note)
        | stage_text("tok", ["data/inst"], ["testseed"])
        | stage_text("adapter", ["data/tok"], ["variants.${key}"])
        | stage_text("cmp", ["data/adapter", "data/tok", "data/reports/adapter", "data/reports/tok.json"], ["variants"])
        | (stage_text("extra", ["data/tok"], []) if with_extra else {})
    )
    return json.dumps({"plots": [{"data/live": {"x": "step"}}], "stages": stages}, indent=1)


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def commit(root: Path, message: str = "made") -> str:
    """Commit everything. Returns the commit."""
    git(root, "add", "-A")
    git(root, "commit", "-qm", message)
    return git(root, "rev-parse", "HEAD").strip()


def commit_project(root: Path, *under_dvc: str) -> Path:
    """Put a project under git and DVC, with these files and folders under DVC; everything is committed."""
    from dvc.repo import Repo

    git(root, "init", "-q")
    with chdir(root), Repo.init() as repo:
        with repo.config.edit() as config:
            config["core"]["analytics"] = False
        repo.add([*under_dvc])
    commit(root, "start")
    return root


def make_project(root: Path, values: Mapping[str, Any] | None = None) -> Path:
    """A project of this pipeline in which nothing has run; everything is committed."""
    for folder in ("code", "data/sources", "data/reports/adapter"):
        (root / folder).mkdir(parents=True)
    for name in STAGES:
        (root / "code" / f"{name}.py").write_text("V = 0\n")
    (root / "small_pipeline.py").write_text(Path(__file__).read_text())
    (root / "dvc.yaml").write_text(dvc_yaml())
    (root / "params.yaml").write_text(
        json.dumps(values or {"minlen": 1, "testseed": 7, "variants": {"lora": {"r": 8}, "dora": {"r": 16}}})
    )
    (root / "data/sources/g.txt").write_text("r0")
    (root / "data/sources/d.txt").write_text("d0")
    (root / ".gitignore").write_text(
        f"/.dagster\n/{LOG}\n__pycache__\n/data/live\n/data/pages\n" + "".join(f"/data/{name}\n" for name in STAGES)
    )
    return commit_project(root, "data/sources/d.txt")


def published(root: Path, address: str) -> dict[str, bytes]:
    """Files of a stage's output, and its report."""
    paths = [*(root / "data" / address.replace("@", "/")).rglob("*"), root / report_of(address)]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def commands_run(root: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (root / LOG).read_text().splitlines()]


def start_until_tok_runs(root: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Edit `tok`, start a front end in which `tok` is slow, and return when its command runs."""
    (root / "code/tok.py").write_text("V = 9\n")
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "SLOW": "tok", **environment},
        text=True,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while "tok" not in commands_run(root)[5:]:
        time.sleep(0.1)
        assert process.poll() is None
    return process


def start_until_both_adapters_run(
    root: Path, *command: str, **environment: str
) -> tuple[subprocess.Popen[str], dict[str, int]]:
    """Edit `adapter`, start a front end in which it is slow, and return when
    the commands of both variants run, with their process ids."""
    ran = len(commands_run(root)) if (root / LOG).exists() else 0
    (root / "code/adapter.py").write_text(f"V = {ran + 9}\n")
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "SLOW": "adapter", **environment},
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=(root / "errors.txt").open("w"),
    )
    while True:
        entries = [json.loads(line) for line in (root / LOG).read_text().splitlines()[ran:]]
        pids = {entry["stage"]: entry["pid"] for entry in entries if entry["stage"].startswith("adapter")}
        if len(pids) == 2:
            return process, pids
        time.sleep(0.1)
        assert process.poll() is None, (root / "errors.txt").read_text()


def gone(pids: set[int], seconds: float) -> bool:
    """Whether all of these processes end within this time."""
    until = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def run_in(root: Path, *command: str, **environment: str) -> int:
    """Exit code of a Python command in the project's folder."""
    return subprocess.run(
        [sys.executable, *command], cwd=root, env={**os.environ, **environment}, check=False, capture_output=True
    ).returncode


def materialize(root: Path, instance: Any, addresses: list[str] | None = None, definitions: Any = None) -> Any:
    """Materialize these assets, or all, in this process."""
    from dagster_project.orchestration.dagster.assets import build_definitions
    from dagster_project.orchestration.dagster_dvc.keys import asset_key

    found = definitions or build_definitions(root, PIPELINE)
    job = found.resolve_implicit_global_asset_job_def()
    keys = (
        [asset_key(a) for a in addresses] if addresses else list(found.resolve_asset_graph().materializable_asset_keys)
    )
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    return job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False, run_config=quiet)


def all_assets() -> Any:
    """The job of all assets of the project in the current folder."""
    from dagster_project.orchestration.dagster.assets import build_definitions

    return build_definitions(Path.cwd(), PIPELINE).resolve_job_def("pipeline")


def materialize_at_once(instance: Any, addresses: list[str]) -> Any:
    """Materialize these assets, or all, by the project's executor: each stage in a process, those that can at once. The
    environment variable RUN adds arguments, e.g. `{"tags": {"pedigree/on": "local"}}`."""
    import dagster as dg
    from dagster._core.definitions.reconstruct import ReconstructableJob

    from dagster_project.orchestration.dagster_dvc.keys import asset_key

    job = ReconstructableJob.for_file("small_pipeline.py", "all_assets")
    keys = [asset_key(a) for a in addresses] or None
    return dg.execute_job(
        job, instance, asset_selection=keys, raise_on_error=False, **json.loads(os.environ.get("RUN", "{}"))
    )


def shown_failures(instance: Any) -> list[str]:
    """What Dagster shows of each step that failed in the latest run."""
    import dagster as dg

    entries = instance.all_logs(instance.get_runs(limit=1)[0].run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    return sorted(entry.get_dagster_event().step_failure_data.error_display_string for entry in entries)


def changed_in_dvc(root: Path) -> set[str]:
    """The command stages that `dvc status` calls changed."""
    from dvc.repo import Repo

    with chdir(root), Repo(str(root)) as repo:
        return {name for name in repo.status() if not name.endswith(".dvc")}


def not_fresh(root: Path, instance: Any, pipeline: Pipeline = PIPELINE) -> set[str]:
    """The stages whose assets Dagster does not call fresh."""
    from builders.staleness import stale_keys
    from dagster_project.orchestration.dagster.assets import build_definitions

    return {"@".join(key.path) for key in stale_keys(build_definitions(root, pipeline).resolve_asset_graph(), instance)}


def _refuse_text(root: Path, values: dict[str, Any]) -> None:
    if any(not isinstance(variant.get("r"), int | float) for variant in values["variants"].values()):
        raise InputError("r must be a number", "give a number")


def main() -> int:
    root = Path.cwd()
    gc.disable()  # the process is short, and there are hundreds in a run of the tests
    atexit.register(gc.freeze)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that was started in the background ignores it
    if sys.argv[1] == "run":
        from dagster_project.orchestration.run_stage import run_stage, streaming_to_dagster

        try:
            with streaming_to_dagster():
                run_stage(root, sys.argv[2], PIPELINE)
        except PedigreeError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0
    if sys.argv[1] == "run-all":
        from dagster_project.orchestration.run_all import run_all

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        document = run_all(root, int(sys.argv[2]), sys.argv[3:] == ["--force"], PIPELINE.validate, pipeline=PIPELINE)
        print(json.dumps(document))
        return 0 if document["passed"] else 1
    if sys.argv[1] == "sweep":
        from dagster_project.commands.sweep import as_text, sweep

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        document = sweep(root, sys.argv[2], sys.argv[4:], int(sys.argv[3]), None, PIPELINE.variants_of, _refuse_text)
        print(as_text(document), file=sys.stderr)
        print(json.dumps(document))
        return 0 if document["passed"] else 1
    import dagster as dg

    with dg.DagsterInstance.from_config(str(root / ".dagster")) as instance:
        if sys.argv[1] == "materialize-at-once":
            return 0 if materialize_at_once(instance, sys.argv[2:]).success else 1
        return 0 if materialize(root, instance, sys.argv[2:]).success else 1


if __name__ == "__main__":
    sys.exit(main())
