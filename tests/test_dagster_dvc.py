"""A DVC project that has nothing of Pedigree, in Dagster: its stages are
assets, its metrics metadata, its checks checks, and sync shows `dvc repro`."""

from __future__ import annotations

import ast
import csv
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from builders import foreign_project
from builders.small_pipeline import changed_in_dvc
from builders.staleness import stale_keys
from conftest import ROOT, dvc

from dagster_project import build_dvc_definitions, pipeline
from dagster_project.core.errors import InputError
from dagster_project.orchestration.dagster_dvc.materialize import NO_RESULT
from dagster_project.orchestration.dagster_dvc.metadata import describe
from dagster_project.orchestration.dagster_dvc.project import DvcProject, is_forced
from dagster_project.orchestration.dagster_dvc.sync import sync

STAGES = ("prepare", "featurize", "train", "evaluate")


@pytest.fixture(scope="module")
def _foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign_project.make_project(tmp_path_factory.mktemp("foreign") / "project")


@pytest.fixture
def foreign(_foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project, in which nothing has run. The current folder is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield Path(shutil.copytree(_foreign, tmp_path / "project", symlinks=True))


def materialize(root: Path, instance: dg.DagsterInstance, *stages: str) -> dg.ExecuteInProcessResult:
    job = build_dvc_definitions(root, "points").resolve_job_def("points_pipeline")
    keys = [dg.AssetKey(["points", *name.split("/")]) for name in stages] or None
    return job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)


def shown(instance: dg.DagsterInstance, stage: str) -> dict[str, Any]:
    """Metadata of the latest materialization."""
    event = instance.get_latest_materialization_event(dg.AssetKey(["points", stage]))
    assert event is not None and event.asset_materialization is not None
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def not_fresh(root: Path, instance: dg.DagsterInstance) -> set[str]:
    return {key.path[-1] for key in stale_keys(build_dvc_definitions(root, "points").resolve_asset_graph(), instance)}


def test_each_stage_is_an_asset_below_what_it_reads(foreign: Path) -> None:
    graph = build_dvc_definitions(foreign, "points").resolve_asset_graph()
    above = {
        key.path[1]: {"/".join(parent.path[1:]) for parent in graph.get(key).parent_keys if parent.path[1] != "def"}
        for key in graph.materializable_asset_keys
    }
    assert above == {
        "prepare": {"workspace/data/points.csv"},
        "featurize": {"prepare"},
        "train": {"featurize"},
        "evaluate": {"train", "featurize"},
    }
    assert {graph.get(dg.AssetKey(["points", name])).group_name for name in STAGES} == {"points", "points/models"}
    assert all(key.path[0] == "points" for key in graph.get_all_asset_keys())


def test_materializing_writes_what_dvc_repro_writes(
    foreign: Path, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(foreign, tmp_path / "other", symlinks=True))
    assert dvc(other, "repro").returncode == 0
    assert materialize(foreign, instance).success
    assert (foreign / "dvc.lock").read_bytes() == (other / "dvc.lock").read_bytes()
    assert (foreign / "model.json").read_bytes() == (other / "model.json").read_bytes()
    assert {name: shown(instance, name)["done"] for name in STAGES} == dict.fromkeys(STAGES, "run")
    assert sync(DvcProject(foreign, ("points",)), instance) == [], "the run has reported everything"
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == set()
    assert materialize(foreign, instance).success
    assert {name: shown(instance, name)["done"] for name in STAGES} == dict.fromkeys(STAGES, "nothing")


def test_a_run_whose_tag_to_force_is_neither_true_nor_false_fails(foreign: Path, instance: dg.DagsterInstance) -> None:
    assert [is_forced({"pedigree/force": value}) for value in ("true", "True", "false")] == [
        True,
        True,
        False,
    ] and not is_forced({})
    job = build_dvc_definitions(foreign, "points").resolve_job_def("points_pipeline")
    result = job.execute_in_process(instance=instance, tags={"pedigree/force": "yes"}, raise_on_error=False)
    [failure] = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    assert failure and "The run tag pedigree/force is neither true nor false: 'yes'." in failure.message
    assert not (foreign / "dvc.lock").exists()


def test_metrics_plots_and_checks_are_shown(foreign: Path, instance: dg.DagsterInstance) -> None:
    assert materialize(foreign, instance).success
    metadata = shown(instance, "evaluate")
    assert metadata["accuracy"] == 1.0 and metadata["test.points"] == 10
    assert metadata["eval/thresholds.csv"].splitlines()[0] == "| threshold | accuracy |"
    assert not [name for name in metadata if "check" in name]
    check = dg.AssetCheckKey(dg.AssetKey(["points", "evaluate"]), "better_than_chance")
    record = instance.event_log_storage.get_latest_asset_check_execution_by_key([check])[check]
    assert record.status.value == "SUCCEEDED"
    evaluation = record.event.dagster_event.asset_check_evaluation_data
    assert evaluation.metadata.keys() == {"description", "severity", "result_hash"}
    script = foreign / "src/evaluate.py"
    script.write_text(script.read_text().replace("> 0.5", "> 1"))
    assert dvc(foreign, "repro").returncode == 0
    assert "check evaluate better_than_chance: failed" in sync(DvcProject(foreign, ("points",)), instance)


def test_a_check_that_only_dvc_yaml_or_only_the_loaded_definitions_have_does_not_fail_the_run(
    foreign: Path, instance: dg.DagsterInstance
) -> None:
    """The script writes `better_than_chance`."""
    (foreign / "dvc.yaml").write_text(foreign_project.DVC_YAML.replace("better_than_chance:", "old_name:"))
    job = build_dvc_definitions(foreign, "points").resolve_job_def("points_pipeline")
    (foreign / "dvc.yaml").write_text(foreign_project.DVC_YAML)
    result = job.execute_in_process(instance=instance, raise_on_error=False)
    assert result.success
    found = {
        one.check_name: one for one in result.get_asset_check_evaluations() if one.asset_key.path[-1] == "evaluate"
    }
    assert {name: one.passed for name, one in found.items()} == {"old_name": False, "dvc_in_sync": True}
    assert found["old_name"].severity == dg.AssetCheckSeverity.WARN
    assert found["old_name"].metadata["note"].value == NO_RESULT
    assert sync(DvcProject(foreign, ("points",)), instance) == ["check evaluate better_than_chance: passed"]


def test_sync_shows_what_dvc_repro_did_and_what_is_stale(foreign: Path, instance: dg.DagsterInstance) -> None:
    project = DvcProject(foreign, ("points",))
    assert dvc(foreign, "repro").returncode == 0
    lines = sync(project, instance)
    assert {line.split(" is ")[0] for line in lines} >= {*STAGES, "workspace/data/points.csv", "def/train"}
    assert shown(instance, "evaluate")["accuracy"] == 1.0 and sync(project, instance) == []
    (foreign / "params.yaml").write_text(foreign_project.PARAMS.replace("steps: 20", "steps: 2"))
    assert [line.split(" is ")[0] for line in sync(project, instance)] == [
        "def/train",
        "check train dvc_in_sync: failed",
    ]
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == {"train"}
    result = materialize(foreign, instance, "evaluate")
    assert not result.success, "its input is not up to date"
    assert dvc(foreign, "repro").returncode == 0
    sync(project, instance)
    assert shown(instance, "evaluate")["accuracy"] < 1 and not_fresh(foreign, instance) == set()
    (foreign / "params.yaml").write_text(foreign_project.PARAMS)
    assert materialize(foreign, instance, "train").success
    assert shown(instance, "train")["done"] == "restored", "from DVC's run cache"


def test_only_a_renamed_stage_is_stale_and_not_what_reads_its_output(
    foreign: Path, instance: dg.DagsterInstance
) -> None:
    project = DvcProject(foreign, ("points",))
    assert dvc(foreign, "repro").returncode == 0
    sync(project, instance)
    (foreign / "dvc.yaml").write_text(foreign_project.DVC_YAML.replace("  prepare:\n", "  split:\n", 1))
    assert "check split dvc_in_sync: failed" in sync(project, instance)
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == {"split"}
    assert sync(project, instance) == []
    assert dvc(foreign, "repro").returncode == 0
    sync(project, instance)
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == set()


