"""Taps: the place of a module in a graph, proved by a side branch against PyTorch and PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.graph.expression import TensorRef
from adaptrix_export.graph.frontends.native import native
from adaptrix_export.graph.graph import Graph
from adaptrix_export.graph.rewrite.taps import (
    Tap,
    bound,
    columns_of,
    joined,
    low_rank,
    replace_uses,
    taps,
)
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.plan import Plan, Site
from adaptrix_export.targets.merged_onnx import Values
from tests.tiny import live, save_adapter, save_base

KINDS = ["llama", "qwen3", "gpt2"]


def _wired(plan: Plan, graph: Graph, adapter: Path, found: dict[Site, Tap]) -> Graph:
    """Every LoRA of the adapter as a side branch, added to the outputs of the unmerged modules."""
    fixed: dict[str, np.ndarray] = {}
    weights = dict(graph.weights)
    opened = open_adapter(str(adapter), plan.base)
    deltas = {}
    for delta in opened.deltas:
        (term,), name = delta.terms, delta.site.path
        fixed[f"{name}.a"] = term.a.read().T
        fixed[f"{name}.b"] = np.float32(term.scale) * term.b.read().T
        a, b = (
            bound(graph.model, weights, n, fixed[n].shape, TensorRef(n))
            for n in (f"{name}.a", f"{name}.b")
        )
        deltas[delta.site] = low_rank(graph.model, found[delta.site], a, b, name)
    by_value: dict[int, list[Site]] = {}
    for site, tap in found.items():
        by_value.setdefault(id(tap.pieces[0].value), []).append(site)
    for sites in by_value.values():
        first = found[sites[0]].pieces[0]
        ranges = {found[s].pieces[0].columns: s for s in sites}
        parts, nodes = columns_of(
            graph.model, first.value, first.width, ranges, f"{sites[0].path}.cut"
        )
        new = []
        for where, part in parts.items():
            site = ranges.get(where)
            if site is not None:
                nodes.append(ir.node("Add", [part, deltas[site]]))
                part = nodes[-1].outputs[0]
                part.name = f"{site.path}.added"
            new.append(part)
        made, join = joined(new, f"{sites[0].path}.joined")
        graph.model.graph.extend([*nodes, *join])
        replace_uses(graph.model, first.value, made, [*nodes, *join])
    graph.model.graph.sort()
    for name, expression in weights.items():
        value = graph.model.graph.initializers[name]
        array = fixed[name] if name in fixed else Values(plan)(expression)
        value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
    return graph


@pytest.mark.parametrize("kind", KINDS)
def test_side_branches_at_every_tap_are_the_live_model(kind: str, tmp_path: Path) -> None:
    base = save_base(kind, tmp_path / "base", initializer_range=0.15)
    adapter = save_adapter(base, tmp_path / "adapter")
    plan = Plan(open_base(str(base)), ())
    sites = [d.site for d in open_adapter(str(adapter), plan.base).deltas]
    graph = native(plan, "cpu")
    found = taps(plan, graph, sites)
    assert len(found) == len(sites) >= 16
    model = _wired(plan, graph, adapter, found).model
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    ids = np.random.default_rng(0).integers(0, 300, (2, 11))
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids),
           "position_ids": np.arange(11)[None].repeat(2, 0)}  # fmt: skip
    for value in session.get_inputs():
        if value.name.startswith("past"):
            fed[value.name] = np.zeros([2, value.shape[1], 0, value.shape[3]], np.float32)
    fed = {n: v for n, v in fed.items() if n in {i.name for i in session.get_inputs()}}
    logits = session.run(["logits"], fed)[0]
    with torch.inference_mode():
        wanted = live(base, adapter)(input_ids=torch.from_numpy(ids)).logits.numpy()
        plain = live(base, adapter).unload()(input_ids=torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits - wanted).max() < 1e-4
    assert np.abs(plain - wanted).max() > 0.1  # the branches do something


def test_packed_modules_have_their_own_columns(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    plan = Plan(open_base(str(base)), ())
    graph = native(plan, "cpu")
    names = ("q_proj", "k_proj", "v_proj")
    found = taps(plan, graph, [Site("model.layers", 1, f"self_attn.{n}") for n in names])
    pieces = [tap.pieces[0] for tap in found.values()]
    assert [p.columns for p in pieces] == [(0, 64), (64, 96), (96, 128)]
    assert {p.width for p in pieces} == {128} and len({id(p.value) for p in pieces}) == 1


def test_a_fused_module_is_one_piece_with_its_bias(tmp_path: Path) -> None:
    base = save_base("gpt2", tmp_path / "base")
    plan = Plan(open_base(str(base)), ())
    site = Site("transformer.h", 2, "attn.c_attn")
    (tap,) = taps(plan, native(plan, "cpu"), [site]).values()
    (piece,) = tap.pieces
    assert piece.columns == piece.rows == (0, 192) and piece.biased
    assert (tap.inputs, tap.outputs, tap.flat) == (64, 192, False)


def test_the_tied_head_is_tapped_at_its_own_end(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    plan = Plan(open_base(str(base)), ())
    graph = native(plan, "cpu")
    (tap,) = taps(plan, graph, [Site("", None, "lm_head")]).values()
    assert tap.pieces[0].value.name == "logits" and tap.outputs == 300


@pytest.mark.parametrize(
    ("kind", "site", "why"),
    [
        ("llama", Site("", None, "model.embed_tokens"), "Gather"),
        ("llama", Site("model.layers", 0, "input_layernorm"), "shape"),
        ("mixtral", Site("model.layers", 0, "mlp.gate"), None),
    ],
)
def test_what_cannot_be_tapped_is_named(
    kind: str, site: Site, why: str | None, tmp_path: Path
) -> None:
    base = save_base(kind, tmp_path / "base")
    plan = Plan(open_base(str(base)), ())
    graph = native(plan, "cpu")
    if why is None:  # the router is a plain MatMul
        assert taps(plan, graph, [site])[site].outputs == 4
        return
    with pytest.raises(UnsupportedError, match=why) as caught:
        taps(plan, graph, [site])
    assert site.path in str(caught.value)
