"""One decoder graph in ONNX Runtime: what it takes, what it gives, and what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.files import read_object
from adaptrix_export.runtime.layout import located
from adaptrix_export.runtime.providers import AUTO, provider_unavailable, requested_providers
from adaptrix_export.runtime.requirement import check_runtime
from adaptrix_export.runtime.stamps import FACTS

GRAPH = "model.onnx"
SLOTLESS = "slotless.onnx"  # beside a graph with slots: the base over the same weights file
ENCODER = "encoder_model.onnx"  # beside a decoder that takes its states
LOGITS = "logits"
ADAPTER_IDS = "adapter_ids"

# ONNX Runtime's name of an element type -> its number in ONNX.
_CACHE_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_LOGIT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

# What has a file, and how to make one.
_MADE_BY = {
    GRAPH: ("an ONNX artifact folder", "name a folder that `build --target onnx` made"),
    SLOTLESS: ("an artifact with slots, and not of an adapter a row", "leave the twin out"),
}

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class CacheSlot:
    """A cache tensor: `past` (batch, kv_heads, past, head_dim) goes in, `present` comes out."""

    past: str
    present: str
    heads: int
    size: int
    element: int


@dataclass(frozen=True)
class AdapterSlot:
    """A place for a pair of factors: input `a` (inputs, r) and input `b` (r, outputs), any r."""

    name: str
    a: str
    b: str
    inputs: int
    outputs: int


def _refuse_others(folder: Path) -> None:
    """Raise SourceError for what does something else than generate, whatever its outputs are."""
    kind = "an encoder-decoder" if located(folder, ENCODER).is_file() else None
    config = folder / "config.json"
    if kind is None and config.is_file():
        names = read_object(config).get("architectures")
        names = names if isinstance(names, list) else []
        kind = "a classifier" if any(str(n).endswith("Classification") for n in names) else None
    if kind is not None:
        raise SourceError(
            str(folder), kind, "a language model with a decoder alone",
            "load it with transformers.js or optimum",
        )  # fmt: skip


class DecoderGraph:
    """An ONNX Runtime session over `model.onnx`, or another `file`, of an artifact folder.

    Raises SourceError if the folder holds no graph, or one that is not a language model, and for
    a provider that is not there. `shares_cache` says that the cache may be updated in place;
    `rows` names the adapters that `adapter_ids` chooses among, where the graph has that input.
    """

    def __init__(
        self, folder: Path, threads: int = 0, provider: str = AUTO, file: str = GRAPH
    ) -> None:
        path = located(folder, file)
        _refuse_others(folder)
        if not path.is_file():
            raise SourceError(
                str(folder),
                f"no {file}",
                *_MADE_BY[file],
            )
        self.session = _session(path, threads, provider)
        active = self.session.get_providers()
        self.provider = next(p for p in requested_providers(AUTO, active) if p.name == active[0])
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        if not {"input_ids", "attention_mask"} <= inputs.keys() or LOGITS not in outputs:
            raise SourceError(
                str(path),
                f"takes {', '.join(inputs)} and gives {', '.join(outputs)}",
                f"input_ids, attention_mask and {LOGITS}",
                "only language models can be run",
            )
        self.takes_positions = "position_ids" in inputs
        self.takes_ids = ADAPTER_IDS in inputs
        self.cache = tuple(_slots(inputs, list(outputs), path))
        self.vocabulary, self.logit_type = _logits(outputs[LOGITS], path)
        facts = _facts(self.session, path)
        self.shares_cache, self.model_version = facts.shares_cache, facts.model_version
        self.rows, self.slots = facts.rows, facts.slots


def _session(path: Path, threads: int, provider: str) -> Any:
    import onnxruntime

    check_runtime(path, onnxruntime.__version__)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # 0: one a physical core
    options.log_severity_level = 4  # what fails is raised, and its warnings are about itself
    # A pattern is for inputs of one shape. The mask grows with every token, so each step would
    # trace and keep a pattern that no step reads again: 3% of decoding without slots, 7% with.
    options.enable_mem_pattern = False
    chosen = requested_providers(provider, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=[p.name for p in chosen]
        )
    except Exception as error:  # ONNX Runtime's errors share no narrower base
        raise SourceError(str(path), f"cannot be loaded ({error})", "an ONNX model") from error
    if provider != AUTO and session.get_providers()[0] != chosen[0].name:
        # it goes on with the next provider when one cannot start, with a warning at most
        raise provider_unavailable(provider, chosen[0], session.get_providers())
    return session


@dataclass(frozen=True)
class Facts:
    """What a graph says of itself; of one that was not made here, nothing is known."""

    shares_cache: bool = False
    model_version: int = 0
    rows: tuple[str, ...] = ()
    slots: Mapping[str, AdapterSlot] = field(default_factory=dict)


def _facts(session: Any, path: Path) -> Facts:
    text = session.get_modelmeta().custom_metadata_map.get(FACTS)
    if text is None:
        return Facts()
    try:
        content = json.loads(text)
        return Facts(
            shares_cache=bool(content.get("shared_cache", False)),
            model_version=int(content.get("model_version", 0)),
            rows=tuple(map(str, content.get("rows", ()))),
            slots={
                str(s["name"]): AdapterSlot(
                    str(s["name"]), s["a"], s["b"], int(s["inputs"]), int(s["outputs"])
                )
                for s in content.get("slots", ())
            },
        )  # fmt: skip
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise SourceError(
            f"{path}: metadata {FACTS}", f"unreadable ({error!r})", "what a build writes there",
            "build again",
        ) from error  # fmt: skip


def _logits(output: Any, path: Path) -> tuple[int | None, Any]:
    """The vocabulary, None if the graph does not say, and the numpy type of the logits."""
    if output.type not in _LOGIT_TYPES:
        raise SourceError(f"{path}: {LOGITS}", output.type, " or ".join(_LOGIT_TYPES))
    width = output.shape[-1]
    return (width if isinstance(width, int) else None), _LOGIT_TYPES[output.type]


def _slots(inputs: dict[str, Any], outputs: list[str], path: Path) -> list[CacheSlot]:
    slots = []
    for name, value in inputs.items():
        if not name.startswith("past_key_values."):
            continue
        present = name.replace("past_key_values.", "present.", 1)
        element = _CACHE_TYPES.get(value.type)
        if present not in outputs or element is None:
            raise SourceError(
                f"{path}: {name}",
                f"{value.type} without {present}" if element else value.type,
                "a float cache that comes back out",
                "build again",
            )
        _, heads, _, size = value.shape
        slots.append(CacheSlot(name, present, heads, size, element))
    return slots
