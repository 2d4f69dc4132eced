"""Audit and impact over small hand-made histories, compared with a brute-force
oracle; also with parts of the history missing."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import shutil
import subprocess
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from builders.history import DVC_YAML, Project, entry, identity
from builders.records import call, result, rich, said, user
from builders.small_pipeline import git
from conftest import pedigree

from dagster_project.commands.verify import verify
from dagster_project.commands.where import where
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.records import read_table, write_records
from dagster_project.lineage import index, runs
from dagster_project.lineage import rows as row_index
from dagster_project.lineage.database import INDEX_FILE
from dagster_project.lineage.diff import as_text as diff_text
from dagster_project.lineage.diff import diff
from dagster_project.lineage.export.export import export, summarize
from dagster_project.lineage.history import resolve, stages_of
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import audit, document, find, listed, trained_on

pytestmark = pytest.mark.usefixtures("warm_small")

FAQ, MAIL = "data/sources/faq.jsonl", "data/sources/mail.jsonl"
ROWS = [("cats", "train", FAQ), ("dogs", "train", MAIL), ("birds", "validation", FAQ), ("fish", "test", MAIL)]


@pytest.fixture
def made(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def names(found: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(model["stage"], model["commit"]) for model in found["models"]]


def test_a_record_leads_to_every_model_that_saw_it_with_split_and_steps(made: Project) -> None:
    first = made.commit(made.lock(ROWS))
    second = made.commit(made.lock([ROWS[0], *ROWS[2:], ("frogs", "train", FAQ)]))
    found = impact(made.root, record=identity("dogs"))
    assert names(found) == [("adapter@lora", first), ("merged@lora", first)]
    assert found["models"][0]["seen"] == [
        {"by": "adapter@lora", "md5": found["models"][0]["md5"], "splits": {"train": 1}, "steps": [2], "epochs": [1]}
    ]
    assert found["models"][1]["seen"] == found["models"][0]["seen"]  # through its parent
    for text, split in (("birds", "validation"), ("fish", "test")):
        found = impact(made.root, record=identity(text))
        assert [commit for _, commit in names(found)] == [first, first, second, second]
        assert all(
            seen["splits"] == {split: 1} and seen["steps"] == [] for model in found["models"] for seen in model["seen"]
        )
    assert not impact(made.root, record=identity("cows"))["models"]


def test_every_row_that_holds_a_record_is_counted(made: Project) -> None:
    made.commit(made.lock([("cats", "train", FAQ), ("cats", "train", MAIL), ("dogs", "test", FAQ)], trained=["cats"]))
    seen = impact(made.root, record=identity("cats"))["models"][0]["seen"][0]
    assert seen["splits"] == {"train": 2} and seen["steps"] == [1]


def test_the_evaluation_of_a_model_is_no_model_that_saw_a_record(made: Project) -> None:
    lock = made.lock(ROWS)
    read = {f"data/{name}": lock[stage]["outs"][0]["md5"] for name, stage in
            {"merged/lora": "merged@lora", "splits": "splits"}.items()}  # fmt: skip
    made.commit({**lock, "evaluation@lora": entry("evaluation@lora", read, made.put({"results.json": b"{}"}))})
    for text in ("cats", "fish"):
        found = impact(made.root, record=identity(text))
        assert [model["stage"] for model in found["models"]] == ["adapter@lora", "merged@lora"]


def test_a_train_record_beyond_the_last_step_was_used_in_no_step(made: Project) -> None:
    made.commit(made.lock(ROWS, trained=["cats"]))
    assert impact(made.root, record=identity("dogs"))["models"][0]["seen"][0] | {"md5": ""} == {
        "by": "adapter@lora", "md5": "", "splits": {"train": 1}, "steps": [], "epochs": []
    }  # fmt: skip


def test_a_text_is_found_ignoring_case_and_white_space_and_near_copies_on_request(made: Project) -> None:
    long = "the long and winding road that leads to the harbour where seven old boats lie"
    made.commit(made.lock([*ROWS, (long, "train", FAQ), (long.replace("seven", "eight"), "test", FAQ)]))
    assert impact(made.root, text="what of  CATS?")["records"] == [identity("cats")]
    assert impact(made.root, text="All about dogs.")["records"] == [identity("dogs")]
    assert impact(made.root, text="nobody said this")["models"] == []
    alone = impact(made.root, record=identity(long))
    assert alone["models"][0]["seen"][0]["splits"] == {"train": 1}
    both = impact(made.root, record=identity(long), near=True)
    assert [one["example_id"] for one in both["near"]] == [identity(long.replace("seven", "eight"))]
    assert both["models"][0]["seen"][0]["splits"] == {"train": 1, "test": 1}


@pytest.fixture
def traced(made: Project, tmp_path: Path) -> tuple[Project, str]:
    """A project whose train split has a plain record and one with reasoning and calls, and the id of that."""
    given = {"city": "Oslo Harbour", "days": [{"from": "Monday, the ninth", "n": 3}]}
    answer = said("", call(given), call("city=Rome"), reasoning_content="The user wants the weather of the harbour.")
    answers = [answer, result("-3 degrees"), said("Cold.")]
    records = [
        {**rich(user("Is it cold?"), *answers), "source": FAQ},
        {**rich(user("Plain?"), said("Plain.")), "source": FAQ},
    ]
    files = {}
    for split, rows in {"train": records, "validation": [], "test": []}.items():
        write_records(tmp_path / split, rows)
        files |= {f"{split}/{path.name}": path.read_bytes() for path in (tmp_path / split).iterdir()}
    lock = {"splits": entry("splits", {"data/sources": "0" * 32 + ".dir"}, made.put(files))}
    made.commit(lock | made.adapter(lock, []))
    return made, records[0]["example_id"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the user wants  the weather of the harbour.", True),
        ("oslo harbour", True),
        ("Monday, the ninth", True),
        ("city=Rome", True),
        ('{"city":"Oslo Harbour","days":[{"from":"Monday, the ninth","n":3}]}', True),
        ('{"days": [{"n": 3, "from": "Monday, the ninth"}], "city": "Oslo Harbour"}', True),
        ("-3 degrees", True),
        ("Cold.", True),
        ("weather", False),
        ('{"city": "Oslo Harbour"}', False),
        ("{not JSON", False),
        ("Oslo", False),
    ],
)
def test_a_text_is_found_in_reasoning_and_in_the_arguments_of_calls(
    traced: tuple[Project, str], text: str, found: bool
) -> None:
    project, identity_of_row = traced
    assert impact(project.root, text=text)["records"] == ([identity_of_row] if found else [])


def test_near_copies_are_found_in_reasoning_and_in_arguments(traced: tuple[Project, str]) -> None:
    project, identity_of_row = traced
    (copy,) = impact(project.root, text="Surely the user wants the weather of the harbour.", near=True)["near"]
    assert (copy["example_id"], copy["part"]) == (identity_of_row, "messages, reasoning_content")


def test_a_source_leads_to_its_records_by_name_by_folder_and_by_sha256(made: Project) -> None:
    commits = [made.commit(made.lock(ROWS)), made.commit(made.lock([*ROWS, ("frogs", "train", MAIL)]))]
    found = impact(made.root, source=MAIL)
    assert [commit for _, commit in names(found)] == [commits[0]] * 2 + [commits[1]] * 2
    assert found["models"][0]["seen"][0]["splits"] == {"train": 1, "test": 1}
    assert found["models"][0]["seen"][0]["learnt"] == {"records": 1, "first_step": 2, "last_step": 2}
    assert found["models"][2]["seen"][0]["learnt"] == {"records": 2, "first_step": 2, "last_step": 3}
    assert impact(made.root, source="data/sources")["models"][0]["seen"][0]["splits"] == {
        "train": 2,
        "test": 1,
        "validation": 1,
    }
    with pytest.raises(
        InputError, match="no recorded run has read such a file"
    ):  # the beginning of a name is not a folder
        impact(made.root, source="data/sources/m")
    sha256 = audit(made.root, "merged@lora")["sources"][MAIL]["sha256"]
    by_hash = impact(made.root, content=sha256[:20])
    assert [commit for _, commit in names(by_hash)] == [commits[1]] * 2  # while the file was so


def test_a_folder_of_sources_is_not_one_whose_name_has_other_case_or_begins_like_it(made: Project) -> None:
    others = (
        "data/sources/Web/a.jsonl",
        "data/sources/web.jsonl",
        "data/sources/web0/a.jsonl",
        "data/sources/we_/a.jsonl",
    )
    made.commit(
        made.lock(
            [("cats", "train", "data/sources/web/a.jsonl"), *((str(i), "train", one) for i, one in enumerate(others))]
        )
    )
    for asked in ("data/sources/web", "data/sources/web/", "data/sources/web/a.jsonl"):
        [seen] = impact(made.root, source=asked)["models"][0]["seen"]
        assert (seen["splits"], seen["learnt"]) == ({"train": 1}, {"records": 1, "first_step": 1, "last_step": 1})
    with pytest.raises(InputError, match="no recorded run has read"):
        impact(made.root, source="data/sources/WEB")


def test_the_hash_of_a_data_set_shard_source_folder_or_model_leads_to_its_models(made: Project) -> None:
    lock = made.lock(ROWS)
    made.commit(lock)
    other = made.lock(ROWS[:1] + ROWS[2:])
    made.commit(other)
    out = lock["splits"]["outs"][0]["md5"]
    mine = [one["md5"] for address in ("adapter@lora", "merged@lora") for one in lock[address]["outs"]]
    for content in (out, out[:8], lock["splits"]["deps"][0]["md5"], mine[0]):
        assert [model["md5"] for model in impact(made.root, content=content)["models"]] == mine
    files = Index(made.root).files(out)
    shard = impact(made.root, content=files["train/records-00000.parquet"])
    assert [model["md5"] for model in shard["models"]] == mine
    assert shard["models"][0]["seen"][0]["learnt"] == {"records": 2, "first_step": 1, "last_step": 2}
    assert len(impact(made.root, content=files["test/records-00000.parquet"])["models"]) == 4
    with pytest.raises(InputError, match="no output, file of one, or source"):
        impact(made.root, content="0123456789")


def test_an_audit_lists_every_record_with_step_and_source_row(made: Project) -> None:
    commit = made.commit(made.lock(ROWS))
    subject = find(Index(made.root), "merged@lora")
    found = document(subject)
    assert found["records"] == {
        "records": 2,
        "learnt_by": {"adapter@lora": {"records": 2, "views": 2, "steps": 2, "epochs": 1}},
    }
    assert found["code"]["commit"] == commit and found["code"]["clean"]
    assert [one["stage"] for one in found["parents"]] == ["adapter@lora"]
    assert found["sources"][FAQ]["outcomes"] == {"splits": {"train": 1, "validation": 1}}
    assert listed(trained_on(subject)[0]) == [
        {
            "example_id": identity(text),
            "source": source,
            "source_row": row,
            "model": "adapter@lora",
            "steps": [row + 1],
            "epochs": [1],
        }
        for row, (text, _, source) in enumerate(ROWS[:2])
    ]


def test_the_commit_of_a_model_is_the_first_with_its_run_in_dvc_lock(made: Project) -> None:
    lock = made.lock(ROWS)
    first = made.commit(lock)
    later = made.commit({**lock, "splits": {**lock["splits"], "cmd": "another command, the same bytes"}})
    (made.root / "notes.txt").write_text("nothing of it")
    made.commit({}, "notes")
    assert audit(made.root, "adapter@lora")["code"]["commit"] == first
    found = audit(made.root, "splits")["code"]
    assert (found["commit"], found["same_bytes_at"]) == (later, first)
    found = audit(made.root, "adapter@lora")["code"]
    assert (found["commit"], found["lineage_at"]) == (
        first,
        later,
    ), "its own run is that of the first commit, that of its data is not"


def test_no_commit_is_named_for_a_lineage_whose_stages_ran_with_code_of_several_commits(made: Project) -> None:
    def lock(code: bytes, seed: int) -> dict[str, Any]:
        found = made.lock(ROWS, seed=seed)
        found["splits"]["deps"].append({"path": "a.py", "hash": "md5", "md5": hashlib.md5(code).hexdigest()})
        return found

    (made.root / "a.py").write_bytes(b"V = 1\n")
    first = made.commit(lock(b"V = 1\n", seed=0))
    assert audit(made.root, "merged@lora")["code"]["lineage_at"] == first
    (made.root / "a.py").write_bytes(b"V = 2\n")  # splits did not run again
    second = made.commit(lock(b"V = 1\n", seed=1))
    code = audit(made.root, "merged@lora")["code"]
    assert (code["commit"], code["clean"], code["lineage_at"]) == (second, True, None)
    assert "git checkout" not in export(made.root, "merged@lora", "model-card")


def test_a_commit_that_does_not_hold_the_code_that_ran_is_dirty(made: Project) -> None:
    lock = made.lock(ROWS)
    (made.root / "a.py").write_text("V = 1\n")
    recorded = {"path": "a.py", "hash": "md5", "md5": "00000000000000000000000000000000"}
    lock["adapter@lora"]["deps"].append(recorded)
    made.commit(lock)
    assert audit(made.root, "merged@lora")["code"]["differs"] == ["a.py"]
    assert "dirty: it contains a.py otherwise" in pedigree(made.root, "audit", "merged@lora").stdout


def test_uncommitted_work_is_audited_and_labeled_uncommitted(made: Project) -> None:
    first = made.commit(made.lock(ROWS))
    lock = made.lock(ROWS, seed=1)
    made.write(lock)
    found = audit(made.root, "adapter@lora")
    assert found["code"]["commit"] is None and found["code"]["after"] == first and not found["code"]["clean"]
    pairs = [(stage, commit) for commit in (first, None) for stage in ("adapter@lora", "merged@lora")]
    assert names(impact(made.root, record=identity("cats"))) == pairs
    second = made.commit(lock)
    assert audit(made.root, "adapter@lora")["code"]["commit"] == second


def test_models_of_merged_branches_are_found_and_so_are_rebased_ones_while_the_reflog_has_them(made: Project) -> None:
    made.commit(made.lock(ROWS), "base")
    git(made.root, "checkout", "-qb", "side")
    side = made.commit(made.lock(ROWS, seed=1), "side")
    git(made.root, "checkout", "-q", "main")
    mine = made.commit(made.lock(ROWS, seed=2), "main")
    git(made.root, "merge", "-q", "-s", "ours", "-m", "merge", "side")
    git(made.root, "branch", "-qD", "side")
    gone = made.commit(made.lock(ROWS, seed=3), "will be rebased away")
    found = {commit for _, commit in names(impact(made.root, record=identity("cats")))}
    assert {side, mine, gone} <= found and len(found) == 4
    git(made.root, "reset", "-q", "--hard", "HEAD~1")
    after = impact(made.root, record=identity("cats"))
    assert {model["commit"]: model["found_in"] for model in after["models"]} == {
        **dict.fromkeys(found - {gone}, "commit"),
        gone: "reflog",
    }
    assert "in no branch or tag but in the reflog" in as_text(after)
    assert audit(made.root, "merged@lora", rev=gone)["code"]["commit"] == gone
    git(made.root, "reflog", "expire", "--expire=all", "--all")
    left = {model["commit"]: model["found_in"] for model in impact(made.root, record=identity("cats"))["models"]}
    assert left == {
        **dict.fromkeys(found - {gone}, "commit"),
        None: "cache",
    }  # its weights and its training record still lie there
    with pytest.raises(InputError, match="not reachable from any branch, tag or reflog"):
        audit(made.root, "merged@lora", rev=gone)


def test_an_old_model_is_found_by_hash_and_by_a_copy_of_its_folder(made: Project, tmp_path: Path) -> None:
    old = made.lock(ROWS)
    commit = made.commit(old)
    made.commit(made.lock(ROWS, seed=1))
    out = old["merged@lora"]["outs"][0]
    wanted = audit(made.root, "merged@lora", rev=commit)
    assert wanted["model"]["md5"] == out["md5"]
    assert audit(made.root, f"{commit[:10]}:merged@lora") == audit(made.root, out["md5"][:12]) == wanted
    files = Index(made.root).files(out["md5"])
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name, md5 in files.items():
        shutil.copy(Index(made.root).objects.path(md5), copy / name)
    assert audit(made.root, str(copy)) == wanted
    (copy / "README.md").write_text("a card")  # what others add does not hide the weights
    assert audit(made.root, str(copy)) == wanted
    (copy / "model.safetensors").write_text("other weights")
    with pytest.raises(InputError, match="no output in history contains these files"):
        audit(made.root, str(copy))


def test_a_file_of_several_outputs_asks_for_the_weights_and_not_for_more_of_a_hash(made: Project) -> None:
    folders = [made.put({"config.json": b"{}", "model.safetensors": name}) for name in (b"one", b"two")]
    made.commit({f"stage{i}": entry(f"stage{i}", {}, md5) for i, md5 in enumerate(folders)})
    (made.root / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"could be {folders[0]}|could be {folders[1]}") as refused:
        audit(made.root, str(made.root / "config.json"))
    assert refused.value.hint == "give one of these hashes, or the file of the weights"


def test_a_stage_is_found_beside_an_output_without_a_hash() -> None:
    """Such as one in S3, which DVC records by its etag."""
    lock = {
        "upload": {"outs": [{"path": "s3://bucket/x", "etag": "1"}]},
        "splits": {"outs": [{"path": "data/splits", "md5": "abcdef12"}]},
    }
    assert resolve(lock, "data/splits") == resolve(lock, "abcdef") == resolve(lock, "ABCDEF12") == "splits"


def test_what_has_no_md5_hides_nothing_and_is_not_reproduced(made: Project) -> None:
    """Such as a dependency on the web or in S3, of which DVC records an etag."""
    lock = made.lock(ROWS)
    lock["extra"] = {"cmd": "x", "outs": [{"path": "s3://b/k", "hash": "etag", "etag": "1"}]}
    lock["adapter@lora"]["deps"].append({"path": "https://example.org/a", "hash": "etag", "etag": "1"})
    made.commit(lock)
    assert where(made.root, audit(made.root, "merged@lora")["stages"]) == {}
    with pytest.raises(InputError, match=r"adapter@lora: dvc\.lock records no md5 of https://example\.org/a"):
        verify(made.root, "merged@lora", deep=True)
    made.commit({"extra": lock["extra"]})
    with pytest.raises(InputError, match=r"dvc\.lock has no stages with an output"):
        audit(made.root, "extra")


def test_a_file_of_an_output_that_nothing_records_any_more_is_in_no_output(made: Project, tmp_path: Path) -> None:
    """The index still lists it: its run was never committed, and the next one replaced it in dvc.lock."""
    lock = made.lock(ROWS)
    made.write(lock)
    shard = Index(made.root).files(lock["splits"]["outs"][0]["md5"])["train/records-00000.parquet"]
    shutil.copy(made.object(shard), tmp_path / "copy.parquet")
    assert audit(made.root, str(tmp_path / "copy.parquet"))["model"]["stage"] == "splits"
    made.commit(made.lock([("frogs", "train", FAQ), *ROWS[1:]]))
    with pytest.raises(InputError, match="no output in history contains these files"):
        audit(made.root, str(tmp_path / "copy.parquet"))


def test_a_run_of_the_run_cache_alone_is_audited_on_a_branch_without_dvc_lock(made: Project) -> None:
    lock = made.lock(ROWS)
    made.commit(made.lock(ROWS, seed=1))
    for name in lock:
        made.cache_run(lock[name])
    git(made.root, "checkout", "-q", "--orphan", "empty")
    git(made.root, "rm", "-qf", "dvc.lock")
    md5 = lock["merged@lora"]["outs"][0]["md5"]
    assert audit(made.root, md5)["model"] == {"stage": "merged@lora", "path": "data/merged/lora", "md5": md5}


def trained_again(made: Project, splits: str = "splits") -> tuple[dict[str, Any], dict[str, Any]]:
    """Two versions of dvc.lock, both committed: the second adapter is trained from a copy of the first merged model.

    Args:
        splits: name of the data set's stage in the second.
    """
    first = made.lock(ROWS)
    first["adapter@lora"]["outs"].append(made.report("adapter/lora", {"environment": {"torch": "1"}, "steps": 2}))
    first["merged@lora"]["outs"].append(made.report("merged/lora", {"output_sha256": "1" * 64}))
    made.commit(first)
    second = {splits: first["splits"], **made.adapter(first, ["dogs"])}
    previous = {"path": "data/previous", "hash": "md5", "md5": first["merged@lora"]["outs"][0]["md5"]}
    second["adapter@lora"]["deps"].append(previous)
    second["adapter@lora"]["outs"].append(made.report("adapter/lora", {"environment": {"torch": "2"}, "steps": 1}))
    second |= made.merged(second)
    second["merged@lora"]["outs"].append(made.report("merged/lora", {"output_sha256": "2" * 64}))
    made.commit(second)
    return first, second


def test_two_trainings_of_one_stage_are_counted_apart(made: Project) -> None:
    first, _ = trained_again(made)
    before = f"adapter@lora {first['adapter@lora']['outs'][0]['md5'][:8]}"
    assert audit(made.root, "merged@lora")["records"] == {
        "records": 2,
        "learnt_by": {
            before: {"records": 2, "views": 2, "steps": 2, "epochs": 1},
            "adapter@lora": {"records": 1, "views": 1, "steps": 1, "epochs": 1},
        },
    }
    found = listed(trained_on(find(Index(made.root), "merged@lora"))[0])
    assert [(one["model"], one["steps"]) for one in found] == [(before, [1]), (before, [2]), ("adapter@lora", [1])]


def test_an_export_of_a_model_that_was_trained_again_describes_the_later_training(made: Project) -> None:
    trained_again(made)
    summary = summarize(find(Index(made.root), "merged@lora"))
    assert (summary["model"]["sha256"], summary["training"]["steps"]) == ("2" * 64, 1)
    assert summary["environment"] == {"torch": "2"}


def test_a_data_set_that_two_trainings_read_under_two_names_of_its_stage_is_two_stages(made: Project) -> None:
    trained_again(made, "my_splits")
    stages = summarize(find(Index(made.root), "merged@lora"))["stages"]
    assert stages["splits"]["md5"] == stages["my_splits"]["md5"]


def test_an_export_of_a_revision_has_its_provider_in_either_notation(made: Project) -> None:
    params = made.root / "params.yaml"
    params.write_text("provider: {legal_name: Then Ltd}")
    commit = made.commit(made.lock(ROWS))
    params.write_text("provider: {legal_name: Now Ltd}")
    then = export(made.root, "merged@lora", "eu-summary", rev=commit)
    assert "**Provider name:** Then Ltd" in then
    assert export(made.root, f"{commit}:merged@lora", "eu-summary") == then


def test_a_renamed_stage_is_one_model_by_its_content(made: Project) -> None:
    lock = made.lock(ROWS)
    first = made.commit(lock)
    renamed = {
        "sft@lora": {**lock["adapter@lora"], "outs": [{**lock["adapter@lora"]["outs"][0], "path": "data/sft/lora"}]}
    }
    deps = [{**lock["merged@lora"]["deps"][0], "path": "data/sft/lora"}]
    made.commit({"splits": lock["splits"], **renamed, "merged@lora": {**lock["merged@lora"], "deps": deps}})
    found = impact(made.root, record=identity("cats"))
    assert names(found) == [("adapter@lora", first), ("merged@lora", first)]
    assert found["models"][0]["also_called"] == ["sft@lora"]
    lines = [line.strip() for line in as_text(found).splitlines() if "train 1; step 1" in line]
    assert len(lines) == len({*lines}) and "train 1; step 1 as sft@lora" in lines
    assert [one["stage"] for one in audit(made.root, "merged@lora")["parents"]] == ["sft@lora"]
    with pytest.raises(InputError, match=r"adapter@lora is not in dvc\.lock; it was before, last with md5"):
        audit(made.root, "adapter@lora")


def test_after_gc_missing_data_is_reported_as_unknown_with_the_fetch_command(made: Project) -> None:
    commit = made.commit(old := made.lock(ROWS))
    made.commit(new := made.lock([("frogs", "train", FAQ), *ROWS[1:]]))
    made.collect_garbage(new)
    found = impact(made.root, record=identity("cats"))
    assert found["models"] == []
    assert [model["md5"] for model in found["unknown"]] == [
        old[name]["outs"][0]["md5"] for name in ("adapter@lora", "merged@lora")
    ]
    assert {one["path"] for one in found["unknown"][0]["missing"]} == {"data/splits", "data/adapter/lora"}
    done = pedigree(made.root, "impact", "--record", identity("cats"))
    assert (
        done.returncode == 2
        and "no model is known to have seen it, but not everything could be looked at" in done.stdout
    )
    assert f"fetch: `git checkout {commit[:12]}`, then `dvc pull splits adapter@lora`" in done.stdout
    assert len(impact(made.root, record=identity("dogs"))["models"]) == 2
    told = audit(made.root, "merged@lora", rev=commit)
    assert told["records"] is None and {one["path"] for one in told["missing"]} == {"data/adapter/lora"}
    assert "records: unknown" in diff_text(diff(made.root, f"{commit}:merged@lora", "merged@lora"))
    of_both = diff(made.root, f"{commit}:merged@lora", f"{commit}:adapter@lora")["missing"]
    assert [one["path"] for one in of_both] == ["data/splits"], "what both models need is named once"


def test_of_a_model_that_was_erased_an_audit_names_no_command_that_brings_it_back(made: Project) -> None:
    commit = made.commit(old := made.lock(ROWS))
    made.commit(new := made.lock([("frogs", "train", FAQ), *ROWS[1:]]))
    made.collect_garbage(new)
    folder = made.root / "data/erasures"
    folder.mkdir(parents=True)
    (folder / "1.dsse.json").write_text('{"payload": ""}')
    asked = {"md5": old["adapter@lora"]["outs"][0]["md5"], "path": "data/adapter/lora"}

    def fetch_hint_of(**models: list[dict[str, str]]) -> str:
        certificate = {"date": "2026-01-02", "models": {"made again": [], "retired": [], **models}}
        (folder / "1.json").write_text(json.dumps(certificate))
        [absent] = audit(made.root, "merged@lora", rev=commit)["missing"]
        assert {key: absent[key] for key in asked} == asked
        return str(absent["fetch"])

    erased = (
        "nothing, because the erasure of 2026-01-02 (data/erasures/1.json) deleted it; what brings it back also brings"
        " back the records"
    )
    again = {"stage": "adapter@lora", "before": asked["md5"], "after": new["adapter@lora"]["outs"][0]["md5"]}
    assert (
        fetch_hint_of(**{"made again": [again]})
        == fetch_hint_of(retired=[{"stage": "adapter@lora", "before": asked["md5"]}])
        == erased
    )
    [data] = diff(made.root, f"{commit}:merged@lora", "merged@lora")["missing"]
    assert (data["path"], data["fetch"]) == (
        "data/splits", "nothing, because the erasure of 2026-01-02 (data/erasures/1.json) deleted the data"
    )  # fmt: skip
    assert "dvc pull" in fetch_hint_of(**{"made again": [{**again, "after": asked["md5"]}]}), (
        "the same bytes, so it was kept"
    )
    assert "dvc pull" in fetch_hint_of()
    [data] = diff(made.root, f"{commit}:merged@lora", "merged@lora")["missing"]
    assert "dvc pull splits" in data["fetch"], "no erasure names the model"


def test_one_missing_shard_makes_every_data_set_that_shares_it_unknown(made: Project) -> None:
    first, second = made.lock(ROWS), made.lock([("frogs", "train", FAQ), *ROWS[2:]])
    made.commit(first)
    made.commit(second)
    shared = Index(made.root).files(first["splits"]["outs"][0]["md5"])["test/records-00000.parquet"]
    shutil.rmtree((made.root / INDEX_FILE).parent)
    Index(made.root).objects.path(shared).unlink()
    assert len(impact(made.root, record=identity("fish"))["unknown"]) == 4
    assert len(impact(made.root, record=identity("frogs"))["unknown"]) == 2


def test_records_are_resolved_from_the_data_or_the_training_record_alone(made: Project) -> None:
    lock = made.lock(ROWS)
    made.commit(lock)
    known = Index(made.root)
    evidence = known.files(lock["adapter@lora"]["outs"][0]["md5"])["examples.parquet"]
    shard = known.files(lock["splits"]["outs"][0]["md5"])["train/records-00000.parquet"]
    for gone, splits, steps in ((evidence, {"train": 1}, None), (shard, {"train": 1}, [1])):
        shutil.rmtree((made.root / INDEX_FILE).parent)
        path = known.objects.path(gone)
        content = path.read_bytes()
        path.unlink()
        (seen,) = impact(made.root, record=identity("cats"))["models"][0]["seen"]
        assert (seen["splits"], seen["steps"]) == (splits, steps)
        path.write_bytes(content)


def test_indexed_records_stay_known_after_gc(made: Project) -> None:
    old = made.lock(ROWS)
    made.commit(old)
    before = impact(made.root, record=identity("cats"))
    new = made.lock([("frogs", "train", FAQ)])
    made.commit(new)
    made.collect_garbage(new)
    after = impact(made.root, record=identity("cats"))
    assert after["models"] == before["models"] and not after["unknown"]


def test_a_clone_without_cache_shows_the_chain_and_names_missing_data(made: Project, tmp_path: Path) -> None:
    made.commit(made.lock(ROWS))
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(made.root), str(clone))
    found = impact(clone, record=identity("cats"))
    assert found["models"] == [] and [one["stage"] for one in found["unknown"]] == ["adapter@lora", "merged@lora"]
    told = audit(clone, "merged@lora")
    assert [one["stage"] for one in told["parents"]] == ["adapter@lora"] and told["records"] is None
    assert told["sources"].keys() == {FAQ, MAIL} and told["missing"][0]["fetch"].startswith("`dvc pull adapter@lora`")
    shutil.copytree(made.root / ".dvc" / "cache", clone / ".dvc" / "cache")
    assert len(impact(clone, record=identity("cats"))["models"]) == 2


def test_without_a_cache_the_workspace_is_read_if_its_bytes_match(made: Project) -> None:
    lock = made.lock(ROWS)
    made.commit(lock)
    known = Index(made.root)
    for stage in lock.values():
        out = stage["outs"][0]
        for name, md5 in known.files(out["md5"]).items():
            target = made.root / out["path"] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(known.objects.path(md5), target)
    made.forget_cache()
    shutil.rmtree((made.root / INDEX_FILE).parent)
    assert len(impact(made.root, record=identity("cats"))["models"]) == 2
    shutil.rmtree((made.root / INDEX_FILE).parent)
    (made.root / "data/splits/train/records-00000.parquet").write_bytes(b"other")
    assert impact(made.root, record=identity("fish"))["unknown"]


def test_a_shallow_clone_is_reported(made: Project, tmp_path: Path) -> None:
    made.commit(made.lock(ROWS))
    made.commit(made.lock(ROWS, seed=1))
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{made.root}", str(clone))
    shutil.copytree(made.root / ".dvc" / "cache", clone / ".dvc" / "cache")
    found = impact(clone, record=identity("cats"))
    assert found["shallow"] and [model["stage"] for model in found["models"]] == [
        "adapter@lora",
        "merged@lora",
        "unrecorded",
    ]
    assert "models before its first commit are unknown" in as_text(found)
    assert audit(clone, "merged@lora")["code"]["or_earlier"]


def test_a_diff_names_the_record_that_was_changed_added_or_moved(made: Project) -> None:
    before = made.commit(made.lock(ROWS))
    made.commit(made.lock([("lions", "train", FAQ), ROWS[1], ROWS[2], ("fish", "train", MAIL), ("newts", "test", FAQ)]))
    found = diff(made.root, "merged@lora", "merged@lora", rev=before)
    assert found["records"]["changed"] == [
        {"before": {"example_id": identity("cats"), "splits": ["train"], "rows": [f"{FAQ}:0"]},
         "after": {"example_id": identity("lions"), "splits": ["train"], "rows": [f"{FAQ}:0"]}}
    ]  # fmt: skip
    assert [one["example_id"] for one in found["records"]["added"]] == [identity("newts")]
    assert [one["after"]["splits"] for one in found["records"]["moved"]] == [["train"]]
    assert not diff(made.root, "adapter@lora", "merged@lora")["records"]["changed"]
    done = pedigree(made.root, "audit", "--diff", f"{before}:merged@lora", "merged@lora")
    assert done.returncode == 0 and f"- {identity('cats')}  train  {FAQ}:0\n  + {identity('lions')}" in done.stdout


def test_models_of_one_data_set_that_were_trained_on_other_records_are_not_called_the_same(made: Project) -> None:
    lock = made.lock([ROWS[0], ("fish", "train", MAIL), ("newts", "train", FAQ)])
    lock |= made.adapter(lock, ["cats", "cats"], "adapter@dora", seed=5)  # as with fewer steps
    made.commit(lock | made.merged(lock, "adapter@dora", "merged@dora"))
    found = diff(made.root, "merged@lora", "merged@dora")
    assert found["records"] == {"added": [], "removed": [], "changed": [], "moved": []}, "their data set is the same"
    assert found["trained_on"] == {"records": [3, 1], "alone": [2, 0]}
    assert "trained on: 3 -> 1 records, 2 by the first alone, 0 by the second alone" in diff_text(found)
    assert "trained on" not in diff_text(diff(made.root, "adapter@dora", "merged@dora"))


def test_a_model_with_the_weights_of_another_has_the_same_records(made: Project) -> None:
    lock = made.lock(ROWS)
    lock |= made.adapter(lock, ["cats"], "adapter@dora", seed=5)
    lock |= made.merged(lock, "adapter@dora", "merged@dora")
    chosen = lock["merged@dora"]["outs"][0]
    board = entry("comparison", {"data/splits": lock["splits"]["outs"][0]["md5"]}, made.put({"board.md": b"dora"}))
    weights = made.put({"model.safetensors": lock["adapter@dora"]["outs"][0]["md5"].encode(), "README.md": b"card"})
    release = entry("release", {"data/comparison": board["outs"][0]["md5"], "data/merged": "f" * 32 + ".dir"}, weights)
    made.commit({**lock, "comparison": board, "release": release})
    assert [one["md5"] for one in audit(made.root, "release")["parents"]][-1] == chosen["md5"]
    found = impact(made.root, record=identity("dogs"))
    (seen,) = next(model for model in found["models"] if model["stage"] == "release")["seen"]
    assert (seen["by"], seen["steps"]) == ("adapter@dora", [])


def test_a_model_converted_in_an_earlier_run_saw_nothing_of_a_run_that_has_not_come_to_it(made: Project) -> None:
    """A stage of the user's own, which writes other weights than the models in the folder that it reads."""
    lock = made.lock(ROWS)
    folders = {
        f"data/{stage}": made.folder({"lora": lock[f"{stage}@lora"]["outs"][0]["md5"]})
        for stage in ("adapter", "merged")
    }
    converted = {
        "converted": entry("converted", folders, made.put({"model.safetensors": b"weights of another format"}))
    }
    first = made.commit({**lock, **converted})
    made.write({**made.lock([("frogs", "train", FAQ), *ROWS[2:]]), **converted})
    assert names(impact(made.root, record=identity("frogs"))) == [("adapter@lora", None), ("merged@lora", None)]
    assert ("converted", first) in names(impact(made.root, record=identity("dogs")))


