"""The animals of the zoo: a small config for each model type, all that is special about it kept.

Head sizes are multiples of 16, where the type allows it, because ONNX Runtime's fused attention
asks for that; sliding windows are shorter than the longest prompt, so that they matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from adaptrix_export.arch.task_table import (
    ANSWERS,
    AUDIO,
    IMAGES,
    MASKED,
    VISION_LANGUAGE,
    ZERO_SHOT_IMAGES,
)
from adaptrix_export.arch.tasks import (
    CLASSIFIERS,
    FEATURES,
    GENERATION,
    SEQ2SEQ,
    SEQUENCES,
    SPEECH,
    TOKENS,
)

VOCAB, WINDOW = 300, 12
_SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=VOCAB,
    max_position_embeddings=128,
)
_TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


@dataclass(frozen=True)
class Animal:
    """One model type. `config` is given to its config class; `targets` to LoRA's target_modules,
    `parameters` to its target_parameters (stacked experts)."""

    kind: str
    config: dict[str, Any]
    task: str = GENERATION
    targets: str | tuple[str, ...] = "all-linear"
    parameters: tuple[str, ...] = ()
    lora: dict[str, Any] = field(default_factory=dict)
    loud: float = 3.0  # on the matrices, so that logits are of the size of one
    model: str = ""  # the class, where the task alone does not say


def _decoder(kind: str, **changed: Any) -> Animal:
    """Of LLaMA's shape, with half as many heads for keys and values."""
    return Animal(kind, {**_SHAPE, "num_key_value_heads": 2, **_TOKENS, **changed})


def _mixture(kind: str, *parameters: str, **changed: Any) -> Animal:
    animal = _decoder(kind, **{"num_experts_per_tok": 2, **changed})
    names = parameters or ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    return Animal(kind, animal.config, parameters=names)


def _phimoe() -> Animal:
    """Its router is a Linear that returns a tuple, which PEFT's layer cannot wrap."""
    animal = _mixture("phimoe", num_local_experts=4)
    return replace(animal, targets=("q_proj", "k_proj", "v_proj", "o_proj"))


def _gpt2(kind: str, **changed: Any) -> Animal:
    sizes = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=128)
    lora = {"fan_in_fan_out": True} if kind in ("gpt2", "openai-gpt") else {}
    return Animal(kind, {**sizes, **_TOKENS, **changed}, lora=lora)


def _encoder(kind: str, **changed: Any) -> Animal:
    return Animal(kind, {**_SHAPE, "type_vocab_size": 2, **_TOKENS, **changed}, FEATURES)


def _t5(kind: str, **changed: Any) -> Animal:
    sizes = dict(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=3, num_heads=4,
        vocab_size=VOCAB, decoder_start_token_id=2, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return Animal(kind, {**sizes, **changed}, SEQ2SEQ, loud=1.0)


def _bart(kind: str, task: str = SEQ2SEQ, **changed: Any) -> Animal:
    sizes = dict(
        d_model=64, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=VOCAB,
        decoder_start_token_id=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    if task == SEQ2SEQ:
        sizes["max_position_embeddings"] = 128
    return Animal(kind, {**sizes, **changed}, task)


_TOWER = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)  # fmt: skip


def _seeing(kind: str, task: str = IMAGES, **changed: Any) -> Animal:
    """An image of sixteen patches."""
    return Animal(kind, {**_TOWER, "image_size": 32, "patch_size": 8, **changed}, task, loud=1.5)


def _staged(kind: str, task: str, **changed: Any) -> Animal:
    """Two stages, the second of half the size."""
    return Animal(kind, dict(image_size=32, **changed), task, loud=1.5)


def _towers(kind: str) -> Animal:
    text = {**_TOWER, "vocab_size": VOCAB, "max_position_embeddings": 32, **_TOKENS}
    vision = {**_TOWER, "image_size": 32, "patch_size": 8}
    config = dict(text_config=text, vision_config=vision, projection_dim=48)
    # PEFT cannot put a layer where MultiheadAttention is
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return Animal(kind, config, ZERO_SHOT_IMAGES, targets=names, loud=1.5)


def _hearing(kind: str, model: str, task: str = SPEECH) -> Animal:
    sizes = dict(
        conv_dim=(32, 32, 32), conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4),
        num_feat_extract_layers=3, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Animal(kind, {**_TOWER, **sizes}, task, model=model, loud=1.5)


def _talking(kind: str, vision: str, **changed: Any) -> Animal:
    """A text model that is given images; its adapter is on the text."""
    text = {**_SHAPE, "num_key_value_heads": 2, **_TOKENS, "model_type": "llama"}
    tower = {**_TOWER, "image_size": 32, "patch_size": 8, "model_type": vision}
    config = dict(text_config=text, vision_config=tower, image_token_id=VOCAB - 1, **changed)
    names = r".*(language|text)_model.*\.(q|k|v|o|gate|up|down)_proj"
    return Animal(kind, config, VISION_LANGUAGE, targets=names, loud=2.0)


_HEAD = {"head_dim": 16}
_PARTIAL = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
    "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
    "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
}  # fmt: skip

