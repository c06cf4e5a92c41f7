"""One training run on many processes: the process group, FSDP2 around a finished model, and what ranks tell each other.

torchrun starts W processes ("ranks"). Every rank computes the same plan for an update and takes every W-th of its
micro-batches (`share`); losses are divided by the whole update's size, and gradients are *summed* over ranks, so the
update is the same whatever W is. Without torchrun W is 1 and all of this is the identity.

The model is sharded from outside (`shard`): `fully_shard` around each block and around the whole, which knows nothing of
it. Tables with a row a user are not sharded: each rank holds them, and sums the gradients of the few rows that an
update touches. A named model's weights are read after that, each rank its own rows (`load_weights_into`).
"""

import contextlib
import os
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
PATIENCE = timedelta(hours=2)  # of the ranks that wait (gloo) while rank 0 writes a large model, or for a slow CPU
# What gloo says of a rank that is gone, and of one that has not answered for PATIENCE.
CONNECTION_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Remote peer closed", "Socket closed", "Broken pipe",
    "Application timeout caused pair closure", "Timed out waiting", "connectFullMesh failed",
)  # fmt: skip


def world_size() -> int:
    """W, how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def started_processes() -> int:
    """How many torchrun has started, before they know each other; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_started_alone(script: str) -> None:
    """UserError where torchrun has started several copies of a script that works alone: all would write the same files."""
    if started_processes() > 1:
        raise UserError(
            f"{script}: found {started_processes()} processes, expected one: python {script}, without torchrun"
        )


def started_rank() -> int:
    """This process's number as torchrun gave it, before there is a process group; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def rank() -> int:
    """This process's number, from 0; 0 is the one that writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def process_group(config: Config, device: str) -> Iterator[None]:
    """Within the context the processes that torchrun started know each other; each has a GPU of its own on `device` cuda.

    A group that is there already stays. One process alone gets one too where the config shards (`sharded`). UserError where
    W does not fit fsdp.replicas.
    """
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
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in CONNECTION_LOST):
            raise OtherRankFailed(
                f"process {rank()} lost another one, which died or left, or cannot reach it ({reason(error)}); the last "
                "checkpoint is good, and the same command goes on"
            ) from None
        raise
    dist.destroy_process_group()


def check_processes(config: Config, processes: int) -> None:
    """UserError where so many processes cannot hold config.fsdp.replicas whole models."""
    if processes % config.fsdp.replicas:
        raise UserError(f"fsdp.replicas: found {config.fsdp.replicas}, expected a divisor of the {processes} processes")


def sharded(config: Config) -> bool:
    """Whether the model is sharded by FSDP2: with several processes, and where the config asks for what it alone does."""
    return started_processes() > 1 or config.model.compute_dtype is not None or config.fsdp.offload


def share(parts: Sequence[T]) -> list[tuple[T, bool]]:
    """This rank's of an update's micro-batches, as many on every rank; False marks one that only fills up and counts nothing.

    Ranks must compute alike, as each forward and backward pass is a collective operation.
    """
    W = world_size()
    rounds = -(-len(parts) // W)
    mine = [r * W + rank() for r in range(rounds)]
    return [(parts[min(i, len(parts) - 1)], i < len(parts)) for i in mine]


def summed(values: Tensor) -> Tensor:
    """The elementwise sum of a tensor on the CPU over ranks, in `values` itself."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def on_any(said: bool) -> bool:
    """Whether any rank says so."""
    return bool(summed(torch.tensor([float(said)])))


def from_main(values: Tensor | None) -> Tensor:
    """Rank 0's tensor, of one of `DTYPES` or float64, on every rank."""
    if world_size() == 1:
        return values
    types = [*DTYPES.values(), torch.float64]
    shape = torch.zeros(8, dtype=torch.long)
    if rank() == 0:
        described = [types.index(values.dtype), values.ndim, *values.shape]
        shape[: len(described)] = torch.tensor(described)
    dtype, ndim, *sizes = summed(shape).tolist()
    if rank() != 0:
        values = torch.zeros(sizes[:ndim], dtype=types[dtype])
    return summed(values.clone())


def text_from_main(function: Callable[[], str]) -> str:
    """What `function` returns on rank 0, on every rank: what it sees of a file system may reach others later."""
    text = on_main(function)
    if world_size() == 1:
        return text
    sent = from_main(torch.tensor(list(text.encode()), dtype=torch.float64) if text is not None else None)
    return bytes(int(byte) for byte in sent.tolist()).decode()


def gathered_rows(rows: Sequence[int], values: Tensor, count: int) -> Tensor:
    """(count, ...) from each rank's `values` (n, ...) for the `rows` that it has; every row is one rank's."""
    found = values.new_zeros(count, *values.shape[1:])
    found[torch.tensor(rows, dtype=torch.long)] = values
    return summed(found)


def sum_rows(table: nn.Parameter) -> None:
    """Sum a table's sparse gradient over ranks, in place; what travels are the rows that are in it."""
    W = world_size()
    if W == 1:
        return
    grad = None if table.grad is None else table.grad.coalesce()
    n, r = 0 if grad is None else grad._nnz(), rank()
    counts_W = torch.zeros(W, dtype=torch.long)
    counts_W[r] = n
    most = int(summed(counts_W).max())  # every rank's counts now
    rows_WN = torch.zeros(W, most, dtype=torch.long)
    values_WN = torch.zeros(W, most, *table.shape[1:], dtype=table.dtype)
    if grad is not None:
        rows_WN[r, :n], values_WN[r, :n] = grad.indices()[0], grad.values()
    real_WN = torch.arange(most) < counts_W[:, None]
    rows, values = summed(rows_WN)[real_WN], summed(values_WN)[real_WN]
    table.grad = torch.sparse_coo_tensor(
        rows[None].to(table.device), values.to(table.device), table.shape, check_invariants=False
    ).coalesce()


def on_main(function: Callable[[], T]) -> T | None:
    """What `function` returns on rank 0, while the others wait; None there. An exception on rank 0 ends all ranks."""
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


def say(text: str) -> None:
    """Print a line for the person at the keyboard, once."""
    if rank() == 0:
        print(text, flush=True)


def barrier() -> None:
    """Wait for all ranks."""
    summed(torch.zeros(1))


def reason(error: BaseException) -> str:
    """What went wrong, in a line; of several ranks on the first that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
