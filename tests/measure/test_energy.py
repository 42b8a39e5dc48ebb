"""The energies of the picture against the deltas themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adaptrix_export.measure.energy import energy
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.show.timings import Timed, keep_timings, kept_timings
from tests.artifacts import plan_of
from tests.tiny import save_adapter, save_base


def test_energy_is_the_norm_of_each_delta(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    plan = plan_of(base, save_adapter(base, tmp_path / "a"))
    told = energy(plan, plan)
    assert told["after"] is None
    assert told["layers"] == {"model.layers": 4}
    (norms,) = told["before"].values()
    (adapter,) = plan.adapters
    assert set(norms) == {delta.name for delta in adapter.deltas}
    for delta in adapter.deltas:
        (term,) = delta.terms
        dense = term.scale * term.b.read().astype(float) @ term.a.read().astype(float)  # type: ignore[union-attr]
        assert norms[delta.name] == pytest.approx(np.linalg.norm(dense), rel=1e-3)
    fewer = Plan(plan.base, (type(adapter)(**{**vars(adapter), "deltas": adapter.deltas[:3]}),))
    after = energy(plan, fewer)["after"]
    assert list(after[adapter.name]) == sorted(d.name for d in adapter.deltas[:3])


def test_what_only_the_base_could_tell_has_no_figure(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    plan = plan_of(base, save_adapter(base, tmp_path / "a", use_dora=True))
    (norms,) = energy(plan, plan)["before"].values()
    assert norms
    assert all(norm is None for norm in norms.values())


def test_stages_are_timed_and_kept_by_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTRIX_EXPORT_CACHE", str(tmp_path / "cache"))
    timed = Timed(Silent())
    with timed.stage("outer"), timed.stage("inner", 10, "layers") as advance:
        advance(4)
    told = timed.as_dict()
    assert [(s["name"], s["depth"], s["amount"]) for s in told["stages"]] == [
        ("outer", 0, ""), ("inner", 1, "4 layers"),
    ]  # fmt: skip
    assert told["seconds"] >= told["stages"][0]["seconds"] >= told["stages"][1]["seconds"]
    (tmp_path / "manifest.json").write_text("{}")
    assert kept_timings(tmp_path) is None
    keep_timings(tmp_path, told)
    assert kept_timings(tmp_path) == told
    (tmp_path / "manifest.json").write_text("{ }")  # another build
    assert kept_timings(tmp_path) is None
