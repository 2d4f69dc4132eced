"""data/pages over HTTP while the Dagster UI runs: on loopback only, read-only, nothing outside the folder.

As a module it is the server: `python -m dagster_project.orchestration.dagster.pages PROJECT FILE_DESCRIPTOR`.
"""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from dagster_project.core.records import write_text
from dagster_project.orchestration.ports import bound
from dagster_project.orchestration.processes import end_with_parent

HOST = "127.0.0.1"
DEFAULT_PORT = 3100
PORT_FILE = Path(".dvc", "tmp", "pedigree", "pages_port")
"""File in the project: the port of the latest `pedigree ui`, for links that are
recorded later. Not in Dagster's home, which projects may share."""
TYPES = {".html": "text/html; charset=utf-8", ".csv": "text/csv; charset=utf-8", ".json": "application/json"}
DENY_ALL = "default-src 'none'"
LISTING_POLICY = f"{DENY_ALL}; style-src 'unsafe-inline'"
DATA_DOCS = "data_docs"
DATA_DOCS_POLICY = f"{DENY_ALL}; style-src 'unsafe-inline' https:; font-src https:; img-src data:"
"""Folder of Great Expectations' pages, which have no policy: styles from the
web, as they name them, but no scripts from there."""
POLICY = re.compile(rb'<meta http-equiv="Content-Security-Policy" content="([^"\r\n]*)">')
HEAD = 4096
"""Bytes at the start of a page that are searched for its policy."""


def port_of(root: Path) -> int:
    """Port of the latest `pedigree ui` of the project, or the default."""
    try:
        return int((root / PORT_FILE).read_text())
    except (OSError, ValueError):
        return DEFAULT_PORT


def remember_port(root: Path, port: int) -> None:
    write_text(root / PORT_FILE, f"{port}\n")


def identity(root: Path) -> str:
    """Short hash of the project's folder. It distinguishes its links from those of another project on the same port."""
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]


def url(root: Path, path: str) -> str:
    """Address of a file or folder in data/pages.

    Args:
        path: relative to data/pages; a folder's ends in "/".
    """
    return f"http://{HOST}:{port_of(root)}/{quote(path)}?project={identity(root)}"


def listen(port: int) -> socket.socket:
    """A listening socket on loopback.

    Raises:
        InputError: the port is in use or out of range.
    """
    listener = bound(HOST, port, "--pages-port", DEFAULT_PORT, "serve data/pages")
    listener.listen()
    return listener


def start(root: Path, listener: socket.socket) -> subprocess.Popen[bytes]:
    """Serve from a process that ends with this one, even after this one has executed another program."""
    command = [sys.executable, "-m", "dagster_project.orchestration.dagster.pages", str(root), str(listener.fileno())]
    return subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)


def locate(base: Path, path: str) -> Path | None:
    """The file or folder of a URL path in `base`; None if there is none.

    Hidden files and symbolic links count as missing.
    """
    pieces = [piece for piece in unquote(path).split("/") if piece]
    if any(piece.startswith(".") or "\\" in piece or "\0" in piece for piece in pieces):
        return None
    target = base.resolve().joinpath(*pieces)
    try:
        resolved = target.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    return resolved if resolved == target and (resolved.is_file() or resolved.is_dir()) else None


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD. The base class refuses every other method."""

    server_version = "pedigree"
    sys_version = ""

    def __init__(self, root: Path, *arguments: object) -> None:
        self.root = root
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        status, kind, policy, body = self._answer()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def _answer(self) -> tuple[HTTPStatus, str, str, bytes]:
        """Status, content type, policy and body."""
        requested = urlsplit(self.path)
        port = self.request.getsockname()[1]
        # DNS rebinding: a web site whose name resolves to loopback
        if self.headers.get("Host") not in {f"{HOST}:{port}", f"localhost:{port}"}:
            return self._refusal(HTTPStatus.FORBIDDEN, "this server answers on loopback only")
        project = parse_qs(requested.query).get("project", [identity(self.root)])
        if project != [identity(self.root)]:
            return self._refusal(
                HTTPStatus.NOT_FOUND, f"the link belongs to another project; this server has the pages of {self.root}"
            )
        base = self.root / "data" / "pages"
        path = locate(base, requested.path)
        if path is None and not requested.path.strip("/"):
            return (
                HTTPStatus.OK,
                TYPES[".html"],
                LISTING_POLICY,
                _page("data/pages", "<li>empty: no stage with pages has run yet</li>").encode(),
            )
        if path is None:
            return self._refusal(
                HTTPStatus.NOT_FOUND, "no such page: `pedigree render` draws the pages of stages that have run"
            )
        if path.is_dir():
            return HTTPStatus.OK, TYPES[".html"], LISTING_POLICY, _listing(base.resolve(), path).encode()
        try:
            body = path.read_bytes()
        except OSError as error:
            return self._refusal(HTTPStatus.NOT_FOUND, f"cannot be read: {error.strerror}")
        policy = DATA_DOCS_POLICY if path.parent.name == DATA_DOCS else DENY_ALL
        if path.suffix == ".html" and (own := POLICY.search(body[:HEAD])):
            policy = own[1].decode("latin-1")
        return HTTPStatus.OK, TYPES.get(path.suffix, "application/octet-stream"), policy, body

    def _refusal(self, status: HTTPStatus, why: str) -> tuple[HTTPStatus, str, str, bytes]:
        return status, "text/plain; charset=utf-8", DENY_ALL, f"{why}\n".encode()

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: Dagster uses the terminal."""


def _listing(base: Path, folder: Path) -> str:
    """Page with links to the content of a folder, without hidden files and symbolic links."""
    inside = [path for path in folder.iterdir() if path.name[0] != "." and not path.is_symlink()]
    folders, files = [path for path in inside if path.is_dir()], [path for path in inside if path.is_file()]
    names = sorted([f"{path.name}/" for path in folders] + [path.name for path in files])
    where = "/".join(["data/pages", *folder.relative_to(base).parts])
    prefix = quote("/".join(["", *folder.relative_to(base).parts, ""]))
    items = "".join(f'<li><a href="{escape(prefix + quote(name))}">{escape(name)}</a></li>' for name in names)
    return _page(where, items or "<li>empty</li>")


def _page(where: str, items: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">'
        f'<head><meta charset="utf-8"><title>{escape(where)}</title>'
        "<style>body{font:1rem sans-serif;margin:2rem}</style></head>"
        f"<body><h1>{escape(where)}</h1><ul>{items}</ul></body></html>\n"
    )


def server(root: Path, listener: socket.socket) -> ThreadingHTTPServer:
    """The server on a listening socket."""
    http_server = ThreadingHTTPServer(listener.getsockname(), partial(Handler, root), bind_and_activate=False)
    http_server.socket.close()
    http_server.socket = listener
    http_server.server_address = listener.getsockname()
    return http_server


def main() -> None:
    """Serve until the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops Dagster, and this process ends with it
    end_with_parent()
    server(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))).serve_forever()


if __name__ == "__main__":
    main()
