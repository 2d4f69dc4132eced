"""`pedigree erase` in a small project whose data stages have run: nothing of the record is left in any byte, everything
else stays, and an erasure that is interrupted in four steps ends as one that is not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.erasure_oracle import blobs_with, files, traces
from builders.files import jsonl
from builders.project_data import messages as ticket
from builders.small_pipeline import commit
from conftest import dvc, edit_params, run

from dagster_project.commands.erase import dry_run, dry_run_text, erase, exit_code
from dagster_project.core.errors import InputError
from dagster_project.core.published_ids import published_id
from dagster_project.core.records import read_ledger, read_records
from dagster_project.lineage.erasure.records import Request
from dagster_project.lineage.signing.envelope import unseal
from dagster_project.lineage.signing.keys import private_key
from dagster_project.orchestration.erasure.steps import Erasure
from dagster_project.pipeline import validate

PROMPT = (
    "Zephyrine Okonkwo says the cobalt lantern from order 8817 arrived without its wick and nobody answers her letters."
)
ANSWER = '{"summary": "lantern without wick", "category": "delivery", "priority": "normal"}'
WORDS = ["zephyrine", "okonkwo", "cobalt lantern", "lantern without wick"]
KEY = "5f" * 32
STAGES = ("tokenized", "raw_preferences")


def plant(root: Path) -> None:
    """The record, in train, with copies and relatives, in what is read and what was left behind."""
    for name in ("tests", "docs", "benchmarks", "examples", "deploy"):  # this file quotes the record
        shutil.rmtree(root / name)
    others = [
        ticket(
            f"Ticket {i} asks where parcel number {i * 37} went after Monday.",
            f'{{"summary": "where is {i}", "category": "delivery"}}',
        )
        for i in range(8)
    ]
    jsonl(root / "data/sources/planted.jsonl", *others[:3], ticket(PROMPT, ANSWER), *others[3:])
    jsonl(
        root / "data/sources/copies.jsonl",
        ticket(PROMPT.upper(), ANSWER),
        ticket("Is the shop open on Sunday in May?", '{"summary": "hours"}'),
    )
    jsonl(
        root / "data/sources/pairs.jsonl",
        {"prompt": PROMPT, "chosen": "We will look.", "rejected": "No."},
        {"prompt": "Hi", "chosen": "Yes?", "rejected": "What?"},
    )
    jsonl(
        root / "data/sources/paraphrases/p.jsonl",
        {"prompt": PROMPT, "paraphrase": "Lady Okonkwo got a lantern of cobalt but no wick."},
        {"prompt": "Hi", "paraphrase": "Hey"},
    )
    (root / "data/keys/record_ids.key").write_text(KEY)

    def change(values: dict[str, Any]) -> None:
        license = {"license": "MIT"}
        values["raw_examples"] = {
            "sources": [{"path": f"data/sources/{name}.jsonl", **license} for name in ("planted", "copies")]
        }
        values["raw_preferences"] = {"sources": [{"path": "data/sources/pairs.jsonl", **license}]}
        values["instructions"] |= {"expectations": None}
        values["splits"] = {"test": 0.0, "validation": 0.1}

    edit_params(root, change)


CACHES = (
    ".dvc/tmp/pedigree/gradients/0a/gradients-00000.safetensors",
    ".dvc/tmp/pedigree/proofs/0a/0b/adapter_model.safetensors",
    ".dvc/tmp/pedigree/judge/0a.json",
    "data/pages/why/0a.html",
)
"""What `pedigree why` and `pedigree judge` keep."""


def leave_behind(root: Path, ids: list[str]) -> None:
    """What earlier runs can have left."""
    for name in (
        "data/pages/old/report.html",
        ".dvc/tmp/pedigree/checkpoints/lora/state.json",
        ".dagster/storage/run/compute_logs/a.err",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<td>{PROMPT}</td>" + "\n".join(ids))
    for name in CACHES:  # numbers, in which no search finds a record
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\x00\x3c" * 8)
    (root / ".dagster/history").mkdir()
    with sqlite3.connect(root / ".dagster/history/index.db") as db:
        db.execute("CREATE TABLE event_logs (id INTEGER PRIMARY KEY, event TEXT)")
        db.executemany(
            "INSERT INTO event_logs (event) VALUES (?)",
            [(json.dumps({"examples": [text]}),) for text in (PROMPT, "fine")],
        )
    db.close()


@pytest.fixture
def made(project: Path) -> Path:
    plant(project)
    (project / ".gitignore").open("a").write("\n/store\n")
    assert dvc(project, "remote", "add", "-d", "store", "store").returncode == 0
    commit(project, "planted")
    done = dvc(project, "repro", *STAGES)
    assert done.returncode == 0, done.stderr + done.stdout
    assert dvc(project, "push", "-q", "--run-cache").returncode == 0
    commit(project, "ran")
    return project


def contents(root: Path) -> dict[str, str]:
    """Path -> hash of what must be the same, however the erasure went: all but
    scratch files, and files of SQLite and logs of runs."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files(root)
        if not path.is_relative_to(root / ".dvc/tmp") and not path.is_relative_to(root / "data/pages")
    }


