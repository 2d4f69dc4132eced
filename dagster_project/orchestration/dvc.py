"""The only file that knows DVC: what dvc.yaml, dvc.lock and the workspace say, and how to run one stage.

DVC's Python API for this is undocumented, so pyproject.toml pins its minor version and every call stands here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.hashing import md5_of_bytes
from dagster_project.core.layout import is_code, is_report
from dagster_project.core.records import remove
from dagster_project.orchestration.processes import interrupt_command, is_running

logging.getLogger("dvc").setLevel(logging.ERROR)
log = logging.getLogger("pedigree")

MISSING = "missing"
WATCH = 10.0
"""Seconds between two looks at a stage that runs."""
UNREADABLE = {"YAMLFileCorruptedError", "YAMLValidationError", "YAMLSyntaxError", "ResolveError", "EntryNotFound", "CyclicGraphError"}


@dataclass(frozen=True)
class Input:
    """Something a stage reads: another stage's output, or a source nobody makes."""

    producer: str | None
    """Address of the stage that makes it; None for a source."""
    path: str
    """Relative to the project."""
    now: str
    """Content hash on disk."""
    recorded: str | None
    """Content hash in dvc.lock, when the stage last ran."""
    unclean: str = ""
    """For a source that DVC tracks: how it differs from its .dvc file and what to do; empty if it does not."""


@dataclass(frozen=True)
class StageState:
    """One stage of dvc.yaml as it should be, as dvc.lock says it was, and as the workspace is. What changed is DVC's own verdict."""

    address: str
    """"adapter@lora"."""
    description: str
    meta: Mapping[str, Any]
    out: str
    report: str | None
    inputs: tuple[Input, ...]
    definition_now: str
    """Hash of command, parameter values, code, and reports of other stages that it reads."""
    definition_recorded: str | None
    version: str
    """Content hash of the output on disk, or "missing"."""
    recorded: bool
    """Does dvc.lock know the stage?"""
    doubt: str
    """Why the output does not count whatever its inputs are, e.g. "data/splits differs from dvc.lock (modified)"; empty if it does."""
    in_cache: bool
    """Could `dvc checkout` bring the recorded output back?"""
    code: tuple[str, ...]
    """Files of code, and reports of other stages, that it depends on."""

    @property
    def changed(self) -> list[str]:
        """Why the stage is not up to date, in words; empty if it is. The same verdict as `dvc status`."""
        if not self.recorded:
            return ["never run"]
        return (
            ([self.doubt] if self.doubt else [])
            + [f"{i.path} changed" for i in self.inputs if i.now != i.recorded]
            + ([] if self.definition_now == self.definition_recorded else ["command, parameters, code or a report it reads changed"])
        )


@contextmanager
def _open(root: Path) -> Iterator[Any]:
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo

    _mend_rwlock(root)
    try:
        with Repo(str(root), _wait_for_lock=True) as repo:
            yield repo
    except NotDvcRepoError:
        raise InputError(f"{root} is not a DVC project", "run `make run` once, or `dvc init`, in the project's folder") from None
    except DvcException as error:
        if type(error).__name__ in UNREADABLE:
            for name in ("dvc.lock", "dvc.yaml", "params.yaml"):
                if (root / name).is_file() and "<<<<<<< " in (root / name).read_text(errors="replace"):
                    raise InputError(
                        f"{name} has an unresolved merge",
                        f"take one side with `git checkout --ours {name}` (or --theirs), then `dvc repro`",
                    ) from None
            raise InputError(f"dvc.yaml or dvc.lock: {error}", "fix that file and run again") from None
        raise


def _mend_rwlock(root: Path) -> None:
    """SIGKILL can leave DVC's table of busy paths empty, and DVC then calls the project corrupt for ever: start a new one."""
    path = root / ".dvc" / "tmp" / "rwlock"

    def sound() -> bool:
        try:
            return isinstance(json.loads(path.read_bytes()), dict)
        except FileNotFoundError:
            return True
        except ValueError:
            return False

    if sound():
        return
    from dvc.lock import make_lock

    with make_lock(str(path.with_name("rwlock.lock")), tmp_dir=str(path.parent), wait=True):
        if not sound():  # it was not just being written
            path.unlink()
            log.warning("mended .dvc/tmp/rwlock, which a killed process had left unreadable")


