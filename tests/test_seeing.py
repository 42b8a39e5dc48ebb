"""A vision-language model as three graphs, asked with an image in prefill and decode."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from adaptrix_export.errors import UnsupportedError
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from adaptrix_export.runtime.layout import located
from tests.any_model import KINDS, save_kind
from tests.tools.zoo import EXACT, compare, house, live
from tests.tools.zoo_rows import ANIMALS

GRAPHS = ("embed_tokens.onnx", "vision_encoder.onnx", "decoder_model_merged.onnx")


def spoil(folder, file):
    """Turn the sign of one matrix of this graph."""
    path = located(folder, file)
    initializers = sorted(ir.load(path).graph.initializers.items())
    stored = [v.const_value for _, v in initializers if len(v.const_value.shape) == 2]
    tensor = next(t for t in reversed(stored) if isinstance(t, ir.ExternalTensor))
    data = path.parent / tensor.location
    whole = bytearray(data.read_bytes())
    whole[tensor.offset : tensor.offset + tensor.nbytes] = (-tensor.numpy()).tobytes()
    data.write_bytes(whole)


@pytest.mark.slow
def test_a_text_adapter_under_its_old_names_and_what_its_check_sees(tmp_path):
    """Keys as transformers wrote them before 4.52 are those of today; a row of a matrix of the
    vision encoder, or of the decoder, that is off is seen."""
    animal = next(a for a in ANIMALS if a.kind == "llava")
    housed = house(animal, tmp_path)
    base, adapted = live(housed)
    file = housed.adapter / "adapter_model.safetensors"
    keys = load_file(file)
    renamed = {
        k.replace(".model.language_model.layers.", ".language_model.model.layers."): v
        for k, v in keys.items()
    }
    assert len(renamed) == len(keys) and not set(renamed) & set(keys)
    save_file(renamed, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    outcome = build(
        Recipe(base=str(housed.base), adapters=(str(housed.adapter),), target="onnx", out=out)
    )
    assert outcome.report["passed"]
    assert [c["name"] for c in outcome.report["cases"]] == [
        "image features", "prefill with an image", "decode after an image", "batch of images"
    ]  # fmt: skip
    assert all(located(out, graph).is_file() for graph in GRAPHS)
    error, effect, _ = compare(animal, "onnx", out, base, adapted)
    assert error <= EXACT and effect > 1e-2
    for graph in GRAPHS[1:]:
        data = located(out, graph).with_suffix(".onnx_data")
        whole = data.read_bytes()
        spoil(out, graph)
        assert compare(animal, "onnx", out, base, adapted)[0] > 10 * EXACT, graph
        data.write_bytes(whole)


@pytest.mark.parametrize(
    "name", ["Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]
)
def test_types_whose_images_are_put_in_otherwise_are_refused_by_name(tmp_path, name):
    row = next(kind for kind in KINDS if kind.cls == name)
    base, adapter = save_kind(row, tmp_path)
    recipe = Recipe(base=str(base), adapters=(str(adapter),), target="onnx", out=tmp_path / "out")
    with pytest.raises(UnsupportedError, match=rf"target onnx: {name}.*--target safetensors"):
        build(recipe)
