"""The prior of a new user's row of the table, where no reward is linear in it: soft prompts, P-DPO, softmax clusters.

    row = base + o,   o ~ N(0, scale C)

base is the unknown user's. For z, w and a softmax's logits C is the covariance of the `population`. Full offsets (T_u x D
numbers) have

    C = (1 - floor) D^T D + floor tr(D^T D) / V I,   D^T D = sum_i o_i o_i^T / M

of the M trained users' offsets: a new user is a mixture of trained ones, and, by the floor, a little of what none of them is. D has
MOST_DIRECTIONS rows at most, and no matrix is larger than the table.

Scale and floor are cross-validated over trained users, each held out of C: a few of their comparisons are learnt from, as a new user's
would be, and others predicted. Scale 1 and the floor MODEST stay unless another is better by more than CLEAR standard errors over
users. What all users share has been trained with those held out too; only training again would undo that (`scale` does, where
training is a solution). New users' own comparisons do not count, so no new user depends on others.

The marginal likelihood of margins taken as linear in the row would need no search. It is far off: over a prior as wide as
trained users differ, margins are not linear.

Shape suffixes: M trained users, V numbers in a row of the table, K directions, H users held out.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from prlhf.adapt.evidence import apart
from prlhf.adapt.gauss_newton import Basis, UserProblem, search
from prlhf.adapt.population import population, second_moment
from prlhf.adapt.reading import task_of
from prlhf.adapt.variational import Gaussian
from prlhf.batch.tokens import EncodedComparison
from prlhf.errors import TrainingError, UserError
from prlhf.method.users import ClusterUsers, IndividualUsers
from prlhf.score.slopes import margin_slopes
from prlhf.score.task import Task
from prlhf.store.final import Loaded

MOST_DIRECTIONS = 256
SCALES_TRIED = (0.25, 4.0)  # beside 1
FLOORS = (
    0.0,
)  # shares of the variance, beside MODEST; more is not tried: what is learnt of the floor is not kept (`nonlinear`)
MODEST = 0.1
HELD_OUT_USERS, LEARN, PREDICT = 8, 3, 6  # trained users, and comparisons of each
ROUGHLY = 0.1  # where a search for them ends, in place of LAST_GRADIENT
CLEAR = 2.0  # with one standard error half of all choices among laws that are equal would be another than the usual one


class RowPrior(NamedTuple):
    """N(base, scale C) of a new user's row."""

    base_V: Tensor
    prior_KK: Tensor  # C; for full offsets the identity, of the mixture's coordinates
    directions_KV: Tensor | None = None  # D times sqrt(1 - floor); None: the identity
    floor: float = 0.0  # what of C is in no direction: a multiple of I
    scale: float = 1.0
    said: str = ""

    def by(self, law: "RowLaw") -> "RowPrior":
        """A prior at scale 1 without a floor by this law, its floor's share being of the variance."""
        if self.directions_KV is None:
            return self._replace(scale=law.scale)
        floor = law.floor * self.directions_KV.square().mean().item() * len(self.directions_KV)
        return self._replace(directions_KV=(1 - law.floor) ** 0.5 * self.directions_KV, floor=floor, scale=law.scale)

    def basis(self, root_KK: Tensor, scale: float) -> Basis:
        """The directions of a row at this scale. root_KK: of the coordinates' covariance, with the scale."""
        span_VK = root_KK if self.directions_KV is None else self.directions_KV.T @ root_KK
        return Basis(span_VK, scale * self.floor)


class RowLaw(NamedTuple):
    """What is chosen: the prior's scale, and the floor's share of its variance."""

    scale: float
    floor: float


class TrainedRows(NamedTuple):
    """The rows of trained users, less the base: full ones, or a few coordinates with a standard prior or none."""

    base_V: Tensor
    away_MV: Tensor
    full: bool
    standard: bool

    def prior(self) -> RowPrior:
        """At scale 1, without a floor."""
        base_V, away_MV, full, standard = self
        if not full:
            return RowPrior(base_V, population(second_moment(away_MV), len(away_MV), standard).covariance_KK)
        _, S_K, Vt_KV = torch.linalg.svd(away_MV / max(len(away_MV), 1) ** 0.5, full_matrices=False)
        directions_KV = (S_K[:, None] * Vt_KV)[:MOST_DIRECTIONS]
        return RowPrior(base_V, torch.eye(len(directions_KV), dtype=torch.float64), directions_KV)

    def without(self, row: int) -> "TrainedRows":
        """The others."""
        return self._replace(away_MV=torch.cat([self.away_MV[:row], self.away_MV[row + 1 :]]))


def trained_rows(loaded: Loaded) -> TrainedRows:
    """Of all known users.

    A softmax does not change where all logits grow alike: they are taken less their mean. Where the unknown user is no mixture
    (user_model.shared), a softmax's new users begin at equal weights.
    """
    user_model, config = loaded.model.user_model, loaded.config.user_model
    table_V = user_model.get_parameter(user_model.table).detach().flatten(1).cpu().double()
    if config.softmax:
        table_V = table_V - table_V.mean(dim=1, keepdim=True)
    full = isinstance(user_model, IndividualUsers)
    base_V, users_MV = torch.zeros_like(table_V[0]), table_V
    if isinstance(user_model, ClusterUsers):
        base_V, users_MV = table_V[0], table_V[1:]
    elif isinstance(user_model, IndividualUsers) and not user_model.shared:
        base_V = user_model.e_UD.detach().flatten().cpu().double()
    return TrainedRows(base_V, users_MV - base_V, full, config.prior is not None and not config.softmax)


