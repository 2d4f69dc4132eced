"""Components of Dagster: a Pedigree project, or any DVC project, beside other
assets in a code location (docs/dagster-dvc.md).

`dg` finds them by the entry point group `dagster_dg_cli.registry_modules` in pyproject.toml.
"""

# No postponed annotations: Dagster resolves the types of the fields.
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

__all__ = ["DvcProjectComponent", "PedigreeProjectComponent"]


@dataclass
class _ProjectComponent(dg.Component, dg.Resolvable):
    project_dir: str
    """Folder of the project; relative to the folder of this component."""
    key_prefix: str | list[str] | None = None
    """First parts of all asset keys, `support` or `[ml, support]`. Default: the name of the component's folder."""
    group_name: str | None = None
    """Group of the assets. Default: the prefix."""

    def _definitions(self, build: Callable[..., dg.Definitions], context: dg.ComponentLoadContext) -> dg.Definitions:
        prefix = context.path.name if self.key_prefix is None else self.key_prefix
        return build(Path(context.path, self.project_dir), key_prefix=prefix, group_name=self.group_name)


@dataclass
class PedigreeProjectComponent(_ProjectComponent):
    """A Pedigree project: its stages, checks, jobs and sync."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The project's definitions."""
        from dagster_project.orchestration.dagster.assets import build_definitions

        return self._definitions(build_definitions, context)


@dataclass
class DvcProjectComponent(_ProjectComponent):
    """Any DVC project: the stages of its dvc.yaml, and sync."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The project's definitions."""
        from dagster_project.orchestration.dagster_dvc.definitions import build_dvc_definitions

        return self._definitions(build_dvc_definitions, context)
