"""Jinja templates -> pages: each is one HTML file that needs nothing else, no network and no server.

Data is hostile: whatever a template prints has its hidden characters written out and is escaped, and no text from data becomes an
element, an attribute's name or a class. A page's Content-Security-Policy allows its own style and script, by their hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dagster_project.core.text import many, number, visible

FOLDER = Path(__file__).parent
SHORT = 300
"""Characters of a name, place or note; the rest is cut."""


@dataclass(frozen=True)
class Table:
    """The first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = True
    """Shown on demand: the numbers of a plot, for readers who cannot see it or want to copy them."""
    region: str = ""
    """Name of the region in which a wide table scrolls; empty: it does not scroll."""


@dataclass(frozen=True)
class Shape:
    """An SVG element. Its tag and the names of its attributes come from code, never from data."""

    tag: str
    attributes: Mapping[str, object]
    children: Sequence[Shape | str] = ()


@dataclass(frozen=True)
class Plot:
    """A picture as wide as its column: horizontal positions are in percent, so that letters keep their size on a narrow screen."""

    label: str
    """Says what is shown, for readers who cannot see it."""
    height: float
    """Pixels."""
    shapes: Sequence[Shape]
    kind: str = "plot"
    """CSS classes."""


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
    """>>> shape("text", "a", x=1, text_anchor="end", class_="tick").attributes
    {'x': 1, 'text-anchor': 'end', 'class': 'tick'}
    """
    return Shape(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}, children)


def render(template: str, title: str, sections: Mapping[str, Any], script: str = "", **view: Any) -> str:
    """A whole page. The same arguments give the same bytes.

    Args:
        template: file in templates/, with a block `head` and a block for each section, named as the section in lower case.
        sections: title -> what its block shows; empty ones are left out.
        script: file beside this one; empty: the page runs none.
        view: what the template shows outside of sections.
    """
    style, code = ((FOLDER / name).read_text("utf-8") if name else "" for name in ("html.css", script))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(code)}; base-uri 'none'; form-action 'none'"
    shown = {name: section for name, section in sections.items() if section}
    own = {"policy": Markup(policy), "style": Markup(style), "script": Markup(code)}
    return ENVIRONMENT.get_template(template).render(title=title, sections=shown, **own, **view)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def cut(value: object, limit: int = SHORT) -> str:
    """The text; what exceeds the limit is replaced by its number of characters."""
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} … ({number(len(text) - limit)} characters cut)"


def label(name: str, most: int = 30) -> str:
    """A name in a picture, shortened in the middle: paths and names differ at their ends."""
    return cut(name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2) :]}")


def brief(value: float) -> str:
    """For an axis: 0.25, 800, 12k, 3M, -2k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2g}{unit}"
    return f"{value:.3g}"


def share(part: int, whole: int) -> str:
    """A percentage that is 0 or 100 only where it is so exactly."""
    percent = 100 * part / max(1, whole)
    return "<0.1 %" if 0 < percent < 0.1 else ">99.9 %" if 99.9 < percent < 100 else f"{percent:.1f} %"


def _printed(value: object) -> object:
    """What a template prints of a value, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, finalize=_printed, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
ENVIRONMENT.filters |= {"cut": cut, "number": number}
ENVIRONMENT.globals |= {"many": many}
ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # ASCII: no hidden character is in a page
