"""Which weights of a quantized base the adapters are merged into: the recipe's `base_weights`.

Training on a quantized base (QLoRA) uses dequantized weights. Merging into those is exact; merging
into the original 16-bit weights often scores better and sometimes far worse. Both are possible, and
the report compares with the other one if it is available.

| the base given is | `dequantized`                   | `original`                          |
|---|---|---|
| quantized         | its stored weights (default)    | `original_base`, compared with it   |
| plain             | quantized and back (`simulate`) | as it is (default)                  |
"""

from __future__ import annotations

from collections.abc import Sequence

from adaptrix_export.errors import RecipeError
from adaptrix_export.load.open_base import open_base
from adaptrix_export.load.quantized.quantized_base import COMPUTING
from adaptrix_export.load.quantized.simulated import SIMULATED, simulate
from adaptrix_export.plan import Base

AUTO, DEQUANTIZED, ORIGINAL = "auto", "dequantized", "original"


def open_bases(
    spec: str,
    choice: str = AUTO,
    simulated: str | None = None,
    original: str | None = None,
    *,
    task: str = "auto",
    adapters: Sequence[str] = (),
) -> tuple[Base, Base | None]:
    """(the base to merge into, the other one if it is available).

    `choice` is `base_weights`, `simulated` a word of SIMULATED, `original` the spec of the
    unquantized base; `task` and `adapters` as in `open_base`. Raises what that raises, and
    RecipeError for words that do not go together.
    """
    base = open_base(spec, task, adapters)
    if base.quantization is None and base.gguf_file is None:
        return _plain(base, choice, simulated, original)
    if simulated is not None:
        raise RecipeError(
            "simulate", f"{simulated} on a quantized base ({how_stored(base)})", "a plain base",
            "its stored weights are what training saw; leave `simulate` out",
        )  # fmt: skip
    other = _original(base, original) if original is not None else None
    if choice == ORIGINAL:
        if other is None:
            raise RecipeError(
                "base_weights", f"original, and a quantized base ({how_stored(base)})",
                "original_base, to merge into", "name the unquantized model as `original_base`",
            )  # fmt: skip
        return other, base
    return base, other


def _plain(
    base: Base, choice: str, simulated: str | None, original: str | None
) -> tuple[Base, Base | None]:
    if original is not None:
        raise RecipeError(
            "original_base", f"{original}, and a plain base", "a quantized base",
            "the base itself is the original; leave `original_base` out",
        )  # fmt: skip
    if choice == DEQUANTIZED and simulated is None:
        raise RecipeError(
            "base_weights", "dequantized, and a plain base", f"simulate: {' | '.join(SIMULATED)}",
            "say how the base was quantized in training",
        )  # fmt: skip
    if simulated is None:
        return base, None
    rounded = simulate(base, simulated)
    return (base, rounded) if choice == ORIGINAL else (rounded, base)


def _original(quantized: Base, spec: str) -> Base:
    """The unquantized base, which must have the tensors of the quantized one."""
    base = open_base(spec, quantized.task)
    if base.quantization is not None or base.gguf_file is not None:
        raise RecipeError("original_base", f"{spec}, {how_stored(base)}", "an unquantized model")
    ours = {name: tensor.shape for name, tensor in quantized.tensors.items()}
    theirs = {name: tensor.shape for name, tensor in base.tensors.items()}
    differing = [n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n) and n not in base.tied]
    if differing:
        name = min(differing)
        raise RecipeError(
            "original_base", f"{name} of shape {theirs.get(name)}", f"{ours.get(name)}, as in "
            f"{quantized.spec}", "name the model that the base was quantized from",
        )  # fmt: skip
    return base


def how_stored(base: Base) -> str:
    """How a base's files store its weights, in a few words."""
    return base.quantization or ("GGUF" if base.gguf_file else "plain")


def weights_read(base: Base) -> str:
    """Whether a base reads as DEQUANTIZED or as ORIGINAL weights."""
    rounded = base.quantization or base.simulated or base.gguf_file
    return DEQUANTIZED if rounded else ORIGINAL


def weights_record(base: Base) -> dict[str, str | None]:
    """The manifest's entry: weights merged into, their storage, and simulated quantization."""
    return {"weights": weights_read(base), "stored": how_stored(base), "simulated": base.simulated}


def note_of(base: Base) -> tuple[str, ...]:
    """Notes for the user on the weights that were merged into."""
    if base.simulated:
        return (f"merged into the base as {base.simulated} rounds it, not as it is stored",)
    if base.quantization is None:
        return ()
    note = f"merged into the dequantized weights of a base stored as {base.quantization}"
    if "int8" in base.quantization or "fp8" in base.quantization:
        note += "; running it quantized rounds activations as well, which no merge can keep"
    if COMPUTING in base.quantization:
        note += "; the weights are rounded to the dtype they had, not to that one"
    return (note,)
