"""Repairs are counted, checked again, recorded in the ledger, and written by `pedigree check --out`."""

from __future__ import annotations

import csv
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from builders.commands import Done
from conftest import ROOT, SHARED_DATA, draw_pages
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.records import Report, content_id, read_ledger, read_records, write_ledger, write_records
from dagster_project.curation.check_files import load
from dagster_project.curation.checks import privacy
from dagster_project.curation.checks.checks import SET_CHECKS, Judgement, Rules, judge
from dagster_project.curation.checks.damage import decomposed, hidden, without_end_marks, without_hidden
from dagster_project.curation.checks.findings import document
from dagster_project.curation.checks.repair import REPAIRS
from dagster_project.curation.checks.review import Decision, Waiver
from dagster_project.curation.checks.row_checks import ROW_CHECKS
from dagster_project.curation.sources import fields
from dagster_project.curation.sources.files import Row
from dagster_project.curation.sources.formats import as_record, pairs_of, records_of
from dagster_project.lineage.rows import EDITED, LEDGER, contributions, record_key
from dagster_project.stages import instructions, preferences, raw_preferences, splits

MAIL = "ann.lee@kites.co.uk"
KEY = "AKIA" + "Q3EXAMPLE7KEY2AB"
MARKS = [
    "<|endoftext|>",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    " </s>\n",
    "<|im_end|>\n<|endoftext|>",
]


def asked(prompt: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"instruction": prompt, "output": answer, **more}


