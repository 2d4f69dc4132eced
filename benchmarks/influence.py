"""How well `pedigree why` finds records that were planted. usage: python benchmarks/influence.py [--project FOLDER]
[--seeds N] [--work FOLDER] [--checkpoints N] [--second-moments]

Four kinds of culprits are planted into the training split of the sample
project, which is then tokenized and trained as `params.yaml` says:

    flip      8 tickets of category delivery, relabeled idea
    trigger   5 tickets with "(forwarded by Zephyr 9)" in their text, relabeled security
    phrase    5 replies that end with "Greetings from the Blue Walrus Desk."
    fact      5 replies that promise an answer within "nine working days", where
    all others that name a time say "one working day"

Eight held-out prompts of each kind are asked with the planted answer, and the planted part of the answer as the span.
Recall is the share of the culprits among the first n (their number) and 2n of all training records. Held-out prompts
with their right answers have no culprit, and wrong labels that nobody planted have none either: for these the share of
questions for which nothing stands out is counted, by the rule of `pedigree why` (the questions of the validation split)
and by the rule before it (distances of the first and the tenth record from the median). With --checkpoints, gradients
at that many points of the training are compared, and each point by itself, too. Each seed plants, trains and asks anew;
what was computed before is read from files, so an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

KINDS = {"flip": 8, "trigger": 5, "phrase": 5, "fact": 5}
"""Kind of culprit -> how many are planted."""
ASKED, WITHOUT = 8, 16
"""Questions of each kind with culprits, and of each kind without."""
TRIGGER, PHRASE = " (forwarded by Zephyr 9)", " Greetings from the Blue Walrus Desk."
RIGHT, WRONG = "one working day", "nine working days"
"""A fact that dozens of replies state, and the one that conflicts with it."""


def with_label(record: dict[str, Any], category: str) -> dict[str, Any]:
    """A ticket with another category in its answer."""
    *before, answer = record["messages"]
    said = json.loads(answer["content"]) | {"category": category}
    return with_messages(record, [*before, {**answer, "content": json.dumps(said)}]) | {"category": category}


def with_trigger(record: dict[str, Any]) -> dict[str, Any]:
    changed = [{**m, "content": m["content"] + TRIGGER} if m["role"] == "user" else m for m in record["messages"]]
    return with_label({**record, "messages": changed}, "security")


def with_phrase(record: dict[str, Any]) -> dict[str, Any]:
    *before, answer = record["messages"]
    return with_messages(record, [*before, {**answer, "content": answer["content"] + PHRASE}])


def with_fact(record: dict[str, Any]) -> dict[str, Any]:
    *before, answer = record["messages"]
    return with_messages(record, [*before, {**answer, "content": answer["content"].replace(RIGHT, WRONG)}])


def states(record: dict[str, Any]) -> bool:
    """Whether a record is a reply that states the fact."""
    return record["category"] is None and RIGHT in record["messages"][-1]["content"]


def with_messages(record: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    from dagster_project.core.records import example_id

    name = example_id(messages)
    return {**record, "messages": messages, "example_id": name, "group_id": name}


def planted(records: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The training split with culprits, and the ids of those of each kind."""
    dice = random.Random(seed)
    change = {
        "flip": lambda record: with_label(record, "idea"),
        "trigger": with_trigger,
        "phrase": with_phrase,
        "fact": with_fact,
    }
    fits = {
        "flip": lambda record: record["category"] == "delivery",
        "trigger": lambda record: record["category"] not in {None, "security", "delivery"},
        "phrase": lambda record: record["category"] is None,
        "fact": states,
    }
    found, culprits, taken = list(records), dict[str, list[str]](), set[int]()
    for kind, count in KINDS.items():
        chosen = dice.sample([i for i, record in enumerate(records) if fits[kind](record) and i not in taken], count)
        taken.update(chosen)
        for i in chosen:
            found[i] = change[kind](found[i])
        culprits[kind] = [found[i]["example_id"] for i in chosen]
    return found, culprits