def interrupted(step: Callable[[Erasure], None]) -> Callable[[Erasure], None]:
    """A step after whose work the process ends, before it is noted as done."""

    def call(self: Erasure) -> None:
        step(self)
        raise KeyboardInterrupt

    call.__name__ = step.__name__
    return call


@pytest.mark.long
def test_nothing_of_an_erased_record_is_left_and_all_else_stays(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    raw = {
        row["source_row"]: row["example_id"]
        for row in read_ledger(made / "data/raw_examples")
        if row["source"].endswith("planted.jsonl")
    }
    ids = [raw[3], published_id(bytes.fromhex(KEY), raw[3])]
    leave_behind(made, ids)
    tokens = [tiny_tokenizer(" Zephyrine Okonkwo", add_special_tokens=False)["input_ids"][1:]]
    kept = {
        path: (made / path).read_bytes()
        for path in ("data/sources/benchmarks/general_knowledge.jsonl", "params.yaml", "README.md")
    }
    before = traces(made, WORDS, ids, tokens)
    for place in (
        "data/sources/",
        "data/tokenized/",
        "data/pages/",
        ".dvc/cache/files/",
        ".dvc/tmp/",
        ".dagster/history",
        ".dagster/storage",
        "store/files/",
    ):
        assert any(path.startswith(place) for path in before), place

    unread = made / "other/dvc.lock"  # a pipeline in a subfolder, of which nothing is known
    unread.parent.mkdir()
    unread.write_text(
        '{"schema": "2.0", "stages": {"x": {"cmd": "x", "outs": [{"path": "x", "md5": "%s"}]}}}' % ("1" * 32)
    )
    plan = dry_run(made, Request(records=(raw[3],)), [], [], "")
    shutil.rmtree(unread.parent)
    assert plan["unreadable"] == ["the pipeline of other/dvc.lock"]
    assert "unknown, as it cannot be read: the pipeline of other/dvc.lock" in dry_run_text(plan)
    rows = {path: change["rows"] for path, change in plan["sources"].items()}
    assert rows == {
        "data/sources/planted.jsonl": [3],
        "data/sources/copies.jsonl": [0],
        "data/sources/pairs.jsonl": [0],
        "data/sources/paraphrases/p.jsonl": [0],
    }
    assert traces(made, WORDS, ids, tokens)[:3] == before[:3] and plan["models"] == []
    assert set(plan["places"]) >= {
        "sources",
        "outputs",
        "pages",
        "scratch files",
        "DVC cache",
        "audit index",
        "Dagster",
        "remote store",
        "git history",
    }

    key = tmp_path / "key.pem"
    run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], tmp_path)
    request = Request(records=(raw[3],))
    steps = ("sources", "pipeline", "cache", "dagster")
    other = tmp_path / "uninterrupted"
    for name in steps:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Erasure, name, interrupted(getattr(Erasure, name)))
            erase(made, request, [], [], "request 7", str(key), validate, False)
        if name == "pipeline":
            shutil.copytree(made, other, symlinks=True)
    with pytest.raises(InputError, match="another erasure"):
        erase(made, Request(containing=("Sunday",)), [], [], "", None, validate, False)
    document = erase(made, request, [], [], "request 7", str(key), validate, False)
    straight = erase(other, None, [], [], "", str(key), validate, False)
    assert {**document, "files": {}} == {**straight, "files": {}}
    assert contents(made) == contents(other)

    assert traces(made, WORDS, ids, tokens) == []
    assert not any((made / name).exists() for name in CACHES)
    assert exit_code(document) == 0 and document["impact"] == "no" and {*document["left"]} == {"git history"}
    assert {*(made / document["files"]["blobs of git history"]).read_text().split()} >= blobs_with(
        made, "cobalt lantern from order"
    )
    assert {path: (made / path).read_bytes() for path in kept} == kept
    assert len(read_records(made / "data/raw_examples")) == 9 and len(read_records(made / "data/raw_preferences")) == 1
    assert {row["example_id"] for row in read_records(made / "data/raw_examples")} == {
        one for row, one in raw.items() if row != 3
    } | {row["example_id"] for row in read_ledger(made / "data/raw_examples") if row["source"].endswith("copies.jsonl")}
    with sqlite3.connect(made / ".dagster/history/index.db") as db:
        assert db.execute("SELECT event FROM event_logs").fetchall() == [('{"examples": ["fine"]}',)]
    statement = unseal(json.loads((made / document["files"]["signature"]).read_bytes()), private_key(str(key)).public)
    certificate = made / document["files"]["certificate"]
    assert statement["subject"][0]["digest"]["sha256"] == hashlib.sha256(certificate.read_bytes()).hexdigest()
    assert statement["predicate"] == json.loads(certificate.read_bytes())
    with pytest.raises(InputError, match="no unfinished erasure"):
        erase(made, None, [], [], "", None, validate, False)


