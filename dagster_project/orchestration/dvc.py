"""dvc.yaml, dvc.lock and workspace -> the state of each stage.

DVC is used only here, in the other files named dvc_*.py, in rwlock.py, remote_store.py and experiments.py, and in
erasure/remotes.py.

DVC's Python API for this is undocumented: `private_module` asserts the minor version, which pyproject.toml pins.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_bytes, md5_of_file
from dagster_project.core.layout import is_code, is_report
from dagster_project.lineage import code_lock
from dagster_project.lineage.graph import closure, flow_order
from dagster_project.lineage.history import LOST_HINT, Revision, is_within, lost_entries, lost_text
from dagster_project.orchestration import dvc_errors, rwlock
from dagster_project.orchestration.dvc_memory import released_afterwards
from dagster_project.orchestration.dvc_parameters import ParameterFiles
from dagster_project.orchestration.last_sync import OBJECTS, stamps
from dagster_project.orchestration.private_api import private_module
from dagster_project.orchestration.special_files import refuse_special_files

log = logging.getLogger("pedigree")

MISSING = "missing"
ALWAYS = "always changed"
"""`output_problem` of a stage that DVC runs each time although its output is as recorded."""


@dataclass(frozen=True)
class Input:
    """Something a stage reads: the output of another stage, or a source."""

    producer: str | None
    """Address of the stage that produces it; None for a source."""
    path: str
    """Relative to the project."""
    now: str
    """Content hash on disk."""
    recorded: str | None
    """Content hash in dvc.lock, when the stage last ran."""
    problem: str = ""
    """For a source that DVC tracks: how it differs from its .dvc file, and the
    next step; empty if it does not differ."""
    of_other_path: bool = False
    """Whether `recorded` is the hash of a folder with this output, or of a part
    of it, which changed: dvc.lock has no hash of the output itself."""


@dataclass(frozen=True)
class StageState:
    """One stage: its definition in dvc.yaml, its record in dvc.lock, and its files in the workspace."""

    address: str
    """"adapter@lora"."""
    description: str
    meta: Mapping[str, Any]
    out: str
    """The main output, or the first of several; empty if the stage has none."""
    outs: tuple[str, ...]
    """The outputs whose content is the stage's version: all but metrics and plots; all if it has no others."""
    metrics: tuple[str, ...]
    plots: tuple[str, ...]
    report: str | None
    """The first metrics file."""
    inputs: tuple[Input, ...]
    definition_now: str
    """Hash of command, parameter values, code, and reports of other stages that it reads."""
    definition_recorded: str | None
    version: str
    """Content hash of `outs` on disk, or "missing"."""
    recorded: bool
    """Whether dvc.lock has an entry of the stage."""
    output_problem: str
    """Why the output is invalid regardless of the inputs, e.g. "data/splits differs from dvc.lock (modified)"; empty if
    it is valid."""
    in_cache: bool
    """Whether `dvc checkout` can restore the recorded output."""
    code: tuple[str, ...]
    """Files of code, and reports of other stages, that it depends on."""
    files: tuple[str, ...]
    """Every file and folder that it reads or writes, also those with
    parameters, and those that `vars:` of dvc.yaml names."""
    frozen: bool = False
    """Whether dvc.yaml freezes it: DVC does not run its command, and does not compare its inputs."""
    definition_changes: tuple[str, ...] = ()
    """What of the definition differs from dvc.lock: "command", "parameter adapter.lora", or the path of code or of a
    report of another stage."""
    report_of_other: bool = False
    """Whether the report is the recorded one and an output is not, e.g. after `git checkout` without `dvc checkout`:
    the report is not that of the output on disk."""

    @property
    def all_outs(self) -> tuple[str, ...]:
        """Paths of everything that it writes."""
        return (*self.outs, *self.metrics, *self.plots)

    @property
    def changed(self) -> list[str]:
        """Why the stage is not up to date; empty if it is. Agrees with `dvc status`."""
        if not self.recorded:
            return ["never run"]
        reasons = [self.output_problem] if self.output_problem else []
        # each path once, of which several parts may have changed
        reasons += dict.fromkeys(f"{i.path} changed" for i in self.inputs if i.now != i.recorded)
        return [*reasons, *(f"{one} changed" for one in self.definition_changes)]

    @property
    def differs(self) -> bool:
        """Whether its outputs are not those in dvc.lock, e.g. after `git checkout` without `dvc checkout`."""
        return self.output_problem not in {"", ALWAYS}

    @property
    def as_recorded(self) -> bool:
        """Whether output, inputs and definition are those in dvc.lock, also if DVC runs the stage each time."""
        return not self.changed or self.changed == [ALWAYS]

    @property
    def frozen_problem(self) -> str:
        """What is wrong with a frozen stage that is not as recorded, with the next step; empty otherwise.

        DVC would record its output as made from its present inputs, which it may never have read.
        """
        if not self.frozen or self.as_recorded:
            return ""
        text = f"{self.address} is frozen, so it is not run, but {self.changed[0]}; "
        if self.recorded and self.output_problem:
            path = self.output_problem.partition(" differs from ")[0]
            restore = "dvc checkout --force" if self.in_cache else "dvc pull --force"
            if path in self.metrics:
                restore = "git checkout HEAD"
            text += f"`{restore} {path}` restores it, or "
        return f"{text}remove `frozen: true` from dvc.yaml to let it run"


