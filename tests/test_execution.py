"""Section `execution`: it is part of no stage's identity, and bad values are
refused before anything runs. Files and objects that a worker gets."""

from __future__ import annotations

import ast
import json
import os
import platform
import posixpath
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders import small_pipeline
from builders.cluster import add_remote
from builders.full_remote import BUCKET_QUOTA, DISK, NO_BLOCKS, POLICY, QUOTA, VOLUMES, full_remote
from builders.relay import Relay
from builders.s3 import BUCKET, S3Server
from builders.small_pipeline import PIPELINE, git
from builders.training import run_in_child
from conftest import dvc, tool

from dagster_project import execution
from dagster_project.core.context import StageContext
from dagster_project.core.errors import CheckFailed, InputError, PedigreeError
from dagster_project.core.hashing import md5_of_bytes
from dagster_project.core.layout import pages_of, report_of
from dagster_project.core.records import remove
from dagster_project.execution import Execution, Placement, placement
from dagster_project.orchestration import dvc_cache
from dagster_project.orchestration.dvc import read_stages, records_locked
from dagster_project.orchestration.dvc_remote import definition_of, inputs_by_hash, push
from dagster_project.orchestration.executors import StageJob, messages, ray, ray_tasks, worker
from dagster_project.orchestration.executors.kept import KEPT_SECONDS, KeptResult
from dagster_project.orchestration.executors.package import project_package
from dagster_project.orchestration.executors.ray import (
    DRIVER,
    PROJECT,
    RESOURCES,
    STAGE,
    WORKSPACE,
    ClusterGone,
    RayExecutor,
    _Run,
    connect,
)
from dagster_project.orchestration.processes import this_process
from dagster_project.orchestration.remote_store import Damaged, RemoteStore, open_store
from dagster_project.orchestration.run_stage import run_stage
from dagster_project.training.trainers.harness import checkpoint

pytestmark = pytest.mark.usefixtures("no_ray_token")

VALUES = {"minlen": 1, "testseed": 7, "variants": {"lora": {"r": 8}, "dora": {"r": 16}}}
STAGES = {
    "adapter": {"on": "ray", "gpus": 1},
    "adapter@lora": {"on": "ray", "gpus": 4, "memory": 80, "resources": {"spot": 1}},
}


def placed(address: str, stages: Any = STAGES, **environment: str) -> Placement:
    values = {**VALUES, "execution": {"stages": stages}}
    return placement(values, address, PIPELINE.stages, PIPELINE.variants_of, environment)[1]


def test_a_variant_precedes_its_stage_and_everything_else_runs_here() -> None:
    assert placed("adapter@lora") == Placement(on="ray", gpus=4, memory=80, resources={"spot": 1})
    assert placed("adapter@dora") == Placement(on="ray", gpus=1)
    assert placed("tok").on == "local"


def test_the_environment_overrides_the_section() -> None:
    assert placed("adapter@lora", PEDIGREE_EXECUTION="local").on == "local"
    assert placed("adapter@lora", PEDIGREE_EXECUTION="ray").gpus == 4  # with the resources of its entry
    assert placed("tok", PEDIGREE_EXECUTION="ray") == Placement(on="ray")
    assert placed("tok", PEDIGREE_EXECUTION='{"stages": {"tok": {"on": "ray", "cpus": 3}}}') == Placement(
        on="ray", cpus=3
    )


