"""`make trust`: what was tried to break the promises, how often, and how often it succeeded.

python -m tests.trust.table [ROW ...] [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from adaptrix_export.errors import AdaptrixError, known
from adaptrix_export.load import open_adapter
from adaptrix_export.load.files.finite import check_finite
from adaptrix_export.load.fit.invariants import verify
from adaptrix_export.load.open_base import open_base
from adaptrix_export.package import check_hashes, read_manifest
from adaptrix_export.pipeline import build
from adaptrix_export.plan import Plan
from adaptrix_export.progress import Silent
from adaptrix_export.recipe import Recipe
from adaptrix_export.save.hashes import files_under, hash_folder
from tests.tiny import save_adapter, save_base
from tests.trust import kills, measured
from tests.trust.fixtures import Inputs, copied, make_inputs, rewrite
from tests.trust.forks import Forks
from tests.trust.hostile import ROOM
from tests.trust.hostile import cases as hostile_cases
from tests.trust.malformed import LIMIT_S, Case, artifact_cases, cases, play
from tests.trust.races import race_of_additions, race_of_builds

QUICK = 20  # divides how often things are tried
WORKERS = 2
MUTATIONS = 20_000
KILLS = 44  # of each command; a short one has fewer operations than tries
RACES = 12  # of each kind
TOO_LITTLE = 60_000_000  # bytes
LIMIT_SHARE = 0.75  # of the weights: all memory that a build of them may take


@dataclass(frozen=True)
class Row:
    """How often something was tried, and the failures among them, worded."""

    tried: int
    failures: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Place:
    """Where a row works, and how much of it it does."""

    inputs: Inputs
    folder: Path
    divisor: int


def _recipe(inputs: Inputs, out: Path, target: str = "safetensors", **more: object) -> Recipe:
    return Recipe.model_validate(
        {"base": str(inputs.base), "adapters": [str(inputs.adapter)], "target": target,
         "out": str(out), "parity": {"level": "off"}, **more}
    )  # fmt: skip


def _in_parts(play_part: Callable[[Place, int], Row], place: Place) -> list[Row]:
    """A row in as many processes as there are workers, each with its part of it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context) as pool:
        parts = [pool.submit(play_part, place, part) for part in range(WORKERS)]
        return [part.result() for part in parts]


def _together(rows: list[Row], note: str) -> Row:
    failures = tuple(failure for row in rows for failure in row.failures)
    return Row(sum(row.tried for row in rows), failures, note)


def malformed(place: Place) -> Row:
    """Inputs that are wrong in one place, through the command line."""
    artifact = place.folder / "artifact"
    build(_recipe(place.inputs, artifact, "onnx", frontend="native"))
    whole = replace(place, inputs=replace(place.inputs, artifact=artifact))
    rows = _in_parts(_malformed_part, whole)
    named = sum(int(row.note) for row in rows)
    return _together(rows, f"{named} named, the others right as they are")


def _malformed_part(place: Place, part: int) -> Row:
    failures, named, tried = [], 0, 0
    picked = [*cases(), *artifact_cases()][:: place.divisor][part::WORKERS]
    for number, case in enumerate(picked):
        folder = place.folder / f"case{part}-{number}"
        folder.mkdir()
        found = play(case, place.inputs, folder)
        tried += 1
        named += found.kind == "named"
        if found.kind in ("internal", "traceback") or found.seconds > LIMIT_S:
            failures.append(
                f"{found.kind}, {found.seconds:.1f} s: {found.case}: {found.said[:100]}"
            )
    return Row(tried, tuple(failures), str(named))


def mutations(place: Place) -> Row:
    """Bytes changed, cut and repeated at random in every input file, read as a build reads it."""
    rows = _in_parts(_mutations_part, place)
    return _together(rows, f"{sum(int(row.note) for row in rows)} refused")


def _mutations_part(place: Place, part: int) -> Row:
    draw = random.Random(part)
    failures: list[str] = []
    files = [("base", name) for name in ("config.json", "model.safetensors")]
    files += [("adapter", n) for n in ("adapter_config.json", "adapter_model.safetensors")]
    total = MUTATIONS // place.divisor // WORKERS
    scratch = place.folder / f"mutated{part}"
    scratch.mkdir()
    copied(place.inputs.base, scratch / "base")
    copied(place.inputs.adapter, scratch / "adapter")
    refused = 0
    for number in range(total):
        which, name = files[number % len(files)]
        path = scratch / which / name
        whole = path.read_bytes()
        rewrite(path, lambda content: _mutated(content, draw))
        try:
            base = open_base(str(scratch / "base"))
            plan = verify(Plan(base, (open_adapter(str(scratch / "adapter"), base),)))
            check_finite(plan, Silent())
        except AdaptrixError:
            refused += 1
        except Exception as error:  # noqa: BLE001  # this is what is counted
            if known(error) is None:
                failures.append(f"{which}/{name} #{number}: {error!r}"[:160])
        path.write_bytes(whole)
    return Row(total, tuple(failures), str(refused))