def released(made: Project, lock: Mapping[str, Any], original: str, **folders: str) -> dict[str, Any]:
    """The stage release: a copy of one merged model with a card, chosen from folders of models."""
    listing = json.loads(made.object(original).read_bytes())
    content = {one["relpath"]: made.object(one["md5"]).read_bytes() for one in listing}
    return {
        **lock,
        "release": entry(
            "release",
            {f"data/{name}": value for name, value in folders.items()},
            made.put({**content, "README.md": b"card"}),
        ),
    }


def test_a_release_of_a_model_that_nothing_records_saw_nothing_of_other_variants_and_cannot_be_told(
    made: Project,
) -> None:
    old = made.lock(ROWS)
    merged = old["merged@lora"]["outs"][0]["md5"]
    folder = made.folder({"lora": merged})
    release = released(made, {}, merged, merged=folder)
    new = made.lock([("frogs", "train", FAQ), *ROWS[2:]])
    made.commit({**new, **release})  # the release did not run again, and no commit has what it is a copy of
    made.collect_garbage({**new, **release})
    found = impact(made.root, record=identity("frogs"))
    assert [model["stage"] for model in found["models"]] == ["adapter@lora", "merged@lora"]
    assert [(one["stage"], one["unexplained"]) for one in found["unknown"]] == [
        ("release", ["the model that it is a copy of"])
    ]
    assert impact(made.root, record=identity("nobody"))["verdict"] == "cannot tell"
    audited = audit(made.root, "release")
    assert (audited["parents"], audited["sources"], set(audited["stages"])) == ([], {}, {"release"})
    assert [one["path"] for one in audited["missing"]] == ["the model that data/release is a copy of"]
    with pytest.raises(InputError, match="the model that data/release is a copy of: not recorded"):
        export(made.root, "release", "model-card")


