"""`pedigree bisect`: the first commit whose model no longer gives an expected
answer, by binary search, and the rows of that commit that are most like it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_project.commands.nearest_records import opening
from dagster_project.commands.outputs import ancestors
from dagster_project.commands.verify import reproduce
from dagster_project.commands.why import excerpt
from dagster_project.commands.why_diff import CAVEAT, Change, also_differ, explained
from dagster_project.commands.why_model import Target, adapter_of, needed, start_of
from dagster_project.commands.why_version import is_available, place_of, version
from dagster_project.core import params
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.core.git import git
from dagster_project.core.messages import Message, Messages
from dagster_project.core.text import many
from dagster_project.evaluation.evaluator import EvaluatedModel, Settings
from dagster_project.lineage.diff import diff
from dagster_project.lineage.history import LOCK, Revision, commit_of
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import Subject, find
from dagster_project.lineage.runs import StageRun, outputs
from dagster_project.lineage.scratch_folder import scratch_folder
from dagster_project.orchestration import dvc
from dagster_project.views.texts import text

log = logging.getLogger("pedigree")

SHALLOW = (
    "this clone is shallow: versions before its first commit were not searched (`git fetch --unshallow` brings them)"
)


@dataclass(frozen=True)
class Asked:
    """What is asked of every version."""

    prompt: str
    expect: str
    system: str | None = None

    @property
    def messages(self) -> Messages:
        return [*opening(self.system), {"role": "user", "content": self.prompt}]

    def accepts(self, message: Message) -> bool:
        """Whether an answer has the expected text."""
        return self.expect in (message.get("content") or "")


@dataclass(frozen=True)
class Step:
    """A commit that changed the model."""

    commit: str
    title: str
    subject: Subject
    run: StageRun
    """The training."""

    @property
    def model(self) -> tuple[str, ...]:
        """Hashes of what answers: the weights, and the model that the training began with."""
        return self.run.md5, needed(self.run)[start_of(self.run)]


@dataclass
class Search:
    """Versions of a model from the oldest to the newest, and their answers as far as they were needed."""

    root: Path
    model: str
    asked: Asked
    steps: Sequence[Step]
    scratch: Path
    may_train: bool
    answers: dict[tuple[str, ...], Message] = field(default_factory=dict)
    """Of the models that were asked: several versions can have the same one."""
    trained: set[int] = field(default_factory=set)
    """Identities of the trainings that were made again."""

    def is_good(self, i: int) -> bool:
        """Whether a version gives the expected answer. Its model is asked once."""
        step = self.steps[i]
        if step.model not in self.answers:
            same = [j for j, one in enumerate(self.steps) if one.model == step.model]
            target = self.target(next((j for j in same if self.is_cached(j)), i))
            settings = params.parse(Settings, params.read(self.root).get("evaluation"), "evaluation")
            model = EvaluatedModel(target.folder, target.compute, settings, target.base_model)
            [said] = model.answer([self.asked.messages], target.run.address)
            self.answers[step.model] = dict(said.message)
            verdict = "as expected" if self.asked.accepts(self.answers[step.model]) else "not as expected"
            log.info(f"bisect: {step.commit[:12]} answers {verdict}: {excerpt(said.content)}")
        return self.asked.accepts(self.answers[step.model])

    def is_answered(self, i: int) -> bool:
        """Whether the answer of a version is known."""
        return self.steps[i].model in self.answers

    def is_answerable(self, i: int) -> bool:
        """Whether the answer of a version is known, or can be without a training."""
        model = self.steps[i].model
        return self.is_answered(i) or any(one.model == model and self.is_cached(j) for j, one in enumerate(self.steps))

    def target(self, i: int) -> Target:
        """A version with the files of its training.

        Raises:
            InputError: they are not available, and the training must not run again.
        """
        step = self.steps[i]
        if not self.is_cached(i):
            self._train(step)
        return version(self.root, step.subject, f"{step.commit[:12]}:{self.model}", self.scratch)

    def is_cached(self, i: int) -> bool:
        run, index = self.steps[i].run, self.steps[i].subject.index
        return run.id in self.trained or is_available(index, needed(run).items())

    def first_bad(self) -> int:
        """Position of the first version without the expected answer, provided
        that the oldest has it and the newest has not.

        If versions are missing from the cache, it asks the cached one that divides the rest most evenly.
        """
        good, bad = 0, len(self.steps) - 1
        while bad - good > 1:
            middle = (good + bad + 1) // 2
            cached = [i for i in range(good + 1, bad) if self.is_answerable(i)]
            asked = min(cached, key=lambda i: (abs(i - middle), i), default=middle)
            good, bad = (asked, bad) if self.is_good(asked) else (good, asked)
        return bad

    def _train(self, step: Step) -> None:
        at = Revision(self.root, step.commit)
        lock = at.lock()
        names = _to_run(at, step, lock)
        if not self.may_train:
            raise InputError(
                f"{self.model} of commit {step.commit[:12]} is not in the cache,"
                f" so {', '.join(names)} must run again{_cost(step)}",
                "fetch it with `dvc pull --all-commits`, or add --train",
            )
        log.info(f"bisect: {step.commit[:12]} is not in the cache: {', '.join(names)} run again{_cost(step)}")
        place = place_of(self.scratch, step.run)
        with closing(reproduce(at, lock, names)) as stages:
            for one in stages:
                if one.judged.verdict == "different":
                    why = f"see `pedigree verify {one.name} --rev {step.commit[:12]}`"
                    raise CheckFailed(
                        f"{one.name} of commit {step.commit[:12]} was made again and differs from its record", why
                    )
                for path in needed(step.run) if one.name == step.run.address else ():
                    shutil.copytree(one.outputs.root / path, place / path, dirs_exist_ok=True)
        self.trained.add(step.run.id)


def _cost(step: Step) -> str:
    """What the report of a training says that it took."""
    report = step.subject.index.report(step.run)
    taken = [f"{report[name]:,} {name}" for name in ("steps", "tokens") if isinstance(report.get(name), int)]
    return f" (the training took {', '.join(taken)})" if taken else ""


def _to_run(at: Revision, step: Step, lock: Mapping[str, Any]) -> list[str]:
    """The training, and the stages before it whose outputs the cache lacks and one of these reads."""
    before, lost = ancestors(at, lock, step.run.address), {step.run.address}
    for name in reversed(before):  # each after those that read its output
        read = {dep["path"]: dep.get("md5") for one in lost for dep in lock[one].get("deps", [])}
        outs = [(out["path"], read.get(out["path"]) or out["md5"]) for out in outputs(lock[name])]
        if any(dvc.overlap(made, path) for made, _ in outs for path in read) and not is_available(
            step.subject.index, outs
        ):
            lost.add(name)
    return [*(name for name in before if name in lost), step.run.address]


def bisect(
    root: Path, model: str, asked: Asked, good: str | None, bad: str | None, may_train: bool, top: int
) -> dict[str, Any]:
    """Find the first commit, in first-parent order, whose model does not give the expected answer; rank its records.

    Args:
        good: a commit that is known to give it; None: the oldest, which is asked if the result depends on it.
        bad: a commit that is known not to; None: the latest.
        may_train: whether versions that are missing are made again.
        top: records to list.
    Returns:
        {"model", "asked", "verdict": "found", "always" (every version gives the answer) or "never", "versions",
        "evaluations", "first", "last_good", "answers", "records", "also_differ", "notes"}.
    Raises:
        InputError: there is no such history, or a version is missing.
    """
    if not asked.prompt.strip() or not asked.expect:
        raise InputError(
            "--prompt and --expect: must not be empty",
            "give the text of a question, and a text that the right answer contains",
        )
    steps = _steps(Index(root), model, good, bad)
    document: dict[str, Any] = {
        "model": model,
        "asked": {"prompt": asked.prompt, "system": asked.system, "expect": asked.expect},
    }
    with scratch_folder(root) as scratch:
        search = Search(root, model, asked, steps, scratch, may_train)
        missing = sum(not search.is_answerable(i) for i in range(len(steps)))
        log.info(
            f"bisect: {many(len(steps), 'version')}, "
            + (
                f"{missing} of them are not in the cache;"
                " these are trained again only if no cached version narrows the search further"
                if missing
                else f"at most {(len(steps) - 1).bit_length() + 1} of them are asked"
            )
        )
        first = search.first_bad()
        if search.is_good(first):
            verdict = "always"
        elif first == 1 and good is None and not search.is_good(0):
            verdict = "never"
        else:
            verdict = "found"
        notes = _about_ends(search, good, bad, first) if verdict == "found" else []
        notes += [SHALLOW] if good is None and steps[0].subject.index.history.shallow else []
        document |= {"verdict": verdict, "versions": [_shown(one) for one in steps], "evaluations": len(search.answers)}
        if verdict == "found":
            document |= _found(search, first, top)
        document["answers"] = [
            {
                "commit": step.commit,
                "answer": excerpt(search.answers[step.model].get("content") or ""),
                "as_expected": asked.accepts(search.answers[step.model]),
            }
            for step in steps
            if step.model in search.answers
        ]
    return document | {"notes": [*notes, *document.get("notes", ())]}


def _about_ends(search: Search, good: str | None, bad: str | None, first: int) -> list[str]:
    """What the result takes for granted about the oldest version and the newest, or what contradicts it."""
    newest, notes = len(search.steps) - 1, list[str]()
    if not search.is_answered(first - 1):
        notes.append(f"{good} is taken to give the expected answer: it was not asked")
    if not search.is_answered(newest):
        notes.append(f"{bad or 'HEAD'} is taken not to give the expected answer: it was not asked")
    elif search.is_good(newest):
        notes.append(f"{bad or 'HEAD'} gives the expected answer again: the answer changed several times")
    return notes


def _steps(index: Index, model: str, good: str | None, bad: str | None) -> list[Step]:
    """The commits from `good` to `bad` that changed the training of a model, the oldest first.

    Raises:
        InputError: a revision does not exist, the model has fewer than two versions, `good` is not before `bad`, or
            both have the same model.
    """
    for option, rev in (("--good", good), ("--bad", bad)):
        if rev is not None and (rev.startswith("-") or commit_of(index.root, rev) is None):
            raise InputError(f"{option} {rev}: no such revision in this repository", "see `git log`")
    steps = _versions(index, model, bad or "HEAD")
    if good is not None:
        latest = _versions(index, model, good)[-1]
        start = next((i for i, one in enumerate(steps) if one.commit == latest.commit), None)
        if start is None:
            raise InputError(
                f"--good {good}: not before {bad or 'HEAD'} on its first-parent history", "see `git log --first-parent`"
            )
        steps = steps[start:]
    if len(steps) < 2:
        shallow = "this clone is shallow: `git fetch --unshallow` brings earlier ones" if index.history.shallow else ""
        hint = shallow or ("name an older commit with --good" if good else "a search needs a commit that changed it")
        span = f"from {good} to {bad or 'HEAD'}" if good else f"up to {bad}" if bad else "in this history"
        raise InputError(f"{model} has 1 version {span}: nothing to search", hint)
    if steps[0].model == steps[-1].model:
        raise InputError(
            f"{model}: the oldest version (commit {steps[0].commit[:12]}) and the newest ({steps[-1].commit[:12]})"
            " are the same model, so they give the same answer",
            "name a commit that gives the expected answer with --good, and one that does not with --bad",
        )
    return steps


def _versions(index: Index, model: str, rev: str) -> list[Step]:
    """The commits up to a revision that changed the training of a model, at least one.

    Raises:
        InputError: no commit has this model, or its answers cannot be attributed: why not for the revision itself.
    """
    options = ("--first-parent", "--reverse", "--no-show-signature", "--format=%H%x09%s")
    listed = git(index.root, "log", *options, "--end-of-options", rev, "--", LOCK)
    steps: list[Step] = []
    for line in (listed or "").splitlines():
        commit, _, title = line.partition("\t")
        try:
            subject = find(index, model, commit)
            run = adapter_of(subject, model)
        except InputError:  # the model did not exist yet, or nothing was run
            continue
        if not steps or steps[-1].run.md5 != run.md5:
            steps.append(Step(commit, title, subject, run))
    if not steps:
        adapter_of(find(index, model, rev), model)
        raise InputError(
            f"{model}: no commit of the first-parent history of {rev} has it",
            "see `git log --first-parent -- dvc.lock`",
        )
    return steps


def _shown(step: Step) -> dict[str, str]:
    return {"commit": step.commit, "title": step.title, "stage": step.run.address, "md5": step.run.md5}


def _found(search: Search, first: int, top: int) -> dict[str, Any]:
    """The commit, and the records of its difference to the version before, ranked for the answer that it gives."""
    before, after = search.steps[first - 1], search.steps[first]
    difference = diff(search.root, f"{before.commit}:{search.model}", f"{after.commit}:{search.model}")
    found: dict[str, Any] = {
        "first": _shown(after),
        "last_good": _shown(before),
        "also_differ": also_differ(difference),
        "notes": [CAVEAT],
    }
    if difference["records"] is None:
        lost = difference["missing"][0]
        return found | {
            "records": None,
            "notes": [f"its records are not known, without {lost['path']}: {lost['fetch']}"],
        }
    versions = {first - 1: before, first: after}
    uncached = [] if search.may_train else [step for i, step in versions.items() if not search.is_cached(i)]
    if uncached:  # given with --good, or its model was asked as that of another version
        lost = f"its records were not ranked: {search.model} of commit {uncached[0].commit[:12]} is not in the cache"
        return found | {"records": None, "notes": [f"{lost} (fetch it with `dvc pull --all-commits`, or add --train)"]}
    said = search.answers.get(before.model, {"role": "assistant", "content": search.asked.expect})
    expected = {"role": "assistant", "content": search.asked.expect}
    record = {"example_id": "", "category": None, "messages": [*search.asked.messages, expected]}
    change = Change(record, (said, search.answers[after.model]), (True, False))
    [row] = explained([search.target(first - 1), search.target(first)], [change], difference["records"], top)
    return found | {"records": row["records"], "among": row["among"]}


def as_text(document: Mapping[str, Any]) -> str:
    """The document for the terminal."""
    return text("bisect", **document)