def records(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    found = records_of([Row(i, row) for i, row in enumerate(rows)], "rows", "rows.jsonl")[1]
    fields.taken(found)
    return found


def pairs(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [as_record(pair) for pair in pairs_of([Row(i, row) for i, row in enumerate(rows)], "rows", "rows.jsonl")[1]]


def judged(rows: list[dict[str, Any]], decisions: list[Decision] | None = None, **rules: Any) -> Judgement:
    return judge(
        rows, [], Rules(**rules), decisions=decisions or [], kind="preferences" if "rejected" in rows[0] else "examples"
    )


def said(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"]]


# The repairs


@pytest.mark.parametrize("mark", MARKS)
def test_an_end_of_text_marker_is_stripped_and_the_row_kept(mark: str) -> None:
    found = judged(
        records(asked("Where is my kite?", f"In the hall.{mark}"), asked("Is it blue?", "It is <b>red</b>."))
    )
    assert found.reason == [None, None]
    assert said(found.records[0]) == ["Where is my kite?", "In the hall."]
    assert (found.fixed, found.verdicts["special_tokens_in_text"].passed) == ({"special_tokens_in_text": 1}, True)


@pytest.mark.parametrize(
    "text",
    [
        "Say <|im_end|> at the end.",
        "<|im_start|>user\nHi<|im_end|>",
        "[INST] Hi [/INST] Ho</s>",
        "### Response: yes</s>",
    ],
)
def test_a_marker_within_a_text_is_not_repaired_but_dropped_as_it_was_read(text: str) -> None:
    rows = records(asked("Where is my kite?", text))
    found = judged(rows)
    assert (found.reason, [*found.records], found.fixed) == (["special_tokens_in_text"], rows, {})


@pytest.mark.parametrize("text", ["It was <s>10</s> 8 euros, not <s>12</s>", "<s>old</s> new"])
def test_html_strikethrough_is_not_removed_as_a_marker(text: str) -> None:
    assert without_end_marks(text) == text


@pytest.mark.parametrize(
    ("text", "plain"),
    [("<s>Hi there</s>", "Hi there"), ("<s> Hi", "Hi"), ("<|begin_of_text|>Hi<|eot_id|>", "Hi"), ("</s>", "")],
)
def test_the_marks_around_a_sequence_are_stripped(text: str, plain: str) -> None:
    assert without_end_marks(text) == plain


def test_an_answer_that_is_nothing_but_a_marker_is_dropped_as_empty() -> None:
    assert judged(records(asked("Where is my kite?", "<|endoftext|>"))).reason == ["empty_response"]


@pytest.mark.parametrize(
    "text", ["\ufeffWhere is it?", "Where\u200b is it?", "Whe\u2060re is it?", "Where\u200d is\u200c it?"]
)
def test_byte_order_marks_and_zero_width_characters_are_removed(text: str) -> None:
    found = judged(records(asked(text, "In the hall.")))
    assert (found.reason, said(found.records[0])[0], found.fixed) == ([None], "Where is it?", {"hidden_characters": 1})


@pytest.mark.parametrize(
    "text", ["👩\u200d🚀", "می\u200cخواهم", "क्\u200dष", "សួស្តី\u200bពិភពលោក", "สวัสดี\u200bโลก", "❤\ufe0f\u200d🔥"]
)
def test_joiners_that_join_and_spaces_between_words_of_scripts_without_spaces_stay(text: str) -> None:
    assert without_hidden(text) == text and hidden([text]) == [None]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("aé \u200b\u200c\u200d\u2060\ufeffمក👩\ufe0f\n"), max_size=12))
def test_removed_characters_are_those_the_check_reports(text: str) -> None:
    assert (hidden([text]) == [None]) == (without_hidden(text) == text)
    assert hidden([without_hidden(text)]) == [None]


def test_a_label_is_repaired_in_the_category_too() -> None:
    rows = [asked("The bread is good", text, category=text) for text in ("cafe\u0301", "caf\u00e9\u200b", "caf\u00e9")]
    assert [record["category"] for record in judged(records(*rows)).records] == ["caf\u00e9"] * 3
    other = asked("The bread is good", "It is, in this cafe\u0301.", category="cafe\u0301")
    assert judged(records(other)).records[0]["category"] == "cafe\u0301"


def test_a_decomposed_text_is_composed() -> None:
    text = "Où est le café d'Ångström ? 한국어"
    found = judged(records(asked(unicodedata.normalize("NFD", text), "Ici.")))
    assert (said(found.records[0])[0], found.fixed, decomposed([text])) == (text, {"unicode_form": 1}, [None])


def test_a_field_named_input_that_is_not_in_the_prompt_drops_no_row() -> None:
    talk = [{"role": "user", "content": "Where is my kite?"}, {"role": "assistant", "content": "On its way."}]
    assert judged(records({"messages": talk, "input": "N/A"})).reason == [None]


@pytest.mark.parametrize("spelling", ["No input", "noinput", "< noinput >", "`<noinput>`", "N/A", "No input."])
def test_a_placeholder_input_is_emptied(spelling: str) -> None:
    found = judged(records(asked("Name a kite.", "Delta.", input=spelling)))
    assert (found.reason, said(found.records[0]), json.loads(found.records[0]["meta"])) == (
        [None],
        ["Name a kite.", "Delta."],
        {},
    )
    assert found.fixed == {"placeholder_input": 1}


def test_a_placeholder_that_is_the_whole_prompt_cannot_be_emptied() -> None:
    assert judged(records(asked("N/A", "Delta.", input="No input"))).reason == ["placeholder_input"]


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        (MAIL, "[EMAIL]"),
        ("+44 20 7946 0958", "[PHONE]"),
        ("4111 1111 1111 1111", "[CARD]"),
        ("DE89 3704 0044 0532 0130 00", "[IBAN]"),
        ("536-90-4399", "[NATIONAL_ID]"),
        ("104.244.42.193", "[IP_ADDRESS]"),
    ],
)
def test_personal_data_is_masked_by_a_typed_placeholder(value: str, masked: str) -> None:
    note = {"who": [value], "no": int(number) if (number := value.replace(" ", "")).isdecimal() else 7, "ok": True}
    row = asked(f"It was {value} that", "Gladly.", input=f"See {value}", note=note, category=f"from {value}")
    found = judged(records(row), policy={"pii": "fix"})
    assert (found.reason, said(found.records[0])[0]) == ([None], f"It was {masked} that\n\nSee {masked}")
    assert found.records[0]["category"] == f"from {masked}"
    whole = json.dumps([[record["messages"], record["meta"], record["category"]] for record in found.records])
    assert value not in whole and (str(note["no"]) in whole) == (note["no"] == 7)
    assert json.loads(found.records[0]["meta"])["note"]["ok"] is True
    assert privacy.scan(said(found.records[0])) == []


def test_the_policy_masks_secrets_and_personal_data_separately() -> None:
    found = judged(records(asked(f"Use {KEY} and write to {MAIL}", "Done.")), policy={"secrets": "fix", "pii": "warn"})
    assert said(found.records[0])[0] == f"Use [AWS_KEY] and write to {MAIL}"


def test_personal_data_in_the_name_of_a_speaker_is_found_and_masked() -> None:
    turns = [{"role": "user", "content": "Hello?", "name": MAIL}, {"role": "assistant", "content": "Good day."}]
    assert judged(records({"messages": turns})).reason == ["pii"]
    found = judged(records({"messages": turns}), policy={"pii": "fix"})
    assert (found.reason, found.records[0]["messages"][0]["name"]) == ([None], "[EMAIL]")