def test_records_of_a_model_whose_data_nothing_records_cannot_be_told(made: Project) -> None:
    """Neither that all records were added, nor that there are no sources."""
    before = made.commit(made.lock(ROWS))
    lock = made.lock(ROWS)
    lock["adapter@lora"]["deps"][0]["md5"] = "0" * 32 + ".dir"
    made.commit(lock)
    found = diff(made.root, "merged@lora", "merged@lora", rev=before)
    assert found["records"] is None and [one["path"] for one in found["missing"]] == ["data/splits"]
    assert [one["path"] for one in audit(made.root, "merged@lora")["missing"]] == ["data/splits"]
    with pytest.raises(InputError, match="data/splits: not recorded or not available"):
        export(made.root, "merged@lora", "cyclonedx")


def test_an_export_is_not_written_without_the_report_that_names_the_sources(made: Project) -> None:
    made.commit(made.lock(ROWS))
    assert FAQ in export(made.root, "merged@lora", "model-card")
    git(made.root, "checkout", "-q", "--orphan", "other")
    git(made.root, "rm", "-q", "--cached", "data/reports/splits.json")
    (made.root / "data/reports/splits.json").unlink()
    git(made.root, "commit", "-qm", "without a report")
    git(made.root, "branch", "-qD", "main")
    git(made.root, "reflog", "expire", "--expire=all", "--all")
    with pytest.raises(InputError, match=r"data/reports/splits\.json: not recorded or not available"):
        export(made.root, "merged@lora", "model-card")


