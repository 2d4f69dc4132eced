"""A model's tokenizer without transformers, whose import loads torch: that took most of the time of `pedigree check`.

Supports only folders whose tokenizer transformers loads from tokenizer.json unchanged; tests compare both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PLAIN_CLASSES = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Tokenizer classes that use tokenizer.json unchanged; the others of transformers 5 build their own pipeline from its
vocabulary."""
PLAIN_MODELS = frozenset({"llama", "smollm3", "qwen3", "gpt2", "gpt_neox"})
"""Model types for which transformers honors these classes; for some others it uses its own tokenizer class for the
model."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens in transformers' order; templates refer to them by these names."""
EXTRA = frozenset({"extra_special_tokens", "additional_special_tokens"})
WITHOUT_EFFECT = frozenset(
    {
        "tokenizer_class", "backend", "is_local", "local_files_only", "model_max_length",
        "clean_up_tokenization_spaces", "model_input_names", "padding_side", "truncation_side", "chat_template",
        "added_tokens_decoder",
    }
)  # fmt: skip
"""Keys of tokenizer_config.json that do not affect token counts; `added_tokens_decoder` must repeat tokenizer.json."""
PATCHED_FROM = 100_000
"""In larger vocabularies transformers may replace Mistral's regular expression."""


@dataclass(frozen=True)
class LightTokenizer:
    """The part of a transformers tokenizer that `core.chat` and `token_counts` call."""

    backend_tokenizer: Any
    """A `tokenizers.Tokenizer`; None for a template without a tokenizer."""
    special_tokens: Mapping[str, str]
    """The special tokens that have a name, by name."""
    extra: Sequence[str]
    """The special tokens without a name."""
    chat_template: str | None
    name_or_path: str = ""
    """The model's folder."""

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        found = self.backend_tokenizer and self.bos_token and self.backend_tokenizer.token_to_id(self.bos_token)
        return found if isinstance(found, int) else None

    def __call__(self, text: str) -> SimpleNamespace:
        """Token ids of a text, with the special tokens that the tokenizer adds."""
        return SimpleNamespace(input_ids=self.backend_tokenizer.encode(text).ids)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens.values(), *self.extra]))

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        return self.special_tokens

    def get_chat_template(self, tools: Any = None) -> str:
        """The template, whether or not a conversation has tools.

        Raises:
            ValueError: there is none.
        """
        if not self.chat_template:
            raise ValueError("there is no chat template")
        return self.chat_template


def read_tokenizer(base_model: Path) -> LightTokenizer | None:
    """The tokenizer of a model's folder; None if transformers would do more than read tokenizer.json, or refuse it."""
    try:
        settings, model, state = (
            json.loads((base_model / name).read_text(encoding="utf-8"))
            for name in ("tokenizer_config.json", "config.json", "tokenizer.json")
        )
        return _build(base_model, settings, model, state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _build(
    base_model: Path, settings: dict[str, Any], model: dict[str, Any], state: dict[str, Any]
) -> LightTokenizer | None:
    from tokenizers import Tokenizer

    added = {token["content"] for token in state["added_tokens"]}
    special = {name: _content(settings[name]) for name in NAMED if settings.get(name) is not None}
    extra = [_content(token) for key in sorted(EXTRA) for token in settings.get(key) or []]
    template = settings.get("chat_template")
    if (base_model / "chat_template.jinja").is_file():
        template = (base_model / "chat_template.jinja").read_text(encoding="utf-8")
    others = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
    plain = (
        settings["tokenizer_class"] in PLAIN_CLASSES
        and model["model_type"] in PLAIN_MODELS
        and settings.keys() <= WITHOUT_EFFECT | EXTRA | {*NAMED}
        and not all(settings.get(key) for key in EXTRA)
        and not any(isinstance(settings.get(key), dict) for key in EXTRA)
        and added.issuperset([*special.values(), *extra])
        and _repeats(settings.get("added_tokens_decoder"), state["added_tokens"])
        and isinstance(template, str | None)
        and not any((base_model / name).exists() for name in others)
    )
    if not plain:
        return None
    try:
        backend = Tokenizer.from_file(str(base_model / "tokenizer.json"))
    except Exception:  # noqa: BLE001 tokenizers raises nothing narrower; transformers then reports the fault
        return None
    if backend.get_vocab_size() > PATCHED_FROM:
        return None
    return LightTokenizer(backend, special, extra, template, str(base_model))


def _content(token: Any) -> str:
    """A special token, given as text or as an object with its flags."""
    content = token["content"] if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"expected a special token, found {type(content).__name__}")
    return content


def _repeats(decoder: Mapping[str, Mapping[str, Any]] | None, added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `added_tokens_decoder` repeats tokenizer.json and so adds nothing."""
    if decoder is None:
        return True
    by_id = {token["id"]: {key: value for key, value in token.items() if key != "id"} for token in added}
    return {int(i): {**token} for i, token in decoder.items()} == by_id
