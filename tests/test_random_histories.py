"""Random histories of a tiny pipeline: every answer of audit, impact and diff
agrees with a log of what ran, or truthfully says that it cannot tell.

As a script: PEDIGREE_HISTORIES=3000 python tests/test_random_histories.py
(`make soak`). PEDIGREE_SEED names the first seed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import pytest
from builders.files import jsonl
from builders.history_oracle import (
    LEARNERS,
    MODELS,
    WORKSPACE,
    Chain,
    Reach,
    Signature,
    TooManyLineages,
    clone_shallow,
    out_of,
)
from builders.random_history import ADDRESSES, NAMES, PAIRS, PARAPHRASES, SOURCES, WORDS, Toy, canonical, dir_md5, git

from dagster_project.core.errors import InputError
from dagster_project.lineage.diff import diff
from dagster_project.lineage.export.export import export
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import document, find, trained_on

Names = Callable[[Chain], set[str]]


class Wrong(AssertionError):
    """An answer that the log contradicts."""


# --- impact


ANYTHING: Signature = ("", "", (), ())
"""What a model may have seen whose lineage is not recorded back to the sources."""
Claims = dict[str, list[tuple[Signature, list[str]]]]
"""Model -> what an answer says that it saw, and at which commits ("": in none)."""


def compare_impact(reach: Reach, question: dict[str, Any], names: Names, source: bool = False) -> None:
    """Compare one answer of impact.

    Args:
        names: lineage -> the records in its splits that are asked for.
        source: whether the answer counts steps instead of listing them.
    """
    try:
        found = impact(reach.root, **question)
    except InputError as error:
        found = {"asked": question, "verdict": "refused", "models": [], "unknown": [], "error": str(error)}
    claims: Claims = {}
    for model in found["models"]:
        for seen in model["seen"]:
            commits = [one or "" for one in seen.get("commits", model["commits"]) or [None]]
            claims.setdefault(model["md5"], []).append((shown(seen, source), commits))
    possible = possible_exposures(reach, names, source)
    for md5, said in of_lost_runs(reach, claims, source):
        possible.setdefault(md5, set()).add(said)
    partly = {
        model["md5"]: {one["md5"] for one in model["missing"]} for model in found["models"] if model.get("missing")
    }
    if partly and not reach.incomplete:
        raise Wrong(f"impact {question}: nothing is missing, but {set(partly)} are called partly unknown")
    problems = [
        *omissions(reach, found, claims, partly, names, source),
        *untruths(reach, claims, partly, possible, names, source),
    ]
    problems += verdict_problems(reach, found, any(possible.values()), names, source)
    if problems:
        raise Wrong(f"impact {question}:\n  " + "\n  ".join(problems))


def possible_exposures(reach: Reach, names: Names, source: bool) -> dict[str, set[Signature]]:
    """Model -> everything that it may have seen of the records, by any lineage that is or ever was recorded."""
    possible: dict[str, set[Signature]] = {}
    for address, entry, place in [*reach.models(), *reach.remembered(), *reach.past()]:
        for chain in reach.chains(address, entry, place):
            seen = reach.signatures(chain, names(chain), source).values() if reach.whole(chain) else [ANYTHING]
            possible.setdefault(out_of(entry)[1], set()).update(seen)
    for (
        address,
        entry,
        place,
    ) in reach.models():  # docs/audit.md, "Limits": each of the runs in the run cache may have been the one
        with suppress(TooManyLineages):
            for chain in reach.chains(address, entry, replace(place, or_unlocked=True)):
                seen = reach.signatures(chain, names(chain), source).values() if reach.whole(chain) else [ANYTHING]
                possible[out_of(entry)[1]].update(seen)
    return possible


def omissions(
    reach: Reach, found: dict[str, Any], claims: Claims, partly: Mapping[str, set[str]], names: Names, source: bool
) -> Iterator[str]:
    """Models that saw the records by every lineage that they may have, and that
    the answer neither names nor calls unknown."""
    unknown = {one["md5"] for one in found["unknown"]}
    for address, entry, place in reach.models():
        md5, chains = out_of(entry)[1], reach.chains(address, entry, place)
        if (
            md5 in unknown
            or not all(reach.whole(chain) for chain in chains)
            or (found["verdict"] == "refused" and reach.incomplete)
        ):
            continue
        if all(
            partly.get(md5, set()) & {one["md5"] for each in chain.values() for one in each["outs"]} for chain in chains
        ):
            continue  # a part of this lineage is called unknown
        seen = [reach.signatures(chain, names(chain), source) for chain in chains]
        for kind in LEARNERS:
            options = {
                next((one for name, one in found.items() if name.partition("@")[0] == kind), None) for found in seen
            }
            if None not in options and not any(
                agrees(md5 in partly, said, options, source) for said, _ in claims.get(md5, [])
            ):
                yield f"missing at {place.name or 'run cache'}: {address} {md5} {options}, said {claims.get(md5)}"


def of_lost_runs(reach: Reach, claims: Claims, source: bool) -> Iterator[tuple[str, Signature]]:
    """Statements about models of which only the bytes are left: that they were trained at these steps."""
    recorded = {out_of(entry)[1] for _, entry, _ in reach.models()}
    for md5 in (claims.keys() & reach.log.weights.keys()) - recorded:
        for said, commits in claims[md5]:
            trained = Counter(step for step, _, _ in reach.log.steps.get(said[1], ()))
            if commits == [""] and reach.exists(md5) and (source or Counter(said[3] or ()) <= trained):
                yield md5, said


def untruths(
    reach: Reach,
    claims: Claims,
    partly: Mapping[str, set[str]],
    possible: dict[str, set[Signature]],
    names: Names,
    source: bool,
) -> Iterator[str]:
    """Statements that no lineage of the model confirms, at all or at the commits that they name."""
    for md5, statements in claims.items():
        for said, _ in statements:
            if not agrees(md5 in partly, said, possible.get(md5, set()), source):
                yield f"not true: {md5} {said}; possible are {possible.get(md5)}"
        for commit in {one for _, commits in statements for one in commits} & set(reach.commits):
            there = at_commit(reach, md5, commit, names, source)
            if not any(agrees(md5 in partly, said, there, source) for said, commits in statements if commit in commits):
                yield f"not true at {commit}: {md5} {statements}; there possible are {there}"
        for said, commits in statements:
            if set(commits) <= set(reach.commits) and not any(
                agrees(md5 in partly, said, at_commit(reach, md5, one, names, source), source) for one in commits
            ):
                yield f"not true at {commits}: {md5} {said}"


def verdict_problems(reach: Reach, found: dict[str, Any], possible: bool, names: Names, source: bool) -> Iterator[str]:
    """Yes needs a model that may have seen them, no that no recorded run of any
    saw them, and cannot tell that something is missing."""
    verdict = found["verdict"]
    certain = any(
        reach.signatures(chain, names(chain), source)
        for _, entry, _ in reach.models()
        for chain in reach.log.ran[canonical(entry)]
        if reach.whole(chain) and reach.recorded(chain)
    )
    gone = {out_of(entry)[1] for _, entry, _ in reach.remembered()}
    unknown = {one["md5"] for one in found["unknown"]}
    unexplained = any(
        reach.unrecorded_inputs(chain) for _, entry, _ in reach.models() for chain in reach.log.ran[canonical(entry)]
    )
    if (unknown - gone or (verdict == "cannot tell" and not unknown)) and not (reach.incomplete or unexplained):
        yield f"nothing is missing, but it says {verdict} and unknown: {found['unknown']}"
    if verdict == "refused" and certain and not reach.incomplete:
        yield f"refused, but models saw it: {found['error']}"
    if verdict == "no" and "record" in found["asked"] and unpublished(reach, found["asked"]["record"]):
        yield "the verdict is no, but the key of the published id is lost"
    if (verdict == "yes" and not possible) or (verdict == "no" and certain):
        yield f"the verdict is {verdict}, but models that saw it: {'some' if certain else 'none'}"


def unpublished(reach: Reach, asked: str) -> bool:
    """Whether an id was published with a key that is gone."""
    ids = (
        hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:32]
        for key in reach.lost_keys
        for name in reach.log.text_of
    )
    return asked in ids


def shown(seen: dict[str, Any], source: bool) -> Signature:
    if source:
        learnt = seen["learnt"]
        steps: Any = learnt and (
            (learnt["records"], learnt["first_step"], learnt["last_step"]) if learnt["records"] else ()
        )
    else:
        steps = None if seen["steps"] is None else tuple(sorted(seen["steps"]))
    return (seen["by"], seen["md5"], tuple(sorted(seen["splits"].items())), steps)


def agrees(partly: bool, said: Signature, options: Collection[Signature | None], source: bool) -> bool:
    """Whether it is one of the options or, of a model that is called partly unknown, a part of one."""
    if ANYTHING in options or said in options:
        return True
    return partly and any(one and said[:2] == one[:2] and is_part(said, one, source) for one in options)


def is_part(said: Signature, whole: Signature, source: bool) -> bool:
    """Whether no split has more rows, and no step occurs more often, or of a source: not more records, and in none but
    these steps. A search of messages finds those that are left, in any data set."""
    rows = dict(whole[2])
    if not all(n <= rows.get(split, 0) for split, n in said[2]):
        return False
    if source and said[3] and whole[3]:
        (n, first, last), (most, earliest, latest) = said[3], whole[3]
        return n <= most and earliest <= first and last <= latest
    return said[3] is None or Counter(said[3]) <= Counter(whole[3] or ())


def at_commit(reach: Reach, md5: str, commit: str, names: Names, source: bool) -> set[Signature]:
    found = set()
    for address, entry in reach.lock_at(commit).items():
        if address.partition("@")[0] in MODELS and out_of(entry)[1] == md5:
            place = next(place for place in reach.places if place.name == commit)
            chains = reach.chains(address, entry, place)
            if not all(reach.whole(chain) for chain in chains):
                return {ANYTHING}
            found |= {one for chain in chains for one in reach.signatures(chain, names(chain), source).values()}
    return found


def questions(reach: Reach, draw: random.Random) -> Iterator[tuple[dict[str, Any], Names, bool]]:
    """Random questions for impact, each with the records that it is about."""
    log = reach.log
    texts = dict(log.text_of)

    def record(name: str) -> tuple[dict[str, Any], Names, bool]:
        return {"record": name}, lambda chain: reach.with_copies(chain, name), False

    def text(asked: str) -> tuple[dict[str, Any], Names, bool]:
        same = {name for name, both in texts.items() if fold(asked) in {fold(one) for one in both}}
        return {"text": asked}, lambda _: same, False

    def containing(asked: str) -> tuple[dict[str, Any], Names, bool]:
        same = {name for name, both in texts.items() if any(f" {plain(asked)} " in f" {plain(one)} " for one in both)}
        return {"containing": asked}, lambda _: same, False

    def near_record(name: str) -> tuple[dict[str, Any], Names, bool]:
        same = {name, *reach.near_copies(reach.texts().get(name, ()), {name})}
        return (
            {"record": name, "near": True},
            lambda chain: set().union(*(reach.with_copies(chain, one) for one in same)),
            False,
        )

    def near_text(asked: str) -> tuple[dict[str, Any], Names, bool]:
        exact = text(asked)[1]({})
        same = exact | reach.near_copies([asked], exact)
        return {"text": asked, "near": True}, lambda _: same, False

    def expression(asked: str) -> tuple[dict[str, Any], Names, bool]:
        same = {
            name
            for name, both in texts.items()
            if any(re.search(asked, " ".join(one.split()), re.IGNORECASE) for one in both)
        }
        return {"containing": asked, "regex": True}, lambda _: same, False

    def published(name: str, key: bytes) -> tuple[dict[str, Any], Names, bool]:
        digest = hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:32]
        return {"record": digest}, lambda chain: reach.with_copies(chain, name) if key in reach.keys else set(), False

    def source(path: str) -> tuple[dict[str, Any], Names, bool]:
        def of(chain: Chain) -> set[str]:
            return {
                name
                for one, names in reach.records_of_sources(chain).items()
                if one == path or one.startswith(f"{path}/")
                for name in names
            }

        return {"source": path}, of, True

    def sha256(value: str) -> tuple[dict[str, Any], Names, bool]:
        def of(chain: Chain) -> set[str]:
            named = [path for path, facts in reach.facts(chain).items() if facts["sha256"] == value]
            return {name for path in named for name in reach.records_of_sources(chain).get(path, ())}

        return {"content": value}, of, True

    for name in draw.sample(sorted(texts), min(3, len(texts))):
        yield record(name)
    chosen = draw.choice(sorted(texts))
    yield text(draw.choice(texts[chosen]).upper() or "nothing")
    yield containing(
        draw.choice([draw.choice(NAMES), "saw the", *draw.choice(texts[chosen])[:40].split()[:1]]).lower() or "nothing"
    )
    yield near_record(draw.choice(sorted(texts)))
    said = draw.choice(texts[draw.choice(sorted(texts))]).split()
    yield near_text(
        " ".join(
            draw.choice([said, said[:-2], [*said[:4], draw.choice(WORDS), *said[4:]], [*said, *draw.sample(WORDS, 3)]])
        )
        or "no"
    )
    yield expression(
        draw.choice([f"^{draw.choice(NAMES)} (saw|met)", rf"\b{draw.choice(WORDS)}\b.*\d$", r"[a-z]{6} \d+\.$"])
    )
    yield published(chosen, draw.choice(list(reach.toy.keys.values())))
    copies = sorted({copy for found in log.parent_of.values() for copy in found})
    if copies:
        copy = draw.choice(copies)
        yield record(copy)
        yield record(next(found[copy] for found in log.parent_of.values() if copy in found))
        yield source(PARAPHRASES)
    paths = sorted({path for facts in log.sources.values() for path in facts})
    for path in draw.sample(paths, min(3, len(paths))):
        yield source(path)
    yield source(draw.choice([SOURCES, f"{SOURCES}/team", f"{SOURCES}/pairs"]))
    yield record("0" * 32)
    yield text("Nobody ever wrote this.")
    yield sha256(draw.choice(sorted({facts["sha256"] for found in log.sources.values() for facts in found.values()})))


def fold(text: str) -> str:
    return " ".join(text.lower().split())


def plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def compare_hash(reach: Reach, value: str) -> None:
    """Compare the models that an output is said to have gone into, or to be."""
    found = impact(reach.root, content=value)
    told, unknown = {one["md5"] for one in found["models"]}, {one["md5"] for one in found["unknown"]}
    required, allowed = set(), {out_of(entry)[1] for _, entry, _ in reach.remembered()}
    for address, entry, place in reach.models():
        chains = reach.chains(address, entry, place)
        inside = [value in {out_of(one)[1] for one in chain.values()} for chain in chains]
        required |= {out_of(entry)[1]} if all(inside) else set()
        allowed |= {out_of(entry)[1]} if any(inside) or not all(reach.whole(chain) for chain in chains) else set()
        with suppress(TooManyLineages):  # docs/audit.md, "Limits", as in possible_exposures
            chains = reach.chains(address, entry, replace(place, or_unlocked=True))
            allowed |= (
                {out_of(entry)[1]}
                if any(value in {out_of(one)[1] for one in chain.values()} for chain in chains)
                else set()
            )
    recorded = {out_of(entry)[1] for _, entry, _ in reach.models()}
    allowed |= {
        md5 for md5 in told & reach.log.weights.keys() if md5 not in recorded and reach.exists(md5)
    }  # only its bytes are left
    if required - told - unknown or told - allowed or (found["verdict"] == "no" and required):
        raise Wrong(
            f"impact of output {value}: {found['verdict']}, without {required - told - unknown}, wrongly"
            f" {told - allowed}"
        )


# --- audit


def compare_audit(reach: Reach, address: str, rev: str | None) -> None:
    """Compare the audit of a model at a revision (None: the workspace)."""
    place = next(one for one in reach.places if one.name == (rev or WORKSPACE))
    entry = place.lock[address]
    chains = reach.chains(address, entry, place)
    try:
        subject = find(Index(reach.root), address, rev)
        found = document(subject)
    except InputError as error:
        raise Wrong(f"audit {address} at {rev}: refused: {error}") from error
    complaints = [audit_problems(reach, found, subject, chain, place.name) for chain in chains]
    if all(complaints):
        raise Wrong(
            f"audit {address} at {rev} ({len(chains)} possible lineages):\n  " + "\n  ".join(min(complaints, key=len))
        )


def audit_problems(reach: Reach, found: dict[str, Any], subject: Any, chain: Chain, place: str) -> list[str]:
    address = next(iter(chain))
    problems = []

    def same(what: str, said: Any, wanted: Any) -> None:
        if said != wanted:
            problems.append(f"{what}: says {said}, but it is {wanted}")

    same("md5", found["model"]["md5"], out_of(chain[address])[1])
    if address == "release" and reach.incomplete and "data/release" in {one["path"] for one in found["missing"]}:
        return problems  # its files, and with them the model that it was made from, are said to be missing
    for one, entry in chain.items():
        outputs = {stage["md5"] for name, stage in found["stages"].items() if name.partition(" ")[0] == one}
        if out_of(entry)[1] not in outputs:
            problems.append(f"output of {one}: says {outputs}, but it is {out_of(entry)[1]}")
    may_miss = reach.incomplete or not reach.whole(chain) or reach.unrecorded_inputs(chain)
    missing = bool(found["missing"]) and may_miss
    if not reach.whole(chain) and not found["missing"]:
        problems.append("its lineage is not recorded completely, but it names nothing that is missing")
    if found["missing"] and not may_miss:
        problems.append(f"nothing is missing, but it names {found['missing']}")
    facts = reach.facts(chain)
    if {"raw_examples", "splits"} <= chain.keys() or "raw_preferences" in chain:
        if not (missing and set(found["sources"]) <= set(facts)):
            same("sources", set(found["sources"]), set(facts))
        for path in facts.keys() & found["sources"].keys():
            for key, value in facts[path].items():
                same(f"{path}: {key}", found["sources"][path].get(key), value)
            for stage in ("instructions", "splits") if path != PAIRS else ("preferences",):
                if stage not in chain:
                    continue
                counted = reach.log.outcomes[str(reach.of(chain, stage))].get(path)
                said = found["sources"][path]["outcomes"].get(stage)
                if not (said is None and reach.incomplete):
                    same(f"{path}: outcomes of {stage}", said, counted)
    learners = reach.learners(chain)
    if learners and reach.whole(chain):
        table, _ = trained_on(subject)
        if table is None:
            if not reach.incomplete:
                problems.append("the training record exists, but the records are unknown")
        else:
            rows = table.rows(named=True)
            wanted = [(name, *step) for name, one in learners.items() for step in reach.log.steps[out_of(one)[1]]]
            said = [(row["model"], row["step"], row["epoch"], row["example_id"]) for row in rows]
            if not (reach.incomplete and Counter(said) <= Counter(wanted)):
                same("records", sorted(said), sorted(wanted))
            owners = reach.records_of_sources(chain)
            for row in rows:
                if row["source"] is None and reach.incomplete:
                    continue
                if row["example_id"] not in owners.get(row["source"], set()):
                    problems.append(f"{row['example_id']} is not of {row['source']}")
    problems += code_problems(reach, found["code"], chain, place)
    return problems


def code_problems(reach: Reach, code: dict[str, Any], chain: Chain, place: str) -> list[str]:
    """The commit holds the model and its run, and it is clean exactly if its code and parameters are those that ran."""
    md5 = out_of(next(iter(chain.values())))[1]
    holders = reach.holders(md5)
    commit = code["commit"]
    if commit is None and not set(holders) & reach.reachable:
        return ["no commit, but clean"] if code["clean"] else []
    if commit is None:
        return [f"commit: says none, but {holders} hold the model"]
    if commit not in holders:
        return [f"commit: says {commit}, but its dvc.lock does not hold the model"]
    problems = []
    own = reach.holders_of_entry(next(iter(chain.values())))
    if set(own) & reach.reachable and commit not in own:
        problems.append(f"commit: says {commit}, but the run of the model is in {own}")
    whole = set.intersection(*(set(reach.holders_of_entry(entry)) for entry in chain.values()))
    if code["lineage_at"] is not None and code["lineage_at"] not in whole:
        problems.append(f"lineage_at: says {code['lineage_at']}, but all runs are in {whole}")
    elif code["lineage_at"] and (
        other := {
            name: found for name, entry in chain.items() if (found := differences(reach, entry, code["lineage_at"]))
        }
    ):
        problems.append(f"lineage_at: says {code['lineage_at']}, whose code differs: {other}")
    clean = True
    for address, entry in chain.items():
        if address not in code["stages"]:
            problems.append(f"code of {address}: says nothing")
            continue
        at, claimed = code["stages"][address]["commit"], code["stages"][address]["clean"]
        holding = reach.holders_of_entry(entry)
        differing = differences(reach, entry, at) if at else ["everything"]
        clean &= not differing
        if (at is None and set(holding) & reach.reachable) or (at and at not in holding):
            problems.append(f"code of {address}: says its run is in {at}, but it is in {holding}")
        elif claimed == bool(differing):
            problems.append(
                f"code of {address}: says clean {claimed} at {at}, but there {differing or 'nothing'} differs"
            )
    clean &= all(
        one["clean"] for name, one in code["stages"].items() if name not in chain
    )  # of what it was compared with
    if code["clean"] != clean:
        problems.append(f"code: says clean {code['clean']}, differing {code.get('differs')}, but it is {clean}")
    return problems


def differences(reach: Reach, entry: dict[str, Any], commit: str) -> list[str]:
    """Code files and parameters that a commit has otherwise than a run recorded them."""
    files, params = reach.committed(commit)
    found = []
    for one in entry["deps"]:
        path = one["path"]
        if path.startswith("dagster_project/"):
            below = {
                name.removeprefix(f"{path}/"): value for name, value in files.items() if name.startswith(f"{path}/")
            }
            if one["md5"] != (dir_md5(below) if below else files.get(path)):
                found.append(path)
    for path, value in entry.get("params", {}).get("params.yaml", {}).items():
        there = params
        for key in path.split("."):
            there = there[key]
        if there != value:
            found.append(path)
    return found


# --- diff


def compare_diff(reach: Reach, before: tuple[str, str], after: tuple[str, str]) -> None:
    """Compare the difference of two models, (address, commit) each."""
    sides, lost = [], False
    for address, commit in (before, after):
        place = next(one for one in reach.places if one.name == commit)
        chains = reach.chains(address, place.lock[address], place)
        lost |= any(reach.unrecorded_inputs(chain) for chain in chains)
        sides.append({canonical(reach.records(chain)): reach.records(chain) for chain in chains})
    found = diff(reach.root, before[0], after[0], rev=before[1], against_rev=after[1])
    if found["records"] is None:
        if reach.incomplete or lost or any(None in side.values() for side in sides):
            return
        raise Wrong(f"diff {before} {after}: the records are unknown, but nothing is missing")
    told = (
        {one["example_id"] for one in found["records"]["added"]}
        | {one["after"]["example_id"] for one in found["records"]["changed"]},
        {one["example_id"] for one in found["records"]["removed"]}
        | {one["before"]["example_id"] for one in found["records"]["changed"]},
        {one["after"]["example_id"] for one in found["records"]["moved"]},
    )
    wanted = []
    for old in sides[0].values():
        for new in sides[1].values():
            if old is None or new is None:
                continue
            wanted.append(
                (
                    new.keys() - old.keys(),
                    old.keys() - new.keys(),
                    {name for name in old.keys() & new.keys() if old[name] != new[name]},
                )
            )
    if told not in wanted:
        raise Wrong(f"diff {before} {after}: says added, removed, moved {told}; possible are {wanted}")


# --- exports


def compare_export(reach: Reach, address: str, rev: str | None) -> None:
    """Compare the exports of a model at a revision with its lineage, and with
    what they were when they were asked for before."""
    place = next(one for one in reach.places if one.name == (rev or WORKSPACE))
    chains = reach.chains(address, place.lock[address], place)
    md5 = out_of(place.lock[address])[1]
    try:
        texts = {
            form: export(reach.root, address, form, rev, None if reach.holders(md5) else date(2026, 1, 1))
            for form in ("cyclonedx", "openlineage", "model-card")
        }
    except InputError as error:
        if reach.incomplete or any(not reach.whole(chain) or reach.unrecorded_inputs(chain) for chain in chains):
            return
        raise Wrong(f"export {address} at {rev}: refused: {error}") from error
    complaints = [export_problems(reach, texts, chain) for chain in chains if reach.whole(chain)]
    if complaints and all(complaints):
        raise Wrong(
            f"export {address} at {rev} ({len(chains)} possible lineages):\n  " + "\n  ".join(min(complaints, key=len))
        )
    if rev and not reach.incomplete:
        holders = [one for one in reach.holders(md5) if one in reach.reachable]
        before = reach.toy.exported.setdefault((rev, address), (holders, texts))
        if before[0] == holders[len(holders) - len(before[0]) :] and before[1] != texts:
            forms = [form for form in texts if texts[form] != before[1][form]]
            raise Wrong(
                f"export {address} at {rev}: not the text that it was before:"
                f" {forms}\n{before[1][forms[0]]}\n{texts[forms[0]]}"
            )


def export_problems(reach: Reach, texts: dict[str, str], chain: Chain) -> list[str]:
    problems = []
    bom, facts = json.loads(texts["cyclonedx"]), reach.facts(chain)
    parts = {part["bom-ref"]: part for part in bom["components"]}
    told = {
        name.removeprefix("source:"): {
            "rows": int(next(one["value"] for one in part["properties"] if one["name"] == "pedigree:rows")),
            "sha256": part["hashes"][0]["content"],
            "license": part["licenses"][0]["license"]["id"],
        }
        for name, part in parts.items()
        if name.startswith("source:")
    }
    if told != facts and not (reach.incomplete and told.items() <= facts.items()):
        problems.append(f"cyclonedx: sources are {told}, but it was trained on {facts}")
    for path, fact in facts.items():
        line = f"| {path} | {fact['rows']} | "
        if not any(
            one.startswith(line) and fact["sha256"] in one and fact["license"] in one
            for one in texts["model-card"].splitlines()
        ):
            problems += [] if reach.incomplete else [f"model card: no line for {path} with {fact}"]
    events = [json.loads(line) for line in texts["openlineage"].splitlines()]
    for event in (one for one in events if one["eventType"] == "COMPLETE" and one["job"]["name"] in chain):
        entry = chain[event["job"]["name"]]
        path, value = out_of(entry)
        hashes = {one["name"]: one["facets"].get("contentHash", {}) for one in [*event["inputs"], *event["outputs"]]}
        if hashes.get(path, {}).get("md5") != value:
            problems.append(f"openlineage: output of {event['job']['name']} is {hashes.get(path)}, but it was {value}")
        read = {one["path"]: one["md5"] for one in entry["deps"]} | {
            name: fact["sha256"] for name, fact in facts.items()
        }
        for name, found in hashes.items():
            if name in read and read[name] not in found.values():
                problems.append(f"openlineage: {event['job']['name']} read {name} as {found}, but it was {read[name]}")
        tags = {one["key"]: one["value"] for one in event["run"]["facets"].get("tags", {}).get("tags", [])}
        if "commit" in tags and tags["commit"] not in reach.holders_of_entry(entry):
            problems.append(
                f"openlineage: {event['job']['name']} is said to be recorded in {tags['commit']}, which has no such run"
            )
    return problems


# --- histories


@contextmanager
def every_git_command_once() -> Iterator[None]:
    """Run each git command once, and repeat its result: for questions, which
    change nothing. Most of their time is that of such processes."""
    run, results = subprocess.run, dict[Any, Any]()

    def once(command: Any, *arguments: Any, **options: Any) -> Any:
        if command[0] != "git":
            return run(command, *arguments, **options)
        key = (tuple(command), arguments, str(options))
        if key not in results:
            results[key] = run(command, *arguments, **options)
        return results[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", once)
        yield


def check(reach: Reach, draw: random.Random) -> None:
    """Ask random questions and compare the answers.

    Raises:
        Wrong: an answer is wrong.
    """
    with every_git_command_once():
        ask(reach, draw)


def ask(reach: Reach, draw: random.Random) -> None:
    for question, names, source in questions(reach, draw):
        with suppress(TooManyLineages):
            compare_impact(reach, question, names, source)
    outs = sorted({out_of(entry)[1] for address, entry, _ in reach.pool if address not in {"base_model", "comparison"}})
    if outs:
        with suppress(TooManyLineages):
            compare_hash(reach, draw.choice(outs))
    with pytest.raises(InputError, match="no recorded run has read such a file"):
        impact(reach.root, source="data/sources/never.jsonl")
    known = [
        (address, place.name) for place in reach.places for address in place.lock if address.partition("@")[0] in MODELS
    ]
    for address, name in draw.sample(known, min(4, len(known))):
        with suppress(TooManyLineages):
            compare_audit(reach, address, None if name == WORKSPACE else name)
            if draw.random() < 0.15:
                compare_export(reach, address, None if name == WORKSPACE else name)
    reach.remember()
    committed = [one for one in known if one[1] != WORKSPACE]
    if len(committed) > 1:
        with suppress(TooManyLineages):
            compare_diff(reach, *draw.sample(committed, 2))


def history(seed: int, folder: Path) -> None:
    """Play one history and compare answers on the way and at its end.

    Raises:
        Wrong: an answer is wrong; the message has the seed and the operations.
    """
    toy = Toy(folder / "project", seed)
    draw = random.Random(f"questions {seed}")
    try:
        toy.play(draw.randint(3, 7))
        if draw.random() < 0.5:  # the index grows as history does
            toy.said.append("(questions)")
            check(Reach(toy, toy.root), draw)
        toy.play(draw.randint(3, 7), first=False)
        toy.said.append("(questions)")
        check(Reach(toy, toy.root), draw)
        if draw.random() < 0.2:
            toy.said.append("(shallow clone)")
            clone_shallow(toy, folder / "clone")
            if draw.random() < 0.7:
                shutil.copytree(toy.root / ".dvc/cache", folder / "clone/.dvc/cache", dirs_exist_ok=True)
            check(Reach(toy, folder / "clone"), draw)
    except Exception as error:
        done = "\n  ".join(toy.said)
        raise Wrong(
            f"seed {seed} ({'real' if toy.real else 'simulated'} stages):\n  {done}\n{type(error).__name__}: {error}"
        ) from error


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_about_a_random_history_agrees_with_what_ran(seed: int, tmp_path: Path) -> None:
    history(seed, tmp_path)


# --- what they have found


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A project with simulated stages, in which all has run and is committed."""
    toy = Toy(tmp_path / "project", seed=1)
    toy.real = toy.ledger_in_tokenized = False
    toy.commit()
    toy.repro()
    toy.commit()
    return toy


