"""Compare a model as llama.cpp serves it with the model as it was trained and measured. usage: python
benchmarks/serving.py [--project FOLDER] [--model NAME] [--exports FOLDER] [--threads N] [--minutes N] [--out FILE]

Exports the model as GGUF in each number format (or takes the folders NAME-FORMAT in --exports), and answers the test
questions of the stage `evaluation` greedily, with at most evaluation.max_new_tokens tokens:

    evaluation     the answers that the stage recorded, in the number format of the project (compute.dtype)
    float32        the same model in transformers, in float32
    f16, q8_0, q4_k_m   llama.cpp (llama-cpp-py-sync), one prompt at a time,
    from the rendered text of the prompt, as its server gets it

Token ids: prompts that llama.cpp splits into the ids that training used. Equal answers: those with the same text.
Each system first reads prompt and recorded answer at once. As long as its most likely tokens are
those of the answer, they are its own answer, too, which goes on token by token from the first
difference. KL: mean over the tokens of the recorded answers of KL(float32 || system) in nats, from
that reading. Scores: as in the stage, on the same questions. Tokens per CPU second: of 64 tokens
generated one after the other; user and system time of the process is comparable on a busy machine.

Questions are asked in blocks, of all systems; the table is written after each.
--minutes N starts no block after this time: the table has fewer questions.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tables import machine, show  # noqa: E402

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
            batch.token[i] = token
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= first
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        rows = [
            self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, i), 4 * self.size)
            for i in range(first, len(ids))
        ]
        found = np.stack([np.frombuffer(row, dtype=np.float32).copy() for row in rows])
        self.lib.llama_batch_free(batch)
        return found

    def answer(self, prompt: Ids, expected: Ids, longest: int) -> tuple[Ids, Any]:
        """The greedy answer with its end, and the log-probabilities (tokens,
        vocabulary) at the tokens of the expected answer."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        logits = self.logits([*prompt, *expected[:-1]], 0, len(prompt) - 1)
        answer = beginning(logits, expected)
        place = len(prompt) + len(answer) - 1
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, place, -1)
        while len(answer) < longest and not self.lib.llama_vocab_is_eog(self.vocab, answer[-1]):
            answer.append(int(self.logits(answer[-1:], place, 0)[0].argmax()))
            place += 1
        return answer, log_probabilities(logits)

    def tokens_a_second(self, prompt: Ids) -> float:
        """Tokens that are generated in a second of processor time."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        token = int(self.logits(prompt, 0, len(prompt) - 1)[0].argmax())
        begin = time.process_time()
        for place in range(len(prompt), len(prompt) + 64):
            token = int(self.logits([token], place, 0)[0].argmax())
        return 64 / (time.process_time() - begin)


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

    def __init__(self, project: Path, folder: Path, results: Path, threads: int) -> None:
        from transformers import AutoTokenizer

        from dagster_project.core import params
        from dagster_project.core.chat import encode_prompt, generation_prompt
        from dagster_project.core.params import Compute
        from dagster_project.core.records import read_records
        from dagster_project.evaluation.custom_metrics import custom_measures
        from dagster_project.evaluation.evaluator import EvaluatedModel, Settings, select_questions
        from dagster_project.evaluation.scoring import Scoring
        from dagster_project.training.methods.hardware import prepare

        self.results = results
        values = params.read(project)
        self.settings = params.parse(Settings, values.get("evaluation"), "evaluation")
        self.compute = params.parse(Compute, values.get("compute"), "compute").model_copy(update={"threads": threads})
        self.load = lambda dtype: EvaluatedModel(
            folder, self.compute, self.settings.model_copy(update={"dtype": dtype})
        )
        train, test = (read_records(project / "data" / "splits" / split) for split in ("train", "test"))
        self.task, self.rows = select_questions(test, self.settings, train)
        self.custom = custom_measures(project, self.settings.metrics)
        self.offers = Scoring(self.rows, self.task, self.custom).offers
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.dtype = str(
            prepare(self.compute.model_copy(update={"dtype": self.settings.dtype or self.compute.dtype}))[1]
        ).removeprefix("torch.")
        self.stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        asked = [(row["messages"][:-1], *offer) for row, offer in zip(self.rows, self.offers, strict=True)]
        self.ids = [encode_prompt(self.tokenizer, *one) for one in asked]
        self.texts = [generation_prompt(self.tokenizer, *one) for one in asked]

    def scoring_of(self, count: int) -> Any:
        """What scores the answers to the first questions."""
        from dagster_project.evaluation.scoring import Scoring

        return Scoring(self.rows[:count], self.task, self.custom)

    def read(self, answers: Sequence[Ids]) -> list[Any]:
        """Token ids -> answers, as the stage reads them."""
        from dagster_project.training.inference.answers import read_answer

        triples = zip(self.ids, answers, self.offers, strict=False)
        return [read_answer(self.tokenizer, prompt, ids, offer.tools) for prompt, ids, offer in triples]

    @property
    def recorded(self) -> list[Any]:
        """The answers that the stage recorded."""
        from dagster_project.core.records import read_table
        from dagster_project.training.inference.answers import Answer

        found = {row["example_id"]: row["answer"] for row in read_table(self.results)}
        return [Answer(found[row["example_id"]]) for row in self.rows]


class Transformers:
    """The model in transformers, with the methods of `Served`."""

    def __init__(self, model: Any, ends: frozenset[int]) -> None:
        self.model, self.ends = model, ends

    def _logits(self, ids: Sequence[int], first: int) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([[*ids]])).logits[0, first:].float().numpy()

    def answer(self, prompt: Ids, expected: Ids, longest: int) -> tuple[Ids, Any]:
        logits = self._logits([*prompt, *expected[:-1]], len(prompt) - 1)
        answer = beginning(logits, expected)
        while len(answer) < longest and answer[-1] not in self.ends:
            answer.append(int(self._logits([*prompt, *answer], len(prompt) + len(answer) - 1)[0].argmax()))
        return answer, log_probabilities(logits)


def beginning(logits: Any, expected: Ids) -> Ids:
    """The most likely tokens up to the first that differs from the expected
    answer; without a difference the whole answer.

    Args:
        logits: (tokens, vocabulary), at the tokens of the expected answer.
    """
    likely = [int(token) for token in logits.argmax(axis=1)]
    same = next(
        (i for i, pair in enumerate(zip(likely, expected, strict=True)) if pair[0] != pair[1]), len(expected) - 1
    )
    return likely[: same + 1]


BLOCK = 10


class Measured:
    """A system's answers and divergences so far."""

    def __init__(self, name: str, system: Any, size: int | None = None) -> None:
        self.name, self.system, self.size = name, system, size
        self.answers: list[Ids] = []
        self.kl: list[Any] = []
        self.same_ids = 0
        self.speed = 0.0

    def ask(self, prompt: Ids, expected: Ids, longest: int) -> Any:
        answer, probabilities = self.system.answer(prompt, expected, longest)
        self.answers.append(answer)
        return probabilities


