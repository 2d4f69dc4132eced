"""`pedigree ui`: Dagster's web server and daemon, with its home in the project, and a server of data/pages, both on loopback."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from dagster_project.core.errors import InputError
from dagster_project.orchestration.dagster import pages, webserver
from dagster_project.orchestration.dagster.assets import home, open_instance
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dagster_dvc.dead_runs import reap

log = logging.getLogger("pedigree")


def serve(root: Path, host: str, port: int, pages_port: int) -> NoReturn:
    """Start the server of data/pages, sync once, then execute `dagster dev`, with the guarded web server, in this process, so that stop signals reach it directly.

    Args:
        host, port: of the Dagster UI.
        pages_port: of the server of data/pages, which is always on loopback.
    Raises:
        InputError: a port is in use.
    """
    if port == pages_port:
        raise InputError(f"--port and --pages-port are both {port}", "give two different ports")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
                f"stop the process that uses it, or give another --port, e.g. {port + 1 if port < 65535 else 3000}",
            ) from None
    listener = pages.listen(pages_port)
    folder = home(root)
    pages.remember_port(root, listener.getsockname()[1])
    with open_instance(root) as instance:
        for line in reap(instance) + sync(root, instance):
            log.info(line)
    command = [sys.executable, "-m", webserver.__name__, "dev", "-w", str(root / "workspace.yaml"), "-h", host, "-p", str(port)]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DAGSTER_HOME": str(folder),
        "PEDIGREE_PROJECT": str(root),
        webserver.HOSTS: ",".join(filter(None, (host, os.environ.get(webserver.HOSTS)))),
    }
    pages.start(root, listener)
    listener.close()
    os.chdir(root)
    os.execve(command[0], command, environment)