def test_a_stage_that_never_ran_and_that_nothing_reads_is_not_reported(
    foreign: Path, instance: dg.DagsterInstance
) -> None:
    (foreign / "model.json").write_text("{}")
    lines = sync(DvcProject(foreign, ("points",)), instance)
    assert lines and not [line for line in lines if line.startswith(("train", "check"))]


@pytest.mark.long
def test_of_two_outputs_only_the_one_that_is_read_makes_a_stage_stale(
    foreign: Path, instance: dg.DagsterInstance
) -> None:
    assert dvc(foreign, "repro").returncode == 0
    script = foreign / "src/featurize.py"
    script.write_text(
        script.read_text().replace(
            "path.read_text()", "(path.read_text() + ('\\n9,9,1' if path.stem == 'test' else ''))"
        )
    )
    assert materialize(foreign, instance, "featurize").success
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == {"evaluate"}
    (foreign / "data/features/test.csv").unlink()
    sync(DvcProject(foreign, ("points",)), instance)
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == {"featurize", "evaluate"}


@pytest.mark.long
def test_a_failing_command_fails_the_run_and_records_nothing(foreign: Path, instance: dg.DagsterInstance) -> None:
    assert materialize(foreign, instance).success
    lock = (foreign / "dvc.lock").read_bytes()
    (foreign / "src/train.py").write_text("raise SystemExit(3)")
    assert not materialize(foreign, instance).success
    assert (foreign / "dvc.lock").read_bytes() == lock


def test_a_stage_that_is_removed_while_it_runs_fails_with_the_next_step(
    foreign: Path, instance: dg.DagsterInstance
) -> None:
    without = foreign_project.DVC_YAML.partition("  evaluate:")[0]
    with (foreign / "src/evaluate.py").open("a") as script:
        script.write(f"Path('dvc.yaml').write_text({without!r})\n")
    result = materialize(foreign, instance)
    [failure] = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    assert failure and "evaluate is no longer in dvc.yaml. Reload the code location." in failure.message


def test_a_stage_that_always_runs_is_run_once_and_what_reads_it_can_be_materialized(
    foreign: Path, instance: dg.DagsterInstance
) -> None:
    text = foreign_project.DVC_YAML.replace("outs: [data/prepared]", "outs: [data/prepared]\n    always_changed: true")
    text = text.replace("cmd: python src/prepare.py", "cmd: echo x >> runs.txt && python src/prepare.py")
    (foreign / "dvc.yaml").write_text(text)
    assert materialize(foreign, instance, "prepare", "featurize").success
    assert (foreign / "runs.txt").read_text() == "x\n"
    sync(DvcProject(foreign, ("points",)), instance)
    assert sync(DvcProject(foreign, ("points",)), instance) == []
    assert (
        not_fresh(foreign, instance) & {"prepare", "featurize"}
        == changed_in_dvc(foreign) & {"prepare", "featurize"}
        == {"prepare"}
    )
    assert materialize(foreign, instance, "featurize").success, "its inputs are as recorded"
    (foreign / "data/prepared/train.csv").unlink()
    assert not materialize(foreign, instance, "featurize").success


def test_a_new_stage_below_a_folder_is_stale_alone_until_it_runs(foreign: Path, instance: dg.DagsterInstance) -> None:
    text = """stages:
  part:
    matrix: {n: [1]}
    cmd: mkdir -p parts && echo ${item.n} > parts/${item.n}
    outs: ["parts/${item.n}"]
  whole: {cmd: cat parts/* > whole, deps: [parts], outs: [whole]}
"""
    (foreign / "dvc.yaml").write_text(text)
    assert dvc(foreign, "repro").returncode == 0
    project = DvcProject(foreign, ("points",))
    sync(project, instance)
    (foreign / "dvc.yaml").write_text(text.replace("[1]", "[1, 2]"))
    sync(project, instance)
    assert not_fresh(foreign, instance) == {"2"} and changed_in_dvc(foreign) == {"part@2"}
    assert sync(project, instance) == []
    assert materialize(foreign, instance, "part/2").success
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == {"whole"}


