"""Commands that attribute answers to training records: why, bisect."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.cli.arguments import SYSTEM, add_command, count, named, project, utf8
from dagster_project.cli.output import print_result, refuse_page, write
from dagster_project.core.errors import InputError
from dagster_project.core.imports import lean_imports

if TYPE_CHECKING:
    from dagster_project.lineage.attribution.points import PointSelection

log = logging.getLogger("pedigree")

QUESTION = ("prompt", "answer", "span", "system")
"""Options of `why` that belong to a question."""
POINTS = ("checkpoints", "second_moments")
"""Options of `why` that choose points of the training."""
DRAWS = 3
"""Sets of random records that `why --prove` leaves out by default."""


def why(options: argparse.Namespace) -> int:
    """Rank the training records of a model by their likeness to a question and
    its answer, or list those that fit the others the least."""
    if options.draws is not None and not options.prove:
        raise InputError("why: --draws is only used with --prove", "add --prove, or leave it out")
    refuse_page("--html", options.html, options)
    if options.diff:
        return _why_diff(options)
    if not options.model:
        raise InputError("why: no MODEL given", "name a model, or two with --diff")
    if options.suspects:
        return _suspects(options)
    if options.prompt is None:
        return _index_gradients(options)
    from dagster_project.commands import model_process

    with ExitStack() as stack:
        process = None
        if not (options.index or options.prove or options.checkpoints or options.second_moments):
            process = stack.enter_context(model_process.started("why", project(options)))
        with lean_imports():
            from dagster_project.commands import why as module
            from dagster_project.commands.why_question import Options
            from dagster_project.views.why import why_page

        asked = Options(options.prompt, options.answer, options.span, options.system, options.top, _points(options))
        draws = (options.draws or DRAWS) if options.prove else None
        document = module.answer_why(project(options), options.model, asked, options.index, draws, process)
    _show(options, document, why_page, module.as_text)
    return 1 if options.prove and not document["proof"]["supported"] else 0


def _points(options: argparse.Namespace) -> PointSelection:
    from dagster_project.lineage.attribution.points import PointSelection

    return PointSelection(options.checkpoints or 1, options.second_moments)


def _refuse(options: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Raises:
    InputError: one of these options is given.
    """
    if given := [name for name in names if getattr(options, name) not in (None, False)]:
        raise InputError(f"why: {reason} --{given[0].replace('_', '-')}", "leave it out")


def _index_gradients(options: argparse.Namespace) -> int:
    """Compute the gradients of a model alone."""
    from dagster_project.commands import why as module

    given = [name for name in (*QUESTION, "html") if getattr(options, name) is not None]
    if not options.index or given or options.prove:
        raise InputError(
            "why: --prompt is required" + (f" with --{given[0]}" if given else ""), "see `pedigree why --help`"
        )
    print_result(options, module.index(project(options), options.model, _points(options)), module.as_text)
    return 0


def _suspects(options: argparse.Namespace) -> int:
    """List the records whose gradients fit those of the others the least, and write them as a review queue."""
    from dagster_project.commands import why_suspects as module
    from dagster_project.views.suspects import suspects_page

    _refuse(options, (*QUESTION, "prove"), "--suspects is about all records: not with")
    _refuse(options, POINTS, "--suspects does not support")
    document = module.suspects(project(options), options.model, options.top, options.index)
    _show(options, document, suspects_page, module.as_text)
    return 0


def _why_diff(options: argparse.Namespace) -> int:
    """Rank the records of the difference between two versions of a model for each answer that changed."""
    from dagster_project.commands import why_diff as module
    from dagster_project.views.why_diff import why_diff_page

    _refuse(options, (*QUESTION, "prove", "index", "suspects"), "--diff compares recorded answers: not with")
    _refuse(options, POINTS, "--diff does not support")
    if options.model:
        raise InputError(f"why: --diff names both models: not with {options.model}", "leave it out")
    before, after = options.diff
    document = module.answer_diff(project(options), before, after, options.top)
    _show(options, document, why_diff_page, module.as_text)
    return 0


