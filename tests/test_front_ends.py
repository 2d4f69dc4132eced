"""One state, two front ends: Dagster shows what DVC ran, and DVC what Dagster ran."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from builders import small_pipeline
from builders.small_pipeline import changed_in_dvc, not_fresh
from conftest import dvc, edit_params, pedigree

from dagster_project.core.records import read_table
from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.metadata import describe, live
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dagster_dvc.metadata import FROZEN
from dagster_project.orchestration.dvc import read_stages
from dagster_project.orchestration.run_all import run_all
from dagster_project.orchestration.run_stage import run_stage
from dagster_project.pipeline import PEDIGREE

pytestmark = pytest.mark.usefixtures("warm_small")

DATA = ["base_model", "raw_examples", "instructions", "splits"]


def materialize(root: Path, instance: dg.DagsterInstance, *addresses: str, **options: Any) -> dg.ExecuteInProcessResult:
    job = build_definitions(root).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, asset_selection=[asset_key(a) for a in addresses], raise_on_error=False, **options
    )


def both_doors_agree(root: Path, instance: dg.DagsterInstance) -> set[str]:
    sync(root, instance)
    stale = not_fresh(root, instance, PEDIGREE)
    assert stale == changed_in_dvc(root)
    assert sync(root, instance) == [], "nothing was reported after `stale` was read"
    return stale


def test_after_dvc_repro_and_a_sync_dagster_shows_everything_fresh_with_the_hashes_on_disk(
    finished: Path, instance
) -> None:
    assert both_doors_agree(finished, instance) == set()
    lock = {address: state.version for address, state in read_stages(finished).items()}
    for address, version in lock.items():
        event = instance.get_latest_materialization_event(asset_key(address))
        assert event.asset_materialization.tags["dagster/data_version"] == version
        assert version in (finished / "dvc.lock").read_text()
    shown = instance.get_latest_materialization_event(asset_key("merged@lora")).asset_materialization.metadata
    assert shown["verify"].value == "pedigree verify merged@lora"
    assert shown["records"].value == len(
        {row["example_id"] for row in read_table(finished / "data/adapter/lora/examples.parquet")}
    )
    assert all(
        f"| {stage} | {lock[stage][:12]} |" in shown["lineage"].value for stage in [*DATA, "tokenized", "adapter@lora"]
    )
    assert shown["audit"].url.startswith("http://127.0.0.1:3100/merged/lora/audit.html?")
    assert lock["adapter@lora"] in (Path(shown["pages_folder"].path) / "audit.html").read_text()
    assert (
        "lineage" not in instance.get_latest_materialization_event(asset_key("splits")).asset_materialization.metadata
    )


def test_after_materializing_dvc_status_is_clean_and_a_second_run_runs_nothing(project: Path, instance) -> None:
    result = materialize(project, instance, *DATA)
    assert result.success
    assert not set(DATA) & changed_in_dvc(project)
    before = (project / "data" / "splits").stat().st_mtime_ns
    again = materialize(project, instance, *DATA)
    assert again.success and (project / "data" / "splits").stat().st_mtime_ns == before
    done = {
        event.asset_key.path[-1]: event.materialization.metadata["done"].value
        for event in again.get_asset_materialization_events()
    }
    assert done == dict.fromkeys(DATA, "nothing")


@pytest.mark.long
def test_force_runs_again_and_gives_the_same_version(finished: Path, synced_finished) -> None:
    version = read_stages(finished)["splits"].version
    result = materialize(finished, synced_finished, "splits", tags={"pedigree/force": "true"})
    events = result.get_asset_materialization_events()
    assert [event.materialization.metadata["done"].value for event in events] == ["run"]
    assert read_stages(finished)["splits"].version == version


@pytest.mark.parametrize(
    ("edit", "stale"),
    [
        (lambda root: edit_params(root, lambda v: v["splits"].update(test=0.3)), {"splits"}),
        (
            lambda root: (root / "dagster_project/curation/splitting/split.py").open("a").write("# a change\n"),
            {"splits", "preferences"},
        ),
        (
            lambda root: edit_params(root, lambda v: v["adapter"]["lora"].update(max_steps=9)),
            {"adapter@lora", "comparison"},
        ),
        (lambda root: shutil.rmtree(root / "data" / "instructions"), {"instructions", "splits"}),
        (
            lambda root: (root / "data/splits/train/records-00000.parquet").write_bytes(b"x"),
            {
                "splits",
                "tokenized",
                "preferences",
                "baselines",
                "evaluation@lora",
                "aligned@dpo",
                "evaluation_aligned@dpo",
                "comparison",
            },
        ),
    ],
    ids=["parameter", "code", "recipe", "deleted output", "tampered output"],
)
def test_a_change_makes_exactly_the_right_assets_stale(finished: Path, synced_finished, edit, stale) -> None:
    edit(finished)
    assert both_doors_agree(finished, synced_finished) == stale


def test_an_added_source_row_makes_the_readers_of_sources_stale_and_reverting_it_makes_it_fresh(
    finished: Path, synced_finished
) -> None:
    path = finished / "data/sources/replies_messages.jsonl"
    before = path.read_text()
    path.write_text(before + before.splitlines()[0] + "\n")
    assert both_doors_agree(finished, synced_finished) == {"raw_examples", "raw_preferences"}
    path.write_text(before)
    assert both_doors_agree(finished, synced_finished) == set()


@pytest.mark.long
def test_a_failed_gate_shows_its_rows_and_nothing_downstream_runs(project: Path, instance) -> None:
    edit_params(project, lambda v: v["instructions"].update(policy={"empty_response": "fail"}))
    rows = json.loads((project / "data/sources/triage_alpaca.json").read_text())
    (project / "data/sources/triage_alpaca.json").write_text(json.dumps([{**rows[0], "output": ""}, *rows[1:]]))
    result = materialize(project, instance, *DATA)
    assert not result.success
    failed = {
        e.check_name: e
        for e in result.get_asset_check_evaluations()
        if not e.passed and e.severity == dg.AssetCheckSeverity.ERROR
    }
    assert set(failed) == {"empty_response"}
    assert "triage_alpaca.json:0" in str(failed["empty_response"].metadata["rows"].value)
    assert "/instructions/report.html?" in failed["empty_response"].metadata["full report"].url
    assert "empty_response" in (project / "data/pages/instructions/report.html").read_text()
    assert not (project / "data" / "splits").exists() and not (project / "data" / "instructions").exists()
    assert [event.asset_key.path[-1] for event in result.get_asset_materialization_events()] == [
        "base_model",
        "raw_examples",
    ]
    assert both_doors_agree(project, instance) >= {"instructions", "splits"}


def test_an_asset_refuses_to_run_on_an_outdated_parent(finished: Path, synced_finished) -> None:
    edit_params(finished, lambda v: v["instructions"].update(min_rows=50))
    before = (finished / "dvc.lock").read_text()
    result = materialize(finished, synced_finished, "splits")
    assert not result.success
    assert (finished / "dvc.lock").read_text() == before and (finished / "data" / "splits" / "train").exists()


@pytest.mark.long
def test_deleting_dagsters_home_and_syncing_brings_the_view_back(finished: Path, synced_finished) -> None:
    assert sync(finished, synced_finished) == []
    shutil.rmtree(finished / ".dagster")
    assert "comparison is " in pedigree(finished, "sync").stdout
    assert "nothing to report" in pedigree(finished, "sync").stdout


def test_adding_a_variant_is_one_entry_in_params(finished: Path) -> None:
    edit_params(
        finished,
        lambda v: v["adapter"].update(
            small={"method": "lora", "peft": {"r": 4, "target_modules": "all-linear"}, "max_steps": 2}
        ),
    )
    keys = {key.to_user_string() for key in build_definitions(finished).resolve_asset_graph().get_all_asset_keys()}
    assert {"adapter/small", "merged/small", "evaluation/small"} <= keys
    assert changed_in_dvc(finished) == {"adapter@small", "merged@small", "evaluation@small", "comparison"}


def test_variants_with_a_hyphen_in_their_name_have_jobs(tmp_path: Path) -> None:
    root = small_pipeline.make_project(
        tmp_path, {"minlen": 1, "testseed": 7, "variants": {"lora-small": {"r": 8}, "dora": {"r": 16}}}
    )
    jobs = {job.name: job for job in build_definitions(root, small_pipeline.PIPELINE).resolve_all_job_defs()}
    assert {"variant_lora_small", "variant_dora"} <= jobs.keys()
    assert jobs["variant_lora_small"].asset_layer.selected_asset_keys == {asset_key("adapter@lora-small")}


def test_dvc_and_dagster_show_the_comparison_scores_and_the_release_lists_its_waivers(finished: Path) -> None:
    states = read_stages(finished)
    scores = json.loads((finished / "data/comparison/comparison.json").read_text())["scores"]
    shown = json.loads(dvc(finished, "metrics", "show", "--json", "data/reports/comparison.json").stdout)
    assert (
        shown[""]["data"]["data/reports/comparison.json"]["data"]["scores"]["lora"]["macro_f1"]
        == scores["lora"]["macro_f1"]
    )
    plot = json.loads(dvc(finished, "plots", "show", "--json", "data/plots/scores.csv").stdout)["data"][
        "data/plots/scores.csv"
    ]
    assert {row["system"] for row in plot[0]["content"]["data"]["values"]} == set(scores)
    assert "/comparison/comparison.html?" in describe(finished, states["comparison"])["comparison"].url
    assert (finished / "data/pages/comparison/comparison.html").is_file()
    released = json.loads((finished / states["release"].report).read_text())
    assert released["checks"]["loads_in_transformers"]["passed"] and released["variant"] == "lora"
    assert released["waived"] == [name for name, check in released["checks"].items() if not check["passed"]]


def described(root: Path, address: str, files: Mapping[str, str]) -> Mapping[str, Any]:
    """What Dagster shows of a stage that has written these files."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text(text)
    report, out = "data/reports/a.json", "data/a"
    state = SimpleNamespace(
        report=report, out=out, version="v", address=address, meta={}, recorded=True, output_problem=""
    )
    return describe(root, state)  # type: ignore[arg-type]


