"""Negative controls, one for each kind of threshold: a graph that forgets it is not published.

The sabotage is in what the front end is told of the model; the reference knows the config itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoConfig

from adaptrix_export.cli import main
from adaptrix_export.compat import transformers_tracing
from adaptrix_export.graph.frontends import native, traced
from adaptrix_export.prove.preflight import preflight as module
from adaptrix_export.prove.preflight.child import answer
from adaptrix_export.prove.preflight.replica import shrunk
from tests.tiny import save_adapter, save_base

GENERATION = "text-generation"
HEAD = 32
LONGROPE: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0,
    "intermediate_size": 128, "sliding_window": None, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
        "short_factor": [1 + n / 10 for n in range(HEAD // 2)],
        "long_factor": [2 + n / 5 for n in range(HEAD // 2)],
    },
}  # fmt: skip
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}
WINDOW = {"sliding_window": 512}


def question(kind: str, frontend: str, **changed: Any) -> dict[str, Any]:
    config = AutoConfig.for_model(kind, **changed).to_dict()
    small = shrunk(json.loads(json.dumps(config, default=str)))
    return {"config": small, "task": GENERATION, "provider": "cpu", "frontend": frontend}


def lie(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """`live_config`, its answer changed."""
    real = traced.live_config

    def live_config(plan: Any) -> Any:
        config = real(plan)
        change(config)
        return config

    return live_config


def no_window(config: Any) -> None:
    config.sliding_window = None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * len(config.layer_types)


def another_pattern(config: Any) -> None:
    config.layer_types = config.layer_types[1:] + config.layer_types[:1]


def rotated(config: Any) -> None:
    config.no_rope_layers = [1] * len(config.no_rope_layers)


def wide_locals(config: Any) -> None:
    config.window_size = 1024


def short_alone(config: Any) -> None:
    config.rope_parameters["long_factor"] = config.rope_parameters["short_factor"]


def unscaled(config: Any) -> None:
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}


# kind of threshold -> front end, model type, its options, what is forgotten, what the proof says
CONTROLS: dict[str, tuple[str, str, dict[str, Any], Callable[[Any], None], str]] = {
    "sliding window": ("native", "mistral", WINDOW, no_window, "prefill"),
    "sliding window, traced": ("traced", "mistral", WINDOW, no_window, "prefill"),
    "layers without rotation": ("native", "smollm3", {}, rotated, "prefill"),
    "layer pattern": ("traced", "gemma3_text", {}, another_pattern, "prefill"),
    "local": ("traced", "gpt_neo", {}, wide_locals, "prefill"),
    "longrope": ("traced", "phi3", LONGROPE, short_alone, "across a longrope"),
    "dynamic": ("traced", "llama", DYNAMIC, unscaled, "across a dynamic"),
}
SLOW = {name for name, (frontend, *_) in CONTROLS.items() if frontend == "traced"}
KINDS = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONTROLS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_without_its_threshold_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontend, model_type, options, forget, said = CONTROLS[kind]
    place = native if frontend == "native" else traced
    monkeypatch.setattr(place, "live_config", lie(forget))
    found = answer(question(model_type, frontend, **options), tmp_path)
    assert not found["passed"]
    assert said in found["why"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTROLS)
def test_the_same_graph_with_its_threshold_passes(kind: str, tmp_path: Path) -> None:
    frontend, model_type, options, *_ = CONTROLS[kind]
    found = answer(question(model_type, frontend, **options), tmp_path)
    assert found == {"passed": True, "why": ""}


@pytest.mark.slow
def test_learned_positions_that_forget_the_cache_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced: the table is read by the place of a token among those of this call."""
    real = traced.weightless

    def by_place(*given: Any) -> Any:
        model = real(*given)
        table = model.transformer.wpe
        read = table.forward
        table.forward = lambda ids: read((ids * 0 + 1).cumsum(1) - 1)
        return model

    monkeypatch.setattr(traced, "weightless", by_place)
    found = answer(question("gpt2", "traced"), tmp_path)
    assert not found["passed"] and "of a small replica is off by" in found["why"]


@pytest.mark.slow
def test_learned_positions_that_count_pads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native: without the prelude that moves pads to the right."""
    monkeypatch.setattr(native, "needs_left_padding", lambda _: False)
    found = answer(question("gpt2", "native"), tmp_path)
    assert not found["passed"]
    assert found["why"].startswith("left-padded batch of a small replica is off by")


# Chunked attention is of Llama 4 alone, whose trace cannot be turned into ONNX (ConversionError,
# torch 2.13, transformers 5.24): neither front end draws it.
# Kinds that mobius-onnx 0.1.0 does not draw: nothing needs to be forgotten, the proof refuses them.
NOT_NATIVE: dict[str, tuple[str, dict[str, Any], str]] = {
    "layer pattern": ("gemma3_text", {}, "prefill of a small replica is off by"),
    "chunked": ("llama4_text", {}, "an initializer without a tensor in the base"),
    "local": ("gpt_neo", {}, "prefill of a small replica is off by"),
    "longrope": ("phi3", LONGROPE, "prefill across a longrope rotary embedding of 32"),
    "dynamic": ("llama", DYNAMIC, "a small replica does not run"),
    "alibi": ("bloom", {}, "prefill of a small replica is off by"),
    "alibi, slopes as weights": ("mpt", {}, "a weight that mobius-onnx computes by itself"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOT_NATIVE)
def test_what_the_native_front_end_draws_wrong_is_refused(kind: str, tmp_path: Path) -> None:
    model_type, options, said = NOT_NATIVE[kind]
    found = answer(question(model_type, "native", **options), tmp_path)
    assert not found["passed"] and said in found["why"]


@pytest.mark.slow
def test_an_alibi_that_counts_pads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_tracing, "_after", lambda visible: (~visible).float())
    found = answer(question("mpt", "traced"), tmp_path)
    assert not found["passed"]


def test_the_build_of_a_sabotaged_graph_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, its replica's process run in this one, where the sabotage is."""
    base = save_base("llama", tmp_path / "plain")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": 64}
    config["architectures"] = ["MistralForCausalLM"]
    (base / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(base, tmp_path / "adapter")

    def here(_: str, job: str, *rest: object) -> dict[str, Any]:
        (tmp_path / "replica").mkdir()
        return answer(json.loads(job), tmp_path / "replica")

    monkeypatch.setenv(module.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(module, "ask", here)
    monkeypatch.setattr(native, "live_config", lie(no_window))
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["build", "--base", str(base), "--adapter", str(adapter),
                              "--target", "onnx", "--frontend", "native", "--parity", "off",
                              "--out", str(out)])  # fmt: skip
    assert done.exit_code == 2
    assert "front end native, model type 'mistral': prefill of a small replica is off by" in (
        done.stderr
    )
    assert not out.exists()
