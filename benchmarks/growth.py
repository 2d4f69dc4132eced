"""How time and memory grow with size. usage: python benchmarks/growth.py
[--only data,stages,versions,training] [--sizes N ...] [--out docs/scaling.md]

    data       each stage of data on N generated rows (`curation.py --pipeline`), in one process
    stages     definitions of Dagster, a sync that reports everything and one with nothing to report, of a pipeline of N
    stages versions   `pedigree impact` over N commits with two models each, and the index that the first question makes
    (`audit.py`) training   LoRA on the embedded model, one row of N tokens a step

Costs are CPU seconds (user and system), which depend less on other work of the machine than time does. Each size is
measured in processes of its own. The exponent is the slope of log(cost - cost of the smallest size) over log(size -
smallest size), by least squares over the other sizes: the cost of the smallest size is nearly that of starting
(process, imports). That of memory is of the peak of the process, in the same way.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audit
import curation
from children import result_of
from tables import machine, show

ROOT = Path(__file__).resolve().parents[1]
Costs = dict[str, dict[int, tuple[float, float]]]
"""What was measured -> size -> (CPU seconds, peak GiB)."""

ROWS = [100, 10_000, 100_000, 1_000_000]
STAGES = [1, 10, 100, 1_000]
VERSIONS = [1, 10, 100, 1_000, 10_000]
TOKENS = [8, 64, 256, 1_024, 4_096]
STEPS = 3
"""Steps of training that are measured, after one that is not."""


def exponent(costs: dict[int, float]) -> float | None:
    """Slope of log(cost - cost of the smallest size) over log(size - smallest
    size); None if fewer than two sizes cost measurably more than it."""
    (smallest, start), *others = sorted(costs.items())
    points = [
        (math.log(size - smallest), math.log(cost - start)) for size, cost in others if cost > 1.05 * start + 0.01
    ]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def data(sizes: list[int], folder: Path) -> Costs:
    costs: Costs = {}
    for size in sizes:
        root = folder / f"rows-{size}"
        sources = root / "data/sources"
        sources.mkdir(parents=True)
        shutil.copytree(ROOT / "data/sources/benchmarks", sources / "benchmarks")
        shutil.copytree(ROOT / "data/expectations", root / "data/expectations")
        curation.alpaca(size, max(1, size // 1000), sources / "rows.jsonl")
        for stage in curation.STAGES:
            arguments = [
                "--stage",
                stage,
                "--base-model",
                str(ROOT / "data/base_model"),
                "--folder",
                str(root),
                "--workers",
                "1",
            ]
            found = result_of(str(ROOT / "benchmarks/curation.py"), *arguments, variables=_environment())
            costs.setdefault(stage, {})[size] = found["cpu"], found["peak GiB"]
        shutil.rmtree(root)
    return costs


def stages(sizes: list[int], folder: Path) -> Costs:
    costs: Costs = {}
    for size in sizes:
        root = folder / f"stages-{size}"
        _recorded_project(root, size)
        for what in ("definitions", "sync, everything to report", "sync, nothing to report"):
            found = result_of(__file__, "--one", f"stages:{what}:{root}", cwd=root, variables=_environment())
            costs.setdefault(what, {})[size] = found["cpu"], found["peak GiB"]
    return costs


def _recorded_project(root: Path, size: int) -> None:
    """The small pipeline of the tests with `size` variants and four more
    stages, all recorded: one variant is run, the others are copies of it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import yaml
    from builders import small_pipeline

    values: dict[str, Any] = {"minlen": 1, "testseed": 7, "variants": {"v0": {"r": 8}}}
    small_pipeline.make_project(root, values)
    inside: dict[str, Any] = {"cwd": root, "check": True, "env": _environment()}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], **inside)
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    recorded, report = json.dumps(lock["stages"]["adapter@v0"]), (root / "data/reports/adapter/v0.json").read_text()
    for number in range(1, size):
        shutil.copytree(root / "data/adapter/v0", root / f"data/adapter/v{number}")
        (root / f"data/reports/adapter/v{number}.json").write_text(report)
        lock["stages"][f"adapter@v{number}"] = json.loads(recorded.replace("v0", f"v{number}"))
    values["variants"] = {f"v{number}": {"r": 8} for number in range(size)}
    (root / "params.yaml").write_text(json.dumps(values))
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    subprocess.run(
        [sys.executable, "-m", "dvc", "commit", "-f", "-q", "cmp"], **inside
    )  # it reads the outputs of all variants
    (root / ".dagster").mkdir()
    (root / ".dagster/dagster.yaml").write_text("telemetry: {enabled: false}\n")


def _of_stages(what: str, root: Path) -> Callable[[], object]:
    import dagster as dg
    from builders import small_pipeline

    from dagster_project.orchestration.dagster.assets import build_definitions
    from dagster_project.orchestration.dagster.sync import sync

    if what == "definitions":
        return lambda: build_definitions(root, small_pipeline.PIPELINE)
    instance = dg.DagsterInstance.from_config(str(root / ".dagster"))
    return lambda: sync(root, instance, small_pipeline.PIPELINE)


