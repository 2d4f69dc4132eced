"""The stages of data after a small change, with what the earlier run kept and
from nothing. usage: python benchmarks/incremental.py [--rows N]

The rows of `curation.py --pipeline` in three sources go through raw_examples -> instructions -> splits, each stage in
its own process. Then 1 % of the rows are edited, all in the first source, 1 % are appended to the second, and the third
is shuffled. The columns are: before, when `core/row_cache.py` has no facts yet | after, from nothing | after, with the
facts of before. `--edited 1` edits one row, and neither appends nor shuffles. CPU seconds are those of whole processes
with all imports. The outputs after the change must be equal in both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from children import ROOT, result_of
from curation import _digest, _produce, alpaca

STAGES = ("raw_examples", "instructions", "splits")
SOURCES = ("a.jsonl", "b.jsonl", "c.jsonl")


def change(folder: Path, share: float, count: int | None) -> None:
    """Edit, append and shuffle rows of the sources.

    Args:
        count: of rows to edit, without any other change; None: 1 % of each kind.
    """
    draw = random.Random(0)
    parts = {name: (folder / name).read_text(encoding="utf-8").splitlines() for name in SOURCES}
    a, b, c = SOURCES
    total = sum(map(len, parts.values()))
    for i in draw.sample(range(len(parts[a])), round(share * total) if count is None else count):
        row = json.loads(parts[a][i])
        parts[a][i] = json.dumps({**row, "output": f"{row['output']} edited"}, ensure_ascii=False)
    if count is None:
        for line in draw.sample(parts[a], round(share * total)):
            row = json.loads(line)
            words = str(row["instruction"]).split()
            parts[b].append(
                json.dumps({**row, "instruction": " ".join(draw.sample(words, len(words)))}, ensure_ascii=False)
            )
        draw.shuffle(parts[c])
    for name, lines in parts.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_stage(stage: str, base_model: Path, root: Path, data: Path, kept: bool) -> dict[str, float]:
    from dagster_project.core import row_cache
    from dagster_project.stages import raw_examples

    with row_cache.using(root, "instructions") if kept else nullcontext():
        if stage == "raw_examples":
            params = raw_examples.Params.model_validate(
                {"sources": [{"path": f"data/sources/{name}"} for name in SOURCES]}
            )
            rows = raw_examples.produce(root, params, data / stage).rows_out or 0
        else:
            rows = _produce(stage, base_model, root, data)
    used = resource.getrusage(resource.RUSAGE_SELF)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu": sum(one.ru_utime + one.ru_stime for one in (used, others)),
        "peak": used.ru_maxrss / 2**20,
        "rows": rows,
    }


def run_all(root: Path, base_model: Path, kept: bool) -> tuple[list[dict[str, float]], list[str]]:
    """Time, memory and digest of each stage."""
    data = root / ("kept" if kept else "nothing")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    (data / "sources").symlink_to(root / "data/sources")  # for the benchmark files
    measured, digests = [], []
    for stage in STAGES:
        of_stage = ["--stage", stage, "--base-model", str(base_model), "--folder", str(root), "--data", str(data)]
        measured.append(
            result_of(__file__, *of_stage, *(["--kept"] if kept else []), variables={"GX_ANALYTICS_ENABLED": "false"})
        )
        digests.append(_digest(data / stage))
    return measured, digests


def compare(root: Path, rows: int, base_model: Path, edited: int | None) -> None:
    sources = root / "data/sources"
    sources.mkdir(parents=True)
    (root / ".dvc").mkdir()
    shutil.copytree(ROOT / "data/sources/benchmarks", sources / "benchmarks")
    shutil.copytree(ROOT / "data/expectations", root / "data/expectations")
    alpaca(rows, max(1, rows // 1000), root / "all.jsonl")
    lines = (root / "all.jsonl").read_text(encoding="utf-8").splitlines()
    for i, name in enumerate(SOURCES):
        (sources / name).write_text("\n".join(lines[i::3]) + "\n", encoding="utf-8")
    del lines
    print(f"{rows:,} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; CPU seconds (peak GiB)")
    columns = [run_all(root, base_model, True)]
    change(sources, 0.01, edited)
    columns += [run_all(root, base_model, False), run_all(root, base_model, True)]
    for i, stage in enumerate(STAGES):
        print(f"{stage:14}" + "".join(f"{one[i]['cpu']:9.1f} ({one[i]['peak']:.2f})" for one, _ in columns))
    sums = [sum(each["cpu"] for each in one) for one, _ in columns]
    size = sum(file.stat().st_size for file in (root / ".dvc").rglob("*.arrow"))
    print(
        f"{'sum':14}"
        + "".join(f"{each:9.1f}       " for each in sums)
        + f" ratio {sums[2] / sums[1]:.2f}; kept {size / 1e6:,.1f} MB"
    )
    if columns[1][1] != columns[2][1]:
        raise SystemExit("the results differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="texts (default: %(default)s)")
    parser.add_argument("--edited", type=int, help="edit so many rows, and change nothing else")
    parser.add_argument(
        "--base-model",
        type=Path,
        default=ROOT / "data/base_model",
        help="folder with its tokenizer (default: data/base_model)",
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.base_model, args.folder, args.data, args.kept)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args.rows, args.base_model.resolve(), args.edited)


if __name__ == "__main__":
    main()
