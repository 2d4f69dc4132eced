"""The web server answers only what was asked for on its own pages and under its own names."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dagster_project.orchestration.dagster.webserver import Guard

QUERY = b"query=mutation%20%7Bx%7D"


def answer(
    headers: list[tuple[str, str]], kind: str = "http", method: str = "POST", path: str = "/graphql", query: bytes = b""
) -> Any:
    """What the guard lets through ("served"), or the messages by which it refuses; and the headers of an answer."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
            await send({"type": "http.response.body", "body": b"served"})
        else:
            await send({"type": "websocket.accept"})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": kind, "method": method, "path": path, "query_string": query, "headers": raw}
    asyncio.run(Guard(app, ["ui.example.org", ""])(scope, None, send))  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize(
    "host", ["127.0.0.1:3000", "localhost:3000", "[::1]:3000", "LOCALHOST", "ui.example.org", "192.168.1.4:80"]
)
def test_requests_of_its_own_pages_are_served(host: str) -> None:
    start, body = answer([("Host", host), ("Origin", f"http://{host.lower()}")])
    assert body["body"] == b"served" and start["status"] == 200
    assert start["headers"] == [(b"x", b"y"), (b"x-frame-options", b"SAMEORIGIN")]
    assert answer([("Host", host), ("Origin", f"https://{host}")], kind="websocket") == [{"type": "websocket.accept"}]
    assert answer([("host", host)], method="GET", path="/runs")[1]["body"] == b"served"
    assert answer([("host", host)], method="GET")[1]["body"] == b"served"  # the page on which queries are written


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([("Host", "evil.example.org:3000")], "not known as evil.example.org:3000"),
        ([("Host", "localhost.evil.example.org")], "not known as"),
        ([], "not known as nothing"),
        ([("Host", "localhost"), ("Host", "evil.example.org")], "not known as"),
        ([("Host", "[::1")], "not known as"),
        ([("Host", "localhost:3000"), ("Origin", "http://evil.example.org")], "comes from another website"),
        ([("Host", "localhost:3000"), ("Origin", "http://localhost:3100")], "comes from another website"),
        ([("Host", "localhost:3000"), ("Origin", "null")], "comes from another website"),
        (
            [("Host", "localhost:3000"), ("Origin", "http://localhost:3000"), ("Origin", "http://evil.example.org")],
            "comes from another website",
        ),
    ],
)
def test_requests_of_other_websites_and_under_other_names_are_refused(
    headers: list[tuple[str, str]], reason: str
) -> None:
    start, body = answer(headers)
    assert start["status"] == 403 and reason in body["body"].decode()
    [closed] = answer(headers, kind="websocket")
    assert closed["type"] == "websocket.close" and reason in closed["reason"]


@pytest.mark.parametrize("path", ["/graphql", "/graphql/", "/prefix/graphql"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_link_or_image_cannot_carry_a_query(path: str, method: str) -> None:
    start, body = answer([("Host", "localhost:3000")], method=method, path=path, query=QUERY)
    assert start["status"] == 403 and b"sent by POST" in body["body"]
