"""`compose` in a recipe and on the command line: short and long forms, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from adaptrix_export import pipeline
from adaptrix_export.cli import main
from adaptrix_export.errors import RecipeError
from adaptrix_export.passes.compose.choose import Auto
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.passes.context import PassContext
from adaptrix_export.passes.from_recipe import MeasureConflicts, passes_of
from adaptrix_export.plan.composition import Weight
from adaptrix_export.plan.methods import METHODS
from adaptrix_export.progress import Silent
from adaptrix_export.recipe import ComposeSpec, Recipe, load_recipe, make_recipe, recipe_schema

BASE = {"base": "b", "adapters": ["x/one", "x/two"], "target": "onnx", "out": "o"}
CONTEXT = PassContext(Path("unused"), Silent())


def passes(**compose):
    return composing(make_recipe({**BASE, **compose}))


def composing(recipe):
    """The passes of a recipe after the one that measures conflicts; no plan is looked at."""
    measure, *steps = passes_of(recipe, None, CONTEXT)
    assert measure == MeasureConflicts(CONTEXT)
    return tuple(steps)


def test_the_default_and_the_short_form():
    assert passes() == (Compose(),)
    assert passes(compose="ties") == (Compose("ties"),)
    assert passes(compose="auto") == (Auto(),)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 0.5], (("two", Weight(0.5)),)),
        ({"one": 0.5}, (("one", Weight(0.5)),)),
        ({"one": {3: 0.5, 1: 0}}, (("one", Weight(1.0, ((1, 0.0), (3, 0.5)))),)),
        ({"one": {"3": "0.5"}}, (("one", Weight(1.0, ((3, 0.5),))),)),
    ],
)
def test_weights(weights, expected):
    (compose,) = passes(compose={"method": "ties", "weights": weights})
    assert compose.weights == expected


def test_a_recipe_file_and_settings_over_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "base: b\nadapters: [one, two]\ntarget: onnx\nout: o\n"
        "compose:\n  method: dare_ties\n  weights: {one: {3: 0.5}}\n  density: 0.3\n  seed: 7\n"
    )
    recipe = load_recipe(path, ["compose.weights.two=0.25", "compose.election=frequency"])
    (compose,) = composing(recipe)
    assert repr(compose) == (
        "Compose(method='dare_ties', weights={one: {3: 0.5, else 1.0}, two: 0.25}, density=0.3, "
        "election='frequency', seed=7)"
    )
    short = make_recipe({**BASE, "compose": "svd"}, overrides=["compose.rank=4"])
    assert composing(short) == (Compose("svd", rank=4),)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("compose", "match"),
    [
        ("tie", "compose.method: 'tie', expected one of cat.*did you mean 'ties'"),
        ({"method": "ties", "weights": [1]}, "1 weights, expected 2, one for each"),
        ({"method": "ties", "weights": {"three": 1}}, "'three', expected one of one, two"),
        (
            {"method": "ties", "weights": {"one": float("nan")}},
            "compose.weights: nan, expected a finite",
        ),
        ({"method": "ties", "weights": ["x", 1]}, "compose.weights: 'x', expected a finite"),
        ({"method": "ties", "weights": 3}, "compose.weights: 3, expected a list of numbers"),
        ({"method": "linear", "density": 0.5}, "compose.density: given with method linear"),
        ({"method": "ties", "density": 0}, "compose.density"),
        ({"method": "ties", "calibration": {"one": "t"}}, "expected method auto"),
        ({"method": "auto", "weights": [1, 1]}, "given with method auto"),
        ({"method": "auto", "calibration": {"three": "t"}}, "'three', expected one of one, two"),
        ({"methods": "ties"}, "unknown key"),
    ],
)
def test_refused(compose, match):
    with pytest.raises(RecipeError, match=match):
        make_recipe({**BASE, "compose": compose})


def test_every_field_and_method_is_described():
    assert all(field.description for field in ComposeSpec.model_fields.values())
    schema = recipe_schema()
    assert schema["properties"]["compose"]["anyOf"][0] == {"type": "string"}
    described = json.dumps(schema)
    assert all(method in described for method in METHODS)


def test_flags(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        pipeline, "build", lambda recipe, telling: seen.update(recipe=recipe) or 1 / 0
    )
    flags = ["--base", "b", "--adapter", "x/one", "--adapter", "x/two", "--target", "onnx"]
    flags += ["--out", "o", "--compose", "ties", "--weight", "one=0.7", "--weight", "two=-1"]
    CliRunner().invoke(main, ["build", *flags])
    (compose,) = composing(seen["recipe"])
    assert compose == Compose("ties", (("one", Weight(0.7)), ("two", Weight(-1.0))))
    for wrong, match in (("one", "NAME=W"), ("one=x", "W a number"), ("no=1", "one of one")):
        result = CliRunner().invoke(main, ["build", *flags, "--weight", wrong])
        assert result.exit_code == 2 and match in result.output, result.output