def test_code_of_a_run_that_is_not_committed_is_not_taken_from_an_earlier_run_with_the_same_bytes(toy: Toy) -> None:
    before = document(find(Index(toy.root), "merged@lora"))["code"]
    (toy.root / "dagster_project/stages/merged.py").write_text("VERSION = 2\n")
    toy.repro()
    after = document(find(Index(toy.root), "merged@lora"))["code"]
    assert (before["clean"], after["clean"]) == (True, False)
    assert (after["stages"]["merged@lora"]["commit"], after["commit"]) == (None, before["commit"])
    assert after["files"]["dagster_project/stages/merged.py"] != before["files"]["dagster_project/stages/merged.py"]


def test_copies_of_a_record_are_credited_to_every_source_that_has_it(toy: Toy) -> None:
    faq, mail = toy.source_paths()
    toy.write_source(mail, toy.read_source(faq))
    prompts = [prompt for prompt, _ in toy.read_source(faq)]
    jsonl(toy.root / PARAPHRASES, *({"prompt": one, "paraphrase": f"{one} Tell me."} for one in prompts))
    toy.write_params(
        toy.params() | {"splits": {**toy.params()["splits"], "augment": {"paraphrases": PARAPHRASES, "license": "MIT"}}}
    )
    toy.repro()
    toy.commit()
    first, second = (impact(toy.root, source=path)["models"][-1]["seen"] for path in (faq, mail))
    assert (
        first == second
        and first[0]["splits"]["train"]
        == 2 * impact(toy.root, source=PARAPHRASES)["models"][-1]["seen"][0]["splits"]["train"]
    )
    assert impact(toy.root, source=SOURCES)["models"][-1]["seen"] == first  # no copy is counted twice


