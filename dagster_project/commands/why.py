"""`pedigree why`: the training records whose gradients and words are most like
a question and its answer, or a part of the answer (docs/why.md)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.commands import why_calibration
from dagster_project.commands.model_process import ModelProcess
from dagster_project.commands.nearest_records import TRAIN, cut, places_in, system_of
from dagster_project.commands.why_checkpoints import at_points, steps_at
from dagster_project.commands.why_checkpoints import index as index_points
from dagster_project.commands.why_model import BASE_MODEL, Target, start_of
from dagster_project.commands.why_pairs import PairTarget, asked_of, pair_trainings
from dagster_project.commands.why_pairs import asked as asked_model
from dagster_project.commands.why_prove import prove, refuse_draws
from dagster_project.commands.why_question import (
    AnsweringModel,
    Options,
    Question,
    ask_loaded,
    question,
    tokenize,
    tokenizer_of,
)
from dagster_project.core.chat import IGNORE
from dagster_project.core.errors import InputError
from dagster_project.core.messages import Messages, Tools
from dagster_project.core.records import prompt_text, read_records, response_text
from dagster_project.core.text import many
from dagster_project.curation.checks.privacy import mask
from dagster_project.evaluation.baselines import bm25
from dagster_project.lineage.attribution.calibration import ALPHA, Calibration
from dagster_project.lineage.attribution.points import END_ONLY, PointSelection
from dagster_project.lineage.attribution.ranking import CROWD, STANDS_OUT, TIMES, Ranking, stands_out
from dagster_project.lineage.attribution.records import Example, TrainedRecord
from dagster_project.lineage.attribution.search import Found, Search, search
from dagster_project.lineage.attribution.store import Gradients
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import find, trained_on
from dagster_project.training.methods.hardware import import_libraries
from dagster_project.views.texts import text

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("pedigree")

EXCERPT = 300
"""Characters of a record's prompt and answer that are shown."""
BINS = 40
"""Of the distribution of scores."""
UNCALIBRATED = "whether a record stands out is judged by its distance from the others alone, which is often wrong: "
OF_PAIRS = "models of preference pairs are not compared with questions of the validation split"
CUT_OFF = "the model did not end its answer: the end-of-turn token, which the template adds, is not asked about"
CAVEAT = "Ranks and scores say how alike gradients and words are, not what would change without a record"


def index(root: Path, model: str, selection: PointSelection) -> dict[str, Any]:
    """Compute the gradients of all records that a model was trained on, and the questions of the validation split."""
    found = asked_model(root, model)
    return {"model": model_of(found), "index": index_points(found, selection)}


def answer_why(
    root: Path,
    model: str,
    options: Options,
    with_index: bool,
    draws: int | None,
    process: ModelProcess | None = None,
) -> dict[str, Any]:
    """Rank the records that a model was trained on for a question.

    Args:
        with_index: compute gradients that are missing, instead of refusing.
        draws: sets of random records to compare with, in a check by training again; None: no check.
        process: asks the end of a supervised training while this one reads files, unless gradients are missing or many;
            None: this one asks.
    Raises:
        InputError: as `target`; the answer or the part of it is empty or not found; or gradients are missing.
    """
    if draws is not None:
        refuse_draws(draws)  # before gradients are computed
    document, found, asked = ask(root, model, options, with_index, draws is not None, process)
    if draws is not None:
        document["proof"] = prove(found, asked, document["hits"], draws)
    return document


def ask(
    root: Path,
    model: str,
    options: Options,
    with_index: bool,
    proves: bool = False,
    process: ModelProcess | None = None,
) -> tuple[dict[str, Any], Target, Question]:
    """As `answer_why` without the check. Returns: the document, and what the check goes on with."""
    if not options.prompt.strip():
        raise InputError("--prompt: empty", "give the text of a question")
    subject = find(Index(root), model)
    if process and pair_trainings(subject):  # whose texts are read with the tokenizer, in this process
        process.end()
        process = None
    with nullcontext() if process else _importing():
        found = asked_of(root, model, subject)
        _refuse_unanswerable(found, options, proves)
    if process and not found.store.is_large and found.store.is_complete():
        document, asked = _ask_in(process, found, options)
        return document, found, asked
    import_libraries()
    indexed = index_points(found, options.points) if with_index else None
    attributed = Attributed.read(found, options.points)
    system, notes = _system(attributed.texts, options)
    answering = AnsweringModel.of(found) if options.answer is None else None
    asked = question(options, system, attributed.texts.tokenizer, answering)
    document = attributed.rank(asked, replace(options, system=system), notes)
    return {"model": document["model"], **({"index": indexed} if indexed else {}), **document}, found, asked


