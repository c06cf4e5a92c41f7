"""Log-probabilities in plain torch, the logits of some positions at a time.

Shape suffixes: N positions, C positions of a chunk, D width, V vocabulary.
"""

import torch
from torch import Tensor

from prlhf.kernels.passes import HeadGradients, Pass, Passes, Softmax, accumulation_type

CHUNK_LOGITS = 2**24  # logits in memory at once: 64 MB in float32; fewer are slower on a CPU


def logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits (C, V) in the type of `weight_VD`, in which they are accumulated."""
    bias_V = None if bias_V is None else bias_V.to(weight_VD.dtype)
    return torch.nn.functional.linear(hidden_CD.to(weight_VD.dtype), weight_VD, bias_V)


def chunked_pass(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, slope: bool) -> Pass:
    """One pass over the vocabulary; the slope W[t] - softmax(z) W if asked for."""
    wide_VD = weight_VD.to(accumulation_type(hidden_ND.dtype))
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    log_p, maxima, sums, slopes = [], [], [], []
    for hidden_CD, targets_C in zip(hidden_ND.split(size), targets_N.split(size)):
        logits_CV = logits(hidden_CD, wide_VD, bias_V)
        max_C = logits_CV.amax(dim=1)
        target_C = logits_CV.gather(1, targets_C[:, None])[:, 0] - max_C
        exponentials_CV = logits_CV.sub_(max_C[:, None]).exp_()
        sum_C = exponentials_CV.sum(dim=1)
        log_p.append(target_C - sum_C.log())
        maxima.append(max_C)
        sums.append(sum_C)
        if slope:
            slopes.append(wide_VD[targets_C] - (exponentials_CV @ wide_VD).div_(sum_C[:, None]))
    return Pass(torch.cat(log_p), Softmax(torch.cat(maxima), torch.cat(sums)), torch.cat(slopes) if slope else None)


def chunked_head_gradients(
    grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softmax: Softmax
) -> HeadGradients:
    """The head's gradients for g = dL / d log p: sum_n dL/dz_n^T h_n with dL/dz = g (onehot(t) - softmax(z))."""
    dtype = accumulation_type(hidden_ND.dtype)
    wide_VD = weight_VD.to(dtype)
    weight_grad_VD, bias_grad_V = torch.zeros_like(wide_VD), wide_VD.new_zeros(len(wide_VD))
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    scale_N = -grad_N / softmax.sum_N
    chunks = zip(*(t.split(size) for t in (hidden_ND, targets_N, softmax.max_N, scale_N, grad_N)))
    for hidden_CD, targets_C, max_C, scale_C, grad_C in chunks:
        logits_grad_CV = logits(hidden_CD, wide_VD, bias_V).sub_(max_C[:, None]).exp_().mul_(scale_C[:, None])
        logits_grad_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])
        weight_grad_VD.addmm_(logits_grad_CV.T, hidden_CD.to(dtype))
        bias_grad_V += logits_grad_CV.sum(dim=0)
    return HeadGradients(weight_grad_VD.to(weight_VD.dtype), None if bias_V is None else bias_grad_V.to(bias_V.dtype))


CHUNKED = Passes(chunked_pass, chunked_head_gradients)
