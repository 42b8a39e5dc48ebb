"""Approximation by SVD: only when asked, the best there is, and the loss told as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptrix_export.errors import RecipeError, UnsupportedError
from adaptrix_export.passes.approximate import nearest
from adaptrix_export.pipeline import build
from adaptrix_export.runtime import Session
from tests.artifacts import save_base_with_tokenizer
from tests.switchable import recipe
from tests.tiny import live, save_adapter

OFF = {"parity": {"level": "off"}}
IDS = np.arange(5, 30)[None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dora")
    base = save_base_with_tokenizer("llama", folder / "base", initializer_range=0.15)
    options = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"]}
    dora = save_adapter(base, folder / "dora", use_dora=True, **options)
    return base, dora


def off_by(base, dora, out):
    with torch.no_grad():
        expected = live(base, dora)(torch.tensor(IDS)).logits.numpy()
    return float(np.abs(Session(out).logits(IDS, adapter="dora") - expected).max())


def test_a_full_rank_is_exact_and_a_small_one_loses_what_is_told(pair, tmp_path):
    base, dora = pair
    found = {}
    for rank in (64, 8, 2):
        slots = {"approximate": "svd", "rank": rank}
        outcome = build(recipe(base, {"dora": dora}, tmp_path / str(rank), slots=slots, **OFF))
        note = next(n for n in outcome.notes if "approximated at rank" in n)
        found[rank] = (off_by(base, dora, tmp_path / str(rank)), note)
    assert found[64][0] < 1e-4 < found[8][0] < found[2][0]
    assert "at rank 2:" in found[2][1] and "% of its delta is lost" in found[2][1]


@pytest.mark.slow
def test_the_proof_is_against_the_approximation_and_says_so(pair, tmp_path):
    base, dora = pair
    slots = {"approximate": "svd", "rank": 8}
    report = build(recipe(base, {"dora": dora}, tmp_path / "out", slots=slots)).report
    assert report["passed"] and report["oracle"].endswith("with dora approximated by SVD")
    told = report["approximated"]["dora"]
    assert told["rank"] == 8 and 0 < told["error"] <= told["worst"] < 1


def test_the_loss_is_the_frobenius_norm_of_what_is_left_out():
    random = np.random.default_rng(0)
    delta = random.normal(size=(12, 20))
    a, b = nearest(delta, 3)
    values = np.linalg.svd(delta, compute_uv=False)
    left = np.linalg.norm(delta - b.astype(float) @ a.astype(float))
    assert left == pytest.approx(np.sqrt((values[3:] ** 2).sum()), rel=1e-6)
    assert a.shape == (3, 20) and nearest(delta, 99)[0].shape == (12, 20)


def test_plain_lora_is_left_alone_and_nothing_happens_unasked(pair, tmp_path):
    base, dora = pair
    plain = save_adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    asked = {"slots": {"approximate": "svd", "rank": 2}}
    one = build(recipe(base, {"plain": plain}, tmp_path / "one", **asked, **OFF))
    two = build(recipe(base, {"plain": plain}, tmp_path / "two", **OFF))
    assert one.manifest["outputs"] == two.manifest["outputs"]
    assert not any("approximated" in note for note in one.notes)
    with pytest.raises(UnsupportedError, match=r"Dora, which no slot can hold.*approximate=svd"):
        build(recipe(base, {"dora": dora}, tmp_path / "no", **OFF))
    saved = save_adapter(base, tmp_path / "saved", target_modules=["q_proj"], bias="none",
                         modules_to_save=["lm_head"])  # fmt: skip
    with pytest.raises(UnsupportedError, match="saved: lm_head: no weight of a linear layer"):
        build(recipe(base, {"saved": saved}, tmp_path / "no", **asked, **OFF))
    with pytest.raises(RecipeError, match="slots with target onnx"):
        recipe(base, {"plain": plain}, tmp_path / "no", target="onnx", **asked)
