"""Entries of dvc.lock -> stage runs: each entry together with the runs that produced its inputs.

One entry may be in many versions of dvc.lock. If two of them record other producers of the same bytes (a source was
renamed, so the stages before it ran again and gave what they had given), the entry counts as two runs, each with its
own lineage. A question about a revision is therefore answered from the dvc.lock of that revision alone.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, combinations, islice, product
from typing import Any, Literal

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_bytes, md5_of_folder
from dagster_project.core.layout import PLOTS, REPORTS, is_code
from dagster_project.core.records import learns_from_reward_model
from dagster_project.lineage.history import LOCK, stages_of

Place = Literal["commit", "workspace", "reflog", "run cache", "cache"]
"""Where a run is recorded: in a reachable commit, in the workspace alone, in a commit that only the reflog reaches, in
DVC's run cache, or nowhere: then only its output is in DVC's cache."""
MEASURED_TASKS = "data/splits/validation"
"""Dependency of an alignment that learns from tasks: held-out ones, whose
answers it measures before and after training."""

PLACEHOLDER = {".gitkeep": md5_of_bytes(b"")}
"""What a folder of outputs may contain beside them, so that git keeps it."""
MOST_COMBINATIONS = 4096
"""Most combinations of earlier outputs that are compared with the hash of a folder of outputs."""


@dataclass(frozen=True)
class Entry:
    """An output in an entry of dvc.lock or of DVC's run cache."""

    id: int
    address: str
    path: str
    """Path of the output."""
    md5: str
    """Hash of the output."""
    is_model: bool
    inputs: tuple[tuple[str, str], ...]
    """(dependency, hash) per input. Code and reports are excluded."""
    watched: frozenset[str]
    """Dependencies that the stage only measures itself by: nothing is learned from them."""
    report: str = ""
    """Path of the report; empty if there is none."""
    report_md5: str = ""

    @property
    def signature(self) -> tuple[Any, ...]:
        """What was made from what, whatever the code."""
        return self.path, self.md5, frozenset(self.inputs)


@dataclass(eq=False)
class StageRun:
    """One run of a stage: an entry of dvc.lock with one lineage, in however many commits."""

    id: int
    entry: Entry
    inputs: tuple[tuple[str, str, str], ...]
    """(dependency as in dvc.lock, path of the upstream output or else of the dependency itself, hash) per input."""
    producers: dict[str, StageRun]
    """Hash of an input -> the run that produced it; sources have none."""
    order: int
    """Position of its first dvc.lock in history."""
    commit: str | None
    """The first commit whose dvc.lock contains the run with this lineage; None if no commit does."""
    place: Place
    unresolved: tuple[str, ...] = ()
    """Folders of outputs whose recorded hash fits no known outputs."""
    in_workspace: bool = False
    """Whether the dvc.lock of the workspace contains the run."""
    locks: set[int] = field(default_factory=set)
    """Ids of every dvc.lock that contains the run."""

    @property
    def address(self) -> str:
        return self.entry.address

    @property
    def stage(self) -> str:
        """The address without the variant."""
        return self.address.partition("@")[0]

    @property
    def variant(self) -> str:
        """The variant; empty if the stage has none."""
        return self.address.partition("@")[2]

    @property
    def path(self) -> str:
        """Path of the output."""
        return self.entry.path

    @property
    def md5(self) -> str:
        return self.entry.md5

    @property
    def is_model(self) -> bool:
        """Whether the output is a model."""
        return self.entry.is_model

    def made_from(self) -> dict[str, StageRun]:
        """`producers` without those of inputs that the run only compared with."""
        return {
            md5: self.producers[md5]
            for dep, _, md5 in self.inputs
            if md5 in self.producers and dep not in self.entry.watched
        }

    def __repr__(self) -> str:
        return f"<{self.address} {self.md5[:8]} #{self.id}>"


def _entries_above(run: StageRun, bits: Mapping[int, int], known: dict[int, int]) -> int:
    """The bits of the entries of a run and of all runs that it was made from.

    Args:
        bits: id of an entry -> its bit.
        known: id of a run -> the same; completed.
    """
    if run.id not in known:
        known[run.id] = bits[run.entry.id]  # ends a cycle
        for one in run.producers.values():
            known[run.id] |= _entries_above(one, bits, known)
    return known[run.id]


