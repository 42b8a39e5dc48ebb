"""The oracle of gates: PyTorch carries out the plan with forward hooks on PEFT's live layers.

A hooked layer's own output is y0 + d, its base layer's y0, and the gate is computed from these in
fp64 by the formula, with nothing of the graph's function. The hooks exist inside the check only,
and what they note of one question is gone at the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from adaptrix_export.errors import ParityError
from adaptrix_export.oracle.job import GateSpec
from adaptrix_export.oracle.live import live_parameter
from adaptrix_export.plan import clamp_slope

Statistics = dict[str, list[float]]  # name of a statistic -> a number a gated site
STATISTICS = ("gate_mean", "gate_min", "clamped")


class LiveGates:
    """Forward hooks on the gated layers of the plain model inside a PEFT model."""

    def __init__(self, plain: Any, gates: Sequence[GateSpec]) -> None:
        self._plain = plain
        self._gates = {gate.site: gate for gate in gates}
        self._seen: dict[str, list[Any]] = {}
        self._handles = [
            self._layer(gate.site).register_forward_hook(self._hook(gate)) for gate in gates
        ]

    def remove(self) -> None:
        """The layers are as they were."""
        for handle in self._handles:
            handle.remove()

    def _layer(self, site: str) -> Any:
        layer = self._plain.get_submodule(site)
        if not hasattr(layer, "get_base_layer"):
            raise ParityError(site, "a gate on a module without an adapter", "an adapted module")
        return layer

    def _hook(self, gate: GateSpec) -> Any:
        def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            y0 = layer.get_base_layer()(*inputs)
            d = (output - y0).double()
            opened = openness(gate, y0.double(), d)
            self._seen.setdefault(gate.site, []).append(opened.reshape(-1))
            return (y0.double() + opened * d).to(output.dtype)

        return hook

    def forget(self) -> None:
        """What was seen so far is of no interest: a new question begins."""
        self._seen.clear()

    def statistics(self) -> Statistics:
        """Over every token since `forget`: mean and least gate, and the share that was clamped."""
        by_name: Statistics = {name: [] for name in STATISTICS}
        for site, gate in self._gates.items():
            if not gate.depends_on_data:
                continue
            every = torch.cat(self._seen[site])
            by_name["gate_mean"].append(float(every.mean()))
            by_name["gate_min"].append(float(every.min()))
            by_name["clamped"].append(float((every < 1).double().mean()))
        return by_name

    def parameter(self, name: str) -> tuple[Any, bool] | None:
        """The fp64 parameter `name` of a gated module as the artifact holds it, and whether an
        adapter acts on it; None for what is not a gated module's.

        The base's own where the gate depends on the data, and beside it the live layer's factors,
        `lora_A.n` and the scaled `lora_B.n` of its n-th active adapter.
        """
        site, _, attribute = name.rpartition(".")
        if attribute.isdecimal():
            site, _, factor = site.rpartition(".")
            return (self._factor(site, factor, int(attribute)), True)
        gate = self._gates.get(site)
        if gate is None:
            return None
        value = getattr(self._layer(site).get_base_layer(), attribute).detach().double()
        if gate.weight is None:
            return value, False
        merged, changed = live_parameter(self._plain, name)
        return value + gate.weight * (merged - value), changed

    def _factor(self, site: str, factor: str, number: int) -> Any:
        layer = self._layer(site)
        name = [a for a in layer.active_adapters if a in layer.lora_A][number]
        if factor == "lora_A":
            return layer.lora_A[name].weight.detach().double()
        return layer.scaling[name] * layer.lora_B[name].weight.detach().double()


def openness(gate: GateSpec, y0: Any, d: Any) -> Any:
    """g of each token, (..., 1), for y0 and d (..., outputs) in fp64; every token is a real one.

    Where the base gives nothing, |y0| = 0, a clamp lets nothing through.
    """
    if gate.mode == "blend":
        return torch.full_like(y0[..., :1], gate.weight or 0.0)
    if gate.mode == "mask":
        return torch.ones_like(y0[..., :1])
    assert gate.tau is not None
    size = d.norm(dim=-1, keepdim=True)
    limit = clamp_slope(gate.tau, y0.shape[-1]) * y0.norm(dim=-1, keepdim=True)
    opened = torch.where(size <= limit, torch.ones_like(size), limit / size)
    return torch.where(limit > 0, opened, torch.zeros_like(size))


def compare_statistics(
    oracle: Mapping[str, Sequence[float]], artifact: Mapping[str, Sequence[float]], tokens: int
) -> dict[str, Any]:
    """The report's entry: gates within GATE of the oracle's, the share of clamped tokens within
    BORDER tokens of it, for a token at the border may fall on either side.

    NaN, and another number of sites than the oracle's, are within nothing: None in the entry.
    """
    mean, least, clamped = (_furthest(oracle[name], artifact[name]) for name in STATISTICS)
    worst = None if mean is None or least is None else max(mean, least)
    passed = worst is not None and worst <= GATE
    passed = passed and clamped is not None and clamped * tokens <= BORDER + 0.5
    return {"tokens": tokens, "max_abs": worst, "clamped": clamped, "passed": passed}


def _furthest(oracle: Sequence[float], artifact: Sequence[float]) -> float | None:
    if len(oracle) != len(artifact):
        return None
    furthest = float(np.max(np.abs(np.subtract(oracle, artifact))))
    return furthest if np.isfinite(furthest) else None


# fp32 gates differ by 1e-6 from fp64 ones where d is not tiny beside y0; states that reach a deep
# layer differ by up to 1e-4 themselves. A tau that is 5% off moves a clamped gate by 5%.
GATE = 2e-3
BORDER = 3
