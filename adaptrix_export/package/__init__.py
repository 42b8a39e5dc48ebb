"""What lies beside the weights, the manifest over all of it, and the one step that publishes it."""

from adaptrix_export.package.content import write_package
from adaptrix_export.package.manifest import (
    Problem,
    build_manifest,
    check_hashes,
    read_manifest,
    write_manifest,
)
from adaptrix_export.package.model_config import portable_config
from adaptrix_export.runtime.files import MANIFEST
from adaptrix_export.save.hashes import InputHashes, hash_file
from adaptrix_export.save.staging import addition, install, publish, staging

__all__ = [
    "MANIFEST",
    "InputHashes",
    "Problem",
    "addition",
    "build_manifest",
    "check_hashes",
    "hash_file",
    "install",
    "portable_config",
    "publish",
    "read_manifest",
    "staging",
    "write_manifest",
    "write_package",
]
