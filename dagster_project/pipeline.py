"""READ FIRST. The pipeline: every stage in flow order, and the module in stages/ that runs it.

dvc.yaml says when a stage runs and what it reads; params.yaml says how. A stage's module has `Params`,
`validate(params, ctx)` and `run(ctx) -> Report`, called by `python -m dagster_project run STAGE` alone.
Stages meet only in files.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dagster_project import execution, optional_stages, refused_values
from dagster_project.core import params
from dagster_project.core.context import Documents, StageContext, ValidationContext
from dagster_project.core.context import Pipeline as Pipeline
from dagster_project.core.errors import InputError
from dagster_project.core.params import Compute, Section
from dagster_project.lineage.provider import Provider

STAGES = {
    "base_model": "base_model",
    "raw_examples": "raw_examples",
    "instructions": "instructions",
    "splits": "splits",
    "tokenized": "tokenized",
    "adapter": "adapter",
    "merged": "merged",
    "raw_preferences": "raw_preferences",
    "preferences": "preferences",
    "reward_model": "reward_model",
    "aligned": "aligned",
    "merged_aligned": "merged",
    "baselines": "baselines",
    "evaluation": "evaluation",
    "evaluation_aligned": "evaluation",
    "comparison": "comparison",
    "release": "release",
}
"""Stage, in flow order -> its module in stages/. Aligned variants have stages of their own (decisions/013)."""

VARIANTS_OF = {
    "adapter": "adapter", "merged": "adapter", "evaluation": "adapter",
    "aligned": "aligned", "merged_aligned": "aligned", "evaluation_aligned": "aligned",
}  # fmt: skip
"""Stage with variants -> section of params.yaml whose keys name them."""

FLOATING_POINT = frozenset({*VARIANTS_OF, "reward_model", "baselines"})
"""Stages whose results depend on the machine in their last bits. The others give the same bytes on any machine."""


def module_of(stage: str) -> Any:
    """The module that runs a stage. Cheap to import: stage modules import heavy libraries inside functions."""
    return import_module(f"dagster_project.stages.{STAGES[stage]}")


UNREAD: dict[str, type[Section]] = {"execution": execution.Execution, "provider": Provider}
"""Sections of params.yaml that no stage reads, so that a change makes nothing stale. Both may be left out."""


def sections() -> dict[str, type[Section]]:
    """Section of params.yaml, in flow order -> its class; of a section with variants the class of one variant."""
    own = {stage: module_of(stage).Params for stage, module in STAGES.items() if stage == module}
    return {"compute": Compute, **UNREAD, **{stage: one for stage, one in own.items() if one.model_fields}}


def validate(root: Path, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """All of params.yaml, or other values, after every section has been checked and every file it names has been found.

    Raises:
        InputError: a section, key, value or file is wrong or missing, or a file is outside the project.
    """
    values, known = params.read(root) if values is None else values, sections()
    if unknown := [f"params.yaml: {name}: unknown section" for name in sorted(set(values) - set(known))]:
        raise InputError("\n".join(unknown), f"sections: {', '.join(known)}")
    params.parse(Compute, values.get("compute"), "compute")
    execution.parse(values, STAGES, VARIANTS_OF)
    params.parse(Provider, values.get("provider"), "provider")
    places = [
        (section, place)
        for section in optional_stages.present(root, values, list(known)[1 + len(UNREAD) :])
        for place in (
            [f"{section}.{name}" for name in params.variant_names(values, section, required=section == "adapter")]
            if section in VARIANTS_OF.values()
            else [section]
        )
    ]
    parsed = [(s, p, params.parse(module_of(s).Params, ValidationContext(root, values, p).value, p)) for s, p in places]
    refused_values.refuse(values, [place for section, place in places if section in VARIANTS_OF.values()])
    optional_stages.refuse_missing(root, values)
    for section, place, found in parsed:
        module_of(section).validate(found, ValidationContext(root, values, place))
    return values


def _forecast(ctx: StageContext) -> Any:
    from dagster_project.training.planning.hints import forecast

    return forecast(ctx)


def _draw(documents: Documents) -> None:
    from dagster_project.lineage.quoted_rows import quoted
    from dagster_project.views.render import draw

    draw(replace(documents, quoted=quoted))


PEDIGREE = Pipeline(
    {name: lambda ctx: module_of(ctx.stage).run(ctx) for name in STAGES},
    VARIANTS_OF,
    lambda stage: dict(getattr(module_of(stage), "CHECK_DESCRIPTIONS", {})),
    validate,
    _forecast,
    _draw,
    FLOATING_POINT,
    {"release": "raw_examples.use_policy"},
)
