"""GGUF files and safetensors that claim an origin, as `audit` reads them where
there is no project: nothing of them may be called verified."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fuzz import gguf_files
from fuzz.surface import Case, Surface, answered, as_content, inside, write_files
from fuzz.values import TEXTS, damaged, text, value

CLAIMS = ("model", "stage", "dvc_lock", "commit", "audit_sha256", "quantization", "other")
HEADER = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def _claims(random: random.Random) -> dict[str, str]:
    names = random.sample(CLAIMS, random.randrange(1, len(CLAIMS)))
    return {
        f"pedigree.{name}": random.choice([*TEXTS.values(), text(random), "0" * 32 + ".dir", "--output=x", "HEAD"])
        for name in names
    }


def _gguf(random: random.Random) -> bytes:
    fields: dict[str, Any] = {name: ("text", claim) for name, claim in _claims(random).items()}
    if random.random() < 0.5:
        name = random.choice([*fields])
        fields[name] = random.choice(
            [("u32", 7), ("bool", True), ("array", ["text", ["a", "b"], random.choice([None, *gguf_files.LENGTHS])])]
        )
    counts = random.choice(
        [(None, None)] * 6 + [(None, random.choice(gguf_files.LENGTHS)), (random.choice(gguf_files.LENGTHS), None)]
    )
    content = gguf_files._file(fields, [], counts, random.choice([3, 3, 3, 2, 1, 4]))
    return damaged(random, content) if random.random() < 0.4 else content


def _safetensors(random: random.Random) -> bytes:
    header: dict[str, Any] = {**HEADER, "__metadata__": {"format": "pt", **_claims(random)}}
    if random.random() < 0.3:
        header[random.choice(["__metadata__", "a"])] = value(random)
    content = json.dumps(header).encode()
    if random.random() < 0.3:
        content = damaged(random, content)
    length = random.choice([len(content)] * 6 + [*gguf_files.LENGTHS])
    return length.to_bytes(8, "little") + content + bytes(8)


def draw(random: random.Random) -> Case:
    is_gguf = random.random() < 0.6
    content = _gguf(random) if is_gguf else _safetensors(random)
    return {"files": {f"model/{'x.gguf' if is_gguf else 'model.safetensors'}": as_content(content)}}


def play(case: Case, folder: Path) -> str:
    write_files(case, folder)
    with inside(folder):
        code, document = answered("audit", "model", "--project", ".", codes=(0, 2))
    if document is None:
        return "refused"
    assert (
        code == 0
        and document["verdict"] == "unverified"
        and document["verified"] is False
        and document["lineage"] is None
    )
    return "unverified"


SURFACE = Surface("exported_files", 2_000, draw, play)