@pytest.mark.parametrize(
    ("stages", "variable", "message"),
    [
        ({"tok": {"on": "mars"}}, "", r"execution.stages.tok.on: .*'local' or 'ray'"),
        ({"tok": {"cpus": -1}}, "", "execution.stages.tok.cpus: .*greater than or equal to 0"),
        ({"tok": {"gpu": 1}}, "", "execution.stages.tok.gpu: unknown key"),
        ({"tok": {"gpus": 1.5}}, "", "execution.stages.tok.gpus: more than one GPU must be a whole number"),
        ({"tok": {"memory": 1e300}}, "", "execution.stages.tok.memory: .*less than or equal to 100000"),
        ({"tok": {"resources": {"GPU": 1}}}, "", "execution.stages.tok.resources: GPU is not .*: write `gpus`"),
        ({"tok": {"image": "registry.example.org/pedigree:cpu"}}, "", "execution.stages.tok.image: .*pattern"),
        ({"tok": {"nodes": 2, "cpus": 0}}, "", "execution.stages.tok: .*`nodes` needs `cpus`, `gpus` or `resources`"),
        ({"tik": {}}, "", "execution.stages.tik: no such stage"),
        ({"adapter@x": {}}, "", "execution.stages.adapter@x: no such variant"),
        ({"tok@x": {}}, "", "execution.stages.tok@x: no such variant\nhint: write tok"),
        ({"adapter@": {}}, "", "execution.stages.adapter@: no such variant"),
        ({}, "mars", r"PEDIGREE_EXECUTION=mars: must be local, ray, or a section.*\nhint: .* the run tag pedigree/on"),
        ({}, "{", "PEDIGREE_EXECUTION is not valid JSON"),
        ({}, '{"stages": {"tok": {"on": 1}}}', "PEDIGREE_EXECUTION: execution.stages.tok.on"),
        (
            {},
            '{"price_per_hour": {"gpu": 2}}',
            "PEDIGREE_EXECUTION: execution.price_per_hour.gpu: no stage has this resource\nhint: write gpus",
        ),
    ],
)
def test_a_bad_value_is_refused_in_one_message(stages: Any, variable: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        placed("tok", stages, **({execution.VARIABLE: variable} if variable else {}))


@pytest.mark.parametrize(
    ("processes", "entry", "message"),
    [
        (3, {}, "adapter@lora with nodes: 2: compute.processes: 3 do not divide evenly among 2 nodes"),
        (2, {"sharding": {"fsdp": "full_shard"}}, "adapter@lora with nodes: 2: with `sharding`, all processes write"),
    ],
)
def test_a_training_that_nodes_cannot_share_is_refused_before_a_cluster_is_asked(
    tmp_path: Path, processes: int, entry: dict[str, Any], message: str
) -> None:
    values = {"compute": {"processes": processes}, "variants": {"lora": entry}}
    ctx = StageContext(tmp_path, "adapter", "lora", tmp_path / "scratch", values, PIPELINE.variants_of)
    with pytest.raises(InputError, match=message):
        RayExecutor(Execution(address="mars"), Placement(on="ray", nodes=2)).run(StageJob(PIPELINE, ctx, {}))


def test_a_change_of_the_section_makes_nothing_stale(root: Path) -> None:
    assert small_pipeline.changed_in_dvc(root) == set()
    (root / "params.yaml").write_text(json.dumps({**VALUES, "execution": {"address": "local", "stages": STAGES}}))
    assert small_pipeline.changed_in_dvc(root) == set()
    (root / "params.yaml").write_text(json.dumps({**VALUES, "minlen": 2}))
    assert small_pipeline.changed_in_dvc(root) == {"inst"}  # the check can fail


def test_a_bad_section_ends_a_run_with_exit_code_2_and_keeps_the_outputs(root: Path) -> None:
    before = small_pipeline.published(root, "tok")
    (root / "params.yaml").write_text(json.dumps({**VALUES, "execution": {"stages": {"tok": {"on": "mars"}}}}))
    done = dvc(root, "repro", "-f", "-s", "tok")
    assert done.returncode != 0 and "execution.stages.tok.on" in done.stderr
    assert small_pipeline.published(root, "tok") == before
    command = [sys.executable, "small_pipeline.py", "run", "tok"]
    assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 2
    assert small_pipeline.published(root, "tok") == before


# --- what is refused before anything is submitted


@pytest.mark.parametrize("mode", ["", "token"])
@pytest.mark.parametrize("address", ["http://192.0.2.7:8265", "http://[2001:db8::7]:8265"])
def test_without_a_token_only_a_loopback_address_is_accepted(
    address: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("ray")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="is not this machine, and no token authenticates its users"):
        connect(address)
    with pytest.raises(PedigreeError, match=r"no Ray cluster answers at http://127\.0\.0\.1:9: "):
        connect("http://127.0.0.1:9")


@pytest.mark.parametrize("token", ["", "hush"])
def test_a_host_that_does_not_exist_is_named_and_not_taken_for_one_without_a_token(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    for proxy in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    with pytest.raises(PedigreeError, match=r"this machine finds no host ray-haed\.invalid \(") as error:
        connect("http://ray-haed.invalid:8265")
    assert isinstance(error.value, ClusterGone if token else InputError) and "token" not in error.value.what
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it looks names up
    with pytest.raises(PedigreeError, match="Failed to connect" if token else "no token authenticates its users"):
        connect("http://ray-haed.invalid:8265")


def test_without_a_token_the_cluster_of_this_machine_is_refused_where_others_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cluster with `--dashboard-host=0.0.0.0`, Ray gives the address in the network."""
    tool("ray")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    ask = "ray.dashboard.utils.get_address_for_submission_client"
    monkeypatch.setattr(ask, lambda _: "http://192.0.2.7:8265")
    with pytest.raises(InputError, match=r"192\.0\.2\.7 is not this machine, and no token authenticates its users"):
        connect("local")


def test_a_cluster_that_was_killed_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a local cluster whose file is still there, Ray asks the head, and gives up after 45 seconds."""
    exceptions = tool("ray.exceptions")

    def ask(address: str) -> str:
        raise exceptions.RpcError("Timed out while waiting for GCS to become available.")

    monkeypatch.setattr("ray.dashboard.utils.get_address_for_submission_client", ask)
    with pytest.raises(ClusterGone, match="no Ray cluster answers at local: Timed out"):
        connect("local")


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1:6379", "127.0.0.1"),
        ("ray-head:8265", "ray-head"),
        ("ray://ray-head:10001", "ray-head"),
        ("http://[::1", "HOST"),
        ("http://127.0.0.1:82650", "HOST"),
    ],
)
def test_an_address_without_http_is_refused_with_the_right_form_before_ray_asks_the_head(
    address: str, host: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("ray")
    monkeypatch.setattr("ray.dashboard.utils.get_address_for_submission_client", pytest.fail)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("PEDIGREE_EXECUTION", "ray")
    before = small_pipeline.published(root, "tok")
    with pytest.raises(InputError) as error:
        run_stage(root, "tok", PIPELINE)
    assert error.value.what == f"RAY_ADDRESS: {address} is not an address of Ray's dashboard"
    assert f"http://{host}:8265" in error.value.hint
    assert small_pipeline.published(root, "tok") == before


@pytest.mark.parametrize(
    "address",
    ["http://me:hush@127.0.0.1:8265", "me:hush@ray-head:8265", "http://me:hush@[::1", "http://me:hush@x:99999"],
)
def test_an_address_with_credentials_is_refused(address: str) -> None:
    tool("ray")
    with pytest.raises(InputError, match="contains credentials") as error:
        connect(address)
    assert "hush" not in str(error.value)


def test_a_project_without_a_remote_is_refused_with_the_command(root: Path) -> None:
    with pytest.raises(InputError, match="dvc remote add -d storage s3://"), open_store(root):
        pass


def test_a_remote_whose_url_has_a_password_is_refused_without_showing_it(root: Path) -> None:
    assert dvc(root, "remote", "add", "-q", "-d", "storage", "ssh://me:hush@host.example.org/data").returncode == 0
    with pytest.raises(InputError, match="URL of DVC's remote contains a password") as error, open_store(root):
        pass
    assert "hush" not in str(error.value)


def test_a_remote_below_another_one_has_its_options(root: Path) -> None:
    tool("dvc_s3")
    assert dvc(root, "remote", "add", "-q", "base", "s3://bucket/data").returncode == 0
    assert dvc(root, "remote", "modify", "base", "endpointurl", "https://s3.example.org").returncode == 0
    assert dvc(root, "remote", "add", "-q", "-d", "storage", "remote://base/mine").returncode == 0
    with open_store(root) as store:
        assert (
            dict(store.remote.options).items()
            >= {
                "url": "s3://bucket/data/mine",
                "endpointurl": "https://s3.example.org",
            }.items()
        )


def write_remote(file: Path, options: dict[str, str]) -> None:
    lines = [
        "[core]",
        "remote = storage",
        "['remote \"storage\"']",
        *(f"{key} = {one}" for key, one in options.items()),
    ]
    file.write_text("\n".join(lines))


def test_a_worker_encrypts_and_shares_what_it_writes_as_the_remote_of_the_project_says(root: Path) -> None:
    tool("dvc_s3")
    options = {
        "url": "s3://bucket/data",
        "sse": "aws:kms",
        "sse_kms_key_id": "key-1",
        "acl": "bucket-owner-full-control",
    }
    write_remote(root / ".dvc/config.local", options)
    with open_store(root) as store:
        assert store.remote.options.items() >= options.items()
    node = root.parent / "node"
    node.mkdir()
    dvc_cache.isolate_project(node, remote=store.remote.options)
    with open_store(node) as store:
        assert store.remote.fs.fs.s3_additional_kwargs == {
            "ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "key-1", "ACL": "bucket-owner-full-control",
        }  # fmt: skip
    write_remote(root / ".dvc/config.local", {"url": "s3://bucket/data", "sse_customer_key": "aHVzaA=="})
    with pytest.raises(InputError, match="encrypts with `sse_customer_key`") as error, open_store(root):
        pass
    assert "aHVzaA" not in str(error.value)


def test_a_remote_whose_endpoint_has_a_password_is_refused_without_showing_it(root: Path) -> None:
    tool("dvc_s3")
    assert dvc(root, "remote", "add", "-q", "-d", "storage", "s3://bucket/data").returncode == 0
    assert dvc(root, "remote", "modify", "storage", "endpointurl", "https://me:hush@s3.example.org").returncode == 0
    with pytest.raises(InputError, match="contains a password") as error, open_store(root):
        pass
    with pytest.raises(InputError, match="has a password in the address") as pushed:
        push(root)
    assert "hush" not in f"{error.value}{pushed.value}"


def test_a_credential_that_git_tracks_is_refused_without_showing_it_and_one_of_this_machine_is_not_sent(
    root: Path,
) -> None:
    tool("dvc_s3")
    assert dvc(root, "remote", "add", "-q", "-d", "storage", "s3://bucket/data").returncode == 0
    assert dvc(root, "remote", "modify", "--local", "storage", "secret_access_key", "hush").returncode == 0
    with open_store(root) as store:
        assert "hush" not in str(store.remote.options)
    assert dvc(root, "remote", "modify", "storage", "secret_access_key", "hush").returncode == 0
    with pytest.raises(InputError, match="has the credential storage") as error, open_store(root):
        pass
    assert "hush" not in str(error.value)


@pytest.mark.parametrize("section", [5, True, "lora", ["lora"]])
def test_a_section_of_variants_that_is_no_mapping_has_no_variants(section: Any) -> None:
    values = {"variants": section, "execution": {"stages": {"adapter@lora": {}}}}
    with pytest.raises(InputError, match="no such variant"):
        execution.parse(values, PIPELINE.stages, PIPELINE.variants_of)


# --- the files that a worker gets


def test_a_worker_gets_a_whole_dvc_lock_while_another_stage_is_recorded(root: Path) -> None:
    content, found = (root / "dvc.lock").read_bytes(), []

    def package() -> None:
        with project_package(root, root / ".dvc/tmp/package") as folder:
            found.append((folder / "dvc.lock").read_bytes())

    with records_locked(root):
        (root / "dvc.lock").write_bytes(content[:100])  # as while DVC writes it
        thread = threading.Thread(target=package)
        thread.start()
        thread.join(1)
        (root / "dvc.lock").write_bytes(content)
    thread.join(60)
    assert found == [content]


def test_a_worker_gets_the_commit_and_every_uncommitted_change_and_no_configuration_of_dvc(root: Path) -> None:
    (root / "code/tok.py").write_text("V = 5\n")
    (root / "code/new.py").write_text("V = 6\n")
    (root / "code/cmp.py").unlink()
    target = root / ".dvc/tmp/package"
    (target / "left by a killed driver").mkdir(parents=True)
    with project_package(root, target) as folder:
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert not (folder / "left by a killed driver").exists()
        assert (folder / "code/tok.py").read_text() == "V = 5\n"
    assert not target.exists()
    assert {
        "code/new.py",
        "dvc.yaml",
        "dvc.lock",
        "params.yaml",
        "data/sources/d.txt.dvc",
        "data/reports/tok.json",
    } <= names
    assert not {"code/cmp.py", "data/sources/d.txt", "data/tok/train.txt"} & names
    assert not [name for name in names if name.startswith((".dvc/", ".git/"))]


def test_ray_leaves_out_no_file_of_a_package(stored: Path, tmp_path: Path) -> None:
    packaging = tool("ray._private.runtime_env.packaging")
    names = ["data/sources/venv/rows.txt", "data/sources/__pycache__/rows.txt", "data/sources/g.txt"]
    for name in names:
        (stored / name).parent.mkdir(exist_ok=True)
        (stored / name).write_text("row")
    (stored / ".rayignore").write_text("data\n")
    git(stored, "add", "--force", "data/sources")
    sent: set[str] = set()

    def submit_job(runtime_env: Any, **_: Any) -> None:  # as Ray's client does
        folder = Path(runtime_env["working_dir"])
        uri = packaging.get_uri_for_directory(str(folder), include_gitignore=False)
        packaging.create_package(str(folder), tmp_path / uri.split("/")[-1], include_gitignore=False)
        sent.update(zipfile.ZipFile(tmp_path / uri.split("/")[-1]).namelist())

    with open_store(stored) as store, project_package(stored, tmp_path / "package") as package:
        run = run_of(stored, store, tmp_path / "work" / "tok")
        run.client = SimpleNamespace(submit_job=submit_job)
        run._submit(package)
    assert sent >= {*names}


def test_a_name_that_ray_cannot_send_is_one_message(root: Path, tmp_path: Path) -> None:
    (root / os.fsdecode(b"Gr\xf6\xdfe.txt")).write_text("row")
    with (
        pytest.raises(InputError, match=r"Gr\\xf6\\xdfe.txt.*\nhint: rename"),
        project_package(root, tmp_path / "sent"),
    ):
        pass
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + "/*.txt\n")
    with project_package(root, tmp_path / "sent") as package:
        assert (package / "dvc.yaml").is_file() and not [*package.glob("*.txt")]


