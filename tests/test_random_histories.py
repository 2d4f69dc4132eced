"""Random histories of a tiny pipeline: every answer of audit, impact and diff agrees with a log of what ran, or truthfully says that it cannot tell.

As a script: PEDIGREE_HISTORIES=3000 python tests/test_random_histories.py (`make soak`). PEDIGREE_SEED names the first seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import pytest
from builders.files import jsonl
from builders.history_oracle import MODELS, WORKSPACE, Chain, Reach, Signature, TooManyLineages, clone_shallow, out_of
from builders.random_history import NAMES, PARAPHRASES, SOURCES, Toy, canonical, dir_md5, git

from dagster_project.core.errors import InputError
from dagster_project.lineage.diff import diff
from dagster_project.lineage.export.export import export
from dagster_project.lineage.impact import impact
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import document, find, trained_on

Names = Callable[[Chain], set[str]]


class Wrong(AssertionError):
    """An answer that the log contradicts."""


# --- impact


def compare_impact(reach: Reach, question: dict[str, Any], names: Names, source: bool = False) -> None:
    """Compare one answer of impact.

    Args:
        names: lineage -> the records in its splits that are asked for.
    """
    try:
        found = impact(reach.root, **question)
    except InputError as error:
        found = {"verdict": "refused", "models": [], "unknown": [], "error": str(error)}
    told: dict[str, list[tuple[Signature, list[str]]]] = {}  # model -> what it says, and at which commits ("": elsewhere)
    for model in found["models"]:
        for seen in model["seen"]:
            told.setdefault(model["md5"], []).append(
                (shown(seen, source), [one or "" for one in seen.get("commits", model["commits"]) or [None]])
            )
    unknown = {one["md5"] for one in found["unknown"]}
    allowed: dict[str, set[Signature]] = {}
    problems = []
    for address, entry, place in reach.models():
        md5 = out_of(entry)[1]
        chains = reach.chains(address, entry, place)
        if not all(reach.whole(chain) for chain in chains):
            allowed.setdefault(md5, set()).add(ANYTHING)
            continue
        options = [reach.signature(chain, names(chain), source) for chain in chains]
        allowed.setdefault(md5, set()).update(one for one in options if one)
        refused = found["verdict"] == "refused" and reach.incomplete
        if (
            None not in options
            and md5 not in unknown
            and not refused
            and not any(agrees(said, set(options)) for said, _ in told.get(md5, []))
        ):
            problems.append(f"missing at {place.name or 'run cache'}: {address} {md5} {options}, said {told.get(md5)}")
    for address, entry, place in reach.remembered():
        options = [
            reach.signature(chain, names(chain), source) if reach.whole(chain) else ANYTHING
            for chain in reach.chains(address, entry, place)
        ]
        allowed.setdefault(out_of(entry)[1], set()).update(one for one in options if one)
    recorded = {out_of(entry)[1] for _, entry, _ in reach.models()}
    for md5, signatures in told.items():
        for said, commits in signatures:
            if md5 not in recorded and md5 in reach.log.weights and commits == [""] and reach.exists(md5):
                allowed.setdefault(md5, set()).add(ANYTHING)  # only its bytes are left
            if not agrees(said, allowed.get(md5, set())):
                problems.append(f"not true: {md5} {said}; possible are {allowed.get(md5)}")
            elif set(commits) <= set(reach.commits) and not any(agrees(said, at_commit(reach, md5, one, names, source)) for one in commits):
                problems.append(f"not true at {commits}: {md5} {said}")
        for commit in {one for _, commits in signatures for one in commits if one in reach.commits}:
            if not any(agrees(said, at_commit(reach, md5, commit, names, source)) for said, commits in signatures if commit in commits):
                problems.append(
                    f"not true at {commit}: {md5} {signatures}; there possible are {at_commit(reach, md5, commit, names, source)}"
                )
    certain = any(
        reach.signature(chain, names(chain), source)
        for _, entry, _ in reach.models()
        for chain in reach.log.ran[canonical(entry)]
        if reach.whole(chain) and reach.recorded(chain)
    )
    possible = any(allowed.values())
    if not reach.incomplete and (unknown or found["verdict"] == "cannot tell"):
        problems.append(f"nothing is missing, but it says {found['verdict']} and unknown: {found['unknown']}")
    verdict = found["verdict"]
    if verdict == "refused" and certain and not reach.incomplete:
        problems.append(f"refused, but models saw it: {found['error']}")
    if (verdict == "yes" and not possible) or (verdict == "no" and certain) or (verdict == "cannot tell" and not reach.incomplete):
        problems.append(
            f"the verdict is {verdict}, unknown are {found['unknown']}, but models that saw it: {'some' if certain else 'none'}"
        )
    if problems:
        raise Wrong(f"impact {question}:\n  " + "\n  ".join(problems))


ANYTHING: Signature = ("", "", (), ())


def shown(seen: dict[str, Any], source: bool) -> Signature:
    if source:
        learnt = seen.get("learnt")
        steps: Any = (learnt["records"], learnt["first_step"], learnt["last_step"]) if learnt and learnt["records"] else ()
    else:
        steps = None if seen["steps"] is None else tuple(sorted(seen["steps"]))
    return (seen["by"], seen["md5"], tuple(sorted(seen["splits"].items())), steps)


def agrees(one: Signature, allowed: set[Signature]) -> bool:
    """Whether it is one of those allowed; steps may be unknown, and splits too if the data are gone."""
    return (
        ANYTHING in allowed
        or any(one[:2] == other[:2] and one[2] in {other[2], ()} and one[3] in {other[3], None} for other in allowed)
        or one in allowed
    )


def at_commit(reach: Reach, md5: str, commit: str, names: Names, source: bool) -> set[Signature]:
    found = set()
    for address, entry in reach.lock_at(commit).items():
        if address.partition("@")[0] in MODELS and out_of(entry)[1] == md5:
            place = next(place for place in reach.places if place.name == commit)
            chains = reach.chains(address, entry, place)
            if not all(reach.whole(chain) for chain in chains):
                return {ANYTHING}
            found |= {one for chain in chains if (one := reach.signature(chain, names(chain), source))}
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
    yield containing(draw.choice([draw.choice(NAMES), "saw the", *draw.choice(texts[chosen])[:40].split()[:1]]).lower() or "nothing")
    copies = sorted({copy for found in log.parent_of.values() for copy in found})
    if copies:
        copy = draw.choice(copies)
        yield record(copy)
        yield record(next(found[copy] for found in log.parent_of.values() if copy in found))
        yield source(PARAPHRASES)
    paths = sorted({path for facts in log.sources.values() for path in facts})
    for path in draw.sample(paths, min(3, len(paths))):
        yield source(path)
    yield source(draw.choice([SOURCES, f"{SOURCES}/team"]))
    yield sha256(draw.choice(sorted({facts["sha256"] for found in log.sources.values() for facts in found.values()})))


def fold(text: str) -> str:
    return " ".join(text.lower().split())


def plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


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
        raise Wrong(f"audit {address} at {rev} ({len(chains)} possible lineages):\n  " + "\n  ".join(min(complaints, key=len)))


def audit_problems(reach: Reach, found: dict[str, Any], subject: Any, chain: Chain, place: str) -> list[str]:
    address = next(iter(chain))
    problems = []

    def same(what: str, said: Any, wanted: Any) -> None:
        if said != wanted:
            problems.append(f"{what}: says {said}, but it is {wanted}")

    same("md5", found["model"]["md5"], out_of(chain[address])[1])
    for one, entry in chain.items():
        same(f"output of {one}", found["stages"].get(one, {}).get("md5"), out_of(entry)[1])
    missing = bool(found["missing"]) and reach.incomplete
    if found["missing"] and not reach.incomplete:
        problems.append(f"nothing is missing, but it names {found['missing']}")
    if {"raw_examples", "splits"} <= chain.keys():
        facts = reach.facts(chain)
        if not missing or found["sources"]:
            same("sources", set(found["sources"]), set(facts))
        for path in facts.keys() & found["sources"].keys():
            for key, value in facts[path].items():
                same(f"{path}: {key}", found["sources"][path].get(key), value)
            for stage in ("instructions", "splits"):
                counted = reach.log.outcomes[str(reach.of(chain, stage))].get(path)
                said = found["sources"][path]["outcomes"].get(stage)
                if not (said is None and reach.incomplete):
                    same(f"{path}: outcomes of {stage}", said, counted)
    made = reach.adapter(chain)
    if made:
        table, _ = trained_on(subject)
        if table is None:
            if not reach.incomplete:
                problems.append("the training record exists, but the records are unknown")
        else:
            rows = table.to_pylist()
            same("records", [(row["step"], row["epoch"], row["example_id"]) for row in rows], reach.log.steps[out_of(made[1])[1]])
            if reach.whole(chain):
                owners = reach.records_of_sources(chain)
                for row in rows:
                    if row["source"] is None and reach.incomplete:
                        continue
                    if row["example_id"] not in owners.get(row["source"], set()):
                        problems.append(f"{row['example_id']} is not of {row['source']}")
    problems += code_problems(reach, found["code"], chain, place)
    return problems


def code_problems(reach: Reach, code: dict[str, Any], chain: Chain, place: str) -> list[str]:
    """The commit holds the model, and it is clean exactly if its code and parameters are those that ran."""
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
            problems.append(f"code of {address}: says clean {claimed} at {at}, but there {differing or 'nothing'} differs")
    clean &= all(one["clean"] for name, one in code["stages"].items() if name not in chain)  # of what it was compared with
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
            below = {name.removeprefix(f"{path}/"): value for name, value in files.items() if name.startswith(f"{path}/")}
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
    sides = []
    for address, commit in (before, after):
        place = next(one for one in reach.places if one.name == commit)
        chains = reach.chains(address, place.lock[address], place)
        if not all(reach.whole(chain) for chain in chains):
            return
        sides.append({canonical(reach.splits(chain)): (reach.splits(chain), reach.facts(chain)) for chain in chains})
    found = diff(reach.root, before[0], after[0], rev=before[1], against_rev=after[1])
    if found["records"] is None:
        if reach.incomplete:
            return
        raise Wrong(f"diff {before} {after}: the records are unknown, but nothing is missing")
    told = (
        {one["example_id"] for one in found["records"]["added"]} | {one["after"]["example_id"] for one in found["records"]["changed"]},
        {one["example_id"] for one in found["records"]["removed"]} | {one["before"]["example_id"] for one in found["records"]["changed"]},
        {one["after"]["example_id"] for one in found["records"]["moved"]},
    )
    wanted = []
    for old, _ in sides[0].values():
        for new, _ in sides[1].values():
            wanted.append(
                (new.keys() - old.keys(), old.keys() - new.keys(), {name for name in old.keys() & new.keys() if old[name] != new[name]})
            )
    if told not in wanted:
        raise Wrong(f"diff {before} {after}: says added, removed, moved {told}; possible are {wanted}")


# --- exports


def compare_export(reach: Reach, address: str, rev: str | None) -> None:
    """Compare the exports of a model at a revision with its lineage, and with what they were when they were asked for before."""
    place = next(one for one in reach.places if one.name == (rev or WORKSPACE))
    chains = reach.chains(address, place.lock[address], place)
    md5 = out_of(place.lock[address])[1]
    try:
        texts = {
            form: export(reach.root, address, form, rev, None if reach.holders(md5) else date(2026, 1, 1))
            for form in ("cyclonedx", "openlineage", "model-card")
        }
    except InputError as error:
        if reach.incomplete:
            return
        raise Wrong(f"export {address} at {rev}: refused: {error}") from error
    complaints = [export_problems(reach, texts, chain) for chain in chains if reach.whole(chain)]
    if complaints and all(complaints):
        raise Wrong(f"export {address} at {rev} ({len(chains)} possible lineages):\n  " + "\n  ".join(min(complaints, key=len)))
    if rev and not reach.incomplete:
        holders = [one for one in reach.holders(md5) if one in reach.reachable]
        before = reach.toy.exported.setdefault((rev, address), (holders, texts))
        if before[0] == holders[len(holders) - len(before[0]) :] and before[1] != texts:
            forms = [form for form in texts if texts[form] != before[1][form]]
            raise Wrong(f"export {address} at {rev}: not the text that it was before: {forms}\n{before[1][forms[0]]}\n{texts[forms[0]]}")


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
        if not any(one.startswith(line) and fact["sha256"] in one and fact["license"] in one for one in texts["model-card"].splitlines()):
            problems += [] if reach.incomplete else [f"model card: no line for {path} with {fact}"]
    events = [json.loads(line) for line in texts["openlineage"].splitlines()]
    for event in (one for one in events if one["eventType"] == "COMPLETE" and one["job"]["name"] in chain):
        entry = chain[event["job"]["name"]]
        path, value = out_of(entry)
        hashes = {one["name"]: one["facets"].get("contentHash", {}) for one in [*event["inputs"], *event["outputs"]]}
        if hashes.get(path, {}).get("md5") != value:
            problems.append(f"openlineage: output of {event['job']['name']} is {hashes.get(path)}, but it was {value}")
        read = {one["path"]: one["md5"] for one in entry["deps"]} | {name: fact["sha256"] for name, fact in facts.items()}
        for name, found in hashes.items():
            if name in read and read[name] not in found.values():
                problems.append(f"openlineage: {event['job']['name']} read {name} as {found}, but it was {read[name]}")
        tags = {one["key"]: one["value"] for one in event["run"]["facets"].get("tags", {}).get("tags", [])}
        if "commit" in tags and tags["commit"] not in reach.holders_of_entry(entry):
            problems.append(f"openlineage: {event['job']['name']} is said to be recorded in {tags['commit']}, which has no such run")
    return problems


# --- histories


def check(reach: Reach, draw: random.Random) -> None:
    """Ask random questions and compare the answers.

    Raises:
        Wrong: an answer is wrong.
    """
    for question, names, source in questions(reach, draw):
        try:
            compare_impact(reach, question, names, source)
        except TooManyLineages:
            continue
    known = [(address, place.name) for place in reach.places for address in place.lock if address.partition("@")[0] in MODELS]
    for address, name in draw.sample(known, min(4, len(known))):
        try:
            compare_audit(reach, address, None if name == WORKSPACE else name)
            if draw.random() < 0.4:
                compare_export(reach, address, None if name == WORKSPACE else name)
        except TooManyLineages:
            continue
    reach.remember()
    committed = [one for one in known if one[1] != WORKSPACE]
    if len(committed) > 1:
        try:
            compare_diff(reach, *draw.sample(committed, 2))
        except TooManyLineages:
            return


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
        raise Wrong(f"seed {seed} ({'real' if toy.real else 'simulated'} stages):\n  {done}\n{type(error).__name__}: {error}") from error


@pytest.mark.parametrize("seed", range(12))
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
    toy.write_params(toy.params() | {"splits": {**toy.params()["splits"], "augment": {"paraphrases": PARAPHRASES, "license": "MIT"}}})
    toy.repro()
    toy.commit()
    first, second = (impact(toy.root, source=path)["models"][-1]["seen"] for path in (faq, mail))
    assert (
        first == second
        and first[0]["splits"]["train"] == 2 * impact(toy.root, source=PARAPHRASES)["models"][-1]["seen"][0]["splits"]["train"]
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
        if (seed - first + 1) % 50 == 0:
            print(f"{seed - first + 1} histories, {len(wrong)} with a wrong answer, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{seed - first + 1} histories from seed {first}, wrong: {wrong or 'none'}", flush=True)
    return len(wrong)


if __name__ == "__main__":
    count, first = int(os.environ.get("PEDIGREE_HISTORIES", "3000")), int(os.environ.get("PEDIGREE_SEED", "0"))
    sys.exit(bool(soak(count, first, "--keep-going" in sys.argv)))
