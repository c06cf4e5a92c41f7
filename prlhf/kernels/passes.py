"""What the implementations of `log_probs` share: what one pass over the vocabulary gives.

Shape suffixes: N positions, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Softmax(NamedTuple):
    """softmax(z) = exp(z - max) / sum, for each position. The two stay apart to keep precision."""

    max_N: Tensor
    sum_N: Tensor  # of exp(z - max)


class Pass(NamedTuple):
    """What one pass over the vocabulary gives, in the accumulation's type, so that gradients are rounded only once."""

    log_p_N: Tensor
    softmax: Softmax
    slope_ND: Tensor | None  # d log p / d hidden, if asked for


class HeadGradients(NamedTuple):
    """dL/dW and dL/db."""

    weight_VD: Tensor | None
    bias_V: Tensor | None


class Passes(NamedTuple):
    """An implementation: one pass over the vocabulary, and the head's gradients."""

    one_pass: Callable[..., Pass]  # (hidden_ND, weight_VD, bias_V, targets_N, slope: bool)
    head_gradients: Callable[..., HeadGradients]  # (grad_N, hidden_ND, weight_VD, bias_V, targets_N, softmax)
