"""DVC's remote: past runs for other clones, and the inputs and outputs of stages that run on other machines."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dagster_project.core import faults
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_file
from dagster_project.core.text import many
from dagster_project.lineage.history import finished_runs
from dagster_project.orchestration.dvc import declared_stages, open_repo, overlap, stage_among, stage_named
from dagster_project.orchestration.experiments import workspace_of
from dagster_project.orchestration.private_api import private_module

SECRET_OPTIONS = {
    "access_key_id", "secret_access_key", "session_token", "password", "sas_token", "account_key", "connection_string",
    "passphrase", "token", "client_secret", "oss_key_secret", "gdrive_client_secret", "custom_auth_header",
    "sse_customer_key",
}  # fmt: skip
"""Options of a DVC remote that hold a credential."""


@dataclass(frozen=True)
class PushResult:
    """Result of `push`: what it copied to a DVC remote."""

    remote: str
    runs: int
    """Entries of the run cache on this machine whose outputs are complete."""
    objects: int
    """Objects that the remote did not have."""


def is_refusal(error: Exception) -> bool:
    """True if a remote refused or was unreachable, False for a programming error.

    Each kind of remote has its own exceptions (botocore, gcsfs, adlfs, paramiko, ...); all libraries also raise those
    of the operating system, and botocore a ValueError for an address.
    """
    return isinstance(error, OSError | ValueError) or type(error).__module__.partition(".")[0] not in {
        "builtins",
        "dagster_project",
    }


FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"}
"""Codes of S3 servers that have no space, or where a quota is reached (MinIO, Ceph). Amazon's has none."""
MAKE_SPACE = "free some space in the remote, or ask for a larger quota, then run the same command again"


def is_full(error: BaseException) -> bool:
    """Whether a remote refused to store something for lack of space, if its answer says so."""
    answer = getattr(error.__cause__ or error, "response", None)
    if isinstance(answer, Mapping):  # of botocore
        if answer.get("Error", {}).get("Code") in FULL:
            return True
        if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == HTTPStatus.INSUFFICIENT_STORAGE:
            return True
    # the second: of the server's disk, in another answer
    return faults.is_full(error) or os.strerror(errno.ENOSPC).lower() in str(error).lower()


def push(root: Path, remote: str | None = None) -> PushResult:
    """Copy sources, outputs and the run cache, with everything that it refers to, to a DVC remote.

    `dvc push --run-cache` omits what only the run cache refers to: every report, and the outputs of earlier runs.
    Another clone could then restore no stage.

    Args:
        remote: its name in .dvc/config (default: the default remote).
    Raises:
        InputError: no such remote, a credential is in .dvc/config, an object of
            the cache is damaged, or the remote refuses or does not answer.
    """
    with chdir(root), open_repo(root) as repo:  # DVC resolves the paths of past runs relative to the current directory
        name = remote or repo.config["core"].get("remote")
        if name not in repo.config["remote"]:
            problem = f"there is no DVC remote named {name}" if name else "there is no default DVC remote"
            raise InputError(problem, f"`dvc remote add --default {name or 'team'} s3://BUCKET/PREFIX` adds one")
        _refuse_tracked_credentials(repo)
        try:
            runs = _complete_runs(repo)
            used = {info for stage in runs.values() for infos in stage.get_used_objs().values() for info in infos}
            _refuse_damaged(repo, name, used)
            result = repo.cloud.push(used, remote=name)  # before the run cache: no entry refers to missing objects
            if result.failed:
                raise InputError(
                    f"not pushed to {name}: {many(len(result.failed), 'object')}", "see the messages above; push again"
                )
            _push_runs(repo, name, runs)
            return PushResult(name, len(runs), len(result.transferred) + repo.push(remote=name))
        except ImportError as error:
            raise InputError(
                f"cannot push to the DVC remote {name}: {error}", "`pip install 'pedigree-llm[s3]'` installs dvc-s3"
            ) from None
        except Exception as error:
            if faults.is_full(error) or not is_refusal(error):
                raise
            raise InputError(
                f"cannot push to the DVC remote {name}: {' '.join(str(error).split())}",
                "check its address and the credentials in the environment (docs/cluster.md)",
            ) from None


