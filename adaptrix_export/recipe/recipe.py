"""The recipe: all options of a build, from a YAML file, flags or a call, as one frozen `Recipe`.

Keys of a file are the fields below. Flags of `build` and `--set key=value` (dotted:
`--set parity.level=fast`) override the file. Relative paths, also in a file, are relative to the
current working directory.

Every failure is a `RecipeError`: place, found, expected, remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adaptrix_export.errors import RecipeError
from adaptrix_export.recipe.compose import check_compose
from adaptrix_export.recipe.messages import misuse, one_of, refusal, shown
from adaptrix_export.recipe.quantize import Quantize
from adaptrix_export.recipe.redistribute import Redistribution
from adaptrix_export.recipe.sections import (
    SOURCES,
    AdapterSpec,
    ComposeSpec,
    Context,
    Line,
    LinePath,
    Parity,
    Section,
    Slots,
)
from adaptrix_export.recipe.targets import TARGET_FACTS, Form, Target
from adaptrix_export.recipe.words import (
    QUANTIZED,
    AdaptrixScaling,
    BaseWeights,
    Frontend,
    Layout,
    OnMismatch,
    Pooling,
    Precision,
    Provider,
    Simulate,
    Task,
    TokenizerFrom,
)
from adaptrix_export.recipe.yaml_reader import parse

MATRIX = "matrix"  # the key of several builds; see `matrix.py`
MAX_BYTES = 1_000_000  # of a recipe file; a long one is a few hundred


class Recipe(Section):
    """One build: a base, its adapters, and what to make of them."""

    base: Line = Field(description=f"The base model: {SOURCES}.")
    adapters: tuple[AdapterSpec, ...] = Field(
        min_length=1,
        description="The adapters to merge, in order; `adapter: X` is short for a list of one.",
    )
    base_weights: BaseWeights = Field(
        default=BaseWeights.AUTO,
        description="What to merge into when training saw a quantized base: dequantized (exactly "
        "what training saw; the default where `base` is quantized or `simulate` is given) or "
        "original (the 16-bit weights).",
    )
    simulate: Simulate | None = Field(
        default=None,
        description="For an unquantized `base`: how bitsandbytes quantized it in training (4 bits, "
        "blocks of 64, nf4-double with bnb_4bit_use_double_quant). Its Linear layers but the head "
        "are then rounded in the same way; fp4 is refused.",
    )
    original_base: Line | None = Field(
        default=None,
        description="For a quantized `base`: the model that it was quantized from, to merge into "
        f"with `base_weights: original`, and to compare with. {SOURCES[0].upper()}{SOURCES[1:]}.",
    )
    target: Target = Field(
        description="onnx: one graph for ONNX Runtime; onnx-switchable: the base's graph, and a "
        "file for each adapter; safetensors: a merged checkpoint; peft: the adapter itself, "
        "composed or redistributed, as a PEFT folder."
    )
    out: LinePath = Field(description="The folder to publish; it must not exist yet.")
    rows: bool = Field(
        default=False,
        strict=True,
        description="For onnx-switchable: every row of a batch chooses its own adapter, by the "
        "input adapter_ids; all adapters are then inside the graph.",
    )
    slots: Slots | None = Field(
        default=None, description="For onnx-switchable: adapters that are not plain LoRA."
    )
    frontend: Frontend = Field(
        default=Frontend.AUTO, description="What draws the base's graph, for onnx targets."
    )
    task: Task = Field(
        default=Task.AUTO,
        description="What the model is for; auto reads it from the configs of adapters and base.",
    )
    pooling: Pooling = Field(
        default=Pooling.NONE,
        description="For feature-extraction with onnx: one vector a row as a further output, "
        "sentence_embedding; by a name of sentence-transformers, or auto: as the base does it.",
    )
    layout: Layout = Field(
        default=Layout.HUB,
        description="Where graphs lie: hub, onnx/model.onnx with onnx/model.onnx_data, which "
        "transformers.js, optimum, sentence-transformers and onnxruntime-genai open as it is; "
        "flat, model.onnx with model.onnx.data in the folder itself.",
    )
    provider: Provider = Field(
        default=Provider.CPU, description="The execution provider that the graph is made for."
    )
    precision: Precision = Field(
        default=Precision.AUTO,
        description="Number format of the weights; auto is fp32 for onnx and the base's own for "
        "safetensors; fp16 and bf16 halve the file, and compute in float32 on a CPU; int8 and int4 "
        "are made as `quantize` says.",
    )
    quantize: Quantize | None = Field(
        default=None, description="For int8 and int4: how weights are rounded."
    )
    allow_pickle: bool = Field(
        default=False,
        strict=True,
        description="Read adapter_model.bin, a pickle; nothing in it is run even so.",
    )
    adaptrix_scaling: AdaptrixScaling = Field(
        default=AdaptrixScaling.ALPHA_OVER_RANK,
        description="The scale of an original Adaptrix folder: alpha_over_rank; stored, the "
        "scaling in its files; one, as the original's last engine applied it.",
    )
    on_mismatch: OnMismatch = Field(
        default=OnMismatch.ERROR,
        description="What becomes of sites that do not fit the base; drop leaves them out and "
        "lists each one.",
    )
    tokenizer: TokenizerFrom = Field(
        default=TokenizerFrom.AUTO,
        description="Whose tokenizer and chat template the artifact gets; auto takes the adapter's "
        "where its folder has one that differs from the base's.",
    )
    portable: bool = Field(
        default=False,
        strict=True,
        description="For safetensors: a config.json and a tokenizer_config.json with the keys of "
        "transformers 4 and 5; otherwise they are the base's own. Graphs always have both.",
    )
    redistribute: Redistribution | None = Field(
        default=None, description="Move the adapters onto a few layers before anything is made."
    )
    compose: ComposeSpec = Field(
        default=ComposeSpec(), description="What becomes of several adapters."
    )
    context: Context | None = Field(
        default=None, description="Context preservation; without it every adapter acts in full."
    )
    parity: Parity = Field(
        default=Parity(), description="How the artifact is proved before it is published."
    )
    report: bool = Field(
        default=True,
        strict=True,
        description="Write report.html into the artifact: what went in, what was proved, how to "
        "load it, on one page that needs no network.",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: Callable[[Any], Recipe], info: ValidationInfo) -> Recipe:
        """Convert pydantic's errors into RecipeErrors, however the Recipe is created."""
        context = info.context or {}
        place = context.get("place", "recipe")
        if not isinstance(data, (Mapping, cls)):
            raise RecipeError(place, shown(data), "keys and values", "see `adaptrix-export schema`")
        flags = context.get("flags", {})
        try:
            recipe = handler(_long_form(data) if isinstance(data, Mapping) else data)
            recipe._check_combinations()
        except ValidationError as error:
            raise misuse(cls, error.errors(), place, flags) from error
        except PydanticCustomError as error:
            detail = {"type": error.type, "loc": (), "msg": error.message(), "ctx": error.context}
            raise misuse(cls, [detail], place, flags) from error
        return recipe

    def _check_combinations(self) -> None:
        """Refuse combinations of fields that exclude each other."""
        possible = TARGET_FACTS[self.target].precisions
        if self.precision not in possible:
            raise refusal(
                f"{self.precision} with target {self.target}",
                one_of(possible),
                "other precisions are not written yet",
                key="precision",
            )
        self._check_context()
        if self.quantize is not None and self.precision not in QUANTIZED:
            raise refusal(
                f"quantize with precision {self.precision}", f"precision {one_of(QUANTIZED)}",
                "leave quantize out, or name the precision", key="quantize",
            )  # fmt: skip
        if self.pooling is not Pooling.NONE and self.target is not Target.ONNX:
            raise refusal(
                f"pooling {self.pooling} with target {self.target}", "target onnx",
                "a checkpoint holds weights alone", key="pooling",
            )  # fmt: skip
        if self.portable and TARGET_FACTS[self.target].form is not Form.CHECKPOINT:
            raise refusal(
                f"portable with target {self.target}", "a checkpoint",
                "leave it out: graphs are portable as they are, and adapters have no config of a "
                "model", key="portable",
            )  # fmt: skip
        self._check_slots()
        names = [adapter.name for adapter in self.adapters]
        check_compose(self.compose, names)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refusal(
                f"two adapters named {twice!r}",
                "a name for each",
                "write them as {source: ..., name: ...}",
                key="adapters",
            )

    def _check_context(self) -> None:
        """Refuse context modes that the target cannot express: weights do not depend on data."""
        if self.context is None or self.context.mode in TARGET_FACTS[self.target].context_modes:
            return
        able = [
            target
            for target, facts in TARGET_FACTS.items()
            if self.context.mode in facts.context_modes
        ]
        raise refusal(
            f"mode {self.context.mode} with target {self.target}",
            f"target {one_of(able)}",
            "it depends on the data, which a checkpoint cannot hold; mode blend is merged exactly",
            key="context",
        )

    def _check_slots(self) -> None:
        """Refuse options that do not apply to the target's adapter slots."""
        if self.target is not Target.ONNX_SWITCHABLE:
            for key, value in (("rows", self.rows), ("slots", self.slots)):
                if value:
                    raise refusal(
                        f"{key} with target {self.target}", str(Target.ONNX_SWITCHABLE), key=key
                    )
        elif self.compose != ComposeSpec():
            raise refusal(
                f"compose with target {self.target}", "adapters that stay apart",
                "mixes are made while it runs, or use target onnx", key="compose",
            )  # fmt: skip
        elif self.redistribute is not None:
            raise refusal(
                f"redistribute with target {self.target}", "another target",
                "redistribute each adapter first, and build from those", key="redistribute",
            )  # fmt: skip


