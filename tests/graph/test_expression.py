"""Expressions over tensors: values, shapes, transposes and their form in a manifest."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adaptrix_export.errors import SourceError
from adaptrix_export.graph.expression import (
    Affine,
    Concat,
    Expression,
    Reshape,
    Slice,
    TensorRef,
    Transpose,
    expression_of,
)

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": -np.arange(8, dtype=np.float32).reshape(2, 4),
    "a_affine.weight": np.ones((3, 4), np.float32),
}
ROWS = np.concatenate([TENSORS["a.weight"], TENSORS["b.weight"]])
A, B = TensorRef("a.weight"), TensorRef("b.weight")
PACKED = Transpose((1, 0), Concat(0, (A, B, Slice(0, 1, 3, A))))
CASES: tuple[tuple[Expression, np.ndarray], ...] = (
    (A, TENSORS["a.weight"]),
    (PACKED, np.concatenate([ROWS, TENSORS["a.weight"][1:3]]).T),
    (Slice(1, 1, 3, Transpose((1, 0), A)), TENSORS["a.weight"].T[:, 1:3]),
    (Reshape((2, 6), A), TENSORS["a.weight"].reshape(2, 6)),
    (Affine(2.0, 1.0, Concat(0, (A, B))), 2 * ROWS + 1),
)


@pytest.mark.parametrize(("expression", "expected"), CASES, ids=lambda x: type(x).__name__)
def test_values_shape_and_transpose_of_an_expression(expression, expected):
    assert np.array_equal(expression.evaluate(TENSORS.__getitem__), expected)
    assert expression.shape(lambda name: TENSORS[name].shape) == expected.shape
    assert np.array_equal(expression.transposed().evaluate(TENSORS.__getitem__), expected.T)
    stacked = [part.evaluate(TENSORS.__getitem__) for part in expression.stacked()]
    assert np.array_equal(np.concatenate(stacked), expected)


@pytest.mark.parametrize(("expression", "expected"), CASES, ids=lambda x: type(x).__name__)
def test_an_expression_survives_json(expression, expected):
    document = json.loads(json.dumps(expression.as_json()))
    assert expression_of(document) == expression
    assert hash(expression_of(document)) == hash(expression)
    assert expression_of(document).as_json() == expression.as_json()


def test_the_form_in_a_manifest():
    assert Affine(2.0, 0.0, PACKED).as_json() == [
        "affine", 2.0, 0.0, ["transpose", [1, 0], ["concat", 0, [
            ["tensor", "a.weight"], ["tensor", "b.weight"],
            ["slice", 0, 1, 3, ["tensor", "a.weight"]],
        ]]],
    ]  # fmt: skip


def test_transposes_move_towards_the_tensors():
    assert PACKED.transposed() == Concat(0, (A, B, Slice(0, 1, 3, A)))
    assert PACKED.transposed().transposed() == Concat(
        1, (Transpose((1, 0), A), Transpose((1, 0), B), Slice(1, 1, 3, Transpose((1, 0), A)))
    )
    assert [part.module for part in PACKED.transposed().stacked()] == ["a", "b", "a"]


def test_only_affine_computes_whatever_a_tensor_is_called():
    assert Transpose((1, 0), Affine(1.0, 1.0, A)).computes
    assert not Transpose((1, 0), TensorRef("a_affine.weight")).computes


def test_rows_of_a_tensor_are_read_alone_where_they_can_be():
    read: list[tuple[str, int, int]] = []

    def rows(name, start, stop):
        read.append((name, start, stop))
        return TENSORS[name][start:stop]

    def whole(name):
        raise AssertionError(f"{name} was read whole")

    Slice(1, 0, 2, Slice(0, 1, 3, A)).evaluate(whole, rows)
    assert read == [("a.weight", 1, 3)]


@pytest.mark.parametrize(
    "document", [[], ["turn", 1], ["slice", 0, ["tensor", "a"]], 7, ["concat", 0, 3]]
)
def test_what_is_no_expression_is_refused_by_its_place(document):
    with pytest.raises(SourceError, match=r"manifest\.json"):
        expression_of(document, "manifest.json: weights")
