"""One session, many adapters: switching, mixing, rows, threads, and files that are refused."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file

from adaptrix_export.errors import SourceError
from adaptrix_export.pipeline import build
from adaptrix_export.runtime import Sampling, Session
from adaptrix_export.runtime.graph import SLOTLESS
from adaptrix_export.runtime.layout import located
from adaptrix_export.runtime.stamps import adapter_version
from tests.switchable import recipe, switchable
from tests.tiny import VOCAB, live, save_adapter, save_base

OFF = {"parity": {"level": "off"}}
PROMPT = [5, 17, 230, 44, 91, 123, 7]
MODES = (None, "attention", "all", "mlp")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return switchable("llama", tmp_path_factory.mktemp("switching"), **OFF)


@pytest.fixture(scope="module")
def session(made):
    return Session(made.out, threads=1)


def answer(session, mode, count=12, prompt=PROMPT, **how):
    return session.generate_ids(prompt, count, stop_at_eos=False, adapter=mode, **how)


def test_each_adapter_generates_what_its_live_model_does(made, session):
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 2}
    found = set()
    for name, folder in made.adapters.items():
        with torch.no_grad():
            ids = torch.tensor([PROMPT])
            expected = live(made.base, folder).generate(input_ids=ids, **options)
        ours = answer(session, name, 24)
        assert ours == expected[0, len(PROMPT) :].tolist()
        found.add(tuple(ours))
    assert len(found | {tuple(answer(session, None, 24))}) == 4  # all of them say something else


def test_use_holds_for_requests_that_start_later(session):
    session.use("mlp")
    begun = session.stream("the quick brown fox", 8)
    first = next(begun)
    session.use("all")
    rest = first + "".join(begun)
    assert rest == session.generate("the quick brown fox", 8, adapter="mlp")
    assert session.generate_ids(PROMPT, 6, stop_at_eos=False) == answer(session, "all", 6)
    session.use(None)
    assert session.generate_ids(PROMPT, 6, stop_at_eos=False) == answer(session, None, 6)


def test_mixes_are_weighted_sums_of_deltas(made, session, tmp_path):
    """Against PEFT on adapters whose B is multiplied by the weight."""
    weights = {"attention": 0.7, "mlp": -0.3}
    scaled = []
    for name, weight in weights.items():
        folder = shutil.copytree(made.adapters[name], tmp_path / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        changed = {k: v * np.float32(weight) if "lora_B" in k else v for k, v in tensors.items()}
        save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        scaled.append(folder)
    with torch.no_grad():
        expected = live(made.base, *scaled)(torch.tensor([PROMPT])).logits.numpy()
    found = session.logits(np.array([PROMPT]), adapter=weights)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(session.logits(np.array([PROMPT]), adapter={"mlp": -0.3}) - found).max() > 0.01
    zero = session.logits(np.array([PROMPT]), adapter={"mlp": 0.0})
    assert np.array_equal(zero, session.logits(np.array([PROMPT]), adapter=None))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_each_row_what_it_gets_alone(session, side):
    rows = [PROMPT, PROMPT[:2], [9, 8, 7, 6, 5, 4, 3, 20, 30, 40]]
    found = session.generate_batch(rows, 9, stop_at_eos=False, adapter="all", padding=side)
    assert found == [answer(session, "all", 9, row) for row in rows]
    stop = {found[1][2]}
    ended = session.generate_batch(rows, 9, adapter="all", stop=stop, padding=side)
    ends = stop | session.eos_ids
    for whole, row in zip(found, ended, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert row == whole[: first + 1]


def test_threads_with_an_adapter_each_get_what_one_thread_gets(session):
    """8 threads, 50 requests each, the session's own choice switched all the while."""
    prompts = [[3 + i, 50 + i, 7 * i + 4] for i in range(6)]
    jobs = [(mode, prompt) for mode in (*MODES, "mix") for prompt in prompts]
    mix = {"all": 0.5, "attention": 0.5}
    adapter_of = {mode: mix if mode == "mix" else mode for mode in (*MODES, "mix")}
    expected = {(mode, tuple(p)): answer(session, adapter_of[mode], 4, p) for mode, p in jobs}

    def work(seed: int) -> int:
        draw = random.Random(seed)
        for _ in range(50):
            mode, prompt = draw.choice(jobs)
            session.use(draw.choice(MODES))
            got = answer(session, adapter_of[mode], 4, prompt)
            assert got == expected[mode, tuple(prompt)], (mode, prompt)
        return 50

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 400
    assert session.stats()["switches"]["number"] >= 400
    session.use(None)


