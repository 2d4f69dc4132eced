"""Independent check of labels against the records, and statistics and samples of the tokenized set."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from dagster_project.core.chat import IGNORE, is_text, trimmed
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_example
from dagster_project.core.messages import Message, argument_texts, calls, is_trained
from dagster_project.core.rendering import end_tokens, python_spellings, render
from dagster_project.training.tokens.examples import ONE_PER_ANSWER, Example, RecordOutcome, spans
from dagster_project.training.tokens.mixture import draw_number

if TYPE_CHECKING:
    import numpy as np

    from dagster_project.training.tokens.tokenized_split import TokenizedSplit

FIRST = 3
"""Number of first examples of each split in the sample."""
OF_EACH_SOURCE = 2
"""Number of random examples of each source in the sample."""


class TurnMarkup(NamedTuple):
    """Text around the content of an answer in its labels."""

    frames: list[tuple[str, str]]
    """Texts before and after it."""
    ends: list[str]
    """End-of-turn tokens."""


def find_wrong_labels(
    tokenizer: Any, records: Sequence[dict[str, Any]], results: Sequence[RecordOutcome]
) -> dict[int, str]:
    """Find records with wrong labels, independently of the code that created the labels.

    Each contiguous run of labels is decoded and compared with the record's assistant turns, each followed by the
    end-of-turn token. All turns must be present, in order, with nothing else; the last turn of a truncated record may
    be cut, and a split record may lack turns. A truncated record with an example for each answer may have both in any
    turn. Text that a template adds to assistant turns (e.g. an empty <think></think>) is determined from probes and
    expected in every turn.

    Returns:
        Index of a record -> problem.
    """
    found = [[ids for example in result.examples for ids in _runs(example)] for result in results]
    texts = iter(decode(tokenizer, [ids for runs in found for ids in runs]))
    said = [list(islice(texts, len(runs))) for runs in found]
    pairs = list(zip(records, results, strict=True))
    expected = TurnMarkup(
        _frames(tokenizer, [record for record, result in pairs if result.kept]), end_tokens(tokenizer)
    )
    plain = TurnMarkup([("", "")], [tokenizer.eos_token])
    openings: tuple[str, ...] | None = None
    wrong = {}
    for i, (record, result) in enumerate(pairs):
        if not result.kept:
            continue
        answers = [turn for turn in record["messages"] if turn["role"] == "assistant" and turn.get("weight") != 0]
        if any((example.labels == IGNORE).all() for example in result.examples):
            wrong[i] = "an example has no labels"
        elif any(map(_has_other_label, result.examples)):
            wrong[i] = "a label differs from the token at its position"
        elif is_text(record):
            text = decode(tokenizer, [[token for ids in found[i] for token in ids]])[0]
            if not _matches(tokenizer, text, answers[0]["content"], plain, result.outcome == "truncated"):
                wrong[i] = "labels contain another text than the record"
        elif problem := _compare(tokenizer, said[i], answers, expected, result):
            wrong[i] = problem
        elif any(message.get("tool_calls") or message.get("reasoning_content") for message in answers):
            openings = _openings(tokenizer) if openings is None else openings
            if not all(_starts_right(tokenizer, example, openings) for example in result.examples):
                wrong[i] = "labels do not begin where generation begins"
    return wrong


def _runs(example: Example) -> list[list[int]]:
    return [example.labels[start:stop].tolist() for start, stop in spans(example.labels)]


def _has_other_label(example: Example) -> bool:
    return bool(((example.labels != IGNORE) & (example.labels != example.input_ids)).any())


def decode(tokenizer: Any, many: Sequence[list[int]]) -> list[str]:
    """Text of each list of ids, with special tokens and unchanged spaces."""
    return tokenizer.backend_tokenizer.decode_batch(list(many), skip_special_tokens=False)


def _recoded(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Texts as the tokenizer decodes their encodings: in another spelling if it normalizes them, or adds spaces."""
    return decode(tokenizer, [tokenizer.encode(text, add_special_tokens=False) for text in texts])


def _compare(
    tokenizer: Any, said: Sequence[str], answers: Sequence[Message], expected: TurnMarkup, result: RecordOutcome
) -> str:
    left, truncated = list(answers), result.outcome == "truncated"
    per_answer = truncated and ONE_PER_ANSWER in result.why
    may_lack = per_answer or result.outcome.startswith("split")
    pending = list(said)
    while pending:
        text = pending.pop(0)
        cut = per_answer or (truncated and not pending)
        while left and not _is_answer(tokenizer, text, left[0], expected, cut):
            # the template writes nothing between two answers
            if rest := _rest_of_joined(tokenizer, text, left, expected):
                pending.insert(0, rest)
                break
            if not may_lack:
                return "labels contain another text than the assistant turn"
            left.pop(0)
        if not left:
            return "labels contain a text that no assistant turn has"
        left.pop(0)
    return "" if not left or may_lack else "an answer is not in the labels"


