"""Commands and stages import what they need and nothing else; and what a stage
computes with is set before torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from builders import hub, training_pipeline
from builders.training import LORA
from conftest import LOADED, ROOT, run, tool

from dagster_project.commands import own_process
from dagster_project.core import waiting
from dagster_project.orchestration import dvc
from dagster_project.pipeline import STAGES

COMPUTES = {"torch", "transformers", "datasets"}
SCORES = {*COMPUTES, "peft"}
TRAINS = {*SCORES, "trl", "pandas"}
CHECKS = {"polars", "pandera"}
NEEDED: dict[str, set[str]] = {
    "base_model": COMPUTES,
    "raw_examples": set(),
    "instructions": {*CHECKS, "great_expectations", "pandas", "scipy"},
    "splits": CHECKS,
    "tokenized": {"transformers"},
    "adapter": TRAINS,
    "merged": SCORES,
    "raw_preferences": set(),
    "preferences": CHECKS,
    "reward_model": TRAINS,
    "aligned": TRAINS,
    "merged_aligned": SCORES,
    "baselines": {*SCORES, "pandas", "sklearn", "scipy"},
    "evaluation": SCORES,
    "evaluation_aligned": SCORES,
    "comparison": set(),
    "release": SCORES,
}
"""Libraries that take long to import and that a stage of the quick project uses."""
LARGE = {
    *TRAINS,
    *CHECKS,
    "great_expectations",
    "sklearn",
    "scipy",
    "bitsandbytes",
    "boto3",
    "sqlalchemy",
    "psycopg2",
    "grpc",
    "dagster",
    "matplotlib",
    "ray",
    "rfc3987_syntax",
    "altair",
    "hypothesis",
}


def test_no_stage_loads_a_large_library_that_it_does_not_need(_finished: Path) -> None:
    loaded: dict[str, set[str]] = {}
    for line in (_finished / LOADED).read_text().splitlines():
        process = json.loads(line)
        if process["arguments"][:3] == ["-m", "dagster_project", "run"]:
            loaded[process["arguments"][3].partition("@")[0]] = {name.partition(".")[0] for name in process["modules"]}
    assert loaded.keys() == STAGES.keys() == NEEDED.keys()
    assert {stage: sorted(names & LARGE - NEEDED[stage]) for stage, names in loaded.items()} == {
        stage: [] for stage in STAGES
    }


def test_modules_of_stages_load_no_large_library() -> None:
    code = f"""import json, sys
