"""The ES module in node and in headless Chromium: the tokens that our own runtime generates.

Both need packages from npm, which `make clients` installs; without them the tests are skipped, and
`make clients` fails instead (ADAPTRIX_CLIENTS=1).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptrix_export.arch.tasks import GENERATION
from adaptrix_export.package import write_package
from adaptrix_export.package.layout import HUB, laid_out
from adaptrix_export.progress import Silent
from adaptrix_export.runtime import Session
from adaptrix_export.targets.switchable_onnx import lower_switchable_onnx
from tests import npm
from tests.artifacts import plan_of, save_base_with_tokenizer
from tests.switchable import LOUD, save_three

WEB = Path(__file__).parents[2] / "adaptrix_export" / "web"
IDS = [3, 17, 42, 99, 5]
STEPS = 12
SELECTIONS: list[Any] = [None, "all", "attention", {"all": 0.5, "attention": 0.5}, None]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A switchable llama in layout hub, not proved here: the proof has tests of its own."""
    folder = tmp_path_factory.mktemp("web")
    base = save_base_with_tokenizer("llama", folder / "base", **LOUD)
    plan = plan_of(base, *save_three("llama", base, folder).values())
    out = folder / "out"
    out.mkdir()
    made = lower_switchable_onnx(plan, out, Silent(), "native")
    write_package(laid_out(made, HUB, GENERATION), plan)
    return out


@pytest.fixture(scope="module")
def expected(artifact: Path) -> list[list[int]]:
    session = Session(artifact)
    found = []
    for selection in SELECTIONS:
        session.use(selection)
        found.append(session.generate_ids(IDS, STEPS))
    assert len({tuple(tokens) for tokens in found}) == 4  # base, two adapters, a mix: all differ
    return found


def request(artifact: Path, **changed: Any) -> dict[str, Any]:
    return {
        "web": (WEB / "index.js").as_uri(),
        "artifact": str(artifact),
        "adapters": ["all", "attention"],
        "selections": SELECTIONS,
        "refused": ["nobody", {"all": None}],
        "ids": IDS,
        "steps": STEPS,
        **changed,
    }


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_node_generates_the_tokens_of_our_runtime(
    runtime: str, artifact: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    modules = npm.modules(runtime)
    asked = request(artifact, modules=str(modules / "package.json"), runtime=runtime)
    told = node(asked, tmp_path)
    assert told["tokens"] == expected
    assert not [name for name in told["inputs"] if "lora" in name]
    assert [("nobody: not loaded" in e, "no number" in e) for e in told["errors"]] == [
        (True, False), (False, True),
    ]  # fmt: skip


def test_an_adapter_of_another_build_is_refused(artifact: Path, tmp_path: Path) -> None:
    modules = npm.modules("onnxruntime-web")
    other = shutil.copytree(artifact, tmp_path / "other")
    path = other / "adapters" / "all.safetensors"
    content = path.read_bytes()
    at = content.index(b"model_version") + len(b'model_version\\": ')
    digit = content[at : at + 1]
    path.write_bytes(content[:at] + (b"1" if digit != b"1" else b"2") + content[at + 1 :])
    asked = request(other, modules=str(modules / "package.json"), runtime="onnxruntime-web")
    with pytest.raises(AssertionError, match="made for model version"):
        node(asked, tmp_path)


def test_chromium_generates_the_tokens_of_our_runtime(
    artifact: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    modules = npm.modules("onnxruntime-web", "playwright-core")
    asked = request(artifact, modules=str(modules / "package.json"), chromium=npm.chromium())
    asked |= {"folders": {"/web/": str(WEB), "/artifact/": str(artifact),
                          "/ort/": str(modules / "node_modules/onnxruntime-web/dist")},
              "page": str(Path(__file__).parent / "page.html"),
              "screenshot": str(tmp_path / "page.png")}  # fmt: skip
    told = node(asked, tmp_path, "browser.mjs")
    assert told["tokens"] == expected
    assert told["console"] == []
    assert all(address.startswith("http://127.0.0.1:") for address in told["requests"])
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_safetensors_hold_what_onnx_adapters_hold(artifact: Path) -> None:
    import onnxruntime as ort
    from safetensors.numpy import load_file

    for file in sorted((artifact / "adapters").glob("*.onnx_adapter")):
        read = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
        same = load_file(file.with_suffix(".safetensors"))
        assert same.keys() == read.keys()
        assert all(np.array_equal(same[name], value.numpy()) for name, value in read.items())


def node(asked: dict[str, Any], folder: Path, script: str = "switching.mjs") -> dict[str, Any]:
    ask, answer = folder / "ask.json", folder / "answer.json"
    ask.write_text(json.dumps(asked))
    done = subprocess.run(
        ["node", Path(__file__).parent / script, ask, answer],
        capture_output=True, text=True, timeout=300, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(answer.read_text())
    return told
