"""Commands killed at their n-th operation on files, each in a process of its own.

The process counts what Python says to its audit hooks: files opened to be written, renames,
removals, folders made. Before the n-th of them it kills itself, as an out-of-memory killer would:
nothing is caught, nothing is cleaned up.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adaptrix_export.errors import AdaptrixError
from adaptrix_export.package import check_hashes, read_manifest
from adaptrix_export.save.hashes import hash_folder
from adaptrix_export.save.staging import finish_addition
from tests.trust.fixtures import Inputs
from tests.trust.forks import Forks

PROGRAM = """
import os, signal, sys, threading
at, counted = int(os.environ["TRUST_KILL_AT"]), [0]
delay = float(os.environ.get("TRUST_KILL_DELAY", 0))
# Between two of these nothing happens to files but writes to those that are open.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link",
          "os.truncate", "os.listdir", "os.scandir", "fsync"}
def count(event, arguments):
    if event not in EVENTS:
        return
    path = str(arguments[0]) if arguments else ""
    ours = path.startswith(os.environ["TRUST_HERE"])
    if event in ("open", "os.listdir", "os.scandir") and not ours:
        return  # what Python and libraries read of themselves
    counted[0] += 1
    if counted[0] == at:
        threading.Timer(delay, kill).start() if delay else kill()
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
fsync = os.fsync
def audited_fsync(handle):
    sys.audit("fsync", handle)
    fsync(handle)
os.fsync = audited_fsync
from adaptrix_export.cli import main
import adaptrix_export.pipeline
sys.dont_write_bytecode = True
sys.addaudithook(count)
try:
    main(sys.argv[1:])
finally:
    if not at:
        print("operations", counted[0], file=sys.stderr)
"""

MAIN = "import sys; from adaptrix_export.cli import main; main(sys.argv[1:])"


@dataclass(frozen=True)
class Command:
    """What is killed: `arguments` write `out`, which `prepare` puts into a fresh folder first, if
    there is something before."""

    name: str
    arguments: Callable[[Path], list[str]]
    prepare: Callable[[Path], None] = lambda folder: None
    out: str = "out"
    has_manifest: bool = True


def _built(inputs: Inputs, target: str) -> Callable[[Path], list[str]]:
    native = ["--frontend", "native"] if target.startswith("onnx") else []
    return lambda folder: [
        "build", "--base", str(inputs.base), "--adapter", str(inputs.adapter), "--target", target,
        "--parity", "off", "--out", str(folder / "out"), *native,
    ]  # fmt: skip


def commands(inputs: Inputs, switchable: Path) -> list[Command]:
    """One for each command that writes; `switchable` is an artifact to add adapters to."""
    base, adapter = str(inputs.base), str(inputs.adapter)

    def copy(folder: Path) -> None:
        shutil.copytree(switchable, folder / "out")

    def write_text(folder: Path) -> None:
        lines = (f"Line {n} of a text says that {n} and {n} are {2 * n}." for n in range(400))
        (folder / "text").write_text("\n".join(lines))

    return [
        *(Command(f"build {t}", _built(inputs, t))
          for t in ("safetensors", "peft", "onnx", "onnx-switchable")),
        Command("add-adapter", lambda f: [
            "add-adapter", str(f / "out"), adapter, "--name", "late", "--base", base,
            "--parity", "off"], copy),
        Command("convert", lambda f: [
            "convert", adapter, "--base", base, "--to", "peft", "--out", str(f / "out")],
            has_manifest=False),
        Command("redistribute", lambda f: [
            "redistribute", base, adapter, "--layers", "1", "--strategy", "select",
            "--calibration", str(f / "text"), "--tokens", "256",
            "--parity", "off", "--out", str(f / "out")],
            write_text, has_manifest=False),
    ]  # fmt: skip


def operations(command: Command, folder: Path, forks: Forks) -> int:
    """How many operations an undisturbed run makes. Raises where it fails."""
    code, said = _run(command, folder, 0, forks)
    if code != 0:
        raise AssertionError(f"{command.name}: {said}")
    return int(said.rpartition("operations ")[2].split()[0])


def _run(
    command: Command, folder: Path, at: int, forks: Forks, delay_s: float = 0.0
) -> tuple[int, str]:
    folder.mkdir()
    command.prepare(folder)
    scratch = folder / "tmp"
    scratch.mkdir()
    more = {
        "TRUST_KILL_AT": str(at),
        "TRUST_KILL_DELAY": str(delay_s),
        "TMPDIR": str(scratch),
        "TRUST_HERE": str(folder.parent),
    }
    return forks.run(PROGRAM, command.arguments(folder), folder, more)


def points(count: int, tries: int) -> Iterator[tuple[int, float]]:
    """`tries` moments: operations 1 to `count`, spread evenly; the last move files into place.

    A command with fewer operations than tries is killed a millisecond behind some of them, too.
    """
    spread = sorted({1 + (count - 1) * n // max(1, tries - 1) for n in range(tries)})
    yield from ((at, 0.0) for at in spread)
    yield from ((1 + n * count // tries, 0.001) for n in range(tries - len(spread)))


def killed(
    command: Command,
    folder: Path,
    at: int,
    before: object,
    after: object,
    forks: Forks,
    delay_s: float = 0.0,
) -> str | None:
    """What is wrong once a run was killed at an operation and then done again; None: nothing.

    Runs differ by an operation or two, so that the last of one may be beyond the end of another,
    which is then killed a little earlier.

    `before` and `after` are the hashes of what an undisturbed run begins with and leaves.
    """
    code, said = _run(command, folder, at, forks, delay_s)
    for earlier in range(at - 1, max(0, at - 4), -1) if code == 0 else ():
        shutil.rmtree(folder)
        code, said = _run(command, folder, earlier, forks, delay_s)
        if code != 0:
            break
    if code != -signal.SIGKILL:
        return f"ended with {code} and was not killed: {said[-200:]}"
    out = folder / command.out
    if command.has_manifest and out.exists():
        finish_addition(out)  # as verify begins
        if wrong := _damage(out):
            return f"left {wrong}"
    if hashes_of(out) not in (before, after):
        return "left something between before and after"
    again = hashes_of(out) != after or not command.has_manifest
    if again:
        if out.exists() and before is None:
            shutil.rmtree(out)
        code, said = forks.run(MAIN, command.arguments(folder), folder, {})
        if code != 0:
            return f"cannot be done again: {said[-200:]}"
    if hashes_of(out) != after:
        return "gives other bytes when it is done again"
    names = {path.name for path in folder.iterdir()} - {"tmp", "text", command.out}
    if names and again:
        return f"leaves {sorted(names)} when it is done again"
    return None


def _damage(out: Path) -> str | None:
    try:
        read_manifest(out)
        problems = check_hashes(out)
    except AdaptrixError as error:
        return str(error)
    return str(problems[0]) if problems else None


def hashes_of(out: Path) -> object:
    return hash_folder(out) if os.path.lexists(out) else None
