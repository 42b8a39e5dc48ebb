"""A rank of zero is a LoRA that does nothing, and an OFT that counts blocks instead."""

from __future__ import annotations

import pytest

from adaptrix_export.errors import SourceError
from adaptrix_export.load.adapters.config_fields import check_adapter_config


@pytest.mark.parametrize(
    ("kind", "rank"), [("LORA", 0), ("LORA", -1), ("OFT", -1), ("OFT", "8"), ("LORA", 2.0)]
)
def test_an_impossible_rank_is_named(kind, rank):
    with pytest.raises(SourceError, match=r"r: .*, expected a whole number from \d"):
        check_adapter_config("a: adapter_config.json", {"peft_type": kind, "r": rank})
    check_adapter_config("a: adapter_config.json", {"peft_type": kind, "r": 8})


def test_oft_has_no_rank_where_it_has_a_block_size():
    config = {"peft_type": "OFT", "r": 0, "oft_block_size": 4}
    check_adapter_config("a: adapter_config.json", config)
