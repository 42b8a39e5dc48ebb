"""Composed builds, whole: proved against PyTorch executing the plan, and caught when wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adaptrix_export.errors import ParityError, RecipeError, UnsupportedError
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.merge import composed
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.naming import EXECUTED
from adaptrix_export.package.manifest import write_manifest
from adaptrix_export.pipeline import build
from adaptrix_export.prove.child import run
from adaptrix_export.recipe import Recipe
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import save_adapter, save_base
from tests.tuned import LINEAR, save_tuned

MIXED = {"dora": 0.7, "lora": {1: 0.5, 2: 0.0}}


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    """The proof in this process: the same code without a second start of PyTorch."""

    def here(job, progress, **options):
        return run(Job.from_json(job.to_json()), progress)

    monkeypatch.setattr("adaptrix_export.prove.proof.prove", here)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base, an rsLoRA DoRA on all linear modules, a LoRA of rank 6 on the embedding too."""
    folder = tmp_path_factory.mktemp("composed")
    base = save_base("llama", folder / "base")
    dora = save_adapter(base, folder / "dora", use_dora=True, use_rslora=True)
    wide = ["q_proj", "v_proj", "up_proj", "embed_tokens"]
    return base, dora, save_adapter(base, folder / "lora", seed=2, r=6, target_modules=wide)


def recipe(inputs, out, target="safetensors", parity="fast", **compose) -> Recipe:
    base, *adapters = inputs
    return Recipe(
        base=str(base), adapters=[str(a) for a in adapters], target=target, out=out,
        compose=compose, parity={"level": parity},
    )  # fmt: skip


SLOW = pytest.mark.slow
BUILDS = [
    ("ties", "onnx"),
    ("svd", "safetensors"),
    *(
        pytest.param(method, target, marks=SLOW)
        for method in ("ties", "dare_ties", "knots", "tsv", "svd")
        for target in ("onnx", "safetensors")
        if (method, target) not in (("ties", "onnx"), ("svd", "safetensors"))
    ),
    *(
        pytest.param(method, "safetensors", marks=SLOW)
        for method in ("magnitude_prune_svd", "linear", "dare_linear")
    ),
]


@pytest.mark.parametrize(("method", "target"), BUILDS)
def test_a_composed_build_is_proved_by_the_plan(tmp_path, llama, method, target):
    options = {"rank": 5} if "svd" in method else {}
    made = build(recipe(llama, tmp_path / "out", target, method=method, weights=MIXED, **options))
    report = made.report
    assert report is not None and report["passed"] and report["oracle"] == EXECUTED
    assert report["replay"]["changed"] >= 20 and report["replay"]["worst"]["ulps"] <= 0.5001
    assert report.get("replay", {}).get("room", 0.0) < 1e-9
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["conflicts"]["pairs"][0]["adapters"] == ["dora", "lora"]
    assert made.manifest["history"][0].startswith(f"Compose(method='{method}', weights={{dora: 0.7")
    assert made.manifest["composition"]["method"] == method


def other_election(values, floors, election):
    return sum(values)


def one_off(matrix, term):
    """One site alone, by a thousandth."""
    good = ORIGINAL(matrix, term)
    if matrix.name != "model.layers.1.self_attn.v_proj.weight":
        return good
    return lambda start, stop: 1.001 * good(start, stop)


ORIGINAL = composed._composed


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("ties", "elected"),
        *(
            pytest.param(method, fault, marks=SLOW)
            for method, fault in (
                ("dare_ties", "random_mask"),
                ("knots", "_composed"),
                ("svd", "_composed"),
                ("tsv", "_composed"),
                ("linear", "_composed"),
            )
        ),
    ],
)
def test_a_fault_in_the_lowering_is_caught(tmp_path, llama, monkeypatch, method, fault):
    random_mask = composed.random_mask
    faults = {
        "elected": other_election,
        "random_mask": lambda seed, *rest: random_mask(seed + 1, *rest),
        "_composed": one_off,
    }
    monkeypatch.setattr(composed, fault, faults[fault])
    with pytest.raises(ParityError) as raised:
        build(recipe(llama, tmp_path / "out", method=method, weights={"dora": 0.7}))
    assert not raised.value.report["replay"]["passed"]
    assert not (tmp_path / "out").exists()
    if fault == "_composed":
        failed = raised.value.report["replay"]["failures"]
        assert [f["tensor"] for f in failed] == ["model.layers.1.self_attn.v_proj.weight"]


def test_the_default_is_the_sum_that_stock_peft_runs(tmp_path, llama):
    made = build(recipe(llama, tmp_path / "out"))
    assert made.report["oracle"].startswith("stock transformers + PEFT")
    assert made.manifest["history"] == ["Compose(method='cat')"]
    assert "composition" not in made.manifest and "conflicts" in made.report


@pytest.mark.slow
def test_same_inputs_same_bytes(tmp_path, llama):
    for name in ("one", "two"):
        build(recipe(llama, tmp_path / name, method="dare_ties", seed=4, parity="off"))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    build(recipe(llama, tmp_path / "three", method="dare_ties", seed=5, parity="off"))
    one, three = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "three"))
    assert any(not torch.equal(one[n], three[n]) for n in one)


@pytest.mark.slow
def test_verify_proves_a_composed_artifact_again(tmp_path, llama):
    base, *adapters = llama
    build(recipe(llama, tmp_path / "out", method="ties", weights=MIXED, parity="off"))
    found = verify_artifact(
        tmp_path / "out", base=str(base), adapters=[str(adapter) for adapter in adapters]
    )
    assert found["parity"]["passed"] and found["parity"]["oracle"] == EXECUTED
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["composition"]["weights"]["dora"]["default"] = 0.8  # not what was built
    write_manifest(tmp_path / "out", manifest)
    with pytest.raises(ParityError):
        verify_artifact(tmp_path / "out", base=str(base), adapters=[str(a) for a in adapters])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["peft-linear", "peft-ties", "peft-dare-ties"])
