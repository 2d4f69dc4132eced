"""What every page is made of: one HTML file that needs nothing else, no network and no server.

Data is hostile: every text passes `visible` and `html.escape`, is kept apart by <bdi> from the text around it, and names no element,
attribute or class. The page's Content-Security-Policy allows its own style and script, by their hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from dagster_project.core.text import many, number, visible

__all__ = ["bdi", "brief", "figure", "label", "many", "number", "page", "share", "svg", "table", "text", "visible"]

SHORT = 300
"""Characters of a name, place or note; the rest is cut."""


def page(title: str, head: str, sections: Mapping[str, str], footer: str, script: str = "") -> str:
    """A whole page. The same parts give the same bytes.

    Args:
        title: any text.
        head: HTML of the page's header.
        sections: title -> HTML; empty ones are left out.
        footer: HTML.
    """
    style = resources.files(__package__).joinpath("html.css").read_text("utf-8")
    shown = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in shown)
    bodies = "".join(
        f'<section id="{n.lower()}" aria-labelledby="h-{n}"><h2 id="h-{n}">{n}</h2>{body}</section>' for n, body in shown.items()
    )
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title><style>{style}</style></head>'
        f'<body>{head}<nav aria-label="Sections"><ul>{links}</ul></nav><main>{bodies}</main>'
        f"<footer>{footer}</footer>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def text(value: object, limit: int = SHORT) -> str:
    """Any text of the document, cut, visible and escaped: fit for an attribute, or for an element that holds nothing else."""
    whole = str(value)
    more = f" … ({number(len(whole) - limit)} characters cut)" if len(whole) > limit else ""
    return escape(visible(whole[:limit])) + more


def bdi(value: object, limit: int = SHORT) -> str:
    return f'<bdi dir="auto">{text(value, limit)}</bdi>'


def label(name: str, most: int = 30) -> str:
    """A name in a picture, shortened in the middle: paths and names differ at their ends."""
    return text(name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2) :]}")


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


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]], unfolded: bool = False) -> str:
    """The figures of a plot, for those who can't see it or want to copy it. The first column names the row."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{bdi(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    whole = f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return whole if unfolded else f"<details><summary>Table<span> of {caption.lower()}</span></summary>{whole}</details>"


def figure(title: str, note: str, plot: str, table: str) -> str:
    return f"<figure><figcaption><b>{title}</b> <span>{note}</span></figcaption>{plot}{table}</figure>"


def svg(label: str, height: float, body: str, kind: str = "plot") -> str:
    """A picture as wide as its column: places across are in percent, so that letters keep their size on a narrow screen."""
    return f'<svg class="{kind}" role="img" aria-label="{label}" width="100%" height="{height:g}">{body}</svg>'
