"""Layouts of preferences: a row -> pairs of a better and a worse answer. One function per layout."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from dagster_project.core.text import shortened
from dagster_project.curation.sources.files import parse_json
from dagster_project.curation.sources.layouts import (
    GEMINI_SYSTEM,
    GEMINI_TURNS,
    TurnReader,
    alpaca,
    alpaca_prompt,
    as_conversation,
    as_list,
    gemini,
    has_rounds,
    instruction,
    merged,
    oasst_turn,
    openai,
    replies,
    sharegpt,
)
from dagster_project.curation.sources.message import EMPTY, Messages, Parsed, as_text, as_turns, read_message, read_turn
from dagster_project.curation.sources.part_messages import (
    instruction_of,
    read_anthropic_instruction,
    read_completion,
    spread,
)
from dagster_project.curation.sources.tools import TOOL_KEYS


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt. One side is empty if the format has one completion per row (KTO)."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    """Difference in quality, in the format's unit; 0 is a tie."""


@dataclass(frozen=True)
class PairLayout:
    """How one format lays out preferences."""

    keys: frozenset[str]
    """Keys a row must have."""
    pairs: Callable[[dict[str, Any]], list[Pair]]
    """Converts a row to pairs. Raises KeyError, TypeError or ValueError for rows of another layout."""
    used: frozenset[str]
    """Keys that went into the pairs; the others are kept in `meta`, except for tool definitions (`tools`,
    `functions`)."""
    judged: str = ""
    """Key of a boolean in each row. With another value the row is in another layout."""
    judged_by_number: bool = False
    """Whether 0 and 1 show this layout, too, if a file has both and no other numbers or texts. Otherwise they may be a
    class."""
    category: str = "category"
    """Key of the pair's category."""
    variants: tuple[PairLayout, ...] = ()
    """The same layout with other keys."""
    by_value: bool = False
    """As in `Layout`."""
    turns: Mapping[str, TurnReader] = field(default_factory=dict)
    """As in `Layout`. A value that is one message becomes a list of one, and text is unchanged."""
    tool_keys: tuple[str, ...] = TOOL_KEYS
    """As in `Layout`."""
    flat: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row
    """Moves fields of a nested object to the row, where they are accounted for. Raises errors like `pairs`."""
    used_turns: Callable[[dict[str, Any]], Mapping[str, int]] = lambda row: {}
    """Key of the row -> how many of its messages are used, where that may be fewer than all."""
    of_tree: Callable[[dict[str, Any]], Iterable[dict[str, Any]]] | None = None
    """As in `Layout`, those that are in a pair."""

    @property
    def forms(self) -> tuple[PairLayout, ...]:
        return (self, *self.variants)

    def form_of(self, row: Mapping[str, Any]) -> PairLayout:
        """The variant whose keys the row has, or most of them. Keys with null count as missing."""

        def match(form: PairLayout) -> tuple[bool, int]:
            keys = sum(row.get(key) is not None for key in form.keys)
            return keys == len(form.keys), keys

        return max(self.forms, key=match) if self.variants else self


MISMATCH = "chosen and rejected do not answer the same prompt"


def _margin(row: dict[str, Any]) -> float | None:
    return None if row.get("margin") in (None, "") else _number(row["margin"])


