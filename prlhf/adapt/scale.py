"""The scale of a new user's prior, and how sharp a single user is, chosen on training's file: trained users as new ones.

    P(y1 preferred by a new user)  =  E sigma(k margin),   margin = (e_0 + B c) . (h(y1) - h(y2)),   c ~ N(0, scale C)

e_0 is what all users share, fitted to all of them at once, and people who differ are together less decided than each alone:
the margins of e_0 are those of the average. k, the sharpness, makes them those of one user (population-averaged and
subject-specific effects; Zeger, Liang and Albert 1988, Biometrics 44). The vector e_0 + B c ranks responses as k times it does.

Fold by fold, trained users are held out. Everything is solved anew without them (`solve.linear`): training fitted e_0 and B to
the users held out as well, so that both would predict them too well. C (`population`) is of the others. Each held-out user's
responses are divided in two halves. The first SHOTS pairs within the one give the coordinates, and all pairs within the other
are predicted, with the posterior integrated out. The pair (scale, k) with the least mean of -log P
is chosen, one of the two at a time, until neither changes.

Shape suffixes: M users, K coordinates, W width, N comparisons, S responses, U = 1 vector a user.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prlhf.adapt.evidence import Evidence, Judgements
from prlhf.adapt.population import population, second_moment
from prlhf.adapt.variational import Whitened, fits, whitened
from prlhf.config.keys import LossConfig
from prlhf.method.posterior import integrated
from prlhf.method.prior import STATED, Strength
from prlhf.method.users import IndividualUsers, LowRankUsers
from prlhf.solve.linear import LinearProblem, solve
from prlhf.solve.strength import FOLDS

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
SHARPNESSES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
SHOTS = (1, 2, 5, 10, 20)


class Halves(NamedTuple):
    """A held-out user's comparisons to learn from, and those to predict, which share no response with them."""

    learn: Tensor
    predict: Tensor