def test_a_worker_gets_the_files_of_submodules_as_they_are_on_disk(root: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "rows.txt").write_text("r0")
    git(shared, "init", "-q")
    git(shared, "add", "-A")
    git(shared, "commit", "-qm", "rows")
    git(root, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(shared), "data/sources/shared")
    (root / "data/sources/shared/rows.txt").write_text("r1")
    with project_package(root, tmp_path / "package") as package:
        assert (package / "data/sources/shared/rows.txt").read_text() == "r1"
        assert not (package / "data/sources/shared/.git").exists()


def test_a_worker_gets_what_a_link_points_to_only_if_that_is_a_file_of_the_project(root: Path) -> None:
    """Ray follows links."""
    (root.parent / "elsewhere").mkdir()
    (root.parent / "elsewhere/credentials").write_text("secret")
    (root / ".env").write_text("secret")
    with (root / ".gitignore").open("a") as file:
        file.write("\n/.env\n")
    links = {
        "file": "code/tok.py",
        "folder": "code",
        "absolute": root / "code/tok.py",
        "absolute folder": root / "code",
        "here": ".",
        "out": root.parent / "elsewhere",
        "out file": "../elsewhere/credentials",
        "ignored": ".env",
        "output": "data/tok",
        "configuration": ".dvc/config",
        "nowhere": "missing",
        "circle": "circle",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    git(root, "add", "-A")
    with project_package(root, root / ".dvc/tmp/package") as folder:
        assert {name for name in links if os.path.lexists(folder / name)} == {
            "file",
            "folder",
            "absolute",
            "absolute folder",
        }
        for name in ("file", "folder/tok.py", "absolute", "absolute folder/tok.py"):
            assert (folder / name).read_bytes() == (root / "code/tok.py").read_bytes()
            assert (folder / name).resolve().is_relative_to(folder.resolve())


def test_sources_in_git_that_are_too_large_are_refused_with_the_command(root: Path) -> None:
    (root / "data/sources/big.txt").write_text("x" * 200_000)
    git(root, "add", "-A")
    with (
        pytest.raises(InputError, match=r"data/sources/big.txt \(0.2 MB\)(.|\n)*dvc add data/sources/big.txt"),
        project_package(root, root / ".dvc/tmp/package", limit=100_000),
    ):
        pass


# --- objects by hash


@pytest.fixture
def stored(root: Path, tmp_path: Path) -> Path:
    """A project whose remote, a directory, has the inputs of `tok`."""
    assert dvc(root, "remote", "add", "-q", "-d", "storage", str(tmp_path / "remote")).returncode == 0
    with open_store(root) as store:
        assert store.push(inputs_by_hash(root, "tok").values()) > 0
    return root


def objects(folder: Path) -> dict[str, Path]:
    return {"".join(path.parts[-2:]): path for path in folder.rglob("*") if path.is_file()}


def test_objects_arrive_in_a_cache_that_has_none_of_them(stored: Path, tmp_path: Path) -> None:
    cache = objects(stored / ".dvc/cache/files/md5")
    content = {oid: path.read_bytes() for oid, path in cache.items()}
    inputs = inputs_by_hash(stored, "tok")
    carried = objects(tmp_path / "remote/files/md5")
    assert set(inputs.values()) < set(carried)  # listings, and what they list
    for oid in carried:
        cache[oid].unlink()
    with open_store(stored) as store:
        assert store.pull(inputs.values()) == sum(len(content[oid]) for oid in carried)
        assert store.pull(inputs.values()) == 0  # now they are here
    assert {oid: path.read_bytes() for oid, path in objects(stored / ".dvc/cache/files/md5").items()} == content


def test_folders_of_a_cache_that_a_group_shares_are_shared(stored: Path, tmp_path: Path) -> None:
    """Other users could not add objects to a folder that only its owner may write."""
    with (stored / ".dvc/config.local").open("a") as file:
        file.write("[cache]\n    shared = group\n")
    shutil.rmtree(stored / ".dvc/cache/files")
    with open_store(stored) as store:
        store.pull(inputs_by_hash(stored, "tok").values())
    folders = [*(stored / ".dvc/cache/files/md5").iterdir()]
    assert folders and {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o2775}


def test_a_worker_runs_the_command_as_the_settings_of_the_driver_write_it(stored: Path, tmp_path: Path) -> None:
    """DVC writes `--no-loud` only with the setting `parsing.bool`, which is in .dvc/config."""
    dvc_yaml, command = (stored / "dvc.yaml").read_text(), definition_of(stored, "tok")[0]
    (stored / "dvc.yaml").write_text(dvc_yaml.replace(command, "echo ${flags} > said"))
    values = json.loads((stored / "params.yaml").read_text())
    (stored / "params.yaml").write_text(json.dumps({**values, "flags": {"loud": False}}))
    assert dvc(stored, "config", "parsing.bool", "boolean_optional").returncode == 0
    with open_store(stored) as store:
        job = run_of(stored, store, tmp_path).description()
    node = tmp_path / "node"
    shutil.copytree(stored, node, symlinks=True, ignore=shutil.ignore_patterns(".dvc"))
    dvc_cache.isolate_project(node, remote=job["remote"])
    assert definition_of(node, "tok")[0] == "echo  > said"
    with open_store(node) as store:
        assert worker.Work(job, node, store, KeptResult(tmp_path, "k"))._command() == 0
    assert (node / "said").read_text() == "--no-loud\n"


def test_an_interrupt_does_not_wait_for_objects_that_are_being_transferred() -> None:
    """The first object takes until the interrupt is handled, or half a minute."""
    handled, ended = threading.Event(), list[str]()

    def transfer(oid: str) -> int:
        if oid == "first":
            handled.wait(30)
        if oid == "last":
            time.sleep(0.2)  # until the main thread waits for results
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        ended.append(oid)
        return 1

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            RemoteStore(None)._each(transfer, ["first", *map(str, range(20)), "last"])  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
    assert "first" not in ended
    handled.set()


class Refused(Exception):
    """As a library of a remote has it."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (Refused("denied"), "denied"),
        (OSError("gone"), "gone"),
        (ValueError("Invalid endpoint"), "Invalid endpoint"),
        (TypeError("wrong"), ""),
    ],
)
def test_what_a_remote_refuses_is_one_message_and_an_error_of_a_program_is_not(
    stored: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, shown: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with open_store(stored) as store:
        failing = RemoteStore(replace(store.remote, fs=SimpleNamespace(fs=SimpleNamespace(invalidate_cache=fail))))
        with pytest.raises(PedigreeError if shown else TypeError, match=shown or "wrong"):
            failing.list("results")
    monkeypatch.setattr("dvc.data_cloud.DataCloud.push", fail)
    with pytest.raises(InputError if shown else TypeError, match=shown or "wrong"):
        push(stored)


def test_a_bucket_that_does_not_exist_is_one_message(stored: Path, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise FileNotFoundError("The specified bucket does not exist")  # as s3fs says it

    with open_store(stored) as store:
        fs = SimpleNamespace(put_file=refuse, pipe_file=refuse, makedirs=lambda _: None, parent=lambda _: "")
        failing = RemoteStore(replace(store.remote, fs=fs))
        with pytest.raises(PedigreeError, match="cannot be written: FileNotFoundError: The specified bucket"):
            failing.put(stored / "dvc.yaml", "a")
        with pytest.raises(PedigreeError, match="cannot be written: FileNotFoundError: The specified bucket"):
            failing.write_document("a", {})
        with pytest.raises(FileNotFoundError):
            failing.put(tmp_path / "none", "a")


@pytest.mark.parametrize("harm", ["changed", "removed"])
def test_an_object_that_is_not_what_its_name_says_is_named_and_never_enters_the_cache(
    stored: Path, tmp_path: Path, harm: str
) -> None:
    inputs = inputs_by_hash(stored, "tok")
    oid, path = next(
        (oid, path) for oid, path in objects(tmp_path / "remote/files/md5").items() if not oid.endswith(".dir")
    )
    cached = objects(stored / ".dvc/cache/files/md5")[oid]
    content = cached.read_bytes()
    cached.unlink()
    path.chmod(0o644)
    path.write_text("something else") if harm == "changed" else path.unlink()
    with open_store(stored) as store:
        with pytest.raises(Damaged) as error:
            store.pull(inputs.values())
        assert error.value.objects == [oid] and not cached.exists()
        store.discard([oid])
        cached.write_bytes(content)
        assert store.push(inputs.values()) == len(content)  # only this one is sent
    assert path.read_bytes() == content


@pytest.mark.parametrize("sent", [True, False])
def test_an_object_that_changes_on_its_way_never_enters_the_cache(
    root: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    """On the way to a server of S3, which may notice it, or on the way back."""
    tool("dvc_s3")
    for name, value in {**s3.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    relay = Relay(int(s3.endpoint.rpartition(":")[2]))
    add_remote(root, f"s3://{BUCKET}/{tmp_path.name}", relay.url)
    inputs = inputs_by_hash(root, "tok")
    with open_store(root) as store:
        [oid] = store._files([*inputs.values()])[1]
        cached = Path(store.remote.cached_at(oid))
        content = cached.read_bytes()
        harm = {content: content.swapcase()}
        relay.replace = harm if sent else {}
        with suppress(PedigreeError):
            store.push(inputs.values())
        relay.replace = {} if sent else harm
        cached.unlink()
        with pytest.raises(PedigreeError):
            store.pull(inputs.values())
        assert not cached.exists()
        relay.replace = {}
        cached.write_bytes(content)
        if sent:
            store.discard([oid])
            store.push(inputs.values())
        cached.unlink()
        store.pull(inputs.values())
    assert cached.read_bytes() == content
    relay.close()


def test_a_damaged_object_of_the_own_cache_is_replaced(stored: Path, tmp_path: Path) -> None:
    oid = next(oid for oid in objects(tmp_path / "remote/files/md5") if not oid.endswith(".dir"))
    cached = objects(stored / ".dvc/cache/files/md5")[oid]
    content = cached.read_bytes()
    cached.chmod(0o644)
    cached.write_text("damaged on this disk")
    with open_store(stored) as store:
        store.pull(inputs_by_hash(stored, "tok").values())
    assert cached.read_bytes() == content


@pytest.mark.parametrize("suffix", ["", ".dir"])
def test_a_damaged_object_of_the_own_cache_is_not_sent(stored: Path, tmp_path: Path, suffix: str) -> None:
    oid, path = next(
        (oid, path)
        for oid, path in objects(tmp_path / "remote/files/md5").items()
        if oid.endswith(".dir") == bool(suffix)
    )
    path.unlink()
    cached = objects(stored / ".dvc/cache/files/md5")[oid]
    cached.chmod(0o644)
    cached.write_text("[]")
    with open_store(stored) as store, pytest.raises(InputError, match=oid):
        store.push(inputs_by_hash(stored, "tok").values())
    assert not path.exists()


@pytest.mark.parametrize("listed", [False, True])
def test_a_name_from_the_remote_that_leaves_the_cache_is_refused_and_touches_nothing(
    stored: Path, tmp_path: Path, listed: bool
) -> None:
    with open_store(stored) as store:
        name = "../victim"
        victim = Path(store.remote.cached_at(name))
        victim.write_text("mine")
        if listed:
            content = json.dumps([{"md5": name, "relpath": "a"}]).encode()
            name = f"{md5_of_bytes(content)}.dir"
            at = Path(store.remote.object_at(name))
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_bytes(content)
        with pytest.raises(PedigreeError, match="is not the name of an object"):
            store.pull([name])
        if not listed:
            with pytest.raises(PedigreeError, match="is not the name of an object"):
                store.discard([name])
    assert victim.read_text() == "mine"


def test_files_of_the_remote_outside_of_a_folder_are_not_listed() -> None:
    keys = ["b/c/step-1/complete.json", "b/c/../complete.json", "b/c/step-1/../../x", "b/c/../../../x"]
    files = SimpleNamespace(
        relpath=posixpath.relpath, find=lambda _: keys, fs=SimpleNamespace(invalidate_cache=lambda: None)
    )
    remote: Any = SimpleNamespace(fs=files)
    assert RemoteStore(remote).list("b/c") == ["step-1/complete.json"]


def run_of(root: Path, store: Any, scratch: Path) -> Any:
    context = SimpleNamespace(root=root, address="tok", scratch=scratch, pages=scratch / "pages", out=scratch / "out")
    job: Any = SimpleNamespace(ctx=context, inputs={})
    return _Run(RayExecutor(Execution(), Placement()), job, store, None, "http://127.0.0.1:8265", True)


def test_a_job_with_another_command_or_number_of_threads_is_another_job(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with open_store(stored) as store:
        key = run_of(stored, store, tmp_path).key
        assert run_of(stored, store, tmp_path).key == key
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert run_of(stored, store, tmp_path).key != key
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        text = (stored / "dvc.yaml").read_text()
        command = definition_of(stored, "tok")[0]
        (stored / "dvc.yaml").write_text(text.replace(command, f"{command} --verbose"))
        assert definition_of(stored, "tok")[0] != command
        assert run_of(stored, store, tmp_path).key != key


def test_a_forced_run_does_not_go_on_with_a_job_that_it_stopped_and_that_ends_late(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tool("ray")
    monkeypatch.setattr(ray, "STOP_SECONDS", 0.3)
    monkeypatch.setattr(ray.dvc_run, "is_forced", lambda: True)
    status = SimpleNamespace(is_terminal=lambda: False)
    with open_store(stored) as store, caplog.at_level("INFO", logger="pedigree"):
        run = run_of(stored, store, tmp_path)
        metadata = {STAGE: "tok", PROJECT: run.project}
        late = SimpleNamespace(submission_id=f"{run.key}-0", status=status, metadata=metadata)
        submitted: list[Any] = []
        run.client = SimpleNamespace(
            list_jobs=lambda: [late],
            stop_job=lambda _: None,
            get_job_status=lambda _: status,
            submit_job=lambda **job: submitted.append(job),
            get_job_info=lambda _: None,
        )
        run._discard_others()
        run._follow(tmp_path)
    assert [job["submission_id"] for job in submitted] == [run.name] and run.name != late.submission_id
    assert "after the request to stop it" in caplog.text and "was stopped" not in caplog.text


def test_a_stopped_job_that_waits_for_resources_is_shown_as_what_it_is(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = tool("ray.job_submission").JobStatus
    monkeypatch.setattr(ray, "STOP_SECONDS", 0.3)
    with open_store(stored) as store, caplog.at_level("INFO", logger="pedigree"):
        run = run_of(stored, store, tmp_path)
        run.client = SimpleNamespace(stop_job=lambda _: None, get_job_status=lambda _: statuses.PENDING)
        run._stop("job-1")
    assert "job job-1 waits for resources, and Ray ends it as soon as it has them" in caplog.text


@pytest.mark.parametrize(
    ("status", "resources", "said", "goes_on"),
    [
        ("PENDING", "1 CPU", None, True),
        ("PENDING", "1 typo", None, False),
        ("RUNNING", "", None, True),
        ("RUNNING", "2 nodes with 1 typo each", "", False),  # a job of several nodes waits while it runs
        ("RUNNING", "2 nodes with 1 typo each", f'{messages.MARK}["hello", {{"node": "a, b"}}]\n', True),
    ],
)
def test_a_driver_does_not_go_on_with_a_job_that_waits_for_resources_which_it_does_not_ask_for(
    stored: Path, tmp_path: Path, status: str, resources: str, said: str | None, goes_on: bool
) -> None:
    statuses = tool("ray.job_submission").JobStatus
    submitted: list[Any] = []
    stopped: list[str] = []
    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path)
        nodes = {} if said is None else {ray.NODES: "2"}
        metadata = {STAGE: "tok", PROJECT: run.project, RESOURCES: resources, **nodes}
        earlier = SimpleNamespace(submission_id=f"{run.key}-0", status=statuses(status), metadata=metadata)
        run.client = SimpleNamespace(
            list_jobs=lambda: [earlier], stop_job=stopped.append, get_job_status=lambda _: statuses.STOPPED,
            submit_job=lambda **job: submitted.append(job["metadata"][RESOURCES]), get_job_info=lambda _: None,
            get_job_logs=lambda _: said,
        )  # fmt: skip
        run._discard_others()
        run._follow(tmp_path)
    assert (run.name == earlier.submission_id) is goes_on
    assert (submitted, stopped) == (([], []) if goes_on else (["1 CPU"], [earlier.submission_id]))


def test_a_job_of_an_experiment_is_stopped_by_the_next_driver_of_the_workspace_if_its_own_has_ended(
    stored: Path, tmp_path: Path
) -> None:
    statuses = tool("ray.job_submission").JobStatus
    says = "from dagster_project.orchestration.processes import this_process; print(this_process())"
    ended = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True).stdout.strip()
    start = ended.partition(" ")[2]
    stopped: list[str] = []
    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path)
        experiment = {STAGE: "adapter@lora", PROJECT: "copy", WORKSPACE: run.workspace}
        metadata = {
            "inst-ended-0": experiment | {DRIVER: ended},
            "inst-rebooted-0": experiment | {DRIVER: f"{platform.node()} another-boot {start.partition(' ')[2]}"},
            "inst-running-0": experiment | {DRIVER: this_process()},
            "inst-elsewhere-0": experiment | {DRIVER: f"another-host {start}"},
            "inst-unknown-0": experiment,
            "inst-other-0": experiment | {DRIVER: ended, WORKSPACE: "another"},
            "inst-none-0": None,
        }
        listed = [
            SimpleNamespace(submission_id=name, status=statuses.RUNNING, metadata=one) for name, one in metadata.items()
        ]
        run.client = SimpleNamespace(
            list_jobs=lambda: listed, stop_job=stopped.append, get_job_status=lambda _: statuses.STOPPED
        )
        for name in metadata:
            store.write_document(store.at("jobs", name.removesuffix("-0"), "result.json"), {})
        run._discard_others()
        assert stopped == ["inst-ended-0", "inst-rebooted-0"]
        assert len(store.list(store.at("jobs"))) == len(metadata) - 2


def test_an_experiment_uses_the_remote_of_the_workspace_also_if_its_path_is_relative(stored: Path) -> None:
    add_remote(stored, "../../remote")
    (stored / ".dvc/tmp/exps").mkdir(parents=True)
    with open_store(stored) as store:
        expected = store.remote.url
    assert Path(expected) == stored.parent / "remote"
    copy = stored / ".dvc/tmp/exps/tmpx"
    shutil.copytree(stored, copy, ignore=shutil.ignore_patterns("tmp"))
    with open_store(copy) as store:
        assert store.remote.url == expected


def test_an_experiment_uses_the_token_of_the_workspace_also_if_its_path_is_relative(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connected(*_: Any) -> None:
        raise ClusterGone(ray._token())

    copy = stored / ".dvc/tmp/exps/standalone/tmpx"
    copy.mkdir(parents=True)
    (stored.parent / "token").write_text("of the workspace")
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "../token"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "connect", connected)
    for root in (stored, copy):
        monkeypatch.chdir(root)
        ctx = StageContext(root, "tok", None, root / "scratch", {}, {})
        with pytest.raises(ClusterGone, match="of the workspace"):
            RayExecutor(Execution(), Placement()).run(StageJob(PIPELINE, ctx, {}))


def test_the_queue_counts_jobs_that_never_started_and_the_cost_those_that_were_lost(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is lost after 50 s, one that Ray gives up after 900 s, and one
    that begins after 30 s and computes for 40 s."""
    tool("ray")
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(
        ray, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now, sleep=lambda _: None)
    )
    submitted: list[str] = []
    polls = iter(
        [
            (10, "RUNNING", ""),
            (50, "FAILED", ""),
            (900, "FAILED", ray.NEVER_STARTED),
            (30, "RUNNING", ""),
            (40, "SUCCEEDED", ""),
        ]
    )

    def info(_: str) -> Any:
        seconds, status, error = next(polls)
        clock.now += seconds
        if status == "SUCCEEDED":
            result = {"exit_code": 0, "seconds": {"compute_seconds": 40.0}, "node": "n", "bytes": {}}
            run.store.write_document(run.at("result.json"), result)
        ended = SimpleNamespace(is_terminal=lambda: status != "RUNNING")
        return SimpleNamespace(
            status=ended, driver_node_id="", error_type=error or None, message="", driver_exit_code=None
        )

    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path / "work" / "tok")
        run.executor = RayExecutor(Execution(price_per_hour={"cpus": 3600.0}), Placement())
        run.job.ctx.live = tmp_path / "live"
        run.client = SimpleNamespace(
            list_jobs=list, submit_job=lambda **job: submitted.append(job["submission_id"]), get_job_info=info,
            get_job_logs=lambda _: "" if len(submitted) == 2 else f'{messages.MARK}["hello", {{"node": "n"}}]\n',
        )  # fmt: skip
        execution = run._execution(run._computed(), 0)
    assert len(submitted) == execution["jobs"] == 3
    assert (execution["queue_seconds"], execution["lost_seconds"], execution["cost"]) == (930.0, 50.0, 90.0)


