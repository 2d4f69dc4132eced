"""Impact and audit where git does not show the whole history, and sources by other names than a run read them by."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from builders.history import Project, identity
from builders.small_pipeline import commit, git

from dagster_project.__main__ import main
from dagster_project.core.errors import InputError
from dagster_project.lineage.impact.question import impact
from dagster_project.lineage.impact.text import as_text
from dagster_project.lineage.lineage import audit
from dagster_project.views.lineage import code_text, lineage_page

FAQ, MAIL = "data/sources/faq.jsonl", "data/sources/mail.jsonl"
ROWS = [("cats", "train", FAQ), ("dogs", "train", MAIL), ("birds", "validation", FAQ)]


@pytest.fixture
def made(tmp_path: Path) -> Project:
    """Two commits; the cache has only what the last one names, and the model that saw "dogs" is of the first one."""
    made = Project(tmp_path / "project")
    first = made.commit(made.lock(ROWS))
    git(made.root, "tag", "first", first)
    last = made.lock([("cats", "train", FAQ), ("frogs", "train", MAIL), ROWS[2]])
    made.commit(last)
    made.collect_garbage(last)
    return made


def test_a_history_that_git_cannot_list_is_not_searched_and_cannot_be_told(
    made: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of another user: git then refuses the folder."""
    commit = git(made.root, "rev-parse", "first").strip()
    lost = made.root / ".git/objects" / commit[:2] / commit[2:]
    content = lost.read_bytes()
    lost.unlink()
    found = impact(made.root, record=identity("dogs"))
    assert (found["verdict"], found["models"], found["unreadable"]) == (
        "cannot tell",
        [],
        ["the history in git (`git log --all` says why)"],
    )
    assert "cannot be read: the history in git" in as_text(found)
    lost.write_bytes(content)
    assert not impact(made.root, record=identity("dogs"))["unreadable"]
    monkeypatch.setenv("PATH", os.fspath(made.root))  # git is not installed
    assert impact(made.root, record=identity("nobody"))["verdict"] == "cannot tell"
    code = audit(made.root, "merged@lora")["code"]
    assert (code["commit"], code_text(code)) == (
        None,
        "commit unknown, without the history in git (`git log --all` says why)",
    )


def test_a_commit_that_git_replaces_is_searched(made: Project) -> None:
    git(made.root, "replace", "first", "HEAD")
    assert [model["stage"] for model in impact(made.root, record=identity("dogs"))["unknown"]] == [
        "adapter@lora",
        "merged@lora",
    ]


def test_the_lock_of_a_merge_without_conflicts_is_read_also_if_git_shows_no_files_of_merges(made: Project) -> None:
    git(made.root, "config", "log.diffMerges", "off")
    lock = made.lock(ROWS)
    made.commit(lock)
    git(made.root, "checkout", "-q", "-b", "side")
    other = json.loads(json.dumps(lock))
    other["splits"]["cmd"] += " # again"
    made.commit(other)
    git(made.root, "checkout", "-q", "main")
    now = made.lock(ROWS, seed=1)
    made.commit(now)
    git(made.root, "merge", "-q", "--no-edit", "side")
    git(made.root, "checkout", "-q", "side")
    found = audit(made.root, "main:merged@lora")
    assert found["model"]["md5"] == now["merged@lora"]["outs"][0]["md5"]
    assert found["code"]["stages"]["splits"]["commit"] == git(made.root, "rev-parse", "side").strip()


def test_the_history_before_a_project_was_moved_is_said_to_be_missing(made: Project) -> None:
    (made.root / "ml").mkdir()
    for name in ("data", "dvc.lock", "dvc.yaml", ".dvc", ".gitignore"):
        (made.root / name).rename(made.root / "ml" / name)
    moved = commit(made.root, "moved")[:12]
    found = impact(made.root / "ml", record=identity("dogs"))
    lost = f"the history before commit {moved}, which moved dvc.lock here (ask at `git checkout {moved}^`)"
    assert (found["verdict"], found["unreadable"]) == ("cannot tell", [lost])
    code = audit(made.root / "ml", "merged@lora")["code"]
    assert code["commit"][:12] == moved and code_text(code).endswith(f"it may be an earlier one, in {lost}")