@contextmanager
def open_repo(root: Path, wait: bool = True) -> Iterator[Any]:
    """DVC's `Repo` of the project.

    Args:
        wait: while another process holds DVC's lock, as `dvc push` does until it ends. Otherwise the project's files
            are read after three seconds anyway, although DVC may be writing dvc.lock: for those who need nothing of
            it, or verify what they take from it.
    Raises:
        InputError: no DVC project, or dvc.yaml, dvc.lock, params.yaml, a file's
            name or DVC's cache of hashes is invalid.
    """
    refuse_special_files(root)
    repository = private_module("dvc.repo")
    logging.getLogger("dvc").setLevel(logging.ERROR)  # after the import, which sets it
    rwlock.repair(root)
    try:
        with released_afterwards(), repository.Repo(str(root), _wait_for_lock=wait) as repo:
            yield repo
    except Exception as error:
        if (known := dvc_errors.explained(error, root)) is None:
            raise
        raise known from None


def digest(value: Any) -> str:
    return md5_of_bytes(json.dumps(value, sort_keys=True, default=str).encode())


UNCHECKED_FILE_ERRORS = (AssertionError, AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError)
"""What DVC raises for values in its files that its schema lets pass."""


def declared_stages(repo: Any) -> list[Any]:
    """All stages of the project, data sources included.

    Raises:
        InputError: dvc.yaml, dvc.lock or params.yaml has values that DVC cannot use.
    """
    with _reading(repo):
        return list(repo.index.stages)


def stage_among(stages: Iterable[Any], address: str) -> Any:
    """DVC's stage with an address; None if there is none. The stages of .dvc files, which have no name, may come first:
    DVC lists files in the order of the file system."""
    return next((stage for stage in stages if getattr(stage, "name", None) == address), None)


def stage_named(repo: Any, address: str) -> Any:
    """DVC's stage with an address. Of the project's files, DVC reads dvc.yaml, dvc.lock and params.yaml only.

    Raises:
        InputError: no such stage, or these files have values that DVC cannot use.
    """
    with _reading(repo):
        try:
            return repo.stage.load_one(str(Path(repo.root_dir, "dvc.yaml")), address)
        except private_module("dvc.stage.exceptions").StageNotFound:
            names = [stage.name for stage in repo.index.stages if not stage.is_data_source]
            raise _no_stage(address, names) from None


def _no_stage(address: str, names: Iterable[str]) -> InputError:
    return InputError(f"{address} is not a stage of dvc.yaml", f"stages: {', '.join(names)}")


@contextmanager
def _reading(repo: Any) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(private_module("dvc.lock").LockError):  # opened without `wait`
            stack.enter_context(repo.lock)  # DVC does not write dvc.lock atomically
        try:
            yield
        except UNCHECKED_FILE_ERRORS as error:
            if isinstance(error, UnicodeEncodeError):  # a file's name (dvc_errors.explained)
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"DVC cannot read dvc.yaml, dvc.lock or params.yaml: {reason}",
                "undo the last change of these files: see `git diff`",
            ) from None


