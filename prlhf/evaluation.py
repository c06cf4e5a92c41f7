"""Implicit-reward accuracy of a model on held-out comparisons, with the controls that show whether it is personal.

A comparison counts as right when the chosen response has the larger implicit reward. Known users' comparisons are
scored three times: with the true user, with the generic user, and with another known user drawn at random. Where
personalisation is real, the first is well above the other two.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from prlhf.config import Config, LossConfig
from prlhf.encoding import EncodedComparison
from prlhf.errors import UserError
from prlhf.losses import ResponseLogProbs, branch_weights, preference_loss, reward_margin
from prlhf.metrics import (
    UserCounts,
    by_user,
    difference_interval,
    mean_interval,
    pooled,
    pooled_interval,
    std_interval,
    worst_user_interval,
)
from prlhf.personalized import PersonalizedLM
from prlhf.scoring import score
from prlhf.user_models import UniformUsers


class Scores(NamedTuple):
    """log p(y|x, u) of the same comparisons under the true, the generic and a random other user."""

    true_user: ResponseLogProbs
    generic_user: ResponseLogProbs
    shuffled_users: ResponseLogProbs


def shuffled(users: Sequence[int], known: int, seed: int) -> list[int]:
    """For every known user's comparison another known user, drawn uniformly; 0 stays 0, and so does a single user."""
    rng = random.Random(seed)
    draw = [rng.randrange(1, known) if known > 1 else 1 for _ in users]
    return [0 if u == 0 else d + (known > 1 and d >= u) for u, d in zip(users, draw)]


def score_users(
    config: Config,
    model: PersonalizedLM,
    comparisons: Sequence[EncodedComparison],
    controls: bool = True,
) -> Scores:
    """Score all comparisons; nothing is computed twice (an unknown user's three scores are one).

    With a uniform user model, and with alpha = 0, which trains no user's own vectors, known users are scored as user 0.

    controls=False leaves `shuffled_users` as `true_user` and saves a pass.
    """
    users = [c.user for c in comparisons]
    personal = config.loss.alpha > 0 and not isinstance(model.user_model, UniformUsers)
    rows = [i for i, user in enumerate(users) if user > 0 and personal]

    def scored(rows: Sequence[int], as_users: Sequence[int]) -> ResponseLogProbs:
        return score(
            model, [comparisons[i] for i in rows], [as_users[i] for i in rows],
            config.evaluate.batch_size, config.model.layout, title="evaluation",
        )  # fmt: skip

    generic = scored(range(len(users)), [0] * len(users))

    def with_rows(as_users: Sequence[int]) -> ResponseLogProbs:
        if not rows:
            return generic
        return ResponseLogProbs(
            *(g.index_copy(0, torch.tensor(rows), r) for g, r in zip(generic, scored(rows, as_users)))
        )

    true = with_rows(users)
    return Scores(true, generic, with_rows(shuffled(users, model.users, config.evaluate.seed)) if controls else true)


def mixed_loss(config: LossConfig, scores: Scores, reference: ResponseLogProbs | None, users: Sequence[int]) -> float:
    """The training objective on scored comparisons: mean of alpha loss(true user) + (1 - alpha) loss(generic user)."""
    weights = branch_weights(torch.tensor(users), config.alpha)
    losses_B = [preference_loss(config, branch, reference) for branch in (scores.true_user, scores.generic_user)]
    return (weights.user * losses_B[0] + weights.generic * losses_B[1]).mean().item()


def summarize(
    config: Config,
    scores: Scores,
    reference: ResponseLogProbs | None,
    users: Sequence[int],
    names: Sequence[str | None],
) -> dict[str, Any]:
    """The numbers of report.json: accuracies, intervals, controls and the table of known users.

    users: user numbers (0 unknown); names: the users' names in the data, by which unknown users are resampled.
    """
    margins = [reward_margin(config.loss, branch, reference).numpy() for branch in scores]
    bad = ~np.isfinite(margins).all(axis=0)
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {len(users)} comparisons have reward margins that are not finite: a broken model?"
        )
    samples, rng = config.evaluate.bootstrap, np.random.default_rng(config.evaluate.seed)
    known = [i for i, user in enumerate(users) if user > 0]
    unknown = [i for i, user in enumerate(users) if user == 0]

    def counts(rows: list[int], values: np.ndarray) -> UserCounts:
        return by_user([names[i] or f"unnamed {i}" for i in rows], values[rows])

    true, generic, other = (counts(known, values) for values in margins)
    strangers = counts(unknown, margins[1])
    per_user = true.accuracy()
    accuracy = {
        "top": pooled(true),
        "average_mean": float(per_user.mean()) if known else None,
        "average_std": float(per_user.std()) if known else None,
        "generic": pooled(strangers),
        "worst_user": float(per_user.min()) if known else None,
    }
    interval = {
        "top": pooled_interval(true, samples, rng),
        "average_mean": mean_interval(per_user, samples, rng),
        "average_std": std_interval(per_user, samples, rng),
        "generic": pooled_interval(strangers, samples, rng),
        "worst_user": worst_user_interval(true, samples, rng),
    }
    return {
        "comparisons": {"known_users": len(known), "unknown_users": len(unknown)},
        "accuracy": accuracy,
        "interval": interval,
        "controls": _controls(true, generic, other, samples, rng),
        "per_user": _per_user(true, generic, other),
    }


def _controls(
    true: UserCounts, generic: UserCounts, other: UserCounts, samples: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Known users' accuracy under the generic and a random other user, and what the true user gains over either."""
    found: dict[str, Any] = {}
    for name, control in (("generic_user", generic), ("shuffled_users", other)):
        found[name] = {"accuracy": pooled(control), "interval": pooled_interval(control, samples, rng)}
    for name, control in (("gain_over_generic", generic), ("gain_over_shuffled", other)):
        gain = pooled(true) - pooled(control) if true.users else None
        found[name] = {"accuracy": gain, "interval": difference_interval(true, control, samples, rng)}
    return found


def _per_user(true: UserCounts, generic: UserCounts, other: UserCounts) -> dict[str, Any]:
    """The table of known users (the paper's Tables 3 and 4): n, and accuracy as themselves and under both controls."""
    columns = zip(true.users, true.n, true.accuracy(), generic.accuracy(), other.accuracy())
    return {
        user: {"n": int(n), "accuracy": float(a), "generic_user": float(g), "shuffled_users": float(o)}
        for user, n, a, g, o in columns
    }
