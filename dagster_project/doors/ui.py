"""`pedigree ui`: Dagster's web server and daemon, on loopback, with its home inside the project."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from dagster_project.doors.dagster_assets import home, open_instance
from dagster_project.doors.runs import reap
from dagster_project.doors.sync import sync
from dagster_project.errors import InputError

log = logging.getLogger("pedigree")


def serve(root: Path, host: str, port: int) -> NoReturn:
    """Sync once, then become `dagster dev`, so that a signal to stop reaches it and nobody else.

    Raises:
        InputError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
                f"stop what runs there, or give another --port, e.g. {port + 1 if port < 65535 else 3000}",
            ) from None
    with open_instance(root) as instance:
        for line in reap(instance) + sync(root, instance):
            log.info(line)
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(root / "workspace.yaml"), "-h", host, "-p", str(port)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DAGSTER_HOME": str(home(root)),
        "PEDIGREE_PROJECT": str(root),
    }
    os.chdir(root)
    os.execve(command[0], command, environment)
