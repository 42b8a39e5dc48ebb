"""Exact adjustments of adapters whose tensors are named or laid out otherwise than the base's.

An adjustment is made only if there is one way to read the adapter, and is recorded in
`Plan.adjustments`. Whatever is not adjusted here is refused by `verify`. Weights are never padded
or truncated; only LoRA factors are transposed, sliced, or padded with zero rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adaptrix_export.load.files.tensors import read_json
from adaptrix_export.load.files.views import Cut, Placed, Transposed
from adaptrix_export.load.fit.fused import Part, parts_in_base, parts_of
from adaptrix_export.plan import (
    Adapter,
    Adjustment,
    Base,
    Delta,
    LowRank,
    Plan,
    Replacement,
    Term,
    low_ranks,
)

TOKENIZER_BYTES = 256 << 20  # Gemma's tokenizer.json has 33 MB

# (path prefix in transformers 4, prefix in 5, model types; none: all that have the new path), from
# transformers.conversion_mapping. A path is renamed only if it is the same module of the same
# model: an adapter of a text model does not fit a larger model around it. Mixture-of-experts
# weights are fused on loading, not renamed, and are not in this table.
_TEXT_OF_A_LARGER = ("gemma3n_text", "qwen3_5_text", "qwen3_5_moe_text")
RENAMES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("language_model.model.", "model.language_model.", ()),
    ("language_model.lm_head", "lm_head", ()),
    ("model.", "model.language_model.", ("qwen2_vl", "qwen2_5_vl")),
    ("model.language_model.", "model.", _TEXT_OF_A_LARGER),
    ("embed_out", "lm_head", ("gpt_neox",)),
)

Step = Callable[[Base, Adapter], tuple[Adapter, list[Adjustment]]]


def adjusted(plan: Plan) -> Plan:
    """The plan with every adapter adjusted to its base, and a record of each adjustment."""
    adapters, notes = [], list(plan.adjustments)
    for adapter in plan.adapters:
        for step in _STEPS:
            adapter, records = step(plan.base, adapter)
            notes += records
        adapters.append(adapter)
    return replace(plan, adapters=tuple(adapters), adjustments=tuple(notes))


def _record_transposed(base: Base, adapter: Adapter) -> tuple[Adapter, list[Adjustment]]:
    """Record the factors that the loader transposed (`views.orient_factors`)."""
    places = [
        delta.site.path
        for delta in adapter.deltas
        if any(
            isinstance(t, Transposed) and not t.by_format
            for term in delta.terms
            for t in term.tensors
        )
    ]
    text = "factors stored transposed, read as (r, in) and (out, r)"
    return adapter, [Adjustment(adapter.name, "transposed", p, text) for p in places]


def _rename_paths(base: Base, adapter: Adapter) -> tuple[Adapter, list[Adjustment]]:
    """Rename module paths of transformers 4 to those of 5, if the base has only the latter.

    Nothing is renamed if two paths would become the same, or one that the adapter uses already.
    """
    items: list[Delta | Replacement] = [*adapter.deltas, *adapter.replacements]
    known = {item.site for item in items if _has(base, item.name)}
    paths = {i.site: _new_path(base, i.site.path, i.name) for i in items if i.site not in known}
    moves = {old: base.architecture.site_of(new) for old, new in paths.items() if new}
    if len(set(moves.values())) < len(moves) or known & set(moves.values()):
        return adapter, []
    renamed = replace(
        adapter,
        deltas=_sorted([replace(d, site=moves.get(d.site, d.site)) for d in adapter.deltas]),
        replacements=tuple(
            replace(r, site=moves.get(r.site, r.site)) for r in adapter.replacements
        ),
    )
    return renamed, [
        Adjustment(adapter.name, "renamed", old.path, f"is {new} in this base")
        for old, new in moves.items()
    ]


def _has(base: Base, name: str) -> bool:
    return name in base.tensors or name in base.tied


def _new_path(base: Base, path: str, name: str) -> str | None:
    """The renamed path, if exactly one rename results in a module of the base; else None."""
    parameter, kind = name.rpartition(".")[2], base.architecture.model_type
    candidates = set()
    for old, new, types in RENAMES:
        if path.startswith(old) and kind in (types or (kind,)):
            candidate = new + path.removeprefix(old)
            if _has(base, f"{candidate}.{parameter}"):
                candidates.add(candidate)
    return candidates.pop() if len(candidates) == 1 else None


def _split_fused(base: Base, adapter: Adapter) -> tuple[Adapter, list[Adjustment]]:
    """Split an adapter of a fused module, for a base with separate parts, by the rows of B."""
    deltas: list[Delta] = []
    notes = []
    present = {delta.name for delta in adapter.deltas}
    for delta in adapter.deltas:
        site = delta.site
        parts = parts_of(base, site.stack, site.layer, site.module)
        part_adapted = any(_at(delta, part.name).name in present for part in parts)
        rows = {term.outputs for term in delta.terms}
        fused = delta.name in base.tensors
        if not parts or fused or part_adapted or rows != {parts[-1].stop}:
            deltas.append(delta)
            continue
        for part in parts:
            terms = tuple(_rows_of(term, part) for term in delta.terms)
            deltas.append(replace(_at(delta, part.name), terms=terms))
        if delta.parameter == "weight":
            names = ", ".join(part.name.rpartition(".")[2] for part in parts)
            text = f"fused in the adapter, split into {names}"
            notes.append(Adjustment(adapter.name, "split", site.path, text))
    return replace(adapter, deltas=_sorted(deltas)), notes


def _at(delta: Delta, module: str) -> Delta:
    return replace(delta, site=replace(delta.site, module=module))


def _rows_of(term: Term, part: Part) -> Term:
    """The term's outputs `part.start` to `part.stop` - 1."""
    return term.with_outputs(lambda tensor: Cut(tensor, part.start, part.stop))


