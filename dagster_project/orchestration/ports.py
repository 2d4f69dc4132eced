"""Ports of this host that a command listens on."""

from __future__ import annotations

import errno
import socket

from dagster_project.core.errors import InputError


def bound(host: str, port: int, option: str, usual: int, task: str = "listen") -> socket.socket:
    """A socket that is bound to a port of an address of this host.

    Args:
        option: of the command line, which names the port.
        usual: another port, for the message.
        task: what the port is for, for the message.
    Raises:
        InputError: the port is in use, reserved for root or out of range, or the address is not one of this host.
    """
    if not 0 < port < 65536:
        raise InputError(f"{option} {port}: not a port", f"give a number from 1 to 65535, e.g. {usual}")
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        following = port + 1 if port < 65535 else usual
        hints = {
            errno.EADDRINUSE: f"stop the process that uses it, or give another {option}, e.g. {following}",
            errno.EACCES: f"only root may use this port; give another {option}, e.g. {usual}",
        }
        raise InputError(
            f"cannot {task} on {host}:{port}: {error.strerror}",
            hints.get(error.errno or 0, f"{host} must be an address of this host"),
        ) from None
    return found
