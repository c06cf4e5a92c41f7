"""Toy objects: float64 models of two layers, and comparisons of random tokens."""

import random
import types
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from prlhf.backbone.attention import use_tree_attention
from prlhf.backbone.toys import byte_tokenizer, random_backbone
from prlhf.batch.tokens import EncodedComparison
from prlhf.config import load as config_module
from prlhf.config.keys import Config
from prlhf.method.build import build_model
from prlhf.method.losses import ResponseLogProbs
from prlhf.method.models import PersonalizedModel
from prlhf.method.users import IndividualUsers, LowRankUsers, UniformUsers
from prlhf.score.score import score
from prlhf.train.step import accumulate_gradients

TOKENIZER = byte_tokenizer()
VOCABULARY = len(TOKENIZER)
USERS = 4
LAYOUTS = ("tree", "packed", "rows")
KINDS = {
    "uniform": ("user_model.kind=uniform",),
    "individual": ("user_model.kind=individual",),
    "cluster": ("user_model.kind=cluster",),
    "softmax": ("user_model.kind=cluster", "user_model.softmax=true"),
    "low rank": ("user_model.kind=individual", "user_model.rank=2"),
    "shared softmax": ("user_model.kind=cluster", "user_model.shared=true", "user_model.softmax=true"),
}


def tiny_config(*overrides: str, family: str = "llama") -> Config:
    small = (f"model.family={family}", "model.width=32", "model.heads=2", "user_model.tokens=3")
    return config_module.load_config(None, (*small, *overrides))


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


def votes(*users: int) -> list[EncodedComparison]:
    """One pair judged by several users, every other one the other way round."""
    (c,) = random_comparisons(1)
    return [(swapped(c) if i % 2 else c)._replace(user=user) for i, user in enumerate(users)]


def swapped(c: EncodedComparison) -> EncodedComparison:
    """The comparison with the other response chosen."""
    return c._replace(chosen=c.rejected, rejected=c.chosen)


def plain_user(user_model, user: int) -> torch.Tensor:
    """f(u), written out: e; e_0 or e_0 + o_i; e_0 or e_0 + sum_k z_ik B_k; sum_k w_uk V_k; softmax is exp(w_uk) / sum_j exp(w_uj)."""
    if isinstance(user_model, UniformUsers):
        return user_model.e_UD
    if isinstance(user_model, IndividualUsers):
        return user_model.e_UD + user_model.offsets_MUD[user - 1] if user else user_model.e_UD
    low_rank = isinstance(user_model, LowRankUsers)
    if low_rank and not user:
        return user_model.e_UD
    w_K = user_model.z_MK[user - 1] if low_rank else user_model.w_MK[user]
    if user_model.softmax:
        w_K = torch.exp(w_K) / torch.exp(w_K).sum()
    mixed_UD = sum(w * V_UD for w, V_UD in zip(w_K, user_model.B_KUD if low_rank else user_model.V_KUD))
    return user_model.e_UD + mixed_UD if low_rank else mixed_UD


def plain_embeddings(
    backbone, prefix: Sequence[int], response: Sequence[int], user_UD: torch.Tensor | None = None, slot: int = 1
) -> torch.Tensor:
    """What one pass over one sequence reads, (1, T, D): the embeddings of prefix + response, e_u behind BOS."""
    embed = backbone.get_input_embeddings()(torch.tensor([*prefix, *response]))
    if user_UD is not None:
        embed = torch.cat([embed[:slot], user_UD, embed[slot:]])
    return embed[None]


def plain_states(backbone, prefix, response, user_UD: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states (T, D) by one pass over one sequence, with Hugging Face's own causal attention."""
    return backbone.base_model(inputs_embeds=plain_embeddings(backbone, prefix, response, user_UD)).last_hidden_state[0]


def plain_log_prob(backbone, prefix: list[int], response: list[int], user_UD: torch.Tensor | None, slot: int = 1):
    """log p(y | x, u) by one forward pass over one sequence, with Hugging Face's own causal attention."""
    embed = plain_embeddings(backbone, prefix, response, user_UD, slot)
    return response_log_prob(backbone(inputs_embeds=embed).logits[0], response)


def response_log_prob(logits_TV: torch.Tensor, response: list[int]) -> torch.Tensor:
    """The sum of the log-probs of the response's tokens, each predicted where the one before it is."""
    log_p = torch.log_softmax(logits_TV[-1 - len(response) : -1], dim=-1)
    return sum(log_p[i, token] for i, token in enumerate(response))


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: p.grad.to_dense().clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= tolerance, name


def assert_updates_are_plain(
    overrides: Sequence[str],
    family: str,
    comparisons: list[EncodedComparison],
    read: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    loss_of: Callable[..., torch.Tensor],
    reference: ResponseLogProbs | None = None,
) -> None:
    """What a model says of comparisons, its loss at alpha = 0.3 and every gradient, in all layouts, are those of

        mean over comparisons of  0.3 loss(u) + 0.7 loss(0),   one sequence a forward pass of Hugging Face's model.

    read(model, backbone, c, e_UD): what a model with these weights says of c's two responses, by passes of `backbone`.
    loss_of(b, first, second): the loss of comparison b of which that is said.
    """
    torch.set_num_threads(1)  # passes are tiny: where cores are busy, two threads mostly wait for each other
    overrides = (*overrides, "loss.alpha=0.3", "optim.micro_batch_size=3")
    users = [c.user for c in comparisons]
    assert {0} < set(users)
    config = tiny_config(*overrides, family=family)
    twin, backbone = tiny_model(config, noise=0.05), plain_backbone(config)
    backbone.load_state_dict(twin.backbone.state_dict())
    said, loss = [], 0.0
    for b, c in enumerate(comparisons):
        own, generic = (read(twin, backbone, c, plain_user(twin.user_model, user)) for user in (c.user, 0))
        said.append(torch.stack(tuple(own)).detach())
        loss = loss + (0.3 * loss_of(b, *own) + 0.7 * loss_of(b, *generic)) / len(comparisons)
    loss.backward()
    expected = {f"backbone.{name}": g for name, g in gradients(backbone).items()} | gradients(twin)
    small = {name for name, g in expected.items() if g.abs().max() < 1e-6}  # beside which 1e-10 would not be little
    assert small <= {"backbone.transformer.ln_f.bias"}  # a constant in h, which r1 - r2 does not have

    for layout in LAYOUTS:
        config = tiny_config(*overrides, f"model.layout={layout}", family=family)
        model = tiny_model(config, noise=0.05)
        first_B, second_B, *_ = score(model, comparisons, users, batch_size=4)
        assert (torch.stack([first_B, second_B], dim=1) - torch.stack(said)).abs().max() < 1e-10
        sums = accumulate_gradients(config, model, comparisons, reference, range(len(comparisons)))
        assert sums.loss == pytest.approx(loss.item(), abs=1e-10)
        assert_same(gradients(model), expected)
