"""A published id leads back to its record, and a released folder adds no record of its own."""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, entry, identity, table
from builders.small_pipeline import git
from conftest import pedigree

from dagster_project.cli.arguments import warn_of_erasure
from dagster_project.core.hashing import md5_of_folder
from dagster_project.curation.sources.erased import key_id, record_mark
from dagster_project.lineage.erasure import tombstones
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import audit
from dagster_project.lineage.published import key_files
from dagster_project.lineage.unfinished_erasure import FILE
from dagster_project.training.trainers.harness.weight_audit import seen_schema

ROWS = [
    ("cats", "train", "data/sources/faq.jsonl"),
    ("dogs", "train", "data/sources/mail.jsonl"),
    ("fish", "test", "data/sources/faq.jsonl"),
]
KEYS = (bytes(range(32)), bytes(range(1, 33)))


def published(key: bytes, text: str) -> str:
    return hmac.new(key, identity(text).encode(), hashlib.sha256).hexdigest()[:32]


@pytest.fixture
def made(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def set_key(project: Project, key: bytes) -> None:
    (project.root / "data/keys").mkdir(parents=True, exist_ok=True)
    (project.root / "data/keys/record_ids.key").write_text(key.hex() + "\n")


def release(project: Project, lock: dict[str, Any], key: bytes, beside: tuple[str, ...] = ()) -> dict[str, Any]:
    """A released copy of merged@lora with the evidence of its training under published ids.

    Args:
        beside: empty files in the folder of the key.
    """
    merged = lock["merged@lora"]["outs"][0]
    seen = [
        {"step": i + 1, "epoch": 1, "position": 0, "example_id": published(key, text)}
        for i, text in enumerate(("cats", "dogs"))
    ]
    weights = lock["adapter@lora"]["outs"][0]["md5"].encode()  # as Project.merged writes them
    files = {
        "model.safetensors": weights,
        "README.md": b"card",
        "audit/adapter_lora/examples.parquet": table(seen, seen_schema()),
    }
    empty = dict.fromkeys(beside, hashlib.md5(b"").hexdigest())
    keys = md5_of_folder({"record_ids.key": hashlib.md5(f"{key.hex()}\n".encode()).hexdigest(), **empty})
    return {"release": entry("release", {"data/keys": keys, "data/merged/lora": merged["md5"]}, project.put(files))}


def answers(project: Project) -> dict[str, Any]:
    return {text: impact(project.root, record=identity(text)) for text in ("cats", "dogs", "fish", "cows")} | {
        "text": impact(project.root, text="All about dogs."),
        "source": impact(project.root, source="data/sources/faq.jsonl"),
    }


def test_a_published_id_gives_the_answer_of_its_record_and_names_it(made: Project) -> None:
    set_key(made, KEYS[0])
    made.commit(made.lock(ROWS))
    for text, _, _ in ROWS:
        asked = published(KEYS[0], text)
        found, plain = impact(made.root, record=asked), impact(made.root, record=identity(text))
        assert found.pop("published") == {"id": asked, "record": identity(text)} and "published" not in plain
        assert found.pop("asked") == {"record": asked} and plain.pop("asked")
        assert found == plain and found["models"] and found["records"] == [identity(text)]
        assert f"published id of record {identity(text)}" in as_text(impact(made.root, record=asked))


def test_ids_published_with_an_earlier_key_lead_back_too(made: Project) -> None:
    set_key(made, KEYS[0])
    made.commit(made.lock(ROWS))
    set_key(made, KEYS[1])
    for key in KEYS:
        assert impact(made.root, record=published(key, "cats"))["published"]["record"] == identity("cats")
    assert "published" not in impact(made.root, record=published(bytes(32), "cats"))


def test_a_key_of_a_branch_whose_merge_kept_another_one_leads_back_too(made: Project, tmp_path: Path) -> None:
    set_key(made, KEYS[0])
    made.commit(made.lock(ROWS))
    git(made.root, "checkout", "-q", "-b", "side")
    set_key(made, KEYS[1])
    made.commit({}, "another key")
    git(made.root, "checkout", "-q", "main")
    made.commit({}, "elsewhere")
    git(made.root, "merge", "-q", "-s", "ours", "-m", "merge", "side")
    git(made.root, "branch", "-D", "side")
    git(tmp_path, "clone", "-q", str(made.root), "clone")  # without the reflog
    assert len(key_files(tmp_path / "clone")) == 2


@pytest.mark.parametrize("content", [None, "", "no key"])
def test_without_a_key_a_published_id_is_like_any_unknown_one(content: str | None, made: Project) -> None:
    made.commit(made.lock(ROWS))
    if content is not None:
        set_key(made, KEYS[0])
        (made.root / "data/keys/record_ids.key").write_text(content)
    found = impact(made.root, record=published(KEYS[0], "cats"))
    assert found["models"] == [] and "published" not in found
    assert impact(made.root, record=identity("cats"))["models"]


def test_an_id_that_a_missing_key_may_have_published_cannot_be_told(made: Project) -> None:
    """The key is ignored by git, and was replaced after the release."""
    (made.root / ".gitignore").write_text("/.dvc/cache\n/.dvc/tmp\n/data/keys\n")
    set_key(made, KEYS[0])
    lock = made.lock(ROWS)
    made.commit(lock | release(made, lock, KEYS[0]))
    assert impact(made.root, record=published(KEYS[0], "cats"))["verdict"] == "yes"
    assert impact(made.root, record=published(KEYS[0], "cats").upper())["verdict"] == "yes"
    assert impact(made.root, record=identity("nobody"))["verdict"] == "no"
    set_key(made, KEYS[1])
    answer = impact(made.root, record=published(KEYS[0], "cats"))
    assert (answer["verdict"], [run["stage"] for run in answer["unknown"]]) == ("cannot tell", ["release"])
    assert "restore data/keys/record_ids.key" in as_text(answer)
    assert impact(made.root, record=identity("cats"))["verdict"] == "yes"


@pytest.mark.parametrize(("beside", "is_kept"), [((".gitkeep",), True), ((".gitkeep",), False), (("NOTE", "x"), True)])
def test_other_files_in_the_folder_of_the_key_do_not_hide_it(
    made: Project, beside: tuple[str, ...], is_kept: bool
) -> None:
    """`pedigree init` puts an empty file into it, by which git keeps the folder."""
    (made.root / ".gitignore").write_text("/.dvc/cache\n/.dvc/tmp\n/data/keys\n")
    set_key(made, KEYS[0])
    for name in beside if is_kept else ():
        (made.root / "data/keys" / name).touch()
    lock = made.lock(ROWS)
    made.commit(lock | release(made, lock, KEYS[0], beside))
    assert impact(made.root, record=identity("nobody"))["verdict"] == "no"
    set_key(made, KEYS[1])
    assert impact(made.root, record=identity("nobody"))["verdict"] == "cannot tell"


def test_a_release_adds_itself_to_the_answers_and_nothing_else(made: Project) -> None:
    set_key(made, KEYS[0])
    lock = made.lock(ROWS)
    made.commit(lock)
    before = answers(made)
    released = release(made, lock, KEYS[0])
    made.write(lock | released)
    after = answers(made)
    for name, found in after.items():
        models = [{**model, "commits": None} for model in found["models"] if model["stage"] != "release"]
        copies = [model for model in found["models"] if model["stage"] == "release"]
        earlier = [{**model, "commits": None} for model in before[name]["models"]]
        assert {**found, "models": models, "looked_at": None} == {**before[name], "models": earlier, "looked_at": None}
        assert [copy["seen"] for copy in copies] == [
            model["seen"] for model in models if model["stage"] == "merged@lora"
        ], name
    known = {key[i : i + 16].hex() for key in Index(made.root).record_keys() for i in range(0, len(key), 16)}
    assert known == {identity(text) for text, _, _ in ROWS}


def test_a_copy_of_the_released_folder_is_audited_as_the_release(made: Project, tmp_path: Path) -> None:
    set_key(made, KEYS[0])
    lock = made.lock(ROWS)
    made.commit(lock | release(made, lock, KEYS[0]))
    expected = audit(made.root, "release")
    assert expected["records"]["records"] == 2 and expected["parents"][0]["stage"] == "adapter@lora"
    index = Index(made.root)
    copy = tmp_path / "sent by mail"
    for name, md5 in index.files(expected["model"]["md5"]).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(index.objects.path(md5), copy / name)
    assert audit(made.root, str(copy)) == expected


def test_the_command_says_which_record_it_is(made: Project) -> None:
    set_key(made, KEYS[0])
    made.commit(made.lock(ROWS))
    done = pedigree(made.root, "impact", "--record", published(KEYS[0], "dogs"), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["published"]["record"] == identity("dogs")
    done = pedigree(made.root, "impact", "--record", published(KEYS[0], "dogs"))
    assert (
        f"published id of record {identity('dogs')}" in done.stdout and KEYS[0].hex() not in done.stdout + done.stderr
    )


def test_of_an_erased_record_no_model_is_known_any_more(made: Project) -> None:
    """The models that had seen it are deleted, or forgotten by the index."""
    made.commit(made.lock(ROWS))
    assert "no model saw it" in as_text(impact(made.root, record=identity("cows")))
    set_key(made, KEYS[0])
    stone = {"record": record_mark(KEYS[0], identity("cows")), "texts": []}
    tombstones.add(made.root, [stone], {"key": key_id(KEYS[0]), "date": "2026-01-01"})
    found = impact(made.root, record=identity("cows"))
    assert (found["verdict"], found["erased"]) == ("no", "2026-01-01")
    assert "no model is known any more to have seen it" in as_text(found) and "no model saw it" not in as_text(found)
    assert "data/erasures lists the models" in as_text(found)


def test_of_an_erasure_that_is_unfinished_no_certificate_is_promised(
    made: Project, caplog: pytest.LogCaptureFixture
) -> None:
    made.commit(made.lock(ROWS))
    set_key(made, KEYS[0])
    stone = {"record": record_mark(KEYS[0], identity("cows")), "texts": []}
    tombstones.add(made.root, [stone], {"key": key_id(KEYS[0]), "date": "2026-01-01"})
    warn_of_erasure(made.root)
    assert not caplog.messages
    (made.root / FILE).parent.mkdir(parents=True)
    (made.root / FILE).write_text("{}")
    shown = as_text(impact(made.root, record=identity("cows")))
    assert "taken out of the sources on 2026-01-01, but an erasure is unfinished" in shown
    assert "data/erasures" not in shown and "`pedigree erase --resume` goes on" in shown
    done = pedigree(made.root, "audit", "merged@lora")
    assert done.returncode == 0 and "an erasure is unfinished" in done.stderr
