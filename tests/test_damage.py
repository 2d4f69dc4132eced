"""Damaged characters and leftover templates are found; other scripts, emoji, art, code and markup pass."""

from __future__ import annotations

import random
import re

import pytest
from ftfy import fix_encoding
from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.curation.checks import damage as damages
from dagster_project.curation.checks import text_search
from dagster_project.curation.checks.damage import _damage, _damage_hint, damage, repaired_encoding, template_marks
from dagster_project.curation.checks.privacy import candidates


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Un cafÃ© noir", "mojibake: 'Un cafÃ© noir'"),
        ("itâ€™s", "mojibake: 'itâ€™s'"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "mojibake: 'Ð¿Ñ€Ð¸Ð²ÐµÑ‚'"),
        ("lost \ufffd sign", "replacement character: 'lost \ufffd sign'"),
        ("a\x00b", "control character: 'a\\x00b'"),
        ("page\x0cbreak", "control character: 'page\\x0cbreak'"),
        ("wait \x85", "control character: 'wait \\x85'; mojibake: 'wait \\x85'"),
        ("\x1b[31mred", "control character: '\\x1b[31mred'"),
        ("if admin\u202e } \u2066", "bidirectional control: 'if admin\\u202e } \\u2066'"),
        ("icon \ue0b0", "private-use character: 'icon \\ue0b0'"),
        ("half \ud83d", "half of a surrogate pair: 'half \\ud83d'"),
        ("hi\U000e0041", "hidden tag character: 'hi\\U000e0041'"),
        ("a\x00 cafÃ©", "control character: 'a\\x00 cafÃ©'; mojibake: 'a\\x00 cafÃ©'"),
        ("ann@a.de\x00 said", "control character: '[e-mail]\\x00 said'"),
    ],
)
def test_damage_is_named_with_a_safe_excerpt(text: str, said: str) -> None:
    assert damage(["fine", text]) == [None, said]


@pytest.mark.parametrize(
    "text",
    [
        "naïve café, Ångström, «oui», l'œuvre Œ uvre, São Paulo, AÇÃO, NÃO É, Größe 5 µm ± 2 °C",
        "Привет, «мир» — как дела? Γειά σου Κόσμε, Ελλάδα",
        "مرحبا بالعالم \u200f(نص) שלום עולם \u200e123",
        "日本語 テスト，中文。한국어",
        "👨\u200d👩\u200d👧 👍🏽 ❤️ 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        "(ノಠ益ಠ)ノ彡┻━┻ ╔══╗ █▓▒░ ʕ•ᴥ•ʔ √2 ≈ 1.41 × ½",
        "tab\tline\r\nnext\n",
        "“quotes” – dashes… ‘it’s’ €5 £3 ¥9 §4 ¶ † ™ ©2020 ®",
    ],
)
def test_undamaged_text_is_not_changed(text: str) -> None:
    assert damage([text]) == [None]


NAUGHTY = st.text(st.sampled_from(sorted(set("".join(MOJIBAKE_CATEGORIES.values()) + "aAВГâÃÂ œ"))), max_size=8)


@settings(max_examples=500, deadline=None)
@given(st.from_regex(BADNESS_RE) | NAUGHTY | st.text(st.characters(), max_size=8))
def test_the_prefilter_loses_nothing(text: str) -> None:
    if BADNESS_RE.search(text):
        assert candidates([text], _damage_hint()) == [0]
    assert damage([text, "fine"]) == [_damage(text), None]


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.characters(codec="utf-8", categories=["L", "N", "P", "Zs", "S"], exclude_characters="\ufffd"), max_size=20
    ),
    st.sampled_from(["\x00", "\x9f", "\u202e"]),
    st.text(max_size=20),
)
def test_a_hidden_character_is_found_anywhere_and_shown_escaped(head: str, bad: str, tail: str) -> None:
    (said,) = damage([head + bad + tail])
    assert said is not None
    assert bad not in said
    assert said.isprintable()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=0xC0, max_codepoint=0x17F, categories=["Ll", "Lu"]), min_size=4, max_size=9))
def test_words_read_in_the_wrong_encoding_are_found(word: str) -> None:
    assert damage([f"the word {word.encode().decode('latin-1')} here"])[0] is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Bye<|im_end|>", "control token: '<|im_end|>'"),
        ("<|start_header_id|>user", "control token: '<|start_header_id|>'"),
        ("x <|endoftext|> y", "control token: '<|endoftext|>'"),
        ("<｜begin▁of▁sentence｜>Hi", "control token: '<｜begin▁of▁sentence｜>'"),
        ("<s>[INST] Hi [/INST] Ho </s>", "control token: '[INST]'"),
        ("<<SYS>>", "control token: '<<SYS>>'"),
        ("[TOOL_CALLS] []", "control token: '[TOOL_CALLS]'"),
        ("<start_of_turn>user", "control token: '<start_of_turn>'"),
        ("The answer is 4</s>", "control token: '</s>'"),
        (" <s>All of it</s>\n", "control token: '<s>'"),
        ("was <s>old</s> new</s>", "control token: '</s>'"),
        ("### Instruction:\nSay hi\n### Response:\nHi", "instruction template: '### Instruction:'"),
        ("Hi\n\n### Response: ", "instruction template: '### Response:'"),
        (
            "Below is an instruction that describes a task, ...",
            "instruction template: 'Below is an instruction that describes a task'",
        ),
        ("Human: hi\n\nAssistant: ho", "transcript: 'Human: ... Assistant:'"),
        ("**User:** hi\n**AI:** ho", "transcript: 'User: ... AI:'"),
        ("USER: hi ASSISTANT: ho</s>", "control token: '</s>'; transcript: 'USER: ... ASSISTANT:'"),
    ],
)
def test_a_template_left_in_is_named(text: str, said: str) -> None:
    assert template_marks(["fine", text]) == [None, said]


