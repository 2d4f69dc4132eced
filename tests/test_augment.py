"""Augmented copies come from train rows only, change only the prose of the last
user turn, and depend on seed and parent alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders.records import stored
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dagster_project.core.errors import InputError
from dagster_project.core.records import (
    Report,
    example_id,
    prompt_text,
    read_ledger,
    read_records,
    write_ledger,
    write_records,
)
from dagster_project.curation.similarity.overlap import near_pairs
from dagster_project.curation.splitting import augment as augmenting
from dagster_project.curation.splitting.augment import (
    AddedRows,
    Augment,
    Paraphrase,
    augment,
    in_another_case,
    read_paraphrases,
    with_typos,
)
from dagster_project.stages import splits

PROSE = "please tell me where the parcel with the kite stands this morning"
CODE = [
    "```python\nreturn parcel\n```",
    "`print parcel`",
    "https://shop.example/orders/parcel",
    "order_number",
    "4711",
    "ann@example.org",
    '"quoted parcel"',
    '{"parcel": "kite"}',
    "getParcel",
    "a/path/here",
]
calm = settings(deadline=None, max_examples=80)


def record(*turns: str, meta: str = "{}") -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return stored(*messages, category="a", group_id=example_id(messages)[:8], meta=meta)


def questions(n: int) -> list[dict[str, Any]]:
    return [
        record(f"Please answer question{chr(97 + i % 26)}{chr(97 + i // 26)} about kettle number {i}", f"It is {i}.")
        for i in range(n)
    ]


def added(
    rows: Sequence[dict[str, Any]],
    seed: int = 7,
    held_out: Sequence[str] = (),
    supplied: Sequence[Paraphrase] = (),
    **wanted: float,
) -> AddedRows:
    return augment(
        Augment(**wanted), seed, rows, held_out, dict.fromkeys(prompt_text(row["messages"]) for row in rows), supplied
    )  # type: ignore[arg-type]


@given(parts=st.lists(st.sampled_from([PROSE, *CODE]), min_size=1, max_size=6), seed=st.integers(0, 500))
@calm
def test_typos_do_not_change_code_addresses_numbers_or_quotes(parts: list[str], seed: int) -> None:
    text = "\n\n".join(parts)
    changed = with_typos(text, "", augmenting._draws(seed, "typos", "row")).split("\n\n")
    assert len(changed) == len(parts)
    assert [new for new, old in zip(changed, parts, strict=True) if old in CODE] == [
        old for old in parts if old in CODE
    ]
    between_braces = (
        "{" in text and PROSE in text[text.index("{") : text.rindex("}")]
    )  # may be JSON all through, so it is left alone
    assert (changed != parts) == (PROSE in parts) or (between_braces and changed == parts)


@given(seed=st.integers(0, 5000))
@calm
def test_a_prompt_gets_one_to_three_typos_of_one_letter_each(seed: int) -> None:
    changed = with_typos(PROSE, "", augmenting._draws(seed, "typos", "row")).split()
    wrong = [(new, old) for new, old in zip(changed, PROSE.split(), strict=True) if new != old]
    assert 1 <= len(wrong) <= 3
    for new, old in wrong:
        assert len(old) >= 4 and new[0] == old[0]
        swapped = sorted(new) == sorted(old) and sum(a != b for a, b in zip(new, old, strict=True)) == 2
        replaced = len(new) == len(old) and sum(a != b for a, b in zip(new, old, strict=True)) == 1
        left_out = any(new == old[:i] + old[i + 1 :] for i in range(len(old)))
        assert swapped or replaced or left_out


def test_words_that_the_answer_repeats_are_not_changed() -> None:
    text = "where is the kettle"
    assert with_typos(text, "Where? The kettle is here.", augmenting._draws(7, "typos", "row")) == text
    assert in_another_case("Dear Anna", "Anna", augmenting._draws(7, "case", "row")) == "dear Anna"


def test_words_that_reasoning_or_a_call_repeats_are_not_changed() -> None:
    row = record("Please check weather around harbour today", "Sure.")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "weather around harbour"}}}
    row["messages"][1] |= {
        "content": "",
        "reasoning_content": "They want me to please check today.",
        "tool_calls": [call],
    }
    assert added([row], typos=1.0).rows == []


def test_a_copy_keeps_tools_calls_reasoning_and_weights_and_its_id_covers_them() -> None:
    rows = questions(20)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"type": "function", "id": "a", "function": {"name": "weather", "arguments": {}}}
    for row in rows:
        row["messages"][1] |= {"reasoning_content": "Hm.", "tool_calls": [call], "weight": 0.0}
        row |= {"tools": tools, "example_id": example_id(row["messages"], tools)}
    made = added(rows, typos=1.0).rows
    assert made
    for i, _, copy in made:
        assert copy["messages"][1:] == rows[i]["messages"][1:] and copy["tools"] == tools
        assert copy["example_id"] == example_id(copy["messages"], tools) != example_id(copy["messages"])


def test_texts_in_scripts_without_case_get_no_typos() -> None:
    for text in ("请帮我写一首关于春天的诗", "اكتب قصيدة عن الربيع", "春について詩を書いて"):
        assert with_typos(text, "", augmenting._draws(7, "typos", "row")) == text
        assert in_another_case(text, "", augmenting._draws(7, "case", "row")) == text


def test_case_lowers_words_or_raises_the_first_letter() -> None:
    assert (
        in_another_case("Where IS my Parcel `GetIt` A4?", "", augmenting._draws(7, "case", "row"))
        == "where is my parcel `GetIt` A4?"
    )
    assert in_another_case("where is it", "", augmenting._draws(7, "case", "row")) == "Where is it"
    assert in_another_case("42 is it", "", augmenting._draws(7, "case", "row")) == "42 is it"


@given(
    kinds=st.sampled_from([{"typos": 0.6}, {"case": 0.6}, {"typos": 0.5, "case": 0.5}]),
    seed=st.integers(0, 1000),
    n=st.integers(1, 60),
)
@calm
def test_a_copy_differs_from_its_parent_only_in_the_last_user_turn(kinds: dict[str, float], seed: int, n: int) -> None:
    rows = [
        record("Earlier question here", "Earlier answer.", *(m["content"] for m in row["messages"]))
        for row in questions(n)
    ]
    for i, kind, copy in added(rows, seed, **kinds).rows:
        parent = rows[i]
        assert kind in kinds
        assert copy["messages"][:2] + copy["messages"][3:] == parent["messages"][:2] + parent["messages"][3:]
        assert copy["messages"][2]["content"] != parent["messages"][2]["content"]
        assert copy["example_id"] == example_id(copy["messages"])
        assert {key: copy[key] for key in ("source", "category", "group_id")} == {
            key: parent[key] for key in ("source", "category", "group_id")
        }
        assert json.loads(copy["meta"]) == {"parent": parent["example_id"], "augmented": kind}


@given(seed=st.integers(0, 1000), n=st.integers(0, 40), data=st.data())
@calm
def test_copies_do_not_depend_on_other_rows_or_their_order(seed: int, n: int, data: st.DataObject) -> None:
    rows = questions(60)
    kept = sorted(data.draw(st.permutations(range(60)))[: 60 - n])
    everything = {copy["meta"]: copy for _, _, copy in added(rows, seed, typos=0.3, case=0.3).rows}
    of_some = {copy["meta"]: copy for _, _, copy in added([rows[i] for i in kept], seed, typos=0.3, case=0.3).rows}
    parents = {rows[i]["example_id"] for i in kept}
    assert of_some == {meta: copy for meta, copy in everything.items() if json.loads(meta)["parent"] in parents}


def test_a_larger_share_adds_copies_and_changes_none() -> None:
    few, many = ({copy["example_id"] for _, _, copy in added(questions(400), typos=share).rows} for share in (0.2, 0.5))
    assert few < many
    assert 50 < len(few) < 110 and 160 < len(many) < 240


def test_another_seed_chooses_other_rows() -> None:
    one, two = ({i for i, _, _ in added(questions(100), seed, typos=0.3).rows} for seed in (1, 2))
    assert one != two


def test_no_copy_repeats_a_prompt_of_the_set() -> None:
    rows = [record("Where is my kite", "There."), record("where is my kite", "Here.")]
    found = added(rows, case=1.0)
    assert (found.rows, found.dropped) == ([], {"repeats_a_prompt": 2})


def test_no_copy_nearly_repeats_a_held_out_row() -> None:
    held_out = "Which bus takes me from the harbour to the old town hall on a Sunday"
    rows = [*questions(20), record("How do I get to the town hall", "By bus.")]
    supplied = [
        Paraphrase(rows[20]["example_id"], None, "Which bus takes me from the harbour to the old town hall on Sundays"),
        Paraphrase(rows[20]["example_id"], None, "Tell me the way to that building where the mayor sits"),
    ]
    found = added(rows, held_out=[held_out], supplied=supplied)
    assert [copy["messages"][0]["content"] for _, _, copy in found.rows] == [
        "Tell me the way to that building where the mayor sits"
    ]
    assert found.dropped == {"near_held_out": 1}


def test_paraphrases_find_their_row_by_id_or_by_prompt_and_others_are_counted() -> None:
    rows = questions(2)
    supplied = [
        Paraphrase(rows[0]["example_id"], None, "In other words"),
        Paraphrase(None, prompt_text(rows[1]["messages"]), "Said otherwise"),
        Paraphrase(None, "Nobody asked this", "Nor this"),
        Paraphrase("0" * 32, None, "Nor that"),
    ]
    found = added(rows, supplied=supplied)
    assert [(i, kind, copy["messages"][0]["content"]) for i, kind, copy in found.rows] == [
        (0, "paraphrase", "In other words"),
        (1, "paraphrase", "Said otherwise"),
    ]
    assert found.unused == 2


def test_a_paraphrase_that_adds_no_copy_is_counted() -> None:
    """It has the words of its row, or its row is a text, which has no prompt."""
    asked, answer = questions(1)[0], {"role": "assistant", "content": "A text on kites."}
    text = {**record(), "messages": [answer], "example_id": example_id([answer])}
    supplied = [
        Paraphrase(asked["example_id"], None, prompt_text(asked["messages"])),
        Paraphrase(text["example_id"], None, "In other words"),
    ]
    found = added([asked, text], supplied=supplied)
    assert (found.rows, found.dropped, found.unused) == ([], {"repeats_a_prompt": 1}, 1)


def test_every_wrong_row_of_a_paraphrases_file_is_named(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"prompt": "a", "paraphrase": "b"},
        {"paraphrase": "b"},
        {"prompt": "a", "paraphrase": " "},
        {"prompt": "a", "example_id": "c", "paraphrase": "b"},
        {"prompt": 4, "paraphrase": "b"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "nonsense\n")
    with pytest.raises(InputError) as refused:
        read_paraphrases(tmp_path / "p.jsonl")
    assert [line.split(":")[1] for line in refused.value.what.splitlines()] == ["1", "2", "3", "4", "5"]
    assert (
        "needs either `example_id` or `prompt`" in refused.value.what
        and "`paraphrase` must be text" in refused.value.what
    )


@pytest.mark.parametrize(
    "path", ["data/sources/p.jsonl", "data/sources/paraphrases/../p.jsonl", "/etc/passwd", "data/sources/paraphrases"]
)
def test_paraphrases_outside_the_tracked_folder_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match=r"must lie inside data/sources/paraphrases/"):
        Augment(paraphrases=path)


# --- the stage


def run(root: Path, out: str, rows: Sequence[dict[str, Any]], **wanted: Any) -> Report:
    write_records(root / "in", rows)
    write_ledger(root / "in", [{**row, "source_row": i, "outcome": "kept", "why": ""} for i, row in enumerate(rows)])
    return splits.produce(
        root, splits.Params(augment=Augment(**wanted) if wanted else None), 7, root / "in", root / out
    )


def test_augmentation_adds_to_train_and_changes_nothing_else(tmp_path: Path) -> None:
    rows = questions(200)
    plain, more = run(tmp_path, "plain", rows), run(tmp_path, "more", rows, typos=0.3, case=0.3)
    for name in ("validation", "test"):
        assert read_records(tmp_path / "plain" / name) == read_records(tmp_path / "more" / name)
    before, after = (read_records(tmp_path / out / "train") for out in ("plain", "more"))
    assert after[: len(before)] == before
    kinds = Counter(json.loads(row["meta"])["augmented"] for row in after[len(before) :])
    assert more.metrics["augmented"] == dict(sorted(kinds.items())) and kinds["typos"] and kinds["case"]
    assert (more.rows_in, more.rows_out, more.failures) == (plain.rows_in, plain.rows_out, [])
    assert {name: more.metrics[name] for name in plain.metrics} == plain.metrics
    held_out = [
        prompt_text(row["messages"])
        for name in ("validation", "test")
        for row in read_records(tmp_path / "more" / name)
    ]
    assert not list(near_pairs([prompt_text(row["messages"]) for row in after[len(before) :]], held_out))


def test_the_ledger_names_the_parent_of_each_copy(tmp_path: Path) -> None:
    rows = questions(60)
    run(tmp_path, "out", rows, typos=0.5)
    lines = read_ledger(tmp_path / "out")
    row_of = {line["example_id"]: line["source_row"] for line in lines[:60]}
    copies = [line for line in lines if line["outcome"] == "augmented:typos"]
    assert len(copies) == len(lines) - 60 > 0
    for line in copies:
        parent = line["why"].removeprefix("copy of ")
        assert line["source_row"] == row_of[parent] and parent != line["example_id"]


def test_supplied_paraphrases_are_added_only_to_train(tmp_path: Path) -> None:
    rows = questions(40)
    folder = tmp_path / "data" / "sources" / "paraphrases"
    folder.mkdir(parents=True)
    mine = [
        {"example_id": row["example_id"], "paraphrase": f"said{chr(97 + i % 26)}{chr(97 + i // 26)} otherwise"}
        for i, row in enumerate(rows)
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mine))
    report = run(tmp_path, "out", rows, paraphrases="data/sources/paraphrases/mine.jsonl")
    file = "data/sources/paraphrases/mine.jsonl"
    digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    assert report.metrics.pop("sources") == {
        file: {"format": "paraphrases", "rows": 40, "sha256": digest, "license": "unknown"}
    }
    assert report.metrics == {"train": 28, "validation": 4, "test": 8, "augmented": {"paraphrase": 28}}
    assert report.checks[2].note == "12 paraphrases are of no row in train that has a prompt"


def test_a_missing_file_of_paraphrases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"splits\.augment\.paraphrases: data/sources/paraphrases/none\.jsonl does not exist"
    ):
        run(tmp_path, "out", questions(4), paraphrases="data/sources/paraphrases/none.jsonl")


def test_a_copy_in_a_held_out_split_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = splits.write_stored_records
    astray = record("which copy is it", "This.", meta='{"parent": "a", "augmented": "typos"}')

    def misplaced(*arguments: Any) -> None:
        write(*arguments)
        folder = tmp_path / "out" / "test"
        write_records(folder, [*read_records(folder)[:-1], astray])

    monkeypatch.setattr(splits, "write_stored_records", misplaced)
    (failed,) = run(tmp_path, "out", questions(60), typos=0.5).failures
    assert (failed.name, failed.rows) == ("augmented_rows", [f"test/{astray['example_id']}"])


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for out in ("one", "two"):
        run(tmp_path, out, questions(60), typos=0.5, case=0.5)
    one, two = (
        {path.relative_to(tmp_path / out): path.read_bytes() for path in (tmp_path / out).rglob("*.parquet")}
        for out in ("one", "two")
    )
    assert one == two and len(one) == 4
