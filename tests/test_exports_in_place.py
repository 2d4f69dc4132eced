"""Exports beside the files of a release: DVC reports no change, the folder alone is verified by a stranger, exports of
another version are refused, and nothing that hashes, copies or publishes the release takes them for a part of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.files import flip, names
from builders.keys import write_keys
from builders.small_pipeline import commit
from conftest import dvc, edit_params, pedigree, run, tool

from dagster_project.__main__ import main
from dagster_project.commands import export_all
from dagster_project.commands.init import DVC_FILES
from dagster_project.commands.sign import attest, sign
from dagster_project.commands.verify_signatures import as_text, verify_signatures
from dagster_project.core.errors import InputError
from dagster_project.core.hashing import md5_of_folder
from dagster_project.lineage import exports_in_place
from dagster_project.lineage.export.folder import FOLDER, PAGE
from dagster_project.lineage.export.registry import find, formats
from dagster_project.lineage.history import listing_of
from dagster_project.lineage.signing.model_signature import ATTESTATIONS, PUBLIC_KEY, SIGNATURE
from dagster_project.orchestration import integrity, locks
from dagster_project.orchestration.dvc import outputs
from dagster_project.orchestration.erasure.steps import Erasure

pytestmark = pytest.mark.usefixtures("warm")

ISSUED = ("--issued", "2026-01-31")
RELEASE = "data/release"


def write_exports(root: Path, *more: str) -> int:
    return main(["export", "release", "--all", *ISSUED, "--project", str(root), *more])


def is_clean(root: Path) -> bool:
    """Whether DVC, by itself, calls the release and everything else unchanged."""
    status, data = dvc(root, "status", "--json"), dvc(root, "data", "status", "--granular", "--json")
    return json.loads(status.stdout) == {} and not {"uncommitted", "committed"} & json.loads(data.stdout).keys()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_keys(tmp_path_factory.mktemp("key"), "ed25519", "key")


@pytest.fixture(scope="module")
def _signed(_finished: Path, keys: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, committed project with signed exports beside the files of its release."""
    tool("spdx_python_model")
    root = Path(shutil.copytree(_finished, tmp_path_factory.mktemp("signed") / "project", symlinks=True))
    commit(root, "ran")
    assert write_exports(root, "--key", keys[0]) == 0
    return root


@pytest.fixture
def signed(_signed: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(_signed, tmp_path / "project", symlinks=True))


def verdict(root: Path, model: str, public: str | None) -> tuple[str, dict[str, str]]:
    document = verify_signatures(root, model, public)
    found = {one["file"]: one["wrong"] for one in document["findings"]}
    assert all(file in as_text(document) and wrong in as_text(document) for file, wrong in found.items())
    return document["verdict"], found


def test_the_names_are_those_that_exports_and_signatures_have() -> None:
    assert set(exports_in_place.NAMES) == {FOLDER, PAGE, SIGNATURE, ATTESTATIONS, PUBLIC_KEY}
    ignored = (Path(__file__).parents[1] / ".dvcignore").read_text().splitlines()
    assert ignored[-6:] == [exports_in_place.COMMENT, *exports_in_place.IGNORE_LINES]
    assert DVC_FILES[".dvcignore"].splitlines()[-6:] == ignored[-6:], "new projects have them, too"


def test_the_exports_are_beside_the_release_and_dvc_and_git_report_nothing(signed: Path, _finished: Path) -> None:
    release, before = signed / RELEASE, _finished / RELEASE
    exports = {
        *(f"exports/{find(form).file}" for form in formats()),
        "exports.html",
        "model.sig",
        "model.intoto.jsonl",
        "model.pub",
    }
    assert names(release) == names(before) | exports and not names(before) & exports and len(exports) == 11
    assert all((release / name).read_bytes() == (before / name).read_bytes() for name in names(before))
    assert is_clean(signed) and run(["git", "status", "--porcelain"], signed).stdout == ""
    assert not list((signed / ".dvc/tmp/pedigree").glob("exports.*"))
    (release / "other.txt").write_text("x")
    assert not is_clean(signed), "other files are reported"


