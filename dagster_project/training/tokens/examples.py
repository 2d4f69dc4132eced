"""Records -> tokenized examples with labels. Records that are too long are dropped, truncated or split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from dagster_project.core.chat import (
    IGNORE,
    Pieces,
    Reasoning,
    encode_pieces,
    examples_of,
    is_text,
    loss_weights,
    with_reasoning,
)
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Message, is_trained

if TYPE_CHECKING:
    import numpy as np

TooLong = Literal["drop", "truncate", "split"]
Encoded = list[tuple[list[int], bool]]
"""Token ids of each piece of a text, and whether it is trained on."""
Said = list[tuple[str, str]]
"""The pieces of a text that are trained on, and the contents of their messages; "" and "" for plain text."""

CHUNK = 1024
"""Records tokenized in one call."""
LOOKED_AT = 20_000
"""Number of records whose whole text is tokenized for comparison; of a larger set every second, third, ... record."""


@dataclass(slots=True)
class Example:
    """A training example: a record or a part of one. Arrays have shape (seq,)."""

    input_ids: np.ndarray
    """int32."""
    labels: np.ndarray
    """int32, -100 for tokens that are not in the loss."""
    weights: np.ndarray
    """float32, weight of each token in the loss."""


@dataclass(slots=True)
class RecordOutcome:
    """Outcome of tokenizing a record, and its examples."""

    outcome: str
    """kept, truncated, split:N, or dropped:<reason>."""
    why: str = ""
    examples: list[Example] = field(default_factory=list)
    trained: int = 0
    """Tokens of the whole record that are trained on."""
    stable: bool | None = None
    """Whether the text tokenized as a whole has the same ids as its pieces; None if that was not checked."""

    @property
    def kept(self) -> bool:
        return bool(self.examples)


@dataclass(frozen=True)
class Rules:
    """How records become examples."""

    room: int
    """Maximum tokens of an example."""
    too_long: TooLong = "drop"
    field_weights: Mapping[str, float] = field(default_factory=dict)
    per_example: bool = False
    """Whether the weights of a record's tokens sum to 1."""
    reasoning: Reasoning = "template"


