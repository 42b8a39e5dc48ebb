"""What a parity run is asked to prove, and how far an artifact may stray from its oracle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptrix_export.arch.tasks import TASKS
from adaptrix_export.errors import ParityError
from adaptrix_export.graph.expression import Expression, expressions_of
from adaptrix_export.oracle.naming import FROM_FILES, OracleFacts
from adaptrix_export.oracle.thresholds import Threshold
from adaptrix_export.plan import Gate
from adaptrix_export.recipe.targets import Form, Target, TargetFacts, facts_of


@dataclass(frozen=True)
class OtherBase:
    """The base weights that were not merged into: files as in `Job`, and which they are."""

    weights: str  # "original" or "dequantized"
    folder: Path
    gguf_file: str | None = None
    simulated: str | None = None


@dataclass(frozen=True)
class GateSpec:
    """A gate of the plan (`plan.Gate`) in words: `site` is the module's path."""

    site: str
    mode: str
    tau: float | None = None
    weight: float | None = None

    @property
    def depends_on_data(self) -> bool:
        return self.mode != "blend"


def gate_specs(gates: Iterable[Gate]) -> tuple[GateSpec, ...]:
    """A plan's gates for the check, those that depend on the data in the order of `Plan.gated`."""
    ordered = sorted(gates, key=lambda gate: gate.site.order)
    return tuple(GateSpec(g.site.path, g.mode, g.tau, g.weight) for g in ordered)


