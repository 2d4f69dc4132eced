"""`pedigree ui`: Dagster's web server and daemon, with its home in the project,
and a server of data/pages, both on loopback."""

from __future__ import annotations

import fcntl
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
from dagster_project.orchestration.dagster_home import home_of
from dagster_project.orchestration.dvc_run import command_environment

log = logging.getLogger("pedigree")

LOCK = "pedigree_ui.lock"
"""File in Dagster's home that `pedigree ui` locks, with its address."""


def serve(root: Path, host: str, port: int, pages_port: int, announce: Callable[[], None]) -> NoReturn:
    """Start the server of data/pages, sync once, then execute `dagster dev`, with the guarded web server, in this
    process, so that stop signals reach it directly.

    Args:
        host, port: of the Dagster UI.
        pages_port: of the server of data/pages, which is always on loopback.
        announce: called when nothing can be refused any more.
    Raises:
        InputError: another one runs with the same home, a port is in use, Dagster's home cannot be used, or the
            project's files are invalid.
    """
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if (home_of(root) / LOCK).is_file():  # before the ports: another one uses some
        os.close(only_one(home_of(root), address))
    if port == pages_port:
        raise InputError(f"--port and --pages-port are both {port}", "give two different ports")
    ports.bound(host, port, "--port", 3000).close()
    listener = pages.listen(pages_port)
    folder = home(root)
    only_one(folder, address)
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


def only_one(folder: Path, address: str) -> int:
    """File descriptor by which this process, whatever it executes, holds the lock of a Dagster home. Dagster's daemon
    does not end where there is another one: two of them launch each run of a schedule or sensor twice.

    Args:
        address: of this process, for others.
    Raises:
        InputError: another process holds it.
    """
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 1000, 0).decode(errors="replace")
        os.close(file)
        raise InputError(
            f"another `pedigree ui` runs with Dagster's home {folder}: {holder}",
            "use that one, or stop it first: with two, Dagster would launch each run of a schedule twice",
        ) from None
    except OSError as error:
        log.warning(f"{folder / LOCK}: this file system does not lock files ({error.strerror}): start no second UI")
    os.truncate(file, 0)
    os.pwrite(file, f"process {os.getpid()}, {address}".encode(), 0)
    os.set_inheritable(file, True)
    return file
