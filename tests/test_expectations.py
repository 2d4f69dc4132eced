"""Expectations validate the whole table, report what they observed, refuse
invalid suites, and write self-contained pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.expectations import FAILING, ODD, ROWS, Record, expect, record, suite
from builders.sources import to_records
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagster_project.core.errors import InputError
from dagster_project.curation.checks import data_docs, expectations
from dagster_project.curation.checks.checks import Rules, judge
from dagster_project.curation.sources.benchmarks import read_items

SUITE = ROOT / "data" / "expectations" / "instructions.json"


def found(folder: Path, *entries: Any, rows: list[Record] = ROWS) -> list[expectations.ExpectationResult]:
    return expectations.run(expectations.table(rows), suite(folder, *entries)).expectations


def refused(folder: Path, *entries: Any, **more: Any) -> str:
    with pytest.raises(InputError) as error:
        expectations.run(expectations.table(ROWS), suite(folder, *entries, **more), name="mine.json")
    return str(error.value)


def of_bugs(operator: str = "==", category: str = "bug") -> dict[str, Any]:
    return {"type": "comparison", "column": {"name": "category"}, "operator": operator, "parameter": category}


# The table


def test_the_table_has_the_columns_of_each_row() -> None:
    rows = expectations.table(ROWS, read=8).astype(object).where(lambda frame: frame.notna(), None).to_dict("list")
    assert rows == {
        "source": ["a.jsonl", "a.jsonl", "b.jsonl", "a.jsonl"],
        "category": ["bug", "bug", "idea", None],
        "script": ["Latin", "Latin", "Han", "Cyrillic"],
        "turns": [1, 1, 1, 1],
        "prompt": [0, 1, 2, 3],
        "prompt_words": [4, 5, 5, 3],
        "response_words": [2, 2, 2, 3],
        "response_is_json": [True, True, True, False],
        "trained_turns": [1, 1, 1, 1],
        "tools": [0, 0, 0, 0],
        "tool_calls": [0, 0, 0, 0],
        "reasoning_words": [0, 0, 0, 0],
        "near_copy": [False, True, False, False],
        "category_share": [0.5, 0.5, 0.25, 0.25],
        "source_share": [0.75, 0.75, 0.25, 0.75],
        "kept_share": [0.5, 0.5, 0.5, 0.5],
    }
    assert list(rows) == list(expectations.COLUMNS)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "Latin"),
        ("Übergröße", "Latin"),
        ("12:30 – 14:00", "(none)"),
        ("", "(none)"),
        ("凧はどこですか", "Kana"),
        ("연이 어디에 있나요", "Hangul"),
        ("ሰላም", "Ethiopic"),
        ("أين طائرتي kite", "Arabic"),
    ],
)
def test_script_is_that_of_most_letters(text: str, script: str) -> None:
    assert expectations.table([record(text)])["script"].tolist() == [script]


def test_equal_prompts_share_a_number_and_clusters_replace_groups() -> None:
    frame = expectations.table([record("a"), record("b"), record("a")], clusters=[7, 7, 9])
    assert frame["prompt"].tolist() == [0, 1, 0]
    assert frame["near_copy"].tolist() == [False, True, False]


def test_an_address_in_a_category_is_masked() -> None:
    rows = expectations.table([record(category=f"{name}@example.org") for name in ("ann", "ann", "ann", "bob")])
    assert rows["category"].tolist() == ["[e-mail]"] * 4
    assert rows["category_share"].tolist() == [0.75, 0.75, 0.75, 0.25]


# Judging


def test_each_expectation_reports_description_observation_and_rows(tmp_path: Path) -> None:
    judged = found(
        tmp_path,
        expect("expect_table_row_count_to_be_between", "critical", "There are ten rows.", min_value=10),
        expect("expect_column_values_to_be_in_set", column="script", value_set=["Latin"], mostly=0.9),
        expect("expect_column_mean_to_be_between", "info", column="response_is_json", min_value=0.7),
        expect("expect_column_distinct_values_to_equal_set", column="category", value_set=["bug", "idea", "login"]),
        expect(
            "expect_column_quantile_values_to_be_between",
            column="prompt_words",
            quantile_ranges={"quantiles": [0.5], "value_ranges": [[None, 3]]},
        ),
        expect("expect_column_max_to_be_between", column="prompt_words", max_value=4, row_condition=of_bugs()),
    )
    assert [(one.passed, one.severity, one.words, one.seen, one.rows) for one in judged] == [
        (False, "error", "There are ten rows.", "4", []),
        (
            False,
            "warn",
            "script values must belong to this set: Latin, at least 90 % of the time.",
            "2 of 4 rows do not (50 %), such as Cyrillic, Han",
            [2, 3],
        ),
        (True, "info", "response_is_json mean must be greater than or equal to 0.7.", "0.75", []),
        (False, "warn", "category distinct values must match this set: bug idea login.", "bug, idea", []),
        (
            False,
            "warn",
            "prompt_words quantiles must be within the following value ranges: Median: Any to 3.",
            "0.5: 5",
            [],
        ),
        (
            False,
            "warn",
            "If category == bug, then prompt_words maximum value must be less than or equal to 4.0.",
            "5",
            [],
        ),
    ]
    assert [one.observed for one in judged[:4]] == [
        4,
        {"unexpected": 2, "of": 4, "values": ["Cyrillic", "Han"]},
        0.75,
        ["bug", "idea"],
    ]


def test_an_expectation_that_examined_no_row_does_not_pass(tmp_path: Path) -> None:
    kwargs = {"column": "response_words", "min_value": 1, "row_condition": of_bugs(category="none such")}
    (judged,) = found(tmp_path, expect("expect_column_values_to_be_between", **kwargs))
    assert (judged.passed, judged.seen) == (False, "no rows to evaluate")


def test_distinct_values_and_sums_are_those_of_the_rows_that_meet_the_condition(tmp_path: Path) -> None:
    categories = {"column": "category", "row_condition": of_bugs()}
    none = {"row_condition": of_bugs(category="none such")}
    judged = found(
        tmp_path,
        expect("expect_column_distinct_values_to_be_in_set", **categories, value_set=["bug"]),
        expect("expect_column_distinct_values_to_equal_set", **categories, value_set=["bug", "idea"]),
        expect("expect_column_distinct_values_to_be_in_set", column="category", value_set=["bug"]),
        expect("expect_column_distinct_values_to_be_in_set", column="script", value_set=["Latin"], **none),
        expect("expect_column_sum_to_be_between", column="turns", max_value=9, **none),
        expect("expect_column_unique_value_count_to_be_between", column="script", max_value=9, **none),
        expect("expect_column_proportion_of_unique_values_to_be_between", column="script", max_value=0.9, **none),
        expect("expect_column_proportion_of_non_null_values_to_be_between", column="script", max_value=0.9, **none),
    )
    assert [(one.passed, one.seen) for one in judged] == [
        (True, "bug"),
        (False, "bug"),
        (False, "bug, idea"),
        *[(False, "nothing")] * 5,
    ]


def test_a_share_of_values_that_are_not_null_may_be_0(tmp_path: Path) -> None:
    rows = [record(f"kite {i}") for i in range(3)]
    (judged,) = found(
        tmp_path,
        expect("expect_column_proportion_of_non_null_values_to_be_between", column="category", max_value=0.1),
        rows=rows,
    )
    assert (judged.passed, judged.seen) == (True, "0")


def test_every_expectation_fails_on_an_empty_table() -> None:
    outcome = expectations.run(expectations.table([]), SUITE)
    assert [one.passed for one in outcome.expectations] == [False] * len(outcome.expectations)


def test_statistics_are_imported_by_the_expectations_that_need_them(tmp_path: Path) -> None:
    weights = {"bins": [0, 10, 20], "weights": [0.5, 0.5]}
    divergent = {"column": "prompt_words", "partition_object": weights, "threshold": 9.0}
    suites = []
    for kind, kwargs in (
        ("expect_table_row_count_to_equal", {"value": 4}),
        ("expect_column_kl_divergence_to_be_less_than", divergent),
    ):
        (tmp_path / kind).mkdir()
        suites.append(str(suite(tmp_path / kind, expect(kind, **kwargs))))
    code = f"""import sys