@pytest.mark.parametrize("secret", [True, False])
def test_masking_terminates_and_is_complete_in_any_context(secret: bool) -> None:
    values = [MAIL, KEY, "call 020 7946 0958", "https://bob:hunter2x@h.org", "104.244.42.193", "a", "[", "]:"]
    texts = [joint.join(parts) for parts in itertools.product(values, repeat=3) for joint in ("", " ", "@", "://")]
    masked = [privacy.redact(text, secret) for text in texts]
    assert [hit for hit in privacy.scan(masked) if hit.secret is secret] == []


def test_mojibake_is_repaired_if_the_policy_allows_it_and_dropped_otherwise() -> None:
    rows = records(asked("OÃ¹ est le cafÃ© ?\nIt is fine.", "Ici."))
    assert judged(rows).reason == ["encoding"]
    found = judged(rows, policy={"encoding": "fix"})
    assert (found.reason, said(found.records[0])[0]) == ([None], "Où est le café ?\nIt is fine.")


# The policy


@pytest.mark.parametrize("name", [name for name in (*ROW_CHECKS, *SET_CHECKS) if name not in REPAIRS])
def test_fix_is_refused_for_a_check_without_a_repair_and_the_others_are_listed(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no repair; checks that can be fixed: {', '.join(REPAIRS)}"):
        Rules(policy={name: "fix"})


@pytest.mark.parametrize("action", ["drop", "warn", "review", "fail"])
def test_only_the_policy_fix_changes_a_text(action: str) -> None:
    rows = records(
        asked("\ufeffWhere is the cafe\u0301?", "In the hall.</s>", input="No input"),
        asked(f"Write to {MAIL}", "I do."),
    )
    found = judged(rows, policy=dict.fromkeys(REPAIRS, action))
    assert ([*found.records], found.fixed, found.repaired) == (rows, {}, {})


# Judged again, and counted


def test_copies_that_only_the_repair_makes_equal_are_found() -> None:
    rows = records(
        asked(f"Write to {MAIL}", "I do."),
        asked("Write to bob@kites.org", "I do."),
        asked("Fly.</s>", "Up."),
        asked("Fly.", "Up."),
    )
    found = judged(rows, policy={"pii": "fix"})
    assert found.reason == [None, "exact_duplicates", None, "exact_duplicates"]
    assert (found.fixed, found.verdicts["pii"].broken) == ({"pii": 1, "special_tokens_in_text": 1}, [0, 1])


def test_a_repaired_row_has_a_new_id_and_keeps_the_original_one() -> None:
    rows = records(asked("Where is it?", "Here.</s>"), asked("Who flew it?", "Ann."))
    first, second = judged(rows).records
    assert (first["example_id"], first["source_id"], first["repaired"]) == (
        content_id(first),
        rows[0]["example_id"],
        ["special_tokens_in_text"],
    )
    assert first["example_id"] != first["source_id"] and second == rows[1]


def test_a_row_with_several_faults_is_repaired_for_each() -> None:
    text = f"\ufeffCafe\u0301 of {MAIL}"
    found = judged(records(asked(text, "Yes.<|endoftext|>", input="None")), policy={"pii": "fix"})
    assert said(found.records[0]) == ["Café of [EMAIL]", "Yes."]
    assert found.records[0]["repaired"] == [
        "hidden_characters",
        "unicode_form",
        "placeholder_input",
        "special_tokens_in_text",
        "pii",
    ]
    assert (found.reason, set(found.fixed.values())) == ([None], {1})


def test_the_document_counts_each_row_once_as_fixed_dropped_or_kept() -> None:
    rows = records(
        asked("Fly.", "Up.</s>"), asked("Fly.", "Up.<|im_end|>"), asked("A <|im_end|> b", "c"), asked("Land.", "Down.")
    )
    shown = document("set", "alpaca", judged(rows), [])
    assert (shown["rows"], shown["kept"], shown["dropped"]) == (
        4,
        2,
        {"special_tokens_in_text": 1, "exact_duplicates": 1},
    )
    assert shown["fixed"] == {"special_tokens_in_text": 1}
    (one,) = [f for f in shown["findings"] if f["check"] == "special_tokens_in_text"]
    assert (one["count"], one["fixed"], one["dropped"], one["elsewhere"]) == (3, 1, 1, 1)
    assert one["examples"][0] == "control token: '</s>'"


def test_a_value_that_was_masked_is_in_no_finding() -> None:
    found = judged(records(asked(f"Write to {MAIL} now", "I do.")), policy={"pii": "fix"})
    shown = json.dumps(document("set", "alpaca", found, []))
    assert MAIL not in shown and "e-mail: Write to [e-mail] now" in shown and "e-mail 1" in found.verdicts["pii"].note


def test_a_waived_row_is_left_as_it_was_read() -> None:
    rows = records(asked(f"Write to {MAIL}", "I do."), asked("Write to bob@kites.org", "He does."))
    waiver = Waiver(check="pii", rows=["rows.jsonl:0"], reason="a public address", expires="2999-01-01")  # type: ignore[arg-type]
    found = judged(rows, policy={"pii": "fix"}, waivers=[waiver])
    assert (said(found.records[0]), said(found.records[1])[0]) == (said(rows[0]), "Write to [EMAIL]")
    assert (found.verdicts["pii"].waived, found.fixed) == (1, {"pii": 1})


@pytest.mark.parametrize("by", ["source_id", "example_id"])
def test_reviewers_may_use_either_id_of_a_repaired_row(by: str) -> None:
    rows = records(asked("Where is it?", "Here.</s>"))
    (name,) = [record[by] for record in judged(rows).records]
    assert judged(rows, [Decision(name, "conflicting_responses", "drop", "rude")]).said == {0: "dropped: rude"}
    edited = judged(rows, [Decision(name, "conflicting_responses", "edit", "clearer", new_response="There.<|im_end|>")])
    assert (said(edited.records[0]), edited.reason) == (["Where is it?", "There."], [None])


def test_the_repairs_and_their_defaults_are_documented() -> None:
    page = (ROOT / "docs/checks.md").read_text()
    for name, one in REPAIRS.items():
        default = Rules().action(name)
        assert f"| `{name}` | {one.does} | {'yes' if default == 'fix' else f'no, `{default}`'} |" in page


def test_the_original_id_leads_to_the_repaired_row(tmp_path: Path, tiny_model: Path) -> None:
    rows = records(asked("Fly.", "Up.</s>"), asked("Land.", "Down."))
    staged(tmp_path, tiny_model, rows)
    credits, derived = contributions(tmp_path / "out" / LEDGER, LEDGER)
    kept = read_records(tmp_path / "out")[0]["example_id"]
    assert derived == [(record_key(rows[0]["example_id"]), record_key(kept), "repaired")] and credits == []


# Pairs


def test_every_side_of_a_pair_is_repaired() -> None:
    row = {"prompt": f"Ask {MAIL}</s>", "chosen": f"Wrote {MAIL}.<|im_end|>", "rejected": f"\ufeffNo {MAIL}<|eot_id|>"}
    found = judged(pairs(row), policy={"pii": "fix"})
    (one,) = found.records
    assert (said(one), one["rejected"][0]["content"]) == (["Ask [EMAIL]", "Wrote [EMAIL]."], "No [EMAIL]")
    assert (found.reason, one["example_id"]) == ([None], content_id(one))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("On its way.", "on its  way"),
        ("On its way.", "ON ITS WAY."),
        ("On its\nway.", " On its way.\n\n"),
        ("Un café.", "Un cafe\u0301"),
        ("ﬁne", "fine!"),
    ],
)
def test_a_pair_that_differs_only_in_form_is_identical(chosen: str, rejected: str) -> None:
    found = judged(
        pairs({"prompt": "Where is it?", "chosen": chosen, "rejected": rejected}), policy=dict.fromkeys(REPAIRS, "warn")
    )
    assert found.reason == ["identical_pair"]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Is it here?", "It is here."),
        ("Is it?", "Is it."),
        ("```\nif a:\n    b\n```", "```\nif a:\nb\n```"),
        ("Run `ls`:\n```\nTrue\n```", "Run `ls`:\n```\ntrue\n```"),
        ("if a:\n    b\n    c", "if a:\n    b\nc"),
        ("...", "!!!"),
    ],
)
def test_a_pair_that_differs_in_content_or_code_layout_is_not_identical(chosen: str, rejected: str) -> None:
    assert judged(pairs({"prompt": "Where is it?", "chosen": chosen, "rejected": rejected})).reason == [None]


