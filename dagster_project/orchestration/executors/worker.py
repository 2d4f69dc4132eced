"""The worker of a Ray job: runs one stage's command in a scratch folder of a node.

Inputs and outputs travel by hash through DVC's remote.

In the folder with the project's files:

    python -m dagster_project.orchestration.executors.worker '{"address": "adapter@lora", ...}'

It pulls the inputs into the node's cache, runs the command of dvc.yaml there as DVC would, pushes the outputs, and
writes the result last. It records nothing: a job whose driver is gone leaves a result that only a driver with the same
inputs takes. A result that could not be pushed stays on the node (kept.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import faults
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.layout import measured_path, pages_of, report_of
from dagster_project.core.records import remove
from dagster_project.execution import VARIABLE, WORKER, WORKERS
from dagster_project.orchestration import dvc, dvc_cache, dvc_remote, dvc_run
from dagster_project.orchestration.executors.kept import KeptResult, remove_old_results
from dagster_project.orchestration.executors.messages import THREADS, refuse_other_versions, send
from dagster_project.orchestration.remote_store import Damaged, RemoteStore, open_store

if TYPE_CHECKING:
    from dagster_project.orchestration.executors.ray_nodes import Group

NODE_CACHE = "PEDIGREE_NODE_CACHE"
"""Environment variable of a node: the folder for its DVC cache and for scratch folders."""
CHECKPOINT_INTERVAL, LIVE_INTERVAL = 2.0, 1.0
"""Polling intervals for new checkpoints and live tables, in seconds."""
LONGEST_CHECKPOINT_INTERVAL = 300.0
"""While checkpoints cannot be copied, the interval doubles up to this one."""
MARKER = "complete.json"
"""Written last into a checkpoint (training/trainers/harness/checkpoint.py)."""
REFUSED, LOST = 3, 4
"""Exit codes of a worker without a result: an error that was sent, and a stage whose process was killed."""
MAX_EXIT_CODE = 2
"""Exit codes above are not a stage's own: its process was killed."""
ABANDONED_SECONDS = 86400.0
"""Age of a temporary file in the node's cache, of a killed worker, at which it is removed. Workers in other containers
share the cache, so its process cannot be asked."""


