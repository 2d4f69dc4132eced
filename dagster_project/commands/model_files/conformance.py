"""Whether a GGUF file reads text as the model was trained to: its vocabulary,
special tokens, chat template, and, with llama.cpp, token ids of prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.commands.model_files import gguf_metadata, llama_cpp
from dagster_project.core.chat import adds_bos
from dagster_project.core.errors import InputError
from dagster_project.core.rendering import end_ids

TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
TEMPLATE = "tokenizer.chat_template"
ADD_BOS = "tokenizer.ggml.add_bos_token"
EOS, BOS = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id"
FURTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Fields for tokens that end an answer, besides the end of the text."""
WINDOW = ".attention.sliding_window"
"""End of the name of the field for the tokens that attention reads."""
WITHOUT_WINDOW = ("phi3", "phimoe")
"""Architectures with that field, which llama.cpp does not apply (src/models/phi3.cpp)."""
ARCHITECTURE, BASE, DEFAULT_BASE = "general.architecture", "rope.freq_base", 10_000.0
"""Fields for the architecture and, after its name, the base of positions;
llama.cpp's value where a file states none."""
ASSUMED: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "llama": {"hidden_act": ("silu", "swish")},
    "qwen2moe": {"norm_topk_prob": (False,)},
    "qwen3": {"attention_bias": (False,)},
    "qwen3moe": {"norm_topk_prob": (True,), "attention_bias": (False,)},
}
"""Architecture -> key of config.json -> values with which llama.cpp computes, as GGUF files do not state them."""
LARGE = {"gemma2": 46, "gemma3": 62}
"""Gemma 2 and 3: number of layers of the 27B model, for which llama.cpp scales attention by the size of the hidden
state per head, instead of by `head_dim`."""
UNUSED = 5
"""Type of a token that only fills the vocabulary."""
NEXT = (
    "the file would not be served as the model was trained,"
    " and is not written; export the model with --format safetensors"
)


@dataclass(frozen=True)
class Prompt:
    """A conversation, as training and evaluation give it to the model."""

    text: str
    ids: Sequence[int]


def further_fields(tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, bool | int]:
    """Fields that the converter does not write as training has them: further tokens that end an answer, and no
    beginning-of-text token where training put none."""
    others = sorted(end_ids(tokenizer) - {tokenizer.eos_token_id})
    fields: dict[str, bool | int] = dict(zip(FURTHER_ENDS, others, strict=False))
    return {**fields, ADD_BOS: _adds_bos(tokenizer, prompts)}


def _adds_bos(tokenizer: Any, prompts: Sequence[Prompt]) -> bool:
    """Whether a server must put the beginning-of-text token before a prompt.

    Servers remove it from the beginning of the rendered text first.
    """
    return adds_bos(tokenizer) and all(prompt.text.startswith(tokenizer.bos_token) for prompt in prompts)


