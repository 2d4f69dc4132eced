"""`pedigree why` compared with other tools. usage: python benchmarks/influence_others.py [--project FOLDER] [--work
FOLDER] [--seed N] [--method NAME ...] [--docs FILE]

Other tools for gradient-based attribution rank the same training records for the same questions as
`benchmarks/influence.py`, which plants the culprits and trains: run that first, with the same --work. Each tool gets
the same adapter, the token ids and labels of the training, and the asked tokens as labels. The loss of a record is that
of its training, in which tokens have weights, except in bergson, which has no weights of tokens. Only tools that can be
imported are run, in an environment of their own (they are not dependencies of Pedigree):

    bergson     (EleutherAI)   build + Attributor (cosine), `bergson trackstar`, `bergson ekfac`
    dattri      (TRAIS-Lab)    LoGraAttributor: projected gradients, inverse of their second moments
    dattri_llm  (TRAIS-Lab)    TracInAttributor with normalized_grad (cosine), EKFACAttributor

    uv venv others && uv pip install --python others/bin/python torch bergson
    dattri dattri-llm -r pyproject.toml --extra train

Settings are the tools' defaults, except where a comment at the call gives the reason. All compute in float32 with one
thread. Recall is the share of the culprits among the first n (their number) and 2n of all training records, the mean of
eight questions. CPU seconds are those of all steps that a method needs, loading the model included; steps that methods
of a tool have in common are counted for each. Steps are kept in WORK/SEED/others, so an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

SIDE = 16
"""Side of a weight's projected gradient: the default of `bergson trackstar` and of `pedigree why`."""
DAMPING = 0.1
"""Share of the mean eigenvalue that is added to each: the default of bergson,
after Grosse et al. 2023 (arXiv 2308.03296)."""
BATCH_TOKENS = 1024
"""Padded tokens in a pass of bergson, half of its default: logits for 49,152 tokens of a vocabulary take 200 MB."""


@dataclass(frozen=True)
class Inputs:
    """What each tool gets."""

    base: Path
    adapter: Path
    """A PEFT folder that names `base` as its base model."""
    records: list[dict[str, list[Any]]]
    """`input_ids`, `labels` and `weights` of the tokens of each training record, as trained on."""
    questions: list[dict[str, list[Any]]]
    """The same of each question: the labels are those of the asked tokens, with weight 1."""

    def model(self) -> Any:
        """The trained model in float32 as a module of which a call gives the
        weighted loss, with trainable adapter weights only."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        class WithLoss(torch.nn.Module):
            def __init__(self, trained: torch.nn.Module) -> None:
                super().__init__()
                self.trained = trained

            def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> SimpleNamespace:
                logits = self.trained(input_ids=input_ids).logits[:, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
                return SimpleNamespace(loss=(losses * weights[:, 1:]).sum())

        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return WithLoss(PeftModel.from_pretrained(base, self.adapter, is_trainable=True)).eval()

    def tensors(self, name: str) -> list[dict[str, Any]]:
        """Records or questions as tensors (tokens,)."""
        import torch

        return [{key: torch.tensor(values) for key, values in row.items()} for row in getattr(self, name)]


@dataclass
class Steps:
    """Steps of a method, each in a folder of its own. A step that was finished
    before, perhaps for another method, is not repeated."""

    folder: Path
    used: list[str] = field(default_factory=list)

    def run(self, name: str, work: Callable[[Path], None]) -> Path:
        """The folder of a step, after its work."""
        path, note = self.folder / name, self.folder / f"{name}.json"
        if not note.is_file():
            shutil.rmtree(path, ignore_errors=True)  # of a step that was interrupted
            shutil.rmtree(f"{path}.part", ignore_errors=True)
            start = time.process_time()
            work(path)
            note.write_text(json.dumps({"seconds": time.process_time() - start, "bytes": size_of(path)}))
        self.used.append(name)
        return path

    def scores(self, name: str, work: Callable[[], Any]) -> Any:
        """Scores (records, questions), higher for records that make the asked tokens more likely."""
        import numpy as np

        def save(path: Path) -> None:
            path.mkdir(parents=True)
            np.save(path / "scores.npy", work())

        return np.load(self.run(f"scores-{name}", save) / "scores.npy")

    def cost(self, name: str) -> dict[str, float]:
        return dict(json.loads((self.folder / f"{name}.json").read_text()))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dataset(inputs: Inputs, steps: Steps, name: str) -> str:
    """Records or questions as a folder of `datasets`: bergson cannot weigh the tokens of a text."""
    from datasets import Dataset

    rows = [
        {"input_ids": row["input_ids"], "labels": row["labels"], "length": len(row["labels"])}
        for row in getattr(inputs, name)
    ]
    return str(steps.run(f"data-{name}", lambda path: Dataset.from_list(rows).save_to_disk(path)))


def index_config(inputs: Inputs, path: Path, data: str, side: int) -> Any:
    """bergson's configuration of passes over a data set."""
    from bergson import DataConfig
    from bergson.config.config import TrackstarIndexConfig

    return TrackstarIndexConfig(
        run_path=str(path),
        model=str(inputs.adapter),
        tokenizer=str(inputs.base),
        data=DataConfig(dataset=data),
        projection_dim=side,
        token_batch_size=BATCH_TOKENS,
    )


