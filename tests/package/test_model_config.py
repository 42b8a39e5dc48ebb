"""config.json with the names of both generations of transformers."""

from __future__ import annotations

import copy
import json

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from adaptrix_export.package import portable_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(rope_theta=1e5, dtype="bfloat16"),
    "llama3": lambda: transformers.LlamaConfig(rope_theta=5e5, rope_scaling=dict(LLAMA3)),
    "qwen3": lambda: transformers.Qwen3Config(rope_theta=1e6),
    "gpt2": lambda: transformers.GPT2Config(dtype="float32"),
    "gemma3": lambda: transformers.Gemma3Config(dtype="bfloat16"),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "phi3": lambda: transformers.Phi3Config(
        rope_scaling=dict(LONGROPE),
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(),
    "modernbert": lambda: transformers.ModernBertConfig(),
    "olmo2": lambda: transformers.Olmo2Config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "phi": lambda: transformers.PhiConfig(),
}


def saved(name):
    """The config as transformers 5 writes it to a file."""
    return json.loads(CONFIGS[name]().to_json_string())


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_5_reads_the_same_model(name, tmp_path):
    """Its `rope_scaling or rope_parameters` makes the legacy key win, so it must say the same."""
    config = saved(name)
    for variant, content in (("plain", config), ("portable", portable_config(config))):
        (tmp_path / variant).mkdir()
        (tmp_path / variant / "config.json").write_text(json.dumps(content))
    plain = AutoConfig.from_pretrained(tmp_path / "plain").to_dict()
    portable = AutoConfig.from_pretrained(tmp_path / "portable").to_dict()
    for rope in (r for c in (plain, portable) for r in _ropes(c)):
        rope.pop("type", None)  # another spelling of rope_type
    assert _top(portable, plain) == _top(plain, plain)
    assert _ropes(portable) == _ropes(plain)


def _ropes(config):
    text = config.get("text_config", config)
    rope = text.get("rope_parameters") or {}
    return [rope, *(v for v in rope.values() if isinstance(v, dict))]


def _top(config, keys):
    """Without the nested configs, which gain keys of their own, and the folder it came from."""
    return {k: config.get(k) for k in keys if not k.endswith(("_config", "name_or_path"))}


# What the config classes of transformers 4.57 read, name by name.
EXPECTED = {
    "llama": {
        "rope_theta": 1e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    },
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "qwen3": {"rope_theta": 1e6, "rope_scaling": None},
    "gpt2": {"torch_dtype": "float32"},
    "gemma3_text": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    },
    "phi3": {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "rope_scaling": LONGROPE},
    "gpt_neox": {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
    "modernbert": {"global_rope_theta": 160000.0, "local_rope_theta": 1e4},
    "olmo2": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "phi": {"partial_rotary_factor": 0.5, "rope_theta": 1e4},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_names_of_transformers_4_stand_beside(name):
    portable = portable_config(saved(name))
    assert {k: portable.get(k, "missing") for k in EXPECTED[name]} == EXPECTED[name]


def test_nested_text_configs_are_treated_too():
    portable = portable_config(saved("gemma3"), "float32")
    assert portable["text_config"]["rope_local_base_freq"] == 1e4
    assert portable["dtype"] == portable["torch_dtype"] == "float32"


def test_gpt2_has_no_rotary_keys():
    assert not [k for k in portable_config(saved("gpt2")) if "rope" in k]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_key_is_altered_and_the_argument_is_not_touched(name):
    config = saved(name)
    before = copy.deepcopy(config)
    portable = portable_config(config)
    assert config == before
    assert _top(portable, config) == _top(config, config)
    assert portable_config(portable) == portable


def test_a_file_of_transformers_4_keeps_its_values_and_gains_dtype():
    old = {
        "model_type": "llama",
        "rope_theta": 1e5,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    }
    assert portable_config(old) == {**old, "dtype": "float16"}


def test_the_dtype_is_the_artifacts_where_given():
    portable = portable_config(saved("llama"), "float32")
    assert (portable["dtype"], portable["torch_dtype"]) == ("float32", "float32")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["dtype", "rope_parameters", "model_type", "x"]), _json))
def test_strange_configs_keep_their_keys(config):
    portable = portable_config(config)
    assert all(portable[k] == v for k, v in config.items() if not isinstance(v, dict))
    assert portable_config(portable) == portable
