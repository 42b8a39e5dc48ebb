"""Front door of the loaders: bases and adapters by their spec, headers only."""

from adaptrix_export.load.base_model import open_base
from adaptrix_export.load.peft_adapter import open_adapter

__all__ = ["open_adapter", "open_base"]
