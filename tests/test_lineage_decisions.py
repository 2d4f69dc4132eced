"""Answers of impact and audit that rest on one decision each, over small histories made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from builders.history import DVC_YAML, Project, entry, identity, md5, out

from dagster_project.core.errors import InputError
from dagster_project.lineage.database import INDEX_FILE
from dagster_project.lineage.impact.question import exposed_in_workspace, impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import audit

FAQ, MAIL, COPY = "data/sources/faq.jsonl", "data/sources/mail.jsonl", "data/sources/copy.jsonl"
ROWS = [("cats", "train", FAQ), ("dogs", "train", MAIL), ("birds", "validation", FAQ)]


@pytest.fixture
def made(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def files_of(made: Project, output: str) -> dict[str, str]:
    """Path -> hash of each file of an output."""
    return {one["relpath"]: one["md5"] for one in json.loads(made.object(output).read_bytes())}


def seen(answer: Mapping[str, Any], stage: str = "adapter@lora") -> list[dict[str, Any]]:
    """What the answer says that each version of a model saw itself."""
    return [one for model in answer["models"] if model["stage"] == stage for one in model["seen"]]


def lose(made: Project, output: str, name: str) -> None:
    """Delete a file of an output, and what the index knows of it."""
    made.object(files_of(made, output)[name]).unlink()
    for file in made.root.glob(f"{INDEX_FILE}*"):
        file.unlink()


def in_shards(made: Project, parts: Sequence[Sequence[tuple[str, str, str]]]) -> dict[str, Any]:
    """A data set whose train split has one shard for each part."""
    lock = made.splits([row for part in parts for row in part])
    contents = {name: made.object(md5).read_bytes() for name, md5 in files_of(made, out(lock, "splits")).items()}
    for number, part in enumerate(parts):
        shard = files_of(made, out(made.splits(part), "splits"))["train/records-00000.parquet"]
        contents[f"train/records-{number:05}.parquet"] = made.object(shard).read_bytes()
    lock["splits"]["outs"][0]["md5"] = made.put(contents)
    return lock


def test_rows_in_several_shards_of_a_split_are_added_up(made: Project) -> None:
    parts = [[("cats", "train", FAQ), ("dogs", "train", FAQ)], [("cats", "train", MAIL)]]
    lock = in_shards(made, parts)
    made.commit(lock | made.adapter(lock, ["cats", "dogs"]))
    assert [one["splits"] for one in seen(impact(made.root, content=out(lock, "splits")))] == [
        {"train": 3, "validation": 0, "test": 0}
    ]
    assert [one["splits"] for one in seen(impact(made.root, record=identity("cats")))] == [{"train": 2}]


def test_steps_on_a_shard_are_those_of_the_model_itself_and_not_of_another_on_the_same_data(made: Project) -> None:
    lock = made.splits(ROWS)
    lock |= made.adapter(lock, ["cats"]) | made.adapter(lock, ["cats", "dogs", "dogs"], "adapter@dora")
    made.commit(lock)
    answer = impact(made.root, content=files_of(made, out(lock, "splits"))["train/records-00000.parquet"])
    assert [one["learnt"] for one in seen(answer)] == [{"records": 1, "first_step": 1, "last_step": 1}]
    assert [one["learnt"] for one in seen(answer, "adapter@dora")] == [{"records": 2, "first_step": 1, "last_step": 3}]


def test_a_file_beside_the_shards_leads_to_the_models_of_the_data_sets_that_have_it(made: Project) -> None:
    old, new = made.curated(ROWS), made.curated([("frogs", "train", FAQ), *ROWS[1:]])
    old, new = made.trained(old, ["cats", "dogs"]), made.trained(new, ["frogs", "dogs"])
    for lock in (old, new):
        made.commit(lock)
    for stage, name in (("instructions", "ledger.parquet"), ("tokenized", "train.parquet")):
        answer = impact(made.root, content=files_of(made, out(old, stage))[name])
        assert [model["md5"] for model in answer["models"]] == [out(old, "adapter@lora"), out(old, "merged@lora")]
        assert seen(answer)[0]["splits"] == {"train": 2, "validation": 1, "test": 0}


def test_a_source_that_the_training_reads_itself_leads_to_the_model(made: Project) -> None:
    lock = made.splits(ROWS)
    lock |= made.adapter(lock, ["cats", "dogs"]) | made.adapter(lock, ["cats"], "adapter@dora")
    lock["adapter@lora"]["deps"].append({"path": "data/sources/prompt.txt", "hash": "md5", "md5": "1234567" + "0" * 25})
    made.commit(lock)
    assert [model["stage"] for model in impact(made.root, content="1234567")["models"]] == ["adapter@lora"]


def test_dvc_lock_alone_decides_which_models_an_output_led_to(made: Project) -> None:
    locks = [made.lock(rows) for rows in (ROWS, ROWS[:1])]
    for lock in locks:
        made.commit(lock)
    made.forget_cache()
    answer = impact(made.root, content=out(locks[0], "splits"))
    expected = [out(locks[0], "adapter@lora"), out(locks[0], "merged@lora")]
    assert ([model["md5"] for model in answer["models"]], answer["unknown"]) == (expected, [])


def test_a_copy_that_was_dropped_in_another_version_of_the_data_is_not_counted(made: Project) -> None:
    for seed, copied in enumerate(("cats", "dogs")):
        for texts in (["cats", "dogs"], ["dogs", "cats", copied]):
            made.commit(made.trained(made.curated(ROWS, [(copied, COPY)]), texts, seed))
    found = [(one["splits"], one["learnt"]) for one in seen(impact(made.root, source=COPY))]
    steps = [(1, 1), (2, 3), (2, 2), (1, 3)]
    assert found == [({"train": 1}, {"records": 1, "first_step": a, "last_step": b}) for a, b in steps]


def test_steps_on_a_record_and_on_what_was_made_from_it_are_in_the_order_of_the_training(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS, paraphrases={"cats": "felines"}), ["felines", "dogs", "cats"]))
    assert seen(impact(made.root, record=identity("cats")))[0]["steps"] == [1, 3]


def test_a_text_is_not_in_what_was_made_from_its_record(made: Project) -> None:
    made.commit(made.trained(made.curated(ROWS, paraphrases={"cats": "felines"}), ["felines", "dogs"]))
    answer = impact(made.root, text="What of cats?")
    assert answer["records"] == [identity("cats")] and seen(answer)[0]["splits"] == {"train": 1}
    assert seen(answer)[0]["steps"] == [], "a paraphrase has another text"


def test_a_model_whose_data_nothing_records_saw_what_it_recorded_itself(made: Project) -> None:
    lock = made.adapter(made.splits(ROWS), ["cats", "dogs", "cats"])
    lock["adapter@lora"]["deps"] = []
    made.commit(lock)
    answer = impact(made.root, record=identity("cats"))
    assert [(one["splits"], one["steps"]) for one in seen(answer)] == [({"train": 1}, [1, 3])]


def test_without_its_ledger_a_data_set_may_have_more_of_a_record_than_the_answer_says(made: Project) -> None:
    """The paraphrase of a record is a row with another id, and the ledger alone names the record."""
    lock = made.trained(made.curated(ROWS, paraphrases={"cats": "felines"}), ["cats", "dogs", "felines"])
    made.commit(lock)
    whole = impact(made.root, record=identity("cats"))
    assert seen(whole)[0]["steps"] == [1, 3] and "missing" not in whole["models"][0]
    lose(made, out(lock, "splits"), "ledger.parquet")
    part = impact(made.root, record=identity("cats"))
    assert seen(part)[0]["steps"] == [1]
    assert [[one["path"] for one in model["missing"]] for model in part["models"]] == [["data/splits"]] * 2
    assert "perhaps more: data/splits could not be looked at" in as_text(part)


def test_a_model_made_from_other_sources_did_not_see_a_source_whatever_tables_are_missing(made: Project) -> None:
    others = made.trained(made.curated([("cats", "train", FAQ), ("birds", "test", FAQ)]), ["cats"])
    made.commit(others)
    made.commit(asked := made.trained(made.curated([("dogs", "train", MAIL)]), ["dogs"]))
    lose(made, out(others, "instructions"), "overlaps.parquet")
    answer = impact(made.root, source=MAIL)
    assert [model["md5"] for model in answer["models"]] == [out(asked, "adapter@lora"), out(asked, "merged@lora")]
    assert answer["unknown"] == []
    assert impact(made.root, source=FAQ)["models"][0]["missing"][0]["path"] == "data/instructions"


def test_a_model_with_weights_of_its_own_beside_those_of_its_parent_is_not_a_copy(made: Project) -> None:
    lock = made.lock(ROWS)
    lock |= made.splits([("mice", "train", COPY)], "preferences")
    weights = {"model.safetensors": out(lock, "adapter@lora").encode(), "head.safetensors": b"its own"}
    reads = {"data/merged/lora": out(lock, "merged@lora"), "data/preferences": out(lock, "preferences")}
    lock["scored"] = entry("scored", reads, made.put(weights))
    made.commit(lock)
    assert [model["stage"] for model in impact(made.root, record=identity("mice"))["models"]] == ["scored"]
    assert {one["by"] for one in seen(impact(made.root, record=identity("cats")), "scored")} == {"adapter@lora"}


def test_a_report_that_was_edited_before_the_commit_is_not_that_of_the_run(made: Project) -> None:
    lock = made.lock(ROWS)
    made.report("splits", {"passed": True, "sources": {COPY: {"rows": 3, "sha256": "0" * 64, "format": "text"}}})
    made.commit(lock)
    audited = audit(made.root, "merged@lora")
    assert audited["sources"] == {} and audited["stages"]["splits"]["report"] == "unknown"
    assert [one["path"] for one in audited["missing"]] == ["data/reports/splits.json"]


def test_a_stage_that_dvc_yaml_declares_as_a_model_later_made_models_before_too(made: Project) -> None:
    """Their files are gone, so the declaration alone says what they are."""
    (made.root / "dvc.yaml").write_text("stages: {}")
    lock = made.lock(ROWS)
    made.commit(lock)
    made.forget_cache()
    with_more = lock | {"other": entry("other", {}, md5(b"other"))}
    (made.root / "dvc.yaml").write_text(DVC_YAML)
    made.commit(with_more)
    answer = impact(made.root, content=out(lock, "splits"))
    assert [model["stage"] for model in answer["models"]] == ["adapter@lora", "merged@lora"]


def test_a_shard_in_the_cache_that_was_changed_is_not_searched(made: Project) -> None:
    lock = made.lock(ROWS)
    made.commit(lock)
    other = out(made.splits([("frogs", "train", FAQ)]), "splits")
    shards = [files_of(made, one)["train/records-00000.parquet"] for one in (out(lock, "splits"), other)]
    made.object(shards[0]).write_bytes(made.object(shards[1]).read_bytes())
    with pytest.raises(InputError, match="its content does not match its name"):
        impact(made.root, record=identity("frogs"))


def test_a_listing_in_the_cache_that_was_changed_names_no_files(made: Project) -> None:
    lock = made.lock(ROWS)
    made.commit(lock)
    other = made.object(out(made.splits([("frogs", "train", FAQ)]), "splits")).read_bytes()
    made.object(out(lock, "splits")).write_bytes(other)
    answer = impact(made.root, record=identity("frogs"))
    assert (answer["verdict"], answer["models"]) == ("cannot tell", [])


def test_data_before_the_splits_that_is_gone_leaves_open_which_records_it_led_to_and_no_text(made: Project) -> None:
    lock = made.trained(made.curated(ROWS), ["cats", "dogs"])
    made.commit(lock)
    made.commit(made.trained(made.curated(ROWS[:2]), ["cats", "dogs"]))
    for stage in ("instructions", "tokenized"):  # what is tokenized decides nothing: it has no splits
        made.object(out(lock, stage)).unlink()
    for text, verdict in (("What of birds?", "yes"), ("What of frogs?", "no")):
        answer = impact(made.root, text=text)
        assert (answer["verdict"], answer["unknown"]) == (verdict, [])
    answer = impact(made.root, record=identity("frogs"))
    assert answer["verdict"] == "cannot tell"
    assert [[one["md5"] for one in model["missing"]] for model in answer["unknown"]] == [
        [out(lock, "instructions")]
    ] * 2


def test_a_release_is_not_a_copy_of_an_earlier_release(made: Project) -> None:
    """Both have the weights of one merged model, and nothing records the folder that it was chosen from."""
    lock = made.lock(ROWS)
    weights = {"model.safetensors": out(lock, "adapter@lora").encode()}
    folder = {"data/merged": "f" * 32 + ".dir"}
    for card in (b"first", b"second"):
        made.commit({**lock, "release": entry("release", folder, made.put({**weights, "README.md": card}))})
    hashes = [run.md5 for run in Index(made.root).runs.values() if run.address == "release"]
    for one in hashes:
        assert [parent["md5"] for parent in audit(made.root, one)["parents"]] == [
            out(lock, "adapter@lora"), out(lock, "merged@lora")
        ]  # fmt: skip


def test_code_that_a_commit_has_beside_what_ran_is_said_to_differ(made: Project) -> None:
    """dvc.lock has one hash of the folder, and the workspace the files: the commit has one more, or another one."""
    code = made.root / "dagster_project" / "curation"
    code.mkdir(parents=True)
    lock, ran = made.lock(ROWS), {"a.py": b"1", "b.py": b"2"}
    listing = json.dumps([{"md5": md5(content), "relpath": name} for name, content in ran.items()])
    dep = {"path": "dagster_project/curation", "hash": "md5", "md5": f"{md5(listing.encode())}.dir"}
    for number, (changed, differing) in enumerate((({"c.py": b"3"}, ["c.py"]), ({"b.py": b"9"}, ["b.py"]))):
        lock = {**lock, "splits": {**lock["splits"], "cmd": str(number), "deps": [*lock["splits"]["deps"][:1], dep]}}
        for name, content in (ran | changed).items():
            (code / name).write_bytes(content)
        made.commit(lock)
        for name in changed.keys() - ran.keys():
            (code / name).unlink()
        for name, content in ran.items():
            (code / name).write_bytes(content)
        found = audit(made.root, "splits")["code"]
        assert (found["clean"], found["differs"]) == (False, [f"dagster_project/curation/{name}" for name in differing])


def test_no_record_is_left_open_by_a_stage_of_the_users_own_that_writes_into_the_folder_of_sources(
    made: Project,
) -> None:
    """Nothing records which version of its output was in the folder; a row gets its id when it is read from there."""
    lock = made.trained(made.curated(ROWS), ["cats", "dogs"])
    lock["clean"] = entry("clean", {"data/raw/r.csv": "1" * 32}, made.put({"r.jsonl": b"{}"}))
    lock["clean"]["outs"][0]["path"] = "data/sources/clean"
    made.commit(lock)
    answer = impact(made.root, record=identity("frogs"))
    assert (answer["verdict"], answer["unknown"]) == ("no", [])
    assert impact(made.root, record=identity("cats"))["verdict"] == "yes"
    answer = impact(made.root, source="data/raw/r.csv")
    assert (answer["verdict"], answer["read_by"]) == ("cannot tell", ["clean"])
    assert [model["unexplained"] for model in answer["unknown"]] == [["data/sources"]] * 2
    assert [one["path"] for one in audit(made.root, "merged@lora")["missing"]] == ["data/sources"]


def scored(made: Project, preferences: str, report: str) -> dict[str, Any]:
    """A model of the user's own, made from a merged model and from preferences with these recorded hashes."""
    lock = made.lock(ROWS) | made.splits([("mice", "train", COPY)], "preferences")
    reads = {"data/merged/lora": out(lock, "merged@lora"), "data/preferences": preferences or out(lock, "preferences")}
    lock["preferences"]["outs"][1]["md5"] = report or lock["preferences"]["outs"][1]["md5"]
    return lock | {"scored": entry("scored", reads, made.put({"model.safetensors": b"scored"}))}


