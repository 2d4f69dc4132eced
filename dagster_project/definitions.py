"""Entry point of Dagster for one project: everything that Dagster loads, derived from its dvc.yaml.

For a project beside other assets, see components.py.
"""

from dagster_project.core.imports import lean_imports

with lean_imports():
    from dagster_project.orchestration.dagster.assets import build_definitions, project_root

    defs = build_definitions(project_root(), whole_location=True)
    """dvc.yaml -> Dagster's assets, checks, job and sync sensor, derived from DVC's resolved stages at load time."""
