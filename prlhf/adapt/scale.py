"""The scale of new users' prior, and how sharp a single user is: what makes their comparisons least surprising.

    P(y1 preferred by a new user)  =  E sigma(k margin),   margin = (e_0 + B c) . (h(y1) - h(y2)),   c ~ N(0, scale C)

e_0 is what all users share, fitted to all of them at once, and people who differ are together less decided than each alone:
the margins of e_0 are those of the average. k, the sharpness, makes them those of one user (population-averaged and
subject-specific effects; Zeger, Liang and Albert 1988, Biometrics 44). The vector e_0 + B c ranks responses as k times it does.

The pair (scale, k) minimises the surprise, -log of the marginal likelihood (empirical Bayes) of the choices alone, whatever
else training's loss has,

    sum over new users  -log P(their comparisons)   +   WORTH . mean over trained users  -log P(their first comparisons),

one of the two at a time, until neither changes. Of each user only comparisons that share no response are counted: what a user
thinks of one response, beyond what the model can say, shows in all its comparisons, and would count as evidence that users
differ. New users need not be like those whom training knew: they may have said less, or be less of one mind. But one or two of
them tell nothing of that, so trained users count as WORTH new ones. These are held out fold by fold, and everything is solved
anew without them (`solve.linear`): training fitted e_0 and B to the users held out as well, so that both would predict them too
well. C (`population`) is of the others.

Shape suffixes: M users, K coordinates, W width, N comparisons, S responses, U = 1 vector a user.
"""

import copy
import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.evidence import Judgements, apart
from prlhf.adapt.population import population, second_moment
from prlhf.adapt.variational import Whitened, surprise, whitened
from prlhf.config.keys import LossConfig
from prlhf.method.posterior import Law
from prlhf.method.prior import STATED, Strength
from prlhf.method.users import IndividualUsers, LowRankUsers
from prlhf.solve.linear import LinearProblem, solve
from prlhf.solve.strength import FOLDS

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SHARPNESSES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
FIRST = 20  # comparisons of a trained user
WORTH = 5  # new users
MOST_NEW_USERS = 200  # new ones, evenly from where there are more


def tune(loss: LossConfig, new: Sequence[Whitened], of_training: Sequence[Whitened]) -> Law:
    """The least surprising scale and sharpness. The problems are at scale and sharpness 1, of priors whose mean is 0."""
    step = max(1.0, len(new) / MOST_NEW_USERS)
    new = [new[int(n * step)] for n in range(min(len(new), MOST_NEW_USERS))]
    surprises: dict[tuple[float, float], float] = {}

    def of(pair: tuple[float, float]) -> float:
        if pair not in surprises:
            own, others = (surprise(loss, [user.scaled(*pair) for user in users]) for users in (new, of_training))
            surprises[pair] = own + WORTH * others / max(len(of_training), 1)
        return surprises[pair]

    best, before = (1.0, 1.0), None
    while best != before:
        before = best
        best = min([(best[0], each) for each in SHARPNESSES], key=of)
        best = min([(each, best[1]) for each in SCALES], key=of)
    return Law(*best)


def plain(loss: LossConfig) -> LossConfig:
    """-log P(y1 preferred): without margins to win by, smoothing or centring."""
    return dataclasses.replace(loss, margin=0.0, label_smoothing=0.0, center=0.0)


def held_out(
    loss: LossConfig, judged: Judgements, coordinates_MK: Tensor, standard: bool, known: int
) -> list[Whitened]:
    """The problem of each trained user's first comparisons, in random order, by what is solved without that user.

    coordinates_MK: of those whose training comparisons are `judged`, by number; standard: see `population`; known: how many
    users training had. Empty where there are fewer than two.
    """
    rng, users = random.Random(0), sorted(judged.rows)
    if len(users) < 2:
        return []
    found, of_all = [], trained(judged, coordinates_MK, known)
    for k in range(min(FOLDS, len(users))):
        fold = users[k::FOLDS]
        of_others, users_MK = without(of_all, fold)
        prior = population(second_moment(users_MK), len(users_MK), standard)
        for user in fold:
            pairs = of_others.pairs(user)
            order = rng.sample(range(len(pairs)), len(pairs))
            first = [order[row] for row in apart([pairs[row] for row in order])][:FIRST]
            found.append(whitened(loss, of_others.of(user).of(torch.tensor(first)), prior))
    return found


class Trained(NamedTuple):
    """Users' training comparisons, with their user model, in the problem's coordinates, and the prior that it is solved by."""

    judged: Judgements
    problem: LinearProblem
    users: IndividualUsers | LowRankUsers
    strength: Strength


@torch.enable_grad()
def trained(judged: Judgements, coordinates_MK: Tensor, known: int) -> Trained:
    """Those whose comparisons are `judged`, with their coordinates, as a user model of e_0 and B or of whole vectors."""
    problem = of_users(judged.problem, sorted(judged.rows))
    e_UW, scale_W = (judged.shared_W * problem.scale_W)[None], problem.scale_W
    if judged.basis_KW is None:
        users: IndividualUsers | LowRankUsers = IndividualUsers(e_UW, (coordinates_MK * scale_W)[:, None])
    else:
        users = LowRankUsers(e_UW, (judged.basis_KW * scale_W)[:, None], coordinates_MK.clone())
    return Trained(judged, problem, users, strength_of(problem, users, max(known / problem.known, 1.0)))


@torch.enable_grad()
def without(of_all: Trained, fold: Sequence[int]) -> tuple[Judgements, Tensor]:
    """The judgements with the e_0 and B that are solved without the users of a fold, and the others' coordinates."""
    judged, problem, users, strength = of_all
    known = sorted(judged.rows)
    places = [place for place, user in enumerate(known) if user not in fold]
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
    return dataclasses.replace(some, users_N=number_of[some.users_N], known=len(users))


def strength_of(problem: LinearProblem, solution: IndividualUsers | LowRankUsers, share: float = 1.0) -> Strength:
    """The strength s, s_0 of the prior at whose optimum a trained user model is; STATED and none where it is at none.

    At an optimum x = -s_x^2 gradient of the loss for what has prior N(0, s_x^2), so s_x^2 = -|x|^2 / (x . gradient). share: all
    users of training for each of the problem's: what all users share has a gradient that is so much larger. Clusters are taken
    for users of a rank, whose prior differs a little from theirs.
    """

    def implied(x: Tensor, gradient: Tensor) -> float | None:
        squared = -(x.square().sum() / (x * gradient).sum()).item()
        return squared**0.5 if 0 < squared < float("inf") else None

    loss = problem.losses(problem.vectors(solution)).sum()
    basis = solution.B_KUD if isinstance(solution, LowRankUsers) else solution.offsets_MUD
    of_shared, of_basis = torch.autograd.grad(loss, [solution.e_UD, basis])
    of_shared = share * of_shared
    of_basis = share * of_basis if isinstance(solution, LowRankUsers) else of_basis
    s = implied(basis.detach(), of_basis)
    if s is not None and isinstance(solution, LowRankUsers):
        s *= len(basis) ** 0.5
    return Strength(STATED if s is None else s, implied(solution.e_UD.detach(), of_shared))
