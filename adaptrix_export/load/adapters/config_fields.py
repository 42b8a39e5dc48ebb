"""What the fields of an adapter_config.json may be, after the config classes of PEFT 0.21."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptrix_export.load.files.fields import (
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    SIZE,
    SIZE_OR_ZERO,
    TEXT,
    TEXTS,
    WHOLE,
    Kind,
    check_fields,
    list_of,
    map_of,
)

_PATHS = TEXT | TEXTS
_FEW_PATHS = TEXT | list_of(TEXT, 1000)  # each is compared with every path of the model
ADAPTER_FIELDS: dict[str, Kind] = {
    "alpha_pattern": map_of(NUMBER),
    "auto_mapping": OBJECT,
    "base_model_name_or_path": TEXT,
    "bias": TEXT,
    "exclude_modules": _FEW_PATHS,
    "fan_in_fan_out": FLAG,
    "inference_mode": FLAG,
    "layer_replication": LIST,
    "layers_pattern": _FEW_PATHS,
    "layers_to_transform": WHOLE | list_of(WHOLE),
    "lora_alpha": NUMBER,
    "lora_bias": FLAG,
    "lora_dropout": NUMBER,
    "modules_to_save": _FEW_PATHS,
    "peft_type": TEXT,
    "peft_version": TEXT,
    "r": SIZE_OR_ZERO,  # 0 in an OFT config that names the size of its blocks
    "rank_pattern": map_of(SIZE),
    "revision": TEXT,
    "target_modules": _PATHS,
    "target_parameters": TEXTS,
    "task_type": TEXT,
    "trainable_token_indices": list_of(WHOLE) | map_of(list_of(WHOLE)),
    "use_dora": FLAG,
    "use_rslora": FLAG,
}


def check_adapter_config(place: str, config: Mapping[str, Any]) -> None:
    """Raise SourceError for a field of another type than PEFT writes."""
    check_fields(place, config, ADAPTER_FIELDS)
    if config.get("peft_type", "LORA") == "LORA":
        check_fields(place, config, {"r": SIZE})
