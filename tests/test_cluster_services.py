"""Dagster on a real Postgres server: the same view as on disk, rebuilt after
the database is lost, and no password anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import small_pipeline
from builders.postgres import Postgres
from builders.servers import free_port
from builders.small_pipeline import PIPELINE, changed_in_dvc, materialize, not_fresh
from conftest import ROOT, run, shown_checks

from dagster_project.core.errors import InputError
from dagster_project.orchestration.dagster.assets import open_instance
from dagster_project.orchestration.dagster.home import home
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc.keys import asset_key
from dagster_project.orchestration.dvc import read_stages

ON_POSTGRES = ROOT / "deploy/dagster.yaml"


@pytest.fixture
def server(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Postgres:
    """A server with an empty database, whose address and password are in the environment."""
    postgres.renew()
    for name, value in postgres.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return postgres


def on_postgres(root: Path) -> Path:
    """Dagster's home of a project, with the documented dagster.yaml."""
    folder = root / ".dagster"
    folder.mkdir(exist_ok=True)
    shutil.copy(ON_POSTGRES, folder / "dagster.yaml")
    return folder


def versions_shown(root: Path, instance: Any) -> dict[str, str]:
    """The version of every asset's latest materialization, by address."""
    latest = {address: instance.get_latest_materialization_event(asset_key(address)) for address in read_stages(root)}
    return {address: event.asset_materialization.tags["dagster/data_version"] for address, event in latest.items()}


def files_with(text: str, folder: Path) -> list[Path]:
    """Files below a folder that contain a text."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    ]


@pytest.mark.long
def test_dagster_shows_the_same_on_postgres_and_no_password(
    root: Path, server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    on_postgres(root)
    (root / "code/tok.py").write_text("V = 2\n")
    with open_instance(root) as instance:
        assert type(instance.event_log_storage).__name__ == "PostgresEventLogStorage"
        assert type(instance.run_storage).__name__ == "PostgresRunStorage"
        sync(root, instance, PIPELINE)
        assert not_fresh(root, instance) == changed_in_dvc(root) == {"tok"}
        assert materialize(root, instance).success
        assert sync(root, instance, PIPELINE) == []
        assert not_fresh(root, instance) == changed_in_dvc(root) == set()
        assert versions_shown(root, instance) == {
            address: state.version for address, state in read_stages(root).items()
        }
        assert {status for checks in shown_checks(root, instance).values() for status in checks.values()} == {
            "SUCCEEDED"
        }
    assert server.query("SELECT count(*) FROM event_logs", "dagster")[0][0] > 0
    assert not (root / ".dagster/history").exists(), "nothing of the event log is on disk"
    assert server.password not in server.dump() + caplog.text
    assert files_with(server.password, root) == []
    assert files_with("PEDIGREE_PG_PASSWORD", root) == [root / ".dagster/dagster.yaml"], (
        "the search looks into the home, too"
    )


@pytest.mark.long
def test_a_lost_database_is_rebuilt_by_a_sync(root: Path, server: Postgres) -> None:
    on_postgres(root)
    with open_instance(root) as instance:
        assert materialize(root, instance).success
        before, checks = versions_shown(root, instance), shown_checks(root, instance)
    server.renew()
    with open_instance(root) as instance:
        assert instance.get_runs() == []
        assert len(sync(root, instance, PIPELINE)) >= len(before)
        assert versions_shown(root, instance) == before and shown_checks(root, instance) == checks
        assert not_fresh(root, instance) == set()
        assert sync(root, instance, PIPELINE) == []


@contextmanager
def ui(root: Path) -> Iterator[str]:
    """`pedigree ui` of a project: the address of its server."""
    port = free_port()
    command = [sys.executable, "-m", "dagster_project", "ui", "--port", str(port), "--pages-port", str(free_port())]
    environment = {**os.environ, "DAGSTER_HOME": str(root / ".dagster"), "PEDIGREE_PROJECT": str(root)}
    with (root / ".dagster/ui.log").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, (root / ".dagster/ui.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ask(url: str, query: str) -> Any:
    request = urllib.request.Request(
        f"{url}/graphql",
        json.dumps({"query": query}).encode(),
        {"Content-Type": "application/json", "User-Agent": "test"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


@pytest.mark.long
def test_the_ui_serves_a_project_whose_event_log_is_on_postgres_and_shows_no_password(
    project: Path, server: Postgres
) -> None:
    on_postgres(project)
    with ui(project) as url:
        shown = ask(url, "{ instance { info } assetNodes { assetKey { path } } }")
        assert {"splits", "release"} <= {node["assetKey"]["path"][-1] for node in shown["assetNodes"]}
        assert "local_artifact_storage" in shown["instance"]["info"] and server.password not in json.dumps(shown)
        end = time.monotonic() + 120
        while not server.query(
            "SELECT 1 FROM daemon_heartbeats LIMIT 1", "dagster"
        ):  # the daemon is a process of its own
            assert time.monotonic() < end, (project / ".dagster/ui.log").read_text()
            time.sleep(0.5)
    assert files_with(server.password, project) == [] and server.password not in server.dump()


# --- dagster.yaml of a user


def test_an_existing_dagster_yaml_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(root / ".dagster"))
    text = on_postgres(root).joinpath("dagster.yaml").read_bytes()
    for _ in range(2):
        assert (home(root) / "dagster.yaml").read_bytes() == text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("storage: [\n", "is not valid YAML (line 2)"),
        ("- storage\n", "is not a mapping"),
        ("storge: {}\n", "unexpected key storge"),
        (
            "storage: {postgres: {postgres_db: {hostname: h, username: u, password: hunter2, db_name: d, ports: 1}}}\n",
            "unexpected key ports",
        ),
        (
            "storage: {custom: {module: no_such_package.storage, class: X, config: {}}}\n",
            "needs the package no-such-package",
        ),
    ],
    ids=["syntax", "list", "key", "key of postgres", "package"],
)
def test_an_invalid_dagster_yaml_is_one_message(root: Path, text: str, what: str) -> None:
    (root / ".dagster").mkdir()
    (root / ".dagster/dagster.yaml").write_text(text)
    with pytest.raises(InputError) as refusal:
        open_instance(root)
    assert what in str(refusal.value) and str(root / ".dagster/dagster.yaml") in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.long
def test_a_command_names_the_missing_variables_and_the_server_that_does_not_answer(
    root: Path, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_postgres(root)
    sync_command = [sys.executable, "-m", "dagster_project", "sync"]
    wrong = {"PEDIGREE_PG_PASSWORD": "not-the-password"}
    for changes, what in (
        (wrong, "password authentication failed"),
        ({"PEDIGREE_PG_PORT": str(free_port())}, "Connection refused"),
    ):
        done = run(sync_command, root, **changes)
        assert (done.returncode, done.stdout) == (2, "") and what in done.stderr
        assert len(done.stderr.splitlines()) == 2, "an error and a hint"
        assert server.password not in done.stderr and wrong["PEDIGREE_PG_PASSWORD"] not in done.stderr
    for name in server.environment:
        monkeypatch.delenv(name)
    done = run(sync_command, root)
    assert done.returncode == 2 and all(name in done.stderr for name in server.environment)
    assert small_pipeline.git(root, "status", "--porcelain") == ""
