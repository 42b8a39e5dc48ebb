"""Invariants of plans, checked on headers after loading and after every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod

from adaptrix_export.arch.tasks import CLASSIFIERS, FEATURES, LABELS, TASKS, TWO_PARTS
from adaptrix_export.errors import AdapterError, InputError, UnsupportedError
from adaptrix_export.load.adapters.tuners import own_sizes
from adaptrix_export.load.files.tensors import FLOATS
from adaptrix_export.load.files.views import Flattened
from adaptrix_export.load.fit.fused import fused_hint
from adaptrix_export.plan import (
    Adapter,
    Base,
    Delta,
    Gate,
    Leaf,
    Plan,
    Replacement,
    Site,
    Tuned,
    leaves,
    low_ranks,
    on_experts,
)


@dataclass(frozen=True)
class Misfit:
    """A violated invariant: `error` in the adapter of that name, at `site` if it concerns one."""

    adapter: str
    site: Site | None
    error: InputError


def verify(plan: Plan) -> Plan:
    """Return the plan, or raise AdapterError or UnsupportedError for the first misfit.

    Every site exists in the base; every shape fits; no parameter is replaced twice; deltas are
    added to float tensors only.
    """
    for misfit in misfits(plan):
        raise misfit.error
    return plan


def misfits(plan: Plan) -> Iterator[Misfit]:
    """Everything that `verify` would raise, in its order."""
    fits = True
    for adapter in plan.adapters:
        if not adapter.deltas and not adapter.replacements and adapter.prompt is None:
            yield Misfit(adapter.name, None, _empty(adapter))
        for delta in adapter.deltas:
            for error in _check_delta(plan.base, adapter, delta):
                fits = False
                yield Misfit(adapter.name, delta.site, error)
        for saved in adapter.replacements:
            for error in _check_replacement(plan.base, adapter, saved):
                fits = False
                yield Misfit(adapter.name, saved.site, error)
    checks = [_check_conflicts(plan), _check_gates(plan), _check_shared(plan), _check_heads(plan)]
    checks.append(_check_prompts(plan))
    if fits:  # the check of the vocabulary needs valid changes
        checks.append(_check_vocabulary(plan))
    for check in checks:
        for error in check:
            yield Misfit(plan.adapters[0].name, None, error)


def _check_prompts(plan: Plan) -> Iterator[InputError]:
    """A learned prompt goes alone: PEFT runs it beside no other adapter, nor can it be composed."""
    named = [adapter.name for adapter in plan.adapters if adapter.prompt is not None]
    if not named or len(plan.adapters) == 1:
        return
    many = "a learned prompt each" if len(named) > 1 else f"{named[0]} is a learned prompt"
    yield UnsupportedError(
        " and ".join(adapter.name for adapter in plan.adapters), many,
        "a learned prompt alone, or adapters that are merged", "build them one by one",
    )  # fmt: skip


def _empty(adapter: Adapter) -> InputError:
    return AdapterError(
        adapter.name, "no tensors", "at least one site",
        "was the adapter saved with another name active?",
    )  # fmt: skip


def _stored(
    base: Base, adapter: Adapter, path: str, parameter: str
) -> tuple[int, ...] | InputError:
    """Shape of the base's parameter, or an error if it is missing or not a float tensor."""
    name = f"{path}.{parameter}"
    tensor = base.tensors.get(base.tied.get(name, name))
    if tensor is None and parameter == "bias" and f"{path}.weight" in base.tensors:
        return UnsupportedError(
            f"{adapter.name}: {path}", "a trained bias", "a module with a bias in the base",
            "the merged model's class has no place for it; train without lora_bias or bias",
        )  # fmt: skip
    if tensor is None:
        return AdapterError(
            f"{adapter.name}: {path}", f"no {parameter} in the base", "a module of the base",
            fused_hint(base, path)
            or _task_hint(base, adapter, name)
            or _tower_hint(base, path)
            or "was this adapter trained on another model?",
        )  # fmt: skip
    if tensor.dtype not in FLOATS:
        return UnsupportedError(f"{path}.{parameter}", f"dtype {tensor.dtype}", " ".join(FLOATS))
    return tensor.shape


_TOWERS = (
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "audio_tower",
    "multi_modal_projector", "mm_projector", "connector", "embed_vision", "embed_audio",
)  # fmt: skip


