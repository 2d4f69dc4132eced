"""Pedigree projects beside other assets: two in one code location, and as components in a folder of YAML files."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from uuid import uuid4

import dagster as dg
import pytest
import yaml
from builders import foreign_project
from builders.small_pipeline import PIPELINE, changed_in_dvc, commands_run
from builders.staleness import stale_keys
from conftest import ROOT, run

import dagster_project
from dagster_project.orchestration.dagster.assets import build_definitions, names_of_jobs
from dagster_project.orchestration.dagster_dvc.dead_runs import ALIVE, reap
from dagster_project.orchestration.dvc import read_stages

TEAMS = ("support", "sales")


@dg.asset(pool="gpu")
def invoices() -> None:
    """An asset of somebody else, with a pool of a common name."""


@pytest.fixture
def roots(_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two copies of the small pipeline, in which everything has run. The current folder is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return {name: Path(shutil.copytree(_made, tmp_path / name, symlinks=True)) for name in TEAMS}


def together(roots: dict[str, Path]) -> dg.Definitions:
    """One code location with both, an asset of somebody else, and an executor of somebody else."""
    projects = [build_definitions(root, PIPELINE, key_prefix=name) for name, root in roots.items()]
    return dg.Definitions.merge(*projects, dg.Definitions(assets=[invoices], executor=dg.in_process_executor))


def not_fresh(definitions: dg.Definitions, instance: dg.DagsterInstance, name: str) -> set[str]:
    return {
        "@".join(key.path[1:]) for key in stale_keys(definitions.resolve_asset_graph(), instance) if key.path[0] == name
    }


def tick(definitions: dg.Definitions, instance: dg.DagsterInstance, name: str) -> str:
    """What the project's sync sensor reports."""
    sensor = definitions.resolve_sensor_def(f"{name}_sync")
    answer = sensor(dg.build_sensor_context(instance=instance))
    assert isinstance(answer, dg.SkipReason)
    return answer.skip_message or ""


def test_two_projects_share_no_name_but_the_pools_of_their_machine(roots: dict[str, Path]) -> None:
    definitions = together(roots)
    graph = definitions.resolve_asset_graph()
    both = [{tuple(key.path[1:]) for key in graph.get_all_asset_keys() if key.path[0] == name} for name in TEAMS]
    assert both[0] == both[1] and len(both[0]) > 10
    assert {key.path[0] for key in graph.get_all_asset_keys()} == {*TEAMS, "invoices"}
    expected = {f"{team}_{job}" for team in TEAMS for job in ("pipeline", "data", "variant_lora", "variant_dora")}
    assert {job.name for job in definitions.jobs or []} == expected
    assert {sensor.name for sensor in definitions.sensors or []} == {"support_sync", "sales_sync"}
    groups = {graph.get(key).group_name.split("/")[0] for key in graph.get_all_asset_keys() if key.path[0] in TEAMS}
    assert groups == {*TEAMS}
    pools = {pool for key in graph.materializable_asset_keys if key.path[0] in TEAMS for pool in graph.get(key).pools}
    assert pools == {"pedigree_cpu"}, "a pool of somebody else gets no limit from us"


def test_jobs_of_variants_have_different_names_without_hyphens() -> None:
    names = names_of_jobs(["a_b", "a-b", "a-b_", "lora"])
    assert names["a-b"] == "variant_a_b" and names["lora"] == "variant_lora" and "-" not in "".join(names.values())
    assert len({*names.values()}) == 4


@pytest.mark.long
def test_both_are_synced_and_materialized_in_one_run_from_another_folder(
    roots: dict[str, Path], instance: dg.DagsterInstance
) -> None:
    definitions = together(roots)
    for name in TEAMS:
        assert "tok is " in tick(definitions, instance, name)
        assert tick(definitions, instance, name) == "Dagster and DVC agree."
        assert not_fresh(definitions, instance, name) == set()
    assert instance.event_log_storage.get_pool_limits() and "gpu" not in {
        one.name for one in instance.event_log_storage.get_pool_limits()
    }
    before = {name: len(commands_run(root)) for name, root in roots.items()}
    (roots["support"] / "code/tok.py").write_text("V = 9\n")
    (roots["sales"] / "code/inst.py").write_text("V = 9\n")
    for name, changed in (("support", {"tok"}), ("sales", {"inst"})):
        tick(definitions, instance, name)
        assert not_fresh(definitions, instance, name) == changed_in_dvc(roots[name]) == changed
    done = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, raise_on_error=False
    )
    assert done.success
    ran = {name: commands_run(root)[before[name] :] for name, root in roots.items()}
    assert ran["support"][0] == "tok" and ran["sales"][0] == "inst" and not {"raw", "inst"} & {*ran["support"]}
    for name, root in roots.items():
        assert tick(definitions, instance, name) == "Dagster and DVC agree."
        assert not_fresh(definitions, instance, name) == changed_in_dvc(root) == set()
        event = instance.get_latest_materialization_event(dg.AssetKey([name, "tok"]))
        assert event is not None and event.asset_materialization is not None
        assert event.asset_materialization.metadata["data_version"].value == read_stages(root)["tok"].version


