"""Drift: measured ratios against an independent computation, and the tau that follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.errors import RecipeError
from adaptrix_export.measure.drift import LENGTH, ROWS, Drift, measure, sample
from adaptrix_export.plan import Site
from adaptrix_export.progress import Silent
from tests.artifacts import plan_of
from tests.tiny import live, save_adapter, save_base

FIRST, SECOND = (Site("model.layers", 0, f"mlp.{name}") for name in ("up_proj", "down_proj"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("drift")
    base = save_base("llama", folder / "base", initializer_range=0.15)
    return base, save_adapter(base, folder / "adapter")


def test_the_ratios_are_those_of_the_factors_and_weights(folders: tuple[Path, Path]) -> None:
    """Each token's d from B A x and y0 from W x, taken from the modules themselves in fp64."""
    found = measure(plan_of(*folders), Silent())
    assert found.tokens == ROWS * LENGTH / 8  # a base without a tokenizer: 256 seeded ids
    model, site = live(*folders), Site("model.layers", 2, "self_attn.q_proj")
    layer, wanted = model.base_model.model.get_submodule(site.path), []

    def hook(_: object, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        x = inputs[0][0].double()
        d = x @ layer.lora_A["a0"].weight.double().T @ layer.lora_B["a0"].weight.double().T
        y0 = x @ layer.base_layer.weight.double().T
        wanted.append((7 / 4 * d.norm(dim=1) / y0.norm(dim=1)).detach().numpy())

    layer.register_forward_hook(hook)
    ids = np.random.default_rng(0).integers(0, 300, size=256)
    with torch.inference_mode():
        for row in ids.reshape(-1, LENGTH):
            model(input_ids=torch.from_numpy(row)[None])
    np.testing.assert_allclose(found.ratios[site], np.concatenate(wanted), rtol=1e-3)


def test_tau_leaves_the_chosen_share_alone() -> None:
    rng = np.random.default_rng(0)
    drift = Drift({FIRST: rng.random(1000), SECOND: rng.random(1000)}, "text")
    for share in (0.5, 0.9, 0.99):
        tau = drift.tau(share)
        assert drift.clamped(tau) <= 1 - share
        assert drift.clamped(tau * 0.99) > 1 - share  # and it is no larger than that takes
        assert drift.tau(share, "layer") == pytest.approx(tau * np.sqrt(2), rel=3e-3)


def test_a_base_output_of_zero_cannot_be_calibrated() -> None:
    drift = Drift({FIRST: np.array([0.1, 0.2, np.inf])}, "text")
    assert drift.tau(0.5) == pytest.approx(0.2, rel=2e-3)
    with pytest.raises(RecipeError, match="zero"):
        drift.tau(1.0)


def test_the_built_in_text_is_prose_and_always_the_same() -> None:
    assert sample() == sample() and len(sample().split()) > 1000


def test_the_command_says_what_was_measured(folders: tuple[Path, Path]) -> None:
    base, adapter = (str(folder) for folder in folders)
    done = CliRunner().invoke(main, ["drift", base, adapter, "--share", "0.5", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["sites"]) == 28 and told["share"] == 0.5
    assert max(line["median"] for line in told["sites"]) <= told["tau"]
    missing = CliRunner().invoke(main, ["drift", base, adapter, "--text", "/no/such/file"])
    assert missing.exit_code == 2 and "--text" in missing.output
