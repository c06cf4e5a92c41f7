"""How strong the prior on users is: chosen by cross-validation within the training data.

What must be predicted is how a known user judges responses that this user has not judged. So it is each user's *responses*
that are divided into folds, not the pairs, which share them: a fold is trained on the pairs of which neither response is the
user's held-out one, and scored on those of which both are; pairs that straddle are left out of it. The score is the training's
own loss, alpha loss(user) + (1 - alpha) loss(generic). First s_0 is chosen where nobody differs, then s with that s_0. s = 0 is
among the candidates, and is chosen unless the best one gains more than a standard error over users: where the data do not show
that users differ, nobody does.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prlhf.config.keys import UserModelConfig
from prlhf.errors import UserError
from prlhf.method.prior import Strength
from prlhf.method.users import IndividualUsers, UniformUsers
from prlhf.solve.linear import LinearProblem, solve, vectors_of_all

FOLDS = 5
SHARED = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # candidates for s_0
USERS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # candidates for s


class Fold(NamedTuple):
    """Which comparisons are trained on and which are scored, both (N,) boolean; the others straddle."""

    train_N: Tensor
    held_out_N: Tensor


Losses = dict[float, Tensor]  # by candidate: what each user adds to the mean held-out loss, (M + 1,)


class Choice(NamedTuple):
    """The strength, and the held-out loss of each candidate that was tried."""

    strength: Strength
    shared_losses: "Losses"
    users_losses: "Losses"

    def record(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        return {
            "prior": self.strength.users,
            "shared_prior": self.strength.shared,
            "held_out_loss_by_prior": means(self.users_losses),
            "held_out_loss_by_shared_prior": means(self.shared_losses),
        }


def choose(problem: LinearProblem, user_model: nn.Module, config: UserModelConfig, seed: int) -> Choice:
    """The strength of config.prior and config.shared_prior, `auto` chosen by cross-validation.

    user_model: in float64, in the problem's coordinates; it is not changed. UserError where no pair can be held out.
    """
    s, s_0 = config.prior, config.shared_prior
    found = folds(problem, seed) if "auto" in (s, s_0) else []
    shared_losses: Losses = {}
    users_losses: Losses = {}
    if s_0 == "auto":
        generic = UniformUsers(torch.zeros(1, len(problem.scale_W), dtype=torch.float64, device=problem.users_N.device))
        shared_losses = losses_along(problem, generic, [Strength(0.0, each) for each in SHARED], found, "shared")
        s_0 = least(shared_losses)
    if s == "auto":
        if isinstance(user_model, UniformUsers) or not (problem.own_N > 0).any():
            s = 0.0
        else:
            users_losses = losses_along(problem, user_model, [Strength(each, s_0) for each in USERS], found, "users")
            s = least(users_losses) if is_shown(users_losses) else 0.0
    return Choice(Strength(s, s_0), shared_losses, users_losses)


def means(losses: Losses) -> dict[str, float]:
    """The mean held-out loss of each candidate, by its name."""
    return {f"{s:g}": of_users_M.sum().item() for s, of_users_M in losses.items()}


def least(losses: Losses) -> float:
    """The candidate with the least mean loss; of equals the first."""
    return min(losses, key=lambda s: losses[s].sum().item())


def is_shown(losses: Losses) -> bool:
    """Whether the best candidate gains more over 0 than the standard error of that, users being the sample (two at least)."""
    gains_M = losses[0.0] - losses[least(losses)]
    gains_M = gains_M[losses[0.0] > 0]  # of users of whom something was held out
    n = len(gains_M)
    return n > 1 and bool(gains_M.sum() > gains_M.std() * n**0.5)


def folds(problem: LinearProblem, seed: int) -> list[Fold]:
    """FOLDS divisions of each user's responses, dealt out in an order of the seed. User 0's comparisons are nobody's votes:
    each is dealt out by itself. UserError where there is not one pair to score."""
    rng = random.Random(seed)
    pairs = list(zip(problem.users_N.tolist(), problem.chosen_N.tolist(), problem.rejected_N.tolist()))
    keys = [((u or -n - 1, y1), (u or -n - 1, y2)) for n, (u, y1, y2) in enumerate(pairs)]
    of_user: dict[int, dict[int, None]] = {}
    for (user, y1), (_, y2) in keys:
        of_user.setdefault(user, {}).update({y1: None, y2: None})
    fold_of: dict[tuple[int, int], int] = {}
    for user, responses in of_user.items():
        order = list(responses)
        rng.shuffle(order)
        first = rng.randrange(FOLDS)
        fold_of.update({(user, y): (first + (i if user >= 0 else 0)) % FOLDS for i, y in enumerate(order)})
    y1_N, y2_N = (torch.tensor([fold_of[pair[side]] for pair in keys]) for side in (0, 1))
    device = problem.users_N.device
    found = [Fold(((y1_N != k) & (y2_N != k)).to(device), ((y1_N == k) & (y2_N == k)).to(device)) for k in range(FOLDS)]
    if not any(fold.held_out_N.any() for fold in found):
        raise UserError(
            f"user_model.prior, user_model.shared_prior: {len(keys)} comparisons are too few to choose `auto` by "
            "cross-validation, for no pair can be held out; expected more comparisons, or numbers for both keys"
        )
    return [fold for fold in found if fold.train_N.any() and fold.held_out_N.any()]


def losses_along(
    problem: LinearProblem, user_model: nn.Module, strengths: Sequence[Strength], folds: Sequence[Fold], name: str
) -> Losses:
    """The held-out losses of each strength, by its part `name`.

    Convex fits start where the one before them ended. Others start afresh: a direction that has vanished stays a saddle point
    when s grows, where a warm start would remain. Ends early where two strengths in a row are worse than the best before them.
    """
    convex = isinstance(user_model, (UniformUsers, IndividualUsers))
    fits: dict[int, nn.Module] = {}
    losses: Losses = {}
    count = sum(int(fold.held_out_N.sum()) for fold in folds)
    for strength in strengths:
        of_users_M = torch.zeros(problem.known + 1, dtype=torch.float64, device=problem.users_N.device)
        for k, fold in enumerate(folds):
            warm = convex and bool(losses)
            if not warm:
                fits[k] = copy.deepcopy(user_model)
            solve(problem.of(fold.train_N), fits[k], strength, warm)
            of_users_M += held_out_losses(problem.of(fold.held_out_N), fits[k]) / count
        losses[getattr(strength, name)] = of_users_M
        of_candidates = list(means(losses).values())
        if len(losses) > 2 and min(of_candidates[-2:]) > min(of_candidates):
            break
    return losses


@torch.no_grad()
def held_out_losses(problem: LinearProblem, user_model: nn.Module) -> Tensor:
    """Each user's sum over their comparisons of alpha loss(user) + (1 - alpha) loss(generic), (M + 1,)."""
    losses_N = problem.losses(vectors_of_all(user_model, problem.known))
    return losses_N.new_zeros(problem.known + 1).index_add(0, problem.users_N, losses_N)