def _number(value: Any) -> float:
    """Parse a number, which is text in a CSV file."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number, found {type(value).__name__}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        found = "text" if isinstance(value, str) else shortened(str(value), 40)
        raise ValueError(f"expected a finite number, found {found}")
    return number


def _preference(
    prompt: str, chosen: str, rejected: str, more: Collection[str] = ("system", "margin")
) -> Callable[[dict[str, Any]], list[Pair]]:
    """Reader of rows with a prompt and two answers.

    Args:
        more: those of the keys `system` and `margin` that are read.
    """

    def pairs(row: dict[str, Any]) -> list[Pair]:
        system = row.get("system") if "system" in more else None
        context = [*as_turns(system), *_asked(row[prompt])]
        good, bad = (as_conversation(row[key], "assistant") for key in (chosen, rejected))
        if context[0]["role"] != "system" and good[:1] == bad[:1] and good[:1] and good[0]["role"] == "system":
            context = [good[0], *context]  # only the answers have a system prompt
        if good[: len(context)] == context == bad[: len(context)]:  # UltraFeedback repeats the prompt in both
            good, bad = good[len(context) :], bad[len(context) :]
        if not good or not bad:
            raise ValueError("chosen or rejected says nothing after the prompt")
        if good[0]["role"] != "assistant" or bad[0]["role"] != "assistant":
            raise ValueError(MISMATCH)
        return [Pair(context, good, bad, _margin(row) if "margin" in more else None)]

    return pairs


def _asked(prompt: Any) -> Messages:
    """A prompt: text, messages, or the beginning of a transcript, up to its last `Assistant:`."""
    if isinstance(prompt, str) and is_transcript(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        return _transcript(prompt.rstrip())[:-1]
    return as_conversation(prompt, "user")


def _alpaca_pair(row: dict[str, Any]) -> list[Pair]:
    """LLaMA-Factory's pairs in Alpaca's columns."""
    asked = alpaca_prompt(_with_rounds(row))
    return _preference("instruction", "chosen", "rejected", ("margin",))({**row, "instruction": asked})


def _with_rounds(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("history") not in EMPTY and not has_rounds(row):
        raise ValueError("history must be a list of pairs of texts")
    return row


def _flat_input(row: dict[str, Any]) -> dict[str, Any]:
    """{"input": {"messages": [...], "tools": [...]}, ...}  ->  {"input.messages": [...], "input.tools": [...], ...}"""
    if not isinstance(row["input"], dict):
        raise ValueError(f"input must be an object with messages, found {type(row['input']).__name__}")
    rest = {key: value for key, value in row.items() if key != "input"}
    return merged(rest, {f"input.{key}": value for key, value in row["input"].items()})


def _sharegpt_pair(row: dict[str, Any]) -> list[Pair]:
    chosen, rejected = (_answer(row[key]) for key in ("chosen", "rejected"))
    return [Pair(sharegpt(row), chosen, rejected, _margin(row))]


def _answer(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a turn, found {type(value).__name__}")
    return value


def _gemini_pair(row: dict[str, Any]) -> list[Pair]:
    """Gemini's preference tuning: two completions, of which one has the higher score."""
    best, *others = sorted(as_list(row, "completions", "completion"), key=lambda one: -_number(one["score"]))
    if len(others) != 1 or _number(best["score"]) == _number(others[0]["score"]):
        raise ValueError("completions must be two, with different scores")
    chosen, rejected = spread([best]), spread(others)
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise ValueError("a completion that is not the model's")
    return [Pair(gemini(row), chosen, rejected)]


