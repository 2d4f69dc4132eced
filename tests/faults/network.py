"""Class `network`: the Hub, a judge's endpoint and S3 through a line that is refused, cut, slow or answers nonsense."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from builders.ballots import make_answered_project
from builders.hub import NAME, OLD, hub_with_pairs, serving
from builders.s3 import BUCKET, s3_server
from builders.servers import Quiet, free_port
from builders.warm import Outcome

from faults import project
from faults.case import Case, Play, Violation

HTML = b"<html>log in</html>"
ANSWERS = {
    "garbage": b"\x16\x03\x01 what?\r\n\r\n",
    "status-500": b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "status-403": b"HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "a-page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
    % (len(HTML), HTML),
}
"""What is answered instead of the server's answer."""
CUTS = {"cut-at-once": 0, "cut-in-the-head": 60, "cut-in-the-body": 700}
"""Bytes of an answer after which the line is dead."""
LINES = ("refused", *ANSWERS, *CUTS, "slow")
"""All but `slow` must end in one message."""


def _serve_line(listener: socket.socket, target: tuple[str, int], kind: str) -> None:
    """Pass connections on to a server, with the fault; never returns."""
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_connection, args=(client, target, kind), daemon=True).start()


def _connection(client: socket.socket, target: tuple[str, int], kind: str) -> None:
    with suppress(OSError), client:
        if kind in ANSWERS:
            client.recv(65536)
            client.sendall(ANSWERS[kind])
            return
        with socket.create_connection(target) as server:
            sent = threading.Thread(target=_pump, args=(client, server), daemon=True)
            sent.start()
            left = CUTS.get(kind, 10**9)
            while left and (chunk := server.recv(min(left, 1024))):
                client.sendall(chunk)
                left -= len(chunk)
                time.sleep(0.2 if kind == "slow" else 0)
            if kind in CUTS:
                client.shutdown(socket.SHUT_RD)  # ends the thread: while it reads, the socket stays open
                sent.join()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(65536):
            sink.sendall(chunk)


@contextmanager
def _served(serve: Callable[[], None]) -> Iterator[None]:
    """A server in a process of its own: this process must not have threads."""
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            serve()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def _line(target: int, kind: str) -> Iterator[int]:
    """Port of a line to a port of loopback."""
    if kind == "refused":
        yield free_port()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        with _served(lambda: _serve_line(listener, ("127.0.0.1", target), kind)):
            yield listener.getsockname()[1]


