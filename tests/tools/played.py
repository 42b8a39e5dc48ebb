"""Artifacts with what they answered where they were built, played again by another runtime.

    python -m tests.tools.played --make FOLDER      builds them, with torch and the whole compiler
    python -m tests.tools.played FOLDER/NAME        plays one, with the runtime alone

An ONNX Runtime older than a session or the graph asks for must be refused as too old; the graph is
then played without the runtime, where its manifest says that it can be.
Decoders answer through the runtime's Session: greedy tokens of a prompt, and its logits, with each
adapter and without; an encoder through ONNX Runtime, its states of a padded batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = [5, 17, 42, 7, 99, 23, 11, 64]
NEW = 8
CLOSE = 1e-5  # releases of ONNX Runtime differ in the last bits
KINDS: dict[str, dict[str, Any]] = {  # name -> fields of a recipe
    "native": {"target": "onnx", "frontend": "native"},
    "traced": {"target": "onnx", "frontend": "traced"},
    "slots": {"target": "onnx-switchable", "frontend": "native"},
    "rows": {"target": "onnx-switchable", "frontend": "native", "rows": True},
    "gated": {"target": "onnx", "frontend": "native", "context": {"tau": 0.25}},
    "int4": {"target": "onnx", "frontend": "native", "precision": "int4"},
    "int8": {"target": "onnx", "frontend": "native", "precision": "int8"},
    "encoder": {"target": "onnx", "frontend": "native", "task": "feature-extraction"},
}
ARTIFACT, TOKENS, LOGITS = "artifact", "tokens.json", "logits.npz"


def main(arguments: list[str]) -> int:
    if arguments[0] == "--make":
        make(Path(arguments[1]))
        return 0
    return play(Path(arguments[0]))


def play(folder: Path) -> int:
    import onnxruntime

    from adaptrix_export.runtime.requirement import OLDEST

    artifact = folder / ARTIFACT
    stored = np.load(folder / LOGITS)
    needs = json.loads((artifact / "manifest.json").read_text())["onnxruntime"]["minimum"]
    here = release(onnxruntime.__version__)
    runs, opens = here >= release(needs), here >= max(release(needs), release(OLDEST))
    if not opens and not is_encoder(artifact) and not refused(artifact):
        print(f"{folder.name}: a session was made, in an ONNX Runtime too old for it")
        return 1
    if not runs:
        print(f"{folder.name}: needs {needs}")
        return 0
    if is_encoder(artifact):
        return judged(folder, {"states": (states(artifact), stored["states"])})
    if not opens:
        return judged(folder, {"None": (prefilled(artifact), stored["None"])})
    tokens, logits = answers(artifact)
    expected = json.loads((folder / TOKENS).read_text())
    if tokens != expected:
        print(f"{folder.name}: {tokens}, expected {expected}")
        return 1
    return judged(folder, {name: (logits[name], stored[name]) for name in stored.files})


def refused(artifact: Path) -> bool:
    """Whether a session says that this ONNX Runtime is too old."""
    from adaptrix_export.errors import SourceError
    from adaptrix_export.runtime import Session

    try:
        Session(artifact, threads=1)
    except SourceError as error:
        return "this ONNX Runtime is too old" in str(error)
    return False


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def judged(folder: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
    """0 where every answer is as near to the one recorded as releases may differ."""
    apart = {name: float(np.abs(here - stored).max()) for name, (here, stored) in pairs.items()}
    print(folder.name, apart)
    return 0 if apart and max(apart.values()) <= CLOSE else 1


def is_encoder(artifact: Path) -> bool:
    return bool(json.loads((artifact / "config.json").read_text())["model_type"] == "bert")


def graph_of(artifact: Path) -> Any:
    """A session of ONNX Runtime over the artifact's graph, nothing of ours around it."""
    import onnxruntime

    places = (artifact / "model.onnx", artifact / "onnx" / "model.onnx")
    path = next(place for place in places if place.exists())
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def prefilled(artifact: Path) -> np.ndarray:
    """Logits of the prompt after an empty cache."""
    session = graph_of(artifact)
    ids = np.array([PROMPT], dtype=np.int64)
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    fed["position_ids"] = np.arange(len(PROMPT), dtype=np.int64)[None]
    fed["adapter_ids"] = np.array([-1], dtype=np.int64)  # of a graph with rows: no adapter
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            _, heads, _, size = value.shape
            fed[value.name] = np.zeros((1, heads, 0, size), dtype=np.float32)
    wanted = {value.name for value in session.get_inputs()}
    given = {name: value for name, value in fed.items() if name in wanted}
    return np.asarray(session.run(["logits"], given)[0])


def answers(artifact: Path) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """Tokens and logits by adapter; an encoder has states alone."""
    if is_encoder(artifact):
        return {}, {"states": states(artifact)}
    from adaptrix_export.runtime import Session

    session = Session(artifact, threads=1)
    tokens, logits = {}, {}
    for name in (None, *session.adapters):
        tokens[str(name)] = session.generate_ids(PROMPT, NEW, adapter=name)
        logits[str(name)] = session.logits([PROMPT], adapter=name)
    return tokens, logits


def states(artifact: Path) -> np.ndarray:
    """Last hidden states of the real tokens of two rows, the second padded on the left."""
    session = graph_of(artifact)
    ids = np.array([PROMPT, [0, 0, 0, *PROMPT[:5]]], dtype=np.int64)
    fed = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    fed["token_type_ids"] = np.zeros_like(ids)
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: value for name, value in fed.items() if name in wanted})[0]
    return np.asarray(found[ids > 0])


def make(folder: Path) -> None:
    from adaptrix_export.pipeline import build
    from adaptrix_export.recipe import Recipe
    from tests.artifacts import save_base_with_tokenizer
    from tests.tiny import save_adapter, save_base

    for name, options in KINDS.items():
        kind = "bert" if name == "encoder" else "llama"
        made = folder / name
        save = save_base if kind == "bert" else save_base_with_tokenizer
        base = save(kind, made / "base")
        adapter = save_adapter(base, made / "adapter")
        build(
            Recipe(
                base=str(base), adapters=[str(adapter)], out=made / ARTIFACT,
                parity={"level": "off"},  # other tests prove them
                **options,
            )
        )  # fmt: skip
        tokens, logits = answers(made / ARTIFACT)
        (made / TOKENS).write_text(json.dumps(tokens))
        np.savez(made / LOGITS, **logits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
