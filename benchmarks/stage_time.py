"""Where the seconds of a run go, by stage. usage: python benchmarks/stage_time.py PROFILE [--out FILE]

PROFILE is what py-spy (`pip install py-spy`) writes while the pipeline runs, in a project in which every stage runs:

    py-spy record --subprocesses --nonblocking --idle --threads --rate 20 --format raw --output PROFILE -- dvc repro

Each sample of the main thread of `python -m dagster_project run STAGE` belongs to one column, by its stack:

    start      interpreter, imports of libraries wherever they happen, the command line
    reading    inputs of the stage: hashing them for the guard, records, weights, tokenizer
    writing    outputs, checkpoints, hashing them, pages
    computing  everything else

DVC's own seconds are the samples of its process in which it does not wait for
another process. Seconds are samples divided by their rate. They are fewer than
those of the run: py-spy cannot sample a process before Python has started in it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tables import machine, show  # noqa: E402

from dagster_project.pipeline import PEDIGREE  # noqa: E402

RATE = 20
"""Samples a second."""
COLUMNS = ("start", "reading", "computing", "writing")
STAGE = re.compile(r"dagster_project run (\S+?)\"?$")
FRAME = re.compile(r"^(.*) \((.*?)(?::\d+)?\)$")
WRITING = re.compile(
    r"save_file|save_pretrained|save|write_\w+|write|_publish|_pass_gate|_draw|draw|copy\w*|_save_checkpoint|_fastcopy\w*|to_csv|_commit"
)
READING = re.compile(
    r"load_base|load|from_pretrained|read_\w+|read|_fetch|_verified_inputs|verified_fingerprint|fingerprint|sha256_of_files?|\w*GGUFReader\S*|md5_of\w*|memmap\S*|identity"
)
WAITING = "subprocess.py"
"""The module that waits for other processes. Where DVC waits for its own threads, they hash and copy outputs."""
IMPORTING = "importlib._bootstrap"
STAGES, COMPUTING = "dagster_project/stages/", ("torch/", "transformers/")


Frame = tuple[str, str]
"""Function and file."""


def frames_of(stack: str) -> tuple[str, str, list[Frame]]:
    """The innermost process, the thread, and the frames of a sample, outermost first."""
    processes, threads, frames = [], [""], []
    for part in stack.split(";"):
        if part.startswith("process "):
            processes.append(part)
            frames.clear()
        elif part.startswith("thread "):
            threads.append(part)
        elif match := FRAME.match(part):
            frames.append((match[1], match[2]))
    return processes[-1], threads[-1], frames


def column(frames: list[Frame]) -> str:
    """The column of a sample of a stage."""
    if any(IMPORTING in file for _, file in frames):
        return "start"
    inside = next(
        (number for number, (name, file) in enumerate(frames) if name == "run" and file.startswith(STAGES)), None
    )
    names = [
        name
        for name, file in frames[inside or 0 :]
        if not file.startswith(("dagster_project/__main__", "dagster_project/cli/", "<frozen"))
    ]
    if inside is None and ("sha256_of" in names and "_verified_inputs" not in names):
        return "writing"  # the guard's hash of the output
    for name in names:
        short = name.rpartition(".")[2]
        if WRITING.fullmatch(short):
            return "writing"
        if READING.fullmatch(short) or READING.fullmatch(name):
            return "reading"
    return (
        "computing" if inside is not None or any(part in file for _, file in frames for part in COMPUTING) else "start"
    )


def samples(profile: Path) -> Iterator[tuple[str, str, int]]:
    """Stage or "dvc", column, and number of samples, of main threads."""
    for line in profile.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        process, thread, frames = frames_of(stack)
        if "MainThread" not in thread:
            continue
        if match := STAGE.search(process):
            yield match[1], column(frames), int(count)
        elif "dvc" in process and "repro" in process and not any(file.endswith(WAITING) for _, file in frames):
            yield "dvc", "dvc", int(count)


def table(profile: Path) -> str:
    seconds: dict[str, Counter[str]] = {}
    for stage, where, count in samples(profile):
        seconds.setdefault(stage, Counter())[where] += count
    dvc = seconds.pop("dvc", Counter())["dvc"] / RATE
    order = [*PEDIGREE.stages]
    lines = ["| stage | " + " | ".join(COLUMNS) + " | all |", "| --- |" + " ---: |" * (len(COLUMNS) + 1)]
    total: Counter[str] = Counter()
    for stage, of in sorted(seconds.items(), key=lambda one: order.index(one[0].partition("@")[0])):
        total.update(of)
        lines.append(
            f"| `{stage}` | "
            + " | ".join(f"{of[name] / RATE:.1f}" for name in COLUMNS)
            + f" | {sum(of.values()) / RATE:.1f} |"
        )
    lines.append(
        "| all stages | "
        + " | ".join(f"{total[name] / RATE:.1f}" for name in COLUMNS)
        + f" | {sum(total.values()) / RATE:.1f} |"
    )
    return f"Seconds of wall time by stage, {machine()}. DVC itself: {dvc:.1f} s.\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "time.md", help="default: %(default)s")
    options = parser.parse_args()
    show(options.out, "stages", table(options.profile))
    return 0


if __name__ == "__main__":
    sys.exit(main())
