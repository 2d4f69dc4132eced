"""Executor `ray`: the stage runs as a job of a Ray cluster (Jobs API), on a node that shares no folder with this host.

The driver pushes the inputs to DVC's remote, submits a job with the project's files and one command line, follows its
log, and fetches the outputs by hash. A job is identified by its inputs, so that the next driver takes over the job of a
driver that was killed (docs/decisions/024).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from shutil import copyfile
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dagster_project.core.context import StageContext
from dagster_project.core.errors import CheckFailed, InputError, PedigreeError
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.imports import lean_imports
from dagster_project.core.progress import clock
from dagster_project.core.records import remove, write_text
from dagster_project.execution import Execution, Placement
from dagster_project.lineage.history import Objects
from dagster_project.orchestration import durations, dvc_remote, dvc_run, integrity, locks, processes
from dagster_project.orchestration.executors import StageJob, StageResult
from dagster_project.orchestration.executors.messages import THREADS, received, versions
from dagster_project.orchestration.executors.package import project_package
from dagster_project.orchestration.executors.ray_queue import (
    PROJECT,
    RESOURCES,
    SECONDS,
    STAGE,
    has_too_few_nodes,
    jobs_ahead,
)
from dagster_project.orchestration.experiments import is_temporary, workspace_of
from dagster_project.orchestration.remote_store import OBJECT, Damaged, RemoteStore, open_store

log = logging.getLogger("pedigree")

T = TypeVar("T")
ATTEMPTS = 3
"""Jobs for one run of a stage, if workers are lost. A stage that fails by itself is not run again."""
POLL = 1.0
"""Polling interval of a job, in seconds; longer if its log is large, because Ray's API always returns the whole log."""
LOG_BYTES_PER_SECOND = 1e6
STOP_SECONDS = 5.0
"""Time for an interrupted job to end. Ray kills its processes after 3 seconds."""
WAITING_LOG_SECONDS = 60.0
"""Interval of log lines about a job that waits for resources."""
NEVER_STARTED = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
"""Ray's error type of a job that waited too long for resources (15 minutes by
default). It is submitted again, and was not lost."""
NO_WORKER = (1, 126, 127)
"""Exit codes of a job whose worker did not begin: Python cannot import Pedigree, or the shell cannot start Python."""
LOCAL, LOCAL_NAMES = "local", {"local", "auto"}
"""Addresses of the cluster that runs on this host."""
VARIABLES, SETTING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"), "execution.address"
"""What can give the address: Ray's variables, the first before the second, and params.yaml."""
WORKSPACE, DRIVER = "pedigree/workspace", "pedigree/driver"
"""Metadata of a job of a queued experiment: the workspace that DVC copied, and the process that submitted the job."""
NODES = "pedigree/nodes"
"""Metadata of a job of several nodes: their number."""


class ClusterGone(PedigreeError):
    """The cluster does not answer."""


class TokenRefused(InputError):
    """The cluster requires another token."""


@dataclass(frozen=True)
class RayExecutor:
    settings: Execution
    placement: Placement
    patience: float = 60.0
    """Seconds without an answer of the cluster, while a job runs, after which the run fails."""

    def run(self, job: StageJob) -> StageResult:
        if self.placement.nodes > 1:
            _refuse_nodes(job.ctx, self.placement.nodes)
        _resolve_token_path(job.ctx.root)
        setting = next((name for name in VARIABLES if os.environ.get(name)), SETTING)
        address = os.environ.get(setting) or self.settings.address or LOCAL
        client, url = connect(address, setting)
        with open_store(job.ctx.root) as store:
            run = _Run(self, job, store, client, url, address in LOCAL_NAMES)
            try:
                return run.result()
            except BaseException:
                if is_temporary(job.ctx.root):  # no later run has its identity, and none would remove its checkpoints
                    with suppress(PedigreeError):
                        store.remove(run.at())
                raise
            finally:
                durations.remove_job(job.ctx.root, job.ctx.address)