def test_a_resource_may_have_the_name_of_anything_else_that_is_shown(stored: Path, tmp_path: Path) -> None:
    from dagster_project.views.texts import text

    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path)
        run.executor = RayExecutor(
            Execution(), Placement(gpus=2, memory=40, resources={"node": 1, "cost": 3, "a100": 4})
        )
        result = {"node": "gpu-7", "seconds": {"compute_seconds": 1.0}, "bytes": {}}
        found = run._execution(result, 0)
    assert found["node"] == "gpu-7" and "cost" not in found, "there are no prices"
    assert found["resources"] == {"cpus": 1, "gpus": 2, "memory": 40, "node": 1, "cost": 3, "a100": 4}
    shown = text("where", where={"tok": found})
    assert "node gpu-7: " in shown and "reserved cpus 1, gpus 2, memory 40 GB, node 1, cost 3, a100 4" in shown


@pytest.mark.parametrize(
    ("exit_code", "kind", "attempts", "message"),
    [
        (1, InputError, 1, "its node cannot start a worker of Pedigree: it failed\nNo module named 'dagster_project'"),
        (None, CheckFailed, ray.ATTEMPTS, "3 jobs ended without a result, the last one: it failed\nNo module named"),
    ],
)
def test_a_job_whose_worker_cannot_start_is_not_submitted_again(
    stored: Path, tmp_path: Path, exit_code: int | None, kind: type[Exception], attempts: int, message: str
) -> None:
    tool("ray")
    submitted: list[str] = []
    ended = SimpleNamespace(
        status=SimpleNamespace(is_terminal=lambda: True), driver_node_id="", error_type=None,
        message="it failed. Full traceback:\nTraceback (most recent call last)", driver_exit_code=exit_code,
    )  # fmt: skip
    log = "Running entrypoint for job {}: python\nNo module named 'dagster_project'\n"
    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path / "work" / "tok")
        run.client = SimpleNamespace(
            list_jobs=list, submit_job=lambda **job: submitted.append(job["submission_id"]),
            get_job_info=lambda _: ended, get_job_logs=log.format,
        )  # fmt: skip
        with pytest.raises(kind) as refusal:
            run._computed()
    assert message in str(refusal.value) and submitted[-1] not in str(refusal.value)
    assert len(submitted) == attempts


