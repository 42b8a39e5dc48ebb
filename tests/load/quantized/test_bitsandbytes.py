"""bitsandbytes' formats: its own files to its own values, bit for bit; damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.load.files.tensors import read_safetensors
from adaptrix_export.load.quantized import bitsandbytes as stored_form
from adaptrix_export.load.quantized import four_bit
from adaptrix_export.load.quantized.bitsandbytes import read_bitsandbytes
from adaptrix_export.load.quantized.simulated import SimulatedTensor

# Made by bitsandbytes 0.50.2 on a CPU: what it stored, and what it read back.
DATA = Path(__file__).parents[2] / "data" / "bitsandbytes.safetensors"
STORED = {t.name: t for t in read_safetensors(DATA).tensors}
CASES = sorted(n.removesuffix(".expected") for n in STORED if n.endswith(".expected"))
FOUR_BIT = [case for case in CASES if case.startswith(("nf4", "fp4"))]


def parts(case):
    kept = (".original", ".expected")
    return {n: t for n, t in STORED.items() if n.startswith(case + ".") and not n.endswith(kept)}


def wide(array):
    return np.asarray(array).astype(np.float32)


@pytest.mark.parametrize("case", FOUR_BIT)
def test_what_bitsandbytes_stored_reads_as_it_reads_it(case):
    tensor = read_bitsandbytes("base", parts(case), "F16")[f"{case}.weight"]
    expected = STORED[f"{case}.expected"]
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(wide(tensor.read()), wide(expected.read()))
    for start, stop in ((0, 1), (1, 4), (tensor.shape[0] - 2, tensor.shape[0])):
        assert np.array_equal(wide(tensor.rows(start, stop)), wide(expected.rows(start, stop)))


@pytest.mark.parametrize("fault", ["nibbles swapped", "offset ignored", "one rounding more"])
def test_negative_controls(monkeypatch, fault):
    """What a wrong reading looks like: the same comparison fails."""
    if fault == "nibbles swapped":
        right = stored_form.unpack
        swapped = lambda packed, *at: right((packed << 4) | (packed >> 4), *at)  # noqa: E731
        monkeypatch.setattr(stored_form, "unpack", swapped)
    elif fault == "offset ignored":
        right_facts = stored_form._nested_facts
        monkeypatch.setattr(stored_form, "_nested_facts", lambda *a: (right_facts(*a)[0], 0.0))
    else:
        right_scaled = stored_form.scaled_levels
        monkeypatch.setattr(
            stored_form,
            "scaled_levels",
            lambda *a: right_scaled(*a).astype(np.float16).astype(np.float32),
        )
    case = "nf4.float32.double.21x77"
    tensor = read_bitsandbytes("base", parts(case), "F16")[f"{case}.weight"]
    expected = STORED[f"{case}.expected"].read()
    assert not np.array_equal(wide(tensor.read()), wide(expected))


def test_int8_reads_as_bitsandbytes_reads_it():
    tensor = read_bitsandbytes("base", parts("int8"), "F32")["int8.weight"]
    assert np.array_equal(tensor.read(), STORED["int8.expected"].read())
    half = read_bitsandbytes("base", parts("int8"), "BF16")["int8.weight"]
    assert half.dtype == "BF16"
    expected = torch.from_numpy(STORED["int8.expected"].read()).bfloat16().float().numpy()
    assert np.array_equal(wide(half.rows(2, 9)), expected[2:9])


@pytest.mark.parametrize("case", [c for c in FOUR_BIT if ".single." in c and c[:3] == "nf4"])
def test_simulated_nf4_is_what_bitsandbytes_stores(case):
    tensor = SimulatedTensor(STORED[f"{case}.original"], double=False)
    expected = STORED[f"{case}.expected"]
    assert np.array_equal(wide(tensor.read()), wide(expected.read()))
    assert np.array_equal(wide(tensor.rows(1, 4)), wide(expected.rows(1, 4)))


def test_the_scales_of_double_quantization_are_those_of_bitsandbytes():
    """Its torch backend, which searches the levels as its GPU kernel does."""
    assert np.array_equal(four_bit.dynamic_levels(), STORED["scales.levels"].read())
    found = four_bit.nested_round_trip(STORED["scales.absmax"].read())
    assert np.array_equal(found, STORED["scales.expected"].read())


def test_simulated_double_quantization_in_pieces_is_that_of_the_whole(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file({"w": torch.randn(300, 90)}, tmp_path / "w.safetensors")
    source = read_safetensors(tmp_path / "w.safetensors").tensors[0]
    whole = SimulatedTensor(source, double=True)
    expected = whole.read()
    from adaptrix_export.load.quantized import simulated

    simulated._nested_absmax.cache_clear()
    monkeypatch.setattr(simulated, "_READ", 90 * 64)
    pieces = [
        SimulatedTensor(source, double=True).rows(i, min(300, i + 7)) for i in range(0, 300, 7)
    ]
    assert np.array_equal(np.concatenate(pieces), expected)
    assert not np.array_equal(expected, SimulatedTensor(source, double=False).read())


@given(st.lists(st.integers(0, 15), max_size=70), st.data())
def test_pack_and_unpack_are_inverse_at_odd_sizes_and_places(numbers, data):
    row = np.array(numbers, np.uint8)
    packed = four_bit.pack(row)
    assert len(packed) == -(-len(row) // 2)
    start = data.draw(st.integers(0, len(row)))
    stop = data.draw(st.integers(start, len(row)))
    assert np.array_equal(four_bit.unpack(packed[start // 2 :], start, stop), row[start:stop])


class InMemory:
    name, dtype = "w", "F32"

    def __init__(self, shape):
        self.shape = shape
        self.values = np.random.default_rng(shape).normal(size=shape).astype(np.float32)

    def rows(self, start, stop):
        return self.values[start:stop]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.booleans(), st.data())
def test_rows_of_a_simulated_matrix_are_those_of_the_whole(rows, columns, double, data):
    tensor = SimulatedTensor(InMemory((rows, columns)), double)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert np.array_equal(tensor.rows(start, stop), tensor.read()[start:stop])


STATE = "nf4.bfloat16.double.129x64.weight.quant_state.bitsandbytes__nf4"
DOUBLE = "nf4.bfloat16.double.129x64"


def with_state(path, **changed):
    """The stored parts of one case with facts of its quant state changed (None: taken out)."""
    held = {n: t for n, t in load_file(DATA).items() if n in parts(DOUBLE)}
    facts = json.loads(bytes(held[STATE].tolist()))
    facts = {k: v for k, v in {**facts, **changed}.items() if v is not None}
    held[STATE] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    save_file(held, path)
    return {t.name: t for t in read_safetensors(path).tensors}


BAD_FACTS = {
    "blocksize None": dict(blocksize=None),
    "blocksize 48": dict(blocksize=48),
    "quant_type 'int4'": dict(quant_type="int4"),
    r"shape \[129\]": dict(shape=[129]),
    r"shape \[129, -64\]": dict(shape=[129, -64]),
    "dtype 'float64'": dict(dtype="float64"),
    "nested_blocksize 'x'": dict(nested_blocksize="x"),
    "nested_offset None": dict(nested_offset=None),
    "nested_offset nan": dict(nested_offset=float("nan")),
    "258 values of U8": dict(shape=[130, 64]),
    "4128 bytes": dict(shape=[10, 823]),
}


@pytest.mark.parametrize("found", BAD_FACTS)
def test_a_malformed_quant_state_is_named(tmp_path, found):
    stored = with_state(tmp_path / "x.safetensors", **BAD_FACTS[found])
    with pytest.raises(SourceError, match=rf"base: {DOUBLE}.weight.*: {found}, expected"):
        read_bitsandbytes("base", stored, "F16")


@pytest.mark.parametrize("part", stored_form.PARTS)
def test_a_missing_part_is_named(part):
    stored = {n: t for n, t in parts(DOUBLE).items() if n != f"{DOUBLE}.weight{part}"}
    with pytest.raises(SourceError, match=r"missing, expected|values of U8, expected"):
        read_bitsandbytes("base", stored, "F16")


def test_parts_without_a_state_and_states_that_are_not_json_are_named(tmp_path):
    stored = {n: t for n, t in parts(DOUBLE).items() if n != STATE}
    with pytest.raises(SourceError, match="and no quantized weight that it is of"):
        read_bitsandbytes("base", stored, "F16")
    held = {n: t for n, t in load_file(DATA).items() if n in parts(DOUBLE)}
    held[STATE] = torch.tensor(list(b'{"quant_type": '), dtype=torch.uint8)
    save_file(held, tmp_path / "x.safetensors")
    broken = {t.name: t for t in read_safetensors(tmp_path / "x.safetensors").tensors}
    with pytest.raises(SourceError, match="bitsandbytes__nf4: not JSON"):
        read_bitsandbytes("base", broken, "F16")
    held = {n: t for n, t in load_file(DATA).items() if n in parts(DOUBLE)}
    held[f"{DOUBLE}.weight.quant_map"] = torch.linspace(-1, 1, 16)
    save_file(held, tmp_path / "y.safetensors")
    other = {t.name: t for t in read_safetensors(tmp_path / "y.safetensors").tensors}
    with pytest.raises(UnsupportedError, match="expected those of nf4"):
        read_bitsandbytes("base", other, "F16")
