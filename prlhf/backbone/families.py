"""What differs between Hugging Face families: head, blocks, positions, what LoRA adapts.

The model classes are Hugging Face's own. Most take a mask through the attention interface, and `attention` makes them
and GPT-J take the preference tree's. That a model's numbers are those of its own forward pass is not assumed: see
`score.agreement`, and docs/models.md for the families.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import linear
from transformers import Cache, PretrainedConfig, PreTrainedModel

from prlhf.errors import UserError

# Configs' names for a softcap of the logits, and for a factor of them, by family where one name means two things.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = {"cohere": "logit_scale", "hyperclovax": "logits_scaling", "falcon_h1": "lm_head_multiplier"}
DIVISORS = {"granite": "logits_scaling", "minicpm3": "logits_scaling"}

# Configs' names for how many positions a model reads, in any layout: Doge's padded rows change beyond its own.
LIMITS = ("max_position_embeddings", "keep_window_size")
# Configs' names for how far back attention reaches, or among how many positions it chooses (DeepSeek 3.2).
WINDOWS = (
    "sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "sliding_window_size", "index_topk",
    "indexer_budget",
)  # fmt: skip
# Families whose attention counts from the start of the row, as it does not for short rows: right in layout rows alone.
COUNT_BY_ROW = ("gpt_neo", "llama4", "llama4_text")
# Routers of experts (LongCat's is a classifier), and layers whose weight a family reads without a call (Mamba, DeepSeek's indexer).
NOT_ADAPTED = frozenset(("router", "gate", "wg", "classifier", "dt_proj", "weights_proj"))


class Head(NamedTuple):
    """The language-model head: logits z = cap(scale (h W^T + b)), where cap(a) = c tanh(a / c), or a without a softcap c."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits (N, V) in float32 at least, of a product in the hidden states' type."""
        products_NV = linear(hidden_ND, self.weight_VD, self.bias_V)
        logits_NV = products_NV.to(torch.promote_types(products_NV.dtype, torch.float32)) * self.scale
        return logits_NV if self.softcap is None else torch.tanh(logits_NV / self.softcap) * self.softcap

    def of_tokens(self, tokens: list[int], dtype: torch.dtype) -> "Head":
        """The head of these tokens alone, in another type."""
        bias = None if self.bias_V is None else self.bias_V[tokens].to(dtype)
        return self._replace(weight_VD=self.weight_VD[tokens].to(dtype), bias_V=bias)


def head(model: PreTrainedModel) -> Head:
    """The head of a causal LM (GPT-J's has a bias), and what its family does to the logits behind it."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    softcaps = (getattr(config, name, None) for name in SOFTCAPS)
    return Head(layer.weight, layer.bias, _logit_scale(config), next(filter(None, softcaps), None))


def _logit_scale(config: PretrainedConfig) -> float:
    for table, power in ((FACTORS, 1), (DIVISORS, -1)):
        for family, name in table.items():
            if config.model_type.startswith(family):
                return float(getattr(config, name)) ** power
    return 1.0


def base(model: PreTrainedModel) -> nn.Module:
    """The causal LM without its head. (Llama 4 names none.)"""
    return model.model if model.base_model is model else model.base_model


def embeddings(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The word embeddings of token ids, as the model reads them in the place of ids: Falcon-H1 scales only those of ids."""
    words = model.get_input_embeddings()(ids)
    return words * model.config.embedding_multiplier if model.config.model_type == "falcon_h1" else words


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, in order: `layers`, or the first list of as many modules as the config has hidden layers.
    UserError where there is none."""
    inner = base(model)
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    found = getattr(inner, "layers", None) or next(lists, None)
    if found is None:
        raise UserError(
            f"model.name: no list of {count} blocks in a {model.config.model_type} model; see docs/models.md"
        )
    return list(found)


def lora_targets(model: PreTrainedModel, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """`names`, or all linear layers of the blocks but NOT_ADAPTED. UserError where blocks have none (GPT-2)."""
    layers = (
        name for block in blocks(model) for name, module in block.named_modules() if isinstance(module, nn.Linear)
    )
    found = names or tuple(
        dict.fromkeys(last for name in layers if (last := name.rsplit(".", 1)[-1]) not in NOT_ADAPTED)
    )
    if not found:
        raise UserError(f"lora.rank: a {model.config.model_type} model's blocks have no linear layers; expected 0")
    return found


def hidden_states(
    model: PreTrainedModel,
    embeddings_RTD: Tensor,
    mask: Tensor | BlockMask,
    positions_RT: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states (R, T, D), after the final norm: what the head reads.
    mask: boolean (R, 1, T, S), True where a query sees a key, or blocks of it. S counts cached positions too. Or (R, T),
    True where a row is not padding, which is at its end: then the model masks and counts positions by itself."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return base(model)(inputs_embeds=embeddings_RTD, attention_mask=mask.long(), use_cache=False)[0]
    if isinstance(mask, Tensor):  # made additive here, once: each block would make and keep its own
        mask = torch.zeros(mask.shape, dtype=embeddings_RTD.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    caching = {"past_key_values": cache, "use_cache": cache is not None}
    output = base(model)(inputs_embeds=embeddings_RTD, attention_mask=mask, position_ids=positions_RT, **caching)
    return output.last_hidden_state


def check_tokens(model: PreTrainedModel, largest: int) -> None:
    """UserError where a token's id is beyond the word embeddings."""
    V = model.get_input_embeddings().weight.shape[0]
    if largest >= V:
        raise UserError(
            f"data.train: found token {largest} in a text, where the model has word embeddings of {V}; expected texts without "
            "it, such as the place of an image"
        )


def check_positions(model: PreTrainedModel, positions: int, windows: bool = True) -> None:
    """UserError where a sequence has more positions than the model reads, by its `windows` too, or than keep it independent.
    Layout rows leaves windows to the model; our masks know none.

    LongRoPE (Phi-3) rotates by one set of frequencies up to its original length and by another beyond. Hugging Face chooses by
    the longest sequence of a batch, and would rotate short ones as if they were long. (Dynamic NTK does so too, but only
    beyond max_position_embeddings.)
    """
    config = model.config.get_text_config()
    names = (*LIMITS, *(WINDOWS if windows else ()))
    limit = min((value for name in names if (value := getattr(config, name, None) or 0) > 0), default=positions)
    if limit < positions:
        whole = getattr(config, "max_position_embeddings", None) or limit
        rows = f"; model.layout=rows reads up to {whole}, as the model's windows do" if whole > limit else ""
        raise UserError(
            f"data.max_tokens: a sequence takes {positions} positions, user vectors included, and the model reads {limit}; "
            f"expected shorter prompts, responses or --max-new-tokens{rows}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # for all layers, or for each type
    limits = (kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope")
    if (limit := min(limits, default=positions)) < positions:
        raise UserError(
            f"data.max_tokens: a sequence takes {positions} positions, user vectors included, and beyond {limit} this model "
            f"(rope_type longrope) reads a batch's other sequences differently too; expected at most {limit}, by shorter "
            "prompts, responses or --max-new-tokens"
        )