def test_what_is_unknown_of_a_model_stays_unknown_although_all_is_known_of_its_parent(made: Project) -> None:
    made.commit(scored(made, "0" * 32 + ".dir", ""))
    answer = impact(made.root, record=identity("frogs"))
    assert answer["verdict"] == "cannot tell"
    assert [(one["stage"], one["unexplained"]) for one in answer["unknown"]] == [("scored", ["data/preferences"])]
    index = Index(made.root)
    index.read_records()
    assert exposed_in_workspace(index, [identity("frogs")]) == ([], ["scored"])
    assert exposed_in_workspace(index, [identity("cats")]) == (["adapter@lora", "merged@lora", "scored"], [])


def test_a_report_that_is_lost_of_a_model_is_named_although_that_of_its_parent_is_there(made: Project) -> None:
    """The report of a data set with splits names files of paraphrases, which no row does."""
    made.commit(scored(made, "", "0" * 32))
    found = {model["stage"]: model.get("missing") for model in impact(made.root, source=FAQ)["models"]}
    lost = {"stage": "preferences", "path": "data/reports/preferences.json", "md5": "0" * 32}
    assert found == {"adapter@lora": None, "merged@lora": None, "scored": [lost]}
    answer = impact(made.root, record=identity("frogs"))
    assert (answer["verdict"], answer["unknown"]) == ("no", []), "no report names a record"


