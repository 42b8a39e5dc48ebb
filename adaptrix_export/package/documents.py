"""The documents of an artifact, typed: manifest.json and report.json, each with its version.

What is written is checked against them, and so is what is read. Sections that this version does not
know are kept as they are, so that an older program still reads what a newer one added.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adaptrix_export.errors import SourceError

MANIFEST_FORMAT = 1
REPORT_FORMAT = 1


class Document(BaseModel):
    """Known fields have these types; unknown ones are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


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


class GateEntry(Document):
    site: str
    mode: str
    tau: float | None = None
    weight: float | None = None


class ContextEntry(Document):
    """The gates, in the order of the graph's statistics."""

    stats: bool
    gates: list[GateEntry]


class ParityEntry(Document):
    verdict: str
    report_sha256: str | None = None


class SwitchableEntry(Document):
    """Where adapters go in a graph, and the adapters by name."""

    model_version: int
    rows: bool
    slots: list[dict[str, Any]] = []
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


class ReplayEntry(Document):
    """Every stored tensor against the live model's, in units in the last place."""

    tensors: int
    elements: int
    changed: int
    worst: dict[str, Any]
    failed: int
    failures: list[dict[str, Any]]
    unmapped: list[str]
    passed: bool


class GatesEntry(Document):
    """Gates of the graph against those of the oracle."""

    sites: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    passed: bool


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
    loss: dict[str, Any] | None = Field(
        default=None, description="Of a quantized artifact, against the float model."
    )
    adapters: dict[str, FactorsEntry] = {}
    adjustments: list[str] = []
    approximated: dict[str, dict[str, Any]] = {}
    base_weights: dict[str, Any] | None = None
    fidelity: dict[str, dict[str, Any]] = {}
    effect: dict[str, Any] | None = None
    conflicts: dict[str, Any] | None = None


def check_document(kind: type[Document], document: dict[str, Any], place: str) -> None:
    """Raise SourceError at the first field of a document that is missing or of another type."""
    try:
        kind.model_validate(document)
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
