"""Training records of a model that are most like a question, for `pedigree chat`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dagster_project.core.messages import Messages
from dagster_project.core.records import prompt_text, read_records, response_text
from dagster_project.core.text import many
from dagster_project.evaluation.baselines import bm25
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import find, trained_on
from dagster_project.views.texts import text

TRAIN = "data/splits/train"


@dataclass(frozen=True)
class Nearest:
    """Training records of a model whose prompts are most like a question."""

    records: list[dict[str, Any]]
    """Each with score, example_id, source, source_row, steps, prompt and response; the most similar first."""
    notes: list[str]
    """What is not known."""


@dataclass
class TrainingRecords:
    """The training split of a project, and which of its records a model was trained on."""

    root: Path
    """The project's folder."""

    @cached_property
    def _index(self) -> Index:
        return Index(self.root)

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        folder = self.root / TRAIN
        return read_records(folder) if folder.is_dir() else []

    def system_prompt(self) -> str | None:
        """The system prompt that all records begin with, if it is one and the same."""
        found = {system_of(record["messages"]) for record in self._records}
        return found.pop() if len(found) == 1 else None

    def have_traces(self) -> bool:
        """Whether there are records, and the last message of each has a reasoning trace."""
        return bool(self._records) and all(record["messages"][-1].get("reasoning_content") for record in self._records)

    def nearest(self, model: str, question: str, count: int) -> Nearest:
        """Records that a model was trained on, by BM25 of their prompts.

        Args:
            model: its name or folder, as for `pedigree audit`.
        Raises:
            InputError: the lineage of the model is not recorded.
        """
        seen, missing = trained_on(find(self._index, model))
        notes = [
            f"what it was trained on is only partly known, without {one['path']}: {one['fetch']}" for one in missing
        ]
        if seen is None:
            return Nearest([], notes or [f"{model} was not trained on records of this project"])
        places = places_in(seen.iter_rows(named=True))
        here = [record for record in self._records if record["example_id"] in places]
        if lost := len(places) - len(here):
            notes.append(
                f"{lost} of {many(len(places), 'record')} that it was trained on"
                f" {'is' if lost == 1 else 'are'} not in {TRAIN} (pairs, or records of other runs)"
            )
        if not here:
            return Nearest([], notes)
        prompts = [prompt_text(record["messages"]) for record in here]
        scores = next(bm25(prompts, [question]))
        best = [i for i in (-scores).argsort(kind="stable")[:count] if scores[i] > 0]
        found = [
            {
                "score": round(float(scores[i]), 2),
                "example_id": here[i]["example_id"],
                **places[here[i]["example_id"]],
                "prompt": prompts[i],
                "response": response_text(here[i]["messages"]),
            }
            for i in best
        ]
        return Nearest(found, notes if found else [*notes, "no training record has a word of the question"])


def system_of(messages: Messages) -> str | None:
    """The system prompt that a conversation begins with."""
    return next((message["content"] for message in messages[:1] if message["role"] == "system"), None)


def opening(system: str | None) -> Messages:
    """The beginning of a conversation with a system prompt, or without one."""
    return [{"role": "system", "content": system}] if system else []


def places_in(uses: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Id of each record of a training -> its source, source row and steps.

    Args:
        uses: rows of `lineage.trained_on`.
    """
    places: dict[str, dict[str, Any]] = {}
    for row in uses:
        also = {"also_in": row["also_in"]} if row.get("also_in") else {}
        known = places.setdefault(
            row["example_id"], {"source": row["source"], "source_row": row["source_row"], **also, "steps": []}
        )
        if row["step"] not in known["steps"][-1:]:  # a step can have several examples of a record
            known["steps"].append(row["step"])
    return places


def nearest_text(found: Nearest) -> str:
    """The records for the terminal."""
    return text("nearest", records=found.records, notes=found.notes, cut=cut)


def cut(text: str, most: int = 300) -> str:
    """A text in one line, cut to `most` characters."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[:most]} ..."