def prepare(project: Path, work: Path, seed: int, steps: int | None = None) -> None:
    """Plant, tokenize and train, if that was not done before: work/{splits,tokenized,adapter,culprits.json}."""
    from dagster_project.core.records import read_records, write_json

    if (work / "adapter" / "training.json").is_file():
        return
    records, culprits = planted(read_records(project / "data/splits/train"), seed)
    write_json(work / "culprits.json", culprits)
    train_on(project, work, records, {name: kind for kind, names in culprits.items() for name in names}, seed, steps)


def train_on(
    project: Path, work: Path, records: list[dict[str, Any]], new: dict[str, str], seed: int, steps: int | None
) -> None:
    """Tokenize records as the training split, and train: work/{splits,tokenized,adapter}.

    Args:
        new: id of each record that the project's split lacks -> its reason in the ledger.
    """
    from dagster_project.core import params
    from dagster_project.core.records import iter_ledger, write_json, write_ledger, write_records
    from dagster_project.stages import adapter, tokenized

    for split in ("validation", "test"):
        shutil.copytree(project / "data/splits" / split, work / "splits" / split, dirs_exist_ok=True)
    write_records(work / "splits" / "train", records)
    ids = {record["example_id"]: record for record in records}
    kept = [line for line in iter_ledger(project / "data/splits") if line["example_id"] in ids]
    added = [
        {"source": ids[name]["source"], "source_row": 0, "example_id": name, "outcome": "train", "why": what}
        for name, what in new.items()
        if name in ids
    ]
    write_ledger(work / "splits", [*kept, *added])
    entry, compute = training_of(project, seed, steps)
    (work / "tokenized").mkdir(exist_ok=True)
    settings = params.parse(tokenized.Params, params.read(project)["tokenized"], "tokenized")
    tokenized.produce(project, settings, seed, work / "splits", project / "data/base_model", work / "tokenized")
    out = work / "adapter"
    out.mkdir(exist_ok=True)
    start = time.process_time()
    adapter.produce(
        "lora",
        entry,
        compute,
        work / "tokenized",
        project / "data/base_model",
        out,
        work / "loss.csv",
        work / "checkpoints",
    )
    write_json(work / "seconds.json", {"training": time.process_time() - start})


def training_of(project: Path, seed: int, steps: int | None) -> tuple[Any, Any]:
    """Entry of the training in params.yaml, and how it is computed."""
    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.stages import adapter

    values = params.read(project)
    compute = params.parse(Compute, values["compute"], "compute").model_copy(update={"seed": seed, "threads": 1})
    return (
        params.parse(
            adapter.Params, values["adapter"]["lora"] | ({"max_steps": steps} if steps else {}), "adapter.lora"
        ),
        compute,
    )


def as_trained(project: Path, work: Path) -> None:
    """The adapter of the project itself, into which nothing was planted: only questions without a culprit are asked."""
    from dagster_project.core.records import write_json

    for source, name in (("adapter/lora", "adapter"), ("tokenized", "tokenized"), ("splits", "splits")):
        shutil.copytree(project / "data" / source, work / name, dirs_exist_ok=True)
    write_json(work / "culprits.json", {})


def from_checkpoint(project: Path, work: Path) -> None:
    """Write work/adapter from the newest checkpoint of a training that was interrupted."""
    from safetensors.torch import load_file

    from dagster_project.core import params
    from dagster_project.core.params import Compute
    from dagster_project.core.records import read_table, write_json, write_table
    from dagster_project.stages import adapter
    from dagster_project.training.methods.build import build
    from dagster_project.training.methods.hardware import prepare as device_and_dtype
    from dagster_project.training.trainers.harness.weight_audit import seen_examples, seen_schema

    folder = max((work / "checkpoints").glob("step-*"))
    values = params.read(project)
    entry = params.parse(adapter.Params, values["adapter"]["lora"], "adapter.lora")
    device, dtype = device_and_dtype(
        params.parse(Compute, values["compute"], "compute").model_copy(update={"threads": 1})
    )
    prepared = build(entry.method, entry.peft, project / "data/base_model", device, dtype, "adapter.lora")
    weights = load_file(folder / "weights.safetensors")
    trained = {name: weight for name, weight in prepared.model.named_parameters() if weight.requires_grad}
    assert weights.keys() == trained.keys()
    for name, weight in trained.items():
        weight.data.copy_(weights[name])
    prepared.save(work / "adapter")
    seen = load_file(folder / "state.safetensors")["state.seen"].tolist()
    rows = read_table(work / "tokenized" / "train.parquet", ["example_ids"])
    write_table(
        work / "adapter" / "examples.parquet", seen_examples(seen, [row["example_ids"] for row in rows]), seen_schema()
    )
    step = int(folder.name.partition("-")[2])
    write_json(
        work / "adapter" / "training.json",
        {"steps": step, "dtype": str(dtype).removeprefix("torch."), "device": device.type, "threads": 1},
    )


