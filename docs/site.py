"""Hook of mkdocs (mkdocs.yml): what a file host shows in Markdown, the site shows too.

Links to files outside docs/ lead to REPOSITORY_URL, or become text without it; Mermaid diagrams become SVG, formulas
MathML. Decisions are in the navigation in the order of their numbers.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from pathlib import Path
from typing import Any

import mmdr
from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.site")  # a warning fails `mkdocs build --strict`

FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"(?P<code>`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>\S|\S[^$\n]*\S)\$")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#]*)(#[^)]*)?\)")


def on_config(config: Any) -> None:
    """Fill the section `Decisions` of the navigation."""
    decisions = sorted(f"decisions/{path.name}" for path in Path(config.docs_dir, "decisions").glob("*.md"))
    config.nav = [{"Decisions": decisions} if "Decisions" in section else section for section in config.nav]


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replace links to files outside docs/, and diagrams.

    Args:
        page: the page of mkdocs, with the path of its file.
        config: mkdocs.yml; files outside docs/ are sought in its folder.
    """
    source = Path(page.file.abs_src_path)
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    parts = re.split(f"({FENCE.pattern})", markdown, flags=FENCE.flags)
    return "".join(
        _diagram(part, source) if part.startswith("```") else _links(_formulas(part), source, root, docs)
        for part in parts
    )


def _formulas(text: str) -> str:
    def replacement(formula: re.Match[str]) -> str:
        if formula["code"]:
            return formula[0]
        return convert(formula["block"] or formula["inline"], display="block" if formula["block"] else "inline")

    return FORMULA.sub(replacement, text)


def _links(text: str, source: Path, root: Path, docs: Path) -> str:
    def replacement(link: re.Match[str]) -> str:
        label, target, anchor = link[1], (source.parent / link[2]).resolve(), link[3] or ""
        if target.is_relative_to(docs):
            return link[0]
        if not target.is_relative_to(root) or not target.exists():
            log.warning("%s: the link to %s has no target", source.relative_to(root), link[2])
            return label
        url = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        path = target.relative_to(root).as_posix()
        if url:
            return f"[{label}]({url}/blob/main/{path}{anchor})"
        return f"`{path}`" if target.stem.casefold() in label.casefold() else f"{label} (`{path}`)"

    return LINK.sub(replacement, text)


def _diagram(fence: str, source: Path) -> str:
    if not fence.startswith("```mermaid\n"):
        return fence
    try:
        svg = mmdr.render(fence.removeprefix("```mermaid\n").removesuffix("```")).svg()
    except ValueError as error:
        log.warning("%s: %s", source.name, error)
        return fence
    name = f"diagram-{zlib.crc32(fence.encode())}"  # ids and style rules of a diagram apply to it alone
    return f'<figure class="diagram">{svg.replace("merman", name)}</figure>\n'
