"""The process that `pedigree serve` starts for `transformers serve`: the same
device, number format, threads and seed as `pedigree chat`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dagster_project.core import params
from dagster_project.core.params import Compute
from dagster_project.evaluation.evaluator import Settings
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

    Serve(
        force_model=options.model,
        host=options.host,
        port=options.port,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
