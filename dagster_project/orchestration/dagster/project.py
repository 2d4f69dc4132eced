"""Pedigree's part of a DVC project in Dagster: groups, pools, placement, checks and metadata of its stages."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg

from dagster_project.core import params
from dagster_project.core.documents import damaged_report
from dagster_project.core.errors import InputError
from dagster_project.core.layout import is_code, is_report
from dagster_project.execution import VARIABLE, placement
from dagster_project.lineage import code_lock
from dagster_project.lineage.registered import HEAD, Version, registered, table_rows
from dagster_project.orchestration import integrity
from dagster_project.orchestration.dagster import metadata, pages
from dagster_project.orchestration.dagster.concurrency import (
    ON_TAG,
    RAY,
    placement_variables,
    pool_of,
    set_default_limits,
)
from dagster_project.orchestration.dagster_dvc.metadata import check_result, table
from dagster_project.orchestration.dagster_dvc.project import DvcProject
from dagster_project.orchestration.dagster_dvc.project import RunConfig as DvcRunConfig
from dagster_project.orchestration.dvc import StageState
from dagster_project.pipeline import PEDIGREE, Pipeline
from dagster_project.views.render import PAGES

log = logging.getLogger("pedigree")

INPUTS = "1_inputs"
"""Group of the sources."""


class RunConfig(DvcRunConfig):
    """Configuration of the run of one stage."""

    on: str = ""
    """Where the stage runs: `local`, `ray`, a section `execution` as JSON, or empty for the section of params.yaml. The
    run tag `pedigree/on` does the same for all stages of a run."""


NOT_IN_REPORT = {
    "passed": True,
    "severity": "info",
    "count": 0,
    "note": "the report has no such check: only other variants have it, or it is newer than this run",
}
"""The result of a check that a complete report does not have."""


@dataclass(frozen=True)
class PedigreeProject(DvcProject):
    """A DVC project whose stages `python -m dagster_project run` runs."""

    pipeline: Pipeline = field(default=PEDIGREE, compare=False)

    config_type: ClassVar[type[DvcRunConfig]] = RunConfig

    def load(self) -> dict[str, StageState]:
        """As DvcProject.load.

        Other code than code.lock.yaml records is a warning here, so that other assets of the code location are shown,
        and an error of each stage that is materialized.
        """
        states = super().load()
        try:
            code_lock.refuse_other_code(self.root)
        except InputError as error:
            log.warning(f"{self.root}: {error}")
        return states

    def read(self, wait: bool = True) -> dict[str, StageState]:
        """The state of every stage, in flow order.

        Args:
            wait: see `dvc.read_stages`.
        Raises:
            InputError: in dvc.yaml a stage of the pipeline has variants and must have none, or the other way round.
        """
        states = super().read(wait)
        for address in states:
            if not self.is_own(address):
                self.pipeline.split_address(address)
        return states

    def is_own(self, address: str) -> bool:
        """Whether a stage is the user's own: dvc.yaml has it and the pipeline does not. It is shown as one of any other
        DVC project."""
        return address.partition("@")[0] not in self.pipeline.stages

    def source_key(self, path: str) -> dg.AssetKey:
        """E.g. "data/sources/benchmarks" -> sources / benchmarks."""
        if not path.startswith("data/"):
            return super().source_key(path)
        return dg.AssetKey([*self.key_prefix, *Path(path).relative_to("data").parts])

    def is_definition(self, path: str) -> bool:
        return is_code(path) or is_report(path)

    def group_of(self, address: str, state: StageState) -> str | None:
        """Group of an asset; for a variant, a subgroup of its stage's group, e.g. "3_training/adapter_lora".

        A node in Dagster's graph shows only the last part of its key, which is the same for every stage of a variant.
        """
        group = str(state.meta.get("group", "default"))
        return self.group(f"{group}/{re.sub('[^A-Za-z0-9_]', '_', address)}" if "@" in address else group)

    def source_group(self) -> str | None:
        return self.group(INPUTS)

    def command_of(self, state: StageState) -> str:
        return (
            super().command_of(state)
            if self.is_own(state.address)
            else f"python -m dagster_project run {state.address}"
        )

    @property
    def pool_prefix(self) -> str:
        """Beside other assets the pools have names of their own, which all
        Pedigree projects of the instance share, as they do the machine."""
        return "pedigree_" if self.key_prefix else ""

    @cached_property
    def _values(self) -> dict[str, Any]:
        """params.yaml when the project was loaded."""
        return params.read(self.root)

    def pool_of(self, address: str, state: StageState, variables: Mapping[str, str] | None = None) -> str | None:
        return self.pool(address, state, self._values, (variables or {}).get(VARIABLE, ""))

    def on_cluster(self, address: str, variables: Mapping[str, str]) -> bool:
        on = variables.get(VARIABLE, "")
        return not self.is_own(address) and pool_of(address, self.pipeline, self._values, on) == RAY

    def pool(self, address: str, state: StageState, values: Mapping[str, Any], on: str = "") -> str:
        """Pool of a stage: that of `meta` for one of the user's own, or else by `concurrency.pool_of`."""
        own = super().pool_of(address, state) if self.is_own(address) else None
        return own or self.pool_prefix + pool_of(address, self.pipeline, values, on)

    def check_descriptions(self, address: str, state: StageState) -> Mapping[str, str]:
        if self.is_own(address):
            return super().check_descriptions(address, state)
        return self.pipeline.check_descriptions(address.partition("@")[0])

    def check_results(
        self, address: str, state: StageState | None, report: Mapping[str, Any]
    ) -> list[dg.AssetCheckResult]:
        """Results with the same severity as on the data-quality page.

        Whether a check blocks was decided when the stage ran. Dagster requires a result of every check of the asset,
        also of those that a complete report does not have.
        """
        if self.is_own(address):
            return super().check_results(address, state, report) if state else []
        found: dict[str, Any] = report.get("checks", {})
        descriptions = self.pipeline.check_descriptions(address.partition("@")[0])
        if found and not self.blocks(address, report):
            found = dict.fromkeys(descriptions, NOT_IN_REPORT) | found
        return [
            check_result(
                self.asset_key(address), name, description, found[name],
                metadata.severity_of(found[name]), metadata.check_metadata(self.root, address, found[name]),
            )
            for name, description in descriptions.items()
            if name in found
        ]  # fmt: skip

    def blocks(self, address: str, report: Mapping[str, Any]) -> bool:
        return not self.is_own(address) and report.get("passed") is False

    def describe(self, state: StageState) -> dict[str, Any]:
        return super().describe(state) if self.is_own(state.address) else metadata.describe(self.root, state)

    def page_url(self, address: str) -> str | None:
        has_pages = address.partition("@")[0] in PAGES
        return pages.url(self.root, f"{address.replace('@', '/')}/") if has_pages else None

    @cached_property
    def _registered(self) -> dict[str, list[Version]]:
        """Registered versions of models when the project was loaded."""
        return registered(self.root)

    def definition_metadata(self, address: str) -> dict[str, Any]:
        rows = table_rows(self._registered, address)
        return {"registered_versions": dg.MetadataValue.md(table([*HEAD], rows))} if rows else {}

    def progress(self, address: str) -> dict[str, float]:
        return metadata.live(self.root, address)

    def validate(self, address: str, variables: Mapping[str, str]) -> None:
        code_lock.refuse_other_code(self.root, [address.partition("@")[0]])
        placement(
            self.pipeline.validate(self.root), address, self.pipeline.stages, self.pipeline.variants_of, variables
        )

    def variables(self, config: Any, tags: Mapping[str, str]) -> dict[str, str]:
        return placement_variables(config.on or tags.get(ON_TAG, ""))

    def set_tampered_aside(self, states: Iterable[StageState]) -> list[str]:
        return integrity.set_tampered_aside(self.root, states)

    def damaged_report(self, state: StageState) -> str:
        if self.is_own(state.address):
            return super().damaged_report(state)
        return damaged_report(self.root, state.address) if state.report else ""

    def before_sync(self, instance: dg.DagsterInstance) -> None:
        super().before_sync(instance)
        set_default_limits(instance, self.pool_prefix)
