"""The adapter behind a model that `pedigree why` asks about: its training, the
files that it was made from, and the store of its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.core import params
from dagster_project.core.documents import read_document
from dagster_project.core.errors import Busy, InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.imports import lean_imports
from dagster_project.core.params import Compute
from dagster_project.core.records import write_json
from dagster_project.lineage.attribution.gradients import REFUSED, STRENGTH, TrainedModel
from dagster_project.lineage.attribution.owners import END, OWNER, remove_others
from dagster_project.lineage.attribution.per_record import projected_gradients
from dagster_project.lineage.attribution.projection import Projection
from dagster_project.lineage.attribution.records import TrainedRecord, trained_records
from dagster_project.lineage.attribution.store import GRADIENTS, GradientStore, identity_of
from dagster_project.lineage.history import listing_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import Subject, find
from dagster_project.lineage.runs import StageRun
from dagster_project.orchestration import locks
from dagster_project.training.methods.load import AdapterInfo
from dagster_project.training.trainers.harness.params import AdapterParams
from dagster_project.training.trainers.sft import auto

if TYPE_CHECKING:
    import torch

ADAPTER, TOKENIZED, BASE_MODEL = "adapter", "data/tokenized", "data/base_model"
ALIGNED, PREFERENCES, MERGED = "aligned", "data/preferences", "data/merged/"
FROM_PAIRS = ("reward_model", ALIGNED, "merged_aligned")


@dataclass(frozen=True)
class Target:
    """One trained adapter, with the files of its training."""

    root: Path
    asked: str
    """The model as it was named."""
    subject: Subject
    run: StageRun
    """The training of the adapter."""
    place: Path
    """Folder in which data/ has the files of the training: the project, or one
    to which an earlier version was restored."""

    @property
    def variant(self) -> str:
        return self.run.variant

    @property
    def folder(self) -> Path:
        return self.place / self.run.path

    @property
    def tokenized(self) -> Path:
        return self.place / TOKENIZED

    @property
    def base_model(self) -> Path:
        return self.place / BASE_MODEL

    @property
    def base_model_md5(self) -> str:
        """Recorded hash of the base model, with which its files were compared (`refuse_other_files`)."""
        return needed(self.run)[self.base_model.relative_to(self.place).as_posix()]

    @cached_property
    def training(self) -> dict[str, Any]:
        """training.json of the adapter."""
        return read_document(
            self.folder / "training.json",
            f"{self.run.path}/training.json",
            f"make it again with `dvc repro {self.run.address}`",
        )

    @cached_property
    def entry(self) -> AdapterParams:
        """The variant's entry in params.yaml as it was trained, with the value that was chosen for each `auto`.

        Raises:
            InputError: a command trained it.
        """
        recorded = self.subject.index.lock_entry(self.run).get("params", {}).get("params.yaml", {})
        value = next((value for key, value in recorded.items() if key.partition(".")[2] == self.variant), None) or {}
        found = params.parse(AdapterParams, value, f"{ADAPTER}.{self.variant}")
        chosen = {name: auto.Choice(choice["value"], "") for name, choice in self.training.get("chosen", {}).items()}
        found = auto.put(found, chosen)
        if found.command is not None:
            raise InputError(
                f"{self.run.address} was trained by a command of your own, whose loss is not known here",
                "ask a variant that was trained without `command`",
            )
        return found

    @property
    def compute(self) -> Compute:
        """As it was trained."""
        names = ("seed", "threads", "dtype", "processes")
        return Compute(**{name: self.training[name] for name in names if name in self.training})

    @cached_property
    def records(self) -> list[TrainedRecord]:
        return trained_records(self.folder, self.tokenized)

    @cached_property
    def projection(self) -> Projection:
        return Projection()

    @cached_property
    def store(self) -> GradientStore:
        compute = {name: self.training.get(name) for name in ("dtype", "device", "threads")}
        smoothing = self.entry.label_smoothing_factor
        identity = identity_of(
            self.run.md5, self.base_model_md5, self.records, self.projection, compute, smoothing, STRENGTH
        )
        return GradientStore.at(self.root, identity, len(self.records))

    @cached_property
    def model(self) -> TrainedModel:
        """The loaded model, as gradients are taken of it."""
        return self.load().weakened()

    def load(self) -> TrainedModel:
        """The model at the end of its training, loaded anew."""
        with lean_imports():  # of the model's own module
            return TrainedModel.load(**self.loading)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `TrainedModel.load`."""
        return {
            "folder": self.folder,
            "base_model": self.base_model,
            "compute": self._one_process,
            "where": self.run.address,
            "label_smoothing": self.entry.label_smoothing_factor,
            "options": self.entry.peft,
        }

    @property
    def _one_process(self) -> Compute:
        return self.compute.model_copy(update={"processes": 1})

    def gradients(self, numbers: Sequence[int]) -> torch.Tensor:
        """Projected gradients of some records by number, (records, width) float32."""
        return projected_gradients(self.model, self.projection, [self.records[i].examples for i in numbers])

    def index(self) -> dict[str, Any]:
        """Compute what is missing in the store; the caller holds the lock (`alone`).

        Returns:
            {"folder", "records", "computed", "bytes"}.
        """
        store = self.store
        if not store.is_complete():
            self.claim_store()
            computed = store.build(self.gradients, f"{self.run.address}: gradients")
        else:
            computed = 0
        return {
            "folder": store.folder.relative_to(self.root).as_posix(),
            "records": len(self.records),
            "computed": computed,
            "bytes": store.bytes(),
        }

    @contextmanager
    def alone(self, command: str) -> Iterator[None]:
        """Hold the lock of the stage, so that neither a training nor an erasure changes the model at the same time.

        Args:
            command: how to describe this process to others.
        Raises:
            Busy: another process holds it.
        """

        def refuse(holder: str) -> None:
            raise Busy(
                f"{self.run.address} is being used by {holder}", "wait for it to end, then run the same command again"
            )

        with locks.hold(self.root, self.run.address, refuse, command):
            refuse_other_files(self.place, self.run)  # they may have changed before the lock was held
            yield

    def claim_store(self) -> None:
        """Name the folder of the store as that of this variant, and remove those of its earlier versions."""
        remove_others(self.root / GRADIENTS, self.store.folder.name, self.run.address)
        write_json(self.store.folder / OWNER, {"stage": self.run.address})