def _refuse_nodes(ctx: StageContext, nodes: int) -> None:
    """Raise InputError if the training cannot run on several nodes."""
    where, processes = f"execution: {ctx.address} with nodes: {nodes}", ctx.compute.processes
    if processes % nodes:
        raise InputError(
            f"{where}: compute.processes: {processes} do not divide evenly among {nodes} nodes", "choose a multiple"
        )
    entry = ctx.values.get(ctx.variants_of.get(ctx.stage, ctx.stage))
    if ctx.variant and isinstance(entry, Mapping):
        entry = entry.get(ctx.variant)
    if isinstance(entry, Mapping) and entry.get("sharding"):
        raise InputError(
            f"{where}: with `sharding`, all processes write checkpoints into one folder, and nodes share none",
            "use one node, or hosts that share a folder (docs/methods.md, Several hosts)",
        )


def connect(address: str, setting: str = SETTING) -> tuple[Any, str]:
    """Client of Ray's Jobs API, and the URL of the dashboard.

    Args:
        setting: what gave the address, for messages.
    Raises:
        InputError: Ray is not installed, the address is invalid, or it is not
            on this machine and token authentication is off, or there is no token.
        ClusterGone: no cluster answers.
    """
    token = _token()
    by_token = bool(token) and os.environ.get("RAY_AUTH_MODE") == "token"
    if address not in LOCAL_NAMES:
        _refuse_unsafe(address, by_token, setting)
    # Ray reads the mode when it is imported. Its client lets the other variables override the address that it is given.
    with _environment(RAY_AUTH_MODE="token" if token else None, RAY_API_SERVER_ADDRESS=None, RAY_ADDRESS=None):
        try:
            # jsonschema, which Ray imports, builds its grammar for a second; Ray does not use it
            with lean_imports("rfc3987_syntax"):
                from ray.dashboard.utils import get_address_for_submission_client
                from ray.exceptions import AuthenticationError, RayError
                from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise InputError(
                "Ray is not installed",
                "`pip install 'pedigree-llm[ray]'`, or run the stage here: PEDIGREE_EXECUTION=local",
            ) from None
        # notes on each upload
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)
        hint = (
            "start one on this machine with `ray start --head`, or set execution.address in params.yaml,"
            " or RAY_ADDRESS, which takes precedence, to http://HOST:8265"
        )
        url = address
        try:
            if address in LOCAL_NAMES:
                url = get_address_for_submission_client("auto")
                _refuse_unsafe(url, by_token, setting)
            headers = {"Authorization": f"Bearer {token}"} if token else None
            return JobSubmissionClient(url, headers=headers), url.rstrip("/")
        except AuthenticationError:
            raise TokenRefused(
                f"the Ray cluster at {url} requires another token",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its token",
            ) from None
        # RayError: a local cluster that was killed
        except (OSError, RuntimeError, ValueError, RayError) as error:
            reason = ("" if url in LOCAL_NAMES else _unknown_host(url)) or " ".join(str(error).split())[:200]
            raise ClusterGone(f"no Ray cluster answers at {url}: {reason}", f"{hint}; nothing was recorded") from None


def _refuse_unsafe(url: str, by_token: bool, setting: str) -> None:
    """Refuse what is not the address of a dashboard. Of HOST:PORT, Ray would ask the head, and wait for 45 seconds."""
    if "@" in url:
        raise InputError(
            f"{setting} contains credentials, which logs would show",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
        )
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        _ = parts.port  # raises ValueError above 65535
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InputError(
            f"{setting}: {url} is not an address of Ray's dashboard",
            f"write `local`, or http://{parts.hostname or 'HOST'}:8265, with the port of the dashboard"
            " (the port of the head, 6379, and of Ray's client, 10001, are others)",
        )
    if not by_token and not _is_loopback(parts.hostname):
        if unknown := _unknown_host(url):
            raise InputError(f"{setting}: {unknown}", "correct the name of the host")
        raise InputError(
            f"{setting}: {parts.hostname} is not this machine, and no token authenticates its users:"
            " anyone who reaches the cluster could run code",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on the cluster and here; see docs/cluster.md",
        )


