"""The examples of a split in a scratch file, and compact columns of facts about its records and examples."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.stored_rows import Scratch
from dagster_project.core.strings import Strings
from dagster_project.training.tokens.blocks import RecordFacts
from dagster_project.training.tokens.examples import Example

if TYPE_CHECKING:
    import numpy as np

UNCHECKED = 2
"""In `TokenizedSplit.stable`: the whole text of the record was not tokenized."""


class TokenizedSplit:
    """A split after tokenization. Columns have one value for each record or example; equal texts are one object."""

    def __init__(self, scratch: Path | None = None) -> None:
        """
        Args:
            scratch: folder of the scratch file; None: the folder for temporary files.
        """
        self.ids = Strings()
        self.sources: list[str] = []
        self.categories: list[str | None] = []
        self.outcomes: list[str] = []
        self.whys: list[str] = []
        self.trained = array("q")
        """Tokens of each whole record that are trained on."""
        self.stable = bytearray()
        self.first, self.counts = array("q"), array("q")
        """Number of each record's first example, and of its examples."""
        self.traces: dict[int, tuple[int, int]] = {}
        """Record -> its traces, and those in the loss."""
        self.wrong: dict[int, str] = {}
        """Record -> what is wrong with its labels."""
        self.lengths, self.labeled = array("q"), array("q")
        """Tokens of each example, and those with a label."""
        self.ends, self.double_bos = bytearray(), bytearray()
        self._data = Scratch(scratch)
        self._same: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.outcomes)

    def extend(self, records: Iterable[RecordFacts]) -> None:
        one = self._same.setdefault
        for facts in records:
            i = len(self)
            self.ids.append(facts.example_id)
            self.sources.append(one(facts.source, facts.source))
            self.categories.append(one(facts.category, facts.category))
            self.outcomes.append(one(facts.outcome, facts.outcome))
            self.whys.append(one(facts.why, facts.why))
            self.trained.append(facts.trained)
            self.stable.append(UNCHECKED if facts.stable is None else facts.stable)
            self.first.append(len(self._data))
            self.counts.append(len(facts.examples))
            if facts.traces:
                self.traces[i] = facts.traces, facts.traces_in_loss
            if facts.wrong:
                self.wrong[i] = facts.wrong
            for example in facts.examples:
                self.lengths.append(example.length)
                self.labeled.append(example.trained)
                self.ends.append(example.ends)
                self.double_bos.append(example.double_bos)
                self._data.append(example.data)

    def leave_out(self, record: int, outcome: str, why: str) -> None:
        """Drop a record that was kept."""
        self.outcomes[record], self.whys[record], self.counts[record] = outcome, why, 0

    def kept(self, record: int) -> bool:
        return self.counts[record] > 0

    def of(self, record: int) -> range:
        """Numbers of a record's examples."""
        return range(self.first[record], self.first[record] + self.counts[record])

    def size(self, record: int) -> int:
        """Tokens of a record's examples."""
        return sum(self.lengths[k] for k in self.of(record))

    def lost(self, record: int) -> int:
        """Trained tokens of a record that are in no example."""
        return self.trained[record] - sum(self.labeled[k] for k in self.of(record))

    def owners(self) -> np.ndarray:
        """Record of each example that is kept, (kept examples,) int64; the examples are `examples()`."""
        import numpy as np

        return np.repeat(np.arange(len(self)), np.array(self.counts, np.int64))

    def examples(self) -> np.ndarray:
        """Numbers of the examples that are kept, (kept examples,) int64, in the order of the records."""
        import numpy as np

        return np.fromiter((k for i in range(len(self)) for k in self.of(i)), np.int64)

    def read(self, examples: Iterable[int]) -> Iterator[Example]:
        """Examples by their numbers, in any order."""
        import numpy as np

        for data in self._data.chosen(examples):
            ids, labels, weights = np.split(np.frombuffer(data, np.int32), 3)
            yield Example(ids, labels, weights.view(np.float32))


def in_order(found: TokenizedSplit, copies: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Number and record of each example and copy, both (examples,) int64, ordered by content hash.

    So each row is a representative mixture of long and short answers, and copies of an example are not adjacent.
    """
    import numpy as np

    def keys() -> Iterator[str]:
        for i, (name, n) in enumerate(zip(found.ids, copies, strict=True)):
            for part in range(found.counts[i]):
                for copy in range(n):
                    yield hashlib.sha256(f"{name}:{part}:{copy}".encode()).hexdigest() if part or copy else name

    def numbers() -> Iterator[tuple[int, int]]:
        for i, n in enumerate(copies):
            for k in found.of(i):
                for _ in range(n):
                    yield k, i

    width = max((len(name.encode()) for name in found.ids), default=0)
    order = np.argsort(np.fromiter((key.encode() for key in keys()), f"S{max(64, width)}"), kind="stable")
    pairs = np.fromiter(numbers(), np.dtype((np.int64, 2)))
    return pairs[order, 0], pairs[order, 1]
