"""Section `execution` of params.yaml: where each stage runs. Not part of any
result's identity: no stage depends on it, and a change makes nothing stale."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.params import Section

VARIABLE = "PEDIGREE_EXECUTION"
"""Environment variable that overrides the section: `local`, `ray`, or a whole section as JSON."""
WORKERS = "PEDIGREE_WORKERS"
"""In a worker of a cluster: the driver's `Placement.workers`."""
WORKER = "worker"
"""Value of the variable in a worker of a cluster: the stage runs in place, with
parameters that the driver has validated."""

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LABEL = r"^[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?$"
"""Values of a label of Ray's nodes."""
OWN_KEYS = {
    "cpu": "cpus", "cpus": "cpus", "gpu": "gpus", "gpus": "gpus",
    "memory": "memory", "object_store_memory": "memory",
}  # fmt: skip
"""Names that `resources` may not have: key of a placement for each. Ray refuses its own names there, and waits
forever for a node that has a resource of one of the others."""


class Placement(Section):
    """Where one stage or variant runs, and the resources reserved for it."""

    on: Literal["local", "ray"] = "local"
    """`local`: on this machine. `ray`: on a node of a Ray cluster, with the same result."""
    cpus: Amount = 1
    """CPUs reserved on the node. How many threads torch uses is `compute.threads`."""
    gpus: Amount = 0
    """GPUs reserved on the node: a part of one, or a whole number."""
    memory: Annotated[float, Field(ge=0, le=100_000)] | None = None
    """Memory reserved on the node, in GB (10^9 bytes). Ray schedules by it and does not enforce it."""
    resources: dict[str, Amount] = {}
    """Other resources of Ray's nodes, as named in `ray start --resources`, e.g. `{trainer: 1}`."""
    workers: int = Field(default=1, ge=1)
    """Processes for work on rows (reading, checks, near-duplicates, splits, tokens), in stages of data. With `on: ray`
    each is a task of one CPU on any node, in addition to `cpus`. The result is the same with any number."""
    nodes: int = Field(default=1, ge=1)
    """Nodes on which the processes of one training run, with `on: ray`: `compute.processes` divided by `nodes` on each.
    Each node then has the reserved `cpus`, `gpus`, `memory` and `resources`. See docs/cluster.md."""
    image: str | None = Field(default=None, pattern=LABEL)
    """Container image of the node, as named in its label: `ray start --labels=image=NAME`. Ray cannot start an image
    for a job that brings its own files, therefore it is chosen by the node's label. A label has no `/` and no `:`."""

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus % 1:
            raise ValueError("more than one GPU must be a whole number")
        return gpus

    @model_validator(mode="after")
    def _something_on_each_node(self) -> Placement:
        if self.nodes > 1 and not (self.cpus or self.gpus or any(self.resources.values())):
            raise ValueError("`nodes` needs `cpus`, `gpus` or `resources` above 0: what to reserve on each node")
        return self

    @field_validator("resources")
    @classmethod
    def _not_own_keys(cls, resources: dict[str, float]) -> dict[str, float]:
        if name := next((name for name in resources if name.lower() in OWN_KEYS), None):
            raise ValueError(f"{name} is not a name of a resource: write `{OWN_KEYS[name.lower()]}` beside `resources`")
        return resources


class Execution(Section):
    """Where stages run. No result depends on it, and a change makes no stage stale. See docs/cluster.md."""

    address: str | None = None
    """The cluster: `http://HOST:PORT` of Ray's dashboard, or `local` for the cluster that runs on this machine (`ray
    start --head`). The environment variable RAY_ADDRESS takes precedence. Default: `local`."""
    price_per_hour: dict[str, Amount] = {}
    """Price of one unit for one hour, by resource: `cpus`, `gpus`, `memory` (GB), or a name in `resources`. Only for
    the cost shown after a run, which does not include the tasks of `workers`."""
    stages: dict[str, Placement] = {}
    """Placement by stage (`adapter`) or variant (`adapter@lora`), which takes
    precedence. All others run on this machine."""


def parse(values: Mapping[str, Any], stages: Mapping[str, Any], variants_of: Mapping[str, str]) -> Execution:
    """The section of params.yaml.

    Args:
        values: params.yaml.
        stages: the pipeline's stages, by name.
        variants_of: stage with variants -> section whose keys name them.
    Raises:
        InputError: unknown key, wrong value, or unknown stage.
    """
    return _parse(values.get("execution"), "params.yaml", values, stages, variants_of)


def _parse(
    section: Any, file: str, values: Mapping[str, Any], stages: Mapping[str, Any], variants_of: Mapping[str, str]
) -> Execution:
    found = params.parse(Execution, section, "execution", file)
    for address in found.stages:
        stage, at, variant = address.partition("@")
        if stage not in stages:
            raise InputError(f"{file}: execution.stages.{address}: no such stage", f"stages: {', '.join(stages)}")
        variants = values.get(variants_of.get(stage, ""))
        if at and variant not in (variants if isinstance(variants, Mapping) else {}):
            raise InputError(
                f"{file}: execution.stages.{address}: no such variant",
                (
                    f"name an entry of `{variants_of[stage]}`"
                    if stage in variants_of
                    else f"write {stage}: it has no variants"
                ),
            )
    resources = {"cpus", "gpus", "memory"}.union(*(place.resources for place in found.stages.values()))
    for name in found.price_per_hour:
        if name not in resources and (meant := get_close_matches(name, resources, 1)):
            raise InputError(
                f"{file}: execution.price_per_hour.{name}: no stage has this resource", f"write {meant[0]}"
            )
    return found


def placement(
    values: Mapping[str, Any],
    address: str,
    stages: Mapping[str, Any],
    variants_of: Mapping[str, str],
    environment: Mapping[str, str] = os.environ,
) -> tuple[Execution, Placement]:
    """The section, and the placement of a stage; the environment variable takes precedence.

    Raises:
        InputError: the section or the variable is invalid.
    """
    override = environment.get(VARIABLE, "").strip()
    if override.startswith("{"):
        try:
            section = json.loads(override)
        except ValueError as error:
            raise InputError(
                f"{VARIABLE} is not valid JSON: {error}", 'e.g. {"stages": {"adapter": {"on": "ray", "gpus": 1}}}'
            ) from None
        found = _parse(section, VARIABLE, values, stages, variants_of)
    elif override in {"", "local", "ray", WORKER}:
        found = parse(values, stages, variants_of)
    else:
        raise InputError(
            f"{VARIABLE}={override}: must be local, ray, or a section `execution` as JSON",
            f"unset {VARIABLE}, or correct it; in a run of Dagster it comes from `on` in the run configuration, or the"
            " run tag pedigree/on",
        )
    entry = found.stages.get(address) or found.stages.get(address.partition("@")[0]) or Placement()
    if override == WORKER:
        entry = entry.model_copy(update={"workers": int(environment.get(WORKERS, 1))})
    on = {"local": "local", WORKER: "local", "ray": "ray"}.get(override)
    return found, entry if on is None else entry.model_copy(update={"on": on})
