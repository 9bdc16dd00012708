"""Signatures: whoever has another key, no signature or another manifest is stopped before a parser sees the model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from bundle_fixture import make_bundle
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from edgeprune.bundle import verify
from edgeprune.bundle.integrity import sums_text
from edgeprune.bundle.load import load
from edgeprune.bundle.sign import sign_bundle
from edgeprune.bundle.write import zip_path
from edgeprune.cli import main as cli
from edgeprune.errors import IntegrityError, SpecError


def _pem(key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey, *, ssh: bool = False) -> bytes:
    form = serialization.PrivateFormat.OpenSSH if ssh else serialization.PrivateFormat.PKCS8
    encoding = serialization.Encoding.PEM
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _key(folder: Path, name: str = "key", *, ssh: bool = False) -> tuple[Path, Path]:
    """A private key file and the file of its public half."""
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(_pem(key, ssh=ssh))
    private.chmod(0o600)
    coding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    if ssh:
        coding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(coding, form))
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A signed bundle and the public key."""
    private, public = _key(tmp_path)
    folder = make_bundle(tmp_path / "bundle")
    text = sign_bundle(folder, str(private))
    assert text.encode() == public.read_bytes()
    return folder, public


def _refused(monkeypatch: pytest.MonkeyPatch, path: Path, key: Path, level: int = 2) -> str:
    """Why a bundle fails at a level, with nothing having looked at its model."""

    def parsed(*arguments: object) -> None:
        raise AssertionError("a parser ran")

    for name in ("weights_line", "open_board", "read_golden"):
        monkeypatch.setattr(verify, name, parsed)
    report = verify.verify(path, key=key)
    assert not report.ok
    assert [x.level for x in report.levels if x.status == "failed"] == [level]
    assert {x.status for x in report.levels if x.level > level} == {"not-run"}
    return report.levels[level].detail


@pytest.mark.parametrize("ssh", [False, True])
def test_a_signed_bundle_passes_as_folder_and_as_zip(tmp_path, ssh):
    private, public = _key(tmp_path, ssh=ssh)
    folder = make_bundle(tmp_path / "bundle")
    sign_bundle(folder, str(private))
    for path in (folder, zip_path(folder)):
        level = verify.verify(path, key=public, require_signature=True).levels[2]
        assert (level.status, level.detail[:18]) == ("passed", "signed by the key ")
    unchecked = verify.verify(folder)
    assert unchecked.ok
    assert unchecked.levels[2].status == "not-run"
    assert "no key was given" in unchecked.levels[2].detail


def test_openssl_checks_the_signature_too(signed):
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    folder, public = signed
    command = [program, "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    files = ["-in", str(folder / "manifest.json"), "-sigfile", str(folder / "manifest.sig")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_key_is_refused(signed, tmp_path, monkeypatch):
    _, other = _key(tmp_path, "other")
    assert "is not the signature of manifest.json" in _refused(monkeypatch, signed[0], other)


def test_a_stripped_signature_is_refused(signed, monkeypatch):
    folder, public = signed
    (folder / "manifest.sig").unlink()
    assert "is not signed" in _refused(monkeypatch, folder, public)


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\0" * 63, b"\0" * 10_000_000])
def test_a_signature_that_is_none_is_refused(signed, monkeypatch, content):
    folder, public = signed
    (folder / "manifest.sig").write_bytes(content)
    assert "is not the signature" in _refused(monkeypatch, folder, public)


def test_an_altered_manifest_is_refused_even_with_new_digests(signed, monkeypatch):
    folder, public = signed
    path = folder / "manifest.json"
    value = json.loads(path.read_bytes())
    value["latency"]["median_ms"] = 0.1
    path.write_text(json.dumps(value))
    (folder / "SHA256SUMS").write_bytes(sums_text(folder))
    assert "is not the signature" in _refused(monkeypatch, folder, public)


def test_an_altered_file_fails_its_hash_before_the_signature(signed, monkeypatch):
    folder, public = signed
    (folder / "labels.txt").write_text("a\nb\nc\n")
    assert "labels.txt is not what" in _refused(monkeypatch, folder, public, level=1)


def test_a_required_signature_needs_a_key(signed):
    with pytest.raises(SpecError, match="--key"):
        verify.verify(signed[0], require_signature=True)


def test_a_key_that_others_can_read_or_that_is_of_another_kind_is_refused(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    private, _ = _key(tmp_path)
    private.chmod(0o644)
    with pytest.raises(SpecError, match="owner alone"):
        sign_bundle(folder, str(private))
    private.write_bytes(_pem(rsa.generate_private_key(65537, 2048)))
    private.chmod(0o600)
    with pytest.raises(SpecError, match="must be an Ed25519 key"):
        sign_bundle(folder, str(private))
    private.write_text("canary-secret")
    with pytest.raises(SpecError) as caught:
        sign_bundle(folder, str(private))
    assert "canary-secret" not in str(caught.value)
    (tmp_path / "no-key").write_text("hello")
    with pytest.raises(SpecError, match="no PEM or OpenSSH public key"):
        verify.verify(folder, key=tmp_path / "no-key")
    assert not (folder / "manifest.sig").exists()


def test_a_key_may_come_by_reference(tmp_path, monkeypatch):
    folder = make_bundle(tmp_path / "bundle")
    key = ed25519.Ed25519PrivateKey.generate()
    monkeypatch.setenv("SIGNING_KEY", _pem(key).decode())
    text = sign_bundle(folder, "env:SIGNING_KEY")
    (tmp_path / "key.pub").write_text(text)
    assert verify.verify(folder, key=tmp_path / "key.pub").levels[2].status == "passed"


def test_a_bundle_that_is_not_whole_is_not_signed(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    private, _ = _key(tmp_path)
    (folder / "labels.txt").write_text("other\n")
    with pytest.raises(IntegrityError, match=r"labels\.txt"):
        sign_bundle(folder, str(private))
    with pytest.raises(SpecError, match="not the folder"):
        sign_bundle(zip_path(folder), str(private))


def test_the_commands_sign_and_verify(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    private, public = _key(tmp_path)
    done = CliRunner().invoke(cli.cli, ["bundle", "sign", str(folder), "--key", str(private)])
    assert done.exit_code == 0, done.output
    assert "BEGIN PUBLIC KEY" in done.stdout
    asked = ["verify", str(folder), "--key", str(public), "--require-signature"]
    shown = CliRunner().invoke(cli.cli, asked)
    assert shown.exit_code == 0, shown.output
    assert "L2 signature                    passed   signed by the key" in shown.stdout
    assert "L5 on a device                  not-run  no device was named" in shown.stdout
    (folder / "manifest.sig").unlink()
    assert isinstance(CliRunner().invoke(cli.cli, asked).exception, IntegrityError)


def test_a_bundle_is_loaded_for_the_key_that_signed_it_alone(signed, tmp_path):
    folder, public = signed
    with load(folder, key=public) as bundle:
        assert bundle.labels[0] == "cat"
    _, other = _key(tmp_path, "other")
    with pytest.raises(IntegrityError, match="is not the signature"):
        load(folder, key=other)