def _refuse_tracked_credentials(repo: Any) -> None:
    """Raises:
    InputError: .dvc/config has a credential.
    """
    tracked = repo.config.load_one("repo").get("remote", {})
    if secret := next(
        (f"{of}.{option}" for of, options in tracked.items() for option in SECRET_OPTIONS & set(options)), None
    ):
        raise InputError(
            f".dvc/config, which git tracks, has the credential {secret}",
            f"`dvc remote modify --unset {secret.replace('.', ' ')}`,"
            " and give credentials by the environment (docs/cluster.md)",
        )
    if shown := next((of for of, options in tracked.items() if _has_password(options)), None):
        raise InputError(
            f".dvc/config, which git tracks, has a password in the address of the remote {shown}",
            f"`dvc remote modify {shown} url ADDRESS` without it,"
            " and give credentials by the environment (docs/cluster.md)",
        )


def _refuse_damaged(repo: Any, remote: str, used: Iterable[Any]) -> None:
    """DVC does not hash read-only objects before it copies them, and other
    clones would find a damaged one in the place of the real one.

    Raises:
        InputError: an object that the remote lacks does not match its name.
    """
    absent = repo.cloud.status({*used, *repo.used_objs().get(None, ())}, remote=remote).new
    for oid in sorted(info.value for info in absent if info.name == "md5"):
        path = Path(repo.cache.local.oid_to_path(oid))
        if path.is_file() and md5_of_file(path) != oid.removesuffix(".dir"):
            raise InputError(
                f"{path}, an object of DVC's cache, does not match its name: nothing was pushed",
                "`pedigree verify --integrity` names what it contains, and how to restore it",
            )


def _complete_runs(repo: Any) -> dict[Path, Any]:
    """File of an entry of the run cache -> temporary stage, for entries whose outputs are all in the cache."""
    cache = repo.stage_cache
    entries = {
        path: cache._load_cache(path.parent.name, path.name) for path in finished_runs(Path(cache.cache_dir).parent)
    }
    stages = {path: cache._create_stage(entry) for path, entry in entries.items() if entry}
    return {path: stage for path, stage in stages.items() if stage.outs_cached()}


def _push_runs(repo: Any, name: str, entries: Iterable[Path]) -> None:
    """Copy entries of the run cache to a remote.

    DVC's own `push` of the run cache copies incomplete ones, too, and only logs failures.
    """
    target = repo.cloud.get_remote_odb(name, "push --run-cache", hash_name="md5-dos2unix")  # that of the folder `runs`
    if isinstance(target.fs, private_module("dvc.fs").HTTPFileSystem):
        raise InputError(
            f"the DVC remote {name} is on a web server, to which past runs cannot be pushed",
            "use a remote of another kind",
        )
    cache = repo.cache.legacy
    paths = {str(path): target.fs.join(target.path, *path.relative_to(cache.path).parts) for path in entries}
    if paths:
        private_module("dvc.fs").generic.copy(cache.fs, [*paths], target.fs, [*paths.values()])


def inputs_by_hash(root: Path, address: str) -> dict[str, str]:
    """Recorded content hash of each cached output and each source with a .dvc file that a stage reads, by path."""
    with open_repo(root) as repo:
        return {
            os.path.relpath(out.fs_path, root): out.hash_info.value
            for out in _read_outputs(repo, root, address)
            if out.hash_info
        }


def _read_outputs(repo: Any, root: Path, address: str) -> list[Any]:
    all_stages = declared_stages(repo)
    stage = stage_among(all_stages, address)
    paths = [os.path.relpath(dep.fs_path, root) for dep in stage.deps]
    return [
        out
        for other in all_stages
        if other is not stage
        for out in other.outs
        if out.use_cache and any(overlap(os.path.relpath(out.fs_path, root), path) for path in paths)
    ]


def checkout_inputs(root: Path, address: str) -> None:
    """Put the recorded inputs of a stage from the cache into the workspace."""
    with open_repo(root) as repo:
        for out in _read_outputs(repo, root, address):
            out.checkout(force=True)


