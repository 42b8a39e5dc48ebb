"""LoRA on convolutions and MultiheadAttention, against PEFT's live layers.

No text model that the pipeline builds has either with one group, so the base here is a small
module of its own, saved as a checkpoint is.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.oracle.live import live_parameter
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.targets.merged_safetensors import lower_merged_safetensors

CONFIG = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 10}


class Mixed(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.line = nn.Conv1d(16, 16, 3, padding=1, groups=groups)
        self.plane = nn.Conv2d(1, 6, (2, 3))
        self.cube = nn.Conv3d(1, 2, 2)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.config = CONFIG

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (batch, 8, 16)."""
        mixed = self.line(x.transpose(1, 2)).transpose(1, 2)
        cube = x.reshape(len(x), 1, 4, 4, 8)
        return self.attention(mixed, mixed, mixed)[0], self.plane(x[:, None]), self.cube(cube)


@pytest.fixture
def made(tmp_path):
    def make(groups: int = 1, **options):
        torch.manual_seed(0)
        model = Mixed(groups)
        (tmp_path / "base").mkdir()
        save_file(model.state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
        (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
        targets = ["line", "plane", "cube", "attention"]
        peft = get_peft_model(
            model, LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, **options})
        )
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        peft.save_pretrained(tmp_path / "adapter")
        fresh = Mixed(groups)
        fresh.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
        live = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        base = open_base(str(tmp_path / "base"))
        return live, Plan(base, (open_adapter(str(tmp_path / "adapter"), base),))

    return make


def test_merged_modules_equal_the_live_ones(made, tmp_path):
    live, plan = made(use_rslora=True)
    changed = {"line.weight", "plane.weight", "cube.weight"}
    changed |= {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert set(verify(plan).changes()) == changed
    (tmp_path / "out").mkdir()
    lower_merged_safetensors(plan, tmp_path / "out", Silent())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    # Before it runs: MultiheadAttention adds and takes away its deltas in float32 at each call.
    for name in changed:
        exact, touched = live_parameter(live.get_base_model(), name)
        assert touched and np.array_equal(stored[name].numpy(), exact.float().numpy()), name
    ours, plain = Mixed().eval(), Mixed().eval()
    ours.load_state_dict(stored)
    plain.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    x = torch.randn(2, 8, 16)
    with torch.no_grad():
        for expected, found, before in zip(live(x), ours(x), plain(x), strict=True):
            assert (expected - found).abs().max() < 1e-5
            assert (expected - before).abs().max() > 1e-2  # negative control


def test_groups_and_dora_are_refused_by_name(made):
    with pytest.raises(UnsupportedError, match="line: factors of shape.*on a convolution"):
        made(groups=2, target_modules=["line"])


def test_dora_on_a_convolution_is_refused(made):
    with pytest.raises(UnsupportedError, match="DoRA on a convolution"):
        made(use_dora=True, target_modules=["plane"])


def test_another_kernel_is_another_model(made, tmp_path):
    _, plan = made(target_modules=["plane"])
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["plane.weight"] = weights["plane.weight"].transpose(2, 3).contiguous()
    save_file(weights, path, {"format": "pt"})
    base = open_base(str(tmp_path / "base"))
    with pytest.raises((AdapterError, UnsupportedError), match="plane"):
        verify(Plan(base, plan.adapters))
