"""Shared fixtures: a tiny random model made in-process, and small copies of the project to run things in."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from builders.tiny_model import make_tiny_model
from builders.training import exclude_loaded_from_garbage_collection
from builders.warm_server import WarmServer, active, running_commands, running_stages, words_of
from hypothesis import HealthCheck, settings

# the same search each time, on a busy machine, too, so that a run that was green stays green; PEDIGREE_FUZZ=1 searches
# at random
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default" if os.environ.get("PEDIGREE_FUZZ") else "steady")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and other tests use the other cores
os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # a thread that waits sleeps: spinning would take the core from the other test process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the many processes of tests need not compile the project each
os.environ.pop("DAGSTER_HOME", None)  # the home of whoever runs the tests is not that of their projects
for _name in (
    "MAKEFLAGS",
    "MFLAGS",
    "VENV",
    "LOCK",
    "UV",
):  # what `make test-latest` sets is not for `make` in projects of tests
    os.environ.pop(_name, None)
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

gc.set_threshold(
    50_000, 20, 100
)  # the default searches the many objects of the libraries so often that it takes a tenth of the time of a test

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Data sets that nobody here wrote; tests on them are skipped where the folder is missing."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A report goes from process to process as UTF-8, and what hostile rows
    leave in a test's log can be half a character."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


_modules_frozen = 0


def pytest_runtest_setup() -> None:
    """After a test that has loaded libraries."""
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 300:
        _modules_frozen = len(sys.modules)
        exclude_loaded_from_garbage_collection()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer random Llama (64 wide) and a byte-level tokenizer with a ChatML template."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def newline_merging_tokenizer(tiny_tokenizer: Any) -> Any:
    """A tokenizer in which two newlines are one token, so that it matters where a text is cut."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["ĊĊ"] = len(state["model"]["vocab"])
    state["model"]["merges"] = [["Ċ", "Ċ"]]
    state["pre_tokenizer"]["use_regex"] = False
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    merging.chat_template = tiny_tokenizer.chat_template
    return merging


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`pedigree check` (builders.commands.Check), in a folder of its own and without a new process."""
    from builders.commands import Done, exit_code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        return Done(exit_code("check", *map(str, arguments)), *capsys.readouterr())

    return call


@pytest.fixture
def model(tiny_model: Path) -> Any:
    """The tiny model with weights ten times as large, so that what a token attends to shows in its logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a project folder, with the interpreter that runs the tests first on PATH."""
    env = {**os.environ, "DAGSTER_HOME": str(folder / ".dagster"), "PEDIGREE_PROJECT": str(folder), **environment}
    if words := words_of(arguments, folder):
        return active[-1].run(words, folder, env)
    return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False)


def pedigree(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "dagster_project", *arguments], folder)


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "dvc", *arguments], folder)


def draw_pages(address: str, report: Any, out: Path, pages: Path, root: Path | None = None) -> None:
    """Draw a stage's pages from its documents, as the runner does after the stage."""
    from dagster_project.core.context import Documents
    from dagster_project.pipeline import PEDIGREE

    PEDIGREE.draw(Documents(root or out.parent, address, out, pages, report.document()))


def edit_params(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change params.yaml of a project through a function on its plain data."""
    from ruamel.yaml import YAML

    path = folder / "params.yaml"
    values = YAML(typ="safe").load(path.read_text())
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")  # YAML has no surrogate pairs


def evaluate(
    root: Path, model: Path, settings: Any, test: list[dict[str, Any]], train: list[dict[str, Any]]
) -> dict[str, Any]:
    """Stages baselines, evaluation and comparison on a model, and two variants
    that are the same model: reports by stage, and `board`."""
    from dagster_project.core.params import Compute
    from dagster_project.core.records import write_records
    from dagster_project.stages import baselines, comparison, evaluation

    compute = Compute(dtype="float32", threads=1)
    for split, rows in (("train", train), ("validation", []), ("test", test)):
        write_records(root / "splits" / split, rows)
    data = root / "splits"
    chosen = baselines.Params(few_shot=1, retrieved=1, thinking_tokens=2)
    found = {"baselines": baselines.produce(root, chosen, settings, compute, model, data, root / "baselines").metrics}
    for name in ("one", "two"):
        out = root / "evaluation" / name
        found[name] = evaluation.produce(
            root, name, settings, compute, model, model, data, out, root / f"{name}.csv"
        ).metrics
    (root / "training.json").write_text('{"tokens": 9, "trained_tokens": 3, "steps": 1}')
    variants = {
        name: comparison.Variant(root / "evaluation" / name, model, root / "training.json") for name in ("one", "two")
    }
    said = comparison.produce(
        root,
        settings,
        variants,
        data,
        root / "baselines",
        model,
        root / "comparison",
        root / "scores.csv",
        root / "pages",
    )
    draw_pages("comparison", said, root / "comparison", root / "pages", root)
    return {**found, **said.metrics, "board": (root / "comparison/board.md").read_text()}


FIRST = (
    "test_start",  # makes the finished project; files that need it follow when it exists
    "test_two_front_ends",
    "test_projects",
    "test_concurrent",
    "test_sharding_alignment",
    "test_sharding",
    "test_processes",
    "test_methods",
    "test_privacy",
    "test_tool_checks",
    "test_why_points",
    "test_why_pairs",
    "test_browser",
    "test_merged_variant",
    "test_machine",
    "test_erase_project",
    "test_erase_remote",
    "test_readme",
    "test_front_ends",
    "test_exports_in_place",
    "test_bad_input",
    "test_answer_history",
    "test_resume",
    "test_own_trainer",
    "test_without_reward_model",
    "test_without_preferences",
    "test_faults",
    "test_fuzz",
    "test_hostile_files",
)
"""Files that take a minute or more, in the order in which they start: none of
them is the last one, for which the other test processes would wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


def copy_project(target: Path) -> Path:
    """A fresh clone of the working tree, as git and DVC would have it, without results."""
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if (
            name == "dvc.lock"
            or (name.startswith(("data/reports/", ".dvc/")) and not name.endswith(".gitkeep"))
            or not (ROOT / name).is_file()
        ):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], ["git", "add", "-A"],
                    ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start"],
                    ["git", "gc", "-q"]):  # fmt: skip  # one file instead of 840, for those who copy it
        done = run(command, target)
        assert done.returncode == 0, done.stderr
    return target


