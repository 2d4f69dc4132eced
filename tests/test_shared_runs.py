"""A stage is computed once for all clones: past runs travel through a DVC remote on S3, and no credential does."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from builders.random_history import Toy
from builders.s3 import S3Server
from builders.servers import free_port
from builders.small_pipeline import changed_in_dvc, commands_run, git
from conftest import ROOT, dvc, pedigree

from dagster_project.core.errors import InputError
from dagster_project.lineage.lineage import audit
from dagster_project.orchestration.dvc_remote import SECRET_OPTIONS, push

pytestmark = pytest.mark.usefixtures("warm_small")

REMOTE = ("remote", "add", "--default", "team")


@pytest.fixture
def server(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server of S3, whose address and credentials are in the environment."""
    for name, value in {**s3.environment, "AWS_ENDPOINT_URL_S3": s3.endpoint}.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def root(_made: Path, tmp_path: Path, server: S3Server) -> Path:
    """A small pipeline in which everything has run, with the documented remote, a different one for each test."""
    root = shutil.copytree(_made, tmp_path / "project", symlinks=True)
    add_remote(root, f"{server.url}/{tmp_path.name}")
    return root


def add_remote(root: Path, url: str) -> None:
    for command in ((*REMOTE, url), ("remote", "modify", "team", "verify", "true")):
        done = dvc(root, *command)
        assert done.returncode == 0, done.stderr
    git(root, "add", ".dvc/config")
    git(root, "commit", "-qm", "remote")


def clone_without_results(root: Path, target: Path) -> Path:
    """A clone of the project in which no run is recorded: neither dvc.lock nor a report."""
    git(root.parent, "clone", "-q", str(root), str(target))
    git(target, "rm", "-rq", "dvc.lock", "data/reports")
    return target


def outputs(root: Path) -> dict[str, bytes]:
    """Bytes of all outputs and reports, and dvc.lock."""
    data = root / "data"
    found = [
        path for path in data.rglob("*") if path.is_file() and path.relative_to(data).parts[0] not in {"live", "pages"}
    ]
    return {str(path.relative_to(root)): path.read_bytes() for path in [*found, root / "dvc.lock"]}


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_second_clone_computes_nothing_and_no_credential_travels(
    root: Path, server: S3Server, tmp_path: Path
) -> None:
    first = pedigree(root, "share", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout).keys() == {"remote", "runs", "objects"} and json.loads(first.stdout)["runs"] == 6
    second = clone_without_results(root, tmp_path / "second")
    done = dvc(second, "repro", "--pull", "--verbose")
    assert done.returncode == 0, done.stderr
    assert not (second / "runs.log").exists() and done.stdout.count("is cached - skipping run") == 6
    assert outputs(second) == outputs(root)
    git(second, "reset", "-q")
    assert changed_in_dvc(second) == set() and git(second, "status", "--porcelain") == "", (
        "dvc.lock and reports are those of git"
    )
    assert push(root).objects == 0, "nothing is pushed twice"
    for secret in (server.key, server.secret):
        assert secret not in first.stdout + first.stderr + done.stdout + done.stderr
        assert files_with(secret, root) == [] == files_with(secret, second)
        assert not any(secret.encode() in server.read(key) for key in server.names())
    assert files_with(server.url, root) != [], "the search looks into .dvc"


@pytest.mark.long
def test_a_change_is_computed_and_the_stages_that_it_does_not_reach_are_restored(root: Path, tmp_path: Path) -> None:
    push(root)
    second = clone_without_results(root, tmp_path / "second")
    values = json.loads((second / "params.yaml").read_text())
    values["variants"]["dora"]["r"] = 32
    (second / "params.yaml").write_text(json.dumps(values))
    assert dvc(second, "repro", "--pull").returncode == 0
    assert commands_run(second) == ["adapter@dora", "cmp"]


