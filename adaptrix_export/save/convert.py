"""An adapter written in another format: PEFT's folder, or that of the original Adaptrix.

What a format cannot hold is refused by name. What is written is read again and compared, bit by
bit, before it is published.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adaptrix_export.errors import MachineError, RecipeError, UnsupportedError
from adaptrix_export.load import Reading, open_adapter, open_base
from adaptrix_export.load.adapters.adaptrix_adapter import METADATA
from adaptrix_export.load.adapters.adaptrix_adapter import OURS as ADAPTRIX_OURS
from adaptrix_export.load.adapters.peft_adapter import CONFIG, OURS, WEIGHTS
from adaptrix_export.load.adapters.peft_form import Factors, peft_config, says
from adaptrix_export.load.adapters.peft_keys import PREFIX, module_paths
from adaptrix_export.load.files.tensors import itemsize
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.fit.replication import repeat_layers
from adaptrix_export.package import publish, staging
from adaptrix_export.package.manifest import without_machine_paths
from adaptrix_export.plan import Adapter, Base, Delta, Dora, LowRank, Plan, Scaled, Tensor, Term
from adaptrix_export.save.writer import HashingWriter


@dataclass(frozen=True)
class Converted:
    """What `convert` published, and what to know of how the source was read."""

    out: Path
    adapter: Adapter

    @property
    def notes(self) -> tuple[str, ...]:
        return self.adapter.notes


def convert(
    source: str, base: str, to: str, out: Path, reading: Reading | None = None
) -> Converted:
    """Read `source` against `base` and publish it at `out` in the format `to`.

    Raises InputError for what cannot be read or held; nothing is published then.
    """
    if to not in WRITERS:
        raise RecipeError("--to", repr(to), f"one of {', '.join(WRITERS)}")
    opened = open_base(base, adapters=[source])
    read = reading or Reading()
    plan = verify(repeat_layers(Plan(opened, (open_adapter(source, opened, None, read),))))
    adapter = plan.adapters[0]
    with staging(out, 2 * _nbytes(adapter)) as stage:
        WRITERS[to](adapter, plan.base, stage)
        _compare(adapter, open_adapter(str(stage), plan.base, adapter.name))
        publish(stage, out)
    return Converted(out, adapter)


def _nbytes(adapter: Adapter) -> int:
    tensors = [t for d in adapter.deltas for term in d.terms for t in term.tensors]
    tensors += [saved.tensor for saved in adapter.replacements]
    return sum(prod(t.shape) * itemsize(t.dtype) for t in tensors)


def write_peft(adapter: Adapter, base: Base, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; same adapter, same bytes.

    The adapter's own configuration is kept where it says what the terms say, else ranks and scales
    are written into it. Raises UnsupportedError for a sum of several terms at one site.
    """
    tensors: dict[str, Tensor] = {saved.tensor.name: saved.tensor for saved in adapter.replacements}
    factors: dict[str, Factors] = {}
    for delta in adapter.deltas:
        term = _only_term(adapter, delta)
        if isinstance(term, (LowRank, Dora)):
            factors[delta.site.path] = term
        for ending, tensor in _parts(base, delta, term).items():
            tensors[f"{PREFIX}{delta.site.path}.{ending}"] = tensor
    strange = next((name for name in sorted(tensors) if not name.startswith(PREFIX)), None)
    if strange is not None:
        raise UnsupportedError(
            f"{adapter.name}: {strange}", "a replacement without a name in PEFT", "one of PEFT's"
        )
    config = dict(adapter.config)
    if not says(adapter.name, config, factors):
        config.update(peft_config(base, factors))
    _write_json(folder / CONFIG, config)
    noted = {OURS: _json(adapter.metadata)} if adapter.metadata else {}
    write_safetensors(folder / WEIGHTS, tensors, {**noted, "format": "pt"})


def _only_term(adapter: Adapter, delta: Delta) -> Term:
    if len(delta.terms) == 1:
        return delta.terms[0]
    raise UnsupportedError(
        f"{adapter.name}: {delta.name}", f"a sum of {len(delta.terms)} terms", "one term a site",
        "convert the adapters one by one",
    )  # fmt: skip


