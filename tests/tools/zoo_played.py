"""How the zoo asks a published artifact, and what the live model says to the same.

Nothing of the package's own checks is used: a session of ONNX Runtime fed by hand, or transformers
on the merged checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adaptrix_export.arch.tasks import GENERATION, SEQ2SEQ, TASKS

Rows = Sequence[Sequence[int]]
Case = tuple[str, Callable[[Any], np.ndarray], Callable[[], np.ndarray]]


def played(task: str, target: str, out: Path, rows: Rows, steps: int) -> Iterator[Case]:
    """(name, what to ask a live model, how the artifact answers) of each case."""
    if target == "safetensors":
        yield from _checkpoint(task, out, rows)
    elif task == GENERATION:
        yield from _generation(Session(out), rows, steps)
    elif task == SEQ2SEQ:
        yield from _translation(out, rows, steps)
    else:
        yield from _encoded(Session(out), task, rows)


class Session:
    """ONNX Runtime on one thread."""

    def __init__(self, folder: Path, file: str = "model.onnx") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._run = onnxruntime.InferenceSession(
            str(folder / file), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {i.name: i for i in self._run.get_inputs()}
        self.outputs = [o.name for o in self._run.get_outputs()]

    def __call__(self, **fed: Any) -> dict[str, np.ndarray]:
        given = {name: value for name, value in fed.items() if name in self.inputs}
        missing = set(self.inputs) - set(given)
        assert not missing, f"inputs beyond the interface: {sorted(missing)}"
        return dict(zip(self.outputs, self._run.run(None, given), strict=True))

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """A cache of no tokens."""
        return {
            name: np.zeros(
                [batch, *(n if isinstance(n, int) else 0 for n in value.shape[1:])], np.float32
            )
            for name, value in self.inputs.items()
            if name.startswith("past_key_values.")
        }


def _after(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.replace("present.", "past_key_values.", 1): value
        for name, value in found.items()
        if name.startswith("present.")
    }


def _generation(session: Session, rows: Rows, steps: int) -> Iterator[Case]:
    yield "prefill", lambda m: _causal(m, rows[:1]), lambda: _decode(session, rows[:1], 0, False)
    yield "decode", lambda m: _causal(m, rows[:1]), lambda: _decode(session, rows[:1], 15, False)
    for left in (True, False):
        name = f"{'left' if left else 'right'}-padded"
        yield (
            name,
            lambda m: _causal(m, rows),
            lambda left=left: _decode(session, rows, steps, left),
        )


def _causal(model: Any, rows: Rows) -> np.ndarray:
    """Logits of each row alone, without a cache: (tokens of all rows, vocabulary)."""
    with torch.inference_mode():
        found = [model(input_ids=torch.tensor([list(r)]), use_cache=False).logits[0] for r in rows]
    return torch.cat(found).float().numpy()


def padded(rows: Rows, left: bool, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, both (rows, longest)."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for r, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[r, start : start + len(row)], mask[r, start : start + len(row)] = row, 1
    return ids, mask


def _decode(session: Session, rows: Rows, steps: int, left: bool) -> np.ndarray:
    """All but the last `steps` tokens of each row in one padded batch, then one by one."""
    heads = [list(row[: len(row) - steps]) for row in rows]
    ids, mask = padded(heads, left, pad=2)
    cache, parts = session.empty(len(rows)), [[] for _ in rows]
    for step in range(steps + 1):
        if step:
            ids = np.array([[row[len(row) - steps + step - 1]] for row in rows])
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        found = session(input_ids=ids, attention_mask=mask, position_ids=positions, **cache)
        cache = _after(found)
        new = mask[:, -ids.shape[1] :]
        for r in range(len(rows)):
            parts[r].append(found["logits"][r][new[r] == 1])
    return np.concatenate([p for row in parts for p in row])


def _encoded(session: Session, task: str, rows: Rows) -> Iterator[Case]:
    """Rows alone and in padded batches; each against the live model on the very same input."""
    batches = {"prefill": padded(rows[:1], False, 2)}
    batches |= {"left-padded": padded(rows, True, 2), "right-padded": padded(rows, False, 2)}
    for name, (ids, mask) in batches.items():
        yield (
            name,
            lambda m, ids=ids, mask=mask: _live_encoded(m, ids, mask),
            lambda ids=ids, mask=mask: _only(
                session(
                    input_ids=ids, attention_mask=mask, token_type_ids=types_of(ids)
                ), mask
            ),
        )  # fmt: skip


def types_of(ids: np.ndarray) -> np.ndarray:
    types = np.zeros_like(ids)
    types[:, ids.shape[1] // 2 :] = 1
    return types


def _only(found: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    values = found.get("logits", found.get("last_hidden_state"))
    assert values is not None
    return values[mask == 1] if values.ndim == 3 else values


def _live_encoded(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    fed = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        fed["token_type_ids"] = torch.from_numpy(types_of(ids))
    with torch.inference_mode():
        out = model(**fed)
    name = "logits" if "logits" in out else "last_hidden_state"
    return _only({name: out[name].float().numpy()}, mask)


def _checkpoint(task: str, out: Path, rows: Rows) -> Iterator[Case]:
    """The merged checkpoint in transformers, one row."""
    auto = getattr(transformers, TASKS[task].auto)
    merged = auto.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    ids, mask = padded(rows[:1], False, 2)
    if task == GENERATION:
        yield "prefill", lambda m: _causal(m, rows[:1]), lambda: _causal(merged, rows[:1])
    elif task == SEQ2SEQ:
        yield (
            "forced",
            lambda m: _forced(m, rows, rows[-1]),
            lambda: _forced(merged, rows, rows[-1]),
        )
    else:
        yield (
            "prefill", lambda m: _live_encoded(m, ids, mask),
            lambda: _live_encoded(merged, ids, mask),
        )  # fmt: skip


def _forced(model: Any, rows: Rows, told: Sequence[int]) -> np.ndarray:
    """Decoder logits for the tokens `told`, given each row: (tokens, vocabulary)."""
    answer = torch.tensor([list(told)])
    with torch.inference_mode():
        found = [
            model(input_ids=torch.tensor([list(row)]), decoder_input_ids=answer).logits[0]
            for row in rows
        ]
    return torch.cat(found).float().numpy()


def _translation(out: Path, rows: Rows, steps: int) -> Iterator[Case]:
    """Encoder once, decoder with its cache; alone, and in a batch padded on the right."""
    encoder, decoder = Session(out, "encoder_model.onnx"), Session(out, "decoder_model_merged.onnx")

    def answer(batch: Rows) -> np.ndarray:
        ids, mask = padded(batch, False, 2)
        states = encoder(input_ids=ids, attention_mask=mask)["last_hidden_state"]
        tokens, parts, cache = list(rows[-1]), [], decoder.empty(len(batch))
        for chunk in (tokens[:-steps], *([t] for t in tokens[-steps:])):
            found = decoder(
                input_ids=np.array([chunk] * len(batch)), encoder_hidden_states=states,
                encoder_attention_mask=mask, **cache,
            )  # fmt: skip
            cache = cache | _after(found)
            parts.append(found["logits"])
        return np.concatenate(np.concatenate(parts, axis=1))

    yield "alone", lambda m: _forced(m, rows[:1], rows[-1]), lambda: answer(rows[:1])
    yield "right-padded", lambda m: _forced(m, rows, rows[-1]), lambda: answer(rows)
