"""A Hub on loopback to which models are uploaded: the API of repositories, LFS
and commits, in memory, and what `from_pretrained` asks."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from builders.servers import Quiet, answering

LARGE = 100_000
"""Bytes from which a file is stored as LFS, like tables and weights of any size."""
LFS_FILES = (".safetensors", ".parquet")


@dataclass
class Repository:
    """A repository of one branch."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """(commit, path -> content), the newest last."""

    def add(self, files: Mapping[str, bytes]) -> str:
        commit = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((commit, dict(files)))
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        return (
            self.commits[-1] if revision == "main" else next((one for one in self.commits if one[0] == revision), None)
        )


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


class ModelHub:
    """Repositories of models, and who may write to them."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """sha256 -> content of what was uploaded by LFS."""
        self.writers: dict[str, str] = {"hf_writer": "org", "hf_reader": ""}
        """Token -> owner whose repositories it may write to; empty for none."""
        self.breaks_at: str = ""
        """Part of a request whose connection breaks in the middle, every time."""
        self.moves_before_commit = False
        """Whether somebody else commits just before."""
        self.changes: dict[str, bytes] = {}
        """Files that are stored with another content than was sent."""
        self.ignored: set[str] = set()
        """Files that the .gitignore of the repository leaves out."""
        self.asked: list[str] = []
        self.url = ""

    def answer(self, method: str, target: str, authorization: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        path, token = unquote(urlsplit(target).path).strip("/"), authorization.removeprefix("Bearer ")
        if path == "api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self._create(json.loads(body), token)
        if path.startswith("lfs/"):
            return self._store(path.removeprefix("lfs/"), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            self._writable(path.removesuffix(".git/info/lfs/objects/batch"), token)
            return self._batch(json.loads(body))
        parts = path.split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._model(method, "/".join(parts[2:4]), parts[4:], token, body)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file(self._readable("/".join(parts[:2]), token), parts[3], "/".join(parts[4:]))
        raise Refused(404)

    def _readable(self, name: str, token: str) -> Repository:
        if name not in self.repos or (self.repos[name].private and token not in self.writers):
            raise Refused(404 if token in self.writers else 401, "RepoNotFound")
        return self.repos[name]

    def _writable(self, name: str, token: str) -> Repository:
        if token not in self.writers:
            raise Refused(401)
        if self.writers[token] != name.partition("/")[0]:
            raise Refused(403)
        return self._readable(name, token)

    def _create(self, asked: Mapping[str, Any], token: str) -> tuple[int, dict[str, str], bytes]:
        name = f"{asked['organization']}/{asked['name']}"
        if token not in self.writers:
            raise Refused(401)
        if self.writers[token] != asked["organization"]:
            raise Refused(403)
        if name in self.repos:
            raise Refused(409)
        self.repos[name] = Repository("private" in (asked.get("visibility"), asked.get("private") and "private"))
        self.repos[name].add({".gitattributes": b"*.safetensors filter=lfs\n"})
        return as_json({"url": f"{self.url}/{name}", "id": name})

    def _model(
        self, method: str, name: str, rest: list[str], token: str, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        what = rest[0] if rest else "revision"
        if what == "preupload":
            return self._preupload(self._writable(name, token), json.loads(body)["files"])
        if what == "commit":
            return self._commit(name, self._writable(name, token), [json.loads(line) for line in body.splitlines()])
        repo = self._readable(name, token)
        found = repo.at(rest[1] if len(rest) > 1 else "main")
        if found is None:
            raise Refused(404, "RevisionNotFound")
        commit, files = found
        if what == "revision":
            return as_json(
                {
                    "id": name,
                    "sha": commit,
                    "private": repo.private,
                    "siblings": [{"rfilename": file} for file in files],
                }
            )
        if what == "tree":
            return as_json([self._entry(file, content) for file, content in files.items()])
        raise Refused(404)

    def _entry(self, file: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 134}} if is_large(file, len(content)) else {}
        return {"type": "file", "path": file, "size": len(content), "oid": git_oid(content), **lfs}

    def _preupload(self, repo: Repository, files: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        _, there = repo.commits[-1]

        def oid(file: str) -> str | None:
            content = there.get(file)
            if content is None:
                return None
            return hashlib.sha256(content).hexdigest() if is_large(file, len(content)) else git_oid(content)

        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if is_large(one["path"], one["size"]) else "regular",
                "shouldIgnore": one["path"] in self.ignored,
                "oid": oid(one["path"]),
            }
            for one in files
        ]
        return as_json({"files": modes})

    def _batch(self, asked: Mapping[str, Any]) -> tuple[int, dict[str, str], bytes]:
        def one(wanted: Mapping[str, Any]) -> dict[str, Any]:
            if wanted["oid"] in self.objects:
                return {"oid": wanted["oid"], "size": wanted["size"]}
            return {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

        return as_json({"transfer": "basic", "objects": [one(wanted) for wanted in asked["objects"]]})

    def _store(self, oid: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400)
        self.objects[oid] = body
        return 200, {}, b""

    def _commit(self, name: str, repo: Repository, lines: list[dict[str, Any]]) -> tuple[int, dict[str, str], bytes]:
        if self.moves_before_commit:
            repo.add({**repo.commits[-1][1], "other.txt": b"by somebody else"})
        parent, files = repo.commits[-1]
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        if header.get("parentCommit") not in {None, parent}:
            raise Refused(412)
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.add({**files, **{file: content for file, content in self.changes.items() if file in files}})
        return as_json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""})

    def _file(self, repo: Repository, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        found = repo.at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound")
        commit, files = found
        if file not in files:
            raise Refused(404, "EntryNotFound")
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{git_oid(files[file])}"'}, files[file]


def is_large(file: str, size: int) -> bool:
    return file.endswith(LFS_FILES) or size > LARGE


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def as_json(document: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps(document).encode()


@contextmanager
def serving(hub: ModelHub) -> Iterator[ModelHub]:
    """Serve a Hub on a free port."""

    class Handler(Quiet):
        protocol_version = "HTTP/1.1"

        def handle_it(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            length = int(self.headers.get("Content-Length") or 0)
            if hub.breaks_at and hub.breaks_at in hub.asked[-1]:
                self.rfile.read(length // 2)
                self.close_connection = True
                return
            body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
            try:
                status, headers, content = hub.answer(
                    self.command, self.path, self.headers.get("Authorization", ""), body
                )
            except Refused as refused:
                status, headers, content = refused.status, {"X-Error-Code": refused.code} if refused.code else {}, b"{}"
            self.send(status, {"Content-Type": "application/json", **headers}, content)

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_HEAD = do_POST = do_PUT = handle_it

    with answering(Handler) as hub.url:
        yield hub
