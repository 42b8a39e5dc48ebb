"""What a base and its adapters are, from headers only: facts as data, then as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from adaptrix_export.plan import Adapter, Base, Plan, Tensor, leaves
from adaptrix_export.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Bits of one value, by its safetensors name.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


def inspect(
    base: str, adapters: Sequence[str], layers: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Open a base and adapters by their specs and describe them; `layers` adds the layer map.

    Raises what opening raises, and AdapterError for an adapter that does not fit the base.
    """
    from adaptrix_export.load import open_adapter, open_base
    from adaptrix_export.load.fit.adjust import adjusted
    from adaptrix_export.load.fit.invariants import verify
    from adaptrix_export.load.fit.replication import repeat_layers
    from adaptrix_export.manage.layer_map import layer_map

    opened = open_base(base, adapters=adapters)
    loaded = [open_adapter(adapter, opened) for adapter in adapters]
    # one by one: they are not to be merged together
    plans = [verify(adjusted(repeat_layers(Plan(opened, (adapter,))))) for adapter in loaded]
    facts = describe(opened, [plan.adapters[0] for plan in plans])
    if layers:
        # one of the adapters may repeat layers: the deepest model has room for all of them
        bases = [opened, *(plan.base for plan in plans)]
        deepest = max(bases, key=lambda b: [stack.count for stack in b.architecture.stacks])
        facts["layer_map"] = layer_map(deepest, plans, progress or Silent())
    return facts


