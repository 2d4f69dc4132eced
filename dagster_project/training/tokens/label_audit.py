"""Whether labels stand where they must, found out anew from the ids that were made, and what the set looks like to the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dagster_project.core.chat import IGNORE, is_text, render
from dagster_project.core.errors import InputError
from dagster_project.training.tokens.examples import Example, Fate, spans
from dagster_project.training.tokens.mixture import draw_order

if TYPE_CHECKING:
    import numpy as np

FIRST = 3
"""Examples shown from the beginning of each split."""
OF_EACH_SOURCE = 2
"""Examples shown of each source, drawn by seed."""


def misplaced(tokenizer: Any, records: Sequence[dict[str, Any]], fates: Sequence[Fate]) -> dict[int, str]:
    """Index of a record -> what is wrong with its labels; empty when all is well.

    Nothing of how the labels were made is used: each unbroken run of labels is decoded and compared with what the record's assistant turns say,
    each followed by the end-of-turn token. All of them must be there, in order and nothing else; the last of a truncated record may be cut, and
    a split record may lack some. A template may add text of its own to the assistant's turns (an empty <think></think>, say): what it adds to
    a probe is expected in every turn.
    """
    runs = [
        (i, example.labels[a:b].tolist()) for i, fate in enumerate(fates) for example in fate.examples for a, b in spans(example.labels)
    ]
    found: dict[int, list[list[int]]] = defaultdict(list)
    for i, ids in runs:
        found[i].append(ids)
    said = defaultdict(list)
    for (i, _), text in zip(runs, decode(tokenizer, [ids for _, ids in runs]), strict=True):
        said[i].append(text)
    frames = _frames(tokenizer, [record for record, fate in zip(records, fates, strict=True) if fate.kept])
    wrong = {}
    for i, (record, fate) in enumerate(zip(records, fates, strict=True)):
        if not fate.kept:
            continue
        answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
        if any((example.labels == IGNORE).all() for example in fate.examples):
            wrong[i] = "an example has nothing to learn from"
        elif any(((example.labels != IGNORE) & (example.labels != example.input_ids)).any() for example in fate.examples):
            wrong[i] = "a label is another token than the one it stands at"
        elif is_text(record):
            text = decode(tokenizer, [[token for ids in found[i] for token in ids]])[0]
            if not _says(tokenizer, text, answers[0], [("", "")], fate.outcome == "truncated"):
                wrong[i] = f"labels say {_short(text)}"
        elif problem := _compare(tokenizer, said[i], answers, frames, fate.outcome):
            wrong[i] = problem
    return wrong


def decode(tokenizer: Any, many: Sequence[list[int]]) -> list[str]:
    """The text of each list of ids, special tokens and spaces as they stand."""
    return tokenizer.backend_tokenizer.decode_batch(list(many), skip_special_tokens=False)


def _compare(tokenizer: Any, said: Sequence[str], answers: Sequence[str], frames: list[tuple[str, str]], outcome: str) -> str:
    left = list(answers)
    for n, text in enumerate(said):
        cut = outcome == "truncated" and n == len(said) - 1
        while left and not _says(tokenizer, text, left[0], frames, cut):
            if not outcome.startswith("split"):
                return f"labels say {_short(text)}, the assistant {_short(left[0])}"
            left.pop(0)
        if not left:
            return f"labels say {_short(text)}, the assistant nothing of the kind"
        left.pop(0)
    return "" if not left or outcome.startswith("split") else f"the answer {_short(left[0])} is not learnt"


def _says(tokenizer: Any, text: str, answer: str, frames: list[tuple[str, str]], cut: bool) -> bool:
    """Whether a run of labels says the answer and the end-of-turn token. A tokenizer that cannot give a text back exactly (one that normalizes
    it) is held to what it gives back of the answer."""
    end = tokenizer.eos_token
    for before, after in frames:
        for words in (answer, answer.strip()):
            if text == before + words + after + end:
                return True
            if cut and text.endswith(end) and (before + words + after).startswith(text.removesuffix(end)):
                return True
    whole = [before + words + after + end for before, after in frames for words in (answer, answer.strip())]
    returned = decode(tokenizer, [tokenizer.encode(form, add_special_tokens=False) for form in whole])
    return any(text == form or (cut and form.startswith(text.removesuffix(end))) for form in returned)


def _frames(tokenizer: Any, records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the template writes before and after the assistant's words within its turn, first and later: ("", "") for most."""
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    found = []
    for messages in ([user, answer], [user, answer, user, answer]) if any(not is_text(record) for record in records) else ():
        try:
            turn = render(tokenizer, messages)[len(render(tokenizer, messages[:-1], add_generation_prompt=True)) :]
        except InputError:
            continue  # a template for single turns
        before, _, after = turn.partition(answer["content"])
        found.append((before, after.partition(tokenizer.eos_token)[0]))
    return list(dict.fromkeys(found))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}")