def test_a_source_of_a_run_that_was_never_committed_is_found_though_a_later_run_made_the_same_bytes(toy: Toy) -> None:
    faq = toy.source_paths()[0]
    toy.write_source(faq, [toy.new_row(), *toy.read_source(faq)])
    digest = hashlib.sha256((toy.root / faq).read_bytes()).hexdigest()
    toy.repro()
    trained = toy.lock()["adapter@lora"]
    toy.write_source(faq, toy.read_source(faq)[::-1])
    toy.repro()
    assert toy.lock()["adapter@lora"] == trained
    found = impact(toy.root, content=digest)
    assert found["verdict"] == "yes" and out_of(trained)[1] in {model["md5"] for model in found["models"]}


def test_each_lineage_of_a_model_names_the_commits_at_which_it_holds(toy: Toy) -> None:
    faq = toy.source_paths()[0]
    first = git(toy.root, "rev-parse", "HEAD").strip()
    rows = toy.read_source(faq)
    toy.write_source(faq, rows[1:])
    toy.write_source(f"{SOURCES}/new.jsonl", rows[:1])
    toy.change_sources(lambda sources: sources.append({"path": f"{SOURCES}/new.jsonl", "license": "MIT"}))
    toy.repro()
    toy.commit()
    second = git(toy.root, "rev-parse", "HEAD").strip()
    (model,) = (one for one in impact(toy.root, source=faq)["models"] if one["stage"] == "adapter@lora")
    assert [seen["commits"] for seen in model["seen"]] == [[first], [second]] and model["commits"] == [first, second]