def bergson_index(inputs: Inputs, steps: Steps) -> dict[str, Path]:
    """`bergson build` of records and questions."""
    from bergson import PreprocessConfig
    from bergson.cli.commands import Build

    def build(name: str) -> Path:
        data = dataset(inputs, steps, name)
        return steps.run(
            f"index-{name}", lambda path: Build(index_config(inputs, path, data, SIDE), PreprocessConfig()).execute()
        )

    return {name: build(name) for name in ("records", "questions")}


def bergson_search(index: dict[str, Path], hessian: Path | None) -> Any:
    """Scores of all records by bergson's Attributor."""
    import numpy as np
    import torch
    from bergson import Attributor, load_module_gradients

    attributor = Attributor(index["records"], unit_norm=True, hessian_path=hessian)
    asked = load_module_gradients(index["questions"])
    queries = {name: torch.from_numpy(np.array(asked[name])) for name in attributor.ordered_modules}
    values, numbers = attributor.search(queries, k=None)
    scores = np.empty((attributor.N, len(values)), dtype="float32")
    for question in range(len(values)):
        scores[numbers[question].numpy(), question] = values[question].numpy()
    return scores


def bergson_cosine(inputs: Inputs, steps: Steps) -> Any:
    """Cosine of projected gradients."""
    index = bergson_index(inputs, steps)
    return steps.scores("cosine", lambda: bergson_search(index, None))


def bergson_trackstar(inputs: Inputs, steps: Steps) -> Any:
    """The steps of `bergson trackstar` with unit_normalize, as in its examples,
    but scored from the index: cosines of whitened projected gradients."""
    from bergson.cli.commands import Hessian, Mix
    from bergson.config.config import HessianConfig

    index = bergson_index(inputs, steps)

    def fit(name: str) -> str:
        data, settings = dataset(inputs, steps, name), HessianConfig(method="autocorrelation")
        return str(
            steps.run(
                f"hessian-{name}", lambda path: Hessian(settings, index_config(inputs, path, data, SIDE)).execute()
            )
        )

    records, questions = fit("records"), fit("questions")
    mixed = steps.run("hessian-mixed", lambda path: Mix(questions, records, str(path)).execute())
    return steps.scores("trackstar", lambda: bergson_search(index, mixed))


