"""How sure the model is of users who were adapted to it (`adapt`), and what that does to predictions.

    f(u) = e_0 + B c_u,   c_u ~ N(mean, S_u)  given u's comparisons
    r(x, y, u) = f(u) . h(y)  has variance  (B h)^T S_u (B h),  a margin the same with h(y1) - h(y2)
    P(y1 preferred) = E sigma(k margin)  ~  sigma(k mean / sqrt(1 + pi / 8 k^2 variance))

The last is MacKay's (1992, "The evidence framework applied to classification networks", eq. 5.7): a sigmoid is nearly a
probit of slope sqrt(pi / 8). k is the sharpness of a single user (`adapt.scale`). For full offsets B is the identity: S_u
differs from the prior only in the span of u's comparisons, and this difference is kept.

Shape suffixes: A adapted users, K coordinates, R directions that a user's comparisons tell of, N responses or pairs, W width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prlhf.method.users import UserModel


def integrated(margin_N: Tensor, variance_N: Tensor, sharpness: Tensor | float = 1.0) -> Tensor:
    """The logit of P(y1 preferred), (N,), for margins of these means and variances."""
    return sharpness * margin_N / torch.sqrt(1 + math.pi / 8 * sharpness**2 * variance_N)


class Law(NamedTuple):
    """What is presumed of a user: coordinates c ~ N(0, scale C), and that choices have k = sharpness."""

    scale: float
    sharpness: float


class Posterior(NamedTuple):
    """The covariances of adapted users' coordinates, in float64 on the CPU, and the covariance of the prior that they came from.

    For few coordinates S_u itself. For full offsets S_u = scale_u prior - told_u^T told_u; R is the largest of any user, and rows
    that a user lacks are 0. Full offsets of a soft prompt or of P-DPO are mixtures of directions, f(u) = e_0 + D^T c_u, and a floor beside:
    their coordinates are the mixture's.
    """

    users_A: Tensor  # their numbers, ascending
    scale_A: Tensor  # of each, by which the prior is multiplied
    sharpness_A: Tensor  # k of each
    prior_KK: Tensor  # C
    law_2: Tensor  # scale and sharpness of the users who were added last
    covariance_AKK: Tensor | None = None
    told_ARK: Tensor | None = None
    directions_KV: Tensor | None = None  # D, of the V numbers of a user's T_u vectors
    floor: Tensor | None = None  # the variance of each of the V numbers beside, times scale_u; None: none

    @classmethod
    def of(cls, prior_KK: Tensor, told: Mapping[int, Tensor], full: bool, laws: Mapping[int, Law]) -> "Posterior":
        """told: Y (K, R) of each user, S_u = scale_u prior - Y Y^T. full: whether coordinates are whole vectors. laws: of each
        user, and under 0 that of the users who were added last."""
        users = sorted(told)
        scale_A, sharpness_A = torch.tensor([laws[user] for user in users], dtype=torch.float64).T
        found = cls(torch.tensor(users), scale_A, sharpness_A, prior_KK, torch.tensor(laws[0], dtype=torch.float64))
        if full:
            return found._replace(told_ARK=pad_sequence([told[user].T for user in users], batch_first=True))
        covariances = [laws[user].scale * prior_KK - told[user] @ told[user].T for user in users]
        return found._replace(covariance_AKK=torch.stack(covariances))

    @property
    def law(self) -> Law:
        """Of the users who were added last."""
        return Law(*self.law_2.tolist())

    def law_of(self, user: int) -> Law:
        """Of an adapted user."""
        row = self.row(user)
        return Law(self.scale_A[row].item(), self.sharpness_A[row].item())

    def row(self, user: int) -> int | None:
        """The place of a user among the adapted ones; None for others."""
        found = (self.users_A == user).nonzero().flatten().tolist()
        return found[0] if found else None

    def told(self, user: int) -> Tensor:
        """Y (K, R) with S_u = scale_u prior - Y Y^T, of an adapted user."""
        row = self.row(user)
        if self.told_ARK is not None:
            return self.told_ARK[row].T
        less_K, axes_KK = torch.linalg.eigh(self.scale_A[row] * self.prior_KK - self.covariance_AKK[row])
        return axes_KK * less_K.clamp(min=0).sqrt()

    def covariance(self, user: int) -> Tensor:
        """S_u (K, K) of an adapted user."""
        if self.covariance_AKK is not None:
            return self.covariance_AKK[self.row(user)]
        return self.scale_A[self.row(user)] * self.prior_KK - self.told(user) @ self.told(user).T

    def sharpness_of(self, users_N: Sequence[int]) -> Tensor:
        """k of each adapted user, (N,)."""
        of_user = dict(zip(self.users_A.tolist(), self.sharpness_A.tolist()))
        return torch.tensor([of_user[user] for user in users_N], dtype=torch.float64)

    def variances(self, users_N: Sequence[int], features_NK: Tensor) -> Tensor:
        """x^T S_u x of each row x of the features, (N,); NaN for users who were not adapted."""
        users, found_N = torch.tensor(users_N), features_NK.new_full((len(users_N),), math.nan)
        for user in self.users_A[torch.isin(self.users_A, users)].tolist():
            rows = users == user
            x_NK = features_NK[rows]
            found_N[rows] = ((x_NK @ self.covariance(user)) * x_NK).sum(dim=1).clamp(min=0)
        return found_N

    def row_variances(self, users_N: Sequence[int], slopes_NV: Tensor) -> Tensor:
        """The variances of numbers whose derivatives by their users' rows are these, to first order, (N,); NaN as above.

        The search's covariance is that of a model whose numbers are linear in the row around where it ended, so it goes with
        these, and not with rows drawn from it (Immer et al. 2021, arXiv 2008.08400). The floor's part is the prior's.
        """
        if self.directions_KV is None:
            return self.variances(users_N, slopes_NV)
        found_N = self.variances(users_N, slopes_NV @ self.directions_KV.T)
        if self.floor is not None:
            scale_of = dict(zip(self.users_A.tolist(), self.scale_A.tolist()))
            scale_N = torch.tensor([scale_of.get(user, math.nan) for user in users_N], dtype=torch.float64)
            found_N = found_N + scale_N * self.floor * slopes_NV.square().sum(dim=1)
        return found_N


def features(user_model: UserModel, states_NW: Tensor) -> Tensor:
    """What a user's coordinates are multiplied with in rewards, B h (N, K), in float64 on the CPU; h for full offsets.

    For a linear reward head. The reward is e_0 . h + c_u . features.
    """
    basis_KUD = user_model.parts(torch.zeros(1, dtype=torch.long, device=states_NW.device)).basis_KUD
    states_NW = states_NW.cpu().double()
    return states_NW if basis_KUD is None else states_NW @ basis_KUD.detach()[:, 0].cpu().double().T