def test_a_model_that_was_tested_on_a_source_may_have_learned_from_it_where_a_report_is_lost(tmp_path: Path) -> None:
    """The file is a source, and its rows are paraphrases of another one's, which the lost report alone names."""
    rows = [("cats", "test", FAQ), ("dogs", "train", MAIL)]
    whole, made = Project(tmp_path / "whole"), Project(tmp_path / "project")
    for project in (whole, made):
        lock = project.trained(project.curated(rows, paraphrases={"dogs": "hounds"}, file=FAQ), ["dogs", "hounds"])
        if project == made:
            lock["splits"]["outs"][1]["md5"] = "0" * 32
        project.commit(lock)
    assert [one["splits"] for one in seen(impact(whole.root, source=FAQ))] == [{"test": 1, "train": 1}]
    lost = [{"stage": "splits", "path": "data/reports/splits.json", "md5": "0" * 32}]
    digest = json.loads((made.root / "data/reports/instructions.json").read_text())["sources"][FAQ]["sha256"]
    for asked in ({"source": FAQ}, {"content": digest}):
        answer = impact(made.root, **asked)  # type: ignore[arg-type]
        assert [model["missing"] for model in answer["models"]] == [lost, lost], asked
    answer = impact(made.root, content=out(lock, "splits"))
    assert all("missing" not in model for model in answer["models"]), "dvc.lock alone names its readers"


def test_data_before_the_splits_that_nothing_records_leaves_open_records_and_sources_but_no_text(made: Project) -> None:
    known = made.trained(made.curated(ROWS, [("cats", COPY)]), ["cats", "dogs"])
    made.commit(known)
    lock = made.trained(made.curated(ROWS[:2]), ["dogs", "cats"])
    lock["splits"]["deps"][0]["md5"] = "0" * 32 + ".dir"
    made.commit(lock)
    for asked in ({"record": identity("frogs")}, {"source": COPY}, {"content": out(known, "instructions")}):
        unknown = impact(made.root, **asked)["unknown"]  # type: ignore[arg-type]
        assert [(one["md5"], one["unexplained"]) for one in unknown] == [
            (out(lock, name), ["data/instructions"]) for name in ("adapter@lora", "merged@lora")
        ], asked
    for asked in ({"text": "What of frogs?"}, {"containing": "frogs"}):
        answer = impact(made.root, **asked)  # type: ignore[arg-type]
        assert (answer["verdict"], answer["unknown"]) == ("no", [])
