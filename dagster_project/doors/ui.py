"""`pedigree ui`: Dagster's web server and daemon, on loopback, with its home inside the project."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

from dagster_project.doors.dagster_assets import home, open_instance
from dagster_project.doors.runs import reap
from dagster_project.doors.sync import sync
from dagster_project.errors import InputError

log = logging.getLogger("pedigree")


def serve(root: Path, host: str, port: int) -> int:
    """Sync once, then run `dagster dev` until it is stopped.

    Raises:
        InputError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error.strerror}", f"stop what runs there, or give another --port, e.g. {port + 1}"
            ) from None
    with open_instance(root) as instance:
        for line in reap(instance):
            log.info(line)
        sync(root, instance)
    log.info(f"Dagster UI: http://{host}:{port}  (stop with Ctrl-C)")
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(root / "workspace.yaml"), "-h", host, "-p", str(port)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DAGSTER_HOME": str(home(root)),
        "PEDIGREE_PROJECT": str(root),
    }
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode
