"""Linear datamodeling score of `pedigree why`. usage: python benchmarks/influence_subsets.py [--project FOLDER] [--work
FOLDER] [--seed N] [--subsets N] [--checkpoints N]

Measures how well the scores of records predict the answers of models that were trained on some of them. The adapter of
`benchmarks/influence.py` (run that first, with the same --work) is trained again on random halves of its records, for
as many epochs and with the same seed, and each of these models is asked all questions of that benchmark. The predicted
log-probability of the asked part is the sum of the scores of the records in the half. The score is the rank correlation
of predicted and measured log-probabilities over the halves (Park et al. 2023, arXiv 2303.14186, section 2), the mean
over questions. Random scores give about 0, a perfect order 1.

Questions share their halves, so their correlations are not independent: the interval is
a bootstrap over halves, which is wide for few of them. Halves are kept in
WORK/SEED/halves, so an interrupted command goes on, and more halves can be added later.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import influence
from influence import ROOT

RESAMPLED = 2000
"""Bootstrap samples of halves."""
LEAST = 3
"""Halves for which a rank correlation can be computed with more than two values."""


def sample_half(ids: list[str], seed: int, number: int) -> list[str]:
    """A random half of the records: half number `number` of this seed."""
    return sorted(random.Random(f"half {seed} {number}").sample(sorted(ids), len(ids) // 2))


def log_probabilities(project: Path, work: Path, asked: list[dict[str, Any]]) -> list[float]:
    """Log-probability of the asked part of each question, in nats, by the adapter in work/adapter."""
    from transformers import AutoTokenizer

    from dagster_project.core.params import Compute
    from dagster_project.lineage.attribution.gradients import TrainedModel

    training = json.loads((work / "adapter/training.json").read_text())
    trained = TrainedModel.load(
        work / "adapter", project / "data/base_model", Compute(threads=1, dtype=training["dtype"]), "adapter@lora"
    )
    tokenizer = AutoTokenizer.from_pretrained(project / "data/base_model")
    return [
        trained.log_probability(influence.example_of(tokenizer, question, question["span"])[0]) for question in asked
    ]


def train_half(project: Path, work: Path, seed: int, number: int, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Train on a half of the records of the adapter in `work`, and ask it. Only what it answers is kept.

    Returns:
        {"records": ids of the half, "log_probability": of each question, "steps"}
    """
    from dagster_project.core.records import read_records, write_json

    folder = work / "halves" / f"{number:02d}"
    answers = folder.with_suffix(".json")
    if not answers.is_file():
        records = read_records(work / "splits/train")
        half = sample_half([record["example_id"] for record in records], seed, number)
        steps = json.loads((work / "adapter/training.json").read_text())["steps"] // 2
        chosen = {*half}
        new = {name: kind for kind, names in json.loads((work / "culprits.json").read_text()).items() for name in names}
        if not (folder / "adapter/training.json").is_file():
            influence.train_on(
                project, folder, [record for record in records if record["example_id"] in chosen], new, seed, steps
            )
        write_json(
            answers, {"records": half, "log_probability": log_probabilities(project, folder, asked), "steps": steps}
        )
        shutil.rmtree(folder)
    return dict(json.loads(answers.read_text()))


def scores_of(project: Path, work: Path, seed: int, selection: Any) -> dict[str, Any]:
    """Scores (questions, records) by each method, and the ids of the records."""
    import numpy as np

    from dagster_project.lineage.attribution.ranking import WEIGHT, cosines, standardized

    points = influence.points_of(work, *influence.training_of(project, seed, None), project, selection)
    of_points = [influence.computed(project, work, seed, point) for point in points]
    end = of_points[-1]
    stored = [one["gradients"] for one in of_points]
    each = [cosines(at.units, one["span"]) for at, one in zip(stored, of_points, strict=True)]
    mean = np.mean([at.scores(one["span"]) for at, one in zip(stored, of_points, strict=True)], axis=0)
    prompt, part = end["prompt"], end["part"]
    rows = range(len(mean))
    scores = {
        "score of gradients": mean,
        "cosine of gradients": np.mean(each, axis=0),
        "inner product of gradients": np.mean([one * at.lengths for one, at in zip(each, stored, strict=True)], axis=0),
        "`pedigree why`: score of the list": np.stack(
            [WEIGHT * standardized(mean[i]) + standardized(prompt[i]) + standardized(part[i]) for i in rows]
        ),
        "BM25 of prompt and asked part": prompt + part,
        "random": np.random.default_rng(seed).random(mean.shape),
    }
    return {"scores": scores, "ids": end["ids"], "kinds": [one["kind"] for one in end["asked"]]}