@pytest.mark.long
def test_an_object_that_was_changed_in_the_remote_is_not_taken(root: Path, server: S3Server, tmp_path: Path) -> None:
    push(root)
    weights = (root / "data/adapter/lora/weights.txt").read_bytes()
    (changed,) = [key for key in server.names(f"dvc/{tmp_path.name}") if server.read(key) == weights]
    server.write(changed, b"other weights")
    second = clone_without_results(root, tmp_path / "second")
    dvc(second, "repro", "--pull")
    assert commands_run(second) == ["adapter@lora"], "what cannot be restored is computed"
    assert outputs(second) == outputs(root)


def test_a_damaged_object_of_the_own_cache_is_named_and_nothing_is_pushed(
    root: Path, server: S3Server, tmp_path: Path
) -> None:
    """DVC takes the content of a read-only object for the one that its name says."""
    for cached in (
        sorted((root / ".dvc/cache/files/md5").rglob("*.dir"))[:1]
        + sorted((root / ".dvc/cache/files/md5").glob("*/" + "?" * 30))[:1]
    ):
        content = cached.read_bytes()
        cached.unlink()
        cached.write_bytes(b"[]")
        cached.chmod(0o444)
        with pytest.raises(InputError, match=f"{cached}, an object of DVC's cache, does not match its name"):
            push(root)
        cached.unlink()
        cached.write_bytes(content)
    assert not server.names(f"{tmp_path.name}/")
    assert push(root).objects > 0


def test_an_audit_gives_the_same_document_in_both_clones(tmp_path: Path, server: S3Server) -> None:
    toy = Toy(tmp_path / "first", seed=3)
    for step in ("repro", "commit_all"):
        toy.do(step)
    add_remote(toy.root, f"{server.url}/audited")
    push(toy.root)
    second = tmp_path / "second"
    git(tmp_path, "clone", "-q", str(toy.root), str(second))
    assert dvc(second, "pull", "--run-cache").returncode == 0
    first, other = (audit(root, "release") for root in (toy.root, second))
    assert first == other and first["sources"]


@pytest.mark.parametrize(
    ("arrange", "what", "hint"),
    [
        (
            lambda root, patch: dvc(root, "remote", "remove", "team"),
            "there is no default DVC remote",
            "dvc remote add --default team s3://",
        ),
        (
            lambda root, patch: dvc(root, "remote", "modify", "team", "url", "s3://no-such-bucket/x"),
            "bucket does not exist",
            "address",
        ),
        (
            lambda root, patch: patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}"),
            "Could not connect",
            "address",
        ),
        (
            lambda root, patch: without_credentials(patch),
            "Unable to locate credentials",
            "the credentials in the environment",
        ),
        (
            lambda root, patch: dvc(root, "remote", "modify", "team", "secret_access_key", "a-secret"),
            "which git tracks, has the credential team.secret_access_key",
            "--unset team secret_access_key",
        ),
        (
            lambda root, patch: dvc(root, "remote", "modify", "team", "url", "gs://bucket/x"),
            "requires 'dvc-gs'",
            "pip install",
        ),
    ],
    ids=["no remote", "no bucket", "no server", "no credentials", "a credential in git", "no package"],
)
def test_a_remote_that_cannot_be_used_is_one_message(
    root: Path, monkeypatch: pytest.MonkeyPatch, arrange, what: str, hint: str
) -> None:
    arrange(root, monkeypatch)
    with pytest.raises(InputError) as refusal:
        push(root)
    assert what in str(refusal.value) and hint in refusal.value.hint
    assert "a-secret" not in str(refusal.value)


def without_credentials(patch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.delenv(name)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


def test_the_projects_own_config_of_dvc_has_no_credential_and_a_local_one_is_ignored() -> None:
    assert not any(option in (ROOT / ".dvc/config").read_text() for option in SECRET_OPTIONS)
    ignored = subprocess.run(["git", "check-ignore", "-q", ".dvc/config.local"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
