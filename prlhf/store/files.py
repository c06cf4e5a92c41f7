"""Directories that are complete or not there: written aside, synced, then renamed."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from prlhf.parallel.ranks import barrier, on_main, rank


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A fresh directory for all ranks to write into; on success it takes the place of `path`, on failure it is removed."""
    aside = path.parent / f".{path.name}.partial"

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(".*.partial"):  # of a process that was killed meanwhile
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
    except BaseException:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(*files: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
