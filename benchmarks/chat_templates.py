"""Test which conversations each model family can be trained on, and whether the labels are correct; writes
docs/models.md.

    python benchmarks/chat_templates.py

Every chat template that TRL ships renders nine conversations. The input ids before each trained answer are compared
with `apply_chat_template`, as called by an inference server, and the labels with the `assistant_masks` of TRL's
training template of the family. The
comparison uses none of the project's rendering code. Tokenizers are stubs:
bytes, and the special tokens that the template writes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dagster_project.core.chat import IGNORE, encode_record, examples_of
from dagster_project.core.errors import InputError
from dagster_project.core.rendering import DATE

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<eos> <turn|> <|tool_response>", "gemma4": "<eos> <turn|> <|tool_response>",
    "gemma": "<eos> <end_of_turn>", "glm4": "<|endoftext|> <|user|> <|observation|>", "gptoss": "<|return|> <|call|>",
    "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>", "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|> <|end_of_text|> <|eom_id|>", "llava": "</s>", "muse": "<|eot|>", "nemotron": "<|im_end|>",
    "phi3": "<|endoftext|> <|end|> <|assistant|>", "qwen": "<|im_end|> <|endoftext|>",
}  # fmt: skip
"""Prefix of a family's name -> its tokenizer's end-of-text token, then further tokens of its generation_config.json."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]


def _call(identity: str, a: int, b: int) -> dict[str, Any]:
    return {"type": "function", "id": identity, "function": {"name": "add", "arguments": {"a": a, "b": b}}}


def _said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


_RESULT = {"tool_call_id": "abcdefghi", "name": "add"}
CELLS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [_said("user", "Why?"), _said("assistant", "Because.")]},
    "two turns": {
        "messages": [
            _said("user", "Why?"),
            _said("assistant", "Because."),
            _said("user", "And?"),
            _said("assistant", "So."),
        ]
    },
    "system": {"messages": [_said("system", "Be kind."), _said("user", "Why?"), _said("assistant", "Because.")]},
    "tool call and result": {
        "tools": TOOLS,
        "messages": [
            _said("user", "What is 1 + 2?"),
            _said("assistant", "Let me see.", tool_calls=[_call("abcdefghi", 1, 2)]),
            _said("tool", "3", **_RESULT),
            _said("assistant", "It is 3."),
        ],
    },
    "parallel calls": {
        "tools": TOOLS,
        "messages": [
            _said("user", "What is 1 + 2, and 3 + 4?"),
            _said("assistant", "Let me see.", tool_calls=[_call("abcdefghi", 1, 2), _call("jklmnopqr", 3, 4)]),
            _said("tool", "3", **_RESULT),
            _said("tool", "7", tool_call_id="jklmnopqr", name="add"),
            _said("assistant", "They are 3 and 7."),
        ],
    },
    "reasoning": {
        "messages": [_said("user", "Why?"), _said("assistant", "Because.", reasoning_content="Let me think.")]
    },
    "reasoning in two turns": {
        "messages": [
            _said("user", "Why?"),
            _said("assistant", "Because.", reasoning_content="Let me think."),
            _said("user", "And?"),
            _said("assistant", "So.", reasoning_content="Once more."),
        ]
    },
    "weight 0": {
        "messages": [
            _said("user", "Why?"),
            _said("assistant", "No.", weight=0.0),
            _said("user", "And?"),
            _said("assistant", "So."),
        ]
    },
    "empty content with call": {
        "tools": TOOLS,
        "messages": [_said("user", "What is 1 + 2?"), _said("assistant", "", tool_calls=[_call("abcdefghi", 1, 2)])],
    },
}


class Cell(NamedTuple):
    """Outcome of one conversation with one template."""

    examples: int
    """0 if it was refused."""
    refusal: str = ""
    traces: bool = True
    """Whether every trace is in the labels."""
    problems: tuple[str, ...] = ()
    """Differences from inference or from TRL's labels, i.e. wrong labels."""
    compared: str = ""
    """Comparison with TRL's labels: `=`, or the additional labels of TRL; "" if TRL has no training template."""


def families() -> list[str]:
    """Names of TRL's chat templates without those that are variants for training."""
    return sorted(path.stem for path in _folder().glob("*.jinja") if not path.stem.endswith("_training"))


def _folder() -> Path:
    import trl

    return Path(trl.__file__).parent / "chat_templates"


