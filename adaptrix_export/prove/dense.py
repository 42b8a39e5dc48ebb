"""PyTorch executing a plan: the base's own weights with dense deltas added, and no PEFT.

What target peft publishes is compared in this way: stock PEFT runs the factors that it finds in a
folder, and here the same folder is read by our own reader and multiplied out, in fp64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adaptrix_export.merge.merge import merged
from adaptrix_export.oracle.job import Job
from adaptrix_export.plan import Plan
from adaptrix_export.prove.subject import TransformersSubject
from adaptrix_export.targets.stored import StoredTensors


def dense_plan(job: Job) -> Plan:
    """The base of a job and the adapter that is its artifact."""
    from adaptrix_export.load import open_adapter, open_base
    from adaptrix_export.load.quantized.simulated import simulate

    spec = job.base_folder / job.gguf_file if job.gguf_file else job.base_folder
    base = open_base(str(spec), job.task)
    if job.simulated:
        base = simulate(base, job.simulated)
    return Plan(base, (open_adapter(str(job.artifact), base, "artifact"),))


def open_dense(job: Job) -> StoredTensors:
    """Every tensor that the adapter changes, multiplied out, in float32."""
    changes = dense_plan(job).changes()

    def reader(name: str) -> Any:
        return lambda: np.asarray(merged(changes[name], "F32"))

    return StoredTensors({name: reader(name) for name in changes})


class DenseSubject(TransformersSubject):
    """The base in float32 with those tensors in the place of its own."""

    def __init__(self, job: Job) -> None:
        import torch
        from torch import nn

        from adaptrix_export.oracle.reference import (
            load_model,
            resize_vocabulary,
            shipped_whole,
        )

        if job.threads is not None:
            torch.set_num_threads(job.threads)
        shipped = shipped_whole((("artifact", job.artifact),))
        model = load_model(job.base_folder, job.gguf_file, job.task, shipped, job.simulated)
        resize_vocabulary(model, shipped)
        stored = open_dense(job)
        for name in stored.names():
            path, _, parameter = name.rpartition(".")
            values = torch.from_numpy(np.array(stored.read(name)))
            # a new parameter: a tied one must not follow
            setattr(model.get_submodule(path), parameter, nn.Parameter(values, False))
        self._model = model.eval()