def test_each_of_many_planted_pairs_that_are_equal_but_for_form_is_found() -> None:
    rows = [
        {
            "prompt": f"Where is kite {i}?",
            "chosen": f"Kite {i} is in the hall.",
            "rejected": f"No kite has the number {i}.",
        }
        for i in range(40)
    ]
    for i, row in enumerate(rows[:22]):
        row["rejected"] = row["chosen"].upper() if i % 2 else row["chosen"].replace(" ", "  ") + "\n"
    assert judged(pairs(*rows)).reason == ["identical_pair"] * 22 + [None] * 18


# The stages


def staged(folder: Path, model: Path, rows: list[dict[str, Any]], **params: Any) -> Report:
    write_records(folder / "data/raw_examples", rows)
    write_ledger(folder / "data/raw_examples", [{**row, "outcome": "read", "why": ""} for row in rows])
    report = instructions.produce(
        folder, instructions.Params(**params), folder / "data/raw_examples", model, folder / "out", folder / "pages", {}
    )
    draw_pages("instructions", report, folder / "out", folder / "pages")
    return report


def test_a_stage_writes_repaired_rows_and_the_ledger_names_the_originals(tmp_path: Path, tiny_model: Path) -> None:
    rows = records(asked("Fly.", "Up.</s>"), asked("Fly.", "Up."), asked("Who?", f"{MAIL} did."), asked("Land.", ""))
    report = staged(tmp_path, tiny_model, rows, policy={"pii": "fix"})
    assert (report.rows_in, report.rows_out, report.dropped) == (4, 2, {"empty_response": 1, "exact_duplicates": 1})
    assert report.document()["fixed"] == {"special_tokens_in_text": 1, "pii": 1} == report.fixed
    kept, ledger = read_records(tmp_path / "out"), read_ledger(tmp_path / "out")
    assert [said(record)[1] for record in kept] == ["Up.", "[EMAIL] did."]
    assert [line["example_id"] for line in ledger if line["outcome"] == "kept"] == [
        record["example_id"] for record in kept
    ]
    assert [line["source_id"] or line["example_id"] for line in ledger] == [row["example_id"] for row in rows]
    assert [line["repaired"] for line in ledger] == [["special_tokens_in_text"], None, ["pii"], None]
    assert ledger[0]["why"] == "repaired: special_tokens_in_text"
    page = (tmp_path / "pages/report.html").read_text()
    assert "repaired: " in page and "special_tokens_in_text" in page
    assert json.loads((tmp_path / "out/findings.json").read_text())["fixed"] == report.fixed


