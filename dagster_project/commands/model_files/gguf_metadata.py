"""The metadata at the beginning of a GGUF file.

Read within bounds, because such files come from anywhere, and written into a copy. Needs no library.

Layout: magic, version, numbers of weights and fields; the fields; name, shape, type and place of each weight; the
weights, aligned. Places count from the first weight, so that fields can be added without a change of what follows them.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dagster_project.core.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Type of a number -> its form for `struct`."""
UINT32, BOOL, TEXT, ARRAY = 4, 7, 8, 9
MOST_FIELDS = 10_000
MOST_ELEMENTS = 1 << 22
"""Elements of all arrays: vocabularies have up to half a million tokens, and as many merges."""
LONGEST_TEXT = 1 << 20
"""Bytes of a text that is read: chat templates have up to some 20,000."""
LONGEST_NAME = 1 << 12
MOST_TEXT = 1 << 26
"""Bytes of all texts that are read."""
MOST_WEIGHTS = 1 << 20
MOST_DIMENSIONS = 8
ALIGNMENT = "general.alignment"

Value = str | int | float | bool


@dataclass(frozen=True)
class Field:
    """A field, and where it is in the file."""

    value: Value | None
    """None: an array."""
    start: int
    end: int


@dataclass(frozen=True)
class Metadata:
    """What a GGUF file begins with."""

    version: int
    weights: int
    fields: Mapping[str, Field]
    end: int
    """Where the fields end."""


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path) -> Metadata:
    """Raises:
    InputError: the file is not GGUF, is cut short, or declares more than it can hold or than is read.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).metadata()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "name a GGUF file that can be read") from None
    except _Damaged as error:
        raise InputError(
            f"{path}: not a GGUF file that can be read: {error}", "name a complete GGUF file, version 2 or 3"
        ) from None


class _Damaged(Exception):
    """What is wrong with a file."""


class _Reader:
    """Reads one file from its beginning."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.elements, self.text_bytes = file, size, 0, 0

    def metadata(self) -> Metadata:
        if self.file.read(len(MAGIC)) != MAGIC:
            raise _Damaged("it does not begin with GGUF")
        version = self._number("<I")
        if version not in VERSIONS:
            raise _Damaged(f"version {version}")
        weights, count = self._number("<Q"), self._number("<Q")
        if count > MOST_FIELDS or weights > MOST_WEIGHTS:
            raise _Damaged(f"it declares {count:,} fields and {weights:,} weights")
        fields: dict[str, Field] = {}
        for _ in range(int(count)):
            start = self.file.tell()
            name = self._text(LONGEST_NAME)
            if name in fields:
                raise _Damaged(f"the field {name[:100]} twice")
            value = self._value(int(self._number("<I")))
            fields[name] = Field(value, start, self.file.tell())
        return Metadata(int(version), int(weights), fields, self.file.tell())

    def end_of_places(self, weights: int) -> int:
        """Where the list of weights ends, which begins here."""
        for _ in range(weights):
            self._text(LONGEST_NAME)
            dimensions = self._number("<I")
            if dimensions > MOST_DIMENSIONS:
                raise _Damaged(f"a weight of {dimensions} dimensions")
            self._skip(8 * int(dimensions) + 4 + 8)
        return self.file.tell()

    def _number(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(form, self._bytes(struct.calcsize(form)))[0]
        return value

    def _bytes(self, length: int) -> bytes:
        found = self.file.read(length)
        if len(found) < length:
            raise _Damaged("it is cut short")
        return found

    def _skip(self, length: int) -> None:
        if length > self.size - self.file.tell():
            raise _Damaged("it is cut short")
        self.file.seek(length, os.SEEK_CUR)

    def _text(self, longest: int) -> str:
        length = int(self._number("<Q"))
        if length > longest:
            raise _Damaged(f"a text of {length:,} bytes")
        self.text_bytes += length
        if self.text_bytes > MOST_TEXT:
            raise _Damaged(f"texts of more than {MOST_TEXT:,} bytes")
        return self._bytes(length).decode("utf-8", "replace")

    def _value(self, kind: int) -> Value | None:
        if kind in FORMATS:
            return self._number(FORMATS[kind])
        if kind == TEXT:
            return self._text(LONGEST_TEXT)
        if kind != ARRAY:
            raise _Damaged(f"a field of unknown type {kind}")
        element, length = int(self._number("<I")), int(self._number("<Q"))
        self.elements += length
        if self.elements > min(MOST_ELEMENTS, self.size):
            raise _Damaged(f"arrays with {self.elements:,} elements")
        if element in FORMATS:
            self._skip(length * struct.calcsize(FORMATS[element]))
        elif element == TEXT:
            for _ in range(length):
                self._skip(int(self._number("<Q")))
        else:
            raise _Damaged(f"an array of type {element}")
        return None


def with_fields(source: Path, target: Path, fields: Mapping[str, str | bool | int]) -> None:
    """Copy a GGUF file with more fields; a field that it has already is replaced.

    The list of weights and the weights are copied byte for byte.

    Args:
        source: a complete file of our own.
        fields: texts, booleans, or numbers of 32 bits without sign.
    """
    before = read(source)
    kept = [field for name, field in before.fields.items() if name not in fields]
    alignment = before.fields.get(ALIGNMENT)
    step = int(alignment.value) if alignment and isinstance(alignment.value, int) else 32
    with source.open("rb") as file, target.open("wb") as copy:
        file.seek(before.end)
        places_end = _Reader(file, source.stat().st_size).end_of_places(before.weights)
        copy.write(MAGIC + struct.pack("<IQQ", before.version, before.weights, len(kept) + len(fields)))
        for field in kept:
            file.seek(field.start)
            copy.write(file.read(field.end - field.start))
        for name, value in fields.items():
            copy.write(_encoded(name) + _encoded_value(value))
        file.seek(before.end)
        copy.write(file.read(places_end - before.end))
        copy.write(bytes(-copy.tell() % step))
        file.seek(places_end + -places_end % step)
        shutil.copyfileobj(file, copy, 1 << 20)


def _encoded(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _encoded_value(value: str | bool | int) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + _encoded(value)
    kind = BOOL if isinstance(value, bool) else UINT32
    return struct.pack("<I", kind) + struct.pack(FORMATS[kind], value)
