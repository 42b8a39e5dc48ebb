"""`make trust`: what was tried to break the promises, how often, and how often it succeeded.

python -m tests.trust.table [ROW ...] [--quick]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from tests.trust.fixtures import Inputs, copied, make_inputs, rewrite
from tests.trust.malformed import LIMIT_S, cases, play

QUICK = 20  # divides how often things are tried


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


def malformed(place: Place) -> Row:
    """Inputs that are wrong in one place, through the command line."""
    failures, named, tried = [], 0, 0
    for number, case in enumerate(cases()[:: place.divisor]):
        folder = place.folder / f"case{number}"
        folder.mkdir()
        found = play(case, place.inputs, folder)
        tried += 1
        named += found.kind == "named"
        if found.kind in ("internal", "traceback") or found.seconds > LIMIT_S:
            failures.append(
                f"{found.kind}, {found.seconds:.1f} s: {found.case}: {found.said[:100]}"
            )
    return Row(tried, tuple(failures), f"{named} named, the others right as they are")


def mutations(place: Place) -> Row:
    """Bytes changed, cut and repeated at random in every input file, read as a build reads it."""
    draw = random.Random(0)
    failures: list[str] = []
    files = [("base", name) for name in ("config.json", "model.safetensors")]
    files += [("adapter", n) for n in ("adapter_config.json", "adapter_model.safetensors")]
    total = 20_000 // place.divisor
    work = place.folder / "mutated"
    work.mkdir()
    copied(place.inputs.base, work / "base")
    copied(place.inputs.adapter, work / "adapter")
    refused = 0
    for number in range(total):
        which, name = files[number % len(files)]
        path = work / which / name
        whole = path.read_bytes()
        rewrite(path, lambda content: _mutated(content, draw))
        try:
            base = open_base(str(work / "base"))
            plan = verify(Plan(base, (open_adapter(str(work / "adapter"), base),)))
            check_finite(plan, Silent())
        except AdaptrixError:
            refused += 1
        except Exception as error:  # noqa: BLE001  # this is what is counted
            if known(error) is None:
                failures.append(f"{which}/{name} #{number}: {error!r}"[:160])
        path.write_bytes(whole)
    return Row(total, tuple(failures), f"{refused} refused")


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


def determinism(place: Place) -> Row:
    """Five runs of each target and front end give one hash."""
    kinds = [("safetensors", {}), ("peft", {}), ("onnx", {"frontend": "native"}),
             ("onnx-switchable", {"frontend": "native"})]  # fmt: skip
    failures, tried = [], 0
    runs = 5 if place.divisor == 1 else 2
    for number, (target, more) in enumerate(kinds):
        found = set()
        for again in range(runs):
            out = place.folder / f"same{number}-{again}"
            build(_recipe(place.inputs, out, target, **more))
            found.add(repr(hash_folder(out)))
            shutil.rmtree(out)
            tried += 1
        if len(found) != 1:
            failures.append(f"{target}: {len(found)} hashes")
    return Row(tried, tuple(failures), f"{len(kinds)} kinds, {runs} runs of each")


ROWS: dict[str, Callable[[Place], Row]] = {
    "malformed inputs": malformed,
    "mutated bytes": mutations,
    "flipped bits": flips,
    "additions": additions,
    "determinism": determinism,
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
