"""splits -> tokenized. Token ids and labels by a chat template, packed into rows, with a ledger of records and an audit of labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dagster_project.core.chat import IGNORE, Reasoning, has_field, is_text, pack
from dagster_project.core.context import StageContext, ValidationContext
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.messages import is_trained
from dagster_project.core.params import Section
from dagster_project.core.records import (
    CheckResult,
    Report,
    read_ledger,
    read_records,
    response_text,
    write_json,
    write_ledger,
    write_table,
)
from dagster_project.training.tokens import chat_templates, label_audit, mixture
from dagster_project.training.tokens.examples import ONE_PER_ANSWER, Example, RecordOutcome, Rules, TooLong, make

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, Any]

CHECK_DESCRIPTIONS = {
    "template_mismatch": "Every conversation fits the chat template.",
    "no_answer": "Every conversation has an answer to train on.",
    "too_long": "Every example fits into `max_length` tokens.",
    "labels": "Exactly the assistant content and its end-of-turn token are labeled.",
    "double_bos": "No example begins with two beginning-of-text tokens.",
}


@cache
def row_schema() -> pa.Schema:
    """One packed row."""
    import pyarrow as pa

    return pa.schema(
        [
            ("example_ids", pa.list_(pa.string())),  # the examples in the row, in order
            ("lengths", pa.list_(pa.int32())),  # tokens of each; they never attend to each other
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),  # -100 where ignored by the loss
            ("weights", pa.list_(pa.float32())),  # loss weight of each token
        ]
    )


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
    """What happens to a longer record: `drop`; `truncate` the end of its last answer; or `split` it, a conversation
    between turns and a plain text into windows."""
    packed_length: int | None = Field(default=None, ge=16)
    """Tokens of a packed row. null: `max_length`. Shorter rows mean more and smaller steps for the same tokens. An
    example that is longer gets its own row."""
    reasoning: Reasoning = "template"
    """Which traces (`reasoning_content`) become part of the text: those that the `template` writes by itself; all
    (`keep`), where a record whose trace the template leaves out does not fit it; none (`strip`); or only that of the
    `last` answer."""
    weigh: Literal["token", "example"] = "token"
    """What counts equally in the loss: every `token` (the usual choice), or every `example`, so that long answers do
    not outweigh short ones."""
    field_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """JSON field -> factor by which the tokens of its value count in the loss, for answers in which one word matters
    most. Fields of a truncated answer get no extra weight. A field that no answer of the training split contains is
    refused."""
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
    return produce(
        ctx.root, ctx.params("tokenized", Params), ctx.compute.seed, ctx.output_of("splits"), ctx.output_of("base_model"), out=ctx.out
    )


def produce(root: Path, params: Params, seed: int, splits: Path, base_model: Path, out: Path) -> Report:
    """Args:
    root: the project's folder, which the path of a template is relative to.
    seed: selects the rows that are repeated or left out, and the examples that the audit shows.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    if params.max_length > tokenizer.model_max_length:
        raise InputError(
            f"params.yaml: tokenized.max_length: {params.max_length} is more than the model's context of {tokenizer.model_max_length}",
            "lower it",
        )
    template = chat_templates.use(tokenizer, root, params.chat_template)
    records = {split: read_records(splits / split) for split in ("train", "validation")}
    if template is None and not all(is_text(record) for found in records.values() for record in found):
        raise InputError("data/base_model: it has no chat template", "name one in params.yaml: tokenized.chat_template, e.g. chatml")

    _check_field_weights(params, records["train"])
    rules = Rules(params.max_length, params.on_too_long, params.field_weights, params.weigh == "example", params.reasoning)
    results = {split: make(tokenizer, found, rules) for split, found in records.items()}
    copies = {split: [int(result.kept) for result in found] for split, found in results.items()}
    copies["train"], repeats = mixture.mix(records["train"], results["train"], params.balance, params.replay, seed)
    source_rows = {(line["source"], line["example_id"]): line["source_row"] for line in read_ledger(splits)}
    ledger = [
        {
            "source": record["source"],
            "source_row": source_rows.get((record["source"], record["example_id"])),
            "example_id": record["example_id"],
            "outcome": result.outcome,
            "why": "; ".join(filter(None, [result.why, f"{n} copies" if n > 1 else ""])),
        }
        for split in records
        for record, result, n in zip(records[split], results[split], copies[split], strict=True)
    ]
    write_ledger(out, ledger)
    categories = {record["example_id"]: record["category"] for found in records.values() for record in found if record["category"]}
    write_table(out / "categories.parquet", [{"example_id": i, "category": name} for i, name in categories.items()], category_schema())

    room = params.packed_length or params.max_length
    written = {"name": params.chat_template or "base_model", "sha256": sha256_of_text(template)} if template else None
    metrics: dict[str, Any] = {"template": written} if written else {}
    audit: dict[str, Any] = {**metrics, "splits": {}, "examples": []}
    for split in records:
        examples = _in_order(records[split], results[split], copies[split])
        lengths = [len(example.input_ids) for _, example in examples]
        layout = pack(lengths, room) if params.packing else [[i] for i in range(len(examples))]
        _write_rows(out / f"{split}.parquet", examples, layout)
        figures = label_audit.statistics(tokenizer, records[split], results[split])
        figures["fill_rate"] = round(sum(lengths) / sum(max(room, sum(lengths[i] for i in row)) for row in layout), 4) if layout else 0.0
        audit["splits"][split] = figures
        audit["examples"] += label_audit.sample(tokenizer, split, records[split], results[split], seed)
        metrics[split] = {
            "examples": len(examples),
            "rows": len(layout),
            "tokens": sum(lengths),
            "trained_tokens": sum(int((example.labels != IGNORE).sum()) for _, example in examples),
            **{name: figures[name] for name in ("trained_share", "end_of_turn_in_loss", "prefix_stable", "fill_rate")},
            **(repeats if split == "train" else {}),
        }
    write_json(out / "audit.json", audit)
    if template:
        (out / chat_templates.FILE).write_text(template, encoding="utf-8")

    everything = [result for found in results.values() for result in found]
    metrics |= _lost_tokens(everything)
    metrics |= _rendering(params, tokenizer, [record for found in records.values() for record in found], everything)
    dropped = Counter(result.outcome.removeprefix("dropped:") for result in everything if not result.kept)
    return Report(
        rows_in=len(everything),
        rows_out=len(everything) - sum(dropped.values()),
        dropped=dict(sorted(dropped.items())),
        metrics=metrics,
        checks=_checks(params, tokenizer, [record for found in records.values() for record in found], everything, ledger),
    )