def _mutated(content: bytes, draw: random.Random) -> bytes:
    """One to four changes near the front, where headers are, or anywhere."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        within = min(len(data), 4096) if draw.random() < 0.8 else len(data)
        at = draw.randrange(max(1, within))
        kind = draw.randrange(4)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.randint(1, 16)]
        elif kind == 2:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 8)))
        else:
            data[at : at + 1] = draw.choice((b"0", b"-", b"{", b"]", b'"', b"9" * 30, b"null"))
    return bytes(data)


def flips(place: Place) -> Row:
    """A bit flipped in every file of an artifact, at places spread over it."""
    out = place.folder / "flipped"
    build(_recipe(place.inputs, out))
    missed: list[str] = []
    tried = 0
    for name, path in sorted(files_under(out)):
        whole = path.read_bytes()
        for at in sorted({len(whole) * n // 40 for n in range(40)} & set(range(len(whole)))):
            changed = bytearray(whole)
            changed[at] ^= 1 << (at % 8)
            path.write_bytes(changed)
            tried += 1
            if not _is_found(out):
                missed.append(f"{name} byte {at}")
        path.write_bytes(whole)
    return Row(tried, tuple(missed))


def _is_found(out: Path) -> bool:
    try:
        read_manifest(out)
        return bool(check_hashes(out))
    except AdaptrixError:
        return True


def additions(place: Place) -> Row:
    """Something put beside every file of an artifact."""
    import os

    out = place.folder / "added"
    build(_recipe(place.inputs, out))
    kinds: dict[str, Callable[[Path], object]] = {
        "a file": lambda path: path.touch(), "a folder": lambda path: path.mkdir(),
        "a broken link": lambda path: path.symlink_to("nowhere"), "a FIFO": os.mkfifo,
        "a link": lambda path: path.symlink_to("/etc"),
    }  # fmt: skip
    missed, tried = [], 0
    for name, path in sorted(files_under(out)):
        for kind, make in kinds.items():
            more = path.with_name(f"{path.name}.more")
            make(more)
            tried += 1
            if not _is_found(out):
                missed.append(f"{kind} beside {name}")
            more.rmdir() if more.is_dir() and not more.is_symlink() else more.unlink()
    return Row(tried, tuple(missed))


def hostile(place: Place) -> Row:
    """Inputs made to cost, each in a process of its own beside one on the inputs as they were."""
    every = [Case("as they were", lambda folder: _arguments(folder)), *hostile_cases()]
    folders = [place.folder / str(number) for number in range(len(every))]

    def measure(number: int) -> tuple[measured.Cost, int]:
        folder = folders[number]
        folder.mkdir()
        copied(place.inputs.base, folder / "base")
        copied(place.inputs.adapter, folder / "adapter")
        command = every[number].make(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        cost = measured.run(command, folder)
        shutil.rmtree(folder)
        return cost, size

    picked = [0, *range(1, len(every), place.divisor)]
    with ThreadPoolExecutor(WORKERS) as pool:
        costs = list(pool.map(measure, picked))
    usual, failures, most, longest = costs[0][0], [], 0, 0.0
    for number, (cost, size) in zip(picked[1:], costs[1:], strict=True):
        memory, seconds = cost.peak - usual.peak - size, cost.seconds - usual.seconds
        most, longest = max(most, memory), max(longest, seconds)
        if cost.code not in (0, 2) or seconds > LIMIT_S or memory > ROOM or not cost.peak:
            failures.append(f"{every[number].name}: exit {cost.code}, {seconds:.1f} s, "
                            f"{memory / 1e6:.0f} MB: {cost.said[-100:]}")  # fmt: skip
    note = f"at most {longest:.1f} s of processor and {most / 1e6:.0f} MB beyond the file"
    return Row(len(picked) - 1, tuple(failures), note)


def _arguments(folder: Path) -> list[str]:
    return ["build", "--base", str(folder / "base"), "--adapter", str(folder / "adapter"),
            "--target", "safetensors", "--parity", "off", "--out", str(folder / "out")]  # fmt: skip


def killed(place: Place) -> Row:
    """Every command that writes, killed at operations on files spread over its run."""
    switchable = place.folder / "switchable"
    build(_recipe(place.inputs, switchable, "onnx-switchable", frontend="native"))
    tries = max(2, KILLS // place.divisor)
    work = list(enumerate(kills.commands(place.inputs, switchable)))
    failures: list[str] = []
    tried: dict[str, int] = {}

    def play_one(forks: Forks, number: int, command: kills.Command) -> None:
        folder = place.folder / str(number)
        folder.mkdir()
        kills.operations(command, folder / "first", forks)  # verdicts that are kept are kept now
        count = kills.operations(command, folder / "count", forks)
        before = hash_folder(switchable) if command.name == "add-adapter" else None
        after = kills.hashes_of(folder / "count" / command.out)
        points = list(kills.points(count, tries))
        tried[command.name] = len(points)
        for at, delay in points:
            place_of_it = folder / f"{at}-{delay}"
            wrong = kills.killed(command, place_of_it, at, before, after, forks, delay)
            if wrong is not None:
                failures.append(f"{command.name} at {at} of {count}: it {wrong}")
            shutil.rmtree(place_of_it)

    def worker(forks: Forks) -> None:
        while work:
            try:
                play_one(forks, *work.pop())
            except AssertionError as error:
                failures.append(str(error)[:300])

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(WORKERS))
        servers = [stack.enter_context(Forks()) for _ in range(WORKERS)]
        for done in [pool.submit(worker, forks) for forks in servers]:
            done.result()
    least = min(tried.values())
    return Row(sum(tried.values()), tuple(failures), f"{len(tried)} commands, {least} or more each")


def raced(place: Place) -> Row:
    """Two processes that write one folder, started up to half a second apart; some are killed."""
    switchable = place.folder / "switchable"
    build(_recipe(place.inputs, switchable, "onnx-switchable", frontend="native"))
    failures, tried = [], 0
    with Forks() as one, Forks() as two:
        for number in range(max(2, RACES // place.divisor)):
            kill_at = 60 + 3 * number if number % 3 == 2 else 0
            delay = 0.5 * draw_share(number)
            folder = place.folder / f"additions{number}"
            found = race_of_additions((one, two), place.inputs, switchable, folder, delay, kill_at)
            builds = race_of_builds(
                (one, two), place.inputs, place.folder / f"builds{number}", delay / 5
            )
            failures += [f"race {number}: it {wrong}" for wrong in (found, builds) if wrong]
            tried += 2
            shutil.rmtree(folder)
    return Row(tried, tuple(failures), "add-adapter with add-adapter, build with build")


def draw_share(number: int) -> float:
    """Numbers in [0, 1) that fill it evenly, the golden ratio's."""
    return number * 0.6180339887 % 1.0


