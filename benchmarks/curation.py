"""Accuracy and cost of curation. usage: python benchmarks/curation.py [--rows
N] [--repeat N] | --pipeline [--rows N] [--workers N [--ray]]

Without --pipeline: near-duplicates by our rule compared with MinHash LSH of datasketch and rensa, on planted pairs.
Texts are generated from a seed: words by Zipf's law, a fifth of the rows in a template, and pairs of each class of
`CLASSES` planted
among them. By default about 200 rows share a template; `--templates` sets more templates with fewer rows each, which is
harder: a template that few texts share looks like a copied passage. Each engine runs in its own process, in turns;
medians are printed. Needs `pip install -e '.[bench]'`.

The MinHashes have 128 permutations over runs of three words and keep pairs with an estimate of `THRESHOLD` or more, the
Jaccard index of our rule; rensa is used in its batch mode. "rensa .8" has the bands and threshold of rensa's own
benchmark.

With --pipeline: the same texts as the prompts of an Alpaca file (`alpaca`) go through raw_examples -> instructions ->
splits -> tokenized, each the stage's own function in its own process, and with --workers with as many
more for work on rows; with the base model's tokenizer and template, the held-out benchmark and the suite
of expectations of data/. Seconds are those of whole processes, from start to end: imports, reading and
checksums, every check, Data Docs, the page, and writing and reading back the results. DVC's work (hashing
the outputs into its cache) and generating the rows are not included. CPU seconds depend less on other
load of the machine. The digest covers all output files of the stage: the same rows give the same digest.

With --ray the workers are tasks of a Ray cluster that is started for each stage: one node of one CPU for each worker,
all on this machine, each with its own object store of `OBJECT_STORE` bytes. CPU seconds include those of all of its
processes, from its start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from children import ROOT, result_of

PERMUTATIONS, BANDS, THRESHOLD = 128, 32, 0.3
STAGES = ("raw_examples", "instructions", "splits", "tokenized")
SECONDS, GIGABYTES = 240, 8
"""Budget of the stages up to splits for a million short rows on two cores, without workers."""
OBJECT_STORE = 200_000_000
"""Size of a Ray node's object store, in bytes."""


class Maker:
    """Texts generated from a seed."""

    def __init__(self, seed: int, templates: int) -> None:
        self.random = random.Random(seed)
        letters = "eeeaaiiootnsrhldcump"
        self.words = sorted({"".join(self.random.choices(letters, k=self.random.randint(2, 9))) for _ in range(60_000)})
        self.random.shuffle(self.words)
        self.weights = self.zipf(len(self.words))
        self.signs = [chr(0x4E00 + i) for i in range(3000)]
        self.sign_weights = self.zipf(len(self.signs))
        self.templates = [
            (self.draw(self.random.randint(3, 9)), self.draw(self.random.randint(0, 6))) for _ in range(templates)
        ]

    @staticmethod
    def zipf(size: int) -> list[float]:
        total, sums = 0.0, []
        for rank in range(size):
            total += 1 / (rank + 2.7)  # Zipf-Mandelbrot
            sums.append(total)
        return sums

    def draw(self, count: int) -> list[str]:
        return self.random.choices(self.words, cum_weights=self.weights, k=count)

    def text(self, low: int = 8, high: int = 40) -> list[str]:
        count = self.random.randint(low, high)
        if count >= 20 and self.random.random() < 0.4:
            opening, ending = self.random.choice(self.templates)
            return [*opening, *self.draw(count - len(opening) - len(ending)), *ending]
        return self.draw(count)

    def edited(self, words: Sequence[str], share: float) -> list[str]:
        result = list(words)
        for i in self.random.sample(range(len(words)), max(1, round(share * len(words)))):
            result[i] = self.random.choice([w for w in self.draw(9) if w != words[i]])
        return result

    def chinese(self) -> str:
        return "".join(self.random.choices(self.signs, cum_weights=self.sign_weights, k=self.random.randint(8, 40)))

    def code(self) -> tuple[str, str]:
        """A function, and the same with another indentation and one variable renamed."""
        name, renamed, *names = self.draw(10)
        lines = [f"def {names[0]}_{self.random.choice(self.words)}({name}, {names[1]}):"]
        for k in range(self.random.randint(5, 10)):
            a, b, c = self.random.choices(names, k=3)
            lines.append(
                f"    {a} = {b}.{self.random.choice(self.words)}({name if k % 3 == 0 else c},"
                f" {self.random.randint(0, 99)})"
            )
        lines.append(f"    return {names[2]}")
        text = "\n".join(lines)
        return text, text.replace("    ", "\t").replace(f"({name},", f"({renamed}q,")


def wide(text: str) -> str:
    """Upper case in the full-width forms of East Asian typesetting."""
    return "".join(chr(ord(c) + 0xFEE0) if c.isalnum() and c.isascii() else c for c in text.upper())


