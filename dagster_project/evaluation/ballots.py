"""Human evaluation: blind pairwise votes between two systems' answers, and their analysis."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from pydantic import Field

from dagster_project.core.errors import InputError
from dagster_project.core.params import Section, parse
from dagster_project.core.text import many, visible
from dagster_project.curation.sources.files import parse_json
from dagster_project.evaluation.paired.pairwise import (
    Choice,
    Match,
    Outcome,
    Pair,
    agreement,
    answers_of,
    as_text,
    majority,
    match,
    tally,
)

log = logging.getLogger("pedigree")


class Vote(Section):
    """One rater's choice on one pair."""

    pair: str
    vote: Choice


class Votes(Section):
    """The file saved by the ballot page."""

    ballot: str
    pairs: int = Field(ge=1)
    """Pairs on the ballot."""
    rater: str = Field(min_length=1, max_length=100)
    """Name or initials."""
    votes: list[Vote]
    seal: str | None = None
    """`Match.seal` of the number of pairs. Pages of earlier versions have none."""


def export_text(exported: Mapping[str, Any]) -> str:
    """Summary of an exported ballot as text for the terminal."""
    pairs, systems = many(exported["of"], "pair"), " and ".join(exported["systems"])
    return (
        f"{exported['file']}: {exported['pairs']} of {pairs} of {systems}, seed {exported['seed']};"
        f" {exported['identical']} with the same answer left out\n"
        "send the page to the raters, then count what they saved with `pedigree ballots import votes-*.json`"
    )


def read_votes(
    project: Path, files: Sequence[Path], seed: int, partial: bool
) -> tuple[Match, dict[str, dict[str, Choice]]]:
    """The match that the files vote on, and rater -> pair -> choice.

    The match is recomputed, because the files do not identify the systems.

    Args:
        seed: seed of the export.
        partial: accept files with missing votes.
    Raises:
        InputError: lists every problem in the files.
    """
    sheets = {file: _read(file) for file in files}
    ids = list(dict.fromkeys(sheet.ballot for sheet in sheets.values()))
    if len(ids) > 1:
        others = [str(file) for file, sheet in sheets.items() if sheet.ballot != ids[0]]
        raise InputError(
            f"the votes are on {len(ids)} ballots: {', '.join(others)} not on {ids[0]}", "import one ballot at a time"
        )
    matches = (match(project, systems, seed) for systems in permutations(answers_of(project), 2))
    ballot = next((candidate for candidate in matches if candidate.id == ids[0]), None)
    if ballot is None:
        raise InputError(
            f"{files[0]}: ballot {ids[0]} does not match the current answers of any two systems with seed {seed}",
            "give the --seed of the export; if the models have changed since,"
            " go back with `git checkout` and `dvc checkout`",
        )
    if problems := _problems(ballot, sheets, partial):
        messages, hints = zip(*problems, strict=True)
        raise InputError("\n".join(messages), "; ".join(dict.fromkeys(hints)))
    if not any(sheet.votes for sheet in sheets.values()):
        raise InputError(f"{files[0]}: no vote", "vote on the page, then save")
    _warn_of_unsealed(sheets)
    return ballot, {sheet.rater: {vote.pair: vote.vote for vote in sheet.votes} for sheet in sheets.values()}


def _problems(ballot: Match, sheets: Mapping[Path, Votes], partial: bool) -> list[tuple[str, str]]:
    """(what is wrong, next step) of each problem in the files."""
    known = {pair.id for pair in ballot.pairs}
    found = []
    for file, sheet in sheets.items():
        counts = Counter(vote.pair for vote in sheet.votes)
        given = {pair.id for pair in ballot.pairs[: sheet.pairs]}  # a page has the first pairs
        if unknown := [pair for pair in counts if pair not in known]:
            problem = f"{file}: {many(len(unknown), 'pair')} not on the ballot (first: {unknown[0]})"
            found.append((problem, AGAIN))
        if sheet.pairs > len(known) or sheet.seal not in {None, ballot.seal(sheet.pairs)}:
            found.append((f"{file}: states {many(sheet.pairs, 'pair')}, which is not the number on its page", AGAIN))
        elif counts.keys() & known - given:
            problem = f"{file}: votes on pairs that a page with {many(sheet.pairs, 'pair')} does not have"
            found.append((problem, AGAIN))
        if twice := [pair for pair, count in counts.items() if count > 1]:
            problem = f"{file}: {many(len(twice), 'pair')} voted on more than once (first: {twice[0]})"
            found.append((problem, "keep one vote for each pair"))
        if len(counts) < sheet.pairs and not partial:
            problem = f"{file}: {sheet.pairs - len(counts)} of {many(sheet.pairs, 'pair')} without a vote"
            found.append((problem, "finish the ballot, or count incomplete ballots with --partial"))
    by_rater: dict[str, list[Path]] = {}
    for file, sheet in sheets.items():
        by_rater.setdefault(_same_rater(sheet.rater), []).append(file)
    for files in (files for files in by_rater.values() if len(files) > 1):
        names = [repr(name) for name in dict.fromkeys(sheets[file].rater for file in files)]
        problem = f"{', '.join(map(str, files))}: all by rater {names[0]}"
        hint = "give one file for each rater"
        if len(names) > 1:
            problem += (
                f", also written {', '.join(names[1:])}: case, spaces at the ends and repeated spaces are ignored,"
                " and so are invisible characters"
            )
            hint += "; if two people have the same name, one of them must add an initial and save again"
        found.append((problem, hint))
    return found