def _stack_parts(base: Base, adapter: Adapter) -> tuple[Adapter, list[Adjustment]]:
    """Stack adapters of separate parts, for a base that fuses them: a sum, each at its own rows.

    Not for DoRA, whose magnitude would need values for the rows of the other parts.
    """
    unchanged: list[Delta] = []
    sums: dict[str, Delta] = {}
    notes = []
    present = {delta.name for delta in adapter.deltas}
    for delta in adapter.deltas:
        part = parts_in_base(base, delta.site.stack, delta.site.layer).get(delta.site.module)
        terms = _place_in_whole(base, delta, part) if part else ()
        if not part or not terms or _at(delta, part.whole).name in present:
            unchanged.append(delta)
            continue
        whole = _at(delta, part.whole)
        sums[whole.name] = replace(whole, terms=sums.get(whole.name, _none(whole)).terms + terms)
        text = f"rows {part.start} to {part.stop - 1} of {part.whole} in this base"
        notes.append(Adjustment(adapter.name, "stacked", delta.site.path, text))
    return replace(adapter, deltas=_sorted([*unchanged, *sums.values()])), notes


def _none(delta: Delta) -> Delta:
    return replace(delta, terms=())


def _place_in_whole(base: Base, delta: Delta, part: Part) -> tuple[Term, ...]:
    """The terms of a part as terms of the whole; empty if they have another kind or size."""
    rows = base.tensors[_at(delta, part.whole).name].shape[0] if delta.parameter == "weight" else 0
    terms = low_ranks(delta.terms)
    fits = all(term.outputs == part.stop - part.start for term in terms)
    if len(terms) < len(delta.terms) or not fits or not rows:
        return ()
    return tuple(term.with_outputs(lambda b: Placed(b, part.start, rows)) for term in terms)


def _fit_vocabulary(base: Base, adapter: Adapter) -> tuple[Adapter, list[Adjustment]]:
    """Adjust LoRA on an embedding or head whose number of rows differs from the base by padding.

    Both must have a row for every token of the tokenizers beside base and adapter. Additional rows
    of the adapter are dropped; additional rows of the base are not changed.
    """
    kind = base.architecture
    replaced = {saved.name for saved in adapter.replacements}
    deltas, notes = [], []
    for delta in adapter.deltas:
        embedding = delta.site.path == kind.family.embedding
        stored = base.tensors.get(base.tied.get(delta.name, delta.name))
        rows = stored.shape[0] if stored else 0
        home = base.tied.get(delta.name, delta.name)
        if (
            not (embedding or delta.site.path == kind.family.head)
            or not all(term.is_plain for term in delta.terms)
            or {delta.name, home} & replaced
        ):
            deltas.append(delta)
            continue
        sizes = {(t.a.shape[1] if embedding else t.b.shape[0]) for t in low_ranks(delta.terms)}
        tokens = _tokens(base.folder, adapter.folder)
        if sizes == {rows} or tokens is None or min(rows, *sizes) < tokens:
            deltas.append(delta)
            continue
        deltas.append(
            replace(
                delta, terms=tuple(_fit_rows(t, rows, embedding) for t in low_ranks(delta.terms))
            )
        )
        text = f"{max(sizes)} rows in the adapter, {rows} in the base, {tokens} tokens: padding"
        notes.append(Adjustment(adapter.name, "vocabulary", delta.site.path, text))
    return replace(adapter, deltas=tuple(deltas)), notes


def _fit_rows(term: LowRank, rows: int, embedding: bool) -> LowRank:
    """The term with `rows` rows in its factor that has a row for each token."""
    factor = Transposed(term.a) if embedding else term.b
    fitted = Cut(factor, 0, rows) if factor.shape[0] > rows else Placed(factor, 0, rows)
    return replace(term, a=Transposed(fitted)) if embedding else replace(term, b=fitted)


def _tokens(*folders: Path) -> int | None:
    """One more than the highest token id in any of the folders' tokenizers; None without one.

    The first folder, the base's, must have one.
    """
    highest = []
    for folder in folders:
        path = folder / "tokenizer.json"
        if path.is_file():
            highest.append(_highest(path))
        elif not highest:
            return None
    return max(highest) + 1


def _highest(path: Path) -> int:
    tokenizer = read_json(path, TOKENIZER_BYTES)
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [token.get("id") for token in tokenizer.get("added_tokens") or []]
    return max((n for n in (*ids, *added) if type(n) is int), default=-1)


def _sorted(deltas: list[Delta]) -> tuple[Delta, ...]:
    return tuple(sorted(deltas, key=lambda d: (d.site.order, d.parameter)))


_STEPS: tuple[Step, ...] = (
    _record_transposed,
    _rename_paths,
    _split_fused,
    _stack_parts,
    _fit_vocabulary,
)