def _check_field_weights(params: Params, train: Sequence[Record]) -> None:
    """Check that every field in `field_weights` occurs in the training answers.

    Raises:
        InputError: a field occurs in no answer.
    """
    if not params.field_weights or not train:
        return
    answers = [response_text(record["messages"]) for record in train]
    if missing := [name for name in params.field_weights if not any(has_field(answer, name) for answer in answers)]:
        raise InputError(
            f"params.yaml: tokenized.field_weights: no answer of the training split is a JSON object with the field {', '.join(missing)}",
            "remove tokenized.field_weights, or use fields that occur in your answers",
        )


def _in_order(records: Sequence[Record], results: Sequence[RecordOutcome], copies: Sequence[int]) -> list[tuple[str, Example]]:
    """(example_id, example) of every part and copy, ordered by content hash.

    So each row is a representative mixture of long and short answers, and copies of an example are not adjacent.
    """

    def sort_key(identity: str, part: int, copy: int) -> str:
        return hashlib.sha256(f"{identity}:{part}:{copy}".encode()).hexdigest() if part or copy else identity

    return [
        item
        for _, item in sorted(
            (
                (sort_key(record["example_id"], part, copy), (record["example_id"], example))
                for record, result, n in zip(records, results, copies, strict=True)
                for part, example in enumerate(result.examples)
                for copy in range(n)
            ),
            key=lambda keyed: keyed[0],
        )
    ]


