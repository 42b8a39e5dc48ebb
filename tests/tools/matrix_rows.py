"""The rows of the matrix: every kind of adapter, as options of PEFT's own configs.

Q, O, EMBED, HEAD, NORM, FF and NORM1 stand for the names that each model gives to its parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KINDS = ("llama", "qwen3", "gpt2", "bert", "mixtral")
_LLAMA = dict(
    Q="q_proj", V="v_proj", O="o_proj", FF="down_proj", EMBED="embed_tokens", HEAD="lm_head",
    NORM="norm", NORM1="input_layernorm", PARAMETER="q_proj.weight",
)  # fmt: skip
NAMES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": {**_LLAMA, "FF": "o_proj"},
    "gpt2": dict(
        Q="c_attn", V="c_fc", O="mlp.c_proj", FF="mlp.c_proj", EMBED="wte", HEAD="lm_head",
        NORM="ln_f", NORM1="ln_1", PARAMETER="c_fc.weight",
    ),
    "bert": dict(
        Q="query", V="value", O="attention.output.dense", FF="output.dense",
        EMBED="word_embeddings", HEAD="lm_head", NORM="embeddings.LayerNorm",
        NORM1="attention.output.LayerNorm", PARAMETER="query.weight",
    ),
}  # fmt: skip
LM = ("llama", "qwen3", "gpt2", "mixtral")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


@dataclass(frozen=True)
class Row:
    """One kind of adapter.

    `options` go to the config class of `tuner`; `base` changes the base's config; `tokens` resizes
    the vocabulary before training; `task` is PEFT's task type, where the usual one will not do.
    `patch` is written into the saved config: for settings that need data or hardware to train
    with. `kinds` are the bases that have what the row is about. `must` is "refused" where an
    artifact, whatever its logits, would be a fault.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = KINDS
    tuner: str = "LORA"
    tokens: int | None = None
    task: str | None = None
    patch: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] | None = None
    must: str = ""
    spread: float = 0.1  # of the noise that stands for training


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_BIASED = {"attention_bias": True}
BOTH = ["Q", "O"]


def _lora(name: str, base: dict[str, Any] | None = None, **options: Any) -> Row:
    return Row(name, {"r": 4, "lora_alpha": 7, "target_modules": BOTH, **options}, base or {})


def _only(kinds: tuple[str, ...], row: Row, **more: Any) -> Row:
    return Row(**{**vars(row), "kinds": kinds, **more})


def _refused(name: str, patch: dict[str, Any] | None = None, **options: Any) -> Row:
    row = _lora(name, **options)
    return Row(**{**vars(row), "patch": patch or {}, "must": "refused"})