def test_a_stranger_with_the_folder_and_the_package_alone_verifies_it(
    signed: Path, keys: tuple[str, str], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(signed / RELEASE, tmp_path / "elsewhere/data/release"))
    code = (
        "import sys\nfor name in ('dvc', 'dagster', 'torch', 'transformers', 'pyarrow', 'spdx_python_model'):"
        " sys.modules[name] = None\nfrom dagster_project.__main__ import main\nsys.exit(main(['verify',"
        f" 'data/release', '--signatures', '--key', {keys[1]!r}, '--json']))"
    )
    for where in (tmp_path / "elsewhere", signed):
        done = run([sys.executable, "-c", code], where, PEDIGREE_PROJECT="")
        document = json.loads(done.stdout)
        assert (done.returncode, document["verdict"], document["findings"]) == (0, "verified", []), (
            where,
            document,
            done.stderr,
        )
        assert (
            document["signature"]["files"] == len(names(place)) - 3
            and document["attestations"]["stages"][-1] == "release"
        )
        assert document["compared"]["values"] > 100
    other = Path(shutil.copytree(place, tmp_path / "published"))
    assert verdict(tmp_path, str(other), keys[1]) == ("verified", {}), "under any other name, too"


@pytest.mark.long
def test_every_changed_added_or_removed_export_is_named(signed: Path, keys: tuple[str, str]) -> None:
    release = signed / RELEASE
    for name in sorted(names(release)):
        content = (release / name).read_bytes()
        (release / name).chmod(0o644)
        (release / name).unlink()
        (release / name).write_bytes(content)
        flip(release / name, 8 * (len(content) // 2))
        found, wrong = verdict(signed, "release", keys[1])
        assert found == "altered" and f"{RELEASE}/{name}" in wrong, name
        (release / name).unlink()
        found, wrong = verdict(signed, "release", keys[1])
        assert (
            (found, wrong) == ("verified", {})
            if name == "model.pub"
            else (found != "verified" and f"{RELEASE}/{name}" in wrong)
        ), name
        (release / name).write_bytes(content)
    for name in ("exports/new.json", "new.txt"):
        (release / name).write_text("{}")
        assert verdict(signed, "release", keys[1])[0] == "altered"
        (release / name).unlink()
    for name in ("model.sig", "model.intoto.jsonl"):
        (release / name).unlink()
    assert verdict(signed, "release", keys[1])[0] == "altered", "the page states a key"
    assert verdict(signed, str(release), None)[0] == "altered"


@pytest.mark.long
def test_exports_of_another_version_are_refused_wherever_dvc_leaves_them(
    signed: Path, keys: tuple[str, str], capsys: Any
) -> None:
    """DVC deletes them when the stage runs or is restored, and leaves them when it checks another version out."""
    release, private, public = signed / RELEASE, *keys
    edit_params(signed, lambda values: values["release"]["waivers"][0].update(reason="another reason"))
    done = dvc(signed, "repro", "release")
    assert done.returncode == 0, done.stderr
    assert not exports_in_place.present(signed), "a run starts without the exports of the version before"
    commit(signed, "second")
    assert write_exports(signed, "--key", private) == 0 and is_clean(signed)
    assert verdict(signed, "release", public) == ("verified", {})
    assert (
        run(["git", "checkout", "-q", "HEAD~1"], signed).returncode == 0
        and dvc(signed, "checkout", "-q").returncode == 0
    )
    assert exports_in_place.present(signed) == [*exports_in_place.NAMES] and is_clean(signed)
    for model in ("release", RELEASE, str(release)):
        found, wrong = verdict(signed, str(release) if model == RELEASE else model, public)
        assert found == "altered" and f"{RELEASE}/release.json" in wrong and "dvc.lock: release" in wrong
    assert pedigree(signed, "verify", "release", "--signatures").returncode == 1
    assert "are of another release" in pedigree(signed, "audit", "release").stderr
    with pytest.raises(InputError, match="nothing was signed"):
        sign(signed, "release", private)
    assert (
        dvc(signed, "checkout", "--force", "-q").returncode == 0 and verdict(signed, "release", public)[0] == "altered"
    )
    assert write_exports(signed, "--key", private) == 0 and verdict(signed, "release", public) == ("verified", {})
    assert "another release" not in pedigree(signed, "audit", "release").stderr
    for name in ("model.sig", "model.intoto.jsonl", "model.pub"):
        (release / name).unlink()
    capsys.readouterr()
    assert write_exports(signed) == 0 and not {"model.sig", "model.pub"} & names(release)
    assert run(["git", "checkout", "-q", "-"], signed).returncode == 0 and dvc(signed, "checkout", "-q").returncode == 0
    attest(signed, "release", private)
    found, wrong = verdict(signed, "release", public)
    assert found == "contradictory" and any("contradicts the files of the model" in one for one in wrong.values()), (
        "exports without a signature"
    )


@pytest.mark.long
def test_dvc_restores_pushes_and_gets_the_release_without_exports(
    signed: Path, keys: tuple[str, str], tmp_path: Path
) -> None:
    release = signed / RELEASE
    content = names(release) - {name for name in names(release) if name.split("/")[0] in exports_in_place.NAMES}
    assert dvc(signed, "remote", "add", "-d", "store", str(tmp_path / "store")).returncode == 0
    commit(signed, "remote")
    for command in (
        ["push", "-q"],
        ["commit", "-f", "-q"],
        ["gc", "-w", "-f", "-q"],
        ["checkout", "--relink", "-q"],
        ["pull", "-q"],
    ):
        assert dvc(signed, *command).returncode == 0
        assert is_clean(signed) and verdict(signed, "release", keys[1]) == ("verified", {}), command
    stored = {hashlib.md5(path.read_bytes()).hexdigest() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert {hashlib.md5((release / name).read_bytes()).hexdigest() for name in content} <= stored
    assert not {hashlib.md5((release / name).read_bytes()).hexdigest() for name in names(release) - content} & stored
    done = dvc(tmp_path, "get", "-q", str(signed), RELEASE, "-o", str(tmp_path / "got"))
    assert done.returncode == 0 and names(tmp_path / "got") == content, done.stderr
    assert (
        run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@e.org", "tag", "-a", "release@v0.0.1", "-m", "x"], signed
        ).returncode
        == 0
    )
    done = dvc(
        tmp_path, "artifacts", "get", str(signed), "release", "--rev", "v0.0.1", "-o", str(tmp_path / "artifact")
    )
    assert done.returncode == 0 and names(tmp_path / "artifact") == content, done.stderr
    subprocess.run(["git", "clone", "-q", str(signed), str(tmp_path / "clone")], check=True)
    assert (
        dvc(tmp_path / "clone", "pull", "-q", "release").returncode == 0
        and names(tmp_path / "clone" / RELEASE) == content
    )
    assert (
        dvc(signed, "repro", "-f", "-s", "release").returncode == 0 and names(release) == content and is_clean(signed)
    )
    first = (signed / "params.yaml").read_bytes()
    edit_params(signed, lambda values: values["release"]["waivers"][0].update(reason="another reason"))
    assert dvc(signed, "repro", "-s", "release").returncode == 0
    (signed / "params.yaml").write_bytes(first)
    assert write_exports(signed) == 0
    done = dvc(signed, "repro", "-s", "release")
    assert "is cached" in done.stdout and names(release) == content, "restored from the run cache"


def test_nothing_takes_the_exports_for_a_part_of_the_release(
    signed: Path, _finished: Path, keys: tuple[str, str], tmp_path: Path
) -> None:
    release, content = signed / RELEASE, names(_finished / RELEASE)
    assert (
        set(listing_of(release)) == content
        and md5_of_folder(listing_of(release)) == outputs(signed, "release")[RELEASE]
    )
    report = json.loads((signed / "data/reports/release.json").read_text())
    assert integrity.sha256_of(release) == report["output_sha256"]
    assert set(listing_of(Path(shutil.copytree(release, tmp_path / "elsewhere")))) == names(release), (
        "only in the place of a release"
    )
    for command in (
        ["run", "release"],
        ["verify", "--integrity"],
        ["audit", "release"],
        ["audit", str(release)],
        ["export", "release", "--format", "safetensors"],
    ):
        done = pedigree(signed, *command)
        assert done.returncode == 0, (command, done.stderr)
        if command[0] == "run":  # by itself, without DVC, it replaces the folder
            assert not exports_in_place.present(signed) and write_exports(signed, "--key", keys[0]) == 0
    assert names(signed / "build/release-safetensors") == content
    handed = tmp_path / "handed"
    assert (
        main(
            [
                "export",
                "release",
                "--all",
                str(handed),
                "--with-model",
                "--key",
                keys[0],
                *ISSUED,
                "--project",
                str(signed),
            ]
        )
        == 0
    )
    assert names(handed) == names(release) and verdict(tmp_path, str(handed), keys[1]) == ("verified", {})
    assert is_clean(signed)


def test_exports_by_an_earlier_version_are_not_of_the_release_and_the_next_export_replaces_them(
    signed: Path, _finished: Path, keys: tuple[str, str], tmp_path: Path
) -> None:
    release, (private, public) = signed / RELEASE, keys
    for name, former in zip((FOLDER, PAGE), exports_in_place.FORMER, strict=True):
        (release / name).rename(release / former)
    with (signed / ".dvcignore").open("a") as file:
        file.write("/data/release/papers/\n/data/release/papers.html\n")  # which that version added
    commit(signed, "ignored")
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    sign(tmp_path, str(copy), private)
    shutil.move(copy / SIGNATURE, release / SIGNATURE)
    assert is_clean(signed) and set(listing_of(release)) == names(_finished / RELEASE)
    assert pedigree(signed, "verify", "--integrity").returncode == 0
    assert verdict(signed, "release", public) == ("verified", {})
    assert "papers.html: exports by an earlier version" in pedigree(signed, "audit", "release").stderr
    for name in (SIGNATURE, ATTESTATIONS, PUBLIC_KEY):
        (release / name).unlink()
    attest(signed, "release", private)
    document = verify_signatures(signed, "release", public)
    assert document["verdict"] == "incomplete"
    assert f"papers, papers.html in {RELEASE}: no signature covers them" in document["not_checked"]
    assert write_exports(signed, "--key", private) == 0 and is_clean(signed)
    assert exports_in_place.present(signed) == [*exports_in_place.NAMES]
    assert verdict(signed, "release", public) == ("verified", {})


def test_signatures_of_the_project_and_in_the_folder_are_both_verified(
    signed: Path, keys: tuple[str, str], tmp_path: Path
) -> None:
    private, public = keys
    attest(signed, "release", private)
    document = verify_signatures(signed, "release", public)
    assert document["verdict"] == "verified" and document["signature"]["file"] == f"{RELEASE}/model.sig"
    assert (
        document["project"]["attestations"]["file"] == "data/signatures/release/model.intoto.jsonl"
        and document["project"]["signature"] is None
    )
    assert not any("only its project has" in what for what in document["not_checked"])
    assert "data/signatures/release/model.intoto.jsonl: " in as_text(document)
    source = signed / "data/sources/triage_alpaca.json"
    before = source.read_bytes()
    source.write_bytes(before + b" ")
    found, wrong = verdict(signed, "release", public)
    assert found == "altered" and list(wrong) == [source.relative_to(signed).as_posix()]
    source.write_bytes(before)
    flip(signed / RELEASE / "exports/README.md")
    assert verdict(signed, "release", public) == ("altered", {f"{RELEASE}/exports/README.md": "is not what was signed"})
    before = (signed / "data/signatures/release/model.intoto.jsonl").read_bytes()
    assert write_exports(signed, "--key", private) == 0 and verdict(signed, "release", public) == ("verified", {})
    assert (signed / RELEASE / "model.intoto.jsonl").read_bytes() == before, "attestations that still hold are taken"
    other, _ = write_keys(tmp_path, "ed25519", "other")
    assert write_exports(signed, "--key", other) == 2, "signatures of a model are by one key"
    shutil.rmtree(signed / "data/signatures")
    assert write_exports(signed, "--key", other) == 0
    attest(signed, "release", private)
    found, wrong = verdict(signed, "release", None)
    assert found == "contradictory" and "another key" in wrong["data/signatures/release/model.pub"]


def test_exports_without_a_signature_are_never_verified_and_can_be_signed_later(
    finished: Path, keys: tuple[str, str], capsys: Any
) -> None:
    private, public = keys
    assert write_exports(finished, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (
        document["folder"] == RELEASE
        and document["signature"] is None
        and [one["name"] for one in document["missing"]][-1] == "signature, attestations"
    )
    assert (
        main(["verify", "release", "--signatures", "--project", str(finished)]) == 2
        and "no signatures" in capsys.readouterr().err
    )
    attest(finished, "release", private)
    document = verify_signatures(finished, "release", public)
    assert (
        document["verdict"] == "incomplete"
        and f"exports, exports.html in {RELEASE}: no signature covers them" in document["not_checked"]
    )
    assert main(["verify", "release", "--signatures", "--project", str(finished)]) == 1
    signed = sign(finished, "release", private)
    assert (
        signed["signature"] == f"{RELEASE}/model.sig" and not (finished / "data/signatures/release/model.sig").exists()
    )
    assert verdict(finished, "release", public) == ("verified", {})
    before = {name: (finished / RELEASE / name).read_bytes() for name in ("model.sig", "exports.html")}
    capsys.readouterr()
    assert write_exports(finished) == 2 and "model.sig signs the exports there" in capsys.readouterr().err, (
        "a signature is not lost unnoticed"
    )
    assert {name: (finished / RELEASE / name).read_bytes() for name in before} == before
    (finished / RELEASE / "model.sig").unlink()
    flip(finished / RELEASE / "exports/bom.cdx.json")
    with pytest.raises(InputError, match="nothing was signed"):
        sign(finished, "release", private)
    exports_in_place.delete(finished)
    assert sign(finished, "release", private)["signature"] == "data/signatures/release/model.sig"
    assert write_exports(finished) == 0
    assert verdict(finished, "release", public)[0] == "incomplete", (
        "a signature of the release from before does not cover them"
    )


def test_bad_input_is_one_message_and_changes_nothing(
    finished: Path, keys: tuple[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, ignore = ("--key", keys[0]), finished / ".dvcignore"
    before = names(finished / "data")
    text = ignore.read_text()
    cases = [
        (("adapter@lora", "--all"), text, "beside the files of a release only"),
        (("release", "--all", ""), text, "the name of the folder is empty"),
        (("release", "--all", "--with-model"), text, "leave it out"),
        (("release", "--all", "--rev", "HEAD"), text, "--rev cannot be combined"),
        (("release", "--all", "--key", "none.pem"), text, "No such file"),
        (
            ("release", "--all", *key),
            text.replace("/data/release/exports.html\n", ""),
            "does not list /data/release/exports.html,",
        ),
        (
            ("release", "--all", *key),
            text + "!/data/release/exports.html\n",
            "does not list /data/release/exports.html,",
        ),
        (("release", "--all", *key), "", "/data/release/model.pub"),
    ]
    for arguments, content, wrong in cases:
        ignore.write_text(content)
        assert main(["export", *arguments, *ISSUED, "--project", str(finished)]) == 2
        error = capsys.readouterr().err
        assert wrong in error and "Traceback" not in error, arguments
    ignore.write_text(text)
    file = finished / RELEASE / "config.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content + b" ")
    assert write_exports(finished, *key) == 2 and "not what dvc.lock recorded" in capsys.readouterr().err
    file.write_bytes(content)
    assert names(finished / "data") == before
    monkeypatch.chdir(finished)
    assert main(["export", "release", "--all", RELEASE, *ISSUED]) == 0, "the folder may be named"
    assert names(finished / "data") > before


def test_while_the_release_is_being_run_or_exported_no_exports_are_written(
    signed: Path, keys: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(holder: str) -> None:
        raise AssertionError(holder)

    before = names(signed / RELEASE)
    with locks.hold(signed, "release", refuse, "dvc repro"):
        assert write_exports(signed, "--key", keys[0]) == 1
    assert "is being used by process" in capsys.readouterr().err

    def remove_release(root: Path) -> None:
        (root / RELEASE).rename(root / "data" / "removed")  # as DVC does before it starts the stage

    monkeypatch.setattr(export_all, "delete", remove_release)
    assert write_exports(signed, "--key", keys[0]) == 1
    assert "is being used by DVC" in capsys.readouterr().err and not (signed / RELEASE).exists()
    (signed / "data" / "removed").rename(signed / RELEASE)
    assert names(signed / RELEASE) == before


def test_data_can_be_on_another_file_system_than_scratch_files(signed: Path, keys: tuple[str, str]) -> None:
    """As with a volume that is mounted at data/: nothing can be renamed from one to the other."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == signed.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=memory) as other:
        shutil.rmtree(signed / ".dvc/tmp/pedigree")
        (signed / ".dvc/tmp/pedigree").symlink_to(other)
        assert write_exports(signed, "--key", keys[0]) == 0 and not [*Path(other).glob("exports.*")]
        assert verdict(signed, "release", keys[1]) == ("verified", {})


def test_an_erasure_deletes_them_and_leaves_the_release_alone(tmp_path: Path) -> None:
    """They state hashes of the sources before, and can have been written from an earlier version."""
    for name in (
        "exports/README.md",
        "exports.html",
        "papers/README.md",
        "papers.html",
        "model.sig",
        "model.intoto.jsonl",
        "model.pub",
        "config.json",
        "audit/audit.json",
    ):
        (tmp_path / RELEASE / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / RELEASE / name).write_text("x")
    needles = {"texts": [], "groups": [], "ids": [], "unsearchable": 0}
    Erasure(tmp_path, {"needles": needles, "files": []}, lambda _: None).files()
    assert names(tmp_path / RELEASE) == {"config.json", "audit/audit.json"}


def test_lines_are_added_once_and_nothing_else_of_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / ".dvcignore"
    assert (
        exports_in_place.add_lines(tmp_path) == [*exports_in_place.IGNORE_LINES]
        and exports_in_place.add_lines(tmp_path) == []
    )
    assert file.read_text().splitlines() == [exports_in_place.COMMENT, *exports_in_place.IGNORE_LINES]
    mine = b"# mine\r\n*.swp\n\xff\n/data/release/exports/"
    file.write_bytes(mine)
    assert exports_in_place.add_lines(tmp_path) == [*exports_in_place.IGNORE_LINES[1:]]
    assert file.read_bytes().startswith(mine + b"\n") and exports_in_place.missing_lines(tmp_path) == []
    file.write_text("/data/release/papers/\n/data/release/papers.html\n")
    assert exports_in_place.add_lines(tmp_path) == [*exports_in_place.IGNORE_LINES]
    assert file.read_text().startswith("/data/release/papers/\n/data/release/papers.html\n"), "those there may stay"


def test_lines_that_cannot_be_added_leave_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = tmp_path / "shared", tmp_path / ".dvcignore"
    target.write_bytes(b"*.swp\n")
    target.chmod(0o664)
    link.symlink_to("shared")
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", half)
        exports_in_place.add_lines(tmp_path)
    assert target.read_bytes() == b"*.swp\n" and names(tmp_path) == {".dvcignore", "shared"}
    exports_in_place.add_lines(tmp_path)
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o664
