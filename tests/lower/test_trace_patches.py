"""What is done otherwise while a graph is traced and simplified."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxscript import optimizer
from transformers import AutoConfig, AutoModelForCausalLM

from adaptrix_export.load.task import GENERATION
from adaptrix_export.lower.trace_patches import exactly_matched, traceable
from tests.zoo_rows import ONE_TASK


def optimized(constant):
    """sqrt(x + constant) of zeros, after the optimizer."""
    graph = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y) <float small = {{{constant}}}>
        {{ s = Add(x, small)  y = Sqrt(s) }}"""
    )
    optimizer.optimize(graph)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    return session.run(None, {"x": np.zeros(2, np.float32)})[0]


@pytest.mark.parametrize("constant", ["1e-8", "1e-12"])
def test_a_small_epsilon_is_not_taken_for_zero(constant):
    with exactly_matched():
        assert np.allclose(optimized(constant), np.sqrt(float(constant)), rtol=1e-6)
    assert not optimized(constant).any(), "control: without the patch it is dropped"


def test_what_is_zero_is_still_dropped():
    graph = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y) <float nothing = {0.0}>
        { s = Add(x, nothing)  y = Sqrt(s) }"""
    )
    with exactly_matched():
        optimizer.optimize(graph)
    assert [node.op_type for node in graph.graph] == ["Sqrt"]


@pytest.mark.parametrize("kind", ["gpt_neo", "mpt"])
def test_pads_behind_a_row_take_no_part_in_windows_and_distances(kind):
    """A row, its pads, then more of it: as if the pads were not there, which stock code fails."""
    torch.manual_seed(0)
    config = next(animal.config for animal in ONE_TASK if animal.kind == kind)
    made = AutoConfig.for_model(kind, **config)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(3, 300, (1, 30))
    pads = torch.full((1, 5), 2)
    padded = torch.cat([ids[:, :20], pads, ids[:, 20:]], 1)
    mask = (padded != 2).long()
    mask[:, :20] = mask[:, 25:] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    asked = {"input_ids": padded, "attention_mask": mask}
    if kind == "gpt_neo":
        asked["position_ids"] = places
    with torch.no_grad():
        expected = model(ids).logits[:, 20:]
        stock = model(**asked).logits[:, 25:]
        with traceable(GENERATION):
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 20:]
            found = model(**asked).logits[:, 25:]
    assert (found - expected).abs().max() <= 1e-5
    assert (alone - expected).abs().max() <= 1e-5
    assert (stock - expected).abs().max() > 1e-3, "control: stock code counts the pads"