@dataclass(frozen=True)
class DerivedTarget(Target):
    """The same adapter at another point or strength. Its gradients are stored within the store of `original`."""

    original: Target

    @cached_property
    def records(self) -> list[TrainedRecord]:
        return self.original.records

    def claim_store(self) -> None:
        self.original.claim_store()


@dataclass(frozen=True)
class EndTarget(DerivedTarget):
    """A trained adapter whose gradients are taken at all that it adds."""

    @cached_property
    def store(self) -> GradientStore:
        store = self.original.store
        return GradientStore(store.folder / END, {**store.identity, "strength": 1.0}, len(self.records))

    @cached_property
    def model(self) -> TrainedModel:
        return self.load()


def at_end(found: Target) -> EndTarget:
    """The same adapter, for suspects and differences, whose figures are better there (docs/decisions/062)."""
    return EndTarget(found.root, found.asked, found.subject, found.run, found.place, found)


def target(root: Path, model: str) -> Target:
    """The adapter that a model was made from.

    Args:
        model: its name, folder or hash, as for `pedigree audit`.
    Raises:
        InputError: its answers cannot be attributed, or the files of its training are not in the workspace.
    """
    return target_of(root, model, find(Index(root), model))


def target_of(root: Path, model: str, subject: Subject) -> Target:
    """As `target`, for a model that was looked up already."""
    run = adapter_of(subject, model)
    refuse_other_files(root, run)
    found = Target(root, model, subject, run, root)
    refuse_method(found)
    return found


def adapter_of(subject: Subject, model: str) -> StageRun:
    """The training of the adapter that a model was made from.

    Raises:
        InputError: it was made from none, learned from preference pairs, or is merged of several adapters.
    """
    models = subject.models
    if aligned := next((run for run in models if run.stage in FROM_PAIRS), None):
        raise InputError(
            f"{model}: {aligned.address} was trained on preference pairs or rewards:"
            " only a single question can be asked about it",
            "name the supervised model that it started from, e.g. merged@lora",
        )
    adapters = [run for run in models if run.stage == ADAPTER]
    *parts, last = adapters or [subject.run]
    if any(part.md5 == md5 for part in parts for _, _, md5 in last.inputs):
        names = ", ".join(part.address for part in parts)
        raise InputError(
            f"{model}: {last.address} is merged of other adapters and has no training of its own",
            f"ask one of these: {names}",
        )
    if len(adapters) != 1:
        raise InputError(
            f"{model} was not made from one supervised adapter of this project",
            "name adapter@VARIANT or merged@VARIANT",
        )
    return adapters[0]


def refuse_method(found: Target) -> None:
    """Raises:
    InputError: the answers of its method cannot be attributed.
    """
    method = AdapterInfo.read(found.folder).method
    if method in REFUSED:
        raise InputError(
            f"{found.run.address}: answers of {method} cannot be attributed: {REFUSED[method]}", "ask another variant"
        )


def start_of(run: StageRun) -> str:
    """Path of the model that a training began with."""
    return next((path for path, _, _ in run.inputs if path.startswith(MERGED)), BASE_MODEL)


def needed(run: StageRun) -> dict[str, str]:
    """Path of the trained weights, of the data and of the model that a training
    began with -> hash of each as recorded."""
    inputs = {path: md5 for path, _, md5 in run.inputs}
    data, start = (PREFERENCES, start_of(run)) if run.stage in FROM_PAIRS else (TOKENIZED, BASE_MODEL)
    return {run.path: run.md5, data: inputs.get(data, ""), start: inputs.get(start, "")}


def refuse_other_files(place: Path, run: StageRun) -> None:
    """Raises:
    InputError: there is no adapter, tokenized data or base model, or they are other ones than those of this training.
    """
    for path, md5 in needed(run).items():
        listing = listing_of(place / path)
        if not listing:
            raise InputError(
                f"{path}, which {run.address} needs, is not in the workspace", f"restore it with `dvc checkout {path}`"
            )
        if md5 != md5_of_folder(listing):
            raise InputError(
                f"{path} in the workspace is not the one of this training ({run.address}, md5 {run.md5[:12]})",
                f"check out the revision of the model and run `dvc checkout --force {path}`",
            )
