"""Damaged files that git, DVC or a cache holds: one message with path and next
step, and what does not need them goes on. On the small pipeline."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from builders import small_pipeline
from conftest import dvc, pedigree
from dvc.scm import SCMError

from dagster_project.__main__ import main
from dagster_project.core.context import Documents, measured
from dagster_project.core.documents import read_report, set_aside
from dagster_project.core.errors import InputError
from dagster_project.lineage import history, lineage
from dagster_project.lineage.impact.question import impact
from dagster_project.orchestration import integrity, rwlock
from dagster_project.orchestration.dagster.assets import build_definitions
from dagster_project.orchestration.dagster.instance import open_at
from dagster_project.orchestration.dagster.sync import sync
from dagster_project.orchestration.dvc import read_stages
from dagster_project.orchestration.dvc_errors import explained

pytestmark = pytest.mark.usefixtures("warm_small")

CONFLICT = b"<<<<<<< ours\n{}\n=======\n{}\n>>>>>>> theirs\n"
REPORTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "conflict": (lambda _: CONFLICT, "it has an unresolved merge conflict"),
    "cut": (lambda content: content[: len(content) // 2], "it is cut short or is not JSON"),
    "list": (lambda _: b"[1]\n", "it is not a JSON object"),
    "latin-1": (lambda _: b'{"a": "\xe9"}', "it is not UTF-8"),
}


@pytest.mark.parametrize("case", ["conflict", "cut"])
def test_a_damaged_report_is_one_line_of_sync_and_the_rest_goes_on(
    root: Path, synced: dg.DagsterInstance, case: str
) -> None:
    damage, why = REPORTS[case]
    path = root / "data/reports/tok.json"
    path.write_bytes(damage(path.read_bytes()))
    (root / "data/sources/g.txt").write_text("r9")
    lines = sync(root, synced, small_pipeline.PIPELINE)
    named = [line for line in lines if line.startswith("data/reports/tok.json cannot be read: ")]
    assert len(named) == 1 and why in named[0]
    assert "git checkout HEAD data/reports/tok.json" in named[0] and "dvc repro tok" in named[0]
    assert any(line.startswith("sources/g.txt is now ") for line in lines)
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root)


@pytest.mark.parametrize("case", REPORTS)
def test_a_damaged_report_is_refused_by_what_needs_it(root: Path, case: str) -> None:
    damage, why = REPORTS[case]
    path = root / "data/reports/tok.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"data/reports/tok.json cannot be read: {why}") as raised:
        read_report(root, "tok")
    assert "dvc repro tok" in raised.value.hint
    assert integrity.examine(root)["verdict"] == "altered"
    assert lineage.audit(root, "tok")["model"]["stage"] == "tok"  # git has the recorded bytes


def test_a_damaged_comparison_and_a_damaged_document_of_a_page_are_named(root: Path) -> None:
    (root / "data/comparison").mkdir()
    (root / "data/comparison/comparison.json").write_bytes(CONFLICT)
    done = pedigree(root, "compare")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "data/comparison/comparison.json cannot be read: it has an unresolved merge conflict" in done.stderr
    assert "dvc checkout --force data/comparison" in done.stderr
    with pytest.raises(InputError, match=r"data/comparison/comparison.json cannot be read"):
        Documents(root, "comparison", root, root, {}).read(root / "data/comparison/comparison.json")


LOCKS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not UTF-8": (lambda lock: lock.replace(b"stages", b"st\xffages", 1), "it is not UTF-8"),
    "empty stages": (lambda _: b"schema: '2.0'\nstages:\n", "its key `stages` is empty"),
    "list": (lambda _: b"- a\n- b\n", "it is not a mapping"),
    "text": (lambda _: b"schema: '2.0'\nstages:\n  tok: 3\n", "tok is not a mapping"),
    "outs": (
        lambda _: b"schema: '2.0'\nstages:\n  tok:\n    cmd: x\n    outs: 3\n",
        "outs of tok are not a list of paths",
    ),
    "conflict": (
        lambda lock: lock.replace(b"  tok:\n", b"<<<<<<< ours\n  tok:\n=======\n>>>>>>> theirs\n"),
        "unresolved merge conflict",
    ),
    "between two stages": (lambda lock: lock[: lock.index(b"  tok:\n")], "has no complete entry of tok, "),
    "in a stage": (
        lambda lock: lock[: lock.index(b"    outs:", lock.index(b"  tok:\n"))],
        "has no complete entry of tok",
    ),
    "empty": (lambda _: b"", "has no complete entry of "),
}


@pytest.mark.parametrize("case", LOCKS)
def test_a_damaged_dvc_lock_is_one_message_in_whatever_reads_it(root: Path, case: str) -> None:
    damage, why = LOCKS[case]
    lock = root / "dvc.lock"
    lock.write_bytes(damage(lock.read_bytes()))
    for command in (
        lambda: history.Revision(root, None).lock(),
        lambda: lineage.audit(root, "tok"),
        lambda: lineage.audit(root, "inst") if "complete" in why else read_stages(root),
    ):
        with pytest.raises(InputError) as raised:
            command()
        assert why in raised.value.what and "dvc.lock" in raised.value.what and "git checkout" in raised.value.hint
    found = integrity.examine(root)
    assert found["verdict"] == "altered" and any(
        why in one["wrong"] and "git checkout" in one["next"] for one in found["findings"]
    )
    asked: dict[str, Any] = dict.fromkeys(("record", "source", "content", "containing"))
    assert impact(root, **asked, text="nothing says this")["verdict"] == "cannot tell"


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("params.yaml", lambda _: "a: [1\nb: 2\n", r"^params\.yaml is not valid YAML: .*, line 2, "),
        ("params.yaml", lambda _: "- 1\n", r"^params\.yaml must be a mapping"),
        ("dvc.yaml", lambda _: "stages:\n  a:\n\tcmd: x\n", r"dvc\.yaml'.*: found character .*, line 3$"),
        (
            "dvc.yaml",
            lambda text: text.replace('"tok": {', '"tok": {"outz": ["x"],'),
            r"extra keys not allowed in stages\.tok\.outz$",
        ),
    ],
)
def test_a_mistake_in_a_file_that_dvc_reads_is_named(
    root: Path, name: str, damage: Callable[[str], str], what: str
) -> None:
    (root / name).write_text(damage((root / name).read_text()))
    with pytest.raises(InputError) as raised:
        read_stages(root)
    assert re.search(what, raised.value.what)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        (
            "outs:\n<<<<<<< ours\n- md5: a\n=======\n- md5: b\n>>>>>>> theirs\n  path: d.txt\n",
            "an unresolved merge",
            "checkout --ours",
        ),
        ("outs: [", "not a file as DVC writes it", "git checkout HEAD"),
        ("outs:\n- md5: 1\n", "not a file as DVC writes it", "git checkout HEAD"),
    ],
)
def test_a_damaged_dvc_file_of_a_source_is_named(root: Path, text: str, what: str, hint: str) -> None:
    (root / "data/sources/d.txt.dvc").write_text(text)
    with pytest.raises(InputError) as raised:
        read_stages(root)
    assert raised.value.what.startswith("data/sources/d.txt.dvc ") and what in raised.value.what
    assert hint in raised.value.hint and "data/sources/d.txt.dvc`" in raised.value.hint


def test_a_dvc_lock_that_was_cut_between_two_stages_is_said_by_sync(root: Path, synced: dg.DagsterInstance) -> None:
    lock = root / "dvc.lock"
    lock.write_bytes(LOCKS["between two stages"][0](lock.read_bytes()))
    lines = sync(root, synced, small_pipeline.PIPELINE)
    assert lines[0].startswith("dvc.lock has no complete entry of tok, ") and "git checkout HEAD dvc.lock" in lines[0]
    assert small_pipeline.not_fresh(root, synced) == small_pipeline.changed_in_dvc(root) >= {"tok"}


def test_an_empty_dvc_lock_that_no_commit_can_restore_is_named_with_what_restores_it(root: Path) -> None:
    before = (root / "dvc.lock").read_bytes()
    (root / "dvc.lock").write_bytes(b"")
    small_pipeline.commit(root, "a kill while DVC wrote it")
    assert dvc(root, "repro").returncode == 255
    with pytest.raises(
        InputError, match=r"dvc\.lock is empty, and DVC refuses it\nhint: delete it, then run `dvc repro`"
    ):
        lineage.audit(root, "tok")
    (root / "dvc.lock").unlink()
    assert dvc(root, "repro").returncode == 0 and (root / "dvc.lock").read_bytes() == before


def test_a_dvc_lock_with_other_line_ends_lacks_nothing(root: Path) -> None:
    lock = root / "dvc.lock"
    lock.write_bytes(lock.read_bytes().replace(b"\n", b"\r\n"))
    assert history.lost_entries(root) == []


def test_entries_of_stages_that_are_no_longer_declared_are_not_lost(root: Path) -> None:
    lock = root / "dvc.lock"
    lock.write_bytes(LOCKS["between two stages"][0](lock.read_bytes()))
    assert {"tok", "adapter@lora", "cmp"} <= set(history.lost_entries(root))
    values = json.loads((root / "params.yaml").read_text())
    del values["variants"]["lora"]
    (root / "params.yaml").write_text(json.dumps(values))
    stages = json.loads((root / "dvc.yaml").read_text())
    del stages["stages"]["tok"]
    (root / "dvc.yaml").write_text(json.dumps(stages))
    assert {"adapter@dora", "cmp"} == set(history.lost_entries(root))


def test_the_sensor_names_a_damaged_dvc_lock_in_one_line(root: Path, synced: dg.DagsterInstance) -> None:
    [sensor] = build_definitions(root, small_pipeline.PIPELINE).sensors
    (root / "dvc.lock").write_bytes(b"- a\n")
    result = sensor(dg.build_sensor_context(instance=synced))
    assert (
        result.skip_message
        == "Not synced: dvc.lock cannot be read: it is not a mapping; hint: restore it with `git checkout HEAD"
        " dvc.lock`, then run `dvc repro`"
    )


@pytest.mark.parametrize("content", ["[]", '{"a": [1]}', '{"a"', '{"a": 3}'])
def test_a_damaged_cache_of_hashes_is_set_aside_and_made_anew(
    root: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / integrity.KNOWN_HASHES
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "pedigree"):
        assert integrity.set_tampered_aside(root, read_stages(root).values()) == []
    assert (
        len(caplog.messages) == 1
        and "it is set aside as sha256.json.damaged: all outputs are hashed again" in caplog.messages[0]
    )
    assert path.with_name("sha256.json.damaged").read_text() == content
    assert len(json.loads(path.read_text())) > 3
    caplog.clear()
    assert integrity.set_tampered_aside(root, read_stages(root).values()) == [] and not caplog.messages


def test_a_damaged_cache_that_cannot_be_renamed_is_not_said_to_be_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sha256.json.damaged").mkdir()
    set_aside(tmp_path / "missing" / "sha256.json", "it is empty", "all outputs are hashed again")
    assert "it is ignored: all outputs are hashed again" in caplog.text and "set aside" not in caplog.text


def test_a_damaged_measurement_is_set_aside(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "data/pages/adapter/lora/measured.json"
    assert measured(root, "adapter@lora")
    path.write_text(path.read_text()[:9])
    with caplog.at_level(logging.WARNING, "pedigree"):
        assert measured(root, "adapter@lora") == {} == measured(root, "adapter@lora")
    assert len(caplog.messages) == 1 and "measured.json.damaged" in caplog.messages[0]


@pytest.mark.parametrize(
    "content", [b'{"write": []}', b"[1]", b'{"read": {"x": 3}}', b'{"write": {"x": {"pid": -1, "cmd": ""}}}', b"\xff"]
)
def test_a_table_of_locked_paths_of_another_shape_is_deleted(root: Path, content: bytes) -> None:
    path = root / ".dvc/tmp/rwlock"
    path.write_bytes(content)
    assert read_stages(root)["tok"].changed == []
    assert not path.exists() or not any(json.loads(path.read_bytes()).values())


def test_dvc_repro_works_again_after_any_command(root: Path) -> None:
    (root / ".dvc/tmp/rwlock").write_text('{"write": []}')
    assert dvc(root, "repro").returncode != 0
    read_stages(root)
    assert dvc(root, "repro").returncode == 0


def test_a_killed_process_that_its_parent_does_not_collect_locks_nothing(root: Path) -> None:
    """DVC counts it as running: so it would be busy for ever where nothing
    collects ended processes, as in many containers."""
    ended = subprocess.Popen(["true"])
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    zombie, here = {"pid": ended.pid, "cmd": "dagster api grpc"}, {"pid": os.getpid(), "cmd": "pytest"}
    path = root / ".dvc/tmp/rwlock"
    path.write_text(
        json.dumps({"write": {str(root / "data/tok"): zombie}, "read": {str(root / "data/other"): [zombie, here]}})
    )
    assert "is busy" in dvc(root, "repro").stderr
    read_stages(root)
    assert json.loads(path.read_bytes()) == {"write": {}, "read": {str(root / "data/other"): [here]}}
    assert dvc(root, "repro").returncode == 0
    ended.wait()


@pytest.mark.parametrize(("words", "locks"), [("", False), ("dvc repro", True)])
def test_a_number_that_another_program_got_after_a_restart_locks_nothing(words: str, locks: bool, root: Path) -> None:
    path = root / ".dvc/tmp/rwlock"
    with subprocess.Popen(["sh", "-c", f"read line; : {words}"], stdin=subprocess.PIPE) as other:
        table = {"write": {str(root / "data/tok"): {"pid": other.pid, "cmd": "dvc repro"}}}
        path.write_text(json.dumps(table))
        try:
            assert "is busy" in dvc(root, "repro").stderr
            assert bool(rwlock.writer_of(root, ["data/tok"])) == locks
            read_stages(root)
            assert json.loads(path.read_bytes())["write"] == (table["write"] if locks else {})
            assert dvc(root, "repro").returncode == (255 if locks else 0)
        finally:
            other.kill()


def test_a_damaged_cache_of_dvc_is_named_and_can_be_removed(root: Path) -> None:
    site = root / ".dvc" / "site"
    (root / ".dvc" / "config.local").write_text(f"[core]\nsite_cache_dir = {site}\n")
    read_stages(root)
    for path in site.rglob("cache.db"):
        path.write_bytes(b"no database" * 400)
    with pytest.raises(InputError, match="DVC's cache of hashes is damaged") as raised:
        read_stages(root)
    named = Path(raised.value.what.partition(": ")[0])
    assert named.is_relative_to(site) and (named / "cache.db").is_file()
    shutil.rmtree(named)
    other = next(iter(path.parent for path in site.rglob("cache.db")), None)
    if other is not None:  # two caches were damaged
        shutil.rmtree(other)
    assert read_stages(root)["tok"].changed == []


def test_a_file_whose_name_is_not_utf8_is_named(root: Path) -> None:
    (root / "data/tok").joinpath("a\udcff.txt").write_text("x")
    with pytest.raises(InputError, match="not UTF-8") as raised:
        read_stages(root)
    assert "data/tok/a" in raised.value.what and raised.value.hint == "rename the file"


def test_a_damaged_configuration_of_git_is_named(root: Path) -> None:
    config = root / ".git/config"
    before = config.read_bytes()
    config.write_text("[core\n")
    with pytest.raises(InputError, match=r"\.git/config: git's configuration cannot be read") as raised:
        read_stages(root)
    assert raised.value.hint == "correct it: `git config --list` names the line"
    config.write_bytes(before)
    assert read_stages(root)["tok"].changed == []


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config", "data/reports/tok.json"])
def test_a_named_pipe_is_one_message_of_every_command_and_none_waits_for_it(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    small_pipeline.git(root, "add", "-A")
    small_pipeline.git(root, "commit", "-q", "--allow-empty", "-m", "all")
    (root / name).unlink()
    os.mkfifo(root / name)
    for words in ("plan", "run --all", "run tok", "sync", "verify --integrity", "render", "audit tok"):
        assert main(words.split()) == 2, words
        shown = capsys.readouterr().err
        assert shown.count("error: ") == 1 and f"error: {root / name} is a named pipe, not a file\nhint: " in shown, (
            words
        )
    with pytest.raises(InputError, match="is a named pipe"):  # Dagster's assets, checks and sensors begin here
        read_stages(root)
    (root / name).unlink()  # what the message says
    small_pipeline.git(root, "checkout", "HEAD", name)
    assert not any(state.changed for state in read_stages(root).values())


def test_a_link_to_a_device_is_not_read(root: Path) -> None:
    (root / "dvc.lock").unlink()
    (root / "dvc.lock").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"dvc\.lock is a device, not a file"):
        read_stages(root)


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml"])
def test_a_link_to_nowhere_is_one_message(
    root: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    (root / name).unlink()
    (root / name).symlink_to("nowhere")
    for words in ("run --all", "sync", "verify --integrity"):
        assert main(words.split()) == 2, words
        shown = capsys.readouterr().err
        assert shown.count("error: ") == 1 and name in shown and "hint: " in shown, (words, shown)


def test_line_ends_that_git_changed_are_named(root: Path) -> None:
    path = root / "data/reports/tok.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    [found] = [one for one in integrity.examine(root)["findings"] if one["path"] == "data/reports/tok.json"]
    assert "line ends of Windows" in found["wrong"] and "* -text" in found["next"]


def test_a_checkout_with_other_line_ends_gets_the_recorded_bytes(root: Path, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / ".gitattributes", root / ".gitattributes")
    small_pipeline.git(root, "add", ".gitattributes")
    small_pipeline.git(root, "commit", "-qm", "attributes")
    small_pipeline.git(
        root,
        "-c",
        "core.autocrlf=true",
        "clone",
        "-q",
        "-c",
        "core.autocrlf=true",
        str(root),
        str(tmp_path / "windows"),
    )
    for name in ("data/reports/tok.json", "dvc.lock", "data/sources/g.txt"):
        assert (tmp_path / "windows" / name).read_bytes() == (root / name).read_bytes()


@pytest.mark.parametrize("name", ["why?", "100%25 done"])
def test_a_home_of_dagster_that_would_be_another_folder_in_a_url_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / ".dagster"
    folder.mkdir(parents=True)
    file = folder / "dagster.yaml"
    file.write_text("telemetry: {enabled: false}\n")
    with pytest.raises(InputError, match="cannot be in a path with") as raised:
        open_at(folder)
    assert "DAGSTER_HOME" in raised.value.hint and [one.name for one in tmp_path.iterdir()] == [name]


def test_a_repository_that_cannot_be_read_is_not_called_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = SCMError(f"{root} is not a git repository")
    assert "git init" in str(explained(error, root))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != ".git")
    assert f"{root / '.git'}: cannot be read" in str(explained(error, root))
    (root / "sub").mkdir()
    assert f"{root / '.git'}: cannot be read" in str(explained(error, root / "sub"))


def test_a_project_without_git_is_one_message_and_its_lineage_is_still_shown(root: Path) -> None:
    shutil.rmtree(root / ".git")
    with pytest.raises(InputError, match="not a git repository") as raised:
        read_stages(root)
    assert "git init" in raised.value.hint and "core.no_scm" in raised.value.hint
    for command in (("sync",), ("verify", "--integrity"), ("verify", "tok"), ("run", "splits"), ("ui",)):
        done = pedigree(root, *command)
        assert done.returncode == 2 and "Traceback" not in done.stderr, command
        assert re.search("not (in )?a git repository.*git init", done.stderr, re.DOTALL), command
    assert lineage.audit(root, "tok")["model"]["stage"] == "tok"
    (root / ".dvc/config.local").write_text("[core]\nno_scm = true\n")
    assert read_stages(root)["tok"].changed == [] and integrity.examine(root)["verdict"] == "intact"
