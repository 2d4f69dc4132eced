"""Questions that an audit once answered wrongly, each over a small hand-made history."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sqlite3
import subprocess
import threading
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders.history import DVC_YAML, Project, entry, identity, md5, out, table
from builders.small_pipeline import git
from conftest import pedigree

from dagster_project.commands.verify import verify
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.records import REWARD_METHODS, ledger_schema
from dagster_project.lineage import database
from dagster_project.lineage.diff import diff
from dagster_project.lineage.export.answers import training_records
from dagster_project.lineage.export.export import issue_date, summarize
from dagster_project.lineage.export.model_card import model_card
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import as_text as audit_text
from dagster_project.lineage.lineage import audit, document, find, listed, trained_on, training_lines
from dagster_project.lineage.runs import Entry, Resolver, StageRun
from dagster_project.training.trainers.alignment.preference import METHODS
from dagster_project.views.lineage import lineage_page

pytestmark = pytest.mark.usefixtures("warm_small")

FAQ, MAIL, COPY = "data/sources/faq.jsonl", "data/sources/mail.jsonl", "data/sources/copy.jsonl"
ROWS = [("cats", "train", FAQ), ("dogs", "train", MAIL), ("birds", "validation", FAQ), ("fish", "test", MAIL)]
TRAINED = ["cats", "dogs"]


@pytest.fixture
def made(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def stages(found: dict[str, Any]) -> list[str]:
    return [model["stage"] for model in found["models"]]


def test_a_stage_that_did_not_run_again_keeps_its_own_commit_and_the_model_is_clean(made: Project) -> None:
    """Day one: an entry that stayed the same is in many locks, and each stage's
    code is compared with the commit of its own run."""
    lock = made.trained(made.curated(ROWS), TRAINED)
    for name, version in (("instructions", "1"), ("adapter@lora", "1")):
        code = made.root / "dagster_project" / f"{name.partition('@')[0]}.py"
        code.parent.mkdir(exist_ok=True)
        code.write_text(version)
        lock[name]["deps"].append(
            {"path": code.relative_to(made.root).as_posix(), "hash": "md5", "md5": md5(version.encode())}
        )
    first = made.commit(lock)
    (made.root / "dagster_project" / "adapter.py").write_text("2")
    again = made.trained({name: lock[name] for name in ("instructions", "splits", "tokenized")}, TRAINED, seed=1)
    again["adapter@lora"]["deps"].append({"path": "dagster_project/adapter.py", "hash": "md5", "md5": md5(b"2")})
    second = made.commit(again)
    code = audit(made.root, "merged@lora")["code"]
    assert (code["commit"], code["clean"]) == (second, True) and "differs" not in code
    assert {name: stage["commit"] for name, stage in code["stages"].items()} == {
        "instructions": first, "splits": first, "tokenized": first, "adapter@lora": second, "merged@lora": second,
    }  # fmt: skip
    assert "clean" in audit_text(audit(made.root, "merged@lora"))


def test_a_renamed_source_is_named_by_every_stage_of_the_revision_and_no_other(made: Project) -> None:
    renamed = [(text, split, COPY if source == MAIL else source) for text, split, source in ROWS]
    before = made.trained(made.curated(ROWS), TRAINED)
    first = made.commit(before)
    after = {**made.curated(renamed), **{name: before[name] for name in ("adapter@lora", "merged@lora")}}
    assert after["tokenized"]["outs"] == before["tokenized"]["outs"] and after["tokenized"] != before["tokenized"]
    second = made.commit(after)
    for model in ("adapter@lora", "merged@lora"):
        assert set(audit(made.root, model)["sources"]) == {FAQ, COPY}
        assert set(audit(made.root, model, rev=first)["sources"]) == {FAQ, MAIL}
    for source, commit in ((MAIL, first), (COPY, second)):
        found = impact(made.root, source=source)
        assert stages(found) == ["adapter@lora", "merged@lora"]
        assert [model["commits"] for model in found["models"]] == [[commit], [commit]]


def test_a_source_whose_rows_are_all_copies_of_another_is_credited_with_them(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS, copies=[("cats", COPY), ("birds", COPY)]), TRAINED))
    found = impact(made.root, source=COPY)
    assert stages(found) == ["adapter@lora", "merged@lora"]
    (seen,) = found["models"][0]["seen"]
    assert seen["splits"] == {"train": 1, "validation": 1} and seen["learnt"] == {
        "records": 1,
        "first_step": 1,
        "last_step": 1,
    }
    (own,) = impact(made.root, source=FAQ)["models"][0]["seen"]
    assert own["splits"] == {"train": 1, "validation": 1}
    assert "; 1 record in step 1\n" in pedigree(made.root, "impact", "--source", COPY).stdout


def test_a_paraphrase_of_a_record_is_credited_to_every_source_that_holds_the_record(made: Project) -> None:
    lock = made.curated(ROWS, copies=[("cats", COPY)], paraphrases={"cats": "felines"})
    made.commit(made.trained(lock, ["cats", "dogs", "felines"]))
    for source in (FAQ, COPY):
        assert impact(made.root, source=source)["models"][0]["seen"][0]["splits"]["train"] == 2


def test_the_code_of_a_run_that_is_not_committed_is_not_clean(made: Project) -> None:
    """Its bytes are those of a committed run, whose code was another."""
    lock = made.trained(made.curated(ROWS), TRAINED)
    first = made.commit(lock)
    made.write({**lock, "merged@lora": {**lock["merged@lora"], "cmd": "another command"}})
    code = audit(made.root, "merged@lora")["code"]
    assert (code["commit"], code["clean"], code["uncommitted"], code["after"]) == (first, False, ["merged@lora"], first)
    assert "the runs of merged@lora are uncommitted" in pedigree(made.root, "audit", "merged@lora").stdout
    assert audit(made.root, "merged@lora", rev="HEAD")["code"]["clean"]


def test_a_copy_within_one_source_counts_once(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS, copies=[("cats", FAQ)]), TRAINED))
    (seen,) = impact(made.root, source=FAQ)["models"][0]["seen"]
    assert seen["splits"] == {"train": 1, "validation": 1} and seen["learnt"]["records"] == 1


def test_a_file_of_paraphrases_is_a_source_and_an_original_leads_to_the_steps_of_its_copies(made: Project) -> None:
    file = "data/sources/paraphrases/p.jsonl"
    made.commit(made.trained(made.curated(ROWS, paraphrases={"cats": "felines"}), ["cats", "dogs", "felines"]))
    assert audit(made.root, "merged@lora")["sources"][file]["license"] == "CC-BY-4.0"
    found = impact(made.root, source=file)
    assert stages(found) == ["adapter@lora", "merged@lora"]
    assert found["models"][0]["seen"][0]["learnt"] == {"records": 1, "first_step": 3, "last_step": 3}
    original = impact(made.root, record=identity("cats"))
    assert original["models"][0]["seen"][0]["steps"] == [1, 3] and original["records"] == [
        identity("cats"),
        identity("felines"),
    ]
    assert impact(made.root, record=identity("felines"))["models"][0]["seen"][0]["steps"] == [3]


def test_a_copy_made_in_another_version_of_the_data_does_not_count(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS, paraphrases={"cats": "felines"}), ["dogs", "felines"]))
    later = [("felines", "train", FAQ), *ROWS[1:]]
    second = made.commit(made.trained(made.curated(later), ["felines", "dogs"]))
    found = impact(made.root, record=identity("cats"))
    assert second not in {model["commit"] for model in found["models"]} and len(found["models"]) == 2


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("cats", [], True),
        ("CATS?", [], True),
        ("about   cats", [], True),
        ("at", [], False),  # not between word boundaries
        ("c[ao]ts", ["--regex"], True),
        ("elephants", [], False),
    ],
)
def test_a_part_of_a_message_is_found(made: Project, text: str, options: list[str], found: bool) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    done = pedigree(made.root, "impact", "--containing", text, *options, "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["verdict"]) == ((0, "yes") if found else (1, "no"))
    assert {match["example_id"] for match in answer["matches"]} == ({identity("cats")} if found else set())
    if found:
        assert {(match["role"], match["field"]) for match in answer["matches"]} <= {
            ("user", "content"),
            ("assistant", "content"),
        }


def test_characters_that_are_not_seen_hide_no_part_of_a_message(made: Project) -> None:
    """A soft hyphen of a web page, a zero-width space, a variation selector;
    where they are in the question, too. A zero-width space may also separate."""
    hidden = "Zephy\u00adrine Okon\u200bkwo\ufe0f"
    made.commit(made.trained(made.curated([(hidden, "train", FAQ), *ROWS[1:]]), [hidden, "dogs"]))
    for asked in ("zephyrine okonkwo", "Zephyrine", "Oko\u2060nkwo"):
        [one, *others] = impact(made.root, containing=asked)["matches"]
        assert {match["example_id"] for match in (one, *others)} == {identity(hidden)} and "zephyrine okonkwo" in one[
            "excerpt"
        ]
    assert not impact(made.root, containing="rine")["matches"], "a soft hyphen separates no words"
    assert impact(made.root, containing="Okon")["matches"] and not impact(made.root, containing="adrine")["matches"]
    assert {one["example_id"] for one in impact(made.root, containing="\u200b", regex=True)["matches"]} == {
        identity(hidden)
    }
    with pytest.raises(InputError, match="the text is empty"):
        impact(made.root, containing="\u200b\u00ad")


@pytest.mark.parametrize("regex", [False, True])
def test_a_part_of_a_message_is_found_in_json_that_the_message_has(made: Project, regex: bool) -> None:
    """An answer in JSON: letters as escapes, and a name after a line break,
    which is written as a letter; also JSON in JSON, and after other text."""
    letter = json.dumps({"text": "Dear\nZephyrine Okonkwo", "by": "Zoë 山田"})
    asked = ["zephyrine okonkwo", "zoë", "山田"]
    for text in (letter, f'a 5" pipe, so:\n```json\n{letter}\n```', json.dumps({"arguments": letter})):
        made.commit(made.trained(made.curated([(text, "train", FAQ), *ROWS[1:]]), [text, "dogs"]))
        for part in asked:
            matches = impact(made.root, containing=part, regex=regex)["matches"]
            assert identity(text) in {match["example_id"] for match in matches}, (text, part)
            assert all(part in match["excerpt"].casefold() for match in matches)
    made.commit(made.trained(made.curated([(r"the density \rho and C:\new", "train", FAQ), *ROWS[1:]]), ["dogs"]))
    assert not impact(made.root, containing="ho")["matches"] and not impact(made.root, containing="ew")["matches"], (
        "no JSON"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ["--source", "data/sources/never.jsonl"],
        ["--source", "/etc/passwd"],
        ["--source", "data/splits"],  # an output
        ["--source", "data/merged"],  # a folder of outputs
        ["--source", "MIT"],  # a word of the parameters, not a file
        ["--record", "nonsense"],
        ["--containing", " "],
        ["--containing", "(", "--regex"],
        ["--hash", "0123456789"],
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(made: Project, wrong: list[str]) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    lock["instructions"]["params"] = {"params.yaml": {"instructions": {"license": "MIT"}}}
    made.commit(lock)
    done = pedigree(made.root, "impact", *wrong)
    assert done.returncode == 2 and "hint:" in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("wrong", ["nonsense", "sha256:0123456789", " 0123456789", "______"])
def test_what_is_no_hash_is_refused_although_reports_are_missing(made: Project, wrong: str) -> None:
    """No report could name it, so "cannot tell" would be wrong, and to fetch the reports of no use."""
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    done = pedigree(made.root, "impact", "--hash", wrong)
    assert done.returncode == 2 and "not a hash" in done.stderr and not done.stdout


def test_what_a_shallow_clone_lacks_is_not_called_uncommitted(made: Project, tmp_path: Path) -> None:
    """The runs of the first commit are in DVC's run cache; the clone has the second one alone."""
    locks = [
        made.trained(made.curated([(text, "train", FAQ), *ROWS[1:]]), [text, "dogs"]) for text in ("lions", "cats")
    ]
    for lock in locks:
        for stage in lock.values():
            made.cache_run(stage)
        made.commit(lock)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{made.root}", str(clone))
    shutil.copytree(made.root / ".dvc" / "cache", clone / ".dvc" / "cache")
    found = impact(clone, record=identity("lions"))
    assert "in no commit of this shallow clone, in DVC's run cache" in as_text(
        found
    ) and "never committed" not in as_text(found)
    lions = locks[0]["merged@lora"]["outs"][0]["md5"]
    assert "commit unknown, without the commits that this shallow clone lacks" in audit_text(audit(clone, lions))
    git(made.root, "rm", "-q", "--cached", "dvc.lock")
    git(made.root, "commit", "-qm", "without")
    assert "unknown" not in audit(made.root, lions)["code"], "a whole history knows the commit"