def test_the_page_of_an_audit_names_the_revision_to_verify(made: Project) -> None:
    commits = [git(made.root, "rev-parse", name).strip() for name in ("first", "HEAD")]
    pages = [lineage_page(audit(made.root, f"{name}:merged@lora"), []) for name in commits]
    for page, name in zip(pages, commits, strict=True):
        assert f"pedigree verify merged@lora --rev {name[:12]}<" in page
    made.write(made.lock([("cats", "train", FAQ), ("newts", "train", MAIL), ROWS[2]]))
    assert "pedigree verify merged@lora<" in lineage_page(audit(made.root, "merged@lora"), [])


def test_an_empty_text_is_no_question(made: Project) -> None:
    with pytest.raises(InputError, match="--text: the text is empty"):
        impact(made.root, text=" \n")


def test_a_source_is_found_by_every_path_to_it(made: Project, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made.root)
    wanted = impact(made.root, source=FAQ)["models"]
    assert wanted
    for path in (
        f"data/sources/../sources/{Path(FAQ).name}",
        FAQ.replace("/", "//"),
        str(made.root / FAQ),
        str(tmp_path / "link" / FAQ),
    ):
        assert impact(made.root, source=path)["models"] == impact(tmp_path / "link", source=path)["models"] == wanted, (
            path
        )


def test_a_source_is_found_by_its_plain_path_where_params_yaml_named_it_otherwise(made: Project) -> None:
    made.commit(made.lock([("owls", "train", "./data/sources/owls.jsonl"), *ROWS]))
    assert (
        impact(made.root, source="data/sources/owls.jsonl")["models"]
        == impact(made.root, source="./data/sources/owls.jsonl")["models"]
        != []
    )


def test_a_source_is_found_whether_its_name_has_composed_letters_or_not(made: Project) -> None:
    name = unicodedata.normalize("NFD", "data/sources/données.jsonl")
    made.commit(made.lock([("owls", "train", name), *ROWS]))
    assert (
        impact(made.root, source=unicodedata.normalize("NFC", name))["models"]
        == impact(made.root, source=name)["models"]
        != []
    )


def test_a_text_is_found_whether_its_letters_are_composed_or_not(made: Project) -> None:
    """Also in the arguments of a call, and of a source whose file has the other form."""
    composed = unicodedata.normalize("NFC", "the élan of Ångström")
    parts = unicodedata.normalize("NFD", composed)
    made.commit(made.lock([(parts, "train", "data/sources/a.jsonl"), *ROWS]))
    assert (
        impact(made.root, text=f"What of {composed}?")["records"]
        == [identity(parts)]
        == impact(made.root, text=f"what of {parts}?")["records"]
    )
    made.commit(made.lock([(composed, "train", "data/sources/a.jsonl"), *ROWS]))
    for text in (composed, parts):
        assert impact(made.root, text=f"What of {text}?")["records"] == sorted([identity(parts), identity(composed)])


def test_an_expression_with_accents_or_an_ellipsis_matches_either_form_of_a_text(made: Project) -> None:
    composed = "caf\u00e9 waits\u2026 for \ufb01ne tea"
    parts = unicodedata.normalize("NFD", composed)
    assert composed != parts
    made.commit(made.lock([(composed, "train", "data/sources/a.jsonl"), *ROWS]))
    for expression in (
        "caf\u00e9",
        "cafe\u0301",
        "waits\u2026",
        "waits[.]{3}",
        r"waits\u2026",
        r"caf\xe9",
        "(fine|none)",
        "\ufb01ne",
        "caf. waits",
    ):
        found = impact(made.root, containing=expression, regex=True)
        assert found["records"] == [identity(composed)], expression
        assert "waits" in found["matches"][0]["excerpt"]
    assert impact(made.root, containing="caf\u00ea|tea\u2026", regex=True)["records"] == []