def _unknown_host(url: str) -> str:
    """Why the host of a URL has no address, e.g. because its name is misspelled; "" if it has one, or if a proxy looks
    it up."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return ""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        return f"this machine finds no host {host} ({getattr(error, 'strerror', None) or error})"
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token() -> str:
    """Ray's token, from the same variables and files as in Ray; "" if token authentication is off.

    As with `ray start`, an existing token is used unless RAY_AUTH_MODE is another mode.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _resolve_token_path(root: Path) -> None:
    """Make a relative RAY_AUTH_TOKEN_PATH absolute, for this process: a trial runs in a copy of the workspace, and the
    path is one of the workspace."""
    if given := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(workspace_of(root) / given)


@contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """While open, set or, for None, remove these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@dataclass
class _Run:
    """One run of one stage, over one or several jobs."""

    executor: RayExecutor
    job: StageJob
    store: RemoteStore
    client: Any
    url: str
    on_this_host: bool
    """Whether the nodes are this host, with its Python."""
    name: str = ""
    """Id of the current job."""
    attempts: int = 0
    submitted: float | None = None
    """Time at which the latest job was submitted, or the first of those that never started."""
    started: float | None = None
    """Time at which the worker of the latest job began, or was found by this driver."""
    node_id: str = ""
    node_ids: str = ""
    """Of a job of several nodes, whose own process is on another one."""
    queued: float | None = None
    """Seconds until the worker of the latest job began; None if another driver submitted it."""
    lost_seconds: float = 0.0
    """Seconds that jobs ran without a result, or with one that arrived damaged."""
    error: Mapping[str, Any] | None = None
    damaged: list[str] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)
    """Ids of jobs that this run stopped, none of which is resumed, even if it has not ended yet."""
    raw: list[str] = field(default_factory=list)
    """Lines of the latest job's log that are not messages."""
    bytes_sent: int = 0
    push_seconds: float = 0.0
    fetch_seconds: float = 0.0

    def __post_init__(self) -> None:
        address, inputs = self.job.ctx.address, dict(self.job.inputs)
        self.address = address
        self.project, self.workspace = _project_id(self.job.ctx.root), _project_id(workspace_of(self.job.ctx.root))
        self.command, outs = dvc_remote.definition_of(self.job.ctx.root, address)
        # neither is an input for DVC, but a job that began before a change of either has another result
        others = [self.command, outs, versions(), os.environ.get(THREADS)]
        identity = sha256_of_text(json.dumps([self.project, address, inputs, *others], sort_keys=True))
        self.prefix = f"{address.replace('@', '.')}-{self.project[:8]}-"
        self.key = f"{self.prefix}{identity[:20]}"

    def at(self, *names: str) -> str:
        return self.store.at("jobs", self.key, *names)

    # ---- result ------------------------------------------------------------------------------------------------------

    def result(self) -> StageResult:
        """The result of the stage: of an earlier job whose result was not
        recorded, of one that is still running, or of a new one."""
        self._discard_others()
        found = self.store.read_document(self.at("result.json"))
        if found is not None:
            log.info(f"{self.address}: the result of an earlier job with the same inputs is used")
        for last in (False, True):
            if found is None:
                found = self._computed()
            try:
                result = self._fetch(found)
                self._tidy(result)
                return result
            except Damaged as error:
                self.store.discard(oid for oid in error.objects if OBJECT.fullmatch(oid))
                self.store.remove(self.at())
                self.lost_seconds += sum(found["seconds"].values())
                if last:
                    raise CheckFailed(
                        f"{self.address}: its outputs arrived damaged twice: {error.what}",
                        "check DVC's remote; nothing was recorded",
                    ) from None
                log.warning(f"{self.address}: {error.what}; it is computed again")
                found = None
        raise AssertionError

    def _tidy(self, result: StageResult) -> None:
        """Remove the result and checkpoints from the remote.

        A result that DVC records next stays for the next driver of the stage: until dvc.lock is written, this process
        or DVC may be killed.
        """
        stays = result.exit_code == 0 and "DVC_STAGE" in os.environ and not is_temporary(self.job.ctx.root)
        try:
            self.store.remove(self.at("checkpoints") if stays else self.at())
        except PedigreeError as error:
            log.warning(f"{self.address}: {error.what}")

    def _computed(self) -> Mapping[str, Any]:
        """The result of a job; lost jobs are submitted again."""
        began = time.monotonic()
        inputs = dvc_remote.inputs_by_hash(self.job.ctx.root, self.address)
        self.bytes_sent += self.store.push(inputs.values())
        self.push_seconds += time.monotonic() - began
        with project_package(self.job.ctx.root, self.job.ctx.scratch.with_name(f"{self.address}.package")) as folder:
            lost, self.submitted = 0, None
            while lost < ATTEMPTS:
                self.error, self.damaged, self.raw = None, [], []
                details = self._follow(folder)
                try:
                    result = self.store.read_document(self.at("result.json"))
                except PedigreeError:
                    if self.error is None:
                        raise
                    result = None  # the worker, too, found that the remote does not answer, and its message says more
                if result is not None:
                    return dict(result)
                if self.error is not None:
                    kind = InputError if self.error["exit_code"] == 2 else CheckFailed
                    raise kind(self.error["what"], self.error["hint"])
                if self.started is None and details is not None and details.driver_exit_code in NO_WORKER:
                    raise InputError(
                        f"{self.address}: its node cannot start a worker of Pedigree: {_reason(details)}{self._tail()}",
                        "install the driver's environment on all nodes: Pedigree, and the same packages"
                        " (docs/cluster.md, Nodes); nothing was recorded",
                    )
                if details is not None and str(details.error_type) == NEVER_STARTED:
                    log.info(
                        f"{self.address}: Ray gave up job {self.name},"
                        " which waited for resources; it is submitted again"
                    )
                    continue
                lost, self.submitted = lost + 1, None
                self.lost_seconds += time.monotonic() - self.started if self.started else 0.0
                if self.damaged:
                    why = f"{len(self.damaged)} input(s) were damaged in the remote"
                    log.warning(f"{self.address}: {why}; they are sent again")
                    self.store.discard(self.damaged)
                    self.bytes_sent += self.store.push(inputs.values())
                else:
                    why = _reason(details)
                    log.warning(f"{self.address}: job {self.name} ended without a result: {why}")
        raise CheckFailed(
            f"{self.address}: {ATTEMPTS} jobs ended without a result, the last one: {why}{self._tail()}",
            f"see {self.url}; nothing was recorded",
        )

    def _tail(self) -> str:
        lines = [line for line in self.raw if self.name not in line]  # not the command line, with its long argument
        return "".join(f"\n{line}" for line in lines[-10:])

    def _discard_others(self) -> None:
        """Stop jobs of this stage that compute from other inputs or wait for other resources.

        Remove results of other inputs; of the same inputs too, if the stage has to be run.
        """
        forced, listed = dvc_run.is_forced(), self._listed()
        for job in listed:
            if self._is_abandoned(job):
                log.info(f"{self.address}: stopping job {job.submission_id} of an experiment whose driver has ended")
                self._stop(job.submission_id)
                self.store.remove(self.store.at("jobs", job.submission_id.rpartition("-")[0]))
        for job in filter(self._is_own, listed):
            if forced:
                why = "because the run is forced"
            elif not job.submission_id.startswith(self.key):
                why = "which has other inputs"
            elif job.metadata.get(RESOURCES) != self._resources() and self._waits(job):
                why = "which waits for other resources"
            else:
                continue
            log.info(f"{self.address}: stopping job {job.submission_id}, {why}")
            self._stop(job.submission_id)
        for key in {name.partition("/")[0] for name in self.store.list(self.store.at("jobs"))}:
            if key.startswith(self.prefix) and (forced or key != self.key):
                self.store.remove(self.store.at("jobs", key))

    def _waits(self, job: Any) -> bool:
        """Whether a job has not got its resources yet. One of several nodes waits for them while Ray says RUNNING."""
        if str(job.status) == "PENDING" or NODES not in job.metadata:
            return str(job.status) == "PENDING"
        with suppress(RuntimeError, OSError), self._authenticated():
            return not any(kind == "hello" for kind, _ in received(self.client.get_job_logs(job.submission_id)))
        return False

    def _listed(self) -> list[Any]:
        """Ray's details of all jobs that have not ended."""
        listed = self._request(self.client.list_jobs)
        return [job for job in listed if job.submission_id and not job.status.is_terminal()]

    def _is_own(self, job: Any) -> bool:
        """Whether it is a job of this stage of this workspace."""
        return bool((job.metadata or {}).items() >= {STAGE: self.address, PROJECT: self.project}.items())

    def _is_abandoned(self, job: Any) -> bool:
        """Whether it is a job of a queued experiment of this workspace whose driver was killed: each experiment has a
        copy of the workspace, so no later run takes it over."""
        metadata = job.metadata or {}
        return metadata.get(WORKSPACE) == self.workspace and processes.has_ended(metadata.get(DRIVER, ""))

    # ---- a job -------------------------------------------------------------------------------------------------------

    def _follow(self, folder: Path) -> Any:
        """Run one job, or follow one that is running, and handle its messages until it ends.

        Returns:
            Ray's details of the job; None if the cluster lost it.
        """
        running = [job.submission_id for job in filter(self._is_own, self._listed())]
        running = [name for name in running if name.startswith(self.key) and name not in self.stopped]
        self.attempts += 1
        self.name = running[0] if running else f"{self.key}-{secrets.token_hex(4)}"
        self.submitted, self.started, self.queued = self.submitted or time.monotonic(), None, None
        self.node_ids = ""
        try:
            if running:
                log.info(f"{self.address}: going on with job {self.name}")
            else:
                self._submit(folder)
                log.info(f"{self.address}: job {self.name} was submitted: {self.url}/#/jobs/{self.name}")
            durations.write_job(self.job.ctx.root, self.address, self.name, None)
            return self._wait(bool(running))
        except KeyboardInterrupt:
            self._stop(self.name)
            raise

    def description(self) -> dict[str, Any]:
        """Argument of the worker. Ray shows it to anyone with access to the cluster, so it contains no credentials."""
        place = self.executor.placement
        return {
            "address": self.address,
            "command": self.command,
            "key": self.key,
            "inputs": dict(self.job.inputs),
            "forced": dvc_run.is_forced(),
            "remote": dict(self.store.remote.options),
            "versions": versions(),
            "threads": os.environ.get(THREADS),
            "workers": place.workers,
            "nodes": place.nodes,
            **(self._group() if place.nodes > 1 else {}),
        }

    def _group(self) -> dict[str, Any]:
        """What Ray Train needs for the nodes of a training, with the names of Ray's resources."""
        return {
            "processes": self.job.ctx.compute.processes,
            "reserved": self._needed(),
            "image": self.executor.placement.image,
        }

    def _submit(self, folder: Path) -> None:
        place = self.executor.placement
        # otherwise Ray leaves out files that .gitignore matches although git tracks them, and folders named `venv`
        os.environ |= {"RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1", "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES": ""}
        python = sys.executable if self.on_this_host else "python"
        command = [python, "-m", "dagster_project.orchestration.executors.worker", json.dumps(self.description())]
        of_experiment = {WORKSPACE: self.workspace, DRIVER: processes.this_process()}
        seconds = durations.last(self.job.ctx.root, self.address, durations.RAY)
        options: dict[str, Any] = {
            "submission_id": self.name,
            "entrypoint": shlex.join(command),
            "runtime_env": {"working_dir": str(folder)},
            "metadata": {
                STAGE: self.address,
                PROJECT: self.project,
                RESOURCES: self._resources(),
                **({NODES: str(place.nodes)} if place.nodes > 1 else {}),
                **(of_experiment if is_temporary(self.job.ctx.root) else {}),
                **({SECONDS: f"{seconds:.1f}"} if seconds is not None else {}),
            },
            "entrypoint_label_selector": {"image": place.image} if place.image else None,
        }
        if place.nodes == 1:  # else the workers that it starts reserve their nodes, all at once
            options |= {
                "entrypoint_num_cpus": place.cpus,
                "entrypoint_num_gpus": place.gpus,
                "entrypoint_memory": None if place.memory is None else int(place.memory * 1e9),
                "entrypoint_resources": dict(place.resources) or None,
            }

        def submit() -> None:
            try:
                self.client.submit_job(**options)
            except RuntimeError as error:
                if "already exists" not in str(error):  # an earlier attempt was accepted, and its answer was lost
                    raise

        self._request(submit)

    def _wait(self, adopted: bool) -> Any:
        read, noted = 0, time.monotonic()
        while True:
            details = self._request(lambda: self.client.get_job_info(self.name))
            if details is None:
                return None
            ended, self.node_id = details.status.is_terminal(), self.node_ids or details.driver_node_id or ""
            # the log does not exist yet, or its node was lost
            with suppress(RuntimeError, OSError), self._authenticated():
                text: str = self.client.get_job_logs(self.name)
                whole = len(text) if ended else text.rfind("\n") + 1
                for kind, content in received(text[read:whole]):
                    self._handle(kind, content, adopted)
                read = max(read, whole)
            if ended:
                return details
            # one of several nodes waits for them while Ray says RUNNING
            waits = str(details.status) == "PENDING" or (self.executor.placement.nodes > 1 and self.started is None)
            if waits and time.monotonic() - noted > WAITING_LOG_SECONDS:
                noted = time.monotonic()
                self._log_wait(details, adopted)
            time.sleep(max(POLL, read / LOG_BYTES_PER_SECOND))

    def _log_wait(self, details: Any, adopted: bool) -> None:
        waited = time.monotonic() - (self.submitted or 0.0)
        if adopted and details.start_time:  # by Ray's clock: another driver submitted it
            waited = max(waited, time.time() - details.start_time / 1000)
        line = f"{self.address}: has waited {clock(waited)} for {self._resources()} on the cluster"
        place = self.executor.placement
        with self._authenticated():
            needs_more_nodes = has_too_few_nodes(self.url, self._needed(), place.nodes, place.image)
        if needs_more_nodes:
            why = "no node has these resources, so it waits until one joins"
            if place.nodes > 1:
                why = f"fewer than {place.nodes} nodes have these resources, so it waits until others join"
            log.warning(f"{line}; {why} (see `ray status` and `execution`)")
        elif str(details.status) == "PENDING":  # Ray Train's log says that it waits for nodes
            others = jobs_ahead(self._request(self.client.list_jobs), self.name, self.job.ctx.root, time.time())
            log.info(f"{line}; {others}; `ray status` on the cluster shows what its nodes have")

    def _handle(self, kind: str, content: Any, adopted: bool) -> None:
        if kind == "log":
            log.info(content)
        elif kind == "live":
            self._write_live(content["name"], content["at"], content["text"])
        elif kind == "hello":
            self.started = time.monotonic()
            self.queued = None if adopted or self.submitted is None else round(self.started - self.submitted, 1)
            # that of the node's clock, for a job that began before this driver
            began = content.get("time", time.time()) if adopted else time.time()
            durations.write_job(self.job.ctx.root, self.address, self.name, began)
            remove(self.job.ctx.live)
            self.node_ids = content.get("node_ids", "")
            self.node_id = self.node_ids or self.node_id
            ids = ", ".join(one[:8] for one in self.node_id.split(", "))
            log.info(f"{self.address}: runs on node {content['node']} ({ids})")
        elif kind == "error":
            self.error = content
        elif kind == "damaged":
            self.damaged = content
        else:
            self.raw.append(content)

    def _write_live(self, name: str, start: int, text: str) -> None:
        path = self.job.ctx.live / Path(name).name
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_text(path, before[:start] + text)

    def _stop(self, name: str) -> None:
        """End a job; its processes are gone when this returns, or when Ray has killed them."""
        self.stopped.add(name)
        try:
            with self._authenticated():
                self.client.stop_job(name)
                until = time.monotonic() + STOP_SECONDS
                while not (ended := (status := self.client.get_job_status(name)).is_terminal()):
                    if time.monotonic() > until:
                        break
                    time.sleep(0.2)
        except (RuntimeError, OSError, TokenRefused) as error:
            reason = " ".join(str(error).split())[:300]
            log.warning(f"{self.address}: job {name} may not have been stopped: {reason}; see {self.url}/#/jobs/{name}")
        else:
            how = "was stopped" if ended else f"has not ended {STOP_SECONDS:.0f} s after the request to stop it"
            if str(status) == "PENDING":  # Ray passes the request on when it starts the job
                how = "waits for resources, and Ray ends it as soon as it has them; until then it is shown as PENDING"
            log.info(f"{self.address}: job {name} {how}")

    @contextmanager
    def _authenticated(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise TokenRefused(
                f"{self.address}: the Ray cluster at {self.url} no longer accepts the token that the run began with",
                "nothing was recorded; set RAY_AUTH_TOKEN_PATH to the new token and run the stage again:"
                " a job that went on is found by its inputs",
            ) from None

    def _request(self, send: Callable[[], T]) -> T:
        """The cluster's answer to a request, which is repeated if there is none. None if the job does not exist.

        Raises:
            ClusterGone: it did not answer for `patience` seconds.
            TokenRefused: its token has changed.
        """
        until = time.monotonic() + self.executor.patience
        while True:
            try:
                with self._authenticated():
                    return send()
            except (OSError, RuntimeError) as error:  # OSError: requests.ConnectionError, ConnectionError
                text, reason = str(error), " ".join(str(error).split())[-300:]
                if "status code 404" in text:
                    return None  # type: ignore[return-value]
                if isinstance(error, RuntimeError) and "status code 5" not in text:
                    raise CheckFailed(
                        f"{self.address}: Ray refused a request: {reason}", f"see {self.url}; nothing was recorded"
                    ) from None
                if time.monotonic() > until:
                    raise ClusterGone(
                        f"{self.address}: the Ray cluster at {self.url} has not answered"
                        f" for {self.executor.patience:.0f} s ({reason})",
                        "nothing was recorded; run the stage again when the cluster is back:"
                        " a job that went on meanwhile is found by its inputs",
                    ) from None
                time.sleep(POLL)

    # ---- outputs -----------------------------------------------------------------------------------------------------

    def _fetch(self, result: Mapping[str, Any]) -> StageResult:
        """Outputs, plots and pages of a result into the working folder, each verified.

        Raises:
            Damaged: an object, or the output as a whole, does not match its hash.
            CheckFailed: the result names a file outside of the outputs.
        """
        began = time.monotonic()
        scratch = self.job.ctx.scratch
        fetched = self.store.pull(result["outs"].values())
        for path, oid in result["outs"].items():
            self._copy(oid, scratch / path)
        if result["pages"]:
            archive = scratch / "pages.tar"
            try:
                self.store.get(self.at("pages.tar"), archive)
                fetched += archive.stat().st_size
                remove(self.job.ctx.pages)
                with tarfile.open(archive) as tar:
                    tar.extractall(self.job.ctx.pages, filter="data")
            except (FileNotFoundError, tarfile.TarError):  # otherwise each later run would find this result, and fail
                raise Damaged(["pages.tar"]) from None
            archive.unlink()
            (self.job.ctx.pages / "measured.json").unlink(missing_ok=True)
        if result["exit_code"] == 0 and integrity.sha256_of(self.job.ctx.out) != result["output_sha256"]:
            raise Damaged(sorted(result["outs"].values()))
        self.fetch_seconds = time.monotonic() - began
        measured = {
            key: value for key, value in result["measured"].items() if key not in {"output_sha256", "execution"}
        }
        return StageResult(result["exit_code"], result["report"], measured, self._execution(result, fetched))

    def _copy(self, oid: str, target: Path) -> None:
        for name, one in (Objects(self.job.ctx.root).listing(oid) or {}).items():
            file = target / name if name else target
            if not file.resolve().is_relative_to(self.job.ctx.scratch.resolve()):
                raise CheckFailed(
                    f"{self.address}: the result names a file outside of the outputs: {file}",
                    "someone else wrote into DVC's remote",
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            copyfile(self.store.remote.cached_at(one), file)

    def _execution(self, result: Mapping[str, Any], fetched: int) -> dict[str, Any]:
        """Where the stage ran, how long each part took, and its cost, with that of lost jobs."""
        seconds, place = result["seconds"], self.executor.placement
        total = sum(seconds.values())
        on_each = {"cpus": place.cpus, "gpus": place.gpus, "memory": place.memory or 0.0, **place.resources}
        amounts = {name: amount * place.nodes for name, amount in on_each.items()}
        prices = self.executor.settings.price_per_hour
        cost = (
            sum(amounts.get(name, 0.0) * price for name, price in prices.items()) * (total + self.lost_seconds) / 3600
        )
        on_node = seconds.get("pull_seconds", 0.0) + seconds.get("push_seconds", 0.0)
        found = {
            "on": "ray",
            "node": result["node"],
            "node_id": self.node_id,
            "job": self.name,
            "dashboard": f"{self.url}/#/jobs/{self.name}" if self.name else self.url,
            "jobs": self.attempts,
            "queue_seconds": self.queued,
            "compute_seconds": seconds.get("compute_seconds"),
            **({"lost_seconds": round(self.lost_seconds, 1)} if self.lost_seconds else {}),
            "transfer_seconds": round(self.push_seconds + self.fetch_seconds + on_node, 3),
            "transfer_bytes": self.bytes_sent + fetched + sum(result["bytes"].values()),
            **({"cost": round(cost, 6)} if prices else {}),
        }
        reserved = {name: amount for name, amount in amounts.items() if amount}
        # users name resources as they like, e.g. `node`
        named = {name: amount for name, amount in reserved.items() if name not in {*found, "lost_seconds", "cost"}}
        return {**found, **named, "resources": reserved}

    def _needed(self) -> dict[str, float]:
        """Resources of the job, or of each of its nodes, by Ray's names."""
        place = self.executor.placement
        amounts = {"CPU": place.cpus, "GPU": place.gpus, "memory": int((place.memory or 0) * 1e9), **place.resources}
        return {name: amount for name, amount in amounts.items() if amount}

    def _resources(self) -> str:
        place = self.executor.placement
        amounts = {"CPU": place.cpus, "GPU": place.gpus, "GB of memory": place.memory, **place.resources}
        reserved = ", ".join(
            [f"{amount:g} {name}" for name, amount in amounts.items() if amount]
            + ([f"image {place.image}"] if place.image else [])
        )
        return f"{place.nodes} nodes with {reserved} each" if place.nodes > 1 else reserved


def _reason(details: Any) -> str:
    """Why a job ended, from Ray's details of it, without the traceback and the log that Ray appends."""
    if details is None:
        return "it is not in the cluster's list of jobs"
    message = str(details.message or "").partition(", last available logs")[0].partition(". Full traceback:")[0]
    return " ".join(message.split())[:300]


def _project_id(root: Path) -> str:
    """Random id of this workspace, so that drivers of other clones and copies do not stop or take its jobs."""
    path = root / ".dvc" / "tmp" / "pedigree" / "project_id"
    with locks.hold(root, path.name, lambda _: None):  # another driver may start at the same moment
        if not path.is_file():
            write_text(path, secrets.token_hex(16))
    return sha256_of_text(f"{path.read_text(encoding='utf-8')} {root.resolve()}")[:32]
