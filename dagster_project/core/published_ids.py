"""Ids of records as they leave the project: HMACs of the content hashes.

Hashing a guessed text therefore confirms nothing (docs/decisions/022).
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_bytes
from dagster_project.core.imports import use_arrow_without_pandas
from dagster_project.core.layout import RECORD_KEY

if TYPE_CHECKING:
    import pyarrow as pa

CREATE = f"mkdir -p {Path(RECORD_KEY).parent} && openssl rand -hex 32 > {RECORD_KEY}"
SAMPLE_KEY = "c37eb4f2451882a0daad312fa1534e8db8cdab531bebd60c2d46cb42a8e26f5c"
"""sha256 of the key that comes with the sample project."""
SAMPLE_SOURCES = {
    "6789bf53d415f8a3949c928cbf051342685662990a8185c4a9ba6658618e67a7",  # triage_alpaca.json
    "77a1a0d25929cd51bde854bf0e74c707d3fb72f2588091debb8686e5109f1480",  # triage_messages.jsonl
    "25251f7ba71f94aad19e53f44f566f09acd0b113de36868f82d1bb28631e6ea0",  # replies_messages.jsonl
    "d8f099bcb21770015e4844d083a8878b0deb76f1f9c44d3f59f7b23523e8259d",  # preferences.jsonl
}
"""sha256 of the files that the sample project trains on."""


def read_key(root: Path) -> bytes:
    """The project's secret, 32 bytes. Never shown: messages name the file only.

    Raises:
        InputError: the file is missing, or is not 64 hexadecimal digits.
    """
    path = root / RECORD_KEY
    if not path.is_file():
        raise InputError(
            f"{RECORD_KEY} does not exist: it keys the ids of records in data/release",
            "copy it from the clone in which the project was made;"
            f" or create another, with which records get other ids there: `{CREATE}`",
        )
    key = parse_key(path.read_bytes())
    if key is None:
        raise InputError(f"{RECORD_KEY}: must be 64 hexadecimal digits on one line", f"create a new key: `{CREATE}`")
    return key


def parse_key(content: bytes) -> bytes | None:
    """The key in the bytes of a key file; None if they are anything else."""
    digits = content.strip()
    return bytes.fromhex(digits.decode("ascii")) if re.fullmatch(rb"[0-9a-fA-F]{64}", digits) else None


def published_id(key: bytes, example_id: str) -> str:
    """HMAC-SHA256 of a record's id, 128 bits in hex, as long as the id itself."""
    return hmac.digest(key, example_id.encode("utf-8"), "sha256").hex()[:32]


def published_table(key: bytes, table: pa.Table) -> pa.Table:
    """A table of training evidence with every text column replaced: all of them are ids of records."""
    import pyarrow as pa

    use_arrow_without_pandas()

    def published(column: pa.Array) -> pa.Array:
        encoded = column.dictionary_encode()
        ids = [published_id(key, identity) for identity in encoded.dictionary.to_pylist()]
        return pa.array(ids, column.type).take(encoded.indices)

    for i, field in enumerate(table.schema):
        if pa.types.is_integer(field.type):
            continue
        if not pa.types.is_string(field.type):
            raise AssertionError(f"{field.name}: {field.type} cannot be published")
        column = pa.chunked_array([published(chunk) for chunk in table.column(i).chunks], field.type)
        table = table.set_column(i, field, column)
    return table


def is_own(key: bytes, sources: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a key may protect these sources.

    The sample project's key is public and protects nothing but its own files, which are public too.
    """
    if sha256_of_bytes(key) != SAMPLE_KEY:
        return True
    return all(source.get("sha256") in SAMPLE_SOURCES for source in sources)
