"""Triton kernels around the vocabulary, for a GPU: two designs for two purposes. Neither makes a tensor of size (N, V).

Values alone of half-precision inputs (reference, evaluation) take one fused kernel. Each program multiplies a block of
positions with blocks of the vocabulary and keeps the running maximum and sum of exponentials; no logit reaches memory.
This is the forward pass of cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009).

Values and slope (training), and float32, where only the vendor's matrix product is fast: it writes the logits of a tile
of the vocabulary, small enough for the L2 cache; a kernel turns them into unnormalised softmax weights; the vendor's
product sums the rows of W by these weights. This is attention of the hidden states over the vocabulary, with W as keys
and values and FlashAttention's running maximum (Dao et al. 2022, arXiv 2205.14135). It gives the log-probs and the slope
W[t] - softmax(z) W together.

Shape suffixes as in `log_probs`, and T of a tile of the vocabulary, S shares of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prlhf.kernels.passes import HeadGradients, Pass, Passes, Softmax

ROWS, TILE = 1024, 2048  # positions and vocabulary of a tile of logits: 8 MB in float32
BLOCK_N, BLOCK_V, BLOCK_D = 128, 128, 64  # of the fused kernel: 96 KB of shared memory in its three stages
INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter multiplies bfloat16 as if it were integers
BLOCKS_PER_SHARE = 8  # vocabulary blocks that one program of the fused kernel walks through


@triton.jit
def _fused_values(
    hidden, weight, bias, targets, max_SN, sum_SN, target_SN, N, V, D,
    HAS_BIAS: tl.constexpr, EXACT_INPUTS: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For BLOCK_N rows and one share of the vocabulary: max z, sum exp(z - max), z[target] (0 if in another share)."""
    share = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = rows < N
    target = tl.load(targets + rows, mask=in_N, other=-1)
    running_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    target_logit = tl.zeros((BLOCK_N,), tl.float32)
    hidden_rows = hidden + rows[:, None].to(tl.int64) * D
    for first in range(share * SHARE, min(V, share * SHARE + SHARE), BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        in_V = columns < V
        weight_rows = weight + columns[None, :].to(tl.int64) * D
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            h = tl.load(hidden_rows + d[None, :], mask=in_N[:, None] & (d < D)[None, :], other=0.0)
            w = tl.load(weight_rows + d[:, None], mask=(d < D)[:, None] & in_V[None, :], other=0.0)
            if EXACT_INPUTS:
                h, w = h.to(tl.float32), w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision="ieee")
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=in_V, other=0.0).to(tl.float32)[None, :]
        z = tl.where(in_V[None, :], z, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(z, axis=1))
        running_sum = running_sum * tl.exp(running_max - new_max) + tl.sum(tl.exp(z - new_max[:, None]), axis=1)
        target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
        running_max = new_max
    out = share * N + rows
    tl.store(max_SN + out, running_max, mask=in_N)
    tl.store(sum_SN + out, running_sum, mask=in_N)
    tl.store(target_SN + out, target_logit, mask=in_N)


