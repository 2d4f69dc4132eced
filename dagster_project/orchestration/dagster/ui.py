"""`pedigree ui`: Dagster's web server and daemon, with its home in the project,
and a server of data/pages, both on loopback."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dagster_project.core.errors import InputError
from dagster_project.orchestration import ports
from dagster_project.orchestration.dagster import pages, webserver
from dagster_project.orchestration.dagster.home import home
from dagster_project.orchestration.dagster.lean_sync import sync_if_changed
from dagster_project.orchestration.dvc_run import command_environment

log = logging.getLogger("pedigree")


def serve(root: Path, host: str, port: int, pages_port: int, announce: Callable[[], None]) -> NoReturn:
    """Start the server of data/pages, sync once, then execute `dagster dev`, with the guarded web server, in this
    process, so that stop signals reach it directly.

    Args:
        host, port: of the Dagster UI.
        pages_port: of the server of data/pages, which is always on loopback.
        announce: called when nothing can be refused any more.
    Raises:
        InputError: a port is in use, Dagster's home cannot be used, or the project's files are invalid.
    """
    if port == pages_port:
        raise InputError(f"--port and --pages-port are both {port}", "give two different ports")
    ports.bound(host, port, "--port", 3000).close()
    listener = pages.listen(pages_port)
    folder = home(root)
    pages.remember_port(root, listener.getsockname()[1])
    for line in sync_if_changed(root, wait=False):  # the daemon syncs later
        log.info(line)
    announce()
    options = ["-w", str(root / "workspace.yaml"), "-h", host, "-p", str(port)]
    command = [sys.executable, "-m", webserver.__name__, "dev", *options]
    hosts = ",".join(filter(None, (host, os.environ.get(webserver.HOSTS))))
    environment = os.environ | command_environment(
        {"DAGSTER_HOME": str(folder), "PEDIGREE_PROJECT": str(root), webserver.HOSTS: hosts}
    )
    pages.start(root, listener)
    listener.close()
    os.chdir(root)
    # shells without job control start background processes with it ignored; Dagster then ignores SIGTERM
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execve(command[0], command, environment)