Listing = Callable[[str], Mapping[str, str] | None]
"""Hash of an output -> path in it -> hash of the file; None if it is unavailable."""


class Resolver:
    """Connects the entries of one dvc.lock after the other, in the order of history."""

    def __init__(self, entries: Mapping[int, Entry], listing: Listing) -> None:
        self.entries = entries
        self.listing = listing
        self.runs: list[StageRun] = []
        self.by_output: dict[str, list[StageRun]] = defaultdict(list)
        self._interned: dict[tuple[Any, ...], StageRun] = {}
        self._latest: dict[int, StageRun] = {}
        self._in_lock: dict[int, dict[str, StageRun]] = {}
        """Id of a dvc.lock -> hash of an output -> the run in it."""
        self._beside_readers: set[int] = set()
        """Ids of runs that no dvc.lock contains, as they were made for one reader (`_beside`)."""
        self._folders: dict[str, tuple[tuple[str, str], ...] | None] = {}
        self._versions: dict[str, dict[str, None]] = defaultdict(dict)
        for entry in entries.values():
            self._versions[entry.path][entry.md5] = None

    def add_lock(
        self, lock: int, entries: Iterable[int], order: int, commit: str | None, place: Place
    ) -> list[StageRun]:
        """The runs in one dvc.lock: one for each output of a stage."""
        here = [self.entries[entry] for entry in entries]
        by_md5: dict[str, list[Entry]] = defaultdict(list)
        for entry in here:
            by_md5[entry.md5].append(entry)
        outs = {entry.path: entry.md5 for entry in here}
        runs: dict[int, StageRun | None] = {}

        def visit(entry: Entry) -> StageRun | None:
            if entry.id in runs:
                return runs[entry.id]
            runs[entry.id] = None  # a cycle, which DVC does not write
            earlier = self._latest.get(entry.id)
            inputs, unresolved = self._expanded(entry, outs, earlier)
            producers: dict[str, StageRun] = {}
            for _, path, md5 in inputs:
                same = sorted(by_md5.get(md5, ()), key=lambda one: one.path != path)
                producer = next(filter(None, (visit(one) for one in same if one is not entry)), None)
                producer = producer or (earlier and earlier.producers.get(md5)) or self._any(md5, path)
                if producer:
                    producers[md5] = producer
            runs[entry.id] = self._run(entry, inputs, producers, unresolved, order, commit, place)
            return runs[entry.id]

        found = [run for entry in here if (run := visit(entry))]
        for run in found:
            run.locks.add(lock)
            self._latest[run.entry.id] = run
        self._in_lock[lock] = {run.md5: run for run in found}
        return found

    def add_unrecorded(self, entries: Iterable[Entry], order: int, place: Place) -> None:
        """Add runs that no dvc.lock contains. `connect` finds what they were made from."""
        for entry in entries:
            self._run(entry, *self._expanded_alone(entry), order, None, place)

    def connect(self) -> None:
        """Connect inputs whose producer is in no earlier dvc.lock, such as that of a run which was never committed."""
        for run in self.runs:
            for _, path, md5 in run.inputs:
                if md5 not in run.producers and md5 != run.md5 and (producer := self._any(md5, path, but=run)):
                    run.producers[md5] = self._beside(producer, run) if run.locks and not producer.locks else producer

    def _beside(self, producer: StageRun, reader: StageRun) -> StageRun:
        """A run that no dvc.lock contains, as it was made for a reader: of the
        inputs that the reader's dvc.lock has, it read those."""
        here = self._in_lock[min(reader.locks)]
        known = {md5: here[md5] for _, _, md5 in producer.inputs if md5 in here and md5 != producer.md5}
        run = self._run(
            producer.entry, producer.inputs, known, producer.unresolved, producer.order, None, producer.place
        )
        if known:
            self._beside_readers.add(run.id)
        return run

    def add_alternatives(self, order: int) -> None:
        """Add the lineages that runs may have through DVC's run cache, which does not
        record the run that made an input: if a run that no dvc.lock contains made the same
        bytes as another one, every reader of these bytes may have read those of either.

        Not every combination is added, because their number is exponential in the number of stages. For each entry that
        may be above another one, there is a run in which it is."""
        bits = {entry: 1 << i for i, entry in enumerate({run.entry.id: None for run in self.runs})}
        above: dict[int, int] = {}
        added: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0])
        """Entry and inputs of a reader -> bits of the entries above the runs that were added for it."""
        readers: dict[str, list[tuple[StageRun, int, list[int]]]] = defaultdict(list)
        """Hash of an input -> each run with it, the bits of the entries above
        its other inputs, and its item of `added`."""
        for run in self.runs:
            for _, _, md5 in run.inputs:
                others = 0
                for made_of, producer in run.producers.items():
                    others |= _entries_above(producer, bits, above) if made_of != md5 else 0
                readers[md5].append((run, others, added[run.entry.id, run.inputs]))
        made = {md5: {run.entry.id for run in runs} for md5, runs in self.by_output.items()}
        pending = deque(
            run for run in self.runs if run.place == "run cache" and not run.locks and len(made[run.md5]) > 1
        )
        while pending:
            producer = pending.popleft()
            of_producer = _entries_above(producer, bits, above)
            for reader, others, of_reader in readers[producer.md5]:
                if reader is producer or reader.producers.get(producer.md5) is producer:
                    continue
                if not (others | of_producer) & ~of_reader[0]:
                    continue
                known, alternative = len(self.runs), {**reader.producers, producer.md5: producer}
                run = self._run(reader.entry, reader.inputs, alternative, reader.unresolved, order, None, "run cache")
                if len(self.runs) > known:
                    of_reader[0] |= others | of_producer
                    pending.append(run)

    def _run(
        self,
        entry: Entry,
        inputs: tuple[tuple[str, str, str], ...],
        producers: dict[str, StageRun],
        unresolved: tuple[str, ...],
        order: int,
        commit: str | None,
        place: Place,
    ) -> StageRun:
        key = (entry.id, inputs, tuple(sorted((md5, run.id) for md5, run in producers.items())))
        run = self._interned.get(key)
        if run is None:
            run = StageRun(len(self.runs), entry, inputs, producers, order, commit, place, unresolved)
            self._interned[key] = run
            self.runs.append(run)
            self.by_output[run.md5].append(run)
        return run

    def _any(self, md5: str, path: str, but: StageRun | None = None) -> StageRun | None:
        """The run that produced these bytes last, preferably at this path, and
        preferably one that a dvc.lock contains."""
        candidates = [
            run
            for run in self.by_output.get(md5, ())
            if run is not but and (but is None or but not in run.producers.values())
        ]
        return max(
            candidates,
            key=lambda run: (bool(run.locks), run.id not in self._beside_readers, run.path == path, run.order, run.id),
            default=None,
        )

    def _expanded(
        self, entry: Entry, outs: Mapping[str, str], earlier: StageRun | None
    ) -> tuple[tuple[tuple[str, str, str], ...], tuple[str, ...]]:
        """The inputs of an entry, with folders of outputs expanded, as the
        dvc.lock with these outputs (path -> hash) has them.

        Args:
            earlier: the run of the entry in the dvc.lock before.
        """
        inputs: list[tuple[str, str, str]] = []
        unresolved = []
        for dep, md5 in entry.inputs:
            before = {path: version for name, path, version in (earlier.inputs if earlier else ()) if name == dep}
            inside = (
                {path: value for path, value in outs.items() if path.startswith(dep + "/")} if dep not in outs else {}
            )
            containing = [path for path in outs if dep.startswith(path + "/")] if not inside and dep not in outs else []
            if inside:
                parts = self._folder(dep, md5, inside, before)
                inputs += [(dep, path, value) for path, value in parts or ()]
                unresolved += [] if parts is not None else [dep]
            elif containing:
                for path in containing:
                    guesses = [one for one in (before.get(path), outs[path]) if one and self.listing(one) is None]
                    version = self._version_read(path, entry, outs[path]) or next(iter(guesses), None)
                    inputs += [(dep, path, version)] if version else []
                    unresolved += [] if version else [dep]
            else:
                inputs.append((dep, dep, md5))
        return tuple(inputs), tuple(unresolved)

    def _expanded_alone(
        self, entry: Entry
    ) -> tuple[tuple[tuple[str, str, str], ...], dict[str, StageRun], tuple[str, ...]]:
        """As `_expanded`, of an entry that no dvc.lock contains: folders of
        outputs that no dvc.lock has expanded stay unresolved."""
        inputs: list[tuple[str, str, str]] = []
        unresolved = []
        for dep, md5 in entry.inputs:
            is_folder = dep not in self._versions and any(path.startswith(dep + "/") for path in self._versions)
            parts = self._folders.get(md5)
            if is_folder and parts is None:
                unresolved.append(dep)
            if containing := next((path for path in self._versions if dep.startswith(path + "/")), None):
                version = self._version_read(containing, entry)
                unresolved += [] if version else [dep]
                inputs += [(dep, containing, version)] if version else []
                continue
            inputs += [(dep, path, value) for path, value in parts or ()] if is_folder else [(dep, dep, md5)]
        return tuple(inputs), {}, tuple(unresolved)

    def _folder(
        self, dep: str, md5: str, inside: Mapping[str, str], before: Mapping[str, str]
    ) -> tuple[tuple[str, str], ...] | None:
        """(path, hash) of the outputs that a folder of outputs contained: those
        of this dvc.lock, or, if its stages ran again since, earlier ones.

        None if the recorded hash of the folder fits none of them. If outputs are unavailable, so
        that this cannot be decided, those that it had in the dvc.lock before (`before`), or else in this one.
        """
        if md5 not in self._folders:
            if has_hash(dep, inside, md5, self.listing) is None:
                return tuple((before or inside).items())
            paths = [path for path in self._versions if path.startswith(dep + "/")]
            versions = [list(dict.fromkeys([inside.get(path), *self._versions[path], None])) for path in paths]
            combinations = ({p: v for p, v in zip(paths, values, strict=True) if v} for values in product(*versions))
            fitting = (
                outs for outs in islice(combinations, MOST_COMBINATIONS) if has_hash(dep, outs, md5, self.listing)
            )
            found = next(fitting, None)
            self._folders[md5] = None if found is None else tuple(found.items())
        return self._folders[md5]

    def _version_read(self, path: str, entry: Entry, now: str | None = None) -> str | None:
        """Hash of the version of an output of which an entry read files or folders, i.e. that has all of them with
        their hashes: that of its dvc.lock (`now`), or else another one; None if none that is available has."""
        parts = {dep.removeprefix(path + "/"): md5 for dep, md5 in entry.inputs if dep.startswith(path + "/")}
        for version in dict.fromkeys([*([now] if now else []), *self._versions[path]]):
            listing = self.listing(version) or {}
            if all(part_of(listing, name) == md5 for name, md5 in parts.items()):
                return version
        return None


