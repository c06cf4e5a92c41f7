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
    """UserError where a sequence has more positions than the model reads, by its sliding window too."""
    limits = (getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    limit = min((value for value in limits if value is not None), default=positions)
    if limit < positions:
        raise UserError(
            f"data.max_tokens: a sequence takes {positions} positions, user vectors included, and the model reads {limit}; "
            "expected shorter prompts, responses or --max-new-tokens"
        )
