"""The words and numbers of the page, section by section: data for the template, no markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isinf, log10

from adaptrix_export.package.documents import EffectEntry, EffectModel, FidelityEntry
from adaptrix_export.show.facts import Facts, bound_share

BAR_DECADES = 6  # a bar is empty at a millionth of its bound and full at the bound
MODELS = {
    "base": "base",
    "adapted": "plain merge",
    "redistributed": "redistributed",
    "gated": "with gates",
}


@dataclass(frozen=True)
class Verdict:
    kind: str  # "good", "bad" or "open"
    title: str
    text: str


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    text: str = ""


@dataclass(frozen=True)
class Check:
    """A case of the proof; `fill` is the length of its bar, from 0 to 1."""

    name: str
    positions: int
    difference: str
    bound: str
    kl: str
    top1: str
    fill: float
    passed: bool


@dataclass(frozen=True)
class Sheet:
    """A small table: a heading for each column, the first one names the row."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: str = ""


def verdict(facts: Facts) -> Verdict:
    """What the proof says, first of all."""
    report, worst = facts.report, facts.worst_case
    if report is None:
        return Verdict(
            "open", "Not verified",
            "Parity was off: nothing was compared with PyTorch. `adaptrix-export verify` does it "
            "later, while base and adapters are at hand.",
        )  # fmt: skip
    oracle = report.oracle
    if not report.passed:
        failed = [case.name for case in facts.cases if not case.passed]
        return Verdict(
            "bad", "Does not agree", f"With {oracle}: {', '.join(failed) or 'see below'}."
        )
    if worst is None:
        return Verdict("good", "Proved", f"Weight by weight, against {oracle}.")
    share = bound_share(worst)
    below = f"{1 / share:,.0f} times below what is allowed" if share else "not one bit apart"
    return Verdict(
        "good", "Proved",
        f"{len(facts.cases)} of {len(facts.cases)} cases agree with {oracle}. The case nearest to "
        f"its bound, {worst.name}, differs by {number(worst.max_abs)} at most: {below}.",
    )  # fmt: skip


def tiles(facts: Facts) -> list[Tile]:
    """The figures that people ask for first."""
    manifest = facts.manifest
    figures = [Tile("Target", facts.target, manifest.precision)]
    figures.append(Tile("Size", size(facts.total_bytes), f"{len(facts.outputs)} files"))
    names = ", ".join(facts.adapters[:3]) + (", ..." if len(facts.adapters) > 3 else "")
    figures.append(Tile("Adapters", str(len(facts.adapters)), names))
    figures.append(Tile("Adapted sites", str(len(manifest.sites))))
    top1 = [case.top1 for case in facts.cases if case.top1 is not None]
    if top1:
        figures.append(
            Tile("Same first choice", f"{100 * min(top1):.4g}%", "of tokens, worst case")
        )
    retained = [entry.retained for entry in facts.fidelity.values()]
    if retained:
        figures.append(
            Tile("Retained", f"{100 * min(retained):.1f}%", "of the adapter's behaviour")
        )
    if manifest.frontend:
        figures.append(Tile("Graph from", manifest.frontend, str(manifest.provider)))
    return figures


def checks(facts: Facts) -> list[Check]:
    """Every case, in the order of the proof."""
    entries = []
    for case in facts.cases:
        limit = case.tolerance
        entries.append(
            Check(
                name=case.name,
                positions=case.positions,
                difference=number(case.max_abs),
                bound=f"{limit.max_abs:g}",
                kl="" if limit.mean_kl is None else number(case.mean_kl),
                top1="" if case.top1 is None else f"{100 * case.top1:.2f}%",
                fill=_fill(bound_share(case)),
                passed=case.passed,
            )
        )
    return entries


def proof_sheets(facts: Facts) -> list[Sheet]:
    """What else was compared: weights, factors, approximations, the other base."""
    report = facts.report
    if report is None:
        return []
    replay = report.replay
    rows = [
        ("weights computed again in fp64", f"{replay.tensors}", f"{replay.changed} changed, "
         f"worst {number(replay.worst.ulps)} ulp", _passed(replay.passed)),
    ]  # fmt: skip
    rows += [
        (f"factors of {name}", f"{factors.slots}", f"worst {number(factors.worst)} of a rounding",
         _passed(factors.passed))
        for name, factors in report.adapters.items()
    ]  # fmt: skip
    rows += [
        (f"gates: {check.name}", str(check.count if check.tokens is None else check.tokens),
         f"max {number(check.max_abs)}" if check.compares_values else "", _passed(check.passed))
        for check in (report.context.checks if report.context else ())
    ]  # fmt: skip
    sheets = [Sheet("Beside the logits", ("check", "of", "found", "result"), tuple(rows))]
    if report.approximated:
        lost = tuple(
            (name, str(loss.rank), f"{100 * loss.error:.2g}%", f"{100 * loss.worst:.2g}%")
            for name, loss in report.approximated.items()
        )
        columns = ("adapter", "rank", "of the delta lost", "at worst")
        sheets.append(Sheet("Approximated adapters", columns, lost))
    if report.base_weights is not None:
        bases = report.base_weights
        other = (bases.merged_into, bases.compared_with, number(bases.max_abs),
                number(bases.mean_kl), _percent(bases.top1))  # fmt: skip
        heads = ("merged into", "compared with", "max abs", "mean KL", "top-1")
        sheets.append(Sheet("The other base", heads, (other,), "For information, not a check."))
    return sheets


