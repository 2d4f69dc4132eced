"""Answers to audit questions by brute force: from the log of what ran
(random_history.Log), and from which commits and cache entries exist.

An input is credited to the run that is in the same dvc.lock as its reader. If that lock does not have it (a part of the
pipeline ran), any run that made these bytes may have been it; then several answers are right.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any

import yaml

from builders.history import md5
from builders.near_copies import by_definition
from builders.random_history import KEY, PARAPHRASES, VARIANTS, Entry, Lock, Toy, canonical, dir_md5, git

WORKSPACE = "workspace"
MODELS = ("adapter", "merged", "reward_model", "aligned", "merged_aligned", "release")
LEARNERS = ("adapter", "aligned", "reward_model")
"""Stages that learn from records themselves; the others take over what their parents learned."""
LIMIT = 64
"""Lineages of one run that are looked at. More of them are not compared."""

Chain = dict[str, Entry]
"""Address -> entry of dvc.lock, of a run (first) and of everything that went into it. Without what a run only compared
itself with: the reward model of DPO, and the test split that `preferences` leaves out."""
Signature = tuple[str, str, tuple[tuple[str, int], ...], tuple[int, ...]]
"""Adapter, its hash, number of records by split, steps (of a record: all; of a
source: number of records, first step, last step)."""


class TooManyLineages(Exception):
    """Not compared."""


def out_of(entry: Entry) -> tuple[str, str]:
    """Path and hash of the data that a run wrote."""
    return next((one["path"], one["md5"]) for one in entry["outs"] if not one["path"].startswith("data/reports/"))


@dataclass(frozen=True)
class Place:
    """A dvc.lock, or "" for what only the run cache has."""

    name: str
    lock: Mapping[str, Entry]
    or_unlocked: bool = False
    """Whether an input may also be of a run that only the run cache has,
    although the lock has one that made the same bytes."""

    @cached_property
    def key(self) -> str:
        """Canonical form of the lock."""
        return canonical(self.lock)


class Reach:
    """What can be known in one project folder at one moment."""

    def __init__(self, toy: Toy, root: Path) -> None:
        self.toy, self.log, self.root = toy, toy.log, root
        self.shallow = (root / ".git/shallow").exists()
        self.reachable = set(git(root, "rev-list", "--all", "HEAD").split())
        """Commits in a branch, tag or other ref. Of others, the reflog knows."""
        commits = git(root, "rev-list", "--all", "--reflog", "HEAD").split()
        self.commits = commits
        self.places = [Place(commit, self.lock_at(commit)) for commit in commits]
        if (root / "dvc.lock").exists():
            self.places.append(Place(WORKSPACE, yaml.load((root / "dvc.lock").read_text(), yaml.CSafeLoader)["stages"]))
        entries = [yaml.load(path.read_text(), yaml.CSafeLoader) for path in sorted(root.glob(".dvc/cache/runs/*/*/*"))]
        self.loose = [(self.log.entries[canonical(entry)][0], entry) for entry in entries]

    def lock_at(self, commit: str) -> Lock:
        if commit not in self.toy.locks:
            self.toy.locks[commit] = self.toy.lock_at(commit)
        return self.toy.locks[commit]

    @cached_property
    def pool(self) -> list[tuple[str, Entry, Place]]:
        """Every run that is recorded anywhere."""
        found = {}
        for place in self.places:
            for address, entry in place.lock.items():
                found[address, canonical(entry), place.key] = (address, entry, place)
        nowhere = Place("", {})
        for address, entry in self.loose:
            found[address, canonical(entry), ""] = (address, entry, nowhere)
        return list(found.values())

    def remember(self) -> None:
        """Keep what was in reach when a question was asked: the index of the audit keeps it as well."""
        self.toy.remembered += [one for one in self.pool if one not in self.toy.remembered]

    def remembered(self) -> list[tuple[str, Entry, Place]]:
        """Models that were in reach when an earlier question was asked, and no longer are."""
        if self.root != self.toy.root:
            return []
        return [one for one in self.toy.remembered if one not in self.pool and one[0].partition("@")[0] in MODELS]

    def past(self) -> Iterator[tuple[str, Entry, Place]]:
        """Models in any dvc.lock that there ever was: the run cache still has what ran for it."""
        for lock in self.toy.past.values():
            place = Place("past", lock)
            yield from (
                (address, entry, place) for address, entry in lock.items() if address.partition("@")[0] in MODELS
            )

    def exists(self, value: str) -> bool:
        """Whether the bytes of an output are in the cache, or in the workspace."""
        cached = self.root / ".dvc/cache/files/md5"
        names = [value, *self.log.files[value].values()] if value.endswith(".dir") else [value]
        return all((cached / name[:2] / name[2:]).exists() for name in names)

    @cached_property
    def incomplete(self) -> bool:
        """Whether anything that some run recorded is gone."""
        gone = any(not self.exists(one["md5"]) for _, entry, _ in self.pool for one in entry["outs"])
        recorded = {out_of(entry)[1] for _, entry, _ in self.pool}
        unrecorded = any(self.exists(value) for value in self.log.weights.keys() - recorded)
        return self.shallow or gone or unrecorded or bool(self.lost_keys)

    @cached_property
    def keys(self) -> set[bytes]:
        """The secrets for published ids in the workspace and in commits."""
        files = [(self.root / KEY).read_text()] if (self.root / KEY).exists() else []
        for commit in self.commits:
            with suppress(subprocess.CalledProcessError):
                files.append(git(self.root, "show", f"{commit}:{KEY}"))
        return {bytes.fromhex(content) for content in files}

    @cached_property
    def lost_keys(self) -> set[bytes]:
        """The secrets that a recorded release was published with, and that are gone."""
        used = {one["md5"] for _, entry, _ in self.pool for one in entry["deps"] if one["path"] == "data/keys"}
        return {self.toy.keys[value] for value in used} - self.keys

    def committed(self, commit: str) -> tuple[dict[str, str], dict[str, Any]]:
        """{path: md5} of the code in a commit, and its parameters."""
        if commit not in self.toy.committed:
            listed = [
                line.split("\t")
                for line in git(self.root, "ls-tree", "-r", commit, "dagster_project", "params.yaml").splitlines()
            ]
            content = {path: self.blob(head.split()[2]) for head, path in listed}
            params = json.loads(content.pop("params.yaml"))
            self.toy.committed[commit] = ({path: md5(text) for path, text in content.items()}, params)
        return self.toy.committed[commit]

    def blob(self, name: str) -> bytes:
        if name not in self.toy.blobs:
            self.toy.blobs[name] = git(self.root, "cat-file", "blob", name).encode()
        return self.toy.blobs[name]

    def holders(self, md5: str) -> list[str]:
        """Commits whose dvc.lock has an output, the latest first."""
        return [
            one.name
            for one in self.places
            if one.name != WORKSPACE and any(out_of(entry)[1] == md5 for entry in one.lock.values())
        ]

    def holders_of_entry(self, entry: Entry) -> list[str]:
        """Commits whose dvc.lock has exactly this run."""
        wanted = canonical(entry)
        return [
            one.name
            for one in self.places
            if one.name != WORKSPACE and any(canonical(found) == wanted for found in one.lock.values())
        ]

    # --- lineages

    def chains(self, address: str, entry: Entry, place: Place) -> list[Chain]:
        """The lineages that a run may have, as far as is recorded."""
        key = (canonical(entry), place.key, place.or_unlocked)
        if key not in self._chains:
            found = {}
            for chain in islice(self._resolve(address, entry, place), 2000):
                found[canonical(chain)] = chain
            if len(found) > LIMIT:
                raise TooManyLineages
            self._chains[key] = list(found.values())
        return self._chains[key]

    @cached_property
    def _chains(self) -> dict[tuple[str, str, bool], list[Chain]]:
        return {}

    def _resolve(self, address: str, entry: Entry, place: Place) -> Iterator[Chain]:
        stage = address.partition("@")[0]
        inputs = {one["path"]: one["md5"] for one in entry["deps"]}
        read = {
            "instructions": ["data/raw_examples"],
            "splits": ["data/instructions"],
            "tokenized": ["data/splits"],
            "adapter": ["data/tokenized"],
            "merged": [path for path in inputs if path.startswith("data/adapter/")],
            "preferences": ["data/raw_preferences"],
            "reward_model": ["data/preferences"],
            "aligned": ["data/merged/lora", "data/preferences"],
            "merged_aligned": ["data/merged/lora", "data/aligned/dpo"],
            "release": ["data/merged"],
        }.get(stage, [])
        nothing: Chain = {}
        options = [list(islice(self._makers(path, inputs[path], place, entry), LIMIT)) or [nothing] for path in read]
        consistent = False
        for chosen in product(*options):
            whole: Chain = {address: entry}
            for chain in chosen:
                if any(whole.get(name, found) != found for name, found in chain.items()):
                    break  # two runs of one stage went into it
                whole |= chain
            else:
                consistent = True
                yield whole
        if not consistent:
            raise TooManyLineages

    def _makers(self, path: str, value: str, place: Place, reader: Entry) -> Iterator[Chain]:
        if path == "data/merged":
            inputs = {one["path"]: one["md5"] for one in reader["deps"]}
            for folder, names in (("merged", VARIANTS), ("merged_aligned", ("dpo",))):
                yield from self._chosen(folder, names, inputs[f"data/{folder}"], place, reader)
            return
        here = [(address, entry) for address, entry in place.lock.items() if out_of(entry) == (path, value)]
        if here:
            for address, entry in here:
                yield from self.chains(address, entry, place)
            for address, entry in [*self.loose, *self.formerly_loose] if place.or_unlocked else ():
                if out_of(entry) == (path, value) and canonical(entry) not in self._locked:
                    yield from self.chains(address, entry, Place("", {}))
            return
        for address, entry, other in self.pool:
            if out_of(entry) == (path, value):
                yield from self.chains(address, entry, other)

    @cached_property
    def formerly_loose(self) -> list[tuple[str, Entry]]:
        """Runs that only the run cache had when an earlier question was asked: the index keeps them."""
        remembered = self.toy.remembered if self.root == self.toy.root else []
        return [
            (address, entry)
            for address, entry, place in remembered
            if not place.name and (address, entry) not in self.loose
        ]

    @cached_property
    def _locked(self) -> set[str]:
        return {canonical(entry) for place in self.places for entry in place.lock.values()}

    def _chosen(self, stage: str, names: Sequence[str], value: str, place: Place, reader: Entry) -> Iterator[Chain]:
        """Of a folder of models, the one whose weights were released."""
        for other in [place, *(one for one in self.places if one != place)]:
            outs = {name: other.lock[f"{stage}@{name}"] for name in names if f"{stage}@{name}" in other.lock}
            if outs and self.folder({name: out_of(entry)[1] for name, entry in outs.items()}) == value:
                for name, entry in outs.items():
                    if self.same_weights(entry, reader):
                        yield from self.chains(f"{stage}@{name}", entry, other)
                if other == place:
                    return
        for address, entry, other in self.pool:
            if address.startswith(f"{stage}@") and self.same_weights(entry, reader):
                yield from self.chains(address, entry, other)

    def same_weights(self, one: Entry, other: Entry) -> bool:
        return self.log.weights[out_of(one)[1]] == self.log.weights[out_of(other)[1]]

    def folder(self, outs: Mapping[str, str]) -> str:
        return dir_md5(
            {f"{name}/{file}": value for name, out in outs.items() for file, value in self.log.files[out].items()}
        )

    def recorded(self, chain: Chain) -> bool:
        """Whether every run of a lineage is recorded somewhere."""
        return all(canonical(entry) in self._recorded for entry in chain.values())

    @cached_property
    def _recorded(self) -> set[str]:
        return {canonical(entry) for _, entry, _ in self.pool}

    # --- what a model saw

    def learners(self, chain: Chain) -> dict[str, Entry]:
        """Address -> entry of the runs of a lineage that learned from records."""
        if next(iter(chain)) == "reward_model":
            return {"reward_model": chain["reward_model"]}
        return {
            address: entry for address, entry in chain.items() if address.partition("@")[0] in ("adapter", "aligned")
        }

    def of(self, chain: Chain, stage: str) -> str | None:
        """Hash of a stage's output in a lineage."""
        return out_of(chain[stage])[1] if stage in chain else None

    def whole(self, chain: Chain) -> bool:
        """Whether the lineage is recorded back to the sources."""
        if next(iter(chain)) == "reward_model":
            return {"preferences", "raw_preferences"} <= chain.keys()
        pairs = (
            {"preferences", "raw_preferences"} if any(address.startswith("aligned@") for address in chain) else set()
        )
        head = next(iter(chain))
        needed = {
            "splits",
            "instructions",
            "raw_examples",
            *pairs,
            *({"aligned@dpo"} if head.startswith("merged_aligned") else ()),
        }
        return needed <= chain.keys() and any(address.startswith("adapter@") for address in chain)

    def splits(self, chain: Chain, stage: str = "splits") -> dict[str, str]:
        """Record -> split; empty if the lineage has no such data set."""
        return self.log.split_of.get(str(self.of(chain, stage)), {})

    def facts(self, chain: Chain) -> dict[str, dict[str, Any]]:
        """Sources with rows, sha256 and license."""
        found: dict[str, dict[str, Any]] = {}
        for stage in ("raw_examples", "splits", "raw_preferences"):
            found |= self.log.sources[canonical(chain[stage])] if stage in chain else {}
        return found

    def records_of_sources(self, chain: Chain) -> dict[str, set[str]]:
        """Records in the splits, by source: rows that are exact duplicates and copies count for each source."""
        key = tuple(self.of(chain, stage) for stage in ("splits", "preferences", "raw_preferences", "raw_examples"))
        if key not in self._records_of_sources:
            self._records_of_sources[key] = self._sources_with_records(chain)
        return self._records_of_sources[key]

    @cached_property
    def _records_of_sources(self) -> dict[tuple[str | None, ...], dict[str, set[str]]]:
        return {}

    def _sources_with_records(self, chain: Chain) -> dict[str, set[str]]:
        known, copies = self.splits(chain), self.copies(chain)
        found: dict[str, set[str]] = {}
        pairs = self.splits(chain, "preferences")
        for pair in self.log.pairs.get(str(self.of(chain, "raw_preferences")), []):
            if pair.identity in pairs:
                found.setdefault(pair.source, set()).add(pair.identity)
        for row in self.log.rows.get(str(self.of(chain, "raw_examples")), []):
            if row.identity in known and row.identity not in copies:
                found.setdefault(row.source, set()).add(row.identity)
        for names in list(found.values()):
            names |= {copy for copy, parent in copies.items() if parent in names}
        if copies:
            found[PARAPHRASES] = set(copies)
        return found

    def signatures(self, chain: Chain, names: set[str], source: bool) -> dict[str, Signature]:
        """Address -> what each learner of a lineage saw of these records; those that saw none are left out."""
        found = {}
        for address, entry in self.learners(chain).items():
            splits = self.splits(chain, "splits" if address.startswith("adapter@") else "preferences")
            counts = Counter(split for name, split in splits.items() if name in names)
            if not counts:
                continue
            steps = [(step, name) for step, _, name in self.log.steps[out_of(entry)[1]] if name in names]
            shown: tuple[int, ...] = tuple(sorted(step for step, _ in steps))
            if source and steps:
                shown = (len({name for _, name in steps}), shown[0], shown[-1])
            found[address] = (address, out_of(entry)[1], tuple(sorted(counts.items())), shown)
        return found

    def records(self, chain: Chain) -> dict[str, str] | None:
        """Record or pair -> split, of everything that the learners of a lineage
        were given; None if nothing records it."""
        learners = self.learners(chain)
        sets = [self.of(chain, "splits" if address.startswith("adapter@") else "preferences") for address in learners]
        if not learners or None in sets:
            return None
        return {name: split for value in sets for name, split in self.log.split_of[str(value)].items()}

    def unrecorded_inputs(self, chain: Chain) -> bool:
        """Whether an output that a run of a lineage read is one that no recorded run made."""
        made = {out_of(entry) for _, entry, _ in self.pool}
        paths = {path for path, _ in made}
        return any(
            one["path"] in paths and (one["path"], one["md5"]) not in made
            for entry in chain.values()
            for one in entry["deps"]
        )

    def texts(self) -> dict[str, tuple[str, ...]]:
        """Record or pair -> its texts, of those in a shard whose bytes are there."""
        outs = {out_of(entry)[1] for address, entry, _ in self.pool if address in {"splits", "preferences"}}
        found = {}
        for out in outs:
            present = {
                name.partition("/")[0]
                for name, value in self.log.files[out].items()
                if name.endswith(".parquet") and self.has(out, value)
            }
            found |= {
                name: self.log.text_of[name] for name, split in self.log.split_of[out].items() if split in present
            }
        return found

    def has(self, out: str, value: str) -> bool:
        """Whether a file of an output is in the cache, or in the workspace if its dvc.lock names the output."""
        if (self.root / ".dvc/cache/files/md5" / value[:2] / value[2:]).exists():
            return True
        lock = next((one.lock for one in self.places if one.name == WORKSPACE), {})
        paths = [path for path, md5 in map(out_of, lock.values()) if md5 == out]
        files = [self.root / path / name for path in paths for name, one in self.log.files[out].items() if one == value]
        return any(file.exists() and md5(file.read_bytes()) == value for file in files)

    def near_copies(self, texts: Collection[str], but: Collection[str]) -> set[str]:
        """Records of which a text is a near-copy of one of these texts."""
        candidates = [(name, text) for name, both in self.texts().items() if name not in but for text in both if text]
        pairs = by_definition(list(texts), [text for _, text in candidates])
        return {candidates[pair.right][0] for pair in pairs}

    def copies(self, chain: Chain) -> dict[str, str]:
        """Copy -> the record that it is a paraphrase of."""
        return self.log.parent_of.get(str(self.of(chain, "splits")), {})

    def with_copies(self, chain: Chain, record: str) -> set[str]:
        return {record, *(copy for copy, parent in self.copies(chain).items() if parent == record)}

    def models(self) -> Iterator[tuple[str, Entry, Place]]:
        for address, entry, place in self.pool:
            if address.partition("@")[0] in MODELS:
                yield address, entry, place


def clone_shallow(toy: Toy, target: Path) -> None:
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", f"file://{toy.root}", str(target)], check=True, capture_output=True
    )