def cases(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    for kind in ("status-403", "a-page") if fixed else LINES:  # the others are tried again for a while
        yield Case(f"network/judge/{kind}", "", _judge(kind))
    if not fixed:
        for kind in LINES:
            yield Case(f"network/hub/{kind}", "base_model", _hub(kind))
        for kind in LINES:
            yield Case(f"network/s3/{kind}", "base_model", _s3(kind))


def _judge(kind: str) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        shutil.rmtree(at_work.root)
        at_work.root.mkdir()
        project.forked(make_answered_project, at_work.root)  # its libraries start threads
        before = project.files(at_work.root)
        server = ThreadingHTTPServer(("127.0.0.1", 0), _JudgeHandler)
        words = ("pedigree", "judge", "lora", "few_shot", "--n", "2", "--model", "m", "--json", "--endpoint")
        with _served(server.serve_forever):
            with _line(server.server_port, kind) as port:
                failed = at_work.explained(at_work.run(*words, f"http://127.0.0.1:{port}/v1"))
            if (failed.code == 0) != (kind == "slow"):
                raise Violation(f"exit code {failed.code}:\n{failed.text}")
            done = at_work.run(*words, f"http://127.0.0.1:{server.server_port}/v1")
        server.server_close()
        if done.code or json.loads(done.out)["pairs"] != 2:
            raise Violation(done.text)
        if found := project.differences(project.files(at_work.root), before):
            raise Violation("\n".join(found))

    return play


class _JudgeHandler(Quiet):
    """Prefers the answer that comes later in the alphabet, whatever the order."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pair = json.loads(asked["messages"][-1]["content"])
        letter = "A" if pair["answer_a"] > pair["answer_b"] else "B"
        body = {
            "choices": [{"message": {"content": letter}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 2},
            "padding": "x" * 2000,
        }
        text = json.dumps(body).encode()
        self.send(200, {}, text)


def _hub(kind: str) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        _read_from(at_work, {"hub": NAME, "revision": OLD, "split": "train", "license": "MIT"})
        with serving(hub_with_pairs()) as hub:
            with _line(int(hub.url.rpartition(":")[2]), kind) as port:
                failed = _cold(
                    at_work,
                    {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "5"},
                )
            again = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
            _reads_after(at_work, failed, kind, again, rows=5)

    return play


def _s3(kind: str) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        with ExitStack() as stack:
            server = stack.enter_context(s3_server(at_work.place.around))
            server.make_bucket()
            server.write(
                "rows/a.jsonl", b"".join(b'{"prompt": "Hi %d", "completion": "Hello"}\n' % i for i in range(50))
            )
            address = f"s3://{BUCKET}/rows"
            _read_from(at_work, {"path": address, "revision": _revision(at_work, server, address), "license": "MIT"})
            with _line(int(server.endpoint.rpartition(":")[2]), kind) as port:
                failed = _cold(at_work, {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
            _reads_after(at_work, failed, kind, {**server.environment, "AWS_ENDPOINT_URL": server.endpoint}, rows=50)

    return play


def _revision(at_work: Play, server: Any, address: str) -> str:
    import hashlib

    listed = server._client.list_objects_v2(Bucket=BUCKET, Prefix="rows/")["Contents"]
    lines = [[one["Key"].removeprefix("rows/"), one["Size"], one["ETag"].strip('"')] for one in listed]
    return hashlib.sha256("".join(json.dumps(line) + "\n" for line in sorted(lines)).encode()).hexdigest()


def _read_from(at_work: Play, source: Mapping[str, str]) -> None:
    """Let the project read another source."""
    from ruamel.yaml import YAML

    path = at_work.root / "params.yaml"
    values = YAML(typ="safe").load(path.read_text())
    values["raw_examples"]["sources"] = [source]
    path.write_text(json.dumps(values))


def _cold(at_work: Play, variables: Mapping[str, str]) -> Outcome:
    """Run the stage raw_examples in a new interpreter: clients of the Hub and
    of S3 read the environment when they are imported."""
    words = (sys.executable, "-m", "dagster_project", "run", "raw_examples")
    environment = {**at_work.place.environment(), "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **variables}
    done = subprocess.run(
        words, cwd=at_work.root, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    outcome = Outcome(("pedigree", *words[3:]), done.returncode, done.stdout, done.stderr)
    at_work.outcomes.append(outcome)
    at_work.seen(outcome)
    return at_work.explained(outcome)


def _reads_after(at_work: Play, failed: Outcome, kind: str, variables: Mapping[str, str], rows: int) -> None:
    """After the fault nothing was written; without it the stage reads all rows."""
    if kind != "cut-in-the-body" and (failed.code == 0) != (kind == "slow"):  # clients may go on where the body was cut
        raise Violation(f"exit code {failed.code}:\n{failed.text}")
    if failed.code and (at_work.root / "data/raw_examples").exists():
        raise Violation("an output appeared though the stage failed")
    if left := [*(at_work.place.around / "tmp").iterdir()]:
        raise Violation(f"left behind: {left}")
    done = _cold(at_work, variables)
    report = json.loads((at_work.root / "data/reports/raw_examples.json").read_text()) if done.code == 0 else {}
    if report.get("rows_out") != rows:
        raise Violation(f"the run after the fault:\n{done.text}")
    if not any(Path(at_work.root / "data/raw_examples").glob("*.parquet")):
        raise Violation("no output")


CLASSES = {"network": cases}
