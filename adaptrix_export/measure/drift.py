"""How far adapters move each site from the base, measured: |d| / |y0| token by token.

y0 is the base's output at a site and d what the adapters add there, in PyTorch with PEFT's live
layers, none of them gated. From the measured ratios follows a tau that a chosen share of the tokens
stays within at every site, so that a clamp never acts on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import RecipeError
from adaptrix_export.load.fit.invariants import ungateable
from adaptrix_export.oracle.job import Job
from adaptrix_export.oracle.peft_folders import oracle_folders
from adaptrix_export.oracle.prompts import token_ids
from adaptrix_export.plan import Plan, Site
from adaptrix_export.progress import Progress

SHARE = 0.9  # of tokens that a calibrated tau leaves alone, by default
ROWS, LENGTH = 16, 128  # of calibration text: 2048 tokens
ROUND = 1 + 1e-3  # tau is rounded up to four digits: by no more than this
Ratios = dict[Site, NDArray[np.float64]]  # one number a token, the same tokens for every site


@dataclass(frozen=True)
class Drift:
    """The ratios of every site that can be clamped, and where the tokens came from."""

    ratios: Ratios
    source: str

    @property
    def tokens(self) -> int:
        return len(next(iter(self.ratios.values())))

    def tau(self, share: float, scope: str = "site") -> float:
        """The least tau with which `share` of the tokens is clamped at no site.

        With scope "layer" a site's own limit is tau / sqrt(sites of its layer). Raises RecipeError
        where a base's output is zero for more tokens than may be clamped.
        """
        count: dict[tuple[str, int | None], int] = {}
        for site in self.ratios:
            count[site.stack, site.layer] = count.get((site.stack, site.layer), 0) + 1
        limits = [
            values * (sqrt(count[site.stack, site.layer]) if scope == "layer" else 1)
            for site, values in self.ratios.items()
        ]
        limit = float(np.quantile(np.max(limits, axis=0), share, method="higher"))
        if not isfinite(limit):
            raise RecipeError(
                "context.tau", "calibrated, but the base's output at a site is zero", "a number",
                "choose a tau, or a smaller share",
            )  # fmt: skip
        return float(f"{limit * ROUND:.4g}")

    def clamped(self, tau: float) -> float:
        """The share of tokens that a tau for every site clamps somewhere."""
        return float((np.max(list(self.ratios.values()), axis=0) > tau).mean())

    def as_dict(self, share: float, scope: str) -> dict[str, Any]:
        """Of each site the median, the quantile at `share` and the largest ratio; the tau."""
        sites = []
        for site, values in self.ratios.items():
            median, most = np.quantile(values, [0.5, share])
            numbers = {"median": median, "quantile": most, "max": values.max()}
            sites.append({"site": site.path} | {k: float(f"{v:.4g}") for k, v in numbers.items()})
        return {
            "tokens": self.tokens,
            "text": self.source,
            "share": share,
            "scope": scope,
            "tau": self.tau(share, scope),
            "sites": sites,
        }


def measure(plan: Plan, progress: Progress, text: str | None = None) -> Drift:
    """The drift of a plan whose adapters PEFT can load: one that no pass has changed.

    Raises RecipeError where no site can be clamped, ParityError where PEFT does not load an
    adapter as it is read here.
    """
    changed = {delta.site for adapter in plan.adapters for delta in adapter.deltas}
    able = [s for s in changed if ungateable(plan, s, "clamp") is None]
    sites = sorted(able, key=lambda s: s.order)
    if not sites:
        raise RecipeError("context", "no site that can be clamped", "at least one LoRA in a layer")
    with oracle_folders(plan) as folders:
        return _measure(_job(plan, text, folders.adapters), sites, progress)


def measure_apart(plan: Plan, progress: Progress, text: str | None = None) -> Drift:
    """The drift of adapters of which one at a time acts: at each site and token the largest.

    A tau that follows from it leaves alone the same share of the tokens, or more, under each.
    """
    ratios: Ratios = {}
    for adapter in plan.adapters:
        drift = measure(replace(plan, adapters=(adapter,)), progress, text)
        for site, values in drift.ratios.items():
            ratios[site] = np.maximum(ratios[site], values) if site in ratios else values
    return Drift(ratios, drift.source)


def text_rows(
    plan: Plan, vocabulary: int, positions: int | None, text: str | None = None
) -> tuple[str, list[NDArray[np.int64]]]:
    """What the token ids are, and rows (1, tokens) of them to calibrate gates on.

    For a model with so many tokens and positions; `text` takes the place of the built-in sample.
    """
    return _rows(_job(plan, text, ()), vocabulary, positions)


def _rows(job: Job, vocabulary: int, positions: int | None) -> tuple[str, list[NDArray[np.int64]]]:
    source, ids = token_ids(job, vocabulary)
    length = min(LENGTH, positions or LENGTH)
    rows = [ids[i : i + length] for i in range(0, ROWS * length, length)]
    return source, [np.array([row], np.int64) for row in rows if row]


def _job(plan: Plan, text: str | None, adapters: tuple[tuple[str, Path], ...]) -> Job:
    return Job(
        target="onnx",
        artifact=plan.base.folder,  # there is none yet: this is where the tokenizer is
        base_folder=plan.base.folder,
        precision="fp32",
        weights={},
        gguf_file=plan.base.gguf_file,
        task=plan.base.task,
        adapters=adapters,
        text=text or sample(),
        simulated=plan.base.simulated,
    )


def sample() -> str:
    """English reference prose from the standard library, the start of every fourth topic."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name][:1500] for name in sorted(topics)[::4])


def _measure(job: Job, sites: Sequence[Site], progress: Progress) -> Drift:
    from adaptrix_export.oracle.reference import Reference  # PyTorch

    with progress.stage("drift: loading base and adapters"):
        reference = Reference.open(job)
    source, rows = _rows(job, reference.vocabulary, reference.positions)
    ratios: dict[Site, list[NDArray[np.float64]]] = {site: [] for site in sites}
    hooks = [reference.watch(site.path, note_ratios(ratios[site])) for site in sites]
    try:
        with progress.stage("drift: measuring", len(rows), "rows") as advance:
            for row in rows:
                reference.encode(row, np.ones_like(row), np.zeros_like(row))
                advance(1)
    finally:
        for hook in hooks:
            hook.remove()
        reference.close()
    return Drift({site: np.concatenate(values) for site, values in ratios.items()}, source)


def note_ratios(values: list[NDArray[np.float64]]) -> Any:
    """A forward hook on a live layer that notes |y - y0| / |y0| of every token."""

    def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y0 = layer.get_base_layer()(*inputs).double()
        size, added = y0.norm(dim=-1), (output.double() - y0).norm(dim=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = added.numpy() / size.numpy()
        values.append(np.nan_to_num(ratio, nan=0.0, posinf=np.inf).reshape(-1))

    return hook