def lost_records(root: Path) -> list[str]:
    """A line with the next step if dvc.lock lacks entries of the committed one; empty otherwise."""
    if not lost_entries(root):
        return []
    with records_locked(root):  # DVC may have been writing it
        lost = lost_entries(root)
    return [f"{lost_text(lost)}; {LOST_HINT}"] if lost else []


@contextmanager
def records_locked(root: Path) -> Iterator[None]:
    """While open, DVC's lock of the project is held, so that DVC does not write dvc.lock.

    It does not write the file atomically.
    """
    with open_repo(root) as repo, repo.lock:
        yield


def _is_definition(path: str) -> bool:
    return is_code(path) or is_report(path)


def read_stages(
    root: Path, is_definition: Callable[[str], bool] = _is_definition, wait: bool = True
) -> dict[str, StageState]:
    """The state of every stage of the project's dvc.yaml, in flow order.

    Compares each output separately, so it never waits for a running stage.

    Args:
        is_definition: whether a dependency, by path, is part of a stage's definition. All others are its inputs.
        wait: see `open_repo`; without it, what is recorded may be incomplete.
    """
    with open_repo(root, wait) as repo:
        names, state_of = _states(root, declared_stages(repo), repo, is_definition)
        found = {name: state_of(name) for name in names}
    return {address: found[address] for address in flow_order(found, lambda address: _parents(found, address))}


def _states(
    root: Path, all_stages: Sequence[Any], repo: Any, is_definition: Callable[[str], bool]
) -> tuple[list[str], Callable[[str], StageState]]:
    """Addresses of the stages of the project's dvc.yaml, and a function that computes the state of one, once."""
    file = Path(repo.root_dir, "dvc.yaml")
    stages = {stage.name: stage for stage in all_stages if not stage.is_data_source and Path(stage.path) == file}
    sources = [(stage, out) for stage in all_stages if stage.is_data_source for out in stage.outs]
    others = Surroundings(
        producers={path_of(root, out): stage.name for stage in stages.values() for out in stage.outs},
        paths={name: next((path_of(root, out) for out in _main_outputs(stage)), "") for name, stage in stages.items()},
        version_of=cache(lambda name: _version(root, _main_outputs(stages[name]))),
        problems={os.path.relpath(out.fs_path, root): _source_problem(root, stage, out) for stage, out in sources},
        # the same for all stages of a file, which DVC would parse once for each of them
        variables=tuple(next(iter(stages.values())).dvcfile.resolver.context.imports) if stages else (),
        is_definition=is_definition,
        parameters=ParameterFiles(),
    )
    return list(stages), cache(lambda name: _state(root, stages[name], others))


@dataclass(frozen=True)
class Surroundings:
    """What the state of one stage takes from all others."""

    producers: Mapping[str, str]
    """Path of every output -> address of its stage."""
    paths: Mapping[str, str]
    """Path of the main output of every stage, by address."""
    version_of: Callable[[str], str]
    """Address of a stage -> content hash on disk of its outputs, computed once."""
    problems: Mapping[str, str]
    """How each source differs from its .dvc file, by path."""
    variables: Sequence[str]
    """Files with variables of all stages."""
    is_definition: Callable[[str], bool]
    parameters: ParameterFiles


def path_of(root: Path, item: Any) -> str:
    """Path of a dependency or output relative to the project; its address if it is not a local file."""
    return os.path.relpath(item.fs_path, root) if item.protocol == "local" else str(item)


def main_output(stage: Any) -> Any:
    return next(out for out in stage.outs if not out.is_metric and not out.is_plot)


def _main_outputs(stage: Any) -> list[Any]:
    return [out for out in stage.outs if not out.is_metric and not out.is_plot] or list(stage.outs)


def _version(root: Path, outs: Sequence[Any]) -> str:
    hashes = {path_of(root, out): _hash(out) for out in outs}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return MISSING if MISSING in hashes.values() else digest(hashes)


