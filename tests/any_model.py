"""Tiny models of many types and tasks, with a LoRA on each, as transformers and PEFT save them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

_TEXT = dict(
    vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, max_position_embeddings=64, pad_token_id=1, bos_token_id=0,
    eos_token_id=2,
)  # fmt: skip
_BART = dict(
    vocab_size=120, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    forced_eos_token_id=2,
)  # fmt: skip
_VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    image_size=16, patch_size=8,
)  # fmt: skip
_WAVE = dict(
    vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=48, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4),
    num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, apply_spec_augment=False,
    classifier_proj_size=16,
)  # fmt: skip
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}


@dataclass(frozen=True)
class Kind:
    """One model: its class, the sizes of its config, the modules that its LoRA is on, and what the
    adapter ships whole."""

    cls: str
    task: str
    sizes: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    saved: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        return getattr(transformers, self.cls).config_class(**self.sizes)


_CLIP = dict(text_config=_TEXT, vision_config=_VISION, projection_dim=16)
_BERT = ("query", "value")

KINDS: tuple[Kind, ...] = (
    Kind("BertForMaskedLM", "fill-mask", _TEXT, _BERT),
    Kind("BertForQuestionAnswering", "question-answering", _TEXT, _BERT, ("qa_outputs",)),
    Kind("BertForMultipleChoice", "multiple-choice", _TEXT, _BERT),
    Kind("BertForPreTraining", "as-saved", _TEXT, _BERT),
    Kind("RobertaForMaskedLM", "fill-mask", _TEXT, _BERT),
    Kind("EsmForMaskedLM", "fill-mask", {**_TEXT, "mask_token_id": 3}, _BERT),
    Kind("LayoutLMForTokenClassification", "token-classification", _TEXT, _BERT, ("classifier",)),
    Kind("BartForConditionalGeneration", "text2text-generation", _BART),
    Kind("BartForSequenceClassification", "text-classification", _BART),
    Kind("MBartForConditionalGeneration", "text2text-generation", _BART),
    Kind("MarianMTModel", "text2text-generation", _BART),
    Kind("M2M100ForConditionalGeneration", "text2text-generation", _BART),
    Kind("PegasusForConditionalGeneration", "text2text-generation", _BART),
    Kind(
        "WhisperForConditionalGeneration", "automatic-speech-recognition",
        {**_BART, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32,
         "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    Kind(
        "Speech2TextForConditionalGeneration", "automatic-speech-recognition",
        {**_BART, "input_feat_per_channel": 16, "max_source_positions": 64,
         "max_target_positions": 32, "conv_channels": 16},
    ),
    Kind("Wav2Vec2ForCTC", "automatic-speech-recognition", _WAVE),
    Kind("HubertForSequenceClassification", "audio-classification", _WAVE, saved=("classifier",)),
    Kind(
        "ASTForAudioClassification", "audio-classification",
        {**_VISION, "num_mel_bins": 16, "max_length": 32}, saved=("classifier",),
    ),
    Kind("ViTForImageClassification", "image-classification", _VISION, saved=("classifier",)),
    Kind("ViTModel", "feature-extraction", _VISION),
    Kind("DeiTForImageClassification", "image-classification", _VISION),
    Kind("Dinov2Model", "feature-extraction", _VISION),
    Kind(
        "SwinForImageClassification", "image-classification",
        dict(image_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2),
             window_size=4),
    ),
    Kind(
        "SegformerForSemanticSegmentation", "semantic-segmentation",
        dict(hidden_sizes=(8, 16), num_attention_heads=(1, 2), depths=(1, 1), sr_ratios=(2, 1),
             num_encoder_blocks=2, patch_sizes=(7, 3), strides=(4, 2), mlp_ratios=(2, 2),
             decoder_hidden_size=16),
    ),
    Kind(
        "ResNetForImageClassification", "image-classification",
        dict(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1), layer_type="basic"),
        ("convolution",),
    ),
    Kind("CLIPModel", "zero-shot-image-classification", _CLIP),
    Kind("SiglipModel", "zero-shot-image-classification",
         dict(text_config=_TEXT, vision_config=_VISION)),
    Kind("BlipForConditionalGeneration", "image-text-to-text", _CLIP, ("qkv", "projection")),
    Kind(
        "LlavaForConditionalGeneration", "image-text-to-text",
        dict(text_config={**_LLAMA, "model_type": "llama"},
             vision_config={**_VISION, "model_type": "clip_vision_model"}, image_token_index=110),
    ),
    Kind(
        "Gemma3ForConditionalGeneration", "image-text-to-text",
        dict(text_config={**_LLAMA, "model_type": "gemma3_text", "sliding_window": 8},
             vision_config={**_VISION, "model_type": "siglip_vision_model"},
             mm_tokens_per_image=4, image_token_index=110, boi_token_index=111,
             eoi_token_index=112),
    ),
    Kind(
        "Qwen2_5_VLForConditionalGeneration", "image-text-to-text",
        dict(text_config={**_LLAMA, "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
             vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2,
                                out_hidden_size=32, patch_size=4, window_size=16,
                                fullatt_block_indexes=[1]),
             image_token_id=110, video_token_id=111, vision_start_token_id=112,
             vision_end_token_id=113),
    ),
    Kind(
        "Qwen3VLForConditionalGeneration", "image-text-to-text",
        dict(text_config={**_LLAMA, "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
             vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2,
                                out_hidden_size=32, patch_size=4, num_position_embeddings=64,
                                deepstack_visual_indexes=[0]),
             image_token_id=110, video_token_id=111, vision_start_token_id=112,
             vision_end_token_id=113),
    ),
    Kind(
        "Idefics3ForConditionalGeneration", "image-text-to-text",
        dict(text_config={**_LLAMA, "model_type": "llama"}, vision_config=_VISION,
             image_token_id=110, scale_factor=2),
    ),
    Kind(
        "SmolVLMForConditionalGeneration", "image-text-to-text",
        dict(text_config={**_LLAMA, "model_type": "llama"}, vision_config=_VISION,
             image_token_id=110, scale_factor=2),
    ),
    Kind("T5EncoderModel", "as-saved",
         dict(vocab_size=120, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2), ("q", "v")),
)  # fmt: skip


def save_kind(kind: Kind, folder: Path) -> tuple[Path, Path]:
    """(base, adapter): random, seeded, B not zero."""
    torch.manual_seed(0)
    model = getattr(transformers, kind.cls)(kind.config).eval()
    for name, value in model.named_parameters():
        if value.ndim < 2 and "norm" not in name.lower():
            value.data += 0.05 * torch.randn_like(value)
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(kind.targets),
        modules_to_save=list(kind.saved) or None, init_lora_weights=False,
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    for name, value in wrapped.named_parameters():
        if "modules_to_save" in name:
            value.data += 0.1 * torch.randn_like(value)
    wrapped.save_pretrained(adapter)
    return base, adapter
