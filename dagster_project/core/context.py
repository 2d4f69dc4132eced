"""Contexts of a stage: StageContext for a run, ValidationContext to check its parameters.

Pipeline: the stages, for orchestration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dagster_project.core import params
from dagster_project.core.documents import damage, read_report, set_aside
from dagster_project.core.errors import InputError
from dagster_project.core.layout import measured_path, report_of
from dagster_project.core.params import Compute, Section
from dagster_project.core.records import Report

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class ExecutionHints:
    """Decisions of planning for one run. Not part of a stage's identity: hints do not affect results."""

    gradient_checkpointing: bool = False
    """Whether a training with `gradient_checkpointing: auto` uses it."""
    advice: Callable[[], str] = str
    """Returns advice for running out of memory; "" if there is none."""


@dataclass(frozen=True)
class StageContext:
    """Paths and parameters of one run of one stage."""

    root: Path
    """The project's folder."""
    stage: str
    variant: str | None
    scratch: Path
    """Folder that outputs are written to. They are moved into data/ only after the stage has succeeded."""
    values: Mapping[str, Any]
    """params.yaml."""
    variants_of: Mapping[str, str] = field(default_factory=dict)
    """Stage with variants -> section of params.yaml whose keys name them."""
    earlier: tuple[str, ...] = ()
    """Stages before this one, in flow order."""
    hints: ExecutionHints = ExecutionHints()
    recorded: Callable[[], Mapping[str, Path]] = dict
    """Files of the stage's output as recorded before this run, by path within the output. Only for pages that show
    changes, never for an output."""

    @property
    def address(self) -> str:
        return f"{self.stage}@{self.variant}" if self.variant else self.stage

    @property
    def out(self) -> Path:
        """The stage's output, data/<stage>[/<variant>]."""
        return self.scratch / "data" / self.stage / (self.variant or "")

    @property
    def pages(self) -> Path:
        """Folder for pages and files to be edited by hand, data/pages/<stage>[/<variant>].

        Kept even if a blocking check fails; not tracked.
        """
        return self.scratch / "data" / "pages" / self.stage / (self.variant or "")

    @property
    def live(self) -> Path:
        """Folder for tables that are appended to during the run, data/live/<stage>[/<variant>], one per metric.

        `dvc plots` and Dagster show them. The only folder written directly, outside `scratch`. Not tracked; nothing
        depends on it.
        """
        return self.root / "data" / "live" / self.stage / (self.variant or "")

    @property
    def checkpoints(self) -> Path:
        """Folder of a training's checkpoints, which survives a killed run. Not tracked."""
        return self.root / ".dvc" / "tmp" / "pedigree" / "checkpoints" / (self.variant or self.stage)

    def plot(self, name: str) -> Path:
        """Path of a table for `dvc plots`, data/plots/<name>[/<variant>].csv."""
        return self.scratch / "data" / "plots" / (f"{name}/{self.variant}.csv" if self.variant else f"{name}.csv")

    def output_of(self, stage: str) -> Path:
        """Another stage's output; of the same variant if that stage has variants."""
        return self.root / "data" / stage / ((self.variant or "") if stage in self.variants_of else "")

    def outputs_of(self, stage: str) -> Path:
        """The folder with the outputs of all variants of a stage."""
        return self.root / "data" / stage

    def reports(self) -> dict[str, dict[str, Any]]:
        """Reports of all stages before this one, by address, in flow order."""
        addresses: list[str] = []
        for stage in self.earlier:
            if stage in self.variants_of:
                addresses += [f"{stage}@{variant}" for variant in self.values[self.variants_of[stage]]]
            else:
                addresses.append(stage)
        return {address: self.report(address) for address in addresses}

    def report(self, address: str) -> dict[str, Any]:
        """The report of another stage."""
        return read_report(self.root, address)

    def params(self, section: str, model: type[S]) -> S:
        return params.parse(model, self.values.get(section), section)

    def variant_params(self, section: str, model: type[S]) -> S:
        """The entry of this run's variant, e.g. adapter.lora."""
        return params.parse(model, self.values[section][self.variant], f"{section}.{self.variant}")

    @property
    def compute(self) -> Compute:
        return self.params("compute", Compute)