def test_a_stage_that_neither_reads_nor_writes_a_file_is_run_once(foreign: Path, instance: dg.DagsterInstance) -> None:
    (foreign / "dvc.yaml").write_text("stages:\n  notify: {cmd: echo x >> runs.txt}\n")
    assert not_fresh(foreign, instance) == {"notify"}
    assert materialize(foreign, instance).success
    assert (foreign / "runs.txt").read_text() == "x\n"
    assert not_fresh(foreign, instance) == changed_in_dvc(foreign) == {"notify"}, "DVC runs it each time"
    assert sync(DvcProject(foreign, ("points",)), instance) == []


def test_bad_projects_and_names_are_refused_with_one_message(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a DVC project"):
        build_dvc_definitions(tmp_path)
    with (
        dg.DagsterInstance.ephemeral() as nothing,
        pytest.raises(InputError, match="'sup-port' cannot be part of a name"),
    ):
        sync(DvcProject(foreign, ("ml", "sup-port")), nothing)  # events of assets that no definitions can have
    with pytest.raises(InputError, match=r"'a\.b' cannot be part of a name"):
        build_dvc_definitions(foreign, "a.b")
    (foreign / "dvc.yaml").write_text("stages:\n  a-b: {cmd: echo}\n  a_b: {cmd: echo}\n")
    with pytest.raises(InputError, match="same name in Dagster"):
        build_dvc_definitions(foreign)
    (foreign / "dvc.yaml").write_text("stages:\n  a: {cmd: echo, deps: [data/my points.csv]}\n")
    with pytest.raises(InputError, match=r"dvc\.yaml: data/my points\.csv cannot be a name in Dagster"):
        build_dvc_definitions(foreign)
    for name in ("import", "input", "pipeline"):
        (foreign / "dvc.yaml").write_text(f"stages:\n  {name}: {{cmd: echo}}\n")
        with pytest.raises(InputError, match=rf"dvc\.yaml: {name} cannot be a name in Dagster"):
            build_dvc_definitions(foreign)
        dg.Definitions.validate_loadable(build_dvc_definitions(foreign, "churn"))


@pytest.mark.parametrize(
    "meta",
    ["checks: [x]", "checks: {c: 1}", "checks: {a b: x}", "checks: {dvc_in_sync: x}", "kinds: python", "kinds: [3]",
     "kinds: [a b]", "group: my models", "group: 7", "pool: 3", "pool: a b", "stale_after_days: soon",
     "stale_after_days: 0", "stale_after_days: 1.0e+99", "stale_after_days: true"],
)  # fmt: skip
def test_meta_that_dagster_cannot_show_is_refused_with_the_stage_and_the_key(foreign: Path, meta: str) -> None:
    (foreign / "dvc.yaml").write_text(f"stages:\n  a: {{cmd: echo, meta: {{{meta}}}}}\n")
    with pytest.raises(InputError, match=rf"dvc\.yaml: a: meta\.{meta.partition(':')[0]} is not a "):
        build_dvc_definitions(foreign)


@pytest.mark.parametrize("meta", ["note for another program", "[1]", "{group: null, kinds: null, owner: {name: x}}"])
def test_meta_for_other_programs_is_not_read(foreign: Path, meta: str) -> None:
    (foreign / "dvc.yaml").write_text(f"stages:\n  a: {{cmd: echo, meta: {meta}}}\n")
    assert build_dvc_definitions(foreign).resolve_asset_graph().get(dg.AssetKey(["a"])).kinds == set()


@pytest.mark.parametrize(
    ("checks", "shown"),
    [
        ({"c": {"passed": True}}, ("passed", "none")),
        ({"c": {"passed": False}}, ("failed", "error")),
        ({"c": {"passed": False, "severity": "warn"}}, ("failed", "warn")),
        ({"c": {"severity": "warn"}}, ("failed", "error")),
        ({"c": 1}, ("failed", "error")),
        ({}, None),
        ([], None),
        ({"other": {"passed": False}}, None),
    ],
)
def test_a_check_without_a_verdict_fails_and_one_that_the_report_lacks_has_no_result(checks: Any, shown: Any) -> None:
    state = SimpleNamespace(meta={"checks": {"c": "What it asserts."}}, report="metrics.json")
    results = DvcProject(Path()).check_results("stage", state, {"checks": checks})  # type: ignore[arg-type]
    found = [("passed" if one.passed else "failed", one.metadata["severity"].value) for one in results]
    assert found == ([shown] if shown else [])


def test_a_table_that_is_not_utf_8_or_not_csv_does_not_end_the_sync(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("city,score\nKöln,1".encode("latin-1"))
    (tmp_path / "long.csv").write_text("x" * (csv.field_size_limit() + 1))
    state: Any = SimpleNamespace(
        outs=("latin.csv", "long.csv"), version="1", metrics=(), plots=("latin.csv", "long.csv")
    )
    shown = describe(tmp_path, state)
    assert shown["latin.csv"].value.splitlines()[-1] == "| K\ufffdln | 1 |" and "long.csv" not in shown


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({"m.json": '{"accuracy": 1, "path": "p", "done": 2}'}, {"accuracy": 1, "m/path": "p", "m/done": 2}),
        ({"m.json": '{"loss": NaN, "gain": -Infinity}'}, {"loss": "nan", "gain": "-inf"}),
        ({"a/m.json": '{"x": 1}', "b/m.json": '{"x": 2}', "n.json": '{"x": 3}'}, {"a/m/x": 1, "b/m/x": 2, "n/x": 3}),
    ],
)
def test_no_metric_is_blank_or_takes_the_place_of_another_figure_or_of_the_metadata(
    tmp_path: Path, files: dict[str, str], shown: dict[str, Any]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    own = {"path": dg.MetadataValue.text("model.bin"), "data_version": dg.MetadataValue.text("1")}
    state: Any = SimpleNamespace(outs=("model.bin",), version="1", metrics=(*files,), plots=())
    assert describe(tmp_path, state) == own | shown


def test_a_check_shows_a_value_that_is_not_finite(tmp_path: Path) -> None:
    state: Any = SimpleNamespace(meta={"checks": {"learned": "The loss falls."}}, report="m.json")
    [result] = DvcProject(tmp_path).check_results(
        "a", state, {"checks": {"learned": {"passed": False, "loss": math.nan}}}
    )
    assert result.metadata["loss"] == dg.MetadataValue.text("nan")


def test_the_docs_show_the_project_that_is_tested() -> None:
    assert f"```yaml\n{foreign_project.DVC_YAML}```" in (ROOT / "docs/dagster-dvc.md").read_text()


def test_the_library_has_no_stage_of_pedigree_and_uses_no_deprecated_api(
    foreign: Path, recwarn: pytest.WarningsRecorder
) -> None:
    build_dvc_definitions(foreign)
    assert not [
        str(warning.message)
        for warning in recwarn
        if "agster" in type(warning.message).__module__ + str(warning.message)
    ]
    for path in (ROOT / "dagster_project/orchestration/dagster_dvc").glob("*.py"):
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not texts & {*pipeline.STAGES}, path


def test_the_output_of_a_forced_run_is_read_after_another_one_that_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_project.orchestration.dagster_dvc import materialize

    log: list[str] = []
    asked: list[list[str]] = []
    snapshots: list[Any] = [
        SimpleNamespace(states={"a": SimpleNamespace(outs=["data/a"], version=version)}) for version in ("missing", "2")
    ]
    writers = ["process 7 (dvc)", ""]
    monkeypatch.setattr(materialize, "_read", lambda *_: snapshots.pop(0))
    monkeypatch.setattr(materialize.rwlock, "writer_of", lambda _, paths: asked.append([*paths]) or writers.pop(0))
    monkeypatch.setattr(materialize, "interrupt_if_canceled", lambda *_: None)
    context: Any = SimpleNamespace(log=SimpleNamespace(info=log.append), instance=None, run_id="")
    project: Any = SimpleNamespace(root=tmp_path)
    assert materialize._read_when_idle(context, project, "a", own=True).states["a"].version == "2"
    assert asked == [["data/a"], ["data/a"]] and log == ["a is waiting: process 7 (dvc) is writing its outputs"]
