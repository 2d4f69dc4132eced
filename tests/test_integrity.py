"""Everything that dvc.lock reaches is hashed: a flipped bit anywhere is reported, and nothing else."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from builders import small_pipeline
from builders.files import flip
from conftest import dvc, edit_params, pedigree
from ruamel.yaml import YAML

from dagster_project.__main__ import main
from dagster_project.lineage.history import Revision
from dagster_project.orchestration.integrity import as_text, examine
from dagster_project.pipeline import STAGES

forked = pytest.mark.usefixtures("warm_small")
"""For tests on the small pipeline."""


def named(root: Path, where: str) -> set[str]:
    return {found["path"] for found in examine(root)["findings"] if found["where"] == where}


def files(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def test_a_flipped_bit_in_any_kind_of_artifact_is_the_only_finding(finished: Path) -> None:
    assert examine(finished)["verdict"] == "intact"
    outputs = files(finished / "data" / name for name in (*STAGES, "plots"))
    reports = files([finished / "data/reports"])
    assert {path.suffix for path in outputs} >= {".parquet", ".safetensors", ".json", ".csv", ".md", ".jinja"}
    outputs, reports = ([path for path in paths if path.name != ".gitkeep"] for paths in (outputs, reports))
    contents = {out.read_bytes() for out in outputs}
    objects = [path for path in files([finished / ".dvc/cache/files/md5"]) if path.read_bytes() in contents]
    listings = [path for path in files([finished / ".dvc/cache/files/md5"]) if path.suffix == ".dir"]
    for path in [*outputs, *reports]:
        path.unlink() if path.stat().st_nlink > 1 else flip(path)
    assert named(finished, "workspace") == {str(path.relative_to(finished)) for path in outputs}
    assert named(finished, "report") == {str(path.relative_to(finished)) for path in reports}
    for path in objects:
        flip(path)
    assert named(finished, "cache") == set(map(str, objects))
    for path in listings:
        flip(path)
    assert {path for path in named(finished, "cache") if path.endswith(".dir")} == set(map(str, listings))
    done = pedigree(finished, "verify", "--integrity")
    assert done.returncode == 1 and all(str(path) in done.stdout for path in listings)


def test_a_flipped_bit_in_dvc_lock_is_detected(root: Path) -> None:
    lock, dice = root / "dvc.lock", random.Random(0)
    content = lock.read_bytes()
    for _ in range(40):
        bit = dice.randrange(len(content) * 8)
        flip(lock, bit)
        assert "dvc.lock" in {found["where"] for found in examine(root)["findings"]}, bit
        lock.write_bytes(content)


@forked
def test_an_uncommitted_run_passes_and_an_edited_entry_fails(root: Path) -> None:
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"testseed": 7', '"testseed": 8'))
    assert dvc(root, "repro").returncode == 0
    assert examine(root)["verdict"] == "intact"
    lock = root / "dvc.lock"
    lock.write_text(lock.read_text().replace("testseed: 8", "testseed: 9"))
    assert named(root, "dvc.lock") == {"tok"}


@forked
def test_a_manually_recorded_output_is_detected_by_the_sha256_in_its_report(root: Path) -> None:
    (root / "data/inst/rows.txt").unlink()
    (root / "data/inst/rows.txt").write_text("BAD")
    assert dvc(root, "commit", "-f").returncode == 0
    assert "data/inst" in named(root, "dvc.lock")


@forked
def test_history_is_verified_and_missing_data_is_listed_separately(root: Path) -> None:
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"testseed": 7', '"testseed": 8'))
    assert dvc(root, "repro").returncode == 0
    small_pipeline.git(root, "commit", "-qam", "again")
    found = examine(root, all_revs=True)
    assert (found["verdict"], found["revisions"]) == ("intact", 3)
    [old] = [path for path in files([root / ".dvc/cache/files/md5"]) if path.read_bytes() == b"test 7"]
    flip(old)
    assert examine(root)["verdict"] == "intact"
    [finding] = examine(root, all_revs=True)["findings"]
    assert (finding["path"], finding["next"]) == (str(old), f"rm {old}, then dvc pull --all-commits")
    old.unlink()
    gone = examine(root, rev="HEAD~1")
    assert gone["verdict"] == "incomplete" and [one["path"] for one in gone["missing"]] == ["data/tok/test.txt"]
    assert [one["next"] for one in gone["missing"]] == ["dvc pull --all-commits"]
    (root / "data/erasures").mkdir()
    (root / "data/erasures/0123456789ab.json").write_text("{}")
    assert "dvc pull --all-commits, unless `pedigree erase` removed it (certificates in data/erasures)" in as_text(
        examine(root, rev="HEAD~1")
    )
    assert pedigree(root, "verify", "--integrity", "--rev", "HEAD~1").returncode == 2


@forked
def test_the_output_of_a_stage_with_wdir_is_compared_where_it_is(root: Path) -> None:
    (root / "other").mkdir()
    pipeline = YAML(typ="safe").load((root / "dvc.yaml").read_text())
    pipeline["stages"]["own"] = {"wdir": "other", "cmd": "echo one > own.txt", "outs": ["own.txt"]}
    (root / "dvc.yaml").write_text(json.dumps(pipeline))
    assert dvc(root, "repro", "own").returncode == 0
    small_pipeline.git(root, "commit", "-qam", "own")  # DVC's run cache has no stage without dependencies
    assert examine(root)["verdict"] == "intact"
    (root / "other/own.txt").unlink()
    (root / "other/own.txt").write_text("two\n")
    assert named(root, "workspace") == {"other/own.txt"}


@forked
def test_a_stage_without_outputs_is_no_damage_and_cannot_be_verified(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one that sends a message. Its command does not run."""
    before = examine(root)
    pipeline = YAML(typ="safe").load((root / "dvc.yaml").read_text())
    pipeline["stages"]["notify"] = {"cmd": f"echo ran >> {root}/sent.log", "deps": ["data/tok"]}
    (root / "dvc.yaml").write_text(json.dumps(pipeline))
    assert dvc(root, "repro", "notify").returncode == 0
    small_pipeline.git(root, "commit", "-qam", "notify")
    found = examine(root, all_revs=True)
    assert found["verdict"] == "intact" and found["objects"] >= before["objects"] and not found["findings"]
    assert main(["verify", "notify", "--project", str(root)]) == 2
    shown = capsys.readouterr()
    assert "notify: dvc.lock records no output of this stage" in shown.err and "Traceback" not in shown.err
    assert (root / "sent.log").read_text() == "ran\n"


