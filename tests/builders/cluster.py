"""A Ray cluster of two nodes on this machine, with token authentication. All of its processes end with `stop`."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from builders.servers import free_port, free_ports

STARTS = 4
"""Attempts to start a node."""
NODE_MODULES = Path(__file__).parent / "ray_nodes"
SETTINGS = {
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",  # 15 by default: on a busy machine its workers would wait for all other processes
    # after five checks that fail a node is lost: checks every 0.5 s, not 3, notice one that is gone; one that is slow
    # to answer has 30 s for each, not 10
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "30000",
}
"""Settings of Ray on every node."""


COMMANDS: dict[str, list[str]] = {
    name: service["command"]
    for name, service in yaml.safe_load((Path(__file__).parents[2] / "deploy/compose.yaml").read_text())[
        "services"
    ].items()
    if name in {"ray-head", "ray-worker"}
}
"""How deploy/compose.yaml starts nodes. Of an option that is given twice, Ray takes the second value."""


@dataclass
class Cluster:
    """Two nodes, started by the commands of deploy/compose.yaml, but on free ports and with one CPU each: the head has
    the resource `first`, the other one `second`."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Credentials for the nodes, which no job and no file contains."""
    port: int = 0
    dashboard: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def token(self) -> Path:
        return self.folder / "token"

    def variables(self) -> dict[str, str]:
        """Environment of a driver that may use the cluster."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.url,
        }

    @property
    def headers(self) -> dict[str, str]:
        """Of requests to the dashboard."""
        return {"Authorization": f"Bearer {self.token.read_text()}"}

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.port, self.dashboard = free_ports(2)
        self.add(
            "first",
            f"--port={self.port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}",
            "--include-dashboard=true",
            f"--ray-client-server-port={free_port()}",
            "--no-monitor",
            f"--temp-dir={self.folder}/ray",
        )
        self.add("second", f"--address=127.0.0.1:{self.port}")  # meanwhile the dashboard starts
        self._wait_for_dashboard()

    def add(self, name: str, *options: str, **environment: str) -> None:
        """Start a node; return when it has started. Ray gives a node 30 s,
        which a busy machine may exceed: then it is started again."""
        for _ in range(STARTS):
            if self._started(name, options, environment):
                return
            self.kill(name)
        raise AssertionError((self.folder / f"{name}.log").read_text())

    def _started(self, name: str, options: tuple[str, ...], environment: Mapping[str, str]) -> bool:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        variables = self.variables()
        del variables["RAY_ADDRESS"]
        path = os.pathsep.join(filter(None, [str(NODE_MODULES), os.environ.get("PYTHONPATH")]))
        log = (self.folder / f"{name}.log").open("wb")
        self.processes[name] = process = subprocess.Popen(
            [
                ray(),
                *COMMANDS["ray-head" if name == "first" else "ray-worker"][1:],
                "--node-ip-address=127.0.0.1",
                "--num-cpus=1",
                "--num-gpus=0",
                f'--resources={{"{name}": 1}}',
                f"--labels=image={name}",
                f"--dashboard-agent-listen-port={free_port()}",
                "--object-store-memory=80000000",
                "--disable-usage-stats",
                "--include-log-monitor=false",
                *options,
            ],
            env={
                **inherited,
                **variables,
                **SETTINGS,
                "PYTHONPATH": path,
                "PEDIGREE_NODE_CACHE": str(self.node_cache(name)),
                **self.environment,
                **environment,
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        until = time.monotonic() + 240
        while b"Ray runtime started" not in (self.folder / f"{name}.log").read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True

    def node_cache(self, name: str) -> Path:
        return self.folder / f"node-{name}"

    def _wait_for_dashboard(self) -> None:
        until = time.monotonic() + 240
        request = urllib.request.Request(f"{self.url}/api/version", headers=self.headers)
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(request, timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise AssertionError((self.folder / "first.log").read_text())

    def kill(self, name: str) -> None:
        """Kill a node with all of its processes."""
        end_session(self.processes.pop(name))

    def stop(self) -> None:
        for name in list(self.processes)[::-1]:
            self.kill(name)
        shutil.rmtree(self.folder / "ray", ignore_errors=True)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its descendants, including those in other sessions."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
    process.wait()


def ray() -> str:
    return str(Path(sys.executable).parent / "ray")


def add_remote(project: Path, url: str, endpoint: str = "") -> None:
    """Make it the default remote, as `dvc remote add` and `dvc remote modify` do."""
    from configobj import ConfigObj

    config = ConfigObj(str(project / ".dvc/config"))
    config.setdefault("core", {})["remote"] = "storage"
    config['remote "storage"'] = {"url": url, **({"endpointurl": endpoint} if endpoint else {})}
    config.write()
