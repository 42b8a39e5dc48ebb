"""What a session loads is what the manifest lists: everything else is refused by its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adaptrix_export.errors import SourceError
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from adaptrix_export.runtime import Session
from adaptrix_export.runtime.layout import located
from tests.trust.fixtures import make_inputs

OFF = {"parity": {"level": "off"}}
IDS = np.arange(5, 25)[None]
WEIGHTS = {"hub": "onnx/model.onnx_data", "flat": "model.onnx.data"}


@pytest.fixture(scope="module", params=sorted(WEIGHTS))
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def built(layout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    inputs = make_inputs(folder / "inputs")
    document = {"base": str(inputs.base), "adapters": [str(inputs.adapter)], "target": "onnx",
                "frontend": "native", "out": str(folder / "out"),
                "layout": layout, **OFF}  # fmt: skip
    build(Recipe.model_validate(document))
    return folder / "out"


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


def test_twelve_of_twelve_altered_weight_files_are_refused_by_name(copy, layout):
    path = copy / WEIGHTS[layout]
    whole = path.read_bytes()
    for n in range(12):
        flip(path, (len(whole) - 1) * n // 11)
        with pytest.raises(SourceError, match=rf"{path.name}: sha256 .* as in the manifest.*check"):
            Session(copy, threads=1)
        path.write_bytes(whole)
    assert np.isfinite(Session(copy, threads=1).logits(IDS)).all()


def test_every_file_that_is_read_is_checked(copy):
    for name in ("config.json", "genai_config.json", "generation_config.json"):
        path = copy / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"\n", b" \n", 1))
        with pytest.raises(SourceError, match=rf"{name}: sha256"):
            Session(copy, threads=1)
        path.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = copy / name
        whole = path.read_bytes()
        path.write_bytes(whole + b"\n")
        with pytest.raises(SourceError, match=rf"{name}: sha256"):
            Session(copy, threads=1).generate("x", 1, chat=True)
        path.write_bytes(whole)
        assert len(Session(copy, threads=1).generate_ids([5], 2)) <= 2  # no text, no tokenizer


@pytest.mark.parametrize("damage", ["graph", "cut", "gone", "link", "fifo", "added"])
def test_other_damages_are_named_before_the_graph_is_used(copy, layout, damage):
    weights, graph = copy / WEIGHTS[layout], located(copy, "model.onnx")
    said = weights.name
    if damage == "graph":
        flip(graph, 200)
        said = "model.onnx: sha256"
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "added":
        (copy / "chat_template.jinja").write_text("{{ messages }}")
        said = "chat_template.jinja: sha256 .*no such file as in the manifest"
    else:
        weights.unlink()
        if damage == "link":
            weights.symlink_to("/dev/zero")
        elif damage == "fifo":
            os.mkfifo(weights)
    with pytest.raises(SourceError, match=said):
        Session(copy, threads=1).generate("x", 1, chat=True)


def test_without_the_check_an_altered_file_is_served(copy, layout):
    before = Session(copy, threads=1).logits(IDS)
    path = copy / WEIGHTS[layout]
    content = np.frombuffer(path.read_bytes(), np.float32).copy()
    content[: len(content) // 2] *= 1.5
    path.write_bytes(content.tobytes())
    after = Session(copy, threads=1, check=False).logits(IDS)
    assert np.abs(after - before).max() > 1e-3


def test_an_edited_manifest_is_refused(copy, layout):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    flip(copy / WEIGHTS[layout], 100)
    manifest["outputs"][WEIGHTS[layout]]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    with pytest.raises(SourceError, match="not what its checksum says"):
        Session(copy)
    for text in ("[]", "{", "[" * 100_000, '{"outputs": []}', '{"outputs": {"a": 1}}'):
        path.write_text(text)
        with pytest.raises(SourceError, match=r"manifest.json: "):
            Session(copy)


SERVE = """
import sys
from adaptrix_export.runtime import Session
print(len(Session(sys.argv[1], threads=1).generate("hello", 3)))
from adaptrix_export import errors
ours = {n for n in sys.modules if n.startswith("adaptrix_export.") and "runtime" not in n}
assert ours == {"adaptrix_export.errors"}, ours
assert not {"torch", "transformers", "onnx", "safetensors"} & set(sys.modules)
"""


def test_checking_takes_nothing_of_the_compiler(built):
    command = [sys.executable, "-c", SERVE, str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