def measured(
    questions: Questions,
    files: Mapping[str, Path],
    threads: int,
    until: float,
    write: Callable[[str], None],
    model: str,
) -> None:
    """Write a table after each block of questions."""
    from dagster_project.core.rendering import end_ids

    ends, longest = end_ids(questions.tokenizer), questions.settings.max_new_tokens
    exact = Measured("transformers, float32", Transformers(questions.load("float32").model, ends))
    served = [
        Measured(f"llama.cpp, {name}", Served(file, threads), file.stat().st_size) for name, file in files.items()
    ]
    for one in served:
        one.same_ids = sum(
            one.system.tokens(text) == ids for text, ids in zip(questions.texts, questions.ids, strict=True)
        )
        one.speed = one.system.tokens_a_second(questions.ids[0])
    end = next(iter(ends))
    expected = [
        [*questions.tokenizer(answer.content, add_special_tokens=False).input_ids, end][:longest]
        for answer in questions.recorded
    ]
    for start in range(0, len(expected), BLOCK):
        if time.monotonic() > until:
            break
        for number in range(start, min(start + BLOCK, len(expected))):
            known = exact.ask(questions.ids[number], expected[number], longest)
            for one in served:
                one.kl.append(divergence(known, one.ask(questions.ids[number], expected[number], longest)))
        write(table([exact, *served], questions, model))


def table(systems: Sequence[Measured], questions: Questions, model: str) -> str:
    import numpy as np

    count, total = len(systems[0].answers), len(questions.ids)
    scoring = questions.scoring_of(count)
    recorded, exact = questions.recorded[:count], questions.read(systems[0].answers)
    rows = [("evaluation", recorded, "", "", "", "")]
    for one in systems:
        size, ids = (f"{one.size / 1e6:.1f}", f"{one.same_ids} of {total}") if one.size else ("", "")
        kl = f"{np.concatenate(one.kl).mean():.6f}" if one.kl else ""
        rows.append((one.name, questions.read(one.answers), size, ids, kl, f"{one.speed:.0f}" if one.speed else ""))
    names = [name for name in ("macro_f1", "accuracy", "rouge_l") if name in scoring.score(recorded, True)][:2]
    base = scoring.score(recorded, True)[names[0]]
    asked = (
        f"{total} test questions"
        if count == total
        else f"the first {count} of {total} test questions (of all for token ids)"
    )
    lines = [
        (
            f"`{model}` ({questions.stored / 1e6:.1f} MB of safetensors), {asked}, greedy, at most"
            f" {questions.settings.max_new_tokens} new tokens, {questions.compute.threads} thread(s), {machine()}."
            f" Recorded answers: {questions.dtype}."
        ),
        "",
        (
            "| system | file, MB | prompts with the token ids of training | answers as recorded | answers as in"
            f" float32 | KL, nats a token | {names[0]} | difference, points | {names[1]} | tokens per CPU second |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, answers, size, ids, kl, speed in rows:
        scores = scoring.score(answers, True)
        same = [
            sum(a.content == b.content for a, b in zip(answers, others, strict=True)) for others in (recorded, exact)
        ]
        lines.append(
            f"| {name} | {size} | {ids} | {same[0]} of {count} | {same[1]} of {count} | {kl} | {scores[names[0]]:.4f} |"
            f" {100 * (scores[names[0]] - base):+.2f} | {scores[names[1]]:.4f} | {speed} |"
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
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no block of questions after this time"
    )
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
            options.project.resolve(), folder, results_of(options.project, options.model), options.threads
        )
        write = partial(show, options.out, "serving")
        measured(questions, files, options.threads, time.monotonic() + 60 * options.minutes, write, options.model)


if __name__ == "__main__":
    main()
