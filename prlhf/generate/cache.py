"""The keys and values of decoding, in room that grows in steps."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

STEP = 64  # columns


class GrowingLayer(DynamicLayer):
    """A block's keys and values, (R, H, T, d), as views of room for more columns: a new token is written beside the others.

    `DynamicLayer` copies all of them for every token. The room, (R, columns, H, d), is a multiple of STEP, and grows by a
    quarter. Every position is kept, for models with a sliding window too.
    """

    keys: Tensor
    values: Tensor
    _rooms: tuple[Tensor, ...]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for no column yet, (R, H, 0, d)."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._show(*(states.transpose(1, 2)[:, :0] for states in (key_states, value_states)), columns=0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append (R, H, S, d); all keys and values, (R, H, T + S, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, columns = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if columns > self._rooms[0].shape[1]:
            wanted = -(-(columns + columns // 4) // STEP) * STEP
            self._rooms = tuple(_larger(room, old, wanted) for room in self._rooms)
        for room, states in zip(self._rooms, (key_states, value_states)):
            room[:, old:columns] = states.transpose(1, 2)
        self._show(*self._rooms, columns=columns)
        return self.keys, self.values

    def gather(self, cells_RT: Tensor) -> None:
        """Make up new rows, (R', T'), of the flat cells (row * T + column) of the present ones."""
        gathered = (shown.transpose(1, 2).flatten(0, 1)[cells_RT] for shown in (self.keys, self.values))
        self._show(*gathered, columns=cells_RT.shape[1])

    def _show(self, *rooms: Tensor, columns: int) -> None:
        self._rooms = rooms
        self.keys, self.values = (room[:, :columns].transpose(1, 2) for room in rooms)


class GrowingCache(Cache):
    """The cache of a whole model."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def gather(self, cells_RT: Tensor) -> None:
        """As `GrowingLayer.gather`, in every block."""
        for layer in self.layers:
            layer.gather(cells_RT)


def _larger(room: Tensor, columns: int, wanted: int) -> Tensor:
    """Room (R, wanted, H, d), with the first columns of `room`."""
    larger = torch.empty(room.shape[0], wanted, *room.shape[2:], dtype=room.dtype, device=room.device)
    larger[:, :columns] = room[:, :columns]
    return larger
