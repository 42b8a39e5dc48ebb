"""A build appears whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple

import pytest

from adaptrix_export.errors import MachineError, OutputError
from adaptrix_export.package import publish, staging

KILLED = """
import os, signal, sys
from pathlib import Path
from adaptrix_export.package import staging
with staging(Path(sys.argv[1]), 0) as stage:
    (stage / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""

HOLDING = """
import sys, time
from pathlib import Path
from adaptrix_export.package import staging
with staging(Path(sys.argv[1]), 0) as stage:
    print("in", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_publish_is_one_rename_of_the_staged_folder(tmp_path):
    out = tmp_path / "new" / "out"
    with staging(out, 1000) as stage:
        assert stage.parent == out.parent and not out.exists()
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text("x")
        inode = stage.stat().st_ino
        publish(stage, out)
    assert out.stat().st_ino == inode
    assert (out / "sub" / "file").read_text() == "x"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_modes_follow_the_umask(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        with staging(tmp_path / "out", 0) as stage:
            (stage / "model.safetensors").write_text("x")
            (stage / "model.safetensors").chmod(0o400)
            publish(stage, tmp_path / "out")
    finally:
        os.umask(before)
    path = tmp_path / "out" / "model.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == file
    assert stat.S_IMODE(path.parent.stat().st_mode) == folder


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_inside_leaves_nothing_not_even_new_parents(tmp_path, error):
    def fail():
        with staging(tmp_path / "a" / "b" / "out", 0) as stage:
            (stage / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_a_block_that_does_not_publish_leaves_nothing(tmp_path):
    with staging(tmp_path / "out", 0) as stage:
        (stage / "half").write_text("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output_is_refused_before_any_work(tmp_path, kind):
    out = tmp_path / "out"
    {
        "folder": out.mkdir,
        "file": out.touch,
        "dangling link": lambda: out.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    with pytest.raises(OutputError, match="exists.*remove it or pick another"), staging(out, 0):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("filled", [False, True])
def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path, filled):
    out = tmp_path / "out"

    def build():
        with staging(out, 0) as stage:
            out.mkdir()
            if filled:
                (out / "theirs").touch()
            publish(stage, out)

    with pytest.raises(OutputError, match="exists"):
        build()
    assert names(tmp_path) == ["out"] and names(out) == ["theirs"] * filled


def test_a_disk_without_room_is_refused_in_megabytes(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 500_000_000))
    refused = pytest.raises(OutputError, match="500 MB free, expected at least 542 MB")
    with refused as caught, staging(tmp_path / "parent" / "out", 500_000_000):
        pytest.fail("the block ran")
    assert caught.value.exit_code == 2
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_is_the_machines_fault(tmp_path, error):
    with pytest.raises(MachineError, match="filled up"), staging(tmp_path / "out", 0):
        raise error
    assert names(tmp_path) == []


def test_other_errors_pass_through_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), staging(tmp_path / "out", 0) as stage:
        (stage / "missing").read_text()


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be created"), staging(tmp_path / "file/x/out", 0):
        pytest.fail("the block ran")


def test_what_a_killed_build_left_is_cleaned_up_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert killed.returncode < 0
    (left,) = [n for n in names(tmp_path) if "staging" in n]
    assert (tmp_path / left / "half").exists()
    others = [".out.staging-notes", ".out.staging-1.staging-2", ".out2.staging-3"]
    for name in others:
        (tmp_path / name).mkdir()
    with staging(out, 0) as stage:
        assert names(stage) == []
        assert sorted(n for n in names(tmp_path) if "staging" in n) == sorted([stage.name, *others])
        publish(stage, out)
    assert names(tmp_path) == sorted(["out", *others])


def test_two_builds_of_one_output_do_not_meet(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(out)], stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline()
        with pytest.raises(OutputError, match="another build"), staging(out, 0):
            pytest.fail("the block ran")
        assert any("staging" in n for n in names(tmp_path))  # the first one's, untouched
        with staging(tmp_path / "other", 0):
            pass
        first.kill()
    with staging(out, 0) as stage:
        publish(stage, out)
    assert names(tmp_path) == ["out"]
