"""The documents of an artifact, typed: manifest.json and report.json, each with its version.

What is written is checked against them, and so is what is read. Sections that this version does not
know are kept as they are, so that an older program still reads what a newer one added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaptrix_export.errors import SourceError

MANIFEST_FORMAT = 1
REPORT_FORMAT = 1


class Document(BaseModel):
    """Known fields have these types; unknown ones are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    def as_dict(self) -> dict[str, Any]:
        """The JSON that was read: fields that were not there are not there again."""
        return self.model_dump(mode="json", exclude_unset=True)


class File(Document):
    """One file by its content."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Input(File):
    """One file that was read: of which base or adapter, as the recipe names it."""

    spec: str
    file: str


class Tool(Document):
    name: str
    version: str


class AdjustmentEntry(Document):
    """Something in an adapter that was read otherwise than it is stored, or dropped."""

    adapter: str
    kind: str
    place: str
    text: str


class NamedSource(Document):
    name: str
    source: str


class ParitySettings(Document):
    decode_steps: int = Field(default=0, ge=0)
    text: str | None = None


class BuiltRecipe(Document):
    """What `verify` and `add-adapter` read of the recipe in a manifest."""

    base: str
    adapters: list[NamedSource]
    parity: ParitySettings
    adaptrix_scaling: str = ""
    slots: dict[str, Any] | None = None


class GateEntry(Document):
    site: str
    mode: str
    tau: float | None = None
    weight: float | None = None


class ContextEntry(Document):
    """The gates, in the order of the graph's statistics."""

    stats: bool
    gates: list[GateEntry]


class CalibrationEntry(Document):
    text: str = Field(description="Where the text is from.")


class FidelityEntry(Document):
    """What one redistributed adapter kept; `kl_base` and the like are those of the bare base."""

    strategy: str
    layers: list[int]
    of_layers: int
    calibration: CalibrationEntry
    measure: str
    tokens: int
    kl: float
    kl_base: float
    retained: float
    gain: float | None = None
    top1: float | None = None
    top1_base: float | None = None
    cosine: float | None = None
    cosine_base: float | None = None
    residual_before: list[float]
    residual_after: list[float]
    sites_before: int
    sites_after: int
    bytes_before: int
    bytes_after: int
    notes: list[str] = []

    @property
    def agreement(self) -> tuple[str, float, float]:
        """(name, of the base, of the adapter): top1 where the model gives logits, else cosine."""
        if self.top1 is not None and self.top1_base is not None:
            return "top1", self.top1_base, self.top1
        return "cosine", self.cosine_base or 0.0, self.cosine or 0.0


class EnergyEntry(Document):
    """Norms of deltas: adapter -> parameter -> norm; null where only the base's weights tell."""

    layers: dict[str, int] = Field(default={}, description="Layers of each stack.")
    before: dict[str, dict[str, float | None]]
    after: dict[str, dict[str, float | None]] | None = None


class ParityEntry(Document):
    verdict: str
    report_sha256: str | None = None


class SwitchableEntry(Document):
    """Where adapters go in a graph, and the adapters by name."""

    model_version: int
    rows: bool
    slots: list[dict[str, Any]] = Field(default=[], description="As `Slot.from_dict` reads them.")
    adapters: dict[str, dict[str, Any]]


class GraphEntry(Document):
    opset: int
    ir_version: int


class RuntimeEntry(Document):
    """The oldest ONNX Runtime that is known to run every graph, as `1.18`, and what each is."""

    minimum: str
    graphs: dict[str, GraphEntry]


class ManifestDocument(Document):
    """manifest.json: what went in, what came out, and what was proved, by hash."""

    format: int = Field(description="Version of this document.")
    tool: Tool
    target: str
    frontend: str | None = Field(default=None, description="What drew the graph, if there is one.")
    frontend_reason: str | None = Field(default=None, description="Why `auto` took it.")
    provider: str | None = None
    precision: str
    onnxruntime: RuntimeEntry | None = Field(default=None, description="Where there is a graph.")
    recipe: dict[str, Any] = Field(description="As it was built, without `out`; no machine paths.")
    inputs: list[Input]
    outputs: dict[str, File] = Field(description="Every file of the artifact but this one.")
    versions: dict[str, str] = Field(description="Of the libraries that decide the bytes.")
    history: list[str] = Field(description="The passes, in order.")
    composition: dict[str, Any] | None = None
    fidelity: dict[str, FidelityEntry] = Field(default={}, description="Of a redistribution.")
    energy: EnergyEntry | None = None
    revisions: dict[str, str] = Field(default={}, description="Commits of sources on the hub.")
    adjustments: list[AdjustmentEntry] = []
    base_weights: dict[str, Any]
    context: ContextEntry | None = None
    sites: list[str] = Field(description="Module paths that some adapter changes.")
    untied: list[str] = Field(description="Tensors that the base shares and this does not.")
    weights: dict[str, list[Any]] = Field(
        description="Initializer or tensor name -> the expression over base tensors that made it."
    )
    quantized: dict[str, dict[str, Any]] = Field(
        default={}, description="Initializer of the float graph -> what is stored in its place."
    )
    kept_float: dict[str, str] = Field(
        default={}, description="Matrices of a quantized graph that stay float, and why."
    )
    switchable: SwitchableEntry | None = None
    parity: ParityEntry
    checksum: str | None = Field(
        default=None, description="sha256 of this file's text without this field."
    )

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> ManifestDocument:
        """A manifest that is about to be written."""
        return parse_document(cls, manifest, "manifest.json")


class ToleranceEntry(Document):
    """How far a case may be off; null is no bound."""

    max_abs: float
    mean_kl: float | None
    top1: float | None


