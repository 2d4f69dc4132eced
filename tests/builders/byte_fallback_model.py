"""A tiny random Llama whose tokenizer llama.cpp's converter supports: pieces by
merges, and bytes for the rest, as in Llama 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.tiny_model import CHAT_TEMPLATE

SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
WORDS = ("▁the", "▁parcel", "▁Where", "▁is", "▁my", "user", "assistant", "system")


def _pieces() -> tuple[list[str], list[tuple[str, str]]]:
    """Characters, the beginnings of each word, and the merges that make them."""
    characters = sorted({*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!"})
    pieces, merges = [], []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    return characters, merges


def tokenizer(template: str = CHAT_TEMPLATE, add_prefix_space: bool | None = False) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    characters, merges = _pieces()
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *("".join(pair) for pair in merges), *characters]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        add_prefix_space=add_prefix_space,
    )
    made.chat_template = template
    return made


def make_model(folder: Path, seed: int = 0, **config: Any) -> Any:
    """Returns the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    own = tokenizer()
    own.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ids = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(own), max_position_embeddings=512, tie_word_embeddings=True, **sizes, **ids, **config
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return own
