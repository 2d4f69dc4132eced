"""`pedigree push`: what a Hub has after it is the verified release in one
commit, and what must not be published is refused before anything is sent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from builders.files import contents
from builders.model_hub import ModelHub, Repository, serving
from conftest import ROOT, edit_params

from dagster_project.__main__ import main
from dagster_project.commands.push import destination, human, refuse_failed_gate, refuse_private
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.lineage.signing.target import find

REPO, ISSUED = "org/helpdesk", "2026-01-31"
MAIL = "jane.roe@acme-support.com"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A Hub, and the environment of a user who may write to repositories of org."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the Hub of the tests stores large files by LFS
    with serving(ModelHub()) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield found


@pytest.fixture(scope="module")
def made(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the whole pipeline has run. Tests that change it copy it."""
    return Path(shutil.copytree(_finished, tmp_path_factory.mktemp("pushed") / "project", symlinks=True))


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project", symlinks=True))


def push(root: Path, *more: str) -> int:
    return main(["push", "release", REPO, "--issued", ISSUED, "--project", str(root), *more])


def pushed(root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The document of a push that works."""
    capsys.readouterr()
    assert push(root, "--json", *more) == 0, capsys.readouterr().err
    return dict(json.loads(capsys.readouterr().out))


def test_the_repository_has_the_release_and_its_exports_in_one_commit(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    document = pushed(made, capsys, "--private")
    repo = hub.repos[REPO]
    commit, files = repo.commits[-1]
    assert (
        repo.private
        and len(repo.commits) == 2
        and document["commit"] == commit
        and document["before"] is None
        and document["private"]
    )
    release = contents(made / "data/release")
    assert {name: files[name] for name in release} == release
    exports = set(files) - set(release) - {".gitattributes"}
    assert "exports.html" in exports and all(name == "exports.html" or name.startswith("exports/") for name in exports)
    assert {one["path"]: one["sha256"] for one in document["files"]} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != ".gitattributes"
    }
    assert document["bytes"] == sum(map(len, files.values())) - len(files[".gitattributes"])


def test_plain_transformers_loads_what_was_pushed(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pushed(made, capsys)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\nthere, here ="
        " (AutoModelForCausalLM.from_pretrained(name) for name in sys.argv[1:])\nweights = here.state_dict()\nassert"
        " weights.keys() == there.state_dict().keys() and all(torch.equal(v, weights[k]) for k, v in"
        " there.state_dict().items())\nasked = [{'role': 'user', 'content': 'Where is my parcel?'}]\nids ="
        " [AutoTokenizer.from_pretrained(n).apply_chat_template(asked, add_generation_prompt=True)['input_ids'] for n"
        " in sys.argv[1:]]\nassert ids[0] == ids[1] and ids[0]\nprint('equal')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, REPO, str(made / "data/release")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr


def test_a_dry_run_needs_neither_network_nor_token_and_lists_what_a_push_sends(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = pushed(made, capsys)["files"]
    asked = len(hub.asked)
    monkeypatch.delenv("HF_TOKEN")
    document = pushed(made, capsys, "--dry-run")
    assert document["files"] == sent and len(hub.asked) == asked and "commit" not in document
    assert push(made, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "nothing was uploaded" in said and all(one["path"] in said for one in sent) and f"({REPO}" not in said


def test_an_existing_repository_gets_a_new_commit_without_its_other_files(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos[REPO] = Repository(private=False)
    before = hub.repos[REPO].add({".gitattributes": b"x", "pytorch_model.bin": b"old", "README.md": b"# old"})
    assert push(made) == 0
    said = capsys.readouterr()
    assert (
        f"after {before[:12]}" in said.out
        and "deleted in this commit: pytorch_model.bin" in said.out
        and f"{REPO} exists" in said.err
    )
    now = hub.repos[REPO].commits[-1][1]
    assert (
        "pytorch_model.bin" not in now
        and now["README.md"] == (made / "data/release/README.md").read_bytes()
        and now[".gitattributes"] == b"x"
    )
    assert hub.repos[REPO].at(before) == (
        before,
        {".gitattributes": b"x", "pytorch_model.bin": b"old", "README.md": b"# old"},
    )
    commits = len(hub.repos[REPO].commits)
    assert push(made) == 0 and len(hub.repos[REPO].commits) == commits, "nothing changed, so there is no new commit"


@pytest.mark.parametrize("where", ["PUT /lfs/", "/commit/"])
def test_an_interrupted_upload_leaves_no_half_commit_and_goes_on(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    hub.breaks_at = where
    assert push(made) == 1
    said = capsys.readouterr()
    assert (
        "was interrupted" in said.err
        and "run the same command again" in said.err
        and said.out == ""
        and "Traceback" not in said.err
    )
    assert [sorted(files) for _, files in hub.repos[REPO].commits] == [[".gitattributes"]]
    stored, hub.breaks_at = set(hub.objects), ""
    hub.asked.clear()
    assert push(made) == 0
    sent = {request.removeprefix("PUT /lfs/") for request in hub.asked if request.startswith("PUT /lfs/")}
    assert not sent & stored and sent | stored == set(hub.objects) and bool(stored) == (where == "/commit/")
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_reader", "may not write to org/helpdesk"), ("hf_unknown", "does not accept the token in HF_TOKEN")],
)
def test_a_token_without_permission_is_one_message_that_does_not_show_it(
    made: Path,
    hub: ModelHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(made) == 2
    said = capsys.readouterr()
    assert message in said.err and token not in said.err + said.out and not hub.repos and "Traceback" not in said.err


def test_a_public_repository_is_not_taken_for_a_private_one(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos[REPO] = Repository(private=False)
    hub.repos[REPO].add({})
    assert push(made, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err and len(hub.repos[REPO].commits) == 1


def test_a_repository_that_changes_meanwhile_gets_no_commit(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.moves_before_commit = True
    assert push(made) == 1
    assert "changed meanwhile; no commit was made" in capsys.readouterr().err
    assert "README.md" not in hub.repos[REPO].commits[-1][1]


@pytest.mark.parametrize("how", ["changes", "ignored"])
def test_a_commit_with_other_files_than_were_sent_is_not_called_a_success(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    if how == "changes":
        hub.changes = {"README.md": b"# another card"}
    else:
        hub.ignored = {"README.md"}  # by a .gitignore in the repository
    assert push(made) == 1
    assert "README.md at commit" in capsys.readouterr().err


def test_the_saved_login_is_not_used(
    made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(made / "token"))
    (made / "token").write_text("hf_writer")
    assert push(made) == 2
    assert "HF_TOKEN is not set" in capsys.readouterr().err and not hub.asked


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://hub.example.org",
        "ftp://127.0.0.1",
        "hub",
        "https://[hub",
        "https://[1.2]",
        "https://hub:x",
        "https://hub:99999",
        "https://a b",
    ],
)
def test_a_token_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    with pytest.raises(InputError, match="HF_ENDPOINT"):
        destination(REPO, private=False, dry_run=False)


def test_a_password_in_the_address_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://user:hunter2@hub.example.org")
    with pytest.raises(InputError, match="without user and password") as refusal:
        destination(REPO, private=False, dry_run=True)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("token", ["hf_writer\nX: y", "hf wri ter", "hf_wr\u00efter"])
def test_a_token_that_no_header_can_have_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match="in no token") as refusal:
        destination(REPO, private=False, dry_run=False)
    assert token[:5] not in str(refusal.value)


@pytest.mark.parametrize("name", ["helpdesk", "a/b/c", "org/has space", "org/..", ""])
def test_a_name_that_the_hub_does_not_accept_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="OWNER/NAME"):
        destination(name, private=False, dry_run=True)


def refused(root: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], code: int, model: str = "release") -> str:
    """The message of a push that is refused before anything is sent."""
    assert main(["push", model, REPO, "--issued", ISSUED, "--project", str(root)]) == code
    assert not hub.asked
    return capsys.readouterr().err


def test_another_model_than_a_release_is_refused(made: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "only a release is published" in refused(made, hub, capsys, 2, "merged@lora")


def test_a_changed_release_is_refused(own: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]) -> None:
    card = own / "data/release/README.md"
    text = card.read_text()
    card.unlink()
    card.write_text(text.replace("Tuned", "tuned", 1))
    said = refused(own, hub, capsys, 2)
    assert "data/release/README.md: not what dvc.lock recorded" in said and "dvc checkout --force" in said


def test_a_failed_gate_is_refused_with_the_names_of_its_checks(
    own: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    report = own / "data/reports/release.json"
    document = json.loads(report.read_text())
    document["passed"] = False
    document["checks"]["better_than_baselines"] |= {"passed": False, "blocking": True}
    report.unlink()
    report.write_text(json.dumps(document))
    assert "did not pass its gate: better_than_baselines" in refused(own, hub, capsys, 1)


@pytest.mark.parametrize(
    ("stage", "path"),
    [("comparison", "data/comparison"), ("merged@lora", "data/merged/lora"), ("raw_examples", "data/raw_examples")],
    ids=["that it read", "in a folder that it read", "before those that it read"],
)
def test_a_release_that_is_older_than_what_it_was_made_from_is_refused(
    own: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], stage: str, path: str
) -> None:
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load((own / "dvc.lock").read_text())
    out = next(out for out in lock["stages"][stage]["outs"] if out["path"] == path)
    out["md5"] = "0" * 32 + ".dir"
    (own / "dvc.lock").write_text(json.dumps(lock))
    assert f"made from an earlier {path} ({stage} ran again since)" in refused(own, hub, capsys, 1)


def test_what_a_removed_variant_left_in_a_folder_that_was_read_is_named(
    own: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dvc repro release` alone has nothing to run."""
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load((own / "dvc.lock").read_text())
    lock["stages"]["raw_examples"]["outs"][0]["md5"] = "0" * 32 + ".dir"
    (own / "dvc.lock").write_text(json.dumps(lock))
    edit_params(own, lambda values: values["adapter"].update(new=values["adapter"].pop("lora")))
    said = refused(own, hub, capsys, 1)
    assert "hint: `rm -r data/adapter/lora " in said and "data/evaluation/lora" in said
    assert said.rstrip().endswith("which dvc.yaml no longer has, then `dvc repro release`")


def test_a_pipeline_that_runs_again_meanwhile_is_refused(
    own: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate was checked for the release of before, and the files were copied afterwards."""
    from dagster_project.commands import export_all
    from dagster_project.commands import push as module

    def hand_over(*given: Any) -> Any:
        with (own / "dvc.lock").open("a") as lock:
            lock.write("# another run\n")
        return export_all.hand_over(*given)

    monkeypatch.setattr(module, "hand_over", hand_over)
    assert "dvc.lock changed meanwhile" in refused(own, hub, capsys, 2)


def test_a_waiver_that_has_expired_is_refused(made: Path) -> None:
    gate = json.loads((made / "data/release/release.json").read_text())
    assert any(not gate["checks"][one["check"]]["passed"] for one in gate["waivers"]), "the release needed its waivers"
    target = find(made, "release")
    refuse_failed_gate(made, target, date(2998, 12, 31))
    with pytest.raises(CheckFailed, match="waived until 2999-01-01, which is over"):
        refuse_failed_gate(made, target, date(2999, 1, 2))


def test_a_use_policy_that_forbids_the_release_is_refused(
    own: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a policy that its sources do not meet, as if `raw_examples` had
    recorded it; the gate of the release had none."""
    report = own / "data/reports/raw_examples.json"
    before, document = report.read_bytes(), json.loads(report.read_text())
    report.unlink()
    report.write_text(json.dumps(document | {"use_policy": {"licenses": ["MIT"]}}))
    old, new = (hashlib.md5(content).hexdigest() for content in (before, report.read_bytes()))
    lock = (own / "dvc.lock").read_text()
    assert lock.count(old) > 1
    (own / "dvc.lock").write_text(lock.replace(old, new))
    said = refused(own, hub, capsys, 1)
    assert "the use policy forbids it" in said and "data/sources/" in said


def test_personal_data_of_a_file_that_would_be_uploaded_is_refused_and_not_shown(
    own: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_params(
        own, lambda values: values.update(provider={"legal_name": "ACME", "illegal_content": f"write to {MAIL}"})
    )
    assert push(own, "--dry-run") == 0, "what `provider` says is meant to be published"
    capsys.readouterr()
    edit_params(own, lambda values: values.pop("provider"))
    lines = ["# card", f"made by {MAIL}"]
    folder = own / "texts"
    folder.mkdir()
    (folder / "README.md").write_text("\n".join(lines))
    with pytest.raises(CheckFailed, match=r"README\.md:2: e-mail") as refusal:
        refuse_private(folder, [folder / "README.md"], [])
    assert MAIL not in str(refusal.value)


def test_texts_in_tables_and_in_the_metadata_of_weights_are_examined(tmp_path: Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    pq.write_table(pa.table({"n": [1, 2], "text": ["fine", MAIL]}), tmp_path / "t.parquet")
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "w.safetensors", {"author": MAIL})
    (tmp_path / "x.bin").write_bytes(b"\0" + MAIL.encode())
    pq.write_table(pa.table({"turns": [[{"role": "user", "content": f"I am {MAIL}"}]]}), tmp_path / "nested.parquet")
    pq.write_table(pa.table({"coded": pa.array([MAIL]).dictionary_encode()}), tmp_path / "coded.parquet")
    pq.write_table(pa.table({"n": [1]}).replace_schema_metadata({"author": MAIL}), tmp_path / "noted.parquet")
    for name in ("t.parquet", "nested.parquet", "coded.parquet", "noted.parquet", "w.safetensors"):
        with pytest.raises(CheckFailed, match=f"{name}: e-mail"):
            refuse_private(tmp_path, [tmp_path / name], [])
    assert refuse_private(tmp_path, [tmp_path / "x.bin"], []) == ["x.bin"]
    assert refuse_private(tmp_path, [tmp_path / "t.parquet"], [f"contact: {MAIL}"]) == []


def test_sizes_are_shown_in_decimal_units() -> None:
    assert [human(count) for count in (0, 999, 1000, 269_060_552, 2_500_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "269 MB",
        "2.5 GB",
    ]


def test_the_page_shows_the_options() -> None:
    text = (ROOT / "docs/push.md").read_text()
    assert all(option in text for option in ("--private", "--dry-run", "HF_TOKEN", "HF_ENDPOINT"))
