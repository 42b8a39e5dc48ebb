"""Weight by weight: an artifact's tensors against the live model's, one rounding allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.errors import ParityError
from adaptrix_export.graph.expression import Expression
from adaptrix_export.oracle.compare import rounded
from adaptrix_export.prove.floats import FORMATS, Float64, FloatFormat, format_of
from adaptrix_export.targets.stored import StoredTensors

# Values that are exact: in fp64, or as the model has them where no adapter acts on them.
Live = Callable[[str], tuple[NDArray[Any], bool]]

# Lowering and oracle may sum the same fp64 products in another order, so that a value next to a tie
# rounds the other way. 2^-44 of a value (a millionth of its fp32 half ulp) is room for sums of
# hundreds of terms; where they cancel to next to nothing, 2^-48 of the tensor's largest value is.
NOISE_OF_VALUE = 2.0**-44
NOISE_OF_LARGEST = 2.0**-48
BLOCK = 1 << 18  # values at a time: 2 MB of fp64, which stays in cache
LISTED = 10
ULP_DIGITS = 7  # a value rounded twice is off by 0.50001 ulp


@dataclass
class Outcome:
    """What the replay has seen so far."""

    tensors: int = 0
    elements: int = 0
    changed: int = 0
    worst: tuple[float, str] = (0.0, "")
    room: float = 0.0  # the largest absolute allowance for a badly conditioned value
    failures: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self, unmapped: list[str]) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "changed": self.changed,
            "worst": {"tensor": self.worst[1], "ulps": rounded(self.worst[0], ULP_DIGITS)},
            **({"room": rounded(self.room, 3)} if self.room else {}),
            "failed": len(self.failures),
            "failures": self.failures[:LISTED],
            "unmapped": unmapped,
            "passed": not self.failures,
        }


def replay(
    stored: StoredTensors,
    weights: dict[str, Expression],
    live: Live,
    precision: str = "base",
    advance: Callable[[int], None] = lambda amount: None,
    room: Callable[[str], float] = lambda name: 0.0,
) -> tuple[dict[str, Any], set[str]]:
    """Each tensor of `weights`, read back, against its expression over live fp64 weights.

    A changed tensor must lie within half an ulp of its own format around the fp64 value; an
    untouched one must equal the base, rounded to nearest even where the format is narrower. No
    tensor may be stored coarser than `precision` says ("base" says nothing: the live model has
    been widened to fp32). `room` says of a tensor just read how far rounding alone may have moved
    its value: singular vectors that are nearly interchangeable are badly conditioned. Holds
    one tensor at a time. Returns the report's `replay` part and the formats met.
    """
    outcome, formats = Outcome(), set[str]()
    read = _LastRead(live)
    for name in _by_first_read(weights):
        kind = _replay_one(outcome, stored, name, weights[name], read, FORMATS.get(precision), room)
        formats |= {kind} if kind else set()
        advance(1)
    unmapped = [
        name
        for name in stored.names()
        if name not in weights and format_of(stored.read(name).dtype) and stored.read(name).size > 1
    ]
    return outcome.as_dict(unmapped), formats


class _LastRead:
    """Reads live weights, remembering the last: fused tensors are cut into several in a row."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._name: str | None = None
        self._value: NDArray[Any] | None = None
        self.touched: dict[str, bool] = {}

    def wide(self, name: str) -> NDArray[np.float64]:
        """In fp64, for an expression that computes."""
        return self(name).astype(np.float64)

    def __call__(self, name: str) -> NDArray[Any]:
        if self._value is None or self._name != name:
            self._value = None  # freed before the next is made: one tensor in memory
            self._value, self.touched[name] = self._live(name)
            self._name = name
        return self._value


def _by_first_read(weights: dict[str, Expression]) -> list[str]:
    return sorted(weights, key=lambda name: (next(weights[name].names()), name))