from pathlib import Path
import pandas as pd
from dagster_project.curation.checks import expectations
frame = pd.DataFrame({{"prompt_words": [1, 2, 11, 12], "category": "a", "source": "b"}})
for path in {suites!r}:
    (one,) = expectations.run(frame, Path(path)).expectations
    print(one.passed, "scipy.stats" in sys.modules)
import scipy
print(type(scipy.stats).__name__)"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:3] == ["True False", "True True", "module"], done.stderr


def test_every_row_is_evaluated_and_the_table_is_not_changed(tmp_path: Path) -> None:
    frame = expectations.table([record(f"kite {i}", "{}" if i else "no") for i in range(150_000)])
    before = frame.copy(deep=True)
    path = suite(
        tmp_path,
        expect("expect_table_row_count_to_equal", value=150_000),
        expect("expect_column_values_to_be_in_set", column="response_is_json", value_set=[True]),
    )
    outcome = expectations.run(frame, path)
    assert outcome.rows == 150_000
    assert [(one.passed, one.rows) for one in outcome.expectations] == [(True, []), (False, [0])]
    assert frame.equals(before)


def test_one_check_counts_the_failed_and_blocks_if_one_is_critical(tmp_path: Path) -> None:
    frame = expectations.table(ROWS)
    holds = expect("expect_table_row_count_to_equal", "critical", value=4)
    many = expect("expect_table_row_count_to_be_between", "critical", "Many rows.", min_value=10)
    latin = expect("expect_column_values_to_be_in_set", "warning", "Latin only.", column="script", value_set=["Latin"])
    short = expect("expect_column_max_to_be_between", "info", "Short.", column="prompt_words", max_value=2)

    def checked(*entries: Any) -> Any:
        return expectations.check(
            expectations.run(frame, suite(tmp_path, *entries)), places={0: "a:0", 1: "a:1", 2: "b:0", 3: "a:2"}
        )

    failed = checked(holds, short, latin, many)
    assert (failed.name, failed.passed, failed.severity, failed.blocking, failed.count) == (
        "expectations",
        False,
        "error",
        True,
        3,
    )
    assert failed.details == [
        "Many rows. Found: 4.",
        "Latin only. Found: 2 of 4 rows do not (50 %), such as Cyrillic, Han.",
        "Short. Found: 5.",
    ]
    assert (failed.rows, failed.note) == (["b:0", "a:2"], "1 of 4 expectations hold")
    assert [
        (c.passed, c.severity, c.blocking) for c in (checked(holds), checked(holds, latin), checked(holds, short))
    ] == [
        (True, "error", True),
        (False, "warn", False),
        (False, "info", False),
    ]


