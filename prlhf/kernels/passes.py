"""What one pass over the vocabulary gives: the types that all implementations of `log_probs` share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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


class Passes(NamedTuple):
    """An implementation of `log_probs`: a pass over the vocabulary, and the head's gradients."""

    one_pass: Callable[..., Pass]
    head_gradients: Callable[..., HeadGradients]
