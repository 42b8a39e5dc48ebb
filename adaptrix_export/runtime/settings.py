"""What an artifact's config files say of its answers: where they end, how long a text may be."""

from __future__ import annotations

from typing import Any

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.files import ArtifactFiles
from adaptrix_export.runtime.requests import whole_number


def read_eos_ids(files: ArtifactFiles) -> frozenset[int]:
    """From generation_config.json, which may know more end tokens than config.json."""
    for name in ("generation_config.json", "config.json"):
        eos = files.read(name).get("eos_token_id")
        if eos is not None:
            place = f"{files.folder / name}: eos_token_id"
            ids = eos if isinstance(eos, list) else [eos]
            return frozenset(whole_number(place, token) for token in ids)
    return frozenset()


def read_context_length(files: ArtifactFiles) -> int | None:
    """In tokens, prompt and answer together; None where no file says it."""
    length, key = None, "model.context_length"
    name = "genai_config.json"
    model = files.read(name).get("model", {})
    if not isinstance(model, dict):
        raise SourceError(f"{files.folder / name}: model", repr(model)[:60], "an object")
    length = model.get("context_length")
    if length is None:  # a graph that genai cannot run
        name = "config.json"
        config: dict[str, Any] = files.read(name)
        key = "max_position_embeddings" if config.get("max_position_embeddings") else "n_positions"
        length = config.get(key)
    return None if length is None else whole_number(f"{files.folder / name}: {key}", length, 1)
