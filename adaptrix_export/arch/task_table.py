"""The tasks, a row each: the transformers class, its heads, inputs, outputs and files.

The names are those that optimum and transformers' pipelines use. Nothing here imports torch or
transformers; `classes.py` looks up the class of a model for a task.
"""

from __future__ import annotations

from dataclasses import dataclass

GENERATION, FEATURES = "text-generation", "feature-extraction"
SEQUENCES, TOKENS = "text-classification", "token-classification"
SEQ2SEQ = "text2text-generation"
MASKED, ANSWERS, CHOICES = "fill-mask", "question-answering", "multiple-choice"
SPEECH, AUDIO = "automatic-speech-recognition", "audio-classification"
IMAGES, ZERO_SHOT_IMAGES = "image-classification", "zero-shot-image-classification"
VISION_LANGUAGE = "image-text-to-text"
AS_SAVED = "as-saved"

TEXT = ("input_ids", "attention_mask", "token_type_ids")
GRAPH = "model.onnx"
PARTS = ("encoder_model.onnx", "decoder_model_merged.onnx")


@dataclass(frozen=True)
class TaskKind:
    """One task.

    `auto` loads the live model, or one of `more` if `auto` has no class for the model's type;
    `suffix`: the end of the class name; `heads`: modules outside the body; `peft`: the `task_type`
    of adapters, if PEFT has one. `labels`: the head has a row for each label. `generates`: tokens
    are generated one by one.

    `files`: its graphs; the first one takes those of `inputs` (rows of `arch/inputs.py`) that the
    model accepts, and returns `outputs`. `logits`: the output is a distribution.
    """

    auto: str
    suffix: str
    heads: tuple[str, ...] = ()
    peft: str | None = None
    more: tuple[str, ...] = ()
    labels: bool = False
    generates: bool = False
    inputs: tuple[str, ...] = TEXT
    outputs: tuple[str, ...] = ("logits",)
    files: tuple[str, ...] = (GRAPH,)
    logits: bool = True

    @property
    def autos(self) -> tuple[str, ...]:
        return (self.auto, *self.more)


_CLASSIFIER = ("classifier", "head")

TASKS: dict[str, TaskKind] = {
    GENERATION: TaskKind(
        "AutoModelForCausalLM", "ForCausalLM", ("lm_head",), "CAUSAL_LM", generates=True
    ),
    FEATURES: TaskKind(
        "AutoModel", "Model", (), "FEATURE_EXTRACTION", outputs=("last_hidden_state",), logits=False
    ),
    SEQUENCES: TaskKind(
        "AutoModelForSequenceClassification", "ForSequenceClassification",
        ("classifier", "score", "pre_classifier", "head", "pooler", "dense"), "SEQ_CLS",
        labels=True,
    ),
    TOKENS: TaskKind(
        "AutoModelForTokenClassification", "ForTokenClassification",
        ("classifier", "score", "head"), "TOKEN_CLS", labels=True,
    ),
    SEQ2SEQ: TaskKind(
        "AutoModelForSeq2SeqLM", "ForConditionalGeneration", ("lm_head",), "SEQ_2_SEQ_LM",
        generates=True, outputs=("last_hidden_state",), files=PARTS,
    ),
    MASKED: TaskKind("AutoModelForMaskedLM", "ForMaskedLM", ("lm_head", "cls", "predictions")),
    ANSWERS: TaskKind(
        "AutoModelForQuestionAnswering", "ForQuestionAnswering", ("qa_outputs",), "QUESTION_ANS"
    ),
    CHOICES: TaskKind("AutoModelForMultipleChoice", "ForMultipleChoice", ("classifier",)),
    SPEECH: TaskKind(
        "AutoModelForSpeechSeq2Seq", "ForConditionalGeneration", ("proj_out", "lm_head"),
        more=("AutoModelForCTC",), generates=True,
        inputs=("input_features",), outputs=("last_hidden_state",), files=PARTS,
    ),
    AUDIO: TaskKind(
        "AutoModelForAudioClassification", "ForSequenceClassification",
        ("classifier", "projector"), labels=True,
    ),
    "audio-frame-classification": TaskKind(
        "AutoModelForAudioFrameClassification", "ForAudioFrameClassification", ("classifier",),
        labels=True,
    ),
    "audio-xvector": TaskKind("AutoModelForAudioXVector", "ForXVector", ("classifier",)),
    "text-to-audio": TaskKind(
        "AutoModelForTextToWaveform", "Model", more=("AutoModelForTextToSpectrogram",)
    ),
    IMAGES: TaskKind(
        "AutoModelForImageClassification", "ForImageClassification", _CLASSIFIER, labels=True
    ),
    ZERO_SHOT_IMAGES: TaskKind("AutoModelForZeroShotImageClassification", "Model"),
    "semantic-segmentation": TaskKind(
        "AutoModelForSemanticSegmentation", "ForSemanticSegmentation",
        ("decode_head", "auxiliary_head"),
    ),
    "image-segmentation": TaskKind(
        "AutoModelForUniversalSegmentation", "ForUniversalSegmentation",
        more=("AutoModelForInstanceSegmentation", "AutoModelForImageSegmentation"),
    ),
    "object-detection": TaskKind("AutoModelForObjectDetection", "ForObjectDetection"),
    "zero-shot-object-detection": TaskKind(
        "AutoModelForZeroShotObjectDetection", "ForObjectDetection"
    ),
    "depth-estimation": TaskKind("AutoModelForDepthEstimation", "ForDepthEstimation"),
    "mask-generation": TaskKind("AutoModelForMaskGeneration", "Model"),
    "masked-im": TaskKind("AutoModelForMaskedImageModeling", "ForMaskedImageModeling"),
    "image-to-image": TaskKind("AutoModelForImageToImage", "ForImageSuperResolution"),
    "keypoint-detection": TaskKind("AutoModelForKeypointDetection", "ForKeypointDetection"),
    "video-classification": TaskKind(
        "AutoModelForVideoClassification", "ForVideoClassification", ("classifier",), labels=True
    ),
    VISION_LANGUAGE: TaskKind(
        "AutoModelForImageTextToText", "ForConditionalGeneration", ("lm_head",),
        more=("AutoModelForMultimodalLM",), generates=True,
    ),
    "visual-question-answering": TaskKind(
        "AutoModelForVisualQuestionAnswering", "ForQuestionAnswering", ("classifier",)
    ),
    "document-question-answering": TaskKind(
        "AutoModelForDocumentQuestionAnswering", "ForQuestionAnswering", ("qa_outputs",)
    ),
    "time-series-prediction": TaskKind("AutoModelForTimeSeriesPrediction", "ForPrediction"),
    # The class that `architectures` names, of a task without a row.
    AS_SAVED: TaskKind("AutoModel", ""),
}  # fmt: skip
CLASSIFIERS = (SEQUENCES, TOKENS)
# An encoder, and a decoder with cross attention to its output.
TWO_PARTS = (SEQ2SEQ, SPEECH)
# Weights of classifier heads, with a row for each label.
LABELS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
