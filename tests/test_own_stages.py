"""Stages of a user's own in the lineage: several outputs of a stage, and stages that read a part of an output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, entry, identity, out
from builders.keys import write_keys
from builders.small_pipeline import git

from dagster_project.commands.outputs import ancestors
from dagster_project.commands.sign import sign
from dagster_project.commands.verify_signatures import verify_signatures
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.lineage.history import Revision, undeclared
from dagster_project.lineage.impact.question import exposed_in_workspace, impact
from dagster_project.lineage.index import Index
from dagster_project.lineage.lineage import audit
from dagster_project.lineage.registered import registered
from dagster_project.orchestration.erasure.plan import models_now

FAQ, MAIL = "data/sources/faq.jsonl", "data/sources/mail.jsonl"


@pytest.fixture
def made(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


def stage(name: str, deps: dict[str, str], outs: dict[str, str]) -> dict[str, Any]:
    """An entry of dvc.lock with several outputs, in the order in which DVC writes them."""
    items = [{"path": path, "hash": "md5", "md5": outs[path]} for path in sorted(outs)]
    return {name: {**entry(name, deps, ""), "outs": items}}


def mixed(made: Project) -> tuple[dict[str, Any], str]:
    """splits -> mix, with two outputs -> tuned, which reads the second one and has two outputs; and the weights."""
    lock = made.splits([("cats", "train", FAQ), ("fish", "test", MAIL)])
    mix, weights = made.put({"all.jsonl": b"cats and others"}), made.put({"model.safetensors": b"tuned"})
    lock |= stage(
        "mix",
        {"data/splits": out(lock, "splits")},
        {"data/mix/counts": made.put({"n.json": b"1"}), "data/mix/train": mix},
    )
    log = made.put({"log.txt": b"loss 1"})
    lock |= stage("tuned", {"data/mix/train": mix}, {"data/tuned/log": log, "data/tuned/model": weights})
    return lock, weights


@pytest.mark.parametrize("place", ["commit", "workspace", "run cache"])
def test_what_is_made_from_any_output_of_a_stage_saw_what_the_stage_read(made: Project, place: str) -> None:
    lock, weights = mixed(made)
    if place == "run cache":
        for name in ("mix", "tuned"):
            made.cache_run(lock[name])
        made.commit({"splits": lock["splits"]})
    else:
        made.write(lock)
        if place == "commit":
            made.commit(lock)
    for asked in ({"record": identity("cats")}, {"source": FAQ}):
        found = impact(made.root, **asked)
        assert [(one["stage"], one["path"], one["md5"], one["found_in"]) for one in found["models"]] == [
            ("tuned", "data/tuned/model", weights, place)
        ]
        assert not found["unknown"] and not found["unreadable"]


def test_an_audit_of_a_model_goes_through_every_output_that_it_was_made_from(made: Project) -> None:
    lock, weights = mixed(made)
    made.commit(lock)
    for asked in ("tuned", "data/tuned/model", weights):
        found = audit(made.root, asked)
        assert found["model"] == {"stage": "tuned", "path": "data/tuned/model", "md5": weights}, "not its log"
        assert [*found["sources"]] == [FAQ, MAIL] and not found["missing"]
        assert [(name, one["output"]) for name, one in found["stages"].items()] == [
            ("splits", "data/splits"), ("mix", "data/mix/train"), ("tuned", "data/tuned/model"),
        ]  # fmt: skip
    assert audit(made.root, "data/mix/train")["model"]["path"] == "data/mix/train"
    assert audit(made.root, lock["tuned"]["outs"][0]["md5"])["model"]["path"] == "data/tuned/log"


def test_of_the_outputs_of_a_declared_model_those_with_weights_are_models_if_there_are_any(made: Project) -> None:
    lock, weights = mixed(made)
    declared = "stages: {tuned: {cmd: x, meta: {kinds: [safetensors]}}}\n"
    (made.root / "dvc.yaml").write_text(declared)
    made.commit(lock)
    assert [one["md5"] for one in impact(made.root, record=identity("cats"))["models"]] == [weights]
    assert models_now(made.root) == {"tuned": weights}
    made.forget_cache()
    shutil.rmtree(made.root / ".dvc/tmp")
    unknown = impact(made.root, record=identity("cats"))["unknown"]
    assert {one["md5"] for one in unknown} == {one["md5"] for one in lock["tuned"]["outs"]}


def test_a_model_beside_another_output_is_one_of_the_workspace_and_can_be_registered(made: Project) -> None:
    lock, weights = mixed(made)
    artifacts = "artifacts: {tuned: {path: data/tuned/model, type: model}}\nstages: {}\n"
    (made.root / "dvc.yaml").write_text(artifacts)
    made.commit(lock)
    index = Index(made.root)
    index.read_records()
    assert exposed_in_workspace(index, [identity("cats")]) == (["tuned"], [])
    git(made.root, "tag", "-a", "tuned@v1.0.0", "-m", "first")
    assert [(one.address, one.md5) for one in registered(made.root)[weights]] == [("tuned", weights)]


def train_part(made: Project, lock: dict[str, Any]) -> str:
    """Hash of the folder `train` in the output of `splits`."""
    files = {one["relpath"]: one["md5"] for one in json.loads(made.object(out(lock, "splits")).read_bytes())}
    return md5_of_folder({name[6:]: one for name, one in files.items() if name.startswith("train/")})


def test_a_model_that_read_a_part_of_an_output_is_not_credited_with_a_version_that_has_another_part(
    made: Project,
) -> None:
    """The data ran again, the model did not, and the earlier version of the data is gone."""
    first = made.splits([("cats", "train", FAQ), ("fish", "test", MAIL)])
    own = {"own": entry("own", {"data/splits/train": train_part(made, first)}, made.put({"m.safetensors": b"own"}))}
    made.commit(first | own)
    now = made.splits([("frogs", "train", MAIL), ("fish", "test", MAIL)]) | own
    made.commit(now)
    assert impact(made.root, record=identity("cats"))["verdict"] == "yes"
    made.collect_garbage(now)
    shutil.rmtree(made.root / ".dvc/tmp")
    for text in ("cats", "frogs"):
        found = impact(made.root, record=identity(text))
        assert (found["verdict"], found["models"]) == ("cannot tell", [])
        assert [(one["stage"], one["missing"]) for one in found["unknown"]] == [
            ("own", [{"stage": "splits", "path": "data/splits", "md5": out(first, "splits")}])
        ]
    found = audit(made.root, "own")
    assert [(one["output"], one["md5"]) for one in found["stages"].values()] == [
        ("data/splits", out(first, "splits")), ("data/own", out(own, "own")),
    ]  # fmt: skip


def test_a_part_that_no_known_version_of_an_output_has_is_said_to_be_unexplained(made: Project) -> None:
    lock = made.splits([("cats", "train", FAQ), ("fish", "test", MAIL)])
    lock |= {"own": entry("own", {"data/splits/train": "1" * 32 + ".dir"}, made.put({"m.safetensors": b"own"}))}
    made.commit(lock)
    found = impact(made.root, record=identity("cats"))
    assert (found["verdict"], found["models"]) == ("cannot tell", [])
    assert [(one["stage"], one["unexplained"]) for one in found["unknown"]] == [("own", ["data/splits/train"])]
    found = audit(made.root, "own")
    assert found["sources"] == {} and [one["path"] for one in found["missing"]] == ["data/splits/train"]


def test_without_files_what_read_a_folder_of_outputs_is_not_credited_with_those_of_a_later_commit(
    made: Project,
) -> None:
    first = made.lock([("cats", "train", FAQ), ("fish", "test", MAIL)])
    read = {"data/merged": made.folder({"lora": out(first, "merged@lora")})}
    compared = {"comparison": entry("comparison", read, made.put({"comparison.json": b"{}"}))}
    made.commit(first | compared)
    made.commit(made.lock([("frogs", "train", MAIL), ("fish", "test", MAIL)]) | compared)
    before = audit(made.root, "comparison")
    assert before["stages"]["merged@lora"]["md5"] == out(first, "merged@lora")
    made.forget_cache()
    shutil.rmtree(made.root / ".dvc/tmp")
    found = audit(made.root, "comparison")
    assert [*found["stages"]] == [*before["stages"]] and [*found["sources"]] == [FAQ, MAIL]
    assert [one["md5"] for one in found["stages"].values()] == [one["md5"] for one in before["stages"].values()]


def test_a_variant_that_dvc_has_is_declared_however_dvc_yaml_lists_it(tmp_path: Path) -> None:
    from dvc.repo import Repo

    git(tmp_path, "init", "-q")
    Repo.init(str(tmp_path)).close()
    (tmp_path / "params.yaml").write_text("one: {two: [{rank: 8}, {rank: 16}], three: {a: {}, c4: {}}, five: [6, x]}\n")
    given = {
        "mappings": "[{rank: 8}, {rank: 16}]", "values": "[true, false, 1.50, x]", "mixed": "[plain, {rank: 8}, [1]]",
        "place": "'${one.two}'", "section": "'${one.three}'", "simple": "'${one.five}'",
    }  # fmt: skip
    lines = [f"  {name}: {{foreach: {items}, do: {{cmd: echo}}}}\n" for name, items in given.items()]
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  plain: {{cmd: echo}}\n{''.join(lines)}")
    with Repo(str(tmp_path)) as repo:
        known = {stage.name for stage in repo.index.stages}
    removed = {"mappings@2", "values@True", "mixed@plain", "place@8", "section@b", "simple@0", "other", "other@a"}
    assert len(known) == 16
    assert undeclared(Revision(tmp_path, None), known | removed) == removed


@pytest.mark.parametrize(
    ("dep", "part"),
    [("data/splits/", ""), ("./data/splits", ""), ("./data/splits/train", "train"), ("data//splits/train/", "train")],
)
@pytest.mark.parametrize("in_cache", [False, True])
def test_a_path_is_the_same_however_dvc_yaml_writes_it(made: Project, dep: str, part: str, in_cache: bool) -> None:
    """DVC writes paths into dvc.lock as dvc.yaml has them."""
    lock = made.splits([("cats", "train", FAQ), ("fish", "test", MAIL)])
    weights = made.put({"model.safetensors": b"own"})
    read = {dep: train_part(made, lock) if part else out(lock, "splits")}
    own = stage("own", read, {"./own//model/": weights}) | stage(
        "copy", {"own/model": weights}, {"./copy": made.put({"model.safetensors": b"own", "README.md": b""})}
    )
    if in_cache:
        for one in own.values():
            made.cache_run(one)
        made.commit(lock)
    else:
        made.commit(lock | own)
    found = impact(made.root, source=FAQ)
    assert sorted(one["path"] for one in found["models"]) == ["copy", "own/model"] and not found["unknown"]
    if not in_cache:
        assert audit(made.root, "own/model")["model"] == {"stage": "own", "path": "own/model", "md5": weights}
        assert audit(made.root, "./copy/")["parents"][0]["path"] == "own/model"
        assert ancestors(Revision(made.root, None), lock | own, "copy") == ["splits", "own"]


@pytest.mark.parametrize("available", [True, False])
def test_an_output_that_is_one_file_with_weights_is_a_model(made: Project, available: bool) -> None:
    lock = made.splits([("cats", "train", FAQ), ("fish", "test", MAIL)])
    weights = json.loads(made.object(made.put({"w": b"own"})).read_bytes())[0]["md5"]
    lock |= stage("own", {"data/splits": out(lock, "splits")}, {"own.safetensors": weights})
    lock |= stage("copy", {"own.safetensors": weights}, {"copy": made.put({"model.safetensors": b"own"})})
    made.commit(lock)
    if not available:
        made.object(weights).unlink()
    found = impact(made.root, record=identity("cats"))
    assert [(one["stage"], one["path"]) for one in found["models"]] == [("own", "own.safetensors"), ("copy", "copy")]
    assert [(one["stage"], one["md5"]) for one in audit(made.root, "copy")["parents"]] == [("own", weights)]
    index = Index(made.root)
    assert [index.is_copy(run) for run in index.runs.values() if run.address == "copy"] == [True]


def test_a_model_that_only_the_run_cache_has_is_not_a_copy_of_its_copy(made: Project) -> None:
    """Both have the same weights; what the one was made from says which was trained."""
    lock = made.splits([("cats", "train", FAQ), ("fish", "test", MAIL)])
    weights = made.put({"model.safetensors": b"own"})
    copy = made.put({"model.safetensors": b"own", "README.md": b"a copy"})
    own = stage("own", {"data/splits": out(lock, "splits")}, {"own": weights})
    for one in (own | stage("copy", {"own": weights}, {"copy": copy})).values():
        made.cache_run(one)
    made.commit(lock)
    assert {one["md5"] for one in impact(made.root, record=identity("cats"))["models"]} == {weights, copy}
    assert [one["md5"] for one in audit(made.root, copy)["parents"]] == [weights]
    assert audit(made.root, weights)["parents"] == []


def test_what_is_signed_is_the_output_that_was_named(made: Project, tmp_path: Path) -> None:
    lock, weights = mixed(made)
    for name, content in (("log/log.txt", "loss 1"), ("model/model.safetensors", "tuned")):
        (made.root / "data/tuned" / name).parent.mkdir(parents=True, exist_ok=True)
        (made.root / "data/tuned" / name).write_text(content)
    made.commit(lock)
    private, public = write_keys(tmp_path / "keys", "ed25519")
    for named in (str(made.root / "data/tuned/model"), "data/tuned/model", weights[:12]):
        signed = sign(made.root, named, private)
        assert (signed["folder"], signed["files"]) == ("data/tuned/model", 1)
        assert verify_signatures(made.root, named, public)["verdict"] == "verified"
    with pytest.raises(InputError, match="data/tuned/log has no signatures"):
        verify_signatures(made.root, "data/tuned/log", public)
    with pytest.raises(InputError, match=r"tuned has several outputs: data/tuned/log, data/tuned/model"):
        sign(made.root, "tuned", private)