def has_hash(dep: str, outs: Mapping[str, str], md5: str, listing: Listing) -> bool | None:
    """Whether a folder with these outputs has this hash; None if an output is unavailable."""
    files: dict[str, str] = {}
    for path, value in outs.items():
        if (found := listing(value)) is None:
            return None
        prefix = path.removeprefix(dep + "/")
        files |= {f"{prefix}/{name}" if name else prefix: digest for name, digest in found.items()}
    return md5 in {md5_of_folder(files), md5_of_folder(files | PLACEHOLDER)}


def outputs_in(
    dep: str, md5: str, outs: Mapping[str, str], removed: Collection[str], listing: Listing
) -> Collection[str]:
    """Of the outputs at paths in a folder, those that it held when a stage read it.

    All of them, if the recorded hash of the folder fits no part, because one ran again since, or because outputs are
    unavailable.

    Args:
        removed: those of stages that dvc.yaml no longer has. The folder held them until somebody deleted them.
    """
    files = {value: listing(value) for value in {*outs.values()}}
    parts = (part for size in range(len(outs), 0, -1) for part in combinations(outs, size))
    for part in chain([[path for path in outs if path not in removed]], islice(parts, MOST_COMBINATIONS)):
        if has_hash(dep, {path: outs[path] for path in part}, md5, files.get):
            return part
    return outs.keys()


