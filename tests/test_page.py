"""The page of a data set: hostile text is escaped, and the figures are those of the check document."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections import Counter
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from builders.browser import CHROMIUM, needs_chromium
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_project.core.text import visible
from dagster_project.views import data_quality as module
from dagster_project.views import html
from dagster_project.views.data_quality import around_span, data_quality_page

CSS = Path(html.__file__).with_name("html.css").read_text(encoding="utf-8")

HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onload=alert(1) x='", "<!--", "]]>",
    "</style><style>*{display:none}", "</template></svg></bdi>", "&lt;b&gt;", "\x1b[31mred\x1b[0m", "\x00",
    "\u202egnp.exe\u202c", "\ud800", "\udfff\ud83d", "\u2028", "{{7*7}}", "javascript:alert(1)", "http://example.org/x",
    "\r\n", "\U000e0041", "\ufffe", "",
]  # fmt: skip
texts = st.lists(st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=()), max_size=20), max_size=4).map(
    "".join
)
names = texts.filter(bool)


def match(
    text: str, other: str, span: tuple[int, int] = (0, 3), rule: str = "jaccard", score: float = 0.83, row: int = 17
) -> dict[str, Any]:
    return {"row": row, "place": f"a.json:{row}", "other": "a.json:3", "part": "prompt", "rule": rule, "score": score,
            "text": text, "span": list(span), "other_text": other, "other_span": list(span)}  # fmt: skip


def finding(check: str, severity: str = "warn", count: int = 1, dropped: int = 0, **more: Any) -> dict[str, Any]:
    given = {
        "waived": 0,
        "elsewhere": 0,
        "rows": [3],
        "places": ["a.json:3"],
        "examples": ["first words"],
        "truth": "It holds.",
        "note": "a note",
        "next": "Look.",
    }
    return {"check": check, "severity": severity, "count": count, "dropped": dropped, **given, **more}


def document(**more: Any) -> dict[str, Any]:
    bins = [{"from": 2.0**i, "to": 2.0 ** (i + 1), "rows": 1 + 7 * i} for i in range(6)]
    length = {"unit": "words", "median": 12, "p95": 60, "max": 63, "histogram": bins}
    return {
        "name": "a.json",
        "format": "alpaca",
        "rows": 1203,
        "kept": 1189,
        "dropped": {"exact_duplicates": 9, "empty_response": 5},
        "findings": [
            finding(
                "near_duplicates",
                count=12,
                waived=2,
                matches=[match(f"tell me a joke {i}", f"tell me a story {i}", score=1 - i / 50) for i in range(45)],
            ),
            finding("exact_duplicates", count=9, dropped=9, matches=[match("again", "again", (0, 5), "equal", 1.0)]),
            finding("empty_response", "error", count=5, dropped=5),
        ],
        "similarity": {
            "gate": {"jaccard": 0.3, "containment": 0.5},
            "histogram": [
                {"from": i / 20, "to": (i + 1) / 20, "pairs": 4000 // (i + 1) ** 3, "near": i // 8} for i in range(20)
            ],
            "boilerplate": [{"text": "in your own words", "rows": 61}],
        },
        "profile": {
            "categories": {"login": 777, "billing": 412},
            "sources": {"a.json": 1189},
            "scripts": {"Latin": 1180, "Han": 9},
            "roles": {"user assistant": 1189},
            "lengths": {"prompt": length, "response": length},
            "singletons": 1,
            "entropy": 0.931,
            "effective_categories": 1.91,
            "diversity": {
                "distinct_1": 0.18,
                "openings": 311,
                "top_openings": {"write a": 40},
                "top_responses": {"Yes.": 3},
            },
            "readability": {
                "rows": 951,
                "median": 58.4,
                "p10": 34.2,
                "p90": 81.5,
                "share_hard": 0.187,
                "histogram": bins,
            },
        },
        "notes": {"secrets": "nothing found", "empty_response": "shown on its card"},
        **more,
    }


CHANGES: dict[str, Any] = {
    "previous": "HEAD~1",
    "rows": {"added": 1201, "removed": 3, "changed": 2, "unchanged": 961},
    "examples": {
        "added": [{"place": "a.json:4", "text": "come"}],
        "removed": [{"place": "a.json:5", "text": "gone"}],
        "changed": [{"place": "a.json:6", "before": "two red cats", "after": "two black cats"}],
    },
    "findings": {
        "new": [{"check": "pii", "count": 4}],
        "gone": [{"check": "encoding", "count": 3}],
        "changed": [{"check": "tied_pair", "before": 7, "after": 8}],
    },
}


class Reader(HTMLParser):
    """What a page is made of: its elements with their attributes, its text, and the cells of its tables by caption."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.caption, self.cell = "", None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "input"}:
            self.inside.append(tag)
        if tag == "tr":
            self.tables[self.caption].append([])
        if tag in {"th", "td"}:
            self.tables[self.caption][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "caption":
            self.caption = data
            self.tables[data] = []
        elif {"th", "td"} & set(self.inside) and self.inside[-1] != "tr":
            self.tables[self.caption][-1][-1] += data
        if not {"style", "script"} & set(self.inside):
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    def skeleton(self) -> Counter[Any]:
        """Elements, names of attributes, and the values of those that name or load something."""
        naming = {"id", "class", "href", "src", "for", "name", "type", "http-equiv", "content", "role", "dir"}
        return Counter(
            (tag, tuple(sorted((k, v if k in naming else "") for k, v in attrs.items())))
            for tag, attrs in self.elements
        )


def renamed(value: Any, names: dict[str, str], keep: frozenset[str] = frozenset({"severity"})) -> Any:
    """The same document with every text that is data replaced by a harmless
    one; different texts stay different, empty ones empty."""
    if isinstance(value, str):
        return names.setdefault(value, f"word {len(names)}") if value else value
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    if isinstance(value, dict):
        named = {
            "dropped",
            "gate",
            "categories",
            "sources",
            "scripts",
            "roles",
            "top_openings",
            "top_responses",
            "notes",
        }
        return {
            key: item
            if key in keep
            else {names.setdefault(k, f"word {len(names)}"): renamed(v, names) for k, v in item.items()}
            if key in named and isinstance(item, dict)
            else renamed(item, names)
            for key, item in value.items()
        }
    return value


@st.composite
def hostile_documents(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    counts = st.dictionaries(names, st.integers(1, 10**6), min_size=1, max_size=12)
    spans = st.tuples(st.integers(0, 30), st.integers(0, 30))
    matches = st.builds(match, texts, texts, spans, names, st.floats(0, 1))
    findings = st.builds(
        finding,
        names,
        st.sampled_from(["error", "warn", "info"]),
        st.integers(1, 50),
        st.integers(0, 50),
        places=st.lists(texts, max_size=4),
        examples=st.lists(texts, max_size=3),
        truth=texts,
        note=texts,
        next=texts,
        matches=st.lists(matches, max_size=3),
    )
    found = document(
        name=draw(texts),
        format=draw(texts),
        dropped=draw(counts),
        findings=draw(st.lists(findings, max_size=3)),
        notes={"quiet": draw(texts)},
    )
    for key in ("categories", "sources", "scripts", "roles"):
        found["profile"][key] = draw(counts)
    found["profile"]["diversity"] |= {"top_openings": draw(counts), "top_responses": draw(counts)}
    found["similarity"]["gate"] = {draw(names): 0.3}
    found["similarity"]["boilerplate"] = [{"text": draw(texts), "rows": 2}]
    entry = {"place": draw(texts), "text": draw(texts), "before": draw(texts), "after": draw(texts)}
    counted = {"check": draw(names), "count": 3, "before": 1, "after": 2}
    changes = {
        "previous": draw(texts),
        "rows": CHANGES["rows"],
        "examples": {kind: [entry] for kind in ("added", "removed", "changed")},
        "findings": {kind: [counted] for kind in ("new", "gone", "changed")},
    }
    return found, changes


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(hostile_documents())
def test_no_text_creates_an_element_or_attribute_and_every_page_is_valid_utf_8(
    drawn: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    found, changes = drawn
    html = data_quality_page(found, changes)
    html.encode("utf-8")
    assert not set(html) & {chr(c) for c in [*range(9), 11, *range(14, 32), 127, 0x202E, 0x2066, 0x2028]}
    names: dict[str, str] = {}
    harmless = renamed(found, names)
    assert Reader(html).skeleton() == Reader(data_quality_page(harmless, renamed(changes, names))).skeleton()


@given(texts)
def test_hidden_characters_become_visible_and_the_rest_is_unchanged(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert visible("a\x1b[31m\u202e\ud800\tझ\u200dñ\n") == "a\\x1b[31m\\u202e\\ud800\tझ\u200dñ\n"


@given(st.integers(0, 9000), st.integers(0, 9000), st.integers(0, 9000))
def test_a_long_text_is_cut_around_its_span_and_the_characters_not_shown_are_counted(
    before: int, inside: int, after: int
) -> None:
    first, middle, last, hidden = around_span("a" * before + "b" * inside + "c" * after, (before, before + inside))
    assert len((first + middle + last).replace("…", "")) + hidden == before + inside + after
    assert bool(middle) == bool(inside)
    assert len(first + middle + last) <= max(module.WHOLE, 2 * module.AROUND + module.INSIDE + 3)


def test_a_megabyte_of_text_gives_a_small_page_that_states_what_is_omitted() -> None:
    text = "x" * 700_000 + "the shared words" + "y" * 300_000
    html = data_quality_page(
        document(
            findings=[
                finding("near_duplicates", examples=[text], note=text, matches=[match(text, text, (700_000, 700_016))])
            ]
        )
    )
    assert len(html) < 200_000
    assert "<mark>the shared words</mark>" in html
    assert "999,200 characters not shown" in html


def test_a_long_place_of_a_pair_says_how_much_of_it_is_cut() -> None:
    """Two rows of one file with a long path must not look like the same row."""
    match = {
        "score": 1.0,
        "rule": "jaccard",
        "part": "prompt",
        "text": "a",
        "span": [0, 1],
        "other_text": "a",
        "other_span": [0, 1],
    }
    pair = module._pair_view(0, "near_duplicates", {**match, "place": "d/" * 160 + ":1", "other": "b.jsonl:2"})
    assert [side["place"] for side in pair["sides"]] == ["d/" * 150 + " … (22 characters cut)", "b.jsonl:2"]


def test_the_figures_of_the_page_are_those_of_the_document() -> None:
    found = document()
    reader = Reader(data_quality_page(found, CHANGES))
    words = re.sub(r"\s+", " ", " ".join(reader.words))
    assert "1,203 read = 1,189 kept + 9 exact_duplicates + 5 empty_response" in words
    assert [row[:2] for row in reader.tables["Rows by outcome"][1:]] == [
        ["kept", "1,189"],
        ["exact_duplicates", "9"],
        ["empty_response", "5"],
    ]
    for caption, bins, key in (
        ("Similarity of prompts", found["similarity"]["histogram"], "pairs"),
        ("Length of the prompt", found["profile"]["lengths"]["prompt"]["histogram"], "rows"),
        ("Readability", found["profile"]["readability"]["histogram"], "rows"),
    ):
        assert [row[2] for row in reader.tables[caption][1:]] == [f"{bin_[key]:,}" for bin_ in bins]
    assert [row[3] for row in reader.tables["Similarity of prompts"][1:]] == [
        str(bin_["near"]) for bin_ in found["similarity"]["histogram"]
    ]
    for caption, key in (
        ("Categories", "categories"),
        ("Sources", "sources"),
        ("Scripts", "scripts"),
        ("Conversations", "roles"),
    ):
        assert [row[:2] for row in reader.tables[caption][1:]] == [
            [name, f"{n:,}"] for name, n in found["profile"][key].items()
        ]
    for said in (
        "dropped by this check 0 kept 12 waived 2",
        "entropy 0.931 bits",
        "median 58.4",
        "18.7 % of 951 scored prompts are hard",
        "+ 1,201",
        "7 → 8",
        "was 3",
    ):
        assert said in words
    html = data_quality_page(found, CHANGES)
    for drawn in (
        "777 · 65.3 %</text>",
        "412 · 34.7 %</text>",
        "40 · 3.4 %</text>",
        "1,189</tspan>",
        "98.8 %</tspan>",
        "<title>0.0 to 0.05: 4,000 pairs</title>",
    ):
        assert drawn in html
    assert "shown on its card" not in words  # a note of a check that has a card stands there


def test_findings_are_sorted_by_severity_and_name_it() -> None:
    html = data_quality_page(
        document(
            findings=[
                finding("a", "info", 90),
                finding("b", "warn", 2),
                finding("c", "error", 1),
                finding("d", "warn", 5),
            ]
        )
    )
    assert re.findall(r'<article class="card (\w+)".*?</span> (\w+)</span><h3><bdi dir="auto">(\w)<', html, re.S) == [
        ("error", "error", "c"), ("warn", "warn", "d"), ("warn", "warn", "b"), ("info", "info", "a"),
    ]  # fmt: skip


def test_a_finding_about_the_whole_set_has_no_numbers_of_rows() -> None:
    of_set = finding("small_dataset", rows=[], places=[], examples=[])
    words = " ".join(" ".join(Reader(data_quality_page(document(findings=[of_set]))).words).split())
    assert "small_dataset the set It holds." in words and "dropped by this check" not in words


@pytest.mark.parametrize(
    ("findings", "kept", "verdict"),
    [
        ([], 9, "Ready to train on"),
        ([finding("pii", "error", 5, 5)], 9, "Ready to train on"),
        ([finding("pii", "error", 5, 3, elsewhere=2)], 9, "Ready to train on"),
        ([finding("pii", "error", 5, 3, passed=True)], 9, "Ready to train on"),
        ([finding("tied_pair", "info", 5)], 9, "Ready to train on"),
        ([finding("pii", "warn", 5, 4)], 9, "Usable, but review the warnings"),
        ([finding("pii", "warn", 5), finding("secrets", "error", 5, 4)], 9, "Not ready to train on"),
        ([finding("pii", "error", 5, 5)], 0, "Nothing to train on"),
    ],
)
def test_the_verdict_follows_from_unresolved_findings(findings: list[dict[str, Any]], kept: int, verdict: str) -> None:
    assert re.findall("<strong>(.*?)\\.</strong>", data_quality_page(document(findings=findings, kept=kept))) == [
        verdict
    ]


def test_a_document_with_nothing_in_it_makes_a_page() -> None:
    empty = {
        "name": "a",
        "format": "",
        "rows": 0,
        "kept": 0,
        "dropped": {},
        "findings": [],
        "similarity": {},
        "profile": {},
    }
    assert "Nothing to train on" in data_quality_page(empty)
    bare = {
        "readability": {"rows": 0},
        "lengths": {"prompt": {"unit": "words", "histogram": []}},
        "categories": {},
        "diversity": {},
    }
    Reader(data_quality_page(document(findings=[], dropped={}, similarity={}, profile=bare)))


def test_the_content_policy_allows_only_the_inline_style_and_script_of_the_page() -> None:
    html = data_quality_page(document(), CHANGES)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy and "*" not in policy
    for tag in ("style", "script"):
        (own,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        assert f"{tag}-src 'sha256-{b64encode(sha256(own.encode()).digest()).decode()}'" in policy
    for tag, attrs in Reader(html).elements:
        assert not any(name in attrs for name in ("src", "style", "xlink:href", "srcset", "action")) and not any(
            name.startswith("on") for name in attrs
        ), tag
        assert tag != "link" and re.fullmatch(r"#[a-z]+(-\d+)?", attrs.get("href") or "#a")
    assert "http" not in CSS and "url(" not in CSS and "@import" not in CSS
    assert data_quality_page(document(), CHANGES) == html


def test_charts_have_words_and_controls_have_labels() -> None:
    html = data_quality_page(document(), CHANGES)
    reader = Reader(html)
    pictures = [attrs for tag, attrs in reader.elements if tag == "svg" and attrs.get("class") in {"plot", "flow"}]
    assert len(pictures) == 11 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in pictures)
    assert (
        len(re.findall(r"<label[^>]*>\w[^<]*<(?:select|input)", html))
        == sum(tag in {"select", "input"} for tag, _ in reader.elements)
        == 4
    )
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for tag, attrs in reader.elements if tag == "a" and attrs.get("href")} <= set(ids)


def _palettes() -> dict[str, dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.S)
    return {
        mode: dict(re.findall(r"--([\w-]+): (#\w+)", block))
        for mode, block in zip(("light", "dark", "print"), blocks, strict=True)
    }


def _linear(colour: str) -> list[float]:
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def _contrast(a: str, b: str) -> float:
    """WCAG 2.2, contrast ratio."""
    low, high = sorted(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), _linear(x), strict=True)) for x in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_text_and_shapes_have_contrast_in_every_color_mode(mode: str) -> None:
    colours = _palettes()[mode]
    letters = [(ink, ground) for ink in ("ink", "soft", "link") for ground in ("ground", "sheet")] + [
        ("mark-ink", "mark")
    ]
    letters += [
        (name, ground) for name in ("error", "warn", "info", "good") for ground in (f"{name}-ground", "ground", "sheet")
    ]
    for ink, ground in letters:
        assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for shape in ("kept", "error", "warn", "info", "other", "gone"):
        assert _contrast(colours[shape], colours["sheet"]) >= 3, shape


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_kept_and_dropped_are_distinguishable_without_color(mode: str) -> None:
    """Machado et al., A physiologically-based model for simulation of color vision deficiency (2009), severity 1."""
    blind = {
        "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
        "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
    }
    colours = _palettes()[mode]
    for matrix in blind.values():
        seen = {
            name: [
                max(0.0, sum(m * c for m, c in zip(row, _linear(colours[name]), strict=True))) ** (1 / 2.2)
                for row in matrix
            ]
            for name in ("kept", "gone", "other")
        }
        for a, b in (("kept", "gone"), ("kept", "other")):
            assert sum((x - y) ** 2 for x, y in zip(seen[a], seen[b], strict=True)) ** 0.5 > 0.2, (a, b)


@pytest.mark.browser
@needs_chromium
def test_in_a_browser_pairs_are_filtered_and_paged_without_a_request_or_an_error(tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    hostile = "".join(text for text in HOSTILE if text)
    trap = match(
        f"before {hostile} after", f"<script>alert(1)</script>{hostile}", (7, 7 + len(hostile)), "<b>rule</b>", 0.5
    )
    found = document(name=hostile)
    found["findings"].append(finding(hostile, "error", matches=[trap], note=hostile, examples=[hostile]))
    (tmp_path / "page.html").write_text(data_quality_page(found, CHANGES), encoding="utf-8")
    url = (tmp_path / "page.html").as_uri()
    seen: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 400, "height": 800})
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("dialog", lambda dialog: seen.append(f"dialog {dialog.message}"))
        tab.on("request", lambda request: seen.append(request.url) if request.url != url else None)
        tab.goto(url)
        hits, pairs = tab.locator("#hits"), tab.locator("#list article")
        assert hits.inner_text() == "1 to 20 of 47 pairs" and pairs.count() == 20
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400

        tab.locator("#on").focus()
        tab.keyboard.press("Enter")
        assert hits.inner_text() == "21 to 40 of 47 pairs"
        tab.locator("#back").click()
        assert hits.inner_text() == "1 to 20 of 47 pairs" and tab.locator("#back").is_disabled()

        tab.locator("#by-score").fill("0.5")
        assert hits.inner_text() == "1 to 20 of 28 pairs"
        tab.locator("#by-rule").select_option("equal")
        assert hits.inner_text() == "1 to 1 of 1 pair" and pairs.locator("mark").all_inner_texts() == ["again", "again"]
        tab.locator("#by-text").fill("nowhere")
        assert hits.inner_text() == "No pair fits the filter" and pairs.count() == 0

        tab.get_by_role("link", name="Show 45 pairs").click()
        expect(hits).to_have_text("1 to 20 of 45 pairs")  # the browser tells the page of the link in its own time
        assert tab.locator("#by-text").input_value() == ""
        tab.locator("#by-text").fill("JOKE 44")
        assert pairs.count() == 1 and pairs.locator("mark").first.inner_text() == "tel"

        tab.locator("#by-check").select_option("")
        tab.locator("#by-text").fill("onerror")
        assert pairs.count() == 1
        assert pairs.locator(".side p").first.evaluate("p => p.textContent") == visible(trap["text"])
        assert tab.evaluate("document.querySelectorAll('main img, main b bdi, main script:not([type])').length") == 0
        tab.emulate_media(color_scheme="dark")
        assert tab.evaluate("getComputedStyle(document.documentElement).colorScheme") in {"light dark", "normal"}

        plain = browser.new_context(java_script_enabled=False).new_page()
        plain.goto(url)
        assert plain.locator("#plain article").count() == 20 + 1 + 1 and not plain.locator("#filter").is_visible()
        browser.close()
    assert seen == []


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("figure", ['<figure class="sheet">', "<figure>"])
def test_in_a_browser_a_wide_table_scrolls_within_its_figure(figure: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    cells = "".join(f"<td>a column of {i}</td>" for i in range(12))
    (tmp_path / "page.html").write_text(
        f"<!DOCTYPE html><style>{CSS}</style><main>{figure}<table><tr>{cells}</tr></table></figure></main>"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 400, "height": 800})
        tab.goto((tmp_path / "page.html").as_uri())
        assert tab.evaluate(
            "document.querySelector('table').scrollWidth > 400 && document.documentElement.scrollWidth <= 400"
        )
        browser.close()


def test_the_embedded_pairs_are_those_of_the_document() -> None:
    found = document()
    (raw,) = re.findall(r'id="pairs-data">(.*?)</script>', data_quality_page(found))
    held = [m for f in sorted(found["findings"], key=lambda f: -f["count"]) for m in f.get("matches", [])]
    data = json.loads(raw)
    assert [pair["score"] for pair in data] == [m["score"] for m in held]
    assert ["".join(pair["sides"][0]["text"]) for pair in data] == [m["text"] for m in held]
    assert [pair["sides"][1]["text"][1] for pair in data] == [m["other_text"][slice(*m["other_span"])] for m in held]


@pytest.mark.parametrize(("checks", "said"), [(2, "c0, c1."), (6, "c4, c5."), (8, "c4, c5 and 2 more.")])
def test_the_verdict_says_how_many_checks_it_does_not_name(checks: int, said: str) -> None:
    reader = Reader(data_quality_page(document(findings=[finding(f"c{i}") for i in range(checks)])))
    words = re.sub(r"\s+", " ", " ".join(reader.words)).replace(" ,", ",").replace(" .", ".")
    assert f"{checks} checks of severity warning to review" in words and said in words
