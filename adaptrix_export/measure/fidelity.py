"""What a redistribution kept of the adapter, measured on text that no strategy has seen.

See `divergence.py` for the figures; beside them stands the residual after each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.measure.divergence import Divergence, rounded
from adaptrix_export.oracle.layered import ADAPTED, BASE, STUDENT, Live, States

if TYPE_CHECKING:
    from adaptrix_export.measure.calibration import Ids
    from adaptrix_export.progress import Progress

ALL = (BASE, STUDENT, ADAPTED)
Residuals = dict[str, list[float]]  # |difference|^2 over |adapted|^2 after each layer, summed


def measure(live: Live, ids: Ids, task: str, progress: Progress) -> dict[str, Any]:
    """The figures for the student as it is now attached, and the residual after each layer.

    `residual_before` and `residual_after` are root mean squares over tokens of
    |h - adapted h| / |adapted h|, for the base and for the redistributed adapter. Layer by layer
    over all rows, whose residuals lie in files, so that each layer is read once where memory does
    not hold the model.
    """
    total = Divergence((BASE, STUDENT), task)
    residuals: Residuals = {who: [0.0] * len(live.layers) for who in (BASE, STUDENT)}
    shape = (ids.shape[0], ids.shape[1], live.width)
    with (
        scratch_folder("fidelity") as folder,
        progress.stage("fidelity", len(live.layers) + len(ids), "steps") as advance,
        torch.no_grad(),
    ):
        states = {who: States(folder, f"{who}.f32", shape) for who in ALL}
        for who, row, ids_of_row in ((w, r, i) for w in ALL for r, i in _rows(live, ids)):
            states[who].write(row, live.enter(ids_of_row, who))
        for number in range(len(live.layers)):
            for row in range(len(ids)):
                _pass_layer(live, number, row, states, residuals)
            advance(1)
        for row, ids_of_row in _rows(live, ids):
            # a row at a time: three sets of logits, each tokens times vocabulary
            total.add(ids_of_row, _answers(live, row, ids_of_row, states))
            advance(1)
    return _figures(total, residuals)


def _rows(live: Live, ids: Ids) -> Iterator[tuple[int, Tensor]]:
    for row in range(len(ids)):
        yield row, torch.from_numpy(ids[row : row + 1]).to(live.device)


def _pass_layer(
    live: Live, number: int, row: int, states: dict[str, States], residuals: Residuals
) -> None:
    """Move all three models past a layer, and add what is left after it to `residuals`."""
    after = {}
    for who, state in states.items():
        after[who] = live.layer(who, number, state.read(row, row + 1, live.device))
        state.write(row, after[who])
    size = after[ADAPTED].square().sum(-1)
    for who, sums in residuals.items():
        sums[number] += float(((after[who] - after[ADAPTED]).square().sum(-1) / size).sum())


def _answers(live: Live, row: int, ids: Tensor, states: dict[str, States]) -> dict[str, Tensor]:
    """The three models' answers to a row, from the residual after the last layer."""
    return {
        who: live.leave(ids, state.read(row, row + 1, live.device), who)
        for who, state in states.items()
    }


def _figures(total: Divergence, residuals: Residuals) -> dict[str, Any]:
    agreement = total.agreement_name
    figures: dict[str, Any] = {
        "measure": total.measure,
        "tokens": total.tokens,
        "kl": total.kl(STUDENT),
        "kl_base": total.kl(BASE),
        "retained": total.retained(STUDENT),
        agreement: total.agreement(STUDENT),
        f"{agreement}_base": total.agreement(BASE),
    }
    loss = total.loss()
    if loss:
        figures["loss"] = {who: rounded(value) for who, value in loss.items()}
        figures["gain"] = total.gain(STUDENT)
    for name, who in (("residual_before", BASE), ("residual_after", STUDENT)):
        figures[name] = [rounded((value / total.tokens) ** 0.5) for value in residuals[who]]
    return figures