def stamp(root: Path, states: Mapping[str, StageState]) -> list[tuple[str, int, int, int]]:
    """Path, modification time, inode and size of every file that `read_stages` read.

    If they are the same, its result is too.
    """
    return stamps(root / name for name in stamped_paths(states))


def stamped_paths(states: Mapping[str, StageState]) -> set[str]:
    """Every file and folder that `read_stages` reads."""
    paths = {"dvc.yaml", "dvc.lock", "params.yaml", code_lock.FILE, ".dvc/config", str(OBJECTS)}
    for state in states.values():
        inputs = [i.path for i in state.inputs]
        paths |= {*state.files, *inputs, *(f"{path}.dvc" for path in inputs)}
    folders = {parent for path in paths for parent in PurePosixPath(path).parents if "://" not in path and parent.name}
    return paths | {f"{folder}{name}" for folder in folders for name in (".dvc", "/.dvcignore", "/.gitignore")}


def overlap(a: str, b: str) -> bool:
    """Whether two paths are equal or one contains the other."""
    return a == b or a.startswith(b + "/") or b.startswith(a + "/")


def _hash(output: Any) -> str:
    """Content hash on disk. An output that another process removes meanwhile is missing."""
    try:
        return output.get_hash().value if output.exists else MISSING
    except (FileNotFoundError, private_module("dvc.output").OutputDoesNotExistError):
        return MISSING


def status_of(output: Any) -> dict[str, str]:
    """DVC's status of an output: {path: "modified", "deleted", "not in cache" or "new"}, empty if nothing changed."""
    try:
        return output.status()
    except FileNotFoundError:
        return {os.path.relpath(output.fs_path): "deleted"}
    except (KeyError, TypeError, AttributeError):
        if not _removed_listing(output):
            raise
        return output.status()


def _removed_listing(output: Any) -> bool:
    """Remove an output's listing from the cache if it does not match its name, as DVC itself does if it is not JSON.

    Returns whether it was so.
    """
    if not output.hash_info:
        return False
    listing = Path(output.cache.oid_to_path(output.hash_info.value))
    if not listing.is_file() or md5_of_file(listing) == output.hash_info.value.removesuffix(".dir"):
        return False
    listing.unlink()
    log.warning(f"deleted {listing}, a damaged object of DVC's cache: the listing of {output}")
    return True


def _source_problem(root: Path, stage: Any, out: Any) -> str:
    """How a source differs from its .dvc file, with the next step; empty if it does not."""
    path, file = os.path.relpath(out.fs_path, root), os.path.relpath(stage.path, root)
    status = out.workspace_status().get(str(out), "")
    if status == "deleted":
        fetch = "dvc checkout" if not out.changed_cache() else "dvc pull"
        return f"{path} is missing; fetch it with `{fetch} {quote(file)}`"
    if not status:
        return ""
    return (
        f"{path} differs from {file}; keep the change with `dvc add {quote(path)}`,"
        f" or drop it with `dvc checkout --force {quote(path)}`"
    )


def changed_sources(root: Path) -> tuple[dict[str, str], list[str]]:
    """.dvc file of each source that differs from it -> how, with the next step; and the stages of a dvc.yaml in a
    subfolder that are not up to date, such as `prepare/dvc.yaml:clean`.

    Only of sources that a stage reads, as `dvc repro` does: what else is under DVC need not be there. DVC does not look
    at what a frozen stage reads. Of other stages, all or none, if no output of theirs is read.
    """
    with open_repo(root) as repo:
        stages, file = declared_stages(repo), Path(repo.root_dir, "dvc.yaml")
        running = [one for one in stages if not one.is_data_source and not one.frozen and Path(one.path) == file]
        read = {path_of(root, dep) for stage in running for dep in stage.deps}

        def is_read(out: Any) -> bool:
            return any(overlap(path_of(root, out), path) for path in read)

        changed = {
            os.path.relpath(stage.path, root): problem
            for stage in stages
            if stage.is_data_source
            for out in stage.outs
            if is_read(out) and (problem := _source_problem(root, stage, out))
        }
        elsewhere = [one for one in stages if not one.is_data_source and Path(one.path) != file]
        stale = filter(_is_stale, elsewhere if any(is_read(out) for one in elsewhere for out in one.outs) else ())
        return changed, [f"{os.path.relpath(stage.path, root)}:{stage.name}" for stage in stale]