def _write_rows(path: Path, examples: Sequence[tuple[str, Example]], layout: Sequence[Sequence[int]]) -> None:
    """Write packed rows to Parquet, column by column: as Python objects a large set would not fit into memory."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = [i for row in layout for i in row]
    lengths = np.array([len(examples[i][1].input_ids) for i in order], dtype=np.int32)
    by_example = np.cumsum([0, *(len(row) for row in layout)], dtype=np.int32)
    by_token = np.cumsum([0, *lengths], dtype=np.int32)[by_example]
    tokens = {
        name: np.concatenate([np.array([], dtype), *(getattr(examples[i][1], name) for i in order)], dtype=dtype)
        for name, dtype in (("input_ids", np.int32), ("labels", np.int32), ("weights", np.float32))
    }
    values = {"example_ids": [examples[i][0] for i in order], "lengths": lengths, **tokens}
    columns = [
        pa.ListArray.from_arrays(by_token if column.name in tokens else by_example, pa.array(values[column.name], column.type.value_type))
        for column in row_schema()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(columns, schema=row_schema()), path, compression="zstd", store_schema=True)


def _rendering(params: Params, tokenizer: Any, records: Sequence[Record], outcomes: Sequence[RecordOutcome]) -> dict[str, Any]:
    """How records with several answers and with traces were rendered; nothing where one rendering had all labels and there are no traces."""
    per_answer = [outcome for outcome in outcomes if ONE_PER_ANSWER in outcome.why]
    facts: dict[str, Any] = {}
    if per_answer:
        facts["one_example_per_answer"] = {"records": len(per_answer), "examples": sum(len(outcome.examples) for outcome in per_answer)}
    traces = [
        (record, outcome)
        for record, outcome in zip(records, outcomes, strict=True)
        if outcome.kept and any(message.get("reasoning_content") and is_trained(message) for message in record["messages"])
    ]
    if traces:
        written = [label_audit.count_traces(tokenizer, record, outcome) for record, outcome in traces]
        total = sum(bool(m.get("reasoning_content")) and is_trained(m) for record, _ in traces for m in record["messages"])
        facts["reasoning"] = {"policy": params.reasoning, "records": len(traces), "traces": total, "in_the_loss": sum(written)}
    return {"rendering": facts} if facts else {}


def _lost_tokens(results: Sequence[RecordOutcome]) -> dict[str, Any]:
    """Reason -> number of records that lose trained tokens, and of these tokens."""
    by_reason: dict[str, dict[str, int]] = {}
    for result in results:
        if result.lost:
            reason = by_reason.setdefault(result.outcome.removeprefix("dropped:").partition(":")[0], {"rows": 0, "trained_tokens": 0})
            reason["rows"] += 1
            reason["trained_tokens"] += result.lost
    return {"lost": dict(sorted(by_reason.items()))} if by_reason else {}


def _checks(
    params: Params, tokenizer: Any, records: Sequence[Record], results: Sequence[RecordOutcome], ledger: Sequence[dict[str, Any]]
) -> list[CheckResult]:
    """The results of CHECK_DESCRIPTIONS, in its order."""
    violations: dict[str, dict[int, str]] = {name: {} for name in CHECK_DESCRIPTIONS}
    for i, result in enumerate(results):
        kind = result.outcome.removeprefix("dropped:").partition(":")[0]
        name = "too_long" if kind in {"truncated", "split"} else kind
        if name in violations:
            violations[name][i] = result.outcome if name == "too_long" else result.why
        if any(label_audit.has_double_bos(tokenizer, example) for example in result.examples):
            violations["double_bos"][i] = "two beginning-of-text tokens"
    violations["labels"] = label_audit.find_wrong_labels(tokenizer, records, results)
    blocking = {"labels"} | ({"template_mismatch"} if params.on_mismatch == "fail" else set())
    resolved = {"template_mismatch", "no_answer", "too_long"} - blocking
    """Violations that are no longer in the output."""
    return [
        CheckResult(
            name,
            passed=name in resolved or not rows,
            severity="warn" if name in {"no_answer", "too_long"} else "error",
            blocking=name in blocking,
            count=len(rows),
            rows=[f"{ledger[i]['source']}:{ledger[i]['source_row']}" for i in list(rows)[:20]],
            note="; ".join(f"{n} {reason}" for reason, n in Counter(rows.values()).most_common(3)),
            dropped=sum(not results[i].kept for i in rows),
        )
        for name, rows in violations.items()
    ]
