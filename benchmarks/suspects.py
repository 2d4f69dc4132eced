"""How well `pedigree why --suspects` finds flipped labels. usage: python benchmarks/suspects.py [--project FOLDER]
[--work FOLDER] [--tickets N] [--steps N] [--seed N]

5 % of the tickets in the training split of the sample project get another category, chosen at random.
The tickets alone are tokenized as `params.yaml` says and trained for a few steps; then records are
ranked by each method, and precision is the share of flipped labels among the first 5 %. Besides the
scores of `pedigree why --suspects` there are the loss of each record at the end of training, cleanlab
(self-confidence of a logistic regression on TF-IDF, five-fold out of sample; extra `bench`), and chance.

Then held-out tickets are asked with the wrong label as the answer: four for each pair of a right label and the one that
some ticket has in its place. Recall is the share of these tickets among the first n (their number) and 5n of all
records, by each ranking of `pedigree why`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

SHARE = 0.05
ASKED = 4
"""Questions for each pair of labels."""


def flipped(records: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The records with a share of the categories replaced by another one, and the ids of those."""
    from influence import with_label

    dice = random.Random(seed)
    labels = sorted({record["category"] for record in records})
    found = list(records)
    chosen = dice.sample(range(len(records)), round(SHARE * len(records)))
    for i in chosen:
        found[i] = with_label(found[i], dice.choice([label for label in labels if label != found[i]["category"]]))
    return found, sorted(found[i]["example_id"] for i in chosen)


def prepare(project: Path, work: Path, seed: int, steps: int, most: int) -> None:
    """Plant, tokenize and train, if that was not done before: work/{data,flipped.json}."""
    from influence import train_on

    from dagster_project.core.records import read_records, write_json

    if (work / "adapter" / "training.json").is_file():
        return
    tickets = [record for record in read_records(project / "data/splits/train") if record["category"]]
    if most < len(tickets):
        tickets = random.Random(f"tickets {seed}").sample(tickets, most)
    records, names = flipped(tickets, seed)
    write_json(work / "flipped.json", names)
    new = {record["example_id"]: "flipped" for record in records if record["example_id"] in names}
    train_on(project, work, records, new, seed, steps)


def store_of(project: Path, work: Path, strength: float) -> Any:
    """The store of the gradients of the training at a share of what the adapter adds."""
    from dagster_project.core.hashing import md5_of_folder
    from dagster_project.lineage.attribution.projection import Projection
    from dagster_project.lineage.attribution.records import trained_records
    from dagster_project.lineage.attribution.store import GradientStore, identity_of
    from dagster_project.lineage.history import listing_of

    adapter, base = work / "adapter", project / "data/base_model"
    training = json.loads((adapter / "training.json").read_text())
    compute = {"dtype": training["dtype"], "device": training["device"], "threads": training["threads"]}
    records = trained_records(adapter, work / "tokenized")
    hashes = [md5_of_folder(listing_of(folder)) for folder in (adapter, base)]
    return GradientStore.at(work, identity_of(*hashes, records, Projection(), compute, 0.0, strength), len(records))


def loaded(project: Path, work: Path, strength: float) -> Any:
    """The model of the training with a share of what its adapter adds."""
    from dagster_project.core.params import Compute
    from dagster_project.lineage.attribution.gradients import TrainedModel

    dtype = json.loads((work / "adapter/training.json").read_text())["dtype"]
    found = TrainedModel.load(
        work / "adapter", project / "data/base_model", Compute(threads=1, dtype=dtype), "adapter@lora"
    )
    return found.weakened() if strength < 1 else found


def built(project: Path, work: Path, strength: float) -> Any:
    """The same store, complete."""
    from dagster_project.lineage.attribution.per_record import projected_gradients
    from dagster_project.lineage.attribution.projection import Projection
    from dagster_project.lineage.attribution.records import trained_records

    store = store_of(project, work, strength)
    if not store.is_complete():
        trained, records = loaded(project, work, strength), trained_records(work / "adapter", work / "tokenized")
        store.build(
            lambda numbers: projected_gradients(trained, Projection(), [records[i].examples for i in numbers]),
            "gradients",
        )
    return store


