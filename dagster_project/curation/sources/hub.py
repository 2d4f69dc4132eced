"""A split of a data set on the Hugging Face Hub, at one commit -> rows.

`datasets` downloads and caches; code of data sets is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_project.core import faults
from dagster_project.core.errors import InputError
from dagster_project.core.versions import require_version
from dagster_project.curation.sources.class_labels import of_features
from dagster_project.curation.sources.detection import canonical_split
from dagster_project.curation.sources.files import Block, Row, as_parsed, rows_of, table_rows

NEXT = (
    "check the name, the revision, the network and, for a gated data set, HF_TOKEN;"
    " rows that `datasets` cannot read can be saved as a file in data/sources/"
)


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set at a commit. Unlike a branch, a commit never changes."""

    hub: str
    """org/name."""
    revision: str
    """The commit, 40 hex digits."""
    split: str
    config: str | None = None

    @property
    def name(self) -> str:
        """The `source` of its rows: hub:org/name@0123456789ab/train, or hub:org/name@0123456789ab/config/train."""
        config = f"{self.config}/" if self.config else ""
        return f"hub:{self.hub}@{self.revision[:12]}/{config}{self.split}"

    @property
    def problem(self) -> str:
        """What is wrong with the names; empty if valid."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", self.hub, re.ASCII) or ".." in self.hub:
            return f"{self.hub!r} is not a data set name: use org/name"
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return (
                f"revision {self.revision!r} is not a commit:"
                " 40 hex digits are required, because branches and tags move"
            )
        if not re.fullmatch(r"\w+(\.\w+)*", self.split):
            return f"split {self.split!r} is not a split name: use e.g. train"
        if self.config is not None and not re.fullmatch(r"(?!\.)[^<>:/\\|?*\0-\x1f]+", self.config):
            return f"config {self.config!r} is not a configuration name"
        return ""


def read_split(source: HubSplit) -> list[Row]:
    """As `split_blocks`, in memory."""
    return rows_of(split_blocks(source))


def split_blocks(source: HubSplit) -> Iterator[Block]:
    """Read the rows from the cache (HF_HOME) or from the Hub. A cached commit needs no network.

    Raises:
        InputError: no such data set, commit, configuration or split; no access; no network; no rows of text.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if source.problem:
        raise InputError(f"{source.name}: {source.problem}", "hub:org/name@REVISION:split")
    _end_stalled_requests()
    datasets.disable_progress_bars()
    disable_progress_bars()
    datasets.logging.set_verbosity_error()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # counting would report every read to Hugging Face
    # One folder per commit and configuration, because `datasets` uses the newest content of a folder.
    cache = Path(datasets.config.HF_DATASETS_CACHE, "pedigree", source.hub.replace("/", "___"), source.revision)
    cache /= f"config {source.config}" if source.config else "any"
    try:
        if any(cache.glob(f"*/*/*/{source.revision}")):
            builder = _cached_builder(cache, source.hub)
        else:
            address = f"hf://datasets/{source.hub}"  # without hf:// a local folder of that name would be used
            builder = datasets.load_dataset_builder(
                address, name=source.config, revision=source.revision, cache_dir=str(cache)
            )
        _refuse_unpinned(source, builder)
        builder.download_and_prepare()
        if source.split not in builder.info.splits:
            what = f"{source.name}: there is no split {source.split!r}"
            raise InputError(what, f"splits: {', '.join(builder.info.splits)}")
        data = builder.as_dataset(source.split)
    except StopIteration:  # raised by `datasets` for an empty file
        what = f"{source.name}: the data set is empty, or its first file is"
        raise InputError(what, "use another split or data set") from None
    except InputError:
        raise
    except Exception as error:  # `datasets` raises errors of many kinds for cards and files that it cannot read
        if isinstance(error, MemoryError) or faults.is_full(error):
            raise
        raise InputError(f"{source.name}: {_error_text(error, huggingface_hub.get_token())}", NEXT) from None
    if media := {name: kind for name, feature in data.features.items() for kind in _kinds(feature) - TEXTUAL}:
        columns = ", ".join(f"{name} ({kind})" for name, kind in media.items())
        what = f"{source.name}: columns without text: {columns}"
        raise InputError(what, "save the other columns as a file in data/sources/")
    if not len(data):
        raise InputError(f"{source.name}: the split is empty", "use another split")
    is_encoded = any("Json" in _kinds(feature) for feature in data.features.values())
    decode = data.features.decode_example if is_encoded else None
    labels = of_features(data.features.to_dict())
    for table in data.with_format("arrow").iter(1024):
        yield Block(as_parsed, table_rows(table.to_batches(), decode), labels)


