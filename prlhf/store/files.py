"""Files and directories that are complete or not there: written aside, then renamed."""

import contextlib
import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from prlhf.errors import TrainingError
from prlhf.parallel.ranks import barrier, on_main, rank, reason


@contextlib.contextmanager
def written_aside(path: Path, shared: bool = False) -> Iterator[Path]:
    """A new directory for all ranks; it replaces `path` once written, or is removed. TrainingError if writing fails.

    Where the system can exchange two folders (Linux), `path` is the old or the new one at every moment. Elsewhere it is gone
    for an instant; if the process is killed then, the next call puts the old one back before it writes.
    It removes what killed processes left in path's folder; if others write there (`shared`), what they left of `path` alone.
    """
    aside, old = (path.parent / f".{path.name}{what}.partial" for what in ("", ".old"))

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        for stale in (aside, old) if shared else path.parent.glob(".*.partial"):  # left by a process that was killed
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir()

    def finish() -> None:
        for file in [*aside.rglob("*"), aside]:
            _sync(file)
        if path.exists() and _exchange(aside, path):
            os.rename(aside, old)
        else:
            if path.exists():
                os.rename(path, old)
            os.rename(aside, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)

    try:
        on_main(begin)
        yield aside
        barrier()  # all have written
        on_main(finish)
    except BaseException as error:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:  # tokenizers raise the last
            raise TrainingError(
                f"{path}: cannot be written ({reason(error)}); checkpoints before it are good, and the same command goes "
                "on from the newest"
            ) from None
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot (renameat2 is Linux's)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the disk gives none (another file system)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    """Have the disk hold a file or folder before the next step."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(*files: Path) -> str:
    """A hash of the files' bytes, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
