"""Switchable artifacts of tiny models: three adapters of different ranks and targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptrix_export.graph.expression import expressions_of
from adaptrix_export.oracle.job import Job
from adaptrix_export.pipeline import Outcome, build
from adaptrix_export.progress import Silent
from adaptrix_export.prove.child import run
from adaptrix_export.recipe import Recipe
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import save_adapter

# Weights so large that adapters change what greedy decoding says.
LOUD = {"initializer_range": 0.15}
ATTENTION = {"gpt2": ["c_attn"]}
MLP = {"gpt2": ["mlp.c_proj"]}


@dataclass(frozen=True)
class Switchable:
    base: Path
    adapters: dict[str, Path]
    out: Path
    outcome: Outcome

    def proof(self, **changed: Any) -> dict[str, Any]:
        """The report of the artifact as it is now, made in this process."""
        settings: dict[str, Any] = {
            "adapters": tuple(self.adapters.items()),
            "weights": expressions_of(self.outcome.manifest["weights"]),
            "level": "fast",
            **changed,
        }
        job = Job("onnx-switchable", self.out, self.base, "fp32", **settings)
        return run(job, Silent())


def save_three(kind: str, base: Path, folder: Path) -> dict[str, Path]:
    """Ranks 4, 8 and 16 on different modules: `all` (rsLoRA), `attention` and `mlp`."""
    attention = ATTENTION.get(kind, ["q_proj", "v_proj"])
    mlp = MLP.get(kind, ["up_proj", "down_proj"])
    options: dict[str, dict[str, Any]] = {
        "attention": {"r": 4, "lora_alpha": 64, "target_modules": attention},
        "all": {"r": 8, "use_rslora": True},
        "mlp": {"r": 16, "lora_alpha": 256, "target_modules": mlp, "layers_to_transform": [1, 3]},
    }
    return {
        name: save_adapter(base, folder / name, seed=seed, **chosen)
        for seed, (name, chosen) in enumerate(options.items(), 1)
    }


def recipe(base: Path, adapters: dict[str, Path], out: Path, **changed: Any) -> Recipe:
    sources = [{"name": name, "source": str(path)} for name, path in adapters.items()]
    settings = {"target": "onnx-switchable", "parity": {"decode_steps": 12}, **changed}
    return Recipe(base=str(base), adapters=sources, out=out, **settings)


def switchable(kind: str, folder: Path, **changed: Any) -> Switchable:
    base = save_base_with_tokenizer(kind, folder / "base", **LOUD)
    adapters = save_three(kind, base, folder)
    outcome = build(recipe(base, adapters, folder / "out", **changed))
    return Switchable(base, adapters, folder / "out", outcome)
