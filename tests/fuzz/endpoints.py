"""Answers of a judge's endpoint and of a Hub, served on loopback: bytes, statuses and headers that break readers."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import threading
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
from builders.hub import Hub, parquet, serving
from builders.layouts import LAYOUT_ROWS
from builders.servers import Quiet

from dagster_project.core.errors import PedigreeError
from dagster_project.evaluation.judge import Endpoint, judge, judge_text
from dagster_project.evaluation.paired.pairwise import Match, Pair
from fuzz.surface import STEERS, Case, Surface, as_bytes, as_content
from fuzz.values import NUMBERS, damaged, like, nested, scalar, text, value

REVISION = "a" * 40
REPLY = {
    "id": "1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
}
STATUSES = (*[200] * 40, 201, 204, 206, 301, 302, 307, 400, 401, 403, 404, 413, 422, 429, 500, 503)
HEADERS: dict[str, list[str]] = {
    "Retry-After": ["0", "-1", "1e9", "x", "9" * 400, "Wed, 21 Oct 2030 07:28:00 GMT"],
    "Content-Length": ["0", "1", "-1", "x", "99999999"],
    "Content-Type": ["text/html", "x"],
    "Content-Encoding": ["gzip", "br"],
    "Transfer-Encoding": ["chunked"],
    "Location": ["http://127.0.0.1:9/", "/", "x"],
    "X": ["é"],
}
HUB_HEADERS: dict[str, list[str]] = {
    "X-Repo-Commit": ["b" * 40, "x", "", "../../x"],
    "ETag": ['"x"', "", '"../../../x"', 'W/"a"'],
    "X-Error-Code": ["RepoNotFound", "GatedRepo", "EntryNotFound", "x"],
    "X-Error-Message": ["a" * 5000, "\x1b[2J"],
    "Link": ['<http://127.0.0.1:9/>; rel="next"', "x"],
    "X-Linked-Size": ["-1", "x"],
    "X-Linked-Etag": ["x"],
}


# --- drawing


def draw(random: random.Random) -> Case:
    return _draw_judge(random) if random.random() < 0.7 else _draw_hub(random)


def _answer(random: random.Random, content: bytes, headers: dict[str, list[str]]) -> dict[str, Any]:
    chosen = {name: random.choice(headers[name]) for name in random.sample([*headers], random.choice([0, 0, 0, 1, 2]))}
    return {
        "status": random.choice(STATUSES),
        "headers": chosen,
        "body": as_content(content),
        "cut": random.random() < 0.1,
    }


def _draw_judge(random: random.Random) -> Case:
    replies = []
    for _ in range(random.randint(1, 4)):
        reply = like(random, REPLY, random.choice([0.0, 0.1, 0.3]))
        kind = random.random()
        if kind < 0.2:
            reply = {**REPLY, "usage": {"prompt_tokens": random.choice(NUMBERS), "completion_tokens": scalar(random)}}
        elif kind < 0.3:
            message = {
                "content": random.choice(["B", " T\n", "a", text(random), None, [{"type": "text", "text": "A"}]]),
                "refusal": value(random, 1),
            }
            reply = {**REPLY, "choices": [{"message": message}]}
        content = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if kind > 0.8:
            deep = b"[" * 50_000
            content = random.choice(
                [
                    damaged(random, content),
                    b"",
                    b"null",
                    deep,
                    json.dumps(nested(210)).encode(),
                    b" " * (3 << 20),
                    b"\xff",
                ]
            )
        replies.append(_answer(random, content, HEADERS))
    return {"kind": "judge", "replies": replies, "price": random.choice([None, [1.0, 2.0]])}


def _draw_hub(random: random.Random) -> Case:
    rows = [random.choice([*LAYOUT_ROWS.values()])[0]] * random.randint(1, 5)
    content = json.dumps(rows[0]).encode() + b"\n"
    files = {"train.jsonl": content * len(rows)}
    if random.random() < 0.4:
        with suppress(pa.ArrowInvalid):  # rows of some layouts have values of several types in one field
            files = {"data/train-00000-of-00001.parquet": parquet(rows)}
    if random.random() < 0.5:
        card = {
            "configs": [
                {
                    "config_name": "default",
                    "data_files": random.choice(
                        ["*", "/etc/passwd", "../x", "hf://datasets/o/n/x.jsonl", "http://127.0.0.1:9/x.jsonl"]
                    ),
                }
            ],
            "dataset_info": value(random, 2),
        }
        files["README.md"] = b"---\n" + json.dumps(like(random, card, 0.2)).encode() + b"\n---\n"
    broken = random.random() < 0.5
    if broken:
        name = random.choice([*files])
        files[name] = damaged(random, files[name])
    answers = {
        str(random.randint(0, 8)): _answer(
            random,
            random.choice([b"", b"[]", b"{}", json.dumps(value(random)).encode(), b"\xff"]),
            HEADERS | HUB_HEADERS,
        )
        for _ in range(random.choice([0, 1, 1, 2]))
    }
    return {
        "kind": "hub",
        "files": {},
        "repository": {name: as_content(content) for name, content in files.items()},
        "answers": answers,
        "what": random.choice(["data set", "data set", "model"]),
        "rows": len(rows) if not broken and "README.md" not in files and not answers else None,
    }


# --- playing


class Server:
    """Answers each request with the next answer of the case, the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []
        self.asked = 0
        server = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                answer = server.answers[min(server.asked, len(server.answers) - 1)]
                server.asked += 1
                send(self, answer)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def send(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> None:
    body = as_bytes(answer["body"])
    handler.send_response(answer["status"])
    for name, content in {"Content-Length": str(len(body)), **answer["headers"]}.items():
        handler.send_header(name, content.encode().decode("latin-1"))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body[: len(body) // 2] if answer["cut"] else body)
    handler.close_connection = True


@cache
def _server() -> Server:
    return Server()


class OddHub(Hub):
    """A Hub that also has models, and answers some requests as the case says."""

    def __init__(self) -> None:
        super().__init__()
        self.odd: dict[str, dict[str, Any]] = {}

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        number = str(len(self.asked) - 1)
        if number in self.odd:
            odd = self.odd[number]
            return (
                odd["status"],
                {name: text.encode().decode("latin-1") for name, text in odd["headers"].items()},
                as_bytes(odd["body"]),
            )
        path = path.replace("/api/models/", "/api/datasets/", 1)
        return super().answer(path if path.startswith(("/api/", "/datasets/")) else f"/datasets{path}", body)


@cache
def _hub(home: Path) -> OddHub:
    """Started before the libraries are imported, which read its address from the environment."""
    context = serving(OddHub())
    hub = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    for name in [name for name in os.environ if name.startswith("HF_")]:
        del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    }
    return hub


def play(case: Case, folder: Path) -> str:
    try:
        return _play_judge(case) if case["kind"] == "judge" else _play_hub(case, folder)
    except PedigreeError as error:
        assert error.what and error.hint, f"no next step: {error}"
        assert len(str(error)) < 5000
        return f"{case['kind']}: refused"


def _play_judge(case: Case) -> str:
    server = _server()
    server.answers, server.asked = case["replies"], 0
    asked = [{"role": "user", "content": "Why?"}]
    pairs = [Pair(f"{i}", asked, None, (f"good {i}", f"bad {i}"), bool(i % 2)) for i in range(2)]
    price = tuple(case["price"]) if case["price"] else None
    found = judge(
        Match("id", ("ours", "theirs"), 7, pairs, 0),
        2,
        Endpoint(server.url, "m", timeout=5),
        price,
        wait=lambda seconds: None,
    )
    assert found["wins"] + found["losses"] + found["ties"] + found["refused"] + found["malformed"] == 2
    assert found["cost"] is None or 0 <= found["cost"] < float("inf")
    json.dumps(found, allow_nan=False)
    assert not STEERS.search(judge_text(found))
    return "judge: answered"


def _play_hub(case: Case, folder: Path) -> str:
    home = folder.parent / "hub"
    shutil.rmtree(home, ignore_errors=True)
    hub = _hub(home)
    hub.repos = {"org/name": {REVISION: {name: as_bytes(content) for name, content in case["repository"].items()}}}
    hub.asked, hub.odd = [], case["answers"]
    if case["what"] == "model":
        from dagster_project.core.params import parse
        from dagster_project.stages import base_model

        params = parse(base_model.Params, {"hub": "org/name", "revision": REVISION, "license": "MIT"}, "base_model")
        base_model.produce(folder, params, folder / "base_model")
        raise AssertionError("a model without weights was accepted")
    from dagster_project.curation.sources.hub import HubSplit, read_split

    rows = read_split(HubSplit("org/name", REVISION, "train"))
    assert case["rows"] in (None, len(rows)), f"{case['rows']} rows were served, {len(rows)} read"
    return "hub: read"


SURFACE = Surface("endpoints", 500, draw, play)