def test_an_audit_at_a_commit_of_the_reflog_names_that_commit_though_the_workspace_has_the_same_model(toy: Toy) -> None:
    commit = git(toy.root, "rev-parse", "HEAD").strip()
    git(toy.root, "reset", "-q", "--soft", "HEAD~1")
    code = document(find(Index(toy.root), "merged@lora", commit))["code"]
    assert (code["commit"], code["clean"]) == (commit, True)


def test_an_audit_at_a_commit_of_the_reflog_names_it_though_the_workspace_has_the_model_in_another_lock(
    toy: Toy,
) -> None:
    commit = git(toy.root, "rev-parse", "HEAD").strip()
    git(toy.root, "reset", "-q", "--soft", "HEAD~1")
    toy.change_sources(lambda sources: sources.reverse())
    lock = toy.lock()
    (toy.root / "dvc.lock").write_text(
        json.dumps({"schema": "2.0", "stages": {name: lock[name] for name in lock if name != "merged@lora"}})
    )
    code = document(find(Index(toy.root), "adapter@lora", commit))["code"]
    assert (code["commit"], code["clean"]) == (commit, True)


def test_a_model_whose_data_set_is_lost_but_whose_training_is_recorded_is_called_partly_unknown(toy: Toy) -> None:
    out, (_, _, trained) = out_of(toy.lock()["splits"])[1], toy.log.steps[out_of(toy.lock()["adapter@lora"])[1]][0]
    toy.object(out).unlink()
    shutil.rmtree(toy.root / "data/splits")
    found = impact(toy.root, record=trained)
    assert found["verdict"] == "yes" and not found["unknown"]
    assert {
        model["stage"] for model in found["models"] if [one["path"] for one in model["missing"]] == ["data/splits"]
    } == {model["stage"] for model in found["models"]}