def quick(folder: Path, model: Path) -> Path:
    """The `quick` override: 40 rows of each source, 8 steps, and a tiny model from a folder."""
    shutil.copytree(model, folder / "models" / "tiny")

    def change(values: dict[str, Any]) -> None:
        values["base_model"] = {"folder": "models/tiny", "license": "Apache-2.0", "dtype": "float32"}
        values["raw_examples"]["limit"] = 40
        values["raw_preferences"]["limit"] = 140  # the first 96 are those of test
        values["tokenized"]["max_length"] = 1024
        values["adapter"]["lora"] = {
            "method": "lora",
            "peft": {"r": 4, "target_modules": "all-linear"},
            "learning_rate": 1e-3,
            "max_steps": 8,
        }
        values["reward_model"] = {"model": "base_model", "max_steps": 3, "min_accuracy": 0.0}
        values["aligned"] = {
            "dpo": {"method": "dpo", "adapter": "lora", "max_steps": 3, "samples": 2, "max_new_tokens": 4}
        }
        values["baselines"] = {"few_shot": 1, "retrieved": 1}
        values["evaluation"]["max_new_tokens"] = 4
        values["compute"].update(dtype="float32", threads=1)
        excused = [
            {"check": name, "reason": "eight steps teach nothing", "expires": "2999-01-01"}
            for name in ("better_than_baselines", "kept_its_knowledge")
        ]
        values["release"] = {"variant": "lora", "waivers": excused}

    edit_params(folder, change)
    return folder


def tool(name: str) -> ModuleType:
    """A package of the extra `dev`. CI must have it."""
    return (
        __import__(name, fromlist=["_"])
        if os.environ.get("CI")
        else pytest.importorskip(name, reason=f"{name} (extra dev) is not installed")
    )


def skip_without(*libraries: str) -> None:
    """Skip a test, or a whole module, where a library is not installed. CI must have all."""
    for name in libraries:
        if importlib.util.find_spec(name) is None and not os.environ.get("CI"):
            pytest.skip(f"{name} is not installed: pip install --editable '.[dev]'", allow_module_level=True)


def made_once(
    name: str, make: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Path:
    """A folder for all test processes: the one that asks first makes it, and the others wait for it."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).exists():
            make(own / f"unfinished-{name}")
            (own / f"unfinished-{name}").rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The wheel of the package."""
    from builders.wheel import build_wheel

    [built] = made_once("wheel", build_wheel, tmp_path_factory, worker_id).glob("dist/*.whl")
    return built


@pytest.fixture(scope="session")
def _project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, worker_id: str) -> Path:
    """A quick project in which nothing has run yet."""

    def make(folder: Path) -> None:
        compiled = run(
            [sys.executable, "-m", "compileall", "-q", "dagster_project"], quick(copy_project(folder), tiny_model)
        )
        assert compiled.returncode == 0, "otherwise each copy compiles anew"

    return made_once("fresh", make, tmp_path_factory, worker_id)


@pytest.fixture
def project(_project: Path, tmp_path: Path) -> Path:
    """A copy of a quick project in which nothing has run yet."""
    target = tmp_path / "project"
    shutil.copytree(_project, target, symlinks=True)
    return target


