"""The oracle: stock transformers and PEFT on the original files, in float32, eager, on the CPU.

Only the child process imports this module; it needs torch, transformers and peft.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

from adaptrix_export.arch.classes import live_class
from adaptrix_export.arch.pieces import Piece
from adaptrix_export.arch.tasks import FEATURES, GENERATION, LABELS, TASKS, has_row
from adaptrix_export.compat.gguf import gguf_read_once
from adaptrix_export.compat.transformers import cache_argument, cache_of
from adaptrix_export.errors import ParityError
from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.oracle.compare import Ids, Logits
from adaptrix_export.oracle.dequantize import (
    dequantized_state,
    quantization_of,
    simulate,
    stored_dtype,
)
from adaptrix_export.oracle.drawn import forward_on_drawn, vision_on_drawn
from adaptrix_export.oracle.encoded import pooled
from adaptrix_export.oracle.gated import LiveGates, Statistics
from adaptrix_export.oracle.job import GateSpec, Job
from adaptrix_export.oracle.live import live_parameter
from adaptrix_export.oracle.seeing import LiveSeeing, seen_sources
from adaptrix_export.oracle.thresholds import thresholds
from adaptrix_export.oracle.translated import Chunks, LiveTranslator, Source
from adaptrix_export.oracle.whole import LiveWhole, pieces_of_model

WEIGHTS = "adapter_model.safetensors"
PROMPT = "prompt_embeddings"  # what PEFT calls a learned prompt


class Reference:
    """Base and adapters as their own libraries load and run them, every adapter active at once.

    PEFT drops adapter keys that it cannot place, with a warning at most, and the model then *is*
    the base. So after loading, every tensor of every adapter file must be found in the live
    model, equal in value, or construction raises `ParityError`.
    """

    def __init__(self, model: Any, gates: Sequence[GateSpec] = ()) -> None:
        self._model = model
        self._plain: Any = model  # the transformers model, its modules replaced by PEFT's
        self._prompt = 0  # virtual tokens that have logits of their own
        self._prompted = False
        if isinstance(model, peft.PeftModel):
            self._plain = model.get_base_model()
            self._prompted = bool(model.active_peft_config.is_prompt_learning)
            if self._prompted and model.active_peft_config.peft_type != "PREFIX_TUNING":
                self._prompt = int(model.active_peft_config.num_virtual_tokens)
        switch_points = thresholds(self._plain.config.to_dict())
        self._switches = any(threshold.switching for threshold in switch_points)
        self._gates = LiveGates(self._plain, gates) if gates else None

    @classmethod
    def open(cls, job: Job) -> Reference:
        """Loads the files that `job` names."""
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        torch.manual_seed(0)  # nothing should be drawn; if something is, let it be the same thing
        model = adapted_model(job.base_folder, job.gguf_file, job.task, job.adapters, job.simulated)
        return cls(model, job.gates)

    @property
    def config(self) -> Any:
        return self._plain.config

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows: rows of its input embedding."""
        ends = _ends(self._plain)
        return int(ends[0].weight.shape[0]) if ends and hasattr(ends[0], "weight") else 0

    @property
    def positions(self) -> int | None:
        """Longest sequence, or None where the config names no limit.

        Rotary embeddings that are scaled dynamically go on beyond the number in the config.
        """
        config = self._plain.config.get_text_config(decoder=True)
        names = ("max_position_embeddings", "max_target_positions")
        limit = next((n for name in names if (n := getattr(config, name, None))), None)
        rope = getattr(config, "rope_parameters", None) or {}
        factor = rope.get("factor", 1) if rope.get("rope_type") == "dynamic" else 1
        return int(limit * factor) if limit else None

    @property
    def pad(self) -> int | None:
        """The token that fills up a row, or None where the config names none."""
        pad = getattr(self._plain.config, "pad_token_id", None)
        return None if pad is None else int(pad)

    def prefill(self, ids: list[int]) -> Logits:
        """One forward pass over one unpadded row. Returns float32 logits (len(ids), vocabulary)."""
        fed: dict[str, Any] = {} if self._prompted else {"use_cache": False}
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([ids]), **fed).logits
        return cast(Logits, logits[0, self._prompt :].float().numpy())

    def encode(self, ids: Ids, mask: Ids, types: Ids) -> Logits:
        """Whole rows without a cache; see the function of that name."""
        return encode(self._model, ids, mask, types)

    def pool(self, ids: Ids, mask: Ids, types: Ids, kind: str) -> Logits:
        """One vector a row, of the hidden states that `encode` gives: (batch, 1, width)."""
        return pooled(self.encode(ids, mask, types), mask, kind)

    def forward(self) -> Logits:
        """One pass over drawn inputs; see `oracle/drawn.py`."""
        return forward_on_drawn(self._model, self._plain)

    def images(self) -> Logits:
        """The vision tower alone."""
        return vision_on_drawn(self._plain)

    @property
    def has_images(self) -> bool:
        return hasattr(self._plain, "get_image_features") and self._plain.can_generate()

    def states(self, source: Source) -> Logits:
        """An encoder-decoder's encoder; see `translated.py`."""
        return LiveTranslator(self._model).states(source)

    def translate(self, source: Source, chunks: Chunks) -> Logits:
        return LiveTranslator(self._model).translate(source, chunks)

    def translated(self, source: Source, steps: int) -> tuple[list[int], Logits]:
        return LiveTranslator(self._model).greedy(source, steps)

    def answer(self, piece: Piece, fed: Source, output: str) -> Logits:
        """One output of one call; see `whole.py`."""
        return LiveWhole(self._model).answer(piece, fed, output)

    def vision_sources(self) -> dict[str, dict[str, NDArray[Any]]]:
        """What a vision-language model is asked; see `seeing.py`."""
        return seen_sources(self._plain)

    def look(self, source: Source) -> Logits:
        return LiveSeeing(self._model, self._plain).look(source)

    def converse(self, source: Source, cut: int) -> Logits:
        return LiveSeeing(self._model, self._plain).converse(source, cut)

    def pieces(self, task: str) -> tuple[Piece, ...]:
        """The graphs that an artifact of this model has."""
        return pieces_of_model(self._plain, task)

    def step(self, ids: Ids, mask: Ids, positions: Ids, cache: Any) -> tuple[Logits, Any]:
        """Feeds `ids` (batch, new) after `cache` (None at first), as transformers' generate does.

        `mask` (batch, past + new) is 0 at pads. Returns logits (batch, new, vocabulary) and cache.
        """
        with torch.inference_mode():
            if cache is None and self._switches:
                # Rotary embeddings that follow the length remember the longest sequence so far,
                # of any call; a short one makes them forget it.
                self._model(input_ids=torch.tensor([[0]]), use_cache=False)
            out = self._model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                past_key_values=cache,
                use_cache=True,
            )
        return cast(Logits, out.logits.float().numpy()), out.past_key_values

    def greedy(self, ids: list[int], steps: int) -> tuple[list[int], Logits]:
        """`steps` tokens after `ids`, each the argmax, through the cache; no end token stops it.

        Returns the tokens and the logits (steps, vocabulary) that each was picked from.
        """
        tokens: list[int] = []
        picked_from: list[Logits] = []
        if self._prompted:  # PEFT puts the prompt before every call, a cached one too
            for _ in range(steps):
                picked_from.append(self.prefill([*ids, *tokens])[-1])
                tokens.append(int(picked_from[-1].argmax()))
            return tokens, np.stack(picked_from)
        cache, fed = None, list(ids)
        with torch.inference_mode():
            for _ in range(steps):
                out = self._model(
                    input_ids=torch.tensor([fed]), **cache_argument(cache), use_cache=True
                )
                cache, logits = cache_of(out), out.logits[0, -1].float().numpy()
                fed = [int(logits.argmax())]
                tokens += fed
                picked_from.append(logits)
        return tokens, np.stack(picked_from)

    def live_weight(self, name: str) -> NDArray[np.float64]:
        """What the model effectively has for the plain model's parameter `name`, in fp64."""
        return self.live(name)[0]

    def live(self, name: str, widen: bool = True) -> tuple[NDArray[Any], bool]:
        """`live_weight(name)`, and whether any adapter acts on it; without `widen` a parameter that
        none acts on is a view of what the model has, not a copy in fp64."""
        if name == PROMPT:
            learned = self._model.prompt_encoder["default"].embedding.weight
            return learned.detach().double().numpy(), True
        gated = self._gates.parameter(name) if self._gates else None
        value, changed = gated or live_parameter(self._plain, name, widen)
        return value.numpy(), changed

    def watch(self, site: str, hook: Any) -> Any:
        """A forward hook on the live layer at a site; the handle that removes it."""
        return self._plain.get_submodule(site).register_forward_hook(hook)

    def room(self, name: str) -> float:
        """How far rounding alone may have moved the last `live_weight(name)`, absolute."""
        return 0.0

    def put_gates(self, gates: Sequence[GateSpec]) -> tuple[GateSpec, ...]:
        """Gate the modules that an adapter acts on, of those in `gates`; returns their gates.

        At all others there is nothing to gate: y is y0.
        """
        adapted = self.adapted()
        own = tuple(gate for gate in gates if gate.site in adapted)
        self._gates = LiveGates(self._plain, own) if own else None
        return own

    def gate_statistics(self, ask: Callable[[Reference], object]) -> Statistics:
        """Of every gate, over all tokens that `ask` passes through this model."""
        assert self._gates is not None
        self._gates.forget()
        ask(self)
        statistics = self._gates.statistics()
        self._gates.forget()
        return statistics

    def delta(self, site: str) -> tuple[NDArray[np.float64] | None, float]:
        """What adapters add to the weight of a linear module, fp64 (outputs, inputs), and the size
        of the weight's largest value; None where no adapter acts on it."""
        value, changed = live_parameter(self._plain, f"{site}.weight")
        if not changed:
            return None, 0.0
        layer = self._plain.get_submodule(site).get_base_layer()
        own = layer.weight.detach().double()
        added = value - own
        if type(layer).__name__ == "Conv1D":
            added = added.T
        return added.numpy(), float(own.abs().max())

    def adapted(self) -> set[str]:
        """Paths of the modules that some adapter acts on."""
        return {n for n, m in self._plain.named_modules() if hasattr(m, "get_base_layer")}

    def close(self) -> None:
        """Gives the memory back, so that the artifact can be loaded in its place; a model that
        somebody else holds, too, is without gates again."""
        if self._gates:
            self._gates.remove()
        self._model = self._plain = self._gates = None
        gc.collect()


