"""What a stage is given: StageContext for a run, ValidationContext for checking its parameters before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dagster_project.core import params
from dagster_project.core.layout import measured_path, report_of
from dagster_project.core.params import Compute, Section

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class ExecutionHints:
    """What planning decided for one run. No part of a stage's identity: hints change no byte of its result."""

    gradient_checkpointing: bool = False
    """Whether a training whose parameter says `auto` uses gradient checkpointing."""
    advice: Callable[[], str] = str
    """Says what to change if memory runs out; "" if that is unknown."""


@dataclass(frozen=True)
class StageContext:
    """Paths and parameters of one run of one stage."""

    root: Path
    """The project's folder."""
    stage: str
    variant: str | None
    scratch: Path
    """Folder that outputs are written to. They are moved to their places only after the stage has succeeded."""
    values: Mapping[str, Any]
    """params.yaml."""
    variants_of: Mapping[str, str] = field(default_factory=dict)
    """Stage with variants -> section of params.yaml whose keys name them."""
    earlier: tuple[str, ...] = ()
    """Stages before this one, in flow order."""
    hints: ExecutionHints = ExecutionHints()
    recorded: Callable[[], Mapping[str, Path]] = dict
    """Files of the stage's output as recorded before this run, by path within the output. For pages that show what changed; never for an output."""

    @property
    def address(self) -> str:
        return f"{self.stage}@{self.variant}" if self.variant else self.stage

    @property
    def out(self) -> Path:
        """The stage's one output, data/<stage>[/<variant>]."""
        return self.scratch / "data" / self.stage / (self.variant or "")

    @property
    def pages(self) -> Path:
        """Folder for pages and files that people fill in, data/pages/<stage>[/<variant>]. Kept also when a blocking check fails; not tracked."""
        return self.scratch / "data" / "pages" / self.stage / (self.variant or "")

    @property
    def live(self) -> Path:
        """Folder for tables that grow while the stage runs, data/live/<stage>[/<variant>], one metric each, for `dvc plots` and Dagster.

        The only folder that is written directly, outside `scratch`. Not tracked; nothing depends on it.
        """
        return self.root / "data" / "live" / self.stage / (self.variant or "")

    @property
    def checkpoints(self) -> Path:
        """Folder of a training's checkpoints, which outlives a killed run. Not tracked."""
        return self.root / ".dvc" / "tmp" / "pedigree" / "checkpoints" / (self.variant or self.stage)

    def plot(self, name: str) -> Path:
        """A table for `dvc plots`, data/plots/<name>[/<variant>].csv."""
        return self.scratch / "data" / "plots" / (f"{name}/{self.variant}.csv" if self.variant else f"{name}.csv")

    def output_of(self, stage: str) -> Path:
        """Another stage's output; of the same variant if that stage has variants."""
        return self.root / "data" / stage / ((self.variant or "") if stage in self.variants_of else "")

    def outputs_of(self, stage: str) -> Path:
        """The folder that holds the outputs of all variants of a stage."""
        return self.root / "data" / stage

    def reports(self) -> dict[str, dict[str, Any]]:
        """Reports of all stages before this one, by address, in flow order."""
        addresses = [
            f"{stage}@{variant}" if variant else stage
            for stage in self.earlier
            for variant in (self.values[self.variants_of[stage]] if stage in self.variants_of else [None])
        ]
        return {address: self.report(address) for address in addresses}

    def report(self, address: str) -> dict[str, Any]:
        """The report of another stage."""
        report: dict[str, Any] = json.loads((self.root / report_of(address)).read_text(encoding="utf-8"))
        return report

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
    """What the pages of one stage are drawn from."""

    root: Path
    """The project's folder."""
    address: str
    """e.g. "adapter@lora"."""
    out: Path
    """The stage's output."""
    pages: Path
    """Folder of its pages, and of untracked documents about its latest run."""
    report: Mapping[str, Any]
    """The stage's report."""

    @property
    def stage(self) -> str:
        return self.address.partition("@")[0]

    @property
    def variant(self) -> str:
        return self.address.partition("@")[2]

    def read(self, path: Path) -> Any:
        """A JSON document; None if it is missing."""
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class ValidationContext:
    """What a stage's parameters are checked against, before anything runs."""

    root: Path
    values: Mapping[str, Any]
    """All of params.yaml."""
    section: str
    """Dotted place of the parameters under check, e.g. "adapter.lora". For messages."""

    @property
    def value(self) -> Any:
        """The section as written in params.yaml; None where it is left out."""
        found: Any = self.values
        for key in self.section.split("."):
            found = found.get(key)
        return found

    @property
    def compute(self) -> Compute:
        return params.parse(Compute, self.values.get("compute"), "compute")

    @property
    def name(self) -> str:
        """Last part of the section: the variant's name for a stage with variants."""
        return self.section.rpartition(".")[2]


def measured(root: Path, address: str) -> dict[str, float]:
    """Time and memory of the run that made the present output of a stage (bytes, seconds); empty where that is unknown on this machine."""
    took, report = measured_path(root, address), root / report_of(address)
    if not took.is_file() or not report.is_file():
        return {}
    found, made = (json.loads(path.read_text(encoding="utf-8")) for path in (took, report))
    return found if found.pop("output_sha256") == made.get("output_sha256") else {}  # not of another version
