"""What differs between Hugging Face families: head, blocks, positions, what LoRA adapts.

The model classes are Hugging Face's own: GPT-J, and Llama-like families (Llama 2/3, Tulu, SmolLM2, Mistral, Qwen), which
take a mask through the attention interface. `attention` makes either take the preference tree's mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedModel

from prlhf.errors import UserError

LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_TARGETS = {"gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")}  # all others: LLAMA_LIKE


class Head(NamedTuple):
    """The language-model head: logits = hidden @ weight.T + bias."""

    weight_VD: Tensor
    bias_V: Tensor | None


def head(model: PreTrainedModel) -> Head:
    """The head of a causal LM (GPT-J's has a bias)."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, layer.bias)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, in order."""
    return list(model.base_model.h if model.config.model_type == "gptj" else model.base_model.layers)


def lora_targets(model: PreTrainedModel, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """`names`, or all linear layers of the blocks for the model's family."""
    return names or LORA_TARGETS.get(model.config.model_type, LLAMA_LIKE)


def hidden_states(
    model: PreTrainedModel,
    embeddings_RTD: Tensor,
    mask: Tensor | BlockMask,
    positions_RT: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states (R, T, D), after the final norm: what the head reads.
    mask: boolean (R, 1, T, S), True where a query sees a key, or blocks of it. S counts cached positions too."""
    if isinstance(mask, Tensor):  # made additive here, once: each block would make and keep its own
        mask = torch.zeros(mask.shape, dtype=embeddings_RTD.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    caching = {"past_key_values": cache, "use_cache": cache is not None}
    output = model.base_model(inputs_embeds=embeddings_RTD, attention_mask=mask, position_ids=positions_RT, **caching)
    return output.last_hidden_state


def check_positions(model: PreTrainedModel, positions: int) -> None:
    """UserError where a sequence has more positions than the model reads, by its windows too, or than keep it independent.

    LongRoPE (Phi-3) rotates by one set of frequencies up to its original length and by another beyond. Hugging Face chooses by
    the longest sequence of a batch, and would rotate short ones as if they were long. (Dynamic NTK does so too, but only
    beyond max_position_embeddings.)
    """
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
    limit = min((value for name in names if (value := getattr(config, name, None))), default=positions)  # 0: no window
    if limit < positions:
        raise UserError(
            f"data.max_tokens: a sequence takes {positions} positions, user vectors included, and the model reads {limit}; "
            "expected shorter prompts, responses or --max-new-tokens"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(kind for kind in rope.values() if isinstance(kind, dict)),
    ]  # one for all layers, or one for each type
    limits = (kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope")
    if (limit := min(limits, default=positions)) < positions:
        raise UserError(
            f"data.max_tokens: a sequence takes {positions} positions, user vectors included, and beyond {limit} this model "
            f"(rope_type longrope) reads a batch's other sequences differently too; expected at most {limit}, by shorter "
            "prompts, responses or --max-new-tokens"
        )
