"""`inspect --layers`: the norms are those of the live model's weights less the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from adaptrix_export.arch.architecture import detect
from adaptrix_export.arch.tasks import TASKS, TEXT
from adaptrix_export.cli import main
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.manage.layer_map import layer_norms
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from tests.tiny import live, save_adapter, save_base
from tests.tools.zoo_rows import ONE_TASK, Animal

MORE: dict[str, dict[str, Any]] = {
    "lora": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]),
    "dora": dict(use_dora=True, target_modules=["v_proj"]),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["norm", "lm_head"]),
}


def live_norms(base: Path, adapter: Path) -> dict[Any, float]:
    """Merged by PEFT in fp64, less the base: squares summed by layer."""
    model: Any = live(base, adapter).double()
    merged = model.merge_and_unload().state_dict()
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).state_dict()
    found: dict[Any, float] = {}
    for name, value in merged.items():
        parts = name.split(".")
        place = ("model.layers", int(parts[2])) if parts[1] == "layers" else ("", None)
        if name == "lm_head.weight" and "lm_head.weight" not in before:
            continue
        found[place] = found.get(place, 0.0) + float(((value - before[name]) ** 2).sum())
    return {place: square**0.5 for place, square in found.items()}


@pytest.mark.parametrize("kind", MORE)
def test_norms_are_those_of_the_weights(tmp_path: Path, kind: str) -> None:
    base = save_base("llama", tmp_path / "base", tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "lora", **MORE[kind])
    opened = open_base(str(base))
    found = layer_norms(Plan(opened, (open_adapter(str(adapter), opened),)), Silent())
    expected = live_norms(base, adapter)
    assert {place for place, norm in expected.items() if norm} == set(found)
    for place, norm in found.items():
        assert norm == pytest.approx(expected[place], rel=1e-5)
    if kind == "lora":
        assert set(found) == {("model.layers", 0), ("model.layers", 2)}


def test_the_command_shows_every_layer(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    adapter = save_adapter(
        base, tmp_path / "lora", target_modules=["q_proj", "up_proj"], layers_to_transform=[1]
    )
    told = CliRunner().invoke(main, ["inspect", str(base), str(adapter), "--layers", "--json"])
    facts = json.loads(told.stdout)["layer_map"]
    (stack,) = facts["stacks"]
    assert stack["middle"] == [1, 2, 3]
    assert [row["layer"] for row in stack["layers"]] == [0, 1, 2, 3]
    assert [row["norms"]["lora"] > 0 for row in stack["layers"]] == [False, True, False, False]
    assert facts["outside"] == {"lora": 0.0}
    shown = CliRunner().invoke(main, ["inspect", str(base), str(adapter), "--layers"])
    assert shown.exit_code == 0
    bars = [line for line in shown.stdout.splitlines() if "█" in line]
    assert len(bars) == 1  # one layer has a delta, and its bar is the longest there is
    assert "█" * 30 in bars[0]


def test_without_an_adapter_there_are_no_bars(tmp_path: Path) -> None:
    base = save_base("gpt2", tmp_path / "base")
    shown = CliRunner().invoke(main, ["inspect", str(base), "--layers"])
    assert shown.exit_code == 0
    assert "█" not in shown.stdout
    assert shown.stdout.count("middle") == 3


def test_an_encoder_decoder_has_two_stacks() -> None:
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=8, num_decoder_layers=12, num_heads=4, vocab_size=50
    )
    with torch.device("meta"):
        names = list(T5ForConditionalGeneration(config).state_dict())
    found = detect(config.to_dict(), names, "t5")
    stacks = {s.prefix: found.middle_layers(i) for i, s in enumerate(found.stacks)}
    assert stacks == {"decoder.block": (3, 6, 9), "encoder.block": (2, 4, 6)}


def test_the_command_shows_both_stacks_of_an_encoder_decoder(tmp_path: Path) -> None:
    """With an adapter on the encoder's last layer and on the decoder's first."""
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=4, num_decoder_layers=3, num_heads=4,
        vocab_size=50, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    sites = r"(encoder\.block\.3|decoder\.block\.0)\.layer\.0\.SelfAttention\.q"
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=sites, task_type="SEQ_2_SEQ_LM", lora_alpha=4)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    command = ["inspect", str(tmp_path / "base"), str(tmp_path / "lora"), "--layers"]
    told = CliRunner().invoke(main, [*command, "--json"])
    stacks = json.loads(told.stdout)["layer_map"]["stacks"]
    changed = {
        (stack["stack"], row["layer"])
        for stack in stacks
        for row in stack["layers"]
        if row["norms"]["lora"] > 0
    }
    assert changed == {("encoder.block", 3), ("decoder.block", 0)}
    assert [len(stack["layers"]) for stack in stacks] == [4, 3]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0
    assert "layers of encoder.block" in shown.stdout and "layers of decoder.block" in shown.stdout
    assert len([line for line in shown.stdout.splitlines() if "█" in line]) == 2


# Other types are read off the live model's class (`arch/skeleton.py`), not detected.
OF_TEXT = [animal for animal in ONE_TASK if TASKS[animal.task].inputs == TEXT]


@pytest.mark.slow
@pytest.mark.parametrize("animal", OF_TEXT, ids=lambda animal: animal.kind)
def test_the_layers_of_every_type_are_found(animal: Animal) -> None:
    """As many as transformers builds, from the names of the tensors alone."""
    config = AutoConfig.for_model(animal.kind, **animal.config)
    with torch.device("meta"):
        model = getattr(transformers, TASKS[animal.task].auto).from_config(config)
    found = detect(config.to_dict(), list(model.state_dict()), animal.kind)
    counts = [stack.count for stack in found.stacks]
    if animal.task == "text2text-generation":
        t5 = hasattr(config, "num_decoder_layers")
        names = ("num_decoder_layers", "num_layers") if t5 else ("decoder_layers", "encoder_layers")
        assert counts == [getattr(config, name) for name in names] == [3, 2]
    else:
        shared = getattr(config, "num_hidden_groups", None)  # ALBERT runs one layer several times
        assert counts[0] == (shared or config.num_hidden_layers) and found.middle_layers()
    for stack in found.stacks:
        modules = model.get_submodule(stack.prefix)
        assert isinstance(modules, torch.nn.ModuleList) and len(modules) == stack.count