def test_on_a_branch_without_results_a_model_of_another_is_found_by_its_hash(made: Project) -> None:
    lock = made.lock(ROWS)
    commit = made.commit(lock)
    md5 = lock["merged@lora"]["outs"][0]["md5"]
    git(made.root, "checkout", "-q", "--orphan", "new")
    git(made.root, "rm", "-q", "--cached", "dvc.lock")
    (made.root / "dvc.lock").unlink()
    git(made.root, "commit", "-qm", "new")
    assert audit(made.root, md5)["model"] == audit(made.root, f"{commit}:merged@lora")["model"]
    with pytest.raises(InputError, match=r"merged@lora is not in dvc\.lock; it was before, last with md5"):
        audit(made.root, "merged@lora")
    with pytest.raises(InputError, match=r"nothing: no such stage(.|\n)*there is no dvc\.lock here"):
        audit(made.root, "nothing")
    with pytest.raises(InputError, match=r"nowhere:merged@lora: there is no revision nowhere here, and no such stage"):
        audit(made.root, "nowhere:merged@lora")
    git(made.root, "checkout", "-q", commit)
    (made.root / "params.yaml").write_text("{}")
    (made.root / "dvc.lock").unlink()
    with pytest.raises(InputError, match=r"dvc\.lock has no complete entry of"):
        audit(made.root, md5)


def test_on_a_branch_without_results_where_and_a_copied_folder_are_answered(
    made: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = made.lock(ROWS)
    made.commit(lock)
    md5 = lock["adapter@lora"]["outs"][0]["md5"]
    copied = tmp_path / "copied"
    copied.mkdir()
    for one in json.loads(made.object(md5).read_bytes()):
        shutil.copyfile(made.object(one["md5"]), copied / one["relpath"])
    git(made.root, "checkout", "-q", "--orphan", "new")
    git(made.root, "rm", "-q", "--cached", "dvc.lock")
    (made.root / "dvc.lock").unlink()
    git(made.root, "commit", "-qm", "new")
    assert main(["audit", md5, "--where", "--project", str(made.root)]) == 0
    assert "no run on a cluster is recorded on this machine" in capsys.readouterr().out
    assert main(["audit", str(copied), "--json", "--project", str(made.root)]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["md5"] == md5


def test_the_file_behind_a_linked_source_names_the_source(made: Project) -> None:
    source = made.root / "data/sources"
    source.mkdir(parents=True)
    (source / "kept.jsonl").write_text("rows")
    (source / "faq.jsonl").symlink_to("kept.jsonl")
    with pytest.raises(
        InputError, match=r"not a name that a run read it by\nhint: ask for --source data/sources/faq.jsonl"
    ):
        impact(made.root, source="data/sources/kept.jsonl")


def test_an_empty_revision_is_not_the_staged_one(made: Project) -> None:
    with pytest.raises(InputError, match="no revision ''"):
        audit(made.root, "merged@lora", "")


def test_a_revision_without_a_model_is_not_the_current_folder(made: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file in it was hashed."""
    monkeypatch.chdir(made.root)
    with pytest.raises(InputError, match="HEAD:: no such stage"):
        audit(made.root, "HEAD:")


def test_near_copies_of_a_record_whose_text_is_gone_are_no_question(made: Project) -> None:
    """Nothing could be compared, which is not the same as no near-copy."""
    assert impact(made.root, record=identity("frogs"), near=True)["near"] == []
    for name in ("dogs", "nobody"):
        with pytest.raises(InputError, match="no available data set contains the record"):
            impact(made.root, record=identity(name), near=True)


def test_the_models_of_a_commit_whose_dvc_yaml_has_a_conflict_are_models_without_their_files(made: Project) -> None:
    pipeline, lock = (made.root / "dvc.yaml").read_text(), made.lock(ROWS, seed=1)
    (made.root / "dvc.yaml").write_text(f"<<<<<<< HEAD\n{pipeline}=======\n{pipeline}>>>>>>> side\n")
    made.commit(lock)
    (made.root / "dvc.yaml").write_text(pipeline)
    made.commit(lock)
    made.forget_cache()
    shutil.rmtree(made.root / ".dvc/tmp", ignore_errors=True)
    found = impact(made.root, record=identity("dogs"))
    unknown = {(one["stage"], one["md5"]) for one in found["unknown"]}
    assert found["verdict"] == "cannot tell"
    assert unknown >= {(name, lock[name]["outs"][0]["md5"]) for name in ("adapter@lora", "merged@lora")}
