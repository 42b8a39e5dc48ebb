"""Both layouts hold the same graph over the same bytes, where clients look for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adaptrix_export.arch.tasks import FEATURES, GENERATION, SEQ2SEQ
from adaptrix_export.errors import ParityError
from adaptrix_export.graph.rewrite.portable import make_portable
from adaptrix_export.package.browser import browser_config
from adaptrix_export.package.layout import FLAT, HUB, laid_out
from adaptrix_export.package.tokenizer_config import make_tokenizer_portable
from adaptrix_export.runtime.layout import located
from adaptrix_export.save.hashes import hash_file
from adaptrix_export.targets.artifact import Artifact
from adaptrix_export.targets.stored import open_onnx
from tests.artifacts import packaged


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact, _ = packaged("llama", tmp_path_factory.mktemp("layout"))
    return artifact


def copy(artifact: Artifact, folder: Path) -> Artifact:
    shutil.copytree(artifact.folder, folder)
    return Artifact(**{**vars(artifact), "folder": folder})


def logits(folder: Path) -> np.ndarray:
    session = ort.InferenceSession(
        located(folder, "model.onnx"), providers=["CPUExecutionProvider"]
    )
    fed = {"input_ids": np.arange(8, dtype=np.int64)[None]}
    fed["attention_mask"] = np.ones((1, 8), np.int64)
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            _, heads, _, size = value.shape
            fed[value.name] = np.zeros((1, heads, 0, size), np.float32)
    return session.run(["logits"], fed)[0]


def test_hub_is_the_same_model_in_other_places(flat: Artifact, tmp_path: Path) -> None:
    hub = laid_out(copy(flat, tmp_path / "hub"), HUB, GENERATION)
    assert {p.name for p in (hub.folder / "onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    assert not list(hub.folder.glob("*.onnx*"))
    assert np.array_equal(logits(hub.folder), logits(flat.folder))
    assert set(hub.hashes) == {"onnx/model.onnx", "onnx/model.onnx_data"}
    assert all(hash_file(hub.folder / name).sha256 == h for name, h in hub.hashes.items())
    assert hub.hashes["onnx/model.onnx_data"] == flat.hashes["model.onnx.data"]
    told = browser_config(hub.folder)["transformers.js_config"]
    assert told == {"dtype": "fp32", "use_external_data_format": True}


def test_flat_stays_as_it_is(flat: Artifact, tmp_path: Path) -> None:
    same = copy(flat, tmp_path / "flat")
    assert laid_out(same, FLAT, GENERATION) is same
    assert browser_config(same.folder) == {}


def test_a_graph_that_was_only_moved_does_not_load(flat: Artifact, tmp_path: Path) -> None:
    """The check above would notice a location that was not rewritten."""
    hub = copy(flat, tmp_path / "hub")
    (hub.folder / "onnx").mkdir()
    (hub.folder / "model.onnx").rename(hub.folder / "onnx" / "model.onnx")
    (hub.folder / "model.onnx.data").rename(hub.folder / "onnx" / "model.onnx_data")
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        logits(hub.folder)


def test_features_are_one_file(flat: Artifact, tmp_path: Path) -> None:
    hub = laid_out(copy(flat, tmp_path / "one"), HUB, FEATURES)
    assert [p.name for p in (hub.folder / "onnx").iterdir()] == ["model.onnx"]
    assert np.array_equal(logits(hub.folder), logits(flat.folder))
    assert set(hub.hashes) == {"onnx/model.onnx"}
    told = browser_config(hub.folder)["transformers.js_config"]
    assert told["use_external_data_format"] is False


def in_parts(flat: Artifact, folder: Path) -> Artifact:
    """The graph twice, as two parts of a model over one data file."""
    parts = copy(flat, folder)
    graph = folder / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    onnx.save(model, folder / "encoder_model.onnx")
    graph.rename(folder / "decoder_model_merged.onnx")
    names = {"encoder_model.onnx", "decoder_model_merged.onnx"}
    hashes = {name: hash_file(folder / name).sha256 for name in names}
    return replace(parts, hashes={**hashes, "model.onnx.data": flat.hashes["model.onnx.data"]})


def test_every_part_has_a_data_file_of_its_name(flat: Artifact, tmp_path: Path) -> None:
    """As transformers.js asks for; optimum and ONNX Runtime read what the graph names."""
    hub = laid_out(in_parts(flat, tmp_path / "parts"), HUB, SEQ2SEQ)
    files = {path.name for path in (hub.folder / "onnx").iterdir()}
    stems = {"encoder_model", "decoder_model_merged"}
    assert files == {f"{stem}{end}" for stem in stems for end in (".onnx", ".onnx_data")}
    assert all(hash_file(hub.folder / name).sha256 == h for name, h in hub.hashes.items())
    stored, before = open_onnx(hub.folder), open_onnx(flat.folder)
    assert list(stored.names()) == list(before.names())
    assert all(np.array_equal(stored.read(name), before.read(name)) for name in stored.names())
    settings = browser_config(hub.folder)["transformers.js_config"]
    assert settings["use_external_data_format"] is True


def test_a_shared_tensor_that_differs_between_parts_is_noticed(
    flat: Artifact, tmp_path: Path
) -> None:
    """Negative control: the replay reads one of the copies, so both must be the same bytes."""
    hub = laid_out(in_parts(flat, tmp_path / "parts"), HUB, SEQ2SEQ)
    path = hub.folder / "onnx" / "encoder_model.onnx_data"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ParityError, match="another initializer"):
        open_onnx(hub.folder)


def test_sizes_have_the_names_that_clients_fill(flat: Artifact) -> None:
    graph = onnx.load(flat.folder / "model.onnx", load_external_data=False).graph
    for value in graph.input:
        sizes = value.type.tensor_type.shape.dim
        assert sizes[0].dim_param == "batch_size"
    unused = [
        name
        for node in graph.node
        if node.op_type.startswith("Skip")
        for name in node.output[1:]
        if name and not any(name in other.input for other in graph.node)
    ]
    assert unused == []


def test_portable_counts_what_it_changes() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    skip = ir.Value(name="s", shape=ir.Shape(["rows", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    gamma = ir.Value(name="g", shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node(
        "SkipSimplifiedLayerNormalization", [x, skip, gamma], domain="com.microsoft", num_outputs=4
    )
    for number, output in enumerate(node.outputs):
        output.name = f"y{number}"
    last = ir.node("Identity", [node.outputs[3]])
    graph = ir.Graph([x, skip, gamma], [node.outputs[0], last.outputs[0]], nodes=[node, last])
    model = ir.Model(graph, ir_version=10)
    assert make_portable(model) == (1, 2)
    assert [o.name for o in node.outputs] == ["y0", "", "", "y3"]
    assert make_portable(model) == (0, 0)


def test_tokenizer_of_transformers_5_is_read_by_4(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    make_tokenizer_portable(tmp_path, decoder=True)
    assert not path.exists()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    path.write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "pad_token": "<p>"}))
    make_tokenizer_portable(tmp_path, decoder=True)
    assert json.loads(path.read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<p>",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": "{{ x }}",
    }
    before = '{"tokenizer_class": "BertTokenizer", "chat_template": "own"}'
    path.write_text(before)
    make_tokenizer_portable(tmp_path, decoder=False)
    assert path.read_text() == before  # byte for byte where nothing has to change
