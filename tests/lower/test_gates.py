"""Gates in whole graphs: what they let through, step by step, padded and alone, and how many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from adaptrix_export.check.job import Job, gate_specs
from adaptrix_export.check.reference import Reference
from adaptrix_export.check.subject import OnnxSubject
from adaptrix_export.lower import LOWERINGS
from adaptrix_export.lower.artifact import Artifact
from adaptrix_export.lower.gate_functions import DOMAIN
from adaptrix_export.passes.compose import Compose
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.verify import verify
from tests.artifacts import plan_of
from tests.tiny import save_adapter, save_base

KINDS = ["llama", "gpt2", "qwen3"]
TAU = 0.08  # clamps about half of the tokens of these adapters
Lowered = tuple[Plan, Artifact, Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Base and adapter of a kind, made once; the weights large enough to matter."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = save_base(kind, folder / "base", initializer_range=0.15)
            made[kind] = base, save_adapter(base, folder / "adapter")
        return made[kind]

    return make


def lowered(files: tuple[Path, Path], out: Path, **options: Any) -> Lowered:
    base, adapter = files
    plan = verify(plan_of(base, adapter))
    if options:
        plan = verify(WireContext(**options)(plan))
    out.mkdir()
    return plan, LOWERINGS["onnx"].lower(plan, out, Silent()), base, adapter


def oracle(made: Lowered) -> Reference:
    plan, artifact, base, adapter = made
    job = Job(
        "onnx", artifact.folder, base, precision="fp32", weights={},
        adapters=(("only", adapter),), gates=gate_specs(plan.gates), threads=1,
    )  # fmt: skip
    return Reference.open(job)


def fed(subject: OnnxSubject, ids: np.ndarray, chunks: list[int]) -> np.ndarray:
    """Logits of one row, fed chunk by chunk through the cache."""
    found, cache, past = [], None, 0
    for size in chunks:
        part = ids[None, past : past + size]
        positions = np.arange(past, past + size)[None]
        past += size
        logits, cache = subject.step(part, np.ones((1, past), np.int64), positions, cache)
        found.append(logits[0])
    return np.concatenate(found)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_is_prefill_and_cached_steps_and_the_oracle(
    kind: str, files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    made = lowered(files(kind), tmp_path / "out", tau=TAU, stats=True)
    subject = OnnxSubject(tmp_path / "out", 1)
    ids = np.random.default_rng(3).integers(0, 300, 24)
    whole = fed(subject, ids, [24])
    share = np.mean(subject.statistics["clamped"])
    assert 0.1 < share < 0.9
    steps = fed(subject, ids, [15, *[1] * 9])
    assert np.abs(whole - steps).max() <= 1e-4
    reference = oracle(made)
    asked = reference.prefill(ids.tolist())
    assert np.abs(whole - asked).max() <= 1e-4
    statistics = reference.gate_statistics(lambda model: model.prefill(ids.tolist()))
    fed(subject, ids, [24])
    for name, values in statistics.items():
        np.testing.assert_allclose(subject.statistics[name], values, atol=1e-4)
    free = lowered(files(kind), tmp_path / "free")
    assert np.abs(fed(OnnxSubject(free[1].folder, 1), ids, [24]) - whole).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [True, False])
def test_real_tokens_of_a_padded_batch_are_the_unpadded_ones(
    kind: str, left: bool, files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    lowered(files(kind), tmp_path / "out", tau=TAU, stats=True)
    subject = OnnxSubject(tmp_path / "out", 1)
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, 300, n) for n in (17, 6, 11)]
    ids, mask = rng.integers(0, 300, (3, 17)), np.zeros((3, 17), np.int64)
    for r, row in enumerate(rows):
        where = slice(17 - len(row), 17) if left else slice(0, len(row))
        ids[r, where], mask[r, where] = row, 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    logits, _ = subject.step(ids, mask, positions, None)
    batch = subject.statistics
    gates = []
    for r, row in enumerate(rows):
        assert np.abs(logits[r][mask[r] == 1] - fed(subject, row, [len(row)])).max() <= 1e-4
        gates.append(np.array(subject.statistics["gate_mean"]) * len(row))
    np.testing.assert_allclose(batch["gate_mean"], np.sum(gates, 0) / mask.sum(), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_graph_has_one_named_node_a_site(
    kind: str, files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    plan, artifact, *_ = lowered(files(kind), tmp_path / "out", tau=((1, 0.1), (2, 0.2)))
    model = ir.load(artifact.folder / "model.onnx")
    nodes = {n.name: n.attributes["tau"].as_float() for n in model.graph if n.domain == DOMAIN}
    assert nodes.keys() == {site.path for site in plan.gated()}
    assert len(nodes) == {"llama": 14, "gpt2": 8}[kind]
    assert [f.name for f in model.functions.values() if f.domain == DOMAIN] == ["Clamp"]
    assert {round(tau, 6) for tau in nodes.values()} == {0.1, 0.2}
    merged = {n for e in artifact.weights.values() for n in str(e).split("'") if "lora_" in n}
    assert len(merged) == 2 * len(nodes)  # every other site is merged


def test_without_gates_the_graph_is_the_merged_one(
    files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    _, artifact, *_ = lowered(files("llama"), tmp_path / "out")
    model = ir.load(artifact.folder / "model.onnx")
    assert not [n for n in model.graph if n.domain == DOMAIN]
    assert not [f for f in model.functions.values() if f.domain == DOMAIN]
    assert DOMAIN not in model.opset_imports


def test_the_same_build_twice_is_the_same_bytes(
    files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    first, second = (
        lowered(files("gpt2"), tmp_path / name, tau=TAU, stats=True)[1] for name in "ab"
    )
    assert first.hashes == second.hashes


def test_a_layer_shares_its_budget(
    files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Over the sites of a layer the squares of |y - y0| / |y0| sum up to tau^2 at most."""
    tau = 0.1
    made = lowered(files("llama"), tmp_path / "out", tau=tau, scope="layer")
    plan, _, _, _ = made
    reference = oracle(made)
    moved: dict[int, np.ndarray] = {}
    watched = []
    for site, gate in plan.gated().items():
        assert gate.tau == pytest.approx(tau / np.sqrt(7))

        def hook(layer: Any, inputs: Any, output: Any, number: int = site.layer or 0) -> None:
            y0 = layer.get_base_layer()(*inputs)
            ratio = ((output - y0).norm(dim=-1) / y0.norm(dim=-1)).numpy().reshape(-1) ** 2
            moved[number] = moved.get(number, 0) + ratio

        watched.append(reference.watch(site.path, hook))
    ids = np.random.default_rng(5).integers(0, 300, 24)
    asked = reference.prefill(ids.tolist())
    assert set(moved) == {0, 1, 2, 3}
    for squares in moved.values():
        assert (squares <= tau**2 * (1 + 1e-4)).all()
    assert max(squares.max() for squares in moved.values()) > 0.9 * tau**2  # and it is used
    assert np.abs(fed(OnnxSubject(tmp_path / "out", 1), ids, [24]) - asked).max() <= 1e-4


def test_two_adapters_are_one_contribution(
    files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    base, first = files("llama")
    second = save_adapter(base, tmp_path / "second", seed=9, r=3, target_modules=["q_proj"])
    plan = verify(WireContext(tau=TAU)(Compose()(plan_of(base, first, second))))
    (tmp_path / "out").mkdir()
    LOWERINGS["onnx"].lower(plan, tmp_path / "out", Silent())
    job = Job(
        "onnx", tmp_path / "out", base, precision="fp32", weights={}, threads=1,
        adapters=(("a", first), ("b", second)), gates=gate_specs(plan.gates),
    )  # fmt: skip
    ids = np.random.default_rng(6).integers(0, 300, 24)
    found = fed(OnnxSubject(tmp_path / "out", 1), ids, [24])
    assert np.abs(found - Reference.open(job).prefill(ids.tolist())).max() <= 1e-4
