"""`build --dry-run`: what it says is what the build then does, and it does nothing."""

import json

import pytest
from click.testing import CliRunner

from adaptrix_export.cli import main
from tests.tiny import save_adapter, save_base


@pytest.fixture
def flags(tmp_path):
    base = save_base("llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    out = tmp_path / "deep" / "out"
    return ["build", "--base", str(base), "--adapter", str(adapter), "--target", "safetensors",
            "--parity", "off", "--out", str(out)]  # fmt: skip


def invoked(*words):
    return CliRunner().invoke(main, [*words, "--json"])


def test_it_says_what_the_build_then_does(tmp_path, flags):
    done = invoked(*flags, "--dry-run")
    assert done.exit_code == 0, done.output
    forecast = json.loads(done.stdout)
    assert not (tmp_path / "deep").exists()
    built = json.loads(invoked(*flags).stdout)
    weights = tmp_path / "deep" / "out" / "model.safetensors"
    assert abs(forecast["writes_bytes"] - weights.stat().st_size) < 8_000  # the header
    sizes = {entry["file"]: entry["bytes"] for entry in forecast["reads"]}
    assert sizes["model.safetensors"] == (tmp_path / "base" / "model.safetensors").stat().st_size
    assert {entry["file"] for entry in built["manifest"]["inputs"]} >= set(sizes)
    assert sum(forecast["changed"].values()) == forecast["changed_tensors"] > 0
    assert forecast["passes"] == ["MeasureConflicts", "Compose"] and forecast["fits"]


def test_it_refuses_what_the_build_would_refuse(tmp_path, flags):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    (tmp_path / "deep" / "out" / "file").write_text("mine")
    done = invoked(*flags, "--dry-run")
    assert done.exit_code == 2 and "deep/out" in done.output


def test_too_little_room_is_said(flags, monkeypatch):
    from adaptrix_export.manage import forecast

    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda place: free)
    done = CliRunner().invoke(main, [*flags, "--dry-run"])
    assert "NOT ENOUGH" in done.output