def test_a_changed_row_and_its_paraphrase_are_two_changed_records(made: Project) -> None:
    """Both name the same source row; each is compared with the one of its kind,
    and the paraphrase that has none before is added."""
    for cats, dogs in (({"cats": "felines"}, {}), ({"lions": "big felines"}, {"wolves": "hounds"})):
        rows = [(text, "train", source) for text, source in ((next(iter(cats)), FAQ), (next(iter(dogs), "dogs"), MAIL))]
        made.commit(made.trained(made.curated(rows, paraphrases=cats | dogs), [next(iter(cats))]))
    records = diff(made.root, "HEAD~1:merged@lora", "merged@lora")["records"]
    assert records is not None
    assert {(one["before"]["example_id"], one["after"]["example_id"]) for one in records["changed"]} == {
        (identity(before), identity(after))
        for before, after in (("cats", "lions"), ("felines", "big felines"), ("dogs", "wolves"))
    }
    assert [one["example_id"] for one in records["added"]] == [identity("hounds")] and not records["removed"]


@pytest.mark.parametrize("asked", ["data/sources/web", "data/sources/web/copy.jsonl"])
def test_copies_from_a_folder_cannot_be_told_without_the_table_that_names_them(made: Project, asked: str) -> None:
    """No row of the data set names a source of the folder: one was dropped as a copy of a row of another source."""
    rows, copies = [("cats", "train", FAQ), ("dogs", "test", MAIL)], [("cats", "data/sources/web/copy.jsonl")]
    lock = made.trained(made.curated(rows, copies), ["cats"])
    made.commit(lock)
    assert impact(made.root, source=asked)["verdict"] == "yes"
    for one in json.loads(made.object(lock["instructions"]["outs"][0]["md5"]).read_bytes()):
        if one["relpath"] == "overlaps.parquet":
            made.object(one["md5"]).unlink()
    (made.root / database.INDEX_FILE).unlink()  # it keeps what it has read
    found = impact(made.root, source=asked)
    assert found["verdict"] == "cannot tell" and [one["stage"] for one in found["unknown"]] == [
        "adapter@lora", "merged@lora"
    ]  # fmt: skip


def test_a_removed_record_is_the_former_one_of_one_record_at_most(made: Project) -> None:
    """Two paraphrases that name the same source row, as those of two rows of one file of prompts may."""
    rows = [("cats", "train", FAQ), ("dogs", "train", FAQ)]
    for paraphrases in ({"cats": "felines", "dogs": "hounds"}, {"cats": "lions", "dogs": "wolves"}):
        made.commit(made.trained(made.curated(rows, paraphrases=paraphrases), ["cats"]))
    records = diff(made.root, "HEAD~1:merged@lora", "merged@lora")["records"]
    assert records is not None
    pairs = [(one["before"]["example_id"], one["after"]["example_id"]) for one in records["changed"]]
    assert sorted(before for before, _ in pairs) == sorted(map(identity, ("felines", "hounds")))
    assert sorted(after for _, after in pairs) == sorted(map(identity, ("lions", "wolves")))
    assert not records["added"] and not records["removed"]