# The suite that comes with the sample data


@pytest.fixture(scope="module")
def sample() -> tuple[list[Record], int]:
    records: list[Record] = []
    for name in ("triage_alpaca.json", "triage_messages.jsonl", "replies_messages.jsonl"):
        _, rows = to_records(ROOT / "data" / "sources" / name, f"data/sources/{name}")
        records += [{**row, "source_row": i} for i, row in enumerate(rows)]
    held_out = read_items(
        ROOT / "data" / "sources" / "benchmarks" / "general_knowledge.jsonl", "general_knowledge.jsonl"
    )
    judged = judge(records, held_out, Rules())
    kept = [
        {**row, "group_id": str(cluster)}
        for row, cluster, why in zip(records, judged.cluster, judged.reason, strict=True)
        if why is None
    ]
    return kept, len(records)


def test_the_sample_data_is_what_its_suite_expects(sample: tuple[list[Record], int]) -> None:
    kept, read = sample
    outcome = expectations.run(expectations.table(kept, read=read), SUITE)
    assert [one.words for one in outcome.failed] == []
    assert len(outcome.expectations) >= 15


def without(kept: list[Record], category: str) -> list[Record]:
    return [row for row in kept if row["category"] != category]


def edited(kept: list[Record], rows: int, **change: Any) -> list[Record]:
    """The first rows changed."""
    return [{**row, **change} if i < rows else row for i, row in enumerate(kept)]


def said(prompt: str, response: str) -> dict[str, Any]:
    return {"messages": record(prompt, response)["messages"]}


