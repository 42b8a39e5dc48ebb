"""The tuners of PEFT 0.21, one row each: names of their tensors, what they change, or the refusal.

A tensor of a module is `base_model.model.<module>.<part>`; a tensor that all modules share is
`base_model.<name>`. Formulas are not here: the module's PEFT layer computes the merge (see
`merge/peft_layers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from adaptrix_export.plan import Tuned

OUT, IN = "rows", "columns"  # of a Linear weight, which is (out, in)
Sizes = tuple[str | None, ...]  # which of the two each dimension of a tensor is, if either


@dataclass(frozen=True)
class Tuner:
    """How one tuner stores its tensors.

    `parts`: pattern of a key after the module's path; `shared`: pattern of a key after
    `base_model.`; `sizes`: the dimensions that must be the module's own. `needs`: config fields
    with the only supported value, and a remedy; with other values the layer's frozen tensors would
    be computed from the base's weights, or drawn at random.
    """

    parts: str
    shared: str | None = None
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    weight: bool = True
    bias: bool = False  # changes the bias of a module that has one
    adds_bias: bool = False  # also where the module has none
    needs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    computed: tuple[str, ...] = ()  # constants of a layer that PEFT computes and does not save
    by_config: bool = False  # modules may have no tensor of their own: the config names them

    def part_of(self, key: str) -> tuple[str, str] | None:
        """(module path, part) of a key without `base_model.model.`, or None if it is no part."""
        match = regex.fullmatch(rf"(.+?)\.({self.parts})", key)
        return (match[1], match[2]) if match else None

    def is_shared(self, key: str) -> bool:
        return self.shared is not None and bool(regex.fullmatch(self.shared, key))


_PROJECTION = {"save_projection": (True, "save the adapter with save_projection=True")}
_ONE_OUT, _ONE_IN = (OUT,), (IN,)

TUNERS: dict[str, Tuner] = {
    "ADALORA": Tuner(
        "lora_[ABE]",
        computed=("ranknum",),
        sizes={"lora_A": (None, IN), "lora_B": (OUT, None)},
        needs={
            "layer_replication": (None, "train on a model that is already that deep"),
            "trainable_token_indices": (None, "train the rows with plain LoRA"),
        },
    ),
    "BEFT": Tuner("beft_bias", sizes={"beft_bias": (None, OUT)}, weight=False, adds_bias=True),
    "BOFT": Tuner("boft_[Rs]", sizes={"boft_s": (OUT, None)}),
    "C3A": Tuner("c3a_kernel"),
    "DEFT": Tuner("deft_[PR]", sizes={"deft_P": (OUT, None), "deft_R": (None, IN)}),
    "DELORA": Tuner(
        "delora_(A|B|lambda|w_norm)",
        sizes={"delora_A": (None, IN), "delora_B": (OUT, None), "delora_w_norm": _ONE_IN},
    ),
    "FOURIERFT": Tuner("fourierft_spectrum"),
    "GLORA": Tuner(
        "glora_[A-E]\\.(Xd|Xu|X|zeros)",
        bias=True,
        needs={"bias": ("none", "GLoRA trains biases by itself; train with bias='none'")},
    ),
    "GRALORA": Tuner("gralora_([AB]|[AB]_general\\.weight)"),
    "HIRA": Tuner("hira_(embedding_)?[AB]", sizes={"hira_A": (None, IN), "hira_B": (OUT, None)}),
    "HRA": Tuner("hra_u", sizes={"hra_u": (IN, None)}),
    "IA3": Tuner("ia3_l", bias=True),
    "LOHA": Tuner("hada_(w[12]_[ab]|t[12])"),
    "LOKR": Tuner("lokr_(w[12](_[ab])?|t2)"),
    "MISS": Tuner("miss_block"),
    "OFT": Tuner("oft_R\\.weight"),
    "PEANUT": Tuner("peanut_([AB]|(en|de)coders\\.\\d+)\\.weight"),
    "PVERA": Tuner(
        "pvera_lambda_[bd]",
        "pvera_[AB]",
        sizes={"pvera_lambda_b": _ONE_OUT},
        needs={"sample_at_inference": (False, "it draws new values at every run; turn it off")},
    ),
    "RANDLORA": Tuner("randlora_(A|B|gamma|lambda)", "randlora_[AB]"),
    "ROAD": Tuner("road_(theta|alpha)", bias=True),
    "SHIRA": Tuner("shira_(weight|indices)"),
    "SUPERTUNING": Tuner(
        "supertuning_(values|indices|lora_[AB]\\.weight)",
        needs={"save_precomputed_indices": (True, "save it with save_precomputed_indices=True")},
    ),
    "UNILORA": Tuner("unilora_(indices|scales)_[AB]", "unilora_theta_d", by_config=True),
    "VBLORA": Tuner("vblora_logits_[AB](_topk_(indices|weights))?", "vblora_vector_bank"),
    "VERA": Tuner("vera_lambda_[bd]", "vera_[AB]", sizes={"vera_lambda_b": _ONE_OUT}),
    "TINYLORA": Tuner(
        "tinylora_[ABP]",
        "tinylora_v\\.\\d+",
        sizes={"tinylora_A": (None, IN), "tinylora_B": (OUT, None)},
        needs=_PROJECTION,
    ),
    "WAVEFT": Tuner("waveft_spectrum"),
}

# Adapters that are nothing but values in the place of the base's own: no layer is needed.
REPLACING = {
    "LN_TUNING": Tuner("ln_tuning_layers\\.(weight|bias)"),
    "TRAINABLE_TOKENS": Tuner("trainable_tokens_delta"),
}

_PROMPT = ("it learns a prompt, not weights", "merge is impossible; serve it with PEFT")
_INPUT = (
    "what it adds depends on the input, so it cannot be merged",
    "serve it with PEFT, or train a LoRA for the same task",
)
_DECOMPOSED = (
    "its frozen part is computed from the base's weights each time that it is loaded",
    "merge it with PEFT's merge_and_unload() and build the merged model",
)

# peft_type -> (why it cannot be merged, what to do instead)
REFUSED: dict[str, tuple[str, str]] = {
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": ("it learns a cache, not weights", "merge is impossible; serve it with PEFT"),
    "ADAPTION_PROMPT": _PROMPT,
    "XLORA": _INPUT,
    "POLY": _INPUT,
    "LILY": _INPUT,
    "SHADOW": ("it runs a second model beside the base", "serve it with PEFT"),
    "PSOFT": _DECOMPOSED,
    "OSF": _DECOMPOSED,
    "FROD": _DECOMPOSED,
    "ADAMSS": _DECOMPOSED,
}


def own_sizes(term: Tuned, outputs: int, inputs: int) -> list[tuple[str, int, int]]:
    """(what, found, expected) for each dimension that must be the module's own (out, in)."""
    expected = {OUT: outputs, IN: inputs}
    checks = []
    for tensor in term.tensors:
        part = tensor.name.rpartition(term.path + ".")[2]
        sizes = TUNERS[term.kind].sizes.get(part, ())
        for size, dimension in zip(tensor.shape, sizes, strict=False):
            if dimension is not None:
                checks.append((f"{part} with {{}} {dimension}", size, expected[dimension]))
    return checks
