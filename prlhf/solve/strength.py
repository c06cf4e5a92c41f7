"""The strength of the prior on users, chosen by cross-validation within the training data.

The model must predict how a known user judges responses that this user has not judged. Pairs share responses, so each user's
*responses* are divided into folds, not the pairs. A fold trains on pairs without a held-out response of that user, and is
scored on pairs of two held-out ones; it leaves out pairs that straddle. The score is the training loss,
alpha loss(user) + (1 - alpha) loss(generic).

First s_0 is chosen for users who do not differ, then s with that s_0. s = 0 is a candidate. It is chosen unless the best one
is better by more than a standard error over users: if the data do not show that users differ, nobody differs.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prlhf.config.keys import UserModelConfig
from prlhf.errors import UserError
from prlhf.method.prior import Strength
from prlhf.method.users import IndividualUsers, UniformUsers
from prlhf.solve.linear import LinearProblem, solve

FOLDS = 5
SHARED = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # candidates for s_0
USERS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # candidates for s
Losses = dict[float, Tensor]  # by candidate: each user's share of the mean held-out loss, (M + 1,)


class Fold(NamedTuple):
    """The comparisons to train on and those to score, both (N,) boolean; the others straddle."""

    train_N: Tensor
    held_out_N: Tensor


class Choice(NamedTuple):
    """The strength, and what metrics.jsonl says of it: the held-out losses of the candidates that were tried."""

    strength: Strength
    record: dict[str, Any]


def choose(problem: LinearProblem, user_model: nn.Module, config: UserModelConfig, seed: int) -> Choice:
    """The strength of config.prior and config.shared_prior, each chosen by cross-validation if it is `auto`.

    user_model: in float64, in the problem's coordinates; it is not changed. UserError if no pair can be held out.
    """
    s, s_0 = config.prior, config.shared_prior
    parts = folds(problem, seed) if "auto" in (s, s_0) else []
    shared_losses: Losses = {}
    users_losses: Losses = {}
    if s_0 == "auto":
        generic = UniformUsers(problem.scale_W.new_zeros(1, len(problem.scale_W)))
        shared_losses = held_out_losses(problem, generic, {each: Strength(0.0, each) for each in SHARED}, parts)
        s_0 = best(shared_losses)
    if s == "auto" and not problem.users_differ:
        s = 0.0
    if s == "auto":
        users_losses = held_out_losses(problem, user_model, {each: Strength(each, s_0) for each in USERS}, parts)
        s = best(users_losses) if is_shown(users_losses) else 0.0
    record = {
        "prior": s,
        "shared_prior": s_0,
        "held_out_loss_by_prior": {f"{each:g}": mean for each, mean in means(users_losses).items()},
        "held_out_loss_by_shared_prior": {f"{each:g}": mean for each, mean in means(shared_losses).items()},
    }
    return Choice(Strength(s, s_0), record)


def means(losses: Losses) -> dict[float, float]:
    """The mean held-out loss of each candidate."""
    return {s: shares_M.sum().item() for s, shares_M in losses.items()}


def best(losses: Losses) -> float:
    """The candidate with the least mean loss; the first of equals."""
    of_candidates = means(losses)
    return min(of_candidates, key=of_candidates.get)


def is_shown(losses: Losses) -> bool:
    """Whether the best candidate's gain over 0 exceeds its standard error, for a sample of at least two users."""
    gains_M = (losses[0.0] - losses[best(losses)])[losses[0.0] > 0]  # users with held-out comparisons
    n = len(gains_M)
    return n > 1 and bool(gains_M.sum() > gains_M.std() * n**0.5)


def folds(problem: LinearProblem, seed: int) -> list[Fold]:
    """Divide each user's responses into FOLDS, dealt out in an order given by the seed. User 0 is no single judge, so each of
    its comparisons is dealt out whole. UserError if no pair can be held out."""
    rng = random.Random(seed)
    pairs = zip(problem.users_N.tolist(), problem.chosen_N.tolist(), problem.rejected_N.tolist())
    votes = [(user or -n - 1, y1, y2) for n, (user, y1, y2) in enumerate(pairs)]  # below 0: a judge of one vote
    judged: dict[int, dict[int, None]] = {}  # each judge's responses, in order of appearance
    for judge, y1, y2 in votes:
        judged.setdefault(judge, {}).update({y1: None, y2: None})
    fold_of: dict[tuple[int, int], int] = {}
    for judge, responses in judged.items():
        order = list(responses)
        rng.shuffle(order)
        first = rng.randrange(FOLDS)
        for i, y in enumerate(order):
            fold_of[judge, y] = (first + (i if judge > 0 else 0)) % FOLDS
    device = problem.users_N.device
    y1_N = torch.tensor([fold_of[judge, y1] for judge, y1, _ in votes], device=device)
    y2_N = torch.tensor([fold_of[judge, y2] for judge, _, y2 in votes], device=device)
    found = [Fold((y1_N != k) & (y2_N != k), (y1_N == k) & (y2_N == k)) for k in range(FOLDS)]
    if not any(fold.held_out_N.any() for fold in found):
        raise UserError(
            f"user_model.prior, user_model.shared_prior: {len(votes)} comparisons are too few to choose `auto` by "
            "cross-validation, as no pair can be held out; expected more comparisons, or numbers for both keys"
        )
    return [fold for fold in found if fold.train_N.any() and fold.held_out_N.any()]


def held_out_losses(
    problem: LinearProblem, user_model: nn.Module, candidates: Mapping[float, Strength], parts: Sequence[Fold]
) -> Losses:
    """The held-out losses of each candidate, summed over folds.

    A convex fit starts where the one before it ended. Others start afresh: a direction that has vanished is a saddle point,
    where a warm start would stay when s grows. Ends early if two candidates in a row are worse than the best before them.
    """
    convex = isinstance(user_model, (UniformUsers, IndividualUsers))
    count = sum(int(fold.held_out_N.sum()) for fold in parts)
    fits: list[nn.Module] = []
    losses: Losses = {}
    for candidate, strength in candidates.items():
        warm = convex and bool(losses)
        fits = fits if warm else [copy.deepcopy(user_model) for _ in parts]
        losses[candidate] = problem.scale_W.new_zeros(problem.known + 1)
        for fold, fit in zip(parts, fits):
            solve(problem.of(fold.train_N), fit, strength, warm)
            held_out = problem.of(fold.held_out_N)
            with torch.no_grad():
                losses_N = held_out.losses(held_out.vectors(fit))
            losses[candidate] += torch.zeros_like(losses[candidate]).index_add(0, held_out.users_N, losses_N) / count
        of_candidates = list(means(losses).values())
        if len(losses) > 2 and min(of_candidates[-2:]) > min(of_candidates):
            break
    return losses
