"""Compare a model as llama.cpp serves it with the model as it was trained and measured. usage: python benchmarks/serving.py
[--project FOLDER] [--model NAME] [--exports FOLDER] [--threads N] [--questions N] [--out FILE]

Exports the model as GGUF in each number format (or takes the folders NAME-FORMAT in --exports), and answers the test questions of the stage
`evaluation` greedily, with at most evaluation.max_new_tokens tokens:

    evaluation     the answers that the stage recorded, in the number format of the project (compute.dtype)
    float32        the same model, by the code of the stage, in float32
    f16, q8_0, q4_k_m   llama.cpp (llama-cpp-py-sync), one prompt at a time, from the rendered text of the prompt, as its server gets it

Token ids: prompts that llama.cpp splits into the ids that training used. Equal answers: share of answers with the same text.
KL: mean over the tokens of the float32 answers of KL(float32 || system) in nats, both given the same tokens before. For it llama.cpp reads prompt and
float32 answer at once; as long as its most likely tokens are those of the answer, they are also its own answer, which goes on token by token
from the first difference. Scores: as in the stage. Seconds are user and system time of the process for a question, and comparable on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tables import machine, replace  # noqa: E402

QUANTIZATIONS = ("f16", "q8_0", "q4_k_m")
CONTEXT = 2048
Ids = list[int]


class Served:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, threads: int) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        self.quiet = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *_: None)
        self.lib.llama_log_set(self.quiet, self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(os.fsencode(file), self.lib.llama_model_default_params())
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = threads
        self.context = self.lib.llama_init_from_model(self.model, params)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokens(self, text: str) -> Ids:
        content = text.encode()
        found = self.ffi.new("llama_token[]", len(content) + 16)
        count = self.lib.llama_tokenize(self.vocab, content, len(content), found, len(content) + 16, True, True)
        return list(found[0:count])

    def logits(self, ids: Sequence[int], start: int, first: int) -> Any:
        """Logits (tokens, vocabulary) at the positions from `first` on of tokens that follow `start` earlier ones."""
        import numpy as np

        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, start + i, 1, 0, i >= first
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        rows = [self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, i), 4 * self.size) for i in range(first, len(ids))]
        found = np.stack([np.frombuffer(row, dtype=np.float32).copy() for row in rows])
        self.lib.llama_batch_free(batch)
        return found

    def answer(self, prompt: Ids, expected: Ids, longest: int) -> tuple[Ids, Any]:
        """The greedy answer with its end, and the log-probabilities (tokens, vocabulary) at the tokens of the expected answer."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        logits = self.logits([*prompt, *expected[:-1]], 0, len(prompt) - 1)
        likely = [int(token) for token in logits.argmax(axis=1)]
        same = next((i for i, pair in enumerate(zip(likely, expected, strict=True)) if pair[0] != pair[1]), len(expected) - 1)
        answer = likely[: same + 1]
        place = len(prompt) + same
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, place, -1)
        while len(answer) < longest and not self.lib.llama_vocab_is_eog(self.vocab, answer[-1]):
            answer.append(int(self.logits(answer[-1:], place, 0)[0].argmax()))
            place += 1
        return answer, log_probabilities(logits)


def log_probabilities(logits: Any) -> Any:
    import numpy as np

    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))).astype(np.float32)


def divergence(reference: Any, other: Any) -> Any:
    """KL(reference || other) of each token, from log-probabilities (tokens, vocabulary)."""
    import numpy as np

    expected = reference.astype(np.float64)
    return (np.exp(expected) * (expected - other)).sum(axis=1)


class Questions:
    """The test questions, as the stage `evaluation` asks them, and what scores their answers."""

    def __init__(self, project: Path, folder: Path, results: Path, threads: int, most: int | None) -> None:
        from dagster_project.core import params
        from dagster_project.core.chat import encode_prompt, generation_prompt
        from dagster_project.core.params import Compute
        from dagster_project.core.records import read_records
        from dagster_project.evaluation.custom_metrics import custom_measures
        from dagster_project.evaluation.evaluator import EvaluatedModel, Settings, select_questions
        from dagster_project.evaluation.scoring import Scoring

        self.results = results
        values = params.read(project)
        self.settings = params.parse(Settings, values.get("evaluation"), "evaluation")
        self.compute = params.parse(Compute, values.get("compute"), "compute").model_copy(update={"threads": threads})
        self.load = lambda dtype: EvaluatedModel(folder, self.compute, self.settings.model_copy(update={"dtype": dtype}))
        train, test = (read_records(project / "data" / "splits" / split) for split in ("train", "test"))
        self.task, self.rows = select_questions(test, self.settings, train)
        self.rows = self.rows[:most]
        self.scoring = Scoring(self.rows, self.task, custom_measures(project, self.settings.metrics))
        self.reference = self.load(self.settings.dtype)
        self.tokenizer = self.reference.tokenizer
        asked = [(row["messages"][:-1], *offer) for row, offer in zip(self.rows, self.scoring.offers, strict=True)]
        self.ids = [encode_prompt(self.tokenizer, *one) for one in asked]
        self.texts = [generation_prompt(self.tokenizer, *one) for one in asked]

    def generated(self, model: Any) -> list[Ids]:
        """Answers by the code of the stage."""
        from dagster_project.training.inference.generate import generate_ids

        longest, batch = self.settings.max_new_tokens, self.settings.batch_size
        return [list(ids) for ids in generate_ids(model.model, self.tokenizer, self.ids, longest, batch, "serving")]

    def read(self, answers: Sequence[Ids]) -> list[Any]:
        """Token ids -> answers, as the stage reads them."""
        from dagster_project.training.inference.answers import read_answer

        triples = zip(self.ids, answers, self.scoring.offers, strict=True)
        return [read_answer(self.tokenizer, prompt, ids, offer.tools) for prompt, ids, offer in triples]

    @property
    def recorded(self) -> list[Any]:
        """The answers that the stage recorded."""
        from dagster_project.core.records import read_table
        from dagster_project.training.inference.answers import Answer

        found = {row["example_id"]: row["answer"] for row in read_table(self.results)}
        return [Answer(found[row["example_id"]]) for row in self.rows]


