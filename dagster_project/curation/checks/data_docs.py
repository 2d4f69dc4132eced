"""Great Expectations' own Data Docs of an evaluated suite, as the library builds them.

The data-quality page shows the same results.

These pages load their styles and scripts from the web, and contain the time of the run. Values from the data are
escaped before the library renders them.
"""

from __future__ import annotations

import copy
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX, SUITE = "index.html", "suite.html"
"""Pages of the result and of the suite."""


def write(folder: Path, suite: Any, result: Any, words: Mapping[str, str]) -> None:
    """Write the pages of a suite and of its result.

    Args:
        suite, result: Great Expectations' own objects; the result as plain JSON.
        words: id of an expectation -> its description on the pages, with the severity, which the pages otherwise omit.
    """
    from great_expectations.render.renderer import ExpectationSuitePageRenderer, ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    suite, result = copy.deepcopy(suite), copy.deepcopy(result)
    # Great Expectations does not escape descriptions and observed values, and a category could be markup.
    for one in suite.expectations:
        one.description = html.escape(words[one.id])
    for one in result.results:
        one.expectation_config.description = html.escape(words[one.expectation_config.id])
        one.result = _escaped(one.result)
    folder.mkdir(parents=True, exist_ok=True)
    results, expected = ValidationResultsPageRenderer().render(result), ExpectationSuitePageRenderer().render(suite)
    for name, page in ((INDEX, results), (SUITE, expected)):
        text = DefaultJinjaPageView().render(page, show_how_to_buttons=False)
        (folder / name).write_text(_linked(text), encoding="utf-8")


def _linked(page: str) -> str:
    """A page whose links within a site of the library's lead to the two pages that are written here."""
    page = re.sub(r'href="(?:\.\./)+expectations/[^"]*"', f'href="{SUITE}"', page)
    return re.sub(r'href="(?:\.\./)+index\.html"', f'href="{INDEX}"', page)


def _escaped(value: Any) -> Any:
    """Plain data with its texts escaped for HTML."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    return html.escape(value) if isinstance(value, str) else value
