"""Gates in an encoder, whose batches are padded and have no cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.tiny import save_base


@pytest.mark.slow
def test_an_encoder_is_gated_and_proved(tmp_path: Path) -> None:
    base = save_base("bert", tmp_path / "base", initializer_range=0.15)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["query", "value", "dense"])
    peft = get_peft_model(AutoModel.from_pretrained(base), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(tmp_path / "adapter")
    layers = dict.fromkeys(range(4), 0.08)  # the pooler has a LoRA, too, and stays merged
    outcome = build(
        Recipe(base=str(base), adapters=[str(tmp_path / "adapter")], target="onnx",
               task="feature-extraction", out=tmp_path / "out",
               context={"tau": layers, "stats": True})
    )  # fmt: skip
    assert outcome.report is not None
    context = outcome.report["context"]
    assert outcome.report["passed"] and len(context["sites"]) == 4 * 5
    names = [check["name"] for check in context["checks"]]
    assert names == ["function nodes", "statistics, prefill"]
    assert 0.1 < sum(line["clamped"] for line in context["sites"]) / 20 < 0.9