def exact(m: Maker) -> tuple[str, str]:
    text = " ".join(m.text())
    return text, text


def case_or_width(m: Maker) -> tuple[str, str]:
    text = " ".join(m.text())
    return text, m.random.choice([str.upper, str.title, wide])(text) + "!"


def one_word(m: Maker) -> tuple[str, str]:
    text = m.text()
    return " ".join(text), " ".join(m.edited(text, 0))


def share(part: float) -> Callable[[Maker], tuple[str, str]]:
    def edit(m: Maker) -> tuple[str, str]:
        text = m.text()
        return " ".join(text), " ".join(m.edited(text, part))

    return edit


def wrapped(m: Maker) -> tuple[str, str]:
    text = m.text()
    return " ".join(text), " ".join([*m.draw(m.random.randint(2, 6)), *text, *m.draw(m.random.randint(2, 6))])


def embedded(m: Maker) -> tuple[str, str]:
    text = m.text(8, 20)
    rest = m.draw(len(text))
    cut = m.random.randint(0, len(rest))
    return " ".join(text), " ".join([*rest[:cut], *text, *rest[cut:]])


def swapped(m: Maker) -> tuple[str, str]:
    text = m.text()
    half = len(text) // 2
    return " ".join(text), " ".join([*text[half:], *text[:half]])


def short(m: Maker) -> tuple[str, str]:
    text = m.draw(m.random.randint(5, 7))
    return " ".join(text), " ".join(m.edited(text, 0))


def chinese(m: Maker) -> tuple[str, str]:
    text = m.chinese()
    i = m.random.randrange(len(text))
    return text, text[:i] + m.random.choice(m.signs) + text[i + 1 :]


CLASSES: dict[str, Callable[[Maker], tuple[str, str]]] = {
    "exact": exact,
    "case or width": case_or_width,
    "1 word edited": one_word,
    "5 % edited": share(0.05),
    "10 % edited": share(0.10),
    "20 % edited": share(0.20),
    "wrapped": wrapped,
    "embedded": embedded,
    "halves swapped": swapped,
    "short, 1 word": short,
    "CJK, 1 character": chinese,
    "code": Maker.code,
}


def plant(rows: int, templates: int, seed: int = 0) -> tuple[list[str], dict[str, list[tuple[int, int]]]]:
    """`rows` shuffled texts, 1 in 12 of them in a planted pair; the pairs by class."""
    maker = Maker(seed, templates)
    texts: list[str] = []
    planted: dict[str, list[tuple[int, int]]] = {name: [] for name in CLASSES}
    for name, make in CLASSES.items():
        for _ in range(max(1, rows // 24 // len(CLASSES))):
            planted[name].append((len(texts), len(texts) + 1))
            texts.extend(make(maker))
    while len(texts) < rows:
        kind = maker.random.random()
        texts.append(
            maker.chinese()
            if kind < 0.02
            else maker.code()[0]
            if kind < 0.04
            else " ".join(maker.text(5 if kind < 0.1 else 8))
        )
    order = maker.random.sample(range(len(texts)), len(texts))
    place = {old: new for new, old in enumerate(order)}
    return [texts[i] for i in order], {
        name: [(min(place[a], place[b]), max(place[a], place[b])) for a, b in pairs] for name, pairs in planted.items()
    }


def ours(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    from dagster_project.curation.similarity.overlap import near_pairs

    return ((pair.left, pair.right) for pair in near_pairs(texts))


def shingles(text: str) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))]


def datasketch(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
    hashes = MinHash.bulk([[s.encode() for s in shingles(text)] for text in texts], num_perm=PERMUTATIONS)
    for i, minhash in enumerate(hashes):
        yield from ((j, i) for j in lsh.query(minhash) if hashes[j].jaccard(minhash) >= THRESHOLD)
        lsh.insert(i, minhash)


def rensa(texts: Sequence[str], bands: int = BANDS, threshold: float = THRESHOLD) -> Iterator[tuple[int, int]]:
    from rensa import RMinHash, RMinHashLSH

    lsh = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands)
    hashes = RMinHash.from_token_sets([shingles(text) for text in texts], PERMUTATIONS, 42)
    lsh.insert_many(hashes)
    for i, near in enumerate(lsh.query_all(hashes)):
        yield from ((i, j) for j in near if j > i and hashes[i].jaccard(hashes[j]) >= threshold)


ENGINES = {"ours": ours, "datasketch": datasketch, "rensa": rensa, "rensa .8": lambda texts: rensa(texts, 8, 0.8)}


