"""What differs between Hugging Face families: attention, head, blocks, what LoRA adapts.

The model classes are Hugging Face's own. Llama-like families (Llama 2/3, Tulu, SmolLM2, Mistral, Qwen) take an
attention mask through the attention interface; GPT-J has no SDPA there and gets one here. Either takes a dense mask
(SDPA) or FlexAttention's BlockMask, of which only the blocks that anything sees are computed.
"""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prlhf.batching import PreferenceBatch, sees, tree_mask
from prlhf.config import ModelConfig
from prlhf.errors import UserError

LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_TARGETS = {"gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")}  # all others: LLAMA_LIKE
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # classes that compute what _gated_mlp does

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}  # -> left factor
ATTENTION = frozenset(
    (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    )
)


class Head(NamedTuple):
    """The language-model head: logits = hidden @ weight.T + bias."""

    weight_VD: Tensor
    bias_V: Tensor | None


def head(model: PreTrainedModel) -> Head:
    """The head of a causal LM (GPT-J's has a bias)."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, layer.bias)


def hidden_states(
    model: PreTrainedModel,
    embeddings_RTD: Tensor,
    mask: Tensor | BlockMask,
    positions_RT: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states (R, T, D), after the final norm: what the head reads.

    mask: boolean (R, 1, T, S), True where a query sees a key, or blocks of it; S counts the cached positions too.
    """
    if isinstance(mask, Tensor):  # from a boolean one each block would make, and keep, what is added to its scores
        mask = torch.zeros(mask.shape, dtype=embeddings_RTD.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    output = model.base_model(
        inputs_embeds=embeddings_RTD,
        attention_mask=mask,
        position_ids=positions_RT,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


def attention_mask(batch: PreferenceBatch) -> Tensor | BlockMask:
    """What each position of the batch's rows sees (`tree_mask`): blocks for a packed row on a GPU, else dense."""
    if not (batch.packed and batch.input_ids_RT.is_cuda):
        return tree_mask(batch.trees_RT, batch.segments_RT)
    return tree_block_mask(batch)


def takes_flex_attention(model: PreTrainedModel) -> bool:
    """Whether FlexAttention computes this model's attention: heads of 16 or more, and no dropout in it."""
    config = model.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads >= 16 and attention_dropout(model) == 0.0


def attention_dropout(model: PreTrainedModel) -> float:
    """The probability of dropout within attention."""
    return getattr(model.config, "attention_dropout", 0.0) or getattr(model.config, "attn_pdrop", 0.0)


def tree_block_mask(batch: PreferenceBatch) -> BlockMask:
    """`tree_mask` as FlexAttention's blocks of 128 x 128 positions."""
    trees_RT, segments_RT = batch.trees_RT, batch.segments_RT

    def mask(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(trees_RT, segments_RT, row, query, key)

    (R, T), device = trees_RT.shape, trees_RT.device
    return create_block_mask(mask, R, None, T, T, device=device, _compile=device.type == "cuda")


def takes_grouped_keys(query: Tensor) -> bool:
    """Whether scaled_dot_product_attention with a mask has a kernel there for fewer key heads than query heads."""
    return query.device.type == "cpu"


def _tree_attention(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Hugging Face's attention interface: FlexAttention for a BlockMask, else scaled_dot_product_attention.

    Where several query heads read one key head (GQA), a CPU's kernel takes the keys as they are; Hugging Face's function
    repeats them for it, as kernels for a GPU want it, and the copies would be kept for the backward pass.
    """
    if isinstance(attention_mask, Tensor) and takes_grouped_keys(query):
        output_RHTd = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attention_mask,
            options.get("dropout", 0.0),
            scale=options.get("scaling"),
            enable_gqa=True,
        )
        return output_RHTd.transpose(1, 2), None
    forward = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
    return forward(attention, query, key, value, attention_mask, **options)


AttentionInterface.register("trees", _tree_attention)


def _gptj_attention(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask
) -> tuple[Tensor, None]:
    """GPTJAttention._attn, softmax(Q K^T / sqrt(d) + mask) V, by the same two; heads (R, H, T, d) in and out."""
    options = {"dropout": attention.attn_dropout.p if attention.training else 0.0}
    query, key = query.to(value.dtype), key.to(value.dtype)
    output_RTHd, _ = _tree_attention(attention, query, key, value, attention_mask, **options)
    return output_RTHd.transpose(1, 2), None


def use_tree_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model's attention take the masks of `attention_mask`, and compute GPT-J's GELU in one operation."""
    if model.config.model_type == "gptj":
        for block in model.transformer.h:
            block.attn._attn = types.MethodType(_gptj_attention, block.attn)
            if isinstance(block.mlp.act, NewGELUActivation):
                block.mlp.act = nn.GELU(approximate="tanh")
    else:
        model.set_attn_implementation("trees")
    return model


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, in order."""
    return list(model.base_model.h if model.config.model_type == "gptj" else model.base_model.layers)


def elementwise_recomputed(
    narrow: int, attention: frozenset[OpOverload]
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts for torch.utils.checkpoint: keep matrix products and the operations `attention`, compute all else again.

    A product over `narrow` or fewer (LoRA's B) is cheaper to compute than to keep. (Selective activation checkpointing:
    Korthikanti et al. 2022, arXiv 2205.05198, section 5, keeps what is dear to compute for its size.)
    """

    def policy(_: SelectiveCheckpointContext, op: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in attention or (op in PRODUCTS and args[PRODUCTS[op]].shape[-1] > narrow)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def keep_less(block: nn.Module) -> None:
    """Let a block keep its products' outputs and its attention's for the backward pass, but not what is elementwise within
    RMSNorm and the MLP, which is computed again there. (As Liger does: Hsu et al. 2024, arXiv 2410.10989, section 3.2.)
    An MLP of another class than those known here stays as it is."""
    for module in block.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = functools.partial(_computed_again, module.forward)
        elif kind in GATED_MLPS:
            module.forward = types.MethodType(_gated_mlp, module)
        elif kind == "GPTJMLP":
            module.forward = types.MethodType(_gptj_mlp, module)


def _computed_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the backward pass keeps the inputs alone. A last product is not computed again: the
    recomputation ends with what it has to keep."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _then_product(layer: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """layer(function(*inputs)), keeping neither the layer's input nor what leads to it; with LoRA only not the latter, as
    the layer is then more than one product."""
    if isinstance(layer, nn.Linear):
        return _computed_again(lambda *again: layer(function(*again)), *inputs)
    return layer(_computed_again(function, *inputs))


def _gated_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """LlamaMLP.forward, W_down (act(W_gate x) * W_up x)."""
    return _then_product(mlp.down_proj, lambda gate, up: mlp.act_fn(gate) * up, mlp.gate_proj(x), mlp.up_proj(x))


def _gptj_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """GPTJMLP.forward, W_out act(W_in x)."""
    return mlp.dropout(_then_product(mlp.fc_out, mlp.act, mlp.fc_in(x)))


def prepare_blocks(model: PreTrainedModel, config: ModelConfig, lora_rank: int) -> None:
    """Gradient checkpointing of every n-th block, and torch.compile of each, as the config has it; the blocks with neither
    `keep_less`: a checkpointed block keeps still less, and the compiler chooses by itself."""
    if config.gradient_checkpointing:
        options: dict[str, Any] = {"use_reentrant": False}
        if config.recompute == "elementwise":
            # Attention with dropout draws again, or what is dropped behind it would be other elements than before.
            kept = frozenset() if attention_dropout(model) else ATTENTION
            options["context_fn"] = functools.partial(elementwise_recomputed, lora_rank, kept)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        for i, block in enumerate(blocks(model)):
            block.gradient_checkpointing = i % config.checkpoint_every == 0
    for block in blocks(model):
        if config.compile:
            block.compile(dynamic=True)
        elif not (config.gradient_checkpointing and block.gradient_checkpointing):
            keep_less(block)


def check_positions(model: PreTrainedModel, positions: int) -> None:
    """UserError where a sequence of so many positions is more than the model reads (its sliding window counts)."""
    limits = (getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    limit = min(value for value in (*limits, positions) if value is not None)
    if limit < positions:
        raise UserError(
            f"data.max_tokens: a sequence takes {positions} positions, user vectors included, and the model reads {limit}; "
            "expected shorter prompts, responses or --max-new-tokens"
        )


def lora_targets(model: PreTrainedModel, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """`names`, or all linear layers of the blocks for the model's family."""
    return names or LORA_TARGETS.get(model.config.model_type, LLAMA_LIKE)
