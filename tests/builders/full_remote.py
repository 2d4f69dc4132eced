"""A port in front of an S3 server that can run out of space: it refuses to store anything, and answers all else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from urllib.parse import urlsplit

from builders.servers import Quiet, answering

DISK = 507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."
"""Status, code and message of MinIO, below its threshold of free space."""
NO_BLOCKS = 500, "InternalError", "We encountered an internal error: cause(no space left on device)"
"""Of MinIO, whose disks are full."""
BUCKET_QUOTA = 400, "XMinioAdminBucketQuotaExceeded", "Bucket quota exceeded"
QUOTA = 403, "QuotaExceeded", ""
"""Of Ceph."""
POLICY = 403, "AccessDenied", "Access Denied"
"""Of a server that forbids to write when a quota is reached."""
VOLUMES = 500, "InternalError", "We encountered an internal error, please try again."
"""Of SeaweedFS without free volumes."""


@dataclass
class FullRemote:
    url: str = ""
    answer: tuple[int, str, str] | None = None
    """The answer to a request that stores something; None: there is space."""
    only: str = ""
    """Text in the path of the requests that are refused; others are stored."""
    refused: list[str] = field(default_factory=list)
    """Paths of the requests that were refused."""


@contextmanager
def full_remote(endpoint: str) -> Iterator[FullRemote]:
    """Answer in place of the server at this address, which has space."""
    remote, target = FullRemote(), urlsplit(endpoint)

    class Handler(Quiet):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            stores = self.command == "PUT" or (self.command == "POST" and "delete" not in urlsplit(self.path).query)
            if stores and remote.answer and remote.only in self.path:
                remote.refused.append(self.path)
                status, code, message = remote.answer
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
                self.reply(status, {"Content-Type": "application/xml"}, text.encode())
                return
            server = HTTPConnection(str(target.hostname), target.port, timeout=60)
            try:
                server.request(self.command, self.path, body, dict(self.headers.items()))
                response = server.getresponse()
                self.reply(response.status, dict(response.getheaders()), response.read())
            finally:
                server.close()

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    with answering(Handler) as remote.url:
        yield remote
