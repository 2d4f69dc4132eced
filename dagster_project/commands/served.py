"""The process that `pedigree serve` starts for `transformers serve`: the same
device, number format, threads and seed as `pedigree chat`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.params import Compute
from dagster_project.evaluation.evaluator import Settings
from dagster_project.orchestration.dagster.webserver import HOSTS, Guard
from dagster_project.orchestration.processes import end_with_parent
from dagster_project.training.methods.hardware import prepare


def main(arguments: list[str]) -> None:
    """Serve until a signal, or until the process that started this one ends."""
    end_with_parent()
    parser = argparse.ArgumentParser()
    for name in ("--project", "--links", "--model", "--host"):
        parser.add_argument(name, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(arguments)
    values = params.read(Path(options.project))
    compute = params.parse(Compute, values.get("compute"), "compute")
    settings = params.parse(Settings, values.get("evaluation"), "evaluation")
    device, dtype = prepare(compute.model_copy(update={"dtype": settings.dtype or compute.dtype}))
    # where the model's id is a link to its folder: transformers lists a model under the path that it was given
    os.chdir(options.links)
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    server.build_server = _guarded(server.build_server)
    Serve(
        force_model=options.model,
        host=options.host,
        port=options.port,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
    )


def _guarded(build: Callable[..., Any]) -> Callable[..., Any]:
    """The function that makes the server's application, which then refuses requests of websites in a browser: they
    could unload the model, load another folder and, by DNS rebinding, read answers."""

    def build_guarded(*arguments: Any, **named: Any) -> Any:
        app = build(*arguments, **named)
        app.add_middleware(Guard, hosts=os.environ.get(HOSTS, "").split(","))
        return app

    return build_guarded


if __name__ == "__main__":
    main(sys.argv[1:])