def versions(sizes: list[int], folder: Path) -> Costs:
    costs: Costs = {}
    for size in sizes:
        root = folder / f"versions-{size}"
        everywhere, _ = audit.make(root, size, 1_000, 10)
        for what in ("index of impact", "impact --record", "impact --containing"):
            question = ("--containing", "question 500") if what.endswith("containing") else ("--record", everywhere)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            found = audit.ask(root, *question)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert len(found["models"]) == 2 * size, (size, len(found["models"]))
            costs.setdefault(what, {})[size] = (
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                math.nan,
            )
        shutil.rmtree(root)
    return costs


def training(sizes: list[int], folder: Path) -> Costs:
    found = {size: result_of(__file__, "--one", f"training:{size}", variables=_environment()) for size in sizes}
    return {"training, CPU s a row": {size: tuple(one.values()) for size, one in found.items()}}


def _train(tokens: int) -> float:
    """CPU seconds of a row, without model loading and the first step."""
    import random
    from dataclasses import replace as with_

    from datasets import Dataset
    from training import LORA
    from transformers import AutoTokenizer, TrainerCallback

    from dagster_project.core.params import Compute
    from dagster_project.training.methods.build import build
    from dagster_project.training.methods.hardware import prepare
    from dagster_project.training.trainers.harness.params import SftParams
    from dagster_project.training.trainers.sft.sft import train

    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.process_time())

    compute = Compute(seed=1, threads=int(os.environ["OMP_NUM_THREADS"]))
    device, dtype = prepare(compute)
    draw = random.Random(0)
    drawn = [[draw.randrange(1_000, 40_000) for _ in range(tokens)] for _ in range(STEPS + 1)]
    rows = [{"input_ids": ids, "labels": ids, "weights": [1.0] * tokens, "lengths": [tokens]} for ids in drawn]
    base = ROOT / "data/base_model"
    tunable = build("lora", LORA, base, device, dtype, "benchmark")
    recipe = SftParams(num_train_epochs=1, gradient_checkpointing=False)
    train(
        with_(tunable, callbacks=[*tunable.callbacks, Stamp()]),
        AutoTokenizer.from_pretrained(base),
        Dataset.from_list(rows),
        None,
        recipe,
        compute,
    )
    assert len(stamps) == STEPS + 1
    return (stamps[-1] - stamps[0]) / STEPS


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "benchmarks")))
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PATH": path,
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "GX_ANALYTICS_ENABLED": "false",
    }


def one(what: str) -> dict[str, float]:
    """One measurement in this process."""
    kind, _, rest = what.partition(":")
    if kind == "training":
        cpu = _train(int(rest))
    else:
        name, _, root = rest.partition(":")
        run = _of_stages(name, Path(root))
        start = time.process_time()
        run()
        cpu = time.process_time() - start
    return {"cpu": cpu, "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def table(costs: Costs, unit: str) -> str:
    """A row for each thing measured: cost by size, and the exponents of CPU time and of memory."""
    sizes = sorted({size for by_size in costs.values() for size in by_size})
    lines = [
        f"| CPU s (peak GiB), {unit}: | {' | '.join(f'{size:,}' for size in sizes)} | exponent of CPU | of memory |",
        f"| --- |{' ---: |' * (len(sizes) + 2)}",
    ]
    for name, by_size in costs.items():
        cells = [
            f"{cpu:.2f}" + ("" if math.isnan(peak) else f" ({peak:.2f})") for _, (cpu, peak) in sorted(by_size.items())
        ]
        fitted = [
            exponent({size: pair[which] for size, pair in by_size.items()}) for which in (0, 1)
        ]  # a comparison with NaN is false
        lines.append(
            f"| {name} | {' | '.join(cells)} |"
            f" {' | '.join('' if value is None else f'{value:.2f}' for value in fitted)} |"
        )
    return "\n".join(lines) + "\n"


PARTS: dict[str, tuple[Callable[[list[int], Path], Costs], list[int], str]] = {
    "data": (data, ROWS, "rows"),
    "stages": (stages, STAGES, "variants"),
    "versions": (versions, VERSIONS, "versions"),
    "training": (training, TOKENS, "tokens a row"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure (default: %(default)s)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        help="sizes of the parts, the smallest first (default: see the constants of this file)",
    )
    parser.add_argument("--out", type=Path, help="put each table between its markers in this Markdown file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    print(f"{machine()}, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    for name in options.only.split(","):
        measure, sizes, unit = PARTS[name]
        with tempfile.TemporaryDirectory() as folder:
            found = table(measure(sorted(options.sizes or sizes), Path(folder)), unit)
        show(options.out, f"growth of {name}", found)


if __name__ == "__main__":
    main()
