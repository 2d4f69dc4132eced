"""Entry point of Dagster: everything Dagster loads, derived from dvc.yaml."""

from dagster_project.orchestration.dagster.assets import build_definitions, project_root

defs = build_definitions(project_root())