@dataclass(frozen=True)
class Documents:
    """Paths and report that the pages of one stage are drawn from."""

    root: Path
    """The project's folder."""
    address: str
    """e.g. "adapter@lora"."""
    out: Path
    """The stage's output."""
    pages: Path
    """Folder of its pages and of untracked documents about its latest run."""
    report: Mapping[str, Any]
    """The stage's report."""
    quoted: Callable[[Documents, Mapping[str, Any]], Mapping[str, Any]] = lambda documents, findings: findings
    """Adds to findings the texts of the rows that they name (lineage/quoted_rows.py)."""

    @property
    def stage(self) -> str:
        return self.address.partition("@")[0]

    @property
    def variant(self) -> str:
        return self.address.partition("@")[2]

    def read(self, path: Path) -> Any:
        """A JSON document; None if it is missing.

        Raises:
            InputError: it is damaged.
        """
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            name = path.relative_to(self.root) if path.is_relative_to(self.root) else path
            raise InputError(
                f"{name} cannot be read: {error}", f"`dvc repro --force {self.address}` makes it again"
            ) from None


@dataclass(frozen=True)
class ValidationContext:
    """Context for checking a stage's parameters before anything runs."""

    root: Path
    values: Mapping[str, Any]
    """All of params.yaml."""
    section: str
    """Dotted path of the parameters to check, e.g. "adapter.lora". For messages."""

    @property
    def value(self) -> Any:
        """The section as written in params.yaml; None if it is omitted."""
        value: Any = self.values
        for key in self.section.split("."):
            value = value.get(key)
        return value

    @property
    def compute(self) -> Compute:
        return params.parse(Compute, self.values.get("compute"), "compute")

    @property
    def name(self) -> str:
        """Last part of the section: the variant's name for a stage with variants."""
        return self.section.rpartition(".")[2]


def measured(root: Path, address: str) -> dict[str, float]:
    """Time (seconds) and memory (bytes) of the run that made a stage's output; empty if unknown on this machine."""
    measured_file, report = measured_path(root, address), root / report_of(address)
    if not measured_file.is_file() or not report.is_file():
        return {}
    if why := damage(measured_file.read_bytes()):
        set_aside(measured_file, why, "the next run of the stage measures again")
        return {}
    if damage(report.read_bytes()):
        return {}
    measurements, report_document = (json.loads(path.read_text(encoding="utf-8")) for path in (measured_file, report))
    is_current = measurements.pop("output_sha256", "") == report_document.get("output_sha256")
    return measurements if is_current else {}  # those of another version say nothing


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as orchestration sees it: stages to run, and parameters to validate."""

    stages: Mapping[str, Callable[[StageContext], Report]]
    variants_of: Mapping[str, str]
    check_descriptions: Callable[[str], dict[str, str]]
    """Stage -> its checks: name -> what the check asserts."""
    validate: Callable[[Path], dict[str, Any]]
    """Project folder -> params.yaml, validated."""
    forecast: Callable[[StageContext], Any] = lambda ctx: None
    """Execution hints and predicted memory of a run (training/planning/hints.py); None: there are none."""
    draw: Callable[[Documents], None] = lambda documents: None
    """Draws a stage's pages from its documents (views/render.py)."""
    floating_point: frozenset[str] = frozenset()
    """Stages that compute with floating-point numbers. Their reports record the machine (orchestration/machine.py)."""
    rests_on_all: Mapping[str, str] = field(default_factory=dict)
    """Stage -> key of params.yaml. If the key is given, the stage runs only if every stage upstream is up to date,
    because it judges the reports of all of them."""

    def split_address(self, address: str) -> tuple[str, str | None]:
        """ "adapter@lora" -> ("adapter", "lora").

        Raises:
            InputError: unknown stage, or a variant is missing, superfluous or not a name.
        """
        stage, _, variant = address.partition("@")
        if stage not in self.stages:
            raise InputError(
                f"unknown stage {stage!r}: pipeline.py does not list it",
                f"correct the name, or add the stage to pipeline.py; stages in flow order: {', '.join(self.stages)}",
            )
        if variant and stage not in self.variants_of:
            raise InputError(f"{address}: {stage} has no variants", f"write {stage}")
        if not variant and stage in self.variants_of:
            raise InputError(f"{address}: {stage} has variants", f"write {stage}@VARIANT")
        if variant and not params.is_variant_name(variant):
            raise InputError(
                f"{address}: a variant's name may contain letters, digits, - and _", f"write {stage}@VARIANT"
            )
        return stage, variant or None
