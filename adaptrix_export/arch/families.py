"""Module names of transformers models: a row for each type that differs from the default.

A test compares every row with transformers' classes; reading them here would import torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

DECODER, ENCODER, ENCODER_DECODER = "decoder", "encoder", "encoder-decoder"
LISTENER = "speech encoder-decoder"
LIVE = "live"  # no row: read from the class (`skeleton.py`)


@dataclass(frozen=True)
class Family:
    """Names in the models of one type.

    `prefix`: the `base_model_prefix`, which checkpoints of the bare model leave out; `embedding`:
    the token embedding; `embeddings`: all Embedding modules, stored (rows, width) and adapted
    transposed; `conv1d`: the stack's weights are stored (in, out); `tied`: the config class's
    default of `tie_word_embeddings`. `aliases`: modules that always share the embedding's weight.
    `renames`: (pattern, name in the live model) for names that differ in the files. `turned`: paths
    of other modules stored (in, out).
    """

    prefix: str = "model"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    shape: str = DECODER
    conv1d: bool = False
    tied: bool = False
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    aliases: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    turned: tuple[str, ...] = ()

    def bare(self) -> Family:
        """The names in the bare model, which has no head and no prefix."""
        start = self.prefix + "."
        return replace(
            self,
            embedding=self.embedding.removeprefix(start),
            embeddings=tuple(name.removeprefix(start) for name in self.embeddings),
        )

    def live_name(self, stored: str) -> str:
        """The name in the live model of a tensor of the files."""
        for pattern, name in self.renames:
            stored = re.sub(pattern, name, stored)
        return stored


def _decoder(
    prefix: str,
    embedding: str,
    *more: str,
    head: str = "lm_head",
    tied: bool = False,
    conv1d: bool = False,
    renames: tuple[tuple[str, str], ...] = (),
) -> Family:
    """`embedding` and `more` embeddings are named without the prefix."""
    modules = tuple(f"{prefix}.{name}" for name in (embedding, *more))
    return Family(
        prefix, modules[0], head, tied=tied, conv1d=conv1d, embeddings=modules, renames=renames
    )


def _encoder(
    prefix: str,
    *more: str,
    tokens: str = "embeddings.word_embeddings",
    tied: bool = True,
    renames: tuple[tuple[str, str], ...] = (),
) -> Family:
    """`more` embeddings are named as their last part, beside the tokens'."""
    start = tokens.rpartition(".")[0]
    modules = [tokens, *(name if "." in name else f"{start}.{name}" for name in more)]
    names = tuple(f"{prefix}.{name}" for name in modules)
    return Family(prefix, names[0], shape=ENCODER, tied=tied, embeddings=names, renames=renames)


_POSITIONS, _TYPES = "position_embeddings", "token_type_embeddings"
_GPT2 = _decoder("transformer", "wte", "wpe", tied=True, conv1d=True)
_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"
_T5 = Family(
    "transformer",
    "shared",
    shape=ENCODER_DECODER,
    tied=True,
    embeddings=(
        "shared", "encoder.embed_tokens", "decoder.embed_tokens",
        f"encoder.{_BIAS}", f"decoder.{_BIAS}",
    ),
    aliases=("encoder.embed_tokens", "decoder.embed_tokens"),
)  # fmt: skip


def _translator(*more: str, shared: str = "model.shared", head: str = "lm_head") -> Family:
    """Like BART: encoder, decoder and head share one embedding; `more` are further embeddings."""
    prefix = shared.rpartition(".")[0]
    aliases = (f"{prefix}.encoder.embed_tokens", f"{prefix}.decoder.embed_tokens")
    modules = (shared, *aliases, *(f"{prefix}.{name}" for name in more))
    return Family(
        prefix, shared, head, ENCODER_DECODER, tied=True, embeddings=modules, aliases=aliases
    )