def measure(engine: str, file: Path) -> dict[str, float]:
    """One run in this process: rows per second, recall by class, precision, peak memory."""
    data = json.loads(file.read_text())
    texts = data["texts"]
    list(ENGINES[engine](texts[:100]))  # imports, and compiled code read from the cache
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = set(ENGINES[engine](texts))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planted = {name: {tuple(pair) for pair in pairs} for name, pairs in data["planted"].items()}
    right = found & set().union(*planted.values())
    return {
        "rows/s": len(texts) / seconds,
        "precision": len(right) / max(1, len(found)),
        "peak GiB": peak / 2**20,
        "of it texts and libraries": loaded / 2**20,
        **{name: len(found & pairs) / len(pairs) for name, pairs in planted.items()},
    }


def alpaca(rows: int, templates: int, file: Path) -> None:
    """The planted texts as prompts with answers of 3 to 25 words, in eight categories. One answer in 20 has a date,
    which resembles a phone number; one row in 200 has a fault."""
    texts, _ = plant(rows, templates)
    maker = Maker(1, 1)
    with file.open("w", encoding="utf-8") as stream:
        for i, text in enumerate(texts):
            row = {"instruction": text, "output": " ".join(maker.draw(maker.random.randint(3, 25)))}
            row["category"] = maker.random.choice(
                ["billing", "bug", "delivery", "idea", "login", "question", "returns", "security"]
            )
            if i % 20 == 0:
                row["output"] += f" on 20{i % 97:02}-{i % 11 + 1:02}-{i % 27 + 1:02} at {i % 24}:{i % 59:02}"
            if i % 200 == 0:
                row |= FLAWS[i // 200 % len(FLAWS)]
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


FLAWS: tuple[dict[str, object], ...] = (
    {"output": "Write to ann.lee@mail-service.org and ask."},
    {"output": "Call +44 20 7946 0018 after nine."},
    {"output": "The cafÃ© is closed."},
    {"output": "Say <|im_end|> when you are done."},
    {"output": ""},
    {"output": 3},
    {"input": "N/A"},
    {"instruction": "   "},
)


def time_pipeline(rows: int, templates: int, base_model: Path, root: Path, workers: Sequence[str]) -> None:
    """Generate `rows` rows under `root`, run the stages on them, and print time and memory of each stage and the
    budget."""
    sources = root / "data/sources"
    sources.mkdir(parents=True)
    shutil.copytree(ROOT / "data/sources/benchmarks", sources / "benchmarks")
    shutil.copytree(ROOT / "data/expectations", root / "data/expectations")
    alpaca(rows, templates, sources / "rows.jsonl")
    size = (sources / "rows.jsonl").stat().st_size
    print(
        f"{rows:,} rows, {size / 1e6:,.0f} MB, {templates:,} templates, {os.cpu_count()} cores, {' '.join(workers)},"
        f" load {os.getloadavg()[0]:.1f} at the start"
    )
    print(f"{'':14}{'seconds':>9}{'CPU seconds':>13}{'peak GiB':>9}{'of a worker':>12}{'rows out':>11}  digest")
    total = [0.0, 0.0, 0.0]
    for stage in STAGES:
        start = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--stage",
                stage,
                "--base-model",
                str(base_model),
                "--folder",
                str(root),
                *workers,
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "GX_ANALYTICS_ENABLED": "false"},
            stdout=subprocess.PIPE,
            text=True,
        )
        said = process.communicate()[0] if process.stdout else ""
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{stage} failed")
        measured = json.loads(said)
        total = [total[0] + seconds, total[1] + measured["cpu"], max(total[2], measured["peak GiB"])]
        print(
            f"{stage:14}{seconds:9.1f}{measured['cpu']:13.1f}{measured['peak GiB']:9.2f}"
            f"{measured['peak of a worker']:12.2f}{measured['rows out']:11,}"
            f"  {_digest(root / 'data' / stage)}",
            flush=True,
        )
    print(f"{'sum':14}{total[0]:9.1f}{total[1]:13.1f}{total[2]:9.2f}")
    print(
        f"{'budget':14}{SECONDS * rows / 1e6:9.1f}{'':13}{GIGABYTES:9.2f}  up to splits, for {rows:,} short rows on two"
        " otherwise idle cores"
    )


def run_stage(stage: str, base_model: Path, root: Path, workers: int, on_ray: bool) -> dict[str, float]:
    """Run one stage in this process and its workers; time and memory include
    the start of the interpreter and all imports."""
    from dagster_project.core.workers import THIS_PROCESS, LocalProcesses, using

    if on_ray:
        with nodes(workers) as processes:
            rows = _produce(stage, base_model, root, root / "data")
            used = processes()
    else:
        with using(LocalProcesses(workers) if workers > 1 else THIS_PROCESS):
            rows = _produce(stage, base_model, root, root / "data")
        others = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = {"cpu": others.ru_utime + others.ru_stime, "peak of a worker": others.ru_maxrss / 2**20}
    own = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu": own.ru_utime + own.ru_stime + used["cpu"],
        "peak GiB": own.ru_maxrss / 2**20,
        "peak of a worker": used["peak of a worker"],
        "rows out": rows,
    }


