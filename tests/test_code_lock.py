"""In a project with an installed package, exactly the stages whose code changed
are stale after an upgrade, and no stage runs with unrecorded code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import grimp
import pytest
from builders.installed import edit, install, installed, pedigree_in, pretend_to_run, set_version
from builders.servers import Quiet, answering
from builders.small_pipeline import commit, git
from conftest import ROOT, run
from ruamel.yaml import YAML

from dagster_project import execution, pipeline
from dagster_project.commands.init import init
from dagster_project.commands.pipeline_file import pipeline_text
from dagster_project.commands.upgrade import results_since
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.layout import is_code
from dagster_project.lineage import code_lock
from dagster_project.lineage.code import code_in
from dagster_project.lineage.exports_in_place import IGNORE_LINES
from dagster_project.orchestration import dvc, dvc_cache
from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.erasure import plan as plans
from dagster_project.orchestration.executors.package import project_package
from dagster_project.orchestration.executors.ray import ClusterGone
from dagster_project.orchestration.run_stage import run_stage

ROWS = [{"instruction": f"Name number {i}.", "output": f"It is {i}, the one after {i - 1}."} for i in range(30)]
A_CHECK, A_VIEW = "curation/checks/content.py", "views/html.py"
USES_CHECKS = ["instructions", "preferences"]
UPSTREAM = ["base_model", "raw_examples", "raw_preferences"]


@pytest.fixture(scope="module")
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`site` with the package, version 1.0, and `project`, in which everything is up to date and committed."""
    base = tmp_path_factory.mktemp("installed")
    site, project = install(base / "site", "1.0"), base / "project"
    (base / "mine.json").write_text(json.dumps(ROWS))
    done = pedigree_in(site, base, "init", str(project), "--data", "mine.json", "--license", "MIT")
    assert done.returncode == 0, done.stderr
    pretend_to_run(project)
    commit(project)
    return base


@pytest.fixture
def site(_installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_installed / "site", tmp_path / "site"))


@pytest.fixture
def project(_installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_installed / "project", tmp_path / "project", symlinks=True))


def stale(project: Path) -> list[str]:
    """Stages that DVC itself calls changed."""
    return sorted(json.loads(run([sys.executable, "-m", "dvc", "status", "--json"], project).stdout))


def test_the_hash_of_a_stage_covers_every_module_that_it_imports() -> None:
    graph = grimp.build_graph("dagster_project", exclude_type_checking_imports=True, cache_dir=None)  # these never run
    for name, entries in code_lock.code_of_stages().items():
        hashed = {path.relative_to(ROOT).as_posix() for entry in entries for path in code_lock._files(ROOT / entry)}
        module = pipeline.module_of(name).__name__
        packages = {"dagster_project", *(m for m in graph.modules if graph.find_children(m))}
        imported = {f"{m.replace('.', '/')}.py" for m in (graph.find_upstream_modules(module) | {module}) - packages}
        assert imported <= hashed