def _add_why(commands: Any) -> None:
    add = add_command(commands, why).add_argument
    add("model", nargs="?", metavar="MODEL", help="adapter@VARIANT, merged@VARIANT, release, ... as for `audit`")
    add(
        "--diff",
        nargs=2,
        type=named,
        metavar=("A", "B"),
        help=(
            "instead: for answers in which two versions differ,"
            " each as MODEL or REV:MODEL, the records of their difference"
        ),
    )
    add(
        "--index",
        action="store_true",
        help="compute the gradients of all its training records, which questions need, once per training",
    )
    add(
        "--suspects",
        action="store_true",
        help="list records whose gradients fit those of the others the least, as a review queue",
    )
    add("--prompt", type=utf8, metavar="TEXT", help="the question")
    add(
        "--answer",
        type=utf8,
        metavar="TEXT",
        help="the answer to explain (default: the model's own most likely answer)",
    )
    add(
        "--span",
        type=utf8,
        metavar="TEXT",
        help="only this part of the answer, wherever it occurs in it (default: the whole answer)",
    )
    add("--system", **SYSTEM)
    add(
        "--top",
        type=count,
        default=10,
        metavar="N",
        help="records to show, or to queue, and to leave out with --prove (default: %(default)s)",
    )
    add(
        "--checkpoints",
        type=count,
        metavar="N",
        help=(
            "compare gradients at N steps of the training;"
            " --index repeats it to store checkpoints (default: at its end only)"
        ),
    )
    add(
        "--second-moments",
        action="store_true",
        help="scale gradients by Adam's second moments; --index repeats the training",
    )
    add(
        "--prove",
        action="store_true",
        help="train again without these records, and without as many random ones, and compare",
    )
    add("--draws", type=count, metavar="N", help=f"with --prove: sets of random records (default: {DRAWS})")
    add("--html", type=named, metavar="FILE.html", help="also write one self-contained page")


def bisect(options: argparse.Namespace) -> int:
    """Find the first commit whose model no longer gives an expected answer, by
    binary search, and the rows of that commit that are most like it."""
    from dagster_project.commands import bisect as module
    from dagster_project.views.bisect import bisect_page

    refuse_page("--html", options.html, options)
    asked = module.Asked(options.prompt, options.expect, options.system)
    document = module.bisect(
        project(options), options.model, asked, options.good, options.bad, options.train, options.top
    )
    if options.html:
        document["page"] = options.html
    _show(options, document, bisect_page, module.as_text)
    return 0 if document["verdict"] == "found" else 1


def _add_bisect(commands: Any) -> None:
    add = add_command(commands, bisect).add_argument
    add("model", type=named, metavar="MODEL", help="adapter@VARIANT, merged@VARIANT, release, ... as for `why`")
    add("--prompt", type=utf8, required=True, metavar="TEXT", help="the question")
    add("--expect", type=utf8, required=True, metavar="TEXT", help="a text that the right answer contains")
    add("--system", type=utf8, metavar="TEXT", help="system prompt (default: none)")
    add(
        "--good",
        metavar="REV",
        help="a commit that is known to give the right answer (default: the oldest with the model)",
    )
    add("--bad", metavar="REV", help="a commit that is known not to (default: HEAD)")
    add(
        "--train",
        action="store_true",
        help="make models that are not in the cache again, in a scratch clone, as `verify` does",
    )
    add("--top", type=count, default=10, metavar="N", help="rows to show (default: %(default)s)")
    add("--html", type=named, metavar="FILE.html", help="also write one self-contained page")


def _show(options: argparse.Namespace, document: Any, draw: Callable[[Any], str], as_text: Any) -> None:
    """Print a document, and write its page with --html."""
    if options.html:
        write("--html", Path(options.html), draw(document))
        if "page" not in document:  # otherwise the text names it
            log.info(f"page: {options.html}")
    print_result(options, document, as_text)


def add_commands(commands: Any) -> None:
    _add_why(commands)
    _add_bisect(commands)