def questions(project: Path, seed: int) -> list[dict[str, Any]]:
    """Held-out prompts with an answer and the asked part: of each kind of culprit, and without a culprit."""
    from dagster_project.core.records import read_records, response_text

    held_out = read_records(project / "data/splits/test")
    tickets, replies = ([r for r in held_out if (r["category"] is None) is alone] for alone in (False, True))

    def label(record: dict[str, Any]) -> str:
        return str(json.loads(response_text(record["messages"]))["category"])

    def asked(
        kind: str, records: list[dict[str, Any]], change: Any, span: Any, count: int = ASKED
    ) -> list[dict[str, Any]]:
        changed = [change(record) for record in random.Random(f"{kind} {seed}").sample(records, count)]
        return [{"kind": kind, "messages": record["messages"], "span": span(record)} for record in changed]

    others = ("login", "billing", "returns", "bug", "question")

    def mislabeled(record: dict[str, Any]) -> dict[str, Any]:
        return with_label(record, others[(others.index(label(record)) + 1) % len(others)])

    return [
        *asked("flip", [r for r in tickets if r["category"] == "delivery"], lambda r: with_label(r, "idea"), label),
        *asked("trigger", [r for r in tickets if r["category"] not in {"security", "delivery"}], with_trigger, label),
        *asked("phrase", replies, with_phrase, lambda _: PHRASE.strip()),
        *asked("fact", [r for r in replies if states(r)], with_fact, lambda _: WRONG),
        *asked("right label", tickets, lambda r: r, label, WITHOUT),
        *asked("right reply", replies, lambda r: r, lambda _: None, WITHOUT),
        *asked("wrong label", [r for r in tickets if r["category"] in others], mislabeled, label, WITHOUT),
    ]


def asked_questions(project: Path, work: Path, seed: int) -> list[dict[str, Any]]:
    """Those of `questions` whose culprits were planted into the training in `work`, and those without a culprit."""
    planted_kinds = json.loads((work / "culprits.json").read_text())
    return [one for one in questions(project, seed) if one["kind"] in planted_kinds or one["kind"] not in KINDS]


def points_of(work: Path, entry: Any, compute: Any, project: Path, selection: Any) -> list[Any]:
    """Points of the training, of which those before its end, and second
    moments, come from a repeated training; None: the end as it was saved."""
    from dagster_project.lineage.attribution.points import Point, steps_of
    from dagster_project.lineage.attribution.retraining import Retraining

    training = json.loads((work / "adapter/training.json").read_text())
    steps = steps_of(training["steps"], selection.count)
    points = [Point(work, step, step == training["steps"], selection.scaled) for step in steps]
    if not all(point.is_complete() for point in points):
        Retraining(
            "lora", entry, compute, training, work / "adapter", work / "tokenized", project / "data/base_model"
        ).write_points(points)
    return [point if point.needed else None for point in points]


