"""Which runtime serves an artifact while it is compared."""

from __future__ import annotations

from typing import Any

from adaptrix_export.arch.task_table import VISION_LANGUAGE
from adaptrix_export.arch.tasks import TWO_PARTS
from adaptrix_export.oracle.job import Job
from adaptrix_export.prove.subject import OnnxSubject, TransformersSubject
from adaptrix_export.recipe.targets import Form


def open_subject(job: Job) -> Any:
    """The artifact of `job` in its runtime: a Subject, or of an encoder-decoder a Translating."""
    if job.drawn and job.is_graph:
        from adaptrix_export.oracle.seeing import OnnxSeeing
        from adaptrix_export.oracle.whole import OnnxWhole

        if job.task == VISION_LANGUAGE:
            return OnnxSeeing(job.artifact, job.threads)
        return OnnxWhole(job.artifact, job.threads)
    if job.drawn:
        return TransformersSubject(job.artifact, job.threads, job.task)
    if job.task in TWO_PARTS:
        from adaptrix_export.oracle.translated import LiveTranslator, OnnxTranslator

        if job.is_graph:
            return OnnxTranslator(job.artifact, job.threads)
        from adaptrix_export.oracle.reference import load_model

        return LiveTranslator(load_model(job.artifact, task=job.task))
    if job.is_graph:
        return OnnxSubject(job.artifact, job.threads, job.task)
    if job.facts.form is Form.ADAPTER:
        from adaptrix_export.prove.dense import DenseSubject

        return DenseSubject(job)
    return TransformersSubject(job.artifact, job.threads, job.task)
