"""Facts about rows that are kept for the next run never change a result,
whatever happens to the rows or to the files that hold them."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from builders.rows_of_all_kinds import answer, sample
from conftest import ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core import row_cache
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.stored_rows import Selected, StoredRows, decode
from dagster_project.curation.checks import overlaps
from dagster_project.curation.checks.expectations import table
from dagster_project.curation.checks.profile import profile
from dagster_project.curation.checks.token_counts import ESTIMATED, tokens_of
from dagster_project.curation.similarity.overlap import near_pairs
from dagster_project.curation.splitting import split
from dagster_project.stages import instructions, raw_examples, splits

COMPUTED: list[dict[str, Any]] = []


def lengths(factor: int, lines: Sequence[bytes]) -> pl.DataFrame:
    """Facts of several types, some of them missing. Keeps the rows that it was asked about."""
    rows = [decode(line) for line in lines]
    COMPUTED.extend(rows)
    texts = [row["text"] for row in rows]
    return pl.DataFrame(
        {
            "size": pl.Series([factor * len(text) for text in texts], dtype=pl.Int64),
            "first": pl.Series([text[:1] or None for text in texts], dtype=pl.String),
            "raw": pl.Series([text.encode() if len(text) > 1 else None for text in texts], dtype=pl.Binary),
            "third": pl.Series([len(text) / 3 for text in texts], dtype=pl.Float64),
        }
    )


def stored(texts: Sequence[str], first: int = 0) -> StoredRows:
    return StoredRows({"source_row": first + i, "text": text} for i, text in enumerate(texts))


def files(root: Path) -> list[Path]:
    return sorted((root / row_cache.FOLDER).rglob("*.arrow"))


@pytest.fixture
def managed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".dvc").mkdir()
    monkeypatch.setattr(
        row_cache, "_code", lambda changed=False: "code"
    )  # a library that is installed meanwhile would be other code
    COMPUTED.clear()
    return tmp_path


def facts(root: Path, texts: Sequence[str], factor: int = 2, first: int = 0) -> tuple[pl.DataFrame, list[str]]:
    """The facts about some rows, and the texts of the rows for which they were computed."""
    COMPUTED.clear()
    with row_cache.using(root, "instructions"):
        made = row_cache.facts(lengths, factor, stored(texts, first), (factor,))
    return made, [row["text"] for row in COMPUTED]


EDITS = st.sampled_from(
    ["edit", "insert", "remove", "shuffle", "cut", "damage", "swap", "empty", "delete", "parameter", "nothing"]
)


def changed(texts: list[str], edit: str, draw: random.Random) -> list[str]:
    at = draw.randrange(len(texts) + 1)
    if edit == "edit":
        return [*texts[:at], draw.choice("abc") * draw.randrange(4), *texts[at + 1 :]]
    if edit == "insert":
        return [*texts[:at], *(draw.choice("abc") * draw.randrange(4) for _ in range(3)), *texts[at:]]
    if edit == "remove":
        return texts[:at] + texts[at + 2 :]
    return draw.sample(texts, len(texts)) if edit == "shuffle" else texts


def tamper(root: Path, edit: str, draw: random.Random) -> None:
    """Change the files of the cache as a disk, another program or a person could."""
    found = files(root)
    if not found:
        return
    path = draw.choice(found)
    content = bytearray(path.read_bytes())
    if edit == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif edit == "damage":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif edit == "swap":  # a file of other parameters, in the place of this one
        path.write_bytes(draw.choice(found).read_bytes())
        for folder in {file.parent for file in found}:
            if folder != path.parent:
                shutil.copy(path, folder / path.name)
    elif edit == "empty":
        path.write_bytes(b"")
    elif edit == "delete":
        path.unlink()


@settings(deadline=None, max_examples=25)
@given(st.lists(EDITS, min_size=1, max_size=12), st.integers(0, 2**32))
def test_facts_are_those_of_a_run_from_nothing_after_any_edits(
    tmp_path_factory: Any, edits: list[str], seed: int
) -> None:
    root, draw, factor = tmp_path_factory.mktemp("project"), random.Random(seed), 2
    (root / ".dvc").mkdir()
    texts = [draw.choice("abc") * draw.randrange(5) for _ in range(draw.randrange(20))]
    for edit in edits:
        factor = draw.choice([2, 3]) if edit == "parameter" else factor
        texts = changed(texts, edit, draw)
        tamper(root, edit, draw)
        made, _ = facts(root, texts, factor, first=draw.randrange(3))
        assert made.equals(lengths(factor, [*stored(texts).encoded(range(len(texts)))]), null_equal=True)


def test_only_rows_that_are_new_are_computed_wherever_they_are(managed: Path) -> None:
    texts = [f"text {i}" for i in range(50)]
    assert facts(managed, texts)[1] == texts
    assert facts(managed, [*reversed(texts)], first=7)[1] == []
    assert facts(managed, [texts[3], "edited", *texts[10:], "appended"])[1] == ["edited", "appended"]
    assert facts(managed, texts, factor=3)[1] == texts, "other parameters"
    assert facts(managed, [*texts, "edited", "appended"])[1] == []


def never_without_rows(_: None, lines: Sequence[bytes]) -> pl.DataFrame:
    assert lines, "asked about no rows, for which it would load its libraries"
    return pl.DataFrame({"size": [len(line) for line in lines]})


def test_work_is_not_loaded_for_rows_that_are_known(managed: Path) -> None:
    with row_cache.using(managed, "instructions"):
        first = row_cache.facts(never_without_rows, None, stored(["a", "bc", "a"]), ())
        assert row_cache.facts(never_without_rows, None, stored(["a", "bc", "a"]), ()).equals(first)
        assert row_cache.facts(never_without_rows, None, stored(["d", "bc", "a"]), ()).equals(first)


def near_copies(root: Path, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, int]], int]:
    """Pairs of near-copies, and how often they were searched."""
    searches = []
    monkeypatch.setattr(split, "near_pairs", lambda given: searches.append(1) or near_pairs(given))
    with row_cache.using(root, "splits"):
        found = split.find_copies(texts)
    return [*zip(found.left.tolist(), found.right.tolist(), strict=True)], len(searches)


def test_near_copies_are_searched_again_only_if_a_text_or_their_order_changed(
    managed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"please send my red kite number {i} back to the harbour today" for i in range(3)] + [
        "where is my letter",
        "",
    ]
    orders = [texts, texts[::-1], [*texts[:3], "where is my lette", "r"], texts[:1], ["a"], ["", " "]]
    for given_texts in orders:
        different = [*dict.fromkeys(text for text in given_texts if text.strip())]
        expected = [(pair.left, pair.right) for pair in near_pairs(different)]
        assert near_copies(managed, given_texts, monkeypatch) == (expected, 1)
        assert near_copies(managed, given_texts, monkeypatch) == (expected, 0)
    found, searches = near_copies(managed, texts, monkeypatch)
    assert (len(found), searches) == (3, 0)
    for path in files(managed):
        path.write_bytes(path.read_bytes()[:-1])
    assert near_copies(managed, texts, monkeypatch) == (found, 1), "damaged files"


def test_comparisons_are_repeated_only_if_a_text_or_its_side_changed(
    managed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"please send my red kite number {i} back to the harbour today" for i in range(3)] + [
        "wh\udce9re is my letter",
        "",
    ]
    wide = [
        f"{text} and {i} tell" for i, text in enumerate(["the frame around all of these texts is one"] * 60)
    ]  # boilerplate
    requests: list[tuple[Sequence[str], Sequence[str] | None]] = [
        (texts, None),
        (texts[::-1], None),
        (texts, texts[:2]),
        ([*texts, *texts[:2]], []),
        (texts + texts[:1], texts[1:2]),
        ([*wide, *texts], None),
        ([], None),
    ]
    searches: list[int] = []
    search = overlaps.compare
    monkeypatch.setattr(overlaps, "compare", lambda *args, **kwargs: (searches.append(1), search(*args, **kwargs))[1])
    for given_texts, against in requests:
        expected = search(given_texts, against, count_words=True)
        for searched in (1, 0):
            searches.clear()
            with row_cache.using(managed, "s"):
                assert overlaps._kept_comparison("prompts", given_texts, against) == expected
            assert len(searches) == searched
    assert overlaps._kept_comparison("prompts", texts) == search(texts, count_words=True), "without a folder"
    assert search([*wide, *texts], count_words=True).boilerplate and search(texts, count_words=True).frequency, (
        "what is kept is not empty"
    )


def test_the_number_of_a_row_is_not_what_work_can_see(managed: Path) -> None:
    facts(managed, ["a"])
    assert COMPUTED == [{"text": "a"}]
    line = b'{"source_row":17,"text":"a"}'
    assert row_cache.numbered(row_cache.unnumbered(line), line) == line
    other = b'{"text":"a","source_row":17}'
    assert row_cache.unnumbered(other) == other == row_cache.numbered(other, other)


@pytest.mark.parametrize("number", ["[1,2]", "null", '"1,2"', "1.5", '{"a":1,"b":2}', "5}"])
def test_a_number_that_is_not_an_integer_stays_in_its_row(number: str) -> None:
    line = f'{{"source_row":{number},"text":"a"}}'.encode() if number != "5}" else b'{"source_row":5}'
    assert row_cache.unnumbered(line) == line
    assert row_cache.numbered(b'{"text":"b"}', line) == b'{"text":"b"}'


def test_an_edit_after_the_modules_were_imported_keeps_nothing(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "dagster_project", tmp_path / "dagster_project", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / ".dvc").mkdir()
    code = """if True:
        import sys
        from pathlib import Path
        from dagster_project.core.stored_rows import StoredRows
        from dagster_project.core import row_cache
        from dagster_project.curation.checks import profile
        file = Path("dagster_project/curation/checks/profile.py")
        assert Path(profile.__file__) == file.resolve()
        if sys.argv[1] == "edit":
            file.write_text(file.read_text() + "EDITED = True\\n")
        row = {"source_row": 1, "example_id": "a", "group_id": None, "source": "a", "category": None}
        row["messages"] = [{"role": "user", "content": "Hi"}]
        with row_cache.using(Path.cwd(), "instructions"):
            row_cache.facts(profile._measure_block, None, StoredRows([row]), ())"""
    for argument, kept in {"edit": 0, "no edit": 1}.items():
        done = run([sys.executable, "-c", code, argument], tmp_path, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert len(files(tmp_path)) == kept, argument


def test_other_code_finds_nothing_and_code_that_changes_during_a_run_keeps_nothing(
    managed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts(managed, ["a"])
    monkeypatch.setattr(row_cache, "_code", lambda changed=False: "edited while it runs" if changed else "other")
    assert facts(managed, ["a"])[1] == facts(managed, ["a"])[1] == ["a"]
    assert len(files(managed)) == 1


def test_code_is_that_of_the_packages_and_of_installed_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core/a.py").write_text("A = 1\n")
    (tmp_path / "libraries/polars-1.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(row_cache, "PACKAGE", tmp_path)
    monkeypatch.setattr(row_cache, "LIBRARIES", (tmp_path / "libraries",))
    before = row_cache._code(changed=True)
    (tmp_path / "copies/wheel-1.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "copies")])  # as setuptools does when it is imported
    assert row_cache._code(changed=True) == before
    (tmp_path / "core/__pycache__").mkdir()
    (tmp_path / "core/__pycache__/a.cpython-311.pyc").write_bytes(b"compiled")
    assert row_cache._code(changed=True) == before
    (tmp_path / "core/a.py").write_text("A = 2\n")
    edited = row_cache._code(changed=True)
    (tmp_path / "libraries/polars-1.0.dist-info").rename(tmp_path / "libraries/polars-1.1.dist-info")
    assert len({before, edited, row_cache._code(changed=True)}) == 3


def test_files_of_one_kind_are_few(managed: Path) -> None:
    for i in range(2 * row_cache.FILES + 2):
        assert facts(managed, [f"text {k}" for k in range(i + 1)])[1] == [f"text {i}"]
        assert len(files(managed)) <= row_cache.FILES


def test_above_the_limit_the_least_recently_used_files_go(managed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts(managed, ["a"], factor=2)
    (unused,) = files(managed)
    facts(managed, ["a"], factor=3)
    (used,) = {*files(managed)} - {unused}
    for path, seconds in ((used, 1), (unused, 2)):
        os.utime(path, (seconds, seconds))
    assert facts(managed, ["a"], factor=3)[1] == []
    monkeypatch.setattr(row_cache, "LIMIT", sum(path.stat().st_size for path in files(managed)))
    facts(managed, ["a"], factor=5)
    assert unused not in files(managed) and used in files(managed) and len(files(managed)) == 2
    monkeypatch.setattr(row_cache, "LIMIT", 0)
    assert facts(managed, ["b"], factor=7)[1] == ["b"] and not files(managed)


def test_without_a_project_or_a_writable_disk_nothing_is_kept_and_all_is_computed(tmp_path: Path) -> None:
    assert facts(tmp_path, ["a"])[1] == ["a"] and not files(tmp_path) and not (tmp_path / ".dvc").exists()
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/pedigree").write_text("a file where the folder would be")
    assert facts(tmp_path, ["a"])[1] == facts(tmp_path, ["a"])[1] == ["a"]


def first_numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"source_row": row["source_row"], **row} for row in rows]


def test_all_checks_say_the_same_with_what_earlier_runs_kept(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    draw, rows = random.Random(0), first_numbered(sample(1, 60))
    for step, tokens in enumerate([tokens_of(tiny_model), tokens_of(tiny_model), ESTIMATED, tokens_of(tiny_model)]):
        rows = (
            rows[:12]
            + draw.sample(rows[12:], len(rows) - 12)
            + [{**row, "source_row": 100 + i} for i, row in enumerate(first_numbered(sample(step + 2, 6)))]
        )
        pairs = False
        plain = answer(rows, tokens, pairs)
        with row_cache.using(tmp_path, "instructions"):
            assert answer(rows, tokens, pairs) == plain
            assert answer(rows, tokens, pairs) == plain
    pairs = first_numbered(sample(3, 40, pairs=True))
    plain = answer(pairs, ESTIMATED, True)
    with row_cache.using(tmp_path, "instructions"):
        assert [answer(pairs, ESTIMATED, True), answer(pairs, ESTIMATED, True)] == [plain, plain]


def test_profile_and_expectations_are_the_same_with_what_earlier_runs_kept(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    rows = StoredRows(first_numbered(sample(4, 60)))
    for kept in (range(60), range(0, 60, 2), [*range(40), *range(50, 60)], []):
        some = Selected(rows, kept)
        plain, columns = json.dumps(profile(some)), table(some)
        with row_cache.using(tmp_path, "instructions"):
            for _ in range(2):
                assert json.dumps(profile(some)) == plain
                assert table(some).equals(columns) and (table(some).dtypes == columns.dtypes).all()


def outputs(root: Path, model: Path) -> dict[str, str]:
    """raw_examples -> instructions -> splits from nothing: path of each file of the outputs -> its hash."""
    data, names = root / "out", ("a.jsonl", "b.jsonl", "c.jsonl")
    shutil.rmtree(data, ignore_errors=True)
    sources = raw_examples.Params.model_validate({"sources": [{"path": f"data/sources/{name}"} for name in names]})
    rules = instructions.Params.model_validate(
        {"policy": {"pii": "fix", "conflicting_responses": "warn"}, "max_tokens": 60}
    )
    raw_examples.produce(root, sources, data / "raw")
    instructions.produce(root, rules, data / "raw", model, data / "instructions", data / "pages", {})
    splits.produce(root, splits.Params(), 7, data / "instructions", data / "splits")
    return {str(path.relative_to(data)): sha256_of_file(path) for path in sorted(data.rglob("*")) if path.is_file()}


@settings(deadline=None, max_examples=2, derandomize=True)
@given(st.lists(EDITS, min_size=2, max_size=3), st.integers(0, 2**32))
def test_outputs_are_those_of_a_run_from_nothing_after_any_edits(
    tmp_path_factory: Any, tiny_model: Path, edits: list[str], seed: int
) -> None:
    root, draw = tmp_path_factory.mktemp("project"), random.Random(seed)
    (root / ".dvc").mkdir()
    (root / "data/sources").mkdir(parents=True)
    made = sample(seed, 60)
    lines = [json.dumps({key: row[key] for key in ("messages", "category", "tools") if key in row}) for row in made]
    parts = {"a.jsonl": lines[:20], "b.jsonl": lines[20:40], "c.jsonl": lines[40:]}
    for edit in ["nothing", *edits]:
        name = draw.choice([*parts])
        row = json.loads(draw.choice(lines))
        row["messages"][0]["content"] += f" {edit}"
        parts[name] = [line if line.startswith("{") else json.dumps(row) for line in changed(parts[name], edit, draw)]
        tamper(root, edit, draw)
        for file, rows in parts.items():
            (root / "data/sources" / file).write_text("".join(f"{line}\n" for line in rows))
        with row_cache.using(root, "instructions"):
            kept = outputs(root, tiny_model)
        assert files(root) or row_cache._code(changed=True) != row_cache._code(), "facts are kept"
        assert kept == outputs(root, tiny_model)