def describe(base: Base, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Facts about a base and adapters that were opened on it; sizes in elements and megabytes.

    `megabytes` counts values in their dtype (a GGUF's once dequantized), `file_megabytes` what lies
    on disk; a megabyte is 10^6 bytes.
    """
    return {
        "base": _base(base),
        "modules": _modules(base),
        "adapters": [_adapter(adapter) for adapter in adapters],
    }


def _base(base: Base) -> dict[str, Any]:
    kind = base.architecture
    own = [tensor for name, tensor in base.tensors.items() if name not in base.tied]
    return {
        "source": base.spec,
        "model_type": kind.model_type,
        "architectures": list(base.config.get("architectures") or []),
        "layers": {stack.prefix: stack.count for stack in kind.stacks},
        "hidden_size": kind.hidden_size,
        "attention_heads": kind.attention_heads,
        "key_value_heads": kind.key_value_heads,
        "vocab_size": kind.vocab_size,
        "max_positions": kind.max_positions,
        "tensors": len(own),
        "parameters": _parameters(own),
        "megabytes": _megabytes(own),
        "file_megabytes": round(sum(path.stat().st_size for path in base.files) / 1e6, 3),
        "dtypes": sorted({tensor.dtype for tensor in own}),
        "tied": dict(base.tied),
        "recommended_layers": list(kind.middle_layers()),
    }


def _modules(base: Base) -> list[dict[str, Any]]:
    """One row for each module path and shape; `count` is in how many layers it is."""
    rows: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for name, tensor in base.tensors.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "bias":
            continue  # its size is the first one of the weight's
        # a tensor that is no module's weight, such as fused experts, is named whole
        site = base.architecture.site_of(module if parameter == "weight" else name)
        # (out, in), as a Linear has it; an embedding is shown as it is, a row a token
        conv1d = base.architecture.family.conv1d and site.layer is not None
        turned = conv1d and len(tensor.shape) == 2
        rows[site.stack, site.module, tensor.shape[::-1] if turned else tensor.shape] += 1
    return [
        {"stack": stack, "module": module, "shape": list(shape), "count": count}
        for (stack, module, shape), count in rows.items()
    ]


def _adapter(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    terms = [term for delta in adapter.deltas for term in leaves(delta.terms)]
    tensors = [tensor for term in terms for tensor in term.tensors]
    tensors += [saved.tensor for saved in adapter.replacements]
    sites = [delta.site for delta in adapter.deltas]
    touched = {site for site in sites if site.layer is not None}
    touched |= {saved.site for saved in adapter.replacements if saved.site.layer is not None}
    layers: dict[str, list[int]] = {}
    for stack, layer in sorted({(s.stack, s.layer) for s in touched if s.layer is not None}):
        layers.setdefault(stack, []).append(layer)
    return {
        "name": adapter.name,
        "source": adapter.spec,
        "kind": str(config.get("peft_type", "LORA")),
        "ranks": sorted({term.product[0].shape[0] for term in terms if term.product}),
        "alpha": config.get("lora_alpha"),
        "alpha_pattern": dict(config.get("alpha_pattern") or {}),
        "rslora": bool(config.get("use_rslora")),
        "scales": sorted({round(s, 6) for term in terms if (s := term.scaling) is not None}),
        "target_modules": sorted({site.module for site in sites}),
        "sites": len(sites),
        "replacements": [f"{r.site.path}.{r.parameter}" for r in adapter.replacements],
        "parameters": adapter.parameters,
        "megabytes": _megabytes(tensors),
        "layers": layers,
    }


def _parameters(tensors: Iterable[Tensor]) -> int:
    return sum(prod(tensor.shape) for tensor in tensors)


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return round(sum(prod(t.shape) * BITS[t.dtype] // 8 for t in tensors) / 1e6, 3)


def rendered(facts: Mapping[str, Any]) -> RenderableType:
    """`describe`'s facts for a terminal."""
    from rich.console import Group

    from adaptrix_export.manage import layer_map

    parts: list[RenderableType] = [_base_table(facts["base"]), _module_table(facts["modules"])]
    parts += [_adapter_table(adapter) for adapter in facts["adapters"]]
    if "layer_map" in facts:
        parts.append(layer_map.rendered(facts["layer_map"]))
    return Group(*parts)


def _base_table(base: Mapping[str, Any]) -> Table:
    layers = ", ".join(f"{count} in {prefix}" for prefix, count in base["layers"].items())
    tied = ", ".join(f"{name} = {source}" for name, source in base["tied"].items())
    recommended = ", ".join(map(str, base["recommended_layers"]))
    heads = f"{base['attention_heads']}, {base['key_value_heads']} for keys and values"
    names = ", ".join(base["architectures"])
    return _facts(
        base["source"],
        {
            "model type": base["model_type"] + (f" ({names})" if names else ""),
            "layers": layers or "none",
            "hidden size": base["hidden_size"],
            "attention heads": heads,
            "vocabulary": base["vocab_size"],
            "positions": base["max_positions"] or "not stated",
            "parameters": f"{base['parameters']:,}",
            "size": f"{base['megabytes']:,.1f} MB, {base['file_megabytes']:,.1f} MB on disk",
            "dtypes": ", ".join(base["dtypes"]),
            "tied": tied or "none",
            "recommended injection layers": recommended or "none",
        },
    )


def _adapter_table(adapter: Mapping[str, Any]) -> Table:
    layers = "; ".join(
        f"{_ranges(numbers)} of {stack}" for stack, numbers in adapter["layers"].items()
    )
    patterns = ", ".join(f"{key}: {value}" for key, value in adapter["alpha_pattern"].items())
    return _facts(
        f"adapter {adapter['name']}",
        {
            "kind": adapter["kind"] + (", rsLoRA" if adapter["rslora"] else ""),
            "ranks": ", ".join(map(str, adapter["ranks"])) or "none",
            "alpha": f"{adapter['alpha']}" + (f" ({patterns})" if patterns else ""),
            "scales": ", ".join(f"{scale:g}" for scale in adapter["scales"]) or "none",
            "target modules": ", ".join(adapter["target_modules"]) or "none",
            "sites": adapter["sites"],
            "whole tensors": ", ".join(adapter["replacements"]) or "none",
            "parameters": f"{adapter['parameters']:,}",
            "size": f"{adapter['megabytes']:,.2f} MB",
            "layers": layers or "none",
        },
    )


def _facts(title: str, rows: Mapping[str, object]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))  # Text: names from files are not markup
    return table


def _module_table(modules: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="modules", title_justify="left")
    table.add_column("module")
    table.add_column("shape (out, in)", justify="right")
    table.add_column("count", justify="right")
    for row in modules:
        path = f"{row['stack']}.*.{row['module']}" if row["stack"] else row["module"]
        table.add_row(Text(path), " x ".join(map(str, row["shape"])), str(row["count"]))
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> `0-2, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
