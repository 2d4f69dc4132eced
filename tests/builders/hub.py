"""A Hub on loopback that answers from memory what `datasets` and `huggingface_hub` ask."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from builders.servers import Quiet, answering

NAME, OLD = "org/name", "a" * 40
PAIRS = [{"prompt": f"Hi {i}", "completion": "Hello"} for i in range(5)]


def parquet(rows: list[dict[str, Any]] | Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, sink)
    return sink.getvalue()


def card(**said: Any) -> bytes:
    """A data set's README.md: JSON is YAML."""
    return f"---\n{json.dumps(said)}\n---\n".encode()


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Hub:
    """A Hub that answers what `datasets` and `huggingface_hub` ask, from memory."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        """Data set -> commit -> path -> content."""
        self.refusals: dict[str, tuple[int, str]] = {}
        """Data set -> status and error code that everything about it is answered with."""
        self.says = ""
        """The commit that it says it gives, if that is another one."""
        self.cut: set[str] = set()
        """Files at whose content the line goes dead."""
        self.asked: list[str] = []
        self.url = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) > 5:
            name, what, revision, rest = "/".join(parts[2:4]), parts[4], parts[5], "/".join(parts[6:])
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            name, what, revision, rest = "/".join(parts[1:3]), "resolve", parts[4], "/".join(parts[5:])
        else:
            return 404, {}, b""
        if name in self.refusals:
            return self.refusals[name][0], {"X-Error-Code": self.refusals[name][1]}, b""
        if name not in self.repos:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in self.repos[name]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repos[name][revision]
        if what == "resolve":
            if rest not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 200, {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha1(files[rest]).hexdigest()}"'}, files[rest]
        if what == "revision":
            return (
                200,
                {},
                json.dumps(
                    {"id": name, "sha": self.says or revision, "siblings": [{"rfilename": file} for file in files]}
                ).encode(),
            )
        entries = {
            file: {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in files.items()
        }
        for file in files:
            for folder in map(str, Path(file).parents):
                if folder != ".":
                    entries[folder] = {
                        "type": "directory",
                        "path": folder,
                        "size": 0,
                        "oid": hashlib.sha1(folder.encode()).hexdigest(),
                    }
        if what == "tree":
            if rest and rest not in entries:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            found = [
                entry for at, entry in entries.items() if (str(Path(at).parent) == rest if rest else "/" not in at)
            ]
            return 200, {}, json.dumps(found).encode()
        if what == "paths-info":
            asked = json.loads(body)["paths"]
            return 200, {}, json.dumps([entries[path] for path in asked if path in entries]).encode()
        return 404, {}, b""


def hub_with_pairs() -> Hub:
    """A Hub with PAIRS in one commit of one data set."""
    found = Hub()
    found.repos[NAME] = {
        OLD: {
            "data/train-00000-of-00001.parquet": parquet(PAIRS),
            "data/test-00000-of-00001.parquet": parquet(PAIRS[:2]),
        }
    }
    return found


@contextmanager
def serving(found: Hub) -> Iterator[Hub]:
    """Serve a Hub on a free port."""

    class Handler(Quiet):
        protocol_version = "HTTP/1.1"

        def handle_it(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found.asked.append(f"{self.command} {self.path}")
            status, headers, content = found.answer(self.path, body)
            is_cut = any(self.path.endswith(file) for file in found.cut)
            sent = len(content) // 2 if is_cut else None
            self.send(status, {"Content-Type": "application/json", **headers}, content, sent)

        do_GET = do_HEAD = do_POST = handle_it

    with answering(Handler) as found.url:
        yield found
