"""A DVC project as Dagster shows it: its folder, the names of its assets, and
the hooks that a pipeline of its own overrides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg

from dagster_project.core.errors import InputError
from dagster_project.orchestration import dvc
from dagster_project.orchestration.dagster_dvc import keys, metadata
from dagster_project.orchestration.dagster_dvc.failure import StageFailure
from dagster_project.orchestration.dagster_home import claim
from dagster_project.orchestration.dvc import StageState

FORCE_TAG = "pedigree/force"
"""Tag of a run: run all of its stages, even if nothing changed."""
CODE_SUFFIXES = {".py", ".sh", ".r", ".R", ".jl", ".ipynb", ".sql"}
NAME = "[A-Za-z0-9_]+"


def _is(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


META: dict[str, tuple[Callable[[Any], bool], str]] = {
    "group": (
        lambda value: _is(f"{NAME}(/{NAME})*", value),
        "a name of letters, digits and _, or several of them separated by /",
    ),
    "kinds": (
        lambda value: isinstance(value, list) and all(_is("[A-Za-z0-9_.-]{1,63}", kind) for kind in value),
        "a list of names of letters, digits, _, - and .",
    ),
    "pool": (lambda value: _is(r"\S+", value), "a name without spaces"),
    "stale_after_days": (
        lambda value: type(value) in {int, float} and 0.001 <= value <= 100_000,
        "a number of days, 0.001 or more",
    ),
    "checks": (
        lambda value: (
            isinstance(value, Mapping)
            and all(_is(NAME, name) and isinstance(text, str) for name, text in value.items())
            and metadata.IN_SYNC not in value
        ),
        f"a mapping of names (of letters, digits and _; not {metadata.IN_SYNC}) to descriptions",
    ),
}
"""What Dagster reads of `meta` of a stage: whether it can be used, and what it has to be."""


class RunConfig(dg.Config):
    """Configuration of the run of one stage."""

    force: bool = False
    """Run the stage even if nothing changed. The run tag `pedigree/force:
    "true"` does the same for all stages of a run."""


def is_forced(tags: Mapping[str, str]) -> bool:
    """Whether the tags of a run force its stages.

    Raises:
        StageFailure: the tag has another value than true or false.
    """
    value = tags.get(FORCE_TAG, "false").strip().lower()
    if value not in {"true", "false"}:
        raise StageFailure(f"The run tag {FORCE_TAG} is neither true nor false: {tags[FORCE_TAG]!r}.")
    return value == "true"


@dataclass(frozen=True)
class DvcProject:
    """A folder with `.dvc` and `dvc.yaml`.

    Everything that is known of a stage comes from these files; the methods below `Hooks` add to it.
    """

    root: Path
    key_prefix: tuple[str, ...] = ()
    """First parts of all of its asset keys. Its jobs, sensor and groups are named with it, too."""
    group_name: str | None = None
    """Group that contains its groups; default: the prefix."""
    owns_instance: bool = False
    """Whether the Dagster instance and the code location have no other assets."""

    config_type: ClassVar[type[RunConfig]] = RunConfig

    def asset_key(self, address: str) -> dg.AssetKey:
        return keys.asset_key(address, self.key_prefix)

    def definition_key(self, address: str) -> dg.AssetKey:
        """ "train@small" -> def / train / small: command, parameters and code of the stage."""
        return dg.AssetKey([*self.key_prefix, "def", *address.split("@")])

    def source_key(self, path: str) -> dg.AssetKey:
        """ "data/raw.csv" -> workspace / data / raw.csv: a file or folder that no stage writes."""
        return dg.AssetKey([*self.key_prefix, "workspace", *Path(path).parts])

    def address_of(self, key: dg.AssetKey) -> str | None:
        """The stage of an asset; None if it is of another project."""
        if tuple(key.path[: len(self.key_prefix)]) != self.key_prefix:
            return None
        return "@".join(key.path[len(self.key_prefix) :])

    def name(self, name: str) -> str:
        """Name of a job, schedule or sensor."""
        return "_".join([*self.key_prefix, name])

    def group(self, name: str | None) -> str | None:
        """Group with this name in the project's group; None for Dagster's default group."""
        return "/".join(filter(None, [self.group_name or "/".join(self.key_prefix), name])) or None

    def load(self) -> dict[str, StageState]:
        """The state of every stage, for definitions.

        Raises:
            InputError: no DVC project in the folder, a name that Dagster does
                not allow, or invalid dvc.yaml or dvc.lock.
        """
        if not (self.root / ".dvc").is_dir() or not (self.root / "dvc.yaml").is_file():
            raise InputError(
                f"{self.root} is not a DVC project: it has no .dvc or no dvc.yaml",
                "name the folder in which `dvc init` was run",
            )
        self.refuse_names()
        try:
            # nothing that is recorded: a run that starts could neither say that it waits, nor be terminated
            return self.read(wait=False)
        except InputError:
            return self.read()

    def refuse_names(self) -> None:
        """Raises:
        InputError: Dagster does not allow the prefix of keys, or the group.
        """
        for part in [*self.key_prefix, *(() if self.group_name is None else self.group_name.split("/"))]:
            if not _is(NAME, part):
                raise InputError(
                    f"{part!r} cannot be part of a name in Dagster",
                    "use letters, digits and _ in key_prefix and group_name",
                )

    def read(self, wait: bool = True) -> dict[str, StageState]:
        """The state of every stage, in flow order.

        Args:
            wait: see `dvc.read_stages`.
        Raises:
            InputError: invalid dvc.yaml or dvc.lock.
        """
        states = dvc.read_stages(self.root, self.is_definition, wait)
        for address, state in states.items():
            for name, (is_valid, what) in META.items():
                if state.meta.get(name) is not None and not is_valid(state.meta[name]):
                    raise InputError(
                        f"{self.root / 'dvc.yaml'}: {address}: meta.{name} is not {what}",
                        "correct it, or rename the key if another program reads it",
                    )
        return states

    # Hooks

    def is_definition(self, path: str) -> bool:
        """Whether a dependency is part of a stage's definition, like code, and
        not an input that is an asset of its own."""
        return Path(path).suffix in CODE_SUFFIXES

    def group_of(self, address: str, state: StageState) -> str | None:
        """Group of a stage: `meta: {group: NAME}` in dvc.yaml."""
        return self.group(state.meta.get("group"))

    def source_group(self) -> str | None:
        return self.group(None)

    def command_of(self, state: StageState) -> str:
        """The command that runs the stage without Dagster."""
        return f"dvc repro {state.address}"

    def pool_of(self, address: str, state: StageState, variables: Mapping[str, str] | None = None) -> str | None:
        """Pool of a stage: `meta: {pool: NAME}` in dvc.yaml.

        Args:
            variables: environment of the stage command; None: that of this process.
        """
        return state.meta.get("pool")

    def on_cluster(self, address: str, variables: Mapping[str, str]) -> bool:
        """Whether a stage runs on a cluster, where it may have to wait.

        Args:
            variables: environment of the stage command.
        """
        return False

    def check_descriptions(self, address: str, state: StageState) -> Mapping[str, str]:
        """The checks of a stage, each with what it asserts: `meta: {checks: {NAME: DESCRIPTION}}` in dvc.yaml."""
        return state.meta.get("checks") or {}

    def check_results(self, address: str, state: StageState, report: Mapping[str, Any]) -> list[dg.AssetCheckResult]:
        """Results of those checks that the report has: `{"checks": {NAME:
        {"passed": ..., "severity": "error" or "warn", "note": ...}}}`."""
        found = report.get("checks")
        if not isinstance(found, Mapping):
            return []
        results = []
        for name, description in self.check_descriptions(address, state).items():
            if name not in found:
                continue
            check = found[name]
            if not isinstance(check, Mapping) or not isinstance(check.get("passed"), bool):
                check = {
                    "passed": False,
                    "note": f"checks.{name} of {state.report} has no `passed: true` or `passed: false`",
                }
            severity = None if check["passed"] else "warn" if check.get("severity") == "warn" else "error"
            values = {key: value for key, value in check.items() if isinstance(value, int | float | str)}
            extra = {key: value for key, value in values.items() if key not in {"passed", "severity", "note"}}
            results.append(metadata.check_result(self.asset_key(address), name, description, check, severity, extra))
        return results

    def blocks(self, address: str, report: Mapping[str, Any]) -> bool:
        """Whether the report is that of a failed attempt, whose output is not to be used.

        In general such a stage ends with an exit code, and DVC records nothing.
        """
        return False

    def describe(self, state: StageState) -> dict[str, Any]:
        """Metadata of a materialization."""
        return metadata.describe(self.root, state)

    def page_url(self, address: str) -> str | None:
        """Address of the stage's pages."""
        return None

    def definition_metadata(self, address: str) -> dict[str, Any]:
        """Metadata of an asset, known without running it."""
        return {}

    def progress(self, address: str) -> dict[str, float]:
        """Figures of the running stage, e.g. its loss."""
        return {}

    def validate(self, address: str, variables: Mapping[str, str]) -> None:
        """Check parameters before anything runs.

        Args:
            variables: environment of the stage command.
        Raises:
            InputError: invalid parameters.
        """

    def variables(self, config: Any, tags: Mapping[str, str]) -> dict[str, str]:
        """Variables in the environment of the stage command, from the run's configuration and tags."""
        return {}

    def set_tampered_aside(self, states: Iterable[StageState]) -> list[str]:
        """Set aside outputs that are not what was published although DVC reports no change.

        Returns:
            One line for each; then the states are read again.
        """
        return []

    def damaged_report(self, state: StageState) -> str:
        """A line that names the stage's report if it cannot be read, and the next step; empty otherwise."""
        return metadata.damaged_report(self.root, state)

    def before_sync(self, instance: dg.DagsterInstance) -> None:
        """Called by the sensor and by each stage before they report anything.

        Raises:
            InputError: the instance has the assets of another project without a prefix.
        """
        if not self.key_prefix:
            with suppress(OSError):  # its folder is not writable
                claim(Path(instance.root_directory), self.root)
