"""Signatures with offline keys: accepted by the library's own verifier, refused once anything was
changed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adaptrix_export.cli import main
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from adaptrix_export.save.hashes import files_under
from tests.trust.fixtures import make_inputs

pytest.importorskip("model_signing")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sign")
    inputs = make_inputs(folder / "inputs")
    build(Recipe.model_validate(
        {"base": str(inputs.base), "adapters": [str(inputs.adapter)], "target": "safetensors",
         "out": str(folder / "out"), "parity": {"level": "off"}}
    ))  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two pairs, and one with a password."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    ways = {"ours": form.NoEncryption(), "theirs": form.NoEncryption(),
            "locked": form.BestAvailableEncryption(b"open sesame")}  # fmt: skip
    made = {}
    for name, way in ways.items():
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, way)
        public = key.public_key().public_bytes(
            form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
        )
        made[name], made[f"{name}.pub"] = folder / f"{name}.pem", folder / f"{name}.pub"
        made[name].write_bytes(private)
        made[f"{name}.pub"].write_bytes(public)
    return made


@pytest.fixture
def out(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "out"))


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, [str(argument) for argument in arguments])


def test_a_signature_is_accepted_here_and_by_the_library(out: Path, keys: dict[str, Path]) -> None:
    done = run("sign", out, "--key", keys["ours"], "--json")
    assert done.exit_code == 0, done.stderr
    signature = Path(json.loads(done.stdout)["signature"])
    assert signature == out.with_name("out.sig")
    assert signature.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in sorted(out.parent.iterdir())] == ["out", "out.sig"]
    done = run("verify", out, "--key", keys["ours.pub"])
    assert done.exit_code == 0, done.stderr
    assert f"signed by the owner of {keys['ours.pub']}" in done.output
    theirs = [sys.executable, "-m", "model_signing", "verify", "key", str(out), "--signature",
              str(signature), "--public_key", str(keys["ours.pub"])]  # fmt: skip
    done_there = subprocess.run(theirs, capture_output=True, text=True)
    assert done_there.returncode == 0, done_there.stderr
    assert "succeeded" in done_there.stdout + done_there.stderr


def test_whatever_is_changed_is_refused(out: Path, keys: dict[str, Path]) -> None:
    assert run("sign", out, "--key", keys["ours"]).exit_code == 0
    check = ("verify", out, "--key", keys["ours.pub"])
    for name, path in sorted(files_under(out)):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        done = run(*check)
        assert done.exit_code == 1 and name in done.stderr, done.output
        path.write_bytes(whole)
    for name in ("more.txt", ".gitattributes"):
        (out / name).touch()
        done = run(*check)
        assert done.exit_code == 1 and f"Extra files found in model 'out': {name}" in done.stderr
        (out / name).unlink()
    (out / "link").symlink_to("config.json")
    assert run(*check).exit_code == 1
    (out / "link").unlink()
    (out / "empty").mkdir()  # of which no hash is made; the manifest notices
    assert run(*check).exit_code == 1
    (out / "empty").rmdir()
    (out / "config.json").unlink()
    assert "Missing files in model 'out': config.json" in run(*check).stderr


def test_another_key_or_a_damaged_signature_is_refused(out: Path, keys: dict[str, Path]) -> None:
    assert run("sign", out, "--key", keys["ours"]).exit_code == 0
    done = run("verify", out, "--key", keys["theirs.pub"])
    assert done.exit_code == 1 and "do not trust this artifact" in done.stderr
    signature = out.with_name("out.sig")
    whole = signature.read_text()
    bundle = json.loads(whole)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"config", b"conf1g", 1)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    for text in ("", "{}", whole[: len(whole) // 2], json.dumps(bundle), "[" * 9, "\0"):
        signature.write_text(text)
        done = run("verify", out, "--key", keys["ours.pub"])
        assert done.exit_code == 1 and "internal" not in done.stderr, (text[:80], done.output)
    signature.unlink()
    done = run("verify", out, "--key", keys["ours.pub"])
    assert done.exit_code == 2 and "no signature" in done.stderr


def test_only_whole_artifacts_are_signed_and_only_by_keys(
    out: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    for key in (keys["ours.pub"], out / "config.json", tmp_path, Path("/dev/zero"), out / "none"):
        done = run("sign", out, "--key", key)
        assert done.exit_code == 2 and str(key) in done.stderr, done.output
        assert not out.with_name("out.sig").exists()
    assert run("verify", out, "--key", keys["ours"]).exit_code == 2
    done = run("sign", out, "--key", keys["ours"], "--signature", out / "signature")
    assert done.exit_code == 2 and "inside the artifact" in done.stderr
    (out / "config.json").write_text("{}")
    done = run("sign", out, "--key", keys["ours"])
    assert done.exit_code == 1 and "config.json: 2 bytes" in done.stderr
    assert not out.with_name("out.sig").exists()


def test_a_key_with_a_password_takes_it_from_the_environment(
    out: Path, keys: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "elsewhere.sig"
    command = ("sign", out, "--key", keys["locked"], "--signature", place)
    assert run(*command).exit_code == 2
    done = run(*command, "--password-env", "NOWHERE_SET")
    assert done.exit_code == 2 and "no environment variable NOWHERE_SET" in done.stderr
    assert run(*command, "--password-env", "SECRET", SECRET="wrong").exit_code == 2
    done = run(*command, "--password-env", "SECRET", SECRET="open sesame")
    assert done.exit_code == 0, done.stderr
    assert "open sesame" not in done.output
    check = ("verify", out, "--key", keys["locked.pub"], "--signature", place)
    assert run(*check).exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.sig", "out"]


def test_without_the_library_the_extra_is_named(
    out: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    done = run("sign", out, "--key", keys["ours"])
    assert done.exit_code == 3 and "adaptrix-export[sign]" in done.stderr
