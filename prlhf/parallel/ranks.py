"""Training on many processes: the process group, and what its members ("ranks") tell each other.

torchrun starts W processes. Every rank computes the same plan for an update and takes every W-th of its micro-batches
(`share`). Losses are divided by the whole update's size and gradients are *summed* over ranks, so the update is the same
whatever W is. Without torchrun W is 1, and every function here gives back what it gets.

FSDP2 shards the model from outside (`shard`). Tables with a row per user are not sharded: each rank holds them whole
and sums the gradients of the few rows that an update touches (`sum_rows`).
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from prlhf.backbone.toys import DTYPES
from prlhf.config.keys import Config
from prlhf.errors import OtherRankFailed, UserError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # how long ranks wait (gloo): rank 0 may write a large model, or a CPU be slow
CONNECTION_LOST = re.compile(  # gloo's words for a rank that is gone, or has not answered for PATIENCE
    "Connection closed by peer|Connection reset by peer|Remote peer closed|Socket closed|Broken pipe|"
    "Application timeout caused pair closure|Timed out waiting|connectFullMesh failed"
)
SENT_TYPES = (*DTYPES.values(), torch.float64, torch.uint8)  # of tensors that `from_main` sends
SENT_DIMENSIONS = 6  # at most


def world_size() -> int:
    """W, how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0. Rank 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def started_processes() -> int:
    """How many processes torchrun has started, before there is a process group; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started_rank() -> int:
    """This process's number, before there is a process group; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def check_started_alone(script: str) -> None:
    """UserError where torchrun has started several copies of a script: all would write the same files."""
    if (found := started_processes()) > 1:
        raise UserError(f"{script}: found {found} processes, expected one: python {script}, without torchrun")


def check_processes(config: Config, processes: int) -> None:
    """UserError where so many processes cannot hold config.fsdp.replicas whole models."""
    if processes % config.fsdp.replicas:
        raise UserError(f"fsdp.replicas: found {config.fsdp.replicas}, expected a divisor of the {processes} processes")


def sharded(config: Config) -> bool:
    """Whether FSDP2 shards the model: with several processes, or where a key asks for what FSDP2 alone does."""
    return started_processes() > 1 or config.model.compute_dtype is not None or config.fsdp.offload


@contextlib.contextmanager
def process_group(config: Config, device: str) -> Iterator[None]:
    """Within the context torchrun's processes form a group. On `device` cuda each has a GPU of its own.
    An existing group stays. A single process gets a group where the model is `sharded`. UserError where W does not fit
    fsdp.replicas or the GPUs. OtherRankFailed where the connection to another rank is lost."""
    size = started_processes()
    check_processes(config, size)
    if dist.is_initialized() or (size == 1 and not sharded(config)):
        yield
        return
    if device == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"--nproc_per_node: found more than {local} processes, expected at most one for each of {gpus} GPUs"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if size > 1:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not CONNECTION_LOST.search(str(error)):
            raise
        raise OtherRankFailed(
            f"process {rank()} lost another one, which died or left, or cannot reach it ({reason(error)}); the last "
            "checkpoint is good, and the same command goes on"
        ) from None
    dist.destroy_process_group()


def share(parts: Sequence[T]) -> list[tuple[T, bool]]:
    """This rank's part of an update's micro-batches; False marks a repeated one whose results must not count.
    Each forward and backward pass is a collective operation, so every rank gets equally many."""
    rounds = -(-len(parts) // world_size())
    mine = [r * world_size() + rank() for r in range(rounds)]
    return [(parts[min(i, len(parts) - 1)], i < len(parts)) for i in mine]


def summed(values: Tensor) -> Tensor:
    """The elementwise sum of a tensor on the CPU over ranks, in `values` itself."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def on_any(condition: bool) -> bool:
    """Whether the condition holds on any rank."""
    return bool(summed(torch.tensor([float(condition)])))


def on_main(function: Callable[[], T]) -> T | None:
    """What `function` returns on rank 0; None on other ranks, which wait. An exception on rank 0 ends all ranks."""
    if world_size() == 1:
        return function()
    result, failure = None, None
    if rank() == 0:
        try:
            result = function()
        except BaseException as error:
            failure = error
    failed = on_any(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise OtherRankFailed
    return result


def from_main(values: Tensor | None) -> Tensor:
    """Rank 0's tensor, on the CPU and of one of SENT_TYPES, on every rank."""
    if world_size() == 1:
        return values
    header = torch.zeros(2 + SENT_DIMENSIONS, dtype=torch.long)  # type, number of dimensions, sizes
    if rank() == 0:
        values = values.contiguous()
        header[: 2 + values.ndim] = torch.tensor([SENT_TYPES.index(values.dtype), values.ndim, *values.shape])
    dist.broadcast(header, src=0)
    dtype, dimensions, *sizes = header.tolist()
    if rank() != 0:
        values = torch.empty(sizes[:dimensions], dtype=SENT_TYPES[dtype])
    dist.broadcast(values, src=0)
    return values


def text_from_main(function: Callable[[], str]) -> str:
    """What `function` returns on rank 0, on every rank. For what is read from files: other ranks may see them later."""
    text = on_main(function)
    if world_size() == 1:
        return text
    sent = from_main(None if text is None else torch.tensor(list(text.encode()), dtype=torch.uint8))
    return bytes(sent.tolist()).decode()


def gathered_rows(rows: Sequence[int], values: Tensor, count: int) -> Tensor:
    """All `count` rows, (count, ...), on every rank, from each rank's `values` (n, ...) for its `rows`; no two share a row."""
    found = values.new_zeros(count, *values.shape[1:])
    found[torch.tensor(rows, dtype=torch.long)] = values
    return summed(found)


def sum_rows(table: nn.Parameter) -> None:
    """Sum a table's sparse gradient over ranks, in place. Only the rows that are in it are sent (by gloo, on the CPU)."""
    if world_size() == 1:
        return
    grad = table.grad
    if grad is None:
        rows, values = torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, *table.shape[1:], dtype=table.dtype)
        grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=False)
    table.grad = summed(grad.cpu().coalesce()).to(table.device).coalesce()


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if rank() == 0:
        print(text, flush=True)


def barrier() -> None:
    """Wait for all ranks, on the CPU (dist.barrier would wait on GPUs)."""
    summed(torch.zeros(1))


def reason(error: BaseException) -> str:
    """What went wrong, in one line. A checkpoint error of several ranks is told by the first that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