@pytest.mark.parametrize("temporary", [True, False])
def test_checkpoints_of_an_interrupted_run_stay_unless_it_is_a_queued_experiment(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: bool
) -> None:
    tool("ray")

    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "is_temporary", lambda _: temporary)
    status = SimpleNamespace(is_terminal=lambda: True)
    client = SimpleNamespace(
        list_jobs=list, submit_job=interrupted, stop_job=lambda _: None, get_job_status=lambda _: status
    )
    monkeypatch.setattr(ray, "connect", lambda *_: (client, "http://127.0.0.1:8265"))
    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path / "work" / "tok")
        store.write_document(run.at("checkpoints", "step-00000002", worker.MARKER), {})
        with pytest.raises(KeyboardInterrupt):
            RayExecutor(Execution(address="http://127.0.0.1:8265"), Placement()).run(run.job)
        assert store.list(run.at()) == ([] if temporary else [f"checkpoints/step-00000002/{worker.MARKER}"])


@pytest.mark.parametrize("pages", [None, b"cut off"])
def test_a_result_without_its_pages_is_computed_again(stored: Path, tmp_path: Path, pages: bytes | None) -> None:
    result = {"outs": {}, "pages": True, "exit_code": 1}
    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path / "scratch")
        if pages:
            (tmp_path / "pages.tar").write_bytes(pages)
            store.write_document(run.at("result.json"), result)
            store.put(tmp_path / "pages.tar", run.at("pages.tar"))
        with pytest.raises(Damaged):
            run._fetch(result)