def test_a_report_that_names_another_sha256_is_the_only_finding(root: Path) -> None:
    report = root / "data/reports/inst.json"
    report.write_text(report.read_text().replace(json.loads(report.read_text())["output_sha256"], "0" * 64))
    assert [(one["where"], one["path"]) for one in examine(root)["findings"]] == [("report", "data/reports/inst.json")]


def test_an_output_is_compared_with_its_report_where_the_cache_has_no_list_of_its_files(root: Path) -> None:
    [out] = [out for out in Revision(root, None).lock()["inst"]["outs"] if out["path"] == "data/inst"]
    (root / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).unlink()
    found = examine(root)
    assert (found["verdict"], found["findings"]) == ("incomplete", [])
    assert [(one["path"], one["object"]) for one in found["missing"]] == [("data/inst", out["md5"])]
    (root / "data/inst/rows.txt").unlink()
    (root / "data/inst/rows.txt").write_text("BAD")
    found = examine(root)
    assert found["verdict"] == "altered"
    assert [(one["where"], one["path"]) for one in found["findings"]] == [("workspace", "data/inst")]


def test_all_revisions_of_a_shallow_clone_are_said_not_to_be_all(root: Path, tmp_path: Path) -> None:
    small_pipeline.git(root, "commit", "-q", "--allow-empty", "-m", "again")
    small_pipeline.git(root, "clone", "-q", "--depth", "1", f"file://{root}", str(tmp_path / "clone"))
    said = "of a shallow clone: earlier ones are unknown"
    for project, all_revs in ((root, True), (tmp_path / "clone", False), (tmp_path / "clone", True)):
        found = examine(project, all_revs=all_revs)
        assert found["shallow"] is (said in as_text(found)) is (project != root and all_revs)


@forked
def test_what_a_removed_variant_made_is_missing_in_earlier_commits_alone(root: Path) -> None:
    edit_params(root, lambda values: values["variants"].pop("dora"))
    shutil.rmtree(root / "data/adapter/dora")
    (root / "data/reports/adapter/dora.json").unlink()
    assert dvc(root, "repro", "-q").returncode == 0
    small_pipeline.commit(root, "removed")
    lock = Revision(root, None).lock()
    oid = next(out["md5"] for out in lock["adapter@dora"]["outs"] if out["path"] == "data/adapter/dora")
    (root / ".dvc/cache/files/md5" / oid[:2] / oid[2:]).unlink()  # as `dvc gc --workspace` does
    assert examine(root)["verdict"] == "intact"
    found = examine(root, all_revs=True)
    assert found["verdict"] == "incomplete" and {one["path"] for one in found["missing"]} == {"data/adapter/dora"}


