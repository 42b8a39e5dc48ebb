"""The model card of an artifact, README.md of its repository: metadata, proof, how to load it."""

from __future__ import annotations

from typing import Any

from adaptrix_export.show.facts import Facts
from adaptrix_export.show.load_code import snippets
from adaptrix_export.show.sections import number, size, verdict

_LIBRARIES = {"safetensors": "transformers", "peft": "peft"}  # every graph: transformers.js


def model_card(facts: Facts, repo: str, licence: str | None = None) -> str:
    """The card; `licence` is an identifier of the hub, such as apache-2.0."""
    lines = ["---", _yaml(_metadata(facts, licence)), "---", ""]
    lines += [f"# {repo.rpartition('/')[2]}", "", _sentence(facts), ""]
    proof = verdict(facts)
    lines += ["## Proof", "", f"**{proof.title}.** {proof.text}", ""]
    if facts.cases:
        lines += ["| case | positions | max abs | bound |", "|---|---|---|---|"]
        lines += [
            f"| {case.name} | {case.positions} | {number(case.max_abs)} | "
            f"{case.tolerance.max_abs:g} |"
            for case in facts.cases
        ]
        lines.append("")
    lines += ["## How to load it", ""]
    for snippet in snippets(facts, repo):
        lines += [f"{snippet.client}:", "", f"```{snippet.language}", snippet.code, "```", ""]
    lines += ["## What it was made from", "", "| source | file | sha256 |", "|---|---|---|"]
    lines += [
        f"| {_cell(i.spec)} | {_cell(i.file)} | `{i.sha256}` |" for i in facts.manifest.inputs
    ]
    pinned = facts.manifest.revisions
    lines += ["", *(f"- {spec} at {commit}" for spec, commit in sorted(pinned.items()))]
    return "\n".join(lines).rstrip() + "\n"


def _metadata(facts: Facts, licence: str | None) -> dict[str, Any]:
    recipe = facts.manifest.recipe
    named = [_hub_id(str(recipe["base"]))]
    adapters = [_hub_id(str(a["source"])) for a in recipe["adapters"]]
    base_model = [name for name in (*named, *adapters) if name]
    metadata: dict[str, Any] = {
        "library_name": _LIBRARIES.get(facts.target, "transformers.js"),
        "pipeline_tag": facts.task,
        "tags": ["adaptrix-export", facts.target, "lora", *(["onnx"] if facts.graph else [])],
    }
    if base_model:
        metadata["base_model"] = base_model
        metadata["base_model_relation"] = "adapter" if facts.target == "peft" else "merge"
    if licence:
        metadata["license"] = licence
    return metadata


def _sentence(facts: Facts) -> str:
    recipe = facts.manifest.recipe
    how = "switchable beside" if facts.switchable else "merged into"
    names = ", ".join(f"`{a['name']}` ({a['source']})" for a in recipe["adapters"])
    method = (facts.manifest.composition or {}).get("method")
    composed = f", composed by {method}" if method and len(recipe["adapters"]) > 1 else ""
    return (
        f"{names} {how} `{recipe['base']}`{composed}, {facts.manifest.precision}, "
        f"{size(facts.total_bytes)}. Made by adaptrix-export {facts.manifest.tool.version}; "
        "`report.html` shows it all."
    )


def _hub_id(spec: str) -> str | None:
    """`hf:org/name/...@revision` -> org/name; None for what is not on the hub."""
    if not spec.startswith("hf:"):
        return None
    return "/".join(spec.removeprefix("hf:").partition("@")[0].split("/")[:2])


def _yaml(metadata: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True).rstrip()


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|")