LOADED = Path(".dvc", "tmp", "loaded_modules.jsonl")
"""In a finished project: the modules that each of its stages loaded (tests/builders/loaded_modules)."""


@pytest.fixture(scope="session")
def _finished(_project: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A quick project in which the whole pipeline has run."""

    def make(folder: Path) -> None:
        hook = str(Path(__file__).parent / "builders" / "loaded_modules")
        noted = {
            "PYTHONPATH": os.pathsep.join(filter(None, [hook, os.environ.get("PYTHONPATH")])),
            "LOADED_MODULES": str(folder / LOADED),
        }
        done = run(
            [sys.executable, "-m", "dvc", "repro"], Path(shutil.copytree(_project, folder, symlinks=True)), **noted
        )
        assert done.returncode == 0, done.stderr + done.stdout

    return made_once("finished", make, tmp_path_factory, worker_id)


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of a quick project in which the whole pipeline has run."""
    target = tmp_path / "project"
    shutil.copytree(_finished, target, symlinks=True)
    yield target


@pytest.fixture(scope="session")
def _warm_server(_finished: Path) -> Iterator[WarmServer]:
    """A process that has loaded what the stages of the finished project load."""
    server = WarmServer(
        {name for line in (_finished / LOADED).read_text().splitlines() for name in json.loads(line)["modules"]}
    )
    yield server
    server.end()


@pytest.fixture
def warm(_warm_server: WarmServer) -> Iterator[None]:
    """`run`, `dvc` and `pedigree` fork their processes, and those of stages, from one that has loaded the libraries: a
    fraction of the time. For tests of what commands do in a project whose code is unchanged; how they start, are
    killed, or share locks is tested with processes that are started."""
    with running_commands(_warm_server):
        yield


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A small pipeline (tests/builders/small_pipeline.py) in which everything has run and is committed."""
    from builders import small_pipeline

    def make(folder: Path) -> None:
        small_pipeline.make_project(folder)
        assert dvc(folder, "repro").returncode == 0
        small_pipeline.commit(folder, "made")

    return made_once("pipeline", make, tmp_path_factory, worker_id)


@pytest.fixture(scope="session")
def _small_server() -> Iterator[WarmServer]:
    """A process that has loaded what commands and stages of the small pipeline load."""
    server = WarmServer(["builders.small_pipeline", "dagster_pipes"])
    yield server
    server.end()


@pytest.fixture
def warm_small(_small_server: WarmServer) -> Iterator[None]:
    """The same as `warm`, for projects of the small pipeline. Stages that DVC
    runs in the process of the test are forked, too."""
    with running_commands(_small_server), running_stages(_small_server):
        yield


@pytest.fixture
def root(_made: Path, tmp_path: Path) -> Path:
    """A copy of the small pipeline in which everything has run and is committed."""
    return Path(shutil.copytree(_made, tmp_path / "project", symlinks=True))


@pytest.fixture(scope="session")
def _trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A project of the stage `adapter@x` alone (tests/builders/training_pipeline.py),
    which has run and whose gradients are computed."""
    from builders.training import LORA
    from builders.training_pipeline import make_project

    from dagster_project.__main__ import main

    def make(folder: Path) -> None:
        root = make_project(folder, tiny_model, {**LORA, "num_train_epochs": 1, "neftune_noise_alpha": None})
        done = dvc(root, "repro", "-q")
        assert done.returncode == 0, done.stderr + done.stdout
        assert main(["why", "adapter@x", "--index", "--project", str(root)]) == 0

    return made_once("trained", make, tmp_path_factory, worker_id)


def synced_home(project: Path, pipeline: Any, copy: Path, folder: Path) -> None:
    """Make Dagster's home after the first sync of a project, which is synced as a copy."""
    import dagster as dg

    from dagster_project.orchestration.dagster.sync import sync

    shutil.copytree(project, copy, symlinks=True)
    folder.mkdir()
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(folder)) as found:
        assert sync(copy, found, pipeline) and sync(copy, found, pipeline) == []


@contextmanager
def copied_home(home: Path, root: Path) -> Iterator[Any]:
    """The Dagster instance in a copy of a home, as the home of this project."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(shutil.copytree(home, root / ".dagster"))) as found:
        yield found


@pytest.fixture(scope="session")
def _home(_made: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Dagster's home after a sync of the small pipeline."""
    from builders.small_pipeline import PIPELINE

    copy = tmp_path_factory.mktemp("synced") / "project"
    return made_once("home", lambda folder: synced_home(_made, PIPELINE, copy, folder), tmp_path_factory, worker_id)


@pytest.fixture
def synced(root: Path, _home: Path) -> Iterator[Any]:
    """The Dagster instance of that copy, after a sync."""
    with copied_home(_home, root) as found:
        yield found


