"""A sync with nothing to report needs neither Dagster nor DVC, and everything that a sync could report is seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from builders import small_pipeline
from conftest import ROOT, run

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


def commit(root: Path, _: dg.DagsterInstance) -> None:
    small_pipeline.git(root, "commit", "-q", "--allow-empty", "-m", "another")


def report_event(_: Path, instance: dg.DagsterInstance) -> None:
    instance.report_runless_asset_event(dg.AssetMaterialization(dg.AssetKey("tok"), tags={"dagster/data_version": "another"}))


def wipe(_: Path, instance: dg.DagsterInstance) -> None:
    instance.wipe_assets([dg.AssetKey("tok")])


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
    "an event log that is not in files": edit(".dagster/dagster.yaml", "storage: {postgres: {}}\n"),
    "the state itself": edit(str(FILE), "[]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    sync_until_unchanged(root, synced)
    CHANGES[name](root, synced)
    assert not unchanged(root)


def test_a_state_is_of_one_home_and_one_prefix(
    root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    sync_until_unchanged(root, synced)
    assert not LastSync.read(root, ("ml",)).unchanged
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert not unchanged(root)


def test_nothing_is_remembered_while_a_run_could_end(root: Path, synced: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    synced.add_run(dg.DagsterRun(job_name="pipeline", run_id="0" * 32, status=dg.DagsterRunStatus.STARTED))
    for _ in range(3):
        sync_after(LastSync.read(root, ()), synced, small_pipeline.PIPELINE)
    assert not unchanged(root)


def test_a_repeated_sync_loads_neither_dagster_nor_dvc(project: Path, tmp_path: Path) -> None:
    log = tmp_path / "loaded.jsonl"
    for _ in range(4):  # one reports the sources, one has nothing to report, one reads the same files
        done = run([sys.executable, "-m", "dagster_project", "sync"], project, PYTHONPATH=str(HOOK), LOADED_MODULES=str(log))
        assert done.returncode == 0, done.stderr
    last = json.loads(log.read_text().splitlines()[-1])
    assert not {"dagster", "dvc", "sqlalchemy"} & {*last["modules"]}
    assert done.stdout == "Dagster and DVC agree: nothing to report.\n"
