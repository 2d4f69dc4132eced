"""Weights and tokenizer in one GGUF file of strangers, as `base_model` reads it
from a package: its counts, fields, tensors and bytes."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from dagster_project.stages import base_model
from fuzz.base_model import CONFIG, HIDDEN, LAYERS, converted, tokenizer_folder
from fuzz.surface import Case, Surface, as_bytes, as_content
from fuzz.values import TEXTS, damaged, text

Field = tuple[str, Any]
"""Type and value; of an array: type of its elements, its elements, and how many it says it has."""
Tensor = dict[str, Any]

FILE = "model/tiny.gguf"
PACKED = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "?",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}
CODES = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "text": 8,
    "array": 9,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
F32, ALIGNMENT = 0, 32
VOCABULARY = 261
LENGTHS = (0, 1, 2, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
"""What counts and offsets say instead."""
NUMBERS = (0, 1, 2, 3, 7, 64, 1000, 2**16, 2**20, 2**24, 2**31 - 1, 2**32 - 1)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "phi3", "mamba", "bloom", "falcon",
    "stablelm", "starcoder2", "t5", "t5encoder", "nemotron", "deci", "lfm2", "gpt-oss", "qwen2moe", "minimax-m2",
    "bert", "clip", "")  # fmt: skip
OTHER_FIELDS: dict[str, Field] = {
    "general.alignment": ("u32", 0),
    "general.name": ("text", "mistral"),
    "general.file_type": ("u32", 2),
    "general.quantization_version": ("u32", 2),
    "llama.rope.scaling.type": ("text", "yarn"),
    "llama.rope.scaling.factor": ("f32", 0.0),
    "llama.expert_count": ("u32", 2**20),
    "llama.rope.freq_base": ("f32", 0.0),
    "llama.attention.key_length": ("u32", 3),
    "tokenizer.ggml.scores": ("array", ["f32", [0.0] * 3, None]),
    "tokenizer.ggml.pre": ("text", "smollm"),
    "tokenizer.ggml.add_bos_token": ("bool", True),
    "tokenizer.ggml.unknown_token_id": ("u32", 2**31),
    "tokenizer.ggml.added_tokens": ("array", ["text", ["<x>", "<x>"], None]),
    "split.count": ("u16", 3),
    "GGUF.version": ("u32", 3),
}


@cache
def _fields() -> dict[str, Field]:
    import json

    vocabulary: dict[str, int] = json.loads(tokenizer_folder()["tokenizer.json"])["model"]["vocab"]
    template = json.loads(tokenizer_folder()["tokenizer_config.json"])["chat_template"]
    tokens = [*sorted(vocabulary, key=lambda token: vocabulary[token]), "ab", "cd"]
    return {
        "general.architecture": ("text", "llama"),
        "general.name": ("text", "tiny"),
        "llama.block_count": ("u32", LAYERS),
        "llama.context_length": ("u32", CONFIG["max_position_embeddings"]),
        "llama.embedding_length": ("u32", HIDDEN),
        "llama.feed_forward_length": ("u32", CONFIG["intermediate_size"]),
        "llama.attention.head_count": ("u32", 2),
        "llama.attention.head_count_kv": ("u32", 1),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "llama.rope.dimension_count": ("u32", 4),
        "llama.vocab_size": ("u32", VOCABULARY),
        "tokenizer.ggml.model": ("text", "gpt2"),
        "tokenizer.ggml.tokens": ("array", ["text", tokens, None]),
        "tokenizer.ggml.token_type": ("array", ["i32", [3] * 3 + [1] * (len(tokens) - 3), None]),
        "tokenizer.ggml.merges": ("array", ["text", ["a b", "c d"], None]),
        "tokenizer.ggml.padding_token_id": ("u32", 0),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.chat_template": ("text", template),
    }


def _tensors() -> list[Tensor]:
    block = {
        "attn_q": [8, 8],
        "attn_k": [4, 8],
        "attn_v": [4, 8],
        "attn_output": [8, 8],
        "ffn_gate": [16, 8],
        "ffn_up": [16, 8],
        "ffn_down": [8, 16],
        "attn_norm": [8],
        "ffn_norm": [8],
    }
    shapes = {"token_embd.weight": [VOCABULARY, HIDDEN], "output_norm.weight": [HIDDEN]} | {
        f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in block.items()
    }
    tensors, at = [], 0
    for name, shape in shapes.items():
        tensors.append({"name": name, "shape": shape, "type": F32, "offset": at})
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        at += -(-size // ALIGNMENT) * ALIGNMENT
    return tensors


def _text(value: str, length: int | None = None) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content) if length is None else length) + content


def _value(kind: str, value: Any) -> bytes:
    if kind == "text":
        return _text(str(value))
    if kind == "array":
        element, values, length = value
        head = struct.pack("<IQ", CODES.get(element, 99), len(values) if length is None else length)
        return head + b"".join(_value(element, one) for one in values)
    if kind not in PACKED:
        return b"\0" * 8
    if kind in ("f32", "f64"):
        return struct.pack(f"<{PACKED[kind]}", value if isinstance(value, int | float) and abs(value) < 1e38 else 0.0)
    if kind == "bool":
        return struct.pack("<?", bool(value))
    size = struct.calcsize(PACKED[kind])
    number = value if isinstance(value, int) else 0
    return (number % 256**size).to_bytes(size, "little")


def _file(
    fields: dict[str, Field],
    tensors: list[Tensor],
    counts: tuple[int | None, int | None] = (None, None),
    version: int = 3,
) -> bytes:
    """The bytes of a GGUF file, whose weights are all zero."""
    said = [len(given) if count is None else count for count, given in zip(counts, (tensors, fields), strict=True)]
    parts = [b"GGUF", struct.pack("<IQQ", version, *said)]
    parts += [
        _text(name) + struct.pack("<I", CODES.get(kind, 99)) + _value(kind, value)
        for name, (kind, value) in fields.items()
    ]
    for tensor in tensors:
        shape = [length % 2**64 for length in reversed(tensor["shape"])]
        parts.append(
            _text(tensor["name"]) + struct.pack(f"<I{len(shape)}Q", tensor.get("dimensions", len(shape)), *shape)
        )
        parts.append(struct.pack("<IQ", tensor["type"], tensor["offset"] % 2**64))
    head = b"".join(parts)
    last = _tensors()[-1]
    return head + bytes(-len(head) % ALIGNMENT + last["offset"] + 4 * last["shape"][0])


def draw(random: random.Random) -> Case:
    fields, tensors = deepcopy(_fields()), _tensors()
    counts: tuple[int | None, int | None] = (None, None)
    version = 3
    kinds = random.choices(
        ["field", "array", "type", "other", "without", "architecture", "tensor", "counts", "version", "bytes"],
        [5, 4, 2, 2, 2, 1, 5, 1, 0.3, 6],
        k=random.choice([1, 1, 2]),
    )
    for kind in kinds:
        if kind in _CHANGES:
            _CHANGES[kind](random, fields)
        elif kind == "tensor":
            _tensor(random, tensors)
        elif kind == "counts":
            counts = random.choice(
                [
                    (random.choice(LENGTHS), None),
                    (None, random.choice(LENGTHS)),
                    (None, len(fields) - 1),
                    (None, len(fields) + 1),
                ]
            )
        elif kind == "version":
            version = random.choice([0, 1, 2, 3, 4, 3 << 24, 2**32 - 1])
    content = _file(fields, tensors, counts, version)
    if "bytes" in kinds:
        head = len(content.rstrip(b"\0"))  # zeros follow: the weights
        content = random.choice(
            [content[: random.randrange(len(content))], damaged(random, content[:head]) + content[head:]]
        )
    section: dict[str, Any] = {"license": "MIT"}
    if random.random() < 0.1:
        section["pad_token"] = random.choice(["<|endoftext|>", "<|im_end|>", text(random)])
    return {"files": {FILE: as_content(content)}, "section": section}


def _changed_field(random: random.Random, fields: dict[str, Field]) -> None:
    name = random.choice([name for name, (kind, _) in fields.items() if kind != "array"])
    kind = fields[name][0]
    fields[name] = (
        kind,
        (
            random.choice([random.choice([*TEXTS.values()]), text(random), ""])
            if kind == "text"
            else random.choice(NUMBERS)
        ),
    )


def _changed_array(random: random.Random, fields: dict[str, Field]) -> None:
    name = random.choice([name for name, (kind, _) in fields.items() if kind == "array"] or ["tokenizer.ggml.tokens"])
    kind, values, _ = fields.get(name, ("array", ["text", [], None]))[1]
    values = [*values]
    how = random.choice(["length", "length", "cut", "empty", "kind", "value", "twice"])
    if how in ("cut", "empty"):
        values = values[: random.randrange(len(values) + 1) if how == "cut" else 0]
    elif how == "kind":
        kind = random.choice([*PACKED, "text", "none"])
    elif how == "value" and values:
        values[random.randrange(len(values))] = (
            random.choice([text(random), values[0]]) if kind == "text" else random.choice(NUMBERS)
        )
    elif how == "twice":
        values *= 2
    fields[name] = ("array", [kind, values, random.choice(LENGTHS) if how == "length" else None])


def _changed_type(random: random.Random, fields: dict[str, Field]) -> None:
    name = random.choice([*fields])
    value = fields[name][1]
    kind = random.choice([*PACKED, "text", "array", "none"])
    fields[name] = (
        kind,
        [random.choice([*PACKED, "array"]), [], random.choice([None, *LENGTHS])] if kind == "array" else value,
    )


def _other_field(random: random.Random, fields: dict[str, Field]) -> None:
    name = random.choice([*OTHER_FIELDS, text(random)])
    fields[name] = OTHER_FIELDS.get(name, ("u32", 1))
    if name == "general.alignment":
        fields[name] = (random.choice(["u32", "u32", "u64"]), random.choice([0, 1, 3, 8, 64, 2**20, 2**31]))


def _without(random: random.Random, fields: dict[str, Field]) -> None:
    del fields[random.choice([*fields])]


def _architecture(random: random.Random, fields: dict[str, Field]) -> None:
    name = random.choice(ARCHITECTURES)
    if random.random() < 0.7:
        for key in [key for key in fields if key.startswith("llama.")]:
            fields[f"{name}.{key.partition('.')[2]}"] = fields.pop(key)
    fields["general.architecture"] = ("text", name)


_CHANGES = {
    "field": _changed_field,
    "array": _changed_array,
    "type": _changed_type,
    "other": _other_field,
    "without": _without,
    "architecture": _architecture,
}


def _tensor(random: random.Random, tensors: list[Tensor]) -> None:
    at = random.randrange(len(tensors))
    how = random.choice(["name", "shape", "dimensions", "type", "offset", "missing", "again", "extra"])
    if how == "missing":
        del tensors[at]
    elif how in ("again", "extra"):
        names = [
            tensors[at]["name"],
            "output.weight",
            "blk.7.attn_q.weight",
            "blk.0.attn_q.bias",
            "rope_freqs.weight",
            text(random),
        ]
        tensors.append({**tensors[at], "name": names[0] if how == "again" else random.choice(names[1:])})
    else:
        tensors[at][how] = {
            "name": lambda: random.choice([text(random), "output.weight", tensors[0]["name"]]),
            "shape": lambda: random.choice(
                [
                    [],
                    [0],
                    [0, 8],
                    [1] * 70,
                    [2**32, 2**32],
                    [2**20, 2**20],
                    [2**63],
                    [3],
                    tensors[at]["shape"][::-1],
                    [*tensors[at]["shape"], 1],
                ]
            ),
            "dimensions": lambda: random.choice([0, 1, 3, 2**20, 2**32 - 1]),
            "type": lambda: random.choice([1, 2, 3, 6, 8, 12, 16, 24, 27, 28, 30, 34, 39, 99, 2**32 - 1]),
            "offset": lambda: random.choice([1, 31, 32, 2**20, *LENGTHS]),
        }[how]()


@contextmanager
def _without_pip(folder: Path) -> Iterator[None]:
    """`base_model` finds the package's file here. A download by pip would take
    most of the time, and tests/test_base_model.py has it."""
    whole = base_model._fetch
    base_model._fetch = lambda root, params, scratch: (folder, {"gguf_file": params.file})
    try:
        yield
    finally:
        base_model._fetch = whole


def play(case: Case, folder: Path) -> str:
    content = as_bytes(case["files"][FILE])
    path = folder / "package" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    section = {
        **case["section"],
        "package": "model==1.0",
        "file": FILE,
        "sha256": {FILE: hashlib.sha256(content).hexdigest()},
    }
    with _without_pip(folder / "package"):
        outcome = converted(folder, section)
    if outcome == "accepted":
        _no_weight_is_random(folder / "data/base_model/model.safetensors")
    return outcome


def _no_weight_is_random(path: Path) -> None:
    """All weights of the file are zero, so each tensor has one value, unless transformers drew the weights itself."""
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a mapping
            assert tensors.get_tensor(name).unique().numel() <= 1, f"weights that no file has: {name}"


SURFACE = Surface("gguf_files", 1_000, draw, play)
