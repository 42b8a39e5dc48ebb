"""How the zoo asks a published artifact, and what the live model says to the same.

Nothing of the package's own checks is used: a session of ONNX Runtime fed by hand, or transformers
on the merged checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adaptrix_export.arch.inputs import random_inputs
from adaptrix_export.arch.pieces import SEEN, pieces_of
from adaptrix_export.arch.task_table import VISION_LANGUAGE
from adaptrix_export.arch.tasks import GENERATION, TASKS, TEXT, TWO_PARTS, has_row
from adaptrix_export.runtime.layout import located

Rows = Sequence[Sequence[int]]
Case = tuple[str, Callable[[Any], np.ndarray], Callable[[], np.ndarray]]


def played(task: str, target: str, out: Path, rows: Rows, steps: int) -> Iterator[Case]:
    """(name, what to ask a live model, how the artifact answers) of each case."""
    saved = transformers.AutoConfig.from_pretrained(out)
    if task == VISION_LANGUAGE:
        yield from _seeing(out, saved, target)
    elif not has_row(json.loads((out / "config.json").read_text()), task):
        yield from _whole(task, out, saved, target)
    elif target == "safetensors":
        yield from _checkpoint(task, out, rows)
    elif task == GENERATION:
        yield from _generation(Session(out), rows, steps)
    elif task in TWO_PARTS:
        yield from _translation(task, out, rows, steps)
    else:
        yield from _encoded(Session(out), task, rows)


class Session:
    """ONNX Runtime on one thread."""

    def __init__(self, folder: Path, file: str = "model.onnx") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._run = onnxruntime.InferenceSession(
            str(located(folder, file)), options, providers=["CPUExecutionProvider"]
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
    elif task in TWO_PARTS:
        yield (
            "forced",
            lambda m: _forced(m, _sources(task, m, rows), rows[-1]),
            lambda: _forced(merged, _sources(task, merged, rows), rows[-1]),
        )
    else:
        yield (
            "prefill", lambda m: _live_encoded(m, ids, mask),
            lambda: _live_encoded(merged, ids, mask),
        )  # fmt: skip


def _sources(task: str, model: Any, rows: Rows) -> list[dict[str, Any]]:
    """What the encoder reads of each row: its text, or features drawn in its place."""
    if TASKS[task].inputs == TEXT:
        return [{"input_ids": torch.tensor([list(row)])} for row in rows]
    fed = random_inputs(TASKS[task].inputs, model.config, len(rows), seed=5)
    return [{n: torch.from_numpy(v[r : r + 1]) for n, v in fed.items()} for r in range(len(rows))]


def _forced(model: Any, sources: Sequence[Any], told: Sequence[int]) -> np.ndarray:
    """Decoder logits for the tokens `told`, given each source: (tokens, vocabulary)."""
    answer = torch.tensor([list(told)])
    with torch.inference_mode():
        found = [model(**source, decoder_input_ids=answer).logits[0] for source in sources]
    return torch.cat(found).float().numpy()


def _translation(task: str, out: Path, rows: Rows, steps: int) -> Iterator[Case]:
    """Encoder once, decoder with its cache; alone, and in a batch padded on the right."""
    config = transformers.AutoConfig.from_pretrained(out)
    speech = (
        None
        if TASKS[task].inputs == TEXT
        else random_inputs(TASKS[task].inputs, config, len(rows), 5)
    )
    encoder, decoder = Session(out, "encoder_model.onnx"), Session(out, "decoder_model_merged.onnx")

    def answer(batch: Rows) -> np.ndarray:
        ids, mask = padded(batch, False, 2)
        text = {"input_ids": ids, "attention_mask": mask}
        source = text if speech is None else {n: v[: len(batch)] for n, v in speech.items()}
        states = encoder(**source)["last_hidden_state"]
        tokens, parts, cache = list(rows[-1]), [], decoder.empty(len(batch))
        for chunk in (tokens[:-steps], *([t] for t in tokens[-steps:])):
            found = decoder(
                input_ids=np.array([chunk] * len(batch)), encoder_hidden_states=states,
                encoder_attention_mask=mask, **cache,
            )  # fmt: skip
            cache = cache | _after(found)
            parts.append(found["logits"])
        return np.concatenate(np.concatenate(parts, axis=1))

    yield (
        "alone",
        lambda m: _forced(m, _sources(task, m, rows)[:1], rows[-1]),
        lambda: answer(rows[:1]),
    )
    yield (
        "right-padded",
        lambda m: _forced(m, _sources(task, m, rows), rows[-1]),
        lambda: answer(rows),
    )


def _plain(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _called(model: Any, method: str, fed: dict[str, np.ndarray], field: str) -> np.ndarray:
    with torch.inference_mode():
        found = getattr(_plain(model), method)(**{n: torch.from_numpy(v) for n, v in fed.items()})
    return found[field].float().numpy()


def _whole(task: str, out: Path, config: Any, target: str) -> Iterator[Case]:
    """Three rows of drawn inputs in one call, every output of every graph."""
    name = config.architectures[0]
    kind = getattr(transformers, name)
    other = kind.from_pretrained(out, dtype=torch.float32).eval() if target != "onnx" else None
    for piece in pieces_of(config.model_type, task, name, kind.main_input_name):
        fed = random_inputs(piece.inputs, config, 3, seed=9)
        session = Session(out, piece.file) if target == "onnx" else None
        for output, field in piece.outputs.items():
            yield (
                f"{piece.file}: {output}",
                lambda m, p=piece, fed=fed, field=field: _called(m, p.method, fed, field),
                lambda p=piece, fed=fed, field=field, output=output, session=session: (
                    _called(other, p.method, fed, field) if session is None
                    else session(**fed)[output]
                ),
            )  # fmt: skip


def _seeing(out: Path, config: Any, target: str) -> Iterator[Case]:
    """An image between text, in one call of the live model, token by token of the artifact."""
    auto = transformers.AutoModelForImageTextToText
    other = auto.from_pretrained(out, dtype=torch.float32).eval() if target != "onnx" else None
    pixels = random_inputs(SEEN[config.model_type], config, 1, seed=9)
    images = pixels["pixel_values"].shape[1] if pixels["pixel_values"].ndim == 5 else 1
    places = images * _places(config)
    ids = np.random.default_rng(3).integers(3, VOCABULARY, (1, places + 10))
    ids[:, 4 : 4 + places] = config.image_token_id

    def asked(model: Any) -> np.ndarray:
        with torch.inference_mode():
            fed = {name: torch.from_numpy(value) for name, value in pixels.items()}
            return model(input_ids=torch.from_numpy(ids), **fed).logits[0].float().numpy()

    def answered() -> np.ndarray:
        if other is not None:
            return asked(other)
        names = ("embed_tokens.onnx", "vision_encoder.onnx", "decoder_model_merged.onnx")
        embed, look, decode = (Session(out, name) for name in names)
        states = embed(input_ids=ids)["inputs_embeds"].copy()
        states[0, 4 : 4 + places] = np.concatenate(look(**pixels)["image_features"])
        cache, parts = decode.empty(1), []
        for first, last in ((0, places + 6), *((i, i + 1) for i in range(places + 6, places + 10))):
            mask = np.ones((1, last), np.int64)
            found = decode(inputs_embeds=states[:, first:last], attention_mask=mask, **cache)
            cache = _after(found)
            parts.append(found["logits"][0])
        return np.concatenate(parts)

    yield "an image between text", asked, answered


def _places(config: Any) -> int:
    """Tokens that stand for one image: its patches, or squares of several of them."""
    side, patch = (
        n[0] if isinstance(n, (list, tuple)) else n
        for n in (config.vision_config.image_size, config.vision_config.patch_size)
    )
    merged = getattr(config, "scale_factor", None) or getattr(config, "downsample_factor", None)
    merged = merged or round(1 / getattr(config, "downsample_ratio", 1))
    return int((side // patch // merged) ** 2)


VOCABULARY = 290  # tokens of the rows that are drawn here, below those that stand for images
