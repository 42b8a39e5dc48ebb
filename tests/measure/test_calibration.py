"""The text of a calibration: from where, how much of it, and what is only measured on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adaptrix_export.errors import RecipeError
from adaptrix_export.load import open_base
from adaptrix_export.measure.calibration import Calibration, calibration_rows
from tests.artifacts import save_base_with_tokenizer
from tests.tiny import save_base

WORDS = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    return open_base(str(save_base_with_tokenizer("llama", folder / "base")))


def written(rows, length, seed):
    return np.random.default_rng(seed).integers(0, 300, (rows, length))


def rows_of(base, text, tokens=512, length=32, seed=0, vocabulary=300, room=None, more=0):
    calibration = Calibration(str(text), tokens, length, seed)
    return calibration_rows(calibration, base, vocabulary, room, written, more)


def as_set(rows):
    return {tuple(row) for row in rows.tolist()}


def test_a_text_file_is_divided_and_no_row_is_in_both_parts(base, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"{i} {WORDS}" for i in range(300)))
    found = rows_of(base, path)
    assert found.fit.shape == (16, 32) and found.held_out.shape == (4, 32)
    assert not as_set(found.fit) & as_set(found.held_out)
    assert found.source == "mine.txt" and not found.notes
    again, other = rows_of(base, path), rows_of(base, path, seed=1)
    assert np.array_equal(found.fit, again.fit) and not np.array_equal(found.fit, other.fit)


def test_a_jsonl_file_is_the_text_of_its_lines(base, tmp_path):
    lines = [f"{i} {WORDS}" for i in range(200)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"text": line, "id": 1}) for line in lines) + "\n\n")
    found = rows_of(base, path, tokens=10**6)
    plain = tmp_path / "mine.txt"
    plain.write_text("".join(lines))
    as_text = rows_of(base, plain, tokens=10**6)
    ends = (found.fit == 1).sum() + (found.held_out == 1).sum()  # an end token after each line
    assert 190 < ends <= 200 and abs(found.fit.size - as_text.fit.size) < 400
    assert "calibration tokens of" in found.notes[0]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"text": "a"}\n{"words": "b"}', "line 2"),
        ("no json", "line 1"),
        ('{"text": 3}', "a string"),
        ('["text"]', "line 1"),
    ],
)
def test_a_line_without_a_text_is_refused_by_its_number(base, tmp_path, content, match):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(RecipeError, match=match):
        rows_of(base, path)


def test_a_file_that_is_missing_or_no_text_is_refused(base, tmp_path):
    with pytest.raises(RecipeError, match="UTF-8"):
        rows_of(base, tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        rows_of(base, tmp_path / "bytes.txt")


def test_pydoc_measures_on_topics_that_it_does_not_fit_on(base):
    found = rows_of(base, "pydoc", tokens=4096)
    assert found.fit.shape == (128, 32) and found.held_out.shape == (32, 32)
    assert not as_set(found.fit) & as_set(found.held_out)


@pytest.mark.parametrize("source", ["pydoc", "self", "mine.txt"])
def test_more_rows_change_nothing_of_the_others(base, tmp_path, source):
    """What a training reads beside the rows of the fit: as many as there are."""
    if source == "mine.txt":
        (tmp_path / source).write_text(" ".join(f"{i} {WORDS}" for i in range(300)))
        source = tmp_path / source
    plain, found = rows_of(base, source), rows_of(base, source, more=2048)
    assert plain.more.size == 0 and plain.tokens == 512
    assert found.more.shape == (48, 32) and found.tokens == 2048
    assert np.array_equal(plain.fit, found.fit) or source == "self"
    parts = [as_set(rows) for rows in (found.fit, found.held_out, found.more)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    if source != "self":
        assert np.array_equal(plain.held_out, found.held_out)
        assert len(rows_of(base, source, more=10**9).more) > 48


def test_self_is_what_the_model_writes(base):
    found = rows_of(base, "self")
    assert np.array_equal(np.concatenate([found.fit, found.held_out]), written(20, 32, 0))
    assert found.source == "text that the adapted model wrote"


def test_auto_is_self_where_the_model_writes_and_else_pydoc(tmp_path):
    assert Calibration().source("text-generation") == "self"
    assert Calibration().source("feature-extraction") == "pydoc"
    bert = open_base(str(save_base_with_tokenizer("bert", tmp_path / "base")))
    with pytest.raises(RecipeError, match="its own"):
        rows_of(bert, "self")


def test_rows_are_no_longer_than_the_model_allows(base):
    assert rows_of(base, "pydoc", room=16).fit.shape == (32, 16)


def test_a_tokenizer_of_another_model_is_refused(base):
    with pytest.raises(RecipeError, match="tokenizer"):
        rows_of(base, "pydoc", vocabulary=100)


def test_a_base_without_a_tokenizer_is_refused(tmp_path):
    bare = open_base(str(save_base("llama", tmp_path / "base")))
    with pytest.raises(RecipeError, match="tokenizer"):
        rows_of(bare, "pydoc")
