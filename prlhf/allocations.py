"""How much memory a computation takes, without doing it: fake tensors, whose storages are counted.

A fake tensor has a shape, a type and a device, and no values. The real code runs on fake tensors, operation by
operation, autograd included, and every storage counts from when it is made until it is freed.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages that operations within it return, until each is freed.

    Enter `fake()`, which may be left and entered again; what is made of fake tensors within stays countable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: dict[int, int] = {}  # storage's address -> bytes
        self.now = self.peak = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:  # whose parts were counted before
                self._see(tensor.untyped_storage())
        return outputs

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.live:
            return
        self.live[address] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address).atexit = False

    def _free(self, address: int) -> None:
        self.now -= self.live.pop(address)

    @contextmanager
    def fake(self) -> Iterator[None]:
        """Within the context nothing is computed: tensors are fake, and real ones that come in are taken for fakes."""
        with self.mode, self:
            yield

    def restart(self) -> int:
        """Take the peak anew from here; returns the bytes that are live."""
        self.peak = self.now
        return self.now


def give_fake_storage(model: nn.Module) -> None:
    """Within `Allocations.fake`: parameters on meta become fake ones of the CPU; tied ones stay tied."""
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in fakes:
                empty = torch.empty_like(parameter.detach(), device="cpu")
                fakes[parameter] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = fakes[parameter]
