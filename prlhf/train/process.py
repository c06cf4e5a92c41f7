"""Settings of the training process: seeds, signals, the C library's memory, and the message when a GPU is full."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import PACK_MULTIPLE
from prlhf.config.keys import Config
from prlhf.errors import TrainingError
from prlhf.method.models import PersonalizedModel
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
        # Else every tensor that is made empty is filled first. Nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False


def compile_attention(model: PersonalizedModel) -> None:
    """Let torch compile FlexAttention for rows of any length, before the first row of the run. A collective operation.

    torch compiles the first length that it sees for that length alone, and the second for any length. The two backward
    passes add in different orders. A resumed run, or another process, may see another length first, and would not give the
    same bits. So two lengths that no row has come first: both forward and backward, then without gradients.
    """
    batch = model.collate([EncodedComparison([1, 2], [1, 2], [3], [4], 0)], [0])  # any tokens
    if not isinstance(model.compute.attention_mask(batch), BlockMask):
        return
    T, training = batch.input_ids_RT.shape[1], model.training
    lengths = (T + PACK_MULTIPLE // 2, T + PACK_MULTIPLE + PACK_MULTIPLE // 2)  # no multiples: no row has them
    for with_gradients in (True, False):
        model.train(with_gradients)
        for length in lengths:
            rows = {name: pad(t, (0, length - T)) for name, t in vars(batch).items() if name.endswith("_RT")}
            with torch.set_grad_enabled(with_gradients):
                values_B = model(replace(batch, **rows))[0]
            if values_B.requires_grad:
                values_B.sum().backward()
    model.zero_grad()
    model.train(training)


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
