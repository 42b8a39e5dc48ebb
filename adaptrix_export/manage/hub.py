"""An artifact on the Hugging Face hub: pushed as one commit, pulled and checked file by file.

The manifest decides what is sent and what is fetched, so that nothing is left out in silence and
nothing else comes along. What was sent before is not sent again: the hub knows files by sha256.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adaptrix_export.compat.huggingface_hub import ignored, transport_errors
from adaptrix_export.errors import InputError, MachineError, OutputError, SourceError
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.load.source import HubName, hub_name
from adaptrix_export.package.documents import ManifestDocument
from adaptrix_export.package.manifest import check_hashes, read_manifest
from adaptrix_export.progress import Progress, Silent
from adaptrix_export.runtime.files import MANIFEST
from adaptrix_export.save.staging import publish, staging

CARD = "README.md"  # of the repository: not part of the artifact


@dataclass(frozen=True)
class Pushed:
    """The repository, the commit or pull request, and how many files it has."""

    repo: str
    url: str
    files: int


def push(
    folder: Path,
    repo: str,
    card: str,
    revision: str | None = None,
    pull_request: bool = False,
    private: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Send an artifact and its card to a model repository, which is made if it is not there.

    `revision` is a branch, made likewise. Raises OutputError for an artifact that is not what its
    manifest says, InputError where the hub refuses, MachineError where it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    progress = progress or Silent()
    manifest = read_manifest(folder)
    with progress.stage("hashes"):
        problems = check_hashes(folder)
    if problems:
        raise OutputError(
            f"{folder}: {problems[0].file}", problems[0].found, problems[0].expected,
            "build it again; nothing was sent",
        )  # fmt: skip
    api = HfApi()
    names = [*sorted(manifest.outputs), MANIFEST]
    with _refusals(f"hf:{repo}"), progress.stage("push", len(names) + 1, "files") as advance:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None and not pull_request:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names
        ]
        operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
        made = api.create_commit(
            repo,
            operations,
            commit_message=f"adaptrix-export: {manifest.target}",
            revision=revision,
            create_pr=pull_request,
        )
        left_out = [operation.path_in_repo for operation in operations if ignored(operation)]
        if left_out:
            raise InputError(
                f"hf:{repo}", f"its .gitignore left out {left_out[0]}", "every file",
                "change the .gitignore of the repository and push again",
            )  # fmt: skip
        advance(len(operations))
    return Pushed(repo, str(made.pr_url or made.commit_url), len(operations))


def pull(spec: str, out: Path, progress: Progress | None = None) -> ManifestDocument:
    """Fetch an artifact into the new folder `out`; returns its manifest.

    Only what the manifest lists is fetched, and every byte is checked against it before the folder
    appears. Raises SourceError for a repository without a manifest, or with other files than it
    lists.
    """
    progress = progress or Silent()
    source = hub_name(spec)
    with scratch_folder("hub") as scratch, _refusals(spec):
        manifest_path = _fetch(source, MANIFEST)
        shutil.copyfile(manifest_path, scratch / MANIFEST)
        manifest = read_manifest(scratch)
    size = sum(file.bytes for file in manifest.outputs.values())
    with staging(out, size) as stage, _refusals(spec):
        shutil.copyfile(manifest_path, stage / MANIFEST)
        with progress.stage("pull", size, "B") as advance:
            for name, file in manifest.outputs.items():
                place = stage / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(_fetch(source, name), place)
                advance(file.bytes)
        problems = check_hashes(stage)
        if problems:
            raise SourceError(
                f"{spec}: {problems[0].file}", problems[0].found, problems[0].expected,
                "push it again; nothing was kept",
            )  # fmt: skip
        publish(stage, out)
    return manifest


def _fetch(source: HubName, name: str) -> str:
    from huggingface_hub import hf_hub_download

    inside = f"{source.inside}/{name}" if source.inside else name
    return str(hf_hub_download(source.repo, inside, revision=source.revision))


@contextmanager
def _refusals(place: str) -> Iterator[None]:
    """What huggingface_hub raises, by our names."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise SourceError(place, why, "the hub, or a copy in the cache") from error
    except EntryNotFoundError as error:
        raise SourceError(
            place, f"no such file ({error})", "an artifact that was pushed"
        ) from error
    except HFValidationError as error:
        raise InputError(place, f"not a hub id ({error})", "org/name") from error
    except HfHubHTTPError as error:
        raise InputError(
            place, f"the hub refused ({error})", "a repository and a token that may write to it",
            "set HF_TOKEN, or log in with `hf auth login`",
        ) from error  # fmt: skip
    except transport_errors() as error:
        raise MachineError(place, f"the hub cannot be reached ({error})", "a connection") from error