@triton.jit
def _tile_row(logits, bias, row, columns, first, width, HAS_BIAS: tl.constexpr):
    """One row's tile of logits z, bias added; -inf beyond the tile's width."""
    inside = columns < width
    z = tl.load(logits + row * width + columns, mask=inside, other=float("-inf"))
    if HAS_BIAS:
        z += tl.load(bias + first + columns, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit
def _softmax_step(
    logits, bias, targets, running_max, running_sum, target_logit, weighted_CD, first, width, D,
    HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replace one row's tile of logits z by exp(z - max), and update the row's maximum, sum and (WEIGHTED) weighted sum."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    z = _tile_row(logits, bias, row, columns, first, width, HAS_BIAS)
    old_max = tl.load(running_max + row)
    new_max = tl.maximum(old_max, tl.max(z, axis=0))
    exponentials = tl.exp(z - new_max)
    tl.store(logits + row * width + columns, exponentials, mask=columns < width)
    shrink = tl.exp(old_max - new_max)
    tl.store(running_sum + row, tl.load(running_sum + row) * shrink + tl.sum(exponentials, axis=0))
    tl.store(running_max + row, new_max)
    hit = columns == tl.load(targets + row) - first
    tl.store(target_logit + row, tl.load(target_logit + row) + tl.sum(tl.where(hit, z, 0.0), axis=0))
    if WEIGHTED:  # noqa: SIM102 (one is known at compile time, the other at run time)
        if shrink != 1.0:  # rare after the first tiles
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                so_far = tl.load(weighted_CD + row * D + d, mask=d < D)
                tl.store(weighted_CD + row * D + d, so_far * shrink, mask=d < D)


@triton.jit
def _logits_gradient(
    logits, bias, targets, maxima, sums, grad, first, width, HAS_BIAS: tl.constexpr, TILE: tl.constexpr
):
    """Replace one row's tile of logits z by dL/dz = g (onehot(target) - softmax(z))."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    z = _tile_row(logits, bias, row, columns, first, width, HAS_BIAS)
    onehot = tl.where(columns == tl.load(targets + row) - first, 1.0, 0.0)
    softmax = tl.exp(z - tl.load(maxima + row)) / tl.load(sums + row)
    gradient = tl.load(grad + row) * (onehot - softmax)
    tl.store(logits + row * width + columns, gradient, mask=columns < width)


def one_pass(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, slope: bool) -> Pass:
    """log p, the softmax's parts, and the slope if asked for. Inputs all in float32, bfloat16 or float16."""
    hidden_ND = _checked(hidden_ND, weight_VD, bias_V)
    if not slope and hidden_ND.dtype != torch.float32:
        return _fused(hidden_ND, weight_VD, bias_V, targets_N)
    N = len(hidden_ND)
    log_p_N, max_N, sum_N = hidden_ND.new_empty(3, N, dtype=torch.float32)
    slope_ND = torch.empty_like(hidden_ND, dtype=torch.float32) if slope else None
    for start in range(0, N, ROWS):
        part = slice(start, start + ROWS)
        slope_CD = None if slope_ND is None else slope_ND[part].zero_()
        outputs = _tiled(hidden_ND[part], weight_VD, bias_V, targets_N[part], slope_CD)
        log_p_N[part], max_N[part], sum_N[part] = outputs.log_p_N, *outputs.softmax
    return Pass(log_p_N, Softmax(max_N, sum_N), slope_ND)


def _fused(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Pass:
    (N, D), V = hidden_ND.shape, len(weight_VD)
    share = BLOCK_V * BLOCKS_PER_SHARE
    shares = triton.cdiv(V, share)
    max_SN, sum_SN, target_SN = hidden_ND.new_empty(3, shares, N, dtype=torch.float32)
    if N:
        _fused_values[triton.cdiv(N, BLOCK_N), shares](
            hidden_ND, weight_VD, bias_V, targets_N, max_SN, sum_SN, target_SN, N, V, D,
            HAS_BIAS=bias_V is not None, EXACT_INPUTS=INTERPRETED, SHARE=share, BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D,
            num_warps=8, num_stages=3,
        )  # fmt: skip
    max_N = max_SN.amax(dim=0)
    sum_N = (sum_SN * (max_SN - max_N).exp()).sum(dim=0)
    return Pass(target_SN.sum(dim=0) - max_N - sum_N.log(), Softmax(max_N, sum_N), None)


def _tiled(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_C: Tensor, slope_CD: Tensor | None
) -> Pass:
    """One pass for a chunk of positions. slope_CD: zeros, into which the slope is written; None for no slope."""
    C, D = hidden_CD.shape
    max_C = hidden_CD.new_full((C,), float("-inf"), dtype=torch.float32)
    sum_C, target_C = max_C.new_zeros(C), max_C.new_zeros(C)
    for first in range(0, len(weight_VD), TILE):
        tile_TD = weight_VD[first : first + TILE]
        logits_CT = _product(hidden_CD, tile_TD.T)
        _softmax_step[(C,)](
            logits_CT, bias_V, targets_C, max_C, sum_C, target_C, slope_CD, first, len(tile_TD), D,
            HAS_BIAS=bias_V is not None, WEIGHTED=slope_CD is not None, TILE=TILE, BLOCK_D=1024,
        )  # fmt: skip
        if slope_CD is not None:
            _add_product(slope_CD, logits_CT.to(hidden_CD.dtype), tile_TD)
    if slope_CD is not None:  # so far it is the unnormalised softmax(z) W
        slope_CD.div_(-sum_C[:, None]).add_(weight_VD[targets_C])
    return Pass(target_C - max_C - sum_C.log(), Softmax(max_C, sum_C), slope_CD)


def head_gradients(
    grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softmax: Softmax
) -> HeadGradients:
    """dL/dW and dL/db from g = dL/d log p (N,) in float32; computes the logits again, tile by tile."""
    hidden_ND = _checked(hidden_ND, weight_VD, bias_V)
    weight_grad_VD = torch.empty_like(weight_VD)
    bias_grad_V = None if bias_V is None else torch.empty_like(bias_V)
    for first in range(0, len(weight_VD), TILE):
        tile_TD = weight_VD[first : first + TILE]
        tile_grad_TD, tile_grad_T = softmax.sum_N.new_zeros(tile_TD.shape), softmax.sum_N.new_zeros(len(tile_TD))
        chunks = zip(*(t.split(ROWS) for t in (hidden_ND, targets_N, *softmax, grad_N.contiguous())))
        for hidden_CD, targets_C, max_C, sum_C, grad_C in chunks if len(hidden_ND) else ():
            logits_CT = _product(hidden_CD, tile_TD.T)
            _logits_gradient[(len(hidden_CD),)](
                logits_CT, bias_V, targets_C, max_C, sum_C, grad_C, first, len(tile_TD),
                HAS_BIAS=bias_V is not None, TILE=TILE,
            )  # fmt: skip
            _add_product(tile_grad_TD, logits_CT.to(hidden_CD.dtype).T, hidden_CD)
            tile_grad_T += logits_CT.sum(dim=0)
        weight_grad_VD[first : first + TILE] = tile_grad_TD
        if bias_grad_V is not None:
            bias_grad_V[first : first + TILE] = tile_grad_T
    return HeadGradients(weight_grad_VD, bias_grad_V)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum += a @ b, accumulated in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(sum_, a, b, out_dtype=torch.float32, out=sum_)
    else:
        sum_.addmm_(a.float(), b.float())


def _checked(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """The hidden states, contiguous. ValueError for inputs that the kernels do not take."""
    types = {t.dtype for t in (hidden_ND, weight_VD, bias_V) if t is not None}
    if len(types) != 1 or not types <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"hidden states, weight and bias have types {sorted(map(str, types))}; expected one half or single"
        )
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden states of width {hidden_ND.shape[1]}, weight of width {weight_VD.shape[1]}")
    if not weight_VD.is_contiguous():
        raise ValueError("the head's weight is not contiguous")
    return hidden_ND.contiguous()


TRITON = Passes(one_pass, head_gradients)