def part_of(listing: Mapping[str, str], name: str) -> str | None:
    """Hash of a file or folder in an output, as DVC computes it; None if the output does not have it."""
    if name in listing:
        return listing[name]
    files = {path.removeprefix(f"{name}/"): md5 for path, md5 in listing.items() if path.startswith(f"{name}/")}
    return md5_of_folder(files) if files else None


def sections_of(text: str) -> dict[str, str]:
    """Address -> its section of a dvc.lock, as `as_section` writes it. Each section is parsed once.

    Parsing YAML is slow, and most stages are unchanged between commits.

    Raises:
        InputError: the text is not a dvc.lock.
    """
    body = re.split(r"^stages:.*\n", text, maxsplit=1, flags=re.MULTILINE)[1:]
    if text.strip() and not body and not stages_of(text):
        raise InputError(f"{LOCK} has no key `stages`", f"restore it with `git checkout HEAD {LOCK}`")
    written = None if _ALIAS.search(text) else _BY_DVC.fullmatch(text)
    before, *pieces = re.split(r"^(?=  \S)", written.group(1), flags=re.MULTILINE) if written else [""]
    heads = [head for piece in pieces if (head := re.match(r"  ([\w@.-]+):\n", piece))]
    if not before.strip() and pieces and len({head.group(1) for head in heads}) == len(pieces):
        # an entry can be invalid without what is before it; the whole text says what is wrong
        with suppress(InputError):
            return _sections({head.group(1): piece for head, piece in zip(heads, pieces, strict=True)})
    # not formatted by DVC
    return {name: as_section(name, stage) for name, stage in stages_of(text).items()}


