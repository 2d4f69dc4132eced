"""`pedigree erase` deletes what is shown to be this project's, and only that; what it does not search, it says."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.history import Project, identity
from builders.small_pipeline import commit, git

from dagster_project.core.errors import Busy, InputError
from dagster_project.core.hashing import md5_of_bytes
from dagster_project.lineage.erasure.needles import needles_of
from dagster_project.lineage.erasure.removal import without
from dagster_project.lineage.erasure.scan import SURE, Scanner
from dagster_project.lineage.history import Objects
from dagster_project.lineage.index import Index
from dagster_project.lineage.scratch_folder import FOLDERS, scratch_folder
from dagster_project.lineage.unfinished_erasure import FILE, is_unfinished
from dagster_project.orchestration.erasure import git_objects, objects, steps
from dagster_project.orchestration.erasure.exclusive import one_erasure
from dagster_project.orchestration.erasure.layout import layout_of
from dagster_project.orchestration.erasure.objects import Own, own_objects, to_remove
from dagster_project.orchestration.erasure.places import Search, search
from dagster_project.orchestration.erasure.remotes import Remotes, remotes_of
from dagster_project.orchestration.erasure.steps import Erasure, finish

SECRET = "Zephyrine Okonkwo of Larkspur Lane has lost a cobalt lantern without its wick"
SCANNER = Scanner(needles_of([SECRET], [], []))


def write(path: Path, content: str = SECRET) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def plan(**changes: Any) -> dict[str, Any]:
    needles = needles_of([SECRET], [identity("secret")], [])
    return {"needles": needles.document(), "retired": [], "own": [], "done": [], "sources": {}, **changes}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return root


def found_in(root: Path, remotes: Remotes | None = None) -> Search:
    return search(root, Scanner(needles_of([SECRET], [], [])), remotes or Remotes(root / ".dvc/cache"))


def test_other_work_trees_of_the_repository_are_searched_and_nothing_there_is_deleted(bare: Path) -> None:
    """A linked one beside the project, one in the project, one whose folder is
    gone; and the main one, seen from a linked one."""
    beside, inside, gone = bare.parent / "beside it", bare / "inside", bare.parent / "gone"
    (bare / "data/pages").mkdir(parents=True)
    (bare / "data/pages/a.html").write_text(SECRET)
    git(bare, "init", "-q")
    commit(bare)
    for number, folder in enumerate((beside, inside, gone)):
        git(bare, "worktree", "add", "-q", "-b", f"b{number}", str(folder))
    shutil.rmtree(gone)
    found = {place: [hit.path for hit in hits] for place, hits in found_in(bare).places.items()}
    assert found == {
        "pages": [bare / "data/pages/a.html"],
        "other files": [inside / "data/pages/a.html"],
        "other work trees of git": [beside / "data/pages/a.html"],
    }
    from_linked = {hit.path for hit in found_in(beside).places["other work trees of git"]}
    assert from_linked == {bare / "data/pages/a.html", inside / "data/pages/a.html"}


def test_the_work_trees_of_a_submodule_are_searched_and_not_its_git_directory(bare: Path) -> None:
    """Git lists the git directory of a submodule in place of its main work tree."""
    whole = bare.parent / "whole"
    for folder in (bare, whole):
        (folder / "data/pages").mkdir(parents=True)
        (folder / "data/pages/a.html").write_text(SECRET)
        git(folder, "init", "-q")
        commit(folder)
    git(whole, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(bare), "part")
    part, linked = whole / "part", bare.parent / "linked"
    git(part, "worktree", "add", "-q", "-b", "other", str(linked))
    assert layout_of(part, Remotes(part / ".dvc/cache")).work_trees == (linked,)
    assert layout_of(linked, Remotes(linked / ".dvc/cache")).work_trees == (part,)
    assert [hit.path for hit in found_in(linked).places["other work trees of git"]] == [part / "data/pages/a.html"]


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Project, dict[str, str], Path]:
    """A project with a shared remote. Names -> hashes of objects in its cache and in the remote."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    root = tmp_path / "project"
    root.mkdir()
    toy = Project(root)
    source = "data/sources/a.jsonl"
    old = toy.lock([("secret", "train", source), ("common", "train", source)])
    card = toy.put({"README.md": SECRET.encode(), "model.safetensors": b"base"})
    base = {
        "cmd": "python -m dagster_project run base_model",
        "deps": [],
        "outs": [{"path": "data/base_model", "hash": "md5", "md5": card}],
    }
    toy.commit({**old, "base_model": base})
    toy.commit(toy.lock([("common", "train", source)]))
    foreign = toy.put({"notes.txt": SECRET.encode() + b" twice", "weights.bin": b"theirs"})
    names = {"splits": old["splits"]["outs"][0]["md5"], "base": card, "foreign": foreign}
    write(root / ".dvc/cache/runs/ab/abcd/e1", f"outs: [{{md5: {foreign}}}]")
    write(root / ".dvc/cache/runs/ab/abce/e2", f"outs: [{{md5: {names['splits']}}}]")
    remote = tmp_path / "remote"
    subprocess.run(["cp", "-r", root / ".dvc/cache", remote], check=True)
    (root / ".dvc/config").write_text(f"['remote \"store\"']\n    url = {remote}\n[cache]\n    dir = ../cache\n")
    (root / ".dvc/cache").rename(root / "cache")
    return toy, names, remote


