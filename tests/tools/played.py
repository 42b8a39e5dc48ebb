"""Artifacts with what they answered where they were built, played again by another runtime.

    python -m tests.tools.played --make FOLDER      builds them, with torch and the whole compiler
    python -m tests.tools.played FOLDER/NAME        plays one, with the runtime alone

Decoders answer through the runtime's Session: greedy tokens of a prompt, and its logits, with each
adapter and without; an encoder through ONNX Runtime, its states of a padded batch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

PROMPT = [5, 17, 42, 7, 99, 23, 11, 64]
NEW = 8
CLOSE = 1e-5  # releases of ONNX Runtime differ in the last bits
ARTIFACT, TOKENS, LOGITS = "artifact", "tokens.json", "logits.npz"


def main(arguments: list[str]) -> int:
    if arguments[0] == "--make":
        make(Path(arguments[1]))
        return 0
    folder = Path(arguments[0])
    tokens, logits = answers(folder / ARTIFACT)
    expected = json.loads((folder / TOKENS).read_text())
    if tokens != expected:
        print(f"{folder.name}: {tokens}, expected {expected}")
        return 1
    stored = np.load(folder / LOGITS)
    apart = {name: float(np.abs(logits[name] - stored[name]).max()) for name in stored.files}
    print(folder.name, apart)
    return 0 if apart and max(apart.values()) <= CLOSE else 1


def answers(artifact: Path) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """Tokens and logits by adapter; an encoder has states alone."""
    config = json.loads((artifact / "config.json").read_text())
    if config["model_type"] == "bert":
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
    import onnxruntime

    from adaptrix_export.runtime.requirement import check_runtime

    path = next(
        p for p in (artifact / "model.onnx", artifact / "onnx" / "model.onnx") if p.exists()
    )
    check_runtime(path, onnxruntime.__version__)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
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

    rows = (
        ("native", "llama", "onnx", "native"),
        ("traced", "llama", "onnx", "traced"),
        ("slots", "llama", "onnx-switchable", "native"),
        ("encoder", "bert", "onnx", "native"),
    )
    for name, kind, target, frontend in rows:
        made = folder / name
        save = save_base if kind == "bert" else save_base_with_tokenizer
        base = save(kind, made / "base")
        adapter = save_adapter(base, made / "adapter")
        build(
            Recipe(
                base=str(base), adapters=[str(adapter)], target=target, out=made / ARTIFACT,
                frontend=frontend, task="feature-extraction" if kind == "bert" else "auto",
                parity={"level": "off"},  # other tests prove them
            )
        )  # fmt: skip
        tokens, logits = answers(made / ARTIFACT)
        (made / TOKENS).write_text(json.dumps(tokens))
        np.savez(made / LOGITS, **logits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
