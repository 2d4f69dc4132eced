"""Documents that a stage wrote -> its pages. Called after the stage by its runner, and by `pedigree render`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dagster_project.core.context import Documents
from dagster_project.views import alignment, comparison, data_quality, training

PAGES: Mapping[str, Callable[[Documents], None]] = {
    "instructions": data_quality.draw,
    "preferences": data_quality.draw,
    "adapter": training.draw,
    "aligned": alignment.draw,
    "comparison": comparison.draw,
}
"""Stage -> what draws its pages."""


def draw(documents: Documents) -> None:
    """Draw the pages of a stage. A stage without pages, or without the documents for them, gets none."""
    if documents.stage in PAGES:
        PAGES[documents.stage](documents)
