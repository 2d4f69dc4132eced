"""Servers that tests start: each on a free port of loopback, in a process that ends with the test process."""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PR_SET_PDEATHSIG = 1


def free_ports(count: int) -> list[int]:
    """Different ports on loopback that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    return free_ports(1)[0]


def as_user(user: str) -> dict[str, object]:
    """Arguments of Popen to run as another user; none for an empty name."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


class Quiet(BaseHTTPRequestHandler):
    """Writes no log of its requests."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def send(self, status: int, headers: Mapping[str, str], content: bytes, sent: int | None = None) -> None:
        """Args:
        sent: bytes of the content after which the connection breaks; None: all.
        """
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.close_connection |= sent is not None
            self.wfile.write(content[:sent])


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer HTTP requests in threads of this process. Yields the address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def running(
    command: list[str],
    log: Path,
    answers: Callable[[], bool],
    stop: signal.Signals = signal.SIGTERM,
    user: str = "",
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it answers, and end it afterwards.

    Args:
        log: file of its output, which is shown if it does not start.
        answers: whether it is ready.
        stop: the signal that ends it, also if the test process is killed.
    """

    def end_with_tests() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, stop)

    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=end_with_tests,
            **as_user(user),
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, f"{command[0]} ended: {log.read_text()}"
            if answers():
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{command[0]} does not answer: {log.read_text()}")
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def base_environment() -> dict[str, str]:
    """PATH and a neutral locale, without credentials of the test process."""
    return {"PATH": os.environ["PATH"], "LC_ALL": "C"}
