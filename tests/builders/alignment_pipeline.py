"""A pipeline of two real stages on preference pairs, `reward_model` and `aligned@x`, from a small model under DVC.

As a script in a project's folder it is that project's command line: `python alignment_pipeline.py run aligned@x`.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from dagster_project.core import params
from dagster_project.core.context import StageContext
from dagster_project.core.errors import PedigreeError
from dagster_project.core.records import Report
from dagster_project.pipeline import Pipeline


def reward_model(ctx: StageContext) -> Report:
    from dagster_project.core.params import Compute
    from dagster_project.stages import reward_model as stage

    values = stage.Params(**ctx.values["reward_model"])
    return stage.produce(
        values,
        Compute(threads=1, dtype="float32"),
        ctx.root / "data/preferences",
        ctx.root / "data/base_model",
        ctx.out,
        ctx.plot("reward"),
        ctx.plot("calibration"),
        ctx.checkpoints,
    )


def aligned(ctx: StageContext) -> Report:
    from dagster_project.core.params import Compute
    from dagster_project.stages import aligned as stage

    values = stage.Params(**ctx.values["variants"][ctx.variant])
    return stage.produce(
        str(ctx.variant),
        values,
        Compute(threads=1, dtype="float32"),
        stage.Sources(ctx.root / "data/preferences", None, ctx.root / "data/merged/lora"),
        ctx.out,
        ctx.plot("aligned"),
        ctx.checkpoints,
        ctx.live,
        ctx.pages,
    )


PIPELINE = Pipeline(
    {"reward_model": reward_model, "aligned": aligned}, {"aligned": "variants"}, lambda stage: {}, params.read
)


def make_project(root: Path, model: Path, preferences: Path, variants: dict[str, Any]) -> Path:
    """A project of this pipeline in which nothing has run, with pairs and a
    model under DVC, which is the base model and the merged one.

    Args:
        preferences: folder of the splits.
        variants: entries of `aligned`.
    """
    from builders.small_pipeline import commit_project

    (root / "data/merged").mkdir(parents=True)
    shutil.copytree(preferences, root / "data/preferences")
    for name in ("base_model", "merged/lora"):
        shutil.copytree(model, root / "data" / name)
    (root / "alignment_pipeline.py").write_text(Path(__file__).read_text())
    rewards = {"model": "base_model", "learning_rate": 2e-2, "num_train_epochs": 1}
    (root / "params.yaml").write_text(json.dumps({"variants": variants, "reward_model": rewards}))
    stages = {
        "reward_model": {
            "cmd": "python alignment_pipeline.py run reward_model",
            "deps": ["data/preferences", "data/base_model"],
            "params": ["reward_model"],
            "outs": ["data/reward_model"],
            "plots": ["data/plots/reward.csv", "data/plots/calibration.csv"],
            "metrics": [{"data/reports/reward_model.json": {"cache": False}}],
        },
        "aligned": {
            "foreach": "${variants}",
            "do": {
                "cmd": "python alignment_pipeline.py run aligned@${key}",
                "deps": ["data/preferences", "data/merged/lora"],
                "params": ["variants.${key}"],
                "outs": ["data/aligned/${key}"],
                "plots": ["data/plots/aligned/${key}.csv"],
                "metrics": [{"data/reports/aligned/${key}.json": {"cache": False}}],
            },
        },
    }
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    (root / ".gitignore").write_text(
        "__pycache__\n/data/live\n/data/pages\n/data/aligned\n/data/reward_model\n/data/plots\n"
    )
    return commit_project(root, "data/preferences", "data/base_model", "data/merged/lora")


def main() -> int:
    from dagster_project.orchestration.run_stage import run_stage

    logging.basicConfig(format="%(message)s")
    try:
        run_stage(Path.cwd(), sys.argv[2], PIPELINE)
    except PedigreeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
