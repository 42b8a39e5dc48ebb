"""The sections of a recipe: adapters, composition, context, parity."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from adaptrix_export.errors import did_you_mean
from adaptrix_export.plan.methods import DENSITY, METHODS
from adaptrix_export.recipe.compose import AUTO, check_weights
from adaptrix_export.recipe.messages import one_of, refusal, shown
from adaptrix_export.recipe.words import (
    Approximation,
    ContextMode,
    ContextScope,
    Election,
    LongPrompts,
    ParityLevel,
)

CALIBRATED = "calibrated"  # a tau that is measured
MIN_TAU = 1e-5  # below, rounding is no longer small beside it
SOURCES = "a folder, a .gguf file, hf:org/name@revision or package:NAME/FILE"


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise refusal(repr(text), "a name on one line")
    return text


def _path(path: object) -> object:
    """Before pydantic makes a Path of it, which turns nothing into the current folder."""
    _one_line("" if path is None else str(path))
    return path


Number = Annotated[float, Field(allow_inf_nan=False)]
Layer = Annotated[int, Field(ge=0)]
Line = Annotated[str, AfterValidator(_one_line)]
LinePath = Annotated[Path, BeforeValidator(_path)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterSpec(Section):
    """One adapter. A plain string stands for `{source: that string}`."""

    source: Line = Field(description=f"The adapter: {SOURCES}.")
    name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="What to call it; by default the last part of its source.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"source": data}
        if not isinstance(data, (dict, cls)):
            raise refusal(shown(data), "a source, or {source: ..., name: ...}")
        if isinstance(data, dict) and "name" not in data and isinstance(data.get("source"), str):
            data = {**data, "name": default_name(data["source"])}
        return data


class Parity(Section):
    """The proof that the artifact computes what PyTorch and PEFT compute."""

    level: ParityLevel = Field(
        default=ParityLevel.FULL,
        description="full: every case; fast: fewer and shorter cases; off: none, and the artifact "
        "is marked unverified.",
    )
    long: LongPrompts = Field(
        default=LongPrompts.AUTO,
        description="Whether prompts go beyond the smallest length at which the model computes "
        "otherwise, a sliding window for example. auto: where it takes minutes at most.",
    )
    text: LinePath | None = Field(
        default=None, description="A UTF-8 text file to compare on, instead of the built-in text."
    )
    decode_steps: int = Field(
        default=32,
        ge=1,
        le=4096,
        strict=True,
        description="Tokens that are decoded greedily with the cache and compared one by one.",
    )


class ComposeSpec(Section):
    """How several adapters become one. A plain string stands for `{method: that string}`."""

    method: str = Field(
        default="cat",
        description="cat: the exact sum of what each adapter adds; others are described in the "
        f"README. One of {', '.join(METHODS)}, or auto: chosen from the conflict report.",
    )
    weights: tuple[Number, ...] | dict[Line, Number | dict[Layer, Number]] | None = Field(
        default=None,
        description="A factor for each adapter: a list in their order, or by name; for a name one "
        "number, or layer: number, with 1 for layers that are not named.",
    )
    density: float | None = Field(
        default=None, gt=0, le=1,
        description=f"Share of the values that a method which drops some keeps; {DENSITY} by "
        "default.",
    )  # fmt: skip
    rank: int | None = Field(
        default=None, ge=1, strict=True,
        description="Rank of the result of svd, the *_svd methods and tsv; by default the largest "
        "of the adapters' (tsv: all of each).",
    )  # fmt: skip
    election: Election = Field(
        default=Election.TOTAL,
        description="What elects a sign: total, the sum of the values; frequency, their number.",
    )
    seed: int = Field(default=0, ge=0, strict=True, description="Of dare's random draws.")
    calibration: dict[Line, LinePath] | None = Field(
        default=None,
        description="For auto: a UTF-8 text of what each adapter is for, by the adapter's name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return {"method": data} if isinstance(data, str) else data

    @field_validator("weights", mode="before")
    @classmethod
    def _numbers(cls, weights: Any) -> Any:
        check_weights(weights)
        return weights

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        known = (*METHODS, AUTO)
        if method not in known:
            raise refusal(repr(method), one_of(known), did_you_mean(method, known))
        return method


Tau = Annotated[float, Field(ge=MIN_TAU, allow_inf_nan=False)]
Weight = Annotated[float, Field(allow_inf_nan=False)]


class Slots(Section):
    """How adapters that are not plain LoRA are put into slots: by default they are refused."""

    approximate: Approximation = Field(
        description="svd: the nearest LoRA in the Frobenius norm; what is lost is reported."
    )
    rank: int = Field(
        ge=1, le=4096, strict=True, description="The rank of the approximation, at every site."
    )


class Context(Section):
    """Context preservation: how far adapters may move a site's output from the base's."""

    mode: ContextMode = Field(
        default=ContextMode.CLAMP,
        description="clamp: at most tau times the size of the base's output, token by token; mask: "
        "only padding is left untouched; blend: a fixed share of the adapter, merged.",
    )
    tau: Tau | dict[Layer, Tau] | Literal["calibrated"] | None = Field(
        default=None,
        description="For clamp: a number for every site; {layer: number}, and then only the sites "
        "of those layers are gated; or calibrated: measured on `text`, so that `share` of the "
        "tokens is clamped at no site.",
    )
    share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="For tau: calibrated, 0.9 by default."
    )
    text: LinePath | None = Field(
        default=None,
        description="For tau: calibrated, a UTF-8 text file, instead of the built-in text.",
    )
    weight: Weight | dict[Layer, Weight] | None = Field(
        default=None, description="For blend: the share, for every site or by layer like tau."
    )
    scope: ContextScope = Field(
        default=ContextScope.SITE,
        description="layer: tau is the budget of a layer, of which each of its k gated sites has "
        "tau / sqrt(k).",
    )
    stats: bool = Field(
        default=False,
        strict=True,
        description="Graph outputs context.gate_mean, context.gate_min and context.clamped, one "
        "number a site over the unpadded tokens of a call.",
    )

    @model_validator(mode="after")
    def _check_mode(self) -> Context:
        for key, mode in (("tau", ContextMode.CLAMP), ("weight", ContextMode.BLEND)):
            is_set, required = getattr(self, key) is not None, self.mode is mode
            if required and not is_set:
                raise refusal(f"mode {mode} without {key}", f"a {key}", f"write `{key}: 0.25`")
            if is_set and not required:
                raise refusal(f"{key} with mode {self.mode}", f"mode {mode}", f"leave {key} out")
        if self.tau != CALIBRATED and (self.share is not None or self.text is not None):
            key = "share" if self.share is not None else "text"
            raise refusal(f"{key} without tau: calibrated", "both", f"leave {key} out")
        if self.tau == {} or self.weight == {}:
            raise refusal("no layers", "{layer: number}", "write one number for every layer")
        if self.mode is not ContextMode.CLAMP and self.scope is not ContextScope.SITE:
            raise refusal(f"scope layer with mode {self.mode}", "mode clamp", "leave scope out")
        if self.mode is ContextMode.BLEND and self.stats:
            raise refusal("stats with mode blend", "mode clamp or mask", "a merged share is fixed")
        return self


def default_name(source: str) -> str:
    """`hf:org/name@revision` -> name; `folder/pydoc/` -> pydoc; `package:p/a.gguf` -> a."""
    path = source.partition("@")[0] if source.startswith("hf:") else source
    last = re.split(r"[/\\:]", path.rstrip("/\\"))[-1].removesuffix(".gguf")
    if last in ("", ".", ".."):
        last = Path(path).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "adapter"
