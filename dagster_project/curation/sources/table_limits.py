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
            hint = "write it without compression and dictionary encoding if you trust it"
            raise InputError(f"{name}: its rows are more than {most // 2**20:,} MiB", hint)
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
    """Bytes of an Arrow array, record batch or table with its values written out: a dictionary stores each one once.

    Raises:
        pyarrow.ArrowInvalid: a column has a type by which a few bytes can hold any number of values.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        return sum(map(decoded_bytes, array.chunks))
    if isinstance(array, pa.RecordBatch | pa.Table):
        return sum(map(decoded_bytes, array.columns)) if _has_dictionary(array.schema) else int(array.nbytes)
    kind = array.type
    if _shares_values(kind):
        raise pa.ArrowInvalid(f"columns of type {kind} are not supported")
    if pa.types.is_dictionary(kind):
        values = array.dictionary
        if values.type in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
            return int(pc.sum(pc.take(pc.cast(pc.binary_length(values), pa.int64()), array.indices)).as_py() or 0)
        if not pa.types.is_primitive(values.type):
            raise pa.ArrowInvalid(f"columns of type {kind} are not supported")
        return len(array) * -(-decoded_bytes(values) // max(len(values), 1))
    if pa.types.is_struct(kind):
        return sum(map(decoded_bytes, array.flatten()))
    if any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return decoded_bytes(array.flatten()) + 4 * len(array)
    return int(array.nbytes)


def without_views(batch: Any) -> Any:
    """A record batch with views of text, as polars writes them, written out."""
    import pyarrow as pa

    schema = pa.schema([field.with_type(written_out(field.type)) for field in batch.schema])
    return batch if schema == batch.schema else batch.cast(schema)


def written_out(kind: Any) -> Any:
    """The Arrow type with texts and bytes instead of views, at any depth: list<string_view>  ->  list<large_string>"""
    import pyarrow as pa

    def inner(field: Any) -> Any:
        return field.with_type(written_out(field.type))

    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, written_out(kind.value_type), kind.ordered)
    if pa.types.is_struct(kind):
        return pa.struct([inner(kind.field(i)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(written_out(kind.key_type), written_out(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner(kind.value_field), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(inner(kind.value_field))
    return kind


def _has_dictionary(fields: Iterable[Any]) -> bool:
    import pyarrow as pa

    def inside(kind: Any) -> bool:
        if pa.types.is_dictionary(kind) or _shares_values(kind):
            return True
        return any(inside(kind.field(i).type) for i in range(kind.num_fields))

    return any(inside(field.type) for field in fields)


def _shares_values(kind: Any) -> bool:
    """Whether rows of an Arrow type, other than a dictionary, can share the bytes of one value."""
    import pyarrow as pa

    shared = ("run_end_encoded", "string_view", "binary_view", "list_view", "large_list_view", "union")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in shared)
