"""Ports of this host that a command listens on."""

from __future__ import annotations

import socket

from dagster_project.core.errors import InputError


def bound(host: str, port: int, option: str, usual: int, task: str = "listen") -> socket.socket:
    """A socket that is bound to a port of an address of this host.

    Args:
        option: of the command line, which names the port.
        usual: another port, for the message.
        task: what the port is for, for the message.
    Raises:
        InputError: the port is in use or out of range.
    """
    if not 0 < port < 65536:
        raise InputError(f"{option} {port}: not a port", f"give a number from 1 to 65535, e.g. {usual}")
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise InputError(
            f"cannot {task} on {host}:{port}: {error.strerror}",
            f"stop the process that uses it, or give another {option}, e.g. {port + 1 if port < 65535 else usual}",
        ) from None
    return found
