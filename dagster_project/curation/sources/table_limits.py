"""Limits for tables, which store a repeated value once: a small file can hold more than the memory of the machine."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError

MAX_TABLE_RATIO, TABLE_FREE_BYTES = 1000, 2**30
"""Maximum ratio of the bytes of all rows to those of the file, checked above so many bytes."""
MAX_BATCH_BYTES = 2**31
"""Maximum bytes of memory for the next rows."""


def bounded(name: str, size: int, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Batches with their size in bytes.

    Args:
        name: of the file, in messages.
        size: of the file, in bytes.
    Raises:
        InputError: a batch takes too much memory, or all of them are too large for the file.
    """
    import pyarrow as pa

    out, most, stream = 0, max(TABLE_FREE_BYTES, MAX_TABLE_RATIO * size), iter(batches)
    while True:
        try:
            with _limited_memory(MAX_BATCH_BYTES):
                batch = next(stream, None)
        except (pa.ArrowMemoryError, MemoryError):
            problem = f"the next rows need more than {MAX_BATCH_BYTES / 2**30:g} GiB of memory"
            raise InputError(f"{name}: {problem}", "write it with shorter rows") from None
        if batch is None:
            return
        decoded = decoded_bytes(batch)
        out += decoded
        if out > most:
            raise InputError(f"{name}: its rows are more than {most // 2**20:,} MiB", "write it without compression if you trust it")
        yield decoded, batch


@contextmanager
def _limited_memory(additional: int) -> Iterator[None]:
    """Limit the address space of this process to additional bytes, where the operating system can."""
    used = Path("/proc/self/statm")
    if not used.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(used.read_text().split()[0]) * resource.getpagesize() + additional
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def decoded_bytes(array: Any) -> int:
    """Bytes of an Arrow array or record batch whose values are written out: a dictionary stores a repeated one once."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.RecordBatch):
        return sum(map(decoded_bytes, array.columns)) if _has_dictionary(array.schema) else int(array.nbytes)
    kind = array.type
    if pa.types.is_dictionary(kind):
        values = array.dictionary
        if pa.types.is_string(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_string(values.type):
            return int(pc.sum(pc.take(pc.cast(pc.binary_length(values), pa.int64()), array.indices)).as_py() or 0)
        return len(array) * -(-decoded_bytes(values) // max(len(values), 1))
    if pa.types.is_struct(kind):
        return sum(map(decoded_bytes, array.flatten()))
    if any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return decoded_bytes(array.flatten()) + 4 * len(array)
    return int(array.nbytes)


def _has_dictionary(fields: Iterable[Any]) -> bool:
    import pyarrow as pa

    def inside(kind: Any) -> bool:
        return pa.types.is_dictionary(kind) or any(inside(kind.field(i).type) for i in range(kind.num_fields))

    return any(inside(field.type) for field in fields)
