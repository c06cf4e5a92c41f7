"""Attention on a CPU that leaves out what the mask hides.

Of a preference tree's T x T pairs of positions most are hidden: what is ahead, and what stands in another branch. torch's kernel
for CPUs computes them all the same. Here each block of neighbouring queries is computed by that kernel over the keys alone
that any of them sees; the numbers are the same but for rounding. (FlexAttention does so by blocks of keys too, and on a CPU has no
backward pass.)

Shape suffixes: R rows, H heads of queries, G heads of keys (H is a multiple), T positions, Q queries of a block, K keys of it,
d width of a head.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries; twice as many take about as long

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextlib.contextmanager
def in_blocks_of(queries: int) -> Iterator[None]:
    """Within the context rows of a few positions are computed so too: for checks."""
    global BLOCK
    before, BLOCK = BLOCK, queries
    try:
        yield
    finally:
        BLOCK = before


class Block(NamedTuple):
    """Neighbouring queries of a row, and the keys that any of them sees."""

    row: slice
    queries: slice
    keys_K: Tensor  # positions
    mask_11QK: Tensor  # additive

    def of(self, *heads_RGTd: Tensor) -> list[Tensor]:
        """Keys, values or their like, at the block's keys, (1, G, K, d) each."""
        return [t[self.row].index_select(2, self.keys_K) for t in heads_RGTd]


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float) -> bool:
    """Whether `visible_attention` computes this: on a CPU, a square additive mask that hides something, one for all heads. Rows of
    up to two blocks gain nothing."""
    return (
        query.device.type == "cpu"
        and not isinstance(query, FakeTensor)  # of the dry run, which counts the same
        and not torch.compiler.is_compiling()
        and dropout == 0
        and query.stride(-1) == 1  # the kernel takes it for granted
        and not mask.requires_grad
        and query.dtype == key.dtype == value.dtype == mask.dtype
        # Which keys a block has depends on its neighbours, and in a half type what is rounded would show it.
        and query.dtype.itemsize >= 4
        and query.shape[-1] == value.shape[-1]
        and mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
        and 2 * BLOCK < query.shape[2] == key.shape[2]
        and bool(blocks(mask))
    )


def blocks(mask_R1TT: Tensor) -> list[Block]:
    """The blocks of an additive mask; none where it hides nothing by -inf. They are made once and kept with the mask, which all
    of a model's layers are given."""
    made: list[Block] | None = getattr(mask_R1TT, "blocks", None)
    if made is None:
        hidden_RTT = mask_R1TT[:, 0].isneginf()
        made = _cut(mask_R1TT, ~hidden_RTT) if hidden_RTT.any() else []
        mask_R1TT.blocks = made
    return made


def _cut(mask_R1TT: Tensor, seen_RTT: Tensor) -> list[Block]:
    R, _, T, _ = mask_R1TT.shape
    found = []
    for r in range(R):
        for start in range(0, T, BLOCK):
            queries = slice(start, min(start + BLOCK, T))
            keys_K = seen_RTT[r, queries].any(dim=0).nonzero().flatten()
            mask_11QK = mask_R1TT[r : r + 1, :, queries].index_select(3, keys_K)
            found.append(Block(slice(r, r + 1), queries, keys_K, mask_11QK))
    return found


def visible_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """softmax(scale Q K^T + mask) V over what each block of queries sees, (R, H, T, d), for what `takes` accepts.

    scale: 1 / sqrt(d) by default. Kept for the backward pass: query, key, value, the output and the logarithm of each softmax's
    sum, as by scaled_dot_product_attention.
    """
    return _VisibleAttention.apply(query, key, value, blocks(mask), scale)


class _VisibleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: list[Block], scale: float | None) -> Tensor:
        output_RHTd, log_sums = torch.empty_like(query), []
        for part in parts:
            found, log_sum = attend(
                query[part.row, :, part.queries], *part.of(key, value), attn_mask=part.mask_11QK, scale=scale
            )
            output_RHTd[part.row, :, part.queries] = found
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, output_RHTd, *log_sums)
        ctx.parts, ctx.scale = parts, scale
        return output_RHTd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *log_sums = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for part, log_sum in zip(ctx.parts, log_sums):
            at = (part.row, slice(None), part.queries)
            dq, dk, dv = attend_backward(
                gradient[at], query[at], *part.of(key, value), output[at], log_sum, 0.0, False,
                attn_mask=part.mask_11QK, scale=ctx.scale,
            )  # fmt: skip
            of_query[at] = dq
            of_key[part.row].index_add_(2, part.keys_K, dk)
            of_value[part.row].index_add_(2, part.keys_K, dv)
        return of_query, of_key, of_value, None, None