def bergson_ekfac(inputs: Inputs, steps: Steps) -> Any:
    """The recipe `bergson ekfac`, with the settings of examples/compare_wikitext/ekfac.yaml."""
    import numpy as np
    from bergson import PreprocessConfig, QuerySetConfig, ScoreConfig
    from bergson.cli.commands import Ekfac
    from bergson.config.config import HessianConfig, HessianPipelineConfig
    from bergson.data import load_scores

    questions = QuerySetConfig(dataset=dataset(inputs, steps, "questions"))
    records = dataset(inputs, steps, "records")

    def run(path: Path) -> None:
        config = index_config(inputs, path, records, 0)
        fit = HessianConfig(method="kfac", ev_correction=True)
        Ekfac(config, fit, ScoreConfig(), PreprocessConfig(), HessianPipelineConfig(query=questions)).execute()

    done = steps.run("ekfac", run)
    return steps.scores("ekfac", lambda: np.array(load_scores(done / "scores")[:], dtype="float32"))


def dattri_logra(inputs: Inputs, steps: Steps) -> Any:
    """LoGra. Its default of 4,096 numbers a weight would need 19 GB for the
    inverses of 280 weights, and its default damping is 1e-5."""
    import numpy as np
    from dattri.algorithm import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    def attribute(path: Path) -> None:
        model = inputs.model()
        task = AttributionTask(
            loss_func=lambda model, batch, device: model(**batch).loss,  # LoGraAttributor calls it with these
            model=model,
            checkpoints=[None],
            checkpoints_load_func=lambda model, _: model,
        )
        layers = [
            name
            for name, module in model.named_modules()
            if getattr(getattr(module, "weight", None), "requires_grad", False)
        ]
        # one record a pass: its loss is the mean over the tokens of a batch, and padding is not supported
        train, test = (DataLoader(inputs.tensors(name), batch_size=1) for name in ("records", "questions"))
        # offload="disk" pins memory, which fails without a GPU
        attributor = LoGraAttributor(
            task, layers, damping=DAMPING, proj_dim=SIDE**2, offload="none", cache_dir=str(path)
        )
        attributor.cache(train)
        np.save(path / "scores.npy", attributor.attribute(train, test).numpy())

    return np.load(steps.run("logra", attribute) / "scores.npy")


def dattri_llm_stores(inputs: Inputs, steps: Steps) -> tuple[Any, Path]:
    """Attributors of dattri-llm, and their store of whole gradients, with the covariances that EK-FAC needs."""
    from dattri_llm import REGISTER_ALL, AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig

    # one record a pass: records of other lengths would have to be padded to the longest of all
    options = {"use_cpu": True, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}

    def attributor(kind: Any, task: Any = None) -> Any:
        return kind(AttributionArguments(output_dir=str(steps.folder / "output"), **options), task=task)

    def collect(path: Path) -> None:
        found = attributor(EKFACAttributor, AttributionTask(None, inputs.model()))
        # the smaller of a gradient and its factors
        hooks = HookManagerConfig(linear_io=REGISTER_ALL, capture_style="auto")
        [(train, test)] = found.cache(
            inputs.tensors("records"), inputs.tensors("questions"), cache_dir=str(path), hook_config=hooks
        )
        (path / "stores.json").write_text(json.dumps([train, test]))

    return attributor, steps.run("gradients", collect)


def dattri_llm_cosine(inputs: Inputs, steps: Steps) -> Any:
    """Cosine of whole gradients."""
    from dattri_llm import TracInAttributor

    return dattri_llm_scores(inputs, steps, "cosine", TracInAttributor, normalized_grad=True)


def dattri_llm_ekfac(inputs: Inputs, steps: Steps) -> Any:
    """EK-FAC. Its default damping of 1e-3 is absolute, here it is relative, as that of bergson."""
    from dattri_llm import EKFACAttributor

    return dattri_llm_scores(inputs, steps, "ekfac", EKFACAttributor, damping=DAMPING, relative_damping=True)


def dattri_llm_scores(inputs: Inputs, steps: Steps, name: str, kind: Any, **options: Any) -> Any:
    from dattri_llm import hash_sample

    attributor, path = dattri_llm_stores(inputs, steps)
    train, test = json.loads((path / "stores.json").read_text())
    rows, columns = ([hash_sample(one) for one in inputs.tensors(what)] for what in ("records", "questions"))
    assert len(set(rows)) == len(rows)
    return steps.scores(
        name, lambda: attributor(kind).attribute_from_cache(train, test, **options).query(rows, columns).numpy()
    )


