"""How much memory a computation takes, without doing it: fake tensors, whose storages are counted.

A fake tensor has a shape, a type and a device, and no values. The real code runs on fake tensors, operation by
operation, autograd included, and every storage counts from when it is made until it is freed. In what order that
happens, and to what else beside, can be written down for a heap that is then asked for the same (`heap.growth`).
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

from prlhf.forecast.heap import Event


class Allocations(TorchDispatchMode):
    """Counts the storages that operations within it return, until each is freed.

    Enter `fake()`, which may be left and entered again; what is made of fake tensors within stays countable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: dict[int, int] = {}  # storage's address -> bytes
        self.now = self.peak = 0  # bytes
        self.events: list[Event] | None = None  # where it is written down what is made and freed, if anywhere
        self.graph: list[int] = []  # events of the nodes of autograd's graph
        self.known: set[int] = set()  # ids of tensors that were written down and live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        # Of a sparse tensor the parts were counted before.
        tensors = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and not t.is_sparse]
        if self.events is not None and tensors and has_gradient((args, kwargs)):
            self._write_node(tensors[0])
        # Gradients are added up in place where there is no dispatch mode; where there is, a summand is freed right after.
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        summed = in_backward and func is torch.ops.aten.add.Tensor
        for tensor in tensors:
            self._see(tensor.untyped_storage(), summed)
        for tensor in tensors if self.events is not None else ():
            if id(tensor) not in self.known:
                self.known.add(id(tensor))
                weakref.finalize(tensor, self.known.discard, id(tensor)).atexit = False
                self._write_until_gone(tensor, "tensor")
        return outputs

    def _see(self, storage: torch.UntypedStorage, summed: bool) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.live:
            return
        self.live[address] = size
        self.now += size
        self.peak = max(self.peak, self.now - size if summed else self.now)
        weakref.finalize(storage, self._free, address).atexit = False
        if self.events is not None and size:
            self._write_until_gone(storage, "sum" if summed else "storage", size)

    def _free(self, address: int) -> None:
        self.now -= self.live.pop(address)

    def _write_until_gone(self, it: Any, what: str, size: int = 0) -> None:
        events, number = self.events, len(self.events)
        events.append((what, number, size))
        weakref.finalize(it, events.append, ("freed", number, 0)).atexit = False

    def _write_node(self, output: torch.Tensor) -> None:
        """A node of the graph stays as long as the graph; of one that a backward pass recomputes, as long as its output."""
        if torch._C._current_graph_task_id() != -1:
            self._write_until_gone(output, "node")
        else:
            self.graph.append(len(self.events))
            self.events.append(("node", len(self.events), 0))

    def graph_ends(self) -> None:
        """To be called where the last reference to the result of a forward pass was dropped."""
        if self.events is not None:
            self.events += [("freed", number, 0) for number in self.graph]
        self.graph.clear()

    @contextmanager
    def written_down(self) -> Iterator[list[Event]]:
        """Within the context what is made is added to the list, and what ends of it."""
        self.events, self.graph, self.known = [], [], set()
        try:
            yield self.events
        finally:
            self.events = None

    @contextmanager
    def fake(self) -> Iterator[None]:
        """Within the context nothing is computed: tensors are fake, and real ones that come in are taken for fakes."""
        with self.mode, self:
            yield

    def restart(self) -> int:
        """Take the peak anew from here; returns the bytes that are live."""
        self.peak = self.now
        return self.now


def has_gradient(arguments: Any) -> bool:
    """Whether autograd is taken to make a node for an operation on these."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves(arguments))


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
