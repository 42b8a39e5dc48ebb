"""Which task a base and its adapters are for."""

from __future__ import annotations

import pytest

from adaptrix_export.arch.tasks import choose_task, class_name
from adaptrix_export.errors import AdapterError, UnsupportedError
from adaptrix_export.load import open_base
from tests.tiny import save_base

BERT, LLAMA = {"model_type": "bert"}, {"model_type": "llama"}


def base(kind, *classes):
    return {"model_type": kind, "architectures": list(classes)}


@pytest.mark.parametrize(
    ("asked", "config", "adapters", "task"),
    [
        ("auto", LLAMA, [], "text-generation"),
        ("auto", base("llama", "LlamaModel"), [], "text-generation"),
        ("auto", base("gpt2", "GPT2LMHeadModel"), [{"task_type": "CAUSAL_LM"}], "text-generation"),
        ("auto", BERT, [], "feature-extraction"),
        ("auto", base("bert", "BertModel"), [{"task_type": None}], "feature-extraction"),
        ("auto", base("bert", "BertForMaskedLM"), [{}], "feature-extraction"),
        ("auto", base("bert", "BertForTokenClassification"), [{}], "token-classification"),
        ("auto", base("bert", "BertModel"), [{"task_type": "SEQ_CLS"}], "text-classification"),
        ("auto", base("llama", "LlamaForCausalLM"), [{"task_type": "TOKEN_CLS"}],
         "token-classification"),
        ("auto", LLAMA, [{"auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}}],
         "text-classification"),
        ("auto", base("t5", "T5ForConditionalGeneration"), [{}], "text2text-generation"),
        ("auto", {"model_type": "mt5"}, [{"task_type": "SEQ_2_SEQ_LM"}], "text2text-generation"),
        ("auto", {"model_type": "deberta-v2"}, [], "feature-extraction"),
        ("feature-extraction", base("bert", "BertModel"), [{"task_type": "SEQ_CLS"}],
         "feature-extraction"),
    ],
)  # fmt: skip
def test_the_task_is_asked_for_trained_for_or_saved_as(asked, config, adapters, task):
    assert choose_task(asked, config, adapters) == task


def test_what_cannot_run_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="text2text-generation.*type llama, a decoder"):
        choose_task("auto", LLAMA, [{"task_type": "SEQ_2_SEQ_LM"}])
    with pytest.raises(AdapterError, match="text-classification and text-generation"):
        choose_task("auto", LLAMA, [{"task_type": "SEQ_CLS"}, {"task_type": "CAUSAL_LM"}])
    with pytest.raises(UnsupportedError, match="type bert, an encoder"):
        choose_task("text-generation", BERT, [])


def test_classes_of_another_task():
    assert class_name(base("llama", "LlamaForCausalLM"), "token-classification") == (
        "LlamaForTokenClassification"
    )
    assert class_name(base("gpt2", "GPT2LMHeadModel"), "text-classification") == (
        "GPT2ForSequenceClassification"
    )
    assert class_name(base("bert", "BertModel"), "feature-extraction") == "BertModel"
    assert class_name(LLAMA, "text-classification") is None


def test_names_are_those_of_the_live_model_of_the_task(tmp_path):
    folder = str(save_base("bert", tmp_path, num_hidden_layers=1))
    bare = open_base(folder)
    assert bare.task == "feature-extraction" and not bare.unseen and not bare.tied
    assert "encoder.layer.0.attention.self.query.weight" in bare.tensors
    assert bare.architecture.is_transposed(bare.architecture.site_of("embeddings.word_embeddings"))
    headed = open_base(folder, "text-classification")
    assert {f"bert.{name}" for name in bare.tensors} == set(headed.tensors)
    tokens = open_base(folder, "token-classification")
    assert {t.name for t in tokens.unseen} == {"pooler.dense.weight", "pooler.dense.bias"}
    assert len(tokens.tensors) + len(tokens.unseen) == len(bare.tensors)
