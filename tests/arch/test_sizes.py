"""What configs call their sizes, against optimum's table of normalized configs."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
from optimum.utils import NormalizedConfigManager
from transformers import CONFIG_MAPPING

from adaptrix_export.arch.architecture import size_fields

# It puts 0 for what SegFormer has not, and for its list of heads.
PLACEHOLDERS = {"segformer"}
KINDS = sorted((set(NormalizedConfigManager._conf) & set(CONFIG_MAPPING)) - PLACEHOLDERS)


def test_sizes_are_those_of_optimum_for_every_type_that_it_knows():
    compared = 0
    for kind in KINDS:
        config = CONFIG_MAPPING[kind]().to_dict()
        normalize = NormalizedConfigManager.get_normalized_config_class(kind)
        normalized = normalize(SimpleNamespace(**config))
        for size, value in asdict(size_fields(config)).items():
            try:
                expected = getattr(normalized, size)
            except (AttributeError, NotImplementedError):
                continue  # a size that it does not know of this type
            assert value == expected, f"{kind}: {size}"
            compared += 1
    assert len(KINDS) > 50 and compared > 100, compared


@pytest.mark.parametrize("kind", ["gpt2", "distilbert", "bart"])
def test_a_size_under_another_name_is_found(kind):
    """Negative control: read by the one name only, these types have no width."""
    config = CONFIG_MAPPING[kind]().to_dict()
    assert "hidden_size" not in config or config["hidden_size"] is None
    assert size_fields(config).hidden_size == (1024 if kind == "bart" else 768)
