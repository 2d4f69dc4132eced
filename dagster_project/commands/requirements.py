"""What another version of the package requires, and which of it the current environment does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dagster_project.commands.extras import PACKAGES
from dagster_project.orchestration.machine import named


def versions_in(folders: Iterable[str]) -> dict[str, str]:
    """Normalized name -> version of the distributions in folders; the first one of a name counts, as for Python."""
    found: dict[str, str] = {}
    for one in named(distributions(path=list(folders))):
        found.setdefault(canonicalize_name(one.name), one.version)
    return found


@dataclass(frozen=True)
class Wheel:
    """Name and requirements of an installed distribution."""

    name: str
    requires: Sequence[Requirement]

    @classmethod
    def read(cls, folder: Path, name: str) -> Wheel:
        """The distribution of this name in a folder."""
        [one] = [found for found in named(distributions(path=[str(folder)])) if canonicalize_name(found.name) == name]
        return cls(name, [Requirement(text) for text in one.requires or ()])

    def needed(self, present: Mapping[str, str], exact: Mapping[str, str]) -> list[str]:
        """Requirements that an environment does not meet: of the core, of
        `pipeline`, and of the extras whose libraries it has in any version.

        Args:
            present: version by normalized name.
            exact: library -> the version to have instead of what is required.
        """
        extras = ["pipeline", *(extra for extra in PACKAGES if self._has(extra, present))]
        needed = {
            name: f"{name}=={version}"
            for name, version in exact.items()
            if present.get(canonicalize_name(name)) != version
        }
        for one in self.requires:
            name = canonicalize_name(one.name)
            if name == self.name or name in exact or not _applies(one, ["", *extras]):
                continue
            if name not in present or not one.specifier.contains(present[name], prereleases=True):
                needed[name] = str(one).partition(";")[0].strip()
        return list(needed.values())

    def constraints(self, present: Mapping[str, str], needed: Iterable[str]) -> list[str]:
        """Lines of a constraints file: every other library keeps its version."""
        replaced = {self.name, *(canonicalize_name(Requirement(one).name) for one in needed)}
        return [f"{name}=={version}" for name, version in present.items() if name not in replaced]

    def _has(self, extra: str, present: Mapping[str, str]) -> bool:
        own = [one for one in self.requires if one.marker and _applies(one, [extra]) and not _applies(one, [""])]
        libraries = [canonicalize_name(one.name) for one in own if canonicalize_name(one.name) != self.name]
        return bool(libraries) and all(name in present for name in libraries)


def _applies(requirement: Requirement, extras: Sequence[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
