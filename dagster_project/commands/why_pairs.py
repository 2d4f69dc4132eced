"""Models that were trained on preference pairs, as `pedigree why` asks about
them: policies of DPO, and reward models (docs/why.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.commands.why_model import ALIGNED, PREFERENCES, Target, refuse_other_files, start_of, target_of
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_file
from dagster_project.core.imports import lean_imports
from dagster_project.lineage.attribution import pairs
from dagster_project.lineage.attribution.pairs import (
    AlignedModel,
    DpoLoss,
    RewardedModel,
    gradients_of_pairs,
    pair_records,
)
from dagster_project.lineage.attribution.records import TrainedRecord
from dagster_project.lineage.attribution.store import GradientStore, identity_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import Subject, find
from dagster_project.lineage.runs import StageRun

if TYPE_CHECKING:
    import torch

DPO, REWARD_MODEL = "dpo", "reward_model"


@dataclass(frozen=True)
class PairTarget(Target):
    """A policy of DPO or a reward model, with the files of its training."""

    @property
    def scores(self) -> bool:
        """Whether it is a reward model, which has no log-probability of an answer."""
        return self.run.address == REWARD_MODEL

    @property
    def preferences(self) -> Path:
        return self.place / PREFERENCES

    @property
    def base_model(self) -> Path:
        """The model that its training began with, which is also the reference of DPO."""
        return self.place / start_of(self.run)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of its training."""
        found: Mapping[str, Any] = self.training["settings"]
        return found

    @cached_property
    def _read(self) -> tuple[list[TrainedRecord], dict[str, dict[str, Any]]]:
        from dagster_project.commands.why_question import tokenizer_of

        return pair_records(self.folder, self.preferences, tokenizer_of(self))

    @cached_property
    def records(self) -> list[TrainedRecord]:
        return self._read[0]

    @property
    def pairs(self) -> Mapping[str, Mapping[str, Any]]:
        """The pairs of the training split by id."""
        return self._read[1]

    @cached_property
    def store(self) -> GradientStore:
        compute = {name: self.training.get(name) for name in ("dtype", "device", "threads")}
        identity = identity_of(self.run.md5, self.base_model_md5, self.records, self.projection, compute, 0.0, 1.0)
        margins = self._margins if self.scores else {}
        identity |= {"settings": dict(self.settings), "margins": margins, "pairs": sha256_of_file(Path(pairs.__file__))}
        return GradientStore.at(self.root, identity, len(self.records))

    @property
    def _margins(self) -> dict[str, float]:
        return (
            {record.example_id: self.pairs[record.example_id]["margin"] for record in self.records}
            if self.settings["margins"]
            else {}
        )

    @cached_property
    def model(self) -> AlignedModel:
        """The loaded policy."""
        with lean_imports():
            loss = DpoLoss.of(self.settings, self.run.address)
            return AlignedModel.aligned(self.folder, self.base_model, self._one_process, self.run.address, loss)

    @cached_property
    def reward_model(self) -> RewardedModel:
        """The loaded reward model."""
        with lean_imports():
            return RewardedModel.load(self.folder, self.settings, self._one_process, self._margins, self.run.address)

    def gradients(self, numbers: Sequence[int]) -> torch.Tensor:
        chosen = [self.records[i] for i in numbers]
        if not self.scores:
            return gradients_of_pairs(self.model, self.projection, [record.examples for record in chosen])
        from torch import stack

        return stack([self.projection.project(self.reward_model.of_record(record)) for record in chosen])


def asked(root: Path, model: str) -> Target:
    """As `asked_of`, for the name, folder or hash of a model, as for `pedigree audit`."""
    return asked_of(root, model, find(Index(root), model))


def asked_of(root: Path, model: str, subject: Subject) -> Target:
    """What a question about a model is compared with: its pairs, if it was trained on pairs last, else as `target`.

    Raises:
        InputError: its answers cannot be attributed, or the files of its training are not in the workspace.
    """
    trained = pair_trainings(subject)
    if not trained:
        return target_of(root, model, subject)
    found = PairTarget(root, model, subject, trained[-1], root)
    if not any(path == PREFERENCES for path, _, _ in found.run.inputs):
        raise InputError(
            f"{found.run.address} was trained on no preference pairs",
            "ask the supervised model that it started from, e.g. merged@lora",
        )
    refuse_other_files(root, found.run)
    refuse_pair_method(found)
    return found


def pair_trainings(subject: Subject) -> list[StageRun]:
    """Those that a model was made by, the last one last."""
    return [run for run in subject.models if run.stage in (ALIGNED, REWARD_MODEL)]


def refuse_pair_method(found: PairTarget) -> None:
    """Raises:
    InputError: the gradients of its method are not supported.
    """
    if found.scores:
        if "settings" not in found.training:
            raise InputError(
                f"{found.run.address} has no weights: there were no preference pairs",
                "add pairs, then `dvc repro reward_model`",
            )
        return
    method = found.settings["method"]
    if method != DPO:
        raise InputError(
            f"{found.run.address} was trained by {method}, whose gradients are not supported: only those of dpo are",
            "ask the supervised model that it started from, e.g. merged@lora",
        )
    DpoLoss.of(found.settings, found.run.address)