_BY_DVC = re.compile(r"schema: '2\.0'\nstages:\n((?:(?: .*)?\n)*)")
"""A dvc.lock as DVC writes it, with nothing after the stages."""
_ALIAS = re.compile(r"[:-] [&*]\w")
"""In YAML: an anchor, or a reference to one. The entry that has it cannot be parsed alone."""
_SECTIONS: dict[tuple[str, str], str] = {}
"""Address and text of an entry as DVC writes it -> the entry as `as_section`
writes it. Entries of dvc.lock that were parsed."""


def _sections(pieces: Mapping[str, str]) -> dict[str, str]:
    """Address -> its entry as `as_section` writes it, of entries as DVC writes them.

    Those that are new are parsed, at once.

    Raises:
        InputError: they are not entries of a dvc.lock.
    """
    if new := {name: text for name, text in pieces.items() if (name, text) not in _SECTIONS}:
        found = stages_of("stages:\n" + "".join(new.values()))
        if found.keys() != new.keys():
            raise InputError(f"{LOCK} cannot be read", f"restore it with `git checkout HEAD {LOCK}`")
        _SECTIONS.update({(name, text): as_section(name, found[name]) for name, text in new.items()})
    return {name: _SECTIONS[name, text] for name, text in pieces.items()}


def as_section(address: str, stage: Mapping[str, Any]) -> str:
    """A stage as a section of a dvc.lock, as JSON."""
    return f"  {json.dumps(address)}: {json.dumps(stage, default=str)}\n"  # str: of dates


def stage_in(section: str) -> dict[str, Any]:
    """The stage that `as_section` wrote. YAML does not have JSON's escapes of characters such as emoji."""
    (stage,) = json.loads(f"{{{section}}}").values()
    return dict(stage)


def conflict_sides(text: str) -> list[str]:
    """The texts that a merge conflict was about, in a file that was committed with its markers.

    The text alone without one.
    """
    if not re.search(r"^<<<<<<<", text, re.MULTILINE):
        return [text]
    sides: list[list[str]] = [[], []]
    side: int | None = None
    for line in text.splitlines(keepends=True):
        if line.startswith("<<<<<<<"):
            side = 0
        elif line.startswith("|||||||"):
            side = -1  # the common ancestor
        elif line.startswith("=======") and side is not None:
            side = 1
        elif line.startswith(">>>>>>>"):
            side = None
        else:
            for number in (0, 1):
                if side in {None, number}:
                    sides[number].append(line)
    return ["".join(lines) for lines in sides]