def _tower_hint(base: Base, path: str) -> str:
    """A remedy for a vision or audio module that a text model does not have."""
    tower = next((word for word in path.split(".") if word in _TOWERS), None)
    if tower is None or any(tower in name.split(".") for name in base.tensors):
        return ""
    return (
        f"this base has no {tower}: name the model with one as the base, or leave this part out "
        "with --on-mismatch drop"
    )


def _task_hint(base: Base, adapter: Adapter, name: str) -> str:
    """A remedy for a module that exists under its name in a model for another task."""
    body = name.partition(".")[2]
    if body not in base.tensors and not any(n.endswith(f".{name}") for n in base.tensors):
        return ""
    trained = adapter.config.get("task_type")
    fitting = next((task for task, kind in TASKS.items() if kind.peft == trained), None)
    if trained is None or fitting in (None, base.task):
        return ""
    mismatch = f"it was trained with task_type {trained}, and the base was opened for {base.task}"
    return f"{mismatch}; use --task {fitting}"


def _check_delta(base: Base, adapter: Adapter, delta: Delta) -> Iterator[InputError]:
    path = delta.site.path
    shape = _stored(base, adapter, path, delta.parameter)
    if isinstance(shape, InputError):
        yield shape
        return
    stacked = on_experts(leaves(delta.terms))
    if stacked:
        outputs, inputs = shape[-2:]  # added to the parameter as it is stored
        if stacked[0].turned:
            outputs, inputs = inputs, outputs
        yield from _check_terms(base, adapter, delta, outputs, inputs)
        return
    factors = [term.a for term in low_ranks(leaves(delta.terms))]
    kernels = [a.source.shape[1:] for a in factors if isinstance(a, Flattened)]
    if kernels and all(kernel == shape[1:] for kernel in kernels):
        shape = (shape[0], prod(shape[1:]))
    dims = 1 if delta.parameter == "bias" else 2
    if len(shape) != dims:
        yield UnsupportedError(
            f"{adapter.name}: {delta.name}", f"shape {list(shape)}", f"{dims} dimensions"
        )
        return
    outputs, inputs = shape[0], shape[-1]
    if base.architecture.is_transposed(delta.site) and delta.parameter == "weight":
        outputs, inputs = inputs, outputs
    yield from _check_terms(base, adapter, delta, outputs, inputs)


def _check_terms(
    base: Base, adapter: Adapter, delta: Delta, outputs: int, inputs: int
) -> Iterator[InputError]:
    path = delta.site.path
    vocabulary = _resized(base, adapter, path)
    for term in leaves(delta.terms):
        scale = getattr(term, "scale", 1.0)
        if not isfinite(scale):
            yield AdapterError(
                f"{adapter.name}: {path}", f"a scale of {scale}", "a finite number",
                "correct lora_alpha and r, or save the adapter again",
            )  # fmt: skip
        for what, actual, expected in _sizes(term, outputs, inputs):
            if actual != expected and actual != vocabulary:
                yield AdapterError(
                    f"{adapter.name}: {path}", f"{what.format(actual)}",
                    f"{expected} as in the base", "was this adapter trained on another model?",
                )  # fmt: skip
        floats = () if term.is_layer_made else term.tensors  # a tuner may store indices
        for tensor in floats:
            if tensor.dtype not in FLOATS:
                yield UnsupportedError(
                    f"{adapter.name}: {tensor.name}", f"dtype {tensor.dtype}", " ".join(FLOATS)
                )


def _sizes(term: Leaf, outputs: int, inputs: int) -> list[tuple[str, int, int]]:
    """(description, actual, expected size) of every axis of a term that depends on the base."""
    if isinstance(term, Tuned):
        return own_sizes(term, outputs, inputs)
    return term.sizes(outputs, inputs)


def _resized(base: Base, adapter: Adapter, path: str) -> int | None:
    """The vocabulary size of the adapter's own replacement of this module, if it has one."""
    name = f"{path}.weight"
    home = base.tied.get(name, name)
    for saved in adapter.replacements:
        if saved.rows is None and saved.name in (name, home):
            return saved.tensor.shape[0]
    return None


