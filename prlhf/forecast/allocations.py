"""Counts the memory that a computation takes, without doing it.

A fake tensor has a shape, a type and a device, and no values. The real code runs on fake tensors, autograd included, and
every storage counts from when it is made until it is freed.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prlhf.errors import UserError


class Allocations(TorchDispatchMode):
    """Counts the storages that operations return, in bytes, until each is freed.

    Enter `fake()`, which may be left and entered again: fake tensors that outlive it still count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: set[int] = set()  # addresses of storages
        self.now = self.peak = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            outputs = _grouped_mm(*args, **(kwargs or {}))
        else:
            outputs = func(*args, **(kwargs or {}))
        # Autograd adds gradients up in place, but not under a dispatch mode: there one summand is freed right after the sum.
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        replaces_summand = in_backward and func is torch.ops.aten.add.Tensor
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:  # a sparse tensor's parts are counted already
                self._count(tensor.untyped_storage(), replaces_summand)
        return outputs

    def _count(self, storage: torch.UntypedStorage, replaces_summand: bool) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.live:
            return
        self.live.add(address)
        self.now += size
        self.peak = max(self.peak, self.now - size if replaces_summand else self.now)
        weakref.finalize(storage, self._free, address, size).atexit = False

    def _free(self, address: int, size: int) -> None:
        self.live.remove(address)
        self.now -= size

    @contextmanager
    def fake(self) -> Iterator[None]:
        """Within the context tensors are fake and nothing is computed; real tensors that come in count as fake ones.
        UserError where a computation asks for values."""
        try:
            with self.mode, self:
                yield
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise UserError(
                f"--dry-run: how much this model computes depends on values that are not there ({error}); expected a model "
                "whose tensors have sizes that are known beforehand. Train two updates instead (--set optim.max_steps=2), "
                "and read peak_memory_gb in metrics.jsonl"
            ) from None

    def restart(self) -> int:
        """Measure the peak anew from here; returns the bytes that are live."""
        self.peak = self.now
        return self.now

    def peak_of(self, function: Callable[..., Any], *arguments: Any) -> int:
        """The most bytes that function(*arguments) takes at once, beside what is live before it."""
        with self.fake():
            before = self.restart()
            function(*arguments)
            return self.peak - before


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The result of torch._grouped_mm, which multiplies each expert's rows by its matrix, without values: (S, K), (E, K, N)
    -> (S, N), or for the matrices' gradients (K, S), (S, N) -> (E, K, N). Torch's own rule knows bfloat16 alone."""
    return a.new_empty(*a.shape[:-1], b.shape[-1]) if b.ndim == 3 else a.new_empty(len(offsets), len(a), b.shape[-1])


def give_fake_storage(model: nn.Module) -> None:
    """Within `Allocations.fake`: turn parameters on meta into fake ones on the CPU. Tied parameters stay tied."""
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in fakes:
                empty = torch.empty_like(parameter.detach(), device="cpu")
                fakes[parameter] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = fakes[parameter]