def determinism(place: Place) -> Row:
    """Five runs of each target and front end give one hash, each run in a process of its own."""
    fronts = ("native", "traced")
    kinds = [(target, front) for target in ("onnx", "onnx-switchable") for front in fronts]
    kinds += [("safetensors", "auto"), ("peft", "auto")]
    runs = 5 if place.divisor == 1 else 2

    def play_one(kind: tuple[str, str], forks: Forks) -> tuple[str, int]:
        hashes = set()
        for again in range(runs):
            folder = place.folder / f"{kind[0]}-{kind[1]}-{again}"
            folder.mkdir()
            command = _arguments(folder)
            command[command.index("--base") + 1] = str(place.inputs.base)
            command[command.index("--adapter") + 1] = str(place.inputs.adapter)
            command[command.index("safetensors")] = kind[0]
            more = ["--frontend", kind[1]] if kind[0].startswith("onnx") else []
            code, said = forks.run(
                kills.MAIN, [*command, *more], folder, {"PYTHONHASHSEED": str(again)}
            )
            hashes.add(repr(kills.hashes_of(folder / "out")) if code == 0 else said[-100:])
            shutil.rmtree(folder)
        return f"{kind[0]} {kind[1]}: {sorted(hashes)}"[:300], len(hashes)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(WORKERS))
        servers = [stack.enter_context(Forks()) for _ in range(WORKERS)]
        halves = [kinds[number::WORKERS] for number in range(WORKERS)]
        found = [
            pool.submit(lambda half, forks: [play_one(k, forks) for k in half], half, forks)
            for half, forks in zip(halves, servers, strict=True)
        ]
        results = [result for future in found for result in future.result()]
    failures = tuple(words for words, count in results if count != 1)
    return Row(len(kinds) * runs, failures, f"{len(kinds)} kinds, {runs} runs of each")


