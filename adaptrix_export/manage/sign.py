"""Signatures of artifacts: offline keys, in the format of the library model-signing (OpenSSF).

The signature covers every file of the folder by its hash, the manifest among them, and lies beside
the folder, so that the artifact stays as it was built. Whoever has the library can check it without
this package: `model_signing verify key ARTIFACT --signature FILE --public_key KEY`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from adaptrix_export.errors import OutputError, SourceError, VerificationError
from adaptrix_export.load.files.regular import require_regular
from adaptrix_export.package import check_hashes, read_manifest
from adaptrix_export.save.staging import finish_addition

SUFFIX = ".sig"


def signature_of(folder: Path) -> Path:
    """Where the signature of an artifact lies by default: `out.sig` beside `out`."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(folder.name + SUFFIX)


def sign_artifact(
    folder: Path, key: Path, signature: Path | None = None, password: str | None = None
) -> Path:
    """Sign an artifact with an elliptic curve key in PEM form; the file of the signature.

    Raises VerificationError for an artifact that is not what its manifest says, SourceError for a
    key that cannot be used, OutputError for a signature inside the artifact.
    """
    from model_signing import signing

    finish_addition(folder)
    read_manifest(folder)
    problems = check_hashes(folder)
    if problems:
        raise VerificationError(
            f"{folder}: {problems[0].file}", problems[0].found, problems[0].expected,
            "only an artifact as it was built is signed; build it again",
        )  # fmt: skip
    place = _outside(folder, signature)
    _require_key(key)
    # cryptography wants bytes, and model-signing 1.1 hands on what it gets
    secret: Any = None if password is None else password.encode()
    try:
        config = _config(signing).use_elliptic_key_signer(private_key=key, password=secret)
    except (ValueError, TypeError) as error:
        raise SourceError(
            str(key), f"cannot be used ({error})", "an elliptic curve key in PEM form",
            "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        ) from error  # fmt: skip
    handle, draft = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    os.close(handle)
    try:
        config.set_hashing_config(_every_file()).sign(folder, Path(draft))
        os.chmod(draft, 0o644)  # it is for others to read
        os.replace(draft, place)
    finally:
        Path(draft).unlink(missing_ok=True)
    return place


def check_signature(folder: Path, key: Path, signature: Path | None = None) -> Path:
    """Raise VerificationError unless the signature is by this public key, for these very files."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    place = signature or signature_of(folder)
    _require_key(key)
    if not place.is_file():
        raise SourceError(str(place), "no signature", "one", "name it with --signature")
    try:
        config = _config(verifying).use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError) as error:
        raise SourceError(
            str(key), f"cannot be used ({error})", "a public elliptic curve key in PEM form",
            "openssl ec -in key.pem -pubout -out key.pub",
        ) from error  # fmt: skip
    try:
        config.set_hashing_config(_every_file()).verify(folder, place)
    except InvalidSignature as error:
        raise VerificationError(
            str(place), "a signature by another key", f"one by {key}", "do not trust this artifact"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise VerificationError(
            f"{folder}: {place.name}", str(error)[:300] or type(error).__name__,
            "a signature for these files", "do not trust this artifact",
        ) from error  # fmt: skip
    return place


def _config(module: Any) -> Any:
    """A configuration of the library, which types its methods and not their making."""
    return module.Config()


def _require_key(key: Path) -> None:
    try:
        require_regular(key)
    except FileNotFoundError:
        raise SourceError(str(key), "nothing there", "a key", "check the spelling") from None


def _every_file() -> Any:
    """Links are refused, and files of git are files as others."""
    from model_signing import hashing

    plain = _config(hashing).use_file_serialization(hashing_algorithm="sha256")
    return plain.set_ignored_paths(paths=[], ignore_git_paths=False)


def _outside(folder: Path, signature: Path | None) -> Path:
    place = Path(os.path.abspath(signature)) if signature else signature_of(folder)
    inside = os.path.realpath(folder)
    if os.path.commonpath((inside, os.path.realpath(place))) == inside:
        raise OutputError(
            str(place), "inside the artifact", "a place outside of it",
            "an artifact has only the files that its manifest lists",
        )  # fmt: skip
    if not place.parent.is_dir():
        raise OutputError(str(place.parent), "no such folder", "one", "make it first")
    return place