def measure(project: Path, work: Path) -> dict[str, Any]:
    """Rank all records by each method: precision among the first as many as
    were flipped, and the places of the flipped ones."""
    import numpy as np
    import torch

    from dagster_project.core.records import read_records
    from dagster_project.lineage.attribution.ranking import cosines, ranks
    from dagster_project.lineage.attribution.records import trained_records
    from dagster_project.lineage.attribution.suspects import (
        Group,
        Suspicion,
        agreement,
        chosen_groups,
        form_of,
        harm,
        opposition,
    )

    start = time.process_time()
    records, stored = trained_records(work / "adapter", work / "tokenized"), built(project, work, 1.0).read()
    if not (work / "losses.json").is_file():
        trained = loaded(project, work, 1.0)
        with torch.no_grad():
            losses = [float(trained.sum_of_losses([one.examples])) for one in records]
        (work / "losses.json").write_text(json.dumps(losses))
    seconds = time.process_time() - start
    gradients, lengths = stored.units, stored.lengths
    known = {one["example_id"]: one for one in read_records(work / "splits/train")}
    texts = [known[one.example_id] for one in records]
    own = [Group(one["source"], one["category"], form_of(one["messages"][-1])) for one in texts]
    fits = agreement(gradients, own, chosen_groups(own))
    _, validation, _ = spans(project, work, asked_tickets(project, work, [one.example_id for one in records]), 1.0)
    opposed, harmful = opposition(gradients, lengths), harm(cosines(gradients, validation), lengths)
    found = Suspicion.of(opposed, lengths, harmful)
    by = {
        "`pedigree why --suspects`": found.rank,
        "without a validation split": Suspicion.of(opposed, lengths).rank,
        "harm to validation answers alone": ranks(harmful),
        "opposition alone": found.opposition_rank,
        "length of the gradient alone": found.length_rank,
        "least cosine with its own group": ranks(-fits),
        "loss": ranks(np.array(json.loads((work / "losses.json").read_text()))),
        **from_cleanlab([one["messages"][-2]["content"] for one in texts], [one["category"] for one in texts]),
        "chance": ranks(np.random.default_rng(0).random(len(records))),
    }
    flips = {*json.loads((work / "flipped.json").read_text())}
    at = [i for i, one in enumerate(records) if one.example_id in flips]
    cost = json.loads((work / "seconds.json").read_text()) | {"gradients": seconds}
    return {
        "records": len(records),
        "flipped": len(at),
        "steps": json.loads((work / "adapter/training.json").read_text())["steps"],
        "cost": cost,
        "places": {method: sorted(int(rank[i]) for i in at) for method, rank in by.items()},
    }


def asked(project: Path, work: Path) -> dict[str, Any]:
    """Recall of the flipped tickets of a pair of labels among the first n and 5n by each ranking, mean over the
    questions; and how often a record stands out for questions with and without such a ticket."""
    import numpy as np

    from dagster_project.core.records import prompt_text, read_records, response_text
    from dagster_project.evaluation.baselines import bm25
    from dagster_project.lineage.attribution.calibration import ALPHA, Calibration
    from dagster_project.lineage.attribution.gradients import STRENGTH
    from dagster_project.lineage.attribution.ranking import Ranking, cosines, fused, ranks, stands_out
    from dagster_project.lineage.attribution.records import trained_records

    known = {one["example_id"]: one for one in read_records(work / "splits/train")}
    ids = [one.example_id for one in trained_records(work / "adapter", work / "tokenized")]
    questions = asked_tickets(project, work, ids)
    documents = [f"{prompt_text(known[name]['messages'])} {response_text(known[name]['messages'])}" for name in ids]
    words = [
        bm25(documents, many)
        for many in ([prompt_text(messages) for messages, _, _ in questions], [label for _, label, _ in questions])
    ]
    stored = built(project, work, STRENGTH).read()
    of_questions, of_validation, owners = spans(project, work, questions, STRENGTH)
    scores, of_validation = (stored.scores(many) for many in (of_questions, of_validation))
    compared = Calibration(of_validation, owners)
    recall: dict[str, list[list[float]]] = {}
    clear: dict[str, list[bool]] = {}
    for score, alike, prompt, label, (_, _, numbers) in zip(
        scores, cosines(stored.units, of_questions), *words, questions, strict=True
    ):
        ranking = Ranking.of(score, prompt, label)
        rules = {
            "by validation questions": compared.p_value(ranking.gradient) <= ALPHA,
            "by the rule before": stands_out(ranking.z),
        }
        for rule, is_clear in rules.items():
            clear.setdefault(f"{rule}, {'with' if numbers else 'without'} a culprit", []).append(is_clear)
        by = {
            "gradient of the label": ranking.gradient_rank,
            "cosine of the gradient of the label": ranks(alike),
            "BM25 of prompt and label": ranking.bm25_rank,
            "`pedigree why`: order of the list": ranking.rank,
            "reciprocal rank fusion": ranks(fused(ranking.gradient_rank, ranking.bm25_rank)),
        }
        for method, rank in by.items() if numbers else ():
            recall.setdefault(method, []).append(
                [float(np.mean(rank[numbers] <= times * len(numbers))) for times in (1, 5)]
            )
    return {
        "recall": {method: np.mean(found, 0).round(4).tolist() for method, found in recall.items()},
        "stands_out": clear,
    }


