"""Tensors from the CPU to a device, in one copy that nobody waits for."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; at least the size of an element of any type


def moved(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors, of any shapes and types, on `device`.

    To a GPU they go as one pinned buffer. The host does not wait, so it prepares the next micro-batch while the GPU works; a
    copy from ordinary memory would wait for all that the GPU has still to do.
    """
    if torch.device(device).type != "cuda":
        return [t.to(device) for t in tensors]
    ends = [0]
    for t in tensors:
        ends.append(ends[-1] + -(-t.nbytes // ALIGNMENT) * ALIGNMENT)
    places = [slice(start, start + t.nbytes) for start, t in zip(ends, tensors)]
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    for place, t in zip(places, tensors):
        buffer[place].view(t.dtype).view(t.shape).copy_(t)
    there = buffer.to(device, non_blocking=True)
    # Copied once more, there: views of one buffer would count each other's changes, and torch.compile tells views apart.
    return [there[place].view(t.dtype).view(t.shape).clone() for place, t in zip(places, tensors)]
