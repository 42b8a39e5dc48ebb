"""Generation on ONNX Runtime alone, against transformers on the same weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from adaptrix_export.errors import SourceError
from adaptrix_export.runtime.session import Session
from tests.artifacts import packaged
from tests.tiny import live

PROMPT = "the quick brown fox héllo 東京"


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def made(request, tmp_path_factory):
    """An artifact's session, and the PyTorch + PEFT model that it must equal."""
    folder = tmp_path_factory.mktemp(request.param)
    artifact, _ = packaged(request.param, folder)
    return Session(artifact.folder), live(folder / "base", folder / "adapter")


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the artifact to damage."""
    return shutil.copytree(made[0].folder, tmp_path / "copy")


def test_greedy_ids_equal_transformers(made):
    session, model = made
    ids = session.tokenizer.encode(PROMPT)
    options = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None, "pad_token_id": 2}
    with torch.no_grad():
        expected = model.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    assert session.generate_ids(ids, 64, stop_at_eos=False) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_give_each_row_its_own_logits(made, side):
    session, model = made
    rows = [list(range(5, 5 + n)) for n in (3, 11, 7)]
    ids, mask = np.zeros((2, 3, 11), dtype=np.int64)
    for i, row in enumerate(rows):
        place = slice(11 - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    logits = session.logits(ids, mask)
    assert logits.shape == (3, 11, 300) and logits.dtype == np.float32
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(logits[i][mask[i] == 1], expected, atol=1e-4)


def test_generation_stops_at_an_end_token_and_says_nothing_for_it(made):
    session, _ = made
    ids = session.tokenizer.encode(PROMPT)
    free = session.generate_ids(ids, 20, stop_at_eos=False)
    (session.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": free[4]}))
    stopped = Session(session.folder)
    first = free.index(free[4])
    assert stopped.generate_ids(ids, 20) == free[: first + 1]
    assert stopped.generate_ids(ids, 20, stop_at_eos=False) == free


def test_streamed_pieces_join_to_the_decoded_answer(made):
    session, _ = made
    ids = session.tokenizer.encode(PROMPT)
    answer = session.generate_ids(ids, 24)
    whole = session.tokenizer.decode([*ids, *answer])
    assert PROMPT + session.generate(PROMPT, 24) == whole


def test_chat_renders_the_template_as_transformers_does(made):
    session, _ = made
    theirs = AutoTokenizer.from_pretrained(session.folder).apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert session.tokenizer.encode_chat("hi") == theirs
    assert theirs[0] == 0 and session.tokenizer.decode(theirs) == "[user] hi\n[assistant] "
    assert isinstance(session.generate("hi", 3, chat=True), str)


def test_the_context_ends_generation_and_refuses_longer_prompts(made):
    session, _ = made
    assert session.context_length == 256
    assert len(session.generate_ids([5] * 250, 20, stop_at_eos=False)) == 6
    with pytest.raises(SourceError, match="257 tokens, expected at most 256"):
        session.generate_ids([5] * 257, 1)
    with pytest.raises(SourceError, match="no tokens"):
        session.generate_ids([], 1)
    with pytest.raises(SourceError, match="prompt: empty"):
        session.stream("")
    with pytest.raises(SourceError, match="prompt: 300 tokens"):
        session.stream("东" * 100)
    assert session.generate_ids([5], 0) == []


def test_a_missing_tokenizer_matters_for_text_only(folder):
    (folder / "tokenizer.json").unlink()
    session = Session(folder)
    assert len(session.generate_ids([5], 2, stop_at_eos=False)) == 2
    with pytest.raises(SourceError, match=r"no tokenizer.json"):
        session.stream("x")


def test_a_missing_template_matters_for_chat_only(folder):
    (folder / "tokenizer_config.json").unlink()
    assert isinstance(Session(folder).generate("x", 2), str)
    with pytest.raises(SourceError, match="no chat template"):
        Session(folder).stream("x", chat=True)


def test_folders_that_are_no_artifact_are_refused(folder, tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        Session(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"no model.onnx"):
        Session(tmp_path)
    (folder / "model.onnx").write_bytes(b"junk")
    with pytest.raises(SourceError, match="cannot be loaded"):
        Session(folder)


def test_a_graph_that_is_no_language_model_is_refused(tmp_path):
    import onnx_ir as ir

    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g")
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(SourceError, match="takes x and gives y, expected input_ids"):
        Session(tmp_path)


RUN = """
import sys
from adaptrix_export.runtime.session import Session
print(Session(sys.argv[1]).generate("the fox", 3, chat=True) is not None)
heavy = {"torch", "transformers", "peft", "mobius", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""


ALONE = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as if it were not installed
from adaptrix_export.cli import main
main(sys.argv[2:])
"""


def without_extras(*arguments):
    """The command line where only the packages of the runtime are installed."""
    from pathlib import Path

    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    built = tomllib.loads(text)["project"]["optional-dependencies"]["build"]
    names = {re.split("[>=<]", name)[0].lower().replace("-", "_") for name in built}
    # what ONNX Runtime and tokenizers themselves bring along
    names -= {"flatbuffers", "filelock", "huggingface_hub"}
    names |= {"mobius", "yaml"} - {"mobius_onnx", "pyyaml"}
    command = [sys.executable, "-c", ALONE, ",".join(sorted(names)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_runtime_extra_is_enough_to_run_and_says_what_building_takes(made):
    done = without_extras(
        "run", str(made[0].folder), "--prompt", "the fox", "--max-new-tokens", "3"
    )
    assert done.returncode == 0, done.stderr
    asked = ["build", "--base", "x", "--adapter", "y", "--target", "onnx", "--out", "z"]
    done = without_extras(*asked)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "no package" in done.stderr and "pip install 'adaptrix-export[cpu]'" in done.stderr


def test_running_imports_neither_torch_nor_transformers(made):
    command = [sys.executable, "-c", RUN, str(made[0].folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
