"""What an artifact of a redistributed plan keeps of it: the adapter itself, for the oracle.

The oracle of such a plan is stock PEFT on the base and the redistributed adapter, so a copy of that
adapter is published with the artifact; `verify` proves the artifact against it later on.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from adaptrix_export.load import open_adapter
from adaptrix_export.package.documents import ManifestDocument
from adaptrix_export.plan import Plan
from adaptrix_export.recipe.targets import Form, facts_of
from adaptrix_export.targets.artifact import Artifact

KEPT = "redistributed"  # the folder in the artifact, with one folder for each adapter
FILES = ("adapter_config.json", "adapter_model.safetensors")


def keep_redistributed(plan: Plan, artifact: Artifact) -> None:
    """Copy the redistributed adapters into the artifact, which for target peft has them already."""
    if not plan.redistributed or facts_of(artifact.target).form is Form.ADAPTER:
        return
    for adapter in plan.adapters:
        place = artifact.folder / KEPT / adapter.name
        place.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(adapter.folder / name, place / name)


def kept_plan(original: Plan, folder: Path) -> Plan:
    """The original plan with the adapters that a published artifact keeps, if it does."""
    home = folder / KEPT
    if not home.is_dir():
        return original
    adapters = tuple(
        open_adapter(str(place), original.base, place.name) for place in sorted(home.iterdir())
    )
    return replace(original, adapters=adapters, adjustments=(), redistributed=True)


def of_peft_folder(original: Plan, manifest: ManifestDocument, folder: Path) -> Plan:
    """The same for target peft: a redistributed artifact is its own adapter."""
    if not manifest.recipe.get("redistribute"):
        return original
    adapter = open_adapter(str(folder), original.base, original.adapters[0].name)
    return replace(original, adapters=(adapter,), adjustments=(), redistributed=True)
