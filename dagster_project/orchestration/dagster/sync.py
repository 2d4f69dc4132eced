"""Sync of a Pedigree project with a Dagster instance."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster_dvc import sync as dagster_dvc
from dagster_project.pipeline import PEDIGREE, Pipeline


def sync(root: Path, instance: dg.DagsterInstance, pipeline: Pipeline = PEDIGREE, key_prefix: tuple[str, ...] = ()) -> list[str]:
    """Report DVC's state to Dagster.

    Returns:
        One line for each reported event, and for each output that was set aside because it was tampered with.
    """
    return dagster_dvc.sync(PedigreeProject(root, key_prefix, pipeline=pipeline), instance)
