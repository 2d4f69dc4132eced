"""Expectations on a whole set, evaluated by Great Expectations.

The data owner's file lists them, the data-quality page shows the results.

A row check tests one row. An expectation tests whether the set is what its owner expects: how many rows, which
categories in which shares, how long the texts, from where. The suite file has Great Expectations' own JSON form, so
that its documentation applies. It is evaluated on `table`, which has figures about each kept row but no texts, so no
text can appear in a result or a page.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dagster_project.core import row_cache
from dagster_project.core.errors import InputError
from dagster_project.core.messages import calls, is_trained
from dagster_project.core.records import CheckResult, prompt_text, response_text
from dagster_project.core.stored_rows import Selected, StoredRows, decode
from dagster_project.curation.checks import data_docs
from dagster_project.curation.checks.gx_import import quick_import
from dagster_project.curation.checks.privacy import mask
from dagster_project.curation.checks.profile import count_words, scripts

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]
    import polars as pl

NAME = "expectations"
"""Of the check."""
TRUTH = "The set is what its owner expects it to be."

COLUMNS = {
    "source": "file the row came from",
    "category": "its category, or null",
    "script": (
        "the script that most letters of the prompt belong to (Latin, Han, ...), `other`, or `(none)` without letters"
    ),
    "turns": "answers of the assistant in it",
    "prompt": "a number that two rows share if and only if they have the same prompt",
    "prompt_words": "words of the user's messages; each Chinese or Japanese character is one",
    "response_words": "words of the last answer",
    "response_is_json": "whether the last answer is a JSON object or list",
    "trained_turns": "answers whose weight is not 0",
    "tools": "tools that may be called",
    "tool_calls": "calls of tools in it",
    "reasoning_words": "words of reasoning in all answers",
    "near_copy": "whether an earlier row has nearly the same prompt",
    "category_share": "share of all rows that have this row's category (null is one)",
    "source_share": "share of all rows that come from this row's source",
    "kept_share": "share of the rows read that were kept; the same in every row",
}
"""Columns of `table`, one row per kept record. Shares are of the whole set, so that a minimum or maximum can be
expected."""

SEVERITY: dict[str, Literal["error", "warn", "info"]] = {"critical": "error", "warning": "warn", "info": "info"}
"""Severity of Great Expectations -> severity of a check. A failed critical expectation blocks."""

_DECODE = json.JSONDecoder().raw_decode
_NOT_KWARGS = {"id", "meta", "notes", "description", "severity", "rendered_content", "windows", "batch_id"}
_NOT_KWARGS |= {"catch_exceptions", "result_format", "condition_parser"}
"""Fields of an expectation that are not supported in its `kwargs`; a condition given as text would be run as code."""
_GALLERY = "https://greatexpectations.io/expectations"


@dataclass(frozen=True)
class ExpectationResult:
    """One expectation and its result."""

    type: str
    """Its type, as named by Great Expectations."""
    words: str
    """The suite's `description`, else Great Expectations' own sentence."""
    passed: bool
    severity: Literal["error", "warn", "info"]
    """If it fails. From critical, warning, info."""
    observed: Any
    """Plain data: a number, a list of values, {quantile: value}, or {"unexpected", "of", "values"} for expectations on
    single rows."""
    seen: str
    """The same as text."""
    rows: list[int]
    """The first rows of the table that violate it, for expectations on single rows."""


@dataclass(frozen=True)
class Outcome:
    """Results of a suite. The same for the same table and suite."""

    suite: str
    rows: int
    expectations: list[ExpectationResult]
    """In the suite's order."""
    page: str
    """Data Docs' first page, relative to the given folder; empty without a folder."""
    foreign: tuple[str, ...] = ()
    """Signs that the suite was written for other data."""

    @property
    def failed(self) -> list[ExpectationResult]:
        return [one for one in self.expectations if not one.passed]


