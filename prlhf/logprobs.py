"""Log-probabilities of tokens from hidden states and head weights, without the logits of a whole batch in memory.

    log_p(n) = z_n[t_n] - logsumexp(z_n),   z_n = h_n W^T + b

Its gradient for the hidden states needs only the softmax s_n of the same logits:

    d log_p(n) / d h_n = W[t_n] - s_n W

which is known as soon as the logits are: one pass over the vocabulary gives log_p and this slope, and the backward pass
multiplies the slope by the incoming gradient. The head's own gradient, where it is trained, computes the logits again:

    d L / d W = sum_n g_n (onehot(t_n) - s_n)^T h_n,   g_n = dL / d log_p(n)

(The usual order, forward and then recomputing backward, takes three matrix products for the hidden states' gradient; this
takes two, as long as the slopes, which are as large as the hidden states, find room.)

Shape suffixes: N positions, D width, V vocabulary, C positions of a chunk.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.errors import UserError

IMPLEMENTATIONS = ("torch", "chunked", "triton")
IGNORED = -100  # a target that counts nothing: its log-prob and gradient are 0
CHUNK_LOGITS = 2**24  # logits in memory at once, for `chunked`: 64 MB in float32; fewer are slower on a CPU
KEPT_SLOPES = 2**22  # elements of the slopes kept for the backward pass: 16 MB in float32
RECOMPUTED = 1024  # positions whose slopes are computed at a time in the backward pass, beyond those kept


def log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, impl: str | None = None
) -> Tensor:
    """log p(target) at each position, (N,), in float32 (float64 for float64 inputs); 0 where a target is IGNORED.

    impl: "torch" computes all logits at once and is the readable reference; "chunked" the logits of some positions at a
    time; "triton" those of a tile of the vocabulary (a GPU, or TRITON_INTERPRET=1; not for float64). None: triton on a GPU,
    else chunked. ValueError for another one, UserError for triton where it does not run. Logits are accumulated in float32
    whatever the inputs' type.
    """
    if impl is None:
        kernels = hidden_ND.is_cuda and hidden_ND.dtype != torch.float64 and importlib.util.find_spec("triton")
        impl = "triton" if kernels else "chunked"
    if impl == "triton" and not (hidden_ND.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UserError("model.log_probs: found 'triton', but the model is not on a GPU; expected null or 'chunked'")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    real_N = targets_N != IGNORED
    targets_N = torch.where(real_N, targets_N, 0)
    if impl == "torch":
        log_p_N = _readable(hidden_ND, weight_VD, bias_V, targets_N)
    else:
        slope = torch.is_grad_enabled() and hidden_ND.requires_grad
        log_p_N = _LogProbs.apply(hidden_ND, weight_VD, bias_V, targets_N, slope, impl)
    return torch.where(real_N, log_p_N, 0.0)


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Softmax(NamedTuple):
    """What softmax(z) is computed from again, both (N,): max z and sum exp(z - max z), apart for the sake of precision."""

    max_N: Tensor
    sum_N: Tensor


class Pass(NamedTuple):
    """What one pass over the vocabulary gives: log p (N,), the softmax's parts, and d log p / d hidden (N, D) if asked.

    All in the accumulation's type, so that a gradient is rounded to the hidden states' type once.
    """

    log_p_N: Tensor
    softmax: Softmax
    slope_ND: Tensor | None


class HeadGradients(NamedTuple):
    """dL/dW (V, D) and dL/db (V,)."""

    weight_VD: Tensor
    bias_V: Tensor | None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, slope: bool, impl: str) -> Tensor:
        one_pass, _ = _passes(impl)
        kept = min(len(hidden_ND), KEPT_SLOPES // hidden_ND.shape[1]) if slope else 0
        parts, slope_KD = [], None
        if kept:
            parts.append(one_pass(hidden_ND[:kept], weight_VD, bias_V, targets_N[:kept], True))
            slope_KD = parts[0].slope_ND
        if kept < len(hidden_ND) or not parts:
            parts.append(one_pass(hidden_ND[kept:], weight_VD, bias_V, targets_N[kept:], False))
        softmax = Softmax(*(torch.cat(both) for both in zip(*(part.softmax for part in parts))))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, *softmax, slope_KD)
        ctx.impl = impl
        return torch.cat([part.log_p_N for part in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):
        *inputs, max_N, sum_N, slope_KD = ctx.saved_tensors
        hidden_ND, weight_VD, bias_V, targets_N = inputs
        one_pass, head_gradients = _passes(ctx.impl)
        hidden_grad_ND, head_grad = None, HeadGradients(None, None)
        if ctx.needs_input_grad[0]:
            hidden_grad_ND, kept = torch.empty_like(hidden_ND), 0 if slope_KD is None else len(slope_KD)
            if kept:
                hidden_grad_ND[:kept] = grad_N[:kept, None] * slope_KD
            for start in range(kept, len(hidden_ND), RECOMPUTED):
                part = slice(start, start + RECOMPUTED)
                slope_CD = one_pass(hidden_ND[part], weight_VD, bias_V, targets_N[part], True).slope_ND
                hidden_grad_ND[part] = slope_CD.mul_(grad_N[part, None])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            head_grad = head_gradients(grad_N, *inputs, Softmax(max_N, sum_N))
        return hidden_grad_ND, head_grad.weight_VD, head_grad.bias_V, None, None, None


def _passes(impl: str) -> tuple[Callable[..., Pass], Callable[..., HeadGradients]]:
    """The pass over the vocabulary and the head's gradients of an implementation.

    Triton's are imported where they are used: Triton comes with torch for GPUs alone.
    """
    if impl == "chunked":
        return chunked_pass, chunked_head_gradients
    kernels = importlib.import_module("prlhf.logprobs_triton")
    return kernels.one_pass, kernels.head_gradients


def _readable(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    dtype = accumulation_type(hidden_ND.dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_NV = torch.nn.functional.linear(hidden_ND.to(dtype), weight_VD.to(dtype), bias_V)
    return logits_NV.log_softmax(dim=1).gather(1, targets_N[:, None])[:, 0]


def _chunk_logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits (C, V) in the type of `weight_VD`, which is that of accumulation."""
    bias_V = None if bias_V is None else bias_V.to(weight_VD.dtype)
    return torch.nn.functional.linear(hidden_CD.to(weight_VD.dtype), weight_VD, bias_V)


