"""A handful of the zoo, and proof that the zoo sees a fault. All of it: `make zoo`."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from adaptrix_export.runtime.layout import located
from tests.tools import zoo
from tests.tools.zoo_rows import ANIMALS, Animal


def animal(kind: str, task: str = "") -> Animal:
    return next(a for a in ANIMALS if a.kind == kind and task in ("", a.task))


def spoil(folder: Path) -> None:
    """Change one weight of one layer by a little."""
    model = ir.load(located(folder, "model.onnx"))
    name = next(n for n in sorted(model.graph.initializers) if "layers.1" in n and "mlp" in n)
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    values = tensor.numpy().copy()
    values[0] += 0.05
    file = located(folder, "model.onnx").parent / tensor.location
    data = bytearray(file.read_bytes())
    data[tensor.offset : tensor.offset + tensor.nbytes] = values.tobytes()
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("tampered", [False, True], ids=["as built", "spoilt"])
def test_the_zoo_sees_a_fault(tampered):
    """Negative control: the same artifact, with one row of one matrix off by 0.05."""
    found = zoo.visit(animal("qwen3"), "onnx", "native", spoil if tampered else None)
    assert found.status == ("wrong" if tampered else "exact"), found
    assert found.error is not None and (found.error > 1e-2) == tampered


def test_a_verdict_needs_an_adapter_that_does_something(monkeypatch):
    monkeypatch.setattr(zoo, "compare", lambda *_: (0.0, 0.0, ""))
    found = zoo.visit(animal("llama"), "safetensors")
    assert found.status == "wrong" and "no effect" in found.detail


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["bloom", "roberta", "gpt_oss", "t5", "apertus", "bart", "m2m_100", "whisper", "smolvlm"],
)
def test_a_few_types_build_right_through_auto(kind):
    found = zoo.visit(animal(kind), "onnx")
    assert found.status == "exact" and found.frontend == "traced", found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [
    ("bert", "text-classification"), ("bert", "token-classification"),
    ("llama", "text-classification"),
])  # fmt: skip
def test_classifiers_build_with_their_heads(kind, task):
    found = zoo.visit(animal(kind, task), "onnx")
    assert found.status == "exact", found


@pytest.mark.slow
def test_every_animal_stands_once_for_each_task():
    assert len({(a.kind, a.task) for a in ANIMALS}) == len(ANIMALS) >= 60
