"""A Gaussian prior on users: a user with few comparisons stays close to what all users share.

    f(i) = e_0 + o_i                     o_i ~ N(0, s^2 / W)                    full offsets, one W-th of s^2 a coordinate
    f(i) = e_0 + B z_i,  z_i in R^K      z_i ~ N(0, 1),  B ~ N(0, s^2 / (K W))  low rank, clusters (z_i = w_i - w_0)
    e_0 ~ N(0, s_0^2 / W)

For a linear reward head, coordinates are scaled so that hidden-state differences h(y1) - h(y2) have a mean square of 1 in
each of their W dimensions (`difference_scale`). Over typical pairs, s is then the standard deviation of a user's reward
margins around the generic user's, and s_0 that of the generic user's margins. Clusters without a shared component have
e_0 = V w_0 with w_0 ~ N(0, s_0^2 / s^2). A soft prompt's effect on a reward is not linear; there a coordinate's standard
deviation is s times that of the word embeddings.

Training minimises the mean loss per comparison plus -log p / N: the most probable user model (MAP).

Shape suffixes: B users, M users known, U vectors a user, W width, K rank, N comparisons.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prlhf.config.keys import UserModelConfig

STATED = 1.0  # s for user_model.prior=auto where no cross-validation can choose it


class Strength(NamedTuple):
    """s of the differences between users (0: nobody differs), and s_0 of what users share. None: no prior on it."""

    users: float | None
    shared: float | None


class Prior(NamedTuple):
    """The prior, and the share of it that each comparison bears in training."""

    strength: Strength
    scale_W: Tensor  # user vectors times scale_W have N(0, s^2) in each coordinate
    comparisons: int  # N
    counts: Tensor  # comparisons of each user number, (M + 1,)

    def penalty(self, user_model: nn.Module, users_B: Tensor) -> Tensor:
        """The part of -log p, (), that B of the N training comparisons bear, by these users. n_u: user u's comparisons.

        sum over b of |z_u(b)|^2 / (2 n_u(b))  +  B / N (|e_0|^2 / (2 s_0^2) + K |B|^2 / (2 s^2))
        """
        share_B = 1 / self.counts.to(users_B.device)[users_B].clamp(min=1).double()
        return self.negative_log_density(user_model, users_B, share_B, len(users_B) / self.comparisons)

    def negative_log_density(self, user_model: nn.Module, users_B: Tensor, share_B: Tensor, part: float) -> Tensor:
        """-log p without its constant, (): `share_B` of each user's term, `part` of the terms of e_0 and of the basis."""
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

    With x = e * scale_W and x_w ~ N(0, s^2) the margin e . (h(y1) - h(y2)) has variance s^2 over typical pairs. A dimension
    in which responses never differ gets the root mean square over all dimensions (1 if they differ in none).
    """
    rms_W = differences_NW.square().mean(dim=0).sqrt()
    typical = differences_NW.square().mean().sqrt() if rms_W.any() else torch.ones_like(rms_W)
    return torch.where(rms_W > 0, rms_W, typical) * differences_NW.shape[1] ** 0.5


def stated_strength(config: UserModelConfig) -> Strength:
    """The strength of a config's prior where it is not chosen from data. `auto` is STATED for users, and none for e_0."""
    shared = None if config.shared_prior == "auto" else config.shared_prior
    return Strength(STATED if config.prior == "auto" else float(config.prior), shared)
