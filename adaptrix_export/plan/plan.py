"""The data that everything else works on: what changes where, by reference to tensors on disk.

Nothing here reads a weight. A `Plan` is immutable; a pass takes one and returns another; lowering
turns one into bytes. Shapes are written as PyTorch has them: a Linear weight is (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy import dtype, ndarray

if TYPE_CHECKING:
    from adaptrix_export.arch.architecture import Architecture
    from adaptrix_export.plan.composition import Composition


Array = ndarray[Any, dtype[Any]]


class Tensor(Protocol):
    """A tensor on disk: its header now, its values when lowering asks for them.

    `dtype` is a safetensors name (`F32`, `F16`, `BF16`, ...). `rows(i, j)` decodes rows i to j-1
    of the first axis only, so that a large matrix never has to be in memory whole.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> Array: ...
    def rows(self, start: int, stop: int) -> Array: ...


@dataclass(frozen=True)
class Site:
    """A place that an adapter changes.

    `Site("model.layers", 7, "self_attn.q_proj")` is a module of one layer of a stack;
    `Site("", None, "lm_head")` is one outside any stack.
    """

    stack: str
    layer: int | None
    module: str

    @property
    def path(self) -> str:
        """The module path in the model, e.g. `model.layers.7.self_attn.q_proj`."""
        return self.module if self.layer is None else f"{self.stack}.{self.layer}.{self.module}"

    @property
    def order(self) -> tuple[str, int, str]:
        """Sort key: by stack, then by layer as a number (10 comes after 9), then by module."""
        return (self.stack, -1 if self.layer is None else self.layer, self.module)

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class LowRank:
    """The term `scale * b @ a`, shape (out, in), from a (r, in) and b (out, r)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b)


@dataclass(frozen=True)
class Dora:
    """DoRA, https://arxiv.org/abs/2402.09353: m / |W + scale b a| * (W + scale b a) - W.

    `magnitude` m is (out,); the norm is taken over the inputs of each output, of the base W alone
    with this one adapter added.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b, self.magnitude)


@dataclass(frozen=True)
class Scaled:
    """`scale * vector`, added to a bias: what `lora_bias` trains."""

    vector: Tensor
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.vector,)


@dataclass(frozen=True)
class Experts:
    """`scale * b_e @ a_e` for each expert e of a parameter (experts, out, in), or of one (out, in).

    What `target_parameters` trains. `a` is (experts * r, in) with the expert slowest, `b` is
    (out, r * experts) with the expert fastest, as PEFT's ParamWrapper lays them out. Added to the
    parameter as it is stored, whatever its module does with it. `turned`: the parameter is
    (experts, in, out), and gains the transpose.
    """

    a: Tensor
    b: Tensor
    scale: float
    experts: int
    turned: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b)


@dataclass(frozen=True)
class Tuned:
    """What a layer of another PEFT tuner makes of its parameter: only the layer knows the formula.

    `kind` is the adapter's `peft_type`; `tensors` are those of this one module. The layer reads
    all of its module's parameters, so the term knows the `base` that they are in.
    """

    folder: Path  # of the adapter, whose config and tensors PEFT loads
    kind: str
    path: str  # of the module
    parameter: str
    base: Base = field(repr=False, compare=False)
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Part:
    """One adapter's share in a `Composed` term: its own terms at the parameter, and its weight."""

    adapter: str
    terms: tuple[LowRank | Dora | Scaled | Experts | Tuned, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Composed:
    """One delta made of several adapters' deltas, each as it acts alone on the base.

    `method` is a row of `plan/methods.py`, which says what the options mean to it; `name` is the
    parameter's, of which random draws depend. Evaluated by `merge/composed.py`.
    """

    method: str
    name: str
    parts: tuple[Part, ...]
    density: float | None = None
    rank: int | None = None
    election: str = "total"
    seed: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for part in self.parts for term in part.terms for t in term.tensors)


Leaf = LowRank | Dora | Scaled | Experts | Tuned
Term = Leaf | Composed