@pytest.mark.parametrize(
    "text",
    [
        "Price: <s>$20</s> $15, <s>old</s>, <b>bold</b>, <strong>s</strong> <sys>",
        "f <| x |> g, a <|> b, |x| < 3, ⟨ψ|φ⟩, a << b >> c, arr[INSTANCE]",
        "### Instructions:\n1. Mix.\n### Input:\nn\n### Response time\nfast, and ### Response: in a line",
        "The user: a person. The Assistant: a play.\nAssistant: only one side",
        "Human: only one side",
        "[PAD] [MASK] <unk> in a text about BERT",
        "Below is an instruction manual",
    ],
)  # fmt: skip
def test_code_markup_and_headings_are_not_templates(text: str) -> None:
    assert template_marks([text]) == [None]


def test_a_mark_outside_of_struck_parts_is_the_first() -> None:
    dice = random.Random(1)
    for size in [2, 5, 9, 30] * 100:
        text = "".join(dice.choices(["<s>", "</s>", "a", "<s>b</s>", " ", "\n", "c" * 401], k=size))
        whole = text.strip()
        struck = [match.span() for match in damages._STRIKE.finditer(whole)]
        marks = [match.span() for match in damages._SENTENCE.finditer(whole)]
        outside = [
            mark for mark in marks if struck == [(0, len(whole))] or not any(a <= mark[0] < b for a, b in struck)
        ]
        found = damages._sentence(text)
        assert (found and found.span()) == (outside[0] if outside else None), text


def test_the_base_models_own_tokens_count_even_in_markup() -> None:
    own = ["<s>", "[PAD]", "<unused6>", "a|b*", "", " "]
    texts = ["Price: <s>$20</s> $15", "a [PAD] b", "x<unused61>", "a|b*", "a b", "<unused6>"]
    assert template_marks(texts, own) == [
        "control token: '<s>'",
        "control token: '[PAD]'",
        None,
        "control token: 'a|b*'",
        None,
        "control token: '<unused6>'",
    ]


BROKEN = [*"éÃÂ©ÐÑ×²³ßÀœ„“”‚Ä€™вЂВГРС\ufffd\x00\x85\xa0\u200bΒβ│═®°Ø…aA1 \n", "Ã©", "â€™", "Ð¿", "a Â ", "×²", "éÀ"]


def mojibake_line_by_line(text: str) -> list[str | None]:
    """The definition: for each line the first sequence that ftfy detects, where it can fix the line or the word."""
    found: list[str | None] = []
    for line in text.split("\n"):
        line = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ufeff]", "", line)
        match = BADNESS_RE.search(line)
        word = line[line.rfind(" ", 0, match.start()) + 1 :].partition(" ")[0] if match else ""
        found.append(match.group() if match and any(fix_encoding(part) != part for part in (line, word)) else None)
    return found


@pytest.mark.parametrize("long", [0, 40, 20_000])
def test_mojibake_of_long_texts_is_that_of_each_line(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_search, "LONG", long)
    dice = random.Random(1)
    for size in [3, 20, 200, 1500] * 40:
        text = "".join(dice.choices([*dice.sample(BROKEN, dice.randint(2, 9)), " ", "a"], k=size))
        found = mojibake_line_by_line(text)
        assert damages._mojibake(text) == next(filter(None, found), None), text
        lines = [
            damages._unmojibake(line) if broken else line for line, broken in zip(text.split("\n"), found, strict=True)
        ]
        assert repaired_encoding(text) == "\n".join(lines), text
        row = text.replace("\n", " ")
        assert bool(candidates([row], damages._badness_hint())) == bool(BADNESS_RE.search(row)), row


def test_after_many_lines_that_cannot_be_fixed_the_rest_is_not_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damages, "MOST_UNFIXED", 3)
    lines = ["éÀ a", "éÀ b", "éÀ a"]
    assert damages._mojibake("\n".join([*lines, "cafÃ©"])) == "fÃ©", "equal lines count once"
    assert damages._mojibake("\n".join([*lines, "éÀ c", "cafÃ©"])) is None


@given(st.text(max_size=10), st.text(min_size=1, max_size=6).filter(str.strip), st.text(max_size=10))
def test_any_special_token_is_found_in_any_text(head: str, token: str, tail: str) -> None:
    assert template_marks([head + token + tail], {token})[0] is not None


def test_no_texts_no_findings() -> None:
    assert damage([]) == template_marks([]) == []
