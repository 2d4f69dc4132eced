"""Class `training`: SIGKILL of a stage in the middle of its training, and while
it writes a checkpoint; the next run resumes."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from builders import warm
from builders.processes import at_pass
from ruamel.yaml import YAML

from faults import project
from faults.case import Case, Play, Violation
from faults.kills import Calls

STAGE, BEFORE = "adapter@lora", "untrained"
PARAMS = {"method": "lora", "max_steps": 12, "save_strategy": "steps", "save_steps": 2}
DEFINITION = {
    "cmd": f"python -m dagster_project run {STAGE}",
    "deps": ["data/tokenized", "data/base_model"],
    "params": ["adapter.lora", "compute"],
    "outs": ["data/adapter/lora"],
    "plots": [{"data/plots/loss/lora.csv": {"x": "step", "y": "loss"}}],
    "metrics": [{"data/reports/adapter/lora.json": {"cache": False}}],
}
TIMED = ("data/live/", "data/pages/adapter/")
"""Files with the seconds that a training took."""
STEPS, WRITES = 5, 5
"""Random steps, and random calls in a checkpoint, before which it is killed."""


def cases(projects: project.Projects, fixed: bool) -> Iterator[Case]:
    passes, calls = _trained(projects)
    draw = random.Random(24)
    steps = sorted(draw.sample(range(2, passes + 1), min(STEPS, passes - 1)))
    for number in steps[:1] if fixed else steps:
        yield Case(f"training/pass-{number}", BEFORE, _killed(lambda at_work, number=number: _Pass(number)))  # type: ignore[misc]
    writes = [] if fixed else sorted(draw.sample(range(1, len(calls) + 1), min(WRITES, len(calls))))
    for number in writes:
        name = f"training/call-{number}-{calls[number - 1]}"
        yield Case(name, BEFORE, _killed(lambda at_work, number=number: Calls(at_work.root, number)))  # type: ignore[misc]


class _Pass:
    """A fault that kills the process at the end of its n-th forward and
    backward pass; 0: that counts them in a file."""

    def __init__(self, number: int, log: Path | None = None) -> None:
        self.number, self.log = number, log

    def __call__(self) -> None:
        if self.log is None:
            at_pass(self.number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            return
        from transformers import Trainer

        whole, log = Trainer.training_step, self.log

        def counted(*arguments: object, **named: object) -> object:
            with log.open("a") as file:
                file.write("pass\n")
            return whole(*arguments, **named)

        Trainer.training_step = counted


def _trained(projects: project.Projects) -> tuple[int, list[str]]:
    """Make the states before and after an undisturbed training. Returns the
    number of its passes, and its calls that change files."""
    place = projects.copy(project.DONE, "training")
    yaml = YAML(typ="safe")
    pipeline = json.loads((place.root / "dvc.yaml").read_text())
    pipeline["stages"]["adapter"] = {"foreach": ["lora"], "do": DEFINITION}
    (place.root / "dvc.yaml").write_text(json.dumps(pipeline, indent=1))
    params = yaml.load((place.root / "params.yaml").read_text())
    (place.root / "params.yaml").write_text(json.dumps({**params, "adapter": {"lora": PARAMS}}, indent=1))
    projects.keep(place, BEFORE)
    passes, calls = place.around / "passes", place.around / "calls"
    count_passes, count_calls = _Pass(0, passes), Calls(place.root, 0, calls)

    def counted() -> None:
        count_passes()
        count_calls()

    done = warm.run(place, "dvc", "repro", STAGE, in_stage=counted)
    assert done.code == 0, done.text
    projects.keep(place, STAGE)
    return len(passes.read_text().split()), calls.read_text().split()


def _killed(fault_in: Callable[[Play], Callable[[], None]]) -> Callable[[Play], None]:
    def play(at_work: Play) -> None:
        at_work.also += TIMED
        ended = at_work.run("dvc", "repro", STAGE, in_stage=fault_in(at_work))
        if ended.code == 0:
            raise Violation(f"nothing was killed: {ended.text}")
        again = at_work.run("dvc", "repro", STAGE)
        if again.code:
            raise Violation(f"the run after the kill:\n{again.text[-3000:]}")
        at_work.clear_temporary_files()
        at_work.is_undisturbed(STAGE)

    return play


CLASSES = {"training": cases}
