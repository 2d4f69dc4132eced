"""`pedigree audit --diff`: whatever differs between two models or data sets is named, and nothing else. On histories
made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, identity, md5, out

from dagster_project.commands.why_diff import also_differ
from dagster_project.core.hashing import md5_of_folder
from dagster_project.core.layout import CODE
from dagster_project.lineage import database
from dagster_project.lineage.diff import as_text, diff

FAQ, MAIL = "data/sources/faq.jsonl", "data/sources/mail.jsonl"
ROWS = [("cats", "train", FAQ), ("dogs", "test", MAIL)]
MODEL = "merged@lora"


@pytest.fixture
def made(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def reads(made: Project, lock: dict[str, Any], stage: str, folder: str, files: dict[str, str]) -> None:
    """Write a folder, and let a stage have read it."""
    for name, content in files.items():
        (made.root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made.root / folder / name).write_text(content)
    digest = md5_of_folder({name: md5(content.encode()) for name, content in files.items()})
    lock[stage]["deps"].append({"path": folder, "hash": "md5", "md5": digest})


def named(found: dict[str, Any]) -> dict[str, Any]:
    """What differs besides records."""
    kinds = ("parameters", "code", "other_files", "environment", "base_model", "sources")
    return {kind: found[kind] for kind in kinds if found[kind]}


@pytest.mark.parametrize(("stage", "split"), [("instructions", []), ("splits", ["train"])])
def test_the_records_of_a_data_set_are_compared_too(made: Project, stage: str, split: list[str]) -> None:
    outputs = []
    for text in ("cats", "lions"):
        lock = made.curated([(text, "train", FAQ), ROWS[1]])
        made.commit(lock)
        outputs.append(out(lock, stage))
    records = diff(made.root, f"HEAD~1:{stage}", stage)["records"]
    before, after = (
        {"example_id": identity(text), "splits": split, "rows": [f"{FAQ}:0"]} for text in ("cats", "lions")
    )
    assert records == {"added": [], "removed": [], "changed": [{"before": before, "after": after}], "moved": []}
    assert diff(made.root, stage, stage)["records"] == {"added": [], "removed": [], "changed": [], "moved": []}
    made.object(outputs[0]).unlink()
    (made.root / database.INDEX_FILE).unlink()  # it keeps what it has read
    found = diff(made.root, f"HEAD~1:{stage}", stage)
    assert found["records"] is None and [one["md5"] for one in found["missing"]] == outputs[:1]


def test_a_template_that_changed_under_its_name_is_named(made: Project) -> None:
    """So are reward functions, training commands and benchmarks: parameters have their path alone."""
    for content in ("{{ a }}", "{{ b }}"):
        lock = made.trained(made.curated(ROWS), ["cats"])
        reads(made, lock, "tokenized", "data/templates", {"chat.jinja": content, "unused.jinja": content})
        lock["tokenized"]["params"] = {"params.yaml": {"tokenized.chat_template": "data/templates/chat.jinja"}}
        made.commit(lock)
    found = diff(made.root, f"HEAD~1:{MODEL}", MODEL)
    assert found["other_files"].keys() == {"data/templates/chat.jinja"}
    before, after = found["other_files"]["data/templates/chat.jinja"]
    assert f"other files\n  data/templates/chat.jinja: {before[:12]} -> {after[:12]}" in as_text(found)
    assert named(diff(made.root, MODEL, MODEL)) == {}


def test_files_whose_content_is_lost_are_compared_as_the_folder_that_was_read(made: Project) -> None:
    """It is not in git, and the workspace has another version."""
    (made.root / ".gitignore").open("a").write("/data/rewards\n")
    digests = []
    for content in ("1", "2"):
        lock = made.trained(made.curated(ROWS), ["cats"])
        reads(made, lock, "adapter@lora", "data/rewards", {"r.txt": content})
        lock["adapter@lora"]["params"] = {"params.yaml": {"adapter.lora": {"reward": "r.txt"}}}
        made.commit(lock)
        digests.append(lock["adapter@lora"]["deps"][-1]["md5"])
    assert named(diff(made.root, f"HEAD~1:{MODEL}", MODEL)) == {"other_files": {"data/rewards": digests}}
    assert named(diff(made.root, f"HEAD~1:{MODEL}", f"HEAD~1:{MODEL}")) == {}


def test_a_parameter_that_is_null_differs_from_one_that_is_left_out(made: Project) -> None:
    """`max_kl: null` sets no limit; left out, it is 0.1."""
    for options in ({}, {"max_kl": None}, {"max_kl": 0.1}):
        lock = made.lock(ROWS)
        lock["adapter@lora"]["params"] = {"params.yaml": {"adapter.lora": {"algorithm": "ppo", "options": options}}}
        made.commit(lock)
    name = "adapter.lora.options.max_kl"

    def parameters(before: str, after: str) -> dict[str, Any]:
        differing: dict[str, Any] = diff(made.root, f"{before}:{MODEL}", f"{after}:{MODEL}")["parameters"]
        return {key: value for key, value in differing.items() if key != "adapter.lora.options"}

    assert parameters("HEAD~2", "HEAD~1") == {f"{name}, given as null": [None, True]}
    assert parameters("HEAD~1", "HEAD") == {name: [None, 0.1], f"{name}, given as null": [True, None]}
    assert parameters("HEAD~2", "HEAD") == {name: [None, 0.1]}
    assert parameters("HEAD~1", "HEAD~1") == {}


@pytest.mark.parametrize("content", ["a = 1\n", "a = 2\n"])
def test_code_is_compared_by_its_recorded_hash_where_its_files_are_lost(made: Project, content: str) -> None:
    """The second run is not committed, and the code was edited since: only its folder and hash are known."""
    runs = []
    for text, seed in (("a = 1\n", 0), (content, 1)):
        lock = made.lock(ROWS, seed=seed)
        reads(made, lock, "adapter@lora", f"{CODE}/core", {"a.py": text, "b.py": "b = 1\n"})
        runs.append(lock)
        made.commit(lock) if not seed else made.write(lock)
    (made.root / CODE / "core/a.py").write_text("a = 3\n")
    digest = runs[1]["adapter@lora"]["deps"][-1]["md5"]
    files = {f"{CODE}/core/a.py": [md5(b"a = 1\n"), None], f"{CODE}/core/b.py": [md5(b"b = 1\n"), None]}
    expected = {} if content == "a = 1\n" else {f"{CODE}/core": [None, digest], **files}
    found = diff(made.root, f"HEAD:{MODEL}", MODEL)
    assert not found["same"] and found["code"] == expected


def test_stages_that_ran_on_other_machines_are_named_with_both(made: Project) -> None:
    """Another processor gives other weights, with everything else the same."""
    lock = made.lock([("cats", "train", FAQ)])
    shown = []
    for cpu in ("first", "second"):
        machine = {"cpu": cpu, "instruction_set": {"torch": "AVX512", "onednn": None}, "threads": 2}
        for stage in ("adapter", "merged"):
            lock[f"{stage}@lora"]["outs"] = [
                one for one in lock[f"{stage}@lora"]["outs"] if one["path"].startswith(f"data/{stage}/")
            ]
            lock[f"{stage}@lora"]["outs"].append(made.report(f"{stage}/lora", {"machine": machine}))
        made.commit(lock)
        shown.append(f"{cpu}, AVX512 (oneDNN none), 2 threads")
    found = diff(made.root, "HEAD~1:merged@lora", "merged@lora")
    assert found["machine"] == {"adapter": shown, "merged": shown} and also_differ(found) == {
        "machine": ["adapter", "merged"]
    }
    assert as_text(found).endswith(f"\nmachine\n  adapter, merged: {shown[0]} -> {shown[1]}")
    assert not diff(made.root, "merged@lora", "merged@lora")["machine"]