def digest(value: Any) -> str:
    return md5_of_bytes(json.dumps(value, sort_keys=True, default=str).encode())


def _stages(repo: Any) -> list[Any]:
    with repo.lock:  # dvc.lock is not written in one step
        return list(repo.index.stages)


def read_stages(root: Path) -> dict[str, StageState]:
    """The state of every stage, in flow order. Asks DVC per output, so it never waits for a running stage."""
    with _open(root) as repo:
        every = _stages(repo)
        stages = [stage for stage in every if not stage.is_data_source]
        tracked = {
            os.path.relpath(out.fs_path, root): _tracked(root, stage, out) for stage in every if stage.is_data_source for out in stage.outs
        }
        main = {stage.name: next(out for out in stage.outs if not out.is_metric and not out.is_plot) for stage in stages}
        paths = {address: os.path.relpath(out.fs_path, root) for address, out in main.items()}
        versions = {address: _hash(out) for address, out in main.items()}
        states = {stage.name: _state(root, stage, paths, versions, tracked) for stage in stages}
    order = _flow({address: [i.producer for i in state.inputs if i.producer] for address, state in states.items()})
    return {address: states[address] for address in order}


def stamp(root: Path, states: Mapping[str, StageState]) -> list[tuple[str, int, int, int]]:
    """Path, modification time, inode and size of every file that `read_stages` looked at: while they stay, it would say the same again."""
    named = {"dvc.yaml", "dvc.lock", "params.yaml", ".dvc/config", ".dvc/cache"}
    for state in states.values():
        named |= {
            state.out,
            state.report or state.out,
            *state.code,
            *(i.path for i in state.inputs),
            *(f"{i.path}.dvc" for i in state.inputs),
        }
    found = []
    for path in sorted(root / name for name in named):
        inside = path.rglob("*") if path.is_dir() and path.name != "cache" else ()
        for file in (path, *inside):
            with suppress(FileNotFoundError):
                stat = file.stat()
                found.append((str(file), stat.st_mtime_ns, stat.st_ino, stat.st_size))
    return sorted(found)


def overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(b + "/") or b.startswith(a + "/")


def _hash(output: Any) -> str:
    """Content hash on disk. What vanishes while it is hashed (another process replaces it) is missing."""
    from dvc.output import OutputDoesNotExistError

    try:
        return output.get_hash().value if output.exists else MISSING
    except (FileNotFoundError, OutputDoesNotExistError):
        return MISSING


def _status(output: Any) -> dict[str, str]:
    """DVC's own verdict: {path: "modified", "deleted", "not in cache" or "new"}, empty if nothing changed."""
    try:
        return output.status()
    except FileNotFoundError:
        return {os.path.relpath(output.fs_path): "deleted"}


def _tracked(root: Path, stage: Any, out: Any) -> str:
    """How a source tracked by a .dvc file differs from it, with the next step; empty if it does not."""
    path, file = os.path.relpath(out.fs_path, root), os.path.relpath(stage.path, root)
    found = out.workspace_status().get(str(out), "")
    if found == "deleted":
        fetch = "dvc checkout" if not out.changed_cache() else "dvc pull"
        return f"{path} is missing; fetch it with `{fetch} {file}`"
    return f"{path} differs from {file}; keep the change with `dvc add {path}`, or drop it with `dvc checkout {path}`" if found else ""


