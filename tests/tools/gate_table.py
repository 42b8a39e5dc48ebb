"""Do gates reduce forgetting? A table, for a real adapter on a real model.

    make gates
    python -m tests.tools.gate_table [--adapter FOLDER] [--strategies fit,distill]

The adapter is the one of `tests/fidelity.py`; it is measured as it is and redistributed onto five
layers. In-domain loss is that of topics of the Python documentation which the adapter was not
trained on. Out of domain there are two texts: what the base itself writes, sampled with a seed from
openings of other kinds of text, and the READMEs of installed packages. Where the adapted model
finds these less likely than the base did, it forgot. All in nats a token; `retained` is the share
of the whole adapter's in-domain gain that is left.

Beside each clamp stands the same adapter scaled down until its in-domain loss is the clamp's, and
measured there: the clamp helps only where its out-of-domain loss is the lower one. The standard
error beside the difference is over the rows of text, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.measure.calibration import Calibration
from adaptrix_export.oracle.gated import LiveGates
from adaptrix_export.oracle.job import GateSpec
from adaptrix_export.oracle.reference import load_model, with_adapters
from adaptrix_export.passes.context import pass_context
from adaptrix_export.passes.redistribute.redistribute import Redistribute
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from tests.tools.fidelity import BASE, HOME, out_of_domain, trained_adapter

TAUS = (0.05, 0.1, 0.25, 0.5, 1.0)
LAYERS = 5
SCALES = (0.25, 0.5, 0.75, 1.0)  # measured first; between them, where a clamp asks for it
NEAR = 0.001  # nats: how close the scaled adapter's in-domain loss is to the clamp's
TRIES = 4
ROWS, LENGTH = 12, 256
INSIDE, OWN, READMES = "in domain", "base's own text", "READMEs"
OUTSIDE = (OWN, READMES)
OPENINGS = (
    "Once upon a time, in a small village by the sea,", "The recipe for a good vegetable soup is",
    "Dear Mr. Thompson, I am writing to you because", "In 1789, the people of Paris",
    "The heart is a muscle that", "My grandmother always said that",
    "To the north of the mountains lies", "The score was level when",
    "Scientists have found that sleep", "Question: Why is the sky blue? Answer:",
    "The best way to learn to play the piano is", "It was raining, and the last bus",
)  # fmt: skip
Rows = Sequence[torch.Tensor]
Losses = dict[str, NDArray[np.float64]]  # by text: one number a row


def rows_inside(tokenizer: Any, rows: int, length: int) -> Rows:
    """Held-out topics: every tenth, as the adapter's training left them out."""
    text = [topics[name] for name in sorted(topics)[::10]]
    return _cut([i for t in text for i in (*tokenizer(t).input_ids, tokenizer.eos_token_id)],
                rows, length)  # fmt: skip


