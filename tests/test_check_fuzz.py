"""For any data, `pedigree check` gives a verdict or a clear refusal: no traceback, no lost row, no raw control characters.

The same search in every run; `PEDIGREE_FUZZ=2000 pytest tests/test_check_fuzz.py` looks at so many cases a test, others each time.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.files import FILE_WRITERS
from builders.layouts import BENCHMARK_ROWS, LAYOUT_ROWS, PAIR_ROWS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagster_project.__main__ import main
from dagster_project.core.errors import InputError
from dagster_project.core.records import read_ledger, read_records, write_ledger, write_records
from dagster_project.curation.check_files import KNOWN
from dagster_project.curation.checks.checks import CHECKS, Rules
from dagster_project.curation.checks.review import edited, read_decisions
from dagster_project.curation.sources import files
from dagster_project.curation.sources.files import READERS

CASES = int(os.environ.get("PEDIGREE_FUZZ", "0"))
STEERS = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours, rings, or turns the direction of text; the line break aside."""


def search(cases: int) -> settings:
    return settings(
        max_examples=CASES or cases, derandomize=not CASES, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip


def call(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["check", *map(str, arguments)])
        except SystemExit as usage:
            code = int(usage.code or 0)
    return code, out.getvalue(), err.getvalue()


def no_json(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def holds(*arguments: object) -> dict[str, Any] | None:
    """Judges in both forms and with a page. Returns the document, or None if the input was refused."""
    page = Path("page.html")
    page.unlink(missing_ok=True)
    code, out, err = call(*arguments, "--json", "--report", page)
    again, shown, told = call(*arguments)
    assert code == again and code in {0, 1, 2}, err
    for text in (shown, told, err):
        assert not STEERS.search(text), repr(STEERS.search(text))
    assert max(map(len, [*told.split("\n"), *err.split("\n")])) < 10_000
    if code == 2:
        assert (out, shown) == ("", "") and err.startswith("error: ") and "\nhint: " in err and "Traceback" not in err
        return None
    found: dict[str, Any] = json.loads(out.encode("utf-8"), parse_constant=no_json)
    assert found["rows"] == found["kept"] + sum(found["dropped"].values())
    assert code == int(any(one["severity"] == "error" and one["count"] for one in found["findings"]))
    for finding in found["findings"]:
        assert finding["dropped"] + finding["waived"] <= finding["count"] + finding["waived"] <= found["rows"] + 1
        assert len(finding["rows"]) == len(finding["places"]) <= found["rows"] + 1
        for match in finding["matches"]:
            for text, span in ((match["text"], match["span"]), (match["other_text"], match["other_span"])):
                assert 0 <= span[0] <= span[1] <= len(text)
    html = page.read_text("utf-8")
    assert html.startswith("<!DOCTYPE html>") and not STEERS.search(html.replace("\t", " "))
    assert html.count("<script") == 1 + ('id="pairs-data"' in html) and len(html) < 20_000_000
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Nasty files, one by one


OK = {"instruction": "Where does the river begin?", "output": "In the hills, near the old mill."}
GOOD = json.dumps(OK).encode()
TEXTS = {
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)></style></template><!--",
    "ansi": "\x1b[2J\x1b[31mred\x1b]0;title\x07 \x9b1m \x08\x08 \r over",
    "direction": "\u202egnp.exe \u2066\u2067\u2068 \u200f\u061c",
    "markup": "[bold red]x[/bold red] [/] [link=http://e.example]y[/link] :smile: \\[",
    "markdown": "| a | b |\n|---|---|\n# x\n```\n[l](javascript:alert(1))",
    "jinja": "{{ 1/0 }} {% for x in range(10**9) %}{% endfor %} {{ config }} ${HOME} %s %n {0}",
    "long word": "x" * 1_000_000,
    "one word again and again": "ho " * 20_000,
    "punctuation": "?!... --- ,,, ;;; \"''\" (((",
    "family": "👩‍👩‍👧‍👦 🏳️‍🌈 " * 20 + "e\u0301\u0301\u0301" * 50,
    "zeroes": "a\0b\0",
    "spaces": "\u3000\u2003\t\v\f\u00a0\u200b\ufeff",
    "line ends": "a\r\nb\u2028c\u2029d\x85e",
    "not a character": "\uffff\ufffe\U0010ffff\ufdd0",
    "formula": "=cmd|' /C calc'!A0",
    "csv": '"a","b\n""c',
    "digits": "9" * 5000,
    "secret": "AKIA" + "Q3EXAMPLE7KEY2AB ann.lee@post.example.org",
    "scripts": "一二三 かな 한글 العربية עברית ไทย हिन्दी Ω",
    "empty": "",
    "space": " ",
}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Is it cold?"}], "weight": 0},
        {
            "role": "assistant", "content": None, "reasoning": "I look.", "weight": 1,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "tool", "content": "-3", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "Yes, it is.", "weight": 0},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}],
}  # fmt: skip
KINDS: dict[str, list[Any]] = {
    "examples": [*(row for row, _ in LAYOUT_ROWS.values()), TOOL_ROW],
    "preferences": [rows[0] for name, rows in PAIR_ROWS.items() if name != "oasst"],
    "benchmarks": [row for name, (row, *_) in BENCHMARK_ROWS.items() if name != "gsm8k"],
}
ROWS_OF_ALL_KINDS: list[Any] = [*itertools.chain(*KINDS.values()), BENCHMARK_ROWS["gsm8k"][0]]


