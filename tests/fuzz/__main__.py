"""`make fuzz`: plays cases of every surface and prints a table. Exit code 1 if anything was found.

Examples:
    make fuzz                                    all surfaces, the full numbers
    make fuzz SURFACE=data_files SEED=3          one surface, other cases
    make fuzz SURFACE=data_files SEED=3 CASE=17  one case, with its files kept in build/fuzz
    make fuzz REPLAY=tests/fuzz/corpus           cases that were kept
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fuzz.engine import ROOT, Tally, play_all, tally
from fuzz.surface import MODULES, drawn, surface, write_files

CORPUS = Path(__file__).parent / "corpus"
BUILD = ROOT / "build" / "fuzz"


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("surfaces", nargs="*", choices=[*MODULES, []])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="cases of each surface (default: the full number)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="play this case alone, and keep its files")
    parser.add_argument("--replay", type=Path, help="a kept case, or a folder with cases")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    if options.replay:
        tallies = [replayed(name, options.replay) for name in MODULES]
    else:
        tallies = [_play(name, options) for name in options.surfaces or MODULES]
    print(table([one for one in tallies if one.played]))
    return int(any(one.findings for one in tallies))


def _play(name: str, options: argparse.Namespace) -> Tally:
    found = surface(name)
    if options.case is not None:
        case = drawn(found, options.seed, options.case)
        folder = BUILD / f"{name}-{options.seed}-{options.case}"
        folder.mkdir(parents=True, exist_ok=True)
        write_files(case, folder)
        (folder / "case.json").write_text(as_json(name, case))
        print(f"{name}: case {options.case} is in {folder.relative_to(ROOT)}")
    numbers = (
        range(options.first, options.first + (options.cases or found.cases)) if options.case is None else [options.case]
    )
    played = tally(name, play_all(name, options.seed, numbers, tick=sys.stderr))
    for place, cases in played.findings.items():
        number, message = cases[0]
        print(
            f"\n{name}: {place}: {len(cases)} of {played.played} cases, e.g.\n  make fuzz SURFACE={name}"
            f" SEED={options.seed} CASE={number}"
        )
        print(f"  cases: {', '.join(str(number) for number, _ in cases[:20])}\n{message.rstrip()}", flush=True)
    return played


def kept(name: str, place: Path) -> dict[Path, dict]:
    """The cases of a surface in a folder (or the one in a file)."""
    files = [place] if place.is_file() else sorted(place.rglob("*.json"))
    cases = {file: json.loads(file.read_bytes()) for file in files}
    return {file: case["case"] for file, case in cases.items() if case["surface"] == name}


def replayed(name: str, place: Path) -> Tally:
    cases = kept(name, place)
    played = tally(name, play_all(name, 0, range(len(cases)), dict(enumerate(cases.values()))))
    for found in played.findings.values():
        for number, message in found:
            print(f"\n{[*cases][number]}\n{message.rstrip()}")
    return played


def as_json(name: str, case: dict) -> str:
    return json.dumps({"surface": name, "case": case}, indent=1) + "\n"


def table(tallies: list[Tally]) -> str:
    lines = [f"\n{'surface':<15}{'cases':>8}{'findings':>10}{'CPU s':>8}{'slowest':>16}  outcomes"]
    for one in tallies:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(one.outcomes.items()))
        slowest = f"{one.slowest[0]:.1f} s ({one.slowest[1]})"
        lines.append(
            f"{one.surface:<15}{one.played:>8}{one.failed:>10}{one.cpu_seconds:>8.0f}{slowest:>16}  {outcomes}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
