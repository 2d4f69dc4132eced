"""Columns with numbers of named classes (`ClassLabel` of Hugging Face `datasets`) -> the names.

The names are in the metadata of a Parquet or Arrow file, or next to it: in the `dataset_info.json` of a saved data set,
or in the README of a repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.core.text import shortened

Labels = Mapping[str, Any]
"""Column -> its classes: a tuple of names; or, at any depth, {key: classes} of an object and [classes] of a list."""
README = "README.md"
MAX_README = 2**20


def of_metadata(metadata: Mapping[bytes, bytes] | None) -> Labels | None:
    """Classes in the metadata of an Arrow schema; None if `datasets` did not write it."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (LookupError, TypeError, ValueError):
        return None
    return of_features(features) if isinstance(features, dict) else None


def of_features(features: Mapping[str, Any]) -> Labels:
    """Args:
    features: `Features.to_dict()`, as in `dataset_info.json`.
    """
    found = {name: _of_feature(feature) for name, feature in features.items()}
    return {name: one for name, one in found.items() if one}


def _of_feature(feature: Any) -> Any:
    """Classes of a feature; None if there are none in it."""
    if isinstance(feature, list):
        return [one] if feature and (one := _of_feature(feature[0])) else None
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if not isinstance(kind, str):
        return of_features(feature) or None
    if kind == "ClassLabel":
        return tuple(map(str, feature.get("names") or ())) or None
    one = _of_feature(feature.get("feature"))
    if kind == "Sequence" and isinstance(one, dict):  # stored as an object of lists
        return {name: [inner] for name, inner in one.items()}
    return [one] if one else None


class FolderLabels:
    """Classes that files next to the data of a folder declare."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cards: dict[Path, Mapping[str, Any]] = {}

    def of(self, name: str) -> Labels:
        """Classes in the columns of a file, which has none in its own metadata.

        Args:
            name: path relative to the folder.
        Raises:
            InputError: configurations of a README give a column of the file different classes.
        """
        place = (self._folder / name).parent
        if (place / "state.json").is_file():
            saved = _object(place / "dataset_info.json")
            if isinstance(features := saved.get("features"), dict):
                return of_features(features)
        while place != self._folder and not (place / README).is_file():
            place = place.parent
        return self._of_card(place, (self._folder / name).relative_to(place).as_posix())

    def _of_card(self, place: Path, name: str) -> Labels:
        if place not in self._cards:
            self._cards[place] = _card(place / README)
        card = self._cards[place]
        infos = card.get("dataset_info")
        found: dict[str, Any] = {}
        for info in _of_file(infos if isinstance(infos, list) else [infos], card.get("configs"), name):
            for column, classes in (_of_yaml(info.get("features")) or {}).items():
                if found.setdefault(column, classes) != classes:
                    what = f"{place.name}/{README}: column {column!r} of {name} has different classes in dataset_info"
                    raise InputError(what, "name the files of each configuration under `configs`, as on the Hub")
        return found


def _of_file(infos: Sequence[Any], configs: Any, name: str) -> list[dict[str, Any]]:
    """The entries of `dataset_info` that can describe a file: of its configuration, by the patterns under `configs`
    or else by its folder; of all if neither names it."""
    known = [info for info in infos if isinstance(info, dict)]
    named = {config.get("config_name") for config in configs or () if _includes(config, name)}
    parts = set(PurePosixPath(name).parts[:-1])
    of_pattern = [info for info in known if info.get("config_name", "default") in named]
    return of_pattern or [info for info in known if info.get("config_name") in parts] or known


def _includes(config: Any, name: str) -> bool:
    return isinstance(config, dict) and any(fnmatch(name, path) for path in _patterns(config.get("data_files")))


def _patterns(files: Any) -> Iterator[str]:
    """ "a.csv", ["a.csv"] or [{"split": "train", "path": "a.csv"}]  ->  "a.csv" """
    if isinstance(files, str):
        yield files
    elif isinstance(files, list):
        for one in files:
            yield from _patterns(one)
    elif isinstance(files, dict):
        yield from _patterns(files.get("path"))


def _of_yaml(features: Any) -> Any:
    """Classes of features as a README has them: [{"name": "label", "dtype": {"class_label": {"names": ...}}}]"""
    if isinstance(features, list):
        columns = {one["name"]: _of_yaml(one) for one in features if isinstance(one, dict) and "name" in one}
        return {name: classes for name, classes in columns.items() if classes} or None
    if not isinstance(features, dict):
        return None
    if isinstance(names := (features.get("class_label") or {}).get("names"), dict | list):
        numbered = names if isinstance(names, list) else [names[key] for key in sorted(names, key=int)]
        return tuple(map(str, numbered))
    inner = _of_yaml(features.get("list"))
    if (classes := _of_yaml(features.get("sequence"))) is not None:
        is_object = isinstance(features["sequence"], list)
        return {name: [one] for name, one in classes.items()} if is_object else [classes]
    return [inner] if inner else _of_yaml(features.get("struct")) or _of_yaml(features.get("dtype"))


def _card(path: Path) -> Mapping[str, Any]:
    """The YAML header of a README; empty if there is none.

    Raises:
        InputError: it names classes and cannot be read.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = path.read_text("utf-8") if path.is_file() and path.stat().st_size <= MAX_README else ""
    except (OSError, ValueError):
        return {}
    header = re.match(r"---\r?\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if not header or "class_label" not in header[1]:
        return {}
    try:
        value = YAML(typ="safe").load(header[1])
    except (YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{path.parent.name}/{README}: the header is not valid YAML: {shortened(str(error))}"
        raise InputError(what, "fix it: its dataset_info has the names of classes") from None
    return value if isinstance(value, dict) else {}


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def named(value: Any, classes: Any) -> Any:
    """A value with names instead of numbers of classes: 1 of ("neg", "pos")  ->  "pos"

    None for a negative number, which in `datasets` is a missing label. Names are unchanged.

    Raises:
        ValueError: there is no such class.
    """
    if value is None or value == "":
        return value
    if isinstance(classes, list):
        return [named(one, classes[0]) for one in value] if isinstance(value, list) else value
    if isinstance(classes, Mapping):
        if not isinstance(value, dict):
            return value
        return {key: named(one, classes[key]) if key in classes else one for key, one in value.items()}
    if value in classes:
        return value
    number = len(classes)
    if isinstance(value, int | float | str):
        with suppress(ValueError, OverflowError):  # a CSV file has numbers as text
            number = int(value)
    if number >= len(classes) or (isinstance(value, float) and number != value):
        raise ValueError(f"{shortened(str(value))} is none of the {len(classes)} classes of the data set")
    return classes[number] if number >= 0 else None