def bounded(place: Place) -> Row:
    """A base of 400 MB, under a limit on all memory that is less than that, and beside a tiny one.

    The control: a limit that is less than the interpreter needs lets nothing be published.
    """
    large = place.folder / "large"
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
             "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 300}  # fmt: skip
    save_base("llama", large / "base", **sizes)
    save_adapter(large / "base", large / "adapter", target_modules=["q_proj", "down_proj"])
    weights = (large / "base/model.safetensors").stat().st_size
    tiny = place.folder / "tiny"
    copied(place.inputs.base, tiny / "base")
    copied(place.inputs.adapter, tiny / "adapter")
    failures, notes = [], [f"weights {weights / 1e6:.0f} MB"]
    for target in ("safetensors", "onnx"):
        peaks = []
        for folder in (tiny, large):
            command = _arguments(folder)
            command[command.index("safetensors")] = target
            more = ["--frontend", "native"] if target == "onnx" else []
            cost = measured.run([*command, *more], folder, timeout_s=300)
            if cost.code != 0:
                failures.append(f"{target}: {cost.said[-200:]}")
            peaks.append(cost.peak)
            shutil.rmtree(folder / "out", ignore_errors=True)
        notes.append(f"{target} +{(peaks[1] - peaks[0]) / 1e6:.0f} MB")
        if peaks[1] - peaks[0] > weights / 2:
            failures.append(f"{target}: {(peaks[1] - peaks[0]) / 1e6:.0f} MB more than a tiny one")
    for limit, fits in ((int(weights * LIMIT_SHARE), True), (TOO_LITTLE, False)):
        program = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))"
        cost = measured.run(
            _arguments(large), large, timeout_s=300, program=f"{program}\n{measured.MAIN}"
        )
        notes.append(f"limit {limit / 1e6:.0f} MB: exit {cost.code}")
        if (cost.code == 0, (large / "out").exists()) != (fits, fits):
            failures.append(f"limit of {limit} bytes: exit {cost.code}: {cost.said[-300:]}")
        shutil.rmtree(large / "out", ignore_errors=True)
    return Row(6, tuple(failures), ", ".join(notes))


CONTROLS = ("tests/prove/preflight/test_crossings.py", "tests/prove/test_parity.py",
            "tests/prove/test_replay.py", "tests/prove/test_gated.py")  # fmt: skip


def controls(place: Place) -> Row:
    """Sabotaged graphs and weights: tests that the proof refuses each of them."""
    report = place.folder / "report.xml"
    words = "refused or rejected or corrupt or publishes_nothing or wrong"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CONTROLS,
               "-k", words, "-m", "", "-n", str(WORKERS), f"--junitxml={report}"]  # fmt: skip
    if place.divisor > 1:
        command[command.index("-m", 3) + 1] = "not slow"
    subprocess.run(command, cwd=measured.ROOT, env=measured.environment(), capture_output=True)
    suite = ElementTree.parse(report).getroot()[0]
    failed = [case for case in suite if case.find("failure") is not None or
              case.find("error") is not None]  # fmt: skip
    names = tuple(f"{case.get('classname')}: {case.get('name')}" for case in failed)
    return Row(int(suite.get("tests", 0)), names, "refused, each")


ROWS: dict[str, Callable[[Place], Row]] = {
    "malformed inputs": malformed,
    "hostile inputs": hostile,
    "mutated bytes": mutations,
    "kills": killed,
    "races": raced,
    "flipped bits": flips,
    "additions": additions,
    "determinism": determinism,
    "memory bound": bounded,
    "negative controls": controls,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help=f"a {QUICK}th of the tries")
    asked = parser.parse_args()
    failed = 0
    print(f"{'what':22} {'tried':>7} {'failed':>7} {'s':>6}")
    with tempfile.TemporaryDirectory(prefix="adaptrix-trust-") as scratch:
        inputs = make_inputs(Path(scratch) / "inputs")
        for name, row in ROWS.items():
            if asked.rows and name not in asked.rows:
                continue
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            start = time.perf_counter()
            found = row(Place(inputs, folder, QUICK if asked.quick else 1))
            seconds = time.perf_counter() - start
            print(f"{name:22} {found.tried:7} {len(found.failures):7} {seconds:6.0f}  {found.note}")
            for failure in found.failures[:20]:
                print(f"    {failure}")
            failed += len(found.failures)
            shutil.rmtree(folder, ignore_errors=True)
            sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
