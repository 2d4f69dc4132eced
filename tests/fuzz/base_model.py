"""A model folder of some kilobytes: a byte-level tokenizer with a ChatML
template, and a Llama of one layer with zeros as weights; and its conversion."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from builders.random_history import tokenizer_files

from dagster_project.core.errors import PedigreeError
from dagster_project.core.params import parse
from dagster_project.stages import base_model

HIDDEN, LAYERS, VOCABULARY = 8, 1, 259
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "max_position_embeddings": 128,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "initializer_range": 0.02, "attention_bias": False, "mlp_bias": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "dtype": "float32", "torch_dtype": "float32",
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": [8, 8],
    "self_attn.k_proj": [4, 8],
    "self_attn.v_proj": [4, 8],
    "self_attn.o_proj": [8, 8],
    "mlp.gate_proj": [16, 8],
    "mlp.up_proj": [16, 8],
    "mlp.down_proj": [8, 16],
    "input_layernorm": [8],
    "post_attention_layernorm": [8],
}


@cache
def tokenizer_folder() -> dict[str, bytes]:
    """File -> content, without weights."""
    return dict(tokenizer_files())


def shapes() -> dict[str, list[int]]:
    layer = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in LAYER.items()}
    return {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN], **layer}


@cache
def weights() -> tuple[dict[str, dict], bytes]:
    """The header of the safetensors file, as it is before it is written, and what follows it."""
    header, at = {}, 0
    for name, shape in shapes().items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, bytes(at)


def safetensors(header: object, content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def model_folder() -> dict[str, bytes]:
    """File -> content of a complete model."""
    return {
        **tokenizer_folder(),
        "config.json": json.dumps(CONFIG).encode(),
        "generation_config.json": b'{"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}',
        "model.safetensors": safetensors(*weights()),
    }


def converted(folder: Path, section: dict[str, Any]) -> str:
    """Convert a model as the stage does: "accepted", or "refused" in one message with its next step.

    Args:
        section: `base_model` of params.yaml.
    """
    (folder / "data").mkdir()
    out = folder / "data/base_model"
    try:
        report = base_model.produce(folder, parse(base_model.Params, section, "base_model"), out)
    except PedigreeError as error:
        assert error.exit_code == 2 and error.what and error.hint, f"no next step: {error}"
        assert len(str(error)) < 5000
        return "refused"
    assert report.metrics["parameters"] > 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    return "accepted"
