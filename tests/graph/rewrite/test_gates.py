"""Gates in whole graphs: what they let through, step by step, padded and alone, and how many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adaptrix_export.graph.rewrite.gate_functions import DOMAIN
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.oracle.job import Job, gate_specs
from adaptrix_export.oracle.reference import Reference
from adaptrix_export.passes.compose.compose import Compose
from adaptrix_export.passes.wire_context import WireContext
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.prove.subject import OnnxSubject
from adaptrix_export.targets import TARGETS
from adaptrix_export.targets.artifact import Artifact
from adaptrix_export.targets.options import LowerOptions
from tests.artifacts import plan_of
from tests.tiny import save_adapter, save_base

KINDS = ["llama", "gpt2", "qwen3"]
TAU = 0.08  # clamps about half of the tokens of these adapters
Lowered = tuple[Plan, Artifact, Path, Path]
Statistics = list[tuple[int, dict[str, list[float]]]]  # of some calls: tokens, what the graph said


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


def lowered(files: tuple[Path, Path], out: Path, frontend: str = "auto", **options: Any) -> Lowered:
    base, adapter = files
    plan = verify(plan_of(base, adapter))
    if options:
        plan = verify(WireContext(**options)(plan))
    out.mkdir()
    return plan, TARGETS["onnx"].lower(plan, out, Silent(), LowerOptions(frontend)), base, adapter


def oracle(made: Lowered) -> Reference:
    plan, artifact, base, adapter = made
    job = Job(
        "onnx", artifact.folder, base, precision="fp32", weights={},
        adapters=(("only", adapter),), gates=gate_specs(plan.gates), threads=1,
    )  # fmt: skip
    return Reference.open(job)


def fed(
    subject: OnnxSubject, ids: np.ndarray, chunks: list[int], told: Statistics | None = None
) -> np.ndarray:
    """Logits of one row, fed chunk by chunk through the cache; statistics of each join `told`."""
    found, cache, past = [], None, 0
    for size in chunks:
        part = ids[None, past : past + size]
        positions = np.arange(past, past + size)[None]
        past += size
        logits, cache = subject.step(part, np.ones((1, past), np.int64), positions, cache)
        found.append(logits[0])
        if told is not None:
            told.append((size, subject.statistics))
    return np.concatenate(found)


def together(told: Statistics) -> dict[str, np.ndarray]:
    """The statistics of several calls as one call with all their tokens would give them."""
    tokens = sum(size for size, _ in told)

    def mean(name: str) -> np.ndarray:
        return np.sum([size * np.array(one[name]) for size, one in told], 0) / tokens

    least = np.min([one["gate_min"] for _, one in told], 0)
    return {"gate_mean": mean("gate_mean"), "gate_min": least, "clamped": mean("clamped")}


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_is_prefill_and_cached_steps_and_the_oracle(
    kind: str, files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    made = lowered(files(kind), tmp_path / "out", tau=TAU, stats=True)
    subject = OnnxSubject(tmp_path / "out", 1)
    ids = np.random.default_rng(3).integers(0, 300, 24)
    whole = fed(subject, ids, [24])
    once = subject.statistics
    assert 0.1 < np.mean(once["clamped"]) < 0.9
    told: Statistics = []
    steps = fed(subject, ids, [15, *[1] * 9], told)
    assert np.abs(whole - steps).max() <= 1e-4
    reference = oracle(made)
    asked = reference.prefill(ids.tolist())
    assert max(np.abs(whole - asked).max(), np.abs(steps - asked).max()) <= 1e-4
    statistics = reference.gate_statistics(lambda model: model.prefill(ids.tolist()))
    for name, values in statistics.items():
        np.testing.assert_allclose(once[name], values, atol=1e-4)
        np.testing.assert_allclose(together(told)[name], values, atol=1e-4)
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
    logits, cache = subject.step(ids, mask, np.maximum(mask.cumsum(1) - 1, 0), None)
    batch = subject.statistics
    following = rng.integers(0, 300, (3, 1))
    then, _ = subject.step(
        following, np.pad(mask, ((0, 0), (0, 1)), constant_values=1), mask.sum(1)[:, None], cache
    )
    after = subject.statistics
    told: Statistics = []
    next_told: Statistics = []
    for r, row in enumerate(rows):
        steps: Statistics = []
        alone = fed(subject, np.append(row, following[r]), [len(row), 1], steps)
        assert np.abs(logits[r][mask[r] == 1] - alone[:-1]).max() <= 1e-4
        assert np.abs(then[r] - alone[-1:]).max() <= 1e-4
        told.append(steps[0])
        next_told.append(steps[1])
    for name in batch:
        np.testing.assert_allclose(batch[name], together(told)[name], atol=1e-4)
        np.testing.assert_allclose(after[name], together(next_told)[name], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_lets_the_whole_adapter_through(
    kind: str, files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Of real tokens; those of a padded batch are the plain merge's."""
    plan, artifact, *_ = lowered(files(kind), tmp_path / "out", mode="mask", stats=True)
    model = ir.load(artifact.folder / "model.onnx")
    nodes = [n for n in model.graph if n.domain == DOMAIN]
    assert [n.op_type for n in nodes] == ["Mask"] * len(plan.gated())
    assert [f.name for f in model.functions.values() if f.domain == DOMAIN] == ["Mask"]
    subject = OnnxSubject(artifact.folder, 1)
    plain = OnnxSubject(lowered(files(kind), tmp_path / "plain")[1].folder, 1)
    rng = np.random.default_rng(7)
    row, ids, mask = rng.integers(0, 300, 9), rng.integers(0, 300, (2, 12)), np.ones((2, 12), int)
    ids[1, 3:], mask[1, :3] = row, 0
    logits, _ = subject.step(ids, mask, np.maximum(mask.cumsum(1) - 1, 0), None)
    assert np.abs(logits[1, 3:] - fed(plain, row, [9])).max() <= 1e-4
    every = {name: set(values) for name, values in subject.statistics.items()}
    assert every == {"gate_mean": {1.0}, "gate_min": {1.0}, "clamped": {0.0}}