def test_a_model_whose_report_is_lost_is_unknown_to_a_question_by_the_hash_of_a_source(toy: Toy) -> None:
    faq, mail = toy.source_paths()
    toy.write_source(mail, [*toy.read_source(mail), *(toy.new_row() for _ in range(6))])
    toy.repro()
    lost = toy.lock()
    toy.write_source(mail, [*toy.read_source(mail), *(toy.new_row() for _ in range(6))])
    toy.repro()
    toy.object(lost["raw_examples"]["outs"][1]["md5"]).unlink()
    found = impact(toy.root, content=hashlib.sha256((toy.root / faq).read_bytes()).hexdigest())
    (unknown,) = (one for one in found["unknown"] if one["stage"] == "merged@lora")
    assert unknown["md5"] == out_of(lost["merged@lora"])[1] and [one["path"] for one in unknown["missing"]] == [
        "data/reports/raw_examples.json"
    ]
    assert impact(toy.root, content="0" * 64)["verdict"] == "cannot tell"


def test_a_model_made_from_a_run_that_only_the_run_cache_has_did_not_see_what_came_later(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "project", seed=1)
    toy.real, toy.ledger_in_tokenized = False, True
    toy.repro()
    values = toy.params()
    values["aligned"]["dpo"]["learning_rate"] = 2
    toy.write_params(values)
    toy.repro(["aligned@dpo"])  # the merged model is of the former run of DPO, which only the run cache has
    toy.commit()
    commit, before = git(toy.root, "rev-parse", "HEAD").strip(), toy.lock()
    faq, new = toy.source_paths()[0], f"{SOURCES}/new.jsonl"
    *rows, last = toy.read_source(faq)
    toy.write_source(faq, rows)
    toy.write_source(new, [last])
    toy.change_sources(lambda sources: sources.append({"path": new, "license": "MIT"}))
    toy.repro()
    assert toy.lock()["adapter@lora"]["outs"] == before["adapter@lora"]["outs"]  # the same bytes, of another lineage
    models = {model["md5"]: model for model in impact(toy.root, source=new)["models"]}
    assert out_of(toy.lock()["adapter@lora"])[1] in models and out_of(before["merged_aligned@dpo"])[1] not in models
    assert out_of(before["merged_aligned@dpo"])[1] in {model["md5"] for model in impact(toy.root, source=faq)["models"]}
    assert commit not in {one for model in models.values() for one in model["commits"]}


