"""Log-probabilities of tokens from hidden states and head weights, without the logits of a whole batch in memory.

    log_p(n) = z_n[t_n] - logsumexp(z_n),   z_n = h_n W^T + b

The gradient for the hidden states needs the softmax s_n of the same logits:

    d log_p(n) / d h_n = W[t_n] - s_n W

One pass over the vocabulary gives log_p and this slope; the backward pass multiplies the slope by the incoming gradient.
Recomputing the logits in the backward pass instead takes three matrix products; this takes two. Slopes are as large as
the hidden states, so only KEPT_SLOPES elements are kept, and the others computed again. The head's gradient, if the head
is trained, computes the logits again:

    d L / d W = sum_n g_n (onehot(t_n) - s_n)^T h_n,   g_n = dL / d log_p(n)

Some models cap their logits, z = c tanh((h W^T + b) / c). The chunked implementation alone computes that (`chunked`).

Shape suffixes: N positions, K positions with kept slopes, C positions of a chunk, D width, V vocabulary.
"""

import importlib.util
import os

import torch
from torch import Tensor

from prlhf.errors import UserError
from prlhf.kernels.chunked import chunked_with, logits
from prlhf.kernels.passes import HeadGradients, Passes, Softmax, accumulation_type

IGNORED = -100  # a target whose log-prob and gradient are 0
KEPT_SLOPES = 2**22  # elements of the slopes kept for the backward pass: 16 MB in float32
RECOMPUTED = 1024  # positions whose slopes the backward pass computes at a time, beyond those kept


def log_probs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    impl: str | Passes | None = None,
    softcap: float | None = None,
) -> Tensor:
    """log p(target) at each position, (N,), in float32 (float64 for float64 inputs); 0 where a target is IGNORED.

    Logits are accumulated in float32 whatever the inputs' type. impl: "torch" computes all logits at once and is the
    readable reference; "chunked" those of some positions at a time; "triton" those of a tile of the vocabulary (on a GPU
    or with TRITON_INTERPRET=1; not for float64, nor with a softcap); `Passes` are an implementation themselves. None: triton
    on a GPU where it can, else chunked. ValueError for any other, UserError for triton where it does not run.
    """
    if impl is None:
        takes = hidden_ND.is_cuda and hidden_ND.dtype != torch.float64 and softcap is None
        kernels = takes and importlib.util.find_spec("triton")
        impl = "triton" if kernels else "chunked"
    real_N = targets_N != IGNORED
    targets_N = torch.where(real_N, targets_N, 0)
    if impl == "torch":
        logits_NV = logits(hidden_ND, weight_VD.to(accumulation_type(hidden_ND.dtype)), bias_V, softcap)
        log_p_N = logits_NV.log_softmax(dim=1).gather(1, targets_N[:, None])[:, 0]
    else:
        slope = torch.is_grad_enabled() and hidden_ND.requires_grad
        passes = _passes(impl, hidden_ND.is_cuda, softcap)
        log_p_N = _LogProbs.apply(hidden_ND, weight_VD, bias_V, targets_N, slope, passes)
    return torch.where(real_N, log_p_N, 0.0)


def _passes(impl: str | Passes, on_gpu: bool, softcap: float | None) -> Passes:
    """An implementation by its name."""
    if isinstance(impl, Passes):
        return impl
    if impl == "chunked":
        return chunked_with(softcap)
    if impl != "triton":
        raise ValueError(f"impl {impl!r}: expected one of torch, chunked, triton")
    if not (on_gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        raise UserError("model.log_probs: found 'triton', but the model is not on a GPU; expected null or 'chunked'")
    if softcap is not None:
        raise UserError("model.log_probs: found 'triton', but the model caps its logits; expected null or 'chunked'")
    return importlib.import_module("prlhf.kernels.triton").TRITON  # here: only torch for GPUs comes with Triton


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, slope: bool, passes: Passes) -> Tensor:
        K = min(len(hidden_ND), KEPT_SLOPES // hidden_ND.shape[1]) if slope else 0
        parts = [passes.one_pass(hidden_ND[:K], weight_VD, bias_V, targets_N[:K], True)] if K else []
        slope_KD = parts[0].slope_ND if K else None
        if not K or len(hidden_ND) > K:
            parts.append(passes.one_pass(hidden_ND[K:], weight_VD, bias_V, targets_N[K:], False))
        softmax = Softmax(*(torch.cat(both) for both in zip(*(part.softmax for part in parts))))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, *softmax, slope_KD)
        ctx.passes = passes
        return torch.cat([part.log_p_N for part in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):
        hidden_ND, weight_VD, bias_V, targets_N, *softmax, slope_KD = ctx.saved_tensors
        hidden_grad_ND, head_grad = None, HeadGradients(None, None)
        if ctx.needs_input_grad[0]:
            hidden_grad_ND, K = torch.empty_like(hidden_ND), 0 if slope_KD is None else len(slope_KD)
            if K:
                hidden_grad_ND[:K] = grad_N[:K, None] * slope_KD
            for start in range(K, len(hidden_ND), RECOMPUTED):
                part = slice(start, start + RECOMPUTED)
                slope_CD = ctx.passes.one_pass(hidden_ND[part], weight_VD, bias_V, targets_N[part], True).slope_ND
                hidden_grad_ND[part] = slope_CD.mul_(grad_N[part, None])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            head_grad = ctx.passes.head_gradients(grad_N, hidden_ND, weight_VD, bias_V, targets_N, Softmax(*softmax))
        return hidden_grad_ND, head_grad.weight_VD, head_grad.bias_V, None, None, None
