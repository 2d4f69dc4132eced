"""Examples -> rows of a Parquet file, written in row groups from a scratch file."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dagster_project.core.chat import packed_rows
from dagster_project.core.records import ROW_GROUP
from dagster_project.training.tokens.tokenized_split import TokenizedSplit

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TOKENS = 2**31 - 1
"""Maximum tokens of one Arrow array of lists, whose bounds are int32."""


@dataclass(frozen=True)
class Layout:
    """Examples in rows."""

    order: np.ndarray
    """Indices of the examples, row by row, (examples,) int64."""
    sizes: np.ndarray
    """Examples of each row, (rows,) int64."""
    tokens: np.ndarray
    """Tokens of each row, (rows,) int64."""

    def fill_rate(self, room: int) -> float:
        """Share of the positions that are used, if every row has at least `room` of them."""
        import numpy as np

        return round(int(self.tokens.sum()) / int(np.maximum(self.tokens, room).sum()), 4) if len(self.sizes) else 0.0


def layout(found: TokenizedSplit, examples: np.ndarray, room: int | None) -> Layout:
    """Pack examples by first fit into rows of `room` tokens.

    Args:
        examples: numbers of the examples, in the order in which they are packed.
        room: None: every example has its own row.
    """
    import numpy as np

    lengths = np.array(found.lengths, np.int64)[examples]
    row_of = np.arange(len(lengths)) if room is None else np.array(packed_rows(lengths.tolist(), room), np.int64)
    order = np.argsort(row_of, kind="stable")
    sizes = np.bincount(row_of)
    ends = np.cumsum(sizes)
    total = np.concatenate([[0], np.cumsum(lengths[order])])
    return Layout(order, sizes, total[ends] - total[ends - sizes])


def write_packed(
    path: Path,
    schema: pa.Schema,
    found: TokenizedSplit,
    examples: np.ndarray,
    owners: np.ndarray,
    sizes: np.ndarray,
    scratch: Path,
) -> None:
    """Write packed rows to Parquet, column by column: as Python objects a large set would not fit into memory.

    Args:
        examples: number of each example, row by row, (examples,) int64.
        owners: its record.
        sizes: examples of each row, (rows,) int64.
        scratch: folder of the scratch file with the columns of one row group.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = np.array(found.lengths, np.int64)[examples]
    by_example = np.concatenate([[0], np.cumsum(sizes)])  # bounds of the rows, in examples
    by_token = np.concatenate([[0], np.cumsum(lengths)])[by_example]
    ids = found.ids.arrow()
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=True) as writer:
        for start in range(0, max(1, len(sizes)), ROW_GROUP):
            stop = min(start + ROW_GROUP, len(sizes))
            parts: list[pa.Table] = []
            first = start
            while first < stop or not parts:
                last = min(stop, max(first + 1, int(np.searchsorted(by_token, by_token[first] + TOKENS, "right")) - 1))
                chosen = slice(by_example[first], by_example[last])
                values = {
                    "example_ids": ids.take(pa.array(owners[chosen])).cast(pa.string()),
                    "lengths": pa.array(lengths[chosen].astype(np.int32)),
                    **_columns(found, examples[chosen], scratch),
                }
                columns = []
                for name, column in values.items():
                    bounds = (by_token if name in TOKEN_COLUMNS else by_example)[first : last + 1]
                    columns.append(pa.ListArray.from_arrays(pa.array((bounds - bounds[0]).astype(np.int32)), column))
                parts.append(pa.Table.from_arrays(columns, schema=schema))
                first = last
            writer.write_table(pa.concat_tables(parts), row_group_size=ROW_GROUP)


TOKEN_COLUMNS = {"input_ids": "int32", "labels": "int32", "weights": "float32"}


def _columns(found: TokenizedSplit, examples: np.ndarray, scratch: Path) -> dict[str, pa.Array]:
    """The columns of tokens, in scratch files that are mapped to memory, of which only parts are read at once."""
    import numpy as np
    import pyarrow as pa

    scratch.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = {name: stack.enter_context(tempfile.TemporaryFile(dir=scratch)) for name in TOKEN_COLUMNS}
        for example in found.read(examples.tolist()):
            for name, file in files.items():
                file.write(getattr(example, name).tobytes())
        columns = {}
        for name, file in files.items():
            dtype = np.dtype(TOKEN_COLUMNS[name])
            columns[name] = pa.array(np.memmap(file, dtype, "r") if file.tell() else np.array([], dtype))
    return columns
