"""Signatures and attestations: other tools accept ours, we accept theirs, and a
change of any byte, file or key is found and named."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import small_pipeline
from builders.files import flip
from builders.keys import KINDS, write_keys
from conftest import pedigree, run, tool
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from dagster_project.commands.sign import Lineage, attest, sign
from dagster_project.commands.sign import as_text as signed_text
from dagster_project.commands.verify_signatures import as_text, verify_signatures
from dagster_project.core.errors import CheckFailed, InputError
from dagster_project.lineage.signing import model_signature
from dagster_project.lineage.signing.envelope import SignatureError
from dagster_project.lineage.signing.keys import public_key_of
from dagster_project.lineage.signing.target import find

pytestmark = pytest.mark.usefixtures("warm_small")


@pytest.fixture(params=sorted(KINDS))
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    return write_keys(tmp_path / "keys", request.param)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder like a model's, with names whose order differs between strings and paths."""
    folder = tmp_path / "model"
    for name in ("model.safetensors", "config.json", "audit/a.json", "audit-b/ä.json", "audit.txt", ".gitattributes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 5)
    return folder


def findings(root: Path, name: str, key: str | None = None) -> dict[str, str]:
    """File -> what is wrong with it; the verdict agrees."""
    document = verify_signatures(root, name, key)
    found = {one["file"]: one["wrong"] for one in document["findings"]}
    assert document["verdict"] == ("altered" if found else "verified")
    assert all(file in as_text(document) for file in found)
    return found


def oracle(folder: Path, action: str, model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line of OpenSSF's `model-signing`."""
    tool("OpenSSL")
    tool("model_signing")
    return run([sys.executable, "-m", "model_signing", action, "key", str(model), *arguments], folder)


def test_a_private_key_that_others_can_read_is_used_with_a_warning(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private, _ = write_keys(tmp_path / "keys", "ed25519")
    Path(private).chmod(0o600)
    sign(tmp_path, str(model), private)
    assert not caplog.records
    Path(private).chmod(0o640)
    sign(tmp_path, str(model), private)
    assert [record.getMessage() for record in caplog.records] == [
        f"--key {private}: other users of this machine can read this private key; run `chmod 600 {private}`"
    ]


# --- the form of OpenSSF Model Signing


def test_model_signing_verifies_our_signature_and_refuses_the_same_changes(tmp_path: Path, model: Path) -> None:
    private, public = write_keys(tmp_path / "keys", "p256")
    sign(tmp_path, str(model), private)

    def accepts() -> bool:
        return (
            oracle(
                tmp_path, "verify", model, "--signature", str(model / "model.sig"), "--public_key", public
            ).returncode
            == 0
        )

    assert accepts() and not findings(tmp_path, str(model), public)
    file = model / "audit-b/ä.json"
    flip(file, 3)
    assert not accepts() and list(findings(tmp_path, str(model), public)) == [str(file)]
    flip(file, 3)
    (model / "extra.bin").write_text("x")
    assert not accepts() and findings(tmp_path, str(model), public) == {
        f"{model}/extra.bin": "was added since it was signed"
    }
    (model / "extra.bin").unlink()
    file.unlink()
    assert not accepts() and findings(tmp_path, str(model), public) == {str(file): "is missing, and was signed"}


def test_what_the_client_of_the_hub_adds_to_a_download_is_named_with_what_to_do(tmp_path: Path, model: Path) -> None:
    private, public = write_keys(tmp_path / "keys", "p256")
    sign(tmp_path, str(model), private)
    (model / ".gitattributes").write_text("*.safetensors filter=lfs")
    (model / ".cache/huggingface").mkdir(parents=True)
    (model / ".cache/huggingface/CACHEDIR.TAG").write_text("x")
    assert findings(tmp_path, str(model), public) == {
        f"{model}/.cache/huggingface/CACHEDIR.TAG": "was added since it was signed (by the Hub's client: delete .cache)"
    }
    shutil.rmtree(model / ".cache")
    assert not findings(tmp_path, str(model), public)


def test_we_verify_the_signature_of_model_signing(tmp_path: Path, model: Path) -> None:
    private, public = write_keys(tmp_path / "keys", "p256")
    done = oracle(
        tmp_path,
        "sign",
        model,
        "--signature",
        str(model / "model.sig"),
        "--private_key",
        private,
        "--ignore-paths",
        str(model / "model.sig"),
    )
    assert done.returncode == 0, done.stderr
    assert not findings(tmp_path, str(model), public)
    flip(model / "model.safetensors", 9)
    assert list(findings(tmp_path, str(model), public)) == [f"{model}/model.safetensors"]


def test_both_tools_sign_the_same_statement(tmp_path: Path, model: Path) -> None:
    private, _ = write_keys(tmp_path / "keys", "p256")
    sign(tmp_path, str(model), private)
    oracle(tmp_path, "sign", model, "--signature", str(tmp_path / "theirs.sig"), "--private_key", private,
           *(part for name in model_signature.IGNORED for part in ("--ignore-paths", str(model / name))))  # fmt: skip
    ours, theirs = (json.loads(file.read_bytes()) for file in (model / "model.sig", tmp_path / "theirs.sig"))
    assert ours["verificationMaterial"] == theirs["verificationMaterial"] and ours["mediaType"] == theirs["mediaType"]
    said = [json.loads(base64.b64decode(one["dsseEnvelope"]["payload"])) for one in (ours, theirs)]
    for statement in said:
        statement["predicate"]["serialization"]["ignore_paths"].sort()
    assert said[0] == said[1]


def test_any_changed_bit_of_a_signature_or_a_public_key_is_found(
    tmp_path: Path, model: Path, keys: tuple[str, str]
) -> None:
    private, public = keys
    sign(tmp_path, str(model), private)
    content, key, dice = (model / "model.sig").read_bytes(), public_key_of(public), random.Random(0)
    for byte in range(len(content)):
        changed = bytearray(content)
        changed[byte] ^= 1 << dice.randrange(8)
        with pytest.raises(SignatureError):
            model_signature.read_bundle(bytes(changed), key)
    file = model / "model.pub"
    for byte in range(0, file.stat().st_size, 9):
        bit = byte * 8 + dice.randrange(8)
        flip(file, bit)
        assert findings(tmp_path, str(model)) and findings(tmp_path, str(model), public), bit
        flip(file, bit)
    assert not findings(tmp_path, str(model), public)


def test_a_wrong_key_is_refused(tmp_path: Path, model: Path, keys: tuple[str, str]) -> None:
    sign(tmp_path, str(model), keys[0])
    for kind in KINDS:
        _, other = write_keys(tmp_path / "others", kind)
        assert {f"{model}/model.sig", f"{model}/model.pub"} == findings(tmp_path, str(model), other).keys()


def test_in_a_project_without_a_run_the_next_step_is_to_run_it(tmp_path: Path) -> None:
    """Also of `push`, `export` and `serve`, which find their model in the same way."""
    with pytest.raises(InputError, match="give --project FOLDER"):
        find(tmp_path, "release")
    (tmp_path / "dvc.yaml").touch()
    with pytest.raises(InputError, match=r"release: no such folder, and no dvc.lock.*\n.*run `dvc repro` first"):
        find(tmp_path, "release")


def test_without_a_key_it_is_said_that_the_signer_is_unknown(
    tmp_path: Path, model: Path, keys: tuple[str, str]
) -> None:
    sign(tmp_path, str(model), keys[0])
    document = verify_signatures(tmp_path, str(model), None)
    assert (
        document["verdict"] == "verified"
        and not document["key_given"]
        and any("who signed" in one for one in document["not_checked"])
    )


def test_links_and_special_files_are_neither_signed_nor_verified(tmp_path: Path, model: Path) -> None:
    private, public = write_keys(tmp_path / "keys", "ed25519")
    (model / "link").symlink_to(model / "config.json")
    with pytest.raises(InputError, match="link: neither a file nor a folder"):
        sign(tmp_path, str(model), private)
    (model / "link").unlink()
    sign(tmp_path, str(model), private)
    (model / "link").symlink_to(model)
    os.mkfifo(model / "audit/pipe")
    assert findings(tmp_path, str(model), public).keys() == {f"{model}/link", f"{model}/audit/pipe"}


def test_files_that_a_signature_leaves_out_are_named(tmp_path: Path, model: Path) -> None:
    private, public = write_keys(tmp_path / "keys", "ed25519")
    sign(tmp_path, str(model), private)
    (model / ".git").mkdir()
    document = verify_signatures(tmp_path, str(model), public)
    assert document["verdict"] == "verified" and document["not_checked"] == [
        "the lineage (no model.intoto.jsonl)",
        f".git, .gitattributes in {model}, which signatures leave out",
    ]


def test_nothing_is_sent_or_fetched(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    private, public = write_keys(tmp_path / "keys", "p256")
    sign(tmp_path, str(model), private)
    assert not findings(tmp_path, str(model), public)


# --- keys


def test_a_key_of_the_environment_signs_and_an_encrypted_one_with_its_password(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame")).decode()
    monkeypatch.setenv("PEDIGREE_SIGNING_KEY", text)
    with pytest.raises(InputError, match="encrypted"):
        sign(tmp_path, str(model), None)
    monkeypatch.setenv("PEDIGREE_SIGNING_KEY_PASSWORD", "wrong")
    with pytest.raises(InputError, match="password"):
        sign(tmp_path, str(model), None)
    assert not (model / "model.sig").exists()
    monkeypatch.setenv("PEDIGREE_SIGNING_KEY_PASSWORD", "open sesame")
    sign(tmp_path, str(model), None)
    assert not findings(tmp_path, str(model))


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a private key"),
        (
            rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "another kind",
        ),
        (
            ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "another kind",
        ),
    ],
    ids=["missing", "empty", "damaged", "rsa", "p384"],
)
def test_a_key_that_cannot_sign_is_one_message_and_nothing_is_written(
    tmp_path: Path, model: Path, content: bytes | None, wrong: str
) -> None:
    key = tmp_path / "key.pem"
    if content is not None:
        key.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    done = pedigree(tmp_path, "sign", str(model), "--key", str(key))
    assert done.returncode == 2 and wrong in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_no_key_is_created_and_none_is_shown(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEDIGREE_SIGNING_KEY", raising=False)
    done = pedigree(tmp_path, "sign", str(model))
    assert done.returncode == 2 and "no private key" in done.stderr and not (model / "model.sig").exists()
    private, public = write_keys(tmp_path / "keys", "p256")
    secrets = [line for line in Path(private).read_text().splitlines() if "-----" not in line]
    done = pedigree(tmp_path, "sign", str(model), "--key", private, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["files"] == 5
    written = "".join(path.read_text(errors="replace") for path in model.rglob("*") if path.is_file())
    assert not [line for line in secrets if line in done.stdout + done.stderr + written]
    for swapped in (("sign", str(model), "--key", public), ("verify", str(model), "--signatures", "--key", private)):
        done = pedigree(tmp_path, *swapped)
        assert (
            done.returncode == 2
            and "private key" in done.stderr
            and not [line for line in secrets if line in done.stderr]
        )


def test_the_text_of_a_key_is_not_repeated_and_endless_files_are_not_read(tmp_path: Path, model: Path) -> None:
    private, public = write_keys(tmp_path / "keys", "p256")
    text = Path(private).read_text()
    for pasted in (text, text.replace("\n", ""), text.split("\n", 1)[1]):
        done = pedigree(tmp_path, "sign", str(model), "--key", pasted)
        assert done.returncode == 2 and "--key takes a file" in done.stderr
        assert not [line for line in text.splitlines() if line in done.stdout + done.stderr]
    with pytest.raises(InputError, match="too large for a key"):
        sign(tmp_path, str(model), "/dev/zero")
    sign(tmp_path, str(model), private)
    with pytest.raises(InputError, match="too large for a key"):
        verify_signatures(tmp_path, str(model), "/dev/zero")
    os.truncate(model / "model.pub", 3_000_000_000)  # sparse
    assert findings(tmp_path, str(model)) == {f"{model}/model.pub": "is larger than 100 MB"}
    assert findings(tmp_path, str(model), public) == {f"{model}/model.pub": "is larger than 100 MB"}
    with pytest.raises(InputError, match="signatures of another key"):
        sign(tmp_path, str(model), private)


def test_a_private_key_in_the_folder_or_a_second_key_is_refused(tmp_path: Path, model: Path) -> None:
    inside, _ = write_keys(model, "ed25519")
    with pytest.raises(InputError, match="in the folder to be signed"):
        sign(tmp_path, str(model), inside)
    Path(inside).unlink()
    first, _ = write_keys(tmp_path / "keys", "ed25519", "first")
    second, _ = write_keys(tmp_path / "keys", "ed25519", "second")
    sign(tmp_path, str(model), first)
    with pytest.raises(InputError, match="signatures of another key") as refused:
        sign(tmp_path, str(model), second)
    named = re.findall(r"[^ ,]+/model\.[a-z.]+", refused.value.hint)
    assert sorted(Path(name).name for name in named) == [
        "model.pub",
        "model.sig",
    ], "the hint names the signatures only, not the model"


# --- a project


LINEAGE = ["raw", "inst", "tok", "adapter@lora"]


@pytest.fixture(scope="module")
def _signed(_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed")
    root = Path(shutil.copytree(_made, folder / "project", symlinks=True))
    private, _ = write_keys(folder / "project/.git/keys", "ed25519")
    sign(root, "adapter@lora", private)
    attest(root, "adapter@lora", private)
    return root


@pytest.fixture
def signed(_signed: Path, tmp_path: Path) -> tuple[Path, str]:
    """The small pipeline with a signed and attested model, and the file of the public key."""
    root = Path(shutil.copytree(_signed, tmp_path / "project", symlinks=True))
    return root, str(root / ".git/keys/key.pub")


SIGNATURES = "data/signatures/adapter/lora"


def test_signatures_lie_beside_the_model_and_change_no_stage(
    signed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, public = signed
    monkeypatch.chdir(root.parent)  # in a clone in which the pipeline has run, the same path is a model of the clone
    assert sorted(path.name for path in (root / SIGNATURES).iterdir()) == [
        "model.intoto.jsonl",
        "model.pub",
        "model.sig",
    ]
    assert {line.split()[1] for line in small_pipeline.git(root, "status", "--porcelain").splitlines()} == {
        "data/signatures/"
    }
    assert run([sys.executable, "-m", "dvc", "status"], root).stdout.startswith("Data and pipelines are up to date")
    document = verify_signatures(root, "data/adapter/lora", public)
    assert (
        document["verdict"] == "verified"
        and document["attestations"]["stages"] == LINEAGE
        and not document["not_checked"]
    )


def statements(signatures: Path) -> list[dict[str, Any]]:
    lines = (signatures / "model.intoto.jsonl").read_text().splitlines()
    return [json.loads(base64.b64decode(json.loads(line)["payload"])) for line in lines]


def test_statements_are_those_of_in_toto_and_slsa_and_say_what_dvc_recorded(signed: tuple[Path, str]) -> None:
    root, _ = signed
    statement_type = tool("in_toto_attestation.v1.statement")
    provenance_type = tool("in_toto_attestation.predicates.provenance.v1.provenance_pb2").Provenance
    parse = tool("google.protobuf.json_format").ParseDict
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"]
    assert [
        one["predicate"]["buildDefinition"]["externalParameters"]["stage"] for one in statements(root / SIGNATURES)
    ] == LINEAGE
    for address, one in zip(LINEAGE, statements(root / SIGNATURES), strict=True):
        parsed = parse(one, statement_type.spb.Statement())  # refuses fields that the type lacks
        statement_type.Statement.copy_from_pb(parsed).validate()
        details = parse(one["predicate"], provenance_type())
        external = one["predicate"]["buildDefinition"]["externalParameters"]
        assert details.build_definition.build_type and details.run_details.builder.id
        assert external["cmd"] == lock[address]["cmd"] and external["params"] == lock[address].get("params", {})
        assert list(external["deps"]) == sorted(dep["path"] for dep in lock[address]["deps"])
        named = {
            item["name"]: item["digest"]
            for item in (*one["subject"], *one["predicate"]["buildDefinition"]["resolvedDependencies"][1:])
        }
        for item in (*lock[address]["deps"], *lock[address]["outs"]):
            if "nfiles" not in item:
                assert named[item["path"]]["md5"] == item["md5"]
    assert statements(root / SIGNATURES)[2]["predicate"]["buildDefinition"]["externalParameters"]["deps"] == {
        "code/tok.py": [],
        "data/inst": ["inst"],
    }


def test_envelopes_are_verified_by_securesystemslib(signed: tuple[Path, str]) -> None:
    root, public = signed
    tool("securesystemslib")
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    key = SSlibKey.from_crypto(public_key_of(public).key)
    for line in (root / SIGNATURES / "model.intoto.jsonl").read_text().splitlines():
        document = json.loads(line)
        key.keyid = document["signatures"][0]["keyid"]
        for one in document["signatures"]:
            one["sig"] = base64.b64decode(one["sig"]).hex() if one["sig"] else ""
        assert Envelope.from_dict(json.loads(line)).verify([key], 1)


DAMAGED = {
    "model": "data/adapter/lora/weights.txt",
    "report of the model": "data/reports/adapter/lora.json",
    "report of a stage before it": "data/reports/inst.json",
    "output of a stage before it": "data/tok/train.txt",
    "source in git": "data/sources/g.txt",
    "source in DVC": "data/sources/d.txt",
    "code": "code/inst.py",
    "attestations": f"{SIGNATURES}/model.intoto.jsonl",
    "signature": f"{SIGNATURES}/model.sig",
}


def test_one_changed_bit_fails_and_names_the_file(signed: tuple[Path, str]) -> None:
    root, public = signed
    for kind, name in DAMAGED.items():
        file = root / name
        content = file.read_bytes()
        if file.stat().st_nlink > 1:  # a link to the cache
            file.unlink()
            file.write_bytes(content)
        flip(file, 8 * (len(content) // 2))
        assert name in findings(root, "adapter@lora", public), kind
        flip(file, 8 * (len(content) // 2))
    assert not findings(root, "adapter@lora", public)
    flip(root / DAMAGED["code"])
    done = pedigree(root, "verify", "adapter@lora", "--signatures", "--key", public)
    assert done.returncode == 1 and DAMAGED["code"] in done.stdout


def test_any_changed_bit_of_the_lineage_in_dvc_lock_is_found(signed: tuple[Path, str]) -> None:
    root, public = signed
    lock, dice = root / "dvc.lock", random.Random(0)
    content = lock.read_bytes()
    end = (
        content.index(b"\n  adapter@dora:")
        if content.index(b"adapter@dora:") > content.index(b"adapter@lora:")
        else len(content)
    )
    for _ in range(25):
        flip(lock, dice.randrange(end * 8))
        try:
            assert any(file.startswith("dvc.lock") for file in findings(root, "adapter@lora", public))
        except InputError as error:
            assert "dvc.lock" in error.what
        lock.write_bytes(content)
    lock.write_bytes(content + b"# another stage\n")
    assert not [file for file in findings(root, "adapter@lora", public) if "adapter" not in file]


def test_added_and_removed_files_are_named(signed: tuple[Path, str]) -> None:
    root, public = signed
    for name in ("data/adapter/lora/new.txt", "data/tok/new.txt"):
        (root / name).write_text("x")
        assert list(findings(root, "adapter@lora", public)) == [name]
        (root / name).unlink()
    for name in ("data/tok/test.txt", "data/sources/g.txt", "data/reports/raw.json"):
        content = (root / name).read_bytes()
        (root / name).unlink()
        assert list(findings(root, "adapter@lora", public)) == [name]
        (root / name).write_bytes(content)
    assert not findings(root, "adapter@lora", public)


def test_files_that_dvc_ignores_and_links_do_not_pass(signed: tuple[Path, str], tmp_path: Path) -> None:
    root, public = signed
    tok = root / "data/tok"
    added, link = "was added since it was attested", "is neither a file nor a folder"
    (root / ".dvcignore").write_text("*.pyc\nextra\n")
    for name in (
        "data/tok/a.pyc",
        "data/tok/extra/a.txt",
        "data/tok/.dvc/a",
        "data/tok/.git/a",
        "data/tok/sub/.dvc/a",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
        assert findings(root, "adapter@lora", public)[name] == added, name
        (root / name).unlink()
    for folder in ("extra", ".dvc", ".git", "sub/.dvc"):
        (tok / folder).rmdir()
    for name, points_to in (
        ("data/tok/link", tmp_path),
        ("data/tok/broken", tmp_path / "none"),
        ("data/tok/a.pyc", tmp_path),
        ("code/tok.py", tmp_path / "tok.py"),
    ):
        content = (root / name).read_bytes() if (root / name).exists() else None
        (tmp_path / "tok.py").write_bytes(content or b"")
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(points_to)
        assert findings(root, "adapter@lora", public) == {name: link}
        with pytest.raises(InputError, match=f"{name}: neither a file nor a folder"):
            attest(root, "adapter@lora", public.replace(".pub", ".pem"))
        (root / name).unlink()
        if content is not None:
            (root / name).write_bytes(content)
    (tok / "a.pyc").write_text("x")
    with pytest.raises(InputError, match=r"data/tok/a\.pyc: DVC ignores it"):
        attest(root, "adapter@lora", public.replace(".pub", ".pem"))


def test_what_dvc_ignores_in_folders_that_are_read_is_said_not_to_be_verified(tmp_path: Path) -> None:
    root, (private, public) = tmp_path / "project", write_keys(tmp_path / "keys", "ed25519")
    (root / "code").mkdir(parents=True)
    (root / "code/a.py").write_text("x")
    (tmp_path / "outside").write_text("x")
    (root / "dvc.yaml").write_text(
        "stages:\n  one:\n    cmd: mkdir out && echo x > out/a\n    deps: [code]\n    outs: [out]\n"
        "  two:\n    cmd: mkdir two && echo x > two/a\n    deps: [../outside]\n    outs: [two]\n"
    )
    for command in (["init", "-q", "--no-scm"], ["repro", "-q"]):
        assert run([sys.executable, "-m", "dvc", *command], root).returncode == 0
    attest(root, "one", private)
    with pytest.raises(InputError, match=r"two: \.\./outside is not a path in the project"):
        attest(root, "two", private)
    assert verify_signatures(root, "one", public)["not_checked"] == ["the files (no model.sig)"]
    (root / ".dvcignore").write_text("# of Python\n*.pyc\n")
    (root / "code/sub/.dvc").mkdir(parents=True)
    for name in ("code/a.pyc", "code/sub/b.py"):
        (root / name).write_text("x")
    document = verify_signatures(root, "one", public)
    assert document["verdict"] == "verified" and document["not_checked"][1:] == [
        "files of sources and code that DVC ignores: 2 (first: code/a.pyc)",
        ".dvcignore, which decides what DVC ignores: it is not attested",
    ]
    (root / "code/links").symlink_to(tmp_path)
    (root / "code/new.py").write_text("x")
    assert findings(root, "one", public) == {
        "code/links": "is neither a file nor a folder",
        "code/new.py": "was added since it was attested",
    }


def test_any_output_of_a_stage_is_attested_however_dvc_yaml_writes_paths(tmp_path: Path) -> None:
    """DVC writes them into dvc.lock as they are in dvc.yaml, such as `./data/x/`, or from the folder of `wdir`."""
    root, (private, public) = tmp_path / "project", write_keys(tmp_path / "keys", "ed25519")
    (root / "data").mkdir(parents=True)
    (root / "data/in").write_text("x")
    (root / "dvc.yaml").write_text(
        "stages:\n  one:\n    cmd: mkdir log model && echo 1 > log/a && echo 2 > model/a && cp ../data/in model/b\n"
        "    wdir: sub\n    deps: [./../data/in]\n    outs: [./log/, model]\n"
        "  two:\n    cmd: cp -r sub/model two\n    deps: [./sub/model/]\n    outs: [two/]\n"
    )
    (root / "sub").mkdir()
    for command in (["init", "-q", "--no-scm"], ["repro", "-q"]):
        assert run([sys.executable, "-m", "dvc", *command], root).returncode == 0
    assert attest(root, "two", private)["stages"] == ["one", "two"]
    assert verify_signatures(root, "two", public)["verdict"] == "verified"
    for name, other in (("log", "model"), ("model", "log")):
        done = attest(root, f"sub/{name}", private)
        assert done["model"] == f"sub/{name}", "the stage's name would be refused"
        assert verify_signatures(root, done["model"], public)["verdict"] == "verified"
        copy = shutil.copytree(root / "sub" / name, tmp_path / name)
        for file in (done["attestations"], done["public_key"]):
            shutil.copy(root / file, copy)
        assert verify_signatures(tmp_path, str(copy), public)["verdict"] == "verified"
        shutil.copy(root / "sub" / other / "a", copy / "a")
        assert verify_signatures(tmp_path, str(copy), public)["verdict"] == "altered"
        sign(root, f"sub/{name}", private)
    for name in ("log", "model"):
        assert verify_signatures(root, f"sub/{name}", public)["verdict"] == "verified", "each has its own signature"


def test_statements_that_are_missing_repeated_added_or_of_another_model_are_refused(signed: tuple[Path, str]) -> None:
    root, public = signed
    file = root / SIGNATURES / "model.intoto.jsonl"
    raw, inst, tok, lora = file.read_text().splitlines(keepends=True)
    attest(root, "adapter@dora", public.replace(".pub", ".pem"))
    dora = (root / "data/signatures/adapter/dora/model.intoto.jsonl").read_text().splitlines(keepends=True)[-1]
    assert dora != lora
    wrong = (
        [inst, tok, lora],
        [raw, inst, lora],
        [raw, inst, tok],
        [raw, raw, inst, tok, lora],
        [raw, inst, tok, dora],
        [raw, inst, tok, dora, lora],
        [inst, raw, tok, lora],
        [raw, inst, tok, lora.replace('":"', '": "', 1)],
        [],
    )
    for lines in wrong:
        file.write_text("".join(lines))
        assert f"{SIGNATURES}/model.intoto.jsonl" in findings(root, "adapter@lora", public)
    file.write_text("".join([raw, inst, tok, lora]))
    assert not findings(root, "adapter@lora", public)


def test_a_stranger_verifies_a_copy_without_the_project(signed: tuple[Path, str], tmp_path: Path) -> None:
    root, public = signed
    copy = Path(shutil.copytree(root / "data/adapter/lora", tmp_path / "elsewhere/copy"))
    shutil.copytree(root / SIGNATURES, copy, dirs_exist_ok=True)
    document = verify_signatures(copy.parent, str(copy), public)
    assert document["verdict"] == "verified" and any("only its project has" in one for one in document["not_checked"])
    flip(copy / "weights.txt", 1)
    assert list(findings(copy.parent, str(copy), public)) == [f"{copy}/weights.txt"]
    (copy / "model.sig").unlink()
    assert list(findings(copy.parent, str(copy), public)) == [f"{copy}/weights.txt"], (
        "the attestation of its stage names the same files"
    )


def test_what_is_not_the_recorded_output_is_neither_signed_nor_attested(root: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path / "keys", "ed25519")
    changes: list[tuple[str, Callable[..., Any], tuple[str, ...]]] = [
        ("data/adapter/lora/weights.txt", sign, ("adapter@lora",)),
        ("data/sources/g.txt", attest, ("adapter@lora",)),
        ("data/reports/tok.json", attest, ("adapter@lora",)),
    ]
    for name, command, arguments in changes:
        content = (root / name).read_bytes()
        (root / name).unlink()
        (root / name).write_bytes(content + b" ")
        with pytest.raises(InputError, match=name):
            command(root, *arguments, private)
        (root / name).write_bytes(content)
    assert not (root / "data/signatures").exists()


def test_attest_remade_states_the_result_and_signs_nothing_that_differs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path / "keys", "ed25519")
    signatures = root / "data/signatures/inst"
    monkeypatch.setenv("PEDIGREE_SIGNING_KEY", Path(private).read_text())
    seen = tmp_path / "seen"  # by the stages that are run again
    pipeline = root / "small_pipeline.py"  # no dependency of a stage: an edit leaves the record valid
    note = f"open({str(seen)!r}, 'a').write('key ' if 'PEDIGREE_SIGNING_KEY' in os.environ else 'none ')"
    pipeline.write_text(pipeline.read_text().replace("if __name__ ==", f"{note}\nif __name__ =="))
    assert attest(root, "inst", None, remade=True)["remade"] == "identical"
    assert set(seen.read_text().split()) == {"none"}
    results = [one["predicate"]["runDetails"]["byproducts"][0]["annotations"] for one in statements(signatures)]
    assert results == [{"verdict": "identical"}] * 2
    assert verify_signatures(root, "inst", public)["attestations"]["remade"] == "identical"
    shutil.rmtree(signatures)
    pipeline.write_text(
        pipeline.read_text().replace('write_text("\\n".join([*rows, _code(ctx)]))', 'write_text("other")')
    )
    done = pedigree(root, "attest", "inst", "--key", private, "--remade")
    assert done.returncode == 1 and "nothing was signed" in done.stderr and not signatures.exists()
    done = pedigree(root, "attest", "inst", "--key", private)
    assert done.returncode == 0 and "not made again" in done.stdout
    assert verify_signatures(root, "inst", public)["attestations"]["remade"] is None


def test_bad_input_is_one_message(root: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path / "keys", "ed25519")
    (tmp_path / "empty").mkdir()
    (tmp_path / "my model; ls").mkdir()
    for arguments, wrong in (
        (("verify", "adapter@lora", "--signatures"), "adapter@lora has no signatures in data/signatures/adapter/lora"),
        (("verify", str(tmp_path / "empty"), "--signatures"), f"error: {tmp_path / 'empty'} has no signatures\n"),
        (
            ("verify", str(tmp_path / "my model; ls"), "--signatures"),
            f"`pedigree sign '{tmp_path / 'my model; ls'}' --key FILE`",
        ),
        (("verify", "--signatures"), "requires a model"),
        (("verify", "adapter@lora", "--signatures", "--deep"), "no other option"),
        (("verify", "adapter@lora", "--key", private), "requires --signatures"),
        (("sign", "nothing", "--key", private), "no such stage"),
        (("sign", "n" * 300, "--key", private), "no such stage"),
        (("sign", ".", "--key", private), "this is the project"),
        (("sign", str(tmp_path / "empty"), "--key", private), "contains no files"),
        (("attest", str(tmp_path / "empty"), "--key", private), "not an output"),
    ):
        done = pedigree(root, *arguments)
        assert done.returncode == 2 and wrong in done.stderr and "Traceback" not in done.stderr, arguments
    assert not (root / "data/signatures").exists()


def test_no_way_to_write_a_path_puts_signatures_into_an_output(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path / "keys", "ed25519")
    (root / "data/tok/part").mkdir()
    (tmp_path / "link").symlink_to(root)
    for folder, project, model, wrong in (
        (root, root, "./data", "it contains data/"),
        (root, root, "data/adapter", "it contains data/adapter/"),
        (root, root, "..", "it contains data/"),
        (root, root, "data/tok/part", "it lies in data/tok, an output of tok"),
        (tmp_path, tmp_path, "project/data/inst", "it is the output of inst in .*/project"),
        (tmp_path, tmp_path, "project", "it contains data/"),
        (tmp_path, tmp_path, "link/data/tok/part", "it lies in data/tok"),
    ):
        monkeypatch.chdir(folder)
        for command in (
            lambda: sign(project, model, private),  # noqa: B023
            lambda: verify_signatures(project, model, public),  # noqa: B023
        ):
            with pytest.raises(InputError, match=wrong):
                command()
    for folder, project, model in (
        (root, root, "data/tok/../inst"),
        (root, root, "./data/inst/"),
        (tmp_path, tmp_path / "link", "link/data/inst"),
        (tmp_path, root, "link/data/inst"),
    ):
        monkeypatch.chdir(folder)
        assert Path(sign(project, model, private)["folder"]) == Path("data/inst")
        assert (root / "data/signatures/inst/model.sig").is_file()
        shutil.rmtree(root / "data/signatures")
    assert not [path for path in tmp_path.rglob("model.*") if path.suffix in (".sig", ".pub")]


def test_attest_takes_values_and_texts_from_one_reading_of_dvc_lock(
    signed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, public = signed
    private = public.replace(".pub", ".pem")
    lock = root / "dvc.lock"
    before, written = lock.read_text(), (root / SIGNATURES / "model.intoto.jsonl").read_bytes()
    addresses = Lineage.addresses

    def another_run(self: Lineage) -> list[str]:
        lock.write_text(before.replace("cmd: ", "cmd: x"))
        return addresses(self)

    with monkeypatch.context() as patch:
        patch.setattr(Lineage, "addresses", another_run)
        attest(root, "adapter@lora", private)
    assert (root / SIGNATURES / "model.intoto.jsonl").read_bytes() == written
    assert {f"dvc.lock: {name}" for name in LINEAGE} == findings(root, "adapter@lora", public).keys()
    lock.write_text(before.replace("  inst:", "  'inst':"))
    small_pipeline.git(root, "commit", "-qam", "quoted")
    assert list(findings(root, "adapter@lora", public)) == ["dvc.lock: inst"]
    attest(root, "adapter@lora", private)
    assert not findings(root, "adapter@lora", public)
    lock.write_text(before.replace("  inst:", "  ? inst\n  :"))
    small_pipeline.git(root, "commit", "-qam", "another form")
    with pytest.raises(InputError, match="the entry of inst is not written as DVC writes it"):
        attest(root, "adapter@lora", private)


def test_nothing_is_signed_if_dvc_lock_changed_while_stages_were_made_again(
    signed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, public = signed
    document = {"verdict": "identical", "stages": {name: {"verdict": "identical", "outputs": {}} for name in LINEAGE}}
    monkeypatch.setattr("dagster_project.commands.verify.verify", lambda *_, **__: document)
    with pytest.raises(CheckFailed, match=r"dvc\.lock changed while"):
        attest(root, "adapter@lora", public.replace(".pub", ".pem"), remade=True)


def test_a_model_that_changes_while_it_is_hashed_is_not_signed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, _ = write_keys(tmp_path / "keys", "ed25519")
    file, hashed = root / "data/adapter/lora/weights.txt", model_signature.manifest

    def manifest(name: str, found: Any) -> Any:
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content + b" ")
        return hashed(name, found)

    monkeypatch.setattr(model_signature, "manifest", manifest)
    with pytest.raises(InputError, match=r"not what dvc\.lock recorded"):
        sign(root, "adapter@lora", private)
    assert not (root / "data/signatures").exists()


def test_the_command_that_checks_a_folder_has_its_name_as_one_word() -> None:
    document = {
        "model": "my models/#1",
        "files": 2,
        "folder": "my models/#1",
        "signature": "s",
        "public_key": "k",
        "key": "0" * 64,
    }
    assert shlex.split(signed_text(document).partition("check them: ")[2]) == [
        "pedigree",
        "verify",
        "my models/#1",
        "--signatures",
    ]
