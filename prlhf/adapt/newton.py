"""One user's coordinates from a few comparisons: the most probable ones, and Laplace's approximation around them.

    margin_n = a_n + x_n . c,   a_n = e_0 . (h(y1) - h(y2)),  x_n = B (h(y1) - h(y2)),   c ~ N(m, C)
    minimise  sum_n loss(margin_n)  +  (c - m)^T C^-1 (c - m) / 2

The loss is that of training's user branch, with its label smoothing, its margin and its centring (r1 + r2)^2. All are
convex, so Newton's method with step halving ends at the one optimum. It works in whitened coordinates: with C = L L^T and the
singular value decomposition X L = U S V^T, c = m + L V t has t ~ N(0, I) in the R <= min(N, K) directions that the comparisons
tell of. In all others the posterior is the prior. So the cost does not grow with K cubed, and users of full offsets (K = W)
and of a few coordinates are one case. The posterior covariance is

    (C^-1 + X^T diag(loss'') X)^-1  =  C - Y Y^T,   Y = L V (I - H^-1)^(1/2),   H = I + S U^T diag(loss'') U S

(Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, section 3.4). The prior weighs in full, and so does each
comparison: training's alpha belongs to the balance of two branches, of which there is one here.

Shape suffixes: N comparisons, K coordinates, R directions, T = N terms of the loss, or 2 N with centring.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prlhf.config.keys import LossConfig
from prlhf.errors import TrainingError

MOST_STEPS = 100
LAST_STEP = 1e-10  # of the last step, in standard deviations of the prior


class Evidence(NamedTuple):
    """A user's N comparisons of responses with rewards r = shared + features . c, in float64."""

    chosen_N: Tensor  # e_0 . h(y1)
    rejected_N: Tensor
    chosen_NK: Tensor  # B h(y1)
    rejected_NK: Tensor
    required_N: Tensor  # in units of loss.margin

    def of(self, rows: Tensor | slice) -> "Evidence":
        """Some of the comparisons."""
        return Evidence(*(part[rows] for part in self))

    @property
    def generic_N(self) -> Tensor:
        """The generic user's margins."""
        return self.chosen_N - self.rejected_N

    @property
    def features_NK(self) -> Tensor:
        """What the coordinates are multiplied with in the margins."""
        return self.chosen_NK - self.rejected_NK


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
    """The most probable coordinates, and Y: their covariance is the prior's less Y Y^T."""

    mean_K: Tensor
    told_KR: Tensor

    def variances(self, prior: Gaussian, features_NK: Tensor) -> Tensor:
        """x^T (C - Y Y^T) x for rows x, (N,)."""
        both = ((features_NK @ root).square().sum(dim=1) for root in (prior.root_KK, self.told_KR))
        return (next(both) - next(both)).clamp(min=0)


class Terms(NamedTuple):
    """The loss, (), and its first and second derivatives for each of T numbers that are linear in the coordinates."""

    loss: Tensor
    slope_T: Tensor
    curvature_T: Tensor


def terms_of(config: LossConfig, at_T: Tensor, required_N: Tensor) -> Terms:
    """-(1-e) log s(z) - e log s(-z), z = margin - loss.margin * required; with centring also (r1 + r2)^2, behind the margins."""
    N, e = len(required_N), config.label_smoothing
    z_N, sums_T = at_T[:N] - config.margin * required_N, at_T[N:]
    p_N = z_N.sigmoid()
    loss = -(1 - e) * logsigmoid(z_N).sum() - e * logsigmoid(-z_N).sum() + config.center * sums_T.square().sum()
    slope_T = torch.cat([p_N - (1 - e), 2 * config.center * sums_T])
    return Terms(loss, slope_T, torch.cat([p_N * (1 - p_N), torch.full_like(sums_T, 2 * config.center)]))


class Whitened(NamedTuple):
    """A user's problem in t ~ N(0, I): c = m + directions t, and T numbers at + features t of which the loss is made."""

    at_T: Tensor
    features_TR: Tensor
    directions_KR: Tensor


def whitened(config: LossConfig, evidence: Evidence, prior: Gaussian) -> Whitened:
    """The problem of these comparisons: their margins, and with centring, behind these, the sums of both rewards."""
    at_T, features_TK = evidence.generic_N, evidence.features_NK
    if config.center:
        at_T = torch.cat([at_T, evidence.chosen_N + evidence.rejected_N])
        features_TK = torch.cat([features_TK, evidence.chosen_NK + evidence.rejected_NK])
    U, S, Vt = torch.linalg.svd(features_TK @ prior.root_KK, full_matrices=False)
    return Whitened(at_T + features_TK @ prior.mean_K, U * S, prior.root_KK @ Vt.T)


def fit(config: LossConfig, evidence: Evidence, prior: Gaussian) -> Fit:
    """The most probable coordinates and Y. Without comparisons, the prior. TrainingError where the search does not end."""
    at_T, features_TR, directions_KR = problem = whitened(config, evidence, prior)
    t_R = at_T.new_zeros(features_TR.shape[1])

    def objective(t_R: Tensor) -> Tensor:
        return terms_of(config, at_T + features_TR @ t_R, evidence.required_N).loss + t_R.square().sum() / 2

    for _ in range(MOST_STEPS if len(t_R) else 0):
        terms = terms_of(config, at_T + features_TR @ t_R, evidence.required_N)
        gradient_R = features_TR.T @ terms.slope_T + t_R
        step_R = torch.linalg.solve(hessian(problem, terms), gradient_R)
        size, before, gain = 1.0, objective(t_R), (gradient_R @ step_R).item()
        while gain > 1e-9 and size > 1e-9 and not objective(t_R - size * step_R) <= before - 1e-4 * size * gain:
            size /= 2
        t_R = t_R - size * step_R
        if step_R.abs().max() < LAST_STEP:
            break
    else:
        if len(t_R):
            raise TrainingError("a user's most probable vector was not found; expected rewards that are finite")
    mean_K = prior.mean_K + directions_KR @ t_R
    return Fit(mean_K, told_by(config, evidence, prior, problem._replace(at_T=at_T + features_TR @ t_R)))


def told_by(config: LossConfig, evidence: Evidence, prior: Gaussian, at: Whitened | None = None) -> Tensor:
    """Y of these comparisons (K, R), at the prior's mean; or at the optimum, given the problem `at` it."""
    problem = at or whitened(config, evidence, prior)
    H_RR = hessian(problem, terms_of(config, problem.at_T, evidence.required_N))
    shares_R, axes_RR = torch.linalg.eigh(torch.eye(len(H_RR), dtype=H_RR.dtype) - torch.linalg.inv(H_RR))
    return problem.directions_KR @ (axes_RR * shares_R.clamp(min=0).sqrt())


def hessian(problem: Whitened, terms: Terms) -> Tensor:
    """H = I + features^T diag(loss'') features, (R, R)."""
    features_TR = problem.features_TR
    identity_RR = torch.eye(features_TR.shape[1], dtype=features_TR.dtype)
    return identity_RR + features_TR.T @ (terms.curvature_T[:, None] * features_TR)
