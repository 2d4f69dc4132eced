"""The workers of a training on several nodes, here two processes without Ray: what the second does when the stage on
the first node ends, the first node is lost, or its own part fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.servers import free_port

from dagster_project.core.errors import PedigreeError
from dagster_project.orchestration.executors import messages, ray_nodes

pytestmark = pytest.mark.long


def worker(rank: int, port: int, case: str, folder: Path) -> None:
    """What Ray Train does for a worker, then the part of one that knows the others."""
    import torch.distributed as dist

    own = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(own, GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    group = ray_nodes.Group.join({"nodes": 2, "processes": 2, "address": "adapter@x"}, f"node{rank}")
    assert group.ids == "node0, node1" and "RANK" not in os.environ
    if rank == 0:
        while not (folder / ("1.json" if case == "fails" else "training.log")).exists():
            time.sleep(0.1)
        if case == "lost":
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "ends":
            (folder / "0.json").write_text(json.dumps(group.end()))
        return
    sent: list[str] = []
    messages.receiver = lambda kind, content: sent.append(content)
    ray_nodes.GRACE = 0.5
    result: Any
    try:
        result = group.take_part(folder / "project", os.environ)
    except PedigreeError as error:
        result = error.what
    left = len(psutil.Process().children(recursive=True))
    (folder / "1.json.new").write_text(json.dumps([result, left, "".join(sent)]))
    (folder / "1.json.new").rename(folder / "1.json")
    os._exit(0)


@pytest.mark.parametrize(
    ("case", "result", "said"),
    [
        ("ends", True, ""),
        ("lost", False, "the first node was lost"),
        ("fails", "adapter@x: node NAME: its part of the training failed", "no such module here"),
    ],
)
def test_the_part_of_a_training_on_another_node_ends_with_the_stage(
    tmp_path: Path, case: str, result: Any, said: str
) -> None:
    (tmp_path / "project").mkdir()
    if case == "fails":  # the package of this project
        (tmp_path / "project" / "dagster_project.py").write_text("raise ImportError('no such module here')\n")
    port, context = free_port(), multiprocessing.get_context("spawn")
    both = [context.Process(target=worker, args=(rank, port, case, tmp_path)) for rank in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    found, left, text = json.loads((tmp_path / "1.json").read_text())
    expected = result.replace("NAME", os.uname().nodename) if isinstance(result, str) else result
    assert found == expected and left == 0 and said in text and bool(text) == bool(said)
    assert case != "ends" or json.loads((tmp_path / "0.json").read_text()) is True
