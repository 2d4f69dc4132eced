"""Keys of signatures: Ed25519 or P-256, as PEM.

A private key is read from a file or the environment; none is ever created, copied or logged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from dagster_project.core.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

log = logging.getLogger("pedigree")

KEY_VARIABLE = "PEDIGREE_SIGNING_KEY"
"""Environment variable with the text of a private key, where --key is not given."""
PASSWORD_VARIABLE = "PEDIGREE_SIGNING_KEY_PASSWORD"
"""Environment variable with the password of an encrypted private key."""
CREATE = (
    "`openssl genpkey -algorithm ed25519 -out key.pem` makes a private key,"
    " `openssl pkey -in key.pem -pubout -out key.pub` its public key"
)
KINDS = "Ed25519 and P-256 keys are supported"


@dataclass(frozen=True)
class PublicKey:
    """A public key, in the one form in which it is written and identified."""

    key: Ed25519PublicKey | EllipticCurvePublicKey

    @property
    def pem(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def fingerprint(self) -> str:
        """sha256 of the PEM, as OpenSSF Model Signing identifies a key."""
        return hashlib.sha256(self.pem).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            if isinstance(self.key, EllipticCurvePublicKey):
                self.key.verify(signature, message, ECDSA(SHA256()))
            else:
                self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, repr=False)
class PrivateKey:
    """A private key. It has no printable form."""

    key: Ed25519PrivateKey | EllipticCurvePrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key())

    def sign(self, message: bytes) -> bytes:
        """The signature of a message: 64 bytes for Ed25519, ECDSA with SHA-256 in DER for P-256."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.hashes import SHA256

        if isinstance(self.key, EllipticCurvePrivateKey):
            return self.key.sign(message, ECDSA(SHA256()))
        return self.key.sign(message)


def private_key(file: str | None) -> PrivateKey:
    """The private key of a file, or else of the environment variable.

    Raises:
        InputError: there is none, or it cannot be used. The message does not quote it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where = f"--key {file}" if file else KEY_VARIABLE
    text = _content(file) if file else os.environ.get(KEY_VARIABLE, "").encode(errors="surrogateescape")
    if not text:
        raise InputError(
            f"no private key: neither --key nor {KEY_VARIABLE} is given" if not file else f"{where}: it is empty",
            CREATE,
        )
    password = os.environ.get(PASSWORD_VARIABLE, "").encode(errors="surrogateescape") or None
    if b"ENCRYPTED" not in text:
        password = None
    try:
        key = load_pem_private_key(text, password)
    except TypeError:
        raise InputError(
            f"{where}: the private key is encrypted", f"give its password in {PASSWORD_VARIABLE}"
        ) from None
    except (ValueError, UnsupportedAlgorithm):  # their messages may quote the key
        hint = f"if it is encrypted, check {PASSWORD_VARIABLE}; {CREATE}"
        raise InputError(f"{where}: not a private key in PEM, or the password is wrong", hint) from None
    if isinstance(key, Ed25519PrivateKey) or (
        isinstance(key, EllipticCurvePrivateKey) and key.curve.name == "secp256r1"
    ):
        return PrivateKey(key)
    raise InputError(f"{where}: a private key of another kind", f"{KINDS}; {CREATE}")


def public_key(content: bytes, where: str) -> PublicKey:
    """A public key from the content of a PEM file.

    Args:
        where: the file, for the message.
    Raises:
        InputError: it is not a public key that is supported.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in content:
        raise InputError(
            f"{where}: this is a private key", "give the public key: `openssl pkey -in key.pem -pubout -out key.pub`"
        )
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{where}: not a public key in PEM", "give the file that the signer published") from None
    if isinstance(key, Ed25519PublicKey) or (isinstance(key, EllipticCurvePublicKey) and key.curve.name == "secp256r1"):
        return PublicKey(key)
    raise InputError(f"{where}: a public key of another kind", KINDS)


def public_key_of(file: str) -> PublicKey:
    """The public key that --key names.

    Raises:
        InputError: it cannot be read, or is not a public key that is supported.
    """
    return public_key(_content(file), f"--key {file}")


def _content(file: str) -> bytes:
    if "PRIVATE KEY" in file or "\n" in file:  # not quoted: it may be the key itself
        raise InputError("--key takes a file, not the text of a key", f"pass a text in {KEY_VARIABLE}")
    try:
        with Path(file).open("rb") as opened:
            content, mode = opened.read(LARGEST + 1), os.fstat(opened.fileno()).st_mode
    except OSError as error:
        raise InputError(f"--key {file}: {error.strerror}", CREATE) from None
    if len(content) > LARGEST:
        raise InputError(f"--key {file}: too large for a key", "name a PEM file")
    if b"PRIVATE KEY" in content and b"ENCRYPTED" not in content and mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning(
            f"--key {file}: other users of this machine can read this private key; run `chmod 600 {quote(file)}`"
        )
    return content


LARGEST = 100_000
"""Bytes of a key file that is read."""