def removed(root: Path, **changes: Any) -> dict[str, Any]:
    erasure = Erasure(root, plan(**changes), lambda _: None)
    erasure.cache()
    found: dict[str, Any] = erasure.plan["removed"]
    return found


def test_only_outputs_of_this_project_that_hold_rows_are_removed_from_cache_and_remotes(
    shared: tuple[Project, dict[str, str], Path],
) -> None:
    toy, names, remote = shared
    root = toy.root
    lists = removed(root)
    for folder, gone in ((root / "cache", lists["objects"]), (remote, lists["remotes"]["store"])):
        assert names["splits"] in gone and names["base"] not in gone and names["foreign"] not in gone
        left = {path.parent.name + path.name for path in (folder / "files/md5").glob("??/*")}
        assert names["splits"] not in left and {names["base"], names["foreign"]} <= left
        assert {path.name for path in (folder / "runs").glob("*/*/*")} == {"e1"}
        for listing in (names["base"], names["foreign"]):
            files = json.loads((folder / "files/md5" / listing[:2] / listing[2:]).read_bytes())
            assert {one["md5"] for one in files} <= left
    after = search(root, Scanner(needles_of([SECRET], [], [])), remotes_of(root))
    assert len(after.places["DVC cache"]) == 2 and len(after.places["remote store"]) == 2


def test_curves_of_removed_outputs_are_removed_and_those_that_another_output_has_stay(bare: Path) -> None:
    toy = Project(bare)
    source = "data/sources/a.jsonl"

    def locked(text: str, own: str) -> dict[str, Any]:
        """The model of one record, with two curves."""
        lock = toy.lock([(text, "train", source)])
        drawn = {"own": toy.put_file(f"confusion,{own}".encode()), "same": toy.put_file(b"step,loss")}
        lock["adapter@lora"]["outs"] += [{"path": f"data/plots/{name}.csv", "md5": md5} for name, md5 in drawn.items()]
        return lock

    old, other, now = locked("secret", "1"), locked("common", "2"), locked("later", "3")
    names = [[out["md5"] for out in lock["adapter@lora"]["outs"]] for lock in (old, other, now)]
    for lock in (old, other, now):
        toy.commit(lock)
    remote = bare.parent / "remote"
    subprocess.run(["cp", "-r", bare / ".dvc/cache", remote], check=True)
    (bare / ".dvc/config").write_text(f"['remote \"store\"']\n    url = {remote}\n")
    lists = removed(bare, retired=[names[0][0]])
    gone = {names[0][0], names[0][1]}
    for storage, listed in ((bare / ".dvc/cache", lists["objects"]), (remote, lists["remotes"]["store"])):
        assert gone <= {*listed}
        left = {one for of in names for one in of if (storage / "files/md5" / one[:2] / one[2:]).is_file()}
        assert left == {one for of in names for one in of} - gone, "the other curve is also of models that stay"


