"""code.lock.yaml: the code that the stages of a project run with, where the
package is installed and not part of the project.

One hash for each stage, over the files of the package that the stage imports. dvc.yaml reads the entry of each stage as
a parameter, so that a new version makes exactly the stages stale whose code it changes (docs/decisions/029). A clone
has no such file: its stages depend on its own files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dagster_project import __version__
from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.core.hashing import sha256_of_file, sha256_of_text
from dagster_project.core.layout import is_code
from dagster_project.lineage.notes import parsed_yaml

FILE = "code.lock.yaml"
DISTRIBUTION = "pedigree-llm"
VERSION, PIPELINE = "version", "pipeline"
"""Keys of the file other than stages: the installed version, and the sha256 of dvc.yaml as it was written."""
PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATE_NAME = "pipeline_template.yaml"
"""dvc.yaml of the clone, which `make docs` copies into the package."""
TEMPLATE = PACKAGE / TEMPLATE_NAME
HEADER = f"""\
# The code that the stages run with: one hash for each stage, over the files of {DISTRIBUTION} that it uses. Keep this \
file in git.
# Written by `pedigree upgrade`, and not by hand: a stage runs only with the code recorded here. The version is for \
information only.
"""
UPGRADE = "`pedigree upgrade` records the installed code and lists the stages that become stale"


@dataclass(frozen=True)
class CodeLock:
    """Content of code.lock.yaml."""

    version: str
    stages: Mapping[str, str]
    """Stage -> sha256 of its code."""
    pipeline: str = ""
    """sha256 of dvc.yaml as `pedigree init` or `pedigree upgrade` wrote it."""

    def text(self) -> str:
        lines = [
            f"{VERSION}: '{self.version}'",
            f"{PIPELINE}: '{self.pipeline}'",
            *(f"{name}: '{value}'" for name, value in self.stages.items()),
        ]
        return HEADER + "".join(f"{line}\n" for line in lines)


@cache
def template_stages(package: Path = PACKAGE) -> Mapping[str, Mapping[str, Any]]:
    """Stages of the clone's dvc.yaml; of a stage with variants, the definition of one variant."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load((package / TEMPLATE_NAME).read_text(encoding="utf-8"))["stages"]
    return {name: body.get("do", body) for name, body in stages.items()}


def code_of_stages(package: Path = PACKAGE) -> dict[str, list[str]]:
    """Stage -> the files and folders of the package that it uses, relative to the folder of the package's parent."""
    return {name: [dep for dep in stage["deps"] if is_code(dep)] for name, stage in template_stages(package).items()}


def installed(stages: Iterable[str] | None = None, package: Path = PACKAGE) -> dict[str, str]:
    """sha256 of the installed code of each stage: over lines "<sha256 of file>
    <path>", in the order of the paths, without Python's caches.

    Args:
        stages: names without variants; None: all stages.
        package: folder of the package; also that of another version, which is read and not imported.
    """
    hashes: dict[Path, str] = {}

    def line(path: Path) -> str:
        if path not in hashes:
            hashes[path] = sha256_of_file(path)
        return f"{hashes[path]} {path.relative_to(package.parent).as_posix()}\n"

    entries = code_of_stages(package)
    return {
        name: sha256_of_text(
            "".join(
                line(path)
                for path in sorted({file for entry in entries[name] for file in _files(package.parent / entry)})
            )
        )
        for name in (entries if stages is None else stages)
    }


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    return [
        path
        for path in place.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    ]


def is_used(root: Path) -> bool:
    """Whether the stages of a project depend on code.lock.yaml, i.e. the project is not a clone of the package."""
    try:
        return FILE.encode() in (root / "dvc.yaml").read_bytes()  # which may not be UTF-8: DVC says so
    except OSError:
        return False


def parse(content: str) -> CodeLock | None:
    """The content of a code.lock.yaml; None if it is invalid."""
    values = parsed_yaml(content)
    if values is None or not all(isinstance(one, str) for item in values.items() for one in item):
        return None
    stages = {name: value for name, value in values.items() if name not in {VERSION, PIPELINE}}
    return CodeLock(values.get(VERSION, "unknown"), stages, values.get(PIPELINE, ""))


