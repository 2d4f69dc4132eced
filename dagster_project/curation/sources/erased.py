"""Records that were erased: a row that would bring one back is refused (docs/erase.md).

data/sources/erasures.jsonl has keyed hashes of them. It is in data/sources/, a dependency of the stages that read
sources: it becomes one of their inputs when it exists, and changes nothing before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.layout import RECORD_KEY
from dagster_project.core.published_ids import read_key
from dagster_project.core.records import CheckResult

TOMBSTONES = "data/sources/erasures.jsonl"
NAME = "erased_record"
DESCRIPTION = "No row is a record that was erased (data/sources/erasures.jsonl)."
DESCRIPTIONS = {NAME: DESCRIPTION}
SHOWN = 20


def key_id(key: bytes) -> str:
    """Identifies the key of a tombstone without revealing it."""
    return hashlib.sha256(b"pedigree erasure key\0" + key).hexdigest()[:16]


def record_mark(key: bytes, example_id: str) -> str:
    """Keyed hash of an id.

    It differs from the id under which a release publishes the record, so the two cannot be matched without the key.
    """
    return hmac.digest(key, b"erased record\0" + example_id.encode(), "sha256").hex()


def text_marks(key: bytes, record: Mapping[str, Any]) -> list[str]:
    """Keyed hashes of the text of a record, or of both sides of a pair.

    Of all turns of user and assistant, without differences of case, compatible characters (NFKC) and white space.
    """
    if "prompt" in record:
        sides = [(record["prompt"], record[side] or ()) for side in ("chosen", "rejected")]
    else:
        messages = record["messages"] or ()
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        sides = [(messages[:last], messages[last:])]
    texts = ["\0".join(map(_normalized, side)) for side in starmap(_turns, sides) if side]
    encoded = [b"erased text\0" + text.encode("utf-8", "surrogatepass") for text in dict.fromkeys(texts)]
    return [hmac.digest(key, text, "sha256").hex() for text in encoded]


def _turns(prompt: Sequence[Mapping[str, Any]], answer: Sequence[Mapping[str, Any]]) -> list[str]:
    """Texts of the turns; empty if the answer says nothing in words: many records may share a prompt."""
    if not any(message["role"] == "assistant" and (message["content"] or "").strip() for message in answer):
        return []
    said = [message["content"] for message in (*prompt, *answer) if message["role"] != "system"]
    return [text for text in said if (text or "").strip()]


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@dataclass(frozen=True)
class Erased:
    """The tombstones of a project, and the key to compare with them."""

    key: bytes
    marks: frozenset[str]

    def includes(self, record: Mapping[str, Any]) -> bool:
        """Whether a record or pair is one that was erased."""
        if record_mark(self.key, record["example_id"]) in self.marks:
            return True
        return not self.marks.isdisjoint(text_marks(self.key, record))

    def check(self, records: Iterable[Mapping[str, Any]]) -> CheckResult:
        """The blocking check of the stages that read sources.

        Args:
            records: records or pairs, with `source` and `source_row`.
        """
        compared = records if self.marks else ()
        places = [f"{record['source']}:{record['source_row']}" for record in compared if self.includes(record)]
        return CheckResult(
            NAME,
            not places,
            blocking=True,
            count=len(places),
            rows=places[:SHOWN],
            note=f"erased before: take the rows out again; {TOMBSTONES} has their keyed hashes" if places else "",
        )


def read_erased(root: Path) -> Erased:
    """The tombstones of the project; without any, no key is needed.

    Raises:
        InputError: the file is damaged, or the project's key is not the one of the tombstones.
    """
    path = root / TOMBSTONES
    if not path.exists():
        return Erased(b"", frozenset())
    key = read_key(root)
    marks: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
            found, of_key = {entry["record"], *entry["texts"]}, entry["key"]
        except (ValueError, TypeError, KeyError):
            what = f"{TOMBSTONES}, line {number}: not a tombstone"
            raise InputError(what, f"restore it: `git checkout {TOMBSTONES}`") from None
        if of_key != key_id(key):
            raise InputError(
                f"{TOMBSTONES}, line {number}: made with another key"
                f" than {RECORD_KEY}, so erased records cannot be recognized",
                f"restore the key with which records were erased: `git log -- {RECORD_KEY}` lists its versions",
            )
        marks |= found
    return Erased(key, frozenset(marks))


def erased_on(root: Path, keys: Iterable[bytes], example_id: str) -> str | None:
    """The day on which a record, or all that it was made from, was erased; None if it was not, or the key is unknown.

    Args:
        keys: of the project, now and before.
    """
    path = root / TOMBSTONES
    marks = {record_mark(key, example_id) for key in keys} if path.is_file() else set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if marks else ():
        try:
            entry = json.loads(line)
            if not marks.isdisjoint([entry["record"], *entry["texts"]]):
                return str(entry["date"])
        except (ValueError, TypeError, KeyError):  # `raw_examples` refuses the file, and says where it is damaged
            continue
    return None
