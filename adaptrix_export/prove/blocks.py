"""Quantized weights read back from an artifact, by none of the code that wrote them.

Three questions for each: are the bytes those that the quantizer chose (by hash); where every weight
was rounded by itself, is each code the nearest one to the live weight, in float64; and does every
row still point where the live row does, which a row with its nibbles swapped does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.graph.expression import Expression, expression_of
from adaptrix_export.oracle.compare import rounded
from adaptrix_export.targets.stored import StoredTensors

NEAREST = 0.5 + 1e-4  # of a step: the quotient was taken in float32
LEAST_COSINE = 0.8  # of a row with the live one; 4 bits leave .98 and more
SUM_ROUNDING = 2.0**-22  # of the largest value: a code's value and its shift are added in float32
LISTED = 10
Live = Callable[[str], tuple[NDArray[np.float64], bool]]


@dataclass(frozen=True)
class Read:
    """A quantized weight as it lies in the artifact: codes (n, k), scales and zeros (n, blocks)."""

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None
    bits: int
    block: int
    shifts: NDArray[np.float32] | None = None  # (n, blocks), added to all values of a block

    def values(self) -> NDArray[np.float32]:
        columns = self.codes.shape[1]
        values: NDArray[np.float32] = self.codes.astype(np.float32)
        values -= self.zero_points(columns)
        values *= np.repeat(self.scales.astype(np.float32), self.block, axis=1)[:, :columns]
        if self.shifts is not None:
            values += np.repeat(self.shifts, self.block, axis=1)[:, :columns]
        return values

    def zero_points(self, columns: int) -> Any:
        if self.zeros is None:
            return np.float32(2 ** (self.bits - 1))
        return np.repeat(self.zeros.astype(np.float32), self.block, axis=1)[:, :columns]

    def sha256(self) -> str:
        digest = hashlib.sha256(f"{self.bits} {self.block} {self.codes.shape}".encode())
        scales = self.scales.astype(np.float16)
        for part in (self.codes, scales, self.zeros, self.shifts):
            digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def read_blocks(stored: StoredTensors, name: str, entry: Mapping[str, Any]) -> Read | str:
    """The weight that stands for initializer `name`, or what is wrong with its parts."""
    rows, columns = entry["shape"]
    bits, block = entry["bits"], entry["block"]
    count = -(-columns // block)
    codes, table = f"{name}.codes", f"{name}.codes.rows"
    tables = [n for n in (codes, table) if n in stored]
    if not tables or f"{name}.scales" not in stored:
        return "missing from the artifact"
    packed = stored.read(tables[0])
    if len(tables) == 2 and not np.array_equal(packed.reshape(-1), stored.read(table).reshape(-1)):
        return "the codes that are looked up are not those that are multiplied with"
    size = count * block * bits // 8 if tables[0] == codes else columns * bits // 8
    scales = np.array(stored.read(f"{name}.scales"))
    if packed.dtype != np.uint8 or packed.size != rows * size or scales.shape != (rows, count):
        return f"codes {packed.shape} {packed.dtype}, scales {scales.shape}"
    zeros = None
    if not entry["symmetric"]:
        if f"{name}.zeros" not in stored:
            return "no zero points"
        zeros = _codes(stored.read(f"{name}.zeros").reshape(rows, -1), bits)[:, :count]
    shifts = None
    if entry.get("shifted"):
        shifts = np.array(stored.read(f"{name}.shifts")).T if f"{name}.shifts" in stored else None
        if shifts is None or shifts.shape != (rows, count) or shifts.dtype != np.float32:
            return "no shifts of its blocks"
    plain = _codes(packed.reshape(rows, size), bits)[:, :columns]
    return Read(plain, scales, zeros, bits, block, shifts)


def _codes(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """One code a column; of two in a byte the low one is the first."""
    plain = np.array(packed, np.uint8)
    if bits == 8:
        return plain
    codes = np.empty((plain.shape[0], 2 * plain.shape[1]), np.uint8)
    codes[:, 0::2] = plain % 16
    codes[:, 1::2] = plain // 16
    return codes


def replay_blocks(
    stored: StoredTensors,
    entries: Mapping[str, Mapping[str, Any]],
    live: Live,
    advance: Callable[[int], None] = lambda amount: None,
) -> dict[str, Any]:
    """Each quantized weight against its live one; see the module. One at a time in memory."""
    failures: list[dict[str, Any]] = []
    least, error, elements = (1.0, ""), (0.0, ""), 0
    for name, entry in sorted(entries.items()):
        read = read_blocks(stored, name, entry)
        advance(1)
        if isinstance(read, str):
            failures.append(_failure(name, entry, read))
            continue
        live_weight = expression_of(entry["expression"], name).evaluate(
            lambda tensor: live(tensor)[0]
        )
        elements += live_weight.size
        cosine, off = _rows(read.values(), live_weight)
        least, error = min(least, (cosine, name)), max(error, (off, name))
        why = _wrong(read, live_weight, entry, cosine)
        if why:
            failures.append(_failure(name, entry, why))
    return {
        "tensors": len(entries),
        "elements": elements,
        "least_cosine": {"tensor": least[1], "cosine": rounded(least[0], 5)},
        "largest_error": {"tensor": error[1], "of_the_weight": rounded(error[0])},
        "failed": len(failures),
        "failures": failures[:LISTED],
        "passed": not failures,
    }


def _wrong(
    read: Read, live_weight: NDArray[np.float64], entry: Mapping[str, Any], cosine: float
) -> str:
    if read.codes.shape != live_weight.shape:
        return f"shape {read.codes.shape}, expected {live_weight.shape}"
    if read.sha256() != entry["sha256"]:
        return "not the codes and scales that were chosen"
    if not cosine >= LEAST_COSINE:
        return f"a row that has a cosine of {cosine:.2f} with the live one"
    if set(entry["methods"]) == {"lossless"}:
        errors = np.abs(read.values() - live_weight)
        count = int((errors > SUM_ROUNDING * np.abs(live_weight).max(initial=0.0)).sum())
        if count:
            return f"{count} values that are not the base's"
    if set(entry["methods"]) == {"rtn"}:
        off = _off_nearest(read, live_weight)
        if off:
            return f"{off} codes that are not the nearest"
    return ""


def _off_nearest(read: Read, live_weight: NDArray[np.float64]) -> int:
    """Codes with a nearer one beside them, those at the ends of the range apart."""
    columns, count = live_weight.shape[1], 0
    top = 2**read.bits - 1
    for start in range(0, len(live_weight), 1024):
        rows = slice(start, start + 1024)
        part = Read(
            read.codes[rows], read.scales[rows],
            None if read.zeros is None else read.zeros[rows], read.bits, read.block,
        )  # fmt: skip
        steps = np.repeat(part.scales.astype(np.float64), read.block, axis=1)[:, :columns]
        exact = np.clip(live_weight[rows] / steps + part.zero_points(columns), 0, top)
        count += int((np.abs(exact - part.codes) > NEAREST).sum())
    return count


def _rows(stored: NDArray[np.float32], live: NDArray[np.float64]) -> tuple[float, float]:
    """The least cosine of a row with its live one, and the error of all as a share of all."""
    inner = np.einsum("ij,ij->i", stored, live, dtype=np.float64)
    sizes = np.linalg.norm(stored, axis=1), np.linalg.norm(live, axis=1)
    rows = sizes[1] > 0  # a row of zeros points nowhere
    cosines = inner[rows] / np.maximum(sizes[0][rows] * sizes[1][rows], 1e-300)
    whole = max(float(np.linalg.norm(live)), 1e-300)
    return float(cosines.min(initial=1.0)), float(np.linalg.norm(stored - live)) / whole


def _failure(name: str, entry: Mapping[str, Any], why: str) -> dict[str, Any]:
    read = expression_of(entry["expression"], name).names()
    sites = sorted({tensor.rpartition(".")[0] for tensor in read})
    return {"tensor": name, "sites": sites, "why": why, "ulps": None}


def values_of(
    stored: StoredTensors, entries: Mapping[str, Mapping[str, Any]]
) -> Iterable[tuple[Expression, NDArray[np.float32]]]:
    """(expression, values) of each quantized weight; those that cannot be read are left out."""
    for name, entry in sorted(entries.items()):
        read = read_blocks(stored, name, entry)
        if not isinstance(read, str):
            yield expression_of(entry["expression"], name), read.values()
