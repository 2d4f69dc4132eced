"""splits -> tokenized.

Token ids and labels by a chat template, packed into rows, with a ledger of records and an audit of labels.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dagster_project.core import workers
from dagster_project.core.chat import Reasoning, has_field, is_text
from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file, sha256_of_text
from dagster_project.core.imports import import_transformers, lean_imports
from dagster_project.core.messages import is_trained
from dagster_project.core.params import Section
from dagster_project.core.records import (
    CheckResult,
    Report,
    iter_ledger,
    iter_records,
    write_json,
    write_ledger,
    write_table,
)
from dagster_project.core.strings import StringIndex, Strings
from dagster_project.training.tokens import chat_templates, label_audit, mixture
from dagster_project.training.tokens.blocks import Setup, Shard, tokenize_shard
from dagster_project.training.tokens.examples import ONE_PER_ANSWER, Rules, TooLong, step_of
from dagster_project.training.tokens.packed_file import layout, write_packed
from dagster_project.training.tokens.portable import PortableTokenizer
from dagster_project.training.tokens.tokenized_split import TokenizedSplit, in_order

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 20
"""Rows that a check names."""
TOKENIZED = ("train", "validation")
"""The splits that are tokenized."""

CHECK_DESCRIPTIONS = {
    "template_mismatch": "Every conversation fits the chat template.",
    "no_answer": "Every conversation has an answer to train on.",
    "too_long": "Every example fits into `max_length` tokens.",
    "labels": "Exactly the assistant content and its end-of-turn token are labeled.",
    "double_bos": "No example begins with two beginning-of-text tokens.",
    "trained_tokens": (
        "The training split has tokens that the loss counts, and no other split lost all of its rows here."
    ),
}

ROW_CHECKS = tuple(name for name in CHECK_DESCRIPTIONS if name != "trained_tokens")
"""The checks that count records."""


@cache
def row_schema() -> pa.Schema:
    """One packed row."""
    import pyarrow as pa

    fields = [
        ("example_ids", pa.list_(pa.string())),  # the examples in the row, in order
        ("lengths", pa.list_(pa.int32())),  # tokens of each; they never attend to each other
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),  # -100 where ignored by the loss
        ("weights", pa.list_(pa.float32())),  # loss weight of each token
    ]
    return pa.schema(fields)


@cache
def category_schema() -> pa.Schema:
    """The category of each example that has one, for classifiers."""
    import pyarrow as pa

    return pa.schema([("example_id", pa.string()), ("category", pa.string())])


class Params(Section):
    """How conversations become tokens, labels and packed rows. See docs/tokenized.md."""

    chat_template: str | None = None
    """`alpaca`, `chatml`, `hermes` (ChatML with tools, calls, results and traces), or the path of a Jinja file in
    data/templates/. null: the base model's own template."""
    on_mismatch: Literal["fail", "drop"] = "fail"
    """What happens when a conversation does not fit the template: `fail` stops the stage, `drop` drops the conversation
    and counts it."""
    max_length: int = Field(default=512, ge=16)
    """Tokens that an example may have, prompt and response together."""
    on_too_long: TooLong = "drop"
    """What happens to a longer record: `drop`; `truncate` the end of its last answer, but neither a trace nor calls; or
    `split` it, a conversation between turns and a plain text into windows."""
    packed_length: int | None = Field(default=None, ge=16)
    """Tokens of a packed row. null: `max_length`. Shorter rows mean more and smaller steps for the same tokens. An
    example that is longer gets its own row."""
    reasoning: Reasoning = "template"
    """Which traces (`reasoning_content`) become part of the text: those that the `template` writes by itself; all
    (`keep`), where a record whose trace the template leaves out does not fit it; none (`strip`); or only that of the
    `last` answer. Evaluation does not read this: it asks for a trace where the test answer has one, and perplexity
    covers the traces that the template writes."""
    weigh: Literal["token", "example"] = "token"
    """What counts equally in the loss: every `token` (the usual choice), or every `example`, so that long answers do
    not outweigh short ones."""
    field_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """JSON field -> factor by which the tokens of its value count in the loss, for answers in which one word matters
    most. A list or an object cannot be weighted: name the fields inside it. Fields of a truncated answer get no extra
    weight. A field is refused if no answer of the training split has it with a text, a number, true, false or null."""
    packing: bool = True
    """Put several examples into one row. Attention never crosses from one example to another."""
    balance: mixture.Balance = "none"
    """Repeat train rows of rare categories: `category`, until each category has as many rows as the largest; `sqrt`,
    until the geometric mean of both counts."""
    replay: mixture.Replay | None = None
    """General data mixed into the training split to reduce forgetting. null: none."""