def _end_stalled_requests() -> None:
    """Give every request the timeout of downloads: listings of files would wait forever for a server that stops."""
    require_version("huggingface-hub", ">=1,<3", "huggingface_hub.utils._http.default_client_factory")
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout") or {}
        parts = {name: given.get(name) for name in ("connect", "read", "write", "pool")}
        request.extensions["timeout"] = {
            name: constants.HF_HUB_DOWNLOAD_TIMEOUT if seconds is None else seconds for name, seconds in parts.items()
        }

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit]}
        return made

    set_client_factory(client)


def _cached_builder(folder: Path, repository: str) -> Any:
    """Builder of a data set that is already in a cache folder.

    `datasets` has no public way to load from its cache without network.
    """
    require_version("datasets", ">=5.2,<6", "datasets.packaged_modules.cache.cache.Cache")
    from datasets.packaged_modules.cache.cache import Cache

    return Cache(
        cache_dir=str(folder),
        repo_id=repository,
        dataset_name=repository.partition("/")[2],
        version="auto",
        hash="auto",
    )


def _refuse_unpinned(source: HubSplit, builder: Any) -> None:
    """Refuse another commit, and files outside of the commit: a card may list any address, whose content can change."""
    if builder.hash != source.revision:
        raise InputError(f"{source.name}: the Hub returned commit {builder.hash}", "set the commit to use")
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    if external := [file for file in files if not file.startswith(f"hf://datasets/{source.hub}@{source.revision}/")]:
        raise InputError(
            f"{source.name}: reads rows from outside its commit: {external[0]}",
            "copy them to data/sources/ if you trust them",
        )


TEXTUAL = frozenset({"Value", "ClassLabel", "Json", "Translation", "TranslationVariableLanguages"})


def _kinds(feature: Any) -> set[str]:
    """Feature types in a column, at any depth."""
    if isinstance(feature, Mapping):
        return {kind for inner in feature.values() for kind in _kinds(inner)}
    if isinstance(feature, list):
        return {kind for inner in feature for kind in _kinds(inner)}
    return _kinds(feature.feature) if hasattr(feature, "feature") else {type(feature).__name__}


def _error_text(error: BaseException, token: str | None) -> str:
    """One line of the error message, without tokens and passwords in addresses."""
    text = str(error.__cause__ or error) if "while generating" in str(error) else str(error)
    text = text.rpartition(" on the Hugging Face Hub either: ")[2]
    line = next((line for line in map(str.strip, text.splitlines()) if line), type(error).__name__)
    line = re.sub(r"//[^/@\s]+@", "//", re.sub(r"\bhf_\w+", "[token]", line))
    return (line.replace(token, "[token]") if token else line)[:300]


class RowsDigest:
    """Hash of rows as JSON lines with sorted keys; an unreadable row is represented by its problem."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, rows: Iterable[Row]) -> None:
        for row in rows:
            text = ROW.encode(row.value if row.value is not None else row.problem)
            self._digest.update(text.encode("utf-8", "surrogatepass") + b"\n")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


ROW = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def held_out_label(source: HubSplit) -> str | None:
    """Split label of the rows.

    Test and validation splits of the data set stay held out; its train split has no label and may be split.
    """
    label = canonical_split(source.split)
    return None if label == "train" else label


SPEC = re.compile(r"hub:(?P<hub>[^@:]*)@(?P<revision>[^:]*):(?:(?P<config>[^:]*):)?(?P<split>[^:]*)")


def parse_spec(spec: str) -> HubSplit | None:
    """ "hub:org/name@REVISION:split" or "hub:org/name@REVISION:config:split"; None for all that begins otherwise.

    Raises:
        InputError: begins with "hub:" but is not a split at a commit.
    """
    if not spec.startswith("hub:"):
        return None
    match = SPEC.fullmatch(spec)
    source = HubSplit(**match.groupdict()) if match else None
    if source is None or source.problem:
        problem = source.problem if source else "not a split of a data set"
        raise InputError(f"{spec}: {problem}", "use hub:org/name@REVISION:split")
    return source