def commit_outputs(root: Path, address: str) -> dict[str, str]:
    """Add a stage's outputs and plots to the cache; dvc.lock is not changed. Returns their content hashes by path."""
    with open_repo(root) as repo:
        hashes = {}
        for out in stage_named(repo, address).outs:
            if out.use_cache:
                out.save()
                out.commit()
                hashes[os.path.relpath(out.fs_path, root)] = out.hash_info.value
        return hashes


def definition_of(root: Path, address: str) -> tuple[str, list[str]]:
    """A stage's command and the paths of its outputs in dvc.yaml."""
    with open_repo(root) as repo:
        stage = stage_named(repo, address)
        command = stage.cmd if isinstance(stage.cmd, str) else " && ".join(stage.cmd)
        return command, sorted(os.path.relpath(out.fs_path, root) for out in stage.outs)


PUBLIC_OPTIONS = (
    "endpointurl", "region", "use_ssl", "ssl_verify",
    "sse", "sse_kms_key_id", "acl", "grant_full_control", "grant_read", "grant_read_acp", "grant_write_acp",
)  # fmt: skip
"""Options of a remote that are sent to workers: where it is, and how what they write there is encrypted and who may
read it. Credentials are not sent: each node has them in its environment."""


@dataclass(frozen=True)
class Remote:
    """DVC's default remote as a file system."""

    url: str
    options: Mapping[str, str]
    """`url` and those of `PUBLIC_OPTIONS` that are set."""
    fs: Any
    """DVC's file system."""
    path: str
    """Folder of the remote in `fs`."""
    object_at: Callable[[str], str]
    """Content hash -> path of the object in `fs`."""
    cached_at: Callable[[str], str]
    """Content hash -> path of the object in the local cache."""
    make_folder: Callable[[str], None]
    """Makes a folder of the local cache, with the mode that DVC's settings give it."""


def _has_password(options: Mapping[str, Any]) -> bool:
    """Whether an address of a remote contains a password, or a token in place of the user."""
    addresses = [urlsplit(str(options.get(name, ""))) for name in ("url", "endpointurl")]
    return any(one.password or (one.username and one.scheme in {"http", "https"}) for one in addresses)


@contextmanager
def open_remote(root: Path) -> Iterator[Remote]:
    """DVC's default remote, and the cache of the project.

    Of DVC's copy of a workspace for an experiment, those of the workspace: a path in its settings may be relative.

    Raises:
        InputError: there is no default remote, it is a versioned one, its package is not installed, or a credential is
            in .dvc/config.
    """
    config_error = private_module("dvc.config").ConfigError
    with open_repo(workspace_of(root)) as repo:
        name = repo.config["core"].get("remote")
        try:
            # with those of a remote that it names
            configured = private_module("dvc.fs").get_fs_config(repo.config, name=name) if name else {}
            if _has_password(configured):
                raise InputError(
                    "the URL of DVC's remote contains a password, which jobs would show",
                    "leave it out, and set it on every node",
                )
            if configured.get("sse_customer_key"):
                raise InputError(
                    "DVC's remote encrypts with `sse_customer_key`, which jobs would show, and nodes would not use",
                    "use `sse_kms_key_id` instead, or run the stage here: PEDIGREE_EXECUTION=local",
                )
            _refuse_tracked_credentials(repo)
            remote, objects = repo.cloud.get_remote(), repo.cloud.get_remote_odb()
        except config_error as error:
            raise InputError(
                f"DVC has no remote that can carry the files of a stage: {' '.join(str(error).split())}",
                "`dvc remote add -d storage s3://BUCKET/FOLDER`, or a folder that driver and nodes share",
            ) from None
        except (ImportError, private_module("dvc.exceptions").DvcException) as error:
            raise InputError(
                f"DVC's remote cannot be used: {error}", "install its package, e.g. `pip install dvc-s3`"
            ) from None
        options = {key: str(value) for key, value in configured.items() if key in PUBLIC_OPTIONS}
        url = remote.fs.unstrip_protocol(remote.path) if remote.fs.protocol != "local" else remote.path
        yield Remote(
            url, {"url": url, **options}, remote.fs, remote.path, objects.oid_to_path,
            repo.cache.local.oid_to_path, repo.cache.local.makedirs,
        )  # fmt: skip