def check(outcome: Outcome, places: Mapping[int, str] | None = None) -> CheckResult:
    """The check of a stage: it counts failed expectations and blocks if one of them is critical.

    Args:
        places: row of the table -> "source:row", for the `ExpectationResult.rows`; None: violating rows are not named.
    """
    order = ("error", "warn", "info")
    failed = sorted(outcome.failed, key=lambda one: order.index(one.severity))
    worst = order[min((order.index(one.severity) for one in failed or outcome.expectations), default=1)]
    rows, count = dict.fromkeys(i for one in failed for i in one.rows), len(outcome.expectations)
    return CheckResult(
        name=NAME,
        passed=not failed,
        severity=worst,
        blocking=worst == "error",
        count=len(failed),
        rows=[places[i] for i in rows][:20] if places else [],
        details=[f"{one.words} Found: {one.seen}." for one in failed],
        note="; ".join([f"{count - len(failed)} of {count} expectations hold", *outcome.foreign]),
    )


def document(outcome: Outcome, places: Mapping[int, str]) -> dict[str, Any]:
    """expectations.json, from which the data-quality page is drawn.

    Args:
        places: as for `check`.
    """
    judged = [
        {"type": one.type, "words": one.words, "passed": one.passed, "severity": one.severity, "seen": one.seen,
         "places": [places[i] for i in one.rows]}
        for one in outcome.expectations
    ]  # fmt: skip
    return {"suite": outcome.suite, "rows": outcome.rows, "expectations": judged}


def table(
    records: Sequence[dict[str, Any]], clusters: Sequence[Any] | np.ndarray | None = None, read: int | None = None
) -> pd.DataFrame:
    """The table that expectations are evaluated on: `COLUMNS`, one row per kept record, in order.

    Args:
        records: the kept canonical records.
        clusters: for each record the key of its cluster of near-copies; `group_id` unless given.
        read: number of rows read, of which these were kept; the number of records unless given.
    """
    import numpy as np
    import pandas as pd

    stored = records if isinstance(records, StoredRows | Selected) else StoredRows(records)
    frame = _as_pandas(row_cache.facts(_measure_block, None, stored, ()))
    groups = pd.Series(clusters) if clusters is not None else frame["group_id"]
    source = pd.Categorical(frame["source"])
    names = {name: mask(name) for name in frame["category"].dropna().unique()}
    category = pd.Categorical(frame["category"].map(names))

    def share(of: pd.Categorical) -> Any:
        return np.bincount(of.codes + 1, minlength=1)[of.codes + 1] / max(1, len(records))

    return frame.assign(
        source=source,
        category=category,
        script=pd.Categorical(frame["script"]),
        prompt=pd.factorize(frame["prompt"])[0],
        near_copy=(groups.notna() & groups.duplicated()).to_numpy(dtype=bool),
        category_share=share(pd.Categorical(frame["category"])),
        source_share=share(source),
        kept_share=len(records) / max(1, read if read is not None else len(records)),
    )[list(COLUMNS)].astype({"response_is_json": bool})


def _measure_block(_: None, lines: Sequence[bytes]) -> pl.DataFrame:
    """The columns that depend on one record each; `prompt` is a digest, `OF_DATA` are JSON."""
    import polars as pl

    records = [decode(line) for line in lines]
    messages = [record["messages"] for record in records]
    prompts = [prompt_text(turns) for turns in messages]
    responses = [response_text(turns) for turns in messages]
    traces = ["\n".join(m.get("reasoning_content") or "" for m in turns) for turns in messages]
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in prompts]

    def numbers(values: Iterable[int]) -> pl.Series:
        return pl.Series(list(values), dtype=pl.Int64)

    texts = {key: pl.Series([json.dumps(record[key]) for record in records], dtype=pl.String) for key in OF_DATA}
    measured = {
        "script": pl.Series(scripts(prompts), dtype=pl.String),
        "turns": numbers([m["role"] for m in turns].count("assistant") for turns in messages),
        "prompt": pl.Series(digests, dtype=pl.Binary),
        "prompt_words": count_words(prompts),
        "response_words": count_words(responses),
        "response_is_json": pl.Series([_is_json(text) for text in responses], dtype=pl.Boolean),
        "trained_turns": numbers(sum(map(is_trained, turns)) for turns in messages),
        "tools": numbers(len(record.get("tools") or ()) for record in records),
        "tool_calls": numbers(sum(len(calls(m)) for m in turns) for turns in messages),
        "reasoning_words": count_words(traces),
    }
    return pl.DataFrame(texts | measured)


