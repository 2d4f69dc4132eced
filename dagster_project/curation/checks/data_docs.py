"""Data Docs of a judged suite: Great Expectations' own pages, made to stand alone.

The library's pages load their style and scripts from nine places on the web, and without them are bare text and an empty table of contents.
These hold their style, run nothing and load nothing, which a content security policy enforces: they open from a disk, in an archive,
and say the same in ten years. They name no time and no random id, so that the same set gives the same pages.
"""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX, SUITE = "index.html", "suite.html"
"""What was found, and what is expected."""

_CSP = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6573; --line: #d9dee5; --card: #f4f6f8; --page: #fff;
  --good: #17743b; --bad: #b3261e; --warn: #8a5a00; --link: #1a5fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a2abb8; --line: #3a424e; --card: #232a33; --page: #171c22;
  --good: #6fcf8f; --bad: #ff8a80; --warn: #e9b949; --link: #8ab8f5; } }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); }
a { color: var(--link); }
h4, h5, h6, p { margin: 0; }
h4 { font-size: 18px; } h5 { font-size: 16px; } h6, .h6 { font-size: 14px; font-weight: 600; color: var(--soft); }
.lead { color: var(--soft); margin: 4px 0 16px; font-size: 14px; }
.navbar.sticky-top { display: block; padding: 14px 24px; border-bottom: 1px solid var(--line); height: auto !important; }
.navbar .navbar { display: block; padding: 0; }
.navbar-brand { font-weight: 700; display: inline-block; } .navbar-brand a { color: inherit; text-decoration: none; }
.breadcrumb { display: inline; margin: 0 0 0 16px; padding: 0; color: var(--soft); list-style: none; }
.breadcrumb li { display: inline; } .breadcrumb li + li::before { content: " / "; }
body > .container-fluid { padding: 24px; max-width: 1240px; }
body > .container-fluid > .row { display: grid; grid-template-columns: 220px minmax(0, 1fr); gap: 32px; }
@media (max-width: 760px) { body > .container-fluid > .row { grid-template-columns: 1fr; } .sticky { position: static !important; } }
.sticky { position: sticky; top: 16px; }
.card { border: 1px solid var(--line); border-radius: 6px; margin-bottom: 16px; overflow: hidden; }
.card-header { padding: 6px 12px; background: var(--card); } .card-body { padding: 8px 12px; }
.card .navbar ul { list-style: none; margin: 0; padding: 0; } .nav-link { display: block; padding: 2px 0; text-decoration: none; }
.btn-group label { display: block; cursor: pointer; }
.ge-section { margin-bottom: 28px; }
.alert { background: var(--card); border-left: 4px solid var(--line); border-radius: 4px; padding: 8px 14px; }
table { border-collapse: collapse; width: 100%; margin: 6px 0; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
table.table:not(.table-sm) > thead th:first-child { width: 70px; }
table.table:not(.table-sm) > thead th:last-child { width: 34%; }
td table { width: auto; } td table th, td table td { padding: 2px 14px 2px 0; border: 0; font-size: 13px; }
[id$="-header"]:not(.alert) { margin-top: 10px; }
[id$="-header"] .h6 { margin-right: 4px; }
.table-responsive { overflow-x: auto; } .table-responsive.col-6 table { width: auto; }
.badge { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 0 5px; font-size: 13px; }
.text-success, .badge-success { color: var(--good); } .text-danger, .badge-danger { color: var(--bad); } .text-warning { color: var(--warn); }
i.fas { font-style: normal; font-weight: 700; } i.fa-check-circle::before { content: "✔"; }
i.fa-times::before { content: "✘"; } i.fa-exclamation-triangle::before { content: "!"; }
pre, code { white-space: pre-wrap; } ul { padding-left: 20px; margin: 4px 0; }
.popover, .cooltip .top, .text-secondary:empty { display: none; }
body:has(#option2:checked) tr:has(> td.hide-succeeded-validation-target-child) { display: none; }
body:has(#option2:checked) .ge-section:has(.hide-succeeded-validations-column-section-target-child) { display: none; }
"""


def write(folder: Path, suite: Any, result: Any, words: Mapping[str, str]) -> None:
    """The pages of a suite and of its result.

    Args:
        suite, result: Great Expectations' own objects, the result made plain JSON.
        words: id of an expectation -> what the pages say of it. They would not say how bad a failure is.
    """
    from great_expectations.render.renderer import ExpectationSuitePageRenderer, ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    suite, result = copy.deepcopy(suite), copy.deepcopy(result)
    # The library writes descriptions and observed values into the page as they are: a category could be markup.
    for one in suite.expectations:
        one.description = html.escape(words[one.id])
    for one in result.results:
        one.expectation_config.description = html.escape(words[one.expectation_config.id])
        one.result = _escaped(one.result)
    found = ValidationResultsPageRenderer().render(result)
    # What is left out are the time, random ids and the versions of the machine that ran it.
    found.sections[0].content_blocks = [block for block in found.sections[0].content_blocks if block.content_block_type != "collapse"]
    found.page_title = f"{suite.name}: what was found"
    expected = ExpectationSuitePageRenderer().render(suite)
    expected.page_title = f"{suite.name}: what is expected"
    folder.mkdir(parents=True, exist_ok=True)
    for page, document in ((INDEX, found), (SUITE, expected)):
        text = DefaultJinjaPageView().render(document, show_how_to_buttons=False)
        (folder / page).write_text(_alone(text, document.page_title), encoding="utf-8")


def _escaped(value: Any) -> Any:
    """Plain data with its text fit for a page."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    return html.escape(value) if isinstance(value, str) else value


def _alone(page: str, title: str) -> str:
    """A page without what it would load or run, and with its own style."""
    for part in (r"<script\b.*?</script>", r"<style\b.*?</style>", r"<title\b.*?</title>", r"<footer\b.*?</footer>", r"<link\b[^>]*>"):
        page = re.sub(part, "", page, flags=re.DOTALL)
    page = re.sub(r"<img\b[^>]*>", "Data Docs", page)
    page = re.sub(r' onclick="[^"]*"|Data asset: None<br>|style="color:red;"', "", page)
    page = re.sub(r'href="(?:\.\./)*index\.html"|href="#"', f'href="{INDEX}"', page)
    page = re.sub(r'href="(?:\.\./)*expectations/[^"]*\.html"', f'href="{SUITE}"', page)
    ids: dict[str, str] = {}
    page = re.sub(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", lambda match: ids.setdefault(match[0], str(len(ids))), page)
    head = f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">\n<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n'
    page = page.replace("</head>", f"{head}</head>", 1)
    return re.sub(r"[ \t]+\n", "\n", re.sub(r"\n\s*\n+", "\n", page))
