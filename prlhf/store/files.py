"""Files and directories that are complete or not there: written aside, then renamed."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from prlhf.errors import TrainingError
from prlhf.parallel.ranks import barrier, on_main, rank, reason


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A new directory for all ranks; it replaces `path` once written, or is removed. TrainingError if writing fails."""
    aside = path.parent / f".{path.name}.partial"

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".*.partial"):  # left by a process that was killed
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
        aside.mkdir()

    def finish() -> None:
        for file in [*aside.rglob("*"), aside]:
            _sync(file)
        old = path.parent / f".{path.name}.old.partial"
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