class HeldOut(NamedTuple):
    """A trained user's comparisons, by their place among all: those to learn from, and those to predict."""

    row: int  # of the trained users
    learn: list[int]
    predict: list[int]


def held_out(training: Sequence[EncodedComparison]) -> tuple[list[EncodedComparison], list[HeldOut]]:
    """HELD_OUT_USERS trained users at most, LEARN and PREDICT comparisons of each at most, drawn at random, that share no response."""
    rng, comparisons, found = random.Random(0), list[EncodedComparison](), list[HeldOut]()
    judges = sorted({c.user for c in training} - {0})
    for user in rng.sample(judges, len(judges)):
        if len(found) == HELD_OUT_USERS:
            break
        own = [c for c in training if c.user == user]
        drawn = spread(rng.sample(own, len(own)))[: LEARN + PREDICT]
        places = range(len(comparisons), len(comparisons) + len(drawn))
        few = min(LEARN, len(drawn) // 2)
        if few:
            found.append(HeldOut(user - 1, list(places[:few]), list(places[few:])))
            comparisons += drawn
    return comparisons, found


def predicted(task: Task, users: Sequence[HeldOut], priors: Sequence[RowPrior], law: RowLaw) -> Tensor | None:
    """By a prior of the others for each user, the mean -log P(y1 preferred) = -log s(margin) on the user's comparisons to
    predict, (H,); None where a search fails."""
    problems = {}
    for n, user in enumerate(users):
        prior = priors[n].by(law)
        root_KK = Gaussian.of(torch.zeros_like(prior.prior_KK[0]), law.scale * prior.prior_KK).root_KK
        problems[n] = UserProblem(
            f"trained user {user.row + 1}", user.learn, prior.base_V, prior.basis(root_KK, law.scale)
        )
    try:
        rows = [problems[n].row(at.t_R) for n, at in sorted(search(task, problems, ROUGHLY).items())]
    except TrainingError:
        return None
    indices = [i for user in users for i in user.predict]
    rows_NV = torch.stack([row_V for row_V, user in zip(rows, users) for _ in user.predict])
    losses_N = torch.zeros(len(indices), dtype=torch.float64)
    for part in margin_slopes(task, indices, rows_NV):
        losses_N[part.indices] = softplus(-part.values_N)
    return torch.stack([some.mean() for some in losses_N.split([len(user.predict) for user in users])])


def spread(comparisons: Sequence[EncodedComparison]) -> list[EncodedComparison]:
    """The first ones that share no response to a prompt with one before them."""
    responses: dict[tuple, int] = {}

    def number(c: EncodedComparison, y: list[int]) -> int:
        return responses.setdefault((*c.prefix, -1, *y), len(responses))

    return [comparisons[row] for row in apart([(number(c, c.chosen), number(c, c.rejected)) for c in comparisons])]


def new_rows_prior(loaded: Loaded, training: Sequence[EncodedComparison] | None) -> RowPrior:
    """As of the users adapted before, if any; else of the trained users, by the `cross_validated` law.

    UserError where trained users do not differ.
    """
    trained = trained_rows(loaded)
    if (earlier := loaded.posterior) is not None:
        floor = 0.0 if earlier.floor is None else earlier.floor.item()
        said = "as of the users adapted before"
        return RowPrior(trained.base_V, earlier.prior_KK, earlier.directions_KV, floor, earlier.law.scale, said)
    if not trained.away_MV.any():
        raise UserError(f"{loaded.path}: its users do not differ, as training found; expected users who do")
    law, how = (
        RowLaw(1.0, MODEST if trained.full else 0.0),
        "no comparisons of two trained users are there to choose by",
    )
    comparisons, users = held_out(training or ())
    if len(users) > 1:
        task = task_of(loaded, comparisons)
        priors = [trained.without(user.row).prior() for user in users]
        law = cross_validated(law, lambda tried: predicted(task, users, priors, tried), trained.full)
        how = f"by cross-validation over {len(users)} trained users"
    said = f"the population of trained users, scale {law.scale:g}" + (f", floor {law.floor:g}" if trained.full else "")
    return trained.prior().by(law)._replace(said=f"{said} ({how})")


def cross_validated(usual: RowLaw, predict: Callable[[RowLaw], Tensor | None], full: bool) -> RowLaw:
    """The usual law, or one that predicts better by more than CLEAR standard errors over users: first of SCALES_TRIED, then of FLOORS.

    predict: a law's loss for each user held out, (H,); None: it is no candidate.
    """
    best, least_H = usual, predict(usual)
    for name, values in (("scale", SCALES_TRIED), ("floor", FLOORS if full else ())):
        from_law = best
        for value in values:
            tried = from_law._replace(**{name: value})
            losses_H = predict(tried) if tried not in (usual, from_law) else None
            if losses_H is None:
                continue
            gain_H = torch.full_like(losses_H, torch.inf) if least_H is None else least_H - losses_H
            if least_H is None or gain_H.mean() > CLEAR * gain_H.std() / len(gain_H) ** 0.5:
                best, least_H = tried, losses_H
    return best
