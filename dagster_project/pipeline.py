"""READ FIRST. The street: every stage, in flow order, with what it reads and what it makes.

dvc.yaml says when a stage runs; this file says what runs. Stages meet only in files: each function below hands one stage its
folders and its parameters, and returns the stage's report. `python -m dagster_project run STAGE` is the only way they are called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dagster_project import params
from dagster_project.errors import InputError
from dagster_project.params import Compute, Section
from dagster_project.records import Report

if TYPE_CHECKING:
    from dagster_project.stages import aligned as aligned_stage

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class At:
    """Where one run of one stage finds and puts its things."""

    root: Path
    """The project's folder."""
    stage: str
    variant: str | None
    scratch: Path
    """Folder that outputs are written to; they take their place only when the stage has succeeded."""
    values: Mapping[str, Any]
    """params.yaml."""
    recorded: Callable[[], Mapping[str, Path]] = dict
    """Files of the stage's output as recorded before this run, by their path in it. For pages that say what changed; never for an output."""

    @property
    def address(self) -> str:
        return f"{self.stage}@{self.variant}" if self.variant else self.stage

    @property
    def out(self) -> Path:
        """The stage's one output, data/<stage>[/<variant>]."""
        return self.scratch / "data" / self.stage / (self.variant or "")

    @property
    def pages(self) -> Path:
        """Folder for what people look at (HTML, files to fill in), data/pages/<stage>[/<variant>]. Kept also when a blocking check fails; not tracked."""
        return self.scratch / "data" / "pages" / self.stage / (self.variant or "")

    @property
    def live(self) -> Path:
        """Folder for tables that grow while the stage runs, data/live/<stage>[/<variant>], one figure each: a view for `dvc plots` and Dagster.
        The one place that is written to at once; not tracked, and what is in it decides nothing."""
        return self.root / "data" / "live" / self.stage / (self.variant or "")

    @property
    def checkpoints(self) -> Path:
        """Folder of a training's checkpoints, which outlives a killed run. Not tracked."""
        return self.root / ".dvc" / "tmp" / "pedigree" / "checkpoints" / (self.variant or self.stage)

    def plot(self, name: str) -> Path:
        """A table for `dvc plots`, data/plots/<name>[/<variant>].csv."""
        return self.scratch / "data" / "plots" / (f"{name}/{self.variant}.csv" if self.variant else f"{name}.csv")

    def made_by(self, stage: str) -> Path:
        """Another stage's output; of the same variant where that stage has variants."""
        return self.root / "data" / stage / ((self.variant or "") if stage in VARIANTS_OF else "")

    def all_of(self, stage: str) -> Path:
        """The folder with the outputs of all variants of a stage."""
        return self.root / "data" / stage

    def report(self, place: str) -> Path:
        """The report of a stage, by `STAGE` or `STAGE/VARIANT`."""
        return self.root / "data" / "reports" / f"{place}.json"

    def measured(self, stage: str, variant: str) -> dict[str, float]:
        """What the run took that made a stage's present output. For pages; never for an output."""
        return measured(self.root, f"{stage}/{variant}")

    def params(self, section: str, model: type[S]) -> S:
        return params.parse(model, self.values.get(section), section)

    @property
    def compute(self) -> Compute:
        return self.params("compute", Compute)


def measured(root: Path, place: str) -> dict[str, float]:
    """What the run took that made the present output of data/<place> (bytes, seconds); empty where that is not known on this machine."""
    took, report = (root / "data" / "pages" / place / "measured.json", root / "data" / "reports" / f"{place}.json")
    if not took.is_file() or not report.is_file():
        return {}
    found, made = (json.loads(path.read_text(encoding="utf-8")) for path in (took, report))
    return found if found.pop("output_sha256") == made.get("output_sha256") else {}  # not of another version


def base_model(at: At) -> Report:
    from dagster_project.stages import base_model as stage

    return stage.run(at.root, at.params("base_model", stage.Params), out=at.out)


def raw_examples(at: At) -> Report:
    from dagster_project.stages import raw_examples as stage

    return stage.run(at.root, at.params("raw_examples", stage.Params), out=at.out)