def split(pairs: Sequence[tuple[int, int]], rng: random.Random) -> Halves:
    """Divide a user's responses in halves: the rows of pairs within the one, in random order, and within the other."""
    responses = sorted({response for pair in pairs for response in pair})
    rng.shuffle(responses)
    first = set(responses[: len(responses) // 2])
    inside = [sum(response in first for response in pair) for pair in pairs]
    learn = [row for row, count in enumerate(inside) if count == 2]
    rng.shuffle(learn)
    return Halves(torch.tensor(learn), torch.tensor([row for row, count in enumerate(inside) if count == 0]))


class Shot(NamedTuple):
    """What a held-out user said first, as a problem in whitened coordinates, and what is to be predicted."""

    problem: Whitened
    generic_N: Tensor  # margins of the generic user
    features_NK: Tensor
    variance_N: Tensor  # x^T C x

    @classmethod
    def of(cls, loss: LossConfig, evidence: Evidence, predict: Evidence, users_MK: Tensor, standard: bool) -> "Shot":
        """At scale and sharpness 1."""
        prior, features_NK = population(second_moment(users_MK), len(users_MK), standard), predict.features_NK
        variance_N = (features_NK @ prior.root_KK).square().sum(dim=1)
        return cls(whitened(loss, evidence, prior), predict.generic_N, features_NK, variance_N)


class Tuned(NamedTuple):
    """The scale, the sharpness, and the mean held-out loss of each pair that was tried."""

    scale: float
    sharpness: float
    losses: dict[tuple[float, float], float]

    @property
    def loss(self) -> float:
        """That of the chosen pair."""
        return self.losses[self.scale, self.sharpness]


def choose(loss: LossConfig, judged: Judgements, coordinates_MK: Tensor, standard: bool) -> Tuned | None:
    """The best scale and sharpness. None where fewer than two users can be held out.

    coordinates_MK: of those whose training comparisons are `judged`, by number; standard: see `population`.
    """
    rng, users = random.Random(0), sorted(judged.rows)
    splits = {user: split(judged.pairs(user), rng) for user in users}
    held_out = [user for user in users if len(splits[user].learn) and len(splits[user].predict)]
    if len(held_out) < 2:
        return None
    shots, of_all = [], trained(judged, coordinates_MK)
    for k in range(min(FOLDS, len(held_out))):
        fold = held_out[k::FOLDS]
        of_others, users_MK = without(of_all, fold)
        for user in fold:
            evidence, (learn, predict) = of_others.of(user), splits[user]
            told, asked = [evidence.of(learn[:n]) for n in SHOTS], evidence.of(predict)
            shots += [Shot.of(loss, each, asked, users_MK, standard) for each in told]
    losses: dict[tuple[float, float], float] = {}

    def best_of(candidates: Sequence[tuple[float, float]]) -> tuple[float, float]:
        losses.update({each: mean_loss(loss, shots, *each) for each in candidates if each not in losses})
        return min(candidates, key=losses.__getitem__)

    best, before = (1.0, 1.0), None
    while best != before:
        before = best
        best = best_of([(best[0], each) for each in SHARPNESSES])
        best = best_of([(each, best[1]) for each in SCALES])
    return Tuned(*best, losses)


def mean_loss(loss: LossConfig, shots: Sequence[Shot], scale: float, sharpness: float) -> float:
    """The mean over users and SHOTS of the mean of -log P(y1 preferred)."""
    problems = [shot.problem.scaled(scale, sharpness) for shot in shots]
    total = 0.0
    for shot, found in zip(shots, fits(loss, problems)):
        told_N = (shot.features_NK @ found.told_KR).square().sum(dim=1)
        variance_N = (scale * shot.variance_N - told_N).clamp(min=0)
        margin_N = shot.generic_N + shot.features_NK @ found.mean_K
        total -= logsigmoid(integrated(margin_N, variance_N, sharpness)).mean().item()
    return total / len(shots)


class Trained(NamedTuple):
    """Users' training comparisons, with their user model, in the problem's coordinates, and the prior that it is solved by."""

    judged: Judgements
    problem: LinearProblem
    users: IndividualUsers | LowRankUsers
    strength: Strength


@torch.enable_grad()
def trained(judged: Judgements, coordinates_MK: Tensor) -> Trained:
    """Those whose comparisons are `judged`, with their coordinates, as a user model of e_0 and B or of whole vectors."""
    problem = of_users(judged.problem, sorted(judged.rows))
    e_UW, scale_W = (judged.shared_W * problem.scale_W)[None], problem.scale_W
    if judged.basis_KW is None:
        users: IndividualUsers | LowRankUsers = IndividualUsers(e_UW, (coordinates_MK * scale_W)[:, None])
    else:
        users = LowRankUsers(e_UW, (judged.basis_KW * scale_W)[:, None], coordinates_MK.clone())
    return Trained(judged, problem, users, strength_of(problem, users))


@torch.enable_grad()
def without(of_all: Trained, held_out: Sequence[int]) -> tuple[Judgements, Tensor]:
    """The judgements with the e_0 and B that are solved without these users, and the others' coordinates."""
    judged, problem, users, strength = of_all
    known = sorted(judged.rows)
    places = [place for place, user in enumerate(known) if user not in held_out]
    solution, scale_W = copy.deepcopy(users), problem.scale_W
    table = solution.tables[0]
    table.data = table.data[places]
    solve(of_users(problem, [place + 1 for place in places]), solution, strength, warm=True)
    e_W, users_MK = solution.e_UD.detach()[0] / scale_W, table.detach()
    if isinstance(solution, IndividualUsers):
        return judged._replace(shared_W=e_W), users_MK[:, 0] / scale_W
    return judged._replace(shared_W=e_W, basis_KW=solution.B_KUD.detach()[:, 0] / scale_W), users_MK


def of_users(problem: LinearProblem, users: Sequence[int]) -> LinearProblem:
    """The comparisons of these users, who are numbered from 1 on, and those of user 0."""
    number_of = torch.full((problem.known + 1,), -1)
    number_of[[0, *users]] = torch.arange(len(users) + 1)
    some = problem.of(number_of[problem.users_N] >= 0)
    return replace(some, users_N=number_of[some.users_N], known=len(users))


def strength_of(problem: LinearProblem, solution: IndividualUsers | LowRankUsers) -> Strength:
    """The strength s, s_0 of the prior at whose optimum a trained user model is; STATED and none where it is at none.

    At an optimum x = -s_x^2 gradient of the loss for what has prior N(0, s_x^2), so s_x^2 = -|x|^2 / (x . gradient).
    """

    def implied(x: Tensor, gradient: Tensor) -> float | None:
        squared = -(x.square().sum() / (x * gradient).sum()).item()
        return squared**0.5 if 0 < squared < float("inf") else None

    loss = problem.losses(problem.vectors(solution)).sum()
    basis = solution.B_KUD if isinstance(solution, LowRankUsers) else solution.offsets_MUD
    of_shared, of_basis = torch.autograd.grad(loss, [solution.e_UD, basis])
    s = implied(basis.detach(), of_basis)
    if s is not None and isinstance(solution, LowRankUsers):
        s *= len(basis) ** 0.5
    return Strength(STATED if s is None else s, implied(solution.e_UD.detach(), of_shared))
