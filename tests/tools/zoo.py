"""One random replica of each model type, adapted, built, and compared with the live PEFT model.

    python -m tests.tools.zoo [--only KIND,KIND] [--task TASK] [--target onnx|safetensors]
                        [--frontend auto|native|traced] [--jobs N] [--json FILE]

An animal is built through the real pipeline, proof included, with the front end that `auto`
chooses. What was published is then asked again, by code of this file's own: prefill, decoding with
the cache, batches padded on the left and on the right, against PEFT on the saved files. `exact` is
a largest difference of 1e-4, `refused` an error of exit code 2 that says what is missing; a build
that its own proof rejected is `rejected`, and anything published that is not exact is WRONG. The
last two make the command fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from adaptrix_export.arch.tasks import CLASSIFIERS, SPEECH, TASKS, TEXT, TWO_PARTS
from adaptrix_export.errors import InputError, ProofError
from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from tests.tools.matrix import _quiet as quiet
from tests.tools.zoo_played import played
from tests.tools.zoo_rows import ANIMALS, VOCAB, Animal

TARGETS = ("onnx", "safetensors")
EXACT = 1e-4
EFFECT = 1e-2  # an adapter that does less proves nothing
LABELS = 3
TIMEOUT_S = 900.0  # for one animal
LENGTHS = (40, 23, 9)  # of the rows of a batch, all longer or shorter than the sliding window
STEPS = 6  # tokens of each row that are fed one by one


@dataclass(frozen=True)
class Visit:
    """What became of one animal: exact, refused, rejected, wrong, or failed."""

    kind: str
    task: str
    target: str
    status: str
    frontend: str = ""
    error: float | None = None
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Housed:
    """A base and an adapter on disk."""

    animal: Animal
    base: Path
    adapter: Path


def house(animal: Animal, folder: Path) -> Housed:
    """Save a random replica and a LoRA on all that is linear, nothing left at zero or one."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(animal.kind, **animal.config)
    if animal.task in CLASSIFIERS:
        config.num_labels = LABELS
    loader = class_of(animal)
    make = loader._from_config if animal.model else loader.from_config
    model = make(config)
    for parameter in model.parameters():
        if parameter.dim() < 2:  # norms and biases: ones and zeros would hide what is forgotten
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            parameter.data *= animal.loud
    model.save_pretrained(folder / "base")
    # PEFT's class for translators knows no input but tokens
    kind = TASKS[animal.task].peft if animal.task != SPEECH else None
    # saved whole, and not adapted as well, which PEFT refuses
    head = r"(.*\.)?(pre_)?(classifier|score)(\..*)?" if animal.task in CLASSIFIERS else None
    lora = LoraConfig(
        **{
            "r": 4, "lora_alpha": 7, "task_type": kind, "target_modules": _targets(animal),
            "target_parameters": list(animal.parameters) or None, "exclude_modules": head,
            **animal.lora,
        }
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    # PEFT looks for a table of tokens, which a model of sounds has not
    tables = "auto" if TASKS[animal.task].inputs == TEXT else False
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=tables)
    return Housed(animal, folder / "base", folder / "adapter")


def class_of(animal: Animal) -> Any:
    return getattr(transformers, animal.model or TASKS[animal.task].auto)


def _targets(animal: Animal) -> Any:
    return animal.targets if isinstance(animal.targets, str) else list(animal.targets)


def live(housed: Housed) -> tuple[Any, Any]:
    """(base, PEFT model), both from the saved files, in float32."""
    auto = class_of(housed.animal)
    labels = {"num_labels": LABELS} if housed.animal.task in CLASSIFIERS else {}
    options = {"dtype": torch.float32, "attn_implementation": "eager", **labels}
    base = auto.from_pretrained(housed.base, **options).eval()
    other = auto.from_pretrained(housed.base, **options)
    return base, PeftModel.from_pretrained(other, str(housed.adapter)).eval()


def visit(
    animal: Animal,
    target: str = "onnx",
    frontend: str = "auto",
    tamper: Callable[[Path], None] | None = None,
) -> Visit:
    """Build and compare one animal. `tamper` is given the published folder: a negative control."""
    begun = time.perf_counter()

    def told(status: str, **facts: Any) -> Visit:
        spent = round(time.perf_counter() - begun, 1)
        return Visit(animal.kind, animal.task, target, status, seconds=spent, **facts)

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        housed = house(animal, Path(scratch))
        recipe = Recipe(
            base=str(housed.base), adapters=(str(housed.adapter),), target=target,
            out=Path(scratch, "out"), frontend=frontend,
            # the merged weights of both are the same: one proof of them is enough here
            parity={"level": "full" if target == "onnx" else "off"},
        )  # fmt: skip
        try:
            outcome = build(recipe)
        except InputError as refusal:
            return told("refused", detail=str(refusal))
        except ProofError as rejection:
            return told("rejected", detail=str(rejection))
        except Exception as fault:  # noqa: BLE001  # whatever it is, the animal failed
            return told("failed", detail=f"{type(fault).__name__}: {fault}")
        if tamper is not None:
            tamper(outcome.out)
        made = str(outcome.manifest.get("frontend") or "")
        try:
            error, effect, where = compare(animal, target, outcome.out, *live(housed))
        except Exception as fault:  # noqa: BLE001  # published, and it does not even run
            return told("wrong", frontend=made, detail=f"{type(fault).__name__}: {fault}")
    if effect < EFFECT:
        return told("wrong", frontend=made, error=error, detail=f"no effect: {effect:.0e}")
    status = "exact" if error <= EXACT else "wrong"
    return told(status, frontend=made, error=error, detail="" if status == "exact" else where)