@pytest.mark.parametrize("others", ["sync", "materialize"])
def test_of_two_projects_without_a_prefix_an_instance_shows_the_first_alone(
    roots: dict[str, Path], instance: dg.DagsterInstance, others: str
) -> None:
    """They have the same asset keys: each would report its files as those of the other."""
    first, second = (build_definitions(root, PIPELINE, whole_location=True) for root in roots.values())
    (roots["sales"] / "code/tok.py").write_text("V = 9\n")

    def tick_of(definitions: dg.Definitions) -> str:
        answer = definitions.resolve_sensor_def("sync")(dg.build_sensor_context(instance=instance))
        assert isinstance(answer, dg.SkipReason)
        return answer.skip_message or ""

    assert "tok is " in tick_of(first)
    if others == "sync":
        said = tick_of(second)
    else:
        job, ran = second.resolve_implicit_global_asset_job_def(), len(commands_run(roots["sales"]))
        done = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("tok")], raise_on_error=False)
        assert not done.success and len(commands_run(roots["sales"])) == ran
        [event] = [one for one in done.all_events if one.event_type_value == "STEP_FAILURE"]
        said = str(event.event_specific_data.user_failure_data.description)
    assert f"belongs to the project in {roots['support']}" in said and "key_prefix" in said
    assert not [line for line in tick_of(first).split("; ") if "tok is " in line or "def/tok" in line]
    assert stale_keys(first.resolve_asset_graph(), instance) == set()


def test_a_run_of_other_assets_is_not_marked_as_failed_in_a_shared_instance(instance: dg.DagsterInstance) -> None:
    """Its process may be on another machine: only runs are examined whose tag names this one."""
    from dagster._core.events import EngineEventData

    theirs = dg.DagsterRun(job_name="theirs", run_id=str(uuid4()), status=dg.DagsterRunStatus.STARTED)
    instance.add_run(theirs)
    instance.report_engine_event("started", theirs, EngineEventData({"pid": dg.MetadataValue.int(2**22 + 1)}))
    assert reap(instance, owned=False) == []
    assert [one.run_id for one in instance.get_runs(dg.RunsFilter(statuses=ALIVE))] == [theirs.run_id]
    assert len(reap(instance)) == 1, "in an instance of the project's own it is"