from dagster_project.pipeline import sections
sections()
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}} & {LARGE!r})))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_question_about_records_loads_no_definitions_of_parameters() -> None:
    code = """import sys
from dagster_project.lineage.impact.question import impact
print(sorted({"pydantic", "jsonschema", "polars"} & sys.modules.keys()))"""
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_a_model_is_given_adapters_without_bitsandbytes_which_remains_available(tiny_model: Path) -> None:
    code = f"""import sys
from pathlib import Path
from dagster_project.core.params import Compute
from dagster_project.training.methods.build import build
from dagster_project.training.methods.hardware import prepare
device, dtype = prepare(Compute(threads=1, dtype="float32"))
build("lora", {{"r": 2, "target_modules": "all-linear"}}, Path({str(tiny_model)!r}), device, dtype, "adapter.lora")
assert "torch" in sys.modules and "bitsandbytes" not in sys.modules
options = {{"r": 2, "target_modules": "all-linear"}}
built = build("lora", options, Path({str(tiny_model)!r}), device, dtype, "adapter.lora", quantization="nf4")
print(sorted({{type(module).__name__ for module in built.model.modules()}} & {{"Linear4bit", "Params4bit"}}))"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["['Linear4bit']"], done.stderr


FRONT_ENDS = {
    "run": ["-m", "dagster_project", "run", "base_model"],
    "repro": ["-m", "dvc", "repro", "base_model"],
    "dagster": ["-m", "dagster", "asset", "materialize", "--select", "base_model", "-m", "dagster_project.definitions"],
}


@pytest.mark.long
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_waiting_threads_of_a_stage_spin_briefly_whichever_front_end_starts_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, front_end: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")  # the OpenMP library prints what it found when torch loaded it
    (project / ".dagster").mkdir()
    done = run([sys.executable, *FRONT_ENDS[front_end]], project)
    assert done.returncode == 0, done.stderr
    assert "GOMP_SPINCOUNT = '3000'" in done.stdout + done.stderr


def kernel(path: Path, *ticks: int) -> Path:
    """A copy of what the kernel writes, with so many ticks of each CPU in user mode."""
    lines = [f"cpu{cpu} {count} 0 0 900 70 0 0 5 0 0" for cpu, count in enumerate(ticks)]
    path.write_text("\n".join([f"cpu  {sum(ticks)} 0 0 900 70 0 0 5 0 0", *lines, "ctxt 5", "procs_running 3", ""]))
    return path


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_own_cpus", lambda: {0, 1})


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize(
    "ticks, computes, expected",
    [
        ((1, 2), True, {"GOMP_SPINCOUNT": "3000"}),
        ((1, 2), False, {"OMP_WAIT_POLICY": "passive"}),
        ((0, 0, 7), True, {"OMP_WAIT_POLICY": "passive"}),
        ((), True, {"OMP_WAIT_POLICY": "passive"}),
    ],
    ids=[
        "a command that computes",
        "a command that computes nothing",
        "a sandbox that does not count",
        "no CPU is named",
    ],
)
def test_threads_spin_briefly_where_the_kernel_says_what_runs(
    tmp_path: Path, ticks: tuple[int, ...], computes: bool, expected: dict[str, str]
) -> None:
    environment: dict[str, str] = {}
    waiting.choose(environment, computes, kernel(tmp_path / "stat", *ticks))
    assert environment == {**expected, "PEDIGREE_WAITING": next(iter(expected))}


@pytest.mark.parametrize("command", ["run", "chat", "serve", "why", "bisect", "plan", "audit"])
def test_threads_of_commands_that_compute_spin_briefly(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(own_process.os, "environ", environment)
    monkeypatch.setattr(waiting, "busy_ticks", lambda cpus, stat: 1)
    own_process.prepare([command])
    assert ("GOMP_SPINCOUNT" in environment) == (command != "audit")


@pytest.mark.parametrize("command", ["run", "mlflow"])
def test_mlflow_sends_no_telemetry_unless_the_user_turns_it_on(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("mlflow")
    code = "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    # also without what tells MLflow that it is tested, when it sends none, either
    own = {name: text for name, text in os.environ.items() if not name.startswith(("MLFLOW_", "CI", "PYTEST_"))}
    said = []
    for chosen in ({}, {"MLFLOW_DISABLE_TELEMETRY": "false"}):
        environment = own | chosen
        monkeypatch.setattr(own_process.os, "environ", environment)
        own_process.prepare([command])
        monkeypatch.undo()
        said.append(subprocess.check_output([sys.executable, "-c", code], env=environment))
    assert said == [b"True\n", b"False\n"]


def test_programs_of_dvc_that_a_command_starts_send_no_analytics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from dvc.analytics import is_enabled; print(is_enabled())"
    environment = {name: text for name, text in os.environ.items() if not name.startswith("DVC_")}
    environment |= {f"DVC_{kind}_CONFIG_DIR": str(tmp_path) for kind in ("GLOBAL", "SYSTEM")}
    said = [subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=tmp_path)]
    monkeypatch.setattr(own_process.os, "environ", environment)
    own_process.prepare(["sweep"])
    monkeypatch.undo()
    said.append(subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=tmp_path))
    assert said == [b"True\n", b"False\n"], "a project that says nothing of them, before and after"


def test_threads_sleep_where_the_kernel_does_not_say_what_runs(tmp_path: Path) -> None:
    for stat in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").write_text("")
        environment: dict[str, str] = {}
        waiting.choose(environment, True, stat)
        assert environment["OMP_WAIT_POLICY"] == "passive"


def test_each_process_decides_for_itself_how_its_threads_wait(tmp_path: Path, two_cpus: None) -> None:
    environment: dict[str, str] = {}
    waiting.choose(environment, False, kernel(tmp_path / "stat", 2, 2))
    waiting.choose(environment, True, kernel(tmp_path / "stat", 1, 1))
    assert environment == {"GOMP_SPINCOUNT": "3000", "PEDIGREE_WAITING": "GOMP_SPINCOUNT"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds since the start, and CPU seconds of this process."""
    clock = {"monotonic": 10.0, "process_time": 3.0}
    for name in clock:
        monkeypatch.setattr(waiting.time, name, lambda name=name: clock[name])
    monkeypatch.setattr(waiting.os, "sysconf", lambda name: 100)
    return clock