def _state(root: Path, stage: Any, paths: Mapping[str, str], versions: Mapping[str, str], tracked: Mapping[str, str]) -> StageState:
    known = any(out.hash_info for out in stage.outs)
    parameters = set(map(id, stage.params))
    files = {os.path.relpath(dep.fs_path, root): dep for dep in stage.deps if id(dep) not in parameters}
    now = {path: _hash(dep) for path, dep in files.items()}
    recorded = {path: dep.hash_info.value if dep.hash_info else None for path, dep in files.items()}
    if stage.frozen:
        recorded = dict(now)
    values: dict[str, Any] = {}
    locked: dict[str, Any] = {}
    for dep in stage.params:
        values.update(dep.read_params())
        locked.update(dep.hash_info.value or {} if dep.hash_info else {})
    code = sorted(path for path in now if is_code(path) or is_report(path))
    inputs: list[Input] = []
    for path in (path for path in now if path not in code):
        makers = [address for address, made in paths.items() if made == path or made.startswith(path + "/")]
        same = now[path] == recorded[path]
        for maker in makers:
            # of a folder of outputs dvc.lock holds one hash: where it differs, none of the outputs counts as the recorded one
            whole = paths[maker] == path
            inputs.append(Input(maker, paths[maker], versions[maker], recorded[path] if whole or not same else versions[maker]))
        if not makers:
            unclean = next((how for source, how in tracked.items() if how and overlap(source, path)), "")
            inputs.append(Input(None, path, now[path], recorded[path], unclean))
    definition_now = digest([stage.cmd, values, {path: now[path] for path in code}])
    defined = not stage.cmd_changed and (
        stage.frozen or (not any(dep.status() for dep in stage.params) and all(now[path] == recorded[path] for path in code))
    )
    differing = {os.path.relpath(out.fs_path, root): how for out in stage.outs for how in _status(out).values()}
    doubt = (
        "not in dvc.lock" if not known
        else f"{next(iter(differing))} differs from dvc.lock ({next(iter(differing.values()))})" if differing
        else "always changed" if stage.always_changed or stage.is_callback
        else ""
    )  # fmt: skip
    return StageState(
        address=stage.name,
        description=stage.desc or "",
        meta=stage.meta or {},
        out=paths[stage.name],
        report=next((os.path.relpath(out.fs_path, root) for out in stage.outs if out.is_metric), None),
        inputs=tuple(inputs),
        definition_now=definition_now,
        definition_recorded=(definition_now if defined else digest(["recorded", locked, {path: recorded[path] for path in code}]))
        if known
        else None,
        version=versions[stage.name],
        recorded=known,
        doubt=doubt,
        in_cache=known and not any(out.use_cache and out.changed_cache() for out in stage.outs),
        code=tuple(code),
    )


def _flow(parents: Mapping[str, list[str]]) -> list[str]:
    order: list[str] = []

    def visit(address: str) -> None:
        if address not in order:
            for parent in parents[address]:
                visit(parent)
            order.append(address)

    for address in parents:
        visit(address)
    return order


def ancestors(states: Mapping[str, StageState], address: str) -> list[str]:
    """All stages that `address` is made from, in flow order."""
    names: set[str] = set()
    pending = [address]
    while pending:
        for i in states[pending.pop()].inputs:
            if i.producer and i.producer not in names:
                names.add(i.producer)
                pending.append(i.producer)
    return [name for name in states if name in names]


def reproduce(
    root: Path,
    address: str,
    force: bool,
    environment: Mapping[str, str],
    waiting: Callable[[str], None],
    watching: Callable[[], None] = lambda: None,
) -> bool:
    """Let DVC bring one stage up to date; wait while another process works on the same paths. Returns whether anything was done.

    An interrupt (Dagster's "terminate") ends the command too: DVC ignores interrupts in the main thread while a command runs, so it gets another.

    Args:
        waiting: called once with the process that keeps the stage busy.
        watching: called every ten seconds while the stage runs, or less often if it runs for long.
    Raises:
        CheckFailed: the stage's command failed; its own message has the reason.
    """
    from dvc.exceptions import ReproductionError
    from dvc.lock import LockError

    def once() -> bool:
        with _open(root) as repo:
            return bool(repo.reproduce([address], single_item=True, force=force, run_env=command_environment(environment)))

    notified = False
    while True:
        try:
            with chdir(root), ThreadPoolExecutor(1) as thread:  # DVC resolves targets against the current directory
                done = thread.submit(once)
                try:
                    began = time.monotonic()
                    while wait([done], max(WATCH, (time.monotonic() - began) / 100)).not_done:
                        watching()
                    return done.result()
                except BaseException:
                    if not done.done():
                        interrupt_command(address)
                    raise
        except (ReproductionError, LockError) as error:
            cause = error if isinstance(error, LockError) else error.__cause__
            if not isinstance(cause, LockError):
                raise CheckFailed(f"{address} failed: {cause or error}", "see its own message above; nothing was recorded") from None
            if not notified:
                waiting(str(cause).partition("\n\nIf there are no")[0])
                notified = True
            time.sleep(0.5)


