"""What the backward pass computes again in place of keeping it, and torch.compile of each block."""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from prlhf.backbone.attention import attention_dropout
from prlhf.backbone.families import blocks
from prlhf.config.keys import ModelConfig

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