def test_all_runs_that_made_a_model_tell_what_is_missing(toy: Toy) -> None:
    first = toy.lock()
    pairs = toy.read_pairs()
    toy.write_pairs(pairs[::-1])
    toy.repro()
    toy.commit()
    second = toy.lock()
    same = [
        name
        for name in ("reward_model", "aligned@dpo")
        if first[name]["outs"][0]["md5"] == second[name]["outs"][0]["md5"]
    ]
    assert same, "the reordered pairs trained other weights"
    lost = [out_of(lock["preferences"])[1] for lock in (first, second)]
    for md5 in lost:
        toy.object(md5).unlink()
    shutil.rmtree(toy.root / "data/preferences")
    found = impact(toy.root, record="0" * 32)
    told = {model["stage"]: {one["md5"] for one in model["missing"]} for model in found["unknown"]}
    assert all(set(lost) <= told[name] for name in same)


def test_a_report_that_is_lost_is_named_as_missing_and_no_source_is_said_to_have_been_added(toy: Toy) -> None:
    before = git(toy.root, "rev-parse", "HEAD").strip()
    mail = toy.source_paths()[1]
    toy.write_source(mail, [*toy.read_source(mail), toy.new_row()])
    toy.repro()
    lock, report = (toy.root / "dvc.lock").read_text(), toy.lock()["raw_examples"]["outs"][1]
    toy.write_source(mail, toy.read_source(mail)[1:])
    toy.repro()
    (toy.root / "dvc.lock").write_text(lock)  # committed with the reports of a later run
    toy.commit()
    toy.object(report["md5"]).unlink()
    found = document(find(Index(toy.root), "merged@lora"))
    assert not found["sources"] and [(one["path"], one["md5"]) for one in found["missing"]] == [
        (report["path"], report["md5"])
    ]
    difference = diff(toy.root, "merged@lora", "merged@lora", rev=before)
    assert difference["records"] and not difference["sources"]
    assert [(one["path"], one["md5"]) for one in difference["missing"]] == [(report["path"], report["md5"])]


