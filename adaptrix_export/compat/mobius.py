"""What mobius-onnx does not offer by a public name."""

from __future__ import annotations

from typing import Any


def module_config(config: Any, module_class: Any) -> Any:
    """The config of a mobius module of `module_class`, from a live config of transformers.

    Seen in mobius-onnx 0.1.0, whose public entry points read a config from the model hub alone.
    Without it the native front end cannot build a model from a local config.json.
    """
    from mobius._config_resolver import _config_from_hf

    return _config_from_hf(config, module_class=module_class)
