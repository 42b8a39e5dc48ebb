"""genai_config.json, so that onnxruntime-genai loads the artifact folder as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptrix_export.errors import MachineError
from adaptrix_export.runtime.graph import ADAPTER_IDS

GRAPH = "model.onnx"

# Types that onnxruntime-genai 0.18 runs with its plain decoder loop under transformers' own name.
# All others, its `gpt2` included (which wants keys and values in one tensor), run as `decoder`.
KNOWN_TYPES = {
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "internlm2",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen3",
    "smollm3",
}
GENERIC_TYPE = "decoder"

# A number by the names that model families give it, first found wins.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "n_embed")
# For families without a limit (ALiBi): genai insists on a number and allocates nothing from it.
UNLIMITED_CONTEXT = 32768

# Of a row's cache that genai keeps in one buffer: 8192 tokens of SmolLM2 take a third of it.
SHARED_BYTES = 1 << 30

_PAST, _PRESENT = "past_key_values.", "present."
_CONTEXT = "context."  # how statistics of gates begin

_Shape = tuple[Any, ...]  # of ints and symbolic dimensions


def genai_config(
    folder: Path, graph: Path, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The configuration of the decoder in `graph`; None without a KV cache, or with `adapter_ids`.

    `graph` lies in `folder`, which genai opens; `config` is the model's config.json, `generation`
    its generation_config.json. Input and output names come from the graph itself.
    """
    from adaptrix_export.graph.rewrite.facts import shares_cache  # needs onnx_ir

    model = _model(graph)
    # Slots for adapters are inputs with a default: adapter files name them, no configuration does.
    needed = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    inputs, outputs = _shapes(needed), _shapes(model.graph.outputs)
    cache_shape = inputs.get(f"{_PAST}0.key")
    if cache_shape is None or ADAPTER_IDS in inputs:  # genai cannot feed an adapter for each row
        return None
    text = text_config(config)
    context = _first(text, CONTEXT_KEYS) or UNLIMITED_CONTEXT
    names = {name: name for name in inputs if not name.startswith(_PAST)}
    _, kv_heads, _, head_size = cache_shape
    decoder = {
        "filename": graph.relative_to(folder).as_posix(),
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": head_size,
        "hidden_size": _first(text, WIDTH_KEYS),
        "num_attention_heads": _first(text, HEAD_KEYS),
        "num_hidden_layers": sum(n.startswith(_PAST) and n.endswith(".key") for n in inputs),
        "num_key_value_heads": kv_heads,
        "inputs": {
            **names,
            "past_key_names": f"{_PAST}%d.key",
            "past_value_names": f"{_PAST}%d.value",
        },
        "outputs": {
            # genai refuses outputs that it does not know, such as statistics of gates
            **{name: name for name in outputs if not name.startswith((_PRESENT, _CONTEXT))},
            "present_key_names": f"{_PRESENT}%d.key",
            "present_value_names": f"{_PRESENT}%d.value",
        },
    }
    kind = str(text.get("model_type", ""))
    return {
        "model": {
            "type": kind if kind in KNOWN_TYPES else GENERIC_TYPE,
            **token_ids(config, generation),
            "vocab_size": _vocabulary(outputs, text),
            "context_length": context,
            "decoder": {key: value for key, value in decoder.items() if value is not None},
        },
        "search": _greedy(context, _cache_bytes(needed) if shares_cache(model) else None),
    }


def _greedy(context: int, token_bytes: int | None) -> dict[str, Any]:
    """Options that a request may set otherwise; `token_bytes` of a cache that is updated in place.

    Such a cache is one buffer, made for all of `max_length`: by default no more than SHARED_BYTES.
    """
    shared = token_bytes is not None
    length = min(context, SHARED_BYTES // token_bytes) if token_bytes else context
    return {
        "do_sample": False,
        "early_stopping": True,
        "max_length": length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shared,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos (a list) and pad, where either file names them; generation_config.json wins."""
    text = text_config(config)

    def of(key: str) -> Any:
        values = (source.get(key) for source in (generation, config, text))
        return next((value for value in values if value is not None), None)

    eos = of("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    pad = of("pad_token_id")
    known = {
        "bos_token_id": of("bos_token_id"),
        "eos_token_id": ids,
        # genai pads with it even in a batch of one; transformers falls back on eos likewise.
        "pad_token_id": pad if pad is not None else next(iter(ids), 0),
    }
    return {key: value for key, value in known.items() if value is not None}


def _first(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _vocabulary(outputs: Mapping[str, _Shape], config: Mapping[str, Any]) -> int:
    """The width of the logits: what the graph says, else what the config says."""
    width = (outputs.get("logits") or (None,))[-1]
    return width if isinstance(width, int) else int(config["vocab_size"])


def _model(graph: Path) -> Any:
    """The graph; weights stay on disk."""
    import onnx_ir

    try:
        return onnx_ir.load(graph)
    except Exception as error:  # protobuf's and onnx_ir's errors share no narrower base
        raise MachineError(str(graph), f"cannot be read back ({error})") from error


def _shapes(values: Sequence[Any]) -> dict[str, _Shape]:
    return {value.name or "": tuple(value.shape or ()) for value in values}


def _cache_bytes(inputs: Sequence[Any]) -> int:
    """Bytes that the cache has for each token of a row."""
    past = [value for value in inputs if str(value.name).startswith(_PAST)]
    return sum(int(v.shape[1]) * int(v.shape[3]) * int(v.dtype.itemsize) for v in past)
