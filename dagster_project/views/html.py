"""Jinja templates -> pages. Each page is one self-contained HTML file: it requires neither network nor server.

Data is untrusted: templates print every value with hidden characters written out, and
escaped, and no text from data becomes an element, the name of an attribute or a
class. A page's Content-Security-Policy allows only its own style and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from dagster_project.core.text import many, visible
from dagster_project.views.texts import FOLDER, environment

SHORT = 300
"""Characters shown of a name, place or note."""


@dataclass(frozen=True)
class Table:
    """The first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = True
    """Shown on demand, e.g. the numbers of a plot, for screen readers and for copying."""
    region: str = ""
    """Name of the region in which a wide table scrolls; empty if it does not scroll."""


@dataclass(frozen=True)
class Shape:
    """An SVG element. Its tag and the names of its attributes come from code, never from data."""

    tag: str
    attributes: Mapping[str, object]
    children: Sequence[Shape | str] = ()


@dataclass(frozen=True)
class Plot:
    """A picture as wide as its column.

    Horizontal positions are in percent, so that text keeps its size on a narrow screen.
    """

    label: str
    """Description for screen readers."""
    height: float
    """Pixels."""
    shapes: Sequence[Shape]
    kind: str = "plot"
    """CSS classes."""
    width: str = "100%"
    """Of its column, or pixels."""


@dataclass(frozen=True)
class Figure:
    """A plot with its caption and its numbers."""

    title: str
    note: str
    plot: Plot
    table: Table
    legend: Sequence[tuple[str, str]] = field(default=())
    """CSS class and name of each line."""


def shape(tag: str, *children: Shape | str, **attributes: object) -> Shape:
    """An SVG element from keyword arguments, with "-" for "_".

    >>> shape("text", "a", x=1, text_anchor="end", class_="tick").attributes
    {'x': 1, 'text-anchor': 'end', 'class': 'tick'}
    """
    return Shape(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}, children)


def bars(words: str, rows: Sequence[tuple[Sequence[Shape | str], str, float, str]]) -> Plot:
    """Horizontal bars, one below the other.

    Args:
        words: description for screen readers.
        rows: name, figure, length in percent, and CSS classes of each bar.
    """
    body: list[Shape] = []
    for i, (name, figure, percent, kind) in enumerate(rows):
        y = 36 * i
        body += [
            shape("text", *name, x="0", y=y + 15, class_="name"),
            shape("text", figure, x="100%", y=y + 15, class_="soft", text_anchor="end"),
            shape("rect", class_="track", x="0", y=y + 21, width="100%", height="7", rx="2"),
            shape("rect", class_=kind, x="0", y=y + 21, width=f"{percent:.3f}%", height="7", rx="2"),
        ]
    return Plot(words, 36 * len(rows), body)


def render(template: str, title: str, sections: Mapping[str, Any], script: str = "", **view: Any) -> str:
    """A whole page. The same arguments give the same bytes.

    Args:
        template: file in templates/, with a block `head` and one block for each section, with its name in lower case.
        sections: title -> content of its block; empty sections are left out.
        script: file in this folder; empty for a page without a script.
        view: other variables of the template.
    """
    style, code = ((FOLDER / name).read_text("utf-8") if name else "" for name in ("html.css", script))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(code)}; base-uri 'none'; form-action 'none'"
    )
    present = {name: section for name, section in sections.items() if section}
    own = {"policy": Markup(policy), "style": Markup(style), "script": Markup(code)}
    return ENVIRONMENT.get_template(template).render(title=title, sections=present, **own, **view)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def cut(value: object, limit: int = SHORT) -> str:
    """The text up to the limit, and the number of characters that were cut."""
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} … ({many(len(text) - limit, 'character')} cut)"


def label(name: str, most: int = 30) -> str:
    """A name in a picture, shortened in the middle, because paths and names differ at their ends."""
    return cut(name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2) :]}")


def brief(value: float) -> str:
    """A number as on an axis: 0.25, 800, 12k, 250k, 3M, -2k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # 999.7 would be 1e+03
            scaled = value / size
            return f"{scaled:.2g}{unit}" if abs(scaled) < 99.5 else f"{scaled:,.0f}{unit}"
    return f"{value:.3g}"


def share(part: float, whole: int = 1) -> str:
    """A percentage that is shown as 0 or 100 only if it is exactly that."""
    percent = 100 * part / max(1, whole)
    return "<0.1 %" if 0 < percent < 0.1 else ">99.9 %" if 99.9 < percent < 100 else f"{percent:.1f} %"


def _printed(value: object) -> object:
    """The value that a template prints, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


ENVIRONMENT = environment(FOLDER / "templates", autoescape=True, finalize=_printed)
ENVIRONMENT.filters |= {"cut": cut}
ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # ASCII, so a page has no hidden characters
