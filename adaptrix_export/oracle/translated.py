"""The ways in which an encoder-decoder is asked, and the artifact of one in its runtime.

What the encoder is given is a source: token ids and their mask, or the features of speech.

Positions may count pads, so a padded batch is compared with the same batch of the reference. What
the decoder is fed is the same on both sides: a text, or the reference's own greedy tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from adaptrix_export.compat.transformers import cache_argument, cache_of
from adaptrix_export.errors import ParityError
from adaptrix_export.oracle.compare import Logits
from adaptrix_export.oracle.encoded import padded_rows
from adaptrix_export.oracle.prompts import Prompts
from adaptrix_export.runtime.layout import located

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
_PAST = "past_key_values."
Chunks = Sequence[Sequence[int]]
Source = Mapping[str, NDArray[Any]]


class Translating(Protocol):
    """What answers for an encoder-decoder: the reference, or an artifact."""

    def states(self, source: Source) -> Logits:
        """The encoder's last hidden states (rows, tokens, width)."""
        ...

    def translate(self, source: Source, chunks: Chunks) -> Logits:
        """Decoder logits (rows, all tokens of `chunks`, vocabulary), fed chunk after chunk through
        the cache; every row is fed the same."""
        ...


class LiveTranslator:
    """A transformers model, or PEFT's around one."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def states(self, source: Source) -> Logits:
        import torch

        with torch.inference_mode():
            output = self._model.get_encoder()(**_as_torch(source))
        return cast(Logits, output.last_hidden_state.float().numpy())

    def translate(self, source: Source, chunks: Chunks) -> Logits:
        import torch

        fed, rows = _as_torch(source), rows_of(source)
        logits, cache = [], None
        with torch.inference_mode():
            for chunk in chunks:
                tokens = torch.tensor([list(chunk)] * rows)
                out = self._model(
                    **fed, decoder_input_ids=tokens, **cache_argument(cache), use_cache=True
                )
                cache = cache_of(out)
                logits.append(out.logits.float().numpy())
        return np.concatenate(logits, axis=1)

    def greedy(self, source: Source, steps: int) -> tuple[list[int], Logits]:
        """The tokens fed, the start token first, and the logits (steps, vocabulary) they gave."""
        import torch

        start = self._model.config.decoder_start_token_id
        if start is None:
            raise ParityError("config.json", "no decoder_start_token_id", "the token to start with")
        tokens, logits, cache = [int(start)], [], None
        fed = _as_torch(source)
        with torch.inference_mode():
            for _ in range(steps):
                out = self._model(
                    **fed,
                    decoder_input_ids=torch.tensor([[tokens[-1]]]),
                    **cache_argument(cache),
                    use_cache=True,
                )
                cache = cache_of(out)
                logits.append(out.logits[0, -1].float().numpy())
                tokens.append(int(logits[-1].argmax()))
        return tokens[:-1], np.stack(logits)


class OnnxTranslator:
    """Two sessions of ONNX Runtime on the CPU."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._encoder, self._decoder = (
            ort.InferenceSession(
                str(located(folder, file)), options, providers=["CPUExecutionProvider"]
            )
            for file in (ENCODER, DECODER)
        )

    def states(self, source: Source) -> Logits:
        return np.asarray(self._encoder.run(["last_hidden_state"], dict(source))[0], np.float32)

    def translate(self, source: Source, chunks: Chunks) -> Logits:
        rows = rows_of(source)
        offered = {
            "encoder_hidden_states": self.states(source),
            "encoder_attention_mask": source.get("attention_mask"),
        }
        accepted = {value.name for value in self._decoder.get_inputs()}
        fed = {name: value for name, value in offered.items() if name in accepted}
        fed |= self._empty(rows)
        names = [value.name for value in self._decoder.get_outputs()]
        logits = []
        for chunk in chunks:
            fed["input_ids"] = np.array([list(chunk)] * rows, np.int64)
            out = dict(zip(names, self._decoder.run(None, fed), strict=True))
            logits.append(np.asarray(out["logits"], np.float32))
            fed |= {
                name.replace("present.", _PAST, 1): value
                for name, value in out.items()
                if name.startswith("present.")
            }
        return np.concatenate(logits, axis=1)

    def _empty(self, rows: int) -> dict[str, Any]:
        """A cache of no tokens."""
        return {
            value.name: np.zeros(
                [rows, *(n if isinstance(n, int) else 0 for n in value.shape[1:])], np.float32
            )
            for value in self._decoder.get_inputs()
            if value.name.startswith(_PAST)
        }


def rows_of(source: Source) -> int:
    return len(next(iter(source.values())))


def _as_torch(source: Source) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(value) for name, value in source.items()}


def one_row(tokens: Sequence[int]) -> Source:
    ids = np.array([list(tokens)], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def batch(prompts: Prompts, left: bool) -> Source:
    """The ragged batch of texts, padded on one side."""
    ids, mask = padded_rows(prompts, left=left)
    return {"input_ids": ids, "attention_mask": mask}


def source_of(prompts: Prompts, tokens: Sequence[int]) -> Source:
    """One row: what was drawn for a model that reads no text, else `tokens`."""
    return prompts.drawn.get("alone") or one_row(tokens)


def translate_states(model: Translating, prompts: Prompts) -> Logits:
    source = prompts.drawn.get("batch") or batch(prompts, left=False)
    states, mask = model.states(source), source.get("attention_mask")
    return cast(Logits, np.concatenate(states) if mask is None else states[mask == 1])


def translate_batch(model: Translating, prompts: Prompts) -> Logits:
    """Several rows of what was drawn."""
    return np.concatenate(model.translate(prompts.drawn["batch"], [prompts.decode]))


def translate_prefill(model: Translating, prompts: Prompts) -> Logits:
    source = source_of(prompts, prompts.prefill)
    return cast(Logits, model.translate(source, [prompts.decode])[0])


def translate_chunked(model: Translating, prompts: Prompts) -> Logits:
    cut = max(1, len(prompts.decode) * 3 // 5)
    chunks = [prompts.decode[:cut], prompts.decode[cut:]]
    source = source_of(prompts, prompts.prefill)
    return cast(Logits, model.translate(source, [c for c in chunks if c])[0])


def translate_left_padded(model: Translating, prompts: Prompts) -> Logits:
    return np.concatenate(model.translate(batch(prompts, left=True), [prompts.decode]))


def translate_right_padded(model: Translating, prompts: Prompts) -> Logits:
    return np.concatenate(model.translate(batch(prompts, left=False), [prompts.decode]))