@contextmanager
def _importing() -> Iterator[None]:
    """Import libraries while the block reads files."""
    with ThreadPoolExecutor(1) as pool:
        imported = pool.submit(import_libraries)
        yield
        imported.result()  # two threads that import parts of transformers find modules that are not complete


def _ask_in(process: ModelProcess, found: Target, options: Options) -> tuple[dict[str, Any], Question]:
    """The document of a question about a model that another process loads, and the question."""
    attributed = Attributed(found, END_ONLY, why_calibration.read(found))
    system, notes = _system(attributed.texts, options)
    answering = AnsweringModel.of(found) if options.answer is None else None
    results = process.start(ask_loaded, options, system, answering, found.loading, found.store)
    _ = attributed.places  # are read meanwhile
    asked, options = next(results), replace(options, system=system)
    words = attributed.word_scores(asked, options)
    value, scores = next(results)
    process.end()
    return attributed.document(asked, value, words, scores, options, notes), asked


@dataclass(frozen=True)
class Attributed:
    """A model whose records are ranked for questions. It is loaded once, and the gradients are read once."""

    found: Target
    points: PointSelection
    known: Calibration | None

    @classmethod
    def read(cls, found: Target, points: PointSelection = END_ONLY) -> Attributed:
        """Raises:
        InputError: gradients are missing or damaged.
        """
        known = why_calibration.mean([why_calibration.read(target) for target in at_points(found, points)])
        attributed = cls(found, points, known)
        _ = attributed.gradients
        return attributed

    @cached_property
    def gradients(self) -> list[Gradients]:
        """For each point of the training."""
        return [target.store.read() for target in at_points(self.found, self.points)]

    @cached_property
    def texts(self) -> Texts:
        return Texts(self.found)

    @cached_property
    def places(self) -> dict[str, dict[str, Any]]:
        return places_of(self.found)

    def answer(self, said: Messages, ended: bool, tools: Tools, span: str | None, top: int) -> dict[str, Any]:
        """Rank the records for the last answer of a conversation.

        Args:
            said: the conversation, which ends with the answer of this model.
            ended: whether the model ended the answer.
        Raises:
            InputError: the part is not in the answer.
        """
        options = Options(prompt_text(said), span=span, system=system_of(said), top=top)
        return self.rank(tokenize(self.texts.tokenizer, said, span, tools, ended), options, [])

    def rank(self, asked: Question, options: Options, notes: Sequence[str]) -> dict[str, Any]:
        """The document of a question.

        Args:
            options: with the system prompt of the question.
            notes: about the question.
        """
        searches = list[Search]()
        for target, gradients in zip(at_points(self.found, self.points), self.gradients, strict=True):
            value, gradient = _asked_gradient(target, asked)
            searches.append(Search(gradients, target.projection.project(gradient).numpy()))
        words = self.word_scores(asked, options)
        scores = search(searches, *words, self.known.scores.max(0) if self.known else None, options.top)
        return self.document(asked, value, words, scores, options, notes)

    def word_scores(self, asked: Question, options: Options) -> tuple[np.ndarray, np.ndarray]:
        """BM25 of each record: of the words of the prompt, and of those of the asked part; (records,) each."""
        texts = self.texts
        documents = [
            " ".join(filter(None, [*texts.of(record), texts.rejected(record)])) for record in self.found.records
        ]
        prompt, part = bm25(documents, [options.prompt, options.span or response_text(asked.messages) or asked.turn])
        return prompt, part

    def document(
        self,
        asked: Question,
        value: float,
        words: tuple[np.ndarray, np.ndarray],
        scores: Found,
        options: Options,
        notes: Sequence[str],
    ) -> dict[str, Any]:
        """As `rank`, with the scores.

        Args:
            value: log-probability of what is asked, in nats, or the reward of a reward model.
            words: as `word_scores`.
        """
        found, known, texts = self.found, self.known, self.texts
        points = dict[str, Any]()
        if self.points != END_ONLY:
            points = {"steps": steps_at(found, self.points), "second_moments": self.points.scaled}
        ranking = Ranking.of(scores.scores, *words)
        estimates = list[str]()
        if scores.error is not None:
            estimates = [_about_estimates(scores.error, int(scores.read.sum()), len(found.records))]
        return {
            "model": model_of(found),
            "question": {
                "system": options.system,
                "prompt": options.prompt,
                "answer": asked.turn,
                "answered_by": "model" if options.answer is None else "given",
                "span": options.span,
                "spans": [list(bounds) for bounds in asked.spans],
                "tokens": asked.tokens,
                "reward" if isinstance(found, PairTarget) and found.scores else "log_probability": round(value, 4),
            },
            **({"points": points} if points else {}),
            "records": len(found.records),
            "distribution": _distribution(ranking, known, scores),
            "hits": _hits(found, ranking, texts, self.places, options.top),
            "notes": [
                *notes,
                *([CUT_OFF] if asked.cut_off and options.span is None else []),
                *([_about_points(points)] if points else []),
                *estimates,
                *([] if known else [UNCALIBRATED + _why_uncalibrated(found, self.points)]),
                *_about(found),
            ],
        }