def _check_replacement(base: Base, adapter: Adapter, saved: Replacement) -> Iterator[InputError]:
    path = saved.site.path
    if _is_new_head(base, saved):
        return
    shape, saved_shape = _stored(base, adapter, path, saved.parameter), saved.tensor.shape
    if isinstance(shape, InputError):
        yield shape
        return
    if saved.tensor.dtype not in FLOATS:
        yield UnsupportedError(
            f"{adapter.name}: {saved.name}", f"dtype {saved.tensor.dtype}", " ".join(FLOATS)
        )
        return
    if saved.rows is not None:
        if any(not 0 <= row < shape[0] for row in saved.rows) or len(saved.rows) != saved_shape[0]:
            yield AdapterError(
                f"{adapter.name}: {saved.name}", f"rows {list(saved.rows)[:5]}",
                f"{saved_shape[0]} rows below {shape[0]}", "is the base's vocabulary another one?",
            )  # fmt: skip
            return
        saved_shape = (shape[0], *saved_shape[1:])
    vocabulary = saved.name in _vocabulary(base) and saved_shape[1:] == shape[1:]
    if saved_shape != shape and not vocabulary:
        yield AdapterError(
            f"{adapter.name}: {saved.name}", f"shape {list(saved_shape)}",
            f"{list(shape)} as in the base", "was this adapter trained on another model?",
        )  # fmt: skip


def _is_new_head(base: Base, saved: Replacement) -> bool:
    """Whether it is a head that the base does not have, trained from scratch."""
    known = saved.name in base.tensors or saved.name in base.tied
    if base.skeleton is not None:
        return saved.name in base.lacking
    return (
        not known
        and not saved.shared
        and saved.site.path.partition(".")[0] in TASKS[base.task].heads
    )


def _vocabulary(base: Base) -> tuple[str, ...]:
    """The tensors with a row for each token, whose number of rows a resized vocabulary changes."""
    family = base.architecture.family
    return (f"{family.embedding}.weight", f"{family.head}.weight")


def _check_vocabulary(plan: Plan) -> Iterator[InputError]:
    """Embedding and head must agree on the number of tokens."""
    changes = plan.changes()
    sizes = {}
    for name in _vocabulary(plan.base):
        stored = plan.base.tensors.get(plan.base.tied.get(name, name))
        changed = changes.get(name) or (changes.get(plan.base.tied.get(name, name)))
        if changed or stored:
            sizes[name] = (changed or stored).shape[0]  # type: ignore[union-attr]
    if len(set(sizes.values())) > 1:
        yield AdapterError(
            plan.adapters[0].name, ", ".join(f"{n}: {s} tokens" for n, s in sizes.items()),
            "one vocabulary", "save the adapter with both (save_embedding_layers=True)",
        )  # fmt: skip


def _check_heads(plan: Plan) -> Iterator[InputError]:
    """Refuse a plan without a tensor of the live model: transformers would initialise it at
    random."""
    base = plan.base
    shipped = {saved.name for adapter in plan.adapters for saved in adapter.replacements}
    missing = [name for name in base.lacking if name not in shipped]
    if base.task == FEATURES:
        missing = [name for name in missing if "pooler" not in name]  # not part of the output
    labelled = any(name in base.tensors or name in shipped for name in LABELS)
    if base.skeleton is None and base.task in CLASSIFIERS and not labelled:
        missing.append(" or ".join(LABELS[:2]))
    if missing:
        yield AdapterError(
            plan.adapters[0].name, f"no {missing[0]}, in the base or the adapter",
            f"the head that it was trained with for {base.task}",
            "a head trained from nothing must be saved: name it in modules_to_save, train and "
            "save again; or name another --task",
        )  # fmt: skip


def _check_shared(plan: Plan) -> Iterator[InputError]:
    """Refuse untying T5's embedding: it scales its logits by `tie_word_embeddings`."""
    if plan.base.architecture.family.aliases and plan.untied():
        yield UnsupportedError(
            plan.adapters[0].name, f"a change of {plan.untied()[0]} alone",
            "the embedding of an encoder-decoder shared as it is",
            "train on the modules of the layers",
        )  # fmt: skip


def _check_conflicts(plan: Plan) -> Iterator[InputError]:
    """Refuse a parameter that two adapters replace, or one adapter changes twice."""
    owner: dict[str, str] = {}
    for adapter in plan.adapters:
        count = Counter(delta.name for delta in adapter.deltas)
        for name in (name for name, times in count.items() if times > 1):
            yield AdapterError(
                f"{adapter.name}: {name}", "adapted twice", "once",
                "two of its tensors mean the same place; save the adapter again",
            )  # fmt: skip
        for saved in adapter.replacements:
            name = saved.name
            if owner.setdefault(name, adapter.name) != adapter.name:
                yield AdapterError(
                    name, f"replaced by {owner[name]} and by {adapter.name}", "one of them",
                    "build with one of the two adapters",
                )  # fmt: skip
    names = [adapter.name for adapter in plan.adapters]
    if len(set(names)) != len(names):
        yield AdapterError("adapters", f"names {', '.join(names)}", "each once", "name them apart")