@dataclass
class Work:
    """One stage, in a scratch folder of this node."""

    job: Mapping[str, Any]
    """As the driver wrote it (ray.py, `_Run.description`)."""
    root: Path
    """The copy of the project."""
    store: RemoteStore
    kept: KeptResult
    """Of an earlier worker of this node with the same inputs, or of this one."""
    group: Group | None = None
    """The workers of the job, if it has several nodes."""
    seconds: dict[str, float] = field(default_factory=dict)
    sent: int = 0
    received: int = 0

    @property
    def address(self) -> str:
        return str(self.job["address"])

    @property
    def checkpoints(self) -> Path:
        """As StageContext.checkpoints."""
        stage, _, variant = self.address.partition("@")
        return self.root / ".dvc" / "tmp" / "pedigree" / "checkpoints" / (variant or stage)

    def at(self, *names: str) -> str:
        return self.store.at("jobs", self.job["key"], *names)

    def run(self) -> int:
        """Returns the worker's exit code."""
        if not self.group and self._push_kept():
            return 0
        with self._timed("pull_seconds"):
            self.received += self.store.pull(dvc_remote.inputs_by_hash(self.root, self.address).values())
            dvc_remote.checkout_inputs(self.root, self.address)
            self._refuse_other_inputs()
            self._bring_checkpoints()
        remove(self.root / report_of(self.address))  # of an earlier run
        if self.group and not self.group.is_first:
            return 0 if self.group.take_part(self.root, self._environment()) else LOST
        with self._timed("compute_seconds"), self._streaming():
            code = self._command()
        if not 0 <= code <= MAX_EXIT_CODE:
            send("log", f"{self.address}: the process of the stage was killed (exit code {code})")
            return LOST
        if self.group and not self.group.end() and code:
            send("log", f"{self.address}: the stage failed because a node was lost")
            return LOST
        self._finish(code)
        return 0

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 3)

    def _refuse_other_inputs(self) -> None:
        now = dvc.inputs_now(self.root, self.address)
        if changed := sorted(path for path, value in self.job["inputs"].items() if now.get(path) != value):
            raise InputError(
                f"{self.address}: {', '.join(changed)}: not the same on worker and driver",
                "files that a stage reads must be in git or in DVC: `git add` or `dvc add` them (a link out of the"
                " project is not sent), and change nothing while a stage runs",
            )

    def _command(self) -> int:
        """Run the stage's command in place; it ends when this process ends, as with DVC.

        It is the driver's: DVC's settings, which the worker does not have, decide how a parameter is written in it.
        """
        process = subprocess.Popen(
            self.job["command"], shell=True, cwd=self.root, env=self._environment(), text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            assert process.stdout
            for line in process.stdout:
                if line.strip():
                    send("log", line.rstrip("\n"))
            code = process.wait()
            return code if code < 128 else 128 - code  # a shell reports a signal as 128 + its number
        finally:
            process.kill()

    def _environment(self) -> dict[str, str]:
        """Environment of the stage's processes."""
        own = {
            "DVC_STAGE": self.address,
            "PYTHONUNBUFFERED": "1",
            VARIABLE: WORKER,
            WORKERS: str(self.job["workers"]),
            **({THREADS: self.job["threads"]} if self.job.get("threads") else {}),
            **(self.group.variables() if self.group and self.group.is_first else {}),
        }
        return dvc_run.environment_in_copy(self.root, [THREADS], own)

    @contextmanager
    def _streaming(self) -> Iterator[None]:
        """While open, send live tables to the driver and copy checkpoints to the remote."""
        done = threading.Event()
        threads = [threading.Thread(target=work, args=(done,)) for work in (self._send_live, self._keep_checkpoints)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def _send_live(self, done: threading.Event) -> None:
        folder = self.root / "data" / "live" / self.address.replace("@", "/")
        sent: dict[str, str] = {}
        ended = False
        while not ended:
            ended = done.wait(LIVE_INTERVAL)
            for path in sorted(folder.glob("*.csv")):
                with suppress(FileNotFoundError):
                    text, before = path.read_text(encoding="utf-8"), sent.get(path.name, "")
                    if text == before:
                        continue
                    start = len(before) if text.startswith(before) else 0
                    send("live", {"name": path.name, "at": start, "text": text[start:]})
                    sent[path.name] = text

    def _keep_checkpoints(self, done: threading.Event) -> None:
        kept, interval = "", CHECKPOINT_INTERVAL
        while not done.wait(interval):
            try:
                newest = self._keep_newest(kept)
            except FileNotFoundError:  # a newer one has replaced it meanwhile
                continue
            except PedigreeError as error:
                if interval == CHECKPOINT_INTERVAL:  # once: it may last for hours
                    send(
                        "log",
                        f"{self.address}: the latest checkpoint was not copied to the remote, so a job that replaces"
                        f" this one would resume from an earlier one; the stage goes on: {error.what}",
                    )
                interval = min(2 * interval, LONGEST_CHECKPOINT_INTERVAL)
                continue
            if interval > CHECKPOINT_INTERVAL and newest != kept:
                send("log", f"{self.address}: checkpoints are copied to the remote again")
                interval = CHECKPOINT_INTERVAL
            kept = newest

    def _keep_newest(self, kept: str) -> str:
        """Copy the newest checkpoint to the remote, its marker last, and remove older ones there. Returns its name.

        Newer ones stay: a worker that Ray took for lost may go on for a while, beside the one that replaced it.
        """
        folders = sorted(path.parent for path in self.checkpoints.glob(f"step-*/{MARKER}") if path.parent.suffix == "")
        if not folders or folders[-1].name == kept:
            return kept
        newest = folders[-1]
        files = (path for path in newest.rglob("*") if path.is_file())  # a sharded one has folders
        names = sorted(str(path.relative_to(newest)) for path in files if path != newest / MARKER)
        try:
            for name in [*names, MARKER]:
                self.sent += self.store.put(newest / name, self.at("checkpoints", newest.name, name))
        except PedigreeError:
            self._remove_incomplete(newest.name)
            raise
        for name in {name.partition("/")[0] for name in self.store.list(self.at("checkpoints"))}:
            if name < newest.name:
                self.store.remove(self.at("checkpoints", name))
        return newest.name

    def _remove_incomplete(self, name: str) -> None:
        """Remove what was copied of a checkpoint: a remote that is full may have space for the outputs."""
        with suppress(PedigreeError):
            if MARKER not in self.store.list(self.at("checkpoints", name)):
                self.store.remove(self.at("checkpoints", name))

    def _bring_checkpoints(self) -> None:
        names = self.store.list(self.at("checkpoints"))
        for name in names:
            step, _, file = name.partition("/")
            if f"{step}/{MARKER}" in names:
                with suppress(FileNotFoundError):  # such a worker removes it: the stage finds it incomplete
                    self.store.get(self.at("checkpoints", step, file), self.checkpoints / step / file)

    def _finish(self, code: int) -> None:
        """Push outputs, pages and report; the result last. Until then the node keeps the result of a stage that did
        not fail."""
        report, measured = self.root / report_of(self.address), measured_path(self.root, self.address)
        document = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        stated = {key: value for key, value in document.items() if key not in {"passed", "output_sha256"}}
        began = time.monotonic()
        pages = self._pack_pages()
        result = {
            "exit_code": code,
            "report": stated if document else None,
            "output_sha256": document.get("output_sha256"),
            "measured": json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {},
            "outs": dvc_remote.commit_outputs(self.root, self.address) if code == 0 else {},
            "pages": pages is not None,
            "node": self.group.names if self.group else platform.node(),
            "seconds": self.seconds,
            "bytes": {"received": self.received, "sent": self.sent},
        }
        if code == 0 and not self.group:
            pages = self.kept.write(result, pages)
        try:
            self._push(result, pages, began)
        except InputError:  # an object of the node's cache is damaged
            raise
        except PedigreeError as error:
            if self.kept.read() is None:
                raise
            raise self._with_kept(error) from None

    def _push_kept(self) -> bool:
        """Push the result that an earlier worker kept on this node, if there is one and the run is not forced."""
        result = None if self.job["forced"] else self.kept.read()
        if result is not None:
            send("log", f"{self.address}: this node kept the result of an earlier job with the same inputs")
            try:
                self._push(result, self.kept.archive if result["pages"] else None, time.monotonic())
                return True
            except (InputError, FileNotFoundError):  # the node's cache was removed, or is damaged
                send("log", f"{self.address}: its outputs are no longer in the node's cache; it is computed again")
            except PedigreeError as error:
                raise self._with_kept(error) from None
        self.kept.remove()
        return False

    def _push(self, result: Mapping[str, Any], pages: Path | None, began: float) -> None:
        sent = self.store.push(result["outs"].values())
        if pages is not None:
            sent += self.store.put(pages, self.at("pages.tar"))
        seconds = {**result["seconds"], "push_seconds": round(time.monotonic() - began, 3)}
        traffic = {**result["bytes"], "sent": result["bytes"]["sent"] + sent}
        self.store.write_document(self.at("result.json"), {**result, "seconds": seconds, "bytes": traffic})
        self.kept.remove()

    def _with_kept(self, error: PedigreeError) -> PedigreeError:
        return PedigreeError(
            error.what,
            f"{error.hint}; node {platform.node()} keeps the result for a week, and the stage is not computed again"
            " if its next job runs there",
        )

    def _pack_pages(self) -> Path | None:
        """An archive of the stage's pages; None if there are none."""
        pages = pages_of(self.root, self.address)
        if not pages.is_dir():
            return None
        archive = self.root.parent / "pages.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(pages, ".")
        return archive


@contextmanager
def scratch_folder() -> Iterator[tuple[Path, Path]]:
    """A scratch folder of this worker, and the cache of its node.

    Scratch folders of workers that were killed, and what they had fetched in part, are removed.

    Raises:
        InputError: the folder of the node belongs to another user.
    """
    named = os.environ.get(NODE_CACHE)
    base = Path(named or Path(tempfile.gettempdir()) / f"pedigree-{os.getuid()}")
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (base.stat() if named else base.lstat()).st_uid != os.getuid():  # others can place a link among temporary files
        raise InputError(
            f"node {platform.node()}: {base} belongs to another user",
            f"set {NODE_CACHE} in the environment of the node",
        )
    for lock in base.glob("work-*.lock"):
        with suppress(OSError), lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system released it when its worker was killed
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
    remove_old_results(base)
    for part in (base / "cache" / "files" / "md5").rglob(".*"):
        with suppress(OSError):
            # a link to an older output has that one's time of modification
            if time.time() - part.lstat().st_ctime > ABANDONED_SECONDS:
                part.unlink()
    name = f"work-{os.getpid()}-{time.time_ns()}"
    with (base / f".{name}").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock = (base / f".{name}").rename(base / f"{name}.lock")  # it is locked before another worker can see it
        folder = base / name
        try:
            folder.mkdir()
            yield folder, base / "cache"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def main(job: Mapping[str, Any]) -> int:
    """Returns the exit code: 0 if there is a result, also of a stage that failed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if job["nodes"] > 1:
        from dagster_project.orchestration.executors import ray_nodes

        return ray_nodes.run(job, LOST)
    return run(job)


def run(job: Mapping[str, Any], group: Group | None = None) -> int:
    """The worker of one node, the only one or one of a group. Returns its exit code."""
    if not group:
        send("hello", {"node": platform.node(), "time": time.time()})
    elif group.is_first:
        send("hello", {"node": group.names, "node_ids": group.ids, "time": time.time()})
    where = Path.cwd()
    try:
        refuse_other_versions(job["versions"])
        with scratch_folder() as (folder, cache):
            where, root = cache.parent, folder / "project"  # the current folder is gone when an error is explained
            shutil.copytree(Path.cwd(), root, symlinks=True)  # Ray gives all jobs with the same files one folder
            os.chdir(root)  # and writes it again when a task of the stage starts on another node of this host
            dvc_cache.isolate_project(root, cache, job["remote"])
            with open_store(root) as store:
                return Work(job, root, store, KeptResult(cache.parent, job["key"]), group).run()
    except Damaged as error:
        send("damaged", error.objects)
    except Exception as error:
        known = faults.explained(error, where)
        if known is None:
            raise
        names_node = known is error and isinstance(known, InputError)  # where it matters
        what = known.what if names_node else f"node {platform.node()}: {known.what}"
        send("error", {"what": what, "hint": known.hint, "exit_code": known.exit_code})
    return REFUSED


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