def instructions(at: At) -> Report:
    from dagster_project.stages import instructions as stage

    return stage.run(
        at.root, at.params("instructions", stage.Params), at.made_by("raw_examples"), at.made_by("base_model"), out=at.out, pages=at.pages,
        previous=at.recorded(),
    )  # fmt: skip


def splits(at: At) -> Report:
    from dagster_project.stages import splits as stage

    return stage.run(at.root, at.params("splits", stage.Params), at.compute.seed, at.made_by("instructions"), out=at.out)


def tokenized(at: At) -> Report:
    from dagster_project.stages import tokenized as stage

    return stage.run(
        at.root, at.params("tokenized", stage.Params), at.compute.seed, at.made_by("splits"), at.made_by("base_model"), out=at.out
    )


def adapter(at: At) -> Report:
    from dagster_project.stages import adapter as stage

    recipe = params.parse(stage.Params, at.values["adapter"][at.variant], f"adapter.{at.variant}")
    return stage.run(
        str(at.variant),
        recipe,
        at.compute,
        at.made_by("tokenized"),
        at.made_by("base_model"),
        out=at.out,
        curve_file=at.plot("loss"),
        checkpoints=at.checkpoints,
        live=at.live,
        pages=at.pages,
    )


def merged(at: At) -> Report:
    from dagster_project.stages import merged as stage

    return stage.run(at.compute, at.made_by("base_model"), at.made_by("adapter"), out=at.out)


def raw_preferences(at: At) -> Report:
    from dagster_project.stages import raw_preferences as stage

    return stage.run(at.root, at.params("raw_preferences", stage.Params), out=at.out)


def preferences(at: At) -> Report:
    from dagster_project.stages import preferences as stage

    return stage.run(
        at.root, at.params("preferences", stage.Params), at.compute.seed, at.made_by("raw_preferences"), at.made_by("splits"),
        at.made_by("base_model"), out=at.out, pages=at.pages, previous=at.recorded(),
    )  # fmt: skip


def baselines(at: At) -> Report:
    from dagster_project.evaluation.measure import Settings
    from dagster_project.stages import baselines as stage

    settings = at.params("evaluation", Settings)
    return stage.run(
        at.root, at.params("baselines", stage.Params), settings, at.compute, at.made_by("base_model"), at.made_by("splits"), out=at.out
    )


def evaluation(at: At) -> Report:
    from dagster_project.evaluation.measure import Settings
    from dagster_project.stages import evaluation as stage

    settings = at.params("evaluation", Settings)
    return stage.run(
        at.root,
        str(at.variant),
        settings,
        at.compute,
        at.made_by("merged"),
        at.made_by("base_model"),
        at.made_by("splits"),
        out=at.out,
        confusion_file=at.plot("confusion"),
    )


def reward_model(at: At) -> Report:
    from dagster_project.stages import reward_model as stage

    made_from = at.params("reward_model", stage.Params)
    return stage.run(
        made_from,
        at.compute,
        at.made_by("preferences"),
        at.root / "data" / made_from.model,
        out=at.out,
        curve_file=at.plot("reward"),
        calibration_file=at.plot("calibration"),
        checkpoints=at.checkpoints,
        live=at.live,
    )


def aligned(at: At) -> Report:
    from dagster_project.stages import aligned as stage

    entry = _aligned(at)
    return stage.run(
        str(at.variant),
        entry,
        at.compute,
        at.made_by("preferences"),
        at.made_by("reward_model"),
        at.all_of("merged") / entry.adapter,
        out=at.out,
        curve_file=at.plot("alignment"),
        checkpoints=at.checkpoints,
        live=at.live,
        pages=at.pages,
    )


def merged_aligned(at: At) -> Report:
    from dagster_project.stages import merged as stage

    return stage.run(at.compute, at.all_of("merged") / _aligned(at).adapter, at.made_by("aligned"), out=at.out)


def evaluation_aligned(at: At) -> Report:
    from dagster_project.evaluation.measure import Settings
    from dagster_project.stages import evaluation as stage

    settings = at.params("evaluation", Settings)
    return stage.run(
        at.root,
        str(at.variant),
        settings,
        at.compute,
        at.made_by("merged_aligned"),
        at.made_by("base_model"),
        at.made_by("splits"),
        out=at.out,
        confusion_file=at.plot("confusion_aligned"),
    )


