"""The Gaussian q = N(t, S) that is nearest to a posterior in coordinates whose prior is N(0, I), for several users at once.

    q minimises   sum_n E_q loss(at_n + f_n . t)  +  ( |t|^2 + trace S - log det S - R ) / 2

Each expectation is an integral over one number, by Gauss-Hermite quadrature. At the minimum

    t = -sum_n E_q loss'_n f_n,      S^-1 = I + sum_n E_q loss''_n f_n f_n^T.

A step is Newton's for t, and goes half the way to this S^-1, or less of both where that does not lower the bound (Khan and Lin
2017, arXiv 1703.04265, have whole steps, which go round the minimum where margins are saturated). E_q loss'' is taken from the
derivative of the quadrature by the variance (Price's theorem), so that the step descends on what is computed.

Shape suffixes: B users, N comparisons, R directions, C = 1 or, with centring, 2 numbers a comparison, which are linear in t:
the margin and the sum of both rewards; Q quadrature nodes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from prlhf.config.keys import LossConfig
from prlhf.errors import TrainingError

NODES, WEIGHTS = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(32))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
SMALLEST_VARIANCE = 1e-12  # of a margin: the derivative by it divides by its root
MOST_STEPS = 500
GROWTH = 1.05  # of the share of a step that is tried, after one that lowered the bound
LAST_STEP = 1e-6  # in standard deviations of the prior
SMALLEST_GAIN = 1e-12  # of the bound: less is rounding
FAR = 0.01  # from the minimum after MOST_STEPS, in standard deviations of the prior


class Problem(NamedTuple):
    """A user's comparisons: numbers at + features t, and by how much the first response must win, in units of loss.margin."""

    at_CN: Tensor
    features_CNR: Tensor
    required_N: Tensor


class Bound(NamedTuple):
    """The bound of each user, and the derivatives of its sum: by each number's mean E_q loss', and E_q loss''."""

    value_B: Tensor
    slope_BCN: Tensor
    curvature_BCN: Tensor


class Padded(NamedTuple):
    """Several users' problems: comparisons that one lacks are not real, directions that one lacks have no features."""

    config: LossConfig
    at_BCN: Tensor
    features_BCNR: Tensor
    required_BN: Tensor
    real_BN: Tensor

    def some(self, rows: Tensor) -> "Padded":
        """Those of some users."""
        return Padded(self.config, *(part[rows] for part in self[1:]))

    def bound(self, t_BR: Tensor, covariance_BRR: Tensor) -> Bound:
        """The bound at q = N(t, covariance).

        loss = -(1-e) log s(z) - e log s(-z), z = margin - loss.margin * required; with centring also (r1 + r2)^2.
        """
        config, features_BCNR = self.config, self.features_BCNR
        e = config.label_smoothing
        mean_BCN = self.at_BCN + torch.einsum("bcnr,br->bcn", features_BCNR, t_BR)
        variance_BCN = torch.einsum("bcnr,brs,bcns->bcn", features_BCNR, covariance_BRR, features_BCNR)
        root_BN = variance_BCN[:, 0].clamp(min=SMALLEST_VARIANCE).sqrt()
        z_BNQ = (mean_BCN[:, 0] - config.margin * self.required_BN)[..., None] + root_BN[..., None] * NODES
        loss_BN = (-(1 - e) * logsigmoid(z_BNQ) - e * logsigmoid(-z_BNQ)) @ WEIGHTS
        slope_BNQ = z_BNQ.sigmoid() - (1 - e)
        slopes, curvatures = [slope_BNQ @ WEIGHTS], [slope_BNQ @ (WEIGHTS * NODES) / root_BN]
        if config.center:
            loss_BN = loss_BN + config.center * (mean_BCN[:, 1].square() + variance_BCN[:, 1])
            slopes.append(2 * config.center * mean_BCN[:, 1])
            curvatures.append(torch.full_like(root_BN, 2 * config.center))
        of_q_B = covariance_BRR.diagonal(dim1=1, dim2=2).sum(dim=1) - covariance_BRR.logdet() - t_BR.shape[1]
        value_B = (loss_BN * self.real_BN).sum(dim=1) + (t_BR.square().sum(dim=1) + of_q_B) / 2
        return Bound(value_B, *(torch.stack(each, dim=1) * self.real_BN[:, None] for each in (slopes, curvatures)))


class State(NamedTuple):
    """Where the search is: q, how much of a step to try next, the bound at q, and how far a whole step would lead."""

    t_BR: Tensor
    covariance_BRR: Tensor
    precision_BRR: Tensor
    share_B: Tensor
    bound: Bound
    moves_B: Tensor

    def ends(self, before: "State") -> Tensor:
        """(B,) whether there is nothing to gain."""
        gain_B = before.bound.value_B - self.bound.value_B
        flat_B = (gain_B > 0) & (gain_B < SMALLEST_GAIN * (1 + before.bound.value_B.abs()))
        return (self.moves_B < LAST_STEP) | (self.share_B < LAST_STEP) | flat_B