def asked_tickets(project: Path, work: Path, ids: list[str]) -> list[tuple[list[dict[str, Any]], str, list[int]]]:
    """Held-out tickets with an answer, its label, and the numbers of the flipped tickets of the same pair of labels;
    the last 32 have none: 16 right labels and 16 wrong ones that nobody flipped so."""
    from influence import with_label

    from dagster_project.core.records import prompt_text, read_records

    right = {prompt_text(one["messages"]): one["category"] for one in read_records(project / "data/splits/train")}
    known = {one["example_id"]: one for one in read_records(work / "splits/train")}
    pairs: dict[tuple[str, str], list[int]] = {}
    for name in json.loads((work / "flipped.json").read_text()):
        pairs.setdefault((right[prompt_text(known[name]["messages"])], known[name]["category"]), []).append(
            ids.index(name)
        )
    dice, held_out = random.Random(0), [one for one in read_records(project / "data/splits/test") if one["category"]]
    found = [
        (with_label(one, wrong)["messages"], wrong, numbers)
        for (label, wrong), numbers in sorted(pairs.items())
        for one in dice.sample([one for one in held_out if one["category"] == label], ASKED)
    ]
    dice, labels = random.Random(1), sorted({one["category"] for one in held_out})
    found += [(one["messages"], one["category"], []) for one in dice.sample(held_out, 16)]
    others = [(one, dice.choice(labels)) for one in dice.sample(held_out, 40)]
    without = [
        (one, wrong) for one, wrong in others if wrong != one["category"] and (one["category"], wrong) not in pairs
    ]
    return found + [(with_label(one, wrong)["messages"], wrong, []) for one, wrong in without[:16]]


def spans(
    project: Path, work: Path, questions: list[tuple[list[dict[str, Any]], str, list[int]]], strength: float
) -> tuple[Any, Any, Any]:
    """Projected gradients of the labels of questions, those of the questions of the validation split, and the number of
    the record of each of these: from a file, if they were computed before."""
    import numpy as np
    from influence import validation_questions
    from transformers import AutoTokenizer

    from dagster_project.commands.why_question import tokenize
    from dagster_project.core.chat import IGNORE
    from dagster_project.core.records import read_records
    from dagster_project.lineage.attribution.per_record import projected_gradients
    from dagster_project.lineage.attribution.projection import Projection
    from dagster_project.lineage.attribution.records import Example

    file = store_of(project, work, strength).folder / "questions.npz"
    if not file.is_file():
        trained = loaded(project, work, strength)
        tokenizer = AutoTokenizer.from_pretrained(project / "data/base_model")
        examples = [tokenize(tokenizer, messages, label).example for messages, label, _ in questions]
        weighed = [
            (Example(one.input_ids, one.labels, tuple(float(label != IGNORE) for label in one.labels)),)
            for one in examples
        ]
        tickets = [one for one in read_records(project / "data/splits/validation") if one["category"]]
        owners, known = validation_questions(tickets, tokenizer)
        span, validation = (projected_gradients(trained, Projection(), many).numpy() for many in (weighed, known))
        np.savez(file, span=span, validation=validation, owners=owners)
    with np.load(file) as kept:
        return kept["span"], kept["validation"], kept["owners"]


def from_cleanlab(prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """Rank by cleanlab's label quality: from the probabilities of a classifier
    that did not see the record. Empty where it is not installed."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    from dagster_project.lineage.attribution.ranking import ranks

    try:
        from cleanlab.rank import get_label_quality_scores
    except ModuleNotFoundError:
        print("cleanlab is not installed: `pip install -e '.[bench]'` adds it to the table")
        return {}
    numbers = np.array([sorted({*labels}).index(label) for label in labels])
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000)
    )
    likely = cross_val_predict(
        model, prompts, numbers, cv=StratifiedKFold(5, shuffle=True, random_state=0), method="predict_proba"
    )
    return {"cleanlab, TF-IDF and logistic regression": ranks(-get_label_quality_scores(numbers, likely))}


def show(document: dict[str, Any]) -> None:
    n = document["flipped"]
    print(f"{document['records']} records, {n} flipped, {document['steps']} steps")
    print(f"{'':<44} precision at {n}   at {2 * n}: recall")
    for method, places in document["places"].items():
        first, second = (sum(place <= limit for place in places) for limit in (n, 2 * n))
        print(f"{method:<44} {first / n:.2f} ({first})         {second / n:.2f}   {places}")
    print(json.dumps(document["cost"]))


def main() -> int:
    import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT, help="a project with data/splits and data/base_model")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/suspects"), help="folder for the training, gradients and results"
    )
    parser.add_argument("--tickets", type=int, default=1000, help="most tickets that are used")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pedigree").setLevel(logging.INFO)
    prepare(options.project, options.work, options.seed, options.steps, options.tickets)
    show(measure(options.project, options.work))
    found = asked(options.project, options.work)
    for method, (first, more) in found["recall"].items():
        print(f"{method:<44} recall at n {first:.2f}   at 5n {more:.2f}")
    for method, clear in found["stands_out"].items():
        print(f"{method:<44} a record stands out for {sum(clear)} of {len(clear)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