def _rest_of_joined(tokenizer: Any, text: str, left: Sequence[Message], expected: TurnMarkup) -> str:
    """What follows an answer in a run of labels that goes on with the next answer; "" for other runs."""
    ends = [text.find(end) + len(end) for end in expected.ends if end in text] if len(left) > 1 else []
    return next((text[end:] for end in ends if _is_answer(tokenizer, text[:end], left[0], expected, False)), "")


def _is_answer(tokenizer: Any, text: str, message: Message, expected: TurnMarkup, cut: bool) -> bool:
    """Whether a run of labels decodes to the message and its end-of-turn token."""
    if not message.get("tool_calls") and not message.get("reasoning_content"):
        return _matches(tokenizer, text, message["content"], expected, cut)
    if not text.endswith(tuple(expected.ends)):
        return False
    made = calls(message)
    if cut and not made:
        return True  # any part of its content may be kept; only its beginning and end are compared
    arguments = [str(value) for call in made for _, value in argument_texts(call.arguments)]
    words = [message["content"].strip(), *(call.name for call in made), *arguments]
    if all(_contains(text, word) for word in words):
        return True
    return all(_contains(text, word.strip()) for word in _recoded(tokenizer, words))


def _contains(text: str, word: str) -> bool:
    """Whether a text has a word as it is, or as JSON or Python writes it."""
    quoted = (json.dumps(word, ensure_ascii=False)[1:-1], json.dumps(word)[1:-1], *python_spellings(word))
    return word in text or any(spelled in text for spelled in quoted)


def _openings(tokenizer: Any) -> tuple[str, ...]:
    """Text of the template between a prompt and an answer, as it is and as its tokens decode.

    After a user turn and after a tool result.
    """
    user = {"role": "user", "content": "Why?"}
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {}}}
    result = {"role": "tool", "content": "x", "tool_call_id": "abcdefghi", "name": "f"}
    found = []
    prompts: list[list[Message]] = [[user], [user, {"role": "assistant", "content": "", "tool_calls": [call]}, result]]
    for prompt in prompts:
        for thinking in (None, True, False):
            try:
                before = render(tokenizer, prompt, thinking=thinking)
                header = render(tokenizer, prompt, add_generation_prompt=True, thinking=thinking)
            except InputError:
                continue  # a template without tools
            found.append(header.removeprefix(before) if header.startswith(before) else "")
    return tuple(dict.fromkeys([*found, *_recoded(tokenizer, found)]))


def _starts_right(tokenizer: Any, example: Example, openings: tuple[str, ...]) -> bool:
    """Whether every run of labels follows one of the openings."""
    ids = example.input_ids.tolist()
    before = decode(tokenizer, [ids[:start] for start, _ in spans(example.labels)])
    return all(text.endswith(openings) for text in before)


def count_traces(tokenizer: Any, record: Mapping[str, Any], outcome: RecordOutcome) -> int:
    """Number of a record's traces that are labeled in its examples."""
    labeled = [[token for token in example.labels.tolist() if token != IGNORE] for example in outcome.examples]
    text = "".join(decode(tokenizer, labeled))
    traced = [message for message in record["messages"] if message.get("reasoning_content") and is_trained(message)]
    return sum(message["reasoning_content"].strip() in text for message in traced)


def _matches(tokenizer: Any, text: str, answer: str, expected: TurnMarkup, cut: bool) -> bool:
    """Whether a run of labels decodes to the answer and the end-of-turn token.

    For tokenizers that normalize text, the decoded encoding of the answer counts as well.
    """
    end = next((token for token in expected.ends if text.endswith(token)), tokenizer.eos_token)
    shown = text.removesuffix(end) if cut and text.endswith(end) else None
    forms = [before + words + after for before, after in expected.frames for words in trimmed(answer)]
    if not answer.strip():  # GLM-4-MoE writes the line break after its empty trace with the answer
        forms += [form for before, after in expected.frames for form in trimmed(before + after)]
    if any(text == form + end or (shown is not None and form.startswith(shown)) for form in forms):
        return True
    returned = _recoded(tokenizer, [form + end for form in forms])
    return any(text == form or (shown is not None and form.startswith(shown)) for form in returned)


