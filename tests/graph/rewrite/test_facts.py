"""Whether a cache may be updated in place: only where the operator counts with the mask."""

from __future__ import annotations

import numpy as np
import pytest

from adaptrix_export.graph.frontends.native import native
from adaptrix_export.graph.rewrite.facts import shares_cache
from adaptrix_export.runtime import Session
from adaptrix_export.runtime.running import Run
from tests.artifacts import packaged, plan_of
from tests.tiny import save_base


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_attention_with_a_shared_cache_is_recognised(tmp_path, kind):
    graph = native(plan_of(save_base(kind, tmp_path)), "cpu").model
    assert shares_cache(graph)
    node = next(n for n in graph.graph if n.op_type == "GroupQueryAttention")
    node.op_type = "MultiHeadAttention"  # the cache's size is then the number of tokens
    assert not shares_cache(graph)


def test_what_lies_in_the_buffer_beyond_the_tokens_is_never_read(tmp_path):
    """The same logits over a cache in place, full of NaN before, and over one that is copied."""
    artifact, _ = packaged("llama", tmp_path)
    graph = Session(artifact.folder, threads=1)._graph
    assert graph.shares_cache
    random = np.random.default_rng(0)
    ids = random.integers(3, 300, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, :4] = 0
    found = []
    for shared in (True, False):
        graph.shares_cache = shared
        run = Run(graph, 2, 40, {})
        if shared:
            for slot in graph.cache:
                run._kept[slot.past][0].numpy()[:] = np.nan
        steps = [run.step(ids, mask).copy()]
        for token in range(5):
            after = np.concatenate([mask, np.ones((2, token + 1), np.int64)], axis=1)
            steps.append(run.step(np.full((2, 1), 7 + token), after).copy())
        found.append(steps)
    for one, other in zip(*found, strict=True):
        keep = mask.astype(bool) if one.shape[1] > 1 else np.ones((2, 1), bool)
        np.testing.assert_allclose(one[keep], other[keep], atol=1e-6)
