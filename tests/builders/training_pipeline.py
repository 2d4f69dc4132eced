"""A pipeline of one real stage, `adapter@x`: a small LoRA training (tests/builders/training.py) from sources under DVC.

As a script in a project's folder it is that project's command line: `python training_pipeline.py run adapter@x`.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.context import StageContext
from dagster_project.core.errors import PedigreeError
from dagster_project.core.records import Report
from dagster_project.pipeline import Pipeline


def adapter(ctx: StageContext) -> Report:
    from dagster_project.stages import adapter as stage

    hold_if_asked(ctx.root)
    values = stage.Params(**ctx.values["variants"][ctx.variant])
    if values.command is not None:
        return _by_command(ctx, values)
    return stage.produce(
        str(ctx.variant),
        values,
        compute_of(ctx),
        ctx.root / "data/tokenized",
        ctx.root / "data/base_model",
        ctx.out,
        ctx.plot("loss"),
        ctx.checkpoints,
        live=ctx.live,
    )


def _by_command(ctx: StageContext, values: Any) -> Report:
    from dagster_project.training.trainers.command.train import Folders, train_by_command

    folders = Folders(
        ctx.root,
        ctx.root / "data/tokenized",
        ctx.root / "data/base_model",
        ctx.scratch / "command",
        ctx.checkpoints,
        ctx.out,
        ctx.plot("loss"),
        ctx.pages,
    )
    return train_by_command(str(ctx.variant), values, compute_of(ctx), folders)


def compute_of(ctx: StageContext) -> Any:
    from dagster_project.core.params import Compute

    return Compute(**{"threads": 1, "dtype": "float32", **ctx.values.get("compute", {})})


def hold_if_asked(root: Path) -> None:
    """As hold.json says: {"before": pass, "gate": file}."""
    if (root / "hold.json").is_file():
        waits = json.loads((root / "hold.json").read_text())
        wait_at_pass(waits["before"], Path(waits["gate"]))


def wait_at_pass(number: int, gate: Path) -> None:
    """Arrange for a forward and backward pass of this process, counted from 1,
    that begins when a file exists, or after five minutes."""
    from transformers import Trainer

    whole, begun = Trainer.training_step, 0

    def step(*arguments: Any, **named: Any) -> Any:
        nonlocal begun
        begun += 1
        until = time.monotonic() + 300
        while begun == number and not gate.exists() and time.monotonic() < until:
            time.sleep(0.01)
        return whole(*arguments, **named)

    Trainer.training_step = step


PIPELINE = Pipeline({"adapter": adapter}, {"adapter": "variants"}, lambda stage: {}, params.read)


def make_project(root: Path, model: Path, values: dict[str, Any], script: str = "", processes: int = 1) -> Path:
    """A project of this pipeline in which nothing has run, with packed examples and a model under DVC.

    Args:
        processes: that train together.
        script: content of data/trainers/train.py, if the stage has a command.
    """
    from builders.small_pipeline import commit_project
    from builders.training import make_data

    (root / "data").mkdir(parents=True)
    make_data(root / "data")
    shutil.copytree(model, root / "data/base_model")
    (root / "training_pipeline.py").write_text(Path(__file__).read_text())
    compute = {"compute": {"processes": processes}} if processes > 1 else {}
    (root / "params.yaml").write_text(json.dumps({"variants": {"x": values}, **compute}))
    if script:
        (root / "data/trainers").mkdir()
        (root / "data/trainers/train.py").write_text(script)
    body = {
        "cmd": "python training_pipeline.py run adapter@${key}",
        "deps": ["data/tokenized", "data/base_model", *(["data/trainers"] if script else [])],
        "params": ["variants.${key}", *compute],
        "outs": ["data/adapter/${key}"],
        "plots": ["data/plots/loss/${key}.csv"],
        "metrics": [{"data/reports/adapter/${key}.json": {"cache": False}}],
    }
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"adapter": {"foreach": "${variants}", "do": body}}}))
    (root / ".gitignore").write_text("__pycache__\n/data/live\n/data/pages\n/data/adapter\n/data/plots\n")
    return commit_project(root, "data/tokenized", "data/base_model")


def main() -> int:
    from dagster_project.orchestration.run_stage import run_stage

    logging.basicConfig(format="%(message)s")
    logging.getLogger("pedigree").setLevel(logging.INFO)
    try:
        run_stage(Path.cwd(), sys.argv[2], PIPELINE)
    except PedigreeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__mp_main__":  # a process that the stage has spawned to train
    hold_if_asked(Path.cwd())

if __name__ == "__main__":
    sys.exit(main())