KILLS = int(os.environ.get("PEDIGREE_ERASE_KILLS", "0"))
STEPS = [
    str(step.__doc__).partition(".")[0]
    for step in (Erasure.sources, Erasure.tombstones, Erasure.pipeline, Erasure.cache, Erasure.dagster)
]
"""What the command prints when it begins each of these steps."""


def erased(root: Path, *arguments: str, step: str = "", after: float = 0.0) -> tuple[int, dict[str, float]]:
    """Run `pedigree erase`, and kill its process group some seconds after a step began.

    Args:
        step: empty: the start of the command.
        after: seconds; 0: it is not killed.
    Returns:
        Exit code, and seconds from the start of the command to each step.
    """
    command = [sys.executable, "-m", "dagster_project", "erase", *arguments]
    environment = {**os.environ, "DAGSTER_HOME": str(root / ".dagster")}
    began, steps = time.monotonic(), {}
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(after, os.killpg, (process.pid, signal.SIGKILL))
    armed = bool(after) and not step
    if armed:
        timer.start()
    assert process.stderr
    for line in process.stderr:
        for name in (one for one in STEPS if f"erase: {one}" in line):
            steps[name] = time.monotonic() - began
            if after and not armed and STEPS.index(name) >= STEPS.index(step):  # it may have been done already
                armed = True
                timer.start()
    code = process.wait()
    timer.cancel()
    return code, steps


def remains(root: Path) -> dict[str, str]:
    """The part of `contents` that no interruption may change: the work tree
    without certificates, which count what was removed."""
    return {
        path: hashed
        for path, hashed in contents(root).items()
        if path.startswith(("data/", "dvc.lock", "params.yaml")) and "/erasures" not in path
    }


@pytest.mark.skipif(not KILLS, reason="set PEDIGREE_ERASE_KILLS to a number of interruptions")
def test_an_erasure_that_is_killed_at_random_moments_ends_like_one_that_is_not(made: Path, tmp_path: Path) -> None:
    rng = random.Random(KILLS)
    [identity] = [
        row["example_id"]
        for row in read_ledger(made / "data/raw_examples")
        if row["source"].endswith("planted.jsonl") and row["source_row"] == 3
    ]
    leave_behind(made, [identity])
    other = tmp_path / "uninterrupted"
    shutil.copytree(made, other, symlinks=True)
    began = time.monotonic()
    code, steps = erased(other, "--record", identity)
    ends = [*list(steps.values())[1:], time.monotonic() - began]
    assert code == 0 and list(steps) == STEPS
    lengths = {
        "": steps[STEPS[0]],
        **{step: end - start for (step, start), end in zip(steps.items(), ends, strict=True)},
    }
    killed = 0
    for number in range(KILLS):
        step = ["", *STEPS][number * (len(STEPS) + 1) // KILLS]
        unfinished = (made / ".dvc/tmp/pedigree/erase/plan.json").is_file()
        given = ("--resume",) if unfinished else ("--record", identity)
        code, _ = erased(made, *given, step=step, after=rng.uniform(0.001, lengths[step]))
        killed += code == -signal.SIGKILL
        if code == 0:
            break
    assert killed >= KILLS // 2
    if code:
        assert erased(made, "--resume")[0] == 0
    assert traces(made, WORDS, [identity, published_id(bytes.fromhex(KEY), identity)]) == []
    assert remains(made) == remains(other)