DAMAGE = {
    "There are 500 to 700 rows.": lambda kept: kept[:300],
    "At least half of the rows read are kept.": lambda kept: kept[:300],
    "At least 95 % of the rows read are kept.": lambda kept: kept[:580],
    "The categories are the eight of the help desk, and each is there.": lambda kept: without(kept, "idea"),
    "Every triaged message has a category.": lambda kept: edited(kept, 1, category=None),
    "Every category has at least 8 % of the rows.": lambda kept: (
        without(kept, "bug") + [r for r in kept if r["category"] == "bug"][:9]
    ),
    "No category has more than a quarter of the rows.": lambda kept: edited(kept, 200, category="bug"),
    "No source gives more than half of the rows.": lambda kept: edited(kept, 400, source="one.jsonl"),
    "The rows come from two sources or more.": lambda kept: edited(kept, 609, source="one.jsonl"),
    "At least 98 % of the prompts are in Latin script.": lambda kept: edited(kept, 20, **said("风筝在哪里", "{}")),
    "Every conversation is one question and one answer.": lambda kept: edited(
        kept, 1, messages=kept[0]["messages"][-2:] * 2
    ),
    "A prompt has 15 to 40 words on average.": lambda kept: edited(kept, 300, **said("why " * 80, "{}")),
    "The shortest prompts (5 %) have 10 to 30 words, those in the middle 20 to 35, the longest (95 %) 25 to 60.": (
        lambda kept: edited(kept, 40, **said("Where is it?", "{}"))
    ),
    "Half of the responses are labels of 8 to 14 words, the longest (95 %) replies of 40 to 70.": lambda kept: kept[
        :481
    ],
    "At least 99 % of the responses have 3 to 100 words.": lambda kept: edited(
        kept, 7, **said("Where is it?", "[ " * 101 + "] " * 101)
    ),
    "Every message with a category is answered in JSON.": lambda kept: edited(
        kept, 1, **said("Where is it?", "Delivery.")
    ),
    "70 to 90 % of the responses are JSON, the others prose.": lambda kept: kept[:481],
    "At least 99 % of the prompts are different ones.": lambda kept: kept + kept[:10],
    "At most 2 % of the rows are near-copies of an earlier one.": lambda kept: kept + kept[:20],
}
"""Expectation -> what breaks it."""


@pytest.mark.parametrize("words", DAMAGE)
def test_each_expectation_of_the_suite_can_fail(sample: tuple[list[Record], int], words: str) -> None:
    kept, read = sample
    outcome = expectations.run(expectations.table(DAMAGE[words](kept), read=read), SUITE)
    assert words in [one.words for one in outcome.failed]


def test_each_expectation_of_the_suite_is_damaged_above() -> None:
    assert [entry["description"] for entry in json.loads(SUITE.read_text(encoding="utf-8"))["expectations"]] == list(
        DAMAGE
    )


def test_the_suite_is_tracked_by_git() -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", str(SUITE)], cwd=ROOT, check=False)
    assert ignored.returncode == 1


# Suites that cannot be evaluated