@dataclass(frozen=True)
class Job:
    """One artifact, the original files that it was made from, and how hard to look.

    `weights` maps an initializer (onnx) or tensor (safetensors) name to the expression over
    transformers' parameter names that made it (`graph/expression.py`). `precision` "base" means
    that each tensor keeps the dtype its base stores. `text` replaces the built-in prompt;
    `threads` of None leaves the number to the runtimes. `simulated` names a quantization that the
    base's weights are put through first; `other` is compared with the base in the report.
    """

    target: str  # a word of `recipe.targets.Target`
    artifact: Path
    base_folder: Path
    precision: str  # "fp32", "fp16", "bf16" or "base"
    weights: Mapping[str, Expression]
    gguf_file: str | None = None
    adapters: tuple[tuple[str, Path], ...] = field(default=())
    task: str = "text-generation"
    level: str = "full"  # "full" or "fast"
    decode_steps: int = 32
    text: str | None = None
    threads: int | None = None
    simulated: str | None = None
    other: OtherBase | None = None
    pooling: str | None = None  # the artifact gives one vector a row, too: "mean", "cls+max"
    composition: Mapping[str, Any] | None = None  # `Composition.as_dict`; None: all simply active
    gates: tuple[GateSpec, ...] = ()  # in the order of the plan's sites
    gate_stats: bool = False  # the graph is to tell how far they were open
    drawn: bool = False  # asked with inputs drawn from a seed: no cases of its own
    # Of a quantized artifact: initializer of the float graph -> what is stored in its place.
    quantized: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loss_rows: tuple[tuple[int, ...], ...] = ()  # token ids that its loss is measured on
    loss_text: str = "the proof's own prompt"  # where they are from
    max_kl: float | None = None  # nats a token to the float model, above which the proof fails
    min_cosine: float | None = None  # of an encoder's answers with the float model's, likewise
    # Where `NAME.onnx_adapter` files are, if not in the artifact: one that is to be added to it.
    adapter_folder: Path | None = None
    oracle: OracleFacts = FROM_FILES  # what `adapters` are, for the report
    crossings: tuple[Threshold, ...] = ()  # lengths that prompts are to go beyond

    def __post_init__(self) -> None:
        for name, value, known in (
            ("target", self.target, tuple(map(str, Target))),
            ("task", self.task, tuple(TASKS)),
            ("level", self.level, ("full", "fast")),
            ("precision", self.precision, (*TOLERANCES, "base")),
        ):
            if value not in known:
                raise ParityError(f"parity job {name}", repr(value), f"one of {', '.join(known)}")
        if self.decode_steps < 1:
            raise ParityError("parity job decode_steps", str(self.decode_steps), "at least 1")

    def to_json(self) -> str:
        """The job as one JSON document; `from_json` is its inverse. Paths become absolute."""
        document = asdict(replace(self, weights={}))
        document["weights"] = {name: e.as_json() for name, e in self.weights.items()}
        document["artifact"] = str(self.artifact.resolve())
        document["base_folder"] = str(self.base_folder.resolve())
        if self.adapter_folder is not None:
            document["adapter_folder"] = str(self.adapter_folder.resolve())
        if self.other is not None:
            document["other"]["folder"] = str(self.other.folder.resolve())
        document["adapters"] = [[name, str(path.resolve())] for name, path in self.adapters]
        return json.dumps(document, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Job:
        document = json.loads(text)
        document["weights"] = expressions_of(document["weights"], "parity job weights")
        document["artifact"] = Path(document["artifact"])
        document["base_folder"] = Path(document["base_folder"])
        if document["adapter_folder"] is not None:
            document["adapter_folder"] = Path(document["adapter_folder"])
        document["adapters"] = tuple((name, Path(path)) for name, path in document["adapters"])
        if document["other"] is not None:
            other = document["other"]
            document["other"] = OtherBase(**{**other, "folder": Path(other["folder"])})
        document["gates"] = tuple(GateSpec(**gate) for gate in document["gates"])
        document["oracle"] = OracleFacts.from_dict(document["oracle"])
        document["loss_rows"] = tuple(map(tuple, document["loss_rows"]))
        document["crossings"] = tuple(Threshold(**t) for t in document["crossings"])
        return cls(**document)

    def on_other(self) -> Job:
        """The same adapters on the other base weights."""
        assert self.other is not None
        return replace(
            self,
            base_folder=self.other.folder,
            gguf_file=self.other.gguf_file,
            simulated=self.other.simulated,
            other=None,
        )

    @property
    def facts(self) -> TargetFacts:
        return facts_of(self.target)

    @property
    def is_graph(self) -> bool:
        return self.facts.form is Form.GRAPH

    @property
    def steps(self) -> int:
        """Greedy tokens to decode: a fast run takes 8, enough to pass through the cache."""
        return min(self.decode_steps, 8) if self.level == "fast" else self.decode_steps


@dataclass(frozen=True)
class Tolerance:
    """How far logits may be from the oracle's and still be called the same model.

    `max_abs` bounds every single logit; `mean_kl` is in nats per token, oracle against artifact;
    `top1` is the least share of positions at which both pick the same token. The last two are
    None for features, which are no distribution over anything.
    """

    max_abs: float
    mean_kl: float | None
    top1: float | None


# Logits reveal a wrong graph, which is off by 0.1 to 7 where it forgets padding, say. A wrong
# weight is caught much more finely by the replay, which knows no tolerance but one rounding.
TOLERANCES: Mapping[str, Tolerance] = {
    # Measured: 1e-5 on random models, 1.4e-4 and a KL of 2e-11 on SmolLM2's 30 layers, where only
    # the order of fp32 sums differs. 1e-3 leaves a factor of seven for deeper models; logits that
    # are off by as much everywhere are a KL of about 1e-6. Greedy decoding must not part, so every
    # argmax counts.
    "fp32": Tolerance(max_abs=1e-3, mean_kl=1e-6, top1=1.0),
    # Measured on SmolLM2 with weights rounded once to 11 bits: 0.039 and 2.3e-6. A factor of four
    # on logits, and near ties may flip. KL grows as the square, hence nine there.
    "fp16": Tolerance(max_abs=0.15, mean_kl=2e-5, top1=0.97),
    # The same with 8 bits: measured 0.23 and 7.6e-5; the same factors.
    "bf16": Tolerance(max_abs=1.0, mean_kl=7e-4, top1=0.9),
    # The oracle runs the dequantized weights; what differs are activations rounded to int8 in
    # blocks. Measured on SmolLM2: 1.2 and a KL of .0032 in 4 bits, .0042 in 8.
    "int8": Tolerance(max_abs=8.0, mean_kl=6e-3, top1=0.95),
    "int4": Tolerance(max_abs=8.0, mean_kl=6e-3, top1=0.95),
}
# Features are about 1 where logits are about 20. Measured on all-MiniLM-L6-v2 in 8 bits: .068.
FEATURES: Mapping[str, float] = {"int8": 0.3, "int4": 0.3}


def tolerance_of(precision: str, task: str, drawn: bool = False) -> Tolerance:
    """The row for a format; of features only the size of the largest difference counts."""
    row = TOLERANCES[precision]
    features = drawn or not TASKS[task].logits
    if not features:
        return row
    return replace(row, max_abs=FEATURES.get(precision, row.max_abs), mean_kl=None, top1=None)
