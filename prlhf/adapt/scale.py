"""The scale of a new user's prior, chosen on training's file: trained users take the place of new ones.

Fold by fold, trained users are held out. C (`population`) is of the others, and B too: training fitted B to the users
held out as well, so that in its directions they would be told from few comparisons, which strangers are not. e_0 stays; it is
what all share. Each held-out user's responses are divided in two halves. The first SHOTS pairs within the one give the
coordinates, and all pairs within the other are predicted, with the posterior integrated out.

    refit:  minimise over B, z   alpha sum_n loss(margin_n) + K |B|^2 / (2 s^2) + |z|^2 / 2

is training's objective (`method.prior`) for a few coordinates. Its s need not be known: stretching B and shrinking z changes
no margin, so at training's optimum both penalties are equal, s^2 = K |B|^2 / |z|^2.

Shape suffixes: M users, K coordinates, W width, N comparisons, S responses.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prlhf.adapt.evidence import Judgements
from prlhf.adapt.newton import Evidence, Gaussian, fit
from prlhf.adapt.population import population
from prlhf.config.keys import LossConfig
from prlhf.method.losses import Rewards, preference_loss
from prlhf.method.posterior import integrated
from prlhf.method.prior import difference_scale
from prlhf.solve.strength import FOLDS

SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SHOTS = (1, 2, 5, 10, 20)
MOST_USERS = 200  # of training, drawn at random where there are more: the cost does not grow with all of them
REFIT_STEPS = 300


class Halves(NamedTuple):
    """A held-out user's comparisons to learn from, and those to predict, which share no response with them."""

    learn: Tensor
    predict: Tensor


def split(pairs: Sequence[tuple[int, int]], rng: random.Random) -> Halves:
    """Divide a user's responses in halves: the rows of pairs within the one, in random order, and within the other."""
    responses = sorted({response for pair in pairs for response in pair})
    rng.shuffle(responses)
    first = set(responses[: len(responses) // 2])
    inside = [sum(response in first for response in pair) for pair in pairs]
    learn = [row for row, count in enumerate(inside) if count == 2]
    rng.shuffle(learn)
    return Halves(torch.tensor(learn), torch.tensor([row for row, count in enumerate(inside) if count == 0]))


def held_out_losses(loss: LossConfig, coordinates_MK: Tensor, standard: bool, judged: Judgements) -> dict[float, float]:
    """The mean loss of each scale's predictions, over held-out users and SHOTS; empty where nobody can be held out.

    coordinates_MK: of users 1 to M, whose training comparisons are `judged`.
    """
    rng = random.Random(0)
    users = sorted(judged.pairs)
    users = sorted(rng.sample(users, MOST_USERS)) if len(users) > MOST_USERS else users
    splits = {user: split(judged.pairs[user], rng) for user in users}
    held_out = [user for user in users if len(splits[user].learn) and len(splits[user].predict)]
    if len(held_out) < 2:
        return {}
    sums = dict.fromkeys(SCALES, 0.0)
    for k in range(FOLDS):
        fold = held_out[k::FOLDS]
        others = [user for user in users if user not in fold]
        of_others, users_MK = refit(loss, judged, coordinates_MK, others)
        prior = population(users_MK, standard)
        for user in fold:
            evidence, (learn, predict) = of_others.of(user), splits[user]
            for shots in SHOTS:
                learnt, predicted = evidence.of(learn[:shots]), evidence.of(predict)
                for scale in SCALES:
                    sums[scale] += loss_of(loss, learnt, predicted, prior.scaled(scale))
    return {scale: total / (len(held_out) * len(SHOTS)) for scale, total in sums.items()}


def loss_of(loss: LossConfig, learnt: Evidence, predicted: Evidence, prior: Gaussian) -> float:
    """The mean of -log P(y1 preferred) over the predicted comparisons, after those that are learnt from."""
    found = fit(loss, learnt, prior)
    features_NK = predicted.features_NK
    margin_N = predicted.generic_N + features_NK @ found.mean_K
    return -logsigmoid(integrated(margin_N, found.variances(prior, features_NK))).mean().item()


def refit(
    loss: LossConfig, judged: Judgements, coordinates_MK: Tensor, users: Sequence[int]
) -> tuple[Judgements, Tensor]:
    """The judgements with the B of these users alone, and their coordinates. Whole vectors share nothing but e_0 and stay."""
    z_MK = coordinates_MK[[user - 1 for user in users]]
    if judged.basis_KW is None or not z_MK.any() or not judged.basis_KW.any():
        return judged, z_MK
    rows = [(m, y1, y2) for m, user in enumerate(users) for y1, y2 in judged.pairs[user]]
    user_N, y1_N, y2_N = torch.tensor(rows).T
    required_N = torch.tensor([each for user in users for each in judged.required[user]], dtype=torch.float64)
    states_SW = judged.states_SW.double()
    scale_W, shared_S = difference_scale(states_SW[y1_N] - states_SW[y2_N]), states_SW @ judged.shared_W
    states_SW = states_SW / scale_W
    B_KW = judged.basis_KW * scale_W
    balanced = z_MK.square().sum() / B_KW.square().sum()  # K / s^2
    B_KW, z_MK = B_KW.requires_grad_(), z_MK.clone().requires_grad_()
    search = torch.optim.LBFGS([B_KW, z_MK], max_iter=REFIT_STEPS, history_size=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        features_SK = states_SW @ B_KW.T
        r1_N, r2_N = (shared_S[y_N] + (features_SK[y_N] * z_MK[user_N]).sum(dim=1) for y_N in (y1_N, y2_N))
        penalty = balanced * B_KW.square().sum() / 2 + z_MK.square().sum() / 2
        value = (loss.alpha * preference_loss(loss, Rewards(r1_N, r2_N, required_N), None).sum() + penalty) / len(rows)
        value.backward()
        return value

    search.step(closure)
    return judged._replace(basis_KW=B_KW.detach() / scale_W), z_MK.detach()