def adapted_model(
    folder: Path,
    gguf_file: str | None,
    task: str,
    adapters: tuple[tuple[str, Path], ...],
    simulated: str | None,
) -> Any:
    """The model of a task with every adapter (name, PEFT folder) active and proved to be there.

    Raises ParityError for files that transformers or PEFT do not load whole.
    """
    model = bare_model(folder, gguf_file, task, adapters, simulated)
    if adapters:
        model = with_adapters(model, adapters)
    return model.eval()


def bare_model(
    folder: Path,
    gguf_file: str | None,
    task: str,
    adapters: tuple[tuple[str, Path], ...],
    simulated: str | None,
) -> Any:
    """The base without the adapters (name, PEFT folder), with room for what they ship whole."""
    shipped = shipped_whole(adapters)
    model = load_model(folder, gguf_file, task, shipped, simulated)
    resize_vocabulary(model, shipped)
    return model.eval()


def encode(model: Any, ids: Ids, mask: Ids, types: Ids) -> Logits:
    """Whole rows at once: (batch, tokens, width) last hidden states or token logits.

    Logits of a classifier of sequences become (batch, 1, labels). `types` reach only a model
    that has more than one token type.
    """
    fed = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        fed["token_type_ids"] = torch.from_numpy(types)
    with torch.inference_mode():
        out = model(**fed)
    output = out.logits if "logits" in out else out.last_hidden_state
    values = cast(Logits, output.float().numpy())
    return values if values.ndim == 3 else values[:, None]


