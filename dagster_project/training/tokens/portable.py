"""A tokenizer that other processes load from the bytes of its files."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
"""Files of a model's folder that a tokenizer may be read from: none with weights."""

Files = tuple[tuple[str, bytes], ...]
"""Path in the folder, and content."""

_received: dict[str, tuple[Any, tempfile.TemporaryDirectory[str]]] = {}
"""The tokenizer that this process got last, and its files, from which the model's end-of-text tokens are read later; by
hash."""


class PortableTokenizer:
    """A tokenizer and the folder that it was loaded from.

    Pickled, it is the bytes of its files and its chat template.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        paths = [path for path in sorted(self.folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
        files = tuple((str(path.relative_to(self.folder)), path.read_bytes()) for path in paths)
        template = self.tokenizer.chat_template
        digest = hashlib.sha256(repr((template, [(name, len(data)) for name, data in files])).encode())
        for _, data in files:
            digest.update(data)
        return _load, (digest.hexdigest(), files, template)


def _load(key: str, files: Files, template: str | None) -> PortableTokenizer:
    """The tokenizer in another process, which loads it once."""
    from transformers import AutoTokenizer

    if key not in _received:
        folder = tempfile.TemporaryDirectory(prefix="tokenizer-")
        for name, data in files:
            path = Path(folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        tokenizer = AutoTokenizer.from_pretrained(folder.name, trust_remote_code=False)
        tokenizer.chat_template = template
        _received.clear()
        _received[key] = tokenizer, folder
    tokenizer, folder = _received[key]
    return PortableTokenizer(Path(folder.name), tokenizer)