def test_a_record_of_two_files_with_the_same_bytes_counts_once(toy: Toy) -> None:
    faq = toy.source_paths()[0]
    row = toy.read_source(faq)[:1]
    for name in ("one", "two"):
        toy.write_source(f"{SOURCES}/{name}.jsonl", row)
        toy.change_sources(
            lambda sources, name=name: sources.append({"path": f"{SOURCES}/{name}.jsonl", "license": "MIT"})
        )  # type: ignore[misc]
    toy.repro()
    digest = hashlib.sha256((toy.root / f"{SOURCES}/one.jsonl").read_bytes()).hexdigest()
    found = impact(toy.root, content=digest)
    assert found["models"] and {
        sum(seen["splits"].values()) for model in found["models"] for seen in model["seen"]
    } == {1}


def test_a_release_that_is_older_than_the_comparison_names_the_model_that_it_was_made_from(toy: Toy) -> None:
    toy.ledger_in_tokenized = True
    toy.repro()
    faq, mail = toy.source_paths()
    *rest, last = toy.read_source(faq)
    toy.write_source(faq, rest)
    toy.write_source(mail, [last, *toy.read_source(mail)])
    before = toy.lock()
    toy.repro(
        ADDRESSES[:-1]
    )  # the adapters are made again, of another data set, with the same bytes; the release is not
    assert toy.lock()["merged@lora"] == before["merged@lora"] and toy.lock()["adapter@lora"] != before["adapter@lora"]
    found = document(find(Index(toy.root), "release"))
    assert found["stages"]["merged@lora"]["md5"] == out_of(toy.lock()["merged@lora"])[1]
    assert "merged@lora" not in found["watched"]["stages"]


