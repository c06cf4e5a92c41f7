"""Attention that takes the preference tree's mask, for every family that takes Hugging Face's attention interface."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from prlhf.backbone import visible
from prlhf.batch.trees import ReadingBatch, sees, tree_mask

# Heads so wide (GPT-J's) spill in FlexAttention's backward kernel; with so many warps they spill less.
WIDE, WIDE_WARPS = 256, 8


def attention_mask(batch: ReadingBatch) -> Tensor | BlockMask:
    """What each position of the batch's rows sees: FlexAttention's blocks for a packed row on a GPU, else `dense_mask`."""
    return tree_block_mask(batch) if batch.kind == "packed" and batch.input_ids_RT.is_cuda else dense_mask(batch)


def dense_mask(batch: ReadingBatch) -> Tensor:
    """`tree_mask`; for single sequences (layout rows) which positions are not padding, (R, T): the model does the rest."""
    return batch.trees_RT > 0 if batch.kind == "rows" else tree_mask(batch.seen_until_RT)


def tree_block_mask(batch: ReadingBatch) -> BlockMask:
    """`tree_mask` as FlexAttention's blocks of 128 x 128 positions."""

    def mask(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch.seen_until_RT, row, query, key)

    (R, T), device = batch.seen_until_RT.shape, batch.seen_until_RT.device
    # Compiled it makes no T x T tensor.
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(mask, R, None, T, T, device=device)


def attention_dropout(model: PreTrainedModel) -> float:
    """The probability of dropout within attention."""
    return getattr(model.config, "attention_dropout", 0.0) or getattr(model.config, "attn_pdrop", 0.0)


def takes_flex_attention(model: PreTrainedModel) -> bool:
    """Whether FlexAttention can compute this model's attention: heads of width 16 or more, without dropout, in a family that
    passes the mask on."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    passes_mask = config.model_type == "gptj" or (model._supports_flex_attn and _takes_interface(model))
    return passes_mask and width >= 16 and attention_dropout(model) == 0.0


def use_tree_attention(model: PreTrainedModel, as_on_gpu: bool = False) -> PreTrainedModel:
    """Let a model's attention take the masks of `attention_mask`, and compute GPT-J's GELU in one operation.
    as_on_gpu: on a CPU, copy keys as a GPU's kernels need them. For the dry run, which has no GPU.
    A model without the attention interface keeps its own."""
    if model.config.model_type == "gptj":
        for block in model.transformer.h:
            compute = functools.partial(_gptj_attention, _as_on_a_gpu if as_on_gpu else _tree_attention)
            block.attn._attn = types.MethodType(compute, block.attn)
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")
    elif _takes_interface(model):
        model.set_attn_implementation("trees_as_on_a_gpu" if as_on_gpu else "trees")
    return model


def _takes_interface(model: PreTrainedModel) -> bool:
    """Whether the attention can be chosen. Falcon's could, but whatever is not SDPA adds its ALiBi twice."""
    return model._can_set_attn_implementation() and model.config.model_type != "falcon"


@contextlib.contextmanager
def as_hugging_face_has_it(model: PreTrainedModel) -> Iterator[None]:
    """Within the context a model's forward pass is its class's: nothing of this module or `recompute` stands in the place of
    a method, and attention is `eager`. That alone computes all that a family passes to it: SDPA drops Gemma 2's softcap."""
    ours = [(module, name) for module in model.modules() for name in ("forward", "_attn") if name in vars(module)]
    replaced = [(module, name, vars(module).pop(name)) for module, name in ours]
    attention = model.config._attn_implementation
    if _takes_interface(model):
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for module, name, method in replaced:
            setattr(module, name, method)
        if _takes_interface(model):
            model.set_attn_implementation(attention)


def _tree_attention(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Hugging Face's attention interface: FlexAttention for a BlockMask, else scaled_dot_product_attention, or
    `_explicit_attention` for what that does not compute. Families name the mask, or do not. Without one attention is causal."""
    if isinstance(attention_mask, Tensor) and any(options.get(name) is not None for name in ("softcap", "s_aux")):
        return _explicit_attention(query, key, value, attention_mask, **options), None
    if isinstance(attention_mask, Tensor) and query.device.type == "cpu" and options.get("position_bias") is None:
        # Where several query heads read one key head (GQA), Hugging Face's function copies keys and values for each, as
        # a GPU's kernels want them. A CPU's kernel needs no copies, and the backward pass would keep them.
        dropout, scale = options.get("dropout", 0.0), options.get("scaling")
        if visible.takes(query, key, value, attention_mask, dropout):
            return visible.visible_attention(query, key, value, attention_mask, scale).transpose(1, 2), None
        output_RHTd = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scale, enable_gqa=True
        )
        return output_RHTd.transpose(1, 2), None
    if isinstance(attention_mask, BlockMask) and query.shape[-1] >= WIDE:
        options["kernel_options"] = {"bwd_num_warps": WIDE_WARPS}
    forward = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return forward(attention, query, key, value, attention_mask, **options)


def _as_on_a_gpu(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `_tree_attention`, for the dry run: FlexAttention keeps what causal scaled_dot_product_attention keeps. Its inputs pass
    `alias`, which marks them for `recompute.ATTENTION`."""
    if isinstance(attention_mask, BlockMask):
        query, key, value = (torch.ops.aten.alias(t) for t in (query, key, value))
        attention_mask = None
    return sdpa_attention_forward(attention, query, key, value, attention_mask, **options)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """softmax(cap(scaling Q K^T) + mask) V, cap(a) = c tanh(a / c), in float32 at least; (R, T, H, d).

    s_aux: a sink for each head, a logit that takes part in the softmax and has no value (gpt-oss). softcap: c (Gemma 2).
    """
    groups = query.shape[1] // key.shape[1]  # query heads that read one key head
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores_RHTS = (query @ key.transpose(2, 3)).to(wide) * scaling
    if softcap is not None:
        scores_RHTS = torch.tanh(scores_RHTS / softcap) * softcap
    scores_RHTS = scores_RHTS + mask
    if s_aux is not None:
        sinks_RHT1 = s_aux.to(wide).view(1, -1, 1, 1).expand(*scores_RHTS.shape[:3], 1)
        scores_RHTS = torch.cat([scores_RHTS, sinks_RHT1], dim=-1)
    weights_RHTS = scores_RHTS.softmax(dim=-1)[..., : key.shape[2]]
    weights_RHTS = nn.functional.dropout(weights_RHTS, dropout).to(value.dtype)
    return (weights_RHTS @ value).transpose(1, 2).contiguous()


def _gptj_attention(
    compute: Callable[..., tuple[Tensor, Any]],
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | BlockMask | None,
) -> tuple[Tensor, None]:
    """GPTJAttention._attn, softmax(Q K^T / sqrt(d) + mask) V, by `compute`; heads (R, H, T, d) in and out."""
    dropout = attention.attn_dropout.p if attention.training else 0.0
    query, key = query.to(value.dtype), key.to(value.dtype)
    output_RTHd, _ = compute(attention, query, key, value, mask, dropout=dropout)
    return output_RTHd.transpose(1, 2), None


AttentionInterface.register("trees", _tree_attention)
AttentionInterface.register("trees_as_on_a_gpu", _as_on_a_gpu)
for name in ("trees", "trees_as_on_a_gpu"):  # of layout rows, where the model makes the mask
    AttentionMaskInterface.register(name, eager_mask)