def test_a_release_is_not_credited_with_what_a_variant_with_other_weights_saw(made: Project) -> None:
    """The folder that it was chosen from cannot be compared, because the files of one variant are gone."""
    merged = made.lock(ROWS)["merged@lora"]["outs"][0]["md5"]
    lock = released(made, made.lock([("frogs", "train", FAQ), *ROWS[2:]]), merged, merged=made.folder({"lora": merged}))
    lock |= made.adapter(lock, ["frogs"], "adapter@dora", seed=5)
    lock |= made.merged(lock, "adapter@dora", "merged@dora")
    made.commit(lock)
    made.collect_garbage(lock)
    made.object(lock["merged@dora"]["outs"][0]["md5"]).unlink()
    found = impact(made.root, record=identity("frogs"))
    assert {model["stage"] for model in found["models"]} == {
        f"{stage}@{name}" for stage in ("adapter", "merged") for name in ("lora", "dora")
    }
    assert [(one["stage"], [absent["path"] for absent in one["missing"]]) for one in found["unknown"]] == [
        ("release", ["data/merged/dora"])
    ]


def test_a_release_whose_files_and_report_are_gone_is_not_said_to_have_seen_what_each_variant_saw(
    made: Project,
) -> None:
    lock = made.lock(ROWS)
    lock |= made.adapter(lock, ["cats"], "adapter@dora", seed=5)
    lock |= made.merged(lock, "adapter@dora", "merged@dora")
    merged = {name: lock[f"merged@{name}"]["outs"][0]["md5"] for name in ("lora", "dora")}
    (made.root / "dvc.yaml").write_text(DVC_YAML + "  release: {cmd: x, meta: {kinds: [safetensors]}}\n")
    release = released(made, lock, merged["dora"], merged=made.folder(merged))
    made.commit(release)
    made.object(release["release"]["outs"][0]["md5"]).unlink()
    found = impact(made.root, record=identity("cats"))
    assert "release" not in {model["stage"] for model in found["models"]}
    assert [(one["stage"], [absent["path"] for absent in one["missing"]]) for one in found["unknown"]] == [
        ("release", ["data/release"])
    ]


