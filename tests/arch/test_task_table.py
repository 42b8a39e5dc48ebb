"""The table of tasks, and which class of transformers runs a model."""

from __future__ import annotations

import pytest
import transformers

from adaptrix_export.arch.classes import live_class, live_class_name, task_of
from adaptrix_export.arch.task_table import TASKS
from adaptrix_export.arch.tasks import choose_task, has_row
from adaptrix_export.errors import UnsupportedError
from adaptrix_export.recipe.words import Task


def test_a_recipe_knows_every_task():
    assert {str(word) for word in Task} == {"auto", *TASKS}
    assert all(hasattr(transformers, auto) for kind in TASKS.values() for auto in kind.autos)


def config(kind, *classes, **more):
    return {"model_type": kind, "architectures": list(classes), **more}


WHISPER = config("whisper", "WhisperForConditionalGeneration", is_encoder_decoder=True)
GEMMA = config(
    "gemma3", "Gemma3ForConditionalGeneration", text_config={"model_type": "gemma3_text"}
)
VIT = config("vit", "ViTModel")


@pytest.mark.parametrize(
    ("base", "adapter", "task"),
    [
        (WHISPER, {}, "automatic-speech-recognition"),
        (WHISPER, {"task_type": "SEQ_2_SEQ_LM"}, "automatic-speech-recognition"),
        (GEMMA, {"task_type": "CAUSAL_LM"}, "image-text-to-text"),
        (VIT, {}, "feature-extraction"),
        (VIT, {"task_type": "SEQ_CLS"}, "image-classification"),
        (VIT, {"auto_mapping": {"base_model_class": "ViTForImageClassification"}},
         "image-classification"),
        (config("clip", "CLIPModel", text_config={"model_type": "clip_text_model"}), {},
         "zero-shot-image-classification"),
        (config("bert", "BertForMaskedLM"), {}, "feature-extraction"),
        (config("bert", "BertForMaskedLM"),
         {"auto_mapping": {"base_model_class": "BertForMaskedLM"}}, "fill-mask"),
        (config("bert", "BertModel"), {"task_type": "QUESTION_ANS"}, "question-answering"),
        (config("bert", "BertForPreTraining"),
         {"auto_mapping": {"base_model_class": "BertForPreTraining"}}, "as-saved"),
        (config("t5", "T5EncoderModel"), {}, "as-saved"),
        # An adapter of the model around this one says nothing of its task.
        (config("gemma3_text", "Gemma3ForCausalLM"),
         {"auto_mapping": {"base_model_class": "Gemma3ForConditionalGeneration"}},
         "text-generation"),
    ],
)  # fmt: skip
def test_the_task_of_any_type(base, adapter, task):
    assert choose_task("auto", base, [adapter]) == task


def test_a_row_is_for_types_with_the_usual_names():
    llama = config("llama", "LlamaForCausalLM")
    assert has_row(llama, "text-generation") and has_row(config("t5"), "text2text-generation")
    assert not has_row(llama, "question-answering")
    assert not has_row(GEMMA, "image-text-to-text") and not has_row(VIT, "feature-extraction")


def test_the_class_is_the_one_that_was_saved_if_it_is_for_the_task():
    wave = config("wav2vec2", "Wav2Vec2ForCTC")
    assert live_class_name(wave, "automatic-speech-recognition") == "Wav2Vec2ForCTC"
    assert live_class_name(VIT, "image-classification") == "ViTForImageClassification"
    assert live_class_name(VIT, "text-generation") is None
    assert task_of("gemma3", "Gemma3ForConditionalGeneration") == "image-text-to-text"
    assert task_of("llama", "WhisperModel") is None


def test_what_transformers_does_not_have_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"'brand_new': not a type.*install a newer"):
        live_class("base", config("brand_new", "BrandNewModel"), "feature-extraction")
    custom = config("my_model", "MyModel", auto_map={"AutoModel": "modeling_my.MyModel"})
    with pytest.raises(UnsupportedError, match=r"'my_model': code of its own"):
        live_class("base", custom, "feature-extraction")
    with pytest.raises(UnsupportedError, match=r"base of type vit.*image-classification"):
        choose_task("text-generation", VIT, [])