def stub_tokenizer(family: str, folder: Path) -> Any:
    """A tokenizer of bytes with the special tokens of a family, saved to a folder with its generation_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    template = (_folder() / f"{family}.jinja").read_text(encoding="utf-8")
    end, *further = next(ends for name, ends in ENDS.items() if family.startswith(name)).split()
    written = set(re.findall(r"<[|｜][^<>\s]*?[|｜]>|<\w+\|>|<\|\w+>|<(?:start|end)_of_\w+>", template)) | {
        end,
        *further,
    }
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=end, pad_token="<pad>",
        additional_special_tokens=sorted(written - {end, "<bos>", "<pad>"}),
    )  # fmt: skip
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids([end, *further])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def served(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> list[str]:
    """Prompts as an inference server may render them: with arguments as objects
    or text, and with thinking on or off."""
    prompts = []
    dated = re.sub(
        r"""strftime_now\(["']([^"']*)["']\)""", lambda call: repr(DATE.strftime(call[1])), tokenizer.chat_template
    )
    for variables in ({}, *({"enable_thinking": switch, "thinking": switch} for switch in (False, True))):
        for form in _forms(messages):
            try:
                prompt = tokenizer.apply_chat_template(
                    form, tools=tools, tokenize=False, add_generation_prompt=True, chat_template=dated, **variables
                )
            except Exception:  # noqa: BLE001  a template that refuses one form may accept the next
                continue
            prompts.append(prompt)
    return prompts


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    from trl.data_utils import prepare_multimodal_messages

    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    thought = [
        message | ({"thinking": message["reasoning_content"]} if "reasoning_content" in message else {})
        for message in plain
    ]
    for form in (thought, [_with_text_arguments(message) for message in thought]):
        yield form
        yield [
            message | ({"content": None} if message.get("tool_calls") and not message["content"] else {})
            for message in form
        ]
        yield prepare_multimodal_messages(form)


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    found = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], separators=(",", ":")),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return message | ({"tool_calls": found} if found else {})


@cache
def training_template(template: str, folder: Path) -> str | None:
    from transformers import AutoTokenizer
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TypeError, KeyError):
        return None


def trl_labels(tokenizer: Any, folder: Path, messages: list[dict[str, Any]], tools: Any) -> str | None:
    """The text that TRL labels in the last message; None if it has no training template, or if that refuses the
    conversation."""
    template = training_template(tokenizer.chat_template, folder)
    if template is None:
        return None
    for form in _forms(messages):
        try:
            encoded = tokenizer.apply_chat_template(
                form, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # noqa: BLE001
            continue
        runs: list[list[int]] = []
        before = 0
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            if mask and not before:
                runs.append([])
            if mask:
                runs[-1].append(token)
            before = mask
        text = tokenizer.decode(runs[-1]) if runs else ""
        if all(word in text for word in _words(messages[-1])):
            return str(text)
    return None


def _words(message: dict[str, Any]) -> list[str]:
    """The required text in the labels of a message: its content, and names and arguments of its calls."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [
        message["content"],
        *(str(word) for function in functions for word in (function["name"], *function["arguments"].values())),
    ]


def judge(tokenizer: Any, folder: Path, record: dict[str, Any]) -> Cell:
    """Render, and compare every trained answer with inference and with TRL."""
    try:
        examples, encoded = examples_of(tokenizer, record), encode_record(tokenizer, record)
    except InputError as error:
        return Cell(0, error.what)
    messages, tools = record["messages"], record.get("tools")
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]
    problems: list[str] = []
    compared: set[str] = set()
    trained = [(parts, k) for parts in examples for k, (_, is_label) in enumerate(parts) if is_label]
    if len(trained) != len(ends):
        problems.append(f"{len(trained)} answers labeled instead of {len(ends)}")
    for (parts, k), end in zip(trained, ends, strict=False):
        before, answer = "".join(text for text, _ in parts[:k]), parts[k][0]
        after = "".join(text for text, _ in parts[k + 1 :])
        if before not in served(tokenizer, messages[:end], tools):
            problems.append(f"the prompt of turn {end + 1} is not what inference renders")
        if not all(word in answer for word in _words(messages[end])):
            problems.append(f"labels of turn {end + 1} lack content")
        theirs = trl_labels(tokenizer, folder, messages[: end + 1], tools)
        if theirs is not None:
            difference = _difference(answer, theirs, before, after)
            compared.add(difference)
            if difference.startswith("≠"):
                problems.append(f"labels of turn {end + 1} differ from TRL's: {answer!r}, {theirs!r}")
    for (ids, labels), parts in zip(encoded, examples, strict=True):
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
        if ids != [token for text in texts for token in text]:
            problems.append("ids are not those of the text")
        if labels != [
            token if is_label else IGNORE for text, (_, is_label) in zip(texts, parts, strict=True) for token in text
        ]:
            problems.append("labels are not on the trained pieces")
    labeled = "".join(text for parts in examples for text, is_label in parts if is_label)
    traces = all(messages[end].get("reasoning_content", "") in labeled for end in ends)
    return Cell(len(examples), "", traces, tuple(problems), " ".join(sorted(compared)))