def test_without_files_a_release_is_not_credited_with_a_later_run_of_the_variant_that_it_names(
    made: Project, tmp_path: Path
) -> None:
    """dvc.lock has the hash of the reports that the release read."""

    def reported(lock: dict[str, Any], name: str, text: str) -> str:
        path = made.root / f"data/reports/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = hashlib.md5(text.encode()).hexdigest()
        lock[name.replace("/", "@")]["outs"].append({"path": f"data/reports/{name}.json", "hash": "md5", "md5": digest})
        return md5_of_folder({"lora.json": digest})

    lock = made.lock(ROWS)
    merged, reports = lock["merged@lora"]["outs"][0]["md5"], reported(lock, "merged/lora", "{}")
    (made.root / "dvc.yaml").write_text(DVC_YAML + "  release: {cmd: x, meta: {kinds: [safetensors]}}\n")
    lock = released(made, lock, merged, merged=made.folder({"lora": merged}), **{"reports/merged": reports})
    reported(lock, "release", json.dumps({"variant": "lora"}))
    made.commit(lock)
    new = made.lock([("frogs", "train", FAQ), *ROWS[2:]])
    reported(new, "merged/lora", '{"again": 1}')
    made.commit({**new, "release": lock["release"]})
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(made.root), str(clone))
    parents = [[one["md5"] for one in audit(clone, "release", rev)["parents"]] for rev in ("HEAD~1", "HEAD")]
    assert parents == [[lock["adapter@lora"]["outs"][0]["md5"], merged]] * 2, "the same run of the release"
    latest = tmp_path / "latest"
    git(tmp_path, "clone", "-q", "--depth", "1", made.root.as_uri(), str(latest))
    assert audit(latest, "release")["parents"] == [], "its own run of merged is in no commit here"