def at_work(root: Path, paths: Iterable[str]) -> str:
    """The process that is writing one of these paths, from DVC's table of busy paths; empty if there is none."""
    try:
        table = json.loads((root / ".dvc" / "tmp" / "rwlock").read_bytes())
    except (FileNotFoundError, ValueError):
        return ""
    for busy, owner in table.get("write", {}).items():
        if owner["pid"] != os.getpid() and is_running(owner["pid"]) and any(overlap(busy, str(root / path)) for path in paths):
            return f"process {owner['pid']} ({owner['cmd']})"
    return ""


def command_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Environment of a stage command: `python` must be the interpreter that runs us."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", **extra}


@dataclass(frozen=True)
class Fingerprint:
    """What the guard compares: hashes of what a stage reads, and what its producers recorded."""

    now: Mapping[str, str]
    disputed: Sequence[tuple[str, str]]
    """For each input that is not what was recorded of it: what is wrong, and the next step."""


def fingerprint(root: Path, address: str) -> Fingerprint:
    """Hashes of everything a stage depends on, files, parameters and code, as they are now."""
    with _open(root) as repo:
        every = _stages(repo)
        stages = {stage.name: stage for stage in every if not stage.is_data_source}
        if address not in stages:
            raise InputError(f"{address} is not a stage of dvc.yaml", f"stages: {', '.join(stages)}")
        parameters = set(map(id, stages[address].params))
        now = {os.path.relpath(dep.fs_path, root): _hash(dep) for dep in stages[address].deps if id(dep) not in parameters}
        values: dict[str, Any] = {}
        for dep in stages[address].params:
            values.update(dep.read_params())
        disputed: list[tuple[str, str]] = []
        for other in every:
            for out in other.outs:
                path = os.path.relpath(out.fs_path, root)
                if not any(overlap(path, read) for read in now):
                    continue
                if other.is_data_source:
                    if unclean := _tracked(root, other, out):
                        what, _, how = unclean.partition("; ")
                        disputed.append((what, how))
                elif other.name != address and _status(out):
                    what = f"{path} is not what {other.name} recorded in dvc.lock"
                    disputed.append((what, f"run `dvc repro {other.name}` first, or `dvc checkout {path}`"))
    return Fingerprint({**now, "params.yaml": digest(values)}, disputed)


def restore_outputs(root: Path, address: str) -> None:
    """Put back from the cache what DVC removed before it ran a stage that then failed, so that nothing is lost."""
    from shutil import copyfile

    with _open(root) as repo:
        stage = next((stage for stage in _stages(repo) if stage.name == address), None)
        for out in stage.outs if stage is not None else []:
            if out.exists or not out.hash_info:
                continue
            if out.use_cache:
                if not out.changed_cache():
                    out.checkout(force=True)
                continue
            kept = Path(repo.cache.local.oid_to_path(out.hash_info.value))
            if kept.is_file():
                Path(out.fs_path).parent.mkdir(parents=True, exist_ok=True)
                copyfile(kept, out.fs_path)


def recorded_files(root: Path, address: str) -> dict[str, Path]:
    """The files of a stage's main output as dvc.lock recorded it, by their path in it: where the cache holds them. Nothing of what is not there."""
    with _open(root) as repo:
        out = next(out for stage in _stages(repo) if stage.name == address for out in stage.outs if not out.is_metric and not out.is_plot)
        listing = Path(repo.cache.local.oid_to_path(out.hash_info.value)) if out.hash_info and out.hash_info.isdir else None
        if listing is None or not listing.is_file():
            return {}
        return {entry["relpath"]: Path(repo.cache.local.oid_to_path(entry["md5"])) for entry in json.loads(listing.read_bytes())}


@dataclass(frozen=True)
class Store:
    """DVC's cache as files: every object lies under the md5 of its bytes, if nobody tampered with it."""

    objects: Path
    runs: Path
    """DVC's own record of the runs of stages, each in the form of its entry in dvc.lock."""

    def at(self, oid: str) -> Path:
        return self.objects / oid[:2] / oid[2:]

    def files(self, oid: str) -> dict[str, str] | None:
        """Objects of a recorded output by their path in it ("" where it is one file); None if its listing is not here or cannot be read."""
        if not oid.endswith(".dir"):
            return {"": oid}
        try:
            return {entry["relpath"]: entry["md5"] for entry in json.loads(self.at(oid).read_bytes())}
        except (OSError, ValueError, KeyError, TypeError):
            return None


