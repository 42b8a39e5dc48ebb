"""Runs that are killed or told to end: nothing half-written, nothing left running, nothing left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from adaptrix_export.pipeline import build
from adaptrix_export.recipe import Recipe
from adaptrix_export.save.hashes import hash_folder
from tests.trust import kills, measured, races
from tests.trust.fixtures import Inputs, make_inputs
from tests.trust.forks import Forks

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def switchable(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("switchable") / "out"
    build(Recipe.model_validate(
        {"base": str(inputs.base), "adapters": [str(inputs.adapter)], "out": str(out),
         "target": "onnx-switchable", "frontend": "native", "parity": {"level": "off"}}
    ))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Forks, Forks]]:
    with Forks() as one, Forks() as two:
        yield one, two


def eventually(happens: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_an_addition_killed_while_it_moves_its_files_is_completed_or_was_not(
    inputs: Inputs, switchable: Path, pair: tuple[Forks, Forks], tmp_path: Path
) -> None:
    (command,) = (c for c in kills.commands(inputs, switchable) if c.name == "add-adapter")
    count = kills.operations(command, tmp_path / "count", pair[0])
    before, after = hash_folder(switchable), hash_folder(tmp_path / "count/out")
    assert count > 40 and before != after
    for at in range(count - 14, count + 1):  # the renames, and what is around them
        wrong = kills.killed(command, tmp_path / str(at), at, before, after, pair[0])
        assert wrong is None, f"killed at {at} of {count}: it {wrong}"
    late = kills.killed(command, tmp_path / "late", count + 9, before, after, pair[0])
    assert late is not None and "was not killed" in late  # the harness notices


@pytest.mark.slow
def test_two_additions_at_once_lose_nothing(
    inputs: Inputs, switchable: Path, pair: tuple[Forks, Forks], tmp_path: Path
) -> None:
    for number in range(3):
        wrong = races.race_of_additions(
            pair, inputs, switchable, tmp_path / str(number), 0.05 * number, 0
        )
        assert wrong is None, f"race {number} {wrong}"
    assert races.race_of_builds(pair, inputs, tmp_path / "builds", 0.0) is None


@pytest.mark.slow
def test_each_command_may_be_killed_anywhere(
    inputs: Inputs, switchable: Path, pair: tuple[Forks, Forks], tmp_path: Path
) -> None:
    for number, command in enumerate(kills.commands(inputs, switchable)):
        folder = tmp_path / str(number)
        folder.mkdir()
        count = kills.operations(command, folder / "count", pair[0])
        before = hash_folder(switchable) if command.name == "add-adapter" else None
        after = kills.hashes_of(folder / "count" / command.out)
        for at, delay in kills.points(count, 6):
            wrong = kills.killed(command, folder / str(at), at, before, after, pair[0], delay)
            assert wrong is None, f"{command.name} killed at {at} of {count}: it {wrong}"


@pytest.fixture
def waiting(inputs: Inputs, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """A process that waits in the middle of a build, its checker, and a scratch folder of it."""
    note = tmp_path / "note"
    program = f"""
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born without it
from adaptrix_export.cli import main
from adaptrix_export.load.files.scratch import scratch_folder
from adaptrix_export.prove.checker import Checker
from adaptrix_export import pipeline
def wait(*arguments, **more):
    with Checker() as child, scratch_folder("test") as scratch:
        child.start()
        Path({str(note)!r}).write_text(f"{{child._process.pid}} {{scratch}}")
        time.sleep(600)
pipeline.check_finite = wait
main(sys.argv[1:])
"""
    (tmp_path / "tmp").mkdir()
    command = ["build", "--base", str(inputs.base), "--adapter", str(inputs.adapter),
               "--target", "safetensors", "--parity", "off",
               "--out", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stderr=subprocess.PIPE,
        env=measured.environment(TMPDIR=str(tmp_path / "tmp")), cwd=tmp_path,
    )  # fmt: skip
    assert eventually(lambda: note.is_file() and " " in note.read_text()), process.poll()
    child, scratch = note.read_text().split()
    try:
        yield process, int(child), Path(scratch)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def gone(number: int) -> bool:
    return not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_end_leaves_nothing(
    waiting: tuple[subprocess.Popen[bytes], int, Path], number: signal.Signals, tmp_path: Path
) -> None:
    process, child, scratch = waiting
    assert scratch.is_dir() and not gone(child)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and b"interrupted; nothing was published" in said
    assert eventually(lambda: gone(child))
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"note", "tmp"}


def test_after_a_kill_the_checker_ends_and_the_next_run_cleans_up(
    waiting: tuple[subprocess.Popen[bytes], int, Path], tmp_path: Path
) -> None:
    process, child, scratch = waiting
    temporary = tmp_path / "tmp"
    mine = subprocess.Popen(  # a run that goes on
        [sys.executable, "-c", "from adaptrix_export.load.files.scratch import scratch_folder\n"
         "with scratch_folder('alive') as f:\n (f / 'x').touch()\n print(f, flush=True)\n input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=measured.environment(TMPDIR=str(temporary)), text=True,
    )  # fmt: skip
    assert mine.stdout is not None
    alive = Path(mine.stdout.readline().strip())
    foreign = temporary / "adaptrix-of-somebody"
    foreign.mkdir()
    (foreign / "data").touch()
    process.kill()
    process.wait()
    assert eventually(lambda: gone(child)), "the checking process outlives its parent"
    assert scratch.is_dir() and alive.is_dir()
    again = "from adaptrix_export.load.files.scratch import scratch_folder\n"
    again += "with scratch_folder('next'):\n pass"
    environment = measured.environment(TMPDIR=str(temporary))
    subprocess.run([sys.executable, "-c", again], env=environment, check=True)
    assert sorted(temporary.iterdir()) == sorted([alive.parent, foreign])
    mine.communicate("\n")
    assert list(temporary.iterdir()) == [foreign]
    shutil.rmtree(foreign)
    assert os.listdir(temporary) == []