class CaseEntry(Document):
    """One way of calling the artifact, compared with the oracle.

    Numbers of null are not finite. KL is in nats a token, oracle against artifact; `top1` is the
    share of positions at which both pick the same token.
    """

    name: str
    positions: int
    finite: bool
    max_abs: float | None
    mean_kl: float | None
    top1: float | None
    tolerance: ToleranceEntry
    passed: bool


class WorstTensor(Document):
    tensor: str
    ulps: float | None


class TensorFailure(Document):
    """A stored tensor that differs, and the modules that it is made from."""

    tensor: str
    sites: list[str]
    why: str


class ReplayEntry(Document):
    """Every stored tensor against the live model's, in units in the last place."""

    tensors: int
    elements: int
    changed: int
    worst: WorstTensor
    failed: int
    failures: list[TensorFailure]
    unmapped: list[str]
    passed: bool


class GatedSite(Document):
    """A gated site with the oracle's statistics, where its gate depends on the data."""

    adapter: str | None = None
    site: str
    mode: str
    tau: float | None = None
    weight: float | None = None
    gate_mean: float | None = None
    gate_min: float | None = None
    clamped: float | None = Field(default=None, description="Share of tokens.")


class GateCheck(Document):
    """One comparison of gates: of statistics over tokens, or of a number of nodes."""

    name: str
    tokens: int | None = None
    count: int | None = None
    max_abs: float | None = None
    passed: bool

    @property
    def compares_values(self) -> bool:
        return "max_abs" in self.model_fields_set


class GatesEntry(Document):
    """Gates of the graph against those of the oracle."""

    sites: list[GatedSite]
    checks: list[GateCheck]
    passed: bool


class LossEntry(Document):
    """A quantized artifact against the float model: a KL, or of features a cosine."""

    rows: int
    positions: int | None = None
    mean_kl: float | None = None
    top1: float | None = None
    max_kl: float | None = None
    cosine: float | None = None
    least_cosine: float | None = None
    min_cosine: float | None = None
    passed: bool


class ApproximationEntry(Document):
    """What the nearest LoRA of a rank loses of an adapter, as shares of the delta's norm."""

    rank: int
    error: float
    worst: float


class OtherBaseEntry(Document):
    """The same adapters on the other weights of a quantized base."""

    merged_into: str
    compared_with: str
    positions: int
    mean_kl: float | None
    max_abs: float | None
    top1: float | None


class DriftEntry(Document):
    """|y - y0| / |y0| at adapted modules; null is unbounded."""

    median: float | None
    p99: float | None
    max: float | None


class EffectModel(Document):
    kl: float
    retained: float | None
    agreement: float | None
    gain: float | None
    sites: int
    drift: DriftEntry | None = None
    clamped: float | None = None


class EffectEntry(Document):
    """A gated plan beside its plain merge, model by model."""

    measure: str
    agreement: str
    text: str
    tokens: int
    models: dict[str, EffectModel]


class PairConflict(Document):
    adapters: list[str]
    cosine: float
    sign_disagreement: float
    overlap_out: float | None = None
    overlap_in: float | None = None


class AdapterConflict(PairConflict):
    """Two adapters over all parameters."""

    conflict: float
    shared_sites: int
    shared_energy: float


class SiteConflict(PairConflict):
    """Two adapters at one parameter."""

    cancelled: float


class SiteConflicts(Document):
    site: str
    pairs: list[SiteConflict]


class ConflictsEntry(Document):
    pairs: list[AdapterConflict]
    sites: list[SiteConflicts] = []


class FactorsEntry(Document):
    """The factors in an adapter's file against the live adapter's."""

    slots: int
    worst: float | None
    failures: list[str]
    passed: bool


class ReportDocument(Document):
    """report.json: what was compared, how far off it was, and what passes measured."""

    format: Literal[1] = Field(default=1, description="Version of this document.")
    oracle: str = Field(description="What the artifact was compared with.")
    target: str
    level: str
    precision: str
    tolerance: str = Field(description="The row of tolerances that was used.")
    task: str
    tokens: str = Field(description="What the models were asked.")
    cases: list[CaseEntry]
    replay: ReplayEntry
    passed: bool
    versions: dict[str, str]
    context: GatesEntry | None = None
    loss: LossEntry | None = Field(
        default=None, description="Of a quantized artifact, against the float model."
    )
    adapters: dict[str, FactorsEntry] = {}
    adjustments: list[str] = []
    approximated: dict[str, ApproximationEntry] = {}
    base_weights: OtherBaseEntry | None = None
    fidelity: dict[str, FidelityEntry] = {}
    effect: EffectEntry | None = None
    conflicts: ConflictsEntry | None = None

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> ReportDocument:
        """A report that a proof has just made, before it is written."""
        return parse_document(cls, {"format": REPORT_FORMAT, **report}, "report.json")


Kind = TypeVar("Kind", bound=Document)


def parse_document(kind: type[Kind], document: Mapping[str, Any], place: str) -> Kind:
    """The typed form of a JSON document.

    Raises SourceError at the first field that is missing or of another type.
    """
    try:
        return kind.model_validate_json(json.dumps(document))  # tuples as the lists they become
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"])) or "the document"
        value = "nothing" if first["type"] == "missing" else repr(first["input"])[:80]
        raise SourceError(
            f"{place}: {path}", value, first["msg"][0].lower() + first["msg"][1:], "build again"
        ) from error


def document_schema(kind: type[Document], title: str) -> dict[str, Any]:
    """The JSON Schema of a document."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **kind.model_json_schema(),
        "title": title,
    }