def behaviour_sheets(facts: Facts) -> list[Sheet]:
    """Fidelity of a redistribution, what gates do, and how adapters get in each other's way."""
    sheets = [_fidelity(name, entry) for name, entry in facts.fidelity.items()]
    if facts.effect is not None:
        sheets.append(_effect(facts.effect))
    if facts.conflicts is not None:
        pairs = tuple(
            (", ".join(pair.adapters), f"{pair.conflict:.3f}", f"{pair.cosine:+.3f}",
             f"{100 * pair.sign_disagreement:.1f}%", str(pair.shared_sites))
            for pair in facts.conflicts.pairs
        )  # fmt: skip
        heads = ("adapters", "conflict", "cosine", "signs differ", "shared sites")
        text = "Conflict: 0 none, about 0.29 for unrelated adapters of one size, 1 all cancels."
        sheets.append(Sheet("Conflicts", heads, pairs, text))
    return sheets


def input_sheet(facts: Facts) -> Sheet:
    rows = tuple((i.spec, i.file, size(i.bytes), i.sha256) for i in facts.manifest.inputs)
    return Sheet("Inputs", ("source", "file", "size", "sha256"), rows)


def output_sheet(facts: Facts) -> Sheet:
    entries = facts.manifest.outputs
    rows = tuple((name, size(n), entries[name].sha256) for name, n in facts.outputs.items())
    return Sheet("Files", ("file", "size", "sha256"), rows)


def stage_sheet(facts: Facts) -> Sheet | None:
    """Time and memory of the build's stages, where this machine made it."""
    timings = facts.timings
    if not timings:
        return None
    rows = tuple(
        (str(s["name"]), f"{s['seconds']:.1f} s", str(s.get("amount") or ""),
         size(s["peak_bytes"]) if s.get("peak_bytes") else "")
        for s in timings["stages"]
    )  # fmt: skip
    text = f"{timings['seconds']:.1f} s in all, on this machine."
    return Sheet("Stages", ("stage", "time", "done", "peak memory so far"), rows, text)


def notes(facts: Facts) -> list[str]:
    """What was read or written otherwise than one might think."""
    manifest = facts.manifest
    lines = [f"{a.adapter}: {a.place}: {a.text}" for a in manifest.adjustments]
    if manifest.frontend_reason:
        lines.append(f"front end {manifest.frontend}: {manifest.frontend_reason}")
    if manifest.base_weights.get("simulated"):
        lines.append(f"base weights: rounded as {manifest.base_weights['simulated']} first")
    return lines + [f"{name} has weights of its own now" for name in manifest.untied]


def passes(facts: Facts) -> list[str]:
    return facts.manifest.history


def versions(facts: Facts) -> Sheet:
    tool = facts.manifest.tool
    libraries = {**facts.manifest.versions, **(facts.report.versions if facts.report else {})}
    rows = tuple({tool.name: tool.version, **dict(sorted(libraries.items()))}.items())
    return Sheet("Versions", ("package", "version"), rows)


def _fidelity(name: str, entry: FidelityEntry) -> Sheet:
    agreement, of_base, of_adapter = entry.agreement
    rows = [
        ("retained", "0", f"{entry.retained:.3f}"),
        (entry.measure, f"{entry.kl_base:.5f}", f"{entry.kl:.5f}"),
        (agreement, f"{of_base:.3f}", f"{of_adapter:.3f}"),
    ]
    if entry.gain is not None:
        rows.insert(1, ("gain", "0", f"{entry.gain:.3f}"))
    for layer in _ends(entry.layers, len(entry.residual_after) - 1):
        before, after = entry.residual_before[layer], entry.residual_after[layer]
        rows.append((f"residual after layer {layer}", f"{before:.4f}", f"{after:.4f}"))
    text = (
        f"{entry.strategy} onto layers {', '.join(map(str, entry.layers))} of "
        f"{entry.of_layers}; {entry.sites_before} sites became {entry.sites_after}; measured "
        f"on {entry.tokens:,} tokens ({entry.calibration.text})."
    )
    heads = ("figure", "without adapter", "redistributed")
    return Sheet(f"Redistribution of {name}", heads, tuple(rows), text)


def _effect(effect: EffectEntry) -> Sheet:
    models = {name: effect.models[name] for name in MODELS if name in effect.models}

    def row(title: str, values: Iterable[str]) -> tuple[str, ...]:
        return (title, *values)

    def drift(model: EffectModel, which: str) -> str:
        if model.drift is None:
            return ""
        value = model.drift.median if which == "median" else model.drift.max
        return "unbounded" if value is None else f"{value:.3f}"

    rows = (
        row("retained", (_three(m.retained) for m in models.values())),
        row("gain", (_three(m.gain) for m in models.values())),
        row(f"{effect.measure} to it", (f"{m.kl:.5f}" for m in models.values())),
        row(f"{effect.agreement} with it", (_three(m.agreement) for m in models.values())),
        row("adapted modules", (str(m.sites) for m in models.values())),
        row("drift, median token", (drift(m, "median") for m in models.values())),
        row("drift, largest", (drift(m, "max") for m in models.values())),
    )
    heads = ("figure", *(MODELS[name] for name in models))
    text = f"Measured on {effect.tokens:,} tokens: {effect.text}."
    return Sheet("Beside the plain merge", heads, rows, text)


def _ends(layers: Sequence[int], last: int) -> list[int]:
    return [*layers, *([] if last in layers else [last])]


def _fill(share: float) -> float:
    if isinf(share):
        return 1.0
    if share <= 0:
        return 0.0
    return round(min(1.0, max(0.0, 1 + log10(share) / BAR_DECADES)), 3)


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def size(count: int) -> str:
    """Bytes in the unit that people write: 538 MB, 12.3 kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _three(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f}%"


def _passed(value: bool) -> str:
    return "passed" if value else "failed"