def _difference(ours: str, theirs: str, before: str, after: str) -> str:
    """Difference of TRL's labels of an answer: `=`; `header`, if they begin in the text that inference writes before
    the answer; `tail`, if they continue after the end of the turn; `end`, if they lack the end-of-turn token; else
    ≠."""
    if ours == theirs:
        return "="
    start = theirs.find(ours[: max(1, len(ours) // 2)])
    header, rest = theirs[: max(start, 0)], theirs[max(start, 0) :]
    kinds = ["header"] if header else []
    if start < 0 or not before.endswith(header):
        return "≠"
    if rest.startswith(ours):
        tail = rest[len(ours) :]
        return "+".join([*kinds, *(["tail"] if tail else [])]) if after.startswith(tail) or not tail.strip() else "≠"
    return "+".join([*kinds, "end"]) if ours.startswith(rest) and re.fullmatch(r"<[^<>]+>", ours[len(rest) :]) else "≠"


def matrix(scratch: Path) -> dict[str, dict[str, Cell]]:
    """Family -> conversation -> outcome."""
    found: dict[str, dict[str, Cell]] = {}
    for family in families():
        folder = scratch / family
        folder.mkdir(parents=True)
        tokenizer = stub_tokenizer(family, folder)
        found[family] = {name: judge(tokenizer, folder, record) for name, record in CELLS.items()}
    return found


def page(found: dict[str, dict[str, Cell]]) -> str:
    """docs/models.md."""
    import trl

    reasons: dict[str, int] = {}
    notes: defaultdict[str, list[str]] = defaultdict(list)
    lines = []
    for family, cells in found.items():
        shown = []
        for cell in cells.values():
            if cell.examples:
                shown.append(("✓" if cell.examples == 1 else f"✓ {cell.examples}") + ("" if cell.traces else " t"))
            else:
                shown.append(
                    str(
                        reasons.setdefault(
                            re.sub(r"in turn \d+|turn \d+ |\(turn \d+\)", "", cell.refusal).strip(), len(reasons) + 1
                        )
                    )
                )
        kinds = sorted({kind for cell in cells.values() for kind in cell.compared.split()})
        lines.append(f"| {family} | {' | '.join(shown)} | {', '.join(kinds) or '–'} |")
        notes[", ".join(kinds)].append(family)
    refused = [family for family, cells in found.items() if not cells["two turns"].examples]
    wrong = sum(bool(cell.problems) for cells in found.values() for cell in cells.values())
    heads = " | ".join(CELLS)
    return "\n".join(
        [
            "# Model families",
            "",
            (
                "Made by `python benchmarks/chat_templates.py`; do not edit. Each row is a chat template that TRL"
                f" {'.'.join(trl.__version__.split('.')[:2])} ships, each column a conversation ([the"
                " script](../benchmarks/chat_templates.py) has them)."
            ),
            "Tokenizers are stubs: bytes, and the special tokens that the template writes.",
            "",
            f"{len(found) - len(refused)} of {len(found)} templates train on two-turn chats; {len(refused)} refuse them"
            + (f" ({', '.join(refused)})" if refused else "")
            + f". Cells that are mislabeled: {wrong}.",
            "",
            (
                "* ✓: trained on as one example. ✓ 2: the template rewrites earlier turns, so each trained answer is a"
                " separate example, rendered as"
            ),
            (
                "  inference renders it. In both cases the ids before every trained answer equal those of"
                " `apply_chat_template`."
            ),
            "* t: trained on, but the template leaves traces out (see `tokenized.reasoning`).",
            "* A number: the record is refused with the reason below.",
            (
                "* Last column: labels, compared with the `assistant_masks` of TRL's training template. `=`: equal."
                " `header`: TRL also labels the part of"
            ),
            (
                "  the answer's header that inference writes by itself. `tail`: TRL also labels what the template"
                " writes after the end-of-turn token. `end`:"
            ),
            "  TRL does not label the token at which generation stops. –: TRL has no training template.",
            "",
            f"| template | {heads} | labels and TRL's |",
            f"| --- |{' --- |' * (len(CELLS) + 1)}",
            *lines,
            "",
            *(f"{number}. {reason}" for reason, number in reasons.items()),
            "",
        ]
    )


def main() -> None:
    """Write docs/models.md; fail if a cell is mislabeled."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        found = matrix(Path(scratch))
    PAGE.write_text(page(found), encoding="utf-8")
    problems = [
        f"{family}, {name}: {'; '.join(cell.problems)}"
        for family, cells in found.items()
        for name, cell in cells.items()
        if cell.problems
    ]
    sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