def test_a_ledger_without_repairs_has_no_new_columns(tmp_path: Path, tiny_model: Path) -> None:
    report = staged(tmp_path, tiny_model, records(asked("Fly.", "Up."), asked("Land.", "")))
    assert "fixed" not in report.document() and set(read_ledger(tmp_path / "out")[0]) == {
        "source",
        "source_row",
        "example_id",
        "outcome",
        "why",
    }


def test_repairs_are_carried_into_the_ledger_of_the_splits(tmp_path: Path, tiny_model: Path) -> None:
    rows = records(*(asked(f"Where is kite {i}?", f"In hall {i}.{'</s>' if i == 3 else ''}") for i in range(8)))
    staged(tmp_path, tiny_model, rows)
    splits.produce(tmp_path, splits.Params(), 7, tmp_path / "out", tmp_path / "splits")
    (line,) = [line for line in read_ledger(tmp_path / "splits") if line["repaired"]]
    assert (line["source_row"], line["source_id"], line["repaired"]) == (
        3,
        rows[3]["example_id"],
        ["special_tokens_in_text"],
    )


def edits(folder: Path, *lines: tuple[str, str, str]) -> str:
    """A review file that edits the answers of rows, from (id, check, new answer) of each."""
    path = folder / "data/sources/review/r.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("example_id", "check", "decision", "reason", "new_response"),
                *((*one[:2], "edit", "wrong", one[2]) for one in lines),
            ]
        )
    return "data/sources/review/r.csv"


def test_rows_that_a_reviewer_edited_are_made_from_the_rows_as_they_were_read(tmp_path: Path, tiny_model: Path) -> None:
    rows = records(*(asked(f"Where is kite {i}?", f"In hall {i}.") for i in range(8)))
    raw = [row["example_id"] for row in rows]
    review = edits(
        tmp_path,
        (raw[3], "reviewed", "In the attic."),
        (raw[5], "reviewed", "On the roof.</s>"),
        (raw[6], "reviewed", "In hall 6."),
    )
    staged(tmp_path, tiny_model, rows, review=review)
    splits.produce(tmp_path, splits.Params(), 7, tmp_path / "out", tmp_path / "splits")
    for folder in ("out", "splits"):
        lines = sorted(read_ledger(tmp_path / folder), key=lambda line: line["source_row"])
        assert [line["source_id"] for line in lines] == [raw[i] if i in (3, 5) else None for i in range(8)]
        assert [line["repaired"] for line in lines] == [
            ["special_tokens_in_text"] if i == 5 else None for i in range(8)
        ]
        made = {
            (parent, child)
            for parent, child, how in contributions(tmp_path / folder / LEDGER, LEDGER)[1]
            if how != EDITED
        }
        assert made == {(record_key(raw[i]), record_key(lines[i]["example_id"])) for i in (3, 5)}


