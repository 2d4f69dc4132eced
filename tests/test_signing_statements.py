"""Statements of attestations: what they say, and which ones of others are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from dagster_project.lineage.signing import envelope, model_signature, provenance
from dagster_project.lineage.signing.envelope import SignatureError
from dagster_project.lineage.signing.keys import PrivateKey


def test_what_is_signed_is_read_strictly() -> None:
    for content in (b'{"a":1,"a":2}', b"[" * 100_000, b"\xff", b"{"):
        with pytest.raises(SignatureError):
            envelope.parsed(content)
    assert envelope.canonical({"b": float("inf"), "a": [1.5, None, "ä"]}) == b'{"a":[1.5,null,"\\u00e4"],"b":"inf"}'
    assert provenance.lock_texts("schema: '2.0'\nstages:\n  a:\n    cmd: x\n  b@c:\n    cmd: y\n") == {
        "a": "schema: '2.0'\nstages:\n  a:\n    cmd: x\n", "b@c": "schema: '2.0'\nstages:\n  b@c:\n    cmd: y\n",
    }  # fmt: skip


def test_statements_name_no_ids_of_records() -> None:
    waiver = {
        "check": "leakage",
        "reason": "known",
        "rows": ["a1b2c3d4e5f6"],
        "pairs": [["a1b2c3d4e5f6", "f6e5d4c3b2a1"]],
    }
    entry = {"cmd": "run", "params": {"params.yaml": {"instructions": {"waivers": [waiver]}}}}
    said = json.dumps(provenance.statement(provenance.StageRecord("a", entry, "", {}, {}, {})))
    assert "known" in said and "a1b2c3" not in said and "f6e5d4" not in said


DIGESTS = {"md5": "0" * 32, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "path", ["../x", "/x", "", "a\0b", "a/../b", "./a", "x" * 5000, "a/" * 3000 + "a", "\ud800"], ids=range(9)
)
def test_statements_that_name_paths_outside_of_a_project_are_refused(path: str) -> None:
    key = PrivateKey(ed25519.Ed25519PrivateKey.generate())
    for name in ("subject", "deps", "outs", "read"):
        record = provenance.StageRecord(
            "b",
            {"cmd": "run", "deps": [{"path": "x"}], "outs": [{"path": "y"}]},
            "",
            {},
            {"x": DIGESTS, "y": DIGESTS},
            {},
        )
        statement = provenance.statement(record)
        provenance.read(provenance.lines([statement], key).encode(), key.public)
        definition = statement["predicate"]["buildDefinition"]
        if name == "deps":
            definition["externalParameters"]["deps"][path] = []
        elif name == "outs":
            definition["externalParameters"]["outs"].append(path)
        else:
            files = statement["subject"] if name == "subject" else definition["resolvedDependencies"]
            files.append({"name": path, "digest": DIGESTS})
        with pytest.raises(SignatureError, match="a path that is not one in a project"):
            provenance.read(provenance.lines([statement], key).encode(), key.public)


@pytest.mark.parametrize(
    "digest",
    [
        {},
        {"md5": "0" * 32},
        {"sha256": "0" * 64},
        DIGESTS | {"md5": "0"},
        DIGESTS | {"sha1": "0"},
        DIGESTS | {"sha256": "G" * 64},
    ],
    ids=range(6),
)
def test_statements_about_files_without_their_digests_are_refused(digest: dict[str, str]) -> None:
    key = PrivateKey(ed25519.Ed25519PrivateKey.generate())
    record = provenance.StageRecord("b", {"cmd": "run", "outs": [{"path": "y"}]}, "", {}, {"y": digest}, {})
    with pytest.raises(SignatureError, match="without its md5 and sha256"):
        provenance.read(provenance.lines([provenance.statement(record)], key).encode(), key.public)


def test_a_signed_statement_of_another_shape_is_read_or_refused_and_nothing_else() -> None:
    key = PrivateKey(ed25519.Ed25519PrivateKey.generate())

    def said() -> dict[str, Any]:
        record = provenance.StageRecord(
            "b",
            {"cmd": "run", "deps": [{"path": "x"}], "outs": [{"path": "y"}]},
            "",
            {},
            {"x": DIGESTS, "y": DIGESTS},
            {},
        )
        return json.loads(json.dumps(provenance.statement(replace(record, remade={"verdict": "identical"}))))

    def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for name in (
            document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
        ):
            yield (*path, name)
            yield from places(document[name], (*path, name))

    read, refused = 0, 0
    for *parents, last in places(said()):
        for value in (
            None,
            3,
            "a",
            [],
            [3],
            {},
            {"a": 3},
            [{"name": 3, "digest": {}}],
            [{"name": "a", "digest": [1]}],
            {"a": ["nobody"]},
        ):
            statement = said()
            inner = statement
            for name in parents:
                inner = inner[name]
            inner[last] = value
            try:
                provenance.read(provenance.lines([statement], key).encode(), key.public)
                read += 1
            except SignatureError:
                refused += 1
    assert read > 20 and refused > 200


@pytest.mark.parametrize(
    ("verdict", "is_read"), [("identical", True), ("elsewhere", True), ("different", False), ("", False)]
)
def test_a_statement_that_a_stage_was_made_again_has_a_result_with_which_one_is_signed(
    verdict: str, is_read: bool
) -> None:
    key = PrivateKey(ed25519.Ed25519PrivateKey.generate())
    record = provenance.StageRecord("b", {"cmd": "run", "outs": [{"path": "y"}]}, "", {}, {"y": DIGESTS}, {})
    signed = provenance.statement(replace(record, remade={"verdict": verdict}))
    content = provenance.lines([signed], key).encode()
    if is_read:
        assert [one.remade for one in provenance.read(content, key.public)] == [verdict]
        return
    with pytest.raises(SignatureError, match="is not a statement of"):
        provenance.read(content, key.public)


def test_a_name_that_was_added_beside_a_signature_is_found() -> None:
    """The name of the key in an envelope is not signed."""
    key = PrivateKey(ed25519.Ed25519PrivateKey.generate())
    text = model_signature.bundle(model_signature.Manifest("model", {"a.txt": "0" * 64}, ()), key)
    assert model_signature.read_bundle(text.encode(), key.public).files
    changed = text.replace('"keyid":""', '"keyid":"another person"')
    assert changed != text
    with pytest.raises(SignatureError, match="was changed"):
        model_signature.read_bundle(changed.encode(), key.public)