def test_records_whose_rows_are_unknown_are_not_versions_of_each_other(made: Project) -> None:
    """Without a ledger, records name their source and no row of it."""
    for text in ("cats", "lions"):
        lock = made.lock([(text, "train", FAQ), ("dogs", "test", MAIL)])
        for one in json.loads(made.object(lock["splits"]["outs"][0]["md5"]).read_bytes()):
            if one["relpath"] == "ledger.parquet":
                made.object(one["md5"]).unlink()
        made.commit(lock)
    records = diff(made.root, "HEAD~1:merged@lora", "merged@lora")["records"]
    assert records == {
        "added": [{"example_id": identity("lions"), "splits": ["train"], "rows": [FAQ]}],
        "removed": [{"example_id": identity("cats"), "splits": ["train"], "rows": [FAQ]}],
        "changed": [],
        "moved": [],
    }


def test_records_that_two_models_have_in_the_same_splits_did_not_move(made: Project) -> None:
    """One model was trained on the first data set and aligned on the second, the other one the other way round."""
    data = [[("cats", "train", FAQ), ("dogs", "test", FAQ)], [("dogs", "train", FAQ), ("cats", "test", FAQ)]]
    commits = []
    for first, second in (data, data[::-1]):
        model = made.lock(first)
        made.commit(model)
        aligned = made.splits(second) | {name: model[name] for name in ("adapter@lora", "merged@lora")}
        aligned |= tasks_on(made, aligned, model)
        aligned["aligned@dpo"]["outs"][0]["md5"] = made.put({"adapter_model.safetensors": str(first).encode()})
        commits.append(made.commit(aligned))
    records = diff(made.root, *(f"{commit}:aligned@dpo" for commit in commits))["records"]
    assert records == {"added": [], "removed": [], "changed": [], "moved": []}


def test_a_file_in_a_folder_that_is_a_source_is_found_by_its_hash(made: Project) -> None:
    """Of two versions of the folder, the one that has this file."""
    name = "data/sources/web/a.jsonl"
    hashes = {version: hashlib.sha256(version.encode()).hexdigest() for version in ("first", "second")}
    models = {}
    for version, sha256 in hashes.items():
        lock = made.lock([(version, "train", name), ("dogs", "test", "data/sources/web/b.jsonl")])
        files = {"a.jsonl": {"rows": 1, "sha256": sha256}, "b.jsonl": {"rows": 1, "sha256": "0" * 64}}
        folder = {
            "rows": 2,
            "format": "text",
            "license": "MIT",
            "sha256": hashlib.sha256(sha256.encode()).hexdigest(),
            "files": files,
        }
        lock["splits"]["outs"][1] |= made.report("splits", {"passed": True, "sources": {"data/sources/web": folder}})
        made.commit(lock)
        models[version] = lock["adapter@lora"]["outs"][0]["md5"]
    for version, sha256 in hashes.items():
        [model] = [one for one in impact(made.root, content=sha256[:12])["models"] if one["stage"] == "adapter@lora"]
        assert model["md5"] == models[version] and model["seen"][0]["splits"] == {"train": 1}
    beside = made.root / "copy.jsonl"
    beside.write_text("first")
    with pytest.raises(InputError, match="not a name that a run read it by") as refused:
        impact(made.root, source=str(beside))
    assert name in refused.value.hint


