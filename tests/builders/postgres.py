"""A real Postgres server on loopback, with its data in a temporary folder, for tests of Dagster's storage."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.servers import as_user, base_environment, free_port, running

HINT = "Postgres is not installed (Debian: apt-get install postgresql)"
UNPRIVILEGED = ("postgres", "nobody")
"""Users, best first, of the server when the tests run as root: Postgres refuses to run as root."""


@dataclass(frozen=True)
class Postgres:
    port: int
    password: str
    """Of the superuser `dagster`. It may appear in no file of a project."""

    @property
    def environment(self) -> dict[str, str]:
        """What deploy/dagster.yaml reads."""
        return {
            "PEDIGREE_PG_HOST": "127.0.0.1",
            "PEDIGREE_PG_PORT": str(self.port),
            "PEDIGREE_PG_PASSWORD": self.password,
        }

    def query(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        import psycopg2

        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, user="dagster", password=self.password, dbname=database
        )
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def renew(self) -> None:
        """Drop the database, also while clients are connected, and create an empty one."""
        self.query("DROP DATABASE IF EXISTS dagster WITH (FORCE)")
        self.query("CREATE DATABASE dagster")

    def dump(self) -> str:
        """Everything in the database, as text."""
        tables = self.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", "dagster")
        return "\n".join(str(row) for (table,) in tables for row in self.query(f'SELECT * FROM "{table}"', "dagster"))


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`; None if there is none. Debian keeps it out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Start a server with an empty database `dagster`; its folder is removed afterwards."""
    bin_folder = programs()
    assert bin_folder, HINT
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "" if os.geteuid() else next(name for name in UNPRIVILEGED if name in names)
    # not in pytest's folder, which only the user of the tests can enter
    with tempfile.TemporaryDirectory(prefix="pedigree-postgres-") as name:
        base = Path(name)
        data, password = base / "data", secrets.token_urlsafe(18)
        (base / "password").write_text(password)
        if user:
            shutil.chown(base, user)
            shutil.chown(base / "password", user)
        words = [
            "-D",
            str(data),
            "-U",
            "dagster",
            "-A",
            "scram-sha-256",
            "--pwfile",
            str(base / "password"),
            "-E",
            "UTF8",
            "--no-sync",
        ]
        done = subprocess.run(
            [str(bin_folder / "initdb"), *words],
            cwd="/",
            env=base_environment(),
            capture_output=True,
            text=True,
            check=False,
            **as_user(user),
        )
        assert done.returncode == 0, done.stderr
        (base / "password").unlink()
        port = free_port()
        server = Postgres(port, password)
        command = [
            str(bin_folder / "postgres"),
            "-D",
            str(data),
            "-p",
            str(port),
            "-h",
            "127.0.0.1",
            "-k",
            str(base),
            "-c",
            "fsync=off",
        ]
        with running(command, base / "server.log", lambda: _answers(server), signal.SIGINT, user, base_environment()):
            server.renew()
            yield server


def _answers(server: Postgres) -> bool:
    import psycopg2

    try:
        server.query("SELECT 1")
    except psycopg2.OperationalError:
        return False
    return True
