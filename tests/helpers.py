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
from prlhf.method.plain import HERE, Preference, user_vectors
from prlhf.score.score import score
from prlhf.score.task import Task
from prlhf.train.step import accumulate_gradients

TOKENIZER = byte_tokenizer()
VOCABULARY = len(TOKENIZER)
USERS = 4
ALPHA = 0.3
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


def as_plain(c: EncodedComparison) -> Preference:
    """The comparison as (x, y1, y2, u_t, u_p), as the plain method takes it. Both prefixes begin with a BOS."""
    text = len(c.prefix) - len(c.reference_prefix)
    return c.reference_prefix, c.chosen, c.rejected, c.prefix[1 : 1 + text], c.user


def with_tails(comparisons: Sequence[EncodedComparison]) -> list[EncodedComparison]:
    """The comparisons with 0, 1 and 2 tokens, in turn, behind their prompts' content."""
    return [c._replace(tail=min(i % 3, len(c.reference_prefix) - 1)) for i, c in enumerate(comparisons)]


def at_place(c: EncodedComparison, place: str) -> EncodedComparison:
    """The comparison with HERE, as the plain method takes it, where user vectors stand."""
    if place == "response_end":
        return c._replace(chosen=[*c.chosen, HERE], rejected=[*c.rejected, HERE])
    if place == "before_prompt":
        return c
    ends = (len(ids) - c.tail for ids in (c.prefix, c.reference_prefix))
    prefix, reference = ([*ids[:n], HERE, *ids[n:]] for ids, n in zip((c.prefix, c.reference_prefix), ends))
    return c._replace(prefix=prefix, reference_prefix=reference)


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
    read: Callable[..., Sequence[torch.Tensor]],
    loss_of: Callable[..., torch.Tensor],
    reference: ResponseLogProbs | None = None,
) -> None:
    """A model's outputs, its loss at ALPHA and every gradient, in all layouts, are those of the plain method.

    read(model, backbone, c, e_UD): the outputs for c's two responses, by passes of the plain `backbone`; c has HERE.
    loss_of(model, backbone, plain_comparisons): the loss. `model` holds the weights of all that is not the backbone.
    """
    overrides = (*overrides, f"loss.alpha={ALPHA}", "optim.micro_batch_size=3")
    users = [c.user for c in comparisons]
    assert {0} < set(users)
    config = tiny_config(*overrides, family=family)
    twin, backbone = tiny_model(config, noise=0.05), plain_backbone(config)
    backbone.load_state_dict(twin.backbone.state_dict())
    placed = [at_place(c, config.user_model.place) for c in comparisons]
    with torch.no_grad():
        outputs = [torch.stack(tuple(read(twin, backbone, c, user_vectors(twin.user_model, c.user)))) for c in placed]
    loss = loss_of(twin, backbone, [as_plain(c) for c in placed])
    loss.backward()
    expected = {f"backbone.{name}": g for name, g in gradients(backbone).items()} | gradients(twin)
    small = {name for name, g in expected.items() if g.abs().max() < 1e-6}  # a tolerance of 1e-10 would say little
    assert small <= {"backbone.transformer.ln_f.bias"}  # a constant in h, which r1 - r2 does not have

    for layout in LAYOUTS:
        config = tiny_config(*overrides, f"model.layout={layout}", family=family)
        model = tiny_model(config, noise=0.05)
        first_B, second_B, *_ = score(model, comparisons, users, batch_size=4)
        assert (torch.stack([first_B, second_B], dim=1) - torch.stack(outputs)).abs().max() < 1e-10
        sums = accumulate_gradients(Task(config, model, comparisons, reference), range(len(comparisons)))
        assert sums.loss == pytest.approx(loss.item(), abs=1e-10)
        assert_same(gradients(model), expected)