def test_dagster_shows_mappings_and_lists_of_a_report_as_tables_and_texts(tmp_path: Path) -> None:
    report = {
        "accuracy": 0.5,
        "accuracy_interval": [0.25, 0.75],
        "losses": [1.5, 0.5],
        "advice": ["Use a.", "Not b."],
        "waived": [],
        "pairs": {"train": 1234567, "cuda": None, "sure": True},
        "by_category": {"a|b": {"n": 2, "share": 0.5}, "c": {"n": 3, "hash": "0a" * 32}},
        "sources": {"a": {"rows": 3, "fields": {"used": {"x": 1, "y": 2}}}, "b": {"rows": 4}},
        "deep": {"a": {"b": {"c": {"interval": [1, 2]}}}, "d": 1, "d_interval": [0, 2]},
    }
    found = described(tmp_path, "adapter@x", {"data/reports/a.json": json.dumps(report)})
    shown = {
        name: value.md_str.split("\n") for name, value in found.items() if isinstance(value, dg.MarkdownMetadataValue)
    }
    assert shown == {
        "intervals": ["| figure | value | 95 % interval |", "| --- | --- | --- |", "| accuracy | 0.5 | 0.25 to 0.75 |"],
        "advice": ["- Use a.", "- Not b."],
        "pairs": [
            "| figure | value |", "| --- | --- |", "| train | 1,234,567 |", "| cuda |  |", "| sure | true |",
        ],
        "by_category": [
            "|  | n | share | hash |", "| --- | --- | --- | --- |",
            r"| a\|b | 2 | 0.5 |  |", f"| c | 3 |  | {'0a' * 8} |",
        ],
        "sources": [
            "| figure | value |", "| --- | --- |",
            "| a / rows | 3 |", "| a / fields | used: x 1, y 2 |", "| b | rows 4 |",
        ],
        "deep": [
            "| figure | value | 95 % interval |", "| --- | --- | --- |",
            "| a / b | c: interval 1 to 2 |  |", "| d | 1 | 0 to 2 |",
        ],
    }  # fmt: skip
    assert (found["losses"].text, found["waived"].text, found["accuracy"]) == ("1.5, 0.5", "none", 0.5)
    assert not any(isinstance(value, dg.JsonMetadataValue) for value in found.values())