def test_a_reward_model_is_not_said_to_be_made_from_the_examples_that_its_pairs_were_compared_with(toy: Toy) -> None:
    found = document(find(Index(toy.root), "reward_model"))
    assert (
        set(found["sources"]) == {PAIRS}
        and {"splits", "instructions", "raw_examples"} <= found["watched"]["stages"].keys()
    )
    assert {"reward_model", "preferences", "raw_preferences"} <= found["stages"].keys()


def test_sources_of_an_aligned_model_are_those_of_its_own_run_if_its_pairs_were_compared_with_later_examples(
    toy: Toy,
) -> None:
    faq = toy.source_paths()[0]
    before = hashlib.sha256((toy.root / faq).read_bytes()).hexdigest()
    toy.write_source(faq, [*toy.read_source(faq), toy.new_row()])
    toy.repro(["raw_examples", "instructions", "splits", "preferences", "aligned@dpo"])
    found = document(find(Index(toy.root), "aligned@dpo"))
    assert found["sources"][faq]["sha256"] == before


def test_a_release_names_its_model_although_the_files_of_that_model_are_lost(toy: Toy) -> None:
    pair = next(
        name for name, split in toy.log.split_of[out_of(toy.lock()["preferences"])[1]].items() if split == "train"
    )
    toy.object(out_of(toy.lock()["merged@lora"])[1]).unlink()
    shutil.rmtree(toy.root / "data/merged/lora")
    found = impact(toy.root, record=pair)
    assert [model["stage"] for model in found["models"]] == ["reward_model", "aligned@dpo", "merged_aligned@dpo"]


def test_pairs_do_not_make_a_model_learn_from_the_examples_that_they_were_compared_with(
    toy: Toy, tmp_path: Path
) -> None:
    clone_shallow(toy, tmp_path / "clone")
    found = impact(tmp_path / "clone", content=out_of(toy.lock()["splits"])[1])
    assert "reward_model" not in {model["stage"] for model in found["models"]}


def test_the_models_of_a_release_end_if_nothing_records_the_one_that_it_was_made_from(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "project", seed=1)
    toy.real = False
    toy.repro()
    mail = toy.source_paths()[1]
    toy.write_source(mail, [*toy.read_source(mail), *(toy.new_row() for _ in range(6))])
    toy.repro(
        ADDRESSES[: ADDRESSES.index("merged@lora") + 1]
    )  # DPO and the release are still of the former one, whose run is lost
    toy.op_drop_runs()
    assert document(find(Index(toy.root), "release"))["model"]["md5"] == out_of(toy.lock()["release"])[1]


def soak(count: int, first: int, keep_going: bool = False) -> int:
    """Returns: the number of histories with a wrong answer."""
    start, wrong = time.monotonic(), []
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            try:
                history(seed, Path(folder))
            except Wrong as error:
                wrong.append(seed)
                print(error, flush=True)
                if not keep_going:
                    break
        if (seed - first + 1) % 25 == 0:
            print(
                f"{seed - first + 1} histories, {len(wrong)} with a wrong answer, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    print(f"{seed - first + 1} histories from seed {first}, wrong: {wrong or 'none'}", flush=True)
    return len(wrong)


if __name__ == "__main__":
    count, first = int(os.environ.get("PEDIGREE_HISTORIES", "3000")), int(os.environ.get("PEDIGREE_SEED", "0"))
    sys.exit(bool(soak(count, first, "--keep-going" in sys.argv)))
