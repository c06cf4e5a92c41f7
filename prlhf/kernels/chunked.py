"""Log-probabilities in plain torch, the logits of some positions at a time.

With a softcap c (Gemma 2) the logits are z = c tanh(a / c) of a = h W^T + b, so dz/da = 1 - (z / c)^2.

Shape suffixes: N positions, C positions of a chunk, D width, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor

from prlhf.kernels.passes import HeadGradients, Pass, Passes, Softmax, accumulation_type

CHUNK_LOGITS = 2**24  # logits in memory at once: 64 MB in float32; fewer are slower on a CPU


def logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None = None) -> Tensor:
    """Logits (C, V) in the type of `weight_VD`, in which they are accumulated."""
    bias_V = None if bias_V is None else bias_V.to(weight_VD.dtype)
    logits_CV = torch.nn.functional.linear(hidden_CD.to(weight_VD.dtype), weight_VD, bias_V)
    return logits_CV if softcap is None else torch.tanh(logits_CV / softcap) * softcap


def chunked_pass(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    slope: bool,
    softcap: float | None = None,
) -> Pass:
    """One pass over the vocabulary; the slope (dz/da)[t] W[t] - (softmax(z) dz/da) W if asked for."""
    wide_VD = weight_VD.to(accumulation_type(hidden_ND.dtype))
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    log_p, maxima, sums, slopes = [], [], [], []
    for hidden_CD, targets_C in zip(hidden_ND.split(size), targets_N.split(size)):
        logits_CV = logits(hidden_CD, wide_VD, bias_V, softcap)
        derivative_CV = _derivative(logits_CV, softcap) if slope else None
        max_C = logits_CV.amax(dim=1)
        target_C = logits_CV.gather(1, targets_C[:, None])[:, 0] - max_C
        exponentials_CV = logits_CV.sub_(max_C[:, None]).exp_()
        sum_C = exponentials_CV.sum(dim=1)
        log_p.append(target_C - sum_C.log())
        maxima.append(max_C)
        sums.append(sum_C)
        if slope:
            target_CD = wide_VD[targets_C]
            if derivative_CV is not None:
                exponentials_CV *= derivative_CV
                target_CD = target_CD * derivative_CV.gather(1, targets_C[:, None])
            slopes.append(target_CD - (exponentials_CV @ wide_VD).div_(sum_C[:, None]))
    return Pass(torch.cat(log_p), Softmax(torch.cat(maxima), torch.cat(sums)), torch.cat(slopes) if slope else None)


def chunked_head_gradients(
    grad_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softmax: Softmax,
    softcap: float | None = None,
) -> HeadGradients:
    """The head's gradients for g = dL / d log p: sum_n dL/da_n^T h_n with dL/da = g (onehot(t) - softmax(z)) dz/da."""
    dtype = accumulation_type(hidden_ND.dtype)
    wide_VD = weight_VD.to(dtype)
    weight_grad_VD, bias_grad_V = torch.zeros_like(wide_VD), wide_VD.new_zeros(len(wide_VD))
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    scale_N = -grad_N / softmax.sum_N
    chunks = zip(*(t.split(size) for t in (hidden_ND, targets_N, softmax.max_N, scale_N, grad_N)))
    for hidden_CD, targets_C, max_C, scale_C, grad_C in chunks:
        logits_CV = logits(hidden_CD, wide_VD, bias_V, softcap)
        derivative_CV = _derivative(logits_CV, softcap)
        logits_grad_CV = logits_CV.sub_(max_C[:, None]).exp_().mul_(scale_C[:, None])
        logits_grad_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])
        if derivative_CV is not None:
            logits_grad_CV *= derivative_CV
        weight_grad_VD.addmm_(logits_grad_CV.T, hidden_CD.to(dtype))
        bias_grad_V += logits_grad_CV.sum(dim=0)
    return HeadGradients(weight_grad_VD.to(weight_VD.dtype), None if bias_V is None else bias_grad_V.to(bias_V.dtype))


def _derivative(logits_CV: Tensor, softcap: float | None) -> Tensor | None:
    """dz/da, None where it is 1."""
    return None if softcap is None else 1 - (logits_CV / softcap).square()


CHUNKED = Passes(chunked_pass, chunked_head_gradients)


def chunked_with(softcap: float | None) -> Passes:
    """`CHUNKED` for capped logits."""
    if softcap is None:
        return CHUNKED
    return Passes(partial(chunked_pass, softcap=softcap), partial(chunked_head_gradients, softcap=softcap))
