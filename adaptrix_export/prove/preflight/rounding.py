"""How far float32 alone takes a small model's logits, measured in PyTorch itself.

Most replicas are off by 1e-6. A few amplify rounding (attention whose scores are not scaled:
GPT-Neo, Granite at its default), and a right graph is then as far from PyTorch as PyTorch is from
itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptrix_export.arch.tasks import SEQ2SEQ, TASKS

TOKENS, ROWS = 48, 2


def rounding(folder: Path, task: str) -> float:
    """The largest difference of logits between float32 and float64 weights; 0 for translators."""
    import torch
    import transformers

    if task == SEQ2SEQ:
        return 0.0
    auto: Any = getattr(transformers, TASKS[task].auto)
    ids = torch.randint(3, 250, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    answers = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float64):
            model = auto.from_pretrained(folder, dtype=dtype).eval()
            answers.append(model(input_ids=ids)[0].double())
    return float((answers[0] - answers[1]).abs().max())