def test_commits_of_a_branch_whose_merge_kept_nothing_of_it_are_verified(root: Path) -> None:
    small_pipeline.git(root, "checkout", "-qb", "side")
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace('"testseed": 7', '"testseed": 8'))
    assert dvc(root, "repro").returncode == 0
    small_pipeline.git(root, "commit", "-qam", "side")
    small_pipeline.git(root, "checkout", "-q", "-")
    small_pipeline.git(root, "merge", "-q", "-s", "ours", "-m", "kept ours", "side")
    small_pipeline.git(root, "branch", "-qD", "side")
    assert dvc(root, "checkout", "--force").returncode == 0
    [old] = [path for path in files([root / ".dvc/cache/files/md5"]) if path.read_bytes() == b"test 8"]
    flip(old)
    [finding] = examine(root, all_revs=True)["findings"]
    assert finding["path"] == str(old)


@forked
def test_commands_of_next_steps_name_one_file_each_whatever_the_folders_are_called(root: Path) -> None:
    project = root.rename(root.with_name("my projects; $(id)"))
    (project / "data/sources/d.txt").rename(project / "data/sources/my data.txt")
    (project / "data/sources/d.txt.dvc").unlink()
    assert dvc(project, "add", "data/sources/my data.txt").returncode == 0
    source, output = b"my data", b"test 7"
    (project / "data/sources/my data.txt").write_bytes(source)
    assert dvc(project, "add", "data/sources/my data.txt").returncode == 0
    objects = [path for path in files([project / ".dvc/cache/files/md5"]) if path.read_bytes() in (source, output)]
    for path in objects:
        flip(path)
    (project / "data/sources/my data.txt").write_bytes(b"other")
    steps = [one["next"] for one in examine(project)["findings"]]
    words = [
        shlex.split(step.partition(":")[0].replace(",", ""))
        for step in steps
        if "data.txt" in step or step.startswith("rm ")
    ]
    named = {word for line in words for word in line if "/" in word}
    assert named <= {*map(str, objects), "data/sources/my data.txt"} and "data/sources/my data.txt" in named
    assert any(str(path) in named for path in objects)


@forked
@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b"x"), lambda path: path.unlink()], ids=["altered", "missing"]
)
def test_the_next_step_for_an_object_whose_file_is_in_the_workspace_repairs_it(
    root: Path, damage: Callable[[Path], None]
) -> None:
    content = (root / "data/inst/rows.txt").read_bytes()
    [path] = [p for p in (root / ".dvc/cache/files/md5").rglob("*") if p.is_file() and p.read_bytes() == content]
    path.chmod(0o644)
    damage(path)
    shown = as_text(examine(root))
    [(remove, address)] = re.findall(r"next: (?:rm (\S+), then )?dvc commit (\S+)", shown)
    if remove:
        Path(remove).unlink()
    assert dvc(root, "commit", address).returncode == 0
    assert path.read_bytes() == content and examine(root)["verdict"] == "intact"


@forked
@pytest.mark.parametrize(
    "name, content",
    [("rows.txt", "other"), ("more.txt", "other"), ("rows.txt", None)],
    ids=["changed", "added", "missing"],
)
def test_the_next_step_for_a_file_of_an_output_repairs_it(root: Path, name: str, content: str | None) -> None:
    (path := root / "data/inst" / name).unlink(missing_ok=True)
    if content:
        path.write_text(content)
    [command] = re.findall(r"next: dvc (.*)", as_text(examine(root)))
    assert dvc(root, *command.split()).returncode == 0
    assert examine(root)["verdict"] == "intact"


def test_one_revision_and_all_of_them_are_not_asked_for_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--integrity", "--rev", "HEAD", "--all-revs"]) == 2
    assert "--rev and --all-revs exclude each other" in capsys.readouterr().err


def test_a_record_of_the_run_cache_that_was_altered_is_named(root: Path) -> None:
    record = files([root / ".dvc/cache/runs"])[0]
    content = record.read_bytes()
    record.chmod(0o644)
    for altered in (
        content.replace(b"md5: ", b"md5: 0", 1),
        content.replace(b"cmd: ", b"cmd: x", 1),
        b"a: 2001-99-99\n",
        b'!!int "x"\n',
        b"[1",
        b"",
    ):
        record.write_bytes(altered)
        assert named(root, "cache") == {str(record)}, altered
    record.write_bytes(content)
    assert examine(root)["verdict"] == "intact"
