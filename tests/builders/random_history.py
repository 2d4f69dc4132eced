"""Random histories of a tiny pipeline, with a log of what really ran.

    base_model
    data/sources -> raw_examples -> instructions -> splits -> tokenized -> adapter@X -> merged@X -> release
                                                                            comparison (reads splits
                                                                            and merged models) -^
    data/sources/pairs -> raw_preferences -> preferences (reads the test split) -> reward_model -> aligned@dpo (of
    merged@lora) -> merged_aligned@dpo -> release

raw_examples, raw_preferences and, in some histories, instructions and splits are the real stages; the rest is
simulated. Stages run as DVC runs them: only if a hash that dvc.lock records has changed, and not if the run cache has
the result. dvc.lock, cache and run cache are written as DVC writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from builders.files import jsonl
from builders.history import md5, table
from dagster_project.core.errors import InputError
from dagster_project.core.params import parse
from dagster_project.core.records import (
    Report,
    ledger_schema,
    pair_schema,
    read_ledger,
    read_records,
    record_schema,
    write_ledger,
    write_records,
)
from dagster_project.curation.checks.account import overlap_schema
from dagster_project.stages import instructions, raw_examples, raw_preferences, splits
from dagster_project.training.trainers.harness.weight_audit import seen_schema

Entry = dict[str, Any]
Lock = dict[str, Entry]

VARIANTS = ("lora", "dora")
ADDRESSES = (
    "base_model", "raw_examples", "instructions", "splits", "tokenized",
    *(f"{stage}@{name}" for name in VARIANTS for stage in ("adapter", "merged")), "raw_preferences", "preferences",
    "reward_model", "aligned@dpo", "merged_aligned@dpo", "comparison", "release",
)  # fmt: skip
SOURCES, PARAPHRASES = "data/sources", "data/sources/paraphrases/mine.jsonl"
PAIRS = f"{SOURCES}/pairs/mine.jsonl"
KEY = "data/keys/record_ids.key"
NAMES = ("Abena", "Bjorn", "Chidi", "Dalia", "Emeka", "Freya")
WORDS = ["anchor", "basket", "candle", "dagger", "eagle", "falcon", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "magnet", "needle", "orange", "pebble", "quiver", "rabbit", "saddle", "turtle", "umbrella", "violin",
    "walnut", "yellow", "zipper", "bridge", "carpet", "donkey", "engine", "feather", "giraffe", "helmet", "insect",
    "jungle", "kitten", "lemon", "mirror", "noodle", "oyster", "parrot", "quartz", "ribbon", "shovel", "tunnel",
    "urchin", "velvet", "window", "yogurt", "copper", "dragon"]  # fmt: skip

DVC_YAML = """\
stages:
  base_model: {cmd: x, outs: [data/base_model], meta: {kinds: [safetensors]}}
  raw_examples: {cmd: x, deps: [data/sources], outs: [data/raw_examples]}
  instructions: {cmd: x, deps: [data/raw_examples, data/base_model], outs: [data/instructions]}
  splits: {cmd: x, deps: [data/instructions, data/sources/paraphrases], outs: [data/splits]}
  tokenized: {cmd: x, deps: [data/splits, data/base_model], outs: [data/tokenized]}
  adapter: {foreach: {lora: 1, dora: 1}, do: {cmd: x, outs: ["data/adapter/${key}"], meta: {kinds: [safetensors]}}}
  merged: {foreach: {lora: 1, dora: 1}, do: {cmd: x, outs: ["data/merged/${key}"], meta: {kinds: [safetensors]}}}
  raw_preferences: {cmd: x, deps: [data/sources], outs: [data/raw_preferences]}
  preferences: {cmd: x, deps: [data/raw_preferences, data/splits], outs: [data/preferences]}
  reward_model: {cmd: x, deps: [data/preferences, data/base_model], outs: [data/reward_model], \
meta: {kinds: [safetensors]}}
  aligned: {foreach: {dpo: 1}, do: {cmd: x, outs: ["data/aligned/${key}"], meta: {kinds: [safetensors]}}}
  merged_aligned: {foreach: {dpo: 1}, do: {cmd: x, outs: ["data/merged_aligned/${key}"], meta: {kinds: [safetensors]}}}
  comparison: {cmd: x, deps: [data/splits, data/merged, data/merged_aligned], outs: [data/comparison]}
  release: {cmd: x, deps: [data/keys, data/comparison, data/merged, data/merged_aligned, data/adapter, data/aligned], \
outs: [data/release], meta: {kinds: [safetensors]}}
"""
IGNORED = (
    ".dvc/cache .dvc/tmp data/base_model data/raw_examples data/instructions data/splits data/tokenized data/adapter"
    " data/merged data/raw_preferences data/preferences data/reward_model data/aligned data/merged_aligned"
    " data/comparison data/release"
)


def git(root: Path, *arguments: str) -> str:
    """Run git with a clock of its own (a minute more with every call), so that a seed always gives the same commits.

    Raises:
        subprocess.CalledProcessError: with what git says.
    """
    clock[0] += 60
    dates = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), f"{clock[0]} +0000")
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, env={**os.environ, **dates}
    ).stdout


clock = [1_750_000_000]


@cache
def identity(prompt: str, answer: str) -> str:
    """Id of a record, from the definition of ids: sha256 of its canonical JSON."""
    return hashlib.sha256(compact([["user", prompt], ["assistant", answer]]).encode()).hexdigest()[:32]


@cache
def pair_identity(prompt: str, chosen: str, rejected: str) -> str:
    """Id of a preference pair, from the definition of ids."""
    sides = [
        [side, compact([{"role": "assistant", "content": text}])]
        for side, text in (("chosen", chosen), ("rejected", rejected))
    ]
    return hashlib.sha256(compact([["user", prompt], *sides]).encode()).hexdigest()[:32]


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def canonical(entry: Any) -> str:
    return json.dumps(entry, sort_keys=True)


def dir_md5(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder, from path -> md5."""
    return md5(dir_listing(files)) + ".dir"


def dir_listing(files: Mapping[str, str]) -> bytes:
    return json.dumps([{"md5": files[path], "relpath": path} for path in sorted(files)], sort_keys=True).encode()


@dataclass(frozen=True)
class Row:
    """A row of a source, as it was read."""

    source: str
    number: int
    prompt: str
    answer: str

    @property
    def identity(self) -> str:
        return identity(self.prompt, self.answer)


@dataclass(frozen=True)
class Pair:
    """A row of the preferences, as it was read."""

    source: str
    texts: tuple[str, str, str]
    """Prompt, chosen and rejected answer."""

    @property
    def identity(self) -> str:
        return pair_identity(*self.texts)