def test_all_errors_of_a_suite_are_reported_together(tmp_path: Path) -> None:
    said = refused(
        tmp_path,
        expect("expect_table_row_count_to_be_betwen", min_value=1),
        expect("expect_column_mean_to_be_between", column="promt_words", min_value=1),
        expect("expect_column_mean_to_be_between", column="prompt_words", minimum=1, min_value=1),
        expect("expect_column_mean_to_be_between", column="prompt_words", min_value="many"),
        expect("expect_column_mean_to_be_between", min_value=1),
        expect("expect_column_mean_to_be_between", column="prompt_words"),
        expect("expect_column_mean_to_be_between", column="prompt_words", min_value=2, max_value=1),
        expect("expect_column_values_to_be_in_set", column="script", value_set=["Latin"], mostly=0),
        expect("expect_column_values_to_be_in_set", column="script", value_set=["Latin"], mostly=90),
        expect("expect_table_row_count_to_equal", "fatal", value=1),
        expect("expect_column_to_exist", column="source") | {"sevrity": "info"},
        expect("expect_column_max_to_be_between", column="turns", max_value={"$PARAMETER": "most"}),
        expect(
            "expect_column_max_to_be_between",
            column="turns",
            max_value=1,
            row_condition="@__import__('os').system('true')",
        ),
        expect(
            "expect_column_max_to_be_between",
            column="turns",
            max_value=1,
            row_condition=of_bugs() | {"column": {"name": "label"}},
        ),
        expect(
            "expect_column_quantile_values_to_be_between",
            column="turns",
            quantile_ranges={"quantiles": [0.5, 0.9], "value_ranges": [[1, 2]]},
        ),
        "expect_column_to_exist",
    )
    lines = [line.removeprefix("mine.json: expectations") for line in said.splitlines()]
    columns = ", ".join(expectations.COLUMNS)
    assert lines[0].startswith(
        "[0] (expect_table_row_count_to_be_betwen): unknown type 'expect_table_row_count_to_be_betwen'; similar types: "
        "expect_table_row_count_to_be_between"
    )
    assert lines[1] == f"[1] (expect_column_mean_to_be_between): no column 'promt_words'; columns: {columns}"
    assert (
        lines[2]
        == "[2] (expect_column_mean_to_be_between): kwargs.minimum: unknown; expect_column_mean_to_be_between takes "
        "column, max_value, min_value, row_condition, strict_max, strict_min"
    )
    assert lines[3] == "[3] (expect_column_mean_to_be_between): kwargs.min_value: value is not a valid float"
    assert lines[4] == "[4] (expect_column_mean_to_be_between): kwargs.column: field required"
    assert lines[5] == "[5] (expect_column_mean_to_be_between): always holds: give min_value, max_value or both"
    assert lines[6] == "[6] (expect_column_mean_to_be_between): can never hold: min_value 2 is above max_value 1"
    assert lines[7] == "[7] (expect_column_values_to_be_in_set): kwargs.mostly: 0 always holds: give a share above 0"
    assert (
        lines[8]
        == "[8] (expect_column_values_to_be_in_set): kwargs.mostly: ensure this value is less than or equal to 1.0"
    )
    assert lines[9] == "[9] (expect_table_row_count_to_equal): severity: must be one of critical, warning, info"
    assert lines[10].startswith(
        "[10] (expect_column_to_exist): sevrity: unknown key; keys: type, kwargs, severity, description"
    )
    assert lines[11].endswith("$PARAMETER is not supported: write the value itself")
    assert lines[12].startswith(
        "[12] (expect_column_max_to_be_between): kwargs.row_condition: must be an object such as"
    )
    assert lines[13] == f"[13] (expect_column_max_to_be_between): no column 'label'; columns: {columns}"
    assert lines[14].endswith("kwargs.quantile_ranges: needs as many value_ranges as quantiles")
    assert lines[15] == "[15]: must be an object with type, kwargs, severity, description, notes, meta, id"
    assert lines[16].startswith("hint: arguments of each type: https://greatexpectations.io/expectations")


@pytest.mark.parametrize(
    "entry",
    [
        expect("expect_column_mean_to_be_between", column="script", min_value=1),
        expect("expect_column_values_to_match_regex", column="script", regex="a("),
        expect(
            "expect_query_results_to_match_comparison",
            base_query="x",
            comparison_data_source_name="x",
            comparison_query="x",
        ),
    ],
)
def test_a_crash_during_validation_names_the_expectation(tmp_path: Path, entry: dict[str, Any]) -> None:
    said = refused(tmp_path, expect("expect_table_row_count_to_equal", value=4), entry)
    assert said.startswith(f"mine.json: expectations[1] ({entry['type']}): cannot be evaluated: ")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON: "),
        ("[]", "not a suite: it needs a list of expectations"),
        ('{"name": "x", "expectations": []}', "not a suite: it needs a list of expectations"),
        (
            '{"expectations": [{"type": "expect_column_to_exist", "kwargs": {"column": "source"}}]}',
            "name: must be text",
        ),
        (
            '{"name": "x", "rows": 1, "expectations": [{"type": "expect_column_to_exist", "kwargs": {}}]}',
            "rows: unknown key",
        ),
    ],
)
def test_a_file_without_a_suite_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "suite.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(f"suite.json: {said}")):
        expectations.run(expectations.table(ROWS), path)


def test_a_missing_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: No such file"):
        expectations.run(expectations.table(ROWS), tmp_path / "none.json")


