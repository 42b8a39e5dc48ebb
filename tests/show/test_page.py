"""The page: what stands on it, that it asks for nothing, and that it is quick and small."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from adaptrix_export.package.documents import ManifestDocument, ReportDocument
from adaptrix_export.show.compare import compared, compared_json
from adaptrix_export.show.facts import Facts, Place, read_facts
from adaptrix_export.show.page import compare_page, report_page
from adaptrix_export.show.picture import energy_pictures, gate_pictures
from adaptrix_export.show.sections import checks, size, verdict
from adaptrix_export.show.write import stage_page
from tests.test_cli import invoke

DATA = Path(__file__).parent / "data"
NAMES = ("moved_and_gated", "switchable")


def facts(name: str = "moved_and_gated") -> Facts:
    return read_facts(DATA / name)


def altered(found: Facts, **changed: Any) -> Facts:
    """The same artifact with other keys in its report."""
    assert found.report is not None
    report = ReportDocument.of({**found.report.as_dict(), **changed})
    return Facts(found.name, found.manifest, report)


class Elements(HTMLParser):
    """Every tag must be closed in order; attributes that could load something are kept."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "action", "srcset"):
                self.links.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_whole_small_quick_and_asks_for_nothing(name: str) -> None:
    report_page(facts(name))  # compiles the template
    start = time.perf_counter()
    text = report_page(facts(name))
    assert time.perf_counter() - start < 1
    assert len(text.encode()) < 3_000_000
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    assert elements.links == ["data:,"]  # the icon, empty
    assert len(set(elements.ids)) == len(elements.ids)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_depends_on_nothing_but_the_facts(tmp_path: Path) -> None:
    found = facts()
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        manifest = stage_page(tmp_path / place, found.manifest, found.report)
        assert manifest.outputs["report.html"].bytes > 10_000
        # made anew, it does not list itself
        assert stage_page(tmp_path / place, manifest, found.report) == manifest
    one, two = ((tmp_path / p / "report.html").read_bytes() for p in ("one", "two"))
    assert one == two


def test_figures_on_the_page_are_those_of_the_report() -> None:
    text = report_page(facts())
    for case in facts().cases:
        assert f"{case.max_abs:.1e}" in text
        assert case.name in text
    for entry in facts().manifest.inputs:
        assert entry.sha256 in text


def test_the_verdict_comes_from_the_cases() -> None:
    found = facts()
    assert verdict(found).kind == "good"
    assert found.worst_case is not None
    assert found.worst_case.max_abs is not None
    share = found.worst_case.max_abs / found.worst_case.tolerance.max_abs
    assert f"{1 / share:,.0f} times below" in verdict(found).text
    cases = [case.as_dict() for case in found.cases]
    cases[1] |= {"max_abs": None, "passed": False}
    bad = altered(found, cases=cases, passed=False)
    assert verdict(bad).kind == "bad"
    assert cases[1]["name"] in verdict(bad).text
    assert checks(bad)[1].fill == 1.0
    assert "not finite" in report_page(bad)
    assert verdict(Facts("x", found.manifest, None)).kind == "open"
    assert "Not verified" in report_page(Facts("x", found.manifest, None))


def test_a_name_in_a_manifest_is_text_and_never_markup() -> None:
    found = facts()
    whole = json.dumps(found.manifest.as_dict()).replace("path:base", "<script>x</script>")
    manifest = ManifestDocument.of(json.loads(whole))
    text = report_page(Facts("<b>n</b>", manifest, found.report))
    assert "<script>x" not in text
    assert "&lt;script&gt;x" in text


def test_a_picture_has_a_cell_for_each_layer_and_module() -> None:
    pictures = energy_pictures(facts())
    assert [p.title for p in pictures] == [
        "all, model.layers", "att, model.layers", "all+att, model.layers",
    ]  # fmt: skip
    for picture in pictures:
        assert picture.layers == (0, 1, 2, 3)
        assert all(len(row.cells) == 4 for row in picture.rows)
    before, _, after = pictures
    energy = facts().manifest.energy
    assert energy is not None and energy.after is not None
    changed = {
        (row.module, layer)
        for row in after.rows
        for layer, cell in enumerate(row.cells)
        if cell.share is not None
    }
    places = {Place.of(name) for name in energy.after["all+att"]}
    assert changed == {(place.module, place.layer) for place in places}
    assert not any(cell.gated for row in before.rows for cell in row.cells)
    assert all(cell.gated for row in after.rows for cell in row.cells if cell.share is not None)
    darkest = max(energy.before["all"], key=lambda name: energy.before["all"][name] or 0.0)
    place = Place.of(darkest)
    row = next(row for row in before.rows if row.module == place.module)
    assert place.layer is not None
    assert row.cells[place.layer].share == 1.0


def test_gates_are_shown_as_the_oracle_saw_them() -> None:
    report = facts().report
    assert report is not None and report.context is not None
    cells = [
        c for p in gate_pictures(facts()) for r in p.rows for c in r.cells if c.share is not None
    ]
    assert sorted(c.share for c in cells if c.share is not None) == sorted(
        s.gate_mean for s in report.context.sites if s.gate_mean is not None
    )
    assert len(gate_pictures(facts("switchable"))) == 3


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.13.self_attn.q_proj.weight", Place("model.layers", 13, "self_attn.q_proj")),
        ("lm_head.weight", Place("", None, "lm_head")),
        ("encoder.layer.3.attention.self.query.bias",
         Place("encoder.layer", 3, "attention.self.query.bias")),
        ("layers.2.mlp.experts.17.up_proj", Place("layers", 2, "mlp.experts.*.up_proj")),
    ],
)  # fmt: skip
def test_places(name: str, place: Place) -> None:
    assert Place.of(name) == place


def test_sizes() -> None:
    assert [size(n) for n in (12, 12_340, 538_090_000, 2_100_000_000)] == [
        "12 B", "12.3 kB", "538 MB", "2.1 GB",
    ]  # fmt: skip


def test_artifacts_side_by_side() -> None:
    both = [facts(name) for name in NAMES]
    sheet = compared(both)
    rows = {row[0]: row[1:] for row in sheet.rows}
    assert sheet.headings == ("figure", *NAMES)
    assert rows["target"] == ("onnx", "onnx-switchable")
    assert rows["cases"] == tuple(str(len(f.cases)) for f in both)
    text = compare_page(NAMES, sheet, both)
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    told = compared_json(both)["artifacts"]
    assert [one["bytes"] for one in told] == [f.total_bytes for f in both]


def test_the_commands(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = invoke("report", str(DATA / "switchable"), "--out", str(out))
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(out.resolve())
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    told = json.loads(invoke("compare", *(str(DATA / n) for n in NAMES), "--json").output)
    assert [one["name"] for one in told["artifacts"]] == list(NAMES)
    table = invoke("compare", *(str(DATA / n) for n in NAMES)).output
    assert "onnx-switchable" in table
    assert invoke("compare", str(DATA / "switchable")).exit_code == 2
    assert invoke("report", str(tmp_path)).exit_code == 2