def _aligned(at: At) -> aligned_stage.Params:
    from dagster_project.stages import aligned as stage

    return params.parse(stage.Params, at.values["aligned"][at.variant], f"aligned.{at.variant}")


def comparison(at: At) -> Report:
    from dagster_project.evaluation.measure import Settings
    from dagster_project.stages import comparison as stage

    ways = {"adapter": ("evaluation", "merged"), "aligned": ("evaluation_aligned", "merged_aligned")}
    variants = {
        name: stage.Variant(
            at.all_of(evaluation) / name,
            at.all_of(merged) / name,
            at.all_of(trained) / name / "training.json",
            at.all_of("adapter") / entry["adapter"] / "training.json" if trained == "aligned" else None,
            at.measured(trained, name),
            _failed_checks(at, [*_made_from(trained, name, entry), f"{merged}/{name}", f"{evaluation}/{name}"]),
        )
        for trained, (evaluation, merged) in ways.items()
        for name, entry in at.values[trained].items()
    }
    return stage.run(
        at.root,
        at.params("evaluation", Settings),
        variants,
        at.made_by("splits"),
        at.made_by("baselines"),
        at.made_by("base_model"),
        out=at.out,
        scores_file=at.plot("scores"),
        pages=at.pages,
    )


def _made_from(trained: str, name: str, entry: Mapping[str, Any]) -> list[str]:
    """The trainings of a variant, as places of reports; of an aligned one also those of the SFT variant that it started from."""
    return [f"adapter/{entry['adapter']}", f"merged/{entry['adapter']}", f"aligned/{name}"] if trained == "aligned" else [f"adapter/{name}"]


def _failed_checks(at: At, places: Sequence[str]) -> list[str]:
    """The failed checks in reports, e.g. "learned of adapter@lora: validation loss 1.2 -> 1.4"."""
    return [
        f"{check} of {place.replace('/', '@')}: {found.get('note') or found['count']}"
        for place in places
        for check, found in json.loads(at.report(place).read_text(encoding="utf-8")).get("checks", {}).items()
        if not found["passed"]
    ]


def release(at: At) -> Report:
    from dagster_project.stages import release as stage

    merged = {name: at.all_of("merged") / name for name in at.values["adapter"]}
    merged |= {name: at.all_of("merged_aligned") / name for name in at.values["aligned"]}
    trained = {f"{name}@{variant}": at.all_of(name) / variant for name in ("adapter", "aligned") for variant in at.values[name]}
    trained["reward_model"] = at.made_by("reward_model")
    return stage.run(at.params("release", stage.Params), at.compute, at.made_by("comparison"), merged, trained, _reports(at), out=at.out)


def _reports(at: At) -> dict[str, dict[str, Any]]:
    """The report of every stage that comes before this one, in flow order."""
    found = {}
    for stage in list(STREET)[: list(STREET).index(at.stage)]:
        for name in [f"{stage}/{variant}" for variant in at.values[VARIANTS_OF[stage]]] if stage in VARIANTS_OF else [stage]:
            found[name.replace("/", "@")] = json.loads(at.report(name).read_text(encoding="utf-8"))
    return found


STREET: dict[str, Callable[[At], Report]] = {
    "base_model": base_model,
    "raw_examples": raw_examples,
    "instructions": instructions,
    "splits": splits,
    "tokenized": tokenized,
    "adapter": adapter,
    "merged": merged,
    "raw_preferences": raw_preferences,
    "preferences": preferences,
    "reward_model": reward_model,
    "aligned": aligned,
    "merged_aligned": merged_aligned,
    "baselines": baselines,
    "evaluation": evaluation,
    "evaluation_aligned": evaluation_aligned,
    "comparison": comparison,
    "release": release,
}

VARIANTS_OF = {
    "adapter": "adapter", "merged": "adapter", "evaluation": "adapter",
    "aligned": "aligned", "merged_aligned": "aligned", "evaluation_aligned": "aligned",
}  # fmt: skip
"""Stages that have variants -> the section of params.yaml whose keys name them."""