def _parts(base: Base, delta: Delta, term: Term) -> dict[str, Tensor]:
    """How PEFT's key ends -> tensor."""
    if isinstance(term, Scaled):
        return {"lora_B.bias": term.vector}
    if not isinstance(term, (LowRank, Dora)):
        raise UnsupportedError(delta.name, f"a {type(term).__name__} term", "LoRA")
    if base.architecture.is_transposed(delta.site) and delta.site.layer is None:
        parts: dict[str, Tensor] = {"lora_embedding_A": term.a, "lora_embedding_B": term.b}
    else:
        parts = {"lora_A.weight": term.a, "lora_B.weight": term.b}
    if isinstance(term, Dora):
        parts["lora_magnitude_vector"] = term.magnitude
    return parts


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """One file, wide values first so that each is aligned, then by name."""
    ordered = sorted(tensors.items(), key=lambda item: (-itemsize(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + prod(tensor.shape) * itemsize(tensor.dtype)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashingWriter(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            out.write_array(tensor.read())


def write_adaptrix(adapter: Adapter, base: Base, folder: Path) -> None:
    """Write `metadata.json` and a `layer_<i>.pt` for each layer; needs torch.

    Each module gets its rank, alpha and scaling, so that every reader of the format finds its own.
    Raises UnsupportedError for what the format cannot hold: anything but LoRA on modules of layers.
    """
    layers: dict[int, dict[str, LowRank]] = {}
    for delta in adapter.deltas:
        layer, term = _in_layer(adapter, base, delta)
        layers.setdefault(layer, {})[delta.site.module] = term
    held = ("modules_to_save", "layer_replication", "trainable_token_indices")
    other = next((key for key in held if adapter.config.get(key)), None)
    if adapter.replacements or other:
        what = adapter.replacements[0].name if adapter.replacements else str(other)
        raise _cannot_hold(adapter, what, "more than LoRA factors")
    terms = {d.site.path: t for d in adapter.deltas for t in d.terms if isinstance(t, LowRank)}
    usual = peft_config(base, terms)
    original = adapter.metadata.get(METADATA)
    kept = dict(original) if isinstance(original, dict) else {"version": "1.0"}
    kept.setdefault("name", adapter.name)
    metadata = {
        **kept,
        "target_layers": sorted(layers),
        "target_modules": sorted({m for modules in layers.values() for m in modules}),
        "rank": usual["r"],
        "alpha": usual["lora_alpha"],
        ADAPTRIX_OURS: {"adapter_config": dict(adapter.config), **_source(adapter)},
    }
    _write_json(folder / METADATA, metadata)
    for layer, modules in sorted(layers.items()):
        _write_layer(folder / f"layer_{layer}.pt", modules)


def _source(adapter: Adapter) -> dict[str, Any]:
    """What another format said, unless it is this one's own metadata, which is kept as such."""
    if not adapter.metadata or adapter.metadata.get("format") == "adaptrix":
        return {}
    return {"source": dict(adapter.metadata)}


def _in_layer(adapter: Adapter, base: Base, delta: Delta) -> tuple[int, LowRank]:
    term, site = _only_term(adapter, delta), delta.site
    if not isinstance(term, LowRank):
        kind = {Dora: "DoRA", Scaled: "lora_bias"}.get(type(term), type(term).__name__)
        raise _cannot_hold(adapter, delta.name, kind)
    modules = module_paths(base)
    stacks = [s for s in base.architecture.stacks if f"{s.prefix}.{site.layer}" in modules]
    if site.layer is None or len(stacks) != 1:
        raise _cannot_hold(adapter, delta.name, "a module outside the one stack of layers")
    return site.layer, term


def _cannot_hold(adapter: Adapter, place: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{adapter.name}: {place}", found, "LoRA on modules of layers",
        "an Adaptrix folder holds nothing else; use --to peft",
    )  # fmt: skip


def _write_layer(path: Path, modules: Mapping[str, LowRank]) -> None:
    import torch

    saved = {
        module: {
            "lora_A": _torch(term.a),
            "lora_B": _torch(term.b),
            "rank": term.rank,
            "alpha": term.scale * term.rank,
            "scaling": term.scale,
        }
        for module, term in sorted(modules.items())
    }
    torch.save(saved, path)


def _torch(tensor: Tensor) -> Any:
    """The same bits as a torch tensor; numpy's bfloat16 goes over as integers."""
    import torch

    values = tensor.read()
    if tensor.dtype != "BF16":
        return torch.from_numpy(values)
    return torch.from_numpy(values.view("int16")).view(torch.bfloat16)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(without_machine_paths(dict(value)), indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(without_machine_paths(dict(value)), sort_keys=True, separators=(",", ":"))


Writer = Callable[[Adapter, Base, Path], None]
WRITERS: dict[str, Writer] = {"peft": write_peft, "adaptrix": write_adaptrix}


def _compare(written: Adapter, read: Adapter) -> None:
    """Raise MachineError unless what was read again is what was written, bit for bit."""
    before, after = _contents(written), _contents(read)
    differing = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    if differing:
        raise MachineError(
            f"{written.name}: {differing[0]}", "other values when read again", "what was written",
            "report this; nothing was published",
        )  # fmt: skip


def _contents(adapter: Adapter) -> dict[str, Any]:
    """Everything that an adapter applies: parameter -> scale, and each tensor's kind and bytes."""

    def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
        return tensor.dtype, tensor.shape, tensor.read().tobytes()

    found: dict[str, Any] = {
        f"{d.name} + {type(t).__name__}": (getattr(t, "scale", None), *map(bits, t.tensors))
        for d in adapter.deltas
        for t in d.terms
    }
    for saved in adapter.replacements:
        found[f"{saved.name} {saved.rows}"] = (saved.shared, bits(saved.tensor))
    return found


@dataclass(frozen=True)
class PeftFolders:
    """(name, folder) of each adapter for stock PEFT, and the names of those that were converted."""

    adapters: tuple[tuple[str, Path], ...]
    converted: tuple[str, ...]

    def told(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report with an oracle that says which adapters it did not read from their own files.

        A fault of our reader is a fault of the copy, too: whoever reads the report must know.
        """
        if not self.converted:
            return report
        names = ", ".join(self.converted)
        return {**report, "oracle": f"{report['oracle']} (adapter converted to PEFT form: {names})"}


@contextmanager
def peft_folders(plan: Plan) -> Iterator[PeftFolders]:
    """The adapters of `plan` as folders that stock PEFT reads: their own, or copies for now."""
    converted = tuple(a.name for a in plan.adapters if a.foreign)
    with tempfile.TemporaryDirectory(prefix="adaptrix-peft-") as scratch:
        pairs = []
        for i, adapter in enumerate(plan.adapters):
            folder = adapter.folder
            if adapter.foreign:
                folder = Path(scratch, f"{i}")
                folder.mkdir()
                write_peft(adapter, plan.base, folder)
            pairs.append((adapter.name, folder))
        yield PeftFolders(tuple(pairs), converted)
