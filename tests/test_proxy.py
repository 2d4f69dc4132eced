"""deploy/proxy/nginx.conf: nobody without a password reaches the UI, and the
guard behind it sees Origin and Host as the browser sent them."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from builders.servers import Quiet, free_port
from conftest import ROOT

from dagster_project.orchestration.dagster.webserver import Guard

CONFIG = (ROOT / "deploy/proxy/nginx.conf").read_text()
NAME = "pedigree.example.org"


class Echo(Quiet):
    """Answers with the headers of the request."""

    def do_GET(self) -> None:
        body = json.dumps([[name.lower(), value] for name, value in self.headers.items()]).encode()
        self.send(200, {}, body)


def _certificate(folder: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = (
        built.not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .sign(key, hashes.SHA256())
    )
    (folder / "pedigree.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "pedigree.key").write_bytes(private)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The proxy with other ports and paths, in front of a server that echoes headers."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have nginx")
        pytest.skip("needs nginx")
    folder, port = tmp_path_factory.mktemp("proxy"), free_port()
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    _certificate(folder)
    (folder / "pedigree.htpasswd").write_text("ann:{PLAIN}secret\n")
    server = CONFIG.replace("/etc/nginx", str(folder)).replace("listen 443", f"listen 127.0.0.1:{port}")
    server = server.replace("127.0.0.1:3000", f"127.0.0.1:{upstream.server_port}")
    scratch = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = (
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\nhttp {{\naccess_log"
        f" off;\n{scratch}{server}}}\n"
    )
    (folder / "nginx.conf").write_text(f"user root;\n{whole}" if os.geteuid() == 0 else whole)
    process = subprocess.Popen(
        [nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.PIPE, text=True
    )
    while True:
        if process.poll() is not None:
            raise AssertionError(process.stderr.read() if process.stderr else "")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    yield f"https://127.0.0.1:{port}"
    process.terminate()
    process.wait()
    upstream.shutdown()
    upstream.server_close()


def ask(address: str, **headers: str) -> tuple[int, list[tuple[str, str]]]:
    """Status, and the headers that arrived behind the proxy."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    request = urllib.request.Request(
        f"{address}/graphql", headers={"Host": NAME, **{k.replace("_", "-"): v for k, v in headers.items()}}
    )
    try:
        with opener.open(request, timeout=30) as reply:
            return reply.status, [tuple(pair) for pair in json.loads(reply.read())]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, []


PASSWORD = "Basic YW5uOnNlY3JldA=="


@pytest.mark.parametrize("given", [{}, {"Authorization": "Basic YW5uOndyb25n"}])
def test_nobody_without_a_password_gets_through(address: str, given: dict[str, str]) -> None:
    assert ask(address, **given) == (401, [])


@pytest.mark.parametrize(
    ("origin", "name", "refused"),
    [
        (f"https://{NAME}", NAME, None),
        ("https://evil.example", NAME, "another website"),
        (f"https://{NAME}", "evil.example", "not known as"),
    ],
)
def test_the_guard_sees_who_asks(address: str, origin: str, name: str, refused: str | None) -> None:
    status, headers = ask(address, Authorization=PASSWORD, Origin=origin, Host=name)
    assert status == 200 and "authorization" not in dict(headers), "the password stays with the proxy"
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in headers],
    }

    async def app(*_: object) -> None:
        raise AssertionError

    reason = Guard(app, [NAME]).refuses(scope)
    assert reason is None if refused is None else refused in str(reason)


def test_web_sockets_are_passed_on(address: str) -> None:
    _, headers = ask(address, Authorization=PASSWORD, Upgrade="websocket", Connection="Upgrade")
    assert ("upgrade", "websocket") in headers and ("connection", "upgrade") in headers


def test_the_page_names_this_example_and_its_variable() -> None:
    page = (ROOT / "docs/security.md").read_text()
    assert "deploy/proxy/nginx.conf" in page and "PEDIGREE_UI_HOSTS" in page and "PEDIGREE_UI_HOSTS" in CONFIG
    assert re.search(r"proxy_pass http://127\.0\.0\.1:3000;", CONFIG), "the default address of `pedigree ui`"
