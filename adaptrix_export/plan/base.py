"""A base model, read from headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrix_export.plan.tensor import Tensor

if TYPE_CHECKING:
    from adaptrix_export.arch.architecture import Architecture
    from adaptrix_export.arch.skeleton import Skeleton


@dataclass(frozen=True)
class Base:
    """A base model, read from headers only.

    `tensors` are named as transformers names them, in file order, whatever the file format.
    `tied` maps a tensor name to the stored tensor that it shares (`lm_head.weight` ->
    `model.embed_tokens.weight`); the first is then usually absent from `tensors`.
    """

    spec: str
    folder: Path
    gguf_file: str | None  # file name inside `folder` when the base is a GGUF file
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    tied: Mapping[str, str]
    task: str = "text-generation"  # decides the live model, and with it every name
    # Stored tensors that the live model of this task does not have (another head): left unchanged.
    unseen: tuple[Tensor, ...] = ()
    # `tensors` are not one to one those of the files (repeated layers, dequantized weights).
    rebuilt: bool = False
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    # Read from the model's class (`arch/skeleton.py`), for a type or a task without a family row.
    skeleton: Skeleton | None = field(default=None, repr=False, compare=False)
    lacking: tuple[str, ...] = ()  # parameters of the live model that no file has
    # Quantization of the files, and the quantization that plain files are read through; see
    # `base_weights.py`.
    quantization: str | None = None
    simulated: str | None = None
