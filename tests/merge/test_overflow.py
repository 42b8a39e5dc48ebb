"""A merge that float16 cannot hold is named, with the tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptrix_export.errors import AdapterError
from adaptrix_export.merge.merge import merged
from tests.artifacts import plan_of
from tests.tiny import save_adapter, save_base


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_float16_overflows(tmp_path, dtype):
    base = save_base("llama", tmp_path / "base", dtype=dtype, num_hidden_layers=1)
    adapter = save_adapter(base, tmp_path / "a", target_modules=["q_proj"], lora_alpha=40_000_000)
    (change,) = plan_of(base, adapter).changes().values()
    if dtype is not torch.float16:
        assert np.isfinite(merged(change, change.source.dtype).astype(np.float32)).all()
        return
    with pytest.raises(AdapterError, match=r"q_proj\.weight.*beyond float16.*save the base in bf"):
        merged(change, "F16")
    small = save_adapter(base, tmp_path / "b", target_modules=["q_proj"])
    (change,) = plan_of(base, small).changes().values()
    assert np.isfinite(merged(change, "F16")).all()