_BOTH_POSITIONS = ("encoder.embed_positions", "decoder.embed_positions")
_BART = _translator(*_BOTH_POSITIONS)
_SINUSOIDAL = _translator()  # positions are computed, and no module of embeddings
_WHISPER = Family(
    "model",
    "model.decoder.embed_tokens",
    "proj_out",
    LISTENER,
    tied=True,
    embeddings=(
        "model.decoder.embed_tokens", *(f"model.{name}" for name in _BOTH_POSITIONS)
    ),
)  # fmt: skip
_ROBERTA = _encoder("roberta", _POSITIONS, _TYPES)
_TIED = Family(tied=True)
# `transformers.conversion_mapping`, in the direction of loading.
_SPARSE_BLOCK = ((r"\.block_sparse_moe\.", ".mlp."),)
_GRANITE_MOE = (
    (r"block_sparse_moe\.input_linear\.weight$", "block_sparse_moe.experts.gate_up_proj"),
    (r"block_sparse_moe\.output_linear\.weight$", "block_sparse_moe.experts.down_proj"),
    (r"block_sparse_moe\.router\.layer\.weight$", "block_sparse_moe.router.weight"),
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, conv1d=False),
    "gpt_neo": replace(_GPT2, conv1d=False),
    "gptj": _decoder("transformer", "wte"),
    "codegen": _decoder("transformer", "wte"),
    "openai-gpt": _decoder(
        "transformer", "tokens_embed", "positions_embed", tied=True, conv1d=True
    ),
    "bloom": _decoder("transformer", "word_embeddings", tied=True),
    "falcon": _decoder("transformer", "word_embeddings", tied=True),
    "mpt": _decoder("transformer", "wte", tied=True),
    "gpt_neox": _decoder("gpt_neox", "embed_in", renames=((r"^embed_out\.", "lm_head."),)),
    "opt": _decoder("model", "decoder.embed_tokens", "decoder.embed_positions", tied=True),
    "biogpt": _decoder(
        "biogpt", "embed_tokens", "embed_positions", head="output_projection", tied=True
    ),
    "modernbert-decoder": _decoder("model", "embeddings.tok_embeddings", head="decoder", tied=True),
    **dict.fromkeys(
        (
            *("gemma", "gemma2", "gemma3_text", "vaultgemma", "cohere", "cohere2", "starcoder2"),
            *("smollm3", "ernie4_5", "xglm"),
        ),
        _TIED,
    ),
    "mixtral": Family(renames=_SPARSE_BLOCK),
    "phimoe": Family(renames=(*_SPARSE_BLOCK, (r"\.mlp\.gate\.weight$", ".mlp.router.weight"))),
    "granitemoe": Family(renames=_GRANITE_MOE),
    "bert": _encoder("bert", _POSITIONS, _TYPES),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _encoder("electra", _POSITIONS, _TYPES),
    "albert": _encoder("albert", _POSITIONS, _TYPES),
    "mpnet": _encoder("mpnet", _POSITIONS, "encoder.relative_attention_bias"),
    "distilbert": _encoder("distilbert", _POSITIONS),
    "deberta-v2": _encoder("deberta", "encoder.rel_embeddings"),
    "modernbert": _encoder("model", tokens="embeddings.tok_embeddings"),
    "eurobert": _encoder("model", tokens="embed_tokens", tied=False),
    "t5": _T5,
    "mt5": _T5,
    **dict.fromkeys(
        (
            *("bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "plbart"),
            *("mvp", "bigbird_pegasus"),
        ),
        _BART,
    ),
    **dict.fromkeys(("m2m_100", "nllb-moe"), _SINUSOIDAL),
    "whisper": _WHISPER,
}
USUAL = Family()
# Types whose files store q, k and v in one tensor that transformers splits while loading.
FUSED_ON_DISK = ("nomic_bert", "gte", "jina_embeddings_v3")


def family_of(model_type: object) -> Family:
    return FAMILIES.get(str(model_type), USUAL)