def verify(file: Path, tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Compare the file, as the library gguf reads it, with the tokenizer.

    Returns:
        {"vocabulary": number of tokens, "special_tokens", "chat_template": that they are equal, "prompts": number of
        prompts with equal token ids, or None without llama.cpp, "finite_weights"}.
    Raises:
        InputError: something differs.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    fields = dict(reader.fields)
    count = _refuse_other_vocabulary(fields, tokenizer)
    _refuse_other_special_tokens(fields, tokenizer, prompts)
    template = _contents(fields, TEMPLATE)
    expected = _template(tokenizer)
    if template != expected:
        raise InputError("the chat template in the file is not the tokenizer's", NEXT)
    _refuse_infinite_weights(reader)
    compared = _refuse_other_ids(file, tokenizer, prompts) if llama_cpp.is_installed() else None
    return {
        "vocabulary": count,
        "special_tokens": True,
        "chat_template": expected is not None,
        "prompts": compared,
        "finite_weights": True,
    }


def refuse_lost_window(file: Path, config: Any, context: int) -> None:
    """The converter writes no sliding window for some architectures, such as Mistral and StarCoder2, and llama.cpp does
    not apply that of others, such as Phi-3. It then reads all of a text.

    Args:
        config: of the model, as transformers reads it.
        context: tokens of the longest text.
    Raises:
        InputError: the model reads such a text within a window that the file does not state, or that is not applied.
    """
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    longest = min(context, getattr(config, "max_position_embeddings", None) or context)
    if not window or window >= longest or (layers is not None and "sliding_attention" not in layers):
        return
    fields = gguf_metadata.read(file).fields
    if not any(name.endswith(WINDOW) for name in fields) or fields[ARCHITECTURE].value in WITHOUT_WINDOW:
        raise InputError(
            f"llama.cpp does not support the sliding window of this model ({window:,} tokens):"
            f" it would compute texts of more tokens, up to {longest:,}, differently",
            f"export it with --format safetensors, or set base_model.max_length to {window} and train again",
        )


def refuse_lost_settings(file: Path, config: Any) -> None:
    """The converter does not write some settings for some architectures, such
    as the base of positions for StableLM, and llama.cpp then takes its own.

    Args:
        config: as for `refuse_lost_window`.
    Raises:
        InputError: llama.cpp would compute with another value than the model.
    """
    fields = gguf_metadata.read(file).fields
    architecture = str(fields[ARCHITECTURE].value)
    positions = getattr(config, "rope_parameters", None) or {}
    positions = positions.get("full_attention", positions)
    stated = fields.get(f"{architecture}.{BASE}")
    base = stated.value if stated and isinstance(stated.value, float) else DEFAULT_BASE
    # `dynamic` changes the base: the converter writes the changed one
    if positions.get("rope_type") in (None, "default") and not math.isclose(
        positions.get("rope_theta") or base, base, rel_tol=1e-6
    ):
        raise InputError(
            f"llama.cpp would compute with rope_theta {base:g}, and the model has {positions['rope_theta']:g}", NEXT
        )
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale and architecture in LARGE:
        large = config.num_hidden_layers == LARGE[architecture]
        own = config.hidden_size // config.num_attention_heads if large else config.head_dim
        if scale != own:
            raise InputError(
                f"llama.cpp would compute with query_pre_attn_scalar {own}, and the model has {scale}", NEXT
            )
    for name, values in ASSUMED.get(architecture, {}).items():
        if (found := getattr(config, name, values[0])) not in values:
            raise InputError(f"llama.cpp would compute with {name} {values[0]}, and the model has {found}", NEXT)


def _contents(fields: Mapping[str, Any], name: str) -> Any:
    return fields[name].contents() if name in fields else None


def _template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _refuse_other_vocabulary(fields: Mapping[str, Any], tokenizer: Any) -> int:
    tokens, types = _contents(fields, TOKENS) or [], _contents(fields, TYPES) or []
    known, added = len(tokenizer), tokenizer.added_tokens_decoder
    expected = tokenizer.convert_ids_to_tokens(list(range(known)))
    if len(tokens) < known:
        raise InputError(f"the file has {len(tokens)} tokens, the tokenizer {known}", NEXT)
    for number, (token, own) in enumerate(zip(tokens, expected, strict=False)):
        if token != own and not (number in added and token == tokenizer.decode([number])):
            raise InputError(f"token {number} is {token!r} in the file, and {own!r} in the tokenizer", NEXT)
    if used := [number for number in range(known, len(tokens)) if types[number] != UNUSED]:
        raise InputError(
            f"token {used[0]} is {tokens[used[0]]!r} in the file, and the tokenizer has {known} tokens", NEXT
        )
    return len(tokens)


def _refuse_other_special_tokens(fields: Mapping[str, Any], tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    expected: dict[str, Any] = {EOS: tokenizer.eos_token_id, ADD_BOS: _adds_bos(tokenizer, prompts)}
    if tokenizer.bos_token_id is not None:
        expected[BOS] = tokenizer.bos_token_id
    for name, value in expected.items():
        if (found := _contents(fields, name)) != value:
            raise InputError(f"{name} is {found} in the file, and {value} in the tokenizer", NEXT)
    if not llama_cpp.is_installed():
        stated = {_contents(fields, name) for name in (EOS, *FURTHER_ENDS)}
        if missing := sorted(end_ids(tokenizer) - stated):
            token = tokenizer.convert_ids_to_tokens(missing[0])
            raise InputError(f"the file does not state that {token!r} ends an answer", NEXT)


def _refuse_infinite_weights(reader: Any) -> None:
    """Numbers of 16 bits end at 65,504."""
    import numpy as np

    for tensor in reader.tensors:
        if tensor.data.dtype in (np.float16, np.float32) and not np.isfinite(tensor.data).all():
            raise InputError(
                f"{tensor.name} has numbers that f16 cannot hold", "use --quantization q8_0, or --format safetensors"
            )


def _refuse_other_ids(file: Path, tokenizer: Any, prompts: Sequence[Prompt]) -> int:
    ends = sorted(end_ids(tokenizer))
    bos = tokenizer.bos_token if _adds_bos(tokenizer, prompts) else ""
    read = llama_cpp.tokenize(file, [prompt.text.removeprefix(bos) for prompt in prompts], ends)
    for number, ends_here in zip(ends, read.ends, strict=True):
        if not ends_here:
            raise InputError(f"llama.cpp would not end an answer at {tokenizer.convert_ids_to_tokens(number)!r}", NEXT)
    for prompt, ids in zip(prompts, read.tokens, strict=True):
        if ids != list(prompt.ids):
            place = next(
                (i for i, (a, b) in enumerate(zip(ids, prompt.ids, strict=False)) if a != b),
                min(len(ids), len(prompt.ids)),
            )
            quoted = tokenizer.decode(list(prompt.ids[max(0, place - 3) : place + 3]))
            raise InputError(f"llama.cpp splits a prompt into other tokens than training did, at {quoted!r}", NEXT)
    return len(prompts)