ONE_TASK: tuple[Animal, ...] = (
    _gpt2("gpt2"),
    _decoder("llama", tie_word_embeddings=True, rope_parameters=_LLAMA3),
    _decoder("mistral", sliding_window=WINDOW),
    _decoder("ministral", **_SLIDING, **_HEAD),
    _decoder("qwen2", tie_word_embeddings=True),
    _decoder("qwen3", **_HEAD),
    _decoder("gemma", **_HEAD),
    _decoder("gemma2", query_pre_attn_scalar=16, **_HEAD, **_SLIDING),
    _decoder("gemma3_text", query_pre_attn_scalar=16, **_HEAD, **_SLIDING),
    _decoder("phi", rope_parameters=_PARTIAL),
    _decoder("phi3"),
    _decoder("gpt_neox", rope_parameters={**_PARTIAL, "partial_rotary_factor": 0.25}),
    Animal(
        "opt",
        dict(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
            **_TOKENS,
        ),
    ),
    Animal("bloom", dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB, **_TOKENS)),
    _decoder("falcon", ffn_hidden_size=96),
    _decoder("stablelm", rope_parameters={**_PARTIAL, "partial_rotary_factor": 0.25}),
    _decoder("starcoder2", sliding_window=WINDOW),
    _decoder("olmo", clip_qkv=8.0),
    _decoder("olmo2"),
    _decoder("olmo3", **_SLIDING),
    _decoder("granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
    _decoder("smollm3", no_rope_layers=[1, 0], **_HEAD),
    _mixture("mixtral", num_local_experts=4),
    _mixture(
        "qwen2_moe", num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=48
    ),
    _mixture("qwen3_moe", num_experts=4, moe_intermediate_size=48, **_HEAD),
    _mixture("olmoe", num_experts=4),
    _mixture("gpt_oss", num_local_experts=4, **_HEAD, **_SLIDING, rope_parameters=_YARN),
    _mixture(
        "granitemoe",
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj",
        num_local_experts=4,
    ),
    _phimoe(),
    _decoder("cohere", logit_scale=0.5),
    _decoder("cohere2", logit_scale=0.5, **_HEAD, **_SLIDING),
    _decoder("glm", rope_parameters=_PARTIAL, **_HEAD),
    _decoder("glm4", rope_parameters=_PARTIAL, **_HEAD),
    Animal(
        "gpt_neo",
        dict(
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            vocab_size=VOCAB,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
            max_position_embeddings=128,
            **_TOKENS,
        ),
    ),
    _gpt2("gptj", rotary_dim=8),
    _gpt2("gpt_bigcode"),
    _gpt2("codegen", rotary_dim=8),
    Animal(
        "mpt",
        dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=VOCAB, **_TOKENS),
    ),
    _decoder("nemotron", rope_parameters=_PARTIAL, **_HEAD),
    _decoder("helium", **_HEAD),
    _decoder("exaone4", **_SLIDING),
    _decoder("ernie4_5", **_HEAD),
    _decoder("seed_oss", **_HEAD),
    _decoder("apertus", rope_parameters=_LLAMA3),
    _decoder("hunyuan_v1_dense", **_HEAD),
    _decoder("arcee", **_HEAD),
    _decoder("persimmon", rope_parameters=_PARTIAL),
    Animal("biogpt", {**_SHAPE, **_TOKENS}),
    Animal(
        "xglm",
        dict(
            d_model=64,
            ffn_dim=96,
            num_layers=2,
            attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=128,
            **_TOKENS,
        ),
    ),
    _decoder("diffllama", **_HEAD),
    _decoder("vaultgemma", query_pre_attn_scalar=16, **_HEAD, **_SLIDING),
    _decoder("nanochat"),
    _decoder("modernbert-decoder", local_attention=WINDOW),
    _encoder("bert"),
    _encoder("roberta", type_vocab_size=1),
    _encoder("xlm-roberta", type_vocab_size=1),
    _encoder("camembert", type_vocab_size=1),
    Animal(
        "distilbert",
        dict(
            dim=64,
            hidden_dim=96,
            n_layers=2,
            n_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=128,
            pad_token_id=2,
        ),
        FEATURES,
    ),
    _encoder("electra", embedding_size=32),
    _encoder("albert", embedding_size=32),
    _encoder("mpnet"),
    _encoder(
        "modernbert",
        local_attention=WINDOW,
        global_attn_every_n_layers=2,
        cls_token_id=0,
        sep_token_id=1,
    ),
    _encoder("eurobert", num_key_value_heads=2),
    _encoder("nomic_bert"),
    _encoder(
        "deberta-v2",
        relative_attention=True,
        position_buckets=16,
        max_relative_positions=-1,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
    ),
    _t5("t5"),
    _t5("mt5"),
    _bart("bart"),
    _bart("mbart", scale_embedding=True),
    _bart("marian", scale_embedding=True),
    _bart("m2m_100", scale_embedding=True),
    _bart("pegasus", scale_embedding=True),
    _bart("blenderbot"),
    _bart("blenderbot-small"),
    _bart("plbart"),
    _bart("mvp"),
    _bart(
        "whisper",
        SPEECH,
        num_mel_bins=16,
        max_source_positions=30,
        max_target_positions=128,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    _seeing("vit"),
    replace(_seeing("deit"), model="DeiTForImageClassification"),
    _seeing("dinov2"),
    _seeing("beit", use_absolute_position_embeddings=True),
    _staged(
        "swin", IMAGES, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    _staged(
        "segformer",
        "semantic-segmentation",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[32, 64],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    ),
    _towers("clip"),
    _towers("siglip"),
    _talking("llava", "clip_vision_model", image_token_index=VOCAB - 1),
    _talking("internvl", "internvl_vision", downsample_ratio=0.5),
    _talking("aya_vision", "siglip_vision_model", downsample_factor=2),
    _talking("idefics3", "idefics3_vision", scale_factor=2),
    _talking("smolvlm", "smolvlm_vision", scale_factor=2),
    _hearing("wav2vec2", "Wav2Vec2ForCTC"),
    _hearing("hubert", "HubertForCTC"),
    Animal(
        "audio-spectrogram-transformer",
        {**_TOWER, "num_mel_bins": 32, "max_length": 48, "patch_size": 16},
        AUDIO,
        loud=1.5,
    ),
)
_OTHER_TASKS = (
    *(("bert", task) for task in CLASSIFIERS), *(("llama", task) for task in CLASSIFIERS),
    ("roberta", SEQUENCES), ("distilbert", SEQUENCES), ("deberta-v2", SEQUENCES),
    ("modernbert", TOKENS), ("qwen3", SEQUENCES), ("qwen3", FEATURES),
    ("bert", MASKED), ("roberta", MASKED), ("distilbert", MASKED), ("modernbert", MASKED),
    ("bert", ANSWERS), ("roberta", ANSWERS), ("dinov2", FEATURES), ("wav2vec2", AUDIO),
)  # fmt: skip
ANIMALS = (
    *ONE_TASK,
    *(
        replace(next(a for a in ONE_TASK if a.kind == k), task=task, model="")
        for k, task in _OTHER_TASKS
    ),
)
