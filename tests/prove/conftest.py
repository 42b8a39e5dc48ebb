"""Tiny bases and adapters, made once a session, and the bench that makes artifacts of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prove.bench import LOUD, Bench, merged
from tests.tiny import save_adapter, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a seeded random model of a kind, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_base(kind, tmp_path_factory.mktemp(kind), **LOUD)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def adapter(
    base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a random LoRA for that model, made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_adapter(base(kind), tmp_path_factory.mktemp(f"{kind}-lora"))
        return made[kind]

    return make


@pytest.fixture
def bench(
    base: Callable[[str], Path], adapter: Callable[[str], Path], tmp_path: Path
) -> Callable[[str], Bench]:
    def make(kind: str) -> Bench:
        weights = merged(base(kind), adapter(kind))
        return Bench(kind, base(kind), (("only", adapter(kind)),), tmp_path, weights)

    return make