@pytest.fixture(scope="session")
def _finished_home(_finished: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Dagster's home after a sync of the finished project."""
    from dagster_project.pipeline import PEDIGREE

    copy = tmp_path_factory.mktemp("finished-synced") / "project"
    return made_once(
        "finished-home", lambda folder: synced_home(_finished, PEDIGREE, copy, folder), tmp_path_factory, worker_id
    )


@pytest.fixture
def synced_finished(finished: Path, _finished_home: Path) -> Iterator[Any]:
    """The Dagster instance of the copy `finished`, after a sync."""
    with copied_home(_finished_home, finished) as found:
        yield found


@pytest.fixture(scope="session")
def _new_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dagster's databases without an event: making their tables takes longer than copying them."""
    import dagster as dg

    folder = tmp_path_factory.mktemp("dagster")
    with dg.DagsterInstance.local_temp(str(folder)) as found:
        assert not found.get_runs(limit=1) and not found.get_asset_keys()
    return folder


@pytest.fixture
def instance(_new_home: Path, tmp_path: Path) -> Iterator[Any]:
    """A Dagster instance of its own, with an event log on disk."""
    import dagster as dg

    with dg.DagsterInstance.local_temp(str(shutil.copytree(_new_home, tmp_path / "dagster"))) as found:
        yield found


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A Postgres server with a database for Dagster (builders.postgres.Postgres). CI must have one."""
    from builders import postgres

    if postgres.programs() is None and not os.environ.get("CI"):
        pytest.skip(postgres.HINT)
    with postgres.postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of S3 with an empty bucket (builders.s3.S3Server). CI must have one."""
    from builders.s3 import s3_server

    skip_without("moto")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server of S3, with credentials and address in the environment."""
    for name, value in {**s3.environment, "AWS_ENDPOINT_URL": s3.endpoint}.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def no_ray_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reads once per process whether there is a token: one in the home folder would count in later tests, too."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no token"))


@pytest.fixture(scope="session")
def _starting_cluster(s3: Any) -> Iterator[tuple[Any, Future[None]]]:
    from builders.cluster import Cluster

    folder = Path(tempfile.mkdtemp(prefix="pray-", dir="/tmp"))  # Ray's sockets need a short path
    nodes = Cluster(folder, {**s3.environment, "AWS_MAX_ATTEMPTS": "2"})
    try:
        with ThreadPoolExecutor(1) as thread:
            yield nodes, thread.submit(nodes.start)
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(_starting_cluster: tuple[Any, Future[None]], _made: Path) -> Any:
    """A Ray cluster of two nodes (builders.cluster.Cluster), with the credentials of the S3 server in their
    environment; while it starts, the small pipeline is made. Two clusters on one machine disturb each other, so all
    tests on Ray run in one test process."""
    nodes, started = _starting_cluster
    started.result()
    return nodes


@pytest.fixture
def driver(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment of a driver that uses the cluster, also set for this process: every stage runs on Ray."""
    from builders.ray_jobs import POLL

    variables = {**cluster.variables(), **cluster.environment, "PEDIGREE_EXECUTION": "ray"}
    monkeypatch.setattr("dagster_project.orchestration.executors.ray.POLL", POLL)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


CHECKS_QUERY = """{ assetNodes { assetKey { path } assetChecksOrError { ... on AssetChecks { checks {
    name executionForLatestMaterialization { status evaluation { severity success } } } } } } }"""


def shown_checks(root: Path, instance: Any) -> dict[str, dict[str, str]]:
    """What Dagster's GraphQL shows of the small pipeline's checks, by address
    and name: a status, or "NOT_EVALUATED" for the latest materialization."""
    from dagster._core.remote_origin import InProcessCodeLocationOrigin
    from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
    from dagster_graphql.test.utils import execute_dagster_graphql

    module = root / "shown_definitions.py"
    module.write_text(
        "from pathlib import Path\n\nfrom builders.small_pipeline import PIPELINE\n\nfrom"
        " dagster_project.orchestration.dagster.assets import build_definitions\n\ndefs ="
        " build_definitions(Path(__file__).parent, PIPELINE)\n"
    )
    origin = InProcessCodeLocationOrigin(
        LoadableTargetOrigin(executable_path=sys.executable, python_file=str(module), working_directory=str(root)),
        location_name="pipeline",
    )
    with WorkspaceProcessContext(instance, InProcessWorkspaceLoadTarget(origin)) as context:
        found = execute_dagster_graphql(context.create_request_context(), CHECKS_QUERY).data["assetNodes"]
    module.unlink()
    return {
        "@".join(node["assetKey"]["path"]): {
            check["name"]: (check["executionForLatestMaterialization"] or {"status": "NOT_EVALUATED"})["status"]
            for check in node["assetChecksOrError"].get("checks", [])
        }
        for node in found
        if node["assetChecksOrError"].get("checks")
    }