LORA: tuple[Row, ...] = (
    _lora("plain"),
    _lora("all-linear", target_modules="all-linear"),
    _lora("regex target", target_modules=r".*\.(Q|V)"),
    _lora("exclude_modules", target_modules=["Q", "V"], exclude_modules=r".*\.0\..*"),
    _lora("layers_to_transform", layers_to_transform=[1], layers_pattern=["layers", "h", "layer"]),
    _lora("rslora", use_rslora=True),
    _lora("rank_pattern", rank_pattern={"Q": 2}),
    _lora("alpha_pattern", alpha_pattern={"O": 3}),
    _lora("both patterns, regex, rslora", use_rslora=True, rank_pattern={r"\d+\..*": 3, "Q": 5},
          alpha_pattern={r".*\.1\..*Q": 9, "Q": 2}),
    _lora("rank above width", r=80),
    _lora("dora", use_dora=True),
    _lora("dora + rslora", use_dora=True, use_rslora=True, rank_pattern={"Q": 2}),
    _lora("dora all-linear", use_dora=True, target_modules="all-linear"),
    _lora("dora embedding", use_dora=True, target_modules=["Q", "EMBED"]),
    _lora("lora_bias", base=_BIASED, lora_bias=True, target_modules=["Q", "V"]),
    _lora("bias all", base=_BIASED, bias="all"),
    _lora("bias lora_only", base=_BIASED, bias="lora_only"),
    _lora("saved norm", modules_to_save=["NORM"]),
    _lora("saved embedding, tied", base=TIED, modules_to_save=["EMBED"]),
    _only(LM, _lora("saved embedding, untied", base=UNTIED, modules_to_save=["EMBED"])),
    _only(LM, _lora("saved head, tied", base=TIED, modules_to_save=["HEAD"])),
    _only(LM, _lora("saved head, untied", base=UNTIED, modules_to_save=["HEAD"])),
    _only(LM, _lora("saved both, tied", base=TIED, modules_to_save=["HEAD", "EMBED"])),
    _lora("embedding, tied", base=TIED, target_modules=["Q", "EMBED"]),
    _only(LM, _lora("embedding, untied", base=UNTIED, target_modules=["Q", "EMBED"])),
    _only(LM, _lora("head, tied", base=TIED, target_modules=["Q", "HEAD"])),
    _only(LM, _lora("head, untied", base=UNTIED, target_modules=["Q", "HEAD"])),
    _only(LM, _lora("embedding + head, tied", base=TIED, target_modules=["Q", "EMBED", "HEAD"])),
    _only(LM, _lora("embedding + head, untied", base=UNTIED,
                    target_modules=["Q", "EMBED", "HEAD"])),
    _only(LM, _lora("ensure_weight_tying, embedding", base=TIED, ensure_weight_tying=True,
                    target_modules=["Q", "EMBED"])),
    _only(LM, _lora("ensure_weight_tying, both", base=TIED, ensure_weight_tying=True,
                    target_modules=["Q", "EMBED", "HEAD"])),
    _only(LM, _lora("ensure_weight_tying, saved", base=TIED, ensure_weight_tying=True,
                    modules_to_save=["EMBED"])),
    _lora("token rows, list", base=TIED, trainable_token_indices=[3, 7]),
    _lora("token rows, dict", base=TIED, trainable_token_indices={"EMBED": [3, 7]}),
    _only(LM, _lora("token rows, untied", base=UNTIED, trainable_token_indices=[3, 7])),
    _only(LM, _lora("token rows, tying ensured", base=TIED, trainable_token_indices=[3, 7],
                    ensure_weight_tying=True)),
    _lora("target_parameters", target_parameters=["PARAMETER"], target_modules=["O"]),
    _only(("mixtral",), _lora("target_parameters, experts", target_parameters=EXPERTS)),
    _only(("mixtral",), _lora("experts, ranks, rslora", target_parameters=EXPERTS,
                              rank_pattern={"gate_up_proj": 3}, use_rslora=True)),
    _lora("layer_replication", layer_replication=[[0, 2], [1, 2]]),
    _only(KINDS, _lora("two adapters"), second={"target_modules": ["Q", "V"], "r": 2}),
    _only(KINDS, _lora("two adapters, dora"), second={"target_modules": ["Q"], "use_dora": True}),
    _lora("init gaussian", init_lora_weights="gaussian"),
    _lora("init orthogonal", init_lora_weights="orthogonal"),
    _lora("init eva", init_lora_weights="eva"),
    _lora("init False", init_lora_weights=False),
    _only(KINDS, _lora("more tokens, tied", base=TIED), tokens=310),
    _only(LM, _lora("more tokens, untied", base=UNTIED), tokens=310),
    _only(KINDS, _lora("fewer tokens, tied", base=TIED), tokens=290),
    _only(LM, _lora("more tokens, both saved", base=TIED, modules_to_save=["EMBED", "HEAD"]),
          tokens=310),
    _only(KINDS, _lora("sequence classifier"), task="SEQ_CLS"),
    _only(("llama", "qwen3", "gpt2", "bert", "mixtral"), _lora("token classifier"),
          task="TOKEN_CLS"),
)  # fmt: skip

LORA_REFUSED: tuple[Row, ...] = (
    _refused("init pissa", init_lora_weights="pissa"),
    _refused("init olora", init_lora_weights="olora"),
    _refused("init loftq", {"init_lora_weights": "loftq"}),
    _refused("init corda", {"init_lora_weights": "corda"}),
    _refused("init lora_ga", {"init_lora_weights": "lora_ga"}),
    _refused("aLoRA", alora_invocation_tokens=[1, 2]),
    _refused("QALoRA", {"use_qalora": True}),
    _refused("Arrow", {"arrow_config": {"top_k": 2}}),
    _refused("KaSA", {"kasa_config": {}, "use_kasa": True}),
)