def test_a_call_knows_nothing_of_the_calls_before_it(
    files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """In the graph and in the oracle, whose hooks leave with what they saw."""
    made = lowered(files("llama"), tmp_path / "out", tau=TAU, stats=True)
    subject, reference = OnnxSubject(tmp_path / "out", 1), oracle(made)
    first, other = np.random.default_rng(8).integers(0, 300, (2, 16))

    def asked(ids: np.ndarray) -> tuple[np.ndarray, object, np.ndarray, object]:
        once = fed(subject, ids, [16]), dict(subject.statistics)
        told = reference.gate_statistics(lambda model: model.prefill(ids.tolist()))
        return (*once, reference.prefill(ids.tolist()), told)

    before, between, after = asked(first), asked(other), asked(first)
    assert not np.array_equal(before[0], between[0]) and before[3] != between[3]
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[2], after[2])
    assert before[1] == after[1] and before[3] == after[3]


def test_onnx_runtime_puts_the_nodes_of_the_function_in_its_place(
    files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    lowered(files("gpt2"), tmp_path / "out", tau=TAU, stats=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(
        str(tmp_path / "out" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    run = ir.load(tmp_path / "run.onnx")
    assert not [node for node in run.graph if node.domain == DOMAIN]
    assert len([node for node in run.graph if node.op_type == "HardSigmoid"]) == 16


@pytest.mark.slow
def test_gates_in_a_traced_graph(files: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    made = lowered(files("llama"), tmp_path / "out", frontend="traced", tau=TAU, stats=True)
    assert made[1].frontend == "traced"
    subject = OnnxSubject(tmp_path / "out", 1)
    ids = np.random.default_rng(3).integers(0, 300, 24)
    whole = fed(subject, ids, [24])
    assert 0.1 < np.mean(subject.statistics["clamped"]) < 0.9
    assert np.abs(whole - fed(subject, ids, [15, *[1] * 9])).max() <= 1e-4
    assert np.abs(whole - oracle(made).prefill(ids.tolist())).max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_has_one_named_node_a_site(
    kind: str, files: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    plan, artifact, *_ = lowered(files(kind), tmp_path / "out", tau=((1, 0.1), (2, 0.2)))
    model = ir.load(artifact.folder / "model.onnx")
    nodes = {n.name: n.attributes["tau"].as_float() for n in model.graph if n.domain == DOMAIN}
    assert nodes.keys() == {site.path for site in plan.gated()}
    assert len(nodes) == {"llama": 14, "gpt2": 8, "qwen3": 14}[kind]
    assert [f.name for f in model.functions.values() if f.domain == DOMAIN] == ["Clamp"]
    assert {round(tau, 4) for tau in nodes.values()} == {0.1, 0.2}  # less what float32 is off by
    merged = {n for e in artifact.weights.values() for n in e.names() if "lora_" in n}
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
    TARGETS["onnx"].lower(plan, tmp_path / "out", Silent())
    job = Job(
        "onnx", tmp_path / "out", base, precision="fp32", weights={}, threads=1,
        adapters=(("a", first), ("b", second)), gates=gate_specs(plan.gates),
    )  # fmt: skip
    ids = np.random.default_rng(6).integers(0, 300, 24)
    found = fed(OnnxSubject(tmp_path / "out", 1), ids, [24])
    assert np.abs(found - Reference.open(job).prefill(ids.tolist())).max() <= 1e-4
