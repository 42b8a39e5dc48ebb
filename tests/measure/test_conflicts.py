"""The conflict report against dense computation, and the rule that chooses from it."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from click.testing import CliRunner

from adaptrix_export.cli import main
from adaptrix_export.load import open_adapter, open_base
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.measure.conflicts import conflicts
from adaptrix_export.merge.merge import merged
from adaptrix_export.merge.tuned import layers_freed
from adaptrix_export.passes.compose.choose import Auto, balanced, by_rule, candidates
from adaptrix_export.plan import Plan
from tests.tiny import save_adapter, save_base
from tests.tuned import LINEAR, save_tuned


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    small = {"n_layer" if request.param == "gpt2" else "num_hidden_layers": 2}
    base = save_base(request.param, folder / "base", **small)
    narrow = ["c_attn"] if request.param == "gpt2" else ["q_proj", "v_proj"]
    return base, [
        save_adapter(base, folder / "a", use_rslora=True),
        save_adapter(base, folder / "b", seed=2, r=2, target_modules=narrow),
        save_adapter(base, folder / "c", seed=3, r=3, use_dora=True, target_modules=narrow),
    ]


def plan_of(base, folders) -> Plan:
    opened = open_base(str(base))
    found = [open_adapter(str(f), opened, n) for f, n in zip(folders, "abc", strict=False)]
    return verify(Plan(opened, tuple(found)))


def dense(base, folder) -> dict[str, np.ndarray]:
    """Every delta of one adapter, (out, in), by merging it alone in float64."""
    plan = plan_of(base, [folder])
    with layers_freed():
        return {
            n: (merged(c, "F64") - c.source.read().astype(np.float64)).T
            if c.transposed
            else merged(c, "F64") - c.source.read().astype(np.float64)
            for n, c in plan.changes().items()
        }


def test_every_number_is_the_dense_one(setting):
    base, folders = setting
    report = conflicts(plan_of(base, folders))
    deltas = {n: dense(base, f) for n, f in zip("abc", folders, strict=True)}
    norms = {n: np.sqrt(sum((d**2).sum() for d in own.values())) for n, own in deltas.items()}
    for adapter in report["adapters"]:
        assert adapter["norm"] == pytest.approx(norms[adapter["name"]], rel=1e-5)
    assert len(report["pairs"]) == 3
    for site in report["sites"]:
        here = {n: own[site["site"]] for n, own in deltas.items() if site["site"] in own}
        whole = sum((d**2).sum() for d in here.values())
        energy = {n: (d**2).sum() / whole for n, d in here.items()}
        assert site["energy"] == pytest.approx(energy, rel=1e-5)
        assert len(site["pairs"]) == len(list(combinations(here, 2)))
        for pair in site["pairs"]:
            x, y = (here[n] for n in pair["adapters"])
            cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
            assert pair["cosine"] == pytest.approx(cosine, abs=1e-5)
            assert pair["sign_disagreement"] == pytest.approx((x * y < 0).mean(), abs=1e-5)
            lost = 1 - np.abs(x + y).sum() / (np.abs(x) + np.abs(y)).sum()
            assert pair["cancelled"] == pytest.approx(lost, rel=1e-4)
            if "c" in pair["adapters"]:  # DoRA's delta is not low rank
                assert pair["overlap_out"] is None and pair["overlap_in"] is None
                continue
            spaces = [np.linalg.svd(d) for d in (x, y)]
            out = [u[:, :r] for (u, _, _), r in zip(spaces, (4, 2), strict=True)]
            into = [vt[:r].T for (_, _, vt), r in zip(spaces, (4, 2), strict=True)]
            for key, (one, other) in {"overlap_out": out, "overlap_in": into}.items():
                cosines = np.linalg.svd(one.T @ other, compute_uv=False)  # of principal angles
                assert pair[key] == pytest.approx((cosines**2).mean(), rel=1e-4)
    (ab,) = [p for p in report["pairs"] if p["adapters"] == ["a", "b"]]
    both = [n for n in deltas["a"] if n in deltas["b"]]
    energy = {n: sum((deltas[k][n] ** 2).sum() for k in "ab") for n in both}
    lost = {
        n: 1 - np.abs(deltas["a"][n] + deltas["b"][n]).sum()
        / (np.abs(deltas["a"][n]) + np.abs(deltas["b"][n])).sum()
        for n in both
    }  # fmt: skip
    whole = norms["a"] ** 2 + norms["b"] ** 2
    conflict = sum(energy[n] * lost[n] for n in both) / whole
    assert ab["conflict"] == pytest.approx(conflict, rel=1e-4)
    assert ab["shared_sites"] == len(both)
    assert ab["shared_energy"] == pytest.approx(sum(energy.values()) / whole, rel=1e-5)


def scaled_copy(folder, out, factor):
    """The same adapter with its alpha multiplied."""
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).write_bytes((folder / name).read_bytes())
    config = json.loads((out / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def test_the_rule_on_what_is_known(tmp_path):
    """The same adapter twice, its opposite, one of other sites, an unrelated one."""
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    a = save_adapter(base, tmp_path / "a")
    same, minus = scaled_copy(a, tmp_path / "same", 1), scaled_copy(a, tmp_path / "minus", -1)
    unrelated = save_adapter(base, tmp_path / "u", seed=5)
    apart = save_adapter(base, tmp_path / "apart", seed=6, target_modules=["up_proj"])
    only_q = save_adapter(base, tmp_path / "q", seed=7, target_modules=["q_proj"])
    expected = {
        same: ("linear", 0.0, "push the same way"),
        minus: ("ties", 1.0, "signs are opposed"),
        unrelated: ("cat", 0.29, "unrelated"),
    }
    for other, (method, conflict, why) in expected.items():
        plan = plan_of(base, [a, other])
        report = conflicts(plan)
        (pair,) = report["pairs"]
        assert pair["conflict"] == pytest.approx(conflict, abs=0.03)
        chosen, told = by_rule(plan, report)
        if other is same:
            assert pair["cosine"] == 1.0 and pair["overlap_out"] == pytest.approx(1)
            assert [w.default for _, w in chosen.weights] == [0.5, 0.5]
        assert chosen.method == method, told
        assert why in told
    plan = plan_of(base, [apart, only_q])
    report = conflicts(plan)
    assert report["pairs"][0]["conflict"] == 0 and report["sites"] == []
    assert by_rule(plan, report)[0].method == "cat"


def test_balanced_weights_reach_along_each_adapter_as_far_as_it_does_alone():
    report = {
        "adapters": [{"name": n, "norm": v} for n, v in (("a", 2.0), ("b", 1.0), ("c", 1.0))],
        "pairs": [
            {"adapters": ["a", "b"], "cosine": 0.6},
            {"adapters": ["a", "c"], "cosine": 0.0},
            {"adapters": ["b", "c"], "cosine": 0.0},
        ],
    }
    found = {n: w.default for n, w in balanced(report)}
    gram = np.array([[4, 1.2, 0], [1.2, 1, 0], [0, 0, 1]])
    w = np.linalg.solve(gram, np.diag(gram)).clip(0, 1)
    assert [found.get(n, 1.0) for n in "abc"] == pytest.approx(w, abs=1e-3)
    report["pairs"][0]["cosine"] = 1.0
    report["adapters"][1]["norm"] = 2.0
    assert {n: w.default for n, w in balanced(report)} == {"a": 0.5, "b": 0.5}


def test_auto_composes_by_the_rule_and_says_so(setting):
    base, folders = setting
    plan = verify(Auto()(plan_of(base, folders[:2])))
    assert plan.history[0] == "Auto()" and plan.history[1].startswith("Compose(method='")
    assert plan.measured["choice"]["method"] in plan.history[1]
    assert "conflict" in plan.measured["choice"]["rule"]
    again = verify(Auto()(plan_of(base, folders[:2])))
    assert again.history == plan.history and again.measured == plan.measured
    alone = plan_of(base, folders[:1])
    assert Auto()(alone) is alone


def test_other_tuners_are_measured_and_get_methods_that_take_them(tmp_path):
    base = save_base("llama", tmp_path / "base", num_hidden_layers=2)
    ia3 = save_tuned(base, tmp_path / "ia3", "IA3", **LINEAR["IA3"])
    folders = [ia3, save_adapter(base, tmp_path / "l")]
    plan = plan_of(base, folders)
    report = conflicts(plan)
    deltas = [dense(base, f) for f in folders]
    for site in report["sites"]:
        x, y = (d[site["site"]] for d in deltas)
        cosine = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
        assert site["pairs"][0]["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert len(report["sites"]) > 2
    assert by_rule(plan, report)[0].method in ("linear", "ties")
    assert "cat" not in {c.method for c in candidates(plan, report)}


def test_the_command_prints_tables_and_json(setting):
    base, folders = setting
    arguments = ["conflicts", str(base), *map(str, folders)]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0 and "conflict" in shown.output and "n/a" in shown.output
    found = CliRunner().invoke(main, [*arguments, "--json"])
    report = json.loads(found.stdout)
    assert len(report["pairs"]) == 3 and set(report) == {"adapters", "pairs", "sites"}
    one = CliRunner().invoke(main, arguments[:3])
    assert one.exit_code == 2 and "two or more" in one.output
