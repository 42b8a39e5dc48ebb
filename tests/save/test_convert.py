"""Writing adapters: exact round trips, stock PEFT's agreement, whole builds from every format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import adaptrix_export.load.adapters.mlx_adapter as mlx_adapter
from adaptrix_export.cli import main
from adaptrix_export.errors import MachineError, UnsupportedError
from adaptrix_export.load import Reading, open_adapter, open_base
from adaptrix_export.manage import convert as converting
from adaptrix_export.manage.convert import convert
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from adaptrix_export.save.adaptrix_folder import write_adaptrix
from adaptrix_export.save.peft_folder import write_peft
from tests.load.adapters.foreign import as_adaptrix, as_gguf, as_mlx
from tests.tiny import VOCAB, live, save_adapter, save_base

BOTH = {"rank": 4, "alpha": 7}
IDS = torch.arange(40).remainder(VOCAB).view(2, 20)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    base = save_base("llama", folder / "base")
    return base, save_adapter(base, folder / "lora")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def with_biases(folder: Path) -> Path:
    return save_base("llama", folder / "base", attention_bias=True)


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def loads_whole(base: Path, folder: Path) -> None:
    """Stock PEFT finds every tensor of the folder, and needs no other."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("error", message="Unexpected keyword arguments.*")
        peft = PeftModel.from_pretrained(model, folder)
    result = peft.load_adapter(folder, "again")
    assert not [k for k in result.missing_keys if "lora_" in k] and not result.unexpected_keys


FOREIGN = {
    "mlx": lambda lora, folder: as_mlx(lora, folder / "mlx", 7 / 4),
    "gguf": lambda lora, folder: as_gguf(lora, folder / "lora.gguf", 7.0),
    "adaptrix": lambda lora, folder: as_adaptrix(lora, folder / "tone", BOTH),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_written_peft_gives_stock_peft_the_logits_of_the_source(tmp_path, pair, form):
    """The reference is the PEFT adapter that the foreign one was written from, by hand."""
    base, lora = pair
    source = FOREIGN[form](lora, tmp_path)
    convert(str(source), str(base), "peft", tmp_path / "out")
    loads_whole(base, tmp_path / "out")
    expected = logits(live(base, lora))
    assert (logits(live(base, tmp_path / "out")) - expected).abs().max() < 1e-6
    edited = config(tmp_path / "out") | {"lora_alpha": 4}  # negative control: scale ignored
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(edited))
    assert (logits(live(base, tmp_path / "out")) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 3}},
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    ],
)
def test_peft_to_peft_keeps_everything(tmp_path, pair, options):
    base = with_biases(tmp_path) if "lora_bias" in options else pair[0]
    source = save_adapter(base, tmp_path / "lora", **options)
    convert(str(source), str(base), "peft", tmp_path / "out")
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    name = {"base_model_name_or_path": f"path:{base.name}"}  # no machine's path is published
    assert config(tmp_path / "out") == config(source) | name
    assert (logits(live(base, source)) - logits(live(base, tmp_path / "out"))).abs().max() == 0


@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip_through_adaptrix_is_exact(tmp_path, pair, rslora):
    base, _ = pair
    options = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.2.*": 5}}
    lora = save_adapter(base, tmp_path / "lora", use_rslora=rslora, **options)
    first = convert(str(lora), str(base), "adaptrix", tmp_path / "tone")
    assert first.notes == ()
    convert(str(tmp_path / "tone"), str(base), "peft", tmp_path / "back")
    convert(str(tmp_path / "back"), str(base), "adaptrix", tmp_path / "again")
    before = load_file(lora / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    name = {"base_model_name_or_path": f"path:{base.name}"}
    assert config(tmp_path / "back") == config(lora) | name
    for path in (tmp_path / "tone").glob("layer_*.pt"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    modules = torch.load(tmp_path / "tone" / "layer_2.pt", weights_only=True)
    entry = modules["self_attn.q_proj"]
    assert set(entry) == {"lora_A", "lora_B", "rank", "alpha", "scaling"} and entry["rank"] == 3
    opened = open_base(str(base))
    stored = open_adapter(str(tmp_path / "tone"), opened, None, Reading(False, "stored"))
    plain = open_adapter(str(lora), opened)
    assert [d.terms[0].scale for d in stored.deltas] == [d.terms[0].scale for d in plain.deltas]


def test_metadata_of_both_sides_survives(tmp_path, pair):
    base, lora = pair
    tone = as_adaptrix(lora, tmp_path / "tone", BOTH)
    convert(str(tone), str(base), "peft", tmp_path / "peft")
    convert(str(tmp_path / "peft"), str(base), "adaptrix", tmp_path / "back")
    before = json.loads((tone / "metadata.json").read_text())
    after = json.loads((tmp_path / "back" / "metadata.json").read_text())
    ours = after.pop("adaptrix_export")
    assert before == after and before["author"] == "someone"
    assert ours["adapter_config"]["r"] == 4
    mlx = as_mlx(lora, tmp_path / "mlx", 2.0)
    convert(str(mlx), str(base), "adaptrix", tmp_path / "from-mlx")
    told = json.loads((tmp_path / "from-mlx" / "metadata.json").read_text())
    assert told["adaptrix_export"]["source"]["adapter_config.json"]["num_layers"] == 4
    assert "/home/someone" not in (tmp_path / "from-mlx" / "metadata.json").read_text()


def test_same_adapter_same_bytes(tmp_path, pair):
    base, lora = pair
    for to in ("peft", "adaptrix"):
        for out in ("one", "two"):
            convert(str(lora), str(base), to, tmp_path / f"{to}-{out}")
        for path in (tmp_path / f"{to}-one").iterdir():
            assert path.read_bytes() == (tmp_path / f"{to}-two" / path.name).read_bytes()


RANDOM = st.tuples(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 5),
    st.floats(0.01, 100),
    st.sets(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1),
    st.sets(st.integers(0, 3), min_size=1),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RANDOM, st.randoms(use_true_random=False))
def test_any_lora_survives_both_formats_bit_for_bit(tmp_path_factory, pair, drawn, random):
    dtype, rank, alpha, modules, layers = drawn
    base = open_base(str(pair[0]))
    root = tmp_path_factory.mktemp("random")
    source = root / "lora"
    source.mkdir()
    torch.manual_seed(random.randrange(1000))
    tensors, ranks = {}, {}
    for layer in sorted(layers):
        for module in sorted(modules):
            path = f"model.layers.{layer}.{'mlp' if module == 'up_proj' else 'self_attn'}.{module}"
            ranks[path] = random.choice([rank, rank + 1])
            rows, columns = base.tensors[f"{path}.weight"].shape
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(ranks[path], columns).to(dtype)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, ranks[path]).to(dtype)
    save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": ranks}
    (source / "adapter_config.json").write_text(json.dumps(told))
    first = open_adapter(str(source), base)
    for write in (write_peft, write_adaptrix):
        folder = root / write.__name__
        folder.mkdir()
        write(first, base, folder)
        converting._compare(first, open_adapter(str(folder), base))
    assert json.loads((root / "write_peft" / "adapter_config.json").read_text()) == told