def _is_stale(stage: Any) -> bool:
    return bool(stage.cmd_changed or any(map(status_of, stage.outs)) or any(dep.status() for dep in stage.deps))


def _state(root: Path, stage: Any, others: Surroundings) -> StageState:
    """The state of one stage."""
    known = _is_recorded(stage)
    now, recorded = _dependency_hashes(root, stage)
    values, recorded_values = _parameters(stage, others.parameters)
    code = sorted(filter(others.is_definition, now))
    code_now, code_recorded = {path: now[path] for path in code}, {path: recorded[path] for path in code}
    definition_now = definition_recorded = digest([stage.cmd, values, code_now])
    changes = (
        *(["command"] if stage.cmd_changed else []),
        *(_changed_parameters(stage, values, recorded_values, others) if known and not stage.frozen else []),
        *(path for path in code if code_now[path] != code_recorded[path]),
    )
    if changes:
        definition_recorded = digest(["recorded", recorded_values, code_recorded])
    changed = {path_of(root, out): how for out in stage.outs for how in status_of(out).values()}
    problem = (
        "not in dvc.lock" if not known
        else f"{next(iter(changed))} differs from dvc.lock ({next(iter(changed.values()))})" if changed
        else ALWAYS if stage.always_changed or stage.is_callback
        else ""
    )  # fmt: skip
    report = next((path_of(root, out) for out in stage.outs if out.is_metric), None)
    differing = {path for path, how in changed.items() if how != "not in cache"} - {
        path_of(root, out) for out in stage.outs if out.is_metric or out.is_plot
    }
    return StageState(
        address=stage.name,
        description=stage.desc or "",
        meta=stage.meta if isinstance(stage.meta, Mapping) else {},  # free-form in DVC
        out=others.paths[stage.name],
        outs=tuple(path_of(root, out) for out in _main_outputs(stage)),
        metrics=tuple(path_of(root, out) for out in stage.outs if out.is_metric),
        plots=tuple(path_of(root, out) for out in stage.outs if out.is_plot),
        report=report,
        inputs=tuple(i for path in now if path not in code for i in _inputs(path, now, recorded, others)),
        definition_now=definition_now,
        definition_recorded=definition_recorded if known else None,
        version=others.version_of(stage.name),
        recorded=known,
        output_problem=problem,
        in_cache=known and not any(out.use_cache and out.changed_cache() for out in stage.outs),
        code=tuple(code),
        files=(
            *(path_of(root, item) for item in [*stage.deps, *stage.outs] if item.protocol == "local"),
            *_variables(root, stage, others),
        ),
        frozen=bool(stage.frozen),
        definition_changes=changes,
        report_of_other=known and report not in changed and bool(differing),
    )


def _is_recorded(stage: Any) -> bool:
    """Whether dvc.lock has an entry of the stage."""
    if items := [*stage.outs] or [*stage.deps]:
        return any(item.hash_info for item in items)
    return stage.name in stage.dvcfile.lockfile_contents.get("stages", {})


def _variables(root: Path, stage: Any, others: Surroundings) -> list[str]:
    """Files with variables of all stages, and with those that this stage uses.

    DVC gives their paths relative to the current folder.
    """
    return sorted({os.path.relpath(path, root) for path in [*others.variables, *stage.tracked_vars]})


def _dependency_hashes(root: Path, stage: Any) -> tuple[dict[str, str], dict[str, str | None]]:
    """Content hash of each file and folder that a stage reads, by path: on disk, and in dvc.lock."""
    parameters = set(map(id, stage.params))
    dependencies = {path_of(root, dep): dep for dep in stage.deps if id(dep) not in parameters}
    now = {path: _hash(dep) for path, dep in dependencies.items()}
    if stage.frozen:
        return now, {**now}
    return now, {path: dep.hash_info.value if dep.hash_info else None for path, dep in dependencies.items()}