def test_a_file_that_stages_only_compare_with_was_not_trained_on(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    benchmark = "data/sources/benchmarks/b.jsonl"
    lock["instructions"]["params"] = {"params.yaml": {"instructions": {"benchmarks": [benchmark]}}}
    made.commit(lock)
    answer = impact(made.root, source=benchmark)
    assert (answer["verdict"], answer["read_by"]) == ("no", ["instructions"])
    assert "named by instructions, but not as a source of rows" in as_text(answer)
    with pytest.raises(InputError, match="no recorded run has read"):
        impact(made.root, source="data/sources/benchmarks/b.json")


def test_characters_that_json_escapes_as_two_hide_no_model(made: Project) -> None:
    """Parameters of a stage had an emoji, and its dvc.lock counted as unreadable."""
    lock = made.trained(made.curated(ROWS), TRAINED)
    system, benchmark = "Be kind \U0001f98a", "data/sources/benchmarks/pr\u00fcfung \U0001f98a.jsonl"
    lock["adapter@lora"]["params"] = {"params.yaml": {"adapter.lora": {"system": system}}}
    lock["instructions"]["params"] = {"params.yaml": {"instructions": {"benchmarks": [benchmark]}}}
    made.commit(lock)
    assert audit(made.root, "adapter@lora")["parameters"]["adapter.lora"] == {"system": system}
    answer = impact(made.root, record=identity("cats"))
    assert (answer["verdict"], answer["unknown"], answer["unreadable"]) == ("yes", [], [])
    answer = impact(made.root, source=benchmark)
    assert (answer["verdict"], answer["read_by"]) == ("no", ["instructions"])


def test_parameters_with_keys_and_values_that_json_does_not_have_are_those_of_the_commit(made: Project) -> None:
    """Numbers as keys were compared with texts, and a date ended the audit."""
    lock = made.trained(made.curated(ROWS), TRAINED)
    values = {"names": {0: "bug", 1: "idea", None: "x"}, "since": date(2024, 1, 31)}
    lock["adapter@lora"]["params"] = {"params.yaml": {"adapter.lora": values}}
    text = "adapter:\n  lora: {names: {0: bug, 1: idea, null: x}, since: 2024-01-31}\n"
    (made.root / "params.yaml").write_text(text)
    made.commit(lock)
    assert audit(made.root, "merged@lora")["code"]["clean"]
    (made.root / "params.yaml").write_text(text.replace("0: bug", "2: bug"))
    lock["adapter@lora"]["params"]["params.yaml"]["adapter.lora"] = {**values, "since": date(2024, 2, 1)}
    made.commit(lock)
    assert audit(made.root, "merged@lora")["code"]["differs"] == ["params.yaml"]


def test_a_module_of_metrics_is_known_by_the_function_that_parameters_name(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    lock["evaluation"] = entry("evaluation", {"data/metrics": "1" * 32 + ".dir"}, made.put({"scores.json": b"{}"}))
    lock["evaluation"]["params"] = {"params.yaml": {"evaluation": {"metrics": ["polite.share"]}}}
    made.commit(lock)
    answer = impact(made.root, source="data/metrics/polite.py")
    assert (answer["verdict"], answer["read_by"]) == ("no", ["evaluation"])
    with pytest.raises(InputError, match="no recorded run has read"):
        impact(made.root, source="data/metrics/rude.py")


def test_other_files_that_contributed_are_listed_with_their_hash(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    folder = made.root / "data/sources/benchmarks"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text("{}")
    (folder / "unused.jsonl").write_text("[]")
    listing = [{"md5": md5((folder / name).read_bytes()), "relpath": name} for name in ("b.jsonl", "unused.jsonl")]
    digest = md5(json.dumps(listing, sort_keys=True).encode()) + ".dir"
    lock["instructions"]["deps"].append({"path": "data/sources/benchmarks", "hash": "md5", "md5": digest})
    lock["instructions"]["params"] = {
        "params.yaml": {"instructions": {"benchmarks": ["data/sources/benchmarks/b.jsonl"]}}
    }
    made.commit(lock)
    (folder / "b.jsonl").write_text("changed since")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    found = audit(made.root, "merged@lora")["other_files"]
    assert found.pop("data/sources/paraphrases").keys() == {"md5", "license", "stages"}  # its content is not at hand
    assert found == {
        "data/sources/benchmarks/b.jsonl": {
            "md5": md5(b"{}"),
            "sha256": sha256,
            "license": "unknown",
            "stages": ["instructions"],
        }
    }


def test_a_source_is_found_by_its_absolute_path(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    assert impact(made.root, source=str(made.root / FAQ))["models"] == impact(made.root, source=FAQ)["models"] != []


def test_a_model_that_was_made_again_before_any_commit_is_found_in_the_run_cache(made: Project) -> None:
    replaced = made.trained(made.curated([("lions", "train", FAQ), *ROWS[1:]]), ["lions", "dogs"])
    for stage in replaced.values():
        made.cache_run(stage)
    lock = made.trained(made.curated(ROWS), TRAINED)
    for stage in lock.values():
        made.cache_run(stage)
    made.commit(lock)
    found = impact(made.root, record=identity("lions"))
    assert [(model["stage"], model["commit"], model["found_in"]) for model in found["models"]] == [
        ("adapter@lora", None, "run cache"), ("merged@lora", None, "run cache"),
    ]  # fmt: skip
    assert "never committed, in DVC's run cache" in as_text(found)
    assert stages(impact(made.root, source=FAQ)) == ["adapter@lora", "merged@lora"] * 2
    assert [model["found_in"] for model in impact(made.root, record=identity("cats"))["models"]] == ["commit"] * 2


def test_an_amended_commit_is_found_in_the_reflog(made: Project) -> None:
    made.commit(made.trained(made.curated([("lions", "train", FAQ), *ROWS[1:]]), ["lions", "dogs"]))
    made.write(made.trained(made.curated(ROWS), TRAINED))
    git(made.root, "add", "-A")
    git(made.root, "commit", "-q", "--amend", "-m", "amended")
    found = impact(made.root, record=identity("lions"))
    assert {model["found_in"] for model in found["models"]} == {"reflog"} and len(found["models"]) == 2


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    "command",
    [["impact", "--record", identity("dogs"), "--json"], ["audit", "merged@lora", "--json"]],
    ids=["impact", "audit"],
)
def test_a_damaged_index_is_set_aside_and_made_anew(made: Project, command: list[str], place: float) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    before = pedigree(made.root, *command)
    index = made.root / ".dvc/tmp/pedigree/index.sqlite3"
    sqlite3.connect(index).execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(index.read_bytes())
    start = int(place * len(content)) // 4096 * 4096
    content[start : start + 8192] = b"\xff" * len(content[start : start + 8192])
    index.write_bytes(content)
    after = pedigree(made.root, *command)
    assert (after.returncode, after.stdout) == (before.returncode, before.stdout), after.stderr
    assert "Traceback" not in after.stderr
    if "was damaged" in after.stderr:  # otherwise the page is one that this question does not read
        assert (
            "set aside as index.sqlite3.damaged, and created again" in after.stderr
            or "set aside as index.sqlite3.damaged and created" in after.stderr
        )
        assert (index.parent / "index.sqlite3.damaged").read_bytes() == bytes(content)
    else:
        assert place
    again = pedigree(made.root, *command)
    assert again.stdout == before.stdout


def test_a_wait_for_another_process_that_indexes_is_shown(
    made: Project, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    impact(made.root, record=identity("dogs"))
    made.commit(made.trained(made.curated([("frogs", "train", FAQ), *ROWS[1:]]), ["frogs", "dogs"]))
    other = sqlite3.connect(
        made.root / ".dvc/tmp/pedigree/index.sqlite3", isolation_level=None, check_same_thread=False
    )
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(database, "SILENT_WAIT", 10)
    monkeypatch.setattr(database.log, "propagate", True)
    released = threading.Timer(1, other.execute, ["ROLLBACK"])
    released.start()
    with caplog.at_level("INFO", logger="pedigree"):
        assert impact(made.root, record=identity("frogs"))["verdict"] == "yes"
    released.join()
    assert any(line.startswith("waiting: another process is reading the history") for line in caplog.messages)


def test_a_lock_that_a_stage_replaces_while_a_question_waits_is_not_indexed_as_the_one_before(
    made: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made.lock(ROWS), made.lock([("frogs", "train", FAQ)])
    made.write(first)
    begin = Index._begin

    def begin_later(index: Index) -> None:
        made.write(second)
        begin(index)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "_begin", begin_later)
        Index(made.root)
    made.commit(first)
    assert stages(impact(made.root, record=identity("cats"))) == ["adapter@lora", "merged@lora"]


def test_one_epoch_is_not_written_in_the_plural() -> None:
    for epochs, words in ((1, "2 steps and 1 epoch"), (3, "2 steps and 3 epochs")):
        seen = {"records": 2, "views": 2, "steps": 2, "epochs": epochs}
        [line] = training_lines({"records": {"learnt_by": {"aligned@dpo": seen}}})
        assert line == f"aligned@dpo: 2 records, 2 times in {words}"


def test_an_answer_of_no_says_what_was_looked_at_and_needs_all_of_it(made: Project) -> None:
    first = made.trained(made.curated(ROWS), TRAINED)
    made.commit(first)
    second = made.trained(made.curated([("frogs", "train", FAQ), *ROWS[1:]]), ["frogs", "dogs"])
    made.commit(second)
    no = impact(made.root, record=identity("nobody"))
    assert no["verdict"] == "no" and no["looked_at"] == {**no["looked_at"], "commits": 2, "models": 4, "data_sets": 6}
    assert "looked at 4 models and 6 other outputs (6 rows in splits)" in as_text(no), "two rows of train are others"
    made.collect_garbage(second)
    Path(made.root / ".dvc/tmp/pedigree/index.sqlite3").unlink()
    unsure = impact(made.root, record=identity("nobody"))
    assert unsure["verdict"] == "cannot tell" and unsure["unknown"]
    done = pedigree(made.root, "impact", "--record", identity("nobody"))
    assert done.returncode == 2 and "dvc pull" in done.stdout
    assert impact(made.root, record=identity("frogs"))["verdict"] == "yes"


def test_a_shallow_clone_does_not_take_its_first_commit_for_the_one_that_recorded_a_run(
    made: Project, tmp_path: Path
) -> None:
    made.commit(made.lock([("cats", "train", "a.jsonl")]))
    git(made.root, "commit", "-q", "--allow-empty", "-m", "later")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{made.root}", str(clone))
    subject = find(Index(clone), "merged@lora")
    with pytest.raises(InputError, match="shallow") as refusal:
        issue_date(subject)
    assert "--issued" in refusal.value.hint
    recorded = summarize(subject)["stages"]["adapter@lora"]
    assert (
        recorded["date"] is None
        and recorded["or_earlier"]
        and f"{recorded['commit']} or earlier | unknown |" in model_card(summarize(subject))
    )


def test_the_issue_date_is_that_of_the_first_commit_that_holds_the_model(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    made.write(lock)
    git(made.root, "add", "-A")
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "run"],
        cwd=made.root, check=True, env={"PATH": "/usr/bin:/bin", "GIT_COMMITTER_DATE": "2020-02-02T12:00:00Z"},
    )  # fmt: skip
    made.commit({**lock, "other": entry("other", {}, made.put({"x": b"1"}))}, "later")
    assert issue_date(find(Index(made.root), "merged@lora")).isoformat() == "2020-02-02"


def test_a_commit_without_a_valid_date_is_one_message(made: Project) -> None:
    """Git writes years of five digits, and fails at dates before 1970, which other tools write."""
    made.write(made.trained(made.curated(ROWS), TRAINED))
    git(made.root, "add", "-A")
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "run"],
        cwd=made.root, check=True, env={"PATH": "/usr/bin:/bin", "GIT_COMMITTER_DATE": "@253402300800 +0000"},
    )  # fmt: skip
    subject = find(Index(made.root), "merged@lora")
    with pytest.raises(InputError, match="has no valid date"):
        issue_date(subject)
    assert {stage["date"] for stage in summarize(subject)["stages"].values()} == {None}


def test_what_only_watched_or_was_compared_is_not_what_the_model_was_made_from(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    lock |= made.splits([("mice", "train", COPY)], "preferences")
    preferences, merged = lock["preferences"]["outs"][0]["md5"], lock["merged@lora"]["outs"][0]["md5"]
    lock["reward_model"] = entry(
        "reward_model", {"data/preferences": preferences}, made.put({"model.safetensors": b"reward"})
    )
    reads = {
        "data/preferences": preferences,
        "data/reward_model": lock["reward_model"]["outs"][0]["md5"],
        "data/merged/lora": merged,
    }
    for name, settings in (
        ("dpo", {"method": "dpo"}),
        ("ppo", {"method": "ppo"}),
        ("rules", {"method": "grpo", "rewards": {"valid_json": 1.0}}),
    ):
        address = f"aligned@{name}"
        lock[address] = entry(address, reads, made.put({"model.safetensors": name.encode()}))
        lock[address]["params"] = {"params.yaml": {f"aligned.{name}": settings}}
    aligned = made.folder({name: lock[f"aligned@{name}"]["outs"][0]["md5"] for name in ("dpo", "ppo", "rules")})
    board = entry(
        "comparison",
        {"data/aligned": aligned, "data/merged": made.folder({"lora": merged})},
        made.put({"board.md": b"lora"}),
    )
    files = {
        "model.safetensors": made.object(Index(made.root).objects.listing(merged)["model.safetensors"]).read_bytes(),
        "README.md": b"card",
    }
    folders = {
        "data/comparison": board["outs"][0]["md5"],
        "data/aligned": aligned,
        "data/merged": made.folder({"lora": merged}),
    }
    lock |= {"comparison": board, "release": entry("release", folders, made.put(files))}
    made.commit(lock)
    release = document(find(Index(made.root), "release"))
    assert list(release["stages"]) == ["instructions", "splits", "tokenized", "adapter@lora", "merged@lora", "release"]
    assert set(release["sources"]) == {FAQ, MAIL} and set(release["watched"]["sources"]) == {COPY}
    assert {"preferences", "reward_model", "aligned@dpo", "comparison"} <= set(release["watched"]["stages"])
    parents = {
        name: [one["stage"] for one in audit(made.root, f"aligned@{name}")["parents"]]
        for name in ("dpo", "ppo", "rules")
    }
    assert parents == {"dpo": ["adapter@lora", "merged@lora"], "rules": ["adapter@lora", "merged@lora"],
                       "ppo": ["reward_model", "adapter@lora", "merged@lora"]}  # fmt: skip
    assert "reward_model" in audit(made.root, "aligned@dpo")["watched"]["stages"]


def test_the_audit_knows_which_methods_learn_from_rewards() -> None:
    assert {name for name, method in METHODS.items() if method.learns_from_rewards} == REWARD_METHODS


def test_both_sides_of_a_committed_merge_conflict_are_read(made: Project) -> None:
    sides = [made.trained(made.curated([(word, "train", FAQ)]), [word]) for word in ("cats", "dogs")]
    texts = []
    for lock in sides:
        made.write(lock)
        texts.append((made.root / "dvc.lock").read_text())
    (made.root / "dvc.lock").write_text(f"<<<<<<< HEAD\n{texts[0]}=======\n{texts[1]}>>>>>>> other\n")
    made.commit({}, "conflict")
    for word in ("cats", "dogs"):
        assert stages(impact(made.root, record=identity(word))) == ["adapter@lora", "merged@lora"]


def test_a_folder_of_outputs_is_that_which_was_read_and_not_what_lies_there_now(made: Project) -> None:
    old = made.trained(made.curated(ROWS), TRAINED)
    converted = entry(
        "converted",
        {"data/merged": made.folder({"lora": old["merged@lora"]["outs"][0]["md5"]})},
        made.put({"model.safetensors": b"converted"}),
    )
    for stage in (*old.values(), converted):
        made.cache_run(stage)
    new = made.trained(made.curated([("frogs", "train", FAQ), *ROWS[1:]]), ["frogs", "dogs"])
    made.commit(
        {**new, "converted": converted}
    )  # the conversion did not run again, and the old models were never committed
    assert "converted" in stages(impact(made.root, record=identity("cats")))
    assert "converted" not in stages(impact(made.root, record=identity("frogs")))


def test_a_model_whose_inputs_nothing_records_cannot_be_told(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    lock["merged@lora"]["deps"][0]["md5"] = "0" * 32 + ".dir"
    made.commit(lock)
    answer = impact(made.root, record=identity("nobody"))
    assert answer["verdict"] == "cannot tell"
    assert [(model["stage"], model["unexplained"]) for model in answer["unknown"]] == [
        ("merged@lora", ["data/adapter/lora"])
    ]


def test_data_whose_inputs_nothing_records_cannot_be_told(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    splits = lock["splits"]["outs"][0]["md5"]
    lock["tokenized"]["deps"][0]["md5"] = "0" * 32 + ".dir"
    made.commit(lock)
    for answer in (impact(made.root, record=identity("birds")), impact(made.root, content=splits)):
        assert answer["verdict"] == "cannot tell"
        assert [model["unexplained"] for model in answer["unknown"]] == [["data/splits"]] * 2
    assert impact(made.root, record=identity("cats"))["verdict"] == "yes"  # by the steps that the model recorded


def test_messages_that_are_gone_are_not_searched_and_cannot_be_told(made: Project) -> None:
    """The index keeps hashes of whole texts, but not the texts."""
    made.commit(made.trained(made.curated([("lions", "train", FAQ), *ROWS[1:]]), ["lions", "dogs"]))
    second = made.trained(made.curated(ROWS), TRAINED)
    made.commit(second)
    Index(made.root).read_records()
    made.collect_garbage(second)
    assert impact(made.root, text="What of lions?")["verdict"] == "yes"
    assert impact(made.root, text="What of frogs?")["verdict"] == "no"
    for answer in (impact(made.root, containing="lions"), impact(made.root, text="What of frogs?", near=True)):
        assert answer["verdict"] == "cannot tell"
        assert [one["path"] for model in answer["unknown"] for one in model["missing"]] == ["data/splits"] * 2


def test_a_row_before_its_repair_cannot_be_told_without_the_ledger(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    line = {
        "source": FAQ,
        "source_row": 0,
        "example_id": identity("cats"),
        "outcome": "kept",
        "why": "",
        "source_id": identity("c@ts"),
    }
    ledger = table([line], ledger_schema(repaired=True))
    lock["instructions"]["outs"][0]["md5"] = lock["splits"]["deps"][0]["md5"] = made.put({"ledger.parquet": ledger})
    made.commit(lock)
    made.object(md5(ledger)).unlink()
    answer = impact(made.root, record=identity("c@ts"))
    assert answer["verdict"] == "cannot tell" and answer["unknown"][0]["missing"][0]["path"] == "data/instructions"
    made.object(md5(ledger)).write_bytes(ledger)
    assert stages(impact(made.root, record=identity("c@ts"))) == ["adapter@lora", "merged@lora"]


def test_a_review_file_is_credited_with_the_records_that_it_edited(made: Project) -> None:
    review = "data/sources/review/r.csv"
    lock = made.curated(ROWS, paraphrases={"cats": "felines"})
    lines = [
        {
            "source": FAQ,
            "source_row": i,
            "example_id": identity(text),
            "outcome": "kept",
            "why": "edited: clearer" if text == "cats" else "",
        }
        for i, text in enumerate(("cats", "dogs", "birds"))
    ]
    ledger = table(lines, ledger_schema())
    lock["instructions"]["outs"][0]["md5"] = lock["splits"]["deps"][0]["md5"] = made.put({"ledger.parquet": ledger})
    lock["instructions"]["deps"].append({"path": "data/sources/review", "hash": "md5", "md5": "1" * 32 + ".dir"})
    lock["instructions"]["params"] = {"params.yaml": {"instructions": {"review": review}}}
    made.commit(made.trained(lock, ["cats", "dogs", "felines"]))
    for source in (review, "data/sources/review"):
        answer = impact(made.root, source=source)
        (seen,) = answer["models"][0]["seen"]
        assert (answer["verdict"], seen["splits"], "read_by" in answer) == (
            "yes",
            {"train": 2},
            False,
        )  # also the paraphrase of the record
    made.object(md5(ledger)).unlink()
    for file in made.root.glob(f"{database.INDEX_FILE}*"):
        file.unlink()
    answer = impact(made.root, source=review)
    assert answer["verdict"] == "cannot tell" and answer["unknown"][0]["missing"][0]["path"] == "data/instructions"


def test_a_lock_that_git_has_lost_cannot_be_told(made: Project) -> None:
    first = made.commit(made.trained(made.curated(ROWS), TRAINED))
    made.commit(made.trained(made.curated([("frogs", "train", FAQ), *ROWS[1:]]), ["frogs", "dogs"]))
    blob = git(made.root, "rev-parse", f"{first}:dvc.lock").strip()
    (made.root / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    answer = impact(made.root, record=identity("nobody"))
    assert (answer["verdict"], answer["unreadable"]) == ("cannot tell", [first])


def test_two_versions_of_a_file_are_listed_separately(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), TRAINED)
    file = "data/sources/benchmarks/b.jsonl"
    for stage, version in (("instructions", b"1"), ("tokenized", b"2")):
        lock[stage]["deps"].append({"path": file, "hash": "md5", "md5": md5(version)})
    made.commit(lock)
    found = audit(made.root, "merged@lora")["other_files"]
    assert found[file]["stages"] == ["instructions"] and found[f"{file} {md5(b'2')[:8]}"]["stages"] == ["tokenized"]


def test_each_version_of_a_code_file_that_stages_ran_with_is_listed(made: Project) -> None:
    """A file was changed, and then only the training was run again, by `dvc repro --single-item`."""
    lock = made.trained(made.curated(ROWS), TRAINED)
    file = "dagster_project/text.py"
    for stage, version in (("instructions", b"1"), ("splits", b"1"), ("adapter@lora", b"2")):
        lock[stage]["deps"].append({"path": file, "hash": "md5", "md5": md5(version)})
    made.commit(lock)
    found = audit(made.root, "merged@lora")
    others = {file: [{"value": md5(b"1"), "stages": ["splits", "instructions"]}]}
    assert (found["code"]["files"], found["code"]["other_files"]) == ({file: md5(b"2")}, others)
    assert f"{file} {md5(b'1')[:12]} in splits, instructions\n" in audit_text(found)
    assert "1 file, 1 of them in several versions" in audit_text(found)
    assert f"<td>{md5(b'1')}</td><td>splits, instructions</td>" in lineage_page(found, [])
    assert "other_files" not in audit(made.root, "splits")["code"]
    assert diff(made.root, "splits", "merged@lora")["code"] == {
        file: [md5(b"1"), md5(b"2")],
        f"{file}, other values": [None, [md5(b"1")]],
    }


def test_each_row_of_a_record_that_was_kept_twice_is_named_and_one_that_was_dropped_is_not_the_first(
    made: Project,
) -> None:
    """`exact_duplicates: warn` keeps copies; of rows whose sources label them for two splits, `splits` drops one."""
    odd = "data/sources/a, b.jsonl"
    rows = [
        ("cats", "dropped:split_leakage", MAIL),
        ("cats", "train", FAQ),
        ("cats", "train", odd),
        ("dogs", "train", FAQ),
    ]
    made.commit(made.lock(rows, trained=TRAINED))
    cats, dogs = listed(trained_on(find(Index(made.root), "adapter@lora"))[0])
    assert (cats["source"], cats["source_row"], cats["also_in"]) == (FAQ, 1, [f"{odd}:2", f"{MAIL}:0"])
    assert (dogs["source"], dogs["source_row"]) == (FAQ, 3) and "also_in" not in dogs


def tasks_on(made: Project, data: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """An alignment that reads a data set and a merged model."""
    read = {out["path"]: out["md5"] for stage in (data["splits"], model["merged@lora"]) for out in stage["outs"][:1]}
    return {"aligned@dpo": entry("aligned@dpo", read, made.put({"adapter_model.safetensors": b"aligned"}))}


def test_two_versions_of_a_source_are_listed_separately(made: Project) -> None:
    """The adapter is frozen in dvc.yaml, or `dvc repro --single-item` made the alignment."""
    first = made.lock([("cats", "train", FAQ), ("birds", "train", MAIL)])
    made.commit(first)
    now = made.splits([("cats", "train", FAQ), ("dogs", "train", FAQ)])
    model = {name: first[name] for name in ("adapter@lora", "merged@lora")}
    made.commit({**now, **model, **tasks_on(made, now, model)})
    found = audit(made.root, "aligned@dpo")["sources"]
    before = audit(made.root, "merged@lora")["sources"]
    earlier = f"{FAQ} {before[FAQ]['sha256'][:8]}"
    assert {name: (one["rows"], one["outcomes"]) for name, one in found.items()} == {
        FAQ: (2, {"splits": {"train": 2}}),
        earlier: (1, {f"splits {first['splits']['outs'][0]['md5'][:8]}": {"train": 1}}),
        MAIL: (1, {f"splits {first['splits']['outs'][0]['md5'][:8]}": {"train": 1}}),
    }
    assert found[earlier]["sha256"] == before[FAQ]["sha256"] != found[FAQ]["sha256"]
    exported = summarize(find(Index(made.root), "aligned@dpo"))
    assert {name: one["sha256"] for name, one in exported["sources"].items()} == {
        name: one["sha256"] for name, one in found.items()
    }
    old = f"splits {first['splits']['outs'][0]['md5'][:8]}"
    assert (exported["stages"]["splits"]["sources"], exported["stages"][old]["sources"]) == ([FAQ], [earlier, MAIL])
    assert training_records(exported) == {FAQ: 2, earlier: 1, MAIL: 1}


def test_each_version_of_a_library_that_stages_ran_with_is_listed(made: Project) -> None:
    """The adapter was trained before an upgrade, the alignment after it."""
    lock = made.lock([("cats", "train", FAQ)])
    lock |= tasks_on(made, lock, lock)
    for name, installed in (("adapter@lora", {"torch": "1", "peft": "7"}), ("aligned@dpo", {"torch": "2", "trl": "9"})):
        report = made.report(name.replace("@", "/"), {"environment": installed})
        lock[name]["outs"].append(report)
    made.commit(lock)
    found = audit(made.root, "aligned@dpo")
    assert found["environment"] == {"torch": "2", "trl": "9", "peft": "7"}
    assert found["other_versions"] == {"torch": [{"value": "1", "stages": ["adapter@lora"]}]}
    assert "torch 1 in adapter@lora" in audit_text(found) and "<dt>torch of adapter@lora</dt>" in lineage_page(
        found, []
    )
    before = audit(made.root, "merged@lora")
    assert before["environment"] == {"torch": "1", "peft": "7"} and "other_versions" not in before
    assert diff(made.root, "merged@lora", "aligned@dpo")["environment"] == {
        "torch": ["1", "2"], "torch, other values": [None, ["1"]], "trl": [None, "9"],
    }  # fmt: skip


def test_each_version_of_the_base_model_is_named(made: Project) -> None:
    """The reward model or the policy may rest on an earlier one."""
    lock = made.lock([("cats", "train", FAQ)])
    lock |= tasks_on(made, lock, lock)
    first, second = (
        {"origin": f"org/{name}", "license": "MIT", "sha256": {"model.safetensors": name * 16}} for name in ("a", "b")
    )
    for name, origin in (("splits", first), ("adapter@lora", first), ("aligned@dpo", second)):
        lock[name]["outs"].append(made.report(name.replace("@", "/"), origin))
    made.commit(lock)
    found = audit(made.root, "aligned@dpo")
    assert (found["base_model"], found["other_base_models"]) == (first, [second])
    assert {"base model org/a, MIT, sha256 aaaaaaaaaaaaaaaa", "base model org/b, MIT, sha256 bbbbbbbbbbbbbbbb"} <= {
        *audit_text(found).splitlines()
    }
    assert "org/a" in lineage_page(found, []) and "org/b" in lineage_page(found, [])
    assert "other_base_models" not in audit(made.root, "merged@lora")
    third = second | {"origin": "org/c"}
    lock["aligned@dpo"]["outs"][-1] = made.report("aligned/dpo", third)
    made.commit(lock)
    changed = diff(made.root, "aligned@dpo", "aligned@dpo", rev="HEAD~1")["base_model"]
    assert changed == {"other 1.origin": ["org/b", "org/c"]}


def test_a_count_of_one_has_the_singular(made: Project) -> None:
    made.commit(made.lock([("cats", "train", FAQ)]))
    found = audit(made.root, "merged@lora")
    said = "\n".join([audit_text(found), as_text(impact(made.root, source=FAQ)), lineage_page(found, [])])
    assert "adapter@lora: 1 record, 1 time in 1 step" in said and "in 1 commit with a dvc.lock" in said
    assert "1 row, MIT" in said and not re.search(
        r"(?<![\d.,])1 (records|rows|times|steps|commits|models|files)\b", said
    )


def test_each_file_of_the_weights_of_a_base_model_is_named_with_its_hash(made: Project) -> None:
    lock = made.lock([("cats", "train", FAQ)])
    weights = {f"model-0000{i}-of-00002.safetensors": str(i) * 64 for i in (1, 2)}
    for name, sha256 in (("adapter@lora", {**weights, "model.safetensors.index.json": "c" * 64}), ("merged@lora", {})):
        lock[name]["outs"].append(
            made.report(name.replace("@", "/"), {"origin": name, "license": "MIT", "sha256": sha256})
        )
    made.commit(lock)
    found = audit(made.root, "merged@lora")
    named = [" ".join(one) for one in weights.items()]
    shown = ", ".join(text[: -64 + 16] for text in named)
    assert found["base_model"]["sha256"].items() >= weights.items()
    assert f"base model adapter@lora, MIT, sha256 of {shown}" in audit_text(found).splitlines()
    assert "base model merged@lora, MIT, sha256 unknown" in audit_text(found).splitlines()
    assert f"adapter@lora, MIT, sha256 of {', '.join(named)}" in lineage_page(found, [])


def test_each_value_of_a_parameter_that_stages_ran_with_is_listed_and_each_source_goes_to_the_stages_that_read_it(
    made: Project,
) -> None:
    waivers = [{"check": "pii", "reason": "public"}, {"check": "secrets", "reason": "test keys"}]
    first = made.lock([("cats", "train", FAQ), ("birds", "train", MAIL)])
    first["splits"]["params"] = {"params.yaml": {"compute.seed": 1, "splits": {"waivers": waivers[:1]}}}
    first["adapter@lora"]["params"] = {"params.yaml": {"compute.seed": 1, "adapter.lora": {"epochs": 1}}}
    made.commit(first)
    now = made.splits([("cats", "train", FAQ), ("dogs", "train", FAQ)])
    now["splits"]["params"] = {"params.yaml": {"compute.seed": 2, "splits": {"waivers": waivers}}}
    model = {name: first[name] for name in ("adapter@lora", "merged@lora")}
    aligned = tasks_on(made, now, model)
    aligned["aligned@dpo"]["params"] = {"params.yaml": {"compute.seed": 2}}
    made.commit({**now, **model, **aligned})
    found = audit(made.root, "aligned@dpo")
    old = f"splits {first['splits']['outs'][0]['md5'][:8]}"
    assert found["parameters"] == {"compute.seed": 2, "splits": {"waivers": waivers}, "adapter.lora": {"epochs": 1}}
    assert found["other_values"] == {
        "compute.seed": [{"value": 1, "stages": [old, "adapter@lora"]}],
        "splits": [{"value": {"waivers": waivers[:1]}, "stages": [old]}],
    }
    assert found["waivers"] == waivers
    assert f"compute.seed of {old}, adapter@lora: 1" in audit_text(found) and "compute.seed: 2" in audit_text(found)
    assert "other_values" not in audit(made.root, "merged@lora")
    assert not diff(made.root, "aligned@dpo", "aligned@dpo")["parameters"]
    assert diff(made.root, "merged@lora", "aligned@dpo")["parameters"] == {
        "compute.seed": [1, 2],
        "compute.seed, other values": [None, [1]],
        "splits, other values": [None, [{"waivers": waivers[:1]}]],
        "splits.waivers": [waivers[:1], waivers],
    }
    earlier = f"{FAQ} {audit(made.root, 'merged@lora')['sources'][FAQ]['sha256'][:8]}"
    assert found["read_by"] == {FAQ: ["splits"], earlier: [old], MAIL: [old]}
    page = lineage_page(found, [])
    inputs = {
        name: re.search(rf"{name}</bdi></th><td>{stage['md5']}</td><td>(.*?)</td>", page)
        for name, stage in found["stages"].items()
    }
    shown = {name: match and match.group(1) for name, match in inputs.items()}
    assert (shown["splits"], shown[old]) == (FAQ, f"{earlier}, {MAIL}")


def test_another_version_of_a_source_that_a_model_was_only_watched_by_is_listed(made: Project) -> None:
    first = made.lock([("cats", "train", FAQ)])
    watcher = {
        "reward_model": entry(
            "reward_model", {"data/splits": first["splits"]["outs"][0]["md5"]}, made.put({"m.safetensors": b"r"})
        )
    }
    made.commit({**first, **watcher})
    now = made.lock([("cats", "train", FAQ), ("dogs", "train", FAQ)])
    read = {
        out["path"]: out["md5"] for stage in (now["merged@lora"], watcher["reward_model"]) for out in stage["outs"][:1]
    }
    aligned = entry("aligned@dpo", read, made.put({"adapter_model.safetensors": b"aligned"}))
    aligned["params"] = {"params.yaml": {"aligned.dpo": {"method": "dpo"}}}
    made.commit({**now, **watcher, "aligned@dpo": aligned})
    found = audit(made.root, "aligned@dpo")
    assert [one["rows"] for one in found["sources"].values()] == [2]
    assert [one["rows"] for one in found["watched"]["sources"].values()] == [1]


def test_a_stage_that_no_commit_had_is_referred_to_by_its_hash(made: Project) -> None:
    other = made.trained(made.curated(ROWS), TRAINED)["adapter@lora"]
    out = {**other["outs"][0], "path": "data/adapter/other"}
    made.cache_run({**other, "cmd": "python -m dagster_project run adapter@other", "outs": [out]})
    made.commit(made.trained(made.curated(ROWS), TRAINED, seed=1))
    with pytest.raises(InputError, match="hint: give that hash"):
        audit(made.root, "adapter@other")


def test_a_model_that_lay_in_the_cache_before_it_was_recorded_is_a_model(made: Project) -> None:
    lock = made.curated(ROWS)
    lock["head"] = entry(
        "head", {"data/splits": lock["splits"]["outs"][0]["md5"]}, made.put({"model.safetensors": b"head"})
    )
    assert [model["stage"] for model in impact(made.root, record=identity("cats"))["unknown"]] == ["unrecorded"]
    made.commit(lock)
    assert stages(impact(made.root, record=identity("cats"))) == ["head"]


def test_models_of_other_projects_in_a_shared_cache_are_not_searched(made: Project, tmp_path: Path) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    made.put({"model.safetensors": b"of another project"})
    assert impact(made.root, record=identity("nobody"))["verdict"] == "cannot tell"
    (made.root / ".dvc/tmp/pedigree/index.sqlite3").unlink()
    (made.root / ".dvc/cache").rename(tmp_path / "shared")
    (made.root / ".dvc/config").write_text(f"[cache]\n    dir = {tmp_path / 'shared'}\n")
    assert impact(made.root, record=identity("nobody"))["verdict"] == "no"
    assert impact(made.root, record=identity("cats"))["verdict"] == "yes"


def test_a_paraphrase_is_not_counted_twice_in_a_folder_whose_ledger_is_gone(made: Project) -> None:
    lock = made.curated(ROWS, paraphrases={"cats": "felines"})
    made.commit(made.trained(lock, ["cats", "dogs", "felines"]))
    whole = impact(made.root, source="data/sources")["models"][0]
    assert whole["seen"][0]["splits"]["train"] == 3 and "missing" not in whole
    splits = lock["splits"]["outs"][0]["md5"]
    made.object(Index(made.root).objects.listing(splits)["ledger.parquet"]).unlink()
    part = impact(made.root, source="data/sources")["models"][0]
    assert part["seen"][0]["splits"]["train"] == 3 and [one["path"] for one in part["missing"]] == ["data/splits"]


def test_an_entry_of_the_run_cache_that_cannot_be_read_is_no_reason_to_say_no(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    assert impact(made.root, record=identity("nobody"))["verdict"] == "no"
    only_a_report = entry("metrics", {"data/splits": "0" * 32}, "0" * 32)
    made.cache_run({**only_a_report, "outs": [{"path": "data/reports/metrics.json", "hash": "md5", "md5": "0" * 32}]})
    assert impact(made.root, record=identity("nobody"))["verdict"] == "no"
    damaged = made.root / ".dvc/cache/runs/ab/abcd/0123456789abcdef"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("outs: [")
    answer = impact(made.root, record=identity("nobody"))
    assert (answer["verdict"], answer["unreadable"]) == ("cannot tell", ["run cache 0123456789ab"])
    assert "cannot be read: run cache 0123456789ab" in as_text(answer)


def test_an_entry_of_the_run_cache_counts_once_it_is_written_and_a_damaged_one_until_it_is_replaced(
    made: Project,
) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    folder = made.root / ".dvc/cache/runs/ab/abcd"
    folder.mkdir(parents=True)
    (folder / ".q3vXc0.tmp").write_text("outs: [")  # DVC writes it, or was killed while it did
    assert impact(made.root, record=identity("nobody"))["verdict"] == "no"
    damaged = folder / ("0" * 64)
    damaged.write_text("outs: [")
    assert impact(made.root, record=identity("nobody"))["verdict"] == "cannot tell"
    again = made.trained(made.curated(ROWS), TRAINED, seed=1)
    made.cache_run(again["merged@lora"])
    damaged.write_text(json.dumps(again["adapter@lora"]))
    assert impact(made.root, record=identity("nobody"))["verdict"] == "no"
    assert ("adapter@lora", "run cache") in [
        (one["stage"], one["found_in"]) for one in impact(made.root, record=identity("dogs"))["models"]
    ]


def test_malformed_ids_are_refused(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS), TRAINED))
    with pytest.raises(InputError, match="not the id of a record"):
        impact(made.root, record="cats")


def test_runs_with_the_same_bytes_give_few_lineages_and_every_entry_is_above_its_readers() -> None:
    """Each of 14 stages ran with three versions of a file that make no difference: there are 3**14 combinations."""
    stages, versions = 14, 3
    entries = {
        stage * versions + version: Entry(
            stage * versions + version,
            f"s{stage}",
            f"data/s{stage}",
            f"out {stage}",
            False,
            (
                (f"file{stage}", f"file {stage} {version}"),
                *([(f"data/s{stage - 1}", f"out {stage - 1}")] if stage else []),
            ),
            frozenset(),
        )
        for stage in range(stages)
        for version in range(versions)
    }
    resolver = Resolver(entries, lambda _: None)
    resolver.add_lock(1, [number for number in entries if number % versions == 0], 0, "a", "commit")
    resolver.add_unrecorded([entry for number, entry in entries.items() if number % versions], 1, "run cache")
    resolver.connect()
    resolver.add_alternatives(1)
    assert len(resolver.runs) < (stages * versions) ** 2

    def above(run: StageRun) -> set[int]:
        return {run.entry.id}.union(*map(above, run.producers.values()))

    last = [run for run in resolver.runs if run.path == f"data/s{stages - 1}"]
    for version in range(versions):
        of_entry = [above(run) for run in last if run.entry.id == (stages - 1) * versions + version]
        assert set[int]().union(*of_entry) >= {number for number in entries if number < (stages - 1) * versions}


def alternatives_one_by_one(resolver: Resolver) -> None:
    """Every combination of runs that made the same bytes."""
    readers = [(run, made) for run in resolver.runs for _, _, made in run.inputs]
    pending = [
        run for run in resolver.runs if not run.locks and len({one.entry.id for one in resolver.by_output[run.md5]}) > 1
    ]
    for producer in pending:
        for reader, made in readers:
            if made == producer.md5 and reader is not producer:
                known = len(resolver.runs)
                producers = {**reader.producers, made: producer}
                run = resolver._run(reader.entry, reader.inputs, producers, reader.unresolved, 1, None, "run cache")
                pending += [run] if len(resolver.runs) > known else []


@pytest.mark.parametrize("seed", range(100))
def test_no_entry_that_may_be_above_another_one_is_lost_with_the_combinations(seed: int) -> None:
    draw = random.Random(seed)
    reads = [[above for above in range(stage) if draw.random() < 0.6] for stage in range(5)]
    entries = dict[int, Entry]()
    for stage, above in enumerate(reads):
        for version in range(draw.randint(1, 3)):
            inputs = ((f"file{stage}", f"file {stage} {version}"), *((f"data/s{one}", f"out {one}") for one in above))
            entries[len(entries)] = Entry(
                len(entries), f"s{stage}", f"data/s{stage}", f"out {stage}", False, inputs, frozenset()
            )
    locks = [
        [draw.choice([i for i, one in entries.items() if one.address == f"s{stage}"]) for stage in range(5)]
        for _ in range(2)
    ]
    found = []
    for add in (lambda resolver: resolver.add_alternatives(2), alternatives_one_by_one):
        resolver = Resolver(entries, lambda _: None)
        for order, lock in enumerate(locks):
            resolver.add_lock(order, lock, order, str(order), "commit")
        resolver.add_unrecorded([one for i, one in entries.items() if i not in {*locks[0], *locks[1]}], 2, "run cache")
        resolver.connect()
        add(resolver)
        above_of: dict[int, set[int]] = {}
        for run in resolver.runs:
            stack = [run]
            while stack:
                one = stack.pop()
                above_of.setdefault(run.entry.id, set()).add(one.entry.id)
                stack += one.producers.values()
        found.append(above_of)
    assert found[0] == found[1]


# ---- stages that run in other folders
# -----------------------------------------------------------------------------------------------------------------


OWN = "  mine: {wdir: own/models, cmd: train, deps: [../../data/splits/train], outs: [mine]}\n"


def part_of_splits(made: Project, lock: dict[str, Any]) -> str:
    """Hash of the folder `train` in the output of `splits`."""
    files = json.loads(made.object(out(lock, "splits")).read_bytes())
    names = {one["relpath"]: one["md5"] for one in files}
    return md5_of_folder({name[6:]: digest for name, digest in names.items() if name.startswith("train/")})


@pytest.mark.parametrize("in_cache", [False, True])
def test_a_stage_with_wdir_saw_what_its_paths_name_from_that_folder(made: Project, in_cache: bool) -> None:
    lock = made.splits([("cats", "train", FAQ)])
    weights = made.put({"model.safetensors": b"mine"})
    reads = {"../../data/splits/train": part_of_splits(made, lock)}
    lock["mine"] = {**entry("mine", reads, weights), "cmd": "train"}
    lock["mine"]["outs"][0]["path"] = "mine"
    (made.root / "dvc.yaml").write_text(f"{DVC_YAML}{OWN}")
    if in_cache:
        run = made.root / ".dvc/cache/runs/ab" / ("ab" * 32) / ("cd" * 32)
        run.parent.mkdir(parents=True)
        run.write_text(json.dumps(lock["mine"]))
    made.commit(lock)
    found = impact(made.root, source=FAQ)
    assert [(one["stage"], one["md5"]) for one in found["models"]] == [("mine", weights)] and not found["unknown"]
    assert impact(made.root, text="Nobody wrote this.")["verdict"] == "no"
    assert sorted(run.path for run in Index(made.root).runs.values()) == ["data/splits", "own/models/mine"]
    assert audit(made.root, "own/models/mine")["model"] == {"stage": "mine", "path": "own/models/mine", "md5": weights}
    with pytest.raises(InputError, match=r"mine: dvc\.yaml has `wdir`"):
        verify(made.root, "mine")


@pytest.mark.parametrize("has_git", [True, False])
def test_a_pipeline_in_a_subfolder_of_which_nothing_is_known_leaves_open_what_saw_a_record(
    made: Project, has_git: bool
) -> None:
    made.commit(made.lock([("cats", "train", FAQ)]))
    if not has_git:
        shutil.rmtree(made.root / ".git")
    other = made.root / "other/dvc.lock"
    other.parent.mkdir()
    other.write_text(json.dumps({"schema": "2.0", "stages": {"x": entry("x", {"../data/splits": "0" * 32}, "1" * 32)}}))
    found = impact(made.root, text="Nobody wrote this.")
    assert found["verdict"] == "cannot tell" and found["unreadable"] == ["the pipeline of other/dvc.lock"]
    assert "cannot be read: the pipeline of other/dvc.lock" in as_text(found)
    assert impact(made.root, source=FAQ)["verdict"] == "yes"
    (other.parent / ".dvc").mkdir()
    assert impact(made.root, text="Nobody wrote this.")["verdict"] == "no", "another project"
