"""An ONNX Runtime that is too old for an artifact is named before it is asked to load it."""

from __future__ import annotations

import json

import pytest

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.requirement import check_runtime, minimum_runtime


def artifact(folder, **manifest):
    (folder / "onnx").mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "onnx" / "model.onnx"


def test_one_that_is_too_old_is_named_with_the_one_that_is_needed(tmp_path):
    graph = artifact(tmp_path, onnxruntime={"minimum": "1.20"})
    for new_enough in ("1.20.0", "1.23.2", "2.0.0", "1.20.1+cpu"):
        check_runtime(graph, new_enough)
    for old in ("1.19.2", "1.9.0", "0.99.1"):
        with pytest.raises(SourceError) as caught:
            check_runtime(graph, old)
        assert caught.value.place == f"onnxruntime {old}"
        assert caught.value.found == "this ONNX Runtime is too old"
        assert caught.value.expected.startswith("1.20 or newer")
        assert "onnxruntime>=1.20" in caught.value.remedy


@pytest.mark.parametrize("needs", [None, {}, {"minimum": 3}, {"minimum": "new"}, ["1.99"]])
def test_a_manifest_that_says_nothing_of_it_asks_for_nothing(tmp_path, needs):
    graph = artifact(tmp_path, onnxruntime=needs)
    assert minimum_runtime(graph) is None
    check_runtime(graph, "1.0.0")


def test_a_graph_without_a_manifest_asks_for_nothing(tmp_path):
    graph = tmp_path / "onnx" / "model.onnx"
    assert minimum_runtime(graph) is None
    assert minimum_runtime(artifact(tmp_path, onnxruntime={"minimum": "1.23"})) == "1.23"
    (tmp_path / "manifest.json").unlink()
    assert minimum_runtime(graph) is None


def test_the_manifest_is_in_the_folder_of_the_graph_or_above_it(tmp_path):
    graph = artifact(tmp_path, onnxruntime={"minimum": "1.24"})
    assert minimum_runtime(graph) == minimum_runtime(tmp_path / "model.onnx") == "1.24"
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        minimum_runtime(graph)


def test_a_session_has_a_minimum_of_its_own(tmp_path):
    """Graphs run in 1.18; what a session reads adapters with is younger."""
    graph = artifact(tmp_path, onnxruntime={"minimum": "1.18"})
    assert minimum_runtime(graph) == "1.20"
    check_runtime(graph, "1.20.0")
    with pytest.raises(SourceError, match=r"too old, expected 1\.20 or newer"):
        check_runtime(graph, "1.19.2")
