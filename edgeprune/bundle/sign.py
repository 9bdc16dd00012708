"""Who made a bundle: a detached Ed25519 signature of ``manifest.json``, which names the digest of every other file.

``manifest.sig`` is the 64 bytes of RFC 8032 and nothing else, so that any tool can check it. The key that it is checked with comes from the
user, never from the bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.bundle.archive import write_zip
from edgeprune.bundle.integrity import check_hashes, check_structure
from edgeprune.bundle.manifest import MANIFEST, SIGNATURE
from edgeprune.devices.link.secrets import read_private, resolve
from edgeprune.errors import IntegrityError, SpecError
from edgeprune.records.files import write_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 64 * 1024


def sign_bundle(folder: Path, key: str) -> str:
    """Sign a bundle, and write its zip again where one lies beside it.

    Args:
        folder: of a whole bundle.
        key: a private key file of mode 0600, or a reference ``env:NAME`` or ``file:/path``; PEM or OpenSSH, without a passphrase.

    Returns:
        The public key as one PEM text, to be given to those who verify.

    Raises:
        SpecError: the key cannot be used, or ``folder`` is no folder.
        IntegrityError: the bundle is not whole.
    """
    if not folder.is_dir():
        raise SpecError(
            f"{folder} is not the folder of a bundle", hint="its .zip is made again from it"
        )
    private = _private_key(key)
    manifest = check_structure(folder)
    check_hashes(folder, manifest)
    write_bytes(folder / SIGNATURE, private.sign((folder / MANIFEST).read_bytes()))
    archive = folder.with_name(folder.name + ".zip")
    if archive.is_file():
        write_zip(folder, archive, top=manifest.name)
    return _public_text(private.public_key())


def check_signature(folder: Path, public: Ed25519PublicKey) -> str:
    """The fingerprint of the key, once the manifest carries its signature.

    Raises:
        IntegrityError: there is no signature, it is another key's, or the manifest was changed after it was signed.
    """
    from cryptography.exceptions import InvalidSignature

    path = folder / SIGNATURE
    if not path.is_file():
        raise IntegrityError("the bundle is not signed, and a signature of that key is required")
    signature = path.read_bytes() if path.stat().st_size == SIGNATURE_BYTES else b""
    try:
        public.verify(signature, (folder / MANIFEST).read_bytes())
    except InvalidSignature as error:
        raise IntegrityError(
            f"{SIGNATURE} is not the signature of {MANIFEST} by the key {fingerprint(public)}",
            hint="ask its maker for the bundle and the key again",
        ) from error
    return fingerprint(public)


def fingerprint(public: Ed25519PublicKey) -> str:
    """The first 16 digits of the SHA-256 of the 32 bytes of a public key."""
    from edgeprune.records.files import sha256_bytes

    return sha256_bytes(public.public_bytes_raw())[:16]


def _public_text(public: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _private_key(reference: str) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    is_reference = reference.startswith(("env:", "file:"))
    content = (
        resolve(reference).reveal().encode() + b"\n"
        if is_reference
        else read_private(Path(reference), "signing key")
    )
    ssh = b"OPENSSH PRIVATE KEY" in content
    load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
    try:
        found = load(content, password=None)
    except (ValueError, TypeError):  # the error may quote the key
        raise SpecError(
            "the signing key is no PEM or OpenSSH private key without a passphrase"
        ) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise SpecError(
            "the signing key must be an Ed25519 key",
            hint="openssl genpkey -algorithm ed25519 -out key.pem",
        )
    return found


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM or OpenSSH file.

    Raises:
        SpecError: it cannot be read, or is no Ed25519 key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if path.stat().st_size > MAX_KEY_BYTES:
            raise SpecError(f"the public key {path} must be at most {MAX_KEY_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read the public key {path}: {error.strerror}") from error
    ssh = content.startswith(b"ssh-")
    load = serialization.load_ssh_public_key if ssh else serialization.load_pem_public_key
    try:
        found = load(content)
    except (ValueError, TypeError) as error:
        raise SpecError(f"{path} is no PEM or OpenSSH public key") from error
    if not isinstance(found, Ed25519PublicKey):
        raise SpecError(f"the public key {path} must be an Ed25519 key")
    return found
