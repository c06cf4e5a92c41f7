"""What a few comparisons tell of a user's coordinates: the Gaussian that is nearest to their posterior.

    margin_n = k (a_n + x_n . c),   a_n = e_0 . (h(y1) - h(y2)),  x_n = B (h(y1) - h(y2)),   c ~ N(m, C)
    p(c | comparisons)  ~  exp( -sum_n loss(margin_n) ) N(c; m, C)
    q = N(mean, S)  minimises  KL(q || p),  which is, but for a constant,  sum_n E_q loss(margin_n) + KL(q || N(m, C))

The loss is that of training's user branch, with its label smoothing, its margin and its centring (r1 + r2)^2; k is the
`sharpness` of choices (see `scale`), which centring does not know. The bound is convex (Challis and Barber 2013, JMLR 14), so
there is one q (`bound` has the search). Laplace's approximation, around the most probable vector, is not used: where users
differ much, few comparisons leave a posterior that is wide and lopsided, and its highest point is far from its mean.

It works in whitened coordinates: with C = L L^T and the singular value decomposition X L = U diag V^T, c = m + L V t has
t ~ N(0, I) in the R <= min(N, K) directions that the comparisons tell of. In all others the posterior is the prior. So users
of full offsets (K = W) and of a few coordinates are one case. The covariance of c is

    S = C - Y Y^T,   Y = L V (I - S_t)^(1/2),   S_t that of t.

The prior weighs in full, and so does each comparison: training's alpha belongs to the balance of two branches, of which there
is one here.

Shape suffixes: N comparisons, K coordinates, R directions, C = 1 or, with centring, 2 numbers that are linear in the
coordinates: margins and sums of rewards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.bound import Problem, nearest
from prlhf.adapt.evidence import Evidence
from prlhf.config.keys import LossConfig


class Gaussian(NamedTuple):
    """N(mean, root root^T) of a user's coordinates."""

    mean_K: Tensor
    root_KK: Tensor

    @classmethod
    def of(cls, mean_K: Tensor, covariance_KK: Tensor) -> "Gaussian":
        """From the covariance, which may be singular."""
        variances_K, directions_KK = torch.linalg.eigh(covariance_KK)
        return cls(mean_K, directions_KK * variances_K.clamp(min=0).sqrt())

    @property
    def covariance_KK(self) -> Tensor:
        """The covariance."""
        return self.root_KK @ self.root_KK.T

    def scaled(self, scale: float) -> "Gaussian":
        """With `scale` times the covariance."""
        return Gaussian(self.mean_K, self.root_KK * scale**0.5)


class Fit(NamedTuple):
    """The posterior mean of the coordinates, and Y: their covariance is the prior's less Y Y^T."""

    mean_K: Tensor
    told_KR: Tensor

    def variances(self, prior: Gaussian, features_NK: Tensor) -> Tensor:
        """x^T (C - Y Y^T) x for rows x, (N,)."""
        of_prior_N, told_N = ((features_NK @ root).square().sum(dim=1) for root in (prior.root_KK, self.told_KR))
        return (of_prior_N - told_N).clamp(min=0)


class Whitened(NamedTuple):
    """A user's problem in t ~ N(0, I), and the way back: c = m + directions t."""

    problem: Problem
    directions_KR: Tensor

    def scaled(self, scale: float, sharpness: float) -> "Whitened":
        """With `scale` times the prior's covariance, and margins times `sharpness`. A prior whose mean is not 0 has scale 1."""
        at_CN, features_CNR, required_N = self.problem
        sharpness_C = torch.tensor([sharpness, 1.0], dtype=torch.float64)[: len(at_CN)]
        features_CNR = features_CNR * sharpness_C[:, None, None] * scale**0.5
        problem = Problem(at_CN * sharpness_C[:, None], features_CNR, required_N)
        return Whitened(problem, self.directions_KR * scale**0.5)


def whitened(config: LossConfig, evidence: Evidence, prior: Gaussian) -> Whitened:
    """The problem of these comparisons, at sharpness 1."""
    at_CN, features_CNK = evidence.generic_N[None], evidence.features_NK[None]
    if config.center:
        sums_N, sums_NK = evidence.chosen_N + evidence.rejected_N, evidence.chosen_NK + evidence.rejected_NK
        at_CN, features_CNK = torch.stack([at_CN[0], sums_N]), torch.stack([features_CNK[0], sums_NK])
    U, S, Vt = torch.linalg.svd((features_CNK @ prior.root_KK).flatten(0, 1), full_matrices=False)
    at_CN = at_CN + features_CNK @ prior.mean_K
    problem = Problem(at_CN, (U * S).view(*at_CN.shape, len(S)), evidence.required_N)
    return Whitened(problem, prior.root_KK @ Vt.T)


def fits(config: LossConfig, users: Sequence[Whitened], fixed_mean: bool = False) -> list[Fit]:
    """q of each user, all at once; means are less the prior's. With `fixed_mean` the best q whose mean is the prior's."""
    found = []
    for (_, directions_KR), (t_R, covariance_RR, _) in zip(
        users, nearest(config, [u.problem for u in users], fixed_mean)
    ):
        told_R, axes_RR = torch.linalg.eigh(torch.eye(len(t_R), dtype=torch.float64) - covariance_RR)
        found.append(Fit(directions_KR @ t_R, directions_KR @ (axes_RR * told_R.clamp(min=0).sqrt())))
    return found


def surprise(config: LossConfig, users: Sequence[Whitened]) -> float:
    """The sum over users of the bound at q: -log of the probability of what they said under the prior, or a little more."""
    return sum(found.bound for found in nearest(config, [user.problem for user in users]))


def fit(config: LossConfig, evidence: Evidence, prior: Gaussian, sharpness: float = 1.0) -> Fit:
    """q of one user. Without comparisons, the prior."""
    (found,) = fits(config, [whitened(config, evidence, prior).scaled(1.0, sharpness)])
    return found._replace(mean_K=prior.mean_K + found.mean_K)


def told_by(config: LossConfig, evidence: Evidence, known: Gaussian, sharpness: float = 1.0) -> Tensor:
    """Y (K, R) of comparisons whose user's coordinates are known.mean: the best q of this mean has S = C - Y Y^T."""
    return fits(config, [whitened(config, evidence, known).scaled(1.0, sharpness)], fixed_mean=True)[0].told_KR
