"""Which execution providers a session runs on: the best that this machine has, or the one named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaptrix_export.errors import SourceError


@dataclass(frozen=True)
class Provider:
    """`name` as ONNX Runtime says it; `device` is where its tensors live."""

    name: str
    device: str
    package: str


# Best first. Every list that ONNX Runtime is given ends in the CPU, which takes what is left over.
PROVIDERS = {
    "cuda": Provider("CUDAExecutionProvider", "cuda", "onnxruntime-gpu"),
    "cpu": Provider("CPUExecutionProvider", "cpu", "onnxruntime"),
}
AUTO = "auto"
CPU = PROVIDERS["cpu"]


def requested_providers(provider: str, available: Sequence[str]) -> tuple[Provider, ...]:
    """The providers to ask ONNX Runtime for, best first, the CPU last.

    Raises SourceError for an unknown name or a provider that the installed runtime lacks.
    """
    if provider == AUTO:
        return tuple(p for p in PROVIDERS.values() if p.name in available or p is CPU)
    chosen = PROVIDERS.get(provider)
    if chosen is None:
        raise SourceError("provider", repr(provider), f"{AUTO}, {', '.join(PROVIDERS)}")
    if chosen.name not in available:
        raise provider_unavailable(provider, chosen, available)
    return (chosen,) if chosen is CPU else (chosen, CPU)


def provider_unavailable(provider: str, chosen: Provider, available: Sequence[str]) -> SourceError:
    """The error for a provider that ONNX Runtime does not have or could not start."""
    return SourceError(
        f"provider {provider}", f"ONNX Runtime runs on {', '.join(available)}", chosen.name,
        f"install {chosen.package} and its drivers, or use provider auto",
    )  # fmt: skip