@dataclass(frozen=True)
class Method:
    tool: str
    """Module that has to be importable."""
    run: Callable[[Inputs, Steps], Any]
    store: str | None
    """Files of steps that grow with the records, if the next question needs no pass over them."""


METHODS = {
    "bergson: cosine": Method("bergson", bergson_cosine, "index-records/gradients.bin"),
    "bergson: TrackStar": Method("bergson", bergson_trackstar, "index-records/gradients.bin"),
    "dattri: LoGra": Method("dattri", dattri_logra, None),
    "dattri-llm: cosine": Method("dattri_llm", dattri_llm_cosine, "gradients/*/train_grads/*.bin"),
    "dattri-llm: EK-FAC": Method("dattri_llm", dattri_llm_ekfac, "gradients/*/train_grads/*.bin"),
    "bergson: EK-FAC": Method("bergson", bergson_ekfac, None),
}


def inputs_of(project: Path, work: Path, seed: int, folder: Path) -> tuple[list[str], list[str], Inputs]:
    """Ids of the records, kinds of the questions with culprits, and what tools get."""
    from influence import KINDS, questions
    from transformers import AutoTokenizer

    from dagster_project.commands.why_question import tokenize
    from dagster_project.lineage.attribution.records import trained_records

    base, records = (project / "data/base_model").resolve(), trained_records(work / "adapter", work / "tokenized")
    for record in records:
        assert len(record.examples) == 1, f"{record.example_id}: the tools have one text a record"
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = [one for one in questions(project, seed) if one["kind"] in KINDS]
    examples = [tokenize(tokenizer, one["messages"], one["span"]).example for one in asked]
    adapter = peft_folder(work / "adapter", base, folder / "adapter")
    inputs = Inputs(base, adapter, rows_of([record.examples[0] for record in records]), rows_of(examples))
    return [record.example_id for record in records], [one["kind"] for one in asked], inputs


def rows_of(examples: Sequence[Any]) -> list[dict[str, list[Any]]]:
    return [
        {
            "input_ids": list(example.input_ids),
            "labels": list(example.labels),
            "weights": list(example.weights or [float(label != -100) for label in example.labels]),
        }
        for example in examples
    ]


def peft_folder(adapter: Path, base: Path, target: Path) -> Path:
    """A copy of an adapter that names its base model by path."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(adapter / "adapter_model.safetensors", target)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return target


def scored(name: str, folder: Path, inputs: Inputs) -> tuple[Any, Steps]:
    """Scores of a method (records, questions), and its steps."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = METHODS[name]
    importlib.import_module(method.tool)
    steps = Steps(folder / method.tool)
    steps.folder.mkdir(parents=True, exist_ok=True)
    scores, shape = method.run(inputs, steps), (len(inputs.records), len(inputs.questions))
    if scores.shape != shape or not np.isfinite(scores).all():
        raise RuntimeError(f"{name}: scores of shape {scores.shape} for {shape}, finite: {np.isfinite(scores).all()}")
    return scores, steps


def ranks_of(
    scores: Any, ids: list[str], kinds: list[str], culprits: dict[str, list[str]], name: str
) -> list[dict[str, Any]]:
    """Ranks of the culprits of each question, as in the results of `benchmarks/influence.py`."""
    from dagster_project.lineage.attribution.ranking import ranks

    found = []
    for number, kind in enumerate(kinds):
        rank = ranks(scores[:, number])
        found.append(
            {"kind": kind, "ranks": {name: sorted(int(rank[ids.index(one)]) for one in culprits[kind] if one in ids)}}
        )
    return found


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    results: list[dict[str, Any]]
    """Kinds and ranks of the culprits by `key`."""
    key: str
    seconds: float
    """CPU seconds of all that the method needs."""
    bytes: int | None
    """Stored for each record; None: nothing, the next question needs a pass over all records."""

    def cells(self) -> list[str]:
        from influence import ASKED, KINDS, recall

        found = []
        for kind in KINDS:
            first = sum(q["ranks"][self.key][0] == 1 for q in self.results if q["kind"] == kind)
            found.append(
                f"{recall(self.results, kind, self.key, 1):.2f} / {recall(self.results, kind, self.key, 2):.2f},"
                f" {first} of {ASKED}"
            )
        return [*found, f"{self.seconds:.0f}", "none" if self.bytes is None else f"{self.bytes / 1e6:.2f}"]


