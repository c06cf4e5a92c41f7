"""What the backward pass recomputes in place of keeping it (`model.recompute`), and torch.compile of each block."""

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._higher_order_ops.wrap import inductor_compiled_code
from torch._ops import OperatorBase
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
from prlhf.errors import UserError

aten = torch.ops.aten
# Matrix products, and which argument is the left factor.
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}
ATTENTION = frozenset(
    (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        # FlexAttention, the one compiled region in a block. It returns its inputs too, so they are kept as well; in the dry run
        # `alias` marks them.
        inductor_compiled_code,
        aten.alias.default,
    )
)


def elementwise_recomputed(narrow: int, attention: frozenset[OperatorBase]) -> tuple[AbstractContextManager, ...]:
    """Two contexts for torch.utils.checkpoint: keep matrix products and the operations `attention`, recompute all else.
    A product over at most `narrow` columns (LoRA's B) is recomputed too: that is cheaper than keeping it. Selective
    activation checkpointing: Korthikanti et al. 2022, arXiv 2205.05198, section 5."""

    def policy(_: SelectiveCheckpointContext, op: OperatorBase, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in attention or (op in PRODUCTS and args[PRODUCTS[op]].shape[-1] > narrow)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def keep_less(block: nn.Module) -> None:
    """Let a block keep the outputs of its matrix products and of its attention for the backward pass, and recompute there
    what is elementwise in its norms and MLP (as Liger does: Hsu et al. 2024, arXiv 2410.10989, section 3.2).
    The forwards of its norms, gated MLPs and GPT-J's MLP are replaced; any other module stays as it is."""
    for module in block.modules():
        if [(name, p.ndim) for name, p in module.named_parameters()] == [("weight", 1)]:  # RMSNorm
            module.forward = functools.partial(_computed_again, module.forward)
        elif _has_just(module, "gate_proj", "up_proj", "down_proj", "act_fn"):
            module.forward = types.MethodType(_gated_mlp, module)
        elif _has_just(module, "fc_in", "fc_out", "act", "dropout"):
            module.forward = types.MethodType(_gptj_mlp, module)


def _has_just(module: nn.Module, *parts: str) -> bool:
    """Whether a module has these parts, and nothing besides that its forward could compute with: BitNet's MLP has Llama's
    four parts and a norm, Falcon-H1's has factors."""
    held = {name for name in vars(module) if not name.startswith("_")}
    held -= {"training", "config", "hidden_size", "intermediate_size"}
    return not held and {name for name, _ in module.named_children()} == set(parts)


def _computed_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which the backward pass keeps the inputs alone. Recomputing ends once all that the function
    would have kept is there, so a last product is not computed twice."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _then_product(layer: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """layer(function(*inputs)), keeping neither the layer's input nor what it is computed from. A LoRA layer is more than
    one product, which would be computed twice: its input is kept."""
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
    """Do to each block what `model.recompute` and `model.compile` ask for. `keep_less` is for the other blocks: a
    checkpointed block keeps less already, and a compiler decides for its own blocks. UserError where a family's blocks cannot
    be checkpointed."""
    _, _, n = config.recompute.partition("every:")
    every = int(n) if n else int(config.recompute in ("elementwise", "blocks"))  # 0: no block is checkpointed
    if every and not model.supports_gradient_checkpointing:
        raise UserError(
            f"model.recompute: found {config.recompute!r}, but the blocks of a {model.config.model_type} model cannot be computed "
            "again in transformers; expected 'cheap' or 'none'"
        )
    if every:
        options: dict[str, Any] = {"use_reentrant": False}
        if config.recompute == "elementwise":
            # Attention with dropout is computed again: kept, it would not draw, and later dropouts would draw otherwise.
            kept = frozenset() if attention_dropout(model) else ATTENTION
            # Else a compiled region is no operation that could be kept.
            torch._inductor.config.wrap_inductor_compiled_regions = True
            options["context_fn"] = functools.partial(elementwise_recomputed, lora_rank, kept)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for i, block in enumerate(blocks(model)):
        block.gradient_checkpointing = every > 0 and i % every == 0
        if config.compile:
            block.compile(dynamic=True)
        elif config.recompute != "none" and not block.gradient_checkpointing:
            keep_less(block)
