"""A split of a data set on the Hugging Face Hub, at one commit -> rows. `datasets` fetches and caches; no code of a data set is run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core.errors import InputError
from dagster_project.curation.sources.files import Row, table_rows
from dagster_project.curation.sources.formats import canonical_split

NEXT = (
    "check the name, the revision, the network and, for a gated data set, HF_TOKEN; "
    "rows that `datasets` cannot read can be saved as a file in data/sources/"
)


@dataclass(frozen=True)
class HubSplit:
    """Rows that stay the same for ever: a branch may move, a commit cannot."""

    hub: str
    """org/name."""
    revision: str
    """The commit, 40 hex digits."""
    split: str
    config: str | None = None

    @property
    def name(self) -> str:
        """The `source` of its rows: hub:org/name@0123456789ab/train, or hub:org/name@0123456789ab/config/train."""
        return "/".join(["hub:" + self.hub + "@" + self.revision[:12], *([self.config] if self.config else []), self.split])

    @property
    def problem(self) -> str:
        """What is wrong with how it is named, or nothing."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.hub, re.ASCII) or ".." in self.hub:
            return f"{self.hub!r} is no data set of the Hub: write org/name"
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return f"revision {self.revision!r} is no commit: 40 hex digits are needed, since branches and tags move"
        if not re.fullmatch(r"\w+(\.\w+)*", self.split):
            return f"split {self.split!r} is no split's name: write train, for instance"
        if self.config is not None and (not re.fullmatch(r"[^<>:/\\|?*\0-\x1f]+", self.config) or self.config.startswith(".")):
            return f"config {self.config!r} is no configuration's name"
        return ""


def read_split(source: HubSplit) -> list[Row]:
    """The rows, from the cache (HF_HOME) or from the Hub. What was fetched once needs no network: a commit does not change.

    Raises:
        InputError: no such data set, commit, configuration or split; no access; no network; nothing that is read as rows of text.
    """
    import datasets
    import huggingface_hub
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub.errors import HTTPError  # of the library that carries the requests
    from huggingface_hub.utils import disable_progress_bars

    if source.problem:
        raise InputError(f"{source.name}: {source.problem}", "hub:org/name@REVISION:split")
    datasets.disable_progress_bars()
    disable_progress_bars()
    datasets.logging.set_verbosity_error()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # they would tell a third place what is read here
    # A folder per commit and configuration, since `datasets` takes the newest of what a folder holds.
    cache = Path(datasets.config.HF_DATASETS_CACHE, "pedigree", source.hub.replace("/", "___"), source.revision)
    cache /= f"config {source.config}" if source.config else "any"
    try:
        if any(cache.glob(f"*/*/*/{source.revision}")):
            name = source.hub.partition("/")[2]
            builder = Cache(cache_dir=str(cache), repo_id=source.hub, dataset_name=name, version="auto", hash="auto")
        else:
            place = f"hf://datasets/{source.hub}"  # without hf:// a folder of that name would be taken
            builder = datasets.load_dataset_builder(place, name=source.config, revision=source.revision, cache_dir=str(cache))
        _pinned(source, builder)
        builder.download_and_prepare()
        if source.split not in builder.info.splits:
            raise InputError(f"{source.name}: there is no split {source.split!r}", f"splits: {', '.join(builder.info.splits)}")
        found = builder.as_dataset(source.split)
    except StopIteration:  # all that `datasets` says of an empty file
        raise InputError(f"{source.name}: the data set is empty, or its first file is", "name another split or data set") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, HTTPError) as error:
        raise InputError(f"{source.name}: {_plainly(error, huggingface_hub.get_token())}", NEXT) from None
    if media := {name: kind for name, feature in found.features.items() for kind in _kinds(feature) - TEXTUAL}:
        told = ", ".join(f"{name} ({kind})" for name, kind in media.items())
        raise InputError(f"{source.name}: columns that hold no text: {told}", "save the other columns as a file in data/sources/")
    rows = table_rows(found.with_format("arrow").iter(1024), _decoder(found.features))
    if not rows:
        raise InputError(f"{source.name}: the split is empty", "name another split")
    return rows


def _pinned(source: HubSplit, builder: Any) -> None:
    """The commit asked for, and no file from elsewhere: a data set's card may name any address, whose content can change."""
    if builder.hash != source.revision:
        raise InputError(f"{source.name}: the Hub gave commit {builder.hash}", "name the commit that you want")
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    if strange := [file for file in files if not file.startswith(f"hf://datasets/{source.hub}@{source.revision}/")]:
        raise InputError(
            f"{source.name}: takes rows from outside of its commit: {strange[0]}", "copy them to data/sources/ if you trust them"
        )


TEXTUAL = frozenset({"Value", "ClassLabel", "Json", "Translation", "TranslationVariableLanguages"})


def _kinds(feature: Any) -> set[str]:
    """The kinds of value in a column, however deep."""
    if isinstance(feature, Mapping):
        return {kind for inner in feature.values() for kind in _kinds(inner)}
    if isinstance(feature, list):
        return {kind for inner in feature for kind in _kinds(inner)}
    return _kinds(feature.feature) if hasattr(feature, "feature") else {type(feature).__name__}


def _decoder(features: Any) -> Any:
    """Labels by their names, and JSON that is stored as text as what it says. None where a row has neither."""
    names = {name: feature.names for name, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    stored = any("Json" in _kinds(feature) for feature in features.values())

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        row = features.decode_example(row) if stored else row
        return {key: names[key][value] if key in names and value is not None and value >= 0 else value for key, value in row.items()}

    return decode if names or stored else None


def _plainly(error: BaseException, token: str | None) -> str:
    """One line that shows no token and no password of an address."""
    told = str(error.__cause__ or error) if "while generating" in str(error) else str(error)
    told = told.rpartition(" on the Hugging Face Hub either: ")[2]
    line = next((line for line in map(str.strip, told.splitlines()) if line), type(error).__name__)
    line = re.sub(r"//[^/@\s]+@", "//", re.sub(r"\bhf_\w+", "[token]", line))
    return (line.replace(token, "[token]") if token else line)[:300]


def sha256_of_rows(rows: Iterable[Row]) -> str:
    """Over the rows as JSON lines, keys sorted; a row that cannot be read counts as its problem."""
    digest = hashlib.sha256()
    encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode
    for row in rows:
        digest.update(encode(row.value if row.value is not None else row.problem).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def held_out_label(source: HubSplit) -> str | None:
    """The label of its rows. Those who made the set held out its test and validation splits; its train split may be split like any file."""
    label = canonical_split(source.split)
    return None if label == "train" else label


SPEC = re.compile(r"hub:(?P<hub>[^@:]*)@(?P<revision>[^:]*):(?:(?P<config>[^:]*):)?(?P<split>[^:]*)")


def parse_spec(spec: str) -> HubSplit | None:
    """ "hub:org/name@REVISION:split" or "hub:org/name@REVISION:config:split"; None for anything that does not begin with "hub:".

    Raises:
        InputError: what begins so but names no split of a commit.
    """
    if not spec.startswith("hub:"):
        return None
    found = SPEC.fullmatch(spec)
    source = HubSplit(**found.groupdict()) if found else None
    if source is None or source.problem:
        raise InputError(f"{spec}: {source.problem if source else 'no split of a data set'}", "write hub:org/name@REVISION:split")
    return source