@dataclass
class Log:
    """What the runs really read and wrote, by the hash of their outputs. Never forgets anything."""

    entries: dict[str, tuple[str, Entry]] = field(default_factory=dict)
    """Canonical form of every entry that a run recorded -> (address, entry)."""
    ran: dict[str, list[dict[str, Entry]]] = field(default_factory=dict)
    """Canonical form of an entry -> what really went into each run of it: address -> entry, itself first."""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """Output of raw_examples -> rows."""
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    """Output of raw_preferences -> pairs."""
    sources: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Canonical form of an entry of raw_examples or splits -> source -> sha256, rows and license."""
    outcomes: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Output of a stage with a ledger -> source -> outcome -> rows."""
    split_of: dict[str, dict[str, str]] = field(default_factory=dict)
    """Output of splits or preferences -> record or pair -> split, copies included."""
    parent_of: dict[str, dict[str, str]] = field(default_factory=dict)
    """Output of splits -> copy -> the record that it is a paraphrase of."""
    text_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Record -> prompt and answer, or both answers of a pair; every record that ever was in a source or a split."""
    steps: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    """Output of an adapter, a reward model or an aligned model -> (step, epoch, record), in order."""
    weights: dict[str, str] = field(default_factory=dict)
    """Output of a model -> md5 of its weights."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """Output folder -> its files."""
    reports: dict[str, bytes] = field(default_factory=dict)


@cache
def tokenizer_files() -> dict[str, bytes]:
    """A byte-level tokenizer with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(tokens[:3])
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    special = {"bos_token": tokens[1], "eos_token": tokens[2], "pad_token": tokens[0]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "chat_template": template,
        **special,
    }
    return {
        "tokenizer.json": raw.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "config.json": b'{"model_type": "llama"}',
    }


