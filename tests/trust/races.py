"""Two processes that write the same folder at once."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

from adaptrix_export.package import read_manifest
from adaptrix_export.save.staging import finish_addition
from tests.trust.fixtures import Inputs
from tests.trust.forks import Forks
from tests.trust.kills import MAIN, PROGRAM, _damage


def _both(
    pair: tuple[Forks, Forks], commands: list[list[str]], folder: Path, delay_s: float, kill_at: int
) -> list[tuple[int, str]]:
    """Exit codes and errors of two commands, the second started `delay_s` later; the first one
    kills itself at its operation `kill_at`, if that is not 0."""
    results: list[tuple[int, str]] = [(0, ""), (0, "")]

    def play(which: int) -> None:
        place = folder / f"at{which}"
        place.mkdir()
        time.sleep(delay_s * which)
        program = PROGRAM if kill_at and which == 0 else MAIN
        more = {"TRUST_KILL_AT": str(kill_at), "TRUST_HERE": str(folder), "TMPDIR": str(place)}
        results[which] = pair[which].run(program, commands[which], place, more)

    threads = [threading.Thread(target=play, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def race_of_additions(
    pair: tuple[Forks, Forks], inputs: Inputs, switchable: Path, folder: Path, delay_s: float,
    kill_at: int,
) -> str | None:  # fmt: skip
    """Two adapters added at once, then a third. What is wrong; None: nothing."""
    out = folder / "out"
    folder.mkdir()
    shutil.copytree(switchable, out)

    def add(name: str) -> list[str]:
        return ["add-adapter", str(out), str(inputs.adapter), "--name", name,
                "--base", str(inputs.base), "--parity", "off"]  # fmt: skip

    results = _both(pair, [add("one"), add("two")], folder, delay_s, kill_at)
    for code, said in results:
        refused = code == 2 and "another build is writing it" in said
        if code not in (0, -9) and not refused:
            return f"ended with {code}: {said[-200:]}"
    finish_addition(out)
    if wrong := _damage(out):
        return f"left {wrong}"
    switchable_part = read_manifest(out).switchable
    names = set(switchable_part.adapters) if switchable_part else set()
    expected = {n for n, (code, _) in zip(("one", "two"), results, strict=True) if code == 0}
    if not expected <= names:
        return f"lost {sorted(expected - names)}"
    code, said = pair[0].run(MAIN, add("three"), folder, {})
    if code != 0:
        return f"takes no more: {said[-200:]}"
    return f"then left {wrong}" if (wrong := _damage(out)) else None


def race_of_builds(
    pair: tuple[Forks, Forks], inputs: Inputs, folder: Path, delay_s: float
) -> str | None:
    """Two builds of one output. What is wrong; None: nothing."""
    folder.mkdir()
    command = ["build", "--base", str(inputs.base), "--adapter", str(inputs.adapter),
               "--target", "safetensors", "--parity", "off",
               "--out", str(folder / "out")]  # fmt: skip
    results = _both(pair, [command, command], folder, delay_s, 0)
    if sorted(code for code, _ in results) != [0, 2]:
        return f"ended with {[code for code, _ in results]}: {results[0][1][-100:]}"
    left = {path.name for path in folder.iterdir()} - {"out", "at0", "at1"}
    return f"left {sorted(left)}" if left else _damage(folder / "out")