def correlations(scores: Any, inside: Any, measured: Any) -> Any:
    """Rank correlation over halves of each question, (questions,); 0 where predictions do not differ.

    Args:
        scores: (questions, records).
        inside: 1 for a record of the half, (halves, records).
        measured: log-probabilities, (halves, questions).
    """
    import numpy as np

    predicted = inside @ scores.T
    first, second = (
        np.sign(one[:, None] - one[None]).sum(axis=1) for one in (predicted, measured)
    )  # twice the rank from its mean; ties share
    lengths = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    return np.divide((first * second).sum(axis=0), lengths, out=np.zeros(len(lengths)), where=lengths > 0)


def show(found: dict[str, Any], halves: list[dict[str, Any]], seed: int) -> None:
    """Print the mean correlation of each kind of question by each method, and the interval of the mean over all."""
    import numpy as np

    places = {name: i for i, name in enumerate(found["ids"])}
    inside = np.zeros((len(halves), len(places)))
    for row, half in zip(inside, halves, strict=True):
        row[[places[name] for name in half["records"] if name in places]] = 1.0
    measured = np.array([half["log_probability"] for half in halves])
    kinds = np.array(found["kinds"])
    dice = np.random.default_rng(seed)
    draws = dice.integers(0, len(halves), (RESAMPLED, len(halves)))
    print(f"{len(halves)} halves of {len(places)} records, {halves[0]['steps']} steps each, {len(kinds)} questions")
    print(
        "spread of the measured log-probabilities over halves, nats, median of questions:"
        f" {np.median(measured.std(axis=0)):.3f}"
    )
    for method, scores in found["scores"].items():
        each = correlations(scores, inside, measured)
        means = [correlations(scores, inside[draw], measured[draw]).mean() for draw in draws]
        low, high = np.quantile(means, [0.025, 0.975])
        cells = "   ".join(f"{kind} {each[kinds == kind].mean():.2f}" for kind in dict.fromkeys(found["kinds"]))
        print(f"{method:<36} all {each.mean():.2f} [{low:.2f}, {high:.2f}]   {cells}")


def main() -> int:
    import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT, help="a project with data/splits and data/base_model")
    parser.add_argument("--work", type=Path, default=Path("/tmp/influence"), help="folder of `benchmarks/influence.py`")
    parser.add_argument("--seed", type=int, default=0, help="of the training there")
    parser.add_argument("--subsets", type=int, default=20, help="halves to train on")
    parser.add_argument(
        "--checkpoints", type=int, default=1, metavar="N", help="points of the training, which is repeated"
    )
    parser.add_argument(
        "--second-moments", action="store_true", help="scale gradients by the second moments of the optimizer"
    )
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pedigree").setLevel(logging.INFO)
    from dagster_project.lineage.attribution.points import PointSelection

    work = options.work / str(options.seed)
    if not (work / "adapter/training.json").is_file():
        parser.error(f"{work}/adapter is missing: run benchmarks/influence.py first, with the same --work")
    if options.subsets < LEAST:
        parser.error(f"--subsets {options.subsets}: at least {LEAST} are needed for a correlation")
    asked = influence.asked_questions(options.project, work, options.seed)
    halves = [train_half(options.project, work, options.seed, number, asked) for number in range(options.subsets)]
    show(
        scores_of(options.project, work, options.seed, PointSelection(options.checkpoints, options.second_moments)),
        halves,
        options.seed,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
