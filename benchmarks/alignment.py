"""Compare alignment methods, those of METHODS, on the project's own preferences. usage: python benchmarks/alignment.py
[METHOD...] [--seeds N] [--episodes N] [--threads N] [--measured FILE] [--out FILE]

Each method starts from the same SFT model (data/merged/<adapter>) with the same new adapter, is trained by the
pipeline's own stage, and answers the same held-out prompts; each seed runs in its own process. METHODS has the
settings; docs/alignment.md names those that were chosen by their results. Online methods learn from equally many
answers: 32 steps of 8 by default, which are four to each of 64 prompts for rloo and grpo, and two to each of 128 for
online_dpo. The task score is measured for the first seed, on the test split with the adapter merged. With --out the
table replaces the one in docs/alignment.md.

A training that is in the file of measurements is not repeated: one with the same method, seed, settings, data, models
and processor. An interrupted benchmark goes on when it is started again, from the start of the training that was
interrupted. Use another file after a change of the code.

The gain over the SFT model is the mean over the seeds, with a bootstrap over the held-out prompts. Seconds are user and
system time until the trained model is measured, with loading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from measurements import Measurements, content  # noqa: E402
from seeds import gain, spread, training_seconds  # noqa: E402
from tables import machine, show  # noqa: E402

ANSWERS_PER_STEP = 8


@dataclass(frozen=True)
class Compared:
    """A method of the comparison."""

    phases: str
    entry: Mapping[str, Any]
    """Its entry in params.yaml, without `method` and `adapter`."""
    answers_key: Literal["max_steps", "total_episodes"] | None = None
    """The key that limits the answers of an online method: of the entry, in
    steps, or of its options, in answers. None: it is offline."""

    @property
    def learns(self) -> str:
        return "online" if self.answers_key else "offline"

    def limited(self, answers: int) -> dict[str, Any]:
        """The entry of a training on so many sampled answers."""
        if self.answers_key == "max_steps":
            return {
                **self.entry,
                "per_device_train_batch_size": ANSWERS_PER_STEP,
                "max_steps": answers // ANSWERS_PER_STEP,
            }
        if self.answers_key == "total_episodes":
            return {**self.entry, "options": {**self.entry["options"], "total_episodes": answers}}
        return dict(self.entry)


OFFLINE: dict[str, Any] = {"learning_rate": 2.5e-4}
SAMPLING: dict[str, Any] = {"learning_rate": 2e-4, "options": {"max_completion_length": 48}}
METHODS = {
    "dpo": Compared("SFT, DPO", OFFLINE),
    "kto": Compared("SFT, KTO", OFFLINE),
    "orpo": Compared("SFT, ORPO", OFFLINE),
    "simpo": Compared("SFT, SimPO", OFFLINE),
    "cpo": Compared("SFT, CPO", OFFLINE),
    "rloo": Compared("SFT, reward model, RLOO", SAMPLING, "max_steps"),
    "grpo": Compared("SFT, reward model, GRPO", SAMPLING, "max_steps"),
    "online_dpo": Compared("SFT, reward model, Online DPO", SAMPLING, "max_steps"),
    "ppo": Compared(
        "SFT, reward model, PPO",
        {"options": {"response_length": 48, "learning_rate": 1e-4, "target_kl": 6.0, "horizon": 64}},
        "total_episodes",
    ),
}
WITHOUT_SETTINGS = {"gkd": "it learns from a larger model of the same family, which the sample project does not have"}
"""Method -> why it is not compared."""


def refuse_unknown(methods: Sequence[str]) -> None:
    """Raises:
    SystemExit: there are no settings for one of the methods.
    """
    for method in methods:
        if method not in METHODS:
            reason = WITHOUT_SETTINGS.get(method, "unknown method")
            print(
                f"{method}: no settings to compare it with: {reason}; name some of {', '.join(METHODS)}",
                file=sys.stderr,
            )
            raise SystemExit(2)


def identity(
    method: str, seed: int, adapter: str, episodes: int, threads: int, project: Path, score: bool
) -> dict[str, Any]:
    """What the result of `one` depends on."""
    from dagster_project.core import params

    values, data = params.read(project), project / "data"
    read = [data / "preferences", data / "reward_model", data / "merged" / adapter]
    scored = (
        {"evaluation": values.get("evaluation"), "data": [content(data / name) for name in ("base_model", "splits")]}
        if score
        else None
    )
    return {
        "method": method,
        "seed": seed,
        "entry": {"adapter": adapter, **METHODS[method].limited(episodes)},
        "compute": {**(values.get("compute") or {}), "seed": seed, "threads": threads},
        "inputs": {str(folder.relative_to(data)): content(folder) for folder in read},
        "scored": scored,
        "machine": machine(),
    }


def one(
    method: str, seed: int, adapter: str, episodes: int, threads: int, project: Path, score: bool
) -> dict[str, Any]:
    """Align and measure one model in this process."""
    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.core.records import read_table
    from dagster_project.stages import aligned

    values, data = params.read(project), project / "data"
    compute = params.parse(Compute, values.get("compute"), "compute").model_copy(
        update={"seed": seed, "threads": threads}
    )
    entry = {"method": method, "adapter": adapter, **METHODS[method].limited(episodes)}
    with tempfile.TemporaryDirectory() as scratch:
        folder, began = Path(scratch), time.perf_counter()
        with training_seconds() as cpu_seconds:
            report = aligned.produce(
                method,
                params.parse(aligned.Params, entry, f"aligned.{method}"),
                compute,
                aligned.Sources(data / "preferences", data / "reward_model", data / "merged" / adapter),
                folder / "aligned",
                folder / "curve.csv",
                folder / "checkpoints",
            )
        found: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "seconds": time.perf_counter() - began,
            **report.measured,
        }
        if report.failures:
            return {**found, "failed": [f"{check.name}: {check.note}" for check in report.failures]}
        samples = read_table(folder / "aligned" / "samples.parquet")
        rewards = {who: {row["example_id"]: row[f"{who}_reward"] for row in samples} for who in ("sft", "aligned")}
        found |= {**report.metrics, "cpu_seconds": cpu_seconds[0], "rewards": rewards}
        found |= {"checks": {check.name: check.passed for check in report.checks}}
        if score:
            found["macro_f1"] = task_score(method, adapter, values, compute, project, folder)
    return found


def task_score(
    method: str, adapter: str, values: Mapping[str, Any], compute: Any, project: Path, folder: Path
) -> float | None:
    """Macro-F1 on the test split of the aligned model in a folder, merged."""
    from dagster_project.core import params
    from dagster_project.evaluation.evaluator import Settings
    from dagster_project.stages import evaluation, merged

    data = project / "data"
    joined = merged.produce(compute, data / "merged" / adapter, folder / "aligned", out=folder / "merged")
    if joined.failures:
        raise SystemExit(f"{method}: {'; '.join(f'{check.name}: {check.note}' for check in joined.failures)}")
    settings = params.parse(Settings, values.get("evaluation"), "evaluation").model_copy(update={"benchmarks": []})
    scored = evaluation.produce(
        project,
        method,
        settings,
        compute,
        folder / "merged",
        data / "base_model",
        data / "splits",
        folder / "scored",
        folder / "confusion.csv",
    )
    macro_f1: float | None = scored.metrics.get("macro_f1")
    return macro_f1


def table(runs: list[dict[str, Any]], sft: float | None, device: str) -> str:
    lines = [
        f"{device}; mean over the seeds and, in brackets, minimum and maximum. Reward, gain, win rate, length and KL"
        " are of held-out prompts, macro-F1 is of the first seed; the SFT model's reward is"
        f" {_over(runs, lambda run: run['watch']['reward']['sft'])}, its answers have"
        f" {_over(runs, lambda run: run['watch']['tokens']['sft'])} tokens"
        + (f", its macro-F1 is {sft:.3f}." if sft is not None else "."),
        "",
        (
            "| method | phases | learns | sampled answers | seeds | reward | gain over SFT, 95 % interval | win rate |"
            " preference accuracy | KL, nats per answer | tokens per answer | macro-F1 | CPU seconds | peak GB |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        good = [run for run in mine if "watch" in run]
        if not good:
            why = "; ".join(mine[0].get("failed") or [mine[0].get("error", "")]).replace("|", "/").replace("\n", " ")
            lines.append(f"| {method} | {METHODS[method].phases} | failed: {why} |")
            continue
        f1 = [run["macro_f1"] for run in good if run.get("macro_f1") is not None]
        cells = [
            method,
            METHODS[method].phases,
            METHODS[method].learns,
            _over([run for run in good if "sampled" in run], lambda run: run["sampled"]["answers"], 0),
            f"{len(good)} of {len(mine)}",
            _over(good, lambda run: run["watch"]["reward"]["aligned"]),
            "{difference:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})".format(**_gain(good)),
            _over(good, lambda run: run["watch"]["win_rate"]["value"]),
            _over(good, lambda run: run["preference"]["accuracy"]["aligned"]),
            _over(good, lambda run: run["watch"]["kl_per_token"] * run["watch"]["tokens"]["aligned"], 1),
            _over(good, lambda run: run["watch"]["tokens"]["aligned"]),
            f"{f1[0]:.3f}" if f1 else "",
            _over(good, lambda run: run["cpu_seconds"], 0),
            _over(good, lambda run: run["peak_memory_bytes"] / 1e9, 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gain(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = {who: {run["seed"]: run["rewards"][who] for run in runs} for who in ("sft", "aligned")}
    return gain(rewards["aligned"], rewards["sft"])


def _over(runs: list[dict[str, Any]], value: Any, digits: int = 2) -> str:
    found = [value(run) for run in runs if "watch" in run]
    return spread(found, digits) if found else ""


def measure(given: Mapping[str, Any]) -> dict[str, Any]:
    """`one` in a process of its own; `error` if that fails."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--child",
        json.dumps({**given, "project": str(given["project"])}),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"method": given["method"], "seed": given["seed"], "error": reason}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def runs_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All trainings, those that are measured already and the others; those that ended with an error are not kept."""
    kept, runs = Measurements(options.measured), []
    for seed in range(1, options.seeds + 1):
        for method in options.methods:
            given = {
                "method": method,
                "seed": seed,
                "adapter": options.adapter,
                "episodes": options.episodes,
                "threads": options.threads,
                "project": options.project.resolve(),
                "score": seed == 1,
            }
            of = identity(**given)
            found = kept.find(of)
            if found is None:
                print(f"{method}, seed {seed}", file=sys.stderr, flush=True)
                found = measure(given)
                if "error" in found:
                    print(f"{method}, seed {seed}: {found['error']}", file=sys.stderr, flush=True)
                else:
                    found = kept.add(of, found)
            runs.append(found)
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument(
        "--episodes",
        type=int,
        default=256,
        help="answers that an online method is trained on, a multiple of 8 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--adapter", default="lora", help="the SFT variant (default: %(default)s)")
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument(
        "--measured", type=Path, default=Path(tempfile.gettempdir()) / "pedigree-alignment.jsonl",
        help="file of measurements; those in it are not repeated (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="put the table between the markers of this Markdown file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(one(**{**options.child, "project": Path(options.child["project"])})))
        return 0
    options.methods = list(dict.fromkeys(options.methods)) or list(METHODS)
    refuse_unknown(options.methods)
    if options.episodes < ANSWERS_PER_STEP or options.episodes % ANSWERS_PER_STEP or options.seeds < 1:
        parser.error(
            f"--episodes is a positive multiple of {ANSWERS_PER_STEP}, the answers of a step, and --seeds at least 1"
        )
    if not (options.project / "data/merged" / options.adapter / "config.json").is_file():
        parser.error(
            f"{options.project}: no data/merged/{options.adapter}; run the pipeline there, or name another --project"
        )
    if not (options.project / "data/reward_model/config.json").is_file():
        parser.error(f"{options.project}: no data/reward_model, which rewards and measures answers")
    runs = runs_of(options)
    report = options.project / "data" / "reports" / "evaluation" / f"{options.adapter}.json"
    sft = json.loads(report.read_text()).get("macro_f1") if report.is_file() else None
    shown = table(runs, sft, f"{machine()}, {dtype_of(options.project)}, {options.threads} thread(s)")
    show(options.out, "alignment", shown)
    return int(any("watch" not in run for run in runs))


def dtype_of(project: Path) -> str:
    """The dtype that the project's trainings use on this machine."""
    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.training.methods.hardware import prepare

    _, dtype = prepare(params.parse(Compute, params.read(project).get("compute"), "compute"))
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