def test_dagster_shows_links_and_results_before_hashes_and_the_counts_of_checks(tmp_path: Path) -> None:
    (tmp_path / "data/pages/instructions").mkdir(parents=True)
    (tmp_path / "data/pages/instructions/report.html").write_text("page")
    check = {"passed": True, "severity": "info", "count": 0}
    report = {"output_sha256": "0" * 64, "rows_in": 2, "rows_out": 1, "share": 0.5, "checks": {"a": check}}
    names = [*described(tmp_path, "instructions", {"data/reports/a.json": json.dumps(report)})]
    first = ["report", "rows_in", "rows_out", "share"]
    assert names == [*first, "path", "data_version", "output_sha256", "pages_folder", "check/a"]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_curves_are_narrow_enough_for_dagsters_dialog(count: int, tmp_path: Path) -> None:
    """The dialog is 1,280 pixels wide, with margins of 20 pixels, and does not scroll."""
    row = {"step": "1", **{f"figure_{n}": "0.5" for n in range(count)}}
    files = {"data/plots/loss/x.csv": f"{','.join(row)}\n{','.join(row.values())}\n"}
    shown = described(tmp_path, "adapter@x", files)["loss"].md_str
    header = base64.b64decode(shown.partition("base64,")[2].removesuffix(")"))[:24]
    assert header[1:4] == b"PNG" and int.from_bytes(header[16:20], "big") <= 1240