def test_a_release_of_an_earlier_run_differs_by_the_records_of_its_own_model(made: Project) -> None:
    old = made.lock(ROWS)
    merged = old["merged@lora"]["outs"][0]["md5"]
    board = {
        "comparison": entry(
            "comparison", {"data/splits": old["splits"]["outs"][0]["md5"]}, made.put({"board.md": b"lora"})
        )
    }
    folders = {"merged": made.folder({"lora": merged}), "comparison": board["comparison"]["outs"][0]["md5"]}
    release = released(made, {}, merged, **folders)
    first = made.commit({**old, **board, **release})
    new = made.lock([("frogs", "train", FAQ), *ROWS[1:]])
    board["comparison"]["deps"][0]["md5"] = new["splits"]["outs"][0]["md5"]
    made.commit({**new, **board, **release})  # a comparison of later models had the same result
    found = diff(made.root, "merged@lora", "release", rev=first)
    assert not any(found["records"].values())


def oracle(
    history: list[tuple[str, dict[str, Any]]], texts: dict[str, list[str]], rows: dict[str, Any], text: str
) -> set[Any]:
    """(md5 of model, split, steps) by brute force: every lock of history, every row of its data."""
    found = set()
    for _, lock in history:
        data = rows[lock["splits"]["outs"][0]["md5"]]
        adapter = lock["adapter@lora"]["outs"][0]["md5"]
        steps = tuple(i + 1 for i, one in enumerate(texts[adapter]) if one == text)
        for split in {split for one, split, _ in data if one == text}:
            for stage in ("adapter@lora", "merged@lora"):
                found.add((lock[stage]["outs"][0]["md5"], split, steps))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_match_a_brute_force_oracle(made: Project, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_index, "CHUNK", 2)
    monkeypatch.setattr(index, "SEGMENT", 5)
    draw = random.Random(seed)
    words = [f"word{i}" for i in range(8)]
    history, texts, rows = [], {}, {}
    for i in range(6):
        if history and draw.random() < 0.4:
            git(made.root, "checkout", "-q", "-b", f"branch{i}", draw.choice(history)[0])
        given = [
            (word, draw.choice(["train", "train", "validation", "test"]), draw.choice([FAQ, MAIL]))
            for word in words
            if draw.random() < 0.6
        ]
        train = [word for word, split, _ in given if split == "train"]
        learnt = draw.choices(train, k=5) if train else []
        lock = made.lock(given, trained=learnt)
        texts[lock["adapter@lora"]["outs"][0]["md5"]] = learnt
        rows[lock["splits"]["outs"][0]["md5"]] = given
        history.append((made.commit(lock), lock))
        if draw.random() < 0.5:  # the index grows as history does
            impact(made.root, record=identity("nobody"))
    for rebuilt in (False, True):
        if rebuilt:
            (made.root / INDEX_FILE).unlink()
        for word in words:
            found = impact(made.root, record=identity(word))
            told = {
                (m["md5"], split, tuple(s["steps"]))
                for m in found["models"]
                for s in m["seen"]
                for split in s["splits"]
            }
            assert told == oracle(history, texts, rows, word)
            assert impact(made.root, text=f"What of {word}?")["models"] == found["models"]
    for commit, lock in history:
        subject = find(Index(made.root), "merged@lora", commit)
        seen = trained_on(subject)[0].rows(named=True)
        learnt = texts[lock["adapter@lora"]["outs"][0]["md5"]]
        assert [(row["step"], row["example_id"]) for row in seen] == [
            (i + 1, identity(word)) for i, word in enumerate(learnt)
        ]
    counts = Counter(source for _, _, source in rows[history[-1][1]["splits"]["outs"][0]["md5"]])
    last = {m["md5"]: m for source in counts for m in impact(made.root, source=source)["models"]}
    assert not counts or history[-1][1]["merged@lora"]["outs"][0]["md5"] in last


