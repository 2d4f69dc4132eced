"""Dagster's web server behind a guard, because it answers any page that the user has open in a browser.

As a module it is a command: `python -m dagster_project.orchestration.dagster.webserver` takes the arguments of
`dagster-webserver`, and after `dev` those of `dagster dev`, which then starts this web server.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dagster_project.core.imports import lean_imports
from dagster_project.orchestration.private_api import private_module

HOSTS = "PEDIGREE_UI_HOSTS"
"""Variable with more names under which browsers may reach the server, separated
by commas: that of a proxy, for example."""
NOTHING_ELSEWHERE = b"default-src 'self' 'unsafe-inline' data: blob:"
"""Policy that the browser applies besides Dagster's own, which lets its pages load
anything from anywhere: a script of dagster.io, unless dagster.yaml turns telemetry off."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Guard:
    """ASGI middleware.

    Refuses requests that another website made, or that reached the server under a name which is not its own.

    Without it any website could launch runs (a GET of GraphQL can be a mutation) and, by a name that it lets resolve to
    this host (DNS rebinding), read everything. It does not authenticate anybody.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], hosts: Iterable[str] = ()) -> None:
        """Args:
        hosts: names of the server besides IP addresses, localhost, and the name of this host.
        """
        self.app = app
        self.hosts = {"localhost", socket.gethostname().lower(), *(host.strip().lower() for host in hosts)} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self.refuses(scope) if scope["type"] in {"http", "websocket"} else None
        if reason is None:
            await self.app(scope, receive, _confined(send) if scope["type"] == "http" else send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            body = f"Refused: {reason}\n".encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": int(HTTPStatus.FORBIDDEN), "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def refuses(self, scope: Scope) -> str | None:
        """Why a request is refused; None if it is not."""
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        host = [value for name, value in headers if name == "host"]
        origins = [value for name, value in headers if name == "origin"]
        if len(host) != 1 or not self._is_ours(host[0]):
            return (
                f"the server is not known as {host[0] if host else 'nothing'}; names are added by the variable {HOSTS}"
            )
        if any(urlsplit(origin).netloc.lower() != host[0].lower() for origin in origins):
            return "the request comes from another website"
        is_link = (
            scope["type"] == "http"
            and scope["method"] in {"GET", "HEAD"}
            and scope["path"].rstrip("/").endswith("/graphql")
        )
        if is_link and "query" in parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True):
            return "queries of GraphQL are sent by POST"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.hosts
        return True  # a website can let its name resolve to this host, but then the name stands here


def _confined(send: Send) -> Send:
    """Answers that load nothing from other websites, and that none can show in a
    frame, where a user could be made to click."""

    async def answer(message: Any) -> None:
        if message["type"] == "http.response.start":
            added = [(b"x-frame-options", b"SAMEORIGIN"), (b"content-security-policy", NOTHING_ELSEWHERE)]
            message["headers"] = [*message.get("headers", []), *added]
        await send(message)

    return answer


def main() -> None:
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")  # a DAGSTER_HOME of the user may say nothing of it
    if sys.argv[1:2] != ["dev"]:
        with lean_imports():
            cli = private_module("dagster_webserver.cli")
        create = cli.create_app_from_workspace_process_context
        hosts = os.environ.get(HOSTS, "").split(",")
        cli.create_app_from_workspace_process_context = lambda *args, **named: Guard(create(*args, **named), hosts)
        cli.main()
        return
    with lean_imports():
        dev = private_module("dagster._cli.dev")
    start = dev.open_ipc_subprocess

    def guarded(command: list[str], **named: Any) -> Any:
        return start([__spec__.name if part == "dagster_webserver" else part for part in command], **named)

    dev.open_ipc_subprocess = guarded
    dev.dev_command(sys.argv[2:], prog_name="dagster dev")


if __name__ == "__main__":
    main()