def rows_of_readmes(tokenizer: Any, rows: int, length: int) -> Rows:
    """Evenly spread over the text, so that every package has its part."""
    ids = tokenizer(out_of_domain().read_text(encoding="utf-8")).input_ids
    pieces = _cut(ids, len(ids) // length, length)
    return [pieces[i * len(pieces) // rows] for i in range(rows)]


def _cut(ids: list[int], rows: int, length: int) -> Rows:
    return list(torch.tensor(ids[: rows * length]).view(rows, length))


@torch.inference_mode()
def rows_of_base(model: Any, tokenizer: Any, rows: int, length: int) -> Rows:
    """What the base writes after each opening, sampled at temperature 1 from a fixed seed."""
    torch.manual_seed(0)
    asked = tokenizer(list(OPENINGS[:rows]), return_tensors="pt", padding=True)
    drawn = model.generate(
        **asked, do_sample=True, top_k=0, temperature=1.0, min_new_tokens=length,
        max_new_tokens=length, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pads = (1 - asked.attention_mask).sum(1).tolist()
    return [row[first : first + length] for row, first in zip(drawn, pads, strict=True)]


@dataclass
class Adapted:
    """A live adapter that can be scaled and clamped; what was measured is kept, by scale."""

    plain: Any
    texts: Mapping[str, Rows]
    curve: dict[float, Losses] = field(default_factory=dict)

    def losses(self, names: Sequence[str]) -> Losses:
        with torch.inference_mode():
            return {
                name: np.array([
                    self.plain(input_ids=row[None], labels=row[None]).loss.item()
                    for row in self.texts[name]
                ])
                for name in names
            }  # fmt: skip

    def scaled(self, scale: float, names: Sequence[str]) -> Losses:
        """The adapter times `scale`, on these texts; each text once."""
        known = self.curve.setdefault(scale, {})
        missing = [name for name in names if name not in known]
        layers = list(self._layers().values())
        for layer in layers:
            layer.scale_layer(scale)
        try:
            known.update(self.losses(missing))
        finally:
            for layer in layers:
                layer.unscale_layer()  # to what its config says
        return known

    def clamped(self, tau: float) -> Losses:
        gates = LiveGates(self.plain, [GateSpec(s, "clamp", tau=tau) for s in self._layers()])
        try:
            return self.losses(tuple(self.texts))
        finally:
            gates.remove()
            gates.forget()

    def scale_with(self, loss: float) -> float:
        """The least scale whose in-domain loss is within NEAR of this, or the best scale."""
        scale = self._guess(loss)
        for _ in range(TRIES):
            if abs(_mean(self.scaled(scale, [INSIDE])[INSIDE]) - loss) <= NEAR:
                break
            scale = self._guess(loss)
        return scale

    def _guess(self, loss: float) -> float:
        """Linearly between the scales measured, or the best of them where none is that good."""
        points = sorted((scale, _mean(found[INSIDE])) for scale, found in self.curve.items())
        for (low, above), (high, below) in pairwise(points):
            if below <= loss <= above:
                return round(float(np.interp(-loss, [-above, -below], [low, high])), 4)
        return min(points, key=lambda point: point[1])[0]

    def _layers(self) -> dict[str, Any]:
        found = self.plain.named_modules()
        return {name: m for name, m in found if hasattr(m, "lora_A") and len(m.lora_A)}


@contextmanager
def adapted(model: Any, folder: Path, texts: Mapping[str, Rows], base: Losses) -> Iterator[Adapted]:
    """The adapter on the model, which is the base alone again afterwards."""
    peft = with_adapters(model, ((folder.name, folder),)).eval()
    try:
        yield Adapted(peft.get_base_model(), texts, {0.0: dict(base)})
    finally:
        peft.unload()


def redistributed(adapter: Path, strategy: str) -> Path:
    """The adapter on LAYERS layers, as a PEFT folder; made once."""
    folder = HOME / f"{adapter.name}-{strategy}-{LAYERS}"
    if not (folder / "adapter_config.json").exists():
        base = open_base(BASE)
        plan = Plan(base, (open_adapter(str(adapter), base),))
        with pass_context(Silent()) as context:
            step = Redistribute(
                LAYERS, strategy, calibration=Calibration("pydoc", 8192, 256), context=context
            )
            moved = step(plan).adapters[0]
            shutil.copytree(moved.folder, folder)
    return folder


def measured(
    name: str, one: Adapted, show: Callable[[str], None]
) -> tuple[dict[float, Losses], dict[float, float]]:
    """What each tau gives, and the scale of the adapter that has the same in-domain loss."""
    for scale in SCALES:
        one.scaled(scale, [INSIDE])
    one.scaled(1.0, tuple(one.texts))
    clamps, scales = {}, {}
    for tau in TAUS:
        clamps[tau] = one.clamped(tau)
        scales[tau] = one.scale_with(_mean(clamps[tau][INSIDE]))
        one.scaled(scales[tau], tuple(one.texts))
        show(f"{name}: tau {tau:g} measured, and the adapter times {scales[tau]:g}")
    return clamps, scales


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def table(
    name: str, one: Adapted, clamps: Mapping[float, Losses], scales: Mapping[float, float],
    gain: float,
) -> Iterator[str]:  # fmt: skip
    """Markdown; `gain` is the in-domain gain of the whole adapter."""
    base = one.curve[0.0]

    def line(what: str, found: Losses, more: str = "") -> str:
        inside = _mean(found[INSIDE])
        retained = (_mean(base[INSIDE]) - inside) / gain
        outside = (f"{_mean(found[n]):.4f} ({np.exp(_mean(found[n])):.2f})" for n in OUTSIDE)
        return f"| {what} | {inside:.4f} | {retained:.3f} | {' | '.join(outside)} | {more} |"

    yield f"\n{name}\n"
    outside = " | ".join(f"{text} (ppl)" for text in OUTSIDE)
    yield f"| | {INSIDE} | retained | {outside} | clamp - scaled |"
    yield "|---|---|---|---|---|---|"
    yield line("base", base)
    yield line("adapter", one.curve[1.0])
    for tau, found in clamps.items():
        same = one.curve[scales[tau]]
        yield line(
            f"clamp {tau:g}", found, ", ".join(f"{n} {told(found[n], same[n])}" for n in OUTSIDE)
        )
        yield line(f"times {scales[tau]:g}", same)


def told(clamped: NDArray[np.float64], scaled: NDArray[np.float64]) -> str:
    """The difference of two losses over the same rows, its standard error, and what it means."""
    off = clamped - scaled
    error = float(off.std(ddof=1) / np.sqrt(len(off))) if len(off) > 1 else float("inf")
    mean = _mean(off)
    if abs(mean) <= max(2 * error, NEAR):
        verdict = "no difference"
    else:
        verdict = "clamp better" if mean < 0 else "scaling better"
    return f"{mean:+.4f} +- {error:.4f} ({verdict})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="by default the one of make fidelity")
    parser.add_argument("--strategies", default="fit", help="of redistribution, comma-separated")
    parser.add_argument("--rows", type=int, default=ROWS, help="of each text")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a row")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    adapter = args.adapter or trained_adapter()
    base = open_base(BASE)
    tokenizer = AutoTokenizer.from_pretrained(
        base.folder, gguf_file=base.gguf_file, padding_side="left"
    )
    model = load_model(base.folder, base.gguf_file)
    size = (args.rows, args.length)
    texts = {
        INSIDE: rows_inside(tokenizer, *size),
        OWN: rows_of_base(model, tokenizer, *size),
        READMES: rows_of_readmes(tokenizer, *size),
    }
    plain = Adapted(model, texts).losses(tuple(texts))
    gain, numbers = 0.0, {}
    for strategy in ("", *filter(None, args.strategies.split(","))):
        name = f"{LAYERS} layers, {strategy}" if strategy else "the whole adapter"
        folder = redistributed(adapter, strategy) if strategy else adapter
        with adapted(model, folder, texts, plain) as one:
            clamps, scales = measured(name, one, lambda line: print(line, flush=True))
            gain = gain or _mean(plain[INSIDE] - one.curve[1.0][INSIDE])
            print("\n".join(table(name, one, clamps, scales, gain)), flush=True)
            numbers[name] = {
                "scaled": {scale: _listed(found) for scale, found in one.curve.items()},
                "clamped": {tau: _listed(found) for tau, found in clamps.items()},
                "same": scales,
            }
        if args.json:
            args.json.write_text(json.dumps(numbers, indent=1))


def _listed(found: Losses) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in found.items()}


if __name__ == "__main__":
    main()
