"""What a request may not hold is named before anything runs."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest

from adaptrix_export.errors import SourceError
from adaptrix_export.pipeline import build
from adaptrix_export.runtime import Sampling, Session
from adaptrix_export.runtime.sampling import Sampler
from adaptrix_export.runtime.statistics import MOST_LABELS, OTHERS, Statistics
from tests.switchable import recipe
from tests.tiny import VOCAB
from tests.trust.fixtures import copied, make_inputs, rewrite

OFF = {"parity": {"level": "off"}}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    inputs = make_inputs(folder / "inputs")
    loud = copied(inputs.adapter, folder / "loud")
    config = loud / "adapter_config.json"
    rewrite(config, lambda old: json.dumps({**json.loads(old), "lora_alpha": 1e6}).encode())
    adapters = {"one": inputs.adapter, "loud": loud}
    build(recipe(inputs.base, adapters, folder / "out", frontend="native", **OFF))
    return Session(folder / "out", threads=1)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([-1], "token id -1, expected ids from 0 to 299"),
        ([5, VOCAB], "token id 300, expected ids from 0 to 299"),
        ([2**63], "token id 9223372036854775808"),
        ([2**80], "object"),
        ([1.5], "float64"),
        ([True], "bool"),
        (["a"], "<U1"),
        ("abc", "<U3"),
        ([[5]], r"shape \[1, 1\]"),
        ([[5], [5, 6]], "expected rows of one length"),
        (None, "object"),
        (7, r"shape \[\]"),
        ([], "no tokens"),
        (np.zeros((0,), np.float32), "no tokens"),
        ({5}, "object"),
    ],
)  # fmt: skip
def test_ids_that_are_none(session, ids, said):
    with pytest.raises(SourceError, match=said):
        session.generate_ids(ids, 2)


def test_ids_of_numpy_are_taken_as_they_are(session):
    expected = session.generate_ids([5, 7], 4, stop_at_eos=False)
    for kind in (np.int32, np.uint8, np.uint64):
        assert session.generate_ids(np.array([5, 7], kind), 4, stop_at_eos=False) == expected


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ([5, 6], None, "one row for each of a batch"),
        ([[5, -2]], None, "token id -2"),
        ([[5], [5, 6]], None, "rows of one length"),
        (np.zeros((1, 0), np.int64), None, r"shape \[1, 0\]"),
        ([[5, 6]], [[1]], r"attention_mask: int64 of shape \[1, 1\]"),
        ([[5, 6]], [[1, 2]], "values up to 2, expected 0 and 1"),
        ([[5, 6]], [[0.5, 1]], "attention_mask: float64"),
        (np.full((1, 257), 5), None, "257 tokens, expected at most 256"),
    ],
)
def test_batches_that_are_none(session, ids, mask, said):
    with pytest.raises(SourceError, match=said):
        session.logits(ids, mask)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: s.generate_ids([5], -1), "max_new_tokens: -1"),
        (lambda s: s.generate_ids([5], 1.5), "max_new_tokens: 1.5"),
        (lambda s: s.generate_ids([5], True), "max_new_tokens: True"),
        (lambda s: s.generate_ids([5], 2, stop=["a"]), "stop: 'a'"),
        (lambda s: s.generate_ids([5], 2, stop=7), "stop: 7, expected token ids"),
        (lambda s: s.generate_batch([], 2), "prompts: none"),
        (lambda s: s.generate_batch(7, 2), "prompts: 7"),
        (lambda s: s.generate_batch([5], 2), "prompt: int64 of shape"),
        (lambda s: s.generate(None, 2), "prompt: None"),
        (lambda s: s.generate([None], 2), "prompt: None, expected some text"),
        (lambda s: s.stream(b"x"), "prompt: b'x'"),
        (lambda s: s.context([-4]), "token id -4"),
        (lambda s: s.use(5), "adapter: 5, expected a name"),
        (lambda s: s.use(b"one"), "adapter: b'one'"),
        (lambda s: s.use({5: 1.0}), "name of an adapter: 5"),
        (lambda s: s.use({"one": "1"}), "weight of adapter one: '1'"),
        (lambda s: s.use({"one": True}), "weight of adapter one: True"),
        (lambda s: s.use({"one": float("nan")}), "weight of adapter one: nan"),
        (lambda s: s.use({"one": float("-inf")}), "weight of adapter one: -inf"),
        (lambda s: s.use({"one": 1e300}), r"weight of adapter one: 1e\+300"),
        (lambda s: s.use({"one": 10**400}), "weight of adapter one: 1000"),
        (lambda s: s.load_adapter(7), "adapter: 7, expected a path"),
        (lambda s: s.load_adapter("x", ""), "name of the adapter: empty"),
        (lambda s: Session(s.folder, threads=-1), "threads: -1"),
        (lambda s: Session(7), "folder: 7"),
        (lambda s: Sampling(temperature=float("nan")), "temperature: nan"),
        (lambda s: Sampling(temperature="x"), "temperature: 'x'"),
        (lambda s: Sampling(top_k=1.5), "top_k: 1.5"),
        (lambda s: Sampling(top_p=float("nan")), "top_p: nan"),
        (lambda s: Sampling(seed="x"), "seed: 'x'"),
    ],
)
def test_other_things_that_are_none(session, call, said):
    with pytest.raises(SourceError, match=said):
        call(session)


def test_a_mix_that_overflows_is_named_by_the_request(session):
    with pytest.raises(SourceError, match="mix of one, loud: values at .* that are not finite"):
        session.logits([[5, 6]], adapter={"one": 1.0, "loud": 3e38})
    assert np.isfinite(session.logits([[5, 6]], adapter={"one": 0.5, "loud": 1e-6})).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=1)])
def test_no_token_is_chosen_from_what_is_no_number(sampling):
    for wrong in (np.nan, np.inf):
        logits = np.array([0.5, wrong, 0.25], np.float32)
        with pytest.raises(SourceError, match="logits: (nan|inf), expected finite numbers"):
            Sampler(sampling, [1]).choose(logits)
    assert Sampler(sampling, [1]).choose(np.array([-np.inf, 0.5, -np.inf], np.float32)) == 1


def test_counters_stay_as_large_as_they_were():
    statistics = Statistics()
    threads = [
        threading.Thread(target=_ask, args=(statistics, range(n, 20_000, 4))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    requests = statistics.as_dict({}, "base")["requests"]
    assert len(requests) == MOST_LABELS + 1
    assert sum(requests.values()) == 20_000 and requests[OTHERS] == 20_000 - MOST_LABELS
    statistics.request("0*one")  # one of the first is still counted by its name
    assert statistics.as_dict({}, "base")["requests"]["0*one"] == requests["0*one"] + 1


def _ask(statistics, weights):
    for weight in weights:
        statistics.request(f"{weight}*one")
        statistics.tokens(f"{weight}*one", 3)


def test_a_config_with_wrong_fields_is_named(session, tmp_path):
    wrong = [
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", [1, None]),
        ("genai_config.json", "model", 7),
        ("genai_config.json", "model", {"context_length": -1}),
    ]
    for name, field, value in wrong:
        folder = shutil.copytree(session.folder, tmp_path / "copy")
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, field: value}))
        with pytest.raises(SourceError, match=rf"{name}: {field}"):
            Session(folder, threads=1, check=False)
        shutil.rmtree(folder)
