"""Settings of the training process: seeds, signals, the C library's memory, and the message when a GPU is full."""

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
    """Tell glibc to keep freed memory, so that a step on a CPU does not ask the system for the same pages again.

    By default glibc maps and unmaps each large tensor: a quarter of a small model's step. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def reproducible(config: Config, device: str) -> None:
    """Seed torch. On a GPU also choose deterministic kernels, so that a resumed run gives the same bits."""
    torch.manual_seed(config.seed)
    if device == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def out_of_memory_explained(config: Config) -> Iterator[None]:
    """Within the context, running out of GPU memory raises a TrainingError that says what to change."""
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
    """Within the context, SIGTERM sets the event and does not end the process."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