def test_report_and_pages_of_a_stage_that_failed_arrive(stored: Path, tmp_path: Path) -> None:
    report, page = {"rows_in": 3, "checks": {"no_bad_rows": {"passed": False}}}, pages_of(stored, "tok") / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("3 rows, 1 is bad")
    (stored / report_of("tok")).write_text(json.dumps({"passed": False, **report}))
    with open_store(stored) as store:
        run = run_of(stored, store, tmp_path / "scratch")
        kept = KeptResult(tmp_path, run.key)
        worker.Work({"address": "tok", "key": run.key}, stored, store, kept)._finish(1)
        assert kept.read() is None
        found = run._fetch(store.read_document(run.at("result.json")))
    assert (found.exit_code, found.report) == (1, report)
    assert [path.read_text() for path in (tmp_path / "scratch/pages").iterdir()] == ["3 rows, 1 is bad"]
    assert not (tmp_path / "scratch/data").exists(), "a stage that failed has no outputs"


def test_a_result_that_was_cut_off_does_not_exist(stored: Path) -> None:
    with open_store(stored) as store:
        store.write_document(store.at("a.json"), {"a": 1})
        assert store.read_document(store.at("a.json")) == {"a": 1}
        Path(store.at("a.json")).write_text('{"a"')
        assert store.read_document(store.at("a.json")) is None


def test_all_files_of_a_sharded_checkpoint_are_kept_in_the_remote(stored: Path) -> None:
    with open_store(stored) as store:
        work = worker.Work({"address": "adapter@lora", "key": "k"}, stored, store, KeptResult(stored.parent, "k"))
        step = work.checkpoints / "step-00000002"
        (step / "shards").mkdir(parents=True)
        for name in ("shards/0.safetensors", "state.json", worker.MARKER):
            (step / name).write_text(name)
        assert work._keep_newest("") == step.name
        remove(work.checkpoints)
        work._bring_checkpoints()
        names = {path.relative_to(step).as_posix(): path.read_text() for path in step.rglob("*") if path.is_file()}
        assert names == {name: name for name in ("shards/0.safetensors", "state.json", worker.MARKER)}


def test_a_worker_that_ray_took_for_lost_removes_no_newer_checkpoint(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(stored) as store:
        work = worker.Work({"address": "adapter@lora", "key": "k"}, stored, store, KeptResult(stored.parent, "k"))
        for step in (2, 6, 4):  # 6: of the worker that replaced it
            remove(work.checkpoints)
            folder = work.checkpoints / f"step-{step:08d}"
            folder.mkdir(parents=True)
            (folder / worker.MARKER).write_text(str(step))
            work._keep_newest("")
        assert store.list(work.at("checkpoints")) == [f"step-{step:08d}/{worker.MARKER}" for step in (4, 6)]
        listed = store.list(work.at("checkpoints"))
        store.remove(work.at("checkpoints", "step-00000004"))
        monkeypatch.setattr(RemoteStore, "list", lambda *_: listed)
        remove(work.checkpoints)
        work._bring_checkpoints()
        assert [path.parent.name for path in work.checkpoints.glob(f"*/{worker.MARKER}")] == ["step-00000006"]


def test_a_remote_that_is_full_is_one_message(stored: Path, tmp_path: Path) -> None:
    """The limit on the size of files makes the system's write fail, as a full disk does."""
    import shutil

    shutil.rmtree(tmp_path / "remote")

    inputs = inputs_by_hash(stored, "tok").values()

    def push_to_a_full_disk() -> None:
        with open_store(stored) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (32, 32))  # the semaphores of threads have 32 bytes
            try:
                store.push(inputs)
            except PedigreeError as error:  # not even a log can be written
                os._exit(7 if "cannot be written: it is full" in str(error) else 8)

    assert run_in_child(push_to_a_full_disk, tmp_path / "log") == 7


def test_each_answer_of_a_full_server_is_one_message_with_a_next_step_and_what_is_there_can_be_read(
    root: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**s3.environment, "AWS_MAX_ATTEMPTS": "2"}.items():
        monkeypatch.setenv(name, value)
    url, inputs = f"s3://{BUCKET}/{tmp_path.name}", inputs_by_hash(root, "tok").values()
    with full_remote(s3.endpoint) as server:
        add_remote(root, url, server.url)
        for server.answer in (DISK, QUOTA, BUCKET_QUOTA, NO_BLOCKS, POLICY, VOLUMES):
            names_it = server.answer not in (POLICY, VOLUMES)  # others do not say that it is space that is lacking
            server.refused.clear()
            with open_store(root) as store, pytest.raises(PedigreeError) as error:
                store.push(inputs)
            assert error.value.exit_code == 1
            assert error.value.what.startswith(f"DVC's remote {url} cannot be written: ")
            assert ("it is full, or a quota is reached" in error.value.what) == names_it
            assert error.value.hint.startswith("nothing was recorded; ")
            assert ("ask for a larger quota" if names_it else "free space, and the credentials") in error.value.hint
            assert len(server.refused) == (2 if server.answer[0] == 500 else 1)
            with open_store(root) as store:
                assert store.list(store.at()) == [] and store.read_document(store.at("a.json")) is None
        server.answer = None
        with open_store(root) as store:
            assert store.push(inputs) > 0


# --- what a node keeps


@pytest.fixture
def refusing(stored: Path) -> Path:
    """The remote of `stored` takes objects, but nothing in its folder `pedigree/`, until this file is removed."""
    with open_store(stored) as store:
        file = Path(store.at())
    file.write_text("")
    return file