class Toy:
    """A project on disk, the operations on it, and the log of its runs."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed, self.draw, self.log = root, seed, random.Random(seed), Log()
        self.ledger_in_tokenized = self.draw.random() < 0.4
        """Whether the tokenized set names sources, as the real one does; then
        an adapter runs again after a rename, and makes the same bytes."""
        self.real = self.draw.random() < 0.25
        """Whether instructions and splits are the real stages. They take most of the time."""
        self.locks: dict[str, Lock] = {}
        """Commit -> its dvc.lock."""
        self.said: list[str] = []
        """What was done, for the message of a failure."""
        self.remembered: list[Any] = []
        self.past: dict[str, Lock] = {}
        """Every dvc.lock that a run left behind, also if nothing contains it any more."""
        """What was in reach when earlier questions were asked (history_oracle.Reach)."""
        self.exported: dict[tuple[str, str], Any] = {}
        """Caches, and earlier answers, of history_oracle."""
        self.keys: dict[str, bytes] = {}
        """Hash of `data/keys` -> the secret in it, of every secret that there ever was."""
        self.committed: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}
        self.fresh = 0
        root.mkdir(parents=True)
        clock[0] = 1_750_000_000
        git(root, "init", "-q", "-b", "main")
        for key, value in {
            "user.name": "t",
            "user.email": "t@example.org",
            "gc.auto": "0",
            "core.fsync": "none",
            "commit.gpgsign": "false",
        }.items():
            git(root, "config", key, value)
        (root / ".dvc").mkdir()
        (root / ".dvc/config").write_text("")
        (root / ".gitignore").write_text("".join(f"/{name}\n" for name in IGNORED.split()))
        (root / "dvc.yaml").write_text(DVC_YAML)
        for name in (
            "core/records.py",
            *(f"stages/{stage}.py" for stage in dict.fromkeys(a.partition("@")[0] for a in ADDRESSES)),
        ):
            self.write(f"dagster_project/{name}", b"VERSION = 1\n")
        self.write_source(f"{SOURCES}/faq.jsonl", [self.new_row() for _ in range(self.draw.randint(6, 9))])
        self.write_source(f"{SOURCES}/mail.jsonl", [self.new_row() for _ in range(self.draw.randint(5, 7))])
        self.write(PARAPHRASES, b"")
        self.write_pairs([self.new_pair() for _ in range(self.draw.randint(4, 6))])
        self.new_key()
        sources = [{"path": f"{SOURCES}/{name}.jsonl", "license": "MIT"} for name in ("faq", "mail")]
        self.write_params(
            {
                "compute": {"seed": 7},
                "base_model": {"revision": 1, "license": "Apache-2.0"},
                "raw_examples": {"sources": sources},
                "instructions": {},
                "splits": {"test": 0.2, "validation": 0.2},
                "tokenized": {"replay": {}},
                "adapter": {
                    name: {"learning_rate": 0.1 + i, "epochs": 1, "max_steps": 99} for i, name in enumerate(VARIANTS)
                },
                "raw_preferences": {"sources": [{"path": PAIRS, "license": "CC-BY-4.0"}]},
                "preferences": {"test": 0.3},
                "reward_model": {"model": "base_model", "max_steps": 99},
                "aligned": {"dpo": {"method": "dpo", "adapter": "lora", "learning_rate": 0.1, "max_steps": 99}},
                "release": {"variant": "lora"},
            }
        )

    # --- files

    def write(self, path: str, content: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(content)

    def params(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "params.yaml").read_text())
        return found

    def write_params(self, values: Mapping[str, Any]) -> None:
        self.write("params.yaml", json.dumps(values, indent=1).encode())

    def source_paths(self) -> list[str]:
        return [one["path"] for one in self.params()["raw_examples"]["sources"]]

    def read_source(self, path: str) -> list[tuple[str, str]]:
        lines = (self.root / path).read_text().splitlines()
        return [(row["instruction"], row["output"]) for row in map(json.loads, lines)]

    def write_source(self, path: str, rows: Sequence[tuple[str, str]]) -> None:
        jsonl(self.root / path, *({"instruction": prompt, "output": answer} for prompt, answer in rows))

    def read_pairs(self) -> list[tuple[str, str, str]]:
        return [
            (row["prompt"], row["chosen"], row["rejected"])
            for row in map(json.loads, (self.root / PAIRS).read_text().splitlines())
        ]

    def write_pairs(self, rows: Sequence[tuple[str, str, str]]) -> None:
        jsonl(
            self.root / PAIRS,
            *({"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows),
        )

    def new_pair(self) -> tuple[str, str, str]:
        (prompt, chosen), (_, rejected) = self.new_row(), self.new_row()
        return prompt, chosen, rejected

    def new_row(self) -> tuple[str, str]:
        self.fresh += 1
        one, two, three, four = self.draw.sample(WORDS, 4)
        name = self.draw.choice(NAMES)
        return (
            f"{name} saw the {one} {self.fresh} near some {two}, why?",
            f"Because the {three} of {name} is a {four} {self.fresh * 7}.",
        )

    def new_key(self) -> None:
        """Write a new secret for published ids."""
        key = hashlib.sha256(f"{self.seed} {len(self.keys)}".encode()).digest()
        self.write(KEY, key.hex().encode() + b"\n")
        self.keys[dir_md5({Path(KEY).name: md5(key.hex().encode() + b"\n")})] = key

    def folder_files(self, path: str) -> dict[str, str]:
        """Files of a folder, or a single file as "": relative path -> md5."""
        folder = self.root / path
        if folder.is_file():
            return {"": md5(folder.read_bytes())}
        return {
            file.relative_to(folder).as_posix(): md5(file.read_bytes())
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != ".gitkeep"
        }

    def hash_of(self, path: str) -> str | None:
        if (self.root / path).is_file():
            return md5((self.root / path).read_bytes())
        files = self.folder_files(path)
        return dir_md5(files) if files else None

    # --- DVC

    def object(self, name: str) -> Path:
        return self.root / ".dvc/cache/files/md5" / name[:2] / name[2:]

    def keep(self, content: bytes, name: str | None = None) -> str:
        name = name or md5(content)
        path = self.object(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return name

    def cached(self, out: str) -> bool:
        """Whether an output, with its files, is in the cache."""
        return self.object(out).exists() and (
            not out.endswith(".dir") or all(self.object(one).exists() for one in self.log.files[out].values())
        )

    def lock(self) -> Lock:
        path = self.root / "dvc.lock"
        return dict(yaml.load(path.read_text(), yaml.CSafeLoader)["stages"]) if path.exists() else {}

    def write_lock(self, lock: Lock) -> None:
        self.past[canonical(lock)] = lock
        self.write(
            "dvc.lock", yaml.dump({"schema": "2.0", "stages": lock}, Dumper=yaml.CSafeDumper, sort_keys=False).encode()
        )

    def definition(self, address: str) -> tuple[list[str], dict[str, Any]]:
        """Dependencies and parameters of a stage, as dvc.yaml has them."""
        stage, _, name = address.partition("@")
        values = self.params()
        code = ["dagster_project/core", f"dagster_project/stages/{stage}.py"]
        deps, params = {
            "base_model": ([], ["base_model"]),
            "raw_examples": ([SOURCES], ["raw_examples"]),
            "instructions": (["data/raw_examples", "data/base_model"], ["instructions"]),
            "splits": (["data/instructions", "data/sources/paraphrases"], ["splits", "compute.seed"]),
            "tokenized": (["data/splits", "data/base_model"], ["tokenized"]),
            "adapter": (["data/tokenized", "data/base_model"], [f"adapter.{name}", "compute"]),
            "merged": (["data/base_model", f"data/adapter/{name}"], ["compute"]),
            "raw_preferences": ([SOURCES], ["raw_preferences"]),
            "preferences": (["data/raw_preferences", "data/splits"], ["preferences", "compute.seed"]),
            "reward_model": (["data/preferences", "data/base_model"], ["reward_model", "compute"]),
            "aligned": (["data/preferences", "data/reward_model", "data/merged/lora"], [f"aligned.{name}", "compute"]),
            "merged_aligned": (["data/merged/lora", f"data/aligned/{name}"], [f"aligned.{name}.adapter", "compute"]),
            "comparison": (["data/splits", "data/merged", "data/merged_aligned"], []),
            "release": (
                [
                    "data/keys",
                    "data/comparison",
                    "data/merged",
                    "data/merged_aligned",
                    "data/adapter",
                    "data/aligned",
                    "data/reports/merged",
                    "data/reports/merged_aligned",
                    *(
                        f"data/reports/{one}.json"
                        for one in ("raw_examples", "splits", "raw_preferences", "preferences", "reward_model")
                    ),
                ],
                ["release"],
            ),
        }[stage]
        found = {}
        for path in params:
            value: Any = values
            for key in path.split("."):
                value = value[key]
            found[path] = value
        return code + deps, found

    def outs_of(self, address: str) -> tuple[str, str]:
        path = address.replace("@", "/")
        return f"data/{path}", f"data/reports/{path}.json"

    def repro(self, wanted: Sequence[str] = ADDRESSES) -> None:
        """`dvc repro --single-item` of each, in flow order."""
        lock = self.lock()
        for address in ADDRESSES:
            if address in wanted and not self._run(address, lock):
                break
        self.write_lock({address: lock[address] for address in ADDRESSES if address in lock})

    def _run(self, address: str, lock: Lock) -> bool:
        """Returns: whether it is up to date now."""
        paths, params = self.definition(address)
        hashes = {path: self.hash_of(path) for path in paths}
        hashes = {
            path: "d751713988987e9331980363e24189ce.dir" if value is None and path.endswith("paraphrases") else value
            for path, value in hashes.items()
        }
        if None in hashes.values():
            return False
        entry: Entry = {
            "cmd": f"python -m dagster_project run {address}",
            "deps": [{"path": path, "hash": "md5", "md5": hashes[path]} for path in sorted(hashes)],
        }
        if params:
            entry["params"] = {"params.yaml": params}
        out, report = self.outs_of(address)
        before = lock.get(address, {})
        if {key: before.get(key) for key in entry} == entry and before.keys() - {"outs"} == entry.keys():
            if all(self.hash_of(one["path"]) == one["md5"] for one in before["outs"]):
                return True
            if self._restore(before):
                return True
        runs = self.root / ".dvc/cache/runs"
        key = hashlib.sha256(canonical({**entry, "outs": [out, report]}).encode()).hexdigest()
        for path in (runs / key[:2] / key).glob("*"):
            found = yaml.load(path.read_text(), yaml.CSafeLoader)
            if self._restore(found):
                lock[address] = found
                return True
        shutil.rmtree(self.root / out, ignore_errors=True)
        try:
            done = getattr(self, f"_{address.partition('@')[0]}")(address)
        except InputError as error:
            raise AssertionError(f"{address}: {error}") from error
        if done.failures:  # a gate: the output does not appear
            shutil.rmtree(self.root / out, ignore_errors=True)
            return False
        files = self.folder_files(out)
        for name, value in files.items():
            self.keep((self.root / out / name).read_bytes(), value)
        value = self.keep(dir_listing(files), dir_md5(files))
        document = {"passed": True, "output_sha256": hashlib.sha256(value.encode()).hexdigest(), **done.document()}
        self.write(report, json.dumps(document, indent=1).encode() + b"\n")
        content = (self.root / report).read_bytes()
        self.keep(content)
        self.log.reports[md5(content)] = content
        entry["outs"] = [
            {"path": out, "hash": "md5", "md5": value},
            {"path": report, "hash": "md5", "md5": md5(content)},
        ]
        lock[address] = entry
        self.log.files[value] = files
        self.log.entries[canonical(entry)] = (address, entry)
        whole = {address: entry}
        for one in entry["deps"]:
            for other, found in lock.items():
                if other != address and any(
                    made["path"] == one["path"] and made["md5"] == one["md5"]
                    for made in found["outs"]
                    if made["md5"].endswith(".dir")
                ):
                    whole = {**whole, **self.log.ran[canonical(found)][-1], **whole}
        self.log.ran.setdefault(canonical(entry), []).append(whole)
        self._note(address, entry, value)
        saved = runs / key[:2] / key / hashlib.sha256(canonical(entry).encode()).hexdigest()
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.write_text(yaml.dump(entry, Dumper=yaml.CSafeDumper, sort_keys=False))
        return True

    def _restore(self, entry: Entry) -> bool:
        """Check the outputs of an entry out of the cache."""
        if not all(self.cached(one["md5"]) for one in entry["outs"]):
            return False
        for one in entry["outs"]:
            self._checkout(one["path"], one["md5"])
        return True

    def _checkout(self, path: str, value: str) -> None:
        if self.hash_of(path) == value:
            return
        if not value.endswith(".dir"):
            self.write(path, self.object(value).read_bytes())
            return
        shutil.rmtree(self.root / path, ignore_errors=True)
        for name, one in self.log.files[value].items():
            self.write(f"{path}/{name}", self.object(one).read_bytes())

    def dvc_checkout(self) -> None:
        """Outputs as dvc.lock has them; those that are not in the cache
        disappear, as do those that it does not have."""
        lock = self.lock()
        for address in ADDRESSES:
            out = self.outs_of(address)[0]
            value = next((one["md5"] for one in lock.get(address, {"outs": []})["outs"] if one["path"] == out), None)
            if value and self.cached(value):
                self._checkout(out, value)
            elif value is None or self.hash_of(out) != value:
                shutil.rmtree(self.root / out, ignore_errors=True)

    # --- stages

    def _base_model(self, address: str) -> Report:
        for name, content in {
            **tokenizer_files(),
            "model.safetensors": canonical(self.params()["base_model"]["revision"]).encode(),
        }.items():
            self.write(f"data/base_model/{name}", content)
        return Report(
            metrics={
                "origin": "toy",
                "license": self.params()["base_model"]["license"],
                "parameters": 1,
                "dtype": "float32",
            }
        )

    def _raw_examples(self, address: str) -> Report:
        params = parse(raw_examples.Params, self.params()["raw_examples"], "raw_examples")
        return raw_examples.produce(self.root, params, self.root / "data/raw_examples")

    def _instructions(self, address: str) -> Report:
        params = parse(instructions.Params, self.params()["instructions"], "instructions")
        data = self.root / "data"
        if not self.real:
            return self._simulate_instructions()
        return instructions.produce(
            self.root,
            params,
            data / "raw_examples",
            data / "base_model",
            data / "instructions",
            self.root / ".dvc/tmp/pages",
            {},
        )

    def _splits(self, address: str) -> Report:
        if not self.real:
            return self._simulate_splits()
        params = parse(splits.Params, self.params()["splits"], "splits")
        return splits.produce(
            self.root,
            params,
            self.params()["compute"]["seed"],
            self.root / "data/instructions",
            self.root / "data/splits",
        )

    def _simulate_instructions(self) -> Report:
        """Drops rows without an answer, and all but the first of equal rows."""
        data, kept, ledger, overlaps = self.root / "data", [], [], []
        seen: set[str] = set()
        for record, line in zip(read_records(data / "raw_examples"), read_ledger(data / "raw_examples"), strict=True):
            empty, name = not record["messages"][-1]["content"].strip(), record["example_id"]
            outcome = "dropped:empty_response" if empty else "dropped:exact_duplicates" if name in seen else "kept"
            if outcome == "kept":
                seen.add(name)
                kept.append({**record, "group_id": name})
            if outcome == "dropped:exact_duplicates":
                overlaps.append(
                    {
                        **line,
                        "check": "exact_duplicates",
                        "other": name,
                        "part": "prompt",
                        "rule": "equal",
                        "score": 1.0,
                    }
                )
            ledger.append({**line, "outcome": outcome, "why": ""})
        self.write("data/instructions/overlaps.parquet", table(overlaps, overlap_schema()))
        write_records(data / "instructions", kept)
        write_ledger(data / "instructions", ledger)
        dropped = Counter(line["outcome"].partition(":")[2] for line in ledger if line["outcome"] != "kept")
        return Report(rows_in=len(ledger), rows_out=len(kept), dropped=dict(dropped))

    def _simulate_splits(self) -> Report:
        """A record's split depends on its id and the seed. Paraphrases are added to train."""
        params, data = self.params(), self.root / "data"
        records = read_records(data / "instructions")
        places = [line for line in read_ledger(data / "instructions") if line["outcome"] == "kept"]
        ledger, shards, metrics = [], {"train": [], "validation": [], "test": []}, {}
        for record, line in zip(records, places, strict=True):
            number = int(md5(f"{params['compute']['seed']}{record['example_id']}".encode()), 16) % 100 / 100
            shares = params["splits"]
            split = (
                "test"
                if number < shares["test"]
                else "validation"
                if number < shares["test"] + shares["validation"]
                else "train"
            )
            shards[split].append({**record, "split": split})
            ledger.append({**line, "outcome": split})
        augment = params["splits"].get("augment")
        if augment:
            content = (self.root / PARAPHRASES).read_bytes()
            facts = {
                "format": "paraphrases",
                "rows": len(content.splitlines()),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            metrics["sources"] = {PARAPHRASES: {**facts, "license": augment["license"]}}
            line_of = {line["example_id"]: line for line in ledger}
            others = {one["prompt"]: one["paraphrase"] for one in map(json.loads, content.splitlines())}
            for record in list(shards["train"]):
                prompt, answer = (message["content"] for message in record["messages"])
                if prompt in others:
                    parent, name = record["example_id"], identity(others[prompt], answer)
                    messages = [{"role": "user", "content": others[prompt]}, record["messages"][1]]
                    meta = json.dumps({"parent": parent, "augmented": "paraphrase"})
                    shards["train"].append({**record, "example_id": name, "messages": messages, "meta": meta})
                    ledger.append(
                        {
                            **line_of[parent],
                            "example_id": name,
                            "outcome": "augmented:paraphrase",
                            "why": f"copy of {parent}",
                        }
                    )
        schema = record_schema().append(pa.field("split", pa.string()))
        for split, rows in shards.items():
            write_records(data / "splits" / split, rows, schema)
        write_ledger(data / "splits", ledger)
        return Report(
            rows_in=len(records),
            rows_out=len(records),
            metrics={**{name: len(rows) for name, rows in shards.items()}, **metrics},
        )

    def _tokenized(self, address: str) -> Report:
        """Train and validation texts in the order of their ids; rows of the sources in `replay` are repeated."""
        repeats = self.params()["tokenized"]["replay"]
        counts, ledger = {}, []
        for split in ("train", "validation"):
            records = sorted(read_records(self.root / "data/splits" / split), key=lambda record: record["example_id"])
            texts = [
                {"example_id": one["example_id"], "messages": one["messages"]}
                for one in records
                for _ in range(repeats.get(one["source"], 1) if split == "train" else 1)
            ]
            self.write(f"data/tokenized/{split}.json", json.dumps(texts).encode())
            counts[split] = {"examples": len(texts)}
            ledger += [
                {
                    "source": one["source"],
                    "source_row": None,
                    "example_id": one["example_id"],
                    "outcome": split,
                    "why": "",
                }
                for one in records
            ]
        if self.ledger_in_tokenized:
            self.write("data/tokenized/ledger.parquet", table(ledger, ledger_schema()))
        return Report(metrics=counts)

    def _adapter(self, address: str) -> Report:
        """Two records per step."""
        texts = json.loads((self.root / "data/tokenized/train.json").read_text())
        settings = self.params()["adapter"][address.partition("@")[2]]
        order = [(epoch + 1, one["example_id"]) for epoch in range(settings["epochs"]) for one in texts]
        seen = [
            {"step": i // 2 + 1, "epoch": epoch, "position": i % 2, "example_id": name}
            for i, (epoch, name) in enumerate(order)
        ]
        seen = [row for row in seen if row["step"] <= settings["max_steps"]]
        out = f"data/{address.replace('@', '/')}"
        base = (self.root / "data/base_model/model.safetensors").read_bytes()
        weights = hashlib.sha256(
            canonical([seen, texts, settings["learning_rate"], self.params()["compute"], base.decode()]).encode()
        ).hexdigest()
        self.write(f"{out}/adapter_model.safetensors", weights.encode())
        self.write(f"{out}/examples.parquet", table(seen, seen_schema()))
        return Report(metrics={"steps": max((row["step"] for row in seen), default=0), "environment": {"torch": "2.0"}})

    def _merged(self, address: str) -> Report:
        name = address.partition("@")[2]
        parts = [
            (self.root / path).read_text()
            for path in ("data/base_model/model.safetensors", f"data/adapter/{name}/adapter_model.safetensors")
        ]
        self.write(f"data/merged/{name}/model.safetensors", canonical(parts).encode())
        return Report()

    def _raw_preferences(self, address: str) -> Report:
        params = parse(raw_preferences.Params, self.params()["raw_preferences"], "raw_preferences")
        return raw_preferences.produce(self.root, params, self.root / "data/raw_preferences")

    def _preferences(self, address: str) -> Report:
        """Drops all but the first of equal pairs, and pairs with a prompt of the test split."""
        seed, share = self.params()["compute"]["seed"], self.params()["preferences"]["test"]
        data, seen, shards, ledger = self.root / "data", set(), {"train": [], "validation": [], "test": []}, []
        tests = {record["messages"][0]["content"] for record in read_records(data / "splits/test")}
        for pair, line in zip(
            read_records(data / "raw_preferences"), read_ledger(data / "raw_preferences"), strict=True
        ):
            name = pair["example_id"]
            if name in seen or pair["prompt"][0]["content"] in tests:
                ledger.append(
                    {
                        **line,
                        "outcome": "dropped:exact_duplicates" if name in seen else "dropped:benchmark_leakage",
                        "why": "",
                    }
                )
                continue
            seen.add(name)
            number = int(md5(f"{seed}{name}".encode()), 16) % 100 / 100
            split = "test" if number < share else "validation" if number < 0.5 else "train"
            shards[split].append({**pair, "group_id": name})
            ledger.append({**line, "outcome": split})
        for split, rows in shards.items():
            write_records(data / "preferences" / split, rows, pair_schema())
        write_ledger(data / "preferences", ledger)
        dropped = Counter(
            line["outcome"].partition(":")[2] for line in ledger if line["outcome"].startswith("dropped:")
        )
        counts = {name: len(rows) for name, rows in shards.items()}
        return Report(rows_in=len(ledger), rows_out=len(seen), dropped=dict(dropped), metrics=counts)

    def _train_on_pairs(self, out: str, settings: Mapping[str, Any], *models: str) -> Report:
        """One pair per step; the weights depend on the pairs, the settings and the models that are read."""
        pairs = sorted(read_records(self.root / "data/preferences/train"), key=lambda pair: pair["example_id"])[
            : settings["max_steps"]
        ]
        seen = [
            {"step": i + 1, "epoch": 1, "position": 0, "example_id": pair["example_id"]} for i, pair in enumerate(pairs)
        ]
        read = [md5((self.root / path).read_bytes()) for path in models]
        weights = md5(canonical([pairs, {**settings, "max_steps": 0}, read]).encode())
        self.write(f"{out}/adapter_model.safetensors", weights.encode())
        self.write(f"{out}/examples.parquet", table(seen, seen_schema()))
        return Report(metrics={"steps": len(seen), "environment": {"torch": "2.0"}})

    def _reward_model(self, address: str) -> Report:
        return self._train_on_pairs(
            "data/reward_model", self.params()["reward_model"], "data/base_model/model.safetensors"
        )

    def _aligned(self, address: str) -> Report:
        settings = self.params()["aligned"]["dpo"]
        report = self._train_on_pairs("data/aligned/dpo", settings, "data/merged/lora/model.safetensors")
        reward = (self.root / "data/reward_model/adapter_model.safetensors").read_text()
        return Report(metrics={**report.metrics, "method": "dpo", "adapter": "lora", "watch": reward[:8]})

    def _merged_aligned(self, address: str) -> Report:
        parts = [
            (self.root / path).read_text()
            for path in ("data/merged/lora/model.safetensors", "data/aligned/dpo/adapter_model.safetensors")
        ]
        self.write("data/merged_aligned/dpo/model.safetensors", canonical(parts).encode())
        return Report()

    def _comparison(self, address: str) -> Report:
        read = [str(self.hash_of(path)) for path in ("data/merged", "data/merged_aligned", "data/splits")]
        self.write("data/comparison/board.md", " ".join(read).encode())
        return Report()

    def _release(self, address: str) -> Report:
        name = self.params()["release"]["variant"]
        folder = "merged_aligned" if name == "dpo" else "merged"
        self.write(
            "data/release/model.safetensors", (self.root / f"data/{folder}/{name}/model.safetensors").read_bytes()
        )
        self.write("data/release/README.md", f"A model: {name}.".encode())
        return Report(metrics={"variant": name})

    def _note(self, address: str, entry: Entry, value: str) -> None:
        """Log what a run read and did, from the files that people wrote and from the outputs, not from reports."""
        import pyarrow.parquet as pq

        stage, out = address.partition("@")[0], self.root / f"data/{address.replace('@', '/')}"
        for weights in ("model.safetensors", "adapter_model.safetensors"):
            if weights in self.log.files[value]:
                self.log.weights[value] = self.log.files[value][weights]
        if stage == "raw_examples":
            rows, facts = [], {}
            for one in self.params()["raw_examples"]["sources"]:
                found = [Row(one["path"], i, *texts) for i, texts in enumerate(self.read_source(one["path"]))]
                rows += found
                digest = hashlib.sha256((self.root / one["path"]).read_bytes()).hexdigest()
                facts[one["path"]] = {"rows": len(found), "sha256": digest, "license": one["license"]}
            self.log.rows[value] = rows
            self.log.sources[canonical(entry)] = facts
            self.log.text_of |= {row.identity: (row.prompt, row.answer) for row in rows}
        if stage == "raw_preferences":
            pairs = [Pair(PAIRS, texts) for texts in self.read_pairs()]
            content = (self.root / PAIRS).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            license_of = self.params()["raw_preferences"]["sources"][0]["license"]
            self.log.pairs[value] = pairs
            self.log.sources[canonical(entry)] = {PAIRS: {"rows": len(pairs), "sha256": digest, "license": license_of}}
            self.log.text_of |= {pair.identity: pair.texts for pair in pairs}
        if stage == "preferences":
            self.log.split_of[value] = {}
            for split in ("train", "validation", "test"):
                for pair in (
                    row for shard in sorted((out / split).glob("*.parquet")) for row in pq.read_table(shard).to_pylist()
                ):
                    name = pair_identity(*(pair[side][0]["content"] for side in ("prompt", "chosen", "rejected")))
                    assert name == pair["example_id"]
                    self.log.split_of[value][name] = split
        if stage == "splits":
            self.log.split_of[value], self.log.parent_of[value], facts = {}, {}, {}
            for split in ("train", "validation", "test"):
                for record in (
                    row for shard in sorted((out / split).glob("*.parquet")) for row in pq.read_table(shard).to_pylist()
                ):
                    name = identity(record["messages"][0]["content"], record["messages"][1]["content"])
                    assert name == record["example_id"]
                    self.log.text_of[name] = (record["messages"][0]["content"], record["messages"][1]["content"])
                    self.log.split_of[value][name] = split
                    if "parent" in json.loads(record["meta"]):
                        self.log.parent_of[value][name] = json.loads(record["meta"])["parent"]
            augment = self.params()["splits"].get("augment")
            if augment:
                content = (self.root / PARAPHRASES).read_bytes()
                facts[PARAPHRASES] = {
                    "rows": len(content.splitlines()),
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "license": augment["license"],
                }
            self.log.sources[canonical(entry)] = facts
        if stage in {"raw_examples", "instructions", "splits", "raw_preferences", "preferences"}:
            counts: dict[str, dict[str, int]] = {}
            for line in pq.read_table(out / "ledger.parquet").to_pylist():
                of = counts.setdefault(line["source"], {})
                of[line["outcome"]] = of.get(line["outcome"], 0) + 1
            self.log.outcomes[value] = counts
        if stage in {"adapter", "reward_model", "aligned"}:
            self.log.steps[value] = [
                (row["step"], row["epoch"], row["example_id"])
                for row in pq.read_table(out / "examples.parquet").to_pylist()
            ]

    # --- git

    def head(self) -> str | None:
        with suppress(AssertionError, Exception):
            return git(self.root, "rev-parse", "-q", "--verify", "HEAD").strip()
        return None

    def record_commit(self) -> None:
        head = git(self.root, "rev-parse", "HEAD").strip()
        if head not in self.locks:
            self.locks[head] = self.lock_at(head)

    def lock_at(self, commit: str) -> Lock:
        try:
            text = git(self.root, "show", f"{commit}:dvc.lock")
        except Exception:  # noqa: BLE001  a commit without one
            return {}
        return dict(yaml.load(text, yaml.CSafeLoader)["stages"])

    def commit(self, *paths: str, amend: bool = False) -> None:
        git(self.root, "add", "-A", *(("--", *paths) if paths else ()))
        git(
            self.root,
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            f"commit {len(self.locks)}",
            *(["--amend"] if amend else []),
        )
        self.record_commit()

    def git_checkout(self, rev: str, *options: str) -> None:
        git(self.root, "checkout", "-q", "-f", *options, rev)
        git(self.root, "clean", "-qfd")
        self.dvc_checkout()
        self.record_commit()

    # --- operations

    def play(self, operations: int, first: bool = True) -> None:
        """Random operations, the first ones after a run that is usually committed."""
        if first:
            self.commit()
            self.do("repro")
            if self.draw.random() < 0.8:
                self.do("commit_all")
        weights = {name: weight for names, weight in OPERATIONS for name in names.split()}
        for _ in range(operations):
            self.do(self.draw.choices(list(weights), list(weights.values()))[0])

    def do(self, name: str) -> None:
        self.said.append(name)
        getattr(self, name if name in {"repro"} else f"op_{name}")()

    def note(self, text: str) -> None:
        self.said[-1] += f" {text}"

    def pick_source(self) -> str | None:
        found = [path for path in self.source_paths() if self.read_source(path)]
        return self.draw.choice(found) if found else None

    def op_edit(self) -> None:
        if path := self.pick_source():
            rows = self.read_source(path)
            i = self.draw.randrange(len(rows))
            rows[i] = self.draw.choice(
                [self.new_row(), (rows[i][0], self.new_row()[1]), (self.new_row()[0], rows[i][1]), (rows[i][0], "")]
            )
            self.write_source(path, rows)
            self.note(f"{path}:{i}")

    def op_add(self) -> None:
        path = self.draw.choice(self.source_paths())
        rows = self.read_source(path)
        rows.insert(self.draw.randint(0, len(rows)), self.new_row())
        self.write_source(path, rows)
        self.note(path)

    def op_delete(self) -> None:
        path = self.pick_source()
        rows = self.read_source(path) if path else []
        if path and len(rows) > 1 and sum(len(self.read_source(one)) for one in self.source_paths()) > 6:
            del rows[self.draw.randrange(len(rows))]
            self.write_source(path, rows)
            self.note(path)

    def op_reorder(self) -> None:
        path = self.draw.choice(self.source_paths())
        rows = self.read_source(path)
        self.draw.shuffle(rows)
        self.write_source(path, rows)
        self.note(path)

    def change_sources(self, change: Callable[[list[dict[str, Any]]], None]) -> None:
        values = self.params()
        change(values["raw_examples"]["sources"])
        self.write_params(values)

    def new_name(self) -> str:
        self.fresh += 1
        return f"{SOURCES}/{self.draw.choice(['team/', ''])}source{self.fresh}.jsonl"

    def op_rename(self) -> None:
        sources = self.params()["raw_examples"]["sources"]
        i, name = self.draw.randrange(len(sources)), self.new_name()
        old = sources[i]["path"]
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / old).rename(self.root / name)
        self.change_sources(lambda found: found[i].update(path=name))
        self.note(f"{old} -> {name}")

    def op_order_of_sources(self) -> None:
        self.change_sources(self.draw.shuffle)

    def op_license(self) -> None:
        i = self.draw.randrange(len(self.source_paths()))
        self.change_sources(lambda found: found[i].update(license=self.draw.choice(["MIT", "CC-BY-4.0", "CC0-1.0"])))

    def op_split_source(self) -> None:
        path = self.pick_source()
        if path and len(rows := self.read_source(path)) > 1:
            name, at = self.new_name(), self.draw.randint(1, len(rows) - 1)
            self.write_source(path, rows[:at])
            self.write_source(name, rows[at:])
            self.change_sources(lambda found: found.append({"path": name, "license": "MIT"}))
            self.note(f"{path} -> {name}")

    def op_move(self) -> None:
        path = self.pick_source()
        if path and len(rows := self.read_source(path)) > 1:
            other = self.draw.choice(self.source_paths())
            row = rows.pop(self.draw.randrange(len(rows)))
            self.write_source(path, rows)
            self.write_source(other, [*self.read_source(other), row])
            self.note(f"{path} -> {other}")

    def op_duplicate(self) -> None:
        if path := self.pick_source():
            rows = self.draw.choices(self.read_source(path), k=2)
            other = self.draw.choice([*self.source_paths(), self.new_name()])
            before = self.read_source(other) if other in self.source_paths() else []
            if not before and other not in self.source_paths():
                self.change_sources(
                    lambda found: found.insert(self.draw.randint(0, len(found)), {"path": other, "license": "CC0-1.0"})
                )
            self.write_source(other, [*before, *dict.fromkeys(rows)])
            self.note(f"{path} -> {other}")

    def op_paraphrases(self) -> None:
        values = self.params()
        if "augment" in values["splits"] and self.draw.random() < 0.3:
            del values["splits"]["augment"]
        else:
            rows = [row for path in self.source_paths() for row in self.read_source(path)]
            chosen = {prompt: None for prompt, _ in self.draw.sample(rows, len(rows) // 2)}
            lines = [{"prompt": one, "paraphrase": f"{one.split()[0]} met {self.new_row()[0]}"} for one in chosen]
            jsonl(self.root / PARAPHRASES, *lines)
            values["splits"]["augment"] = {"paraphrases": PARAPHRASES, "license": "CC-BY-4.0"}
        self.write_params(values)

    def op_params(self) -> None:
        values = self.params()
        where = self.draw.choice(
            ["seed", "base", "test", "replay", "rate", "epochs", "steps", "release", "align", "reward"]
        )
        name = self.draw.choice(VARIANTS)
        if where == "seed":
            values["compute"]["seed"] = self.draw.randint(1, 9)
        elif where == "base":
            values["base_model"]["revision"] = self.draw.randint(1, 3)
        elif where == "test":
            values["splits"]["test"] = self.draw.choice([0.2, 0.3])
        elif where == "replay":
            values["tokenized"]["replay"] = (
                {self.draw.choice(self.source_paths()): 2} if self.draw.random() < 0.7 else {}
            )
        elif where == "rate":
            values["adapter"][name]["learning_rate"] = self.draw.randint(1, 3) + VARIANTS.index(name) / 10
        elif where == "epochs":
            values["adapter"][name]["epochs"] = self.draw.randint(1, 2)
        elif where == "steps":
            values["adapter"][name]["max_steps"] = self.draw.choice([2, 99])
        elif where == "align":
            values["aligned"]["dpo"]["learning_rate"] = self.draw.randint(1, 3)
        elif where == "reward":
            values["reward_model"]["max_steps"] = self.draw.choice([1, 99])
        else:
            values["release"]["variant"] = self.draw.choice([*VARIANTS, "dpo"])
        self.write_params(values)
        self.note(where)

    def op_code(self) -> None:
        path = self.draw.choice(sorted((self.root / "dagster_project").rglob("*.py")))
        path.write_text(f"VERSION = {self.draw.randint(1, 4)}\n")
        self.note(path.name)

    def op_pair(self) -> None:
        """One pair is added, deleted, edited or repeated."""
        rows = self.read_pairs()
        i, what = self.draw.randrange(len(rows)), self.draw.choice(["add", "delete", "edit", "repeat"])
        if what == "add":
            rows.insert(i, self.new_pair())
        elif what == "delete" and len(rows) > 2:
            del rows[i]
        elif what == "repeat":
            rows.append(rows[i])
        else:
            rows[i] = self.draw.choice([self.new_pair(), (rows[i][0], self.new_row()[1], rows[i][2])])
        self.write_pairs(rows)
        self.note(f"{what} {i}")

    def op_key(self) -> None:
        self.new_key()

    def op_run_all(self) -> None:
        self.repro()

    def op_run_some(self) -> None:
        wanted = self.draw.sample(ADDRESSES, self.draw.randint(1, 5))
        self.repro(wanted)
        self.note(" ".join(wanted))

    def op_run_up_to(self) -> None:
        last = self.draw.randrange(2, len(ADDRESSES))
        self.repro(ADDRESSES[: last + 1])
        self.note(ADDRESSES[last])

    def op_commit_all(self) -> None:
        self.commit()

    def op_commit_part(self) -> None:
        """Only dvc.lock, or everything but dvc.lock."""
        if self.draw.random() < 0.5:
            if (self.root / "dvc.lock").exists():
                self.commit("dvc.lock")
                self.note("dvc.lock")
        else:
            self.commit(".", ":!dvc.lock")
            self.note("without dvc.lock")

    def op_amend(self) -> None:
        self.commit(amend=True)

    def parent(self) -> str | None:
        found = git(self.root, "rev-list", "--max-count=2", "HEAD").split()
        return found[1] if len(found) > 1 else None

    def op_reset(self) -> None:
        """As a rebase does it: the last commit is taken back, and its changes are committed again, or not."""
        if not self.parent():
            return
        how = self.draw.choice(["soft", "mixed", "hard"])
        git(self.root, "reset", "-q", f"--{how}", "HEAD~1")
        if how == "hard":
            git(self.root, "clean", "-qfd")
            self.dvc_checkout()
        elif self.draw.random() < 0.7:
            self.commit()
        self.note(how)

    def op_rebase(self) -> None:
        """The last commit is made again on top of an earlier one, with another message."""
        head = git(self.root, "rev-parse", "HEAD").strip()
        commits = git(self.root, "rev-list", "--all").split()
        new = git(
            self.root,
            "commit-tree",
            "-p",
            self.draw.choice(commits),
            "-m",
            f"rebased {len(self.said)}",
            f"{head}^{{tree}}",
        ).strip()
        git(self.root, "reset", "-q", "--soft", new)
        self.record_commit()

    def branches(self) -> list[str]:
        return git(self.root, "for-each-ref", "--format=%(refname:short)", "refs/heads").split()

    def current_branch(self) -> str:
        return git(self.root, "rev-parse", "--abbrev-ref", "HEAD").strip()

    def op_branch(self) -> None:
        self.fresh += 1
        git(self.root, "checkout", "-q", "-b", f"branch{self.fresh}")

    def op_checkout(self) -> None:
        rev = self.draw.choice([*self.branches(), *git(self.root, "rev-list", "--all").split()])
        self.git_checkout(rev)
        self.note(rev)

    def op_tag(self) -> None:
        self.fresh += 1
        options = ["-a", "-m", "a tag"] if self.draw.random() < 0.5 else []
        git(self.root, "tag", *options, f"v{self.fresh}")

    def op_delete_branch(self) -> None:
        others = [one for one in self.branches() if one != self.current_branch()]
        if len(others) > 0:
            name = self.draw.choice(others)
            git(self.root, "branch", "-qD", name)
            self.note(name)

    def related(self, branch: str) -> bool:
        """Whether a branch and HEAD have a commit in common: not after the first commit was amended."""
        found = subprocess.run(["git", "merge-base", "HEAD", branch], cwd=self.root, capture_output=True, text=True)
        if found.returncode > 1 or found.stderr:
            raise AssertionError(f"git merge-base: {found.stderr}")
        return found.returncode == 0

    def op_merge(self) -> None:
        """Of a branch, by hand: the files of one side, and dvc.lock of one side or, stage by stage, of both."""
        others = [one for one in self.branches() if one != self.current_branch()]
        if not others:
            return
        self.commit()
        other = self.draw.choice(others)
        if not self.related(other):
            self.note(f"{other}: refused by git, which merges no unrelated histories")
            return
        mine, theirs = self.lock(), self.lock_at(other)
        git(self.root, "merge", "-q", "-s", "ours", "--no-commit", "--no-ff", other)
        side = self.draw.choice(["ours", "theirs", "mixed"])
        if side != "ours":
            git(self.root, "checkout", "-q", other, "--", ".")
            if not theirs:
                (self.root / "dvc.lock").unlink(missing_ok=True)
        if side == "mixed" and mine and theirs:
            self.write_lock(
                {
                    address: self.draw.choice([lock for lock in (mine, theirs) if address in lock])[address]
                    for address in ADDRESSES
                    if address in mine or address in theirs
                }
            )
        self.commit()
        self.dvc_checkout()
        self.note(f"{other} {side}")

    def op_stash(self) -> None:
        git(self.root, "add", "-A")
        if not git(self.root, "status", "--porcelain").strip():
            return
        git(self.root, "stash", "-q")
        if self.draw.random() < 0.5:
            git(self.root, "stash", "drop", "-q")
            self.note("dropped")
        self.dvc_checkout()

    def op_experiment(self) -> None:
        """`dvc exp run` in a temporary directory: a change, a run, and a commit that only a ref of DVC's names."""
        if git(self.root, "status", "--porcelain").strip():
            self.commit()
        self.op_params()
        self.repro()
        git(self.root, "add", "-A")
        tree = git(self.root, "write-tree").strip()
        commit = git(self.root, "commit-tree", "-p", "HEAD", "-m", "experiment", tree).strip()
        head = git(self.root, "rev-parse", "HEAD").strip()
        self.fresh += 1
        git(self.root, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/exp{self.fresh}", commit)
        self.locks[commit] = self.lock_at(commit)
        git(self.root, "reset", "-q", "--hard")
        self.dvc_checkout()

    def op_expire_reflog(self) -> None:
        git(self.root, "reflog", "expire", "--expire=all", "--all")

    def op_gc(self) -> None:
        """`dvc gc`: keep what the workspace, or all branches and tags, name. Reports are kept by git alone."""
        everything = self.draw.random() < 0.4
        locks = [self.lock()]
        if everything:
            locks += [
                self.locks[one] if one in self.locks else self.lock_at(one)
                for one in git(self.root, "rev-list", "--branches", "--tags", "HEAD").split()
            ]
        kept = {
            one["md5"]
            for lock in locks
            for entry in lock.values()
            for one in entry["outs"]
            if one["md5"].endswith(".dir")
        }
        kept |= {value for name in kept for value in self.log.files[name].values()}
        for path in self.root.glob(".dvc/cache/files/md5/*/*"):
            if path.parent.name + path.name not in kept:
                path.unlink()
        if self.draw.random() < 0.5:
            shutil.rmtree(self.root / ".dvc/cache/runs", ignore_errors=True)
            self.note("runs")
        self.note("all commits" if everything else "workspace")

    def op_drop_runs(self) -> None:
        shutil.rmtree(self.root / ".dvc/cache/runs", ignore_errors=True)

    def op_lose_object(self) -> None:
        """One file of the cache is deleted."""
        found = sorted(self.root.glob(".dvc/cache/files/md5/*/*"))
        if found:
            path = self.draw.choice(found)
            path.unlink()
            self.note(path.parent.name + path.name)


OPERATIONS = (
    ("edit add delete move duplicate", 2.0),
    ("pair", 3.0),
    ("reorder rename order_of_sources license split_source paraphrases code", 1.5),
    ("params", 3.0),
    ("run_all", 8.0),
    ("run_some run_up_to", 2.5),
    ("commit_all", 8.0),
    ("commit_part amend reset branch checkout merge", 1.5),
    ("rebase tag delete_branch stash experiment", 1.0),
    ("gc lose_object", 0.5),
    ("expire_reflog drop_runs key", 0.4),
)
"""Names of operations, and how often each of them is done."""
