"""Front door of the loaders: bases and adapters by their spec, headers only."""

from adaptrix_export.load.formats import open_adapter
from adaptrix_export.load.open_base import open_base
from adaptrix_export.load.reading import Reading

__all__ = ["Reading", "open_adapter", "open_base"]
