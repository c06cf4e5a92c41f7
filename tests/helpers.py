"""Toy objects: float64 models of two layers, and comparisons of random tokens."""

import random
import types

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prlhf import config as config_module
from prlhf.backbones import byte_tokenizer, random_backbone, use_tree_attention
from prlhf.config import Config
from prlhf.encoding import EncodedComparison
from prlhf.personalized import PersonalizedModel, build_model

TOKENIZER = byte_tokenizer()
VOCABULARY = len(TOKENIZER)
USERS = 4


def tiny_config(*overrides: str, family: str = "llama") -> Config:
    small = (f"model.family={family}", "model.width=32", "model.heads=2", "user_model.tokens=3")
    return config_module.load(None, (*small, *overrides))


def rms_norm_float64(norm, x: torch.Tensor) -> torch.Tensor:
    """Llama's RMSNorm, x / sqrt(mean(x^2) + eps) * weight, which Hugging Face computes in float32 for any weights."""
    return norm.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + norm.variance_epsilon)


def gptj_attention_float64(attention, query, key, value, attention_mask=None):
    """GPT-J's attention, softmax(q k^T / sqrt(d) + mask) v, which Hugging Face computes in float32 for any weights."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask < 0, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value, None


def in_float64(backbone):
    """The model with float64 weights and no float32 step inside, so that 1e-10 means something."""
    for module in backbone.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = types.MethodType(rms_norm_float64, module)
    return backbone.double()


def plain_backbone(config: Config):
    """Hugging Face's model with plain causal attention, in float64."""
    backbone = in_float64(random_backbone(config.model, VOCABULARY, config.seed))
    for block in backbone.transformer.h if config.model.family == "gptj" else ():
        block.attn._attn = types.MethodType(gptj_attention_float64, block.attn)
    return backbone


def tiny_model(config: Config, noise: float = 0.0) -> PersonalizedModel:
    """A float64 model; `noise` moves every trained weight, so that nothing is zero or an identity by initialisation."""
    model = build_model(config, TOKENIZER, USERS, use_tree_attention(plain_backbone(config)))
    model.user_slot = 1  # the comparisons here begin with a BOS
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and noise:
                parameter += noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def random_comparisons(count: int, seed: int = 0, user_text: bool = False) -> list[EncodedComparison]:
    """Comparisons of random tokens whose longer response is in turn the chosen, the rejected, and of one token."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(n)]

    lengths = [(9, 3), (2, 8), (1, 6), (5, 1), (1, 1), (4, 4)]
    found = []
    for i in range(count):
        x, text = ids(rng.randrange(1, 9)), ids(5) if user_text and i % 2 == 0 else []
        chosen, rejected = lengths[i % len(lengths)]
        found.append(EncodedComparison([1] + text + x, [1] + x, ids(chosen), ids(rejected), rng.randrange(USERS + 1)))
    return found


def plain_log_prob(backbone, prefix: list[int], response: list[int], user_UD: torch.Tensor | None, slot: int = 1):
    """log p(y | x, u) by one forward pass over one sequence, with Hugging Face's own causal attention."""
    embed = backbone.get_input_embeddings()(torch.tensor(prefix + response))
    vectors = 0
    if user_UD is not None:
        embed = torch.cat([embed[:slot], user_UD, embed[slot:]])
        vectors = len(user_UD)
    logits = backbone(inputs_embeds=embed[None]).logits[0]
    start = vectors + len(prefix)
    log_p = torch.log_softmax(logits[start - 1 : start - 1 + len(response)], dim=-1)
    return sum(log_p[i, token] for i, token in enumerate(response))


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: p.grad.to_dense().clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= tolerance, name