def _why_uncalibrated(found: Target, points: PointSelection) -> str:
    if isinstance(found, PairTarget):
        return OF_PAIRS
    missing = [target for target in at_points(found, points) if why_calibration.read(target) is None]
    return why_calibration.why_not(missing[0])


def _about_points(points: Mapping[str, Any]) -> str:
    """The points of the training in words."""
    *others, last = points["steps"]
    scores = (
        f"gradient scores are means over the steps {', '.join(map(str, others))} and {last}"
        if others
        else f"gradient scores are of step {last}"
    )
    return f"{scores} of the training" + (
        ", of gradients scaled by the second moments of its optimizer" if points["second_moments"] else ""
    )


def _about_estimates(error: float, read: int, records: int) -> str:
    """Which gradient scores are estimates, and how good these are."""
    return (
        f"gradients of {read:,} of {many(records, 'record')} were compared, those listed among them;"
        " scores of the others are estimates from sketches,"
        f" with a standard error of {error:.3f}, and count neither as the highest nor for whether a record stands out"
    )


def _asked_gradient(found: Target, asked: Question) -> tuple[float, Any]:
    """Log-probability of the asked tokens, or the reward of the answer, and the gradient of its negative."""
    if isinstance(found, PairTarget) and found.scores:
        return found.reward_model.of_answer(asked.example)
    return found.model.of_span(asked.example)


def _about(found: Target) -> list[str]:
    """What the ranks and scores do not say, and how to find it out, if there is a way."""
    if not isinstance(found, PairTarget):
        return [f"{CAVEAT}: `pedigree why --prove` tests that for the group."]
    start = start_of(found.run)
    earlier = "" if start == BASE_MODEL else f"; what {start} was trained on before is not ranked: ask it"
    return [f"the records are preference pairs{earlier}", f"{CAVEAT}."]


def _refuse_unanswerable(found: Target, options: Options, proves: bool) -> None:
    """Raises:
    InputError: the model was trained on pairs, and this cannot be asked about it.
    """
    if not isinstance(found, PairTarget):
        return
    if proves:
        raise InputError(
            f"--prove: {found.run.address} was trained on pairs, and only supervised trainings are run again",
            "leave it out",
        )
    if found.scores and (options.answer is None or options.span is not None):
        what = "--span: a reward is that of a whole answer"
        if options.answer is None:
            what = "--answer is required: a reward model gives none"
        raise InputError(f"{found.run.address}: {what}", "give the answer with --answer, and no --span")


def model_of(found: Target) -> dict[str, str]:
    return {"asked": found.asked, "stage": found.run.address, "path": found.run.path, "md5": found.run.md5}


def _system(texts: Texts, options: Options) -> tuple[str | None, list[str]]:
    """The system prompt, and a note if the records do not have the same."""
    if options.system is not None:
        return options.system or None, []
    found = texts.system_prompts()
    if found is not None and len(found) == 1:
        return next(iter(found)), []
    why = f"{TRAIN} has not all records of this training" if found is None else "the records have different ones"
    return None, [
        f"asked without a system prompt, as {why}; --system gives one:"
        " answers of records with another one are less alike"
    ]


