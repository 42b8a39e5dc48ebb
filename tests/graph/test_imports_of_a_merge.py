"""A checkpoint is merged without the libraries of graphs and models: start-up is most of a small
merge."""

from __future__ import annotations

import subprocess
import sys


def test_the_pipeline_imports_neither_torch_nor_onnx_ir():
    code = "import sys, adaptrix_export.pipeline; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "onnx_ir", "sympy", "transformers", "peft", "onnxruntime"}
    assert heavy & set(done.stdout.split()) == set()