def test_a_result_that_the_remote_refused_stays_on_its_node_and_the_next_job_there_pushes_it(
    stored: Path, tmp_path: Path, refusing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = pages_of(stored, "tok") / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("4 rows")
    job = {"address": "tok", "key": "k", "forced": False, "inputs": {}, "workers": 1, "command": "exit 1"}

    def work(**changes: Any) -> worker.Work:
        folder = tmp_path / "node" / f"work-{time.time_ns()}"
        root = Path(shutil.copytree(stored, folder / "project", symlinks=True))
        return worker.Work({**job, **changes}, root, store, KeptResult(tmp_path / "node", "k"))

    with open_store(stored) as store:
        first = work()
        first.seconds["compute_seconds"] = 3600.0
        for attempt in (lambda: first._finish(0), lambda: work().run()):
            with pytest.raises(PedigreeError, match=f"node {platform.node()} keeps the result") as error:
                attempt()
            assert not isinstance(error.value, InputError)
        before = first.kept.read()
        refusing.unlink()
        assert work().run() == 0, "the command, which would fail, did not run"
        result = store.read_document(store.at("jobs", "k", "result.json"))
        assert before is not None and result["outs"] == before["outs"] == {"data/tok": before["outs"]["data/tok"]}
        assert result["seconds"]["compute_seconds"] == 3600.0 and result["report"] == before["report"]
        assert store.list(store.at("jobs", "k")) == ["pages.tar", "result.json"]
        assert store.pull(result["outs"].values()) == 0
        assert first.kept.read() is None and not [*(tmp_path / "node/results").iterdir()]
        kept = {**before, "outs": {"data/tok": "0" * 32}}  # the node's cache was removed
        for result, changes in ((before, {"forced": True}), (kept, {})):
            first.kept.write(result, None)
            assert not work(**changes)._push_kept() and first.kept.read() is None


def test_a_result_of_a_stage_that_failed_is_not_kept(stored: Path, tmp_path: Path, refusing: Path) -> None:
    with open_store(stored) as store:
        kept = KeptResult(tmp_path, "k")
        with pytest.raises(PedigreeError, match="cannot be written") as error:
            worker.Work({"address": "tok", "key": "k"}, stored, store, kept)._finish(1)
    assert "keeps" not in error.value.hint and kept.read() is None


def test_a_node_without_space_keeps_no_result_and_a_result_is_removed_after_a_week(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(worker.NODE_CACHE, str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "results").write_text("no folder can be made here")
    old, new = KeptResult(tmp_path / "node", "old"), KeptResult(tmp_path / "node", "new")
    assert old.write({}, tmp_path / "pages.tar") == tmp_path / "pages.tar" and old.read() is None
    (tmp_path / "node" / "results").unlink()
    for one in (old, new):
        (tmp_path / "pages.tar").touch()
        one.write({"outs": {}}, tmp_path / "pages.tar")
    for path in (old.document, old.archive):
        os.utime(path, (time.time() - KEPT_SECONDS - 60,) * 2)
    with worker.scratch_folder():
        assert sorted((tmp_path / "node" / "results").iterdir()) == [new.document, new.archive]


def test_a_checkpoint_that_the_remote_refuses_is_logged_once_and_copied_when_there_is_space(
    stored: Path, tmp_path: Path, refusing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "CHECKPOINT_INTERVAL", 0.01)
    monkeypatch.setattr(worker, "LONGEST_CHECKPOINT_INTERVAL", 0.04)
    done, refusals, copied = threading.Event(), [], threading.Event()
    with open_store(stored) as store:
        put = RemoteStore.put

        def counted(*arguments: Any) -> int:
            try:
                return put(*arguments)
            except PedigreeError:
                refusals.append(time.monotonic())
                raise
            finally:
                if len(refusals) == 4 and refusing.is_file():
                    refusing.unlink()
                if Path(arguments[2]).name == worker.MARKER:
                    copied.set()

        monkeypatch.setattr(RemoteStore, "put", counted)
        work = worker.Work({"address": "adapter@lora", "key": "k"}, stored, store, KeptResult(tmp_path, "k"))
        step = work.checkpoints / "step-00000002"
        step.mkdir(parents=True)
        for name in ("state.json", worker.MARKER):
            (step / name).write_text(name)
        thread = threading.Thread(target=work._keep_checkpoints, args=(done,))
        thread.start()
        assert copied.wait(30)
        done.set()
        thread.join()
        assert store.list(work.at("checkpoints")) == [f"{step.name}/{worker.MARKER}", f"{step.name}/state.json"]
    lines = [content for kind, content in messages.received(capsys.readouterr().out) if kind == "log"]
    assert len(lines) == 2 and len(refusals) == 4
    assert lines[0].startswith("adapter@lora: the latest checkpoint was not copied") and "the stage goes on" in lines[0]
    assert lines[1] == "adapter@lora: checkpoints are copied to the remote again"


def test_what_was_copied_of_a_checkpoint_is_removed_if_the_rest_is_refused(
    root: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with full_remote(s3.endpoint) as server:
        add_remote(root, f"s3://{BUCKET}/{tmp_path.name}", server.url)
        with open_store(root) as store:
            work = worker.Work({"address": "adapter@lora", "key": "k"}, root, store, KeptResult(tmp_path, "k"))
            for step in ("step-00000002", "step-00000004"):
                (work.checkpoints / step).mkdir(parents=True)
                for name in ("a.safetensors", "b.safetensors", worker.MARKER):
                    (work.checkpoints / step / name).write_text(name)
                if step == "step-00000002":
                    assert work._keep_newest("") == step
            server.answer, server.only = DISK, "b.safetensors"
            with pytest.raises(PedigreeError, match="it is full"):
                work._keep_newest("step-00000002")
            assert {name.partition("/")[0] for name in store.list(work.at("checkpoints"))} == {"step-00000002"}
            assert len(server.refused) == 1 and f"step-00000002/{worker.MARKER}" in store.list(work.at("checkpoints"))


# --- messages


def test_messages_survive_a_log_in_which_others_write_too(capsys: pytest.CaptureFixture[str]) -> None:
    messages.send("log", '@pedigree ["error", {}] ünd\nmore')
    messages.send("live", {"name": "loss.csv", "at": 0, "text": "step\n1\n"})
    found = list(
        messages.received(f'Running entrypoint for job x\n{capsys.readouterr().out}{messages.MARK}["log", "cut o\n')
    )
    assert found == [
        ("raw", "Running entrypoint for job x"),
        ("log", '@pedigree ["error", {}] ünd\nmore'),
        ("live", {"name": "loss.csv", "at": 0, "text": "step\n1\n"}),
        ("raw", f'{messages.MARK}["log", "cut o'),
    ]


@pytest.mark.parametrize(
    ("changes", "what", "exit_code"),
    [
        ({"inputs": {"code/tok.py": "another"}}, "tok: code/tok.py: not the same on worker and driver", 2),
        (
            {"remote": {"url": "s3://pedigree/dvc", "endpointurl": "http://127.0.0.1:9"}},
            f"node {platform.node()}: DVC's remote",
            1,
        ),
    ],
)
def test_an_error_on_a_node_arrives_as_one_message(
    stored: Path, tmp_path: Path, changes: dict[str, Any], what: str, exit_code: int
) -> None:
    tool("dvc_s3")
    nobody = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = {**nobody, worker.NODE_CACHE: str(tmp_path / "node"), "AWS_EC2_METADATA_DISABLED": "true"}
    with open_store(stored) as store, project_package(stored, tmp_path / "package") as package:
        job = {**run_of(stored, store, tmp_path / "work" / "tok").description(), **changes}
        command = [sys.executable, "-m", worker.__name__, json.dumps(job)]
        done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    [error] = [content for kind, content in messages.received(done.stdout) if kind == "error"]
    assert done.returncode == worker.REFUSED and "Traceback" not in done.stderr
    assert error["what"].startswith(what) and error["exit_code"] == exit_code
    assert not [*(tmp_path / "node").glob("work-*")]


def test_differing_versions_are_named_and_builds_of_one_version_are_not() -> None:
    here = messages.versions()
    assert messages.different(here, here) == []
    assert messages.different(here, {**here, "numpy": "9.9", "Python": "3.99"}) == [
        f"Python 3.99 instead of {here['Python']}", f"numpy 9.9 instead of {here['numpy']}"
    ]  # fmt: skip
    assert "+" not in here["torch"]


def test_a_task_on_a_node_with_other_versions_is_refused() -> None:
    """A job's node is not the only one: its tasks run on any."""
    here = messages.versions()
    assert ray_tasks._call(lambda shared, item: shared + item, (here, 1), 2) == 3
    with pytest.raises(InputError, match=rf"polars {here['polars']} instead of 0\.1"):
        ray_tasks._call(lambda shared, item: shared + item, ({**here, "polars": "0.1"}, 1), 2)


def test_versions_are_compared_of_all_packages_that_stages_import() -> None:
    """But of those that only read files and parameters, measure the machine,
    reach the sources, or need a GPU, which the driver's image may not have."""
    no_effect = {
        "orjson",
        "packaging",
        "psutil",
        "pydantic",
        "ruamel.yaml",
        "ruamel.yaml.clib",
        "referencing",
        "jsonschema-specifications",
        "ray",
        "s3fs",
        "botocore",
        "liger-kernel",
    }
    package = Path(messages.__file__).parents[2]
    trees = [
        ast.parse(file.read_text(encoding="utf-8"))
        for folder in ("stages", "core", "curation", "training", "evaluation")
        for file in (package / folder).rglob("*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    known = metadata.packages_distributions()
    imported = {one.lower().replace("_", "-") for name in names for one in known.get(name.partition(".")[0], ())} - {
        "pedigree-llm"
    }
    assert imported - no_effect <= {name.replace("_", "-") for name in messages.PACKAGES}


def test_the_worker_knows_where_checkpoints_are_and_when_they_are_whole(tmp_path: Path) -> None:
    from dagster_project.core.context import StageContext

    assert checkpoint.MARKER == worker.MARKER
    for address in ("adapter@lora", "reward_model"):
        stage, _, variant = address.partition("@")
        ctx = StageContext(tmp_path, stage, variant or None, tmp_path, {})
        work = worker.Work({"address": address}, tmp_path, None, KeptResult(tmp_path, "k"))  # type: ignore[arg-type]
        assert work.checkpoints == ctx.checkpoints


def test_a_worker_removes_scratch_folders_of_dead_workers_and_keeps_those_of_live_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(worker.NODE_CACHE, str(tmp_path / "node"))
    script = (
        "import sys, time; from dagster_project.orchestration.executors.worker import scratch_folder\nwith"
        " scratch_folder() as (folder, cache): print(folder, flush=True); time.sleep(600)"
    )
    live, dead = (subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        assert live.stdout and dead.stdout
        kept, left = Path(live.stdout.readline().strip()), Path(dead.stdout.readline().strip())
        dead.kill()
        dead.wait()
        assert left.is_dir()
        with worker.scratch_folder() as (own, _):
            assert sorted(path.name for path in (tmp_path / "node").glob("work-*") if path.is_dir()) == sorted(
                [own.name, kept.name]
            )
        assert not own.exists()
    finally:
        live.kill()
        live.wait()


@pytest.mark.skipif(os.getuid() != 0, reason="gives a link to another user")
def test_a_worker_follows_no_link_of_another_user_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(worker.NODE_CACHE, raising=False)
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "own").mkdir()
    link = tmp_path / f"pedigree-{os.getuid()}"
    link.symlink_to(tmp_path / "own")
    os.lchown(link, 1234, 1234)
    with pytest.raises(InputError, match="belongs to another user"), worker.scratch_folder():
        pass
    assert not list((tmp_path / "own").iterdir())


def test_a_worker_removes_what_killed_ones_had_fetched_in_part_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(worker.NODE_CACHE, str(tmp_path))
    monkeypatch.setattr(worker, "ABANDONED_SECONDS", 1.0)
    folder = tmp_path / "cache/files/md5/ee"
    folder.mkdir(parents=True)
    for name in ("b34e34d1c9301a13f6103b48eccba0", ".b34e34d1c9301a13f6103b48eccba0.1a2b3c4d.7"):
        (folder / name).touch()
    time.sleep(1.1)
    (folder / ".c5.1a2b3c4d.7").touch()
    with worker.scratch_folder():
        assert sorted(path.name for path in folder.iterdir()) == [".c5.1a2b3c4d.7", "b34e34d1c9301a13f6103b48eccba0"]


def test_a_local_run_leaves_no_record_of_another_place(root: Path) -> None:
    from dagster_project.core.layout import measured_path
    from dagster_project.core.records import write_json

    write_json(measured_path(root, "tok"), {"output_sha256": "0" * 64, "execution": {"on": "ray"}})
    run_stage(root, "tok", PIPELINE)
    assert not measured_path(root, "tok").exists()


def test_stages_that_run_on_a_cluster_are_in_a_pool_of_their_own(root: Path) -> None:
    """So the limit of this machine's GPU does not hold them back."""
    from dagster_project.orchestration.dagster.assets import build_definitions

    def pools() -> dict[str, str]:
        graph = build_definitions(root, PIPELINE).resolve_asset_graph()
        return {"@".join(key.path): next(iter(graph.get(key).pools)) for key in graph.materializable_asset_keys}

    assert "ray" not in pools().values()
    (root / "params.yaml").write_text(json.dumps({**VALUES, "execution": {"stages": {"adapter@lora": {"on": "ray"}}}}))
    assert {address for address, pool in pools().items() if pool == "ray"} == {"adapter@lora"}
    (root / "params.yaml").write_text(json.dumps({**VALUES, "execution": {"stages": {"adapter@lora": {"on": "mars"}}}}))
    assert "ray" not in pools().values()  # the run says what is wrong


def test_a_run_of_dagster_can_give_a_whole_section(root: Path) -> None:
    from dagster_project.orchestration.dagster.project import PedigreeProject, RunConfig

    project = PedigreeProject(root, pipeline=PIPELINE)
    section = json.dumps({"stages": {"tok": {"on": "ray", "cpus": 3}}})
    for config, tags in ((RunConfig(on=section), {}), (RunConfig(), {"pedigree/on": section})):
        variables = project.variables(config, tags)
        assert placed("tok", **variables) == Placement(on="ray", cpus=3)
        assert placed("adapter@lora", **variables) == Placement(), "it replaces the section of params.yaml"
    states = read_stages(root)
    pools = {stage: project.pool(stage, states[stage], VALUES, section) for stage in ("tok", "inst")}
    assert pools == {"tok": "ray", "inst": "cpu"}


def test_where_shows_the_run_that_made_the_current_output_and_no_other(root: Path) -> None:
    from dagster_project.commands.where import where
    from dagster_project.core.layout import measured_path, report_of
    from dagster_project.core.records import write_json
    from dagster_project.lineage.history import Revision
    from dagster_project.views.texts import text

    lock = Revision(root, None).lock()
    stages = {address: {"md5": stage["outs"][0]["md5"]} for address, stage in lock.items()}
    assert where(root, stages) == {} and "no run on a cluster is recorded" in text("where", where={})
    ran = {
        "on": "ray",
        "node": "gpu-7",
        "node_id": "0a1b2c3d4e",
        "queue_seconds": 3.0,
        "compute_seconds": 60.0,
        "transfer_seconds": 2.0,
        "transfer_bytes": 5_000_000,
        "cost": 1.25,
    }
    published = json.loads((root / report_of("tok")).read_text())["output_sha256"]
    write_json(measured_path(root, "tok"), {"output_sha256": published, "execution": ran})
    write_json(measured_path(root, "inst"), {"output_sha256": "0" * 64, "execution": ran})  # of another output
    assert where(root, stages) == {"tok": ran}
    assert where(root, {"tok": {"md5": "an earlier one"}}) == {}
    (root / report_of("tok")).write_text(
        (root / report_of("tok")).read_text() + "\n"
    )  # of a run that DVC did not record
    assert where(root, stages) == {}
    assert "node gpu-7 (0a1b2c3d): queue 3 s, transfer 2 s (5.0 MB), compute 60 s, cost 1.2500" in text(
        "where", where={"tok": ran}
    )
    assert "node gpu-7: queue" in text("where", where={"tok": {**ran, "node_id": ""}}), "of a job found by its result"