def read(root: Path) -> CodeLock:
    """The recorded code of a project.

    Raises:
        InputError: the file is missing or invalid.
    """
    path = root / FILE
    try:
        found = parse(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        raise InputError(
            f"{FILE} is missing: the code of the stages is not recorded", f"`git checkout {FILE}`, or {UPGRADE}"
        ) from None
    if found is None:
        raise InputError(f"{FILE} is invalid: it must map stages to hashes", f"`git checkout {FILE}`, or {UPGRADE}")
    return found


def record(root: Path, stages: Mapping[str, str]) -> None:
    """Replace the entries of some stages in a project's code.lock.yaml."""
    lock = parse((root / FILE).read_text(encoding="utf-8")) if (root / FILE).is_file() else None
    lock = lock or CodeLock("unknown", {})
    (root / FILE).write_text(replace(lock, stages={**lock.stages, **stages}).text(), encoding="utf-8")


def refuse_other_code(root: Path, stages: Iterable[str] | None = None) -> None:
    """Check that the installed code of stages is the recorded one. A clone passes: its code is part of its files.

    Args:
        stages: names without variants; None: all stages.
    Raises:
        InputError: the code of one of these stages differs, or code.lock.yaml is missing or invalid.
    """
    if not is_used(root):
        return
    recorded, now = read(root), installed()
    differing = [name for name, value in now.items() if recorded.stages.get(name) != value]
    if not set(differing) & set(now if stages is None else stages):
        return
    versions = (
        f"{DISTRIBUTION} {__version__} is installed, {recorded.version} is recorded"
        if __version__ != recorded.version
        else f"both are version {__version__}"
    )
    raise InputError(
        f"the installed code of {', '.join(differing)} is not that of {FILE} ({versions})",
        f"{UPGRADE}; or install {DISTRIBUTION} {recorded.version} again",
    )


def recorded_in(entry: Mapping[str, Any]) -> dict[str, str]:
    """{stage: sha256 of its code} in a stage's entry of dvc.lock; empty in a clone."""
    return dict((entry.get("params") or {}).get(FILE) or {})


def compare(root: Path, recorded: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The recorded code of stages, with the version that has it, against the installed code.

    Args:
        recorded: name -> `recorded_in` its entry of dvc.lock.
    Returns:
        {"installed": version, "stages": {name: {"sha256", "version"}}, "differs": names}; a version is None if no
        code.lock.yaml in the workspace or the git history has the hash.
    """
    now = installed()
    entries = {name: (stage, value) for name, entry in recorded.items() for stage, value in entry.items()}
    versions = _versions(root, set(entries.values()))
    return {
        "installed": __version__,
        "stages": {name: {"sha256": entry[1], "version": versions.get(entry)} for name, entry in entries.items()},
        "differs": [name for name, (stage, value) in entries.items() if now.get(stage) != value],
    }


def _versions(root: Path, entries: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The version recorded with each (stage, hash): in the workspace, or in the latest commit that has it."""
    found: dict[tuple[str, str], str] = {}
    for lock in _locks(root) if entries else ():
        found.update({entry: lock.version for entry in entries - found.keys() if lock.stages.get(entry[0]) == entry[1]})
        if not entries - found.keys():
            break
    return found


def version_with(root: Path, entries: Mapping[str, str], preferred: str | None = None) -> str | None:
    """The version whose code several stages were made with; None if no recorded version has all of these hashes.

    Args:
        entries: stage -> sha256 of its code.
        preferred: text of a code.lock.yaml, whose version is returned if it has the hashes.
    """
    first = parse(preferred) if preferred else None
    for lock in (*([first] if first else []), *_locks(root)):
        if entries.items() <= dict(lock.stages).items():
            return lock.version
    return None


def _locks(root: Path) -> Iterator[CodeLock]:
    """code.lock.yaml in the workspace, then at each commit that changed it, of any branch or tag, latest first."""
    texts = [(root / FILE).read_text(encoding="utf-8", errors="replace")] if (root / FILE).is_file() else []
    yield from filter(None, map(parse, texts))
    for commit in (git(root, "log", "--all", "--full-history", "--no-follow", "--format=%H", "--", FILE) or "").split():
        if lock := parse(git(root, "show", f"{commit}:./{FILE}") or ""):
            yield lock


def as_text(facts: Mapping[str, Any]) -> str:
    """`compare` in one line."""
    versions = sorted({stage["version"] or "of unknown version" for stage in facts["stages"].values()})
    differs = facts["differs"]
    now = f"differs for {', '.join(differs)}" if differs else "is the same"
    return f"{DISTRIBUTION} {', '.join(versions)}; the installed code ({facts['installed']}) {now}"


def refuse_to_verify(root: Path, recorded: Mapping[str, Mapping[str, str]]) -> None:
    """Check that the installed code of stages is that which their entries of dvc.lock record.

    Args:
        recorded: address -> `recorded_in` its entry.
    Raises:
        InputError: it differs.
    """
    if not any(recorded.values()) or not (facts := compare(root, recorded))["differs"]:
        return
    stages = {name: facts["stages"][name]["version"] for name in facts["differs"]}
    wanted = sorted({version for version in stages.values() if version not in {None, facts["installed"]}})
    what = ", ".join(f"{name} ({DISTRIBUTION} {version or 'of unknown version'})" for name, version in stages.items())
    raise InputError(
        f"made by other code than the installed {DISTRIBUTION} {facts['installed']}: {what}",
        (
            "install the version that made it, in a separate environment, and verify there:"
            f" `pip install {DISTRIBUTION}=={wanted[0]}`; --install does both"
            if wanted
            else "install the build that made it; a stage can be verified only with the code recorded for it"
        ),
    )
