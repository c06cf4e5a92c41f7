"""Attention that takes the preference tree's mask, for every supported family."""

import types
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prlhf.batch.trees import ReadingBatch, sees, tree_mask


def attention_mask(batch: ReadingBatch) -> Tensor | BlockMask:
    """What each position of the batch's rows sees: FlexAttention's blocks for a packed row on a GPU, else `tree_mask`."""
    if batch.packed and batch.input_ids_RT.is_cuda:
        return tree_block_mask(batch)
    return tree_mask(batch.trees_RT, batch.segments_RT)


def tree_block_mask(batch: ReadingBatch) -> BlockMask:
    """`tree_mask` as FlexAttention's blocks of 128 x 128 positions."""

    def mask(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch.trees_RT, batch.segments_RT, row, query, key)

    (R, T), device = batch.trees_RT.shape, batch.trees_RT.device
    return create_block_mask(mask, R, None, T, T, device=device, _compile=device.type == "cuda")


def attention_dropout(model: PreTrainedModel) -> float:
    """The probability of dropout within attention."""
    return getattr(model.config, "attention_dropout", 0.0) or getattr(model.config, "attn_pdrop", 0.0)


def takes_flex_attention(model: PreTrainedModel) -> bool:
    """Whether FlexAttention can compute this model's attention: heads of width 16 or more, without dropout."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width >= 16 and attention_dropout(model) == 0.0


def use_tree_attention(model: PreTrainedModel, as_on_gpu: bool = False) -> PreTrainedModel:
    """Let a model's attention take the masks of `attention_mask`, and compute GPT-J's GELU in one operation.
    as_on_gpu: on a CPU, copy keys as a GPU's kernels need them. For the dry run, which has no GPU."""
    if model.config.model_type == "gptj":
        for block in model.transformer.h:
            block.attn._attn = types.MethodType(_gptj_attention, block.attn)
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")
    else:
        model.set_attn_implementation("trees_as_on_a_gpu" if as_on_gpu else "trees")
    return model


def _tree_attention(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Hugging Face's attention interface: FlexAttention for a BlockMask, else scaled_dot_product_attention.
    Without a mask (the model's own forward) attention is causal."""
    if isinstance(mask, Tensor) and query.device.type == "cpu":
        # Where several query heads read one key head (GQA), Hugging Face's function copies keys and values for each, as
        # a GPU's kernels want them. A CPU's kernel needs no copies, and the backward pass would keep them.
        dropout, scale = options.get("dropout", 0.0), options.get("scaling")
        output_RHTd = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scale, enable_gqa=True
        )
        return output_RHTd.transpose(1, 2), None
    forward = flex_attention_forward if isinstance(mask, BlockMask) else sdpa_attention_forward
    return forward(attention, query, key, value, mask, **options)


def _gptj_attention(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None
) -> tuple[Tensor, None]:
    """GPTJAttention._attn, softmax(Q K^T / sqrt(d) + mask) V, by `_tree_attention`; heads (R, H, T, d) in and out."""
    dropout = attention.attn_dropout.p if attention.training else 0.0
    query, key = query.to(value.dtype), key.to(value.dtype)
    output_RTHd, _ = _tree_attention(attention, query, key, value, mask, dropout=dropout)
    return output_RTHd.transpose(1, 2), None


AttentionInterface.register("trees", _tree_attention)
AttentionInterface.register("trees_as_on_a_gpu", sdpa_attention_forward)
