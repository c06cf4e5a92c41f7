"""How the dry run, whose tensors are on a CPU, takes memory as a GPU does.

A packed row needs no dense mask: FlexAttention takes blocks of it (`backbone.attention` has what it keeps). Triton's log-probs take
a tile of logits where the chunked ones take a chunk (`kernels.triton`).
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from prlhf.backbone.attention import attention_mask
from prlhf.batch.trees import PACK_MULTIPLE, ReadingBatch
from prlhf.kernels.passes import HeadGradients, Pass, Passes, Softmax
from prlhf.method.models import Computation

TRITON_LOGITS = 1024 * 2048  # positions x vocabulary of Triton's tile


def computation_on_gpu(layout: str, log_probs: str | None) -> Computation:
    """A computation that takes memory as a GPU's does, for model.layout (not "auto") and model.log_probs."""
    mask = _blocks if layout == "packed" else attention_mask
    return Computation(mask, "torch" if log_probs == "torch" else Passes(_tile_pass, _tile_head_gradients))


def _blocks(batch: ReadingBatch) -> BlockMask:
    """Blocks for a row of this length. Which they are is not computed."""
    T = batch.input_ids_RT.shape[1]
    n = T // PACK_MULTIPLE
    counts, indices = torch.zeros(1, 1, n, dtype=torch.int32), torch.zeros(1, 1, n, n, dtype=torch.int32)
    return BlockMask.from_kv_blocks(counts, indices, seq_lengths=(T, T))


def _tile_pass(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, slope: bool) -> Pass:
    log_p_N, max_N, sum_N = torch.empty(3, len(hidden_ND), dtype=torch.float32).unbind()
    slope_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32) if slope else None
    tile = torch.empty(TRITON_LOGITS, dtype=torch.float32)
    tile.to(hidden_ND.dtype)  # once more in the inputs' type
    return Pass(log_p_N.clone(), Softmax(max_N.clone(), sum_N.clone()), slope_ND)


def _tile_head_gradients(
    grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softmax: Softmax
) -> HeadGradients:
    tile = torch.empty(TRITON_LOGITS, dtype=torch.float32)
    tile.to(hidden_ND.dtype)
    return HeadGradients(torch.empty_like(weight_VD), None if bias_V is None else torch.empty_like(bias_V))
