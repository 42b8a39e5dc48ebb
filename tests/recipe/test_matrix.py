"""`matrix:`: the product of its values, names of their folders, and what is refused."""

from __future__ import annotations

import json

import pytest

from adaptrix_export.errors import RecipeError
from adaptrix_export.recipe.matrix import cells
from adaptrix_export.recipe.recipe import make_recipe, recipe_schema

PLAIN = {"base": "./base", "adapter": "./sql", "target": "onnx", "out": "build/"}


def labels(document, **options):
    return [cell.label for cell in cells(document, **options)]


def test_without_a_matrix_a_recipe_is_one_build():
    (cell,) = cells(PLAIN)
    assert cell.label == "" and cell.recipe == make_recipe(PLAIN)


def test_every_combination_is_a_build_of_its_own():
    matrix = {
        "adapter": ["./loras/sql", {"source": "hf:org/poems@main", "name": "verse"}],
        "layers": [3, [7, 15]],
        "parity.level": ["off"],
    }
    found = cells({**PLAIN, "matrix": matrix})
    assert [cell.label for cell in found] == [
        "adapter-sql_layers-3_level-off",
        "adapter-sql_layers-7-15_level-off",
        "adapter-verse_layers-3_level-off",
        "adapter-verse_layers-7-15_level-off",
    ]
    last = found[-1].recipe
    assert str(last.out) == "build/adapter-verse_layers-7-15_level-off"
    assert [a.name for a in last.adapters] == ["verse"]
    assert last.redistribute.layers == (7, 15) and last.parity.level == "off"
    written_out = make_recipe({
        **PLAIN, "adapter": {"source": "hf:org/poems@main", "name": "verse"},
        "redistribute": {"layers": [7, 15]}, "parity": {"level": "off"},
        "out": "build/adapter-verse_layers-7-15_level-off",
    })  # fmt: skip
    assert last == written_out


def test_settings_hold_for_every_build():
    found = cells({**PLAIN, "matrix": {"target": ["onnx", "safetensors"]}}, "r", ["out=other"])
    assert [str(c.recipe.out) for c in found] == ["other/target-onnx", "other/target-safetensors"]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ({}, "matrix"),
        ([1], "matrix"),
        ({"target": "onnx"}, "a list of values"),
        ({"target": []}, "a list of values"),
        ({"out": ["a", "b"]}, "for all builds"),
        ({"target": ["onnx", "tflite"]}, "target-tflite"),
        ({"precison": ["fp32"]}, "precison"),
        ({"adapter": ["./a/lora", "./b/lora"]}, "two builds named adapter-lora"),
        ({"parity.decode_steps": list(range(1, 200)), "tau": [0.1] * 100}, "at most 10,000"),
    ],
)
def test_what_makes_no_builds_is_refused(matrix, message):
    with pytest.raises(RecipeError, match=message):
        cells({**PLAIN, "matrix": matrix})


def test_build_takes_no_matrix():
    with pytest.raises(RecipeError, match="adaptrix-export batch"):
        make_recipe({**PLAIN, "matrix": {"target": ["onnx"]}})


def test_the_schema_knows_it():
    schema = recipe_schema()
    assert schema["properties"]["matrix"]["type"] == "object"
    assert {"required": ["adapter"]} in schema["oneOf"]
    json.dumps(schema)
