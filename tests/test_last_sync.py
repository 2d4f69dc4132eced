"""A sync with nothing to report needs neither Dagster nor DVC, and everything that a sync could report is seen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
from builders import small_pipeline
from conftest import ROOT, run
from dagster._daemon.types import DaemonHeartbeat

from dagster_project.orchestration import dvc, last_sync
from dagster_project.orchestration.dagster.sync import sync_after
from dagster_project.orchestration.last_sync import FILE, LastSync

HOOK = ROOT / "tests" / "builders" / "loaded_modules"


def unchanged(root: Path) -> bool:
    return LastSync.read(root, ()).unchanged


def sync_until_unchanged(root: Path, instance: dg.DagsterInstance) -> None:
    for _ in range(4):
        if unchanged(root):
            return
        sync_after(LastSync.read(root, ()), instance, small_pipeline.PIPELINE)
    assert unchanged(root)


def edit(path: str, text: str) -> Callable[[Path, dg.DagsterInstance], None]:
    def change(root: Path, _: dg.DagsterInstance) -> None:
        (root / path).write_text(text)

    return change


def replace_output(root: Path, _: dg.DagsterInstance) -> None:
    output = next(path for path in sorted((root / "data" / "tok").rglob("*")) if path.is_file())
    content = output.read_bytes()
    output.unlink()  # it may be a link into the cache
    output.write_bytes(content + b"x")


def remove_output(root: Path, _: dg.DagsterInstance) -> None:
    next(path for path in sorted((root / "data" / "tok").rglob("*")) if path.is_file()).unlink()


def remove_object(root: Path, _: dg.DagsterInstance) -> None:
    version = dvc.read_stages(root)["tok"].version
    (root / ".dvc/cache/files/md5" / version[:2] / version[2:]).unlink()
    assert not dvc.read_stages(root)["tok"].in_cache


def commit(root: Path, _: dg.DagsterInstance) -> None:
    small_pipeline.git(root, "commit", "-q", "--allow-empty", "-m", "another")


def report_event(_: Path, instance: dg.DagsterInstance) -> None:
    instance.report_runless_asset_event(
        dg.AssetMaterialization(dg.AssetKey("tok"), tags={"dagster/data_version": "another"})
    )


def wipe(_: Path, instance: dg.DagsterInstance) -> None:
    instance.wipe_assets([dg.AssetKey("tok")])


def start_run(_: Path, instance: dg.DagsterInstance) -> None:
    instance.add_run(dg.DagsterRun(job_name="pipeline", run_id="1" * 32, status=dg.DagsterRunStatus.STARTED))


CHANGES = {
    "a source": edit("data/sources/g.txt", "r0\nr1"),
    "params.yaml": edit("params.yaml", "{}"),
    "code": edit("code/tok.py", "another"),
    "dvc.lock": edit("dvc.lock", ""),
    "an output": replace_output,
    "a removed output": remove_output,
    "a commit": commit,
    "an event in Dagster": report_event,
    "an asset wiped in Dagster": wipe,
    "a run": start_run,
    "a database of runs that cannot be read": edit(".dagster/history/runs.db", "not a database"),
    "an event log that is not in files": edit(".dagster/dagster.yaml", "storage: {postgres: {}}\n"),
    "the state itself": edit(str(FILE), "[]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    sync_until_unchanged(root, synced)
    CHANGES[name](root, synced)
    assert not unchanged(root)


def test_everything_else_that_dvc_reads_is_seen(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    declared = json.loads((root / "dvc.yaml").read_text())
    declared["stages"]["raw"]["params"] = [*declared["stages"]["raw"].get("params", []), {"other.yaml": ["size"]}]
    (root / "dvc.yaml").write_text(json.dumps({**declared, "vars": ["variables.yaml"]}))
    (root / "variables.yaml").write_text("word: one\n")
    (root / "other.yaml").write_text("size: 1\n")
    sync_until_unchanged(root, synced)
    before = LastSync.read(root, ()).now
    remove_object(root, synced)
    for path, text in {
        "the object": "",
        "variables.yaml": "word: another\n",
        "other.yaml": "size: 2\n",
        "data/sources.dvc": "outs: []\n",
        "data/.dvcignore": "sources\n",
        ".dvc/config.local": "[core]\n    analytics = false\n",
    }.items():
        if path != "the object":
            (root / path).write_text(text)
        now = LastSync.read(root, ()).now
        assert now is not None and now != before, path
        before = now
    (root / ".dvc/config.local").write_text("[cache]\n    dir = ../../cache\n")
    assert LastSync.read(root, ()).now is None, "objects of another cache are not looked at"


def test_a_state_is_of_one_home_and_one_prefix(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    sync_until_unchanged(root, synced)
    assert not LastSync.read(root, ("ml",)).unchanged
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert not unchanged(root)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a project, with a remembered state."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for folder in (".git", ".dagster/history", "data/sources", "home"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".dagster/dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    remember(tmp_path, "data/sources")
    assert unchanged(tmp_path)
    return tmp_path


def remember(root: Path, *paths: str) -> None:
    for _ in range(2):
        LastSync.read(root, ()).remember(paths)


@pytest.mark.parametrize("address", ["http://host/a", "https://host/a", "s3://bucket/a"])
def test_a_project_that_reads_an_address_is_read_again_each_time(known: Path, address: str) -> None:
    remember(known, "data/sources", address)
    assert not unchanged(known)


def test_settings_of_the_user_and_other_libraries_are_seen(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (known / "home/dvc").mkdir()
    (known / "home/dvc/config").write_text("[core]\n")
    assert not unchanged(known)
    remember(known, "data/sources")
    assert unchanged(known)
    monkeypatch.setattr(last_sync, "find_spec", lambda name: SimpleNamespace(origin=known / ".dagster/dagster.yaml"))
    assert not unchanged(known)


@pytest.mark.parametrize(
    "content",
    [
        *(
            '{"paths": ["a\\u0000b"], "state": "x"}',
            '{"paths": ["\\ud800"], "state": "x"}',
            "[" * 100_000,
            '{"paths": ["%s"]}' % ("x" * 5000),
        ),
        *('{"paths": ["data/sources/loop"]}', "[]", "{", '{"paths": [1]}'),
    ],
    ids=range(8),
)
def test_a_damaged_state_counts_as_none(known: Path, content: str) -> None:
    (known / "data/sources/loop").symlink_to("loop")
    (known / FILE).write_text(content)
    assert not unchanged(known)


def test_a_file_in_the_place_of_a_folder_is_seen(known: Path) -> None:
    (known / "data/sources").rmdir()
    (known / "data").rmdir()
    (known / "data").write_text("a file")
    assert not unchanged(known)


def test_nothing_is_remembered_while_a_run_could_end(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    synced.add_run(dg.DagsterRun(job_name="pipeline", run_id="0" * 32, status=dg.DagsterRunStatus.STARTED))
    for _ in range(3):
        sync_after(LastSync.read(root, ()), synced, small_pipeline.PIPELINE)
    assert not unchanged(root)


def test_a_run_that_ends_is_a_change_and_a_heartbeat_is_not(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    synced.add_run(dg.DagsterRun(job_name="pipeline", run_id="0" * 32, status=dg.DagsterRunStatus.CANCELED))
    sync_until_unchanged(root, synced)
    before = (root / ".dagster/history/runs.db").read_bytes()
    synced.add_daemon_heartbeat(DaemonHeartbeat(time.time(), "SENSOR", "an id", []))
    assert (root / ".dagster/history/runs.db").read_bytes() != before
    assert unchanged(root)
    synced.run_storage.handle_run_event("0" * 32, dg.DagsterEvent(dg.DagsterEventType.RUN_FAILURE.value, "pipeline"))
    assert not unchanged(root)


@pytest.mark.long
def test_a_repeated_sync_loads_neither_dagster_nor_dvc(project: Path, tmp_path: Path) -> None:
    log = tmp_path / "loaded.jsonl"
    for _ in range(4):  # one reports the sources, one has nothing to report, one reads the same files
        done = run(
            [sys.executable, "-m", "dagster_project", "sync"], project, PYTHONPATH=str(HOOK), LOADED_MODULES=str(log)
        )
        assert done.returncode == 0, done.stderr
    last = json.loads(log.read_text().splitlines()[-1])
    assert not {"dagster", "dvc", "sqlalchemy"} & {*last["modules"]}
    assert done.stdout == "Dagster and DVC agree: nothing to report.\n"
    ui = (
        "import sys; from pathlib import Path; from dagster_project.orchestration.dagster import ui;"
        " ui.sync_if_changed(Path.cwd())"
    )
    code = f"{ui}; print({{'dagster', 'dvc', 'sqlalchemy'}} & {{*sys.modules}})"
    assert run([sys.executable, "-c", code], project).stdout == "set()\n", "nor does the UI, before it starts Dagster"
