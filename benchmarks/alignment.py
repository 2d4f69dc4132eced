"""Compare alignment methods, those of SETTINGS, on the project's own preferences. usage: python benchmarks/alignment.py [METHOD...]
[--seeds N] [--episodes N] [--threads N] [--out FILE]

Each method starts from the same SFT model (data/merged/<adapter>) with the same new adapter, is trained by the
pipeline's own stage, and answers the same held-out prompts; each seed runs in its own process. SETTINGS has the
settings; docs/alignment.md names those that were chosen by their results. The task score is measured for the first
seed, on the test split with the adapter merged. The table replaces the one in docs/alignment.md.

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from seeds import gain, spread, training_seconds  # noqa: E402
from tables import machine, replace  # noqa: E402

PHASES = {"dpo": "SFT, DPO", "kto": "SFT, KTO", "orpo": "SFT, ORPO", "simpo": "SFT, SimPO", "cpo": "SFT, CPO"} | {
    name: f"SFT, reward model, {name.upper()}" for name in ("rloo", "grpo", "ppo")
}

SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rate": 2.5e-4},
    "kto": {"learning_rate": 2.5e-4},
    **{name: {"learning_rate": 2.5e-4} for name in ("orpo", "simpo", "cpo")},
    "rloo": {"learning_rate": 2e-4, "options": {"max_completion_length": 48}},
    "grpo": {"learning_rate": 2e-4, "options": {"max_completion_length": 48}},
    "ppo": {"options": {"response_length": 48, "learning_rate": 1e-4, "target_kl": 6.0, "horizon": 64}},
}
"""Method -> its entry."""


def one(method: str, seed: int, adapter: str, episodes: int, threads: int, project: Path, score: bool) -> dict[str, Any]:
    """Align and measure one model in this process."""
    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.core.records import read_table
    from dagster_project.evaluation.evaluator import Settings
    from dagster_project.stages import aligned, evaluation, merged

    values, data = params.read(project), project / "data"
    compute = params.parse(Compute, values.get("compute"), "compute").model_copy(update={"seed": seed, "threads": threads})
    entry = {"method": method, "adapter": adapter, **SETTINGS[method]}
    if method in ("rloo", "grpo"):
        entry["max_steps"] = episodes // 8
    if method == "ppo":
        entry["options"] = {**entry.get("options", {}), "total_episodes": episodes}
    with tempfile.TemporaryDirectory() as scratch:
        folder, began = Path(scratch), time.perf_counter()
        with training_seconds() as cpu_seconds:
            report = aligned.produce(
                method, params.parse(aligned.Params, entry, f"aligned.{method}"), compute, data / "preferences", data / "reward_model",
                data / "merged" / adapter, folder / "aligned", folder / "curve.csv", folder / "checkpoints",
            )  # fmt: skip
        found: dict[str, Any] = {"method": method, "seed": seed, "seconds": time.perf_counter() - began, **report.measured}
        found |= {"failed": [check.note for check in report.failures]} if report.failures else report.metrics
        if cpu_seconds:
            samples = read_table(folder / "aligned" / "samples.parquet")
            rewards = {who: {row["example_id"]: row[f"{who}_reward"] for row in samples} for who in ("sft", "aligned")}
            found |= {"cpu_seconds": cpu_seconds[0], "rewards": rewards}
        if score and not report.failures:
            merged.produce(compute, data / "merged" / adapter, folder / "aligned", out=folder / "merged")
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
            found["macro_f1"] = scored.metrics.get("macro_f1")
    return found


def table(runs: list[dict[str, Any]], sft: float | None, device: str) -> str:
    lines = [
        f"{device}; mean over the seeds and, in brackets, minimum and maximum. Reward, gain, win rate, length and KL are of held-out prompts, macro-F1 is of the first seed; the SFT model's reward is"
        f" {_over(runs, lambda run: run['watch']['reward']['sft'])}, its answers have {_over(runs, lambda run: run['watch']['tokens']['sft'])} tokens"
        + (f", its macro-F1 is {sft:.3f}." if sft is not None else "."),
        "",
        "| method | phases | learns | seeds | reward | gain over SFT, 95 % interval | win rate | preference accuracy | KL, nats per answer | tokens per answer | macro-F1 | CPU seconds | peak GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        good = [run for run in mine if "watch" in run]
        if not good:
            lines.append(f"| {method} | {PHASES[method]} | failed: {mine[0].get('failed') or mine[0].get('error')} |")
            continue
        f1 = [run["macro_f1"] for run in good if run.get("macro_f1") is not None]
        cells = [
            method,
            PHASES[method],
            "offline" if method in ("dpo", "kto", "orpo", "simpo", "cpo") else "online",
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=256, help="answers that an online method is trained on (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--adapter", default="lora", help="the SFT variant (default: %(default)s)")
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--measured", type=Path, help="file with measurements; those in it are not repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "alignment.md", help="default: %(default)s")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(one(**{**options.child, "project": Path(options.child["project"])})))
        return 0
    kept = json.loads(options.measured.read_text()) if options.measured and options.measured.is_file() else []
    for seed in range(1, options.seeds + 1):
        for method in options.methods:
            if any(run["method"] == method and run["seed"] == seed for run in kept):
                continue
            given = {
                "method": method,
                "seed": seed,
                "adapter": options.adapter,
                "episodes": options.episodes,
                "threads": options.threads,
                "project": str(options.project),
                "score": seed == 1,
            }
            print(f"{method}, seed {seed}", file=sys.stderr, flush=True)
            env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(given)],
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            error = {"method": method, "seed": seed, "error": (done.stderr.strip().splitlines() or [""])[-1]}
            kept.append(json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else error)
            if options.measured:
                options.measured.write_text(json.dumps(kept))
    report = options.project / "data" / "reports" / "evaluation" / f"{options.adapter}.json"
    sft = json.loads(report.read_text()).get("macro_f1") if report.is_file() else None
    from dagster_project.core.params import Compute
    from dagster_project.training.methods.hardware import prepare

    _, dtype = prepare(Compute())
    wanted = [run for run in kept if run["method"] in options.methods]
    shown = table(wanted, sft, f"{machine()}, {str(dtype).removeprefix('torch.')}, {options.threads} thread(s)")
    replace(options.out, "alignment", shown)
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
