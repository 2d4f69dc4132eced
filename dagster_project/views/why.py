"""The document of `pedigree why` -> one page: the question with the asked part marked, the records, the distribution of
scores, and the check by training again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_project.core.text import listed, many, number, place_text
from dagster_project.views.html import Figure, Plot, Shape, Table, brief, render, shape

HEIGHT = 160
ROW = 30
"""Pixels of a row of the plot of the check."""


def why_page(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: of `commands/why.py`, with "proof" where `--prove` was given.
    """
    asked, spread, proof = document["question"], document["distribution"], document.get("proof")
    sections: dict[str, Any] = {
        "Answer": _parts(asked["answer"], asked["spans"]),
        "Check": {"figure": _proof_figure(proof), "proof": proof} if proof else None,
        "Records": [_record(hit) for hit in document["hits"]],
        "Scores": _distribution(spread, document["records"]),
        "Notes": document["notes"],
    }
    figures = [
        ("records", number(document["records"]), "that the model was trained on"),
        ("highest score", f"{spread['first']:.3f}", f"median {spread['median']:.3f}"),
        (
            "distance",
            f"{spread['z_of_first']:.1f}",
            (
                "robust standard deviations above the median;"
                f" the {'tenth' if document['records'] >= 10 else 'last'} record {spread['z_of_tenth']:.1f}"
            ),
        ),
    ]
    if compared := spread["compared"]:
        figures[-1] = (
            "p-value",
            f"{compared['p']:.3f}",
            f"by {many(compared['questions'], 'question')} of the validation split",
        )
    return render(
        "why.jinja",
        f"Why did {document['model']['stage']} say that?",
        sections,
        stage=document["model"]["stage"],
        md5=document["model"]["md5"],
        asked=asked,
        figures=figures,
        stands_out=spread["stands_out"],
        compared=spread["compared"],
    )


def _parts(text: str, spans: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it was asked about.

    >>> _parts("a red hat", [[2, 5]])
    [('a ', False), ('red', True), (' hat', False)]
    """
    parts, at = [], 0
    for start, stop in spans:
        parts += [(text[at:start], False), (text[start:stop], True)]
        at = stop
    return [(part, asked) for part, asked in [*parts, (text[at:], False)] if part]


def _record(hit: Mapping[str, Any]) -> dict[str, Any]:
    by, words = hit["gradient"], hit["bm25"]
    return {
        "rank": hit["rank"],
        "place": place_text(hit["source"], hit["source_row"]),
        "also_in": hit.get("also_in") or "",
        "chips": [
            f"gradient {by['score']:+.3f}, rank {by['rank']}, z {by['z']:+.1f}",
            f"BM25 {words['score']:.2f}, rank {words['rank']}",
            f"{hit['split']}, steps {listed(hit['steps'], 12)}",
            hit["example_id"][:8],
        ],
        "prompt": hit["prompt"],
        "answer": hit["answer"],
        "rejected": hit.get("rejected"),
    }


def _distribution(spread: Mapping[str, Any], records: int) -> Figure:
    """Histogram of the gradient scores of all records."""
    counts, edges = spread["counts"], spread["edges"]
    most, low, high = max(counts), edges[0], edges[-1]
    width = 100 / len(counts)
    shapes = [shape("line", class_="grid", x1="0", x2="100%", y1=HEIGHT, y2=HEIGHT)]
    for i, count in enumerate(counts):
        if count:
            tall = max(2.0, (HEIGHT - 16) * count / most)
            title = shape("title", f"{many(count, 'record')} from {edges[i]:.3f} to {edges[i + 1]:.3f}")
            shapes.append(
                shape(
                    "rect",
                    title,
                    class_="bar",
                    x=f"{i * width:.2f}%",
                    y=f"{HEIGHT - tall:.1f}",
                    width=f"{0.9 * width:.2f}%",
                    height=f"{tall:.1f}",
                )
            )
    for value, anchor in ((low, "start"), ((low + high) / 2, "middle"), (high, "end")):
        x = 100 * (value - low) / ((high - low) or 1)
        shapes.append(shape("text", brief(value), class_="tick", x=f"{x:.1f}%", y=HEIGHT + 16, text_anchor=anchor))
    rows = [(f"{edges[i]:.3f} to {edges[i + 1]:.3f}", count) for i, count in enumerate(counts) if count]
    note = (
        "similarity of the gradient of each record to that of the question;"
        " directions that many records share count little; below 0: opposed"
    )
    plot = Plot(
        f"Scores of {many(records, 'record')} from {low:.3f} to {high:.3f}, median {spread['median']:.3f}",
        HEIGHT + 22,
        shapes,
    )
    return Figure("Gradient scores of all records", note, plot, Table("Scores", ["score", "records"], rows))


def _proof_figure(proof: Mapping[str, Any]) -> Figure:
    """The change without the first records beside those without random ones."""
    changes = [
        ("first records", proof["change"]),
        *((f"random {i + 1}", change) for i, change in enumerate(proof["draws"])),
    ]
    values = [0.0, *(change for _, change in changes)]
    low, high = min(values), max(values)

    def x(value: float) -> str:
        return f"{18 + 78 * (value - low) / ((high - low) or 1):.2f}%"

    tall = ROW * len(changes)
    shapes: list[Shape] = [shape("line", class_="mark", x1=x(0), x2=x(0), y1=0, y2=tall)]
    for i, (name, change) in enumerate(changes):
        y, kind = ROW * i + ROW / 2, "dot of-1" if i == 0 else "dot"
        shapes += [
            shape("text", name, class_="tick name", x="0", y=f"{y + 4:g}"),
            shape("line", class_="grid", x1="18%", x2="96%", y1=f"{y:g}", y2=f"{y:g}"),
            shape(
                "circle", shape("title", f"{name}: {change:+.2f} nats"), class_=kind, cx=x(change), cy=f"{y:g}", r="5"
            ),
        ]
    for value in {low, 0.0, high}:
        shapes.append(shape("text", brief(value), class_="tick", x=x(value), y=tall + 14, text_anchor="middle"))
    bounds = f"95 % interval {proof['interval'][0]:.2f} to {proof['interval'][1]:.2f}"
    note = (
        f"nats by which the asked tokens became less likely without {many(proof['left_out'], 'record')};"
        f" difference {proof['difference']:.2f}, {bounds}"
    )
    rows = [(name, f"{change:+.3f}") for name, change in changes]
    return Figure(
        "Trained again without the first records, and without random ones",
        note,
        Plot(note, tall + 20, shapes),
        Table("Changes", ["without", "nats"], rows),
    )
