"""A small made-up data set with answers that can be verified: one value of a parcel's note, e.g. where it goes. usage:
python benchmarks/parcel_notes.py FOLDER [--seed N]

Writes few.jsonl, train.jsonl and validation.jsonl in the layout `messages`. Each note names two cities, two days, a
number of boxes and a weight, in an order and with words that vary, so that an answer has to be chosen between two
values of a kind; it is a word or number of the note. No note is in two files. The same seed gives the same bytes.
License: that of the project, Apache-2.0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

SIZES = {"few": 32, "train": 256, "validation": 240}
"""File -> its records: for supervised training of the model to start from, for rewards, and held out."""
SYSTEM = "Answer with one word or number of the note."
CITIES = (
    "Oslo",
    "Lima",
    "Rome",
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Cairo",
    "Tokyo",
    "Delhi",
    "Dublin",
    "Vienna",
    "Boston",
    "Denver",
    "Miami",
    "Seattle",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
ROUTES = (
    "from {origin} to {destination}", "to {destination} from {origin}", "{destination} receives it from {origin}",
    "leaves {origin} for {destination}", "bound for {destination}, packed in {origin}",
    "{origin} ships it to {destination}", "ordered by {destination}, supplied by {origin}",
    "{destination} waits for it, {origin} has it ready", "picked up in {origin}, dropped off in {destination}",
    "{destination} gets it, {origin} sends it",
)  # fmt: skip
TIMES = (
    "sent {sent}, due {due}",
    "due {due}, sent {sent}",
    "must arrive {due}, leaves {sent}",
    "wanted by {due}, on the road since {sent}",
    "pickup {sent}, delivery {due}",
    "delivery {due}, pickup {sent}",
    "expected {due} after it left {sent}",
    "{sent} to {due}",
)
LOADS = (
    "{boxes} boxes, {kilograms} kg",
    "{kilograms} kg in {boxes} boxes",
    "{boxes} boxes weigh {kilograms} kg",
    "weight {kilograms}, boxes {boxes}",
    "{boxes} boxes of {kilograms} kg together",
    "{kilograms} kg; boxes: {boxes}",
)
FIELDS = ("origin", "destination", "sent", "due", "boxes", "kilograms")


def note(dice: random.Random) -> tuple[str, dict[str, str]]:
    """A note, and the value of each field."""
    origin, destination = dice.sample(CITIES, 2)
    sent, due = sorted(dice.sample(range(len(DAYS)), 2))
    values = {
        "origin": origin, "destination": destination, "sent": DAYS[sent], "due": DAYS[due],
        "boxes": str(dice.randint(2, 9)), "kilograms": str(dice.randint(10, 99)),
    }  # fmt: skip
    parts = [dice.choice(phrases).format(**values) for phrases in (ROUTES, TIMES, LOADS)]
    dice.shuffle(parts)
    return "; ".join(parts), values


def records(seed: int) -> dict[str, list[dict[str, Any]]]:
    """File -> its rows, each with a note of its own."""
    dice, known = random.Random(f"parcel notes {seed}"), set[str]()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIZES}
    for name, size in SIZES.items():
        while len(found[name]) < size:
            text, values = note(dice)
            if text in known:
                continue
            known.add(text)
            field = FIELDS[len(found[name]) % len(FIELDS)]
            messages = [("system", SYSTEM), ("user", f"{text}\n{field}?"), ("assistant", values[field])]
            found[name].append(
                {"messages": [{"role": role, "content": content} for role, content in messages], "category": field}
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in records(options.seed).items():
        (options.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