def test_runs_overlap(session, monkeypatch):
    """No lock is held while a graph runs: one request stands still, another one ends."""
    import threading

    from adaptrix_export.runtime.running import Run

    inside, go_on = threading.Event(), threading.Event()
    real = Run.step

    def step(self, ids, mask):
        if ids.shape == (1, 5):  # the request that is to stand still
            inside.set()
            assert go_on.wait(60)
        return real(self, ids, mask)

    monkeypatch.setattr(Run, "step", step)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answer, session, "mlp", 3, [5, 6, 7, 8, 9])
        assert inside.wait(60)
        session.use("all")
        assert len(answer(session, "all", 3, PROMPT)) == 3
        session.use(None)
        go_on.set()
        assert len(waiting.result(60)) == 3


def test_statistics_count_requests_and_bytes(made):
    session = Session(made.out, threads=1)
    answer(session, "mlp", 3)
    session.use("all")
    session.generate_ids(PROMPT, 5, stop_at_eos=False)
    stats = session.stats()
    assert stats["active"] == "all" and stats["requests"] == {"mlp": 1, "all": 1}
    assert stats["tokens"] == {"mlp": 3, "all": 5}
    assert stats["adapters"]["mlp"]["rank"] == 16
    # up: 64 x 16 and 16 x 96, down: 96 x 16 and 16 x 64, on two layers, four bytes each
    assert stats["adapters"]["mlp"]["bytes"] == 2 * 2 * 16 * (64 + 96) * 4
    assert stats["switches"]["number"] == 1 and stats["switches"]["max_ms"] > 0


def test_a_twin_serves_requests_without_an_adapter_and_no_others(made, session, copy):
    twin = Session(made.out, threads=1, twin=True)
    for mode in MODES:
        assert answer(twin, mode) == answer(session, mode)
    plain = session.logits([PROMPT])
    model = ir.load(located(copy, SLOTLESS))  # it alone: logits of the other sign
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    producer = logits.producer()
    turned = ir.node("Neg", [logits])
    model.graph.insert_after(producer, [turned])
    logits.name, turned.outputs[0].name = "plain", "logits"
    turned.outputs[0].shape, turned.outputs[0].type = logits.shape, logits.type
    model.graph.outputs[0] = turned.outputs[0]
    ir.save(model, located(copy, SLOTLESS))
    changed = Session(copy, threads=1, twin=True, check=False)
    assert np.array_equal(changed.logits([PROMPT]), -plain)
    assert np.array_equal(changed.logits([PROMPT], adapter="mlp"),
                          session.logits([PROMPT], adapter="mlp"))  # fmt: skip
    assert np.array_equal(Session(copy, threads=1).logits([PROMPT]), plain)
    (located(copy, SLOTLESS)).unlink()
    with pytest.raises(SourceError, match="no slotless.onnx.*leave the twin out"):
        Session(copy, twin=True, check=False)


def test_unknown_names_and_kinds_are_refused(session):
    with pytest.raises(SourceError, match="adapter 'nope': not in this session"):
        session.use("nope")
    with pytest.raises(SourceError, match="weight of adapter mlp: nan"):
        session.use({"mlp": float("nan")})
    with pytest.raises(SourceError, match="one for each row.*rows: true"):
        session.use(["mlp", None])
    with pytest.raises(SourceError, match="padding: 'up'"):
        session.generate_batch([PROMPT], 2, padding="up")


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.out, tmp_path / "copy")


@pytest.mark.parametrize("place", [40, 230, -3])
def test_a_tampered_adapter_is_refused_before_any_run(copy, place):
    path = copy / "adapters" / "mlp.onnx_adapter"
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match="mlp.onnx_adapter: sha256 .* as in the manifest"):
        Session(copy)


def test_a_changed_value_is_known_without_the_manifest(copy, session):
    path = copy / "adapters" / "mlp.onnx_adapter"
    damaged = bytearray(path.read_bytes())
    value = np.frombuffer(damaged, "<f4")  # some tensor's values, somewhere in the middle
    offset = 4 * (len(value) // 2)
    damaged[offset] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match="its values have version"):
        session.load_adapter(path, "damaged")


