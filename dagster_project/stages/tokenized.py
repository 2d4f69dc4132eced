"""splits -> tokenized. Token ids and labels by the base model's chat template, packed into rows of context length."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dagster_project.chat import IGNORE, encode, loss_weights, pack
from dagster_project.errors import InputError
from dagster_project.params import Section
from dagster_project.records import CheckResult, Report, read_records, response_text, write_table

if TYPE_CHECKING:
    import pyarrow as pa

TRUTHS = {
    "too_long": "Every example fits into `max_length` tokens.",
    "template_mismatch": "Every example has tokens to learn from and ends with the end-of-turn token in its labels.",
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
            ("labels", pa.list_(pa.int32())),  # -100 where the loss does not count
            ("weights", pa.list_(pa.float32())),  # how much each token counts in the loss
        ]
    )


class Params(Section):
    max_length: int = Field(default=512, ge=16)
    """Tokens an example may have, prompt and response together. Longer examples are dropped and counted."""
    packed_length: int | None = Field(default=None, ge=16)
    """Tokens of a packed row; null means `max_length`. Shorter rows mean more and smaller steps for the same tokens. A longer example has a row of its own."""
    weigh: Literal["token", "example"] = "token"
    """What counts the same in the loss: every token (the usual), or every example, so that long answers do not drown short ones."""
    field_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """JSON field -> how many times as much the tokens of its value count. For answers in which one word is what matters."""
    packing: bool = True
    """Put several examples into one row. They stay isolated from each other."""


def run(params: Params, splits: Path, base_model: Path, out: Path) -> Report:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    if params.max_length > tokenizer.model_max_length:
        raise InputError(
            f"params.yaml: tokenized.max_length: {params.max_length} is more than the model's context of {tokenizer.model_max_length}",
            "lower it",
        )
    metrics: dict[str, Any] = {}
    rows_in = 0
    long: list[str] = []
    wrong: list[str] = []
    for split in ("train", "validation"):
        records = read_records(splits / split)
        rows_in += len(records)
        # by content hash, so that each row is a fair mixture: long replies and short labels learn in the same step
        encoded = [_example(tokenizer, record, params) for record in sorted(records, key=lambda record: record["example_id"])]
        long += [example["example_ids"][0] for example in encoded if len(example["input_ids"]) > params.max_length]
        fitting = [example for example in encoded if len(example["input_ids"]) <= params.max_length]
        wrong += [example["example_ids"][0] for example in fitting if tokenizer.eos_token_id not in example["labels"]]
        lengths = [len(example["input_ids"]) for example in fitting]
        layout = pack(lengths, params.packed_length or params.max_length) if params.packing else [[i] for i in range(len(fitting))]
        rows = [{column: [value for i in row for value in fitting[i][column]] for column in row_schema().names} for row in layout]
        write_table(out / f"{split}.parquet", rows, row_schema())
        metrics[split] = {
            "examples": len(fitting),
            "rows": len(rows),
            "tokens": sum(lengths),
            "trained_tokens": sum(label != IGNORE for example in fitting for label in example["labels"]),
        }
    return Report(
        rows_in=rows_in,
        rows_out=rows_in - len(long),
        dropped={"too_long": len(long)} if long else {},
        metrics=metrics,
        checks=[
            CheckResult(
                "too_long", passed=True, severity="warn", count=len(long), rows=long[:20], note=f"{len(long)} dropped" if long else ""
            ),
            CheckResult("template_mismatch", passed=not wrong, blocking=True, count=len(wrong), rows=wrong[:20]),
        ],
    )


def _example(tokenizer: Any, record: dict[str, Any], params: Params) -> dict[str, Any]:
    """One record as a row of its own, in the columns of `row_schema`."""
    ids, labels = encode(tokenizer, record["messages"])
    weights = loss_weights(tokenizer, labels, response_text(record["messages"]), params.field_weights, params.weigh == "example")
    return {"example_ids": [record["example_id"]], "lengths": [len(ids)], "input_ids": ids, "labels": labels, "weights": weights}
