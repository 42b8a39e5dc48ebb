"""The step of a lowering that quantizes its graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from adaptrix_export.graph.graph import Graph
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.plan import Plan
from adaptrix_export.precision.quantize import Piece, PieceStore, Quantized, Read, quantize
from adaptrix_export.precision.settings import GPTQ, LOSSLESS, Quantization
from adaptrix_export.precision.stored import stored_blocks
from adaptrix_export.progress import Progress


@contextmanager
def quantizing(
    settings: Quantization | None,
    graphs: Mapping[str, Graph],
    plan: Plan,
    read: Read,
    progress: Progress,
) -> Iterator[Quantized]:
    """The graphs quantized as `settings` say, or as they are without any; their initializers can
    be read inside the block."""
    if settings is None:
        yield Quantized(graphs, {}, {})
        return
    with scratch_folder("blocks") as folder:
        solve = None
        if settings.method == GPTQ:
            from adaptrix_export.passes.quantize.calibrate import Calibrated  # needs PyTorch

            assert settings.calibration is not None

            solve = Calibrated(plan, settings.calibration, progress).solve
        elif settings.method == LOSSLESS:
            solve = partial(_keep_stored, plan)
        yield quantize(graphs, plan, read, settings, folder, progress, solve)


def _keep_stored(plan: Plan, pieces: Sequence[Piece], store: PieceStore) -> None:
    for piece in pieces:
        store.put(piece.key, stored_blocks(plan, piece.expression, piece.spec), LOSSLESS)
