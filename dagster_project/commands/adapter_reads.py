"""`pedigree pipeline`: writes into dvc.yaml what each adapter reads, where params.yaml merges some of others.

DVC's loop gives all variants of a stage the same number of dependencies. So the loop lists the paths of each variant,
`reads`, and a shorter list repeats its last path, which changes nothing (docs/decisions/049).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from dagster_project.commands.new_project import flow
from dagster_project.core import params
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.layout import is_code
from dagster_project.core.records import write_text
from dagster_project.lineage import code_lock
from dagster_project.training.trainers.merging.reads import ADAPTER, READS, parents_of, reads_of_merge
from dagster_project.views.texts import text

LOOP = "foreach: ${adapter}"
COMMENT = "# what each variant reads, written by `pedigree pipeline`: some are merged of others"
NOT_A_LOOP = (
    "dvc.yaml: the stage `adapter` is not a loop as Pedigree writes it",
    "compare with the dvc.yaml that `pedigree init` writes",
)
WIDTH = 118
_STAGE = re.compile(r"^  adapter:\n(?:(?:    .*)?\n)+", re.MULTILINE)
_HEAD = re.compile(r"(?<=^  adapter:\n)(?:.*\n)*?(?=    do:)", re.MULTILINE)
_DEPS = re.compile(r"^      deps:.*\n(?:        .*\n)*", re.MULTILINE)


def write_reads(root: Path) -> dict[str, Any]:
    """Write dvc.yaml, unless it already lists what params.yaml needs.

    Returns:
        {"changed", "adapters": {name: what it reads}}; empty if none is merged of others.
    Raises:
        InputError: an entry that merges is wrong, or the stage `adapter` of
            dvc.yaml has not the form that Pedigree writes.
    """
    adapters, path = _checked(params.read(root)), root / "dvc.yaml"
    try:
        before = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"dvc.yaml: not UTF-8: {error}", "see `git diff dvc.yaml`") from None
    text = listed(before, adapters)
    if text != before:
        write_with_its_line_ends(path, text)
        _record_as_written(root, before, text)
    return {
        "changed": text != before,
        "adapters": _reads(_trained_reads(_stage(text)), adapters) if _has_merges(adapters) else {},
    }


def write_with_its_line_ends(path: Path, text: str) -> None:
    """Write a new text of a file, with the line ends of its first line."""
    with path.open("rb") as file:
        ends_in_crlf = file.readline().endswith(b"\r\n")
    write_text(path, text.replace("\n", "\r\n") if ends_in_crlf else text)


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section `adapter` of params.yaml.

    Raises:
        InputError: a name, or an entry that merges, is wrong. What it names
            would be written into dvc.yaml, which DVC then could not read.
    """
    from dagster_project.training.trainers.harness.params import AdapterParams
    from dagster_project.training.trainers.merging.entry import check_merge

    params.variant_names(values, "adapter", required=True)
    adapters: dict[str, Any] = values["adapter"]
    for name, entry in adapters.items():
        if isinstance(entry, Mapping) and entry.get("merge_of") is not None:
            check_merge(params.parse(AdapterParams, entry, f"adapter.{name}"), adapters, f"adapter.{name}")
    return adapters


def _record_as_written(root: Path, before: str, text: str) -> None:
    """In a project with an installed package, dvc.yaml is still the one that
    Pedigree wrote, so that `pedigree upgrade` replaces it."""
    if not code_lock.is_used(root) or not (root / code_lock.FILE).is_file():
        return
    lock = code_lock.read(root)
    if lock.pipeline == sha256_of_text(before):
        write_text(root / code_lock.FILE, replace(lock, pipeline=sha256_of_text(text)).text())


def listed(text: str, adapters: Mapping[str, Any]) -> str:
    """dvc.yaml whose stage `adapter` lists what each variant reads; without a list if none is merged of others.

    Args:
        adapters: the section of params.yaml.
    """
    stage = _stage(text)
    if not _has_merges(adapters) and LOOP in stage:
        return text
    before, trained = _parsed(stage), _trained_reads(stage)
    code = [dep for dep in before["do"]["deps"] if is_code(dep)]
    if _has_merges(adapters):
        reads = _reads(trained, adapters)
        slots = max(map(len, reads.values()))
        items: Any = {name: {READS: paths + paths[-1:] * (slots - len(paths))} for name, paths in reads.items()}
        lines = [f"      {flow(name)}: {flow(item)}" for name, item in items.items()]
        head = "\n".join([f"    {COMMENT}", "    foreach:", *lines])
        paths = [f"${{item.{READS}[{number}]}}" for number in range(slots)]
    else:
        head, items, paths = f"    {LOOP}", LOOP.removeprefix("foreach: "), trained
    new = _HEAD.sub(lambda _: f"{head}\n", stage, count=1)
    new = _DEPS.sub(
        lambda _: _wrapped([*(f'"{path}"' if "$" in path else path for path in paths), *code]), new, count=1
    )
    try:
        as_meant = _parsed(new) == {**before, "foreach": items, "do": {**before["do"], "deps": [*paths, *code]}}
    except RecursionError:  # another key of the stage is nested too deep
        as_meant = False
    if not as_meant:
        raise InputError(*NOT_A_LOOP)
    return text.replace(stage, new, 1)


def _has_merges(adapters: Mapping[str, Any]) -> bool:
    return any(parents_of(adapters, name) for name in adapters)


def _reads(trained: Sequence[str], adapters: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        name: reads_of_merge(parents) if (parents := parents_of(adapters, name)) else list(trained) for name in adapters
    }


def _stage(text: str) -> str:
    """The text of the stage `adapter`."""
    found = _STAGE.search(text)
    if not found or not _HEAD.search(found[0]) or not _DEPS.search(found[0]):
        raise InputError(*NOT_A_LOOP)
    return found[0]


def _parsed(stage: str) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        parsed = dict(YAML(typ="safe").load(stage)["adapter"])
    except (YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"dvc.yaml: the stage `adapter` cannot be read: {' '.join(str(error).split())[:200]}",
            "see `git diff dvc.yaml`",
        ) from None
    items, body = parsed.get("foreach"), parsed.get("do")
    lists: list[Any] = (
        [item.get(READS) if isinstance(item, dict) else None for item in items.values()]
        if isinstance(items, dict)
        else [[items]]
    )
    lists.append(body.get("deps") if isinstance(body, dict) else None)
    if not all(isinstance(one, list) and one and all(isinstance(path, str) for path in one) for one in lists):
        raise InputError(*NOT_A_LOOP)
    return parsed


def _trained_reads(stage: str) -> list[str]:
    """What a trained adapter reads, apart from code: as listed already, or else by the dependencies of the loop."""
    parsed = _parsed(stage)
    items = parsed["foreach"]
    if isinstance(items, dict):
        lists = [list(dict.fromkeys(item[READS])) for item in items.values()]
        if found := [reads for reads in lists if not any(path.startswith(f"{ADAPTER}/") for path in reads)]:
            return found[0]
    return [dep for dep in parsed["do"]["deps"] if not is_code(dep) and "${item" not in dep]


def _wrapped(deps: Sequence[str]) -> str:
    lines = wrap(
        f"deps: [{', '.join(deps)}]", WIDTH - 6, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "".join(f"      {line}\n" for line in lines)


def as_text(document: Mapping[str, Any]) -> str:
    """For the terminal."""
    return text("adapter_reads", **document)