def leaves(terms: Iterable[Term]) -> Iterator[Leaf]:
    """The terms that read tensors: those inside a composition in its place."""
    for term in terms:
        if isinstance(term, Composed):
            for part in term.parts:
                yield from part.terms
        else:
            yield term


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one parameter of a site: the sum of its terms."""

    site: Site
    terms: tuple[Term, ...]
    parameter: str = "weight"

    @property
    def name(self) -> str:
        return f"{self.site.path}.{self.parameter}"


@dataclass(frozen=True)
class Replacement:
    """A parameter, or some rows of one, that an adapter ships whole.

    `shared` values go into the base's own parameter, so tied tensors follow (saved biases,
    resized embeddings, trained token rows); the others are a copy of the adapter's own
    (`modules_to_save`). `rows` of None means all of them.
    """

    site: Site
    parameter: str  # "weight" or "bias"
    tensor: Tensor
    shared: bool = False
    rows: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.site.path}.{self.parameter}"


@dataclass(frozen=True)
class Adapter:
    """One adapter, read from headers only."""

    name: str
    spec: str  # as the recipe named it
    folder: Path
    files: tuple[Path, ...]
    config: Mapping[str, Any]  # adapter_config.json, or what it would be in PEFT's form
    deltas: tuple[Delta, ...]
    replacements: tuple[Replacement, ...]
    # What a user should know of how the files were read.
    notes: tuple[str, ...] = ()
    # Stock PEFT would not read the files as we do: the oracle gets a copy in PEFT's own form.
    foreign: bool = False
    # What the files say beside what is applied: `format`, and that format's own metadata.
    metadata: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[Tensor, ...] = ()  # tensors that many sites use, such as VeRA's projections

    @property
    def parameters(self) -> int:
        """Number of trained values that the adapter ships."""
        tensors = [t for d in self.deltas for term in d.terms for t in term.tensors]
        tensors += self.shared
        return sum(prod(t.shape) for t in (*tensors, *(r.tensor for r in self.replacements)))


@dataclass(frozen=True)
class Base:
    """A base model, read from headers only.

    `tensors` are named as transformers names them, in file order, whatever the file format.
    `tied` maps a tensor name to the stored tensor that it shares (`lm_head.weight` ->
    `model.embed_tokens.weight`); the first is then usually absent from `tensors`.
    """

    spec: str
    folder: Path
    gguf_file: str | None  # file name inside `folder` when the base is a GGUF file
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    tied: Mapping[str, str]
    task: str = "text-generation"  # decides the live model, and with it every name
    # Stored, but not part of the live model for this task (another head): kept as they are.
    unseen: tuple[Tensor, ...] = ()
    # The tensors are no longer one for one those of the files (repeated layers, dequantized).
    rebuilt: bool = False
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    # How the files store the weights, and as what plain files are read: see `base_weights.py`.
    quantization: str | None = None
    simulated: str | None = None


@dataclass(frozen=True)
class Change:
    """All that happens to one tensor: `source` taken, some rows of it set, terms added.

    `source` is the base's tensor or the one that replaces it. `transposed` says that it is stored
    (in, out), as GPT-2's Conv1D and every embedding are, so that a term is transposed, too.
    """

    name: str
    site: Site
    source: Tensor
    transposed: bool
    terms: tuple[Term, ...] = ()
    rows: tuple[Replacement, ...] = ()
    blend: float = 1.0  # share of the terms' sum that is added

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape


@dataclass(frozen=True)
class Adjustment:
    """Something in an adapter that was read otherwise than it is stored, or dropped.

    `kind` is "transposed", "renamed", "split", "stacked", "vocabulary" or "dropped"; `place` is
    the module as the adapter names it.
    """

    adapter: str
    kind: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.adapter}: {self.place}: {self.text}"


@dataclass(frozen=True)
class Gate:
    """What becomes of the adapters' contribution d at one site, beside the base's output y0.

    With m the token's mask: "clamp" gives y0 + m min(1, tau |y0| / |d|) d, "mask" y0 + m d, and
    "blend" y0 + weight d, which a weight can hold; the first two depend on the data.
    """

    site: Site
    mode: str
    tau: float | None = None
    weight: float | None = None

    @property
    def depends_on_data(self) -> bool:
        return self.mode != "blend"


def clamp_slope(tau: float, width: int) -> float:
    """What a clamp to `tau` multiplies |y0| / |d| by, for outputs of `width` numbers.

    It is tau less what float32 can be off by: norms of `width` squares, by 2^-24 for each in
    whatever order they are summed, and y0 + g d, by 2^-22 |y0|.
    """
    return max(0.0, tau * (1 - (width + 16) * 2.0**-24) - 2.0**-22)


@dataclass(frozen=True)
class Plan:
    """Base, adapters, and what the passes did, in order."""

    base: Base
    adapters: tuple[Adapter, ...]
    history: tuple[str, ...] = field(default=())
    adjustments: tuple[Adjustment, ...] = field(default=())
    # What passes measured, by the name of its section in the report.
    measured: Mapping[str, Any] = field(default_factory=dict)
    # The base weights that were not chosen, when they are at hand: the report tells how far off.
    alternative: Base | None = None
    pooling: str | None = None  # "mean" or "cls": a graph of features gives one vector a row, too
    # How several adapters became one, unless they simply add up: the oracle then needs to know.
    composition: Composition | None = None
    gates: tuple[Gate, ...] = field(default=())
    gate_stats: bool = False  # the graph tells how far its gates were open

    def after(self, step: object, **changed: Any) -> Plan:
        """This plan with fields changed by `step`, whose repr becomes the history line."""
        return replace(self, history=(*self.history, repr(step)), **changed)

    def sites(self) -> tuple[Site, ...]:
        """Every site that some adapter changes, sorted."""
        found = {d.site for a in self.adapters for d in a.deltas}
        found |= {r.site for a in self.adapters for r in a.replacements}
        return tuple(sorted(found, key=lambda s: s.order))

    def gated(self) -> dict[Site, Gate]:
        """The sites that cannot be merged, because their gates depend on the data; in order."""
        found = (gate for gate in self.gates if gate.depends_on_data)
        return {gate.site: gate for gate in sorted(found, key=lambda g: g.site.order)}

    def merged(self) -> Plan:
        """What is merged of this plan: all but the deltas of its gated sites."""
        gated = self.gated()
        if not gated:
            return self
        adapters = (
            replace(a, deltas=tuple(d for d in a.deltas if d.site not in gated))
            for a in self.adapters
        )
        return replace(self, adapters=tuple(adapters), gates=tuple(
            gate for gate in self.gates if not gate.depends_on_data
        ))  # fmt: skip

    def changes(self) -> dict[str, Change]:
        """Tensor name -> what happens to it. Two adapters on one site add up.

        A tensor that was tied and is changed by itself is tied no longer (see `untied`): it
        starts from the values that it shared. Shared replacements come first: they change what
        is shared.
        """
        return dict(self._changes)

    @cached_property
    def _changes(self) -> dict[str, Change]:
        replacements = [r for a in self.adapters for r in a.replacements]
        shared: dict[str, Change] = {}
        for saved in (r for r in replacements if r.shared):
            home = self.base.tied.get(saved.name, saved.name)
            shared[home] = _replaced(shared.get(home) or self._start(home, saved.site, {}), saved)
        own: dict[str, Change] = {}
        blends = {g.site: g.weight for g in self.gates if g.weight is not None}
        for saved in (r for r in replacements if not r.shared):
            start = own.get(saved.name) or self._start(saved.name, saved.site, shared)
            own[saved.name] = _replaced(start, saved)
        for delta in (d for a in self.adapters for d in a.deltas):
            change = own.get(delta.name) or self._start(delta.name, delta.site, shared)
            blend = blends.get(delta.site, 1.0)
            own[delta.name] = replace(change, terms=change.terms + delta.terms, blend=blend)
        for name in self.untied():  # keeps what it shared, also where that was changed for all
            if name not in own and self.base.tied[name] in shared:
                site = self.base.architecture.site_of(name.rpartition(".")[0])
                own[name] = self._start(name, site, shared)
        return {**shared, **own}

    def _start(self, name: str, site: Site, shared: Mapping[str, Change]) -> Change:
        """The starting point of a change: the base's tensor, or what became of what it shares."""
        home = self.base.tied.get(name, name)
        transposed = self.base.architecture.is_transposed(site)
        if home not in self.base.tensors:  # a head that the adapter brings along
            saved = next(r for a in self.adapters for r in a.replacements if r.name == name)
            return Change(name, site, saved.tensor, transposed)
        if home in shared:
            return replace(shared[home], name=name, site=site, transposed=transposed)
        return Change(name, site, self.base.tensors[home], transposed)

    def added(self) -> tuple[str, ...]:
        """Tensor names that the base lacks: a head that only the adapter ships."""
        shipped = {r.name for a in self.adapters for r in a.replacements}
        known = {*self.base.tensors, *self.base.tied}
        return tuple(sorted(shipped - known))

    def untied(self) -> tuple[str, ...]:
        """Tensor names that the base shares and that this plan gives values of their own.

        Changing either end by itself unties: a new `lm_head` must not reach the embedding, nor
        the other way round, because PEFT's live model keeps them apart.
        """
        return self._untied

    @cached_property
    def _untied(self) -> tuple[str, ...]:
        own = {d.name for a in self.adapters for d in a.deltas}
        own |= {r.name for a in self.adapters for r in a.replacements if not r.shared}
        return tuple(n for n, source in self.base.tied.items() if n in own or source in own)

    def config_changes(self) -> dict[str, Any]:
        """Keys of config.json that the merged model needs otherwise than the base."""
        changed = dict(self.base.config_changes)
        if self.untied():
            changed["tie_word_embeddings"] = False
        embedding = self.changes().get(f"{self.base.architecture.family.embedding}.weight")
        if embedding and embedding.shape[0] != self.base.architecture.vocab_size:
            changed["vocab_size"] = embedding.shape[0]
        return changed | self._head_changes()

    def _head_changes(self) -> dict[str, Any]:
        """A classifier that the adapter ships: the class of the model, and a label for each row."""
        from adaptrix_export.arch.tasks import CLASSIFIERS, LABELS, class_name

        base = self.base
        if base.task not in CLASSIFIERS:
            return {}
        changed: dict[str, Any] = {}
        name = class_name(base.config, base.task)
        if name and [name] != base.config.get("architectures"):
            changed["architectures"] = [name]
        heads = [c for n, c in self.changes().items() if n in LABELS]
        labels = heads[0].shape[0] if heads else 0
        if labels and labels != len(base.config.get("id2label") or (0, 1)):
            changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
            changed["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        return changed


def _replaced(change: Change, saved: Replacement) -> Change:
    if saved.rows is None:
        return replace(change, source=saved.tensor)
    return replace(change, rows=(*change.rows, saved))


Pass = Callable[[Plan], Plan]