def test_peft_formulas_are_proved_too(tmp_path, llama, method):
    base = llama[0]
    pair = [save_adapter(base, tmp_path / n, seed=s, r=4) for n, s in (("a", 3), ("b", 4))]
    made = build(recipe((base, *pair), tmp_path / "out", method=method, weights=[0.7, -0.4]))
    assert made.report["passed"] and made.report["replay"]["changed"] == 28


@pytest.mark.slow
def test_one_adapter_scaled(tmp_path, llama):
    made = build(recipe(llama[:2], tmp_path / "out", method="ties", weights=[0.5]))
    assert made.report["passed"] and made.report["oracle"] == EXECUTED
    assert "conflicts" not in made.report


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["IA3", "OFT"])
def test_other_tuners_compose_as_what_they_add_alone(tmp_path, llama, kind):
    base, _, lora = llama
    other = save_tuned(base, tmp_path / "other", kind, **LINEAR[kind])
    for method in ("linear", "ties"):
        made = build(recipe((base, other, lora), tmp_path / method, method=method))
        assert made.report["passed"], method


@pytest.mark.slow
def test_what_is_shipped_whole_stays_whole(tmp_path, llama):
    """A saved head and trained biases beside composed sites; the oracle does not mix them up."""
    base = save_base("llama", tmp_path / "base", attention_bias=True)
    saved = save_adapter(base, tmp_path / "saved", modules_to_save=["lm_head"], bias="lora_only")
    other = save_adapter(
        base, tmp_path / "other", seed=2, lora_bias=True, target_modules=["q_proj"]
    )
    made = build(recipe((base, saved, other), tmp_path / "out", method="ties", weights=[1, 0.5]))
    assert made.report["passed"]
    with pytest.raises(UnsupportedError, match="shipped whole, with weight 0.5"):
        build(recipe((base, saved, other), tmp_path / "no", method="ties", weights=[0.5, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "knots", "svd"])
def test_other_families(tmp_path, kind, method):
    """Weights stored (in, out), and experts of a stacked parameter."""
    base = save_base(kind, tmp_path / "base")
    options = {}
    if kind == "mixtral":
        options = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    pair = [
        save_adapter(base, tmp_path / n, seed=s, r=r, **options)
        for n, s, r in (("a", 3, 4), ("b", 4, 2))
    ]
    rank = {"rank": 3} if method == "svd" else {}
    made = build(recipe((base, *pair), tmp_path / "out", method=method, weights=[0.7, 1.2], **rank))
    assert made.report["passed"]


TEXTS = {
    "dora": "the quick brown fox jumps over the lazy dog, and over the fence. " * 30,
    "lora": "a lazy dog watches how quick foxes jump; brown ones jump best. " * 30,
}


@pytest.mark.slow
def test_auto_measures_on_texts(tmp_path):
    base = save_base_with_tokenizer("llama", tmp_path / "base")
    texts = {}
    for name, text in TEXTS.items():
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text(text)
    dora = save_adapter(base, tmp_path / "dora", use_dora=True)
    inputs = base, dora, save_adapter(base, tmp_path / "lora", seed=2)
    made = build(recipe(inputs, tmp_path / "out", method="auto", calibration=texts))
    choice = made.report["choice"]
    assert made.report["passed"]
    worst = [c["worst"] for c in choice["candidates"]]
    best = choice["candidates"][worst.index(min(worst))]
    assert made.manifest["history"] == [
        "Auto(calibration={dora: 'dora.txt', lora: 'lora.txt'})", best["compose"]
    ]  # fmt: skip
    assert best["worst"] == max(best["loss"].values()) and set(best["held_out"]) == set(TEXTS)
    assert len(worst) == len(set(map(str, choice["candidates"]))) >= 6
    assert str(tmp_path) not in json.dumps(made.manifest)
    # the chosen one's divergence, once more with transformers and PEFT on the files
    measured = divergence(inputs, tmp_path / "out", TEXTS["dora"])
    kl = best["kl"]["dora"]
    assert measured == pytest.approx((kl["chosen_on"] + kl["held_out"]) / 2, rel=0.02)
    short = tmp_path / "short.txt"
    short.write_text("the fox")
    with pytest.raises(RecipeError, match="at least 16"):
        build(recipe(inputs, tmp_path / "no", method="auto", calibration={**texts, "lora": short}))
    with pytest.raises(RecipeError, match="no text for lora"):
        build(recipe(inputs, tmp_path / "no", method="auto", calibration={"dora": texts["dora"]}))


def divergence(inputs, artifact, text) -> float:
    """Mean KL(adapter alone || artifact) over the first eight rows of 64 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny import live

    base, adapter, _ = inputs
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"][:512]).view(8, 64)
    composed_model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    with torch.no_grad():
        p, q = (
            model(input_ids=ids).logits.double().log_softmax(-1)
            for model in (live(base, adapter), composed_model)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
def test_the_artifact_differs_from_a_plain_sum(tmp_path, llama):
    """What ties publishes is not what cat publishes: the proofs above prove something."""
    for method in ("cat", "ties"):
        build(recipe(llama, tmp_path / method, method=method, parity="off"))
    one, two = (load_file(tmp_path / m / "model.safetensors") for m in ("cat", "ties"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.abs((one[name] - two[name]).numpy()).max() > 1e-3