@pytest.mark.parametrize(
    "threads, others, contended",
    [(2, [0.0, 0.2, 1.0, 0.2, 0.05, 0.2], [0, 0, 1, 1, 0, 0]), (1, [1.0, 1.3, 1.2, 1.05], [0, 1, 1, 0])],
    ids=["a thread for each CPU", "a spare CPU"],
)
def test_cpus_are_contended_if_other_processes_use_more_than_the_threads_leave(
    tmp_path: Path, clock: dict[str, float], two_cpus: None, threads: int, others: list[float], contended: list[int]
) -> None:
    """Each look: the CPUs that others used in two seconds, in which this
    process used all others, and a CPU that is not ours was busy."""
    ticks, stat = [100, 100, 100], kernel(tmp_path / "stat", 100, 100, 100)
    watched, seen = waiting.Contention(threads, stat), []
    for used in others:
        clock["monotonic"] += 2
        clock["process_time"] += 2 * (2 - used)
        ticks = [count + 200 for count in ticks]
        kernel(stat, *ticks)
        seen.append(int(watched.look()))
    assert seen == contended


def test_the_kernel_counts_what_other_processes_use() -> None:
    cpus = os.sched_getaffinity(0)
    before = waiting.busy_ticks(cpus)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            while psutil.Process(other.pid).cpu_times().user < 0.5:
                time.sleep(0.05)
            used = (waiting.busy_ticks(cpus) - before) / os.sysconf("SC_CLK_TCK")
        finally:
            other.kill()
    assert used > 0.4


CODE = """import threading
import time
from dagster_project.core.params import Compute
from dagster_project.training.methods.hardware import prepare
for _ in range(2):
    prepare(Compute(threads=2))
print([thread.name for thread in threading.enumerate()].count("waiting"))"""


@pytest.mark.parametrize(
    "variables, expected", [({"PEDIGREE_WAITING": "GOMP_SPINCOUNT"}, 1), ({}, 0)], ids=["ours", "the user's"]
)
def test_a_process_that_computes_watches_what_else_runs_once(variables: dict[str, str], expected: int) -> None:
    environment = {**os.environ, "GOMP_SPINCOUNT": "3000", **variables}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.parametrize(
    "used, expected", [(0.0, "GOMP_SPINCOUNT"), (1.0, "OMP_WAIT_POLICY")], ids=["quiet", "beside another process"]
)
def test_threads_of_a_command_of_the_user_wait_as_suits_what_runs_when_it_starts(
    monkeypatch: pytest.MonkeyPatch, used: float, expected: str
) -> None:
    environment = {"GOMP_SPINCOUNT": "3000", "PEDIGREE_WAITING": "GOMP_SPINCOUNT"}
    monkeypatch.setattr(waiting.Contention, "look", lambda self: used > waiting.CONTENDED)
    waiting.settle(environment, 2)
    assert environment == {
        expected: "3000" if expected == "GOMP_SPINCOUNT" else "passive",
        "PEDIGREE_WAITING": expected,
    }


def test_a_wait_setting_of_the_user_is_kept_for_a_command() -> None:
    for environment in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        kept = dict(environment)
        waiting.settle(environment, 2)
        waiting.follow(2)
        assert environment == kept and waiting.NAME not in {thread.name for thread in threading.enumerate()}


IDLE = """import os, time
os.environ["GOMP_SPINCOUNT"] = "1000000000000"  # without sleepers, a thread spins as long as this process lives
import torch
from dagster_project.core.waiting import Sleepers
torch.set_num_threads(2)
a = torch.ones(400, 400, dtype=torch.float64).div_(3)
def idle():
    result = (a @ a).sum().item()
    begun = time.process_time()
    time.sleep(0.5)
    return time.process_time() - begun, result
sleepers, rounds = Sleepers(2), []
for wanted in (False, True, True, False, True):
    sleepers.hold(wanted)
    time.sleep(0.5)
    idle()
    rounds.append(idle())
print([seconds > 0.05 for seconds, _ in rounds], len({result for _, result in rounds}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp")
def test_a_team_that_sleeps_lets_other_threads_sleep_instead_of_spin() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("one CPU")
    code = f"import os\nos.sched_setaffinity(0, {cpus})\n{IDLE}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.strip() == "[True, False, False, True, False] 1", done.stderr


@pytest.mark.parametrize("setting", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_a_wait_policy_of_the_user_is_kept(tmp_path: Path, setting: dict[str, str]) -> None:
    environment = dict(setting)
    waiting.choose(environment, True, kernel(tmp_path / "stat", 1))
    assert environment == setting


def test_the_guard_of_a_stage_parses_the_pipeline_as_often_as_one_stage_needs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.utils import strictyaml

    states, parsed, producers = dvc.read_stages(root), list[str](), list[dvc.StageState]()
    load = strictyaml.load
    monkeypatch.setattr(
        strictyaml,
        "load",
        lambda path, *args, **kwargs: [parsed.append(Path(path).name), load(path, *args, **kwargs)][1],
    )
    found = dvc.verified_fingerprint(root, "tok", producers.extend)
    assert parsed.count("dvc.yaml") == 2  # the index of all stages, and the files with variables
    assert producers == [states[i.producer] for i in states["tok"].inputs if i.producer] and producers
    parsed.clear()
    assert found.now == dvc.inputs_now(root, "tok")
    assert parsed == ["dvc.yaml", "dvc.lock"]


def test_the_guard_of_a_stage_needs_no_record_of_other_stages(root: Path) -> None:
    """As in a clone without dvc.lock, where DVC restores stages from the run cache and runs the others."""
    lock = root / "dvc.lock"
    stages = yaml.safe_load(lock.read_text())["stages"]
    for kept in ({}, {"raw": stages["raw"]}):
        lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": kept}))
        assert not dvc.verified_fingerprint(root, "tok", lambda _: None).leftovers
    lock.unlink()
    assert not dvc.verified_fingerprint(root, "tok", lambda _: None).leftovers


NAMES = """
import json, sys
import transformers, transformers.models
def names(package):
    listed = package.__all__
    return [sorted(listed), sorted(package._class_to_module.items()), set(listed) <= set(dir(package))]