def chunked_pass(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, slope: bool) -> Pass:
    """One pass in plain torch, CHUNK_LOGITS logits at a time."""
    wide_VD = weight_VD.to(accumulation_type(hidden_ND.dtype))
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    log_p, maxima, sums, slopes = [], [], [], []
    for hidden_CD, targets_C in zip(hidden_ND.split(size), targets_N.split(size)):
        logits_CV = _chunk_logits(hidden_CD, wide_VD, bias_V)
        max_C = logits_CV.amax(dim=1)
        target_C = logits_CV.gather(1, targets_C[:, None])[:, 0] - max_C
        exponentials_CV = logits_CV.sub_(max_C[:, None]).exp_()
        sum_C = exponentials_CV.sum(dim=1)
        log_p.append(target_C - sum_C.log())
        maxima.append(max_C)
        sums.append(sum_C)
        if slope:
            slopes.append(wide_VD[targets_C] - (exponentials_CV @ wide_VD).div_(sum_C[:, None]))
    softmax = Softmax(torch.cat(maxima), torch.cat(sums))
    return Pass(torch.cat(log_p), softmax, torch.cat(slopes) if slope else None)


def chunked_head_gradients(
    grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softmax: Softmax
) -> HeadGradients:
    """The head's gradients in plain torch, CHUNK_LOGITS logits at a time."""
    dtype = accumulation_type(hidden_ND.dtype)
    wide_VD = weight_VD.to(dtype)
    weight_grad_VD, bias_grad_V = torch.zeros_like(wide_VD), wide_VD.new_zeros(len(wide_VD))
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    scale_N = -grad_N / softmax.sum_N
    chunks = zip(*(t.split(size) for t in (hidden_ND, targets_N, softmax.max_N, scale_N, grad_N)))
    for hidden_CD, targets_C, max_C, scale_C, grad_C in chunks:
        logits_grad_CV = _chunk_logits(hidden_CD, wide_VD, bias_V).sub_(max_C[:, None]).exp_().mul_(scale_C[:, None])
        logits_grad_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])
        weight_grad_VD.addmm_(logits_grad_CV.T, hidden_CD.to(dtype))
        bias_grad_V += logits_grad_CV.sum(dim=0)
    return HeadGradients(weight_grad_VD.to(weight_VD.dtype), None if bias_V is None else bias_grad_V.to(bias_V.dtype))
