"""Objects under a prefix of an S3 bucket -> files.

The list of objects is pinned, and no object is read in another version than the listed one.

Credentials, region and address (AWS_ENDPOINT_URL) come from the environment or the role of the machine, as in all AWS
tools.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from dagster_project.core import faults
from dagster_project.core.errors import InputError
from dagster_project.core.git import git
from dagster_project.core.hashing import sha256_of_text
from dagster_project.core.layout import report_of
from dagster_project.core.text import listed
from dagster_project.curation.sources.files import (
    MEGABYTE,
    READERS,
    UNLISTED,
    is_hidden,
    json_object,
    of_saved,
    suffix_of,
    unread,
)

SCHEME = "s3://"
READ_AHEAD = 8 * MEGABYTE
SEEKING = (".parquet", ".arrow", ".feather")
"""Types of files that are not read from beginning to end. Such an object is copied to a scratch file while it is
read."""
NEXT = "check the address, AWS_ENDPOINT_URL, and the credentials in the environment (docs/sources.md)"
SHOWN = 5


def problem_of(url: str, revision: str | None) -> str:
    """What is wrong with an address or a revision; empty if valid."""
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/.*)?", url) or "//" in url.removeprefix(SCHEME):
        return f"{url!r} is not an address of objects: use s3://BUCKET/PREFIX"
    if revision is not None and not re.fullmatch(r"[0-9a-f]{64}", revision):
        return (
            f"revision {revision!r} is not the digest of a list of objects:"
            " 64 hex digits are required; without it, a run prints it"
        )
    return ""


class Reader:
    """Reads from S3. Errors are InputErrors, whose text contains no credentials."""

    def __init__(self) -> None:
        """Raises:
        InputError: s3fs is not installed.
        """
        try:
            import s3fs
        except ImportError:
            hint = "`pip install 'pedigree-llm[s3]'` installs it, with dvc-s3"
            raise InputError("s3fs is not installed, which reads sources in S3", hint) from None
        self._files = s3fs.S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, default_block_size=READ_AHEAD
        )

    def list(self, url: str, scratch: Path) -> list[S3Object]:
        """All objects of the known file types under a prefix that are not hidden, or the object of that name, sorted.

        Of data sets that `datasets` saved, only the data, as in a folder.

        Args:
            scratch: folder for scratch files.
        """
        place = url.removeprefix(SCHEME).rstrip("/")
        with _as_input_error(url):
            listed: Mapping[str, Mapping[str, Any]] = self._files.find(place, detail=True)
        names = {key: PurePosixPath(key).name if key == place else key.removeprefix(f"{place}/") for key in listed}
        objects = []
        for key, facts in listed.items():
            is_shown = key == place or not is_hidden(PurePosixPath(names[key]))
            if is_shown and suffix_of(PurePosixPath(key)) in READERS:
                etag, modified = str(facts["ETag"]).strip('"'), str(facts.get("LastModified", ""))[:10]
                objects.append(S3Object(self, key, names[key], int(facts["size"]), etag, modified, scratch))
        data = _data_of(objects)
        if not data:
            raise InputError(f"{url}: no file of examples at this address", f"file types: {', '.join(READERS)}; {NEXT}")
        paths = {one.path for one in data}
        unread(url, (PurePosixPath(name) for name in names.values() if name not in paths), UNLISTED)
        return sorted(data, key=lambda one: one.path)

    def open(self, key: str, etag: str) -> BinaryIO:
        """An object in the version with this ETag, which the server requires for each part of it."""
        with _as_input_error(f"{SCHEME}{key}"):
            file = self._files.open(key, "rb")
            now = str(file.details["ETag"]).strip('"')
        if now != etag:
            raise InputError(f"{SCHEME}{key} has changed since it was listed", "run the stage again")
        return cast(BinaryIO, file)


@dataclass
class S3Object:
    """An object, as a file (`files.Stored`) that is read once."""

    reader: Reader
    key: str
    """BUCKET/KEY"""
    path: str
    """Relative to the prefix."""
    size: int
    etag: str
    modified: str
    """Date, if the server has it."""
    scratch: Path
    _content: _Content | None = None

    @property
    def name(self) -> str:
        return f"{SCHEME}{self.key}"

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def suffixes(self) -> Sequence[str]:
        return PurePosixPath(self.key).suffixes

    def open(self, mode: str) -> BinaryIO:
        self._content = _Content(self.reader.open(self.key, self.etag), self.name)
        buffered = io.BufferedReader(self._content, MEGABYTE)
        if self.suffix.lower() not in SEEKING:
            return buffered
        copy = tempfile.TemporaryFile(dir=self.scratch)  # noqa: SIM115  the reader closes it
        with buffered:
            shutil.copyfileobj(buffered, copy, MEGABYTE)
        copy.seek(0)
        return cast(BinaryIO, copy)

    @property
    def sha256(self) -> str:
        """Hash of the content, which has been read.

        Raises:
            InputError: not all of it has been read.
        """
        if self._content is None or self._content.bytes != self.size:
            done = self._content.bytes if self._content else 0
            raise InputError(f"{self.name}: {done} of {self.size} bytes were read", "run the stage again")
        return self._content.digest.hexdigest()


def _data_of(objects: Sequence[S3Object]) -> list[S3Object]:
    """The objects without those that are not data of a saved data set."""
    folders: dict[str, dict[str, S3Object]] = defaultdict(dict)
    for one in objects:
        place, _, name = one.key.rpartition("/")
        folders[place][name] = one
    found: list[S3Object] = []
    for place, there in folders.items():
        kept = of_saved(place.rpartition("/")[2], [*there], partial(_object_in, there))
        found += [there[name] for name in kept]
    return found


def _object_in(there: Mapping[str, S3Object], name: str) -> dict[str, Any]:
    one = there[name]
    with one.reader.open(one.key, one.etag) as file, _as_input_error(one.name):
        return json_object(file.read()) if one.size <= MEGABYTE else {}


class _Content(io.RawIOBase):
    """The bytes of an object, of which the hash is computed."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.digest, self.bytes = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_input_error(self._name):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self.digest.update(content)
        self.bytes += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _as_input_error(name: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: no such bucket or object", NEXT) from None
    except (OSError, BotoCoreError, ClientError) as error:
        if faults.is_full(error):  # of the scratch file
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
            text = text.replace(os.environ.get(secret) or "\0", "[credential]")
        raise InputError(f"{name}: cannot be read: {text[:300]}", NEXT) from None


# --- the pin


def digest_of(objects: Sequence[S3Object]) -> str:
    """sha256 of the list of objects: one line of JSON per object, with name, size and ETag."""
    return sha256_of_text("".join(json.dumps([one.path, one.size, one.etag]) + "\n" for one in objects))


def require_revision(objects: Sequence[S3Object], url: str, revision: str | None, root: Path, section: str) -> None:
    """Refuse objects that are not pinned, or not those that are.

    Args:
        root: the project's folder, whose reports name the objects of earlier runs.
        section: "raw_examples" or "raw_preferences".
    Raises:
        InputError: as described.
    """
    now = digest_of(objects)
    if now == revision:
        return
    where, size = f"params.yaml: {section}.sources: {url}", sum(one.size for one in objects)
    there = f"{len(objects)} objects ({size} bytes) that are there now"
    if len(objects) == 1:
        there = f"1 object ({size} bytes) that is there now"
    if revision is None:
        what = f"{where} has no revision, and objects can change"
        raise InputError(what, f"to use the {there}, add `revision: {now}`")
    hint = f"restore them, or use the {there}: `revision: {now}`"
    known = _recorded(root, section, url, revision)
    if known is None:
        recent = sorted(objects, key=lambda one: one.modified, reverse=True)[:SHOWN]
        last = ", ".join(f"{one.path} ({one.modified})" if one.modified else one.path for one in recent)
        what = "the objects have changed since the revision in params.yaml, which no report lists"
        raise InputError(f"{where}: {what}; modified last: {last}", hint)
    here = {one.path: (one.etag, one.size) for one in objects}
    there_before = {name: (facts["etag"], facts["size"]) for name, facts in known.items()}
    changes = {
        "changed": [name for name, facts in there_before.items() if here.get(name, facts) != facts],
        "new": [name for name in here if name not in known],
        "missing": [name for name in known if name not in here],
    }
    named = "; ".join(f"{kind}: {listed(names, SHOWN)}" for kind, names in changes.items() if names)
    raise InputError(f"{where}: the objects are not those of the revision in params.yaml: {named}", hint)


def _recorded(root: Path, section: str, url: str, revision: str) -> Mapping[str, Mapping[str, Any]] | None:
    """Name -> facts of the objects of a revision, from the stage's report in the workspace or in the latest commit.

    None if neither has it.
    """
    path = report_of(section)
    current = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
    for text in (current, git(root, "show", f"HEAD:./{path}") or ""):
        try:
            facts = json.loads(text)["sources"][url]
            if facts["revision"] == revision:
                return dict(facts["files"])
        except (ValueError, LookupError, TypeError):
            continue
    return None