"""
FROM_MODELS = ("AutoModelForCausalLM", "BloomPreTrainedModel", "Qwen2ForCausalLM", "BertTokenizerFast", "Trainer")


def names_of_transformers(code: str) -> list[Any]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def test_transformers_lists_few_names_until_another_is_used_and_then_all_of_them() -> None:
    lean = "from dagster_project.core.imports import import_transformers\nimport_transformers()\n"
    listed, both = names_of_transformers(f"""{lean}{NAMES}
few = len(transformers._class_to_module)
used = transformers.AutoModelForCausalLM.__name__, transformers.models.llama.__name__
still = len(transformers._class_to_module)
every = names(transformers), names(transformers.models)
print(json.dumps([[few, still, len(transformers._class_to_module), *used], every]))
""")
    few, still, every, *used = listed
    assert few == still < 1_000 < 3_000 < every
    assert used == ["AutoModelForCausalLM", "transformers.models.llama"]
    assert both == names_of_transformers(f"{NAMES}print(json.dumps([names(transformers), names(transformers.models)]))")


def test_a_stage_that_uses_only_tokenizers_reads_the_files_of_few_models(tiny_model: Path) -> None:
    code = f"""import json, sys
from pathlib import Path
from dagster_project.commands import own_process
own_process.prepare(["run", "tokenized"])
from dagster_project.training.methods.load import load_tokenizer
model = Path({str(tiny_model)!r})
load_tokenizer(model, model)
transformers = sys.modules["transformers"]
print(json.dumps(["torch" in sys.modules, len(transformers._class_to_module) < 1_000]))"""
    assert names_of_transformers(code) == [False, True]


@pytest.mark.parametrize("name", FROM_MODELS)
def test_every_name_of_transformers_can_be_imported_first(name: str) -> None:
    lean = "from dagster_project.core.imports import import_transformers\nimport_transformers()\n"
    used = f"import json\nfrom transformers import {name} as used\nprint(json.dumps([used.__module__, used.__name__]))"
    assert names_of_transformers(f"{lean}{used}") == names_of_transformers(used)


def test_a_name_that_transformers_does_not_have_is_an_error() -> None:
    code = "from dagster_project.core.imports import import_transformers\nimport_transformers()\n"
    code += (
        "import json, transformers\nprint(json.dumps([hasattr(transformers, 'NoSuchModel'), transformers._is_short]))"
    )
    assert names_of_transformers(code) == [False, False]


def test_a_training_reports_nothing_to_the_hub(tiny_model: Path, tmp_path: Path) -> None:
    values = {**LORA, "num_train_epochs": 1, "save_strategy": "no", "load_best_model_at_end": False}
    project = training_pipeline.make_project(tmp_path / "project", tiny_model, values)
    silencers = {"HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI"}
    environment = {name: value for name, value in os.environ.items() if name not in silencers}
    with hub.serving(hub.Hub()) as hosted:
        done = subprocess.run(
            [sys.executable, "training_pipeline.py", "run", "adapter@x"],
            cwd=project,
            env={**environment, "HF_ENDPOINT": hosted.url},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert hosted.asked == []