def test_an_adapter_of_another_base_is_refused(made, session, tmp_path):
    """The same shapes and names, other weights: only the stamp tells."""
    other = save_base("llama", tmp_path / "other", seed=9)
    adapter = save_adapter(other, tmp_path / "mlp", target_modules=["up_proj"])
    build(recipe(other, {"mlp": adapter}, tmp_path / "out", **OFF))
    foreign = tmp_path / "out" / "adapters" / "mlp.onnx_adapter"
    with pytest.raises(SourceError, match="made for model version .* another base"):
        session.load_adapter(foreign, "foreign")
    assert "foreign" not in session.adapters


def test_a_tensor_without_a_slot_is_refused(session, tmp_path):
    from adaptrix_export.targets.adapter_file import write_adapter

    values = {"model.layers.9.x.lora_A": np.ones((4, 2), np.float32)}
    write_adapter(tmp_path / "odd.onnx_adapter", values, session._graph.model_version)
    with pytest.raises(SourceError, match="no slot of that name"):
        session.load_adapter(tmp_path / "odd.onnx_adapter")
    slot = next(iter(session._graph.slots.values()))
    half = {slot.a: np.ones((slot.inputs, 2), np.float32)}
    assert adapter_version(half) != adapter_version(values)
    write_adapter(tmp_path / "half.onnx_adapter", half, session._graph.model_version)
    with pytest.raises(SourceError, match=r"None\] of tensor.float., expected float \(\d+, r\)"):
        session.load_adapter(tmp_path / "half.onnx_adapter")


def test_rows_of_a_mixed_batch_equal_each_row_alone(made, session, tmp_path):
    build(recipe(made.base, made.adapters, tmp_path / "out", rows=True, **OFF))
    rows = Session(tmp_path / "out", threads=1)
    prompts = [PROMPT, PROMPT[:3], [9, 8, 7, 6, 5, 4, 3, 20], PROMPT[2:]]
    modes = ["mlp", None, "attention", "all"]
    found = rows.generate_batch(prompts, 8, stop_at_eos=False, adapter=modes)
    assert found == [answer(session, m, 8, p) for m, p in zip(modes, prompts, strict=True)]
    same = np.array([PROMPT] * 4)
    logits = rows.logits(same, adapter=modes)
    for row, mode in enumerate(modes):
        assert np.abs(logits[row] - rows.logits(same[:1], adapter=mode)[0]).max() < 1e-5
        assert np.abs(logits[row] - session.logits(same[:1], adapter=mode)[0]).max() < 1e-4
    with pytest.raises(SourceError, match="4 of them, expected one for each of 1"):
        rows.logits(same[:1], adapter=modes)
    with pytest.raises(SourceError, match="a weighted mix"):
        rows.use({"mlp": 0.5, "all": 0.5})
    with pytest.raises(SourceError, match="adapter 'nope': not in this graph"):
        rows.use(["nope"])


def test_a_seed_draws_the_same_tokens_and_rows_are_independent(session):
    how = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=7)
    one = answer(session, "all", 12, sampling=how)
    assert one == answer(session, "all", 12, sampling=how)
    batch = session.generate_batch(
        [PROMPT, PROMPT], 12, stop_at_eos=False, adapter="all", sampling=how
    )
    assert batch[0] == one and batch[1] != one
    assert one != answer(session, "all", 12, sampling=Sampling(temperature=1.0, seed=8))
    assert all(0 <= token < VOCAB for token in one)


@pytest.mark.slow
def test_onnxruntime_genai_generates_the_same_tokens(made, session):
    """64 tokens an adapter: genai's Adapters, our runtime and PEFT."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(made.out))
    adapters = genai.Adapters(model)
    options = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None, "pad_token_id": 2}
    for name, folder in made.adapters.items():
        adapters.load(str(made.out / "adapters" / f"{name}.onnx_adapter"), name)
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(PROMPT) + 64, do_sample=False)
        generator = genai.Generator(model, params)
        generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array(PROMPT, dtype=np.int32))
        theirs = []
        while len(theirs) < 64 and not generator.is_done():
            generator.generate_next_token()
            theirs.append(int(generator.get_next_tokens()[0]))
        with torch.no_grad():
            ids = torch.tensor([PROMPT])
            live_ids = live(made.base, folder).generate(input_ids=ids, **options)
        ours = answer(session, name, 64)
        assert ours == live_ids[0, len(PROMPT) :].tolist()
        ended = next((i + 1 for i, t in enumerate(ours) if t in session.eos_ids), 64)
        assert theirs == ours[:ended]
