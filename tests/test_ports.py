"""Ports that a command listens on: one that cannot be bound is refused with the reason and the next step."""

from __future__ import annotations

import errno
import socket

import pytest

from dagster_project.core.errors import InputError
from dagster_project.orchestration.ports import bound

LOOPBACK = "127.0.0.1"


def test_a_free_port_is_bound_and_is_then_taken_for_others() -> None:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        free = probe.getsockname()[1]
    with bound(LOOPBACK, free, "--port", 8000) as mine:
        mine.listen()
        assert mine.getsockname() == (LOOPBACK, free)
        with pytest.raises(InputError, match=f"cannot serve pages on {LOOPBACK}:{free}: ") as refused:
            bound(LOOPBACK, free, "--pages-port", 3100, "serve pages")
        assert f"another --pages-port, e.g. {free + 1}" in refused.value.hint


@pytest.mark.parametrize("port", [-1, 0, 65536, 70000])
def test_a_number_that_is_not_a_port_is_refused(port: int) -> None:
    with pytest.raises(InputError, match=f"--port {port}: not a port") as refused:
        bound(LOOPBACK, port, "--port", 3000)
    assert "from 1 to 65535, e.g. 3000" in refused.value.hint


def test_an_address_of_another_host_is_named_as_the_mistake() -> None:
    host = "192.0.2.1"  # of a network that is reserved for documentation
    with pytest.raises(InputError, match=f"cannot listen on {host}:8000: ") as refused:
        bound(host, 8000, "--port", 3000)
    assert refused.value.hint == f"{host} must be an address of this host"


def test_a_port_that_only_root_may_use_is_not_taken_for_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(InputError, match="80: Permission denied") as refused:
        bound(LOOPBACK, 80, "--port", 3000)
    assert refused.value.hint == "only root may use this port; give another --port, e.g. 3000"
