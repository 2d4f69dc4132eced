"""What dvc.yaml lists as the inputs of each adapter, where some are merged of others.

DVC's loop over `adapter` gives every variant the same dependencies. With `merge_of` it lists them for each variant
(`reads`); `pedigree pipeline` writes that list (docs/decisions/049).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError

BASE_MODEL, ADAPTER = "data/base_model", "data/adapter"
READS = "reads"
"""Key of a variant in the loop of dvc.yaml: what it reads."""
WRITE = "`pedigree pipeline` writes into dvc.yaml what each adapter reads"


def parents_of(adapters: Mapping[str, Any], name: str) -> list[str]:
    """The adapters that an entry of params.yaml names in `merge_of`; empty for one that is trained."""
    entry = adapters.get(name)
    found = entry.get("merge_of") if isinstance(entry, Mapping) else None
    return list(map(str, found)) if isinstance(found, Mapping) else []


def reads_of_merge(parents: list[str]) -> list[str]:
    """What the stage of a merged adapter reads."""
    return [BASE_MODEL, *(f"{ADAPTER}/{parent}" for parent in parents)]


def refuse_other_reads(root: Path, name: str, adapters: Mapping[str, Any]) -> None:
    """Compare dvc.yaml with params.yaml.

    A merged adapter must be made after those that it is merged of, and again when they change.

    Raises:
        InputError: dvc.yaml does not list an adapter, lists one that params.yaml does not have, or lists other inputs.
    """
    if not (root / "dvc.yaml").is_file():
        return
    listed, parents = listed_reads(root), parents_of(adapters, name)
    if listed is None:
        if parents:
            raise InputError(f"dvc.yaml: adapter@{name} does not read {', '.join(reads_of_merge(parents)[1:])}", WRITE)
        return
    if differing := sorted(listed.keys() ^ adapters.keys()):
        one = differing[0]
        what = f"lists adapter.{one}, which params.yaml does not have"
        if one in adapters:
            what = f"does not list adapter.{one} of params.yaml"
        raise InputError(f"dvc.yaml: the stage adapter {what}", WRITE)
    merged = {path for path in listed[name] if path.startswith(f"{ADAPTER}/")}
    if merged != set(reads_of_merge(parents)[1:]):
        expected = f"merged of {', '.join(parents)}" if parents else "trained"
        problem = f"adapter.{name} is {expected}, and its stage reads {', '.join(listed[name])}"
        raise InputError(f"dvc.yaml: {problem}", WRITE)


def listed_reads(root: Path) -> dict[str, list[str]] | None:
    """Variant -> what the loop of dvc.yaml lists for it; None if it lists nothing."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = (root / "dvc.yaml").read_text(encoding="utf-8", errors="replace")
    # parsing takes a tenth of a second, and each process validates all of params.yaml
    if "\n  adapter:\n    foreach: ${" in text:
        return None
    try:
        items = YAML(typ="safe").load(text)["stages"]["adapter"]["foreach"]
    except (YAMLError, KeyError, TypeError):  # DVC says what is wrong with it
        return None
    if not isinstance(items, dict) or not all(isinstance(item, dict) and READS in item for item in items.values()):
        return None
    return {str(name): list(item[READS]) for name, item in items.items()}