@dataclass(frozen=True)
class Pipeline:
    """A street as the doors see it. They run, mirror and guard any such thing; only the plots and the plan know stages by name."""

    stages: Mapping[str, Callable[[At], Report]]
    variants_of: Mapping[str, str]
    truths: Callable[[str], dict[str, str]]
    """The checks that a stage reports: name -> the truth it looks at."""
    validate: Callable[[Path], dict[str, Any]]
    """All of params.yaml, once it has been found sound."""

    def split_address(self, address: str) -> tuple[str, str | None]:
        """ "adapter@lora" -> ("adapter", "lora").

        Raises:
            InputError: no such stage, or a variant too many or missing.
        """
        stage, _, variant = address.partition("@")
        if stage not in self.stages:
            raise InputError(
                f"unknown stage {stage!r}: nothing in pipeline.py makes it",
                f"stages, in flow order: {', '.join(self.stages)}; write its function in pipeline.py, or take it out of dvc.yaml",
            )
        if bool(variant) != (stage in self.variants_of):
            raise InputError(
                f"{address}: {stage} has {'variants' if not variant else 'no variants'}",
                f"write {stage}@VARIANT" if not variant else f"write {stage}",
            )
        return stage, variant or None


def module_of(stage: str) -> str:
    """The file in stages/ that a stage runs. What is done with aligned variants is what is done with adapters: DVC loops over one mapping only, so
    such a stage stands twice in dvc.yaml (docs/decisions/013)."""
    return f"dagster_project.stages.{stage.removesuffix('_aligned')}"


def truths(stage: str) -> dict[str, str]:
    """The checks a stage reports: name -> the truth it looks at. Cheap: stage modules import what is heavy inside functions."""
    from importlib import import_module

    return dict(getattr(import_module(module_of(stage)), "TRUTHS", {}))


def validate(root: Path) -> dict[str, Any]:
    """All of params.yaml, once every section has been checked and every file it names exists.

    Raises:
        InputError: unknown section, unknown key, wrong value, missing or outside file. Nothing has been changed.
    """
    from dagster_project.curation.review import refuse_expired
    from dagster_project.curation.sources import locate, locate_sources
    from dagster_project.evaluation.measure import Settings
    from dagster_project.stages import (
        adapter,
        base_model,
        baselines,
        instructions,
        preferences,
        raw_examples,
        raw_preferences,
        release,
        reward_model,
        splits,
        tokenized,
    )
    from dagster_project.training import auto, methods, templates

    sections: dict[str, type[Section]] = {
        "compute": Compute,
        "base_model": base_model.Params,
        "raw_examples": raw_examples.Params,
        "instructions": instructions.Params,
        "splits": splits.Params,
        "tokenized": tokenized.Params,
        "raw_preferences": raw_preferences.Params,
        "preferences": preferences.Params,
        "reward_model": reward_model.Params,
        "baselines": baselines.Params,
        "evaluation": Settings,
        "release": release.Params,
    }
    values = params.read(root)
    unknown = sorted(set(values) - set(sections) - {"adapter", "aligned"})
    if unknown:
        raise InputError(
            "\n".join(f"params.yaml: {name}: unknown section" for name in unknown),
            f"sections: {', '.join([*sections, 'adapter', 'aligned'])}",
        )
    parsed = {name: params.parse(model, values.get(name), name) for name, model in sections.items()}
    variants = values.get("adapter")
    if not isinstance(variants, dict) or not variants:
        raise InputError("params.yaml: adapter: must name at least one variant", "add an entry such as `lora: {method: lora}`")
    for name, recipe in variants.items():
        _check_name(name, f"adapter.{name}")
        entry = auto.settle(params.parse(adapter.Params, recipe, f"adapter.{name}"), examples=1, rows=1, validates=False).params
        checkpointing = entry.gradient_checkpointing is True
        methods.check(entry.method, entry.peft, entry.quantization, entry.merge, f"adapter.{name}", checkpointing)
        if parsed["compute"].processes > 1 and entry.method.lower() == "feature_extraction":  # type: ignore[attr-defined]
            raise InputError(
                f"params.yaml: compute.processes: adapter.{name} trains by feature_extraction, which takes no steps to share", "set it to 1"
            )
    _check_aligned(values, parsed["reward_model"])
    for section in ("raw_examples", "raw_preferences"):
        locate_sources(root, parsed[section].sources, f"{section}.sources")  # type: ignore[attr-defined]
    promoted: release.Params = parsed["release"]  # type: ignore[assignment]
    for section in ("instructions", "preferences", "release"):
        for i, waiver in enumerate((values.get(section) or {}).get("waivers", ())):
            if not isinstance(waiver["expires"], str):
                raise InputError(
                    f"params.yaml: {section}.waivers.{i}.expires: DVC reads no dates", f'put it in quotes: "{waiver["expires"]}"'
                )
        refuse_expired(parsed[section].waivers, f"params.yaml: {section}.waivers", date.today())  # type: ignore[attr-defined]
    known = [*variants, *values["aligned"]]
    if promoted.variant not in {release.AUTO, *known}:
        raise InputError(f"params.yaml: release.variant: no variant {promoted.variant!r}", f"{release.AUTO}, or one of {', '.join(known)}")
    for section in ("instructions", "preferences"):
        if review := parsed[section].review:  # type: ignore[attr-defined]
            locate(root, review, f"{section}.review", "data/sources/review")
    if suite := parsed["instructions"].expectations:  # type: ignore[attr-defined]
        locate(root, suite, "instructions.expectations", "data/expectations")
    augment = parsed["splits"].augment  # type: ignore[attr-defined]
    if augment and augment.paraphrases:
        locate(root, augment.paraphrases, "splits.augment.paraphrases", "data/sources/paraphrases")
    templates.locate(root, parsed["tokenized"].chat_template)  # type: ignore[attr-defined]
    for section in ("instructions", "preferences", "evaluation"):
        for path in parsed[section].benchmarks:  # type: ignore[attr-defined]
            locate(root, path, f"{section}.benchmarks", "data/sources/benchmarks")
    return values


