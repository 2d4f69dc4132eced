"""DVC's remote as the carrier between driver and workers: objects by content
hash, and a folder `pedigree/` for results and checkpoints.

Objects are transferred one by one and hashed on arrival. DVC's own push and pull are not used: they trust read-only
cache objects, and an index of what the remote had earlier, so a damaged or removed object would not be noticed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from dagster_project.core import faults
from dagster_project.core.errors import InputError, PedigreeError
from dagster_project.core.files import replacing
from dagster_project.core.hashing import md5_of_bytes, md5_of_file
from dagster_project.orchestration.dvc_remote import MAKE_SPACE, Remote, is_full, is_refusal, open_remote

AREA = "pedigree"
"""Folder of the remote for everything but objects. `dvc gc` ignores it."""
TRANSFERS = 8
"""Objects transferred at once."""
OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
"""Names of objects. Any other, which a document or listing in the remote may
contain, could be a path outside of the cache."""


class Damaged(PedigreeError):
    """Objects in the remote are missing, or do not match their hashes."""

    def __init__(self, objects: Sequence[str]) -> None:
        super().__init__(
            f"DVC's remote: {len(objects)} object(s) are missing or do not match their hashes (first: {objects[0]})",
            "remove them from the remote and run again",
        )
        self.objects = list(objects)


@dataclass(frozen=True)
class RemoteStore:
    remote: Remote

    # ---- objects ---------------------------------------------------------------------------------------------------

    def push(self, objects: Iterable[str]) -> int:
        """Copy outputs from the cache to the remote, if they are not there yet; a listing last, after its files.

        Args:
            objects: content hashes, of files or of folders.
        Returns:
            Bytes sent.
        Raises:
            InputError: an object is neither in the remote nor in the cache, or does not match its hash there.
            PedigreeError: the remote cannot be written.
        """
        sent = 0
        listings, files = self._files(list(objects))
        for group in (files, listings):
            absent = self._absent(group)
            if missing := [oid for oid in absent if not Path(self.remote.cached_at(oid)).is_file()]:
                raise InputError(
                    f"{len(missing)} object(s) of the inputs are neither"
                    f" in DVC's cache nor in its remote (first: {missing[0]})",
                    "`dvc pull` them, or `dvc commit` what is in the workspace",
                )
            sent += self._each(self._send, absent)
        return sent

    def _send(self, oid: str) -> int:
        """Raises:
        InputError: the object of the cache is damaged. In the remote, it would
            be in the place of the real one for all clones.
        """
        cached = Path(self.remote.cached_at(oid))
        _refuse_damaged(oid, md5_of_file(cached))
        return self.put(cached, self.remote.object_at(oid))

    def _files(self, objects: Sequence[str]) -> tuple[list[str], list[str]]:
        """Listings of folders, and all files; a folder whose listing is missing has no files."""
        listings = [oid for oid in objects if oid.endswith(".dir")]
        files = [oid for oid in objects if not oid.endswith(".dir")]
        for oid in listings:
            with suppress(FileNotFoundError):
                content = Path(self.remote.cached_at(oid)).read_bytes()
                _refuse_damaged(oid, md5_of_bytes(content))
                files += [entry["md5"] for entry in json.loads(content)]
        return list(dict.fromkeys(listings)), list(dict.fromkeys(files))

    def _absent(self, objects: list[str]) -> list[str]:
        if not objects:
            return []
        with self._explained("read"):
            self.remote.fs.fs.invalidate_cache()
            found = self.remote.fs.exists([self.remote.object_at(oid) for oid in objects])
        return [oid for oid, there in zip(objects, found, strict=True) if not there]

    def pull(self, objects: Iterable[str]) -> int:
        """Copy outputs from the remote into the cache. Every object is hashed, also one that the cache already has.

        Returns:
            Bytes received.
        Raises:
            Damaged: objects do not match their hashes, or are missing. They are not added to the cache.
            PedigreeError: the remote cannot be read.
        """
        requested = _objects(objects)
        contents: dict[str, bytes] = {}
        received = 0
        for oid in (oid for oid in requested if oid.endswith(".dir")):
            cached = Path(self.remote.cached_at(oid))
            content = cached.read_bytes() if cached.is_file() else b""
            if md5_of_bytes(content) != oid.removesuffix(".dir"):
                content = self.read(self.remote.object_at(oid)) or b""
                received += len(content)
            if md5_of_bytes(content) != oid.removesuffix(".dir"):
                raise Damaged([oid])
            contents[oid] = content
        files = [oid for oid in requested if not oid.endswith(".dir")]
        files += _objects(entry["md5"] for content in contents.values() for entry in json.loads(content))
        damaged: list[str] = []
        received += self._each(lambda oid: self._receive(oid, damaged), list(dict.fromkeys(files)))
        if damaged:
            raise Damaged(sorted(damaged))
        for oid, content in contents.items():  # last: a listing in the cache has all of its files
            self._write_object(Path(self.remote.cached_at(oid)), content)
        return received

    def _receive(self, oid: str, damaged: list[str]) -> int:
        target = Path(self.remote.cached_at(oid))
        if target.is_file():
            if md5_of_file(target) == oid:
                return 0
            target.unlink()
        # removed by leftovers.py if this process is killed
        scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.{os.getpid()}")
        self.remote.make_folder(str(scratch.parent))
        try:
            with self._explained("read"):
                self.remote.fs.get_file(self.remote.object_at(oid), str(scratch))
            if md5_of_file(scratch) != oid:
                damaged.append(oid)
                return 0
            scratch.chmod(0o444)
            size = scratch.stat().st_size
            scratch.replace(target)
            return size
        except FileNotFoundError:
            damaged.append(oid)
            return 0
        finally:
            scratch.unlink(missing_ok=True)

    def _write_object(self, path: Path, content: bytes) -> None:
        self.remote.make_folder(str(path.parent))
        with replacing(path) as scratch:
            scratch.write_bytes(content)
            scratch.chmod(0o444)

    def _each(self, transfer: Any, objects: Sequence[str]) -> int:
        with ThreadPool(TRANSFERS) as threads:  # unlike an executor, it does not wait for them after an interrupt
            return sum(threads.imap_unordered(transfer, objects))

    def discard(self, objects: Iterable[str]) -> None:
        """Remove objects from the remote."""
        for oid in _objects(objects):
            with suppress(FileNotFoundError), self._explained("write"):
                self.remote.fs.fs.invalidate_cache()
                self.remote.fs.rm(self.remote.object_at(oid))

    # ---- the folder `pedigree/` --------------------------------------------------------------------------------------

    def at(self, *names: str) -> str:
        return str(self.remote.fs.join(self.remote.path, AREA, *names))

    def read(self, path: str) -> bytes | None:
        """Content of a file; None if it does not exist."""
        try:
            with self._explained("read"):
                content: bytes = self.remote.fs.cat_file(path)
                return content
        except FileNotFoundError:
            return None

    def read_document(self, path: str) -> Any:
        """Content of a JSON file; None if it does not exist, or its writer was killed."""
        with suppress(ValueError):
            return json.loads(self.read(path) or b"")
        return None

    def write_document(self, path: str, document: Mapping[str, Any]) -> None:
        try:
            with self._explained("write"):
                self.remote.fs.makedirs(self.remote.fs.parent(path))
                self.remote.fs.pipe_file(path, json.dumps(document).encode())
        except FileNotFoundError as error:  # S3: no such bucket
            raise self._refusal("write", error) from None

    def put(self, source: Path, path: str) -> int:
        try:
            with self._explained("write"):
                self.remote.fs.put_file(str(source), path)
        except FileNotFoundError as error:
            if not source.exists():
                raise
            raise self._refusal("write", error) from None  # S3: no such bucket
        return source.stat().st_size

    def get(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._explained("read"):
            self.remote.fs.get_file(path, str(target))

    def list(self, path: str) -> list[str]:
        """All files below a path, relative to it.

        Keys of S3 may contain "..": files outside of the path are left out.
        """
        try:
            with self._explained("read"):
                self.remote.fs.fs.invalidate_cache()
                names = (self.remote.fs.relpath(found, path) for found in self.remote.fs.find(path))
                return sorted(name for name in names if ".." not in name.split("/"))
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        """Remove a folder."""
        with suppress(FileNotFoundError), self._explained("write"):
            self.remote.fs.fs.invalidate_cache()
            self.remote.fs.rm(path, recursive=True)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, PedigreeError):
            raise
        except Exception as error:
            # full: the disk of this machine, to which the file was copied
            if not is_refusal(error) or (action == "read" and faults.is_full(error)):
                raise
            raise self._refusal(action, error) from None

    def _refusal(self, action: str, error: Exception) -> PedigreeError:
        reason = f"{type(error).__name__}: {error}"
        if action == "write" and is_full(error):
            return PedigreeError(
                f"DVC's remote {self.remote.url} cannot be written: it is full, or a quota is reached ({reason})",
                f"nothing was recorded; {MAKE_SPACE}",
            )
        return PedigreeError(
            f"DVC's remote {self.remote.url} cannot be {'read' if action == 'read' else 'written'}: {reason}",
            "nothing was recorded; check its address, free space,"
            " and the credentials in the environment of this machine and of the nodes",
        )


def _objects(names: Iterable[str]) -> list[str]:
    """These names.

    Raises:
        PedigreeError: one is not the name of an object.
    """
    found = list(names)
    if wrong := next((name for name in found if not OBJECT.fullmatch(str(name))), None):
        raise PedigreeError(
            f"DVC's remote: {wrong!r} is not the name of an object",
            "someone else wrote into DVC's remote; nothing was recorded",
        )
    return found


def _refuse_damaged(oid: str, md5: str) -> None:
    """Raises:
    InputError: an object of this machine's cache is damaged.
    """
    if md5 != oid.removesuffix(".dir"):
        raise InputError(
            f"DVC's cache: the object {oid} does not match its hash; it was not sent to the remote",
            "`pedigree verify --integrity` names its file, and how to restore it",
        )


@contextmanager
def open_store(root: Path) -> Iterator[RemoteStore]:
    """The remote of a project.

    Raises:
        InputError: DVC has no default remote that can be used.
    """
    with open_remote(root) as remote:
        yield RemoteStore(remote)
