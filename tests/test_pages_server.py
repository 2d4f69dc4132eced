"""data/pages by URL: readable on loopback while the UI runs, and nothing else is served."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from builders.servers import free_port
from conftest import pedigree

from dagster_project.core.errors import InputError
from dagster_project.orchestration.dagster import pages
from dagster_project.orchestration.dagster.project import PedigreeProject
from dagster_project.orchestration.dagster.ui import only_one
from dagster_project.pipeline import STAGES
from dagster_project.views.ballot import ballot_page

SECRET = "a secret outside data/pages"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with pages, a secret beside them, and links to it."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    root = tmp_path / "project"
    folder = root / "data" / "pages" / "instructions"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text(ballot_page({"ballot": "b", "seal": "", "pairs": []}))
    (folder / "plain.html").write_text("<script>alert(1)</script>")
    (folder / "review.csv").write_text("row,decision\n")
    (folder / ".hidden").write_text(SECRET)
    (root / "params.yaml").write_text(SECRET)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key.txt").write_text(SECRET)
    (folder / "link.html").symlink_to(root / "params.yaml")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.html")
    return root


@pytest.fixture
def port(root: Path) -> Iterator[int]:
    number = free_port()
    server = pages.server(root, pages.listen(number))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield number
    server.shutdown()
    server.server_close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(pages.HOST, port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)  # as it is: no client tidies it
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_a_page_is_served_with_its_own_strict_policy(root: Path, port: int) -> None:
    status, headers, body = ask(port, "/instructions/report.html")
    assert (status, body) == (200, (root / "data/pages/instructions/report.html").read_text())
    (own,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', body)
    assert headers["Content-Security-Policy"] == f"{own}; frame-ancestors 'none'" and "unsafe" not in own
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Content-Type"] == "text/html; charset=utf-8"
    status, headers, _ = ask(port, "/instructions/plain.html")
    assert (status, headers["Content-Security-Policy"]) == (200, "default-src 'none'; frame-ancestors 'none'")
    assert ask(port, "/instructions/review.csv")[1]["Content-Type"].startswith("text/csv")
    assert ask(port, "/instructions/report.html", "HEAD")[2] == ""


def test_data_docs_have_their_styles_and_no_scripts(root: Path, port: int) -> None:
    (root / "data/pages/instructions/data_docs").mkdir()
    (root / "data/pages/instructions/data_docs/index.html").write_text(
        "<style>p {color: red}</style><script src='https://a.example/x.js'></script>"
    )
    status, headers, _ = ask(port, "/instructions/data_docs/index.html")
    policy = headers["Content-Security-Policy"]
    assert (
        status == 200
        and policy.startswith("default-src 'none'; style-src 'unsafe-inline' https:;")
        and "script" not in policy
    )


@pytest.mark.parametrize(
    "path",
    [
        "/../params.yaml", "/../../params.yaml", "/instructions/../../../params.yaml", "/%2e%2e/%2e%2e/params.yaml",
        "/..%2f..%2fparams.yaml", "/%2fetc/passwd", "//etc/passwd", "/instructions/..\\..\\..\\params.yaml",
        "/instructions/link.html", "/instructions/folder/key.txt", "/instructions/folder/", "/instructions/.hidden",
        "/instructions/pipe.html", "/instructions/report.html%00.txt",
        "/" + 300 * "a",
        "/instructions/report.html/x", "/nothing",
    ],
)  # fmt: skip
def test_nothing_outside_the_folder_is_served_and_no_link_is_followed(port: int, path: str) -> None:
    status, _, body = ask(port, path)
    assert status == 404 and SECRET not in body and "root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(port: int, method: str) -> None:
    assert ask(port, "/instructions/report.html", method)[0] == 501


def test_dns_rebinding_reads_nothing(port: int) -> None:
    assert ask(port, "/instructions/report.html", Host="evil.example")[0] == 403
    assert ask(port, "/instructions/report.html", Host=f"localhost:{port}")[0] == 200


def test_before_the_first_page_the_address_that_ui_prints_says_so(root: Path, port: int) -> None:
    shutil.rmtree(root / "data/pages")
    status, _, body = ask(port, "/")
    assert status == 200 and "no stage with pages has run yet" in body
    assert ask(port, "/instructions/")[0] == 404


def test_stages_without_pages_have_no_link_to_them(root: Path) -> None:
    project = PedigreeProject(root)
    assert {stage for stage in STAGES if project.page_url(stage)} == {
        "instructions",
        "preferences",
        "adapter",
        "aligned",
        "comparison",
    }
    assert "/adapter/lora/" in str(project.page_url("adapter@lora"))


def test_a_folder_lists_what_is_served_from_it(port: int) -> None:
    status, headers, body = ask(port, "/instructions/")
    assert status == 200 and "script" not in headers["Content-Security-Policy"]
    assert re.findall('href="([^"]*)"', body) == [
        f"/instructions/{name}" for name in ("plain.html", "report.html", "review.csv")
    ]


def test_a_link_of_another_project_is_refused_and_a_link_of_this_one_answers(
    root: Path, port: int, tmp_path: Path
) -> None:
    pages.remember_port(root, port)
    link = urlsplit(pages.url(root, "instructions/report.html"))
    assert (link.scheme, link.netloc, link.path) == ("http", f"127.0.0.1:{port}", "/instructions/report.html")
    assert ask(port, f"{link.path}?{link.query}")[0] == 200
    other = urlsplit(pages.url(tmp_path / "another", "instructions/report.html"))
    assert ask(port, f"{other.path}?{other.query}")[0] == 404


def test_links_use_the_port_of_the_latest_ui_or_the_default(root: Path) -> None:
    assert pages.port_of(root) == pages.DEFAULT_PORT
    pages.remember_port(root, 4567)
    assert pages.port_of(root) == 4567 and ":4567/" in pages.url(root, "")


def test_a_busy_port_is_reported_with_the_next_step(project: Path) -> None:
    with socket.socket() as taken:
        taken.bind((pages.HOST, 0))
        taken.listen()
        number = taken.getsockname()[1]
        done = pedigree(project, "ui", "--port", str(free_port()), "--pages-port", str(number))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"cannot serve data/pages on 127.0.0.1:{number}" in done.stderr and "--pages-port" in done.stderr
    assert not (project / ".dagster").exists()


def test_one_ui_has_a_dagster_home_until_its_process_ends(tmp_path: Path) -> None:
    """Also if that is another program by then: it becomes `dagster dev`."""
    script = (
        "import os\nfrom pathlib import Path\nfrom dagster_project.orchestration.dagster import ui\n"
        f"lock = ui.only_one(Path({str(tmp_path)!r}), 'http://127.0.0.1:3000')\nprint(flush=True)\n"
        "os.execvp('sleep', ['sleep', '600'])\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"\n"
        while Path(f"/proc/{first.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.05)
        with pytest.raises(InputError, match=f"process {first.pid}, http://127.0.0.1:3000"):
            only_one(tmp_path, "http://127.0.0.1:3001")
    finally:
        first.kill()
        first.wait()
    os.close(only_one(tmp_path, "http://127.0.0.1:3001"))


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_an_invalid_port_is_bad_input(port: int) -> None:
    with pytest.raises(InputError, match="not a port"):
        pages.listen(port)


def test_the_server_ends_with_the_process_that_started_it(root: Path) -> None:
    number = free_port()
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom dagster_project.orchestration.dagster import pages\nserver ="
        f" pages.start(Path({str(root)!r}), pages.listen({number}))\nprint(server.pid, flush=True)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None and int(parent.stdout.readline())
        assert ask_patiently(number) == 200
    finally:
        parent.kill()
        parent.wait()
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex((pages.HOST, number)):
                return
        time.sleep(0.05)
    raise AssertionError("the server outlived the UI")


def ask_patiently(port: int) -> int:
    for _ in range(600):
        try:
            return ask(port, "/instructions/report.html")[0]
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
    raise AssertionError("the server never answered")