AGAIN = "save the votes from the page again"


def _same_rater(name: str) -> str:
    """Two spellings of a name with the same value are one rater; empty if nothing of the name is visible."""
    seen = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen).casefold().split())


def _warn_of_unsealed(sheets: Mapping[Path, Votes]) -> None:
    """Warn of files without a seal: an earlier version saved them, or a rater removed it."""
    if unsealed := [str(file) for file, sheet in sheets.items() if sheet.seal is None]:
        log.warning(
            f"{', '.join(unsealed)}: saved from a page of an earlier version, or edited, so the number of pairs"
            " that the file states cannot be checked"
        )


def _read(file: Path) -> Votes:
    try:
        content = file.read_bytes()
        # also with a byte order mark, and as UTF-16, as some editors save it
        document = parse_json(content.decode(json.detect_encoding(content)))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}", "name a file that the ballot's page saved") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{file}: not JSON", "name a file that the ballot's page saved") from None
    except ValueError as error:
        raise InputError(f"{file}: {error}", AGAIN) from None
    sheet = parse(Votes, document if document is not None else [], "votes", file=str(file))
    if not _same_rater(sheet.rater):
        raise InputError(f"{file}: votes.rater: no name", "write a name or initials")
    return sheet.model_copy(update={"rater": sheet.rater.strip()})


def outcomes(ballot: Match, votes: Mapping[str, Mapping[str, Choice]]) -> dict[str, list[Outcome]]:
    """Pair with votes, in ballot order -> outcome of each rater's choice for the first system."""
    by_pair = {}
    for pair in ballot.pairs:
        if chosen := [choices[pair.id] for choices in votes.values() if pair.id in choices]:
            by_pair[pair.id] = [pair.outcome(choice) for choice in chosen]
    return by_pair


def result(ballot: Match, votes: Mapping[str, Mapping[str, Choice]]) -> dict[str, Any]:
    """Win rate over pairs by majority vote, rater agreement, and how often A, B or a tie was chosen."""
    by_pair = outcomes(ballot, votes)
    places = Counter(choice for choices in votes.values() for choice in choices.values())
    return {
        "ballot": ballot.id,
        "systems": list(ballot.systems),
        "raters": {rater: len(choices) for rater, choices in votes.items()},
        **tally(ballot.pairs, {pair: majority(votes) for pair, votes in by_pair.items()}),
        "agreement": agreement(list(by_pair.values())),
        "places": {place: places[place] for place in ("a", "tie", "b")},
    }


def preferences(ballot: Match, votes: Mapping[str, Mapping[str, Choice]]) -> list[dict[str, Any]]:
    """Pairs decided by majority, as rows in the `preference` layout of formats.py; ties are left out."""
    won = {pair: majority(choices) for pair, choices in outcomes(ballot, votes).items()}
    rows = []
    for pair in ballot.pairs:
        if won.get(pair.id, "tie") != "tie":
            chosen, rejected = pair.turns if won[pair.id] == "win" else reversed(pair.turns)
            row: dict[str, Any] = {"prompt": pair.prompt, "chosen": [chosen], "rejected": [rejected]}
            if pair.tools:
                row["tools"] = pair.tools
            if pair.category is not None:
                row["category"] = pair.category
            rows.append(row)
    return rows


def votes_text(found: Mapping[str, Any]) -> str:
    """The result as text for the terminal."""
    raters, agreed, places = found["raters"], found["agreement"], found["places"]
    lines = [f"ballot {found['ballot']}: {many(sum(raters.values()), 'vote')} of {', '.join(raters)}", *as_text(found)]
    if agreed["pairs"]:
        undefined = "undefined, because all of these votes have the same outcome"
        alpha = undefined if agreed["alpha"] is None else f"{agreed['alpha']:.2f}"
        lines.append(
            f"{many(agreed['pairs'], 'pair')} with several votes: two raters agree in {agreed['percent']} % of cases;"
            f" Krippendorff's alpha {alpha}"
        )
    lines.append(f"places chosen: A {places['a']}, B {places['b']}, tie {places['tie']}")
    return visible("\n".join(lines))


def document(ballot: Match, n: int) -> dict[str, Any]:
    """Content of the ballot page: the first n pairs, without system names.

    `tools` and `messages`, the answers, only where there is more than text.
    """
    pairs = [_rich_content(pair) for pair in ballot.pairs[:n]]
    return {"ballot": ballot.id, "seal": ballot.seal(len(pairs)), "pairs": pairs}


def _rich_content(pair: Pair) -> dict[str, Any]:
    """A pair on the page; `tools` and `messages`, the answers, only where there is more than text."""
    prompt = [dict(message) for message in pair.prompt]
    content: dict[str, Any] = {"id": pair.id, "prompt": prompt, "answers": list(pair.shown)}
    if pair.tools:
        content["tools"] = pair.tools
    if pair.messages:
        content["messages"] = list(reversed(pair.messages) if pair.swapped else pair.messages)
    return content