@pytest.fixture
def location(_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Dagster project of a company with two components: a foreign DVC
    project, and a Pedigree project in which nothing has run."""
    foreign_project.make_project(tmp_path / "churn")
    shutil.copytree(_project, tmp_path / "tuning", symlinks=True)
    root = tmp_path / "company"
    (root / "src" / "company" / "defs").mkdir(parents=True)
    (root / "pyproject.toml").write_text(
        '[tool.dg]\ndirectory_type = "project"\n\n[tool.dg.project]\nroot_module = "company"\n'
    )
    (root / "src" / "company" / "__init__.py").touch()
    for name, text in {
        "churn": """\
type: dagster_project.DvcProjectComponent
attributes:
  project_dir: ../../../../../churn
  key_prefix: [ml, churn]
post_processing:
  assets:
    - attributes:
        automation_condition: "{{ automation_condition.eager() }}"
""",
        "tuning": """\
type: dagster_project.components.PedigreeProjectComponent
attributes:
  project_dir: "{{ project_root }}/../tuning"
  group_name: models
""",
    }.items():
        (root / "src" / "company" / "defs" / name).mkdir()
        (root / "src" / "company" / "defs" / name / "defs.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(root / "src"))
    monkeypatch.chdir(tmp_path)
    yield root


@pytest.mark.long
def test_components_are_loaded_from_yaml_and_automation_runs_what_sync_shows_as_changed(
    location: Path, instance: dg.DagsterInstance
) -> None:
    definitions = dg.load_from_defs_folder(path_within_project=location)
    graph = definitions.resolve_asset_graph()
    materializable = {key.to_user_string() for key in graph.materializable_asset_keys}
    assert {"ml/churn/train", "tuning/splits", "tuning/adapter/lora"} <= materializable
    assert graph.get(dg.AssetKey(["tuning", "splits"])).group_name == "models/2_data"
    assert {sensor.name for sensor in definitions.sensors or []} == {"ml_churn_sync", "tuning_sync"}
    tick(definitions, instance, "ml_churn")
    job = definitions.resolve_job_def("ml_churn_pipeline")
    assert job.execute_in_process(instance=instance).success
    first = dg.evaluate_automation_conditions(definitions, instance)
    quiet = dg.evaluate_automation_conditions(definitions, instance, cursor=first.cursor)
    assert quiet.total_requested == 0
    (location.parent / "churn" / "params.yaml").write_text(foreign_project.PARAMS.replace("steps: 20", "steps: 2"))
    assert "def/train is now" in tick(definitions, instance, "ml_churn")
    requested = dg.evaluate_automation_conditions(definitions, instance, cursor=quiet.cursor)
    keys = [dg.AssetKey(["ml", "churn", name]) for name in ("prepare", "featurize", "train", "evaluate")]
    assert [requested.get_num_requested(key) for key in keys] == [0, 0, 1, 1]


@pytest.mark.long
def test_a_stage_of_a_component_runs_in_its_project(location: Path, instance: dg.DagsterInstance) -> None:
    definitions = dg.load_from_defs_folder(path_within_project=location)
    done = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey(["tuning", "raw_examples"])], raise_on_error=False
    )
    assert done.success
    assert (location.parent / "tuning" / "data" / "raw_examples").is_dir() and not (location.parent / "data").exists()


def test_sync_on_the_command_line_reports_under_the_prefix_and_does_not_claim_the_home(
    location: Path, tmp_path: Path
) -> None:
    home, project = tmp_path / "home", location.parent / "tuning"
    home.mkdir()
    done = run(
        [sys.executable, "-m", "dagster_project", "sync", "--key-prefix", "ml/tuning"], project, DAGSTER_HOME=str(home)
    )
    assert done.returncode == 0 and "def/splits is now" in done.stdout, done.stderr
    assert not (home / "pedigree_project").exists()
    with dg.DagsterInstance.from_config(str(home)) as shared:
        assert {tuple(key.path[:2]) for key in shared.get_asset_keys()} == {("ml", "tuning")}


def test_dg_finds_the_components_by_the_entry_point() -> None:
    from dagster.components.core.package_entry import DG_PLUGIN_ENTRY_POINT_GROUP, get_package_objects_in_module

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [module] = project["entry-points"][DG_PLUGIN_ENTRY_POINT_GROUP].values()
    found = dict(get_package_objects_in_module(import_module(module)))
    assert found.keys() == {"DvcProjectComponent", "PedigreeProjectComponent"}
    assert found["PedigreeProjectComponent"] is dagster_project.PedigreeProjectComponent


def test_the_docs_show_how_a_file_of_the_project_adds_a_schedule(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs/dagster-dvc.md").read_text()
    [python] = re.findall(r"```python\n(# definitions.py\n.*?)```", text, re.DOTALL)
    [workspace] = re.findall(r"```yaml\n(load_from:\n.*?)```", text, re.DOTALL)
    (project / "definitions.py").write_text(python)
    [named] = yaml.safe_load(workspace)["load_from"]
    monkeypatch.chdir(project.parent)
    defs = runpy.run_path(str(project / named["python_file"]["relative_path"]))["defs"]
    dg.Definitions.validate_loadable(defs)
    data = defs.resolve_job_def(defs.resolve_schedule_def("data_daily").job_name)
    assert dg.AssetKey("splits") in data.asset_layer.selected_asset_keys
    assert dg.AssetKey(["adapter", "lora"]) not in data.asset_layer.selected_asset_keys


def test_the_current_project_alone_has_the_names_of_before(roots: dict[str, Path]) -> None:
    definitions = build_definitions(roots["support"], PIPELINE, whole_location=True)
    keys = {key.to_user_string() for key in definitions.resolve_asset_graph().get_all_asset_keys()}
    assert {"tok", "adapter/lora", "def/adapter/lora", "sources/g.txt", "sources/d.txt"} <= keys
    assert {job.name for job in definitions.jobs or []} == {"pipeline", "data", "variant_lora", "variant_dora"}
    assert [sensor.name for sensor in definitions.sensors or []] == ["sync"] and definitions.executor is not None
