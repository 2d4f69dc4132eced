"""Time and agreement of a search among many gradients. usage: python
benchmarks/gradient_search.py [--records N] [--width N] [--folder FOLDER]

Makes a store of random gradients, each with a part in common with many others, and asks for planted
ones: questions that are records with as much noise as `NOISE` says. Prints the seconds of each
question, from reading the store to the scores of all records, without words and without the gradient of
the question; with the kernel's cache of files as it is, and emptied (as root). For `--exact` questions
the scores of all records are computed from all gradients, which reads the whole store: the list of ten,
the distance of the first, and the standard error that the search reports are compared with these.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from children import result_of

if TYPE_CHECKING:
    import numpy as np
    import torch

SHARED, NOISE = 20, 3.0
"""Directions that records share, and the length of the noise of a question in lengths of the record."""
TOP = 10


class Maker:
    """Gradients by number, always the same."""

    def __init__(self, width: int) -> None:
        import numpy as np

        dice = np.random.default_rng(0)
        self.own = dice.standard_normal((32, width), np.float32)
        self.shared = dice.standard_normal((SHARED, width), np.float32)

    def gradients(self, numbers: Sequence[int]) -> torch.Tensor:
        import numpy as np
        import torch

        parts = np.random.default_rng(numbers[0]).standard_normal((len(numbers), SHARED), np.float32)
        own = np.roll(self.own[: len(numbers)], 7 * numbers[0], axis=1)
        return torch.from_numpy(own + 0.3 * parts @ self.shared)

    def question(self, record: int, each: int) -> np.ndarray:
        import numpy as np

        first = record // each * each
        row = self.gradients(range(first, first + each))[record - first].numpy()
        noise = np.random.default_rng(record).standard_normal(len(row), np.float32)
        asked: np.ndarray = row + NOISE * noise
        return asked


def measure(folder: Path, records: int, width: int, exact: int, questions: int, empties: bool) -> dict[str, object]:
    """Answers and seconds of this process."""
    import numpy as np

    from dagster_project.lineage.attribution import store
    from dagster_project.lineage.attribution.ranking import robust_z
    from dagster_project.lineage.attribution.search import Search, search
    from dagster_project.lineage.attribution.store import GradientStore

    one = GradientStore.at(folder, {"records": records, "width": width}, records)
    maker = Maker(width)
    words = np.zeros(records)
    if not one.is_begun():
        one.build(maker.gradients, f"{records:,} random gradients")
    seconds, first, lists = [], 0, []
    planted = [
        int(i) for i in np.random.default_rng(1).choice(records // store.SHARD * store.SHARD, questions, replace=False)
    ]
    for record in planted:
        question = maker.question(record, store.SHARD)
        if empties:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        start = time.perf_counter()
        found = search([Search(one.read(), question)], words, words, None, TOP)
        seconds.append(time.perf_counter() - start)
        first += int(found.scores.argmax()) == record
        lists.append(found)
    agreed, distances, errors = [], [], []
    for record, found in list(zip(planted, lists, strict=True))[:exact]:
        whole = Search(one.read(), maker.question(record, store.SHARD)).all()
        agreed.append(len(set(np.argsort(-whole)[:TOP]) & set(np.argsort(-found.certain)[:TOP])))
        distances.append([float(robust_z(scores).max()) for scores in (whole, found.scores)])
        errors.append([float(np.std((whole - found.scores)[~found.read])), found.error])
    return {
        "seconds": seconds,
        "planted record first": f"{first} of {questions}",
        "of the first ten": agreed,
        "z of the first, exact and found": distances,
        "standard error of the rest, measured and reported": errors,
        "gradients read": int(lists[0].read.sum()),
        "peak GiB before the exact ones": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if not exact
        else None,
        "GB": one.bytes() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument(
        "--width", type=int, default=71_680, help="numbers of a gradient (default: those of 280 weights)"
    )
    parser.add_argument("--questions", type=int, default=9)
    parser.add_argument(
        "--exact",
        type=int,
        default=2,
        help="questions that are also answered from all gradients (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, help="for the store, kept afterwards (default: a temporary one)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        exact, empties = (int(one) for one in args.measure)
        print(json.dumps(measure(args.folder, args.records, args.width, exact, args.questions, bool(empties))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        common = ["--records", str(args.records), "--width", str(args.width), "--questions", str(args.questions)]
        common += ["--folder", str(args.folder or scratch), "--measure"]
        runs = [("cache of files as it is", "0", "0")]
        runs += [("cache of files emptied", "0", "1")] if os.access("/proc/sys/vm/drop_caches", os.W_OK) else []
        runs += [("compared with all gradients", str(args.exact), "0")]
        for what, exact, empties in runs:
            found = result_of(__file__, *common, exact, empties, variables={})
            print(
                f"{what}: median {statistics.median(found.pop('seconds')):.2f} s",
                *(f"{k}: {v}" for k, v in found.items()),
                sep="\n  ",
                flush=True,
            )


if __name__ == "__main__":
    main()
