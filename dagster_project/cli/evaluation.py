"""Which system is better: compare, ballots, judge."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster_project.cli.arguments import add_command, count, named, project
from dagster_project.cli.output import print_result, refuse_page, write
from dagster_project.core.errors import InputError
from dagster_project.core.text import many

if TYPE_CHECKING:
    from dagster_project.evaluation.paired.pairwise import Match

log = logging.getLogger("pedigree")


def compare(options: argparse.Namespace) -> None:
    """Show the comparison table: every variant, the baselines, which system to
    use, and the registered versions of models."""
    from dagster_project.core.documents import read_document
    from dagster_project.lineage import registered
    from dagster_project.lineage.export.tables import table

    root = project(options)
    folder = root / "data" / "comparison"
    if not (folder / "comparison.json").is_file():
        raise InputError(
            "data/comparison: there is no comparison here",
            "`dvc repro comparison` makes it, `dvc pull comparison` fetches it",
        )
    hint = "restore it with `dvc checkout --force data/comparison`, or make it again with `dvc repro comparison`"
    document = read_document(folder / "comparison.json", "data/comparison/comparison.json", hint)
    versions = registered.table_rows(registered.registered(root))
    document |= {"registered": [dict(zip(registered.HEAD, row, strict=True)) for row in versions]} if versions else {}
    board = (folder / "board.md").read_text(encoding="utf-8", errors="replace").rstrip("\n")
    print_result(
        options,
        document,
        lambda _: board + (f"\n\n## Registered versions\n\n{table(registered.HEAD, versions)}" if versions else ""),
    )


def export_ballot(options: argparse.Namespace) -> None:
    """Write a page for blind votes between the answers of two systems."""
    from dagster_project.evaluation.ballots import document, export_text
    from dagster_project.views.ballot import ballot_page

    ballot = _match(options)
    out = Path(options.out or project(options) / "data" / "pages" / "ballots" / f"{ballot.id}.html")
    refuse_page("--out", str(out), options)
    coverage = _coverage(project(options), ballot)
    write("--out", out, ballot_page(document(ballot, options.n)))
    found = {"ballot": ballot.id, "systems": ballot.systems, "seed": ballot.seed}
    pairs = min(options.n, len(ballot.pairs))
    print_result(options, {**found, "pairs": pairs, **coverage, "file": str(out)}, export_text)


def import_votes(options: argparse.Namespace) -> None:
    """Count the votes that raters saved."""
    from dagster_project.evaluation.ballots import preferences, read_votes, result, votes_text

    if options.preferences:
        _refuse_preferences(options)
    files = [Path(file) for file in options.votes]
    if not options.partial:
        _refuse_unsealed(files)
    ballot, votes = read_votes(project(options), files, _seed(options), options.partial)
    coverage = _coverage(project(options), ballot)
    if options.preferences:
        rows = preferences(ballot, votes)
        if not rows:
            raise InputError(f"--preferences {options.preferences}: no pair has a winner", "leave --preferences out")
        write(
            "--preferences",
            Path(options.preferences),
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        )
        log.info(f"preferences: {options.preferences}, {many(len(rows), 'pair')}")

    def as_text(found: Mapping[str, Any]) -> str:
        raters = {name.replace("\n", "\\n"): count for name, count in found["raters"].items()}  # one line, as any name
        return votes_text({**found, "raters": raters}) + _coverage_text(found)

    print_result(options, result(ballot, votes) | coverage, as_text)


def _refuse_unsealed(files: Sequence[Path]) -> None:
    """Raise InputError if files of votes do not have the code that shows how many pairs their page has: they may be
    incomplete."""
    if unsealed := [str(file) for file in files if _is_unsealed(file)]:
        raise InputError(
            f"{', '.join(unsealed)}: without the code of the page for its number of pairs (`seal`), so votes may be"
            " missing: a page of an earlier version saved it, or it was edited",
            "save the votes from a page that this version exports, or count incomplete ballots with --partial",
        )


def _is_unsealed(file: Path) -> bool:
    with suppress(OSError, ValueError, RecursionError):  # `read_votes` says what is wrong with it
        document = json.loads(file.read_bytes())
        return isinstance(document, dict) and {"ballot", "votes"} <= document.keys() and document.get("seal") is None
    return False


def _refuse_preferences(options: argparse.Namespace) -> None:
    """Refuse a file of pairs that would replace votes or data, or change what DVC recorded; a new source is fine."""
    from dagster_project.lineage.signing.target import refuse_in_output

    file = Path(options.preferences)
    if file.resolve() in (Path(votes).resolve() for votes in options.votes):
        raise InputError(f"--preferences {file}: a file of votes, which it would replace", "name a new file")
    refuse_in_output(project(options), "--preferences", file, "file", may_be_source=not file.exists())


def judge(options: argparse.Namespace) -> int:
    """Compare the answers of two systems by a language model, in both orders, or by the reward model."""
    from dagster_project.core import params
    from dagster_project.evaluation import judge as module
    from dagster_project.evaluation.kept_replies import KeptReplies

    of_endpoint = [
        f"--{name.replace('_', '-')}"
        for name in ("endpoint", "model", "key_env", "price")
        if getattr(options, name) is not None
    ]
    if options.reward_model and of_endpoint:
        raise InputError(
            f"judge: --reward-model and {of_endpoint[0]}: requires exactly one judge", "leave one of the two out"
        )
    if not options.reward_model and not (options.endpoint and options.model):
        raise InputError("judge: requires exactly one judge", "give either --endpoint and --model, or --reward-model")
    if options.reward_model:
        if "reward_model" not in params.read(project(options)):  # a folder that was left behind is not the project's
            raise InputError("params.yaml has no section reward_model", "give --endpoint and --model")
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
    elif options.price and not all(0 <= price < float("inf") for price in options.price):
        raise InputError(
            f"--price {options.price[0]:g} {options.price[1]:g}: a price cannot be negative or infinite",
            "give two numbers from 0",
        )
    endpoint = None if options.reward_model else module.Endpoint(options.endpoint, options.model, options.key_env)
    match = _match(options)
    coverage = _coverage(project(options), match)
    kept = KeptReplies(project(options))
    if endpoint:
        document, text = module.judge(match, options.n, endpoint, options.price, kept=kept), module.judge_text
    else:
        folder = project(options) / "data" / "reward_model"
        document, text = module.by_reward(match, options.n, folder), module.by_reward_text
    print_result(options, document | coverage, lambda found: text(found) + _coverage_text(found))
    kept.forget()  # last: nothing is lost if the result cannot be printed
    return 1 if document["alarm"] else 0


def _match(options: argparse.Namespace) -> Match:
    """Pairs of answers of the two systems given, by default of the best variant and the best prompted baseline.

    Raises:
        InputError: one system or more than two are given, or no pair of answers differs.
    """
    from dagster_project.evaluation.paired.pairwise import contenders, match

    root = project(options)
    if len(options.systems) not in {0, 2}:
        raise InputError(
            f"{many(len(options.systems), 'system')} given",
            "give two, or none for the best variant and the best prompted baseline",
        )
    matched = match(root, tuple(options.systems) or contenders(root), _seed(options))
    if not matched.pairs:
        raise InputError(
            f"{' and '.join(matched.systems)}:"
            f" no test prompt with two different answers ({matched.identical} with the same answer)",
            "give two other systems",
        )
    return matched


def _coverage(root: Path, match: Match) -> dict[str, int]:
    """What the pairs of a match were taken from, and answers that are not compared; warns of those that are missing."""
    from dagster_project.core.frames import read_frame
    from dagster_project.evaluation.paired.pairwise import answers_of

    known = answers_of(root)
    first, second = (known[name].keys() for name in match.systems)
    shards = sorted((root / "data" / "splits" / "test").glob("records-*.parquet"))
    test = {example for shard in shards for example in read_frame(shard, ["example_id"])["example_id"]}
    outdated = sum(example not in test for example, _ in first | second)
    unmatched = sum(example in test for example, _ in first ^ second)
    names = " and ".join(match.systems)
    if outdated:
        log.warning(
            f"{names}: answers to {many(outdated, 'question')} are left out, because data/splits/test does not have the"
            " example: `dvc repro comparison` answers the current test split"
        )
    if unmatched:
        log.warning(f"{names}: {many(unmatched, 'question')} left out that only one of them has answered")
    return {
        "of": len(match.pairs),
        "identical": match.identical,
        "answered": len({example for example, _ in first & second} & test),
        "test_examples": len(test),
        "outdated": outdated,
        "unmatched": unmatched,
    }


def _coverage_text(found: Mapping[str, Any]) -> str:
    """A line on what the pairs were taken from: equal answers are not pairs, so a win rate says nothing of them."""
    return (
        f"\nboth answered {found['answered']} of {many(found['test_examples'], 'test example')}:"
        f" {many(found['of'], 'pair')} of different answers, {found['identical']} of the same answer left out"
    )


def _seed(options: argparse.Namespace) -> int:
    from dagster_project.core import params

    if options.seed is not None:
        return int(options.seed)
    return int(params.parse(params.Compute, params.read(project(options)).get("compute"), "compute").seed)


def add_commands(commands: Any) -> None:
    add_command(commands, compare)
    ballots = commands.add_parser("ballots", help="Collect blind votes of people between two systems.")
    parts = ballots.add_subparsers(dest="part", required=True, metavar="COMMAND")
    command = add_command(parts, export_ballot, "export")
    _add_systems(command)
    command.add_argument(
        "--out", type=named, metavar="FILE.html", help="the page (default: data/pages/ballots/<ballot>.html)"
    )
    add = add_command(parts, import_votes, "import").add_argument
    add("votes", nargs="+", metavar="VOTES.json", help="files saved from one ballot, one for each rater")
    add("--preferences", type=named, metavar="OUT.jsonl", help="also write the majority votes as preference pairs")
    add(
        "--partial",
        action="store_true",
        help="count files with missing votes, and without the code for the number of their pairs",
    )
    add("--seed", type=int, help="seed of the export (default: compute.seed)")
    command = add_command(commands, judge)
    _add_systems(command)
    add = command.add_argument
    add("--reward-model", action="store_true", help="use the project's reward model as the judge")
    add("--endpoint", metavar="URL", help="OpenAI-compatible, up to /v1: /chat/completions is appended")
    add("--model", metavar="NAME", help="name of the model at the endpoint")
    add("--key-env", metavar="NAME", help="environment variable with the key (default: the endpoint requires no key)")
    add(
        "--price",
        nargs=2,
        type=float,
        metavar=("IN", "OUT"),
        help="price of a million prompt and completion tokens, to report the cost",
    )


def _add_systems(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "systems",
        nargs="*",
        metavar="SYSTEM",
        help="variants or baselines (default: the best variant and the best prompted baseline)",
    )
    add("--n", type=count, default=40, help="maximum number of pairs (default: %(default)s)")
    add("--seed", type=int, help="for the choice and the order of the pairs and the answers (default: compute.seed)")