def load_recipe(
    path: Path, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe file; `flags` and `overrides` override it (see `make_recipe`)."""
    return make_recipe(read_document(path), str(path), flags, overrides)


def make_recipe(
    document: Mapping[str, Any],
    place: str = "recipe",
    flags: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
) -> Recipe:
    """A Recipe from a document, then `flags` (dotted key -> value), then `key=value` overrides.

    `place` names the document in errors. Raises RecipeError.
    """
    if MATRIX in document:
        raise RecipeError(
            f"{place}: {MATRIX}", "several builds", "one", f"run `adaptrix-export batch {place}`"
        )
    changed = deepcopy(dict(document))
    origins: dict[str, str] = {}
    for key, value in (flags or {}).items():
        assign(changed, key, value)
        origins[key] = f"--{key.partition('.')[0].removesuffix('s').replace('_', '-')}"
    settings = list(overrides)
    changed = with_overrides(changed, settings)
    for setting in settings:
        key = setting.partition("=")[0].strip()
        origins[key] = f"--set {key}"
    return Recipe.model_validate(changed, context={"place": place, "flags": origins})


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, not validated yet."""
    place = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(place, "no such file", "a recipe", "check the spelling") from error
    except OSError as error:
        raise RecipeError(place, str(error.strerror or error), "a readable file") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(place, f"more than {MAX_BYTES} bytes", "a recipe", "is this the file?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(place, f"byte {error.start} is not UTF-8", "UTF-8 text") from error
    document = parse(text, place)
    if not isinstance(document, dict):
        remedy = "write lines such as `base: FOLDER`"
        raise RecipeError(place, shown(document), "keys and values", remedy)
    return document


def with_overrides(document: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """The document with each `key=value` applied; the key is dotted, the value is YAML."""
    changed = deepcopy(dict(document))
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise RecipeError(f"--set {text}", "no key and value", "key=value")
        assign(changed, key, parse(value, f"--set {key}"))
    return changed


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, short forms included."""
    schema = Recipe.model_json_schema()
    adapter = {"$ref": "#/$defs/AdapterSpec"}
    either = {"anyOf": [{"type": "string", "minLength": 1}, adapter]}
    properties = schema["properties"]
    properties["adapters"]["items"] = either
    properties["adapter"] = {**either, "description": "Short for `adapters` with one in it."}
    properties["compose"] = {
        "anyOf": [{"type": "string"}, properties["compose"]],
        "description": "What becomes of several adapters: a method by name, or a section.",
    }
    properties[MATRIX] = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"type": "array", "minItems": 1},
        "description": "For `batch`: one build for each combination of values, by key: "
        "{precision: [fp32, int4], layers: [3, 5]}.",
    }
    schema["required"].remove("adapters")
    named: list[dict[str, Any]] = [{"required": ["adapters"]}, {"required": ["adapter"]}]
    schema["oneOf"] = [*named, {"required": [MATRIX], "not": {"anyOf": named}}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def assign(document: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a value by its dotted key, in place; a number goes into a list."""
    *parents, last = dotted.split(".")
    if (parents or [last])[0] in ("adapter", "adapters"):
        _list_adapters(document, keep=bool(parents))
    if parents and parents[0] == "compose" and isinstance(document.get("compose"), str):
        document["compose"] = {"method": document["compose"]}
    if parents and parents[0] == "adapter":
        parents = ["adapters", "0", *parents[1:]]
    here: Any = document
    for part in parents:
        if isinstance(here, list):
            here = _element(here, part, dotted)
        else:
            here = here.setdefault(part, {})
        if not isinstance(here, (dict, list)):
            raise RecipeError(
                f"--set {dotted}", f"{part} = {shown(here)}", "a key with keys below it"
            )
    if isinstance(here, list):
        _element(here, last, dotted)
        here[int(last)] = value
    else:
        here[last] = value


def _list_adapters(document: dict[str, Any], keep: bool) -> None:
    """Replace adapters by their long form, or remove them, before a flag sets them."""
    adapters = _long_form(document).get("adapters")
    document.pop("adapter", None)
    document.pop("adapters", None)
    if keep and isinstance(adapters, (list, tuple)):
        document["adapters"] = [{"source": a} if isinstance(a, str) else a for a in adapters]


def _element(items: list[Any], part: str, dotted: str) -> Any:
    if not part.isdecimal() or int(part) >= len(items):
        raise RecipeError(f"--set {dotted}", part, f"a number from 0 to {len(items) - 1}")
    return items[int(part)]


def _long_form(document: Mapping[str, Any]) -> dict[str, Any]:
    """`adapter: X` as `adapters: [X]`, unless both are given: then `adapter` is an unknown key."""
    long = dict(document)
    if "adapter" in long and "adapters" not in long:
        long["adapters"] = [long.pop("adapter")]
    return long
