"""The part `shown` of the check document -> text for the terminal, with what is trained on highlighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.text import many, number, visible

HIGHLIGHT, PLAIN, DIM, RED = "\x1b[30;42m", "\x1b[0m", "\x1b[2m", "\x1b[31m"


def rendered_text(rows: Sequence[Mapping[str, Any]], color: bool = False) -> str:
    """Rows as the chat template renders them.

    Args:
        color: highlight with ANSI colors; otherwise trained spans are in ⟦ ⟧,
            and such brackets in the data are written as escapes.
    """
    how = "highlighted" if color else "in ⟦ ⟧"
    lines = [f"as rendered by {visible(rows[0]['template'])}; what is trained on is {how}"] if rows else []
    for row in rows:
        for head, body in _parts(row, color):
            lines += ["", f"{DIM}{head}{PLAIN}" if color else head, body]
    return "\n".join(lines)


def _parts(row: Mapping[str, Any], color: bool) -> list[tuple[str, str]]:
    """Heading and text of each example of a row."""
    place = f"row {row['row']}  {visible(row['place'])}"
    dropped = [f"would be dropped: {row['outcome'].removeprefix('dropped:')}"] if row["outcome"] != "kept" else []
    if "problem" in row:
        text = f"cannot be rendered: {visible(row['problem'])}"
        return [("  ".join([place, *dropped]), f"{RED}{text}{PLAIN}" if color else text)]
    parts = []
    for i, example in enumerate(row["examples"], 1):
        heading = [place]
        if "side" in example:
            heading.append(example["side"])
        elif len(row["examples"]) > 1:
            heading.append(f"example {i} of {len(row['examples'])}")
        if "tokens" in example:
            trained = number(example["trained_tokens"])
            heading.append(f"{many(example['tokens'], 'token')}, {trained} in the loss")
        parts.append(("  ".join([*heading, *dropped]), _marked_text(example["pieces"], color)))
    return parts


def _marked_text(pieces: Sequence[Mapping[str, Any]], color: bool) -> str:
    text = ""
    for piece in pieces:
        shown = visible(piece["text"])
        if color:  # line by line, because a background over a line break fills the line
            text += "\n".join(
                f"{HIGHLIGHT}{line}{PLAIN}" if line and piece["trained"] else line for line in shown.split("\n")
            )
        else:
            shown = shown.replace("⟦", "\\u27e6").replace("⟧", "\\u27e7")
            text += f"⟦{shown}⟧" if piece["trained"] else shown
    return text.rstrip("\n")
