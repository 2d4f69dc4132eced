"""Documents of a stage -> its pages. Called by the runner after the stage, and by `pedigree render`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dagster_project.core.context import Documents
from dagster_project.views.alignment import draw_alignment
from dagster_project.views.comparison import draw_comparison
from dagster_project.views.data_quality import draw_data_quality
from dagster_project.views.training import draw_training

PAGES: Mapping[str, Callable[[Documents], None]] = {
    "instructions": draw_data_quality,
    "preferences": draw_data_quality,
    "adapter": draw_training,
    "aligned": draw_alignment,
    "comparison": draw_comparison,
}
"""Stage -> the function that draws its pages."""


def draw(documents: Documents) -> None:
    """Draw the pages of a stage, if it has any and their documents exist."""
    if documents.stage in PAGES:
        PAGES[documents.stage](documents)
