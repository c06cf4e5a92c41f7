"""What training does to its process: seeds, signals, memory that glibc keeps, and what an exhausted GPU says."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

import torch

from prlhf.config.keys import Config
from prlhf.errors import TrainingError
from prlhf.parallel.ranks import rank

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> None:
    """Keep freed memory in the process, so that a step on a CPU does not ask the system for the same pages again.

    By default glibc maps and unmaps large tensors one by one: a quarter of the time of a small model's step. Without glibc
    this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def reproducible(config: Config, device: str) -> None:
    """Seed torch; on a GPU also choose deterministic kernels, so that a resumed run ends bit for bit alike."""
    torch.manual_seed(config.seed)
    if device == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def out_of_memory_explained(config: Config) -> Iterator[None]:
    """Within the context a GPU that has no more memory ends with what to change (TrainingError)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"process {rank()} has no GPU memory left ({str(error).splitlines()[0]}). Lower optim.micro_batch_size (now "
            f"{config.optim.micro_batch_size}) or evaluate.batch_size (now {config.evaluate.batch_size}), set "
            "model.recompute=blocks, or use more GPUs (torchrun --nproc_per_node N); the same command with "
            "--dry-run says what each would hold. Checkpoints are good"
        ) from None


@contextlib.contextmanager
def termination_noted() -> Iterator[threading.Event]:
    """Within the context SIGTERM does not end the process, but sets the event."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
