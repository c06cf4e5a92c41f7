"""LoRe (Bose et al. 2025, arXiv 2504.14439): K reward functions that all share, and each user's weights on the simplex.

    r(y, u) = sum_k w_uk v_k . h(y),   w_u = softmax(logits_u)     (user_model.kind=cluster, softmax=true, without a prior)

Training is maximum likelihood without a prior, so where the search stops is all that holds V back. It is therefore that of LoRe's
code (github.com/facebookresearch/LoRe, utils.py): Adam, learning rate 0.5, 1,000 steps, margins divided by 100, the sum of each
user's mean loss, all standard normal at the start. A new user's weights are the exact maximum on the simplex, with V as it is;
there LoRe's code takes 500 steps of Adam at 0.1 from random logits. Without comparisons, the mean weights of the trained users.

Shape suffixes: N comparisons, S responses, W width, K reward functions, M known users.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from examples.new_users.baselines import cached, differences
from examples.new_users.setting import Row, Setting, Turn

KS = (2, 3, 5, 10, 20)
STEPS, LR, SCALE = 1000, 0.5, 100.0
MOST_STEPS, NEAR = 20_000, 1e-6  # of a new user's weights: until the loss is this near to its minimum


class Basis(NamedTuple):
    """The reward functions, margins' scale included, and the mean weights of the trained users."""

    V_KW: Tensor
    mean_K: Tensor


def train(states_SW: Tensor, pairs: dict[int, list[tuple[int, int]]], K: int, seed: int) -> Basis:
    """LoRe's training on what the known users said. pairs: by user, the states chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    users, W = sorted(pairs), states_SW.shape[1]
    rows = [(m, *pair) for m, user in enumerate(users) for pair in pairs[user]]
    user_N, y1_N, y2_N = torch.tensor(rows).T
    logits_MK = torch.randn(len(users), K, generator=generator).requires_grad_()
    V_KW = torch.randn(K, W, generator=generator).requires_grad_()
    states_SW, share_N = states_SW.float(), 1 / torch.bincount(user_N)[user_N].float()
    search = torch.optim.Adam([logits_MK, V_KW], lr=LR)
    for _ in range(STEPS):
        search.zero_grad()
        rewards_SK = states_SW @ V_KW.T / SCALE
        weights_NK = logits_MK.softmax(dim=1).index_select(0, user_N)
        margin_N = ((rewards_SK.index_select(0, y1_N) - rewards_SK.index_select(0, y2_N)) * weights_NK).sum(dim=1)
        (-share_N * logsigmoid(margin_N)).sum().backward()
        search.step()
    return Basis(V_KW.detach().double() / SCALE, logits_MK.detach().softmax(dim=1).mean(dim=0).double())


def weights(features_NK: Tensor) -> Tensor:
    """argmin over the simplex of the mean of -log s(features w), (K,). Entropic mirror descent with a step that is halved
    where it would not lower the loss; ends where the duality gap <gradient, w> - min_k gradient_k is below NEAR."""
    w_K = features_NK.new_full((features_NK.shape[1],), 1 / features_NK.shape[1])
    size = 1.0

    def loss(w_K: Tensor) -> Tensor:
        return -logsigmoid(features_NK @ w_K).mean()

    for _ in range(MOST_STEPS):
        gradient_K = -features_NK.T @ (features_NK @ w_K).neg().sigmoid() / len(features_NK)
        gap = gradient_K @ w_K - gradient_K.min()
        if gap < NEAR:
            break
        while True:
            moved_K = (w_K.log() - size * gradient_K).softmax(dim=0)
            if loss(moved_K) <= loss(w_K) or size < 1e-12:
                break
            size /= 2
        w_K, size = moved_K, 2 * size
    return w_K


def lore(setting: Setting, K: int) -> Row:
    """LoRe with K reward functions, trained with the checkpoint's seed."""
    seed, width = setting.loaded.config.seed, setting.training.states_SW.shape[1]

    def solved() -> Tensor:
        judged = setting.training
        basis = train(judged.states_SW, {user: judged.pairs(user) for user in judged.rows}, K, seed)
        return torch.cat([basis.V_KW, basis.mean_K[:, None]], dim=1)

    both_KW = cached(setting, ["lore", K, seed, STEPS, LR, SCALE], width + 1, solved)
    basis = Basis(both_KW[:, :-1], both_KW[:, -1])
    rewards_SK = setting.new.states_SW.double() @ basis.V_KW.T

    def margins(turns: Sequence[Turn]) -> list[Tensor]:
        found = []
        for turn in turns:
            learnt_NK, test_NK = (
                differences(setting.new, turn.user, rows, rewards_SK) for rows in (turn.learn, turn.predict)
            )
            found.append(test_NK @ (weights(learnt_NK) if turn.learn else basis.mean_K))
        return found

    return margins
