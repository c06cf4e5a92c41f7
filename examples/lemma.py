"""Lemma 3.1 of the paper on a toy: a vanilla reward model learns the vote share, a personalised one each user's vote.

    python -m examples.lemma

Seven users vote on four pairs of responses. Both models are linear heads on a small random-weight backbone, fitted to all
votes until the gradient vanishes.
"""

import math
import random

import torch

from prlhf.backbone.toys import byte_tokenizer, random_backbone
from prlhf.batch.tokens import EncodedComparison
from prlhf.config import load as config_module
from prlhf.config.keys import Config
from prlhf.errors import run_command
from prlhf.method.build import build_model
from prlhf.method.losses import Rewards
from prlhf.method.models import PersonalizedModel
from prlhf.score.score import score
from prlhf.score.task import Task
from prlhf.train.step import accumulate_gradients

USERS = 7
VOTES_FOR_FIRST = (1, 3, 4, 6)  # of the seven users, on each pair


def votes(seed: int = 0) -> list[EncodedComparison]:
    """All users judge each pair p; VOTES_FOR_FIRST[p] of them, drawn at random, choose its first response."""
    rng = random.Random(seed)
    found = []
    for p, count in enumerate(VOTES_FOR_FIRST):
        prefix, first, second = [1, 10 + p], [20 + p, 30, 2], [40 + p, 50, 51, 2]
        fans = rng.sample(range(1, USERS + 1), count)
        for user in range(1, USERS + 1):
            chosen, rejected = (first, second) if user in fans else (second, first)
            found.append(EncodedComparison(prefix, prefix, chosen, rejected, user))
    return found


def fitted(config: Config, comparisons: list[EncodedComparison], decay: float = 0.0) -> PersonalizedModel:
    """The reward model of `config`, its user model fitted by L-BFGS to the loss on `comparisons` + decay |e|^2."""
    tokenizer = byte_tokenizer()
    backbone = random_backbone(config.model, len(tokenizer), config.seed).double()
    model = build_model(config, tokenizer, USERS, backbone)
    parameters = list(model.user_model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=300, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = accumulate_gradients(Task(config, model, comparisons), range(len(comparisons))).loss
        penalty = decay * torch.stack([(p**2).sum() for p in parameters]).sum()
        if decay:
            penalty.backward()
        return loss + penalty.item()

    optimizer.step(closure)
    return model


def lemma_config(*overrides: str) -> Config:
    """A reward model with a linear head on a frozen two-layer backbone."""
    fixed = ("model.family=llama", "model.frozen=true", "user_model.tokens=1", "user_model.aggregator=linear")
    return config_module.load_config(
        None, ("method=prm", "optim.micro_batch_size=28", *fixed, "user_model.init=zero", *overrides)
    )


def margins(model: PersonalizedModel, comparisons: list[EncodedComparison], users: list[int]) -> list[float]:
    """r(chosen) - r(rejected) of each comparison, read by the given user."""
    rewards = score(model, comparisons, users, batch_size=8)
    assert isinstance(rewards, Rewards)
    return (rewards.chosen - rewards.rejected).tolist()


def main() -> None:
    """Fit both models and print what they have learned of each pair."""
    comparisons = votes()
    vanilla = fitted(lemma_config("user_model.kind=uniform"), comparisons)
    personal = fitted(lemma_config("user_model.kind=individual"), comparisons, decay=1e-4)
    firsts = [
        EncodedComparison([1, 10 + p], [1, 10 + p], [20 + p, 30, 2], [40 + p, 50, 51, 2], 0)
        for p in range(len(VOTES_FOR_FIRST))
    ]
    learned = margins(vanilla, firsts, [0] * len(firsts))
    right = [m > 0 for m in margins(personal, comparisons, [c.user for c in comparisons])]
    print("| pair | votes for the first | logit of the share | vanilla: r1 - r2 | personalised: votes recovered |")
    print("|---|---|---|---|---|")
    for p, (count, margin) in enumerate(zip(VOTES_FOR_FIRST, learned)):
        logit = math.log(count / (USERS - count))
        recovered = sum(right[p * USERS : (p + 1) * USERS])
        print(f"| {p + 1} | {count} of {USERS} | {logit:.6f} | {margin:.6f} | {recovered} of {USERS} |")


if __name__ == "__main__":
    run_command(main)
