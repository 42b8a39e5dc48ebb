"""Adapters of every format: the same factors and scale that the PEFT adapter has, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptrix_export.errors import AdapterError, InputError, SourceError, UnsupportedError
from adaptrix_export.load import Reading, open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.plan import Adapter, Plan
from tests.load.adapters.foreign import as_adaptrix, as_gguf, as_mlx
from tests.tiny import save_adapter, save_base


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    base = save_base("llama", folder / "base")
    return base, save_adapter(base, folder / "lora")


def read(base: Path, adapter: Path, **reading: object) -> Adapter:
    opened = open_base(str(base))
    return verify(
        Plan(opened, (open_adapter(str(adapter), opened, None, Reading(**reading)),))
    ).adapters[0]


def values(adapter: Adapter) -> dict[str, list]:
    return {
        d.name: [d.terms[0].scale, *(t.read() for t in d.terms[0].tensors)] for d in adapter.deltas
    }


def assert_same(one: Adapter, other: Adapter) -> None:
    first, second = values(one), values(other)
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name][0] == pytest.approx(second[name][0], rel=1e-15)
        for left, right in zip(first[name][1:], second[name][1:], strict=True):
            assert left.shape == right.shape and np.array_equal(left, right), name


def test_mlx_is_turned_and_its_scale_is_absolute(tmp_path, pair):
    base, lora = pair
    mlx = read(base, as_mlx(lora, tmp_path / "mlx", 7 / 4))
    assert_same(mlx, read(base, lora))
    assert mlx.foreign and mlx.config["lora_alpha"] == 7
    other = read(base, as_mlx(lora, tmp_path / "other", 20.0))
    assert {v[0] for v in values(other).values()} == {20.0}


def test_mlx_dora_and_embedding(tmp_path, pair):
    base, _ = pair
    dora = save_adapter(base, tmp_path / "dora", use_dora=True)
    assert_same(read(base, as_mlx(dora, tmp_path / "mlx", 7 / 4)), read(base, dora))
    embedding = save_adapter(base, tmp_path / "e", target_modules=["embed_tokens", "q_proj"])
    from_table = _without_base_weights(embedding)
    assert_same(read(base, as_mlx(from_table, tmp_path / "emlx", 7 / 4)), read(base, from_table))


def _without_base_weights(folder: Path) -> Path:
    """PEFT saves the embedding it adapted, whole; other formats do not."""
    path = folder / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if ".lora_" in k}
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full'"),
        ({"fine_tune_type": "dora"}, "lora_a and lora_b, expected lora_a and lora_b and m"),
        ({"lora_parameters": {"rank": 4, "alpha": 8, "scale": 2.0}}, "lora_parameters with alpha"),
        ({"lora_parameters": {"rank": 3, "scale": 2.0}}, "rank 4 in lora_a and 4 in lora_b"),
        ({"lora_parameters": {"rank": 4}}, "scale None"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "scale nan"),
        ({"lora_parameters": None}, "no lora_parameters"),
    ],
)
def test_mlx_is_refused_by_name(tmp_path, pair, changed, message):
    base, lora = pair
    with pytest.raises(InputError, match=message):
        read(base, as_mlx(lora, tmp_path / "mlx", 1.0, **changed))


@pytest.mark.parametrize("half", [False, True])
def test_gguf_lora_has_its_rows_put_back(tmp_path, pair, half):
    base, lora = pair
    path = as_gguf(lora, tmp_path / "lora.gguf", 7.0, half=half)
    found, wanted = values(read(base, path)), values(read(base, lora))
    assert found.keys() == wanted.keys()
    for name, (scale, a, b) in wanted.items():
        rounded = [v.astype(np.float16).astype(np.float32) if half else v for v in (a, b)]
        assert found[name][0] == scale
        assert all(map(np.array_equal, found[name][1:], rounded)), name
    # Negative control: the rows as llama.cpp has them are others.
    raw = values(read(base, as_gguf(lora, tmp_path / "raw.gguf", 7.0, permute=False)))
    wrong = {n for n in wanted if not np.array_equal(raw[n][2], wanted[n][2])}
    assert {n.rsplit(".", 2)[1] for n in wrong} == {"q_proj", "k_proj"}


def test_gguf_embedding_alpha_zero_and_folder(tmp_path, pair):
    base, _ = pair
    lora = save_adapter(base, tmp_path / "e", target_modules=["embed_tokens", "v_proj"])
    lora = _without_base_weights(lora)
    (tmp_path / "folder").mkdir()
    as_gguf(lora, tmp_path / "folder" / "lora.gguf", 7.0)
    assert_same(read(base, tmp_path / "folder"), read(base, lora))
    zero = read(base, as_gguf(lora, tmp_path / "zero.gguf", 0.0))
    assert {v[0] for v in values(zero).values()} == {1.0}  # llama.cpp: no alpha, no scaling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "falcon"}, "GGUF architecture 'falcon'"),
        ({"kind": "qwen2"}, "an adapter for qwen2, expected one for llama"),
        ({"type": "model"}, "a GGUF file of type 'model'"),
        ({"of": "control_vector"}, "adapter type 'control_vector'"),
        ({"invocation": "yes"}, "activated LoRA"),
    ],
)
def test_gguf_of_another_kind_is_refused(tmp_path, pair, options, message):
    base, lora = pair
    with pytest.raises(InputError, match=message):
        read(base, as_gguf(lora, tmp_path / "lora.gguf", 7.0, **options))


BOTH = {"rank": 4, "alpha": 7}


@pytest.mark.parametrize(
    ("entry", "changed", "scaling", "scale"),
    [
        (BOTH, {}, "alpha_over_rank", 1.75),
        ({"scaling": 3.0}, {}, "alpha_over_rank", 1.75),  # the numbers of metadata.json
        ({"scaling": 3.0}, {}, "stored", 3.0),
        ({"scaling": 3.0}, {}, "one", 1.0),
        ({"alpha": 2}, {"rank": None}, "alpha_over_rank", 0.5),  # rank is the factors' own
    ],
)
def test_adaptrix_folders_of_both_writers(tmp_path, pair, entry, changed, scaling, scale):
    base, lora = pair
    folder = as_adaptrix(lora, tmp_path / "tone", entry, **changed)
    found = read(base, folder, adaptrix_scaling=scaling)
    assert {v[0] for v in values(found).values()} == {scale}
    wanted = values(read(base, lora))
    for name, (_, *factors) in values(found).items():
        assert all(map(np.array_equal, factors, wanted[name][1:]))
    differs = entry.get("scaling", scale) != scale
    assert any("stores scaling 3" in note for note in found.notes) == differs


@pytest.mark.parametrize(
    ("entry", "changed", "reading", "message"),
    [
        ({}, {"alpha": None}, {}, "no alpha, which adaptrix_scaling alpha_over_rank needs"),
        (BOTH, {}, {"adaptrix_scaling": "stored"}, "no scaling, which"),
        ({"rank": 8, "alpha": 7}, {}, {}, "expected 8 as stored"),
        ({"alpha": float("inf")}, {}, {}, "alpha is no finite number"),
        ({"beta": 1}, {}, {}, "unknown key 'beta'"),
        (BOTH, {"target_layers": [0, 1, 2]}, {}, "layer_3.pt beyond target_layers"),
        (BOTH, {"target_layers": [0, 1, 2, 3, 4]}, {}, "no layer_4.pt"),
        (BOTH, {"target_layers": "all"}, {}, "target_layers 'all'"),
        (BOTH, {"target_modules": ["mlp.up_proj"]}, {}, "not in target_modules"),
        ({**BOTH, "lora_A": torch.ones(4)}, {}, {}, "no matrix lora_A"),
        ({**BOTH, "lora_A": [1.0]}, {}, {}, "no matrix lora_A"),
    ],
)
def test_adaptrix_folders_that_do_not_add_up(tmp_path, pair, entry, changed, reading, message):
    base, lora = pair
    with pytest.raises(AdapterError, match=message):
        read(base, as_adaptrix(lora, tmp_path / "tone", entry, **changed), **reading)


def test_adaptrix_names_are_resolved_in_the_base(tmp_path, pair):
    base, lora = pair
    old = {"self_attn.o_proj": "self_attn.dense", "mlp.gate_proj": "mlp.fc1"}
    found = read(base, as_adaptrix(lora, tmp_path / "old", BOTH, old))
    assert_same(found, read(base, lora))
    assert "mlp.fc1 of the original format is mlp.gate_proj" in found.notes
    wrong = as_adaptrix(lora, tmp_path / "wrong", BOTH, {"self_attn.o_proj": "self_attn.out"})
    with pytest.raises(AdapterError, match=r"self_attn.out: no such module"):
        read(base, wrong)
    twice = as_adaptrix(lora, tmp_path / "twice", BOTH)
    modules = torch.load(twice / "layer_2.pt")
    modules["mlp.fc1"] = modules["mlp.gate_proj"]
    torch.save(modules, twice / "layer_2.pt")
    metadata = json.loads((twice / "metadata.json").read_text())
    metadata["target_modules"].append("mlp.fc1")
    (twice / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(AdapterError, match=r"mlp.gate_proj, as 'mlp.gate_proj' is"):
        read(base, twice)


def test_adaptrix_of_gpt2(tmp_path):
    base = save_base("gpt2", tmp_path / "base")
    lora = save_adapter(base, tmp_path / "lora", target_modules=["c_attn", "c_fc", "c_proj"])
    folder = tmp_path / "tone"
    renamed = tmp_path / "renamed"  # as_adaptrix cuts at `.layers.`, GPT-2 says `.h.`
    renamed.mkdir()
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(
        {k.replace("transformer.h.", "model.layers."): v for k, v in tensors.items()},
        renamed / "adapter_model.safetensors",
    )
    as_adaptrix(renamed, folder, BOTH)
    assert_same(read(base, folder), read(base, lora))


def test_a_pickled_peft_adapter_is_read_if_allowed(tmp_path, pair):
    base, lora = pair
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    torch.save(load_file(lora / "adapter_model.safetensors"), folder / "adapter_model.bin")
    with pytest.raises(SourceError, match="only adapter_model.bin, a pickle.*--allow-pickle"):
        read(base, folder)
    found = read(base, folder, allow_pickle=True)
    assert_same(found, read(base, lora))
    assert found.foreign


def test_two_formats_in_one_folder_are_an_error(tmp_path, pair):
    base, lora = pair
    folder = as_mlx(lora, tmp_path / "mlx", 1.0)
    as_adaptrix(lora, tmp_path / "tone", BOTH)
    for path in (tmp_path / "tone").iterdir():
        path.rename(folder / path.name)
    with pytest.raises(SourceError, match=r"adapters.safetensors \(mlx-lm\) and metadata.json"):
        read(base, folder)
    with pytest.raises(SourceError, match="no adapter_config.json"):
        read(base, tmp_path / "tone")


def test_a_reading_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="adaptrix_scaling: 'two'"):
        Reading(adaptrix_scaling="two")


def test_stacked_experts_of_mlx_are_refused(tmp_path, pair):
    base, lora = pair
    folder = as_mlx(lora, tmp_path / "mlx", 1.0)
    tensors = load_file(folder / "adapters.safetensors")
    name = "model.layers.0.mlp.up_proj.lora_a"
    tensors[name] = torch.stack([tensors[name]] * 2)
    save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises(UnsupportedError, match="stacked experts"):
        read(base, folder)
