"""A Gaussian prior on who users are: what the data do not say of a user is what users share.

    f(i) = e_0 + o_i                     o_i ~ N(0, s^2 / W)                    full offsets, one W-th of s^2 a coordinate
    f(i) = e_0 + B z_i,  z_i in R^K      z_i ~ N(0, 1),  B ~ N(0, s^2 / (K W))  low rank, clusters (z_i = w_i - w_0)
    e_0 ~ N(0, s_0^2 / W)

in coordinates in which hidden-state differences h(y1) - h(y2) have a mean square of 1 in each of their W dimensions. So s is
how far a user's reward margins lie from the generic user's, as a standard deviation over typical pairs, and s_0 how large the
generic user's are, whatever the backbone's scale. Clusters without a shared component have no e_0, but e_0 = V w_0 with
w_0 ~ N(0, s_0^2 / s^2). Behind a soft prompt, where a vector's effect on a reward is not linear, a coordinate's standard
deviation is s times that of the word embeddings instead.

Training minimises the mean loss per comparison plus -log p / N: the most probable user model (MAP). The prior of a user is
weighed against that user's comparisons alone, so one with few of them stays close to e_0.

Shape suffixes: B users, M users known, U vectors a user, W width, K rank, N comparisons.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prlhf.config.keys import UserModelConfig

STATED = 1.0  # user_model.prior=auto where no cross-validation can choose it


class Strength(NamedTuple):
    """s of users' differences (0: nobody differs) and s_0 of what they share; None: no prior on it."""

    users: float | None
    shared: float | None


class Prior(NamedTuple):
    """The prior, and what of it one comparison is charged with when training goes through them one by one."""

    strength: Strength
    scale_W: Tensor  # user vectors are multiplied with it before they are measured: N(0, s^2) a coordinate
    comparisons: int  # N
    counts: Tensor  # comparisons of each user number, (M + 1,)

    def penalty(self, user_model: nn.Module, users_B: Tensor) -> Tensor:
        """What B of the N training comparisons, by these users, are charged with; all of them together with -log p:

        sum over b of |z_u(b)|^2 / (2 n_u(b))  +  B / N (|e_0|^2 / (2 s_0^2) + K |B|^2 / (2 s^2)), n_u the user's comparisons.
        """
        share_B = 1 / self.counts.to(users_B.device)[users_B].clamp(min=1).double()
        return self.negative_log_density(user_model, users_B, share_B, len(users_B) / self.comparisons)

    def negative_log_density(self, user_model: nn.Module, users_B: Tensor, share_B: Tensor, part: float) -> Tensor:
        """-log p but for its constant, (): of each user `share_B`, of what users share, B included, `part`."""
        shared_UW, basis_KUW, coordinates, origin_K = user_model.parts(users_B)
        s, s_0 = self.strength
        scale_W = self.scale_W.to(shared_UW)
        shared, of_users_B = shared_UW.new_zeros(()), shared_UW.new_zeros(len(users_B))
        if s_0 is not None:
            size = (shared_UW * scale_W).square().sum() if origin_K is None or not s else s**2 * origin_K.square().sum()
            shared = shared + size / s_0**2
        if s and basis_KUW is not None:
            shared = shared + len(basis_KUW) * (basis_KUW * scale_W).square().sum() / s**2
            of_users_B = coordinates.square().sum(dim=1)
        elif s and coordinates is not None:
            of_users_B = (coordinates * scale_W).square().flatten(1).sum(dim=1) / s**2
        return part * shared / 2 + (share_B.to(of_users_B) * of_users_B).sum() / 2


def counts_of(users: Sequence[int], known: int) -> Tensor:
    """How many comparisons each user number has, (known + 1,)."""
    return torch.bincount(torch.tensor(users, dtype=torch.long), minlength=known + 1)


def embedding_scale(vocabulary_VD: Tensor) -> Tensor:
    """scale_W of a soft prompt, (1,): one over the word embeddings' standard deviation."""
    return 1 / vocabulary_VD.detach().float().std().cpu()[None]


def difference_scale(differences_NW: Tensor) -> Tensor:
    """scale_W of a linear reward head: sqrt(W) times the root mean square of h(y1) - h(y2) in each dimension.

    With x = e * scale_W and x_w ~ N(0, s^2) the margin e . (h(y1) - h(y2)) has variance s^2 over typical pairs. A dimension in
    which responses never differ says nothing, and is given the scale of the mean of the others (1 if there is none).
    """
    rms_W = differences_NW.square().mean(dim=0).sqrt()
    typical = differences_NW.square().mean().sqrt() if rms_W.any() else torch.ones_like(rms_W)
    return torch.where(rms_W > 0, rms_W, typical) * differences_NW.shape[1] ** 0.5


def stated_strength(config: UserModelConfig) -> Strength:
    """The strength, of a config that has a prior, where it is not chosen from data: `auto` is STATED for users and none for
    what they share."""
    shared = None if config.shared_prior == "auto" else config.shared_prior
    return Strength(STATED if config.prior == "auto" else float(config.prior), shared)
