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

import importlib.util
import os

import torch
from torch import Tensor

from prlhf.errors import UserError
from prlhf.kernels.chunked import CHUNKED
from prlhf.kernels.passes import HeadGradients, Passes, Softmax, accumulation_type

IMPLEMENTATIONS = ("torch", "chunked", "triton")
IGNORED = -100  # a target that counts nothing: its log-prob and gradient are 0
KEPT_SLOPES = 2**22  # elements of the slopes kept for the backward pass: 16 MB in float32
RECOMPUTED = 1024  # positions whose slopes are computed at a time in the backward pass, beyond those kept


def log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, impl: str | Passes | None = None
) -> Tensor:
    """log p(target) at each position, (N,), in float32 (float64 for float64 inputs); 0 where a target is IGNORED.

    impl: "torch" computes all logits at once and is the readable reference; "chunked" the logits of some positions at a
    time; "triton" those of a tile of the vocabulary (a GPU, or TRITON_INTERPRET=1; not for float64); `Passes` are an
    implementation themselves. None: triton on a GPU, else chunked. ValueError for another one, UserError for triton where it does not run. Logits are accumulated in float32
    whatever the inputs' type.
    """
    if impl is None:
        kernels = hidden_ND.is_cuda and hidden_ND.dtype != torch.float64 and importlib.util.find_spec("triton")
        impl = "triton" if kernels else "chunked"
    if impl == "triton" and not (hidden_ND.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UserError("model.log_probs: found 'triton', but the model is not on a GPU; expected null or 'chunked'")
    if not isinstance(impl, Passes) and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    real_N = targets_N != IGNORED
    targets_N = torch.where(real_N, targets_N, 0)
    if impl == "torch":
        log_p_N = _readable(hidden_ND, weight_VD, bias_V, targets_N)
    else:
        slope = torch.is_grad_enabled() and hidden_ND.requires_grad
        log_p_N = _LogProbs.apply(hidden_ND, weight_VD, bias_V, targets_N, slope, _passes(impl))
    return torch.where(real_N, log_p_N, 0.0)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, slope: bool, passes: Passes) -> Tensor:
        one_pass = passes.one_pass
        kept = min(len(hidden_ND), KEPT_SLOPES // hidden_ND.shape[1]) if slope else 0
        parts, slope_KD = [], None
        if kept:
            parts.append(one_pass(hidden_ND[:kept], weight_VD, bias_V, targets_N[:kept], True))
            slope_KD = parts[0].slope_ND
        if kept < len(hidden_ND) or not parts:
            parts.append(one_pass(hidden_ND[kept:], weight_VD, bias_V, targets_N[kept:], False))
        softmax = Softmax(*(torch.cat(both) for both in zip(*(part.softmax for part in parts))))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, *softmax, slope_KD)
        ctx.passes = passes
        return torch.cat([part.log_p_N for part in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):
        *inputs, max_N, sum_N, slope_KD = ctx.saved_tensors
        hidden_ND, weight_VD, bias_V, targets_N = inputs
        one_pass, head_gradients = ctx.passes
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


def _passes(impl: str | Passes) -> Passes:
    """An implementation by its name. Triton is imported here, where it is used: it comes with torch for GPUs alone."""
    if isinstance(impl, Passes):
        return impl
    return CHUNKED if impl == "chunked" else importlib.import_module("prlhf.kernels.triton").TRITON


def _readable(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    dtype = accumulation_type(hidden_ND.dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_NV = torch.nn.functional.linear(hidden_ND.to(dtype), weight_VD.to(dtype), bias_V)
    return logits_NV.log_softmax(dim=1).gather(1, targets_N[:, None])[:, 0]