def _tuner(kind: str, kinds: tuple[str, ...] = KINDS, **options: Any) -> Row:
    targets = {} if kind in _OWN_TARGETS else {"target_modules": BOTH}
    return Row(kind, {**targets, **options}, tuner=kind, kinds=kinds)


_OWN_TARGETS = ("TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW")

# Sizes divide those of the models in tiny.py: 64 and 96 wide.
TUNERS: tuple[Row, ...] = (
    _tuner("ADALORA", init_r=4, target_r=2, total_step=10),
    _tuner("BEFT"),
    _tuner("BOFT", boft_block_size=4),
    _tuner("C3A", block_size=8),
    _tuner("DEFT", r=4),
    _tuner("DELORA", r=4),
    _tuner("FOURIERFT", n_frequency=50, scaling=30.0),
    _tuner("FROD"),
    _tuner("GLORA", r=4),
    _tuner("GRALORA", r=8, gralora_k=2, hybrid_r=2),
    _tuner("HIRA", r=4),
    _tuner("HRA", r=4),
    _tuner("IA3", feedforward_modules=["FF"], target_modules=["Q", "FF"]),
    _tuner("LILY", r=4),
    _tuner("LN_TUNING", target_modules=["NORM1", "NORM"]),
    _tuner("LOHA", r=4),
    _tuner("LOKR", r=4),
    _tuner("MISS", r=8),
    _tuner("OFT", r=0, oft_block_size=8),
    _tuner("OSF", effective_rank=4),
    _tuner("PEANUT", r=4, depth=1),
    _tuner("PSOFT", r=4),
    _tuner("PVERA", r=8),
    _tuner("RANDLORA", r=16, randlora_alpha=8),
    _tuner("ROAD", group_size=16),
    _tuner("SHADOW", kinds=LM),
    _tuner("SHIRA", r=4),
    _tuner("SUPERTUNING", sparsity=0.9, r=2),
    _tuner("TINYLORA"),
    _tuner("TRAINABLE_TOKENS", token_indices=[1, 5, 7], target_modules=["EMBED"]),
    _tuner("UNILORA", r=4, theta_d_length=64, init_theta_d_bound=0.5),
    _tuner("VBLORA", r=2, num_vectors=16, vector_length=16, topk=2),
    _tuner("VERA", r=8),
    _tuner("WAVEFT", n_frequency=50),
)
# What no weight can hold. Poly's forward pass wants task ids, the others need no weight to fail.
TUNERS_REFUSED: tuple[Row, ...] = tuple(
    Row(kind, options, tuner=kind, kinds=kinds, must="refused")
    for kind, options, kinds in (
        ("POLY", {"r": 4, "target_modules": BOTH}, KINDS),
        # on decoders they are put into a graph: tests/test_learned_prompts.py
        ("PROMPT_TUNING", {"num_virtual_tokens": 4}, ("bert",)),
        ("P_TUNING", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}, ("bert",)),
        ("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 1}, ("llama",)),
        ("CPT", {"cpt_token_ids": [1, 2]}, LM),
    )
)

# The same, saved as a LoRA and renamed: to make one takes data, other adapters or scikit-learn.
TUNERS_REFUSED += tuple(
    _only(KINDS, _refused(kind, {"peft_type": kind}))
    for kind in ("ADAMSS", "CARTRIDGE", "MULTITASK_PROMPT_TUNING", "XLORA")
)

ROWS = (*LORA, *LORA_REFUSED, *TUNERS, *TUNERS_REFUSED)


def named(value: Any, names: dict[str, str]) -> Any:
    """The options with Q, EMBED, ... replaced by the model's own names, in regexes too."""
    if isinstance(value, dict):
        return {named(k, names): named(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [named(v, names) for v in value]
    if isinstance(value, str) and any(c in value for c in "\\*"):
        for short in ("Q", "V"):
            value = value.replace(short, names[short])
        return value
    return names.get(value, value) if isinstance(value, str) else value