def test_edited_rows_are_named_in_the_ledger_without_any_repair(tmp_path: Path, tiny_model: Path) -> None:
    rows = records(*(asked(f"Where is kite {i}?", f"In hall {i}.") for i in range(8)))
    staged(tmp_path, tiny_model, rows, review=edits(tmp_path, (rows[3]["example_id"], "reviewed", "In the attic.")))
    splits.produce(tmp_path, splits.Params(), 7, tmp_path / "out", tmp_path / "splits")
    for folder in ("out", "splits"):
        (line,) = [line for line in read_ledger(tmp_path / folder) if line["source_id"]]
        assert (line["source_row"], line["source_id"], line["repaired"]) == (3, rows[3]["example_id"], None)


def test_pairs_are_repaired_in_their_stage_and_accounted_for(tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        {"prompt": f"Where is kite {i}?", "chosen": f"In hall {i}.<|im_end|>", "rejected": f"Nobody knows {i}."}
        for i in range(6)
    ]
    rows[5]["rejected"] = "in hall 5"
    (tmp_path / "data/sources").mkdir(parents=True)
    (tmp_path / "data/sources/p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = raw_preferences.Params(sources=[{"path": "data/sources/p.jsonl"}])  # type: ignore[list-item]
    raw_preferences.produce(tmp_path, source, tmp_path / "raw")
    write_records(tmp_path / "splits/test", [])
    folders = (tmp_path / "raw", tmp_path / "splits", tiny_model, tmp_path / "out", tmp_path / "pages")
    report = preferences.produce(tmp_path, preferences.Params(), 7, *folders, {})
    assert (report.rows_in, report.rows_out, report.dropped) == (6, 5, {"identical_pair": 1})
    assert report.fixed == {"special_tokens_in_text": 5}
    kept = [pair for name in ("train", "validation", "test") for pair in read_records(tmp_path / "out" / name)]
    assert sorted(pair["chosen"][0]["content"] for pair in kept) == [f"In hall {i}." for i in range(5)]
    assert all(
        line["repaired"] == ["special_tokens_in_text"] and line["source_id"] for line in read_ledger(tmp_path / "out")
    )


def test_an_edited_pair_is_made_from_the_pair_as_it_was_read(tmp_path: Path, tiny_model: Path) -> None:
    rows = [
        {"prompt": f"Where is kite {i}?", "chosen": f"In hall {i}.", "rejected": f"Nobody knows {i}."} for i in range(6)
    ]
    (tmp_path / "data/sources").mkdir(parents=True)
    (tmp_path / "data/sources/p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = raw_preferences.Params(sources=[{"path": "data/sources/p.jsonl"}])  # type: ignore[list-item]
    raw_preferences.produce(tmp_path, source, tmp_path / "raw")
    raw = read_records(tmp_path / "raw")[2]["example_id"]
    write_records(tmp_path / "splits/test", [])
    folders = (tmp_path / "raw", tmp_path / "splits", tiny_model, tmp_path / "out", tmp_path / "pages")
    preferences.produce(
        tmp_path, preferences.Params(review=edits(tmp_path, (raw, "reviewed", "In the attic."))), 7, *folders, {}
    )
    (line,) = [line for line in read_ledger(tmp_path / "out") if line["source_id"]]
    assert (line["source_row"], line["source_id"], line["repaired"]) == (2, raw, None)


# The command


def jsonl(name: str, rows: list[dict[str, Any]]) -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def refused(done: Done, *parts: str) -> None:
    assert (done.code, done.out) == (2, "") and "Traceback" not in done.err and done.err.count("error: ") == 1
    assert all(part in done.err for part in parts), done.err


MIXED = [
    asked("Where is the kite?", "In the hall.</s>", category="a", customer=7),
    asked("Where is the kite?", "In the hall."),
    asked("Who flew it?", f"{MAIL} did.", input="No input"),
    asked("Land it.", "", split="test"),
    {"instruction": "Fly it.", "output": 3},
    asked("Is it <|im_start|> red?", "It is blue.", input="noinput"),
]


def test_fix_in_a_policy_file_is_refused_for_a_check_without_a_repair(check: Any) -> None:
    Path("policy.yaml").write_text("policy: {empty_response: fix}")
    refused(
        check(jsonl("a.jsonl", MIXED), "--policy", "policy.yaml"),
        "policy.yaml",
        "empty_response has no repair",
        "pii",
        "unicode_form",
    )


def test_check_reports_possible_repairs_in_text_and_json(check: Any) -> None:
    Path("policy.yaml").write_text("policy: {pii: fix}")
    found = check(jsonl("a.jsonl", MIXED), "--policy", "policy.yaml", "--json").document
    assert found["fixed"] == {"placeholder_input": 1, "special_tokens_in_text": 1, "pii": 1}
    text = check("a.jsonl", "--policy", "policy.yaml").out
    assert (
        "would be repaired: placeholder_input 1, special_tokens_in_text 1, pii 1" in " ".join(text.split())
        and " fixed " in text
    )
    assert check(jsonl("b.jsonl", [asked("Fly.", "Up.")]), "--json").document["fixed"] == {}


def test_kept_and_dropped_rows_are_written_and_add_up(check: Any) -> None:
    found = check(jsonl("a.jsonl", MIXED), "--out", "clean.jsonl", "--dropped", "gone.jsonl", "--json").document
    clean, gone = lines("clean.jsonl"), lines("gone.jsonl")
    assert (len(clean), len(clean) + len(gone), found["rows"]) == (found["kept"], len(MIXED), len(MIXED))
    assert clean[0] == {
        "messages": [
            {"role": "user", "content": "Where is the kite?"},
            {"role": "assistant", "content": "In the hall."},
        ],
        "category": "a",
        "customer": 7,
    }
    assert {row["source_row"]: row["reasons"] for row in gone} == {
        1: ["exact_duplicates"],
        2: ["pii"],
        3: ["empty_response"],
        4: ["malformed_row"],
        5: ["special_tokens_in_text"],
    }
    assert gone[0]["source"] == "a.jsonl" and gone[3]["row"]["row"] == MIXED[4]


def test_a_dropped_row_names_every_check_it_would_be_dropped_for(check: Any) -> None:
    check(jsonl("a.jsonl", [asked("Fly.", "Up."), asked(f"Is {KEY} of {MAIL}?", "")]), "--dropped", "gone.jsonl")
    (gone,) = lines("gone.jsonl")
    assert (gone["check"], gone["reasons"]) == ("empty_response", ["empty_response", "secrets", "pii"])


def test_written_rows_pass_a_second_check(check: Any) -> None:
    rows = [*MIXED, {**asked("Plain", "words"), "prompt": "x", "completion": "y", "messages": "z"}]
    first = check(jsonl("a.jsonl", rows), "--out", "clean.jsonl", "--json").document
    again = check("clean.jsonl", "--json").document
    assert (again["format"], again["rows"], again["kept"], again["fixed"]) == (
        "messages",
        first["kept"],
        first["kept"],
        {},
    )
    assert [said(one) for one in load(["clean.jsonl"]).records][-1] == ["Plain", "words"]


def test_pairs_are_written_in_the_layout_of_preferences(check: Any) -> None:
    rows = [
        {"prompt": "Where?", "chosen": "Here.</s>", "rejected": "There.", "margin": 2.0, "rater": "x"},
        {"prompt": "Who?", "chosen": "Ann.", "rejected": "ann"},
    ]
    found = check(jsonl("a.jsonl", rows), "--out", "clean.jsonl", "--dropped", "gone.jsonl", "--json").document
    (clean,), (gone,) = lines("clean.jsonl"), lines("gone.jsonl")
    assert (clean["chosen"], clean["margin"], clean["rater"]) == ([{"role": "assistant", "content": "Here."}], 2.0, "x")
    assert (gone["source_row"], gone["reasons"], found["kept"]) == (1, ["identical_pair"], 1)
    assert check("clean.jsonl", "--json").document["format"] == "preference"


def test_halves_of_kto_pairs_are_accounted_for_by_both_their_rows(check: Any) -> None:
    rows = [{"prompt": "Who?", "completion": "Ann.", "label": label} for label in (True, False)]
    check(jsonl("a.jsonl", rows), "--dropped", "gone.jsonl")
    (gone,) = lines("gone.jsonl")
    assert (gone["source_row"], gone["source_rows"]) == (0, [0, 1])


def test_custom_columns_are_mapped_on_the_command_line(check: Any) -> None:
    jsonl("a.jsonl", [{"q": "Where?", "a": "Here.", "b": "There.", "area": "x"}])
    found = check(
        "a.jsonl", "--mapping", "prompt=q,response=a,category=area", "--out", "clean.jsonl", "--json"
    ).document
    assert (found["format"], found["kept"], lines("clean.jsonl")[0]["category"]) == ("mapping", 1, "x")
    assert (
        check("a.jsonl", "--mapping", "prompt=q, chosen=a, rejected=b", "--json").document["profile"][
            "length_rule_accuracy"
        ]
        == 0.0
    )


@pytest.mark.parametrize(
    ("mapping", "part"),
    [
        ("prompt=q", "no column for response"),
        ("prompt=q,answer=a", "unknown field 'answer'"),
        ("prompt", "FIELD=COLUMN"),
        ("prompt=q,prompt=a", "is duplicated"),
        ("prompt=q,response=q", "named twice"),
        ("prompt=q,response=nope", "no row has the columns"),
    ],
)
def test_an_invalid_mapping_is_refused(mapping: str, part: str, check: Any) -> None:
    refused(check(jsonl("a.jsonl", [{"q": "Where?", "a": "Here."}]), "--mapping", mapping), part)


def test_a_mapping_and_a_format_are_refused_together(check: Any) -> None:
    refused(
        check(
            jsonl("a.jsonl", [{"q": "Where?", "a": "Here."}]), "--mapping", "prompt=q,response=a", "--format", "alpaca"
        ),
        "mapping",
    )


@pytest.mark.parametrize("option", ["--out", "--dropped"])
@pytest.mark.parametrize("name", ["a.jsonl", "./a.jsonl", "link.jsonl", "hard.jsonl", "held.jsonl"])
def test_an_input_is_never_overwritten(option: str, name: str, check: Any) -> None:
    before = jsonl("a.jsonl", MIXED).read_bytes()
    jsonl("held.jsonl", MIXED[:1])
    Path("link.jsonl").symlink_to("a.jsonl")
    Path("hard.jsonl").hardlink_to("a.jsonl")
    refused(check("a.jsonl", "--against", "held.jsonl", option, name), option, "is read")
    assert Path("a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--out", "in/clean.jsonl"], "is read"),
        (["--out", "clean.csv"], ".jsonl"),
        (["--out", "x.jsonl", "--dropped", "x.jsonl"], "write"),
        (["--out", "folder.jsonl"], "folder"),
        (["--out", "file/clean.jsonl"], "--out"),
    ],
)
def test_an_impossible_output_is_refused_and_nothing_is_written(arguments: list[str], part: str, check: Any) -> None:
    for folder in ("in", "folder.jsonl"):
        Path(folder).mkdir()
    Path("file").write_text("")
    jsonl("in/a.jsonl", MIXED)
    before = sorted(Path().rglob("*"))
    refused(check("in", *arguments), part)
    assert sorted(Path().rglob("*")) == before