def _replay_one(
    outcome: Outcome,
    stored: StoredTensors,
    name: str,
    expression: Expression,
    read: _LastRead,
    promised: FloatFormat | None,
    room: Callable[[str], float],
) -> str | None:
    outcome.tensors += 1
    if name not in stored:
        _fail(outcome, name, expression, "missing from the artifact")
        return None
    artifact = stored.read(name)
    kind = format_of(artifact.dtype)
    if kind is None or (promised is not None and kind.bits < promised.bits):
        promised_type = promised.name if promised else "a float of 16 or 32 bits"
        _fail(outcome, name, expression, f"stored as {artifact.dtype}, expected {promised_type}")
        return None
    computes = expression.computes
    expected = expression.evaluate(read.wide if computes else read)
    if expected.shape != artifact.shape:
        _fail(outcome, name, expression, f"shape {artifact.shape}, expected {expected.shape}")
        return kind.name
    touched = any(read.touched[source] for source in expression.names())
    outcome.elements += artifact.size
    outcome.changed += touched
    exact = not touched and not computes
    allowed = sum(room(source) for source in set(expression.names()))
    outcome.room = max(outcome.room, allowed)
    ulps, wrong = _measure(artifact, expected, kind, exact, allowed)
    if ulps > outcome.worst[0]:
        outcome.worst = (ulps, name)
    if wrong:
        what = "differ from the base" if exact else "are further off than one rounding"
        _fail(outcome, name, expression, f"{wrong} of {artifact.size} values {what}", ulps)
    return kind.name


def _fail(
    outcome: Outcome, name: str, expression: Expression, why: str, ulps: float | None = None
) -> None:
    sites = sorted({source.rpartition(".")[0] for source in expression.names()})
    outcome.failures.append(
        {
            "tensor": name,
            "sites": sites,
            "why": why,
            "ulps": None if ulps is None else rounded(ulps, ULP_DIGITS),
        }
    )


def _measure(
    artifact: NDArray[Any], expected: NDArray[Any], kind: FloatFormat, exact: bool, allowed: float
) -> tuple[float, int]:
    """The largest error in ulps and the number of values that are wrong, NaN and Inf included."""
    # two reductions, where abs() would copy the whole tensor
    noise = NOISE_OF_LARGEST * float(max(expected.max(initial=0.0), -expected.min(initial=0.0)))
    noise += allowed
    room = 1 + NOISE_OF_VALUE * 2.0**kind.bits
    worst, wrong = 0.0, 0
    for stored, exact_values in _blocks(artifact, expected):
        error = stored.astype(np.float64)
        error -= exact_values
        np.abs(error, out=error)
        half = kind.half_ulp(exact_values)
        if exact:
            # to fp32 first is exact here: an untouched base has at most fp32's precision
            bad = stored != exact_values.astype(np.float32).astype(kind.dtype)
        else:
            bad = ~(error <= half * room + noise)  # negated, so that NaN is bad
        wrong += int(np.count_nonzero(bad))
        error /= half
        worst = max(
            worst, float(np.nan_to_num(error, nan=np.inf, posinf=np.inf).max(initial=0.0)) / 2
        )
    return worst, wrong


def _blocks(artifact: NDArray[Any], expected: NDArray[Any]) -> Iterator[tuple[Any, Float64]]:
    """Matching flat pieces of both. `expected` may be a view in any layout."""
    if artifact.ndim == 0:
        yield artifact.reshape(1), np.ascontiguousarray(expected.reshape(1), np.float64)
        return
    rows = max(1, BLOCK // max(1, int(np.prod(artifact.shape[1:], dtype=np.int64))))
    for start in range(0, artifact.shape[0], rows):
        piece = np.ascontiguousarray(expected[start : start + rows], np.float64)
        yield artifact[start : start + rows].reshape(-1), piece.reshape(-1)


def coarsest(formats: set[str]) -> str:
    """The format that decides which logit tolerance holds, of those that an artifact stores."""
    for name in ("bf16", "fp16", "fp32"):
        if name in formats:
            return name
    raise ParityError("artifact", "no float tensor to replay", "at least one weight")