OF_DATA = ("source", "category", "group_id")
"""Columns with texts of the data."""


def _as_pandas(frame: pl.DataFrame) -> pd.DataFrame:
    """The same table with Python objects in columns that are not numbers."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for column in frame.iter_columns():
        if column.name in OF_DATA:
            texts = {text: json.loads(text) for text in column.unique().to_list()}
            columns[column.name] = pd.array([texts[text] for text in column.to_list()], dtype=object)
        else:
            objects = column.name in {"script", "prompt"}
            columns[column.name] = pd.array(column.to_list(), dtype=object) if objects else column.to_numpy()
    return pd.DataFrame(columns)


def _is_json(text: str) -> bool:
    text = text.strip()
    if text[:1] not in ("{", "["):
        return False
    try:
        return _DECODE(text)[1] == len(text)
    except (ValueError, RecursionError):
        return False


def run(frame: pd.DataFrame, suite_file: Path, docs_folder: Path | None = None, name: str = "") -> Outcome:
    """Evaluate a suite on a table.

    Args:
        frame: `table`'s. All rows are evaluated, without sampling: a million rows and twenty expectations take about a
            second.
        suite_file: a suite in Great Expectations' JSON form: {"name", "expectations": [{"type", "kwargs", "severity",
            "description"}]}.
        docs_folder: gets Great Expectations' own Data Docs; None for none.
        name: of the suite file in messages; its path unless given.
    Raises:
        InputError: lists everything in the suite that cannot be evaluated.
    """
    name = name or str(suite_file)
    with _silenced():
        suite, expectations = _load(suite_file, name, list(frame.columns))
        result = _validate(frame, suite)
        judged = _read_results(result, expectations, frame, name)
        if docs_folder is not None:
            words = {str(i): f"{one.words} ({expectations[i].severity.value})" for i, one in enumerate(judged)}
            data_docs.write(docs_folder, suite, result, words)
    page = data_docs.INDEX if docs_folder is not None else ""
    return Outcome(suite.name, len(frame), judged, page, _foreign(frame, expectations, name))


def _foreign(frame: pd.DataFrame, expectations: Sequence[Any], name: str) -> tuple[str, ...]:
    """One message if the suite names categories or sources that no row has."""
    found = []
    given = [one.configuration.kwargs for one in expectations]
    for column in ("category", "source"):
        sets = [_listed(kwargs.get("value_set")) for kwargs in given if kwargs.get("column") == column]
        named = {*chain.from_iterable(sets)}
        if named and not named & set(frame[column].dropna()):
            plural = "categories" if column == "category" else "sources"
            found.append(
                f"the suite names {len(named)} {plural} that no row has:"
                f" {name} was written for other data, edit it or leave out instructions.expectations"
            )
    return tuple(found)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppresses warnings, logs and progress bars of Great Expectations, one of which ignores its settings."""
    log = logging.getLogger("great_expectations")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _load(path: Path, name: str, columns: list[str]) -> tuple[Any, list[Any]]:
    """The suite and its expectations, each with its index as `id`."""
    with quick_import():
        import great_expectations as gx

    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}", "name an existing suite of expectations") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON: {error}", "fix the file at this place") from None
    form = '{"name": "...", "expectations": [{"type": "expect_...", "kwargs": {...}, "severity": "warning"}]}'
    if not isinstance(document, dict) or not _listed(document.get("expectations")):
        raise InputError(f"{name}: not a suite: it needs a list of expectations", f"its form is {form}")
    title = document.get("name")
    problems = [] if isinstance(title, str) and title else [f"{name}: name: must be text"]
    known = ("name", "expectations", "meta", "notes", "id")
    problems += [f"{name}: {key}: unknown key; keys: {', '.join(known)}" for key in document if key not in known]
    expectations: list[Any] = []
    for i, entry in enumerate(document["expectations"]):
        found, wrong = _expectation(entry, str(i), columns)
        kind = f" ({entry['type']})" if isinstance(entry, dict) and isinstance(entry.get("type"), str) else ""
        problems += [f"{name}: expectations[{i}]{kind}: {line}" for line in wrong]
        expectations.append(found)
    if problems:
        hint = f"arguments of each type: {_GALLERY}; columns and their content: docs/checks.md"
        raise InputError("\n".join(problems), hint)
    given = [one.configuration for one in expectations]
    return gx.ExpectationSuite(name=str(title), expectations=given, notes=document.get("notes")), expectations