def outputs(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A stage's outputs with a hash, other than report and plots. Stages of this project have one."""
    return [out for out in stage.get("outs", []) if not out["path"].startswith((REPORTS, PLOTS)) and "md5" in out]


def is_input(path: str) -> bool:
    """Whether a dependency is data, i.e. neither code nor a report."""
    return not is_code(path) and not path.startswith(REPORTS)


def watched_inputs(address: str, stage: Mapping[str, Any]) -> set[str]:
    """Dependencies that a stage only compares with: the reward model of an alignment method that learns from pairs, the
    validation records of one that learns from tasks, and the splits whose test examples `preferences` leaves out."""
    if address == "preferences":
        return {"data/splits"}
    settings = _alignment(address, stage)
    if settings is None:
        return set()
    measured = {MEASURED_TASKS} if settings.get("reward_target") == "response" else set()
    return measured if learns_from_reward_model(settings) else {*measured, "data/reward_model"}


def unread_inputs(address: str, stage: Mapping[str, Any]) -> set[str]:
    """Dependencies that a stage does not open with its parameters.

    DVC has one list of them for all variants of `aligned`.
    """
    settings = _alignment(address, stage)
    if settings is None:
        return set()
    if settings.get("reward_target") != "response":
        return {"data/splits/train", "data/splits/validation"}
    return {"data/preferences"} | (set() if learns_from_reward_model(settings) else {"data/reward_model"})


def teacher_of(address: str, stage: Mapping[str, Any]) -> dict[str, Any] | None:
    """The larger model that an alignment learned from (`gkd`): "folder", "license", and "sha256" of each of its files,
    which the stage compared before it read them. No dependency names it."""
    options = (_alignment(address, stage) or {}).get("options")
    teacher = options.get("teacher") if isinstance(options, dict) else None
    if not isinstance(teacher, dict) or not isinstance(teacher.get("sha256"), dict):
        return None
    hashes = {str(name): str(digest).lower() for name, digest in sorted(teacher["sha256"].items())}
    return {"folder": str(teacher.get("folder")), "license": str(teacher.get("license") or "unknown"), "sha256": hashes}


def _alignment(address: str, stage: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recorded parameters of a variant of `aligned`; None for other stages."""
    section, _, variant = address.partition("@")
    settings = ((stage.get("params") or {}).get("params.yaml") or {}).get(f"{section}.{variant}")
    return settings if section == "aligned" and isinstance(settings, dict) else None


def declared_models(pipeline: bytes) -> frozenset[str]:
    """Stages that dvc.yaml marks as producing safetensors, so that a model is
    recognized even if its files are unavailable."""
    try:
        stages = stages_of(pipeline.decode(), "dvc.yaml") if pipeline else {}
    except (InputError, UnicodeDecodeError):
        return frozenset()
    return frozenset(name for name, body in stages.items() if "safetensors" in _kinds(body.get("do", body)))


def _kinds(body: Any) -> list[Any]:
    """`meta.kinds` of a stage of dvc.yaml; empty where it has none."""
    for key in ("meta", "kinds"):
        body = body.get(key) if isinstance(body, dict) else None
    return body if isinstance(body, list) else []


def address_in(command: str, path: str) -> str:
    """The stage that a command of DVC's run cache runs, which does not record
    its name: `... run adapter@lora` -> adapter@lora."""
    match = re.search(r"\brun ([\w@.-]+)\s*$", command)
    return match.group(1) if match else path


def fetch_hint(runs: Sequence[StageRun]) -> str:
    """Commands that restore outputs which are not in the cache."""
    commit = next((run.commit for run in reversed(runs) if run.commit), None)
    checkout = f"`git checkout {commit[:12]}`, then " if commit and not all(run.in_workspace for run in runs) else ""
    names = " ".join(dict.fromkeys(run.address for run in runs))
    return f"{checkout}`dvc pull {names}`, or `dvc repro {names}` if no remote has it"
