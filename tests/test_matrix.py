"""The matrix itself: a few rows quickly, all of them slowly, and that it can see a fault."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from adaptrix_export.merge import merge
from tests.tools.matrix import BUILT, cells_of, main
from tests.tools.matrix_rows import KINDS, LORA, LORA_REFUSED, ROWS, TUNERS

BY_NAME = {row.name: row for row in ROWS}


def statuses(row, kind):
    return {cell.target: cell.status for cell in cells_of(row, kind)}


def test_rows_are_many_and_have_names_of_their_own():
    assert len(BY_NAME) == len(ROWS)
    assert sum("llama" in row.kinds for row in LORA) >= 25 and len(TUNERS) >= 18
    assert {kind for row in ROWS for kind in row.kinds} == set(KINDS)


@pytest.mark.parametrize(
    ("row", "kind"),
    [("dora + rslora", "gpt2"), ("plain", "bert"), ("experts, ranks, rslora", "mixtral")],
)
def test_cells_are_exact(row, kind):
    assert statuses(BY_NAME[row], kind) == dict.fromkeys(BUILT, "exact")


def test_cells_are_refused_by_name():
    cells = cells_of(BY_NAME["init pissa"], "llama")
    assert [cell.text for cell in cells] == ["refused: init_lora_weights = 'pissa'"] * 2


def test_a_fault_is_seen(monkeypatch):
    """Negative controls: a term off by a thousandth, an adapter without effect, a lax compiler."""
    row = BY_NAME["plain"]
    terms = merge._low_rank_terms
    louder = lambda c: [replace(t, scale=1.001 * t.scale) for t in terms(c)]  # noqa: E731
    monkeypatch.setattr(merge, "_low_rank_terms", louder)
    assert statuses(row, "llama") == dict.fromkeys(BUILT, "wrong")
    monkeypatch.undo()
    assert set(statuses(replace(row, spread=0.0), "llama").values()) == {"wrong"}
    assert set(statuses(replace(row, must="refused"), "llama").values()) == {"wrong"}

    def broken(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr("tests.tools.matrix.open_plan", broken)
    assert set(statuses(row, "llama").values()) == {"wrong"}


@pytest.mark.slow
def test_the_whole_matrix(tmp_path):
    assert main(["--jobs", "2", "--json", str(tmp_path / "cells.json")]) == 0
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert len(cells) == len(ROWS) * len(KINDS) * len(BUILT)
    assert not any(cell["status"] == "wrong" for cell in cells)
    exact = Counter(
        cell["row"] for cell in cells if cell["status"] == "exact" and cell["kind"] == "llama"
    )
    assert sum(exact[row.name] == len(BUILT) for row in LORA) >= 25
    assert sum(exact[row.name] == len(BUILT) for row in TUNERS) >= 18
    refused = {cell["row"] for cell in cells if cell["status"] == "refused"}
    assert {row.name for row in LORA_REFUSED} <= refused
