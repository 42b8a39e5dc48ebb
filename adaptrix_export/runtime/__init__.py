"""Generation over ONNX Runtime; imports neither torch nor transformers."""

from adaptrix_export.runtime.sampling import Sampling
from adaptrix_export.runtime.session import Session

__all__ = ["Sampling", "Session"]