def test_a_damaged_index_is_rebuilt(made: Project) -> None:
    made.commit(made.lock(ROWS))
    before = impact(made.root, record=identity("cats"))
    (made.root / INDEX_FILE).write_bytes(b"no database at all, but a file of some length" * 100)
    assert impact(made.root, record=identity("cats")) == before


LOCKED = "schema: '2.0'\nstages:\n  a:\n    cmd: a\n    outs:\n    - path: data/a\n      md5: '1'\n  b@x:\n    cmd: b\n"


def test_an_entry_of_dvc_lock_is_parsed_once_however_many_commits_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    monkeypatch.setattr(runs, "_SECTIONS", {})
    monkeypatch.setattr(runs, "stages_of", lambda text, *where: parsed.append(text) or stages_of(text, *where))
    changed = LOCKED.replace("cmd: b", "cmd: c")
    for text in (LOCKED, changed, LOCKED):
        assert runs.sections_of(text) == {name: runs.as_section(name, one) for name, one in stages_of(text).items()}
    assert ["  a:" in text for text in parsed] == [True, False] and "cmd: c" in parsed[1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  b@x:", "<<<<<<< ours\n  b@x:"),
        ("  b@x:", "lost\n  b@x:"),
        ("  b@x:", " b@x:"),
        ("b@x", "a"),
        ("md5: '1'", "md5: &one '1'"),
        ("cmd: b\n", "cmd: *one\n"),
        ("  b@x:", "  # of a person\n  b@x:"),
        ("    cmd: b\n", ""),
        ("\n", "\r\n"),
        ("schema", "# of a person\nschema"),
        ("  b@x:\n    cmd: b\n", "meta: {}\n"),
    ],
)
def test_a_dvc_lock_that_dvc_did_not_write_reads_as_a_whole(old: str, new: str) -> None:
    """Not as the entries before the first line that does not belong to one."""

    def read(text: str, parse: Any) -> Any:
        try:
            return dict(parse(text))
        except InputError as error:
            return str(error)

    runs.sections_of(LOCKED)
    whole = read(LOCKED.replace(old, new), stages_of)
    expected = whole if isinstance(whole, str) else {name: runs.as_section(name, one) for name, one in whole.items()}
    assert read(LOCKED.replace(old, new), runs.sections_of) == expected