def compare(
    animal: Animal, target: str, out: Path, base: Any, adapted: Any
) -> tuple[float, float, str]:
    """(largest error, effect of the adapter, the case of the largest error)."""
    rows = rows_of(animal)
    worst, where, effect = 0.0, "", 0.0
    for name, asked, answered in played(animal.task, target, out, rows, STEPS):
        expected = asked(adapted)
        found = answered()
        if found.shape != expected.shape:
            return np.inf, np.inf, f"{name}: shape {found.shape}, expected {expected.shape}"
        effect = max(effect, float(np.abs(asked(base) - expected).max()))
        error = float(np.abs(found - expected).max())
        if not error <= worst:  # NaN is no match, either
            worst, where = (error if error == error else np.inf), name
    return worst, effect, where


def rows_of(animal: Animal) -> list[list[int]]:
    """Token ids above the special ones, of several lengths."""
    generator = np.random.default_rng(3)
    longest = LENGTHS if animal.task not in TWO_PARTS else LENGTHS[1:]
    return [[int(i) for i in generator.integers(3, VOCAB, size=n)] for n in longest]


def run(
    animals: Sequence[Animal], targets: Sequence[str], frontend: str = "auto", jobs: int = 1
) -> Iterator[Visit]:
    """Every animal for every target, as they are done, `jobs` at a time.

    Each has a process of its own, as each build of a user has: one that crashes is one that failed.
    """
    tasks = [(animal, target, frontend) for animal in animals for target in targets]
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(_apart, *zip(*tasks, strict=True))


def _apart(animal: Animal, target: str, frontend: str) -> Visit:
    """`visit`, in another process."""
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch, "visit.json")
        command = [
            sys.executable, "-m", "tests.tools.zoo", "--alone", str(ANIMALS.index(animal)),
            "--target", target, "--frontend", frontend, "--json", str(told),
        ]  # fmt: skip
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            last = " | ".join(ended.stderr.strip().splitlines()[-3:])
            detail = f"its process ended with {ended.returncode}: {last}"
        except subprocess.TimeoutExpired:
            detail = f"its process was ended after {TIMEOUT_S:.0f} s"
        if told.exists():
            return Visit(**json.loads(told.read_text()))
    return Visit(animal.kind, animal.task, target, "failed", detail=detail)


def _start() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet()


def show(visits: Sequence[Visit]) -> None:
    """The table, and why what is not exact is not."""
    print(
        f"{'model type':22}{'task':22}{'target':13}{'front end':10}{'verdict':10}"
        f"{'error':>9}{'s':>7}"
    )
    for v in visits:
        error = "" if v.error is None else f"{v.error:.1e}"
        print(
            f"{v.kind:22}{v.task:22}{v.target:13}{v.frontend:10}{v.status:10}{error:>9}"
            f"{v.seconds:>7.1f}"
        )
    for v in visits:
        if v.status != "exact":
            print(f"{v.status.upper()} {v.kind} {v.task} {v.target}: {v.detail[:700]}")
    kinds = {v.kind for v in visits if v.status == "exact"}
    count = Counter(v.status for v in visits)
    print(f"\n{len(kinds)} model types exact; " + ", ".join(f"{n} {s}" for s, n in count.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="model types, with commas between them")
    parser.add_argument("--task", default="", help="one task")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--frontend", choices=("auto", "native", "traced"), default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)  # one animal, by its number
    asked = parser.parse_args(arguments)
    _start()
    if asked.alone is not None:
        found = visit(ANIMALS[asked.alone], asked.target, asked.frontend)
        asked.json.write_text(json.dumps(asdict(found)))
        return 0
    only = asked.only.split(",") if asked.only else []
    animals = [
        a for a in ANIMALS
        if (not only or a.kind in only) and (not asked.task or a.task == asked.task)
    ]  # fmt: skip
    if not animals or set(only) - {a.kind for a in animals}:
        parser.error(f"no such model type among {', '.join(sorted({a.kind for a in ANIMALS}))}")
    targets = [asked.target] if asked.target else list(TARGETS)
    visits = []
    for done in run(animals, targets, asked.frontend, asked.jobs):
        visits.append(done)
        error = "" if done.error is None else f"{done.error:.1e}"
        print(f"{len(visits)}/{len(animals) * len(targets)} {done.kind} {done.task} {done.target} "
              f"{done.status} {done.frontend} {error} {done.seconds:.0f}s {done.detail[:300]}",
              file=sys.stderr, flush=True)  # fmt: skip
        if asked.json:  # after each one: hours of visits are not lost with the last
            asked.json.write_text(json.dumps([asdict(v) for v in visits], indent=1) + "\n")
    show(visits)
    return int(any(v.status not in ("exact", "refused") for v in visits))


if __name__ == "__main__":
    sys.exit(main())