def filled(value: Any, text: str) -> Any:
    """The same, each text in it replaced, but those that a layout reads as names."""
    if isinstance(value, dict):
        return {key: filled(inner, text) if key not in {"role", "from"} else inner for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, text) for inner in value]
    return text if isinstance(value, str) else value


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_text_in_every_field_is_checked(name: str) -> None:
    text = TEXTS[name]
    more = {"category": text, "split": text, "meta": {text[:100]: [text]}, text[:100]: text}
    rows = [
        {**OK, "category": text},
        {**OK, **more},
        {"instruction": f"{OK['instruction']} {text}", "output": text + text},
        {**OK, "input": text},
    ]
    Path("a.jsonl").write_bytes(lines(*rows))
    assert holds("a.jsonl", "--against", "a.jsonl", "--thirteen-grams", "--since", "a.jsonl")
    assert holds("a.jsonl", "--format", "flan"), "a malformed row is shown as well"


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if len(text) < 10_000])
def test_hostile_text_in_every_layout_is_checked(name: str) -> None:
    for kind, rows in KINDS.items():
        for number, row in enumerate(rows):
            Path(f"{kind}{number}.jsonl").write_bytes(lines(filled(row, TEXTS[name]), row))
        found = holds(*sorted(map(str, Path().glob(f"{kind}*.jsonl"))))
        assert found and found["rows"] >= 2 * len(rows) - (kind == "preferences"), "two rows of KTO may be one pair"


ASKED, SAID = (
    {"role": "user", "content": "Where does the river begin?"},
    {"role": "assistant", "content": "In the hills, near the old mill."},
)