MIN_TAU = 1e-5  # below, a clamp's rounding allowance is no longer small beside it
MODES = ("clamp", "mask", "blend")


def _check_gates(plan: Plan) -> Iterator[InputError]:
    """Refuse two gates at a site, gates where they are impossible, and invalid numbers."""
    if plan.gates and plan.composition is not None:
        yield UnsupportedError(
            "context", f"adapters composed by {plan.composition.method}", "one, or their plain sum",
            "leave the context out, or compose with method cat and every weight 1",
        )  # fmt: skip
    count = Counter(gate.site for gate in plan.gates)
    for gate in plan.gates:
        error = ungateable(plan, gate.site, gate.mode) or _gate_error(gate)
        if error is None and count[gate.site] > 1:
            error = AdapterError(f"context: {gate.site.path}", "two gates", "one a site")
        if error is not None:
            yield error


def _gate_error(gate: Gate) -> InputError | None:
    place = f"context: {gate.site.path}"
    if gate.mode not in MODES:
        return UnsupportedError(place, f"mode {gate.mode!r}", " or ".join(MODES))
    tau, weight = gate.tau, gate.weight
    if gate.mode == "clamp" and (tau is None or not (isfinite(tau) and tau >= MIN_TAU)):
        return AdapterError(place, f"tau {tau}", f"a number from {MIN_TAU:g} on")
    if gate.mode == "blend" and (weight is None or not isfinite(weight)):
        return AdapterError(place, f"weight {weight}", "a finite number")
    return None


def ungateable(plan: Plan, site: Site, mode: str) -> InputError | None:
    """The reason why a site cannot have a gate of this mode, or None.

    A gate reads the base's output and the adapters' contribution, so no adapter may replace the
    weight. For modes that depend on the data the delta must be low-rank, and the site a Linear
    inside the layers.
    """
    place = f"context: {site.path}"
    deltas = [d for a in plan.adapters for d in a.deltas if d.site == site]
    if not deltas:
        return AdapterError(place, "no adapter changes it", "a site of an adapter")
    if any(r.site == site and r.parameter == "weight" for a in plan.adapters
           for r in a.replacements):  # fmt: skip
        return UnsupportedError(
            place, "a weight that an adapter replaces whole", "one that it adds to", _UNGATED
        )
    if mode == "blend":
        return None
    if plan.base.task in TWO_PARTS:
        return UnsupportedError(
            place, f"a {mode} gate in an encoder-decoder", "one graph to gate",
            "leave context out, or use mode blend",
        )  # fmt: skip
    if site.layer is None:
        return UnsupportedError(place, f"a {mode} gate outside the layers", "a layer's module",
                                _UNGATED)  # fmt: skip
    kinds = {type(term).__name__ for d in deltas for term in d.terms if not term.is_plain}
    if kinds:
        return UnsupportedError(
            place, f"a {mode} gate on {' and '.join(sorted(kinds))}", "low-rank additions only",
            _UNGATED,
        )  # fmt: skip
    shape = plan.base.tensors[f"{site.path}.weight"].shape
    if len(shape) != 2:
        return UnsupportedError(place, f"a weight of shape {list(shape)}", "two dimensions",
                                _UNGATED)  # fmt: skip
    for term in low_ranks(term for d in deltas for term in d.terms):
        outputs, inputs = _sizes_of(plan.base, site)
        if (term.b.shape[0], term.a.shape[1]) != (outputs, inputs):
            return AdapterError(
                place, f"a delta of shape {[term.b.shape[0], term.a.shape[1]]}",
                f"{[outputs, inputs]} as the base's output needs", _UNGATED,
            )  # fmt: skip
    return None


_UNGATED = "name other layers in context.tau, or merge it with on_mismatch: drop"


def _sizes_of(base: Base, site: Site) -> tuple[int, int]:
    """(outputs, inputs) of a module with a weight of two dimensions."""
    outputs, inputs = base.tensors[f"{site.path}.weight"].shape
    return (inputs, outputs) if base.architecture.is_transposed(site) else (outputs, inputs)