def store(root: Path) -> Store:
    with _open(root) as repo:
        return Store(Path(repo.cache.local.path), Path(repo.stage_cache.cache_dir))


def stand_alone(root: Path) -> None:
    """Make a folder with a project's files a DVC project that shares nothing: no git, its own cache, in which what lies twice is kept once."""
    (root / ".dvc").mkdir(exist_ok=True)
    site = root / ".dvc" / "site"
    own = f'[core]\nno_scm = true\nsite_cache_dir = {site}\n[cache]\ndir = cache\ntype = "reflink,hardlink,copy"\n'
    (root / ".dvc" / "config.local").write_text(own)


def keep(root: Path, paths: Iterable[str]) -> None:
    """Take outputs as they lie in the workspace into the cache. dvc.lock stays as it is."""
    wanted = set(paths)
    with _open(root) as repo:
        for out in (out for stage in _stages(repo) for out in stage.outs):
            if out.use_cache and os.path.relpath(out.fs_path, root) in wanted:
                out.commit()


def outputs(root: Path, address: str) -> dict[str, str]:
    """Content hash on disk of each output of a stage, report and plots included, by its path."""
    with _open(root) as repo:
        stage = next(stage for stage in _stages(repo) if stage.name == address)
        return {os.path.relpath(out.fs_path, root): _hash(out) for out in stage.outs}


def tracked_sources(root: Path) -> dict[str, str]:
    """Content hash of each source that a .dvc file tracks, as that file records it, by its path."""
    with _open(root) as repo:
        return {
            os.path.relpath(out.fs_path, root): out.hash_info.value
            for stage in _stages(repo)
            if stage.is_data_source
            for out in stage.outs
            if out.hash_info
        }


def set_aside(root: Path, address: str, differs: Callable[[Path], bool], held: bool) -> list[str] | None:
    """Take a stage's main output out of the workspace, and each object of it that is not what its name says out of the cache.

    They are moved to .dvc/tmp/pedigree/set_aside, and DVC calls the output deleted.

    Args:
        differs: asked once more while nobody else can write the output.
        held: whether that is so already; otherwise DVC's lock of the path is taken.
    Returns:
        The names of the objects that were tampered with; None if somebody is at work there or the output is sound after all.
    """
    from dvc.lock import LockError
    from dvc.rwlock import rwlock

    aside = root / ".dvc" / "tmp" / "pedigree" / "set_aside"
    aside.mkdir(parents=True, exist_ok=True)
    with _open(root) as repo, ExitStack() as stack:
        stage = next(stage for stage in _stages(repo) if stage.name == address)
        out = next(out for out in stage.outs if not out.is_metric and not out.is_plot)
        if not held:
            try:
                stack.enter_context(rwlock(repo.tmp_dir, repo.fs, "pedigree", [], [out.fs_path], False))
            except LockError:
                return None
        if _status(out) or not differs(Path(out.fs_path)):
            return None
        whole = out.hash_info.value
        listing = Path(repo.cache.local.oid_to_path(whole))
        objects = [whole]
        if out.hash_info.isdir and listing.is_file():
            with suppress(ValueError, KeyError, TypeError):  # the listing itself may have been tampered with
                objects += [entry["md5"] for entry in json.loads(listing.read_bytes())]
        found = []
        for oid in dict.fromkeys(objects):
            path = Path(repo.cache.local.oid_to_path(oid))
            if not path.is_file():
                continue
            with path.open("rb") as file:
                tampered = hashlib.file_digest(file, "md5").hexdigest() != oid.removesuffix(".dir")
            if tampered:
                found.append(oid)
            if tampered or oid == whole:  # without the whole, the run cache cannot bring back what was published by nobody
                path.replace(aside / oid)
        target = aside / address
        remove(target)
        if out.exists:
            Path(out.fs_path).replace(target)
    return found