def test_dagster_shows_the_last_loss_of_a_training_and_its_curves(tmp_path: Path) -> None:
    files = {"data/reports/a.json": '{"loss": 0.7}', "data/plots/loss/x.csv": "step,loss\n1,0.9\n2,0.7\n"}
    found = described(tmp_path, "adapter@x", files)
    assert found["loss"] == 0.7 and found["loss_curves"].md_str.startswith("![loss](data:image/png;base64,")


@pytest.mark.parametrize("text", ["", "st", "step,loss\n", "step,loss\n1,0.5\n2", "step,loss\n1,0.5\n2,"])
def test_a_table_that_is_being_written_does_not_end_the_run_that_shows_it(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "data" / "live" / "adapter" / "lora"
    folder.mkdir(parents=True)
    (folder / "loss.csv").write_text(text)
    (folder / "speed.csv").write_text("step,speed\n3,7\n")
    assert live(tmp_path, "adapter@lora") == {"step": 3, "speed": 7.0}


def test_dagster_shows_the_curves_of_an_alignment_and_a_link_to_its_page(tmp_path: Path) -> None:
    files = {
        "data/reports/a.json": "{}",
        "data/plots/alignment/x.csv": "step,reward\n1,0.5\n2,0.7\n",
        "data/pages/aligned/x/alignment.html": "page",
    }
    found = described(tmp_path, "aligned@x", files)
    assert "/aligned/x/alignment.html?" in found["alignment"].url
    assert found["alignment_curves"].md_str.startswith("![alignment](data:image/png;base64,")


def test_groups_follow_the_flow_and_each_variant_has_one_that_names_stage_and_variant(finished: Path) -> None:
    states = read_stages(finished)
    graph = build_definitions(finished).resolve_asset_graph()
    group = {address: graph.get(asset_key(address)).group_name for address in states}
    assert group["adapter@lora"] == "3_training/adapter_lora" and group["merged@lora"] == "3_training/merged_lora"
    assert asset_key("adapter@lora").path == ["adapter", "lora"]
    for address, state in states.items():
        for i in state.inputs:
            above = (
                group[i.producer] if i.producer else graph.get(PedigreeProject(finished).source_key(i.path)).group_name
            )
            assert above.partition("/")[0] <= group[address].partition("/")[0], f"{i.path} -> {address}"


def test_metadata_of_a_materialization_hides_none_of_its_asset(root: Path) -> None:
    """Dagster's page of an asset shows one entry of each name, that of the materialization."""
    graph = build_definitions(root, small_pipeline.PIPELINE).resolve_asset_graph()
    state = read_stages(root)["adapter@lora"]
    (root / "data/pages/adapter/lora").mkdir(parents=True, exist_ok=True)
    of_asset, made = graph.get(asset_key("adapter@lora")).metadata, describe(root, state)
    assert of_asset["pages"].value.startswith("http://127.0.0.1:") and made["pages_folder"].path
    assert not of_asset.keys() & made.keys()


def test_definitions_are_hidden_in_graph_and_catalog(finished: Path) -> None:
    graph = build_definitions(finished).resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        hidden = "dagster/auto_created_stub_asset" in graph.get(key).metadata
        assert hidden == (key.path[0] == "def"), key
        assert not hidden or graph.get(key).is_external


def test_every_stage_has_a_result_for_each_check_that_dagster_requires(finished: Path) -> None:
    project = PedigreeProject(finished)
    for address, state in project.load().items():
        report = json.loads((finished / str(state.report)).read_text())
        found = [one.check_name for one in project.check_results(address, state, report)]
        assert sorted(found) == sorted(project.check_descriptions(address, state)), address
        first = [*report.get("checks", {}).items()][:1]
        blocked = {"passed": False, "checks": {name: {**check, "passed": False} for name, check in first}}
        assert [one.check_name for one in project.check_results(address, state, blocked)] == [*blocked["checks"]]


@pytest.mark.long
def test_a_training_on_pairs_is_materialized_although_some_checks_are_for_online_methods(
    finished: Path, synced_finished: Any
) -> None:
    done = materialize(finished, synced_finished, "aligned@dpo", tags={"pedigree/force": "true"})
    assert done.success


def test_a_metric_named_passed_of_a_stage_of_the_users_own_fails_no_run(root: Path, synced: dg.DagsterInstance) -> None:
    text = json.loads((root / "dvc.yaml").read_text())
    command = """echo '{"passed": false, "score": 3}' > own.json"""
    text["stages"]["own"] = {"cmd": command, "deps": ["data/tok"], "metrics": [{"own.json": {"cache": False}}]}
    (root / "dvc.yaml").write_text(json.dumps(text))
    done = small_pipeline.materialize(root, synced, ["own"])
    assert done.success and "own" not in changed_in_dvc(root)
    [made] = done.asset_materializations_for_node("own")
    assert made.metadata["passed"].value is False and made.metadata["score"].value == 3


def test_outputs_of_a_removed_variant_are_named_until_they_are_removed(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another clone does not have them, so there `cmp`, which reads the folder, would be changed."""
    edit_params(root, lambda values: values["variants"].pop("dora"))
    run_stage(root, "cmp", small_pipeline.PIPELINE)
    [line] = caplog.messages
    assert line.startswith("cmp reads a folder with outputs of stages that dvc.yaml no longer has") and line.endswith(
        "rm -r data/adapter/dora"
    )
    shutil.rmtree(root / "data/adapter/dora")
    assert dvc(root, "repro", "-q").returncode == 0
    caplog.clear()
    run_stage(root, "cmp", small_pipeline.PIPELINE)
    assert caplog.messages == []
    small_pipeline.commit(root, "removed")
    clone = root.parent / "clone"
    small_pipeline.git(root.parent, "clone", "-q", str(root), str(clone))
    shutil.copytree(root / ".dvc" / "cache", clone / ".dvc" / "cache")
    assert dvc(clone, "checkout", "-q").returncode == 0
    assert changed_in_dvc(clone) == set()


def test_a_frozen_stage_is_never_recorded_with_inputs_that_it_did_not_read(
    root: Path, instance: dg.DagsterInstance
) -> None:
    before = (root / "dvc.lock").read_text()
    assert dvc(root, "freeze", "tok").returncode == 0
    (root / "code/tok.py").write_text("V = 9\n")
    job = build_definitions(root, small_pipeline.PIPELINE).resolve_implicit_global_asset_job_def()

    def materialize_tok() -> dg.ExecuteInProcessResult:
        tags = {"pedigree/force": "true"}
        return job.execute_in_process(
            instance=instance, asset_selection=[asset_key("tok")], raise_on_error=False, tags=tags
        )

    [event] = materialize_tok().get_asset_materialization_events()
    assert event.materialization.metadata["done"].value == "nothing"
    document = run_all(root, 1, True, lambda _: None, only=["tok"])
    assert document["passed"] and document["stages"]["tok"]["outcome"] == "up to date"
    assert (root / "dvc.lock").read_text() == before, "it has not read the new code"
    key = dg.AssetCheckKey(asset_key("tok"), "dvc_in_sync")
    record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    assert record.event.dagster_event.event_specific_data.metadata["note"].value == FROZEN

    shutil.rmtree(root / "data/tok")
    what = (
        "tok is frozen, so it is not run, but data/tok differs from dvc.lock (deleted); `dvc checkout --force data/tok`"
        " restores it, or remove"
    )
    assert what in str(materialize_tok().failure_data_for_node("tok").user_failure_data.description)
    document = run_all(root, 1, False, lambda _: None)
    assert document["stages"]["tok"]["error"].startswith(what) and document["stages"]["cmp"]["outcome"] == "not started"
    assert (root / "dvc.lock").read_text() == before
    (root / "data/reports/tok.json").unlink()
    assert dvc(root, "checkout", "data/tok").returncode == 0
    assert "`git checkout HEAD data/reports/tok.json` restores it" in read_stages(root)["tok"].frozen_problem


def test_what_is_above_a_frozen_stage_need_not_be_there_for_what_is_below(
    root: Path, instance: dg.DagsterInstance
) -> None:
    assert dvc(root, "freeze", "raw").returncode == 0
    (root / "data/sources/d.txt").unlink()
    (root / "code/inst.py").write_text("V = 9\n")
    assert small_pipeline.materialize(root, instance, ["raw", "inst"]).success, "`dvc repro inst` runs, too"
    assert run_all(root, 1, False, lambda _: None, only=["raw", "inst", "tok"])["passed"]
    assert not {"inst", "tok"} & changed_in_dvc(root)


def test_an_added_or_removed_variant_is_not_reported_as_a_run_of_what_reads_all_variants(
    root: Path, synced: dg.DagsterInstance
) -> None:
    before = json.loads((root / "params.yaml").read_text())["variants"]
    for variants in (before | {"x": {"r": 4}}, before, {"lora": before["lora"]}, before):
        edit_params(root, lambda values: values.update(variants=variants))  # noqa: B023
        lines = sync(root, synced, small_pipeline.PIPELINE)
        assert not [line for line in lines if line.startswith(("cmp is ", "adapter@x is "))]
        assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root)


def test_the_catalog_has_no_definition_of_a_variant_that_was_removed(root: Path, synced: dg.DagsterInstance) -> None:
    theirs = dg.AssetKey(["def", "adapter", "theirs"])
    synced.report_runless_asset_event(dg.AssetMaterialization(theirs, tags={"dagster/data_version": "1"}))
    values = json.loads((root / "params.yaml").read_text())
    edit_params(root, lambda values: values["variants"].pop("dora"))
    assert "def/adapter/dora was removed" in sync(root, synced, small_pipeline.PIPELINE)
    definitions = {key for key in synced.get_asset_keys() if key.path[0] == "def"}
    assert definitions == {dg.AssetKey(["def", *address.split("@")]) for address in read_stages(root)} | {theirs}
    assert synced.get_latest_materialization_event(asset_key("adapter@dora")), "what was made stays"
    assert sync(root, synced, small_pipeline.PIPELINE) == []
    assert not_fresh(root, synced) == changed_in_dvc(root)
    (root / "params.yaml").write_text(json.dumps(values))
    assert any(line.startswith("def/adapter/dora is ") for line in sync(root, synced, small_pipeline.PIPELINE))
    assert not_fresh(root, synced) == changed_in_dvc(root) == set()
    assert sync(root, synced, small_pipeline.PIPELINE) == []


def test_a_variant_that_runs_alone_is_not_reported_as_a_run_of_what_reads_all_variants(
    root: Path, synced: dg.DagsterInstance
) -> None:
    """`cmp` reads the folder of all variants, of which dvc.lock has one hash."""
    for version, address in ((5, "adapter@lora"), (6, "adapter@dora")):
        (root / "code/adapter.py").write_text(f"V = {version}\n")
        assert dvc(root, "repro", "--single-item", address).returncode == 0
        assert not [line for line in sync(root, synced, small_pipeline.PIPELINE) if line.startswith("cmp is ")]
        assert "cmp" in not_fresh(root, synced) == changed_in_dvc(root)
    assert dvc(root, "repro").returncode == 0
    assert [
        line.split()[0]
        for line in sync(root, synced, small_pipeline.PIPELINE)
        if line.startswith(("cmp is ", "adapter"))
    ].count("cmp") == 1
    assert not_fresh(root, synced) == changed_in_dvc(root) == set()


def test_figures_of_another_version_are_not_shown_with_an_output_that_differs(
    root: Path, synced: dg.DagsterInstance
) -> None:
    """After `git checkout` without `dvc checkout`, report and dvc.lock are of another version than the output."""

    def shown() -> dict[str, Any]:
        sync(root, synced, small_pipeline.PIPELINE)
        event = synced.get_latest_materialization_event(asset_key("raw"))
        return {name: value.value for name, value in event.asset_materialization.metadata.items()}

    before = shown()
    (root / "data/sources/g.txt").write_text("r0\nr1\nr2")
    assert dvc(root, "repro").returncode == 0
    commit = small_pipeline.commit(root)
    after = shown()
    assert (before["rows_out"], after["rows_out"], after["git_commit"]) == (2, 4, commit)
    small_pipeline.git(root, "checkout", "-q", "HEAD~1")
    assert shown() == {"path": "data/raw", "data_version": after["data_version"]}
    assert dvc(root, "checkout").returncode == 0
    assert shown() == before


def test_checks_of_another_version_are_not_those_of_an_output_that_differs(
    root: Path, synced: dg.DagsterInstance
) -> None:
    """As figures. The report that git checked out says nothing of the output that is still there."""

    def reported() -> list[str]:
        return [line for line in sync(root, synced, small_pipeline.PIPELINE) if "inst no_bad_rows" in line]

    (root / "data/sources/g.txt").write_text("r0\nr1\nr2")
    assert dvc(root, "repro").returncode == 0
    assert reported() == ["check inst no_bad_rows: passed"]
    small_pipeline.commit(root)
    small_pipeline.git(root, "checkout", "-q", "HEAD~1")
    assert read_stages(root)["inst"].report_of_other and reported() == []
    assert dvc(root, "checkout").returncode == 0
    assert reported() == ["check inst no_bad_rows: passed"]
    shutil.rmtree(root / "data/inst")
    assert reported() == [], "there is no output"
    (root / "data/sources/g.txt").write_text("BAD")
    assert dvc(root, "repro").returncode
    assert reported() == ["check inst no_bad_rows: failed"], "of the attempt that just failed"