def validate(params: Params, ctx: ValidationContext) -> None:
    chat_templates.locate(ctx.root, params.chat_template)


def run(ctx: StageContext) -> Report:
    params, splits, base_model = ctx.params("tokenized", Params), ctx.output_of("splits"), ctx.output_of("base_model")
    return produce(ctx.root, params, ctx.compute.seed, splits, base_model, out=ctx.out)


def produce(root: Path, params: Params, seed: int, splits: Path, base_model: Path, out: Path) -> Report:
    """Tokenize, pack and audit the splits.

    Args:
        root: the project's folder, which the path of a template is relative to.
        seed: selects the rows that are repeated or left out, and the examples that the audit shows.
    """
    with lean_imports():  # loading it imports the module of its kind
        import_transformers()
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    if params.max_length > tokenizer.model_max_length:
        problem = f"{params.max_length} is more than the model's context of {tokenizer.model_max_length}"
        raise InputError(f"params.yaml: tokenized.max_length: {problem}", "lower it")
    template = chat_templates.use(tokenizer, root, params.chat_template)
    if template is None and not all(is_text(record) for split in TOKENIZED for record in iter_records(splits / split)):
        hint = "name one in params.yaml: tokenized.chat_template, e.g. chatml"
        raise InputError("data/base_model: it has no chat template", hint)
    _check_field_weights(params, splits / "train")

    found = _tokenize(params, PortableTokenizer(base_model, tokenizer), splits, scratch=out.parent)
    copies, repeats = _copies(params, found, seed)
    source_rows = _source_rows(found, splits)
    write_ledger(out, _ledger(found, copies, source_rows), repaired=False)
    write_table(out / "categories.parquet", _categories(found), category_schema())

    room = params.packed_length or params.max_length
    metrics: dict[str, Any] = {}
    if template:
        metrics["template"] = {"name": params.chat_template or "base_model", "sha256": sha256_of_text(template)}
    audit: dict[str, Any] = dict(metrics)
    vocabulary = base_model / "tokenizer.json"
    if vocabulary.is_file():
        audit["tokenizer"] = sha256_of_file(vocabulary)
    audit |= {"splits": {}, "examples": []}
    for split, tokens in found.items():
        examples, owners = in_order(tokens, copies[split])
        rows = layout(tokens, examples, room if params.packing else None)
        path, order = out / f"{split}.parquet", rows.order
        write_packed(path, row_schema(), tokens, examples[order], owners[order], rows.sizes, scratch=out.parent)
        figures = label_audit.statistics(tokens)
        figures["fill_rate"] = rows.fill_rate(room)
        audit["splits"][split] = figures
        audit["examples"] += label_audit.sample(split, tokens, seed)
        metrics[split] = {
            "examples": len(examples),
            "rows": len(rows.sizes),
            "tokens": sum(tokens.lengths[k] for k in examples),
            "trained_tokens": sum(tokens.labeled[k] for k in examples),
            **{name: figures[name] for name in ("trained_share", "end_of_turn_in_loss", "prefix_stable", "fill_rate")},
            **(repeats if split == "train" else {}),
        }
    write_json(out / "audit.json", audit)
    if template:
        (out / chat_templates.FILE).write_text(template, encoding="utf-8")

    metrics |= _lost_tokens(found)
    metrics |= _rendering(params, found)
    dropped: Counter[str] = Counter()
    for tokens in found.values():
        counted = zip(tokens.outcomes, tokens.counts, strict=True)
        dropped.update(outcome.removeprefix("dropped:") for outcome, count in counted if not count)
    records = sum(map(len, found.values()))
    return Report(
        rows_in=records,
        rows_out=records - sum(dropped.values()),
        dropped=dict(sorted(dropped.items())),
        metrics=metrics,
        checks=[*_checks(params, found, source_rows), _trained_tokens(found)],
    )


Splits = Mapping[str, TokenizedSplit]
"""Split -> its records and examples."""


def _tokenize(params: Params, tokenizer: PortableTokenizer, splits: Path, scratch: Path) -> Splits:
    """Tokenize all shards with the stage's workers.

    Args:
        scratch: folder of scratch files.
    """
    import pyarrow.parquet as pq

    by_example = params.weigh == "example"
    rules = Rules(params.max_length, params.on_too_long, params.field_weights, by_example, params.reasoning)
    paths = {split: sorted((splits / split).glob("records-*.parquet")) for split in TOKENIZED}

    def shards() -> Iterator[Shard]:
        for split, files in paths.items():
            rows = [pq.read_metadata(path).num_rows for path in files]
            for n, path in enumerate(files):
                yield Shard(split, sum(rows[:n]), step_of(sum(rows)), path.read_bytes())

    found = {split: TokenizedSplit(scratch) for split in TOKENIZED}
    for split, records in workers.current().map(tokenize_shard, Setup(tokenizer, rules), shards()):
        found[split].extend(records)
    return found


