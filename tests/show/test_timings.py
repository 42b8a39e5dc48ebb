"""Timings that are kept between runs, by several at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptrix_export.show import timings
from adaptrix_export.show.timings import keep_timings, kept_timings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTRIX_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timings"


def artifact(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


def test_the_oldest_go_and_what_others_removed_is_no_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "KEPT", 3)
    folders = [artifact(tmp_path / str(n), f"{n}") for n in range(6)]
    for folder in folders:
        keep_timings(folder, {"seconds": 1.5})
    assert kept_timings(folders[-1]) == {"seconds": 1.5}
    assert kept_timings(folders[0]) is None
    (cache / "gone.json").symlink_to(tmp_path / "nowhere")  # listed, and then not there
    keep_timings(folders[0], {"seconds": 2.5})
    assert kept_timings(folders[0]) == {"seconds": 2.5}
    assert not [path for path in cache.iterdir() if path.suffix == ".part"]


def test_without_a_cache_nothing_is_kept(cache: Path, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "out", "{}")
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the cache should be")
    keep_timings(folder, {"seconds": 1.5})
    assert kept_timings(folder) is None


@pytest.mark.parametrize("text", ["", "[]", "7", '{"seconds": '])
def test_damaged_timings_are_none(cache: Path, tmp_path: Path, text: str) -> None:
    folder = artifact(tmp_path / "out", "{}")
    keep_timings(folder, {"seconds": 1.5})
    (kept,) = cache.glob("*.json")
    kept.write_text(text)
    assert kept_timings(folder) is None
