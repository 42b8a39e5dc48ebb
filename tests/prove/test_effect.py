"""What gates make of adapters, beside the plain merge: figures against an independent account."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from adaptrix_export.measure.effect import measure
from adaptrix_export.package.documents import EffectEntry, parse_document
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.redistribute.redistribute import Redistribute
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.pipeline import open_plan
from adaptrix_export.progress import Silent
from adaptrix_export.recipe import Recipe
from adaptrix_export.show.fidelity_tables import effect_table
from tests.artifacts import plan_of
from tests.tiny import save_adapter, save_base
from tests.tools.zoo import house
from tests.tools.zoo_rows import ANIMALS

ROWS = np.random.default_rng(3).integers(0, 96, (3, 24))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("effect")
    base = save_base("llama", folder / "base", initializer_range=0.15)
    return base, save_adapter(base, folder / "adapter")


def chances(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ROWS)).logits.double().log_softmax(-1)


def test_the_figures_are_those_of_the_models(folders: tuple[Path, Path]) -> None:
    """KL, agreement and loss over whole batches, and drift from the factors, for the merge."""
    plan = plan_of(*folders)
    told = measure(plan, WireContext(tau=0.2)(plan), ROWS, None, Silent())
    bare = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    base = chances(bare)
    peft = PeftModel.from_pretrained(bare, str(folders[1])).eval()
    seen: list[torch.Tensor] = []

    def drift(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        x = inputs[0].double()
        d = (
            x
            @ layer.lora_A["default"].weight.double().T
            @ layer.lora_B["default"].weight.double().T
        )
        y0 = torch.nn.functional.linear(x, layer.base_layer.weight.double())
        ratio = layer.scaling["default"] * d.norm(dim=-1) / y0.norm(dim=-1)
        seen.append(ratio.flatten())

    for module in peft.modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            module.register_forward_hook(drift)
    adapted = chances(peft)
    kl = float((adapted.exp() * (adapted - base)).sum(-1).mean())
    same = float((adapted.argmax(-1) == base.argmax(-1)).double().mean())
    following = torch.from_numpy(ROWS)[:, 1:, None]
    loss = -float(adapted[:, :-1].gather(-1, following).mean())
    models = told["models"]
    assert kl > 1e-3
    assert models["base"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert models["base"]["agreement"] == pytest.approx(same)
    assert models["base"]["retained"] == 0 and models["adapted"]["retained"] == 1
    assert models["adapted"]["loss"] == pytest.approx(loss, rel=1e-5)
    better = models["base"]["loss"] > models["adapted"]["loss"]
    assert models["adapted"]["gain"] == (1 if better else None)
    every = torch.cat(seen)
    assert models["adapted"]["sites"] == len(seen)
    assert models["adapted"]["drift"]["max"] == pytest.approx(float(every.max()), rel=1e-3)
    assert models["adapted"]["drift"]["median"] == pytest.approx(float(every.median()), rel=0.02)
    assert told["tokens"] == ROWS.size and list(models) == ["base", "adapted", "gated"]


def test_a_clamp_bounds_the_drift_and_one_that_never_acts_is_the_merge(
    folders: tuple[Path, Path],
) -> None:
    plan = plan_of(*folders)
    tight, wide = (
        measure(plan, WireContext(tau=tau)(plan), ROWS, None, Silent())["models"]
        for tau in (0.02, 50.0)
    )
    assert tight["adapted"]["drift"]["max"] > 0.05
    assert tight["gated"]["drift"]["max"] <= 0.02 * (1 + 1e-5)
    assert tight["gated"]["clamped"] > 0.5 and 0 < tight["gated"]["retained"] < 0.9
    assert wide["gated"]["retained"] == pytest.approx(1, abs=1e-5)
    assert wide["gated"]["clamped"] == 0
    assert wide["gated"]["drift"] == pytest.approx(wide["adapted"]["drift"], rel=1e-4)


def test_a_redistributed_adapter_stands_between(
    folders: tuple[Path, Path],
) -> None:
    plan = plan_of(*folders)
    with pass_context(Silent()) as context:
        assert context.held_out() is None
        moved = Redistribute(layers=(1, 2), strategy="select", context=context)(plan)
        rows = context.held_out()
        assert rows is not None
        gated = WireContext(tau=0.05)(moved)
        told = measure(plan, gated, rows, None, Silent())
    models = told["models"]
    assert list(models) == ["base", "adapted", "redistributed", "gated"]
    assert models["redistributed"]["retained"] == pytest.approx(
        moved.measured["fidelity"]["adapter"]["retained"], abs=1e-4
    )
    assert models["adapted"]["sites"] == 28 and models["redistributed"]["sites"] == 14
    assert models["gated"]["retained"] < models["redistributed"]["retained"] < 1
    console = Console(width=120)
    with console.capture() as shown:
        console.print(effect_table(parse_document(EffectEntry, told, "effect")))
    text = shown.get()
    for heading in ("plain merge", "redistributed", "with gates", "drift, largest"):
        assert heading in text


def test_an_encoder_decoder_is_asked_to_copy(tmp_path: Path) -> None:
    housed = house(next(animal for animal in ANIMALS if animal.kind == "t5"), tmp_path)
    plan = open_plan(
        Recipe(base=str(housed.base), adapters=[str(housed.adapter)], target="onnx", out="unused")
    )
    half = WireContext(mode="blend", weight=0.5)(plan)
    told = measure(plan, half, ROWS, None, Silent())["models"]
    assert 0.3 < told["gated"]["retained"] < 1 and "clamped" not in told["gated"]
    assert told["gated"]["drift"]["median"] < told["adapted"]["drift"]["median"]


def test_adapters_of_different_modules_are_measured_together(tmp_path: Path) -> None:
    """Composed by their sum, which PEFT runs with all of them active; a wide gate is no gate."""
    base = save_base("llama", tmp_path / "base", initializer_range=0.15)
    one = save_adapter(base, tmp_path / "one", target_modules=["q_proj"])
    two = save_adapter(base, tmp_path / "two", seed=2, target_modules=["down_proj"])
    original = plan_of(base, one, two)
    plan = WireContext(tau=1e3)(Compose()(original))
    assert len(plan.gates) == 8
    models = measure(original, plan, ROWS[:1], None, Silent())["models"]
    assert "redistributed" not in models
    assert models["gated"]["sites"] == models["adapted"]["sites"] == 8
    assert models["gated"]["kl"] == pytest.approx(0, abs=1e-9)