def test_the_source_before_is_removed_from_cache_and_remote_also_if_its_text_is_short(
    shared: tuple[Project, dict[str, str], Path],
) -> None:
    toy, _, remote = shared
    name = md5_of_bytes(b"short")
    for folder in (toy.root / "cache", remote):
        write(folder / "files/md5" / name[:2] / name[2:], "short")
    unknown = removed(toy.root, sources={"data/sources/a.jsonl": {"md5": name}})
    assert name not in unknown["objects"], "no .dvc file names it: it may be another project's"
    write(toy.root / "data/sources/a.jsonl.dvc", f"outs:\n- md5: {name}\n  path: a.jsonl\n")
    toy.commit({})
    assert name not in removed(toy.root, sources={"data/sources/a.jsonl": {"md5": name}})["objects"], "needed"
    git(toy.root, "rm", "-q", "data/sources/a.jsonl.dvc")
    toy.commit({})
    lists = removed(toy.root, sources={"data/sources/a.jsonl": {"md5": name}})
    assert name in lists["objects"] and name in lists["remotes"]["store"]


def test_nothing_is_removed_from_a_shared_cache_or_its_run_cache(
    shared: tuple[Project, dict[str, str], Path], tmp_path: Path
) -> None:
    toy, names, remote = shared
    (toy.root / "cache").rename(tmp_path / "cache")
    (toy.root / ".dvc/config").write_text("[cache]\n    dir = ../../cache\n")
    before = sorted((tmp_path / "cache").rglob("*"))
    assert removed(toy.root) == {"objects": [], "runs": [], "remotes": {}}
    assert sorted((tmp_path / "cache").rglob("*")) == before and remote.is_dir() and names


