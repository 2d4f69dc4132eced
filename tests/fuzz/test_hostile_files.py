"""For any data, `pedigree check` gives a verdict or a clear refusal: no
traceback, no lost row, no raw control characters.

Hostile files one by one; the drawn ones are in data_files.py.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders.commands import refuse_constant
from builders.layouts import BENCHMARK_ROWS, LAYOUT_ROWS, PAIR_ROWS

from dagster_project.core.errors import PedigreeError
from dagster_project.curation import check_files
from dagster_project.curation.sources import files
from dagster_project.curation.sources.files import READERS
from fuzz import values
from fuzz.data_files import TOOL_ROW
from fuzz.surface import STEERS, call


@contextmanager
def judging_once() -> Iterator[None]:
    """While open, the second call of the command takes the verdict of the first: judging takes nearly all of its time,
    and test_a_file_that_is_judged_again_gets_the_same_verdict shows on a few files that it would be the same."""
    whole, verdicts = check_files.check_paths, list[Any]()

    def check_paths(*arguments: Any) -> Any:
        if not verdicts:
            try:
                verdicts.append(whole(*arguments))
            except PedigreeError as refusal:
                verdicts.append(refusal)
        if isinstance(verdicts[0], PedigreeError):
            raise verdicts[0]
        return copy.deepcopy(verdicts[0])

    check_files.check_paths = check_paths
    try:
        yield
    finally:
        check_files.check_paths = whole


def holds(*arguments: object) -> dict[str, Any] | None:
    """Judges, and shows the verdict in both forms and with a page. Returns the
    document, or None if the input was refused."""
    page = Path("page.html")
    page.unlink(missing_ok=True)
    with judging_once():
        code, out, err = call("check", *map(str, arguments), "--json", "--report", str(page))
        again, shown, told = call("check", *map(str, arguments))
    assert code == again and code in {0, 1, 2}, err
    for text in (shown, told, err):
        assert not STEERS.search(text), repr(STEERS.search(text))
    assert max(map(len, [*told.split("\n"), *err.split("\n")])) < 10_000
    if code == 2:
        refused = json.loads(out.encode("utf-8"))
        assert refused.keys() == {"error", "hint"} and refused["error"] and not STEERS.search(out.rstrip("\n"))
        assert shown == "" and err.startswith("error: ") and "\nhint: " in err and "Traceback" not in err
        return None
    found: dict[str, Any] = json.loads(out.encode("utf-8"), parse_constant=refuse_constant)
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
TEXTS = {**values.TEXTS, "long word": "x" * 1_000_000, "one word again and again": "ho " * 20_000}
KINDS: dict[str, list[Any]] = {
    "examples": [*(row for row, _ in LAYOUT_ROWS.values()), TOOL_ROW],
    "preferences": [rows[0] for name, rows in PAIR_ROWS.items() if name != "oasst"],
    "benchmarks": [row for name, (row, *_) in BENCHMARK_ROWS.items() if name != "gsm8k"],
}


def filled(value: Any, text: str) -> Any:
    """The same, each text in it replaced, but those that a layout reads as names."""
    if isinstance(value, dict):
        return {key: filled(inner, text) if key not in {"role", "from"} else inner for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, text) for inner in value]
    return text if isinstance(value, str) else value


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.mark.long
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


ASKED = {"role": "user", "content": "Where does the river begin?"}
SAID = {"role": "assistant", "content": "In the hills, near the old mill."}


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
    "an element over the limit": (
        "a.json",
        b"[" + b",".join([GOOD, b'{"instruction": "' + b"x" * 60_000 + b'", "output": "y"}', GOOD]) + b"]",
    ),
    "not UTF-8": ("a.jsonl", lines(OK, '{"instruction": "é"}'.encode("latin-1"), OK)),
    "UTF-16": ("a.jsonl", json.dumps(OK).encode("utf-16")),
    "UTF-32": ("a.json", json.dumps([OK]).encode("utf-32")),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(OK)),
    "byte order mark within": ("a.jsonl", lines(OK, b"\xef\xbb\xbf" + GOOD)),
    "half a character": ("a.jsonl", lines(OK, b'{"instruction": "\\ud83d", "output": "\\ude00"}', OK)),
    "half a character in a key": ("a.jsonl", lines(OK, b'{"\\ud83d": 1, "instruction": "a", "output": "b"}')),
    "key twice": ("a.jsonl", lines(OK, b'{"instruction": "a", "instruction": "b", "output": "c"}')),
    "no numbers": (
        "a.jsonl",
        lines(
            OK,
            b'{"instruction": NaN, "output": 1}',
            b'{"instruction": "a", "output": "b", "x": -Infinity}',
            b'{"x": 1e999}',
        ),
    ),
    "huge numbers": (
        "a.jsonl",
        lines(
            {**OK, "x": 10**4000},
            b'{"instruction": "a", "output": "b", "x": ' + b"9" * 5000 + b"}",
            {**OK, "category": 1e308},
        ),
    ),
    "late type": ("a.jsonl", lines(*[OK] * 300, {**OK, "output": 3}, {**OK, "output": None}, {**OK, "output": [1]})),
    "late and missing columns": ("a.jsonl", lines(*[OK] * 300, {**OK, "extra": 1}, {"instruction": "a"}, {})),
    "empty": ("a.jsonl", b""),
    "blank": ("a.json", b" \n\t\r\n"),
    "blank lines": ("a.jsonl", b"\n \n\r\n"),
    "empty list": ("a.json", b"[]"),
    "empty objects": ("a.jsonl", b"{}\n{}\n"),
    "no objects": ("a.json", b'[1, "a", null, [], true]'),
    "an object": ("a.json", GOOD),
    "deep": (
        "a.jsonl",
        lines(
            OK,
            b'{"instruction": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            {**OK, "meta": json.loads("[" * 150 + "]" * 150)},
        ),
    ),
    "deep list": ("a.json", b"[" * 100_000),
    "deep reply tree": (
        "a.jsonl",
        lines(
            LAYOUT_ROWS["oasst"][0],
            json.loads(
                '{"message_tree_id": "t", "prompt": '
                + '{"role": "prompter", "text": "a", "replies": [' * 60
                + "]}" * 60
                + "}"
            ),
        ),
    ),
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
    "a tree of texts": (
        "a.jsonl",
        lines({"message_tree_id": 1, "prompt": {"role": "prompter", "text": "a", "replies": "abc"}}),
    ),
    "ranks of every kind": (
        "a.jsonl",
        lines(
            *(
                {
                    "message_tree_id": 1,
                    "prompt": {
                        "role": "prompter",
                        "text": "a",
                        "replies": [
                            {"role": "assistant", "text": "b", "rank": rank},
                            {"role": "assistant", "text": "c", "rank": 0},
                        ],
                    },
                }
                for rank in (None, "1", [], {}, True, 1.5, 10**400)
            )
        ),
    ),
    "margins of every kind": (
        "a.jsonl",
        lines(
            *(
                {"prompt": "a", "chosen": "b", "rejected": "c", "margin": margin}
                for margin in (None, "1", [], True, 1.5, 10**400, -1e308)
            )
        ),
    ),
    "20,000 categories": (
        "a.jsonl",
        b"".join(b'{"instruction": "q%d", "output": "It is so.", "category": "c%d"}\n' % (i, i) for i in range(20_000)),
    ),
    "arguments of every kind": (
        "a.jsonl",
        lines(
            *(
                calling(arguments)
                for arguments in (
                    "not JSON",
                    "",
                    "[1]",
                    "3",
                    [1],
                    3,
                    None,
                    {},
                    '{"a": NaN}',
                    '{"a": "\\ud83d"}',
                    "[" * 100_000,
                    '{"a": 1, "a": 2}',
                    "\x1b[2J\u202e",
                    '{"a": ' + "9" * 5000 + "}",
                    '{"a": ' + "[" * 150 + "]" * 150 + "}",
                )
            )
        ),
    ),
    "a tool result without a call": (
        "a.jsonl",
        lines(
            chatting(ASKED, {"role": "tool", "content": "b", "tool_call_id": "c9"}, SAID),
            chatting(ASKED, {"role": "tool", "content": {"a": [1]}}, SAID),
        ),
    ),
    "weights of every kind": (
        "a.jsonl",
        lines(
            *(
                chatting(ASKED, {**SAID, key: weight})
                for key in ("weight", "train", "loss")
                for weight in ("yes", 2, -1, 0.5, [], {}, None, 0, 1, True, 10**400)
            )
        ),
    ),
    "nested parts": (
        "a.jsonl",
        lines(
            *(
                chatting({**ASKED, "content": parts}, SAID)
                for parts in (
                    [],
                    [[]],
                    [{"type": "text", "text": [{"type": "text", "text": "a"}]}],
                    [{"type": "image"}],
                    [{"type": []}],
                    [{"type": "thinking", "thinking": [{"type": "thinking", "thinking": []}]}],
                    [None],
                    {"a": 1},
                    [{"type": "text", "text": "a", "\x1b[2J": 1}],
                )
            )
        ),
    ),
    "tools of every kind": (
        "a.jsonl",
        lines(
            *(
                {**chatting(ASKED, SAID), "tools": tools}
                for tools in (
                    "a hammer",
                    "",
                    "[]",
                    "{",
                    "[" * 100_000,
                    3,
                    True,
                    [3],
                    [[]],
                    ["{}"],
                    {"name": 1},
                    {"name": "a", "parameters": "x"},
                    [{"name": "a", "parameters": {"b": {"type": "List[" * 300}}}],
                    [{"type": "web_search"}],
                    '[{"name": "\\ud83d"}]',
                    [{"name": "a", "parameters": {"type": {"type": "str"}}}],
                )
            )
        ),
    ),
    "ids and names of every kind": (
        "a.jsonl",
        lines(
            *(
                chatting(
                    ASKED,
                    {**SAID, "name": name, "tool_calls": [{"id": name, "name": "f"}]},
                    {"role": "tool", "content": "b", "tool_call_id": name},
                )
                for name in ("a", "", 3, None, [], {}, True, 1.5, "\x1b[2J")
            )
        ),
    ),
    "calls in text": (
        "a.jsonl",
        lines(
            *(
                chatting({"role": "system", "content": system}, ASKED, {**SAID, "content": said})
                for system in (
                    "<tools>[{}]</tools>",
                    '<tools>\n[{"name": "f"}]\n</tools>',
                    "<tools>{" * 500,
                    "functions in JSON format: [" + "[" * 50_000,
                    'list of functions in JSON format: [{"name": "f g"}]',
                )
                for said in (
                    "<tool_call>",
                    "<tool_call>{}</tool_call>",
                    "<tool_call>{'name': 'f'}</tool_call>",
                    "[f g(a=1), f g(",
                    "[f g(a=" + "(" * 5000 + ")]",
                    "<think>a",
                    "<think></think>",
                    "<|begin_of_thought|>",
                    "</think>",
                )
            )
        ),
    ),
    "a tool calls": (
        "a.jsonl",
        lines(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None, "tool_calls": {"a": [[]]}},
                    {"role": "tool", "content": "b"},
                ]
            }
        ),
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_hostile_file_is_checked_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 50_000 if "limit" in name else files.MAX_ROW_BYTES)
    monkeypatch.setattr(files, "GZIP_FREE_BYTES", 1_000_000)
    path, content = BYTES[name]
    Path(path).write_bytes(content)
    Path("b.jsonl").write_bytes(lines(OK))
    if name == "20,000 categories":
        found = json.loads(call("check", path, "--json")[1])
        assert (found["profile"]["category_count"], len(found["profile"]["categories"])) == (20_000, 51)
        return
    found = holds(path)
    if name in {"a line over the limit", "an element over the limit", "not UTF-8", "half a character", "zero bytes"}:
        assert found and (found["dropped"]["malformed_row"], found["rows"]) == (1, 3)
    holds("b.jsonl", "--against", path)
    holds("b.jsonl", "--since", path)


@pytest.mark.parametrize(
    "name", ["truncated gzip", "half a character", "late type", "ranks of every kind", "calls in text"]
)
def test_a_file_that_is_judged_again_gets_the_same_verdict(name: str) -> None:
    """One file is refused, and in the others rows are malformed, equal, or
    nearly so. The other form of the output is made from the same document."""
    path, content = BYTES[name]
    Path(path).write_bytes(content)
    assert call("check", path, "--json") == call("check", path, "--json")


def test_an_archive_under_another_name_is_refused() -> None:
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("../../evil.jsonl", lines(OK))
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow", "a.jsonl.gz"):
        Path(name).write_bytes(Path("a.zip").read_bytes())
        assert holds(name) is None or name in {"a.txt", "a.csv"}


NAMES = [
    "two\nlines",
    "\x1b[31mred\x07",
    "\u202egnp",
    "a:b",
    "-x",
    "--json",
    "[bold]x",
    "<b>x",
    "%s{0}",
    "'quote\"",
    "…" * 40,
    os.fsdecode(b"\xff\xfe"),
    "hub",
    "~",
    "$HOME",
    "*",
    ".",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_any_name_is_checked_and_named(name: str) -> None:
    Path(f"./{name}.jsonl").write_bytes(lines(OK, OK, {**OK, "output": 1}))
    found = holds(f"./{name}.jsonl")
    assert found and (found["rows"], found["dropped"]) == (3, {"malformed_row": 1, "exact_duplicates": 1})
    Path("set", name).mkdir(parents=True)
    Path("set", name, f"{name}.jsonl").write_bytes(lines(OK, b"no json"))
    assert holds("set", "--against", f"./{name}.jsonl") is None
    is_hidden = name == "."  # "..jsonl", which is not read as part of a folder
    assert bool(holds("set", f"./{name}.jsonl", "--since", "set")) is not is_hidden
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
            assert "Permission denied" in call("check", f"set/a{suffix}")[2]
            assert holds(f"set/a{suffix}") is None

    def walk(top: Path, onerror: Callable[[OSError], None]) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", str(top)))
        yield

    monkeypatch.setattr(files.os, "walk", walk)
    assert "set: cannot be read: Permission denied" in call("check", "set")[2] and holds("set") is None


@pytest.mark.long
def test_many_long_near_copies_take_seconds() -> None:
    """Each pair's shared words are sought, which takes minutes where words repeat."""
    unique = " ".join(f"word{i}" for i in range(300))
    rows = [{"instruction": f"{unique} {'ho ' * 4000}{i}", "output": f"{'ha ' * 4000}{i}"} for i in range(8)]
    Path("a.jsonl").write_bytes(lines(*rows))
    Path("b.jsonl").write_bytes(lines(*({**row, "output": "haha" * 3000} for row in rows)))
    found = json.loads(call("check", "a.jsonl", "--since", "b.jsonl", "--against", "b.jsonl", "--json")[1])
    assert [len(finding["matches"]) for finding in found["findings"] if finding["matches"]] == [64, 28]