def _frames(tokenizer: Any, records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Text that the template adds before and after an assistant's content; ("", "") for most templates.

    In first and in later turns.
    """
    if all(map(is_text, records)):
        return []
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    found = []
    for messages in ([user, answer], [user, answer, user, answer]):
        for thinking in (None, False):
            try:
                header = render(tokenizer, messages[:-1], add_generation_prompt=True, thinking=thinking)
                whole = render(tokenizer, messages, thinking=thinking)
            except InputError:
                continue  # a template that supports only single turns
            if whole.startswith(header):
                before, _, after = whole[len(header) :].partition(answer["content"])
                end = min((after.find(token) for token in end_tokens(tokenizer) if token in after), default=len(after))
                found.append((before, after[:end]))
    return list(dict.fromkeys(found))


def has_double_bos(tokenizer: Any, example: Example) -> bool:
    """Whether an example begins with two beginning-of-text tokens, one of them from the template."""
    bos, ids = tokenizer.bos_token_id, example.input_ids
    return bos is not None and len(ids) > 1 and bool((ids[:2] == bos).all())


def statistics(found: TokenizedSplit) -> dict[str, Any]:
    """Statistics of a split. An example counts once, however often it is repeated."""
    import numpy as np

    examples, owners = found.examples(), found.owners()
    lengths, trained = np.array(found.lengths, np.int64)[examples], np.array(found.labeled, np.int64)[examples]
    ends, double_bos = (np.frombuffer(column, np.uint8)[examples] for column in (found.ends, found.double_bos))
    checked = [stable for i, stable in enumerate(found.stable) if found.kept(i) and stable in {0, 1}]
    total, padded = int(lengths.sum()), len(lengths) * int(lengths.max(initial=0))
    return {
        "examples": len(examples),
        "tokens": total,
        "trained_tokens": int(trained.sum()),
        "trained_share": _share(int(trained.sum()), total),
        "end_of_turn_in_loss": _share(int(ends.sum()), len(examples)),
        "double_bos": int(double_bos.sum()),
        "prefix_stable": _share(sum(checked), len(checked)),
        "padding_without_packing": _share(padded - total, padded),
        "lengths": histogram(lengths),
        "category": _by(found.categories, owners, lengths, trained),
        "source": _by(found.sources, owners, lengths, trained),
    }


def _by(values: Sequence[str | None], owners: np.ndarray, lengths: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    """Statistics of the examples of each value.

    Args:
        values: value of each record.
        owners: record of each example.
    """
    import numpy as np

    names = sorted({str(value or "(none)") for value in values})
    code = {name: k for k, name in enumerate(names)}
    codes = np.fromiter((code[str(value or "(none)")] for value in values), np.int64, len(values))[owners]
    order, groups = np.argsort(codes, kind="stable"), {}
    bounds = np.cumsum(np.bincount(codes, minlength=len(names)))
    for name, chosen in zip(names, np.split(order, bounds[:-1]), strict=True) if names else ():
        if len(chosen):
            own = lengths[chosen]
            groups[name] = {
                "examples": len(own),
                "tokens": int(own.sum()),
                "trained_tokens": int(trained[chosen].sum()),
                "lengths": histogram(own),
            }
    return groups


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Number of examples by length in tokens, in powers of two: {"33-64": 12} means 12 examples of 33 to 64 tokens."""
    import numpy as np

    if not len(lengths):
        return {}
    powers, n = np.unique(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    first = [2 ** (p - 1) + 1 if p > 1 else 1 for p in powers.tolist()]
    return {f"{a}-{2**p}": count for a, p, count in zip(first, powers.tolist(), n.tolist(), strict=True)}


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def sample(split: str, found: TokenizedSplit, seed: int) -> Iterator[dict[str, Any]]:
    """The first examples and a random sample of each source, by their place and the sha256 of their tokens.

    Views show their texts.
    """
    chosen: dict[int, str] = {}
    # source -> the records with the lowest random numbers
    drawn: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    for i, name in enumerate(found.ids):
        if not found.kept(i):
            continue
        if len(chosen) < FIRST:
            chosen[i] = "first"
        own = drawn[found.sources[i]]
        own.append((draw_number(name, seed), i))
        if len(own) > OF_EACH_SOURCE:
            own.remove(max(own))
    for source in sorted(drawn):
        for _, i in sorted(drawn[source]):
            chosen.setdefault(i, "sample")
    for i, why in chosen.items():
        for part, example in enumerate(found.read(found.of(i))):
            yield {
                "split": split,
                "source": found.sources[i],
                "example_id": found.ids[i],
                "part": part,
                "why": why,
                "sha256": sha256_of_example(example.input_ids.tolist(), example.labels.tolist()),
            }