def shipped_whole(adapters: tuple[tuple[str, Path], ...]) -> dict[str, tuple[int, ...]]:
    """Parameters of the plain model that the adapters' files hold whole: name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for _, folder in adapters:
        if (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, "np") as file:
                for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
                    name = key.removeprefix("base_model.model.")
                    for wrapper in (".base_layer.", ".original_module."):
                        name = name.replace(wrapper, ".")
                    shapes[name] = tuple(file.get_slice(key).get_shape())
    return shapes


def resize_vocabulary(model: Any, shipped: Mapping[str, tuple[int, ...]]) -> None:
    """Give the base as many tokens as the adapter was saved with, as its user did before training.

    The new rows are then overwritten by the adapter's; `_check_arrival` sees to that.
    """
    ends = _ends(model)
    homes = {name: m for name, m in model.named_modules() if any(m is end for end in ends if end)}
    for name, module in homes.items():
        shape = shipped.get(f"{name}.weight")
        if shape is not None and shape[0] != module.weight.shape[0]:
            model.resize_token_embeddings(shape[0], mean_resizing=False)
            return


def _ends(model: Any) -> tuple[Any, ...]:
    """Embedding and head; nothing of a model that reads no tokens."""
    try:
        return (model.get_input_embeddings(), model.get_output_embeddings())
    except (NotImplementedError, AttributeError):
        return ()


def load_model(
    folder: Path,
    gguf_file: str | None = None,
    task: str = GENERATION,
    shipped: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    simulated: str | None = None,
) -> Any:
    """The model of a task in float32 with eager attention, from local files only.

    A quantized checkpoint is dequantized; `simulated` names a quantization that plain weights are
    put through. transformers fills a tensor that is missing from the files with random values and
    a warning; here that is a `ParityError`, except for a head that an adapter ships whole
    (`shipped`) and a pooler where only the hidden states are looked at.
    """
    options: dict[str, Any] = {}
    heads = [shipped[n] for n in LABELS if n in shipped]
    if TASKS[task].labels and heads:
        options["num_labels"] = heads[0][0]
    auto: Any = model_class(folder, gguf_file, task)
    place: Path | None = folder
    settings = None if gguf_file else quantization_of(folder)
    if settings:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        with torch.device("meta"):
            skeleton = auto.from_config(config)
        auto, place = type(skeleton), None  # the class itself takes tensors in place of files
        options["config"] = config
        options["state_dict"] = dequantized_state(folder, settings, skeleton)
    if gguf_file:
        options["gguf_file"] = gguf_file
        options["quantization_config"] = transformers.GgufConfig(
            dequantize=True, gguf_file=gguf_file
        )
    with gguf_read_once() if gguf_file else nullcontext():
        model, info = auto.from_pretrained(
            place,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        keys = [str(k) for k in info.get(problem) or () if not _is_expected(str(k), task, shipped)]
        if keys:
            first = min(keys)
            raise ParityError(
                folder.name, f"transformers loaded it with {problem}: {first}", "every tensor found"
            )
    if simulated:
        simulate(model, simulated, stored_dtype(folder))
    return model.eval()


def model_class(folder: Path, gguf_file: str | None, task: str) -> Any:
    """The class that loads a checkpoint for a task: the auto class, or the one that the names were
    read off (`arch/skeleton.py`)."""
    if gguf_file is None:
        config = read_json(folder / "config.json")
        if not has_row(config, task):
            return live_class(folder.name, config, task)
    return getattr(transformers, TASKS[task].auto)


def _is_expected(key: str, task: str, shipped: Mapping[str, tuple[int, ...]]) -> bool:
    return key in shipped or (task == FEATURES and key.startswith("pooler."))


def with_adapters(model: Any, adapters: tuple[tuple[str, Path], ...]) -> Any:
    """Loads each adapter through PEFT, proves that it arrived, and activates all of them."""
    # Names of our own: a user's may hold a dot, or be part of a key ("lora"), which PEFT confuses.
    # The first one is PEFT's own default, under which it also accepts keys that spell the name.
    names = ["default", *(f"adapter{i}" for i in range(2, len(adapters) + 1))]
    wrapped: Any = None
    for name, (_, folder) in zip(names, adapters, strict=True):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = ""  # else PEFT asks the hub about the model of that name
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), name, config=config)
        else:
            wrapped.load_adapter(str(folder), name, peft_config=config)
    if not wrapped.active_peft_config.is_prompt_learning:
        wrapped.base_model.set_adapter(names, inference_mode=True)
    for name, (title, folder) in zip(names, adapters, strict=True):
        _check_arrival(wrapped, name, title, folder)
    return wrapped


def _check_arrival(model: Any, name: str, title: str, folder: Path) -> None:
    """Every tensor of the adapter's file is in the live model, and nothing random is beside it."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ParityError(f"adapter {title}", f"no {WEIGHTS}", "one to compare with")
    shipped = load_file(file)
    live = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state = model.state_dict()
    for key in sorted(shipped):
        # PEFT saves a resized module of modules_to_save a second time: it must be the same
        loaded = live.get(key.replace(".modules_to_save.", "."), state.get(key))
        if loaded is None or not _same(loaded, shipped[key]):
            how = "it has no such tensor" if loaded is None else "its values differ"
            raise ParityError(
                f"adapter {title}",
                f"the reference did not load tensor {key!r} ({how})",
                "PEFT to use every tensor of the adapter",
                "rename the key to the form base_model.model.<module>.lora_A.weight",
            )
    _refuse_invented(title, live, set(shipped))


def _same(live: torch.Tensor, shipped: torch.Tensor) -> bool:
    # PEFT widens 16-bit adapters to float32, so the cast below is exact except from fp64
    return live.shape == shipped.shape and torch.equal(live, shipped.to(live.dtype))


def _refuse_invented(title: str, live: dict[str, torch.Tensor], shipped: set[str]) -> None:
    """A LoRA pair that the file lacks must be inert: one factor zero, as PEFT initialises it.

    With `init_lora_weights: false` in its config, PEFT fills such a pair with random values.
    """
    invented: dict[str, list[torch.Tensor]] = {}
    for key in sorted(set(live) - shipped):
        if ".lora_" in key:
            invented.setdefault(key.split(".lora_")[0], []).append(live[key])
    for module, factors in invented.items():
        if all(bool(factor.count_nonzero()) for factor in factors):
            raise ParityError(
                f"adapter {title}",
                f"PEFT invented values for {module}, which the adapter does not ship",
                "both LoRA factors of every targeted module in the file",
            )