def _expectation(entry: Any, number: str, columns: list[str]) -> tuple[Any, list[str]]:
    """One entry of a suite as an expectation, or what is wrong with it."""
    from great_expectations.compatibility.pydantic import ValidationError
    from great_expectations.exceptions import GreatExpectationsError
    from great_expectations.expectations import registry
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    known = ("type", "kwargs", "severity", "description", "notes", "meta", "id")
    if not isinstance(entry, dict):
        return None, [f"must be an object with {', '.join(known)}"]
    types = sorted(registry.list_registered_expectation_implementations())
    kind, kwargs = entry.get("type"), entry.get("kwargs", {})
    if kind not in types:
        near = difflib.get_close_matches(str(kind), types, n=3, cutoff=0.5)
        others = f"similar types: {', '.join(near)}" if near else f"types: {', '.join(types)}"
        return None, [f"unknown type {kind!r}; {others}"]
    if not isinstance(kwargs, dict):
        return None, ["kwargs: must be an object"]
    fields = sorted(set(registry.get_expectation_impl(kind).__fields__) - _NOT_KWARGS)
    problems = [f"{key}: unknown key; keys: {', '.join(known)}" for key in entry if key not in known]
    problems += [f"kwargs.{key}: unknown; {kind} takes {', '.join(fields)}" for key in kwargs if key not in fields]
    if entry.get("severity", "critical") not in [*SEVERITY]:
        problems.append(f"severity: must be one of {', '.join(SEVERITY)}")
    if not isinstance(entry.get("description"), str | None):
        problems.append("description: must be text")
    if not isinstance(entry.get("meta"), dict | None):
        problems.append("meta: must be an object")
    missing = [column for column in _columns(kwargs) if column not in columns]
    problems += [f"no column {column!r}; columns: {', '.join(columns)}" for column in missing]
    problems += _empty(kwargs, fields)
    if problems:
        return None, problems
    try:
        given = {key: entry[key] for key in ("severity", "description", "notes", "meta") if key in entry}
        return ExpectationConfiguration(type=kind, kwargs=kwargs, id=number, **given).to_domain_obj(), []
    except ValidationError as error:
        # If several types are allowed, the library reports each one: the first is sufficient.
        first: dict[str, str] = {}
        for problem in error.errors():
            first.setdefault(str(problem["loc"][0]), str(problem["msg"]))
        return None, [f"{'' if key == '__root__' else f'kwargs.{key}: '}{text}" for key, text in first.items()]
    except (GreatExpectationsError, TypeError, ValueError) as error:
        return None, [_line(error)]