def step_of(records: int) -> int:
    """Of every which record of a split of this size the whole text is tokenized for comparison."""
    return -(-records // LOOKED_AT)


def make(
    tokenizer: Any, records: Sequence[dict[str, Any]], rules: Rules, first: int = 0, step: int = 1
) -> list[RecordOutcome]:
    """Tokenize records, in order. The tokenizer is called once per `CHUNK` records, which is faster than once per text.

    Args:
        first: number of the first record in its split.
        step: from `step_of`.
    """
    outcomes: list[RecordOutcome] = []
    for start in range(0, len(records), CHUNK):
        chunk = records[start : start + CHUNK]
        cuts = [_pieces_or_outcome(tokenizer, record, rules.reasoning) for record in chunk]
        texts = [(i, parts) for i, cut in enumerate(cuts, start) if not isinstance(cut, RecordOutcome) for parts in cut]
        encoded: dict[int, list[Encoded]] = defaultdict(list)
        answers: dict[int, list[list[str]]] = defaultdict(list)
        for (i, parts), ids in zip(texts, encode_pieces(tokenizer, [parts for _, parts in texts]), strict=True):
            encoded[i].append([(piece, trained) for piece, (_, trained) in zip(ids, parts, strict=True)])
            answers[i].append(_answers(parts))
        whole = _whole_texts(tokenizer, [(i, parts) for i, parts in texts if (first + i) % step == 0])
        for i, (record, cut) in enumerate(zip(chunk, cuts, strict=True), start):
            if isinstance(cut, RecordOutcome):
                outcomes.append(cut)
                continue
            outcome = _fit(tokenizer, record, encoded[i], answers[i], rules)
            outcome.trained = sum(len(ids) for example in encoded[i] for ids, trained in example if trained)
            if i in whole:
                outcome.stable = whole[i] == [[token for ids, _ in example for token in ids] for example in encoded[i]]
            outcomes.append(outcome)
    return outcomes


def _whole_texts(tokenizer: Any, texts: Sequence[tuple[int, Pieces]]) -> dict[int, list[list[int]]]:
    """Number of a record -> ids of each of its texts, tokenized as a whole."""
    joined = [[("".join(text for text, _ in parts), True)] for _, parts in texts]
    whole: dict[int, list[list[int]]] = defaultdict(list)
    for (i, _), ids in zip(texts, encode_pieces(tokenizer, joined), strict=True):
        whole[i].append(ids[0])
    return whole


def _pieces_or_outcome(tokenizer: Any, record: Mapping[str, Any], reasoning: Reasoning) -> list[Pieces] | RecordOutcome:
    roles = [message["role"] for message in record["messages"]]
    if "assistant" not in roles:
        return RecordOutcome("dropped:no_answer", f"turns: {', '.join(roles) or 'none'}")
    if not any(is_trained(message) for message in record["messages"]):
        return RecordOutcome("dropped:no_answer", "every answer has weight 0")
    try:
        return examples_of(tokenizer, record, reasoning)
    except InputError as error:
        return RecordOutcome("dropped:template_mismatch", error.what)


ONE_PER_ANSWER = "one per answer, because the template rewrites earlier turns"


def _answers(parts: Pieces) -> list[str]:
    return [text for text, trained in parts if trained]


def _fit(
    tokenizer: Any, record: Mapping[str, Any], encoded: Sequence[Encoded], answers: Sequence[list[str]], rules: Rules
) -> RecordOutcome:
    """Examples of a record that fit into `rules.room`.

    Args:
        answers: the pieces of each example that are trained on.
    """
    if len(encoded) > 1:
        return _fit_turns(tokenizer, record, encoded, answers, rules)
    length = _length(encoded[0])
    text, trained = is_text(record), _trained(record)
    said = [("", "")] if text else _said(answers[0], trained)
    after = next(i for i, message in enumerate(reversed(record["messages"])) if message["role"] == "assistant")
    if length <= rules.room:
        why = f"{after} turns after the last answer left out" if after else ""
        return RecordOutcome("kept", why, [_example(tokenizer, encoded[0], said, rules)])
    why = f"{length} tokens, room for {rules.room}"
    if rules.too_long == "truncate":
        least = 1 if text else _least(tokenizer, answers[0][-1], trained[-1])
        if shorter := truncate(tokenizer, encoded[0], rules.room, least):
            return RecordOutcome("truncated", why, [_example(tokenizer, shorter, said, rules)])
        reason = "the prompt leaves no room" if least == 1 else "traces and calls are not cut"
        return RecordOutcome("dropped:too_long", f"{why}; {reason}")
    if rules.too_long == "split":
        if text:
            parts = [(part, said) for part in windows(encoded[0], rules.room)]
        else:
            parts = split(tokenizer, record, rules)
        if parts:
            return RecordOutcome(f"split:{len(parts)}", why, [_example(tokenizer, *part, rules) for part in parts])
        return RecordOutcome("dropped:too_long", f"{why}; no answer fits together with its question")
    return RecordOutcome("dropped:too_long", why)


def _fit_turns(
    tokenizer: Any, record: Mapping[str, Any], encoded: Sequence[Encoded], answers: Sequence[list[str]], rules: Rules
) -> RecordOutcome:
    """Examples of a record with one example per trained answer. Together they have the weight of one example."""
    longest = max(map(_length, encoded))
    fitting = [
        (kept, [(answer, message["content"])])
        for example, (answer,), message in zip(encoded, answers, _trained(record), strict=True)
        if (kept := _shortened(tokenizer, example, answer, message, rules))
    ]
    why = f"{longest} tokens, room for {rules.room}"
    if not fitting or (rules.too_long == "drop" and longest > rules.room):
        return RecordOutcome("dropped:too_long", why)
    examples = [_example(tokenizer, *one, replace(rules, per_example=False)) for one in fitting]
    if rules.per_example and (total := sum(float(one.weights.sum()) for one in examples)):
        for one in examples:
            one.weights /= total
    how = f"{len(examples)} examples, {ONE_PER_ANSWER}"
    if longest <= rules.room:
        return RecordOutcome("kept", how, examples)
    outcome = "truncated" if rules.too_long == "truncate" else f"split:{len(examples)}"
    return RecordOutcome(outcome, f"{why}; {how}", examples)


def _shortened(tokenizer: Any, example: Encoded, answer: str, message: Message, rules: Rules) -> Encoded | None:
    """An example that fits; None if it does not, and is not or cannot be truncated."""
    if _length(example) <= rules.room:
        return example
    if rules.too_long != "truncate":
        return None
    return truncate(tokenizer, example, rules.room, _least(tokenizer, answer, message))


def _length(encoded: Encoded) -> int:
    return sum(len(ids) for ids, _ in encoded)


def _example(tokenizer: Any, encoded: Encoded, said: Said, rules: Rules) -> Example:
    import numpy as np

    labels = [label for ids, trained in encoded for label in (ids if trained else [IGNORE] * len(ids))]
    weights = loss_weights(tokenizer, encoded, said, rules.field_weights, rules.per_example)
    return Example(
        np.array([token for ids, _ in encoded for token in ids], dtype=np.int32),
        np.array(labels, dtype=np.int32),
        np.array(weights, dtype=np.float32),
    )


def _trained(record: Mapping[str, Any]) -> list[Message]:
    return [message for message in record["messages"] if is_trained(message)]


def _said(answers: Sequence[str], trained: Sequence[Message]) -> Said:
    return [(answer, message["content"]) for answer, message in zip(answers, trained, strict=True)]


def _least(tokenizer: Any, answer: str, message: Message) -> int:
    """Tokens of an answer that truncation keeps at least, up to the first one of its content; 0 if it is not cut.

    A model that learned from a part of a trace or call would end its turn inside one.

    Args:
        answer: the message with its end-of-turn token, as the template writes it.
    """
    trace, content = (message.get("reasoning_content") or "").strip(), message["content"].strip()
    if message.get("tool_calls") or (not content and trace in answer):
        return 0
    begin = answer.find(content, answer.find(trace) + len(trace) if trace in answer else 0)
    bounds = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return next(number for number, (_, stop) in enumerate(bounds, 1) if stop > begin)


def truncate(tokenizer: Any, encoded: Encoded, room: int, least: int = 1) -> Encoded | None:
    """Cut off the end of the last answer before its end-of-turn token.

    None if there is no room for its first `least` tokens, or if that is 0.

    Characters are not split: tokens of an incomplete character at the cut are removed too.

        prompt 4, answer [7, 8, 9, END], after it [0], room 7  ->  prompt 4, answer [7, 8, END]
    """
    last = max(i for i, (_, trained) in enumerate(encoded) if trained)
    *said, end = encoded[last][0]
    left = room - 1 - sum(len(ids) for ids, _ in encoded[:last])
    cut = said[: max(0, left)]
    for _ in range(3 if len(cut) < len(said) else 0):  # UTF-8 has at most four bytes a character
        if cut and tokenizer.decode(cut).endswith("\ufffd"):
            cut.pop()
    return [*encoded[:last], ([*cut, end], True)] if 0 < least <= len(cut) else None


def windows(encoded: Encoded, room: int) -> list[Encoded]:
    """Split a plain text into the fewest parts, of nearly equal length; only the last has the end-of-text token."""
    flat = [(token, trained) for ids, trained in encoded for token in ids]
    n = -(-len(flat) // room)
    bounds = [len(flat) * i // n for i in range(n + 1)]

    def runs(part: Sequence[tuple[int, bool]]) -> Encoded:
        return [([token for token, _ in run], trained) for trained, run in groupby(part, key=itemgetter(1))]

    return [runs(flat[a:b]) for a, b in pairwise(bounds)]


def split(tokenizer: Any, record: Mapping[str, Any], rules: Rules) -> list[tuple[Encoded, Said]]:
    """Split a conversation into parts that fit. Every answer is trained on once, in the part where it is new.

    An exchange is a user turn and everything up to the next one. A part has the system turn, as many new exchanges as
    fit, and before them as many earlier exchanges as still fit, as context. An exchange that does not fit by itself is
    left out.

        system, exchanges 1 2 3 4, room for the system turn and three
        -> system 1 2 3; system 2 3 4 with labels on 4 only

    Returns:
        For each part its pieces, and the answers in it that are trained on.
    """
    # before the cut: `last` is the last answer of the record, not of a part
    messages = with_reasoning(record["messages"], rules.reasoning)
    reasoning: Reasoning = "keep" if rules.reasoning == "keep" else "template"
    system = [message for message in messages[:1] if message["role"] == "system"]
    exchanges: list[list[Message]] = []
    for message in messages[len(system) :]:
        if not exchanges or (message["role"] == "user" and exchanges[-1][-1]["role"] == "assistant"):
            exchanges.append([])
        exchanges[-1].append(message)

    def encode(first: int, new: int, stop: int) -> tuple[Encoded, Said] | None:
        """Exchanges first to stop with labels from `new` on; None if too long, without labels, or refused."""
        turns = [*system, *(m for exchange in exchanges[first:stop] for m in exchange)]
        part = {"messages": turns, "tools": record.get("tools"), "meta": None}
        cut = _pieces_or_outcome(tokenizer, part, reasoning)
        if isinstance(cut, RecordOutcome) or len(cut) > 1:
            return None
        ids = encode_pieces(tokenizer, cut)[0]
        context = sum(is_trained(message) for exchange in exchanges[first:new] for message in exchange)
        answers, encoded = 0, []
        for piece, (_, trained) in zip(ids, cut[0], strict=True):
            answers += trained
            encoded.append((piece, trained and answers > context))
        if sum(map(len, ids)) > rules.room or answers <= context:
            return None
        return encoded, _said(_answers(cut[0]), _trained(part))[context:]

    parts: list[tuple[Encoded, Said]] = []
    new = 0
    while new < len(exchanges):
        stop, best = new, None
        while stop < len(exchanges) and (longer := encode(new, new, stop + 1)):
            stop, best = stop + 1, longer
        if best is None:
            new += 1
            continue
        first = new
        while first and (longer := encode(first - 1, new, stop)):
            first, best = first - 1, longer
        parts.append(best)
        new = stop
    return parts


def spans(labels: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each contiguous run of labels in the loss.

    [-100, 5, 6, -100, 7]  ->  (1, 3), (4, 5)
    """
    import numpy as np

    edges = np.flatnonzero(np.diff(labels != IGNORE, prepend=False, append=False)).tolist()
    return zip(edges[::2], edges[1::2], strict=True)