def step(problems: Padded, state: State, fixed_mean: bool) -> State:
    """The state after one step; where that does not lower the bound, the same q and half the share."""
    t_BR, covariance_BRR, precision_BRR, share_B, bound, _ = state
    share_B1, features_BCNR = share_B[:, None], problems.features_BCNR
    weighted_BCNR = bound.curvature_BCN[..., None] * features_BCNR
    towards_BRR = torch.eye(t_BR.shape[1]).double() + torch.einsum("bcnr,bcns->brs", weighted_BCNR, features_BCNR)
    gradient_BR = torch.einsum("bcnr,bcn->br", features_BCNR, bound.slope_BCN) + t_BR
    step_BR = torch.linalg.solve(towards_BRR, gradient_BR) * (not fixed_mean)
    precision_next_BRR = precision_BRR + share_B1[..., None] / 2 * (towards_BRR - precision_BRR)
    t_next_BR, covariance_next_BRR = t_BR - share_B1 * step_BR, torch.linalg.inv(precision_next_BRR)
    tried = problems.bound(t_next_BR, covariance_next_BRR)
    better_B = tried.value_B < bound.value_B
    moves_B = step_BR.abs().amax(dim=1) + (covariance_next_BRR - covariance_BRR).abs().amax(dim=(1, 2)) / share_B

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better_B.view(-1, *[1] * (new.dim() - 1)), new, old)

    return State(
        chosen(t_next_BR, t_BR), chosen(covariance_next_BRR, covariance_BRR), chosen(precision_next_BRR, precision_BRR),
        chosen((GROWTH * share_B).clamp(max=1), share_B / 2), Bound(*map(chosen, tried, bound)), moves_B,
    )  # fmt: skip


class Nearest(NamedTuple):
    """q = N(t, S) of a user, and the bound there: -log of the comparisons' probability under the prior, or a little more."""

    t_R: Tensor
    covariance_RR: Tensor
    bound: float


def nearest(config: LossConfig, problems: Sequence[Problem], fixed_mean: bool = False) -> list[Nearest]:
    """q of each user; with `fixed_mean` the best q whose mean is 0.

    TrainingError where the search does not come near the minimum.
    """
    if not problems:
        return []
    all_of_them = padded(config, problems)
    B, _, _, R = all_of_them.features_BCNR.shape
    t_BR, identity_BRR = torch.zeros(B, R).double(), torch.eye(R).double().repeat(B, 1, 1)
    going, at = torch.arange(B), all_of_them
    start = at.bound(t_BR, identity_BRR)
    state = State(t_BR, identity_BRR, identity_BRR, torch.ones(B).double(), start, torch.zeros(B).double())
    t_BR, covariance_BRR, bound_B = t_BR.clone(), identity_BRR.clone(), start.value_B.clone()
    far = False
    for _ in range(MOST_STEPS if R else 0):
        before, state = state, step(at, state, fixed_mean)
        t_BR[going], covariance_BRR[going], bound_B[going] = state.t_BR, state.covariance_BRR, state.bound.value_B
        rest = (~state.ends(before)).nonzero()[:, 0]
        if not len(rest):
            break
        going, at = going[rest], at.some(rest)
        state = State(*(part[rest] if torch.is_tensor(part) else Bound(*(x[rest] for x in part)) for part in state))
    else:
        far = R > 0 and bool(state.moves_B.max() > FAR)
    if far or not bound_B.isfinite().all():
        raise TrainingError("a user's posterior was not found; expected rewards that are finite, and not too large")
    sizes = [problem.features_CNR.shape[2] for problem in problems]
    return [Nearest(t_BR[b, :r], covariance_BRR[b, :r, :r], bound_B[b].item()) for b, r in enumerate(sizes)]


def padded(config: LossConfig, problems: Sequence[Problem]) -> Padded:
    """The problems as one."""
    N, R = (max(problem.features_CNR.shape[axis] for problem in problems) for axis in (1, 2))
    at, features, required, real = [], [], [], []
    for at_CN, features_CNR, required_N in problems:
        n, r = features_CNR.shape[1:]
        at.append(pad(at_CN, (0, N - n)))
        features.append(pad(features_CNR, (0, R - r, 0, N - n)))
        required.append(pad(required_N, (0, N - n)))
        real.append(pad(torch.ones_like(required_N), (0, N - n)))
    return Padded(config, *(torch.stack(each) for each in (at, features, required, real)))
