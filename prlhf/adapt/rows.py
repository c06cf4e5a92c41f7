"""The prior of a new user's row of the table, where no reward is linear in it: soft prompts, P-DPO, softmax clusters.

    row = base + o,   o ~ N(0, scale C)

base is the unknown user's. For z, w and a softmax's logits C is the covariance of the `population`. Full offsets (T_u x D
numbers) have

    C = (1 - floor) D^T D + floor tr(D^T D) / V I,   D^T D = sum_i o_i o_i^T / M

of the M trained users' offsets: a new user is a mixture of trained ones, and, by the floor, a little of what none of them is. D has
MOST_DIRECTIONS rows at most, and no matrix is larger than the table.

Scale and floor make what trained users said least surprising, each by the C of the others. The surprise, -log of the marginal
likelihood of a user's OWN_COMPARISONS comparisons, would need a search for every candidate. It is computed of margins that are linear around
the user's own row, by `variational`. What all users share has been trained with the user held out too; only training again would
undo that (`scale` does, where training is a solution). New users' comparisons do not count, so no new user depends on others.

Shape suffixes: M trained users, V numbers in a row of the table, K directions, N comparisons.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.bound import Problem
from prlhf.adapt.evidence import apart
from prlhf.adapt.population import population, second_moment
from prlhf.adapt.reading import task_of
from prlhf.adapt.scale import SCALES, plain
from prlhf.adapt.variational import Whitened, surprise
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import LossConfig
from prlhf.errors import UserError
from prlhf.method.users import ClusterUsers, IndividualUsers
from prlhf.score.slopes import margin_slopes, user_rows
from prlhf.store.final import Loaded

MOST_DIRECTIONS = 256
FLOORS = (0.0, 0.1, 0.3)  # shares of the variance
MODEST = 0.1  # where nothing tells
OWN_COMPARISONS = 10  # comparisons of a trained user
HELD_OUT_USERS = 40  # trained ones


class RowPrior(NamedTuple):
    """N(base, scale C) of a new user's row."""

    base_V: Tensor
    prior_KK: Tensor  # C; for full offsets the identity, of the mixture's coordinates
    directions_KV: Tensor | None = None  # D times sqrt(1 - floor); None: the identity
    floor: float = 0.0  # what of C is in no direction: a multiple of I
    scale: float = 1.0
    said: str = "scale 1"


class TrainedRows(NamedTuple):
    """The rows of trained users, less the base: full ones, or a few coordinates with a standard prior or none."""

    base_V: Tensor
    away_MV: Tensor
    full: bool
    standard: bool

    def prior(self, share: float = 0.0) -> RowPrior:
        """At scale 1, `share` of the variance being the floor's."""
        base_V, away_MV, full, standard = self
        if not full:
            return RowPrior(base_V, population(second_moment(away_MV), len(away_MV), standard).covariance_KK)
        _, S_K, Vt_KV = torch.linalg.svd(away_MV / max(len(away_MV), 1) ** 0.5, full_matrices=False)
        directions_KV = (S_K[:, None] * Vt_KV)[:MOST_DIRECTIONS]
        floor = share * directions_KV.square().sum().item() / directions_KV.shape[1]
        identity_KK = torch.eye(len(directions_KV), dtype=torch.float64)
        return RowPrior(base_V, identity_KK, (1 - share) ** 0.5 * directions_KV, floor)

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
    """What a trained user said first: margins as the base would have them, if they were linear, and their slopes."""

    row: int  # of the trained users
    base_N: Tensor
    slopes_NV: Tensor

    def problem(self, prior: RowPrior) -> Whitened:
        """Of the user's comparisons, at the prior's scale 1: margins of covariance slopes C slopes^T."""
        along_NK = self.slopes_NV if prior.directions_KV is None else self.slopes_NV @ prior.directions_KV.T
        covariance_NN = along_NK @ prior.prior_KK @ along_NK.T + prior.floor * self.slopes_NV @ self.slopes_NV.T
        variances_N, axes_NN = torch.linalg.eigh(covariance_NN)
        features_NN = axes_NN * variances_N.clamp(min=0).sqrt()
        return Whitened(Problem(self.base_N[None], features_NN[None], torch.ones_like(self.base_N)), axes_NN)