def _copies(params: Params, found: Splits, seed: int) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Copies of each record of each split, and facts for the report.

    Records that replay does not need are left out of train.
    """
    train = found["train"]
    columns = zip(train.ids, train.sources, train.categories, map(train.size, range(len(train))), strict=True)
    copies = {split: [int(count > 0) for count in tokens.counts] for split, tokens in found.items()}
    copies["train"], repeats = mixture.mix((mixture.Row(*row) for row in columns), params.balance, params.replay, seed)
    for i, n in enumerate(copies["train"]):
        if not n and train.kept(i):
            train.leave_out(i, "dropped:replay", "not needed for the share of replay")
    return copies, repeats


def _source_rows(found: Splits, splits: Path) -> dict[str, list[int | None]]:
    """Split -> row of each record in its source file; None for a record that the ledger of `splits` does not have.

    Equal records of a source are in one split, in the order of their lines in the ledger.
    """
    import numpy as np

    rows = array("q")

    def keys() -> Iterator[str]:
        for line in iter_ledger(splits):
            if not (line["outcome"] or "").startswith("dropped:"):
                rows.append(line["source_row"])
                yield f"{line['source']}\0{line['example_id']}"

    index = StringIndex(keys())
    row_of: list[int | None] = [*np.array(rows)[np.argsort(index.numbers, kind="stable")].tolist(), None]
    # place in `row_of` of the first record of each key
    starts = np.searchsorted(np.sort(index.numbers), np.arange(len(index) + 1))
    following = starts.copy()
    result: dict[str, list[int | None]] = {split: [] for split in found}
    for split, tokens in found.items():
        names = Strings(f"{source}\0{name}" for source, name in zip(tokens.sources, tokens.ids, strict=True))
        for number in index.find(names).tolist():
            result[split].append(row_of[following[number] if number >= 0 else -1])
            if number >= 0 and following[number] + 1 < starts[number + 1]:
                following[number] += 1
    return result


def _ledger(
    found: Splits, copies: Mapping[str, Sequence[int]], source_rows: Mapping[str, Sequence[int | None]]
) -> Iterator[dict[str, Any]]:
    for split, tokens in found.items():
        columns = (tokens.sources, source_rows[split], tokens.ids, tokens.outcomes, tokens.whys, copies[split])
        for source, row, name, outcome, why, n in zip(*columns, strict=True):
            why = "; ".join(filter(None, [why, f"{n} copies" if n > 1 else ""]))
            yield {"source": source, "source_row": row, "example_id": name, "outcome": outcome, "why": why}


def _categories(found: Splits) -> Iterator[dict[str, Any]]:
    """The category of each example that has one, by id: that of the last record with the id."""
    ids = Strings()
    values: list[str] = []
    for tokens in found.values():
        values += filter(None, tokens.categories)
        ids.extend(name for name, category in zip(tokens.ids, tokens.categories, strict=True) if category)
    index = StringIndex(ids)
    last = dict(zip(index.numbers.tolist(), values, strict=True))
    for number, first in enumerate(index.first.tolist()):
        yield {"example_id": ids[first], "category": last[number]}


def _check_field_weights(params: Params, train: Path) -> None:
    """Check that every field in `field_weights` has a value that can be weighted in some of the training answers, which
    are read until all are found.

    Raises:
        InputError: a field has none.
    """
    missing, records = dict.fromkeys(params.field_weights), 0
    for record in iter_records(train) if missing else ():
        records += 1
        answers = [message["content"] for message in record["messages"] if is_trained(message)]
        missing = {name: None for name in missing if not any(has_field(answer, name) for answer in answers)}
        if not missing:
            return
    if missing and records:
        problem = f"in no answer of the training split, as a JSON object, is the value of {', '.join(missing)}"
        problem += " a text, a number, true, false or null"
        hint = "remove tokenized.field_weights, or use fields that occur in your answers"
        raise InputError(f"params.yaml: tokenized.field_weights: {problem}", hint)


def _rendering(params: Params, found: Splits) -> dict[str, Any]:
    """How records with several answers and with traces were rendered.

    Nothing where one rendering had all labels and there are no traces.
    """
    facts: dict[str, Any] = {}
    per_answer: list[int] = []
    for tokens in found.values():
        counted = zip(tokens.whys, tokens.counts, strict=True)
        per_answer += [count for why, count in counted if ONE_PER_ANSWER in why]
    if per_answer:
        facts["one_example_per_answer"] = {"records": len(per_answer), "examples": sum(per_answer)}
    traces = [counts for tokens in found.values() for i, counts in tokens.traces.items() if tokens.kept(i)]
    if traces:
        total, written = (sum(column) for column in zip(*traces, strict=True))
        counts = {"records": len(traces), "traces": total, "in_the_loss": written}
        facts["reasoning"] = {"policy": params.reasoning, **counts}
    return {"rendering": facts} if facts else {}


def _lost_tokens(found: Splits) -> dict[str, Any]:
    """Reason -> number of records that lose trained tokens, and of these tokens."""
    by_reason: dict[str, dict[str, int]] = {}
    for tokens in found.values():
        for i, outcome in enumerate(tokens.outcomes):
            if lost := tokens.lost(i):
                of_reason = by_reason.setdefault(_reason(outcome), {"rows": 0, "trained_tokens": 0})
                of_reason["rows"] += 1
                of_reason["trained_tokens"] += lost
    return {"lost": dict(sorted(by_reason.items()))} if by_reason else {}


def _reason(outcome: str) -> str:
    """Why a record was dropped or changed, by its outcome in the ledger."""
    return outcome.removeprefix("dropped:").partition(":")[0]


def _violations(tokens: TokenizedSplit) -> Iterator[tuple[str, int, str]]:
    """Check, record and reason of everything that the checks count, in the order of the records."""
    for i, outcome in enumerate(tokens.outcomes):
        reason = _reason(outcome)
        name = "too_long" if reason in {"truncated", "split"} else reason
        if name in ROW_CHECKS:
            yield name, i, outcome if name == "too_long" else tokens.whys[i]
        if any(tokens.double_bos[k] for k in tokens.of(i)):
            yield "double_bos", i, "two beginning-of-text tokens"
        if i in tokens.wrong and tokens.kept(i):
            yield "labels", i, tokens.wrong[i]


def _checks(params: Params, found: Splits, source_rows: Mapping[str, Sequence[int | None]]) -> list[CheckResult]:
    """The results of ROW_CHECKS, in its order."""
    reasons: dict[str, Counter[str]] = {name: Counter() for name in ROW_CHECKS}
    rows: dict[str, list[str]] = {name: [] for name in ROW_CHECKS}
    dropped: Counter[str] = Counter()
    for split, tokens in found.items():
        for name, i, reason in _violations(tokens):
            reasons[name][reason] += 1
            dropped[name] += not tokens.kept(i)
            if len(rows[name]) < SHOWN:
                rows[name].append(f"{tokens.sources[i]}:{source_rows[split][i]}")
    blocking = {"labels"} | ({"template_mismatch"} if params.on_mismatch == "fail" else set())
    resolved = {"template_mismatch", "no_answer", "too_long"} - blocking  # these are no longer in the output
    checks: list[CheckResult] = []
    for name, counted in reasons.items():
        check = CheckResult(
            name,
            passed=name in resolved or not counted,
            severity="warn" if name in {"no_answer", "too_long"} else "error",
            blocking=name in blocking,
            count=counted.total(),
            rows=rows[name],
            note="; ".join(f"{n} {reason}" for reason, n in counted.most_common(3)),
            dropped=dropped[name],
        )
        checks.append(check)
    return checks


def _trained_tokens(found: Splits) -> CheckResult:
    """Blocks if nothing would be trained on. An emptied validation split is a warning: its loss would be unknown."""
    labeled: dict[str, int] = {}
    for split, tokens in found.items():
        labeled[split] = sum(tokens.labeled[k] for i in range(len(tokens)) for k in tokens.of(i))
    lost = [split for split, tokens in found.items() if len(tokens) and not labeled[split]]
    warns = labeled["train"] > 0 and bool(lost)
    notes = [f"none of {len(found[split])} records of {split} has a token that the loss counts" for split in lost]
    if not len(found["train"]):
        notes.append("train has no records")
    if notes:
        look = "look at the template and the weights of messages"
        notes.append(f"see the reasons in the ledger; raise tokenized.max_length, or {look}")
    return CheckResult(
        "trained_tokens",
        passed=not notes,
        severity="warn" if warns else "error",
        blocking=not warns,
        count=len(lost),
        note="; ".join(notes),
    )
