"""The fidelity and effect sections of a report, for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adaptrix_export.package.documents import EffectEntry, EffectModel, FidelityEntry

if TYPE_CHECKING:
    from rich.table import Table


def fidelity_table(name: str, figures: FidelityEntry) -> Table:
    """What one redistributed adapter kept, by figure: as the base is, and as it is now."""
    from rich.table import Table
    from rich.text import Text

    layers = ", ".join(str(layer) for layer in figures.layers)
    title = f"{name}: {figures.strategy} onto layers {layers} of {figures.of_layers}"
    shown = Table(title=Text(title), title_justify="left")
    for heading in ("figure", "without adapter", "redistributed"):
        shown.add_column(heading, justify="left" if heading == "figure" else "right")
    agreement, of_base, of_adapter = figures.agreement
    rows = [
        ("retained", "0", f"{figures.retained:.3f}"),
        (figures.measure, f"{figures.kl_base:.5f}", f"{figures.kl:.5f}"),
        (agreement, f"{of_base:.3f}", f"{of_adapter:.3f}"),
    ]
    if figures.gain is not None:
        rows.insert(1, ("gain", "0", f"{figures.gain:.3f}"))
    for layer in figures.layers:
        before, after = figures.residual_before[layer], figures.residual_after[layer]
        rows.append((f"residual after layer {layer}", f"{before:.4f}", f"{after:.4f}"))
    last = len(figures.residual_after) - 1
    before, after = figures.residual_before[last], figures.residual_after[last]
    rows.append((f"residual after the last layer, {last}", f"{before:.4f}", f"{after:.4f}"))
    for row in rows:
        shown.add_row(*row)
    shown.caption = "\n".join(
        [
            f"{figures.sites_before} -> {figures.sites_after} sites, "
            f"{figures.bytes_before:,} -> {figures.bytes_after:,} bytes; "
            f"measured on {figures.tokens:,} tokens: {figures.calibration.text}",
            *figures.notes,
        ]
    )
    shown.caption_justify = "left"
    return shown


HEADINGS = {
    "base": "base",
    "adapted": "plain merge",
    "redistributed": "redistributed",
    "gated": "with gates",
}


def effect_table(figures: EffectEntry) -> Table:
    """What a gated plan keeps of its adapters, and how far it drifts, beside the plain merge."""
    from rich.table import Table

    models = {name: figures.models[name] for name in HEADINGS if name in figures.models}
    shown = Table(title="beside the plain merge", title_justify="left")
    shown.add_column("figure")
    for name in models:
        shown.add_column(HEADINGS[name], justify="right")
    rows: dict[str, Callable[[EffectModel], str]] = {
        "retained": lambda m: _share(m.retained),
        "gain": lambda m: _share(m.gain),
        f"{figures.measure} to it": lambda m: f"{m.kl:.5f}",
        f"{figures.agreement} with it": lambda m: _share(m.agreement),
        "adapted modules": lambda m: str(m.sites),
        "drift, median token": lambda m: _drift(m, "median"),
        "drift, largest": lambda m: _drift(m, "max"),
        "clamped": lambda m: "" if m.clamped is None else f"{100 * m.clamped:.1f}%",
    }
    for figure, of in rows.items():
        shown.add_row(figure, *(of(model) for model in models.values()))
    shown.caption = f"measured on {figures.tokens:,} tokens: {figures.text}"
    shown.caption_justify = "left"
    return shown


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _drift(model: EffectModel, of: str) -> str:
    """|y - y0| / |y0| at an adapted module."""
    if model.drift is None:
        return ""
    value = model.drift.median if of == "median" else model.drift.max
    return "unbounded" if value is None else f"{value:.3f}"