def _check_name(name: Any, where: str) -> None:
    if not str(name).replace("_", "").replace("-", "").isalnum():
        raise InputError(f"params.yaml: {where}: a variant's name may hold letters, digits, - and _", "rename it")


def _check_aligned(values: Mapping[str, Any], made_from: Any) -> None:
    """The entries that start from an SFT variant: is there such a one, and can what they say be done?"""
    from dagster_project.stages import adapter, aligned
    from dagster_project.training import align, methods, reward

    def merges(name: str, where: str) -> None:
        if name not in values["adapter"]:
            raise InputError(f"params.yaml: {where}: there is no adapter.{name}", f"adapters: {', '.join(values['adapter'])}")
        tuned = params.parse(adapter.Params, values["adapter"][name], f"adapter.{name}")
        if not tuned.merge or methods.why_not_merged(tuned.method, tuned.peft, tuned.quantization):
            raise InputError(f"params.yaml: {where}: adapter.{name} makes no model that stands alone", "name a variant that is merged")

    if made_from.model != "base_model":
        merges(made_from.model.removeprefix("merged/"), "reward_model.model")
    methods.check("lora", made_from.peft, None, True, "reward_model")
    entries = values.get("aligned")
    if not isinstance(entries, dict):
        raise InputError("params.yaml: aligned: must be a mapping of variants", "write `aligned: {}` for none")
    for name, recipe in entries.items():
        where = f"aligned.{name}"
        _check_name(name, where)
        if name in values["adapter"]:
            raise InputError(f"params.yaml: {where}: adapter.{name} has the same name", "rename one of them")
        entry = params.parse(aligned.Params, recipe, where)
        merges(entry.adapter, f"{where}.adapter")
        methods.check("lora", entry.peft, None, True, where)
        align.check(entry.method, entry.options, entry.per_device_train_batch_size, where, recipe)
        if entry.method in align.ONLINE:
            reward.check(entry.rewards, f"{where}.rewards")
        elif "rewards" in recipe:
            raise InputError(f"params.yaml: {where}.rewards: {entry.method} learns from pairs alone", "leave it out")


PEDIGREE = Pipeline(STREET, VARIANTS_OF, truths, validate)
