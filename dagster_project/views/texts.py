"""Jinja templates -> texts for the terminal and for text files.

Unlike pages they are printed as they are: `print_result` of the command line writes hidden characters out.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dagster_project.core.text import listed, many, number, place_text, shortened, visible

FOLDER = Path(__file__).parent


def text(template: str, /, **values: object) -> str:
    """A text without a line break at its end. The same arguments give the same text."""
    return ENVIRONMENT.get_template(f"{template}.txt.jinja").render(values).removesuffix("\n")


def environment(folder: Path, **options: Any) -> Environment:
    """The templates of a folder, with what all of them can call.

    Args:
        options: further ones of Jinja.
    """
    made = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, **options,
    )  # fmt: skip
    made.globals.update(many=many, place_text=place_text)
    made.filters.update(
        number=number,
        listed=listed,
        visible=visible,
        shortened=shortened,
        json=partial(json.dumps, ensure_ascii=False),
        fmt=lambda value, form: format(value, str(form)),
        line=lambda text: str(text).replace("\n", "\\n"),
    )
    return made


ENVIRONMENT = environment(FOLDER / "templates")
