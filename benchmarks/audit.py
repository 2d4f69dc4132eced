"""Time of `pedigree impact` over a long history. usage: python benchmarks/audit.py [--versions N] [--records N]
[--trainings N]

Creates a history: in each version one record is changed, so one shard of its data set is new; splits, an adapter and a
merged model are committed with their objects in DVC's cache. Each query runs in a new process, whose start is included
in the time. Prints medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
SHARD = 8192
SOURCES = [f"data/sources/part{n}.jsonl" for n in range(10)]
DVC_YAML = """\
stages:
  adapter: {foreach: {lora: 1}, do: {cmd: x, meta: {kinds: [safetensors]}}}
  merged: {foreach: {lora: 1}, do: {cmd: x, meta: {kinds: [safetensors]}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--versions", type=int, default=1000, help="commits, each with two models (default: %(default)s)"
    )
    parser.add_argument("--records", type=int, default=1_000_000, help="in the data set of each (default: %(default)s)")
    parser.add_argument("--trainings", type=int, default=10, help="different orders of training (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each question (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        start = time.perf_counter()
        everywhere, once = make(root, options.versions, options.records, options.trainings)
        print(f"{options.versions} versions of {options.records:,} records made in {time.perf_counter() - start:.0f} s")
        start = time.perf_counter()
        ask(root, "--record", everywhere)
        print(f"indexed in {time.perf_counter() - start:.0f} s; the index has {size(root / '.dvc/tmp') / 1e6:,.0f} MB")
        questions = {
            "a record of every model": ("--record", everywhere),
            "a record of a few versions": ("--record", once),
            "a text": ("--text", f"question {options.records // 2}"),
            "a part of a text": ("--containing", f"question {options.records // 2}"),
            "a source": ("--source", SOURCES[0]),
            "a record of no model": ("--record", "0" * 32),
        }
        for name, arguments in questions.items():
            times, models = [], 0
            for _ in range(options.repeat):
                start = time.perf_counter()
                models = len(ask(root, *arguments)["models"])
                times.append(time.perf_counter() - start)
            print(f"{name}: {statistics.median(times):.2f} s, {models} models")


def ask(root: Path, *arguments: str) -> Any:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dagster_project", "impact", *arguments, "--json"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make(root: Path, versions: int, records: int, trainings: int) -> tuple[str, str]:
    """The project. Returns the ids of a record that every model is trained on, and of one that only the middle version
    has."""
    cache = root / ".dvc" / "cache" / "files" / "md5"
    cache.mkdir(parents=True)
    (root / ".dvc" / "config").write_text("")
    scratch = root / "scratch.parquet"

    def keep(content: bytes | Path, ending: str = "") -> str:
        if isinstance(content, bytes):
            scratch.write_bytes(content)
        with scratch.open("rb") as file:
            name = hashlib.file_digest(file, "md5").hexdigest() + ending
        place = cache / name[:2] / name[2:]
        place.parent.mkdir(exist_ok=True)
        shutil.move(scratch, place)
        return name

    def folder(files: dict[str, str]) -> str:
        return keep(json.dumps([{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]).encode(), ".dir")

    draw = np.random.default_rng(0)
    ids = np.array([draw.bytes(16).hex() for _ in range(records)], dtype=object)

    def shard(number: int) -> str:
        part = ids[number * SHARD : (number + 1) * SHARD].tolist()
        first = number * SHARD
        messages = [
            [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
            for i in range(first, first + len(part))
        ]
        sources = [SOURCES[i % len(SOURCES)] for i in range(first, first + len(part))]
        pq.write_table(
            pa.table({"example_id": part, "source": sources, "messages": messages}), scratch, compression="zstd"
        )
        return keep(scratch)

    evidence = []
    for _ in range(trainings):
        order = draw.permutation(records)
        steps = np.arange(records, dtype=np.int32) // 32 + 1
        seen = {"step": steps, "epoch": np.ones(records, np.int32), "position": steps % 32, "example_id": ids[order]}
        pq.write_table(pa.table(seen), scratch, compression="zstd")
        evidence.append(keep(scratch))
    shards = {f"train/records-{n:05d}.parquet": shard(n) for n in range(-(-records // SHARD))}
    stream = [f"blob\nmark :1\ndata {len(DVC_YAML)}\n{DVC_YAML}\n"]
    changing = ""
    for version in range(versions):
        number = version % len(shards)
        ids[number * SHARD] = draw.bytes(16).hex()
        changing = str(ids[number * SHARD]) if version == versions // 2 else changing
        shards[f"train/records-{number:05d}.parquet"] = shard(number)
        splits = folder(shards)
        sources = folder({Path(source).name: f"{version:032x}" for source in SOURCES})
        adapter = folder(
            {
                "examples.parquet": evidence[version % trainings],
                "adapter_model.safetensors": hashlib.md5(f"{version}".encode()).hexdigest(),
            }
        )
        merged = folder({"model.safetensors": hashlib.md5(f"merged {version}".encode()).hexdigest()})
        lock = lock_text(
            [("splits", "data/sources", sources, splits), ("adapter@lora", "data/splits", splits, adapter),
             ("merged@lora", "data/adapter/lora", adapter, merged)]
        )  # fmt: skip
        stream.append(
            f"commit refs/heads/main\ncommitter t <t@example.org> {1_700_000_000 + version} +0000\ndata 1\nx\n"
            f"M 100644 :1 dvc.yaml\nM 100644 inline dvc.lock\ndata {len(lock)}\n{lock}\n"
        )
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    subprocess.run(["git", "fast-import", "--quiet"], cwd=root, input="".join(stream), text=True, check=True)
    subprocess.run(["git", "reset", "-q", "--hard"], cwd=root, check=True)
    return str(ids[1]), changing


def lock_text(stages: list[tuple[str, str, str, str]]) -> str:
    """A dvc.lock in DVC's format, of stages with one dependency and fifty files
    of code. A hash without letters would be a number in YAML."""
    lines = ["schema: '2.0'", "stages:"]
    for name, dep, read, out in stages:
        lines += [f"  {name}:", f"    cmd: python -m dagster_project run {name}", "    deps:"]
        lines += [f"    - path: code/{i}.py\n      hash: md5\n      md5: {i:031x}f" for i in range(50)]
        lines += [f"    - path: {dep}\n      hash: md5\n      md5: {read}", "    outs:"]
        lines += [f"    - path: data/{name.replace('@', '/')}\n      hash: md5\n      md5: {out}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