def held_out(loaded: Loaded, training: Sequence[EncodedComparison], trained: TrainedRows) -> list[HeldOut]:
    """Of HELD_OUT_USERS trained users at most, OWN_COMPARISONS comparisons each, in random order, that share no response."""
    rng = random.Random(0)
    judges = sorted({c.user for c in training} - {0})
    own = {
        user: [c for c in training if c.user == user] for user in rng.sample(judges, min(HELD_OUT_USERS, len(judges)))
    }
    chosen = {user: spread(rng.sample(some, len(some)))[:OWN_COMPARISONS] for user, some in sorted(own.items())}
    task = task_of(loaded, [c for some in chosen.values() for c in some])
    users = [c.user for c in task.comparisons]
    rows_NV = user_rows(loaded.model.user_model, users)
    margins_N, slopes_NV = rows_NV.new_zeros(len(users)), torch.zeros_like(rows_NV)
    for part in margin_slopes(task, range(len(users)), rows_NV):
        margins_N[part.indices], slopes_NV[part.indices] = part.values_N, part.slopes_NV
    found = []
    for user in chosen:
        own_N = torch.tensor(users) == user
        at_N = margins_N[own_N] - slopes_NV[own_N] @ trained.away_MV[user - 1]
        found.append(HeldOut(user - 1, at_N, slopes_NV[own_N]))
    return found


def spread(comparisons: Sequence[EncodedComparison]) -> list[EncodedComparison]:
    """The first ones that share no response to a prompt with one before them."""
    responses: dict[tuple, int] = {}

    def number(c: EncodedComparison, y: list[int]) -> int:
        return responses.setdefault((*c.prefix, -1, *y), len(responses))

    return [comparisons[row] for row in apart([(number(c, c.chosen), number(c, c.rejected)) for c in comparisons])]


def new_rows_prior(loaded: Loaded, training: Sequence[EncodedComparison] | None) -> RowPrior:
    """As of the users adapted before, if any; else of the trained users, scale and floor chosen by what they said.

    At scale 1 and MODEST floor where fewer than two of them have comparisons. UserError where trained users do not differ.
    """
    trained = trained_rows(loaded)
    if (earlier := loaded.posterior) is not None:
        floor = 0.0 if earlier.floor is None else earlier.floor.item()
        scale, said = earlier.law.scale, "as of the users adapted before"
        return RowPrior(trained.base_V, earlier.prior_KK, earlier.directions_KV, floor, scale, said)
    if not trained.away_MV.any():
        raise UserError(f"{loaded.path}: its users do not differ, as training found; expected users who do")
    if len({c.user for c in training or ()} - {0}) < 2:
        share = MODEST if trained.full else 0.0
        return trained.prior(share)._replace(said=named(1.0, share, trained.full))
    others = held_out(loaded, training or [], trained)
    scale, share = least_surprising(loaded.config.loss, trained, others)
    said = f"{named(scale, share, trained.full)} (by marginal likelihood of {len(others):,} trained users)"
    return trained.prior(share)._replace(scale=scale, said=said)


def named(scale: float, share: float, full: bool) -> str:
    """The law in words."""
    return f"the population of trained users, scale {scale:g}" + (f", floor {share:g}" if full else "")


def least_surprising(loss: LossConfig, trained: TrainedRows, said: Sequence[HeldOut]) -> tuple[float, float]:
    """The scale and floor that minimise the sum over users of -log P(what they said), by what the others are."""
    found = {}
    for share in FLOORS if trained.full else FLOORS[:1]:
        problems = [user.problem(trained.without(user.row).prior(share)) for user in said]
        for scale in SCALES:
            found[scale, share] = surprise(plain(loss), [problem.scaled(scale, 1.0) for problem in problems])
    return min(found, key=found.__getitem__)
