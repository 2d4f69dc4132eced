"""A real S3 server (moto's) on loopback, with one bucket. Objects are in its memory and end with it."""

from __future__ import annotations

import hashlib
import json
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from builders.servers import base_environment, free_port, running

BUCKET = "pedigree"


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    """http://127.0.0.1:PORT"""
    url: str
    """s3://BUCKET/dvc"""
    key: str
    """Access key id. Like the secret, it may appear in no file of a project."""
    secret: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the server. It accepts any credentials:
        tests look for these in files, logs and objects."""
        return {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_DEFAULT_REGION": "us-east-1"}

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of the objects in the bucket."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", []) if item["Key"].endswith(suffix)]

    def read(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def write(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def revision(self, prefix: str) -> str:
        """What `revision` of a source pins: the sha256 of the list of objects, from the server's own list."""
        listed = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]
        lines = [[one["Key"].removeprefix(f"{prefix}/"), one["Size"], one["ETag"].strip('"')] for one in listed]
        return hashlib.sha256("".join(json.dumps(line) + "\n" for line in sorted(lines)).encode()).hexdigest()

    def make_bucket(self) -> None:
        self._client.create_bucket(Bucket=BUCKET)

    @cached_property  # building one reads the description of the service again
    def _client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start the server and make the bucket.

    Args:
        folder: an existing folder for the server's log.
    """
    port = free_port()
    server = S3Server(
        f"http://127.0.0.1:{port}",
        f"s3://{BUCKET}/dvc",
        f"AKIA{secrets.token_hex(8).upper()}",
        secrets.token_urlsafe(30),
    )

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{server.endpoint}/moto-api/", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, folder / "s3.log", answers, environment=base_environment()) as process:
        server.make_bucket()
        yield replace(server, process=process)