def chatting(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def calling(arguments: Any) -> dict[str, Any]:
    return chatting(
        ASKED,
        {**SAID, "content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "content": "b"},
    )


BYTES: dict[str, tuple[str, bytes]] = {
    "truncated line": ("a.jsonl", lines(OK, GOOD[:20])),
    "truncated list": ("a.json", b"[" + GOOD + b"," + GOOD[:20]),
    "zero bytes": ("a.jsonl", lines(OK, b"\0" * 5000, OK)),
    "only zero bytes": ("a.json", b"\0" * 5000),
    "a line over the limit": ("a.jsonl", lines(OK, b'{"instruction": "' + b"x" * 60_000 + b'", "output": "y"}', OK)),
    "an element over the limit": ("a.json", b"[" + b",".join([GOOD, b'{"instruction": "' + b"x" * 60_000 + b'", "output": "y"}', GOOD]) + b"]"),
    "not UTF-8": ("a.jsonl", lines(OK, '{"instruction": "é"}'.encode("latin-1"), OK)),
    "UTF-16": ("a.jsonl", json.dumps(OK).encode("utf-16")),
    "UTF-32": ("a.json", json.dumps([OK]).encode("utf-32")),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(OK)),
    "byte order mark within": ("a.jsonl", lines(OK, b"\xef\xbb\xbf" + GOOD)),
    "half a character": ("a.jsonl", lines(OK, b'{"instruction": "\\ud83d", "output": "\\ude00"}', OK)),
    "half a character in a key": ("a.jsonl", lines(OK, b'{"\\ud83d": 1, "instruction": "a", "output": "b"}')),
    "key twice": ("a.jsonl", lines(OK, b'{"instruction": "a", "instruction": "b", "output": "c"}')),
    "no numbers": ("a.jsonl", lines(OK, b'{"instruction": NaN, "output": 1}', b'{"instruction": "a", "output": "b", "x": -Infinity}', b'{"x": 1e999}')),
    "huge numbers": ("a.jsonl", lines({**OK, "x": 10**4000}, b'{"instruction": "a", "output": "b", "x": ' + b"9" * 5000 + b"}", {**OK, "category": 1e308})),
    "late type": ("a.jsonl", lines(*[OK] * 300, {**OK, "output": 3}, {**OK, "output": None}, {**OK, "output": [1]})),
    "late and missing columns": ("a.jsonl", lines(*[OK] * 300, {**OK, "extra": 1}, {"instruction": "a"}, {})),
    "empty": ("a.jsonl", b""),
    "blank": ("a.json", b" \n\t\r\n"),
    "blank lines": ("a.jsonl", b"\n \n\r\n"),
    "empty list": ("a.json", b"[]"),
    "empty objects": ("a.jsonl", b"{}\n{}\n"),
    "no objects": ("a.json", b'[1, "a", null, [], true]'),
    "an object": ("a.json", GOOD),
    "deep": ("a.jsonl", lines(OK, b'{"instruction": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {**OK, "meta": json.loads("[" * 150 + "]" * 150)})),
    "deep list": ("a.json", b"[" * 100_000),
    "deep reply tree": ("a.jsonl", lines(LAYOUT_ROWS["oasst"][0], json.loads('{"message_tree_id": "t", "prompt": ' + '{"role": "prompter", "text": "a", "replies": [' * 60 + "]}" * 60 + "}"))),
    "gzip bomb": ("a.jsonl.gz", gzip.compress(b" " * 3_000_000)),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(lines(*[OK] * 100))[:-20]),
    "gzip in name only": ("a.jsonl.gz", lines(OK)),
    "gzip within gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(lines(OK)))),
    "broken gzip": ("a.json.gz", gzip.compress(b"[" + GOOD + b"]")[:12] + b"\xff" * 40),
    "open quote": ("a.csv", b'instruction,output\n"a,b\nc,d\n'),
    "column twice": ("a.csv", b"instruction,instruction\na,b\n"),
    "ragged": ("a.csv", b"instruction,output\na\na,b,c\na,b\n\xff,b\n"),
    "nameless column": ("a.csv", b"instruction,output,\na,b,c\n"),
    "no Parquet": ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1"),
    "no Arrow": ("a.arrow", b"ARROW1\0\0" + b"\xff" * 100),
    "text of bytes": ("a.txt", b"One\n\n\xff\xfe\n\n\0\0\n"),
    "no suffix": ("a", lines(OK)),
    "other suffix": ("a.xml", lines(OK)),
    "no layout": ("a.jsonl", lines({"a": 1}, {"b": 2})),
    "a key of a megabyte": ("a.jsonl", lines({"k" * 1_000_000: 1})),
    "keys that steer": ("a.jsonl", lines({"\x1b[2J\u202e\n": 1})),
    "many keys": ("a.jsonl", lines({f"k{i}": i for i in range(20_000)}, OK)),
    "a tree of texts": ("a.jsonl", lines({"message_tree_id": 1, "prompt": {"role": "prompter", "text": "a", "replies": "abc"}})),
    "ranks of every kind": ("a.jsonl", lines(*({"message_tree_id": 1, "prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b", "rank": rank}, {"role": "assistant", "text": "c", "rank": 0}]}} for rank in (None, "1", [], {}, True, 1.5, 10**400)))),
    "margins of every kind": ("a.jsonl", lines(*({"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin} for margin in (None, "1", [], True, 1.5, 10**400, -1e308)))),
    "20,000 categories": ("a.jsonl", b"".join(b'{"instruction": "q%d", "output": "It is so.", "category": "c%d"}\n' % (i, i) for i in range(20_000))),
    "arguments of every kind": ("a.jsonl", lines(*(calling(arguments) for arguments in ("not JSON", "", "[1]", "3", [1], 3, None, {}, '{"a": NaN}', '{"a": "\\ud83d"}', "[" * 100_000, '{"a": 1, "a": 2}', "\x1b[2J\u202e", '{"a": ' + "9" * 5000 + "}", '{"a": ' + "[" * 150 + "]" * 150 + "}")))),
    "a tool result without a call": ("a.jsonl", lines(chatting(ASKED, {"role": "tool", "content": "b", "tool_call_id": "c9"}, SAID), chatting(ASKED, {"role": "tool", "content": {"a": [1]}}, SAID))),
    "weights of every kind": ("a.jsonl", lines(*(chatting(ASKED, {**SAID, key: weight}) for key in ("weight", "train", "loss") for weight in ("yes", 2, -1, 0.5, [], {}, None, 0, 1, True, 10**400)))),
    "nested parts": ("a.jsonl", lines(*(chatting({**ASKED, "content": parts}, SAID) for parts in ([], [[]], [{"type": "text", "text": [{"type": "text", "text": "a"}]}], [{"type": "image"}], [{"type": []}], [{"type": "thinking", "thinking": [{"type": "thinking", "thinking": []}]}], [None], {"a": 1}, [{"type": "text", "text": "a", "\x1b[2J": 1}])))),
    "tools of every kind": ("a.jsonl", lines(*({**chatting(ASKED, SAID), "tools": tools} for tools in ("a hammer", "", "[]", "{", "[" * 100_000, 3, True, [3], [[]], ["{}"], {"name": 1}, {"name": "a", "parameters": "x"}, [{"name": "a", "parameters": {"b": {"type": "List[" * 300}}}], [{"type": "web_search"}], '[{"name": "\\ud83d"}]', [{"name": "a", "parameters": {"type": {"type": "str"}}}])))),
    "ids and names of every kind": ("a.jsonl", lines(*(chatting(ASKED, {**SAID, "name": name, "tool_calls": [{"id": name, "name": "f"}]}, {"role": "tool", "content": "b", "tool_call_id": name}) for name in ("a", "", 3, None, [], {}, True, 1.5, "\x1b[2J")))),
    "calls in text": ("a.jsonl", lines(*(chatting({"role": "system", "content": system}, ASKED, {**SAID, "content": said}) for system in ("<tools>[{}]</tools>", '<tools>\n[{"name": "f"}]\n</tools>', "<tools>{" * 500, "functions in JSON format: [" + "[" * 50_000, 'list of functions in JSON format: [{"name": "f g"}]') for said in ("<tool_call>", "<tool_call>{}</tool_call>", "<tool_call>{'name': 'f'}</tool_call>", "[f g(a=1), f g(", "[f g(a=" + "(" * 5000 + ")]", "<think>a", "<think></think>", "<|begin_of_thought|>", "</think>")))),
    "a tool calls": ("a.jsonl", lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": {"a": [[]]}}, {"role": "tool", "content": "b"}]})),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_a_hostile_file_is_checked_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 50_000 if "limit" in name else files.MAX_ROW_BYTES)
    monkeypatch.setattr(files, "GZIP_FREE_BYTES", 1_000_000)
    path, content = BYTES[name]
    Path(path).write_bytes(content)
    Path("b.jsonl").write_bytes(lines(OK))
    if name == "20,000 categories":
        found = json.loads(call(path, "--json")[1])
        assert (found["profile"]["category_count"], len(found["profile"]["categories"])) == (20_000, 51)
        return
    found = holds(path)
    if name in {"a line over the limit", "an element over the limit", "not UTF-8", "half a character", "zero bytes"}:
        assert found and (found["dropped"]["malformed_row"], found["rows"]) == (1, 3)
    holds("b.jsonl", "--against", path)
    holds("b.jsonl", "--since", path)


def test_an_archive_under_another_name_is_refused() -> None:
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("../../evil.jsonl", lines(OK))
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz"):
        Path(name).write_bytes(Path("a.zip").read_bytes())
        assert holds(name) is None or name in {"a.txt", "a.csv"}


NAMES = ["two\nlines", "\x1b[31mred\x07", "\u202egnp", "a:b", "-x", "--json", "[bold]x", "<b>x", "%s{0}", "'quote\"", "…" * 40, os.fsdecode(b"\xff\xfe"),
         "hub", "~", "$HOME", "*", "."]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_any_name_is_checked_and_named(name: str) -> None:
    Path(f"./{name}.jsonl").write_bytes(lines(OK, OK, {**OK, "output": 1}))
    found = holds(f"./{name}.jsonl")
    assert found and (found["rows"], found["dropped"]) == (3, {"malformed_row": 1, "exact_duplicates": 1})
    Path("set", name).mkdir(parents=True)
    Path("set", name, f"{name}.jsonl").write_bytes(lines(OK, b"no json"))
    assert holds("set", "--against", f"./{name}.jsonl") is None
    assert holds("set", f"./{name}.jsonl", "--since", "set")
    Path("set", f"{name}.jsonl").write_bytes(b"")
    assert holds("set") is None


def test_links_are_followed_inside_a_folder_and_never_out(folder: Path) -> None:
    Path("set/deep").mkdir(parents=True)
    Path("set/a.jsonl").write_bytes(lines(OK))
    Path("outside.jsonl").write_bytes(lines(OK))
    Path("set/deep/again").symlink_to("..")
    Path("set/b.jsonl").symlink_to("a.jsonl")
    found = holds("set")
    assert found and found["rows"] == 2
    for target in ("../outside.jsonl", "/etc/passwd", "loop.jsonl", "nowhere.jsonl", str(folder / "outside.jsonl")):
        Path("set/loop.jsonl").symlink_to(target)
        assert holds("set") is None and holds("outside.jsonl", "--against", "set") is None
        Path("set/loop.jsonl").unlink()
    Path("loop.jsonl").symlink_to("loop.jsonl")
    assert holds("loop.jsonl") is None and holds("outside.jsonl", "--since", "loop.jsonl") is None
    assert holds("set/../set/deep/../a.jsonl", "./set//a.jsonl")


def test_anything_but_a_regular_file_is_refused(folder: Path) -> None:
    Path("empty").mkdir()
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    for name in (
        "empty",
        "folder.jsonl",
        "pipe.jsonl",
        os.devnull,
        "/dev/zero",
        "/proc/self/mem",
        "\0",
        "a" * 300,
        "/" + "a/" * 3000,
        "hub:",
        "hub:a/b@" + "0" * 40 + ":../x",
    ):
        assert holds(name) is None


def test_a_file_that_may_not_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("set").mkdir()
    for suffix in READERS:
        Path(f"set/a{suffix}").write_bytes(b"x")

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", "a")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        patch.setattr(gzip, "open", denied)
        for suffix in (".json", ".jsonl", ".csv", ".txt", ".json.gz", ".jsonl.gz"):
            assert "Permission denied" in call(f"set/a{suffix}")[2]
            assert holds(f"set/a{suffix}") is None

    def walk(top: Path, onerror: Callable[[OSError], None]) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", str(top)))
        yield

    monkeypatch.setattr(files.os, "walk", walk)
    assert "set: cannot be read: Permission denied" in call("set")[2] and holds("set") is None


def test_many_long_near_copies_take_seconds() -> None:
    """Each pair's shared words are sought, which takes minutes where words repeat."""
    unique = " ".join(f"word{i}" for i in range(300))
    rows = [{"instruction": f"{unique} {'ho ' * 4000}{i}", "output": f"{'ha ' * 4000}{i}"} for i in range(8)]
    Path("a.jsonl").write_bytes(lines(*rows))
    Path("b.jsonl").write_bytes(lines(*({**row, "output": "haha" * 3000} for row in rows)))
    found = json.loads(call("a.jsonl", "--since", "b.jsonl", "--against", "b.jsonl", "--json")[1])
    assert [len(finding["matches"]) for finding in found["findings"] if finding["matches"]] == [64, 28]


# Nasty files, drawn


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(10**20, 10**400)
TEXT = st.sampled_from([text for text in TEXTS.values() if len(text) < 10_000]) | st.text(max_size=40) | st.sampled_from(["", "user", "assistant", "system", "tool", "human", "gpt", "prompter", "-1", "0", "train", "test"])  # fmt: skip
JSON = st.recursive(SCALARS | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
EXTRA = st.dictionaries(
    st.sampled_from(["system", "category", "split", "kind", "meta", "margin", "label", "rank", "problem", "row", "input", "tree", "id", "subject", "activity_label"]),
    JSON, max_size=3,
)  # fmt: skip


def like(value: Any) -> st.SearchStrategy[Any]:
    """Nearly the value: the same keys mostly, other texts, and now and then something else altogether."""
    if isinstance(value, dict):
        same = st.fixed_dictionaries({key: like(inner) for key, inner in value.items()})
    elif isinstance(value, list):
        same = st.lists(st.one_of([JSON, *map(like, value)]), max_size=3) | st.tuples(*map(like, value)).map(list)
    else:
        same = st.just(value) | (TEXT if isinstance(value, str) else SCALARS)
    return st.one_of(same, same, same, st.just(value), JSON)


def row_like(example: dict[str, Any]) -> st.SearchStrategy[Any]:
    whole = st.fixed_dictionaries({key: like(value) for key, value in example.items()})
    return st.builds(lambda row, extra: {**extra, **row}, whole, EXTRA) | like(example)


ROWS_LIKE = st.sampled_from(ROWS_OF_ALL_KINDS).flatmap(
    lambda example: st.lists(st.just(example) | row_like(example), min_size=1, max_size=6)
)
MIXED = st.lists(st.sampled_from(ROWS_OF_ALL_KINDS).flatmap(row_like), min_size=1, max_size=6)


@search(20)
@given(ROWS_LIKE | MIXED, st.booleans(), st.sampled_from(["", *KNOWN]))
def test_rows_with_the_keys_of_every_layout_are_checked_or_refused(rows: list[Any], listed: bool, layout: str) -> None:
    path = Path("a.json" if listed else "a.jsonl")
    path.write_bytes(json.dumps(rows).encode() if listed else lines(*rows))
    holds(path, *(["--format", layout] if layout else []))


@search(10)
@given(ROWS_LIKE, ROWS_LIKE, st.booleans())
def test_any_rows_can_be_held_out_or_be_an_earlier_version(rows: list[Any], others: list[Any], grams: bool) -> None:
    Path("a.jsonl").write_bytes(lines(*rows, rows[0]))
    Path("b.jsonl").write_bytes(lines(*others))
    holds("a.jsonl", "--against", "b.jsonl", *(["--thirteen-grams"] if grams else []))
    holds("a.jsonl", "--since", "b.jsonl")


PIECES = st.sampled_from([b'{"', b'"}', b"\n", b"[", b"]", b",", b"\\u", b"\x00", b"\xff", b"\xef\xbb\xbf", GOOD, GOOD + b"\n", b'"', b"PAR1", b"ARROW1", b"\x1f\x8b", b"NaN", b"1e999", b"instruction,output\n"])  # fmt: skip
BLOB = st.lists(PIECES | st.binary(max_size=20), max_size=12).map(b"".join)


@pytest.mark.parametrize("suffix", READERS)
@search(6)
@given(BLOB)
def test_any_bytes_in_any_file_type_are_checked_or_refused(suffix: str, content: bytes) -> None:
    path = Path(f"a{suffix}")
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") and not content.startswith(b"\x1f") else content)
    holds(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".jsonl.gz"])
@search(10)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 400))
def test_a_table_with_broken_bytes_is_checked_or_refused(suffix: str, broken: list[tuple[int, int]], cut: int) -> None:
    path = Path(f"a{suffix}")
    FILE_WRITERS[suffix](path, [{"prompt": f"Where is row {i}?", "completion": "Here, as you can see."} for i in range(20)])
    content = bytearray(path.read_bytes())
    for place, value in broken:
        content[place % len(content)] = value
    path.write_bytes(bytes(content[: len(content) - cut] if cut % 4 == 0 else content))
    holds(path)


@search(10)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_a_broken_output_of_a_stage_is_checked_or_refused(broken: list[tuple[int, int]], ledger: bool) -> None:
    said = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    records = [
        {"example_id": f"{i:032x}", "source": "s", "messages": said, "category": None, "group_id": None, "meta": "{}"} for i in range(5)
    ]
    write_records(Path("set"), records)
    write_ledger(
        Path("set"), [{"source": "s", "source_row": i, "example_id": f"{i:032x}", "outcome": "kept", "why": None} for i in range(5)]
    )
    assert len(read_records(Path("set"))) == len(read_ledger(Path("set"))) == 5
    path = Path("set", "ledger.parquet" if ledger else "records-00000.parquet")
    content = bytearray(path.read_bytes())
    for place, value in broken:
        content[place % len(content)] = value
    path.write_bytes(bytes(content))
    holds("set")


# Policies and decisions


YAML_TEXT = st.text(st.sampled_from(list("ab1:-[]{}&*!|>'\"%@`#,?\n \t.é\0")), max_size=30)
CHECK = st.sampled_from([*CHECKS, "nothing", 3])
POLICY = st.dictionaries(
    st.sampled_from([*Rules.model_fields, "benchmarks", "instructions", 1, None]),
    JSON
    | st.dictionaries(CHECK, st.sampled_from(["drop", "warn", "fail", "review", "error", "info", None]) | JSON, max_size=3)
    | st.lists(
        st.fixed_dictionaries(
            {"check": CHECK, "reason": TEXT, "expires": st.sampled_from(["2999-01-01", "2999-02-30", "2000-01-01", 3, None])},
            optional={"rows": st.lists(st.sampled_from(["a.jsonl:0", "b:1", ""]) | JSON, max_size=2), "pairs": JSON},
        ) | JSON,
        max_size=2,
    )
    | st.integers(-5, 5)
    | st.floats(0, 2),
    max_size=4,
)  # fmt: skip


@search(20)
@given(POLICY, st.booleans(), YAML_TEXT)
def test_any_policy_is_followed_or_refused(policy: dict[Any, Any], nested: bool, more: str) -> None:
    Path("a.jsonl").write_bytes(lines(OK, OK, {**OK, "output": ""}))
    text = (
        json.dumps({"instructions": policy} if nested else policy, ensure_ascii=False)
        .replace('"2999-01-01"', "2999-01-01")
        .replace('"2999-02-30"', "2999-02-30")
    )
    for content in (text, more, f"policy: {more}"):
        Path("policy.yaml").write_text(content, encoding="utf-8", errors="surrogatepass")
        holds("a.jsonl", "--policy", "policy.yaml")


DECISION = st.fixed_dictionaries(
    {}, optional={name: TEXT | st.sampled_from(["accept", "drop", "edit", "Edit ", ""]) for name in ("example_id", "check", "decision", "reason", "new_prompt", "new_response", "place", "x\n")}
)  # fmt: skip


@search(30)
@given(st.lists(DECISION, max_size=4), st.none() | BLOB)
def test_any_review_file_is_read_or_refused(decisions: list[dict[str, str]], content: bytes | None) -> None:
    path = Path("review.csv")
    if content is None:
        names = [*itertools.chain(*decisions)] or ["decision"]
        rows = [[decision.get(name, "") for name in dict.fromkeys(names)] for decision in decisions]
        quoted = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [[*dict.fromkeys(names)], *rows])
        content = quoted.encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    try:
        found = read_decisions(path)
    except InputError as error:
        assert error.hint and "review.csv" in error.what
    else:
        said = [{"role": "user", "content": "Where?"}]
        records, why = edited([{"example_id": found[0].example_id if found else "", "messages": said}], found)
        assert len(records) == 1 and set(why) <= {0}
