"""DSSE envelopes with in-toto statements: what is signed, and the strict reading of what was signed.

A verifier must notice a change of any byte. So JSON with repeated keys and base64 in other than its canonical form are
refused, although common readers accept them.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

from dagster_project.lineage.signing.keys import PrivateKey, PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


class SignatureError(Exception):
    """A signature does not verify, or its file was changed. The message completes "FILE ..."."""


def canonical(document: Any) -> bytes:
    """A document as compact JSON in ASCII, with sorted keys. Values that JSON does not have become text."""
    return json.dumps(_plain(document), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def parsed(content: bytes) -> Any:
    """JSON without repeated keys.

    Raises:
        SignatureError: it is not.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a repeated key")
        return found

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise SignatureError("is not JSON") from None


def seal(statement: Mapping[str, Any], key: PrivateKey, keyid: str) -> dict[str, Any]:
    """The DSSE envelope of a statement."""
    payload = canonical(statement)
    signature = {"sig": base64.b64encode(key.sign(_encoded(payload))).decode(), "keyid": keyid}
    return {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}


def unseal(envelope: Any, key: PublicKey) -> dict[str, Any]:
    """The statement in an envelope, if its signature is by this key.

    Raises:
        SignatureError: it is not, or the envelope has another shape.
    """
    payload, signature = _decoded(envelope)
    if not key.verifies(signature, _encoded(payload)):
        raise SignatureError(f"is not signed by this key (sha256 {key.fingerprint[:16]}), or was changed")
    statement = parsed(payload)
    if not isinstance(statement, dict) or statement.get("_type") != STATEMENT_TYPE:
        raise SignatureError("does not contain an in-toto statement, version 1")
    return statement


def _encoded(payload: bytes) -> bytes:
    """Pre-authentication encoding of DSSE, version 1: the bytes that are signed."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _decoded(envelope: Any) -> tuple[bytes, bytes]:
    """Payload and signature of an envelope with one signature."""
    wrong = SignatureError("is not a DSSE envelope with one signature")
    if not isinstance(envelope, dict) or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise wrong
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise wrong
    if set(signatures[0]) != {"sig", "keyid"} or envelope["payloadType"] != PAYLOAD_TYPE:
        raise wrong
    return _from_base64(envelope["payload"]), _from_base64(signatures[0]["sig"])


def _from_base64(text: Any) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise SignatureError("has invalid base64") from None
    if base64.b64encode(content).decode() != text:  # unused bits of the last character
        raise SignatureError("has base64 that is not canonical")
    return content