def begins_twice(tokenizer: Any, example: Example) -> bool:
    """Whether it begins with two beginning-of-text tokens: the template wrote one, and somebody another."""
    return (
        len(example.input_ids) > 1 and tokenizer.bos_token_id is not None and bool((example.input_ids[:2] == tokenizer.bos_token_id).all())
    )


def figures(tokenizer: Any, records: Sequence[dict[str, Any]], fates: Sequence[Fate]) -> dict[str, Any]:
    """Of a whole split, each example counted once however often it is repeated."""
    import numpy as np

    examples = [(record, example) for record, fate in zip(records, fates, strict=True) for example in fate.examples]
    lengths = [len(example.input_ids) for _, example in examples]
    trained = [int((example.labels != IGNORE).sum()) for _, example in examples]
    ends = sum(bool((example.labels[1:] == tokenizer.eos_token_id).any()) for _, example in examples)
    looked_at = [fate.stable for fate in fates if fate.kept and fate.stable is not None]
    groups = {
        name: {value: _group(lengths, trained, chosen) for value, chosen in sorted(_by(examples, name).items())}
        for name in ("category", "source")
    }
    total = sum(lengths)
    return {
        "examples": len(examples),
        "tokens": total,
        "trained_tokens": sum(trained),
        "trained_share": _share(sum(trained), total),
        "end_of_turn_in_loss": _share(ends, len(examples)),
        "double_bos": sum(begins_twice(tokenizer, example) for _, example in examples),
        "prefix_stable": _share(sum(looked_at), len(looked_at)),
        "padding_without_packing": _share(len(lengths) * max(lengths, default=0) - total, len(lengths) * max(lengths, default=0)),
        "lengths": histogram(np.array(lengths)),
        **groups,
    }


def _by(examples: Sequence[tuple[dict[str, Any], Example]], name: str) -> dict[str, list[int]]:
    found = defaultdict(list)
    for i, (record, _) in enumerate(examples):
        found[str(record[name] or "(none)")].append(i)
    return found


def _group(lengths: Sequence[int], trained: Sequence[int], chosen: Sequence[int]) -> dict[str, Any]:
    import numpy as np

    own = [lengths[i] for i in chosen]
    return {
        "examples": len(own),
        "tokens": sum(own),
        "trained_tokens": sum(trained[i] for i in chosen),
        "lengths": histogram(np.array(own)),
    }


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Examples by their tokens, in powers of two: {"33-64": 12} are those of 33 to 64 tokens."""
    import numpy as np

    if not len(lengths):
        return {}
    powers, n = np.unique(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    return {f"{2 ** (p - 1) + 1}-{2**p}" if p > 1 else f"1-{2**p}": count for p, count in zip(powers.tolist(), n.tolist(), strict=True)}


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def shown(tokenizer: Any, split: str, records: Sequence[dict[str, Any]], fates: Sequence[Fate], seed: int) -> Iterator[dict[str, Any]]:
    """The first examples and a sample of each source, each as text with its trained spans in ⟦ ⟧, as ids and as labels."""
    kept = [i for i, fate in enumerate(fates) if fate.kept]
    drawn = [kept[k] for k in draw_order([records[i]["example_id"] for i in kept], seed)]
    chosen = dict.fromkeys(kept[:FIRST], "first")
    for source in sorted({records[i]["source"] for i in kept}):
        for i in [i for i in drawn if records[i]["source"] == source][:OF_EACH_SOURCE]:
            chosen.setdefault(i, "sample")
    for i, why in chosen.items():
        for part, example in enumerate(fates[i].examples):
            yield {
                "split": split,
                "source": records[i]["source"],
                "example_id": records[i]["example_id"],
                "part": part,
                "why": why,
                "text": marked(tokenizer, example),
                "input_ids": example.input_ids.tolist(),
                "labels": example.labels.tolist(),
            }


def marked(tokenizer: Any, example: Example) -> str:
    """The decoded example, each trained span in ⟦ ⟧."""
    ids, text, at = example.input_ids.tolist(), "", 0
    for start, stop in spans(example.labels):
        before, span = decode(tokenizer, [ids[at:start], ids[start:stop]])
        text, at = f"{text}{before}⟦{span}⟧", stop
    return text + decode(tokenizer, [ids[at:]])[0]
