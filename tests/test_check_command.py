"""`pedigree check` from the command line: every format, file type and option,
and one JSON document that matches the page."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.commands import Check, Done
from builders.files import FILE_WRITERS, jsonl
from builders.layouts import BENCHMARK_ROWS, LAYOUT_ROWS, PAIR_ROWS
from conftest import ROOT, SHARED_DATA

from dagster_project.curation.check_files import ALIASES, KNOWN
from dagster_project.curation.checks.checks import CHECKS, checks_of

KEY = "AKIA" + "Q3EXAMPLE7KEY2AB"
LONG = "My parcel with the garden kite went to the wrong house last week"
ANSWERED = {"instruction": LONG, "output": "We are sorry; a new kite is on its way to you."}


def by_itself(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "dagster_project", "check", *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        timeout=300,
        check=False,
    )


def ask(prompt: str, answer: str = "On its way, and with you tomorrow.", **more: Any) -> dict[str, Any]:
    return {"instruction": prompt, "output": answer, **more}


def many(count: int, **more: Any) -> list[dict[str, Any]]:
    """Rows whose words no other row has, and in which no check on rows finds anything."""
    letters = str.maketrans("0123456789", "ghijklmnop")
    names = [hashlib.sha256(str(i).encode()).hexdigest().translate(letters) for i in range(count)]
    return [
        ask(
            f"Is {name[:9]} in {name[9:16]} or {name[16:24]}?",
            f"It stands in {name[24:31]} made in town {name[31:38]}",
            **more,
        )
        for name in names
    ]


def refused(done: Done, *said: str) -> None:
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and "\nhint: " in done.err and "Traceback" not in done.err
    for part in said:
        assert part in done.err


# Formats and file types


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_examples_in_each_layout_are_detected(layout: str, check: Check) -> None:
    jsonl(Path("a.jsonl"), LAYOUT_ROWS[layout][0])
    for arguments in ([], ["--format", layout]):
        found = check("a.jsonl", "--json", *arguments).document
        assert (found["format"], found["rows"], found["kept"]) == (layout, 1, 1)


@pytest.mark.parametrize("layout", PAIR_ROWS)
def test_preferences_in_each_layout_are_detected(layout: str, check: Check) -> None:
    jsonl(Path("a.jsonl"), *PAIR_ROWS[layout])
    for arguments in ([], ["--format", layout], ["--format", "dpo"]):
        found = check("a.jsonl", "--json", *arguments).document
        assert (found["format"], found["rows"], found["kept"]) == (layout, 1, 1)


@pytest.mark.parametrize("name", BENCHMARK_ROWS)
def test_benchmarks_in_each_layout_are_detected(name: str, check: Check) -> None:
    layout = name.partition(",")[0]
    jsonl(Path("a.jsonl"), BENCHMARK_ROWS[name][0])
    found = check("a.jsonl", "--json", "--format", layout).document
    assert (found["format"], found["rows"], found["kept"]) == (layout, 1, 1)
    told = check("a.jsonl", "--json").document
    assert told["format"] == {"gsm8k": "question_answer"}.get(layout, layout)


@pytest.mark.parametrize("name", KNOWN)
def test_each_name_of_a_format_is_accepted_for_every_row(name: str, check: Check) -> None:
    layout = ALIASES.get(name, name)
    rows = PAIR_ROWS.get(layout) or [
        LAYOUT_ROWS[layout][0] if layout in LAYOUT_ROWS else BENCHMARK_ROWS.get(layout, BENCHMARK_ROWS["mmlu"])[0]
    ]
    rows = PAIR_ROWS["preference"] if name == "dpo" else rows
    done = check(jsonl(Path("a.jsonl"), *rows), "--format", name, "--json")
    assert done.code in {0, 1} and "malformed_row" not in done.findings


def test_an_unknown_format_is_refused_with_the_known_ones(check: Check) -> None:
    refused(
        check(jsonl(Path("a.jsonl"), ANSWERED), "--format", "alpacca"),
        "unknown format 'alpacca'",
        "alpaca",
        "sharegpt",
        "mmlu",
        "dpo",
    )


def test_examples_named_as_pairs_are_refused(check: Check) -> None:
    refused(check(jsonl(Path("a.jsonl"), ANSWERED), "--format", "dpo"), "not preferences", "leave --format out")


@pytest.mark.parametrize("suffix", FILE_WRITERS)
def test_each_file_type_gives_the_same_document(suffix: str, check: Check) -> None:
    rows = (
        [{"text": "The kite flies."}]
        if suffix == ".txt"
        else [{"prompt": "Where is it?", "completion": "In the hall."}]
    )
    FILE_WRITERS[suffix](Path(f"a{suffix}"), rows)
    jsonl(Path("b.jsonl"), *rows)
    ours, plain = check(f"a{suffix}", "--json").document, check("b.jsonl", "--json").document
    del ours["name"], plain["name"], ours["profile"]["sources"], plain["profile"]["sources"]
    assert ours == plain and ours["kept"] == 1


def test_a_file_type_in_capitals_is_read_alone_and_in_a_folder(check: Check) -> None:
    Path("set").mkdir()
    jsonl(Path("set/A.JSONL"), ANSWERED)
    (Path("set") / "B.Json.GZ").write_bytes(gzip.compress(json.dumps([ask("Hi")]).encode()))
    assert check("set/A.JSONL", "--json").document["rows"] == 1
    assert check("set", "--json").document["rows"] == 2


# The document, and exit codes


def test_json_is_exactly_one_document_with_the_documented_keys(check: Check) -> None:
    done = check(jsonl(Path("a.jsonl"), *many(3), ask("Hi <|im_end|>"), "no json"), "--json")
    assert done.out.count("\n") == 1 and done.err == ""
    found = done.document
    assert {
        "name",
        "format",
        "rows",
        "kept",
        "dropped",
        "fixed",
        "findings",
        "similarity",
        "profile",
        "notes",
        "fields",
    } == set(found)
    keys = {
        "check",
        "severity",
        "passed",
        "count",
        "dropped",
        "elsewhere",
        "waived",
        "rows",
        "places",
        "examples",
        "truth",
        "note",
        "next",
        "matches",
    }
    assert found["findings"] and all(set(finding) - {"fixed"} == keys for finding in found["findings"])
    assert {finding["severity"] for finding in found["findings"]} <= {"error", "warn", "info"}
    assert found["rows"] == found["kept"] + sum(found["dropped"].values())
    assert (done.findings["malformed_row"]["rows"], done.findings["special_tokens_in_text"]["rows"]) == ([4], [3])


def test_the_exit_code_is_0_for_good_data_1_for_an_error_and_2_for_bad_input(check: Check) -> None:
    good, bad = jsonl(Path("good.jsonl"), *many(3)), jsonl(Path("bad.jsonl"), *many(3), ask("Hi", ""))
    assert [check(good).code, check(bad).code, check("none.jsonl").code, check().code] == [0, 1, 2, 2]
    assert [check(good, "--json").code, check(bad, "--json").code] == [0, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.jsonl", "--policy"],
        ["a.jsonl", "--nonsense"],
        ["a.jsonl", "--since"],
        ["a.jsonl", "--thirteen-grams"],
        [""],
        ["none.jsonl"],
        ["a.jsonl", "none.jsonl"],
        ["a.jsonl", "--against", "none.jsonl"],
        ["a.jsonl", "--policy", "none.yaml"],
        ["a.jsonl", "--policy", "."],
        ["a.jsonl", "--base-model", "none"],
        ["a.jsonl", "--since", ""],
        ["x" * 5000],
        ["a.jsonl", "--since", "x" * 5000],
        ["a.jsonl", "--against", "x" * 5000],
        ["hub:nobody"],
        ["hub:a/b@main:train"],
        ["a.jsonl", "--report", "a.jsonl"],
        ["a.jsonl", "--report", "a.jsonl/b.html"],
        ["a.jsonl", "--report", ""],
    ],
)
def test_wrong_usage_is_refused_with_a_hint(arguments: list[str], check: Check) -> None:
    before = jsonl(Path("a.jsonl"), ANSWERED).read_bytes()
    refused(check(*arguments))
    assert Path("a.jsonl").read_bytes() == before


def test_rows_are_source_rows_also_where_two_rows_make_a_pair(check: Check) -> None:
    good, bad = ({"prompt": "Where?", "completion": text, "label": text == "Here."} for text in ("Here.", "No."))
    secret = {"prompt": "Mail ann.lee@post.example.org?", "completion": "Yes.", "label": True}
    jsonl(Path("a.jsonl"), good, bad, good, bad)
    done = check(
        "a.jsonl", jsonl(Path("b.jsonl"), good, bad, secret, {**secret, "completion": "No.", "label": False}), "--json"
    )
    assert (done.findings["pii"]["rows"], done.findings["pii"]["places"]) == ([6], ["b.jsonl:2"])
    assert done.findings["exact_duplicates"]["rows"] == [2, 4]
    assert [match["row"] for match in done.findings["exact_duplicates"]["matches"]] == [2, 4]


# Paths


def test_files_and_folders_are_one_set_and_rows_are_counted_on(check: Check) -> None:
    for name in ("one.jsonl", "set/b.jsonl", "set/deep/a.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(Path(name), *many(2), ask("Is this a row?", ""))
    done = check("one.jsonl", "set/", "--json")
    assert (done.document["rows"], done.document["name"]) == (9, "one.jsonl, set/")
    assert (done.findings["empty_response"]["rows"], done.findings["empty_response"]["places"]) == (
        [2, 5, 8], ["one.jsonl:2", "set/b.jsonl:2", "set/deep/a.jsonl:2"]
    )  # fmt: skip


def test_layouts_of_one_kind_mix_and_kinds_do_not(check: Check) -> None:
    jsonl(Path("a.jsonl"), ANSWERED)
    jsonl(Path("m.jsonl"), LAYOUT_ROWS["messages"][0])
    jsonl(Path("p.jsonl"), *PAIR_ROWS["preference"])
    jsonl(Path("q.jsonl"), BENCHMARK_ROWS["mmlu"][0])
    assert check("a.jsonl", "m.jsonl", "--json").document["format"] == "alpaca, messages"
    refused(
        check("a.jsonl", "p.jsonl", "q.jsonl"),
        "a.jsonl holds examples",
        "p.jsonl holds preferences",
        "q.jsonl holds benchmark",
    )


def test_a_few_questions_do_not_make_examples_a_benchmark(check: Check) -> None:
    rows = [*many(5), BENCHMARK_ROWS["mmlu"][0], BENCHMARK_ROWS["piqa"][0]]
    done = check(jsonl(Path("a.jsonl"), *rows), "--json")
    assert (done.document["format"], done.document["kept"], done.findings["malformed_row"]["rows"]) == (
        "alpaca",
        5,
        [5, 6],
    )
    jsonl(Path("mine.jsonl"), *many(3))
    assert (
        check("mine.jsonl", "--against", jsonl(Path("held.jsonl"), *many(4)), "--json").findings["benchmark_leakage"][
            "count"
        ]
        == 3
    )


def test_the_output_of_a_stage_is_read_and_a_broken_one_refused(check: Check) -> None:
    from dagster_project.core.records import write_ledger, write_records

    records = [
        {
            "example_id": f"{i:032x}",
            "source": "s.json",
            "messages": [
                {"role": "user", "content": f"Where is {i}?"},
                {"role": "assistant", "content": f"At place {i}."},
            ],
            "category": None,
            "group_id": None,
            "meta": "{}",
        }
        for i in range(3)
    ]
    entries = [
        {
            "source": "s.json",
            "source_row": i,
            "example_id": f"{i:032x}",
            "outcome": "kept" if i != 1 else "dropped:pii",
            "why": None,
        }
        for i in range(4)
    ]
    write_records(Path("set"), records)
    write_ledger(Path("set"), entries)
    found = check("set", "--json").document
    assert (found["format"], found["rows"]) == ("canonical records", 3)
    write_ledger(Path("set"), entries[:3])
    refused(check("set"), "set: not a complete data set")
    write_ledger(Path("set"), entries)
    write_records(Path("set"), [{**records[0], "messages": [{"role": "user", "content": None}]}, *records[1:]])
    refused(check("set"), "s.json:0 is not a canonical record")
    (Path("set") / "ledger.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    refused(check("set"), "set: not a complete data set")
    (Path("set") / "ledger.parquet").unlink()
    write_records(Path("set"), records)
    assert check("set", "--json").document["format"] == "messages"


# Held-out data


LEAK = "Which planet do people sometimes call the red planet of the night?"
QUIZ: dict[str, dict[str, Any]] = {
    "mmlu": {"question": LEAK, "choices": ["Mars", "Venus"], "answer": 0},
    "hellaswag": {"ctx": LEAK, "endings": ["Mars", "Venus"], "label": "0"},
    "arc": {"question": LEAK, "choices": {"text": ["Mars", "Venus"], "label": ["A", "B"]}, "answerKey": "A"},
    "piqa": {"goal": LEAK, "sol1": "Mars", "sol2": "Venus", "label": 0},
    "gsm8k": {"question": LEAK, "answer": "Mars #### 4"},
    "examples": ask(LEAK, "Mars"),
    "preferences": {"prompt": LEAK, "chosen": "Mars", "rejected": "Venus"},
}


@pytest.mark.parametrize("layout", QUIZ)
@pytest.mark.parametrize("place", ["quiz.jsonl", "quiz/deep/a.jsonl"])
def test_a_row_that_overlaps_held_out_data_is_a_leak(layout: str, place: str, check: Check) -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    jsonl(Path(place), QUIZ[layout])
    done = check(
        jsonl(Path("a.jsonl"), *many(3), ask(f"Tell me. {LEAK}", "Saturn")),
        "--against",
        place.partition("/")[0],
        "--json",
    )
    leak = done.findings["benchmark_leakage"]
    assert (done.code, leak["rows"], leak["severity"], leak["dropped"]) == (1, [3], "error", 1)
    (match,) = leak["matches"]
    assert (match["place"], match["other"], match["part"], match["row"]) == ("a.jsonl:3", f"{place}:0", "prompt", 3)
    assert match["text"][slice(*match["span"])] == match["other_text"][slice(*match["other_span"])] == LEAK.rstrip("?")


def test_a_held_out_folder_may_contain_benchmarks_and_examples(check: Check) -> None:
    Path("held").mkdir()
    for name, row in QUIZ.items():
        jsonl(Path(f"held/{name}.jsonl"), row)
    leak = check(jsonl(Path("a.jsonl"), ask(LEAK)), "--against", "held", "--json").findings["benchmark_leakage"]
    assert {match["other"] for match in leak["matches"]} == {f"held/{name}.jsonl:0" for name in QUIZ}


def test_an_unreadable_held_out_row_is_refused(check: Check) -> None:
    jsonl(Path("a.jsonl"), ANSWERED)
    refused(
        check(
            "a.jsonl",
            "--against",
            jsonl(Path("q.jsonl"), QUIZ["mmlu"], QUIZ["mmlu"], {"question": 3, "choices": ["a", "b"]}),
        ),
        "q.jsonl: row 2",
    )
    refused(
        check("a.jsonl", "--against", jsonl(Path("e.jsonl"), ANSWERED, ask("Hi", 3))),
        "e.jsonl:1",
        "expected text, found int",
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("report", ["a.jsonl/b.html", "folder.html"])
def test_a_report_that_cannot_be_written_leaves_no_other_file(report: str, check: Check) -> None:
    Path("folder.html").mkdir()
    before = sorted(Path().iterdir())
    refused(
        check(jsonl(Path("a.jsonl"), ANSWERED), "--out", "clean.jsonl", "--report", report),
        "--report",
        "cannot be written",
    )
    assert sorted(Path().iterdir()) == sorted([*before, Path("a.jsonl")])


def test_overlap_by_13_words_is_reported_in_addition(check: Check) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    jsonl(
        Path("q.jsonl"),
        {"question": f"{long} {' '.join(f'q{i}' for i in range(60))}", "choices": ["a", "b"], "answer": 0},
    )
    jsonl(Path("a.jsonl"), ask(f"{' '.join(f'p{i}' for i in range(60))} {long}"), ask("Short"))
    done = check("a.jsonl", "--against", "q.jsonl", "--thirteen-grams", "--json")
    assert done.document["thirteen_grams"] == {
        "rows": 1, "pairs": 1, "matches": [{"place": "a.jsonl:0", "other": "q.jsonl:0", "shared": long}]
    }  # fmt: skip
    assert "benchmark_leakage" not in done.findings
    said = check("a.jsonl", "--against", "q.jsonl", "--thirteen-grams").out
    assert f"13 shared words, the common rule: 1 row, 1 pair\n  a.jsonl:0 ~ q.jsonl:0   {long}" in said


# Policy


def policy(text: str) -> str:
    Path("policy.yaml").write_text(text, encoding="utf-8")
    return "policy.yaml"


@pytest.mark.parametrize(
    ("action", "kept", "severity", "code"),
    [("drop", 3, "warn", 0), ("warn", 4, "warn", 0), ("review", 4, "warn", 0), ("fail", 4, "error", 1)],
)
def test_the_policy_decides_what_happens_to_a_row(
    action: str, kept: int, severity: str, code: int, check: Check
) -> None:
    jsonl(Path("a.jsonl"), *many(3), ask("Mail ann.lee@post.example.org about it"))
    done = check("a.jsonl", "--policy", policy(f"policy: {{pii: {action}}}"), "--json")
    assert (done.document["kept"], done.findings["pii"]["severity"], done.code) == (kept, severity, code)


def test_limits_and_severities_come_from_the_policy(check: Check) -> None:
    jsonl(Path("a.jsonl"), *many(3), ask("Hi", ""))
    assert "small_dataset" in check("a.jsonl", "--json").findings
    done = check(
        "a.jsonl",
        "--policy",
        policy("{min_rows: 2, max_tokens: 16, severity: {empty_response: info, too_long: error}}"),
        "--json",
    )
    assert "small_dataset" not in done.findings and done.findings["empty_response"]["severity"] == "info"
    assert (done.findings["too_long"]["count"], done.code) == (3, 1)


def test_a_waived_row_is_kept_without_error_and_an_unused_waiver_is_reported(check: Check) -> None:
    jsonl(Path("a.jsonl"), *many(3), ask(f"Use the key {KEY} for it", "Done, thank you."))
    assert check("a.jsonl").code == 1
    text = "waivers: [{{check: secrets, rows: ['{}'], reason: made up, expires: 2999-01-01}}]"
    done = check("a.jsonl", "--policy", policy(text.format("a.jsonl:3")), "--json")
    assert (
        done.code,
        done.document["kept"],
        done.findings["secrets"]["waived"],
        done.findings["secrets"]["count"],
    ) == (0, 4, 1, 0)
    done = check("a.jsonl", "--policy", policy(text.format("b.jsonl:3")))
    assert done.code == 1 and "waived or reviewed, but not in the set: b.jsonl:3" in done.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "waivers: [{check: pii, rows: ['a:1'], reason: x, expires: 2020-01-01}]",
            "waivers.0: the waiver for pii expired on 2020-01-01",
        ),
        ("waivers: [{check: pii, rows: ['a:1'], reason: x, expires: 2027-02-30}]", "day is out of range"),
        ("waivers: [{check: pii, rows: ['a:1'], expires: 2999-01-01}]", "reason: missing"),
        ("waivers: [{check: pii, reason: x, expires: 2999-01-01}]", "names neither rows nor pairs"),
        ("waivers: [{check: small_dataset, rows: [a], reason: x, expires: 2999-01-01}]", "is not a check on rows"),
        ("policy: {pij: drop}", "unknown check 'pij'"),
        ("policy: {pii: burn}", "'drop', 'review', 'warn' or 'fail'"),
        ("policy: {small_dataset: drop}", "applies to the set as a whole"),
        ("minrows: 3", "minrows: unknown key"),
        ("min_rows: three", "valid integer"),
        ("min_rows: [", "is not valid YAML"),
        ("- a", "expected a mapping"),
        ("instructions: [a]", "expected a mapping"),
        ("\0", "is not valid YAML"),
        ("x: !!int a", "is not valid YAML"),
        ("? [[a], {b: 1}]\n: 1", "is not valid YAML"),
        ("x: !!bool a", "is not valid YAML"),
        ("x: !!python/object:os.system a", "is not valid YAML"),
        ("a: &a {b: *a}", "a: unknown key"),
        ("max_tokens: 1", "greater than or equal to 16"),
        ("min_rows: 1\nmin_rows: 2", "duplicate key"),
    ],
)
def test_an_invalid_policy_is_refused(text: str, said: str, check: Check) -> None:
    refused(check(jsonl(Path("a.jsonl"), ANSWERED), "--policy", policy(text)), "policy.yaml", said)


def test_a_policy_that_is_not_utf_8_is_refused(check: Check) -> None:
    Path("policy.yaml").write_bytes("# é".encode("latin-1"))
    refused(check(jsonl(Path("a.jsonl"), ANSWERED), "--policy", "policy.yaml"), "policy.yaml is not valid YAML")


def test_a_whole_params_yaml_is_a_policy(check: Check) -> None:
    jsonl(Path("a.jsonl"), *many(3))
    assert check("a.jsonl", "--policy", ROOT / "params.yaml").code == 0
    done = check(
        "a.jsonl",
        "--policy",
        policy("compute: {seed: 1}\ninstructions: {min_rows: 2, benchmarks: [b.jsonl], review: r.csv}"),
        "--json",
    )
    assert "small_dataset" not in done.findings
    assert check("a.jsonl", "--policy", policy("")).code == 0


# Report


def test_the_page_shows_the_figures_of_the_document_and_loads_nothing(check: Check) -> None:
    rows = [*many(3), ask("Hi", ""), *many(1), ask(f"{LONG}!"), ask(LONG), "no json"]
    done = check(jsonl(Path("a.jsonl"), *rows), "--report", "new/folder/page.html", "--json")
    page = Path("new/folder/page.html").read_text(encoding="utf-8")
    assert done.err == "report: new/folder/page.html\n"
    found = done.document
    for finding in found["findings"]:
        card = page[page.index(f'<bdi dir="auto">{finding["check"]}</bdi></h3>') :]
        count = f"{finding['count']:,}" if finding["rows"] else "the set"
        assert re.search(r'<p class="count">([^<]+)</p>', card)[1] == count  # type: ignore[index]
    assert f"{found['rows']} read = " in page and f"{found['kept']} kept" in page
    assert all(f"{n} {name}" in page for name, n in found["dropped"].items())
    assert not re.search(r'(src|href)="(?!#)', page) and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_the_page_is_the_same_in_every_run_and_with_or_without_json(check: Check) -> None:
    jsonl(Path("a.jsonl"), *many(3), ask(f"{LONG}!"), ask(LONG))
    check("a.jsonl", "--report", "a.html", "--json")
    check("a.jsonl", "--report", "b.HTML")
    assert Path("a.html").read_bytes() == Path("b.HTML").read_bytes()


# What changed


BEFORE = many(4)
AFTER = [
    BEFORE[0],
    ask(BEFORE[1]["instruction"], "Another answer, and a longer one."),
    BEFORE[3],
    ask("Mail ann.lee@post.example.org today"),
]


def git(*arguments: str) -> str:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    done = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def committed(*names: str) -> None:
    git("init", "-q", ".")
    git("add", "--", *names)
    git("commit", "-qm", "first")


@pytest.mark.parametrize("version", ["path", "revision"])
@pytest.mark.parametrize("folder", [False, True])
def test_changed_added_and_removed_rows_are_reported(version: str, folder: bool, check: Check) -> None:
    Path("set").mkdir()
    Path("old").mkdir()
    jsonl(Path("set/a.jsonl"), *BEFORE)
    jsonl(Path("old/a.jsonl"), *BEFORE)
    committed("set")
    jsonl(Path("set/a.jsonl"), *AFTER)
    path, old = ("set/", "old/") if folder else ("set/a.jsonl", "old/a.jsonl")
    since = old if version == "path" else "HEAD"
    changes = check(path, "--since", since, "--json").document["changes"]
    assert (changes["previous"], changes["rows"]) == (since, {"added": 1, "removed": 1, "changed": 1, "unchanged": 2})
    assert [one["place"] for one in changes["examples"]["added"]] == ["set/a.jsonl:3"]
    assert [one["place"] for one in changes["examples"]["removed"]] == ["set/a.jsonl:2 (before)"]
    (edit,) = changes["examples"]["changed"]
    assert edit["place"] == "set/a.jsonl:1" and "made in town" in edit["before"] and "longer one" in edit["after"]
    assert [one["check"] for one in changes["findings"]["new"]] == ["pii"] and "ann.lee" not in json.dumps(changes)
    said = check(path, "--since", since).out
    assert f"rows since {since}: 1 added, 1 removed, 1 changed, 2 unchanged" in said and "new findings: pii 1" in said
    check(path, "--since", since, "--report", "page.html")
    assert "Since <code>" in Path("page.html").read_text()


def test_resolved_findings_are_reported(check: Check) -> None:
    jsonl(Path("old.jsonl"), *AFTER)
    said = check(jsonl(Path("a.jsonl"), *BEFORE), "--since", "old.jsonl")
    assert "findings that are gone: pii 1" in said.out


def test_several_paths_each_have_their_earlier_version(check: Check) -> None:
    for name in ("a.jsonl", "set/b.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        jsonl(Path(name), *BEFORE)
    committed("a.jsonl", "set")
    jsonl(Path("set/b.jsonl"), *BEFORE, ask("A new one, is it?"))
    changes = check("a.jsonl", "./set", "--since", "HEAD", "--json").document["changes"]
    assert changes["rows"] == {"added": 1, "removed": 0, "changed": 0, "unchanged": 8}


def test_a_name_that_is_not_utf_8_a_link_and_a_submodule_have_an_earlier_version(check: Check) -> None:
    Path("set").mkdir()
    odd = os.fsdecode(b"set/odd \xff\n.jsonl")
    jsonl(Path(odd), *BEFORE)
    jsonl(Path("set/plain.jsonl"), *BEFORE)
    Path("set/link.jsonl").symlink_to("plain.jsonl")
    committed("set")
    git("update-index", "--add", "--cacheinfo", f"160000,{git('rev-parse', 'HEAD')},set/module")
    git("commit", "-qm", "second")
    assert check("set", "--since", "HEAD", "--json").document["changes"]["rows"]["unchanged"] == 12
    assert check("set/link.jsonl", "--since", "HEAD", "--json").document["changes"]["rows"]["unchanged"] == 4


def test_an_earlier_file_of_git_lfs_is_read_or_refused_and_its_pointer_is_not_data(check: Check) -> None:
    content = jsonl(Path("a.jsonl"), *BEFORE).read_bytes()
    oid = hashlib.sha256(content).hexdigest()
    Path("a.jsonl").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n")
    committed("a.jsonl")
    jsonl(Path("a.jsonl"), *AFTER)
    refused(check("a.jsonl", "--since", "HEAD"), "--since HEAD: a.jsonl is a file of Git LFS")
    stored = Path(".git/lfs/objects", oid[:2], oid[2:4], oid)
    stored.parent.mkdir(parents=True)
    stored.write_bytes(content[:-1])
    refused(check("a.jsonl", "--since", "HEAD"), "`git lfs fetch origin ")
    stored.write_bytes(content)
    changes = check("a.jsonl", "--since", "HEAD", "--json").document["changes"]
    assert changes["rows"] == {"added": 1, "removed": 1, "changed": 1, "unchanged": 2}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_or_git_annex_is_not_read_as_data(check: Check, name: str) -> None:
    pointers = [
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a1' * 32}\nsize 123\n",
        "/annex/objects/SHA256E-s12--abc.jsonl\n",
    ]
    for pointer in pointers:
        Path(name).write_text(pointer)
        refused(check(name), f"{name}: a pointer of Git LFS or git-annex, and not the data", "git lfs pull")


def test_an_earlier_file_of_git_annex_or_that_git_lost_is_refused(check: Check) -> None:
    jsonl(Path("a.jsonl"), *BEFORE)
    committed("a.jsonl")
    digest = git("rev-parse", "HEAD:a.jsonl").strip()
    Path(".git/objects", digest[:2], digest[2:]).unlink()
    refused(check("a.jsonl", "--since", "HEAD"), "git cannot read it")
    Path("a.jsonl").write_text("/annex/objects/SHA256E-s12--abc.jsonl\n")
    committed("a.jsonl")
    jsonl(Path("a.jsonl"), *BEFORE)
    refused(check("a.jsonl", "--since", "HEAD"), "is in git-annex")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.jsonl", "--since", "nowhere"], "--since nowhere: no such path, and no such revision"),
        (["a.jsonl", "--since=--help"], "no such revision"),
        (["a.jsonl", "--since=-p"], "no such revision"),
        (["a.jsonl", "--since=HEAD:a.jsonl"], "no such revision"),
        (["new.jsonl", "--since", "HEAD"], "new.jsonl is not in git"),
        (["gone.jsonl", "--since", "HEAD"], "gone.jsonl does not exist here"),
        (["a.jsonl", "--since", "pairs.jsonl"], "pairs.jsonl holds preferences, a.jsonl examples"),
        ([Path(os.devnull), "--since", "HEAD"], "is not in git"),
    ],
)
def test_an_invalid_earlier_version_is_refused(arguments: list[str], said: str, check: Check) -> None:
    committed(jsonl(Path("a.jsonl"), ANSWERED).name, jsonl(Path("gone.jsonl"), ANSWERED).name)
    Path("gone.jsonl").unlink()
    jsonl(Path("new.jsonl"), ANSWERED)
    jsonl(Path("pairs.jsonl"), *PAIR_ROWS["preference"])
    refused(check(*arguments), said)


def test_outside_a_repository_and_without_git_a_revision_is_refused(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(Path("a.jsonl"), ANSWERED)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    refused(check("a.jsonl", "--since", "HEAD"), "no such revision in git")
    monkeypatch.setenv("PATH", str(Path.cwd()))
    refused(check("a.jsonl", "--since", "HEAD"), "git is not installed")


def test_a_change_of_a_secret_alone_shows_neither_value(check: Check) -> None:
    keys = [KEY, KEY[:-1] + "C"]
    for name, key in zip(("old.jsonl", "new.jsonl"), keys, strict=True):
        jsonl(Path(name), ask(f"{'Read this. ' * 40}My key is {key}, use it"))
    done = check("new.jsonl", "--since", "old.jsonl", "--json")
    assert done.document["changes"]["rows"]["changed"] == 1
    assert not any(key[6:] in done.out for key in keys)


# The base model


def test_a_base_model_counts_tokens_and_its_template_is_checked(check: Check, tiny_model: Path) -> None:
    jsonl(Path("a.jsonl"), *many(3), ask("Where? " * 700))
    done = check("a.jsonl", "--base-model", tiny_model, "--json")
    assert done.findings["too_long"]["rows"] == [3] and "estimated" not in done.findings["too_long"]["note"]
    assert "tokens" in done.document["profile"]["lengths"]
    assert "estimated at four bytes" in check("a.jsonl").out


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_broken_base_model_is_refused(content: str, check: Check) -> None:
    Path("model").mkdir()
    (Path("model") / "tokenizer.json").write_text(content)
    refused(check(jsonl(Path("a.jsonl"), ANSWERED), "--base-model", "model"), "model: the tokenizer cannot be read")


# What each kind of data is judged by


def kto(*judged: tuple[str, str, bool]) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], "label": good}
        for asked, said, good in judged
    ]


@pytest.mark.parametrize("arguments", [[], ["--format", "kto"], ["--format", "dpo"]])
def test_answers_called_good_or_bad_are_checked_as_pairs(arguments: list[str], check: Check) -> None:
    rows = kto(
        ("Where is my kite?", "It flies over the hill.", True), ("Where is my kite?", "Who cares, go and look.", False)
    )
    done = check(jsonl(Path("a.jsonl"), *rows), "--json", *arguments)
    assert (done.document["format"], done.document["rows"], done.document["kept"]) == ("kto", 1, 1)
    assert "malformed_row" not in done.findings


def test_a_labeled_answer_without_a_counterpart_is_only_reported_as_unpaired(check: Check) -> None:
    rows = kto(
        ("Where is my kite?", "It flies over the hill.", True),
        ("Who took the parcel?", "How would I know that.", False),
    )
    done = check(jsonl(Path("a.jsonl"), *rows), "--json")
    assert done.document["dropped"] == {"unpaired_answer": 2} and done.findings["unpaired_answer"]["rows"] == [0, 1]
    assert not {"malformed_row", "ends_on_user_turn", "empty_response"} & done.findings.keys()


@pytest.mark.parametrize("tie", [0, 1.5])
def test_a_tie_is_counted_as_one_and_does_not_make_a_held_out_file_unreadable(tie: float, check: Check) -> None:
    rows = [
        {
            "instruction": asked,
            "output_1": "It flies over the hill.",
            "output_2": "Who cares.",
            "preference": preference,
        }
        for asked, preference in ((LONG, tie), ("Who took the blue parcel from the shelf?", 1))
    ]
    done = check(jsonl(Path("a.jsonl"), *rows), "--json")
    assert done.findings["tied_pair"]["rows"] == [0] and "malformed_row" not in done.findings
    leaked = check(jsonl(Path("b.jsonl"), ask(LONG), *many(3)), "--against", "a.jsonl", "--json")
    assert leaked.findings["benchmark_leakage"]["rows"] == [0]


@pytest.mark.parametrize("column", ["prompt", "question", "instruction"])
def test_prompts_without_answers_can_be_held_out(column: str, check: Check) -> None:
    jsonl(Path("held.jsonl"), {"id": 1, column: LONG}, {"id": 2, column: "Who took the blue parcel from the shelf?"})
    leaked = check(jsonl(Path("a.jsonl"), ask(LONG), *many(3)), "--against", "held.jsonl", "--json")
    assert leaked.findings["benchmark_leakage"]["rows"] == [0]
    refused(
        check("a.jsonl", "--against", jsonl(Path("held.jsonl"), {column: LONG}, {column: None})),
        "held.jsonl: row 1",
        "prompts",
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["mmlu", "mmlu, in columns", "agieval", "hellaswag", "ifeval"])
def test_a_benchmark_is_checked_and_held_out_from_each_file_type(name: str, suffix: str, check: Check) -> None:
    row, question, _ = BENCHMARK_ROWS[name]
    FILE_WRITERS[suffix](
        Path(f"a{suffix}"),
        [
            {key: value for key, value in row.items() if value is not None and key != "kwargs"}
            | ({"kwargs": "[]"} if "kwargs" in row else {})
        ],
    )
    found = check(f"a{suffix}", "--json").document
    assert (found["format"], found["rows"], found["kept"]) == (name.partition(",")[0], 1, 1)
    leaked = check(jsonl(Path("b.jsonl"), ask(question), *many(3)), "--against", f"a{suffix}", "--json")
    assert leaked.findings["benchmark_leakage"]["rows"] == [0]


def test_a_waiver_for_a_row_covers_each_of_its_instances(check: Check) -> None:
    jsonl(
        Path("a.jsonl"),
        {
            "instruction": "Name it.",
            "instances": [
                {"input": f"Write to ann.{name}@kites.co.uk", "output": "It is a kite."} for name in ("lee", "low")
            ],
        },
    )
    Path("p.yaml").write_text("waivers: [{check: pii, rows: ['a.jsonl:0'], reason: public, expires: '2999-01-01'}]")
    assert check("a.jsonl", "--json").findings["pii"]["dropped"] == 2
    assert check("a.jsonl", "--json", "--policy", "p.yaml").document["dropped"].get("pii", 0) == 0


PREFERENCES: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
    "identical_pair": ([{"prompt": "Where is it?", "chosen": "Here.", "rejected": "Here."}], [0]),
    "prompt_mismatch": (
        [
            {
                "chosen": "\n\nHuman: Where is it?\n\nAssistant: Here.",
                "rejected": "\n\nHuman: Who are you?\n\nAssistant: Ann.",
            }
        ]
        * 2,
        [0, 1],
    ),
    "tied_pair": (
        [{"instruction": "Where is it?", "output_1": "Here.", "output_2": "There it is.", "preference": 1.5}],
        [0],
    ),
    "exact_duplicates": ([{"prompt": "Where is it?", "chosen": "Here.", "rejected": "No."}] * 3, [1, 2]),
    "conflicting_responses": (
        [{"prompt": "Where is it?", "chosen": a, "rejected": b} for a, b in (("Here.", "There."), ("There.", "Here."))],
        [1],
    ),
    "empty_response": ([{"prompt": "Where is it?", "chosen": "Here.", "rejected": " "}], [0]),
    "malformed_row": (
        [
            {"prompt": "Where is it?", "chosen": "Here.", "rejected": 3},
            {"prompt": "Who?", "chosen": "I.", "rejected": "No."},
        ],
        [0],
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_checked_as_pairs(name: str, check: Check) -> None:
    rows, broken = PREFERENCES[name]
    done = check(jsonl(Path("a.jsonl"), *rows), "--json")
    assert done.findings[name]["rows"] == broken
    assert name == "malformed_row" or "malformed_row" not in done.findings
    assert done.findings.keys() <= checks_of("preferences").keys()


def test_answers_to_different_questions_are_not_a_pair(check: Check) -> None:
    def transcript(*turns: str) -> str:
        return "".join(f"\n\n{who}: {said}" for who, said in zip(("Human", "Assistant") * 2, turns, strict=True))

    apart = {
        "chosen": transcript("Hi", "What?", "My parcel", "Its number?"),
        "rejected": transcript("Hi", "Go.", "Why?", "Because."),
    }
    same = {
        "chosen": transcript("Hi", "What?", "My parcel", "Its number?"),
        "rejected": transcript("Hi", "What?", "My parcel", "Because."),
    }
    assert check(jsonl(Path("a.jsonl"), apart, same), "--json").findings["prompt_mismatch"]["rows"] == [0]


def test_only_a_margin_of_0_is_a_tie(check: Check) -> None:
    rows = [
        {"prompt": f"Where is {margin}?", "chosen": "Here.", "rejected": "There.", "margin": margin}
        for margin in (0, 0.0, 1, -2, None)
    ]
    assert check(jsonl(Path("a.jsonl"), *rows), "--json").findings["tied_pair"]["rows"] == [0, 1]


def test_a_set_in_which_one_length_always_wins_is_reported_as_biased(check: Check) -> None:
    rows = [
        {"prompt": f"Where is {i}?", "chosen": f"Here it is, number {i}.", "rejected": f"No {i}."} for i in range(10)
    ]
    assert check(jsonl(Path("a.jsonl"), *rows), "--json").findings["length_bias"]["count"] == 1
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    note = check(jsonl(Path("a.jsonl"), *turned), "--json").findings["length_bias"]["note"]
    assert note.startswith("chosen is shorter in 100% of pairs")
    half = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i % 2 else row for i, row in enumerate(rows)
    ]
    assert "length_bias" not in check(jsonl(Path("a.jsonl"), *half), "--json").findings


def test_a_median_between_two_lengths_is_not_rounded_to_one_of_them(check: Check) -> None:
    for lengths, median in (([1, 2], "1.5"), ([2, 3], "2.5"), ([3, 3], "3")):
        rows = [{"prompt": f"why{i} " * n, "response": "Because."} for i, n in enumerate(lengths)]
        said = check(jsonl(Path("a.jsonl"), *rows)).out
        assert f"prompt: median {median}, 95 % up to {lengths[1]}, longest {lengths[1]} words" in said


def test_examples_have_no_check_for_pairs_or_questions(check: Check) -> None:
    found = check(jsonl(Path("a.jsonl"), *many(30)), "--json").document
    assert {*found["notes"], *(finding["check"] for finding in found["findings"])} <= checks_of("examples").keys()
    assert {*found["notes"]} <= set(CHECKS)


def test_a_question_without_its_answer_is_unlabelled(check: Check) -> None:
    rows = [
        QUIZ["mmlu"],
        {**QUIZ["mmlu"], "question": "Is it far?", "answer": -1},
        {**QUIZ["mmlu"], "question": "Is it old?", "answer": 7},
    ]
    done = check(jsonl(Path("a.jsonl"), *rows), "--json")
    assert (done.findings["unlabelled"]["rows"], done.findings["malformed_row"]["rows"], done.code) == ([1], [2], 1)


def test_plain_text_needs_no_prompt_and_no_roles(check: Check) -> None:
    Path("a.txt").write_text(
        "The kite flies over the hill.\n\nA river runs below it.\n\nThe kite flies over the hill.\n"
    )
    done = check("a.txt", "--json")
    assert (done.document["format"], done.document["rows"], done.findings["exact_duplicates"]["rows"]) == (
        "text",
        3,
        [2],
    )
    assert not {"invalid_roles", "empty_prompt", "ends_on_user_turn", "empty_response"} & done.findings.keys()


def test_a_row_in_two_splits_is_found(check: Check) -> None:
    rows = [ask(LONG, split="train"), *many(2, split="train"), ask(LONG.replace("garden", "yellow"), split="test")]
    leak = check(jsonl(Path("a.jsonl"), *rows), "--json").findings["split_leakage"]
    assert (leak["rows"], leak["severity"], leak["matches"][0]["other"]) == ([0], "error", "a.jsonl:3")


# At a terminal


def test_a_newcomer_sees_verdict_rows_reason_and_next_step(check: Check) -> None:
    done = check(jsonl(Path("a.jsonl"), *many(3), ask("Hi", ""), '{"instruction": "cut'))
    assert done.out.startswith(
        "5 rows (alpaca), 3 would be kept; 2 errors, 1 warning\nwould be dropped: malformed_row 1, empty_response 1\n"
    )
    assert "a.jsonl:4  line is not JSON: Unterminated string starting at: column 17 (line 5)" in done.out
    assert done.out.count("next: ") == 3
    assert "\nfields used: instruction 4, output 4\n" in done.out
    assert "benchmark_leakage      nothing held out to compare with" in done.out


def test_a_conflict_shows_both_answers_and_a_repeat_its_text_once(check: Check) -> None:
    done = check(jsonl(Path("a.jsonl"), ask(LONG, "It is here."), ask(LONG, "It is lost."), ask(LONG, "It is here.")))
    conflict = done.out[done.out.index("\nconflicting_responses  ") :].partition("next:")[0]
    assert (
        f"a.jsonl:1 ~ a.jsonl:0   prompt, equal 1.00\n      {LONG}  It is lost.\n      {LONG}  It is here.\n"
        in conflict
    )
    repeat = done.out[done.out.index("\nexact_duplicates  ") :].partition("next:")[0]
    assert repeat.count(LONG) == 1


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_table_with_another_separator_is_refused_by_it(mark: str, check: Check) -> None:
    Path("a.csv").write_text(f"prompt{mark}completion\nHi{mark}Hello\n")
    refused(check("a.csv"), f"columns are separated by {mark!r}", "commas")


@pytest.mark.parametrize("columns", ["1", "20", "80", "400"])
def test_the_output_fits_every_terminal(columns: str, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = check(jsonl(Path("a.jsonl"), *many(3), ask(f"{LONG}!"), ask(LONG)))
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= max(40, int(columns))


@pytest.mark.long
def test_a_terminal_that_is_not_utf_8_gets_every_row_and_a_file_name_of_any_bytes_is_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"odd \xff.jsonl")
    jsonl(tmp_path / name, ask("Grüße, 你好 🎉", ""))
    done = by_itself(name, folder=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (1, b"") and b"\\udcff.jsonl:0" in done.stdout
    for encoding in ("ascii", "utf-8"):
        done = by_itself(name, "--json", folder=tmp_path, PYTHONIOENCODING=encoding)
        assert json.loads(done.stdout)["findings"][0]["places"] == [f"{name}:0"] and done.stderr == b""


def test_a_closed_pipe_changes_neither_exit_code_nor_stderr(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ask("Hi", ""), *many(3000))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dagster_project", "check", "a.jsonl", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=300) == 1


# Data that nobody here wrote


real = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data, the real data sets, is missing")


@real
def test_a_real_alpaca_file_has_its_known_defects_and_few_false_positives(check: Check) -> None:
    done = check(SHARED_DATA / "alpaca_en_demo.json", "--json")
    found = done.document
    assert (done.code, found["format"], found["rows"], found["kept"]) == (
        0,
        "alpaca",
        999,
        999 - sum(found["dropped"].values()),
    )
    assert (done.findings["exact_duplicates"]["count"], done.findings["placeholder_input"]["count"]) == (14, 8)
    true = {91}  # a made-up telephone number that looks like one; the others are example.com
    assert len(set(done.findings["pii"]["rows"]) - true) <= 2
    assert not {"secrets", "encoding", "special_tokens_in_text", "malformed_row"} & done.findings.keys()


@real
def test_a_real_preference_file_has_its_known_defects(check: Check) -> None:
    for arguments in ([], ["--format", "dpo"], ["--format", "sharegpt"]):
        done = check(SHARED_DATA / "dpo_en_demo.json", "--json", *arguments)
        assert (done.document["format"], done.document["rows"], done.findings["exact_duplicates"]["count"]) == (
            "sharegpt",
            300,
            5,
        )
        assert "malformed_row" not in done.findings and done.code == 0


@real
def test_every_real_tree_is_read_as_examples_and_as_preferences(check: Check) -> None:
    done = check(SHARED_DATA / "oasst_en_100_tree.jsonl", "--json")
    assert (done.document["format"], done.document["rows"]) == ("oasst", 100) and "malformed_row" not in done.findings
    done = check(SHARED_DATA / "oasst_en_100_tree.jsonl", "--json", "--format", "dpo")
    assert done.document["rows"] > 300 and "prompt_mismatch" not in done.findings
    assert max(row for finding in done.findings.values() for row in finding["rows"]) < 100


@real
def test_real_training_questions_that_nearly_repeat_the_test_set_are_found(check: Check) -> None:
    leak = check(SHARED_DATA / "gsm8k_train.jsonl", "--against", SHARED_DATA / "gsm8k_test.jsonl", "--json").findings[
        "benchmark_leakage"
    ]
    assert "equal" not in {match["rule"] for match in leak["matches"]}
    assert (f"{SHARED_DATA}/gsm8k_train.jsonl:20", f"{SHARED_DATA}/gsm8k_test.jsonl:632") in {
        (match["place"], match["other"]) for match in leak["matches"]
    }