def test_each_file_is_read_once_however_many_models_saw_it(made: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    shard = row_index.RowCollector.add_shard
    monkeypatch.setattr(
        row_index.RowCollector, "add_shard", lambda self, path, content: read.append(path) or shard(self, path, content)
    )
    for seed in range(5):
        made.commit(made.lock(ROWS, seed=seed))
        impact(made.root, record=identity("cats"))
    assert len(read) == 3


def test_the_exit_code_is_1_for_no_result_and_2_for_bad_input(made: Project, tmp_path: Path) -> None:
    made.commit(made.lock(ROWS))
    assert pedigree(made.root, "impact", "--text", "Nobody said this.").returncode == 1
    told = pedigree(made.root, "impact", "--record", identity("dogs"))
    assert (
        told.returncode == 0
        and "train 1; step 2 through adapter@lora" in told.stdout
        and "2 model versions saw it" in told.stdout
    )
    assert json.loads(pedigree(made.root, "impact", "--source", MAIL, "--json").stdout)["models"]
    for wrong in (
        ["impact"],
        ["impact", "--source", MAIL, "--near"],
        ["audit"],
        ["audit", "splits", "--diff", "a", "b"],
        ["audit", "nothing"],
        ["audit", "splits", "--records", "x.txt"],
        ["audit", "splits", "--rev", "nowhere"],
    ):
        done = pedigree(made.root, *wrong)
        assert done.returncode == 2 and "hint:" in done.stderr and "Traceback" not in done.stderr
    page, rows = tmp_path / "page.html", tmp_path / "rows.parquet"
    done = pedigree(made.root, "audit", "merged@lora", "--html", str(page), "--records", str(rows), "--json")
    assert [one["example_id"] for one in json.loads(done.stdout)["records"]["list"]] == [
        identity("cats"),
        identity("dogs"),
    ]
    assert [row["step"] for row in read_table(rows)] == [1, 2]
    text = page.read_text()
    for shown in ("adapter@lora", MAIL, identity("cats"), "<svg", "pedigree verify merged@lora"):
        assert shown in text
    assert "http://" not in text and "https://" not in text


@pytest.mark.parametrize(
    ("option", "file"),
    [("--records", "data/splits/ledger.parquet"), ("--html", "data/splits/page.html"), ("--records", ".dvc/rows.csv")],
)
def test_an_audit_writes_no_file_into_an_output(made: Project, option: str, file: str) -> None:
    made.commit(made.lock(ROWS))
    before = sorted(made.root.rglob("*"))
    done = pedigree(made.root, "audit", "merged@lora", option, file)
    assert done.returncode == 2 and f"{option} {file}" in done.stderr and "name another file" in done.stderr
    assert {path for path in made.root.rglob("*") if ".dvc/tmp" not in str(path)} <= set(before)


def test_a_project_without_git_is_audited_as_uncommitted(made: Project) -> None:
    made.write(made.lock(ROWS))
    shutil.rmtree(made.root / ".git")
    assert audit(made.root, "merged@lora")["code"]["commit"] is None
    assert names(impact(made.root, record=identity("cats"))) == [("adapter@lora", None), ("merged@lora", None)]


def test_a_committed_merge_conflict_hides_no_other_model(made: Project) -> None:
    commit = made.commit(made.lock(ROWS))
    sound = (made.root / "dvc.lock").read_text()
    (made.root / "dvc.lock").write_text("<<<<<<< HEAD\n" + sound + ">>>>>>> other\n")
    git(made.root, "commit", "-qam", "oops")
    assert {one for _, one in names(impact(made.root, record=identity("cats")))} == {commit}
    with pytest.raises(InputError, match=r"dvc\.lock cannot be read"):
        audit(made.root, "merged@lora")
    subprocess.run(["git", "checkout", "-q", commit, "--", "dvc.lock"], cwd=made.root, check=True)
    assert audit(made.root, "merged@lora")["code"]["commit"] == commit


def test_an_index_is_closed_when_its_question_is_answered(made: Project) -> None:
    """Dagster's process asks for as long as it runs: an index that stayed alive
    would keep a database open for each question."""
    made.commit(made.lock(ROWS))
    opened = Index(made.root)
    for run in opened.runs.values():
        opened.ancestors(run)
    gone = weakref.ref(opened)
    del opened, run
    gc.collect()
    assert gone() is None