def _transcript(text: str) -> Messages:
    """Parse Anthropic's format: "\\n\\nHuman: Hi\\n\\nAssistant: Hello"  ->  user "Hi", assistant "Hello"."""
    before, *parts = re.split(r"\n\n(Human|Assistant): ?", text)
    if before.strip() or not parts:
        raise ValueError("expected a transcript that begins with a blank line and `Human:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    return as_turns(None, *((roles[name], text) for name, text in zip(parts[::2], parts[1::2], strict=True)))


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip(" ").startswith("\n\nHuman:")


def _whole_conversations(row: dict[str, Any]) -> list[Pair]:
    """Convert two whole conversations, whose common beginning up to a turn that is answered is the prompt."""
    sides = (row["chosen"], row["rejected"])
    good, bad = (_transcript(one) if isinstance(one, str) else as_conversation(one, "assistant") for one in sides)
    shared = len([*takewhile(lambda both: both[0] == both[1], zip(good[:-1], bad[:-1], strict=False))])
    while shared and good[shared - 1]["role"] not in {"user", "tool"}:
        shared -= 1
    if not shared:
        raise ValueError(MISMATCH)
    return [Pair(good[:shared], good[shared:], bad[shared:], _margin(row))]


def _alpaca_eval(row: dict[str, Any]) -> list[Pair]:
    """Convert AlpacaEval annotations. The margin is the distance from a tie, 0 to 1.

    `preference` is between 1 (the first output is better) and 2; 1.5, in older annotations 0, is a tie.
    """
    preference = _number(row["preference"]) or TIE
    if not 1 <= preference <= 2:
        raise ValueError(f"preference must lie between 1 and 2, or be 0 for a tie, found {preference:g}")
    outputs = [as_conversation(as_text(row[key]), "assistant") for key in ("output_1", "output_2")]
    chosen, rejected = outputs if preference <= TIE else reversed(outputs)
    prompt = as_turns(row.get("system"), ("user", instruction(row, "input")))
    return [Pair(prompt, chosen, rejected, 2 * abs(preference - TIE))]


def _compared(
    prompt: str, answers: tuple[str, str], verdict: str, score: Callable[[Any], float], scaled: bool = False
) -> Callable[[dict[str, Any]], list[Pair]]:
    """Reader of rows with a prompt, two answers and which of them is better.

    Args:
        score: of the verdict; below 0 if the first answer is better, 0 for a tie.
        scaled: whether the score is also the margin. Otherwise only a tie has one.
    """

    def pairs(row: dict[str, Any]) -> list[Pair]:
        value = score(row[verdict])
        chosen, rejected = answers if value <= 0 else answers[::-1]
        (pair,) = _preference(prompt, chosen, rejected, ())(row)
        return [replace(pair, margin=abs(value) if scaled or not value else None)]

    return pairs


def _texts_in(keys: str, pairs: Callable[[dict[str, Any]], list[Pair]]) -> Callable[[dict[str, Any]], list[Pair]]:
    """Reader of rows whose columns `keys` are texts. Messages there would be in no canonical form."""

    def checked(row: dict[str, Any]) -> list[Pair]:
        for key in keys.split():
            as_text(row[key])
        return pairs(row)

    return checked


def _first_if(better: bool) -> Callable[[Any], float]:
    """Score of a verdict that is true or false, or 1 or 0, and has this value if the first answer is better."""

    def score(value: Any) -> float:
        if (found := judgement(value)) is None:
            raise ValueError(f"expected 0 or 1, found {_shown(value)}")
        return -1 if found is better else 1

    return score


def _arena(row: dict[str, Any]) -> list[Pair]:
    """Battles of Chatbot Arena and MT-Bench: two conversations, of which the first `turn` rounds were judged."""
    winner = row["winner"]
    if not isinstance(winner, str) or winner not in ARENA:
        raise ValueError(f"winner must be {', '.join(ARENA)}, found {shortened(str(winner), 40)}")
    first, second = (_rounds(row[key], row.get("turn")) for key in ("conversation_a", "conversation_b"))
    sides = (second, first) if winner == "model_b" else (first, second)
    return _whole_conversations(dict(zip(("chosen", "rejected"), sides, strict=True), margin=ARENA[winner]))


ARENA = {"model_a": None, "model_b": None, "tie": 0.0, "tie (bothbad)": 0.0, "both_bad": 0.0}
"""Winner -> margin."""


def _rounds(conversation: Any, count: Any) -> Messages:
    """The first rounds of a conversation, all without a count."""
    messages = as_conversation(conversation, "assistant")
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if count in EMPTY:
        return messages
    rounds = _number(count)
    if rounds < 1 or rounds != int(rounds):
        raise ValueError(f"turn must be a whole number from 1, found {rounds:g}")
    return messages[: asked[int(rounds)]] if rounds < len(asked) else messages


def _judged_turns(row: dict[str, Any]) -> dict[str, int]:
    return {key: len(_rounds(row[key], row.get("turn"))) for key in ("conversation_a", "conversation_b")}


def _arena_columns(row: dict[str, Any]) -> list[Pair]:
    """Battles of LMSYS with the turns of each side as lists of texts, or JSON text of these."""
    asked, *answers = (_texts(row[key]) for key in ("prompt", "response_a", "response_b"))
    wins = [judgement(row[key]) for key in ("winner_model_a", "winner_model_b")]
    if None in wins or all(wins):
        raise ValueError("winner_model_a and winner_model_b must be 0 or 1, and not both 1")
    winner = "model_a" if wins[0] else "model_b" if wins[1] else "tie"
    if any(len(texts) != len(asked) for texts in answers):
        raise ValueError("prompt, response_a and response_b must have the same number of turns")
    rounds = [[one for both in zip(asked, texts, strict=True) for one in both] for texts in answers]
    first, second = ([{"role": ROUND[i % 2], "content": text} for i, text in enumerate(texts)] for texts in rounds)
    return _arena({"conversation_a": first, "conversation_b": second, "winner": winner})


ROUND = ("user", "assistant")


def _texts(value: Any) -> list[str]:
    if not isinstance(value, str) or not value.startswith("["):
        return [as_text(text) for text in (value if isinstance(value, list) else [value])]
    try:
        return [as_text(text) for text in parse_json(value)]
    except json.JSONDecodeError:
        raise ValueError("the turns of a side are text that begins with [ and is not JSON") from None


def _read_ranked(given: Any) -> Parsed:
    """An answer of Nectar: {"answer": "Hello", "model": "gpt-4", "rank": 1}"""
    if not isinstance(given, dict):
        raise ValueError(f"expected an answer with its rank, found {type(given).__name__}")
    answer = as_turns(None, ("assistant", as_text(given["answer"])))
    return {"messages": answer, "rank": _number(given["rank"])}, tuple({*given} - {"answer", "rank"})


def _nectar(row: dict[str, Any]) -> list[Pair]:
    """Pair the best answer with each lower-ranked one. The margin is the difference in rank."""
    best, *others = sorted(as_list(row, "answers", "answer"), key=lambda answer: answer["rank"])
    prompt = _asked(row["prompt"])
    gaps = [(other, other["rank"] - best["rank"]) for other in others]
    pairs = [Pair(prompt, best["messages"], other["messages"], gap) for other, gap in gaps if gap > 0]
    if not pairs:
        raise ValueError("no two answers have different ranks")
    return pairs


TIE = 1.5
"""AlpacaEval's metrics convert a `preference` of 0 to this value (alpaca_eval/metrics/helpers.py)."""


def judgement(value: Any) -> bool | None:
    """Parse true, false, 1 or 0, which are text in a CSV file; None for other values."""
    if isinstance(value, str):
        spellings = {"true": True, "false": False, "1": True, "1.0": True, "0": False, "0.0": False}
        return spellings.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def is_boolean(value: Any) -> bool:
    """Whether a judgement is true or false, and not a number."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in {"true", "false"})


def _kto(
    judged: str, conversation: Callable[[dict[str, Any]], tuple[Messages, Messages]]
) -> Callable[[dict[str, Any]], list[Pair]]:
    """Reader of rows with one answer each that is labelled good or bad.

    Args:
        judged: key of the label.
        conversation: returns the prompt and the answer.
    """

    def pairs(row: dict[str, Any]) -> list[Pair]:
        prompt, answer = conversation(row)
        good = judgement(row[judged])
        if good is None:
            raise ValueError(f"{judged} must be true or false, or 1 or 0, found {_shown(row[judged])}")
        return [Pair(prompt, answer, []) if good else Pair(prompt, [], answer)]

    return pairs


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, int | float) else type(value).__name__


def _completion(row: dict[str, Any]) -> tuple[Messages, Messages]:
    prompt = [*as_turns(row.get("system")), *as_conversation(row["prompt"], "user")]
    return prompt, as_conversation(row["completion"], "assistant")


def _last_turn(
    conversation: Callable[[dict[str, Any]], Messages],
) -> Callable[[dict[str, Any]], tuple[Messages, Messages]]:
    """Split a conversation before its last turn, which must be the assistant's and is what the label refers to."""

    def cut(row: dict[str, Any]) -> tuple[Messages, Messages]:
        *prompt, answer = conversation(row)
        if not prompt or answer["role"] != "assistant":
            raise ValueError("the conversation must end with an answer of the assistant, after a prompt")
        return prompt, [answer]

    return cut


def _after_system(row: dict[str, Any]) -> Messages:
    """The messages of a row, after the system prompt in a column of its own."""
    system, messages = instruction_of(row, "system"), openai(row)
    if system and messages[0]["role"] == "system":
        if messages[:1] != system:
            raise ValueError("`system` is not the system prompt that the messages begin with")
        return messages
    return [*system, *messages]


def _oasst_pairs(row: dict[str, Any]) -> list[Pair]:
    """Pair the best reply to each prompter turn with each lower-ranked reply. The margin is the difference in rank."""
    pairs = [
        Pair([oasst_turn(message) for message in thread], [oasst_turn(best)], [oasst_turn(reply)], float(margin))
        for thread, best, reply, margin in _ranked_replies(row)
    ]
    if not pairs:
        raise ValueError("the tree has no two replies of different rank to the same message")
    return pairs


def _ranked_replies(row: dict[str, Any]) -> Iterator[tuple[list[Any], Any, Any, float]]:
    """A message of a tree with those before it, its best reply, one ranked below it, and the difference in rank."""
    threads = [[row["prompt"]]]
    for thread in threads:
        found = replies(thread[-1])
        threads += [[*thread, reply] for reply in found]
        ranked = [reply for reply in found if reply.get("rank") is not None and reply["role"] == "assistant"]
        for reply in ranked[1:]:
            if (margin := reply["rank"] - ranked[0]["rank"]) > 0:
                yield thread, ranked[0], reply, margin


def _pair_layout(
    keys: str, pairs: Callable[[dict[str, Any]], list[Pair]], optional: str = "", **more: Any
) -> PairLayout:
    return PairLayout(frozenset(keys.split()), pairs, frozenset((keys + " " + optional).split()), **more)


def _messages_in(keys: str) -> dict[str, TurnReader]:
    return dict.fromkeys(keys.split(), read_message)


def _turns_in(keys: str) -> dict[str, TurnReader]:
    return dict.fromkeys(keys.split(), read_turn)


def _kto_forms() -> Iterator[PairLayout]:
    """TRL's columns, then LLaMA-Factory's: whole conversations, or Alpaca's columns, with a judgement."""
    more: dict[str, Any] = {"judged": "label", "judged_by_number": True}
    turns = _messages_in("prompt completion")
    yield _pair_layout("prompt completion label", _kto("label", _completion), "system", turns=turns, **more)
    for judged in ("label", "kto_tag"):
        more = {"judged": judged, "judged_by_number": judged == "kto_tag"}
        turns = _messages_in("messages")
        form = _pair_layout(f"messages {judged}", _kto(judged, _last_turn(openai)), turns=turns, **more)
        # first: more keys than the examples of `anthropic` and `bedrock`
        yield replace(
            form,
            keys=form.keys | {"system"},
            pairs=_kto(judged, _last_turn(_after_system)),
            used=form.used | {"system"},
            turns={**turns, "system": read_anthropic_instruction},
        )
        yield replace(form, keys=form.keys | {"schemaVersion"})
        yield form
        turns = _turns_in("conversations")
        yield _pair_layout(f"conversations {judged}", _kto(judged, _last_turn(sharegpt)), "system", turns=turns, **more)
    yield _pair_layout(
        "instruction output kto_tag",
        _kto("kto_tag", _last_turn(lambda row: alpaca(_with_rounds(row)))),
        "input system history",
        **more,
    )


def _kto_layout() -> PairLayout:
    first, *others = _kto_forms()
    return replace(first, variants=tuple(others))


PAIR_LAYOUTS: dict[str, PairLayout] = {
    "preference": _pair_layout(
        "prompt chosen rejected",
        _preference("prompt", "chosen", "rejected"),
        "system margin",
        turns=_messages_in("prompt chosen rejected"),
    ),
    "sharegpt": _pair_layout(
        "conversations chosen rejected",
        _sharegpt_pair,
        "system margin",
        turns=_turns_in("conversations chosen rejected"),
        variants=(
            _pair_layout(
                "messages chosen rejected",
                _preference("messages", "chosen", "rejected", ("margin",)),
                "margin",
                turns=_messages_in("messages chosen rejected"),
            ),
        ),
    ),
    "alpaca_dpo": _pair_layout(
        "instruction chosen rejected",
        _alpaca_pair,
        "input system history margin",
        turns=_messages_in("chosen rejected"),
    ),
    "transcripts": _pair_layout(
        "chosen rejected", _whole_conversations, "margin", turns=_messages_in("chosen rejected")
    ),
    "openai_dpo": PairLayout(
        keys=frozenset({"input", "preferred_output", "non_preferred_output"}),
        pairs=_preference("input.messages", "preferred_output", "non_preferred_output"),
        used=frozenset({"input.messages", "preferred_output", "non_preferred_output", "system", "margin"}),
        turns=_messages_in("input.messages preferred_output non_preferred_output"),
        tool_keys=tuple(f"input.{key}" for key in TOOL_KEYS) + TOOL_KEYS,
        flat=_flat_input,
    ),
    "gemini": _pair_layout(
        "contents completions",
        _gemini_pair,
        " ".join(GEMINI_SYSTEM),
        turns={**GEMINI_TURNS, "completions": read_completion},
    ),
    "alpaca_eval": _pair_layout("instruction output_1 output_2 preference", _alpaca_eval, "input system"),
    "kto": _kto_layout(),
    "oasst": PairLayout(
        frozenset({"message_tree_id", "prompt"}),
        _oasst_pairs,
        frozenset({"prompt"}),
        of_tree=lambda row: (one for thread, *both, _ in _ranked_replies(row) for one in (*thread, *both)),
    ),
}

PAIR_LAYOUTS |= {
    "orca_dpo": _pair_layout(
        "question chosen rejected",
        _texts_in("question chosen rejected", _preference("question", "chosen", "rejected")),
        "system margin",
        by_value=True,
        variants=(
            _pair_layout(
                "input chosen rejected",
                _texts_in("input chosen rejected", _preference("input", "chosen", "rejected")),
                "system margin",
                by_value=True,
            ),
        ),
    ),
    "arena": _pair_layout(
        "conversation_a conversation_b winner",
        _arena,
        "turn",
        turns=_messages_in("conversation_a conversation_b"),
        used_turns=_judged_turns,
        variants=(
            _pair_layout("prompt response_a response_b winner_model_a winner_model_b", _arena_columns, "winner_tie"),
        ),
    ),
    "helpsteer": _pair_layout(
        "context response1 response2 overall_preference",
        _texts_in(
            "response1 response2",
            _compared("context", ("response1", "response2"), "overall_preference", _number, scaled=True),
        ),
        turns=_messages_in("context"),
        variants=(
            _pair_layout(
                "prompt response_1 response_2 preference_strength",
                _texts_in(
                    "prompt response_1 response_2",
                    _compared("prompt", ("response_1", "response_2"), "preference_strength", _number, scaled=True),
                ),
            ),
        ),
    ),
    "nectar": _pair_layout(
        "prompt answers num_responses", _texts_in("prompt", _nectar), turns={"answers": _read_ranked}
    ),
    "pku_saferlhf": _pair_layout(
        "prompt response_0 response_1 better_response_id",
        _texts_in(
            "prompt response_0 response_1",
            _compared("prompt", ("response_0", "response_1"), "better_response_id", _first_if(False)),
        ),
    ),
    "shp": _pair_layout(
        "history human_ref_A human_ref_B labels",
        _texts_in(
            "history human_ref_A human_ref_B",
            _compared("history", ("human_ref_A", "human_ref_B"), "labels", _first_if(True)),
        ),
    ),
}

PAIR_FIELDS = {"prompt": True, "chosen": True, "rejected": True, "category": False, "tools": False}
"""Field of a `mapping` -> whether it is required."""


def mapped_pairs(mapping: Mapping[str, str]) -> PairLayout:
    columns = prompt, chosen, rejected = [mapping[name] for name in ("prompt", "chosen", "rejected")]
    more = {"system", "margin"} - set(mapping.values())  # a column that is mapped to a field is only that field
    return PairLayout(
        keys=frozenset(columns),
        pairs=_preference(prompt, chosen, rejected, more),
        used=frozenset(columns) | more | ({mapping["tools"]} if "tools" in mapping else set()),
        category=mapping.get("category", "category"),
        turns=dict.fromkeys(columns, read_message),
        tool_keys=(mapping["tools"],) if "tools" in mapping else (),
    )