def distributions(model: Any, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[Any]:
    """Log-probabilities (tokens, vocabulary) of each answer by transformers."""
    import torch

    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
        found.append(log_probabilities(logits.numpy()))
    return found


def measured(questions: Questions, files: Mapping[str, Path], threads: int) -> list[dict[str, Any]]:
    """A row of the table for each system."""
    longest = questions.settings.max_new_tokens
    exact, begin = questions.load("float32"), time.process_time()
    expected = questions.generated(exact)
    spent = (time.process_time() - begin) / len(expected)
    known = distributions(exact.model, questions.ids, expected)
    own = distributions(questions.reference.model, questions.ids, expected)
    dtype = str(questions.reference.model.dtype).removeprefix("torch.")
    rows = [
        {"name": f"evaluation, {dtype}", "answers": questions.recorded, "kl": _mean_kl(known, own)},
        {"name": "transformers, float32", "answers": questions.read(expected), "kl": 0.0, "seconds": spent},
    ]
    del exact, own
    for name, file in files.items():
        served, begin = Served(file, threads), time.process_time()
        same = sum(served.tokens(text) == ids for text, ids in zip(questions.texts, questions.ids, strict=True))
        answered = [served.answer(*pair, longest) for pair in zip(questions.ids, expected, strict=True)]
        spent = (time.process_time() - begin) / len(answered)
        served.close()
        size, kl = file.stat().st_size, _mean_kl(known, [given for _, given in answered])
        answers = questions.read([ids for ids, _ in answered])
        rows.append({"name": f"llama.cpp, {name}", "ids": same, "answers": answers, "kl": kl, "seconds": spent, "size": size})
        print(f"{rows[-1]['name']}: {same} prompts, KL {kl:.6f}", file=sys.stderr, flush=True)
    for row in rows:
        row["scores"] = questions.scoring.score(row["answers"], True)
        for key, others in (("evaluation", rows[0]), ("float32", rows[1])):
            row[key] = [a.content == b.content for a, b in zip(row["answers"], others["answers"], strict=True)]
    return rows


def _mean_kl(expected: Sequence[Any], other: Sequence[Any]) -> float:
    import numpy as np

    return float(np.concatenate([divergence(*pair) for pair in zip(expected, other, strict=True)]).mean())


def table(rows: Sequence[Mapping[str, Any]], questions: Questions, model: str, stored: int) -> str:
    count = len(questions.ids)
    names = [name for name in ("macro_f1", "accuracy", "rouge_l") if name in rows[0]["scores"]][:2]
    base = rows[0]["scores"][names[0]]
    lines = [
        f"`{model}` ({stored / 1e6:.1f} MB of safetensors), {count} test questions, greedy, at most {questions.settings.max_new_tokens} new tokens, "
        f"{questions.compute.threads} thread(s), {machine()}.",
        "",
        f"| system | file, MB | prompts with the token ids of training | answers as in evaluation | answers as in float32 | KL, nats a token | "
        f"{names[0]} | difference, points | {names[1]} | CPU seconds a question |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        size = f"{row['size'] / 1e6:.1f}" if "size" in row else ""
        ids = f"{row['ids']} of {count}" if "ids" in row else ""
        score = row["scores"][names[0]]
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else ""
        lines.append(
            f"| {row['name']} | {size} | {ids} | {sum(row['evaluation'])} of {count} | {sum(row['float32'])} of {count} | {row['kl']:.6f} | "
            f"{score:.4f} | {100 * (score - base):+.2f} | {row['scores'][names[1]]:.4f} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def results_of(project: Path, model: str) -> Path:
    """The table of results of a model's evaluation."""
    import json

    stage, _, variant = model.partition("@")
    if model == "release":
        variant = json.loads((project / "data/release/release.json").read_bytes())["variant"]
        stage = "merged" if (project / "data/merged" / variant).is_dir() else "merged_aligned"
    return project / "data" / stage.replace("merged", "evaluation") / variant / "results.parquet"


def main() -> None:
    from dagster_project.commands.model_files.export import export

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=ROOT)
    parser.add_argument("--model", default="release")
    parser.add_argument("--exports", type=Path, help="folder with folders that `pedigree export` wrote: NAME-f16, ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--questions", type=int, help="ask only the first of them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = options.model.replace("@", "-")
    with tempfile.TemporaryDirectory() as scratch:
        exports = options.exports or Path(scratch)
        if not options.exports:
            for form in QUANTIZATIONS:
                export(options.project.resolve(), options.model, "gguf", form, str(exports / f"{name}-{form}"))
        files = {form: exports / f"{name}-{form}" / f"{name}-{form}.gguf" for form in QUANTIZATIONS}
        folder = options.project / "data" / options.model.replace("@", "/")
        questions = Questions(
            options.project.resolve(), folder, results_of(options.project, options.model), options.threads, options.questions
        )
        rows = measured(questions, files, options.threads)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    text = table(rows, questions, options.model, stored)
    print(text)
    if options.out:
        replace(options.out, "serving", text)


if __name__ == "__main__":
    main()