def test_what_the_workspace_needs_by_now_stays_when_an_erasure_goes_on(
    shared: tuple[Project, dict[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, names, remote = shared
    lists = {"objects": [names["foreign"], names["splits"]], "runs": [], "remotes": {"store": [names["splits"]]}}
    monkeypatch.setattr(steps, "needed_objects", lambda _: {names["splits"]})
    assert removed(toy.root, removed=lists) == {"objects": [names["foreign"]], "runs": [], "remotes": {"store": []}}
    assert (remote / "files/md5" / names["splits"][:2] / names["splits"][2:]).is_file()


@pytest.mark.parametrize("showing", ["true", "false"])
def test_sources_that_dvc_tracks_are_this_projects(tmp_path: Path, showing: str) -> None:
    """Also those of the first commit, if the user's git does not show its files."""
    toy = Project(tmp_path)
    git(tmp_path, "config", "log.showRoot", showing)
    git(tmp_path, "checkout", "-q", "--orphan", "data")
    for number, path in enumerate(
        ("data/sources/a.jsonl.dvc", "data/sources/deep/b.jsonl.dvc", "data/sources/benchmarks/c.jsonl.dvc")
    ):
        write(tmp_path / path, f"outs:\n- md5: {number:032x}\n  path: x\n")
    toy.commit({})
    git(tmp_path, "rm", "-q", "data/sources/a.jsonl.dvc")
    toy.commit({})
    assert own_objects(Index(tmp_path), (), with_run_cache=True).outputs == {f"{0:032x}", f"{1:032x}"}


def test_a_file_that_another_output_has_too_stays() -> None:
    folders = {"mine.dir": frozenset({"row", "same"}), "theirs.dir": frozenset({"same"})}
    own = Own(frozenset({"mine.dir", "same"}), frozenset({"row", "same"}), frozenset())
    assert to_remove(folders, {"row", "same"}, set(), set(), own) == {"mine.dir", "row"}
    assert to_remove(folders, {"row"}, set(), set(), Own(own.outputs, own.files, frozenset({"row"}))) == set()


def test_one_short_fragment_is_not_enough_to_delete() -> None:
    assert SCANNER.content(b"a Zephyrine Okonkwo of Larkspur b") == {"text"}
    assert SURE in SCANNER.content(SECRET.encode())
    assert Scanner(needles_of([SECRET[:30]], [], [])).content(SECRET[:30].encode()) == {
        "text"
    }  # its two fragments overlap


@pytest.mark.parametrize("home", [".", ".."])
def test_a_home_of_dagster_around_the_project_makes_no_file_of_the_project_its_own(
    bare: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    git(bare, "init", "-q")
    kept = [
        write(bare / name)
        for name in ("README.md", "docs/a.md", "data/history/a.txt", "storage/kept.txt", "data/sources/a.jsonl")
    ]
    git(bare, "add", "-A")
    own = write(bare / home / "history/runs.txt")
    monkeypatch.setenv("DAGSTER_HOME", str(bare / home))
    erasure = Erasure(bare, plan(), lambda _: None)
    monkeypatch.setattr(steps, "remotes_of", lambda root: Remotes(root / ".dvc/cache"))
    erasure.dagster()
    assert all(path.is_file() for path in kept) and not own.exists()


def test_rows_of_an_event_log_that_projects_share_go_only_if_they_are_surely_of_the_record(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [SECRET, "theirs: Zephyrine Okonkwo of Larkspur", "fine"]
    left = {}
    for name, home in (("shared", tmp_path / "home"), ("own", bare / ".dagster")):
        path = write(home / "history/index.db", "")
        log = write(home / "storage/a.err", events[1])
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE event_logs (id INTEGER PRIMARY KEY, event TEXT)")
            db.executemany("INSERT INTO event_logs (event) VALUES (?)", [(event,) for event in events])
        db.close()
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        monkeypatch.setattr(steps, "remotes_of", lambda root: Remotes(root / ".dvc/cache"))
        Erasure(bare, plan(), lambda _: None).dagster()
        with sqlite3.connect(path) as db:
            left[name] = [event for (event,) in db.execute("SELECT event FROM event_logs")], log.exists()
        db.close()
    assert left == {"shared": (events[1:], True), "own": (["fine"], False)}


def test_paths_are_compared_resolved(bare: Path, tmp_path: Path) -> None:
    real = write(tmp_path / "real/files/md5/ab/c").parents[3]
    (tmp_path / "link").symlink_to(real)
    layout = layout_of(bare, Remotes((tmp_path / "link").resolve(), {}))
    assert layout.place(real / "files/md5/ab/c") == "DVC cache" and not layout.owns_cache


def test_the_cache_is_the_one_that_dvc_uses(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Project(bare)
    assert remotes_of(bare).cache == bare / ".dvc/cache"
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "config"))
    write(tmp_path / "config/config", f"[cache]\n    dir = {tmp_path}/x/../everyones\n")
    assert remotes_of(bare).cache == tmp_path / "everyones"


@pytest.mark.parametrize(
    ("file", "text", "folder"),
    [
        (".dvc/config", "", "project/.dvc/cache"),
        (".dvc/config", "[cache]\n    dir = ../../of project\n", "of project"),
        (".dvc/config.local", "[cache]\n    dir = {home}/of clone\n", "of clone"),
        ("../user/config", "[cache]\n    dir = {home}/of user\n", "of user"),
        ("../machine/config", "[cache]\n    dir = {home}/of machine\n", "of machine"),
        (".dvc/config", "[cache]\n    local = mine\n['remote \"mine\"']\n    url = ../../named\n", "named"),
        (".dvc/config", '[cache]\n    local = "mine"  # shared\n[\'remote "mine"\']\n    url = ../../named\n', "named"),
        (".dvc/config", '[cache]\n    dir = "{home}/of team, #2"  # shared\n', "of team, #2"),
        (".dvc/config", "[cache]\n    dir = {home}/ours  # of all projects\n", "ours"),
    ],
    ids=["default", "project", "clone", "user", "machine", "remote", "quoted remote", "quoted", "comment"],
)
def test_audits_read_the_cache_that_dvc_uses(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, folder: str
) -> None:
    Project(bare)
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("DVC_SYSTEM_CONFIG_DIR", str(tmp_path / "machine"))
    write(bare / file, text.format(home=tmp_path))
    expected = tmp_path / folder
    assert (
        Objects(bare).cache.resolve()
        == (expected / "files" / "md5").resolve()
        == remotes_of(bare).cache / "files" / "md5"
    )


def test_settings_that_dvc_cannot_read_are_one_message(bare: Path) -> None:
    write(bare / ".dvc/config", "[cache\n")
    with pytest.raises(InputError, match=r"DVC.s configuration .* cannot be read"):
        _ = Objects(bare).cache


def test_a_git_that_fails_is_an_error_and_no_clean_history(bare: Path) -> None:
    assert found_in(bare).blobs == []
    (bare / ".git").mkdir()
    with pytest.raises(InputError, match="git history cannot be searched"):
        found_in(bare)


def test_git_objects_that_cannot_be_read_are_counted_and_the_others_searched(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(bare, "init", "-q")
    for name in ("a", "b", "c"):
        write(bare / name, SECRET + name)
    git(bare, "add", "-A")
    bad = git(bare, "rev-parse", ":b").strip()
    read = git_objects.blobs
    monkeypatch.setattr(git_objects, "blobs", lambda root, names: {} if bad in names else read(root, names))
    found = found_in(bare)
    assert len(found.blobs) == 2 and found.unsearched == {"git objects that cannot be read": 1}


def test_large_files_of_git_and_submodules_are_searched(bare: Path) -> None:
    git(bare, "init", "-q")
    write(bare / ".git/lfs/objects/ab/cd/abcd")
    inner = bare / ".git/modules/inner"
    inner.mkdir(parents=True)
    git(inner, "init", "-q", "--bare")
    git(inner, "hash-object", "-w", str(write(bare.parent / "x")))
    nested = bare / "nested"
    nested.mkdir()
    git(nested, "init", "-q")
    git(nested, "hash-object", "-w", str(bare.parent / "x"))
    backup = bare / "backup.git"
    git(bare.parent, "init", "-q", "--bare", str(backup))
    git(backup, "hash-object", "-w", str(bare.parent / "x"))
    for name in ("rr-cache/ab/preimage", "lost-found/other/ab", "lfs/tmp/1", "modules/inner/rr-cache/c/postimage"):
        write(bare / ".git" / name)
    assert {place: len(hits) for place, hits in found_in(bare).places.items()} == {
        "Git LFS and git-annex": 1,
        "git submodules": 3,
        "other files of git": 4,
    }


def test_links_to_other_folders_are_counted(bare: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/a.txt")
    for name, target in (
        ("folder", tmp_path / "elsewhere"),
        ("file", tmp_path / "elsewhere/a.txt"),
        ("inside", bare),
        ("broken", bare / "x"),
    ):
        (bare / name).symlink_to(target)
    found = found_in(bare)
    assert found.unsearched == {"links to files and folders elsewhere": 2} and found.places == {}


def test_files_that_vanish_or_cannot_be_read_end_no_search(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {name: write(bare / name) for name in ("gone", "locked", "read")}
    read = Path.open

    def opened(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.name == "locked":
            raise PermissionError(errno.EACCES, "denied", str(self))
        if self.name == "gone":
            paths["gone"].unlink(missing_ok=True)
        return read(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", opened)
    found = found_in(bare)
    assert found.unsearched == {"files that cannot be read": 1}
    assert [hit.path.name for hits in found.places.values() for hit in hits] == ["read"]


def test_work_trees_of_experiments_are_left(bare: Path) -> None:
    write(bare / ".dvc/tmp/exps/standalone/x/README.md")
    write(bare / ".dvc/tmp/pedigree/a.json")
    places = found_in(bare).places
    assert {*places} == {"scratch files of DVC", "scratch files"} and "scratch files of DVC" not in steps.DELETED


@pytest.mark.parametrize("other_disk", [False, True])
def test_a_source_is_replaced_as_a_whole_and_its_folder_gets_no_other_file(
    bare: Path, monkeypatch: pytest.MonkeyPatch, other_disk: bool
) -> None:
    source = write(bare / "data/sources/a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    content = without(source, {0}, "a")
    change = {
        "rows": [0],
        "may_be_empty": False,
        "before": steps.sha256_of_file(source),
        "after": steps.sha256_of_bytes(content),
    }
    write(source.with_name(".a.jsonl.erase"), "half")
    seen, replace = [], Path.replace

    def replaced(self: Path, target: Path) -> Any:
        seen.append(self.relative_to(bare).as_posix())
        if other_disk and self.parent != target.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    Erasure(bare, plan(sources={"data/sources/a.jsonl": change}), lambda _: None).sources()
    assert source.read_bytes() == content and [path.name for path in source.parent.iterdir()] == ["a.jsonl"]
    assert seen[0] == ".dvc/tmp/pedigree/erase/source" and len(seen) == 1 + other_disk


def test_rows_leave_a_csv_file_with_a_long_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\nshort\n")
    limit = csv.field_size_limit()
    assert without(path, {0}, "a.csv") == b"text\nshort\n" and csv.field_size_limit() == limit


def test_names_of_objects_are_not_those_of_other_files() -> None:
    assert (
        objects.name_of(Path("x/files/md5/ab") / ("c" * 30)) == "ab" + "c" * 30
        and objects.name_of(Path("x/runs/ab/c")) is None
    )


COPIES = """
import os, signal, sys
from pathlib import Path
from dagster_project.lineage.scratch_folder import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "a.txt").write_text(sys.argv[2])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_copies_of_data_of_a_killed_command_are_erased(bare: Path) -> None:
    """Also a short text, which no search finds."""
    Project(bare)
    subprocess.run([sys.executable, "-c", COPIES, str(bare), "short"], check=False)
    assert [path.read_text() for path in (bare / FOLDERS).rglob("a.txt")] == ["short"]
    Erasure(bare, plan(files=[]), lambda _: None).files()
    assert [*(bare / FOLDERS).iterdir()] == []


def test_copies_of_data_of_a_killed_command_are_removed_by_the_next_one(bare: Path) -> None:
    Project(bare)
    subprocess.run([sys.executable, "-c", COPIES, str(bare), SECRET], check=False)
    with scratch_folder(bare) as folder:
        assert [*(bare / FOLDERS).iterdir()] == [folder]


def test_a_command_with_copies_of_data_keeps_them_and_an_erasure_waits_until_it_has_ended(bare: Path) -> None:
    Project(bare)
    with scratch_folder(bare) as folder:
        with pytest.raises(Busy, match="works on copies of the data"), one_erasure(bare):
            pass
        with scratch_folder(bare):
            write(folder / "a.txt")
        Erasure(bare, plan(files=[]), lambda _: None).files()
        assert (folder / "a.txt").is_file()
    with one_erasure(bare):
        pass


def test_rows_are_not_copied_to_temporary_files_of_the_system(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Project(bare)
    monkeypatch.setattr("tempfile.tempdir", str(bare / "missing"))
    source = write(bare / "data/sources/a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    assert without(source, {0}, "a", root=bare) == b'{"text": "b"}\n'


def test_an_erasure_is_unfinished_until_nothing_else_with_the_text_is_beside_its_plan(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_written = write((bare / FILE).with_name(".plan.json.1"))
    write(bare / FILE)
    removed, remove = list[bool](), steps.remove

    def noted(path: Path) -> None:
        removed.append(half_written.exists())
        if not half_written.exists():
            assert is_unfinished(bare)
        remove(path)

    monkeypatch.setattr(steps, "remove", noted)
    finish(bare)
    assert removed == [True, False] and not (bare / FILE).parent.exists()
