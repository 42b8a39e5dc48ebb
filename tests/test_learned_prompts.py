"""Prompt tuning, p-tuning and prefix tuning in a graph, against live PEFT."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnxruntime as ort
import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrix_export.errors import AdapterError, ParityError, UnsupportedError
from adaptrix_export.pipeline import build
from adaptrix_export.progress import Silent
from adaptrix_export.prove import child, proof
from adaptrix_export.recipe import Recipe
from adaptrix_export.runtime.layout import located
from tests.tiny import save_adapter, save_base

TOKENS = 5
CONFIGS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "p-tuning": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=32
    ),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
}
EXACT = 1e-5


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """The proof in this process: another one would import everything again."""
    monkeypatch.setattr(proof, "prove", lambda job, progress, **_: child.run(job, Silent()))


def save_prompt(base, folder, method):
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, deepcopy(CONFIGS[method]))  # PEFT writes sizes into it
    for parameter in wrapped.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder)
    return folder


class Served:
    """The graph, fed by hand as a client that knows nothing of the prompt feeds it."""

    def __init__(self, folder):
        self.session = ort.InferenceSession(str(located(folder, "model.onnx")))

    def logits(self, rows, steps):
        """(rows, tokens, vocabulary) of left-padded rows, the last `steps` tokens one by one."""
        longest = max(map(len, rows))
        ids = np.array([[0] * (longest - len(r)) + r for r in rows], np.int64)
        mask = np.array([[0] * (longest - len(r)) + [1] * len(r) for r in rows], np.int64)
        cache = {
            v.name: np.zeros([len(rows), v.shape[1], 0, v.shape[3]], np.float32)
            for v in self.session.get_inputs() if v.name.startswith("past")
        }  # fmt: skip
        known = {v.name for v in self.session.get_inputs()}
        names = [v.name for v in self.session.get_outputs()]
        found, cuts = [], [0, *range(longest - steps, longest + 1)]
        for first, last in pairwise(cuts):
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, first:last]
            fed = {"input_ids": ids[:, first:last], "attention_mask": mask[:, :last],
                   "position_ids": positions, **cache}  # fmt: skip
            given = {n: v for n, v in fed.items() if n in known}
            out = dict(zip(names, self.session.run(None, given), strict=True))
            found.append(out.pop("logits"))
            cache = {n.replace("present", "past_key_values"): v for n, v in out.items()}
        assert next(iter(cache.values())).shape[2] == longest + TOKENS
        return np.concatenate(found, axis=1)


def expected(base, adapter, row):
    """Live PEFT on one row: the logits of its own tokens, and six more tokens, each of a call with
    the whole row. (On GPT-2, the cached `generate` of PEFT 0.21 gives other tokens than its own
    forward pass, so it is no reference.)"""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()

    def asked(tokens):
        with torch.inference_mode():
            return model(input_ids=torch.tensor([tokens])).logits[0].numpy()

    longer = list(row)
    for _ in range(6):
        longer.append(int(asked(longer)[-1].argmax()))
    return asked(row)[-len(row) :], longer[len(row) :]


KINDS = [
    pytest.param("llama", "prefix tuning", marks=pytest.mark.slow),
    pytest.param("llama", "prompt tuning", marks=pytest.mark.slow),
    pytest.param("gpt2", "prefix tuning", marks=pytest.mark.slow),
    pytest.param("gpt2", "p-tuning", marks=pytest.mark.slow),
    pytest.param("qwen3", "p-tuning", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "method"), KINDS)
def test_a_client_that_knows_nothing_of_the_prompt_gets_pefts_answers(tmp_path, kind, method):
    base = save_base(kind, tmp_path / "base", num_hidden_layers=2)
    adapter = save_prompt(base, tmp_path / "adapter", method)
    outcome = build(Recipe(base=str(base), adapters=(str(adapter),), target="onnx",
                           out=tmp_path / "out"))  # fmt: skip
    assert outcome.report["passed"] and outcome.manifest["frontend"] == "traced"
    served = Served(tmp_path / "out")
    rows = [[7, 9, 100, 20, 31, 5, 250, 11], [41, 3, 77, 8, 19]]
    given = served.logits(rows, 3)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for row, logits in zip(rows, given, strict=True):
        wanted, tokens = expected(base, adapter, row)
        assert np.abs(logits[-len(row) :] - wanted).max() <= EXACT
        with torch.inference_mode():
            without = plain(input_ids=torch.tensor([row])).logits[0].numpy()
        assert np.abs(without - wanted).max() > 1e-2
        for token in tokens:
            assert int(served.logits([row], 1)[0, -1].argmax()) == token
            row = [*row, token]


@pytest.mark.slow
def test_a_prompt_that_is_not_the_adapters_fails_the_proof(tmp_path, monkeypatch):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    adapter = save_prompt(base, tmp_path / "adapter", "prompt tuning")
    other = shutil.copytree(adapter, tmp_path / "other")
    values = load_file(other / "adapter_model.safetensors")
    values["prompt_embeddings"][0] += 0.5
    save_file(values, other / "adapter_model.safetensors")
    real = proof.prove

    def swapped(job, progress, **more):
        return real(replace(job, adapters=(("adapter", other),)), progress, **more)

    monkeypatch.setattr(proof, "prove", swapped)
    with pytest.raises(ParityError) as raised:
        build(Recipe(base=str(base), adapters=(str(adapter),), target="onnx",
                     out=tmp_path / "out"))  # fmt: skip
    cases = {case["name"]: case["passed"] for case in raised.value.report["cases"]}
    assert not cases["prefill"] and not raised.value.report["replay"]["passed"]


@pytest.mark.parametrize("target", ["safetensors", "peft", "onnx-switchable"])
def test_targets_without_a_place_for_it_say_so(tmp_path, target):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    adapter = save_prompt(base, tmp_path / "adapter", "prompt tuning")
    with pytest.raises(UnsupportedError, match=r"PROMPT_TUNING.*--target onnx"):
        build(Recipe(base=str(base), adapters=(str(adapter),), target=target,
                     out=tmp_path / "out"))  # fmt: skip


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_a_prompt_of_another_model_is_named(tmp_path, method):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    other = save_base("llama", tmp_path / "wide", num_hidden_layers=2, hidden_size=96, head_dim=24)
    adapter = save_prompt(other, tmp_path / "adapter", method)
    with pytest.raises(AdapterError, match="prompt_embeddings.*as the base has it"):
        build(Recipe(base=str(base), adapters=(str(adapter),), target="onnx",
                     out=tmp_path / "out"))  # fmt: skip


def test_two_prompts_are_refused_together(tmp_path):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    first = save_prompt(base, tmp_path / "first", "prompt tuning")
    second = save_prompt(base, tmp_path / "second", "prefix tuning")
    with pytest.raises(UnsupportedError, match="first and second: a learned prompt each"):
        build(Recipe(base=str(base), adapters=(str(first), str(second)), target="onnx",
                     out=tmp_path / "out"))  # fmt: skip


def test_a_lora_beside_a_prompt_is_named(tmp_path):
    """PEFT itself runs one kind at a time, so that there is nothing to compare with."""
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    first = save_prompt(base, tmp_path / "first", "prompt tuning")
    lora = save_adapter(base, tmp_path / "lora")
    with pytest.raises(UnsupportedError, match="first and lora"):
        build(Recipe(base=str(base), adapters=(str(first), str(lora)), target="onnx",
                     out=tmp_path / "out"))  # fmt: skip