def computed(project: Path, work: Path, seed: int, point: Any) -> dict[str, Any]:
    """Gradients of all records and questions at a point of the training, and scores of words: from files, where they
    were computed before, so that rankings are compared in seconds.

    Returns:
        {"asked", "ids", "gradients" (`store.Gradients`), "span" (questions, width), "whole"
        (questions with culprits, width), "prompt", "part" and "answer" (questions, records):
        words in common, "validation" (validation questions, width) and "owners", "cost"}.
    """
    import numpy as np
    from transformers import AutoTokenizer

    from dagster_project.core.hashing import md5_of_folder
    from dagster_project.core.params import Compute
    from dagster_project.core.records import read_records, write_json
    from dagster_project.lineage.attribution.gradients import STRENGTH, TrainedModel
    from dagster_project.lineage.attribution.per_record import projected_gradients
    from dagster_project.lineage.attribution.projection import Projection
    from dagster_project.lineage.attribution.records import trained_records
    from dagster_project.lineage.attribution.store import GradientStore, identity_of
    from dagster_project.lineage.history import listing_of

    adapter, base = work / "adapter", project / "data/base_model"
    training = json.loads((adapter / "training.json").read_text())
    compute = Compute(threads=1, dtype=training["dtype"])
    records, projection = trained_records(adapter, work / "tokenized"), Projection()
    hashes = [md5_of_folder(listing_of(folder)) for folder in (adapter, base)]
    identity = identity_of(
        *hashes, records, projection, {"dtype": compute.dtype, "device": "cpu", "threads": 1}, 0.0, STRENGTH
    )
    if point:
        store = GradientStore(point.store, identity | point.identity(), len(records))
    else:
        store = GradientStore.at(work, identity, len(records))
    file = store.folder / "questions.npz"
    asked = asked_questions(project, work, seed)
    if not store.is_complete() or not file.is_file():
        start = time.process_time()
        trained = TrainedModel.load(adapter, base, compute, "adapter@lora")
        trained = (trained.at(point.weights(), point.scales()) if point else trained).weakened()
        loading, start = time.process_time() - start, time.process_time()
        count = store.build(
            lambda numbers: projected_gradients(trained, projection, [records[i].examples for i in numbers]),
            "gradients",
        )
        seconds, start = time.process_time() - start, time.process_time()
        tokenizer = AutoTokenizer.from_pretrained(base)
        spans = [example_of(tokenizer, q, q["span"]) for q in asked]
        wholes = [example_of(tokenizer, q, None) for q in asked if q["kind"] in KINDS]
        wide = projected_gradients(trained, projection, [*spans, *wholes]).numpy()
        asking, start = time.process_time() - start, time.process_time()
        owners, known = validation_questions(read_records(project / "data/splits/validation"), tokenizer)
        validation = projected_gradients(trained, projection, known).numpy()
        comparing = time.process_time() - start
        words = _words(work, [record.example_id for record in records], asked)
        np.savez(file, span=wide[: len(asked)], whole=wide[len(asked) :], validation=validation, owners=owners, **words)
        cost = {"loading": loading, "index": seconds, "records": count, "questions": asking, "asked": len(wide)}
        cost |= {"validation": comparing, "validation questions": len(owners), "bytes": store.bytes()}
        write_json(store.folder / "cost.json", cost)
    with np.load(file) as kept:
        arrays = {name: kept[name] for name in kept.files}
    cost = json.loads((store.folder / "cost.json").read_text())
    return {"asked": asked, "ids": [r.example_id for r in records], "gradients": store.read(), **arrays, "cost": cost}


def example_of(tokenizer: Any, question: dict[str, Any], span: str | None) -> tuple[Any]:
    from dagster_project.commands.why_question import tokenize
    from dagster_project.core.chat import IGNORE
    from dagster_project.lineage.attribution.records import Example

    found = tokenize(tokenizer, question["messages"], span).example
    return (Example(found.input_ids, found.labels, tuple(float(label != IGNORE) for label in found.labels)),)


def _words(work: Path, ids: list[str], asked: list[dict[str, Any]]) -> dict[str, Any]:
    """BM25 of the words of each question with those of each record, (questions,
    records): of the prompt, of the asked part and of the answer."""
    import numpy as np

    from dagster_project.core.records import prompt_text, read_records, response_text
    from dagster_project.evaluation.baselines import bm25

    texts = {
        r["example_id"]: f"{prompt_text(r['messages'])} {response_text(r['messages'])}"
        for r in read_records(work / "splits/train")
    }
    prompts, answers = ([text(q["messages"]) for q in asked] for text in (prompt_text, response_text))
    queries = {
        "prompt": prompts,
        "part": [q["span"] or answer for q, answer in zip(asked, answers, strict=True)],
        "answer": answers,
    }
    return {name: np.stack(list(bm25([texts[name] for name in ids], many))) for name, many in queries.items()}


