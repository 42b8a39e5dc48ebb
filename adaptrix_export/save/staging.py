"""Atomic publication: a build appears complete at its output path, or not at all.

Everything is written into a staging folder beside the output, hence on the same filesystem, and
renamed into place as one folder after all of it is flushed to disk.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from adaptrix_export.errors import MachineError, OutputError

# Space beyond the estimate, for reports, other small files and filesystem overhead.
MARGIN_SHARE = 0.05
MARGIN_BYTES = 16 * 2**20

ORDER = ".order"  # in a commit folder: the names of its files, in the order of their moves

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Errors of rename(2) if the target exists by now.
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EBUSY}


@contextmanager
def staging(out: Path, estimated_bytes: int) -> Iterator[Path]:
    """A new, empty folder beside `out` to build in; removed when the block ends unless published.

    Raises OutputError before any work if `out` exists, its parent cannot be written, the disk
    has no room for `estimated_bytes`, or another process builds the same output; MachineError
    when the disk fills up inside the block.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    created = _make_parent(out)
    try:
        _check_room(out, estimated_bytes)
        with _only_builder_of(out):
            refuse_existing(out)  # another build may have published while the lock was taken
            _remove_stale(out)
            yield from _new_folder(out)
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(out, error) from error
        raise
    finally:
        _remove_empty(created)


def publish(stage: Path, out: Path) -> None:
    """Flush all of `stage` to disk, then rename it to `out`, which must not exist.

    Modes follow the umask (safetensors writes 0600, which a web server cannot read). Raises
    OutputError if `out` appeared since the build started.
    """
    out = Path(os.path.abspath(out))
    file_mode = _umask_mode(stage)
    folders: list[Path] = []
    for root, _, names in os.walk(stage, topdown=False):
        for name in names:
            path = Path(root, name)
            path.chmod(file_mode)
            _fsync(path)
        folders.append(Path(root))
    for folder in folders:
        # A folder needs the search bit wherever it has the read bit.
        folder.chmod(file_mode | (file_mode & 0o444) >> 2)
        _fsync(folder)
    refuse_existing(out)  # rename(2) would silently replace an empty folder
    try:
        os.rename(stage, out)
    except OSError as error:
        if error.errno in _OCCUPIED:
            raise _exists(out) from error
        raise
    _fsync(out.parent)


def refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise _exists(out)


def _exists(out: Path) -> OutputError:
    return OutputError(str(out), "exists", "a new path", "remove it or pick another --out")


def _make_parent(out: Path) -> list[Path]:
    """Create the missing parents of `out`; returns them, innermost first."""
    missing = [p for p in out.parents if not p.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise OutputError(
            str(out.parent),
            f"cannot be created ({error.strerror})",
            "a writable directory",
            "pick another --out",
        ) from error
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise _not_writable(out.parent)
    return missing


def _not_writable(parent: Path) -> OutputError:
    return OutputError(
        str(parent), "not writable", "a writable directory", "change its mode or pick another --out"
    )


def _remove_empty(folders: list[Path]) -> None:
    """Undo `_make_parent`; folders that are not empty are left."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _check_room(out: Path, estimated_bytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    needed = int(estimated_bytes * (1 + MARGIN_SHARE)) + MARGIN_BYTES
    if free < needed:
        raise OutputError(
            str(out.parent),
            f"{free / 1e6:,.0f} MB free",
            f"at least {needed / 1e6:,.0f} MB",
            "free some space or pick --out on another disk",
        )


@contextmanager
def _only_builder_of(out: Path) -> Iterator[None]:
    """Hold `.<name>.lock` beside `out`; a second builder of the same output is refused."""
    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            str(out),
            "another build is writing it",
            "one build at a time",
            "wait for it or pick another --out",
        ) from error
    except PermissionError as error:
        raise _not_writable(out.parent) from error
    try:
        yield
    finally:
        # Unlinked while held: whoever opened it in between finds an unlinked inode and retries.
        path.unlink(missing_ok=True)
        lock.release()


def _remove_stale(out: Path) -> None:
    """Delete folders that killed builds of `out` left; the lock excludes running builds."""
    ours = re.compile(re.escape(f".{out.name}.") + r"(staging-\d+|commit)")
    for path in sorted(out.parent.iterdir()):
        if ours.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _new_folder(out: Path) -> Iterator[Path]:
    stage = out.with_name(f".{out.name}.staging-{os.getpid()}")
    stage.mkdir()
    try:
        yield stage
    except Exception as error:
        if _is_disk_full(error):
            raise _disk_full(out, error) from error
        raise
    finally:
        # Ignoring errors keeps the first one visible; what is left goes with the next build.
        shutil.rmtree(stage, ignore_errors=True)


def _is_disk_full(error: Exception) -> bool:
    """Rust libraries (safetensors, tokenizers) carry the errno in their text only."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return "(os error 28)" in str(error)


def _disk_full(out: Path, error: Exception) -> MachineError:
    return MachineError(
        str(out.parent),
        f"the disk filled up while writing ({error})",
        remedy="free some space and build again; nothing was published",
    )


def _umask_mode(folder: Path) -> int:
    """The mode that a new file gets here. Asking `os.umask` would change it for other threads."""
    probe = folder / f".mode-{os.getpid()}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def addition(out: Path) -> Iterator[Path]:
    """A new, empty folder beside the published folder `out`, for files that `install` moves there.

    Raises OutputError if another process builds or changes `out`.
    """
    out = Path(os.path.abspath(out))
    if not os.access(out, os.W_OK | os.X_OK):
        raise _not_writable(out)
    with _only_builder_of(out):
        _finish_moves(out)
        _remove_stale(out)
        yield from _new_folder(out)


def finish_addition(out: Path) -> None:
    """Complete an addition to `out` that was killed while it moved its files."""
    out = Path(os.path.abspath(out))
    if _commit_of(out).is_dir():
        with addition(out):
            pass


def install(stage: Path, out: Path, names: Sequence[str]) -> None:
    """Move files of `stage` into the published folder, in this order, each as a whole.

    The manifest comes last and refers to the others. First the stage is renamed to the commit
    folder, which marks it complete; after that, the next process completes the moves of a killed
    one. Before it, the published folder is unchanged.
    """
    out = Path(os.path.abspath(out))
    mode = _umask_mode(stage)
    for name in names:
        (stage / name).chmod(mode)
        _fsync(stage / name)
    (stage / ORDER).write_text("\n".join(names), encoding="utf-8")
    _fsync(stage / ORDER)
    os.rename(stage, _commit_of(out))
    _fsync(out.parent)
    _finish_moves(out)


def _commit_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.commit")


def _finish_moves(out: Path) -> None:
    """Move what is left in the commit folder of `out`, if there is one, and remove that."""
    commit = _commit_of(out)
    order = commit / ORDER
    if order.is_file():
        for name in order.read_text(encoding="utf-8").split("\n"):
            path, place = commit / name, out / name
            if path.is_file():  # else it was moved before the kill
                os.replace(path, place)
                _fsync(place.parent)
        order.unlink()
    shutil.rmtree(commit, ignore_errors=True)