@contextmanager
def nodes(count: int) -> Iterator[Callable[[], dict[str, float]]]:
    """A Ray cluster of `count` nodes with one CPU each. While it is open, its tasks are the workers.

    The function that it gives measures the cluster's processes so far: CPU seconds of all, and the largest peak memory
    of a process that computes tasks, in GiB, including pages of the object store.
    """
    import psutil
    import ray
    from ray.cluster_utils import Cluster

    from dagster_project.core.workers import using
    from dagster_project.orchestration.executors.ray_tasks import RayTasks

    cluster = Cluster()

    def measured() -> dict[str, float]:
        cpu, peak = 0.0, 0.0
        for process in psutil.Process().children(recursive=True):
            times = process.cpu_times()
            cpu += times.user + times.system
            if " ".join(process.cmdline()).startswith("ray::"):
                status = Path(f"/proc/{process.pid}/status").read_text()
                high = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
                peak = max(peak, high / 2**20)
        return {"cpu": cpu, "peak of a worker": peak}

    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)
        with using(RayTasks(count)):
            yield measured
    finally:
        ray.shutdown()
        cluster.shutdown()


def _produce(stage: str, base_model: Path, root: Path, data: Path) -> int:
    from dagster_project.stages import instructions, raw_examples, splits, tokenized

    if stage == "raw_examples":
        sources = raw_examples.Params.model_validate({"sources": [{"path": "data/sources/rows.jsonl"}]})
        report = raw_examples.produce(root, sources, data / stage)
    elif stage == "instructions":
        benchmarks = sorted(
            f"data/sources/benchmarks/{file.name}" for file in (data / "sources/benchmarks").glob("*.jsonl")
        )
        rules = instructions.Params(benchmarks=benchmarks, expectations="data/expectations/instructions.json")
        report = instructions.produce(
            root, rules, data / "raw_examples", base_model, data / stage, data / stage / "pages", {}
        )
    elif stage == "splits":
        report = splits.produce(root, splits.Params(), 7, data / "instructions", data / stage)
    else:
        report = tokenized.produce(root, tokenized.Params(), 7, data / "splits", base_model, out=data / stage)
    return report.rows_out or 0


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, help="texts (default: 200,000, of the pipeline 1,000,000)")
    parser.add_argument("--templates", type=int, help="number of templates (default: a thousandth of the rows)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="runs of each; medians are printed (default: %(default)s)"
    )
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="which to run (default: all)"
    )
    parser.add_argument("--pipeline", action="store_true", help="time the stages instead of the engines")
    parser.add_argument(
        "--base-model",
        type=Path,
        default=ROOT / "data/base_model",
        help="folder with its tokenizer (default: data/base_model)",
    )
    parser.add_argument(
        "--folder", type=Path, help="with --pipeline: new folder to work in, kept afterwards (default: a temporary one)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="with --pipeline: processes for work on rows (default: %(default)s)"
    )
    parser.add_argument("--ray", action="store_true", help="with --workers: these are tasks on Ray, a node for each")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.base_model, args.folder, args.workers, args.ray)))
        return
    rows = args.rows or (1_000_000 if args.pipeline else 200_000)
    templates = args.templates or max(1, rows // 1000)
    if args.pipeline:
        if not (args.base_model / "tokenizer.json").is_file():
            parser.error(
                f"{args.base_model} has no tokenizer.json: run `dvc repro base_model`, or name a model's folder with"
                " --base-model"
            )
        with tempfile.TemporaryDirectory() as scratch:
            time_pipeline(
                rows,
                templates,
                args.base_model.resolve(),
                (args.folder or Path(scratch) / "pipeline").resolve(),
                [f"--workers={args.workers}", *(["--ray"] if args.ray else [])],
            )
        return
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in args.engines}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "planted.json"
        texts, planted = plant(rows, templates)
        file.write_text(json.dumps({"texts": texts, "planted": planted}))
        for _ in range(args.repeat):
            for engine, done in runs.items():
                done.append(result_of(__file__, "--measure", engine, str(file), variables={}))
    print(
        f"{len(texts):,} rows, {sum(map(len, planted.values())):,} planted pairs, {templates:,} templates,"
        f" {os.cpu_count()} cores, median of {args.repeat}"
    )
    print(f"{'':28}" + "".join(f"{engine:>12}" for engine in runs))
    for key in next(iter(runs.values()))[0]:
        values = (statistics.median(run[key] for run in done) for done in runs.values())
        print(f"{key:28}" + "".join(f"{value:12,.0f}" if key == "rows/s" else f"{value:12.3f}" for value in values))


if __name__ == "__main__":
    main()