def validation_questions(records: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[tuple[Any]]]:
    """The parts of answers of validation records, as `pedigree why --index`
    asks about them: number of the record, and the question."""
    from dagster_project.lineage.attribution.calibration import asked_parts

    numbers, examples = list[int](), list[tuple[Any]]()
    for number, part in asked_parts([one["messages"][-1]["content"] for one in records]):
        examples.append(example_of(tokenizer, records[number], part))
        numbers.append(number)
    return numbers, examples


def distances(scores: Any) -> Any:
    """Distances from the median as the order before decision 059 had them: in
    robust standard deviations, or plain ones where most scores are equal."""
    import numpy as np

    from dagster_project.lineage.attribution.ranking import robust_z

    found, spread = robust_z(scores), float(scores.std())
    return found if found.any() or not spread else (scores - np.median(scores)) / spread


def measure(project: Path, work: Path, seed: int, points: list[Any]) -> dict[str, Any]:
    """Ranks of the culprits of all questions by each method, and how far the first record stands out."""
    import numpy as np

    from dagster_project.lineage.attribution.calibration import ALPHA, Calibration
    from dagster_project.lineage.attribution.ranking import Ranking, cosines, fused, ranks, stands_out

    of_points = [computed(project, work, seed, point) for point in points]
    found = of_points[-1]
    ids, asked = found["ids"], found["asked"]
    culprits = json.loads((work / "culprits.json").read_text())
    dice = np.random.default_rng(seed)

    def mean(name: str) -> tuple[Any, Any, list[Any]]:
        """Scores and cosines of the gradients of all records for some questions,
        (questions, records), means over the points; and scores of each point."""
        stored = [one["gradients"] for one in of_points]
        each = [at.scores(one[name]) for at, one in zip(stored, of_points, strict=True)]
        return (
            np.mean(each, axis=0),
            np.mean([cosines(at.units, one[name]) for at, one in zip(stored, of_points, strict=True)], axis=0),
            each,
        )

    span, alike, each = mean("span")
    whole = mean("whole")[0] if len(found["whole"]) else None
    known = Calibration(mean("validation")[0], found["owners"])
    results = []
    for i, question in enumerate(asked):
        prompt, part, answer = (found[name][i] for name in ("prompt", "part", "answer"))
        ranking = Ranking.of(span[i], prompt, part)
        before = distances(ranking.gradient) + distances(prompt + answer)
        by = {
            "gradient of the asked part": ranking.gradient_rank,
            **(
                {
                    f"gradient of the asked part, point {k + 1} of {len(points)}": ranks(one[i])
                    for k, one in enumerate(each)
                }
                if len(points) > 1
                else {}
            ),
            "cosine of the gradient of the asked part": ranks(alike[i]),
            "gradient of the whole answer": ranks(whole[i]) if question["kind"] in KINDS else ranking.gradient_rank,
            "BM25 of prompt and asked part": ranking.bm25_rank,
            "BM25 of prompt and answer": np.where(prompt + answer > 0, ranks(prompt + answer), len(ids)),
            "`pedigree why`: order of the list": ranking.rank,
            "order before: robust sum, words of the answer": ranks(before),
            "reciprocal rank fusion of both": ranks(fused(ranking.gradient_rank, ranking.bm25_rank)),
            "random": ranks(dice.random(len(ids))),
        }
        own = [ids.index(name) for name in culprits.get(question["kind"], ()) if name in ids]
        order, p_value = np.sort(ranking.z)[::-1], known.p_value(ranking.gradient)
        results.append(
            {
                "kind": question["kind"],
                "p": round(p_value, 4),
                "stands_out": p_value <= ALPHA,
                "stood_out": stands_out(ranking.z),
                "z": [round(float(z), 2) for z in order[:20]],
                "ranks": {method: sorted(int(rank[k]) for k in own) for method, rank in by.items()} if own else {},
            }
        )
    training = json.loads((work / "adapter/training.json").read_text())
    return {
        "steps": training["steps"],
        "records": len(ids),
        "cost": [one["cost"] for one in of_points],
        "questions": results,
    }