def test_a_suite_that_the_library_wrote_is_read(tmp_path: Path) -> None:
    import great_expectations as gx

    written = gx.ExpectationSuite(
        name="theirs", expectations=[expect("expect_table_row_count_to_equal", "info", value=4)]
    )
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(written.to_json_dict()), encoding="utf-8")
    (judged,) = expectations.run(expectations.table(ROWS), path).expectations
    assert (judged.passed, judged.severity) == (True, "info")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, width=16)
    | st.sampled_from(["category", "turns", "bug", "("]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["column", "name", "type", "quantiles", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
kwargs_keys = st.sampled_from(
    [
        "column",
        "column_list",
        "column_set",
        "value_set",
        "min_value",
        "max_value",
        "mostly",
        "regex",
        "row_condition",
        "quantile_ranges",
    ]
)
kinds = st.sampled_from(
    [
        "expect_column_mean_to_be_between",
        "expect_column_values_to_be_in_set",
        "expect_column_values_to_be_between",
        "expect_column_quantile_values_to_be_between",
        "expect_column_distinct_values_to_equal_set",
        "expect_column_values_to_match_regex",
        "expect_compound_columns_to_be_unique",
        "expect_table_columns_to_match_set",
        "expect_column_most_common_value_to_be_in_set",
    ]
)
entries = json_values | st.fixed_dictionaries(
    {"type": kinds | json_values},
    optional={
        "kwargs": st.dictionaries(kwargs_keys, json_values | st.just("turns"), max_size=4) | json_values,
        "severity": st.sampled_from(["info", "critical"]) | json_values,
        "description": json_values,
        "notes": json_values,
        "meta": json_values,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=entries, column=st.sampled_from(["turns", "category", "response_is_json", None]))
def test_any_json_is_evaluated_or_refused_with_a_message(tmp_path: Path, entry: Any, column: str | None) -> None:
    if column and isinstance(entry, dict) and isinstance(entry.get("kwargs"), dict):
        entry["kwargs"]["column"] = column
    try:
        outcome = expectations.run(expectations.table(ROWS), suite(tmp_path, entry), tmp_path / "docs")
    except InputError as error:
        assert "suite.json: " in str(error)
    else:
        assert [one.type for one in outcome.expectations] == [entry["type"]]


# Data Docs


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    rows = [*ROWS, record("Which?", category=ODD), record("What?", category="<script>alert(2)</script>")]
    expectations.run(expectations.table(rows), suite(tmp_path, *FAILING, notes=ODD), tmp_path / "docs")
    return tmp_path / "docs"


def test_data_docs_are_the_library_s_own_with_values_escaped(pages: Path) -> None:
    assert sorted(path.name for path in pages.rglob("*")) == [data_docs.INDEX, data_docs.SUITE]
    for page in pages.iterdir():
        text = page.read_text(encoding="utf-8")
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        assert ODD not in text and "<script>alert(2)" not in text


def test_the_links_between_data_docs_lead_to_pages_that_exist(pages: Path) -> None:
    links = {
        name: set(re.findall(r'<a [^>]*href="([^"#:]+)"', (pages / name).read_text("utf-8")))
        for name in (data_docs.INDEX, data_docs.SUITE)
    }
    assert links == {data_docs.INDEX: {data_docs.INDEX, data_docs.SUITE}, data_docs.SUITE: {data_docs.INDEX}}


def test_the_same_set_gives_the_same_outcome_in_any_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from builders.expectations import *; from"
        " dagster_project.curation.checks import expectations;o = expectations.run(expectations.table(ROWS),"
        " suite(Path(sys.argv[1]), *FAILING), Path(sys.argv[1], 'docs')); print(o)"
    )
    said = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)], env=env, capture_output=True, text=True, check=True
        )
        said.append(done.stdout)
    assert said[0] == said[1]


def test_a_run_prints_nothing_leaves_no_files_and_uses_no_network(tmp_path: Path) -> None:
    program = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from builders.expectations import FAILING, ROWS, expect
from dagster_project.curation.checks import expectations
more = expect("expect_column_kl_divergence_to_be_less_than", column="prompt_words", threshold=0.1,
              partition_object={"bins": [0, 4, 9], "weights": [0.5, 0.5]})
import json
Path("suite.json").write_text(json.dumps({"name": "x", "expectations": [*FAILING, more]}))
expectations.run(expectations.table(ROWS), Path("suite.json"), Path("docs"))
"""
    work, home, scratch = tmp_path / "work", tmp_path / "home", tmp_path / "scratch"
    for folder in (work, home, scratch):
        folder.mkdir()
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=work, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in work.iterdir()) == ["docs", "suite.json"]
    assert list(home.iterdir()) == []
    assert list(scratch.iterdir()) == []