class Texts:
    """Prompts and answers of the records of a training."""

    def __init__(self, found: Target) -> None:
        self.found = found
        folder = found.root / TRAIN
        if isinstance(found, PairTarget):
            self.known = {
                name: {**pair, "messages": [*pair["prompt"], *pair["chosen"]]} for name, pair in found.pairs.items()
            }
        else:
            self.known = {record["example_id"]: record for record in (read_records(folder) if folder.is_dir() else ())}

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.found)

    def of(self, record: TrainedRecord) -> tuple[str, str]:
        """Prompt and answer; from the tokens of the training, where the split has no text of it."""
        known = self.known.get(record.example_id, {})
        messages = known.get("messages", [])
        # the first of a pair has the chosen answer
        examples = record.examples[:1] if "rejected" in known else record.examples
        prompt = prompt_text(messages) or self._decoded(examples, False)
        return prompt, response_text(messages) or self._decoded(examples, True)

    def rejected(self, record: TrainedRecord) -> str | None:
        """The rejected answer of a pair; None for other records."""
        known = self.known.get(record.example_id, {})
        if "rejected" not in known:
            return None
        return response_text(known["rejected"]) or self._decoded(record.examples[1:], True)

    def system_prompts(self) -> set[str | None] | None:
        """Those that the records of the training begin with.

        None if the split has not all of these records, so that they are not known.
        """
        known = [self.known.get(record.example_id) for record in self.found.records]
        return {system_of(one["messages"]) for one in known if one} if all(known) else None

    def _decoded(self, examples: Sequence[Example], trained: bool) -> str:
        parts = (
            [token for token, label in zip(one.input_ids, one.labels, strict=True) if (label != IGNORE) is trained]
            for one in examples
        )
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in parts)


def _distribution(ranking: Ranking, known: Calibration | None, scores: Found) -> dict[str, Any]:
    """Scores of all records: median, z of the first, counts by interval; and whether
    records stand out: by the questions of the validation split, if there are any, else by
    the distance of the first. An estimate counts for the median and the counts alone."""
    import numpy as np

    counts, edges = np.histogram(ranking.gradient, bins=BINS)
    ordered = np.sort(ranking.z[scores.read])[::-1]
    compared = None
    if known:
        p_value = known.p_value(scores.certain)
        compared = {
            "questions": len(known.owners),
            "excess": round(known.excess(scores.certain), 4),
            "p": round(p_value, 4),
        }
    return {
        "median": round(float(np.median(ranking.gradient)), 4),
        "first": round(float(scores.certain.max()), 4),
        "z_of_first": round(float(ordered[0]), 2),
        "z_of_tenth": round(float(ordered[min(CROWD, len(ordered)) - 1]), 2),
        "compared": compared,
        "stands_out": p_value <= ALPHA if known else stands_out(ordered),
        "counts": [int(count) for count in counts],
        "edges": [round(float(edge), 5) for edge in edges],
    }


def places_of(found: Target) -> dict[str, dict[str, Any]]:
    """Id of each record of a training -> its source, source row and steps."""
    seen, _ = trained_on(found.subject)
    rows = seen.iter_rows(named=True) if seen is not None else ()
    return places_in(row for row in rows if row["model"] == found.run.address)


def shown_texts(texts: Texts, record: TrainedRecord) -> dict[str, str]:
    """Prompt and answer of a record, cut; secrets and personal data in them are masked."""
    prompt, response = map(excerpt, texts.of(record))
    rejected = texts.rejected(record)
    return {"prompt": prompt, "answer": response, **({} if rejected is None else {"rejected": excerpt(rejected)})}


def excerpt(text: str, most: int = EXCERPT) -> str:
    """The beginning of a text of the data; secrets and personal data in it are masked."""
    found, enough = mask(text[: 20 * EXCERPT]), 10 * EXCERPT
    # of much white space or a long value, the end of the piece is shown: perhaps a part of a value, which no rule finds
    if len(text) > 20 * EXCERPT and len(" ".join(found.split())) < enough:
        found = mask(text)
    return cut(found, most)


def _hits(
    found: Target, ranking: Ranking, texts: Texts, places: Mapping[str, Mapping[str, Any]], top: int
) -> list[dict[str, Any]]:
    """The first records by both scores, each with its place, use and scores."""
    hits = []
    for i in ranking.order()[:top]:
        record = found.records[i]
        hits.append(
            {
                "rank": int(ranking.rank[i]),
                "example_id": record.example_id,
                **places[record.example_id],
                "split": "train",
                **shown_texts(texts, record),
                "gradient": {
                    "rank": int(ranking.gradient_rank[i]),
                    "score": round(float(ranking.gradient[i]), 4),
                    "z": round(float(ranking.z[i]), 2),
                },
                "bm25": {"rank": int(ranking.bm25_rank[i]), "score": round(float(ranking.bm25[i]), 2)},
            }
        )
    return hits


def as_text(document: Mapping[str, Any]) -> str:
    """The document for the terminal."""
    limits = {"alpha": ALPHA, "crowd": CROWD, "z": STANDS_OUT, "times": TIMES}
    return text("why", **document, limits=limits, cut=cut)