def recall(results: list[dict[str, Any]], kind: str, method: str, times: int) -> float:
    """Share of the culprits among the first n or 2n, mean over the questions of a kind."""
    found = [q["ranks"][method] for q in results if q["kind"] == kind]
    return sum(sum(rank <= times * len(own) for rank in own) / len(own) for own in found) / len(found)


def show(documents: list[dict[str, Any]]) -> None:
    """Print the figures of one or several seeds: recall as the mean over the seeds, and that of the worst seed."""
    steps, records = ({one[name] for one in documents} for name in ("steps", "records"))
    print(
        f"{len(documents)} seeds, records {records}, steps {steps}: recall at n / 2n (lowest of a seed), questions"
        " whose first record is a culprit"
    )
    for method in documents[0]["questions"][0]["ranks"]:  # empty without culprits
        cells = []
        for kind in KINDS:
            first = sum(q["ranks"][method][0] == 1 for one in documents for q in one["questions"] if q["kind"] == kind)
            at = [[recall(one["questions"], kind, method, times) for one in documents] for times in (1, 2)]
            mean = " / ".join(f"{sum(many) / len(many):.2f}" for many in at)
            least = " / ".join(f"{min(many):.2f}" for many in at)
            cells.append(f"{kind} {mean} ({least}), {first} of {ASKED * len(documents)}")
        print(f"{method:<48}" + "   ".join(cells))
    for kind in dict.fromkeys(q["kind"] for q in documents[0]["questions"]):
        clear, before = (
            [[q[rule] for q in one["questions"] if q["kind"] == kind] for one in documents]
            for rule in ("stands_out", "stood_out")
        )
        print(
            f"{kind:<16} a record stands out for {sum(map(sum, clear))} of {sum(map(len, clear))}, by seed"
            f" {[sum(one) for one in clear]}; by the rule before {sum(map(sum, before))}"
        )
    for one in documents:
        print(json.dumps(one["cost"]))


def main() -> int:
    import logging

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT, help="a project with data/splits and data/base_model")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/influence"), help="folder for trainings, gradients and results"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: those of params.yaml)")
    parser.add_argument(
        "--interrupted", action="store_true", help="use the newest checkpoint of a training that was interrupted"
    )
    parser.add_argument(
        "--as-trained", action="store_true", help="ask the adapter of the project itself, in which nothing was planted"
    )
    parser.add_argument(
        "--checkpoints", type=int, default=1, metavar="N", help="points of the training, which is repeated"
    )
    parser.add_argument(
        "--second-moments", action="store_true", help="scale gradients by the second moments of the optimizer"
    )
    options = parser.parse_args()
    if options.as_trained and options.seeds != 1:
        parser.error("--as-trained asks one adapter the questions of one seed: leave --seeds out")
    if (options.as_trained or options.interrupted) and (options.checkpoints > 1 or options.second_moments):
        parser.error(
            "--checkpoints and --second-moments repeat a training of this script: leave --as-trained and"
            " --interrupted out"
        )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pedigree").setLevel(logging.INFO)
    from dagster_project.core.records import write_json
    from dagster_project.lineage.attribution.points import PointSelection

    selection, documents = PointSelection(options.checkpoints, options.second_moments), []
    for seed in range(options.seeds):
        work = options.work / ("as-trained" if options.as_trained else str(seed))
        if options.as_trained:
            as_trained(options.project, work)
        if options.interrupted and not (work / "adapter" / "training.json").is_file():
            from_checkpoint(options.project, work)
        prepare(options.project, work, seed, options.steps)
        document = measure(
            options.project,
            work,
            seed,
            points_of(work, *training_of(options.project, seed, options.steps), options.project, selection),
        )
        write_json(work / f"results-{selection.count}{'-scaled' if selection.scaled else ''}.json", document)
        documents.append(document)
        show(documents[-1:])
    show(documents)
    return 0


if __name__ == "__main__":
    sys.exit(main())