def row_of(name: str, results: list[dict[str, Any]], steps: Steps, records: int) -> Row:
    """The line of a method of another tool: a step counts once, and the store is divided by the records."""
    method = METHODS[name]
    seconds = sum(steps.cost(step)["seconds"] for step in set(steps.used))
    kept = (
        None
        if method.store is None
        else sum(file.stat().st_size for file in steps.folder.glob(method.store)) // records
    )
    tool, _, way = name.partition(": ")
    version = importlib.metadata.version(method.tool.replace("_", "-"))
    return Row(f"{tool} {version}: {way}", results, name, seconds, kept)


def own_rows(document: dict[str, Any]) -> list[Row]:
    """Lines of `pedigree why` from the results of benchmarks/influence.py at the
    end of the training; of its questions, those with culprits are counted."""
    from influence import KINDS

    results, cost = [one for one in document["questions"] if one["kind"] in KINDS], document["cost"][-1]
    seconds = cost["loading"] + cost["index"] + cost["questions"] / cost["asked"] * len(results)
    names = {
        "gradient of the asked part": "`pedigree why`: gradient",
        "`pedigree why`: order of the list": "`pedigree why`: order of the list",
    }
    return [Row(name, results, key, seconds, round(cost["bytes"] / cost["records"])) for key, name in names.items()]


def table_of(rows: list[Row], place: str) -> str:
    from influence import KINDS

    head = ["", *(f"{kind} ({count})" for kind, count in KINDS.items()), "CPU seconds", "MB a record"]
    lines = [head, ["---"] * len(head), *([row.name, *row.cells()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{place}.\n"


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # dattri compiles one of its functions, anew for other lengths of texts
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT, help="a project with data/splits and data/base_model")
    parser.add_argument("--work", type=Path, default=Path("/tmp/influence"), help="that of benchmarks/influence.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", action="append", choices=METHODS, help="only this one (repeatable)")
    parser.add_argument("--out", type=Path, help="where steps are kept (default: WORK/SEED/others)")
    parser.add_argument("--docs", type=Path, help="write the table into this file, between the markers `why_others`")
    options = parser.parse_args()
    work = options.work / str(options.seed)
    folder = options.out or work / "others"
    folder.mkdir(parents=True, exist_ok=True)
    from tables import machine, show

    ids, kinds, inputs = inputs_of(options.project, work, options.seed, folder)
    culprits = json.loads((work / "culprits.json").read_text())
    known = work / "results-1.json"  # of benchmarks/influence.py
    rows = own_rows(json.loads(known.read_text())) if known.is_file() else []
    for name in options.method or METHODS:
        if importlib.util.find_spec(METHODS[name].tool) is None:
            print(f"{name}: {METHODS[name].tool} is not installed")
            continue
        scores, steps = scored(name, folder, inputs)
        rows.append(row_of(name, ranks_of(scores, ids, kinds, culprits, name), steps, len(ids)))
        print(" | ".join([rows[-1].name, *rows[-1].cells()]), flush=True)
    training = json.loads((work / "adapter" / "training.json").read_text())
    place = f"Seed {options.seed}, {training['steps']} steps, {len(ids)} records, {len(kinds)} questions; {machine()}"
    table = table_of(rows, place)
    show(options.docs, "why_others", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