def test_a_writer_that_lies_publishes_nothing(tmp_path, pair, monkeypatch):
    base, lora = pair

    def wrong(adapter, base, folder):
        write_peft(adapter, base, folder)
        path = folder / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setitem(converting.WRITERS, "peft", wrong)
    with pytest.raises(MachineError, match="other values when read again"):
        convert(str(lora), str(base), "peft", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "outside the one stack"),
        ({"modules_to_save": ["norm"]}, "more than LoRA factors"),
    ],
)
def test_what_an_adaptrix_folder_cannot_hold_is_refused(tmp_path, pair, options, message):
    base = with_biases(tmp_path) if "lora_bias" in options else pair[0]
    lora = save_adapter(base, tmp_path / "lora", **options)
    with pytest.raises(UnsupportedError, match=message):
        convert(str(lora), str(base), "adaptrix", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def prefixless(lora: Path, folder: Path) -> Path:
    folder.mkdir()
    tensors = load_file(lora / "adapter_model.safetensors")
    renamed = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    return folder


def pickled(lora: Path, folder: Path) -> Path:
    folder.mkdir()
    tensors = load_file(lora / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    return folder


BUILDS = {
    **FOREIGN,
    "peft with other keys": lambda lora, folder: prefixless(lora, folder / "keys"),
    "peft pickled": lambda lora, folder: pickled(lora, folder / "bin"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", BUILDS)
def test_a_build_from_every_format(tmp_path, pair, form):
    base, lora = pair
    source = BUILDS[form](lora, tmp_path)
    recipe = Recipe(
        base=str(base), adapters=[{"source": str(source), "name": "tone"}], target="safetensors",
        out=tmp_path / "out", parity={"level": "fast"}, allow_pickle=form == "peft pickled",
    )  # fmt: skip
    outcome = build(recipe)
    assert outcome.report["oracle"].endswith("(adapter converted to PEFT form: tone)")
    assert any("tone" in n for n in outcome.notes) == (form == "peft with other keys")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(ours) - logits(live(base, lora))).abs().max() < 5e-6
    if form != "peft pickled":  # the one whose reading the manifest must remember
        return
    again = verify_artifact(tmp_path / "out", base=str(base), adapters=[str(source)])
    assert again["parity"]["oracle"] == outcome.report["oracle"]


def test_a_scale_that_is_ignored_gives_another_model(tmp_path, pair, monkeypatch):
    """The oracle's copy has the reader's fault, so only the adapter it came from can tell."""
    base, lora = pair
    source = as_mlx(lora, tmp_path / "mlx", 7 / 4)
    right = mlx_adapter._settings
    monkeypatch.setattr(mlx_adapter, "_settings", lambda p, c: (right(p, c)[0], 1.0, False))
    convert(str(source), str(base), "peft", tmp_path / "out")
    assert (logits(live(base, tmp_path / "out")) - logits(live(base, lora))).abs().max() > 1e-3


@pytest.mark.slow
def test_a_stock_adapter_is_its_own_oracle(tmp_path, pair):
    base, lora = pair
    outcome = build(
        Recipe(base=str(base), adapters=[str(lora)], target="safetensors", out=tmp_path / "out",
               parity={"level": "fast"})
    )  # fmt: skip
    assert "converted" not in outcome.report["oracle"]


def test_the_command_line_converts(tmp_path, pair):
    base, lora = pair
    arguments = ["--base", str(base), "--to", "adaptrix", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["convert", str(lora), *arguments, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["to"] == "adaptrix"
    assert len(list((tmp_path / "out").iterdir())) == 5
    twice = CliRunner().invoke(main, ["convert", str(lora), *arguments])
    assert twice.exit_code == 2 and "exists" in twice.output
    no_base = CliRunner().invoke(main, ["convert", str(lora), "--to", "peft", "--out", "x"])
    assert no_base.exit_code == 2 and "--base" in no_base.output
    shown = CliRunner().invoke(
        main, ["convert", str(prefixless(lora, tmp_path / "keys")), "--base", str(base), "--to",
               "peft", "--out", str(tmp_path / "peft")],
    )  # fmt: skip
    assert "note: 56 keys are not as PEFT writes them" in shown.output
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