def test_the_hashes_of_a_wheel_are_those_of_the_clone_that_it_was_built_from(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import json; from dagster_project.lineage import code_lock; print(json.dumps(code_lock.installed()))"
    done = installed(site, tmp_path, "-c", code)
    assert json.loads(done.stdout) == code_lock.installed(), done.stderr
    assert (site / "dagster_project" / "results_changelog.md").is_file()


def test_dvc_yaml_of_a_project_is_that_of_the_clone_with_an_entry_of_the_lock_instead_of_code() -> None:
    clone = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
    for name, body in clone["stages"].items():
        stage = body.get("do", body)
        stage["deps"] = [dep for dep in stage["deps"] if not is_code(dep)]
        if not stage["deps"]:
            del stage["deps"]
        stage["params"].append({"code.lock.yaml": [name]})
    assert YAML(typ="safe").load(pipeline_text()) == clone


def test_an_upgrade_in_which_only_a_view_changed_makes_nothing_stale(site: Path, project: Path) -> None:
    before = (project / "code.lock.yaml").read_text()
    edit(site, A_VIEW)
    assert pedigree_in(site, project, "run", "--all").returncode == 0, "nothing is refused, and nothing runs"
    set_version(site, "1.1")
    (project / ".dvcignore").write_text("*.swp\n")
    document = json.loads(pedigree_in(site, project, "upgrade", "--json").stdout)
    assert document["ignored"] == [*IGNORE_LINES] == (project / ".dvcignore").read_text().splitlines()[2:], (
        "those for exports are added"
    )
    assert (document["from"], document["to"]) == ("1.0", "1.1")
    assert document["changed"] == [] and document["stale"] == {} and document["results"] == {}
    assert stale(project) == []
    assert (project / "code.lock.yaml").read_text() == before.replace("version: '1.0'", "version: '1.1'")


def test_an_upgrade_in_which_a_check_changed_makes_the_stages_that_check_stale_and_what_follows(
    site: Path, project: Path
) -> None:
    edit(site, A_CHECK)
    set_version(site, "1.1")
    (site / "dagster_project/results_changelog.md").write_text("## 1.1\n\n- Fewer rows pass.\n\n## 1.0\n\n- Earlier.\n")
    assert stale(project) == []
    document = json.loads(pedigree_in(site, project, "upgrade", "--json").stdout)
    assert document["changed"] == USES_CHECKS
    assert document["current"] == UPSTREAM
    assert {name for name, why in document["stale"].items() if why == "its code changed"} == set(USES_CHECKS)
    assert (
        document["stale"]["splits"] == "it reads instructions"
        and document["stale"]["adapter@lora"] == "it reads tokenized"
    )
    assert document["results"] == {"1.1": ["Fewer rows pass."]}
    assert stale(project) == USES_CHECKS, "DVC: the others follow if the output of these changes"
    assert pedigree_in(site, project, "upgrade").stdout.count("its code changed") == 0, (
        "a second upgrade changes nothing"
    )


def test_other_code_than_recorded_is_refused_by_every_way_to_run_a_stage(site: Path, project: Path) -> None:
    edit(site, "curation/sources/formats.py")
    (project / "data/sources/mine.json").write_text(json.dumps(ROWS[1:]))
    for expected, done in (
        (2, pedigree_in(site, project, "run", "raw_examples")),
        (2, pedigree_in(site, project, "run", "--all")),
        (255, installed(site, project, "-m", "dvc", "repro", "raw_examples")),
    ):
        assert done.returncode == expected and "Traceback" not in done.stderr
        assert (
            "the installed code of raw_examples, instructions, splits" in done.stderr
            and "`pedigree upgrade`" in done.stderr
        )
    assert (project / "data/raw_examples/file.txt").is_file(), "the earlier output is kept"


@pytest.fixture
def other_code(project: Path) -> Path:
    """The project, if other code than the installed one had made raw_examples, and its source has changed since."""
    was = code_lock.read(project).stages["raw_examples"]
    for name in ("code.lock.yaml", "dvc.lock"):
        (project / name).write_text((project / name).read_text().replace(was, "0" * 64))
    (project / "data/sources/mine.json").write_text(json.dumps(ROWS[1:]))
    return project


OTHER_CODE = "the installed code of raw_examples is not that of code.lock.yaml"


def test_dagster_loads_with_a_warning_and_refuses_to_materialize_with_other_code(
    other_code: Path, instance: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lock = (other_code / "dvc.lock").read_bytes()
    definitions = build_definitions(other_code, whole_location=True)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert OTHER_CODE in warning and "`pedigree upgrade`" in warning
    done = definitions.resolve_job_def("data").execute_in_process(
        instance=instance, asset_selection=[asset_key("raw_examples")], raise_on_error=False
    )
    [failure] = [
        event.step_failure_data.user_failure_data.description for event in done.all_events if event.is_step_failure
    ]
    assert failure.startswith(OTHER_CODE) and "`pedigree upgrade`" in failure
    assert instance.get_latest_materialization_event(asset_key("raw_examples")) is None
    assert (other_code / "dvc.lock").read_bytes() == lock and (other_code / "data/raw_examples/file.txt").is_file()
    PedigreeProject(other_code).validate("raw_preferences", {})  # the code of other stages is the recorded one


def test_an_erasure_with_other_code_is_refused_before_the_rows_are_taken_out(other_code: Path) -> None:
    """Stages could not be made again without them."""
    with pytest.raises(InputError, match=OTHER_CODE):
        plans._refuse_outdated(other_code, dvc.read_stages(other_code))


class _Dashboard(Quiet):
    """Of a Ray cluster, as far as it is asked: which is counted."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(503)


def test_other_code_is_refused_before_a_stage_goes_to_a_cluster_and_by_its_worker(
    other_code: Path, site: Path, no_ray_token: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(_Dashboard) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv(execution.VARIABLE, "ray")
        with pytest.raises(InputError, match=OTHER_CODE):
            run_stage(other_code, "raw_examples")
        assert _Dashboard.asked == []
        code_lock.record(other_code, code_lock.installed(["raw_examples"]))
        with pytest.raises(ClusterGone):
            run_stage(other_code, "raw_examples")
        assert _Dashboard.asked, "with the recorded code, the cluster is asked"
    run(["git", "add", "-A"], other_code)
    edit(site, "stages/raw_examples.py")  # on the node
    with project_package(other_code, other_code.parent / "package") as package:
        shutil.copytree(package, other_code.parent / "node", symlinks=True)
    dvc_cache.isolate_project(other_code.parent / "node")
    done = pedigree_in_node(site, other_code.parent / "node")
    assert done.returncode == 2 and OTHER_CODE in done.stderr and "Traceback" not in done.stderr


def pedigree_in_node(site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The stage's command, as a worker of a cluster runs it."""
    return installed(
        site, folder, "-m", "dagster_project", "run", "raw_examples", **{execution.VARIABLE: execution.WORKER}
    )


def test_a_missing_or_damaged_lock_is_refused_and_upgrade_writes_it_again(site: Path, project: Path) -> None:
    lock = code_lock.read(project)
    for content, what in ((None, "is missing"), ("- a list\n", "is invalid"), ("a: {b: c}\n", "is invalid")):
        (project / "code.lock.yaml").unlink(missing_ok=True)
        if content:
            (project / "code.lock.yaml").write_text(content)
        with pytest.raises(InputError, match=f"code.lock.yaml {what}"):
            code_lock.refuse_other_code(project)
    assert pedigree_in(site, project, "upgrade").returncode == 0, "as the hint says"
    assert code_lock.read(project) == lock
    (project / "code.lock.yaml").unlink()
    assert pedigree_in(site, project, "upgrade").returncode == 0
    assert code_lock.read(project).stages == lock.stages


def test_an_empty_pipeline_is_not_up_to_date(site: Path, project: Path) -> None:
    (project / "dvc.yaml").write_text("")
    for command, message in (
        (["run", "--all"], "dvc.yaml has no stages"),
        (["upgrade"], "dvc.yaml does not name code.lock.yaml"),
    ):
        done = pedigree_in(site, project, *command)
        assert (
            done.returncode == 2
            and f"error: {message}\nhint: restore it with `git checkout HEAD dvc.yaml`" in done.stderr
        )


def test_a_clone_is_not_affected() -> None:
    assert not code_lock.is_used(ROOT)
    code_lock.refuse_other_code(ROOT)
    assert code_lock.recorded_in({"params": {"params.yaml": {"instructions": {}}}}) == {}


def test_dagster_loads_the_project_in_the_working_folder_although_the_package_is_elsewhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_project.orchestration.dagster.assets import project_root

    monkeypatch.delenv("PEDIGREE_PROJECT", raising=False)
    monkeypatch.chdir(project)
    assert project_root() == project
    monkeypatch.chdir(tmp_path)
    assert project_root() == ROOT, "the clone with this package"
    monkeypatch.setenv("PEDIGREE_PROJECT", str(project))
    assert project_root() == project


def test_parameters_and_code_of_one_stage_are_told_apart(project: Path) -> None:
    before = dvc.read_stages(project)
    params = project / "params.yaml"
    params.write_text(
        params.read_text().replace("instructions: {", "instructions: {min_response_tokens: 1, ").replace(", }", "}")
    )
    after = dvc.read_stages(project)
    assert [name for name in after if after[name].definition_now != before[name].definition_now] == ["instructions"]
    stamp = dvc.stamp(project, after)
    code_lock.record(project, {"splits": "0" * 64})
    assert dvc.stamp(project, after) != stamp, "a cached state is read again"
    last = dvc.read_stages(project)
    assert [name for name in last if last[name].definition_now != after[name].definition_now] == ["splits"]


def test_dvc_yaml_of_an_earlier_version_is_replaced_and_folders_that_it_lacked_are_made(
    site: Path, project: Path
) -> None:
    path, text = project / "dvc.yaml", pipeline_text()
    shutil.rmtree(folder := project / "data/sources/paraphrases")
    earlier = text.replace("deps: [data/sources/paraphrases, data/instructions]", "deps: [data/instructions]").replace(
        "Train, validation", "Train"
    )
    path.write_text(earlier)
    lock = code_lock.read(project)
    (project / "code.lock.yaml").write_text(replace(lock, pipeline=sha256_of_text(earlier)).text())
    document = json.loads(pedigree_in(site, project, "upgrade", "--json").stdout)
    assert path.read_text() == text and code_lock.read(project) == lock
    assert document["changed"] == [] and document["stale"]["splits"] == "its definition in dvc.yaml changed"
    assert {"base_model", "raw_examples", "instructions", "raw_preferences"} == set(document["current"])
    assert [file.name for file in folder.iterdir()] == [".gitkeep"], "DVC refuses a stage that reads a missing folder"


def test_an_edited_dvc_yaml_is_kept_and_named(site: Path, project: Path) -> None:
    path = project / "dvc.yaml"
    path.write_text(path.read_text().replace("stale_after_days: 7", "stale_after_days: 30"))
    edit(site, A_CHECK)
    document = json.loads(pedigree_in(site, project, "upgrade", "--json").stdout)
    assert document["edited"] == ["comparison"] and "stale_after_days: 30" in path.read_text()


def test_the_code_behind_an_output_is_its_entry_and_clean_if_the_commit_has_it(project: Path) -> None:
    sha = run(["git", "rev-parse", "HEAD"], project).stdout.strip()
    entry = YAML(typ="safe").load((project / "dvc.lock").read_text())["stages"]["splits"]
    recorded = entry["params"]["code.lock.yaml"]["splits"]
    assert code_in(project, sha, {"splits": entry})["splits"] == ({"code.lock.yaml:splits": recorded}, [])
    entry["params"]["code.lock.yaml"]["splits"] = "0" * 64
    assert code_in(project, sha, {"splits": entry})["splits"][1] == ["code.lock.yaml"]


def test_facts_about_code_name_the_version_that_has_it_also_from_history(project: Path) -> None:
    old = code_lock.read(project).stages["splits"]
    code_lock.record(project, {"splits": "1" * 64})
    commit(project)
    facts = code_lock.compare(project, {"splits": {"splits": old}, "other": {"splits": "2" * 64}})
    assert facts["stages"] == {
        "splits": {"sha256": old, "version": "1.0"},
        "other": {"sha256": "2" * 64, "version": None},
    }
    assert facts["differs"] == ["other"]
    assert "1.0, of unknown version; the installed code" in code_lock.as_text(
        facts
    ) and "differs for other" in code_lock.as_text(facts)


def test_a_version_is_known_from_other_branches_and_from_one_whose_merge_kept_another(tmp_path: Path) -> None:
    def record(value: str) -> None:
        (tmp_path / code_lock.FILE).write_text(code_lock.CodeLock(f"{value}.0", {"splits": value}).text())
        commit(tmp_path)

    git(tmp_path, "init", "-q", "-b", "main")
    record("1")
    for branch, value in (("merged", "2"), ("other", "3")):
        git(tmp_path, "checkout", "-q", "-b", branch, "main")
        record(value)
    git(tmp_path, "checkout", "-q", "main")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    git(tmp_path, "merge", "-q", "-s", "ours", "-m", "merge", "merged")
    git(tmp_path, "branch", "-D", "merged")
    git(tmp_path, "merge", "-q", "--no-commit", "-s", "ours", "other")
    record("5")  # a merge that has what neither side has
    record("1")
    git(tmp_path, "config", "log.follow", "true")  # with which git leaves out merges
    assert [code_lock.version_with(tmp_path, {"splits": value}) for value in "1235"] == ["1.0", "2.0", "3.0", "5.0"]
    assert code_lock.version_with(tmp_path, {"splits": "4"}) is None


def test_changes_in_results_are_those_after_the_recorded_version() -> None:
    text = (
        "## Unreleased\n\n- a\n  b\n\n## [1.2.0] - 2026-01-01\n\n- c\n\n## 1.10.0\n\n- d\n- e\n\n## First"
        " version\n\n- f\n"
    )
    assert results_since("1.1.0", text) == {"Unreleased": ["a b"], "1.2.0": ["c"], "1.10.0": ["d", "e"]}
    assert results_since("1.2.0", text) == {"Unreleased": ["a b"], "1.10.0": ["d", "e"]}
    assert results_since("unknown", text) == {"Unreleased": ["a b"]}


@pytest.mark.long
@pytest.mark.slow
def test_verify_runs_with_the_recorded_code_and_names_the_version_otherwise(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(ROWS))
    project = tmp_path / "real"
    init(project, [str(tmp_path / "mine.json")], None, "auto", "MIT")
    assert pedigree_in(site, project, "upgrade").returncode == 0  # records version 1.0
    done = installed(site, project, "-m", "dvc", "repro", "raw_examples")
    assert done.returncode == 0, done.stderr
    sha = commit(project)
    assert "raw_examples: identical" in pedigree_in(site, project, "verify", "raw_examples").stdout
    edit(site, "stages/raw_examples.py")
    set_version(site, "2.0")
    assert pedigree_in(site, project, "upgrade").returncode == 0
    commit(project)
    refused = pedigree_in(site, project, "verify", "raw_examples", "--rev", sha)
    assert refused.returncode == 2 and "raw_examples (pedigree-llm 1.0)" in refused.stderr
    assert "pip install pedigree-llm==1.0" in refused.stderr
    audited = json.loads(pedigree_in(site, project, "audit", "raw_examples", "--json").stdout)["code"]
    assert audited["package"]["stages"]["raw_examples"]["version"] == "1.0" and audited["package"]["installed"] == "2.0"
    assert audited["package"]["differs"] == ["raw_examples"] and audited["commit"] == sha and audited["clean"]
