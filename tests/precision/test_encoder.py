"""Quantized encoders: a text's vector alone and in a batch, and the bound on its cosine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptrix_export.package.documents import ReportDocument
from adaptrix_export.precision.settings import RTN, Quantization
from adaptrix_export.progress import Silent
from adaptrix_export.prove.quantized import run_quantized
from adaptrix_export.prove.report import summary
from adaptrix_export.prove.subject import OnnxSubject
from tests.precision.artifacts import Made, quantized


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return quantized(tmp_path_factory.mktemp("encoder"), Quantization("int8", 8, RTN), "bert")


def test_a_text_has_the_same_features_alone_and_in_a_padded_batch(encoder: Made) -> None:
    subject = OnnxSubject(encoder.artifact.folder, 1, encoder.plan.base.task)
    draw = np.random.default_rng(0)
    ids = draw.integers(5, 90, (4, 12))
    mask = (np.arange(12) < np.array([12, 3, 7, 1])[:, None]).astype(np.int64)
    types = np.zeros_like(ids)
    together = subject.encode(ids, mask, types)
    for row, length in enumerate(mask.sum(axis=1)):
        one = (slice(row, row + 1), slice(0, length))
        alone = subject.encode(ids[one], mask[one], types[one])
        assert np.abs(alone[0] - together[row, :length]).max() < 1e-5


def test_a_cosine_below_the_bound_publishes_nothing(encoder: Made) -> None:
    report = run_quantized(replace(encoder.job, min_cosine=0.999), Silent())
    assert report["passed"], summary(ReportDocument.of({**report, "versions": {}}))
    assert report["loss"]["least_cosine"] > 0.999
    refused = run_quantized(replace(encoder.job, min_cosine=1.0, level="fast"), Silent())
    assert not refused["passed"] and "quantize.min_cosine" in summary(
        ReportDocument.of({**refused, "versions": {}})
    )