def _parameters(stage: Any, files: ParameterFiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the parameters that a stage reads: on disk, and in dvc.lock.

    Keys of code.lock.yaml, which are names of stages, get its name as a prefix.
    """
    values: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    for dep in stage.params:
        prefix = f"{code_lock.FILE}:" if Path(dep.fs_path).name == code_lock.FILE else ""
        in_lock = (dep.hash_info.value or {}) if dep.hash_info else {}
        values |= {prefix + key: value for key, value in files.values(dep).items()}
        recorded |= {prefix + key: value for key, value in in_lock.items()}
    return values, recorded


def _changed_parameters(
    stage: Any, values: Mapping[str, Any], recorded: Mapping[str, Any], others: Surroundings
) -> list[str]:
    """The parameters that differ from dvc.lock, or have no value in one of the two."""
    if not any(map(others.parameters.changed, stage.params)):
        return []
    absent = object()
    keys = [key for key in {**values, **recorded} if values.get(key, absent) != recorded.get(key, absent)]
    return [f"parameter {key}" for key in keys] or ["parameters"]


def _inputs(path: str, now: Mapping[str, str], recorded: Mapping[str, str | None], others: Surroundings) -> list[Input]:
    """The inputs at a path that a stage reads: one source, one output or
    something in it, or all outputs in a folder."""
    producers = dict.fromkeys(address for out, address in others.producers.items() if overlap(out, path))
    if not producers:
        problem = next((how for source, how in others.problems.items() if how and overlap(source, path)), "")
        return [Input(None, path, now[path], recorded[path], problem)]
    # dvc.lock has one hash for a folder of outputs: if it differs, none of the outputs is treated as the recorded one
    changed = now[path] != recorded[path]
    return [
        Input(
            address,
            others.paths[address],
            version,
            recorded[path] if changed else version,
            of_other_path=changed and path not in others.producers,
        )
        for address in producers
        for version in [others.version_of(address)]
    ]


def _parents(states: Mapping[str, StageState], address: str) -> list[str]:
    return [i.producer for i in states[address].inputs if i.producer]


def ancestors(states: Mapping[str, StageState], address: str) -> list[str]:
    """All stages upstream of `address`, in flow order."""
    names = closure(_parents(states, address), lambda name: _parents(states, name))
    return [name for name in states if name in names]


DOCUMENTS = frozenset({".json", ".yaml", ".yml", ".toml"})
"""Suffixes of metrics files that can be read."""


def load_document(path: Path) -> Any:
    """Content of a metrics file, JSON, YAML or TOML; None if it is missing, invalid or in another format."""
    serialize = private_module("dvc.utils.serialize")
    if path.suffix not in DOCUMENTS:
        return None
    try:
        return serialize.LOADERS[path.suffix](str(path))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, serialize.ParseError):
        return None


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of everything a stage depends on, and how it differs from the record of its producers."""

    now: Mapping[str, str]
    conflicts: Sequence[tuple[str, str]]
    """For each input that differs from its record: what is wrong, and the next step."""
    leftovers: Sequence[str]
    """Outputs of stages that dvc.yaml no longer has, in folders that the stage reads."""


def inputs_now(root: Path, address: str) -> dict[str, str]:
    """Current hash of everything a stage depends on, by path: files and code, and as `params.yaml` its parameters.

    Raises:
        InputError: no such stage.
    """
    with open_repo(root) as repo:
        return _inputs_now(root, stage_named(repo, address))


def verified_fingerprint(root: Path, address: str, refuse: Callable[[Sequence[StageState]], None]) -> Fingerprint:
    """As `inputs_now`, compared with the records. DVC reads the project's files once for both.

    Args:
        refuse: called before with the states of the stages whose outputs the stage reads.
    Raises:
        InputError: no such stage.
    """
    with open_repo(root) as repo:
        all_stages = declared_stages(repo)
        names, state_of = _states(root, all_stages, repo, _is_definition)
        if address not in names:
            raise _no_stage(address, names)
        refuse([state_of(i.producer) for i in state_of(address).inputs if i.producer])
        now = _inputs_now(root, stage_among(all_stages, address))
        with repo.lock:
            return Fingerprint(now, _conflicts(root, address, all_stages, now), _leftovers(root, names, now))


def _inputs_now(root: Path, stage: Any) -> dict[str, str]:
    now, _ = _dependency_hashes(root, stage)
    values, _ = _parameters(stage, ParameterFiles())
    return {**now, "params.yaml": digest(values)}


def _leftovers(root: Path, addresses: Collection[str], inputs: Iterable[str]) -> tuple[str, ...]:
    """Outputs of removed or renamed variants, which stay where they were.

    Git and DVC do not bring them to another clone, so there the hash of the folder is another one.

    Args:
        addresses: of the stages that dvc.yaml has.
    """
    recorded: dict[str, Any] = {}
    with suppress(InputError):  # no dvc.lock, or an empty or damaged one, of which DVC says what is wrong
        recorded = Revision(root, None).lock(partial=True)
    outs = [
        out["path"] for address, entry in recorded.items() if address not in addresses for out in entry.get("outs", [])
    ]
    folders = [path for path in inputs if not is_report(path)]
    within = [out for out in outs if any(out != folder and is_within(out, folder) for folder in folders)]
    return tuple(out for out in within if (root / out).exists())


def _conflicts(root: Path, address: str, all_stages: Iterable[Any], inputs: Iterable[str]) -> list[tuple[str, str]]:
    paths = [path for path in inputs if path != "params.yaml"]
    conflicts: list[tuple[str, str]] = []
    for other in all_stages:
        for out in other.outs:
            path = os.path.relpath(out.fs_path, root)
            if not any(overlap(path, dependency) for dependency in paths):
                continue
            if other.is_data_source:
                if problem := _source_problem(root, other, out):
                    what, _, how = problem.partition("; ")
                    conflicts.append((what, how))
            elif other.name != address and status_of(out):
                what = f"{path} is not what {other.name} recorded in dvc.lock"
                conflicts.append((what, f"run `dvc repro {other.name}` first, or `dvc checkout --force {quote(path)}`"))
    return conflicts


def outputs(root: Path, address: str) -> dict[str, str]:
    """Content hash on disk of each output of a stage, including report and plots, by path."""
    with open_repo(root) as repo:
        return {os.path.relpath(out.fs_path, root): _hash(out) for out in stage_named(repo, address).outs}


def files_within(root: Path, paths: Iterable[str]) -> list[str]:
    """Everything but folders at or in paths of the project, without what DVC
    ignores (.dvcignore, and what it leaves out by itself).

    Links are not followed; those to folders are listed, too.
    """
    found = set[str]()
    with open_repo(root) as repo:
        for path in paths:
            if (root / path).is_symlink() or not (root / path).is_dir():
                found |= {path} if os.path.lexists(root / path) else set()
                continue
            for folder, folders, files in repo.dvcignore.walk(repo.fs, str(root / path)):
                links = [name for name in folders if Path(folder, name).is_symlink()]
                found |= {os.path.relpath(Path(folder, name), root) for name in (*files, *links)}
    return sorted(found)


def not_ignored(root: Path, paths: Iterable[str]) -> list[str]:
    """Those of some paths of the project that DVC does not ignore. They need not exist.

    Args:
        paths: of folders with "/" at the end.
    """
    with open_repo(root) as repo:
        rules = repo.dvcignore

        def is_ignored(path: str) -> bool:
            ignores = rules.is_ignored_dir if path.endswith("/") else rules.is_ignored_file
            return bool(ignores(str(root / path)))

        return [path for path in paths if not is_ignored(path)]


def tracked_sources(root: Path) -> dict[str, str]:
    """Recorded content hash of each source with a .dvc file, by path."""
    with open_repo(root) as repo:
        return {
            os.path.relpath(out.fs_path, root): out.hash_info.value
            for stage in declared_stages(repo)
            if stage.is_data_source
            for out in stage.outs
            if out.hash_info
        }