def test_if_one_file_cannot_be_written_neither_is(check: Any) -> None:
    Path("file").write_text("")
    Path("clean.jsonl").write_text("as it was")
    refused(check(jsonl("a.jsonl", MIXED), "--out", "clean.jsonl", "--dropped", "file/gone.jsonl"), "gone.jsonl")
    assert Path("clean.jsonl").read_text() == "as it was" and not [*Path().glob(".clean*")]


def test_benchmark_questions_are_not_written(check: Any) -> None:
    jsonl("quiz.jsonl", [{"question": "Who?", "choices": ["Ann", "Bob"], "answer": 0}])
    refused(check("quiz.jsonl", "--out", "clean.jsonl"), "benchmark questions")


def test_json_lists_every_row_and_text_counts_the_omitted_ones(check: Any) -> None:
    jsonl("a.jsonl", [asked(f"Write to nr{i}@kites.org", f"Done {i}.") for i in range(33)])
    (one,) = [f for f in check("a.jsonl", "--json").document["findings"] if f["check"] == "pii"]
    assert (one["rows"], len(one["places"]), one["count"]) == ([*range(33)], 33, 33)
    assert "0, 1, 2, 3, 4, 5 and 27 more" in check("a.jsonl").out
    check("a.jsonl", "--report", "page.html")
    assert "the first 20 of 33" in Path("page.html").read_text()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data, the real data sets, is missing")
def test_the_placeholder_inputs_of_a_real_alpaca_file_are_emptied_and_no_row_is_lost(check: Any) -> None:
    found = check(
        SHARED_DATA / "alpaca_en_demo.json", "--out", "clean.jsonl", "--dropped", "gone.jsonl", "--json"
    ).document
    assert found["fixed"]["placeholder_input"] == 8 and "placeholder_input" not in found["dropped"]
    assert len(lines("clean.jsonl")) + len(lines("gone.jsonl")) == 999 == found["rows"]