def _columns(kwargs: dict[str, Any]) -> list[str]:
    """The columns that an expectation names, including those of its condition."""
    named = [kwargs[key] for key in ("column", "column_A", "column_B") if isinstance(kwargs.get(key), str)]
    named += [one for key in ("column_list", "column_set") for one in _listed(kwargs.get(key)) if isinstance(one, str)]

    def walk(condition: Any) -> Iterator[str]:
        if isinstance(condition, dict):
            column = condition.get("column")
            if isinstance(column, dict) and isinstance(column.get("name"), str):
                yield column["name"]
            for one in _listed(condition.get("conditions")):
                yield from walk(one)

    return list(dict.fromkeys([*named, *walk(kwargs.get("row_condition"))]))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _empty(kwargs: dict[str, Any], fields: Sequence[str]) -> list[str]:
    """Faults that the library accepts: expectations that always or never hold, and conditions that run code."""
    problems = []
    low, high = kwargs.get("min_value"), kwargs.get("max_value")
    if {"min_value", "max_value"} <= set(fields) and "threshold" not in fields and low is None and high is None:
        problems.append("always holds: give min_value, max_value or both")
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        problems.append(f"can never hold: min_value {low} is above max_value {high}")
    if kwargs.get("mostly") == 0:
        problems.append("kwargs.mostly: 0 always holds: give a share above 0")
    ranges = kwargs.get("quantile_ranges")
    if isinstance(ranges, dict) and len(_listed(ranges.get("quantiles"))) != len(_listed(ranges.get("value_ranges"))):
        problems.append("kwargs.quantile_ranges: needs as many value_ranges as quantiles")
    if "$PARAMETER" in json.dumps(kwargs):
        problems.append("kwargs: $PARAMETER is not supported: write the value itself")
    condition = json.dumps(kwargs.get("row_condition"))
    if isinstance(kwargs.get("row_condition"), str) or "pass_through" in condition:
        problems.append(
            'kwargs.row_condition: must be an object such as {"type": "comparison", "column": {"name": "category"},'
            ' "operator": "==", "parameter": "bug"} or {"type": "nullity", "column": {"name": "category"}, "is_null":'
            " true}; text would be run as code"
        )
    return problems


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _validate(frame: pd.DataFrame, suite: Any) -> Any:
    """Great Expectations' result for the whole table."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.enable_analytics(False)
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    asset = context.data_sources.add_pandas("instructions").add_dataframe_asset("rows")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    return batch.validate(suite, result_format="COMPLETE")


def _read_results(result: Any, expectations: Sequence[Any], frame: pd.DataFrame, name: str) -> list[ExpectationResult]:
    """The results as `ExpectationResult`, in the suite's order. Fixes in `result` what Data Docs would not show."""
    judged = []
    problems = []
    for one in sorted(result.results, key=lambda one: int(one.expectation_config.id)):
        i, kind = int(one.expectation_config.id), one.expectation_config.type
        raised = [info for info in _infos(one.exception_info) if info["raised_exception"]]
        if raised:
            why = _line(raised[0]["exception_message"])
            problems.append(f"{name}: expectations[{i}] ({kind}): cannot be evaluated: {why}")
            continue
        rows, observed = _correct(one, frame), _plain_data(one.result)
        words, severity = _sentence(expectations[i]), SEVERITY[expectations[i].severity.value]
        judged.append(ExpectationResult(kind, words, one.success, severity, observed, _seen(observed), rows))
    if problems:
        raise InputError("\n".join(problems), f"choose another type or column; arguments of each type: {_GALLERY}")
    statistics = [one.success for one in result.results]
    result.success = all(statistics)
    result.statistics.update(
        successful_expectations=sum(statistics),
        unsuccessful_expectations=len(statistics) - sum(statistics),
        success_percent=100 * sum(statistics) / len(statistics),
    )
    return judged


def _correct(one: Any, frame: pd.DataFrame) -> list[int]:
    """Fix a result of the library where its pages would be wrong or fail; returns the first rows that violate it."""
    from great_expectations.util import convert_to_json_serializable

    kind, rows = one.expectation_config.type, list[int]()
    one.success = bool(one.success)  # a NumPy bool is not JSON to the library's own pages
    # a NumPy float passes for JSON with the library
    one.result = found = json.loads(json.dumps(convert_to_json_serializable(one.result)))
    if "element_count" in found:
        rows = (found.pop("unexpected_index_list", None) or [])[:20]
        values = [value for value in found.get("partial_unexpected_list") or [] if value is not None]
        found["partial_unexpected_list"] = [_as_one_value(value) for value in values]
        for key in _OF_ROWS:
            found.pop(key, None)
        if found["element_count"] == (found.get("missing_count") or 0):
            one.success = False  # an expectation evaluated on no rows does not hold
    elif any(name in kind for name in _OF_NO_VALUES):
        values = _values(frame, one.expectation_config.kwargs, nulls="non_null" in kind)
        if not values:
            one.success, found["observed_value"] = False, None
        elif "_distinct_values_" in kind:
            # The library omits the observed value, and then fails on a count without a percentage.
            found["observed_value"] = sorted(values)[:100]
        for key in ("unexpected_count", "missing_count", "partial_unexpected_list", "partial_missing_list"):
            found.pop(key, None)
    return rows


