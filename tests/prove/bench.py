"""Artifacts made by a route of their own, right or wrong as a test wants them.

Merging here is a dozen lines of numpy over the adapter's file, and graphs come straight from
mobius: no code of the package's lowering takes part, except `evaluate` of weight expressions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from adaptrix_export.graph.expression import Expression, Slice, TensorRef, Transpose
from adaptrix_export.oracle.job import Job
from tests.tiny import config_of

WIDTH, RANK, ALPHA = 64, 4, 7  # as tests/tiny.py has them
LOUD = {"initializer_range": 0.15}  # weights large enough that a wrong graph shows
Weights = dict[str, np.ndarray]


def merged(base: Path, *adapters: Path, scale: float = ALPHA / RANK, dtype: Any = None) -> Weights:
    """W + scale * B @ A in fp64, rounded once to `dtype` (default: as the base stores it)."""
    weights = load_file(base / "model.safetensors")
    exact = {name: value.astype(np.float64) for name, value in weights.items()}
    transposed = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    for adapter in adapters:
        factors = load_file(adapter / "adapter_model.safetensors")
        for key, a in factors.items():
            if ".lora_A" not in key:
                continue
            b = factors[key.replace("lora_A", "lora_B")].astype(np.float64)
            delta = scale * (b @ a.astype(np.float64))
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            exact[name] += delta.T if transposed else delta
    return {name: value.astype(dtype or weights[name].dtype) for name, value in exact.items()}


def gpt2_expressions(names: list[str]) -> dict[str, Expression]:
    """mobius splits GPT-2's fused c_attn and stores every weight (out, in)."""
    found: dict[str, Expression] = {}
    for name in names:
        module, parameter = name.rsplit(".", 1)
        part = {"q_proj": 0, "k_proj": 1, "v_proj": 2}.get(module.rsplit(".", 1)[-1])
        for ours, theirs in (
            ("attn.o_proj", "attn.c_proj"),
            ("mlp.up_proj", "mlp.c_fc"),
            ("mlp.down_proj", "mlp.c_proj"),
        ):
            if module.endswith(ours):
                source = TensorRef(f"{module.removesuffix(ours)}{theirs}.{parameter}")
                found[name] = Transpose((1, 0), source) if parameter == "weight" else source
        if part is not None:
            source = TensorRef(f"{module.rsplit('.', 1)[0]}.c_attn.{parameter}")
            axis, cut = (1, True) if parameter == "weight" else (0, False)
            piece = Slice(axis, part * WIDTH, (part + 1) * WIDTH, source)
            found[name] = Transpose((1, 0), piece) if cut else piece
    return {name: found.get(name, TensorRef(name)) for name in names}


def write_onnx(kind: str, weights: Weights, out: Path) -> dict[str, Expression]:
    """The graph as mobius builds it, GroupQueryAttention and all, with `weights` put in."""
    import mobius
    import onnx_ir as ir
    from mobius._config_resolver import _config_from_hf

    hf = config_of(kind, **LOUD)
    hf.dtype = "float32"
    cls = mobius.registry.get(kind)
    resolved = _config_from_hf(hf, module_class=cls)
    package = mobius.build_from_module(
        cls(resolved), resolved, "text-generation", execution_provider="cpu"
    )
    model = package["model"]
    empty = [n for n, v in model.graph.initializers.items() if v.const_value is None]
    expressions = gpt2_expressions(empty) if kind == "gpt2" else {n: TensorRef(n) for n in empty}
    have = dict(weights)
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    have.setdefault("lm_head.weight", have[embedding])
    for name, expression in expressions.items():
        values = np.ascontiguousarray(expression.evaluate(have.__getitem__))
        model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    out.mkdir(parents=True, exist_ok=True)
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    return expressions


def write_safetensors(base: Path, weights: Weights, out: Path) -> dict[str, Expression]:
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    return {name: TensorRef(name) for name in weights}


@dataclass(frozen=True)
class Bench:
    """A base and its adapter on disk, and the job that checks an artifact made from `weights`."""

    kind: str
    base: Path
    adapters: tuple[tuple[str, Path], ...]
    scratch: Path
    weights: Weights = field(repr=False)

    def job(self, target: str = "onnx", **options: Any) -> Job:
        out = self.scratch / target
        if target == "onnx":
            expressions = write_onnx(self.kind, self.weights, out)
        else:
            expressions = write_safetensors(self.base, self.weights, out)
        chosen: dict[str, Any] = {"precision": "fp32", "decode_steps": 12, "threads": 1} | options
        return Job(target, out, self.base, adapters=self.adapters, weights=expressions, **chosen)

    def changed(self, name: str, values: np.ndarray) -> Bench:
        return replace(self, weights=self.weights | {name: values})
