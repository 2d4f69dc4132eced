"""The web server answers only what was asked for on its own pages and under its own names."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders.browser import CHROMIUM, needs_chromium
from builders.servers import Quiet, answering, free_port

from dagster_project.orchestration.dagster.webserver import Guard

WEBSERVER = Guard.__module__

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
    assert start["headers"][:2] == [(b"x", b"y"), (b"x-frame-options", b"SAMEORIGIN")]
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


@contextmanager
def webserver(home: Path, **environment: str) -> Iterator[str]:
    """The web server without a code location, whose dagster.yaml says nothing of
    telemetry. Yields its address; when it has ended, all that it sends was sent."""
    (home / "dagster.yaml").write_text("# of the user\n")
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", WEBSERVER, "--empty-workspace", "--host", "127.0.0.1", "--port", url[17:]]
    environment = {**os.environ, "DAGSTER_HOME": str(home), **environment}
    environment.pop("DAGSTER_DISABLE_TELEMETRY", None)
    server = subprocess.Popen(command, env=environment, cwd=home)
    try:
        until = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{url}/server_info", timeout=30).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def test_a_dagster_home_that_says_nothing_of_telemetry_sends_none(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/event.log").write_text('{"action": "sensor_run_created"}\n')  # what an earlier run left to send
    received = list[str]()

    class Collector(Quiet):
        def do_POST(self) -> None:
            received.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

    with answering(Collector) as collector, webserver(tmp_path, DAGSTER_TELEMETRY_URL=collector) as url:
        urllib.request.urlopen(url, timeout=30).close()
    assert received == []


IMAGE = """() => new Promise(done => {
    Object.assign(new Image(), {onload: () => done(), onerror: () => done(), src: "http://images.example.org/x"})
})"""


@pytest.mark.browser
@needs_chromium
def test_pages_of_the_ui_ask_no_other_server_for_anything(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    asked = set[str]()

    class Elsewhere(Quiet):
        """Any other server, which Chromium takes for its proxy."""

        def do_CONNECT(self) -> None:
            asked.add(self.path)
            self.send_error(502)

        do_GET = do_CONNECT

    with answering(Elsewhere) as proxy, webserver(tmp_path) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", f"--proxy-server={proxy}", "--disable-background-networking"],
        )
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"{url}/runs")
        page.get_by_text("No runs").first.wait_for()  # by a query of GraphQL
        assert '"telemetryEnabled": true' in page.locator("#initialization-data").inner_html(), "Dagster's default"
        assert {one for one in asked if "dagster" in one} == set()
        page.evaluate(IMAGE)
        page.goto(f"{url}/graphql")
        page.evaluate(IMAGE)
        assert {one for one in asked if "example.org" in one} == set()
        page.goto("about:blank")  # where no policy forbids it
        page.evaluate(IMAGE)
        browser.close()
    assert {one for one in asked if "example.org" in one} == {"http://images.example.org/x"}