def _as_one_value(value: Any) -> Any:
    """The values of several columns as one text; a single value as it is."""
    values = [*value.values()] if isinstance(value, dict) else value
    return " / ".join(map(str, values)) if isinstance(values, list) else value


_OF_ROWS = (
    "unexpected_list",
    "unexpected_index_query",
    "partial_unexpected_index_list",
    "partial_unexpected_counts",
)
"""What the library adds to a result on rows, and no page needs."""
_OF_NO_VALUES = ("_distinct_values_", "_sum_", "_unique_value_count_", "_proportion_of_")
"""In the types of expectations that the library evaluates without any value, e.g. to a sum of 0."""


def _values(frame: pd.DataFrame, kwargs: Mapping[str, Any], nulls: bool) -> list[Any]:
    """Different values of an expectation's column in the rows that meet its condition, with null only if `nulls`."""
    from great_expectations.execution_engine import PandasExecutionEngine

    engine = PandasExecutionEngine(batch_data_dict={"rows": frame})
    column = engine.get_domain_records({"row_condition": kwargs.get("row_condition")})[kwargs["column"]]
    return (column if nulls else column.dropna()).unique().tolist()


def _infos(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The exceptions raised: one entry, or one for each metric."""
    return [info] if "raised_exception" in info else list(info.values())


def _plain_data(found: dict[str, Any]) -> Any:
    """The observed value, as plain and stable data."""
    if "element_count" in found:
        values = {json.dumps(value): value for value in map(_value, found["partial_unexpected_list"])}
        judged = found["element_count"] - (found.get("missing_count") or 0)
        shown = [values[key] for key in sorted(values)][:10]
        return {"unexpected": found["unexpected_count"], "of": judged, "values": shown}
    return _value(found.get("observed_value"))


def _value(value: Any) -> Any:
    """As JSON: numbers rounded to six digits, NaN and null are None, quantiles a mapping."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, dict):
        if value.keys() == {"quantiles", "values"}:
            return {str(q): _value(v) for q, v in zip(value["quantiles"], value["values"], strict=False)}
        return {str(key): _value(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_value(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _seen(observed: Any) -> str:
    """An observed value as text."""
    if isinstance(observed, dict) and "unexpected" in observed:
        unexpected, rows = observed["unexpected"], observed["of"]
        if not rows:
            return "no rows to evaluate"
        if not unexpected:
            return f"all {rows} rows do"
        which = ", ".join(_seen(value) for value in observed["values"][:5] if value is not None)
        share = f"{unexpected} of {rows} rows do not ({100 * unexpected / rows:.3g} %)"
        return f"{share}, such as {which}" if which else share
    if isinstance(observed, dict):
        return ", ".join(f"{key}: {_seen(value)}" for key, value in observed.items())
    if isinstance(observed, list):
        return (", ".join(map(_seen, observed[:20])) + (", ..." if len(observed) > 20 else "")) or "none"
    if isinstance(observed, float):
        return f"{observed:.4g}"
    return "nothing" if observed is None else str(observed)


def _sentence(expectation: Any) -> str:
    """The owner's description of an expectation, or else the library's."""
    from great_expectations.render.renderer.inline_renderer import InlineRenderer

    if expectation.description:
        return str(expectation.description)
    value = InlineRenderer(render_object=expectation.configuration).get_rendered_content()[0].value.to_json_dict()
    if "template" in value:
        return _filled(value)
    kwargs = {key: one for key, one in expectation.configuration.kwargs.items() if isinstance(one, str | int | float)}
    given = ", ".join(f"{key} {one}" for key, one in kwargs.items())
    if "quantile_ranges" in expectation.configuration.kwargs:
        rows = "; ".join(f"{row[0]['value']}: {row[1]['value']} to {row[2]['value']}" for row in value["table"])
        return f"{_filled(value['header']['value']).rstrip('.')}: {rows}."
    return f"{expectation.expectation_type.replace('_', ' ')}: {given}."


def _filled(value: dict[str, Any]) -> str:
    """The library's template with its parameters."""
    params = {key: str(one["value"]) for key, one in (value.get("params") or {}).items()}
    return re.sub(r"\$(\w+)", lambda match: params.get(match[1], match[0]), value["template"])
