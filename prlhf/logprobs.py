"""Per-token log-probabilities from hidden states and head weights.

    log_probs(n) = z_n[target_n] - logsumexp(z_n),   z_n = hidden_n W^T + b

Logits exist only for the positions asked for. Shape suffixes: N positions, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions whose logits are in memory at once, for `chunked`


def log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, impl: str = "chunked"
) -> Tensor:
    """log p(target) at each position, (N,) in float32 at least.

    impl: "torch" computes all logits at once and is the readable reference; "chunked" does so for CHUNK positions at
    a time and computes them again in the backward pass, so that no (N, V) tensor is kept.
    """
    if impl == "torch" or (impl == "chunked" and len(targets_N) <= CHUNK):
        return _log_probs(hidden_ND, weight_VD, bias_V, targets_N)
    if impl != "chunked":
        raise ValueError(f"impl {impl!r}: expected 'torch' or 'chunked'")
    chunks = zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK))
    return torch.cat([checkpoint(_log_probs, h, weight_VD, bias_V, t, use_reentrant=False) for h, t in chunks])


def _log_probs(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)  # half-precision logits would be off by percents
    bias_V = None if bias_V is None else bias_V.to(dtype)
    logits_NV = torch.nn.functional.linear(hidden_ND.to(dtype), weight_VD.to(dtype), bias_V)
    return logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)
