"""Ports that a command listens on: one that is taken or out of range is refused with the option that names it."""

from __future__ import annotations

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
        with pytest.raises(InputError, match=rf"cannot serve pages on {LOOPBACK}:{free}: .*\n?.*") as refused:
            bound(LOOPBACK, free, "--pages-port", 3100, "serve pages")
        assert f"another --pages-port, e.g. {free + 1}" in refused.value.hint


@pytest.mark.parametrize("port", [-1, 0, 65536, 70000])
def test_a_number_that_is_not_a_port_is_refused(port: int) -> None:
    with pytest.raises(InputError, match=f"--port {port}: not a port") as refused:
        bound(LOOPBACK, port, "--port", 3000)
    assert "from 1 to 65535, e.g. 3000" in refused.value.hint
