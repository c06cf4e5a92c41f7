"""How far users are from the generic user and from each other.

Users are points whose Euclidean distance is what the model makes of the difference of their vectors:
- a linear reward head: the root mean square of (f(u) - f(v)) . (h(y1) - h(y2)) over comparisons, by how much their margins differ;
- else: the root mean square over the T_u vectors of |f(u)_t - f(v)_t|, in standard deviations of word embeddings,
  sqrt(E |w - E w|^2): at 1 they are as far apart as a word is from the average word.
With f(u) = f(0) + c_u B both are |R c_u - R c_v|, where R^T R is the mean of x x^T, x = B (h(y1) - h(y2)); or B B^T.

Shape suffixes: M users, K coordinates, R <= K directions, N comparisons, U vectors a user, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.reading import task_of
from prlhf.adapt.rows import trained_rows
from prlhf.adapt.users import coordinates
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import has_linear_coordinates, is_linear
from prlhf.method.models import PersonalizedRewardModel
from prlhf.method.posterior import features
from prlhf.score.slopes import margin_slopes
from prlhf.score.states import States, response_states
from prlhf.store.final import Loaded

NEAREST = 3
DISTANCES = 2**24  # distances in memory at once


class Space(NamedTuple):
    """Users as points around the generic user."""

    points_MR: Tensor
    unit: str  # a sentence
    deviations: dict[int, float]  # of adapted users: the root mean square of the standard deviations of their margins


def space_of(loaded: Loaded, comparisons: Sequence[EncodedComparison]) -> Space:
    """The space of a model's users; for a linear reward head as of these comparisons."""
    model = loaded.model
    users_MK = coordinates(model.user_model, range(1, len(loaded.users) + 1)).users_MK
    if is_linear(loaded.config):
        assert isinstance(model, PersonalizedRewardModel)
        size = loaded.config.evaluate.batch_size
        states = States(*response_states(model, comparisons, size, loaded.backbone_weights()))
        chosen_NW, rejected_NW = states.of_pairs(comparisons)
        x_NK = features(model.user_model, chosen_NW - rejected_NW)
        root_RK = torch.linalg.qr(x_NK / len(x_NK) ** 0.5, mode="r").R
        unit = (
            f"Distances: the root mean square of the difference of two users' margins over {len(x_NK):,} comparisons."
        )
        linear = has_linear_coordinates(loaded.config)
        sure = deviations(loaded, root_RK) if linear else row_deviations(loaded, comparisons)
        return Space(users_MK @ root_RK.T, unit, sure)
    basis_KUD = model.user_model.parts(torch.zeros(1, dtype=torch.long, device=model.device)).basis_KUD
    if basis_KUD is not None:
        users_MK = users_MK @ torch.linalg.qr(basis_KUD.detach().flatten(1).cpu().double().T, mode="r").R.T
    unit = "Distances: of users' vectors, root mean square over those of a user, in standard deviations of word embeddings."
    points_MR = users_MK / (word_deviation(loaded) * model.user_model.tokens**0.5)
    return Space(points_MR, unit, row_deviations(loaded, comparisons))


def word_deviation(loaded: Loaded) -> float:
    """sqrt(E |w - E w|^2) of the word embeddings as the blocks read them."""
    embedding = loaded.model.backbone.get_input_embeddings()
    words_VD = embedding(torch.arange(embedding.weight.shape[0], device=embedding.weight.device)).float()
    return (words_VD - words_VD.mean(dim=0)).square().sum(dim=1).mean().sqrt().item()


def deviations(loaded: Loaded, root_RK: Tensor) -> dict[int, float]:
    """sqrt of the mean of x^T S_u x for each adapted user, by number; root_RK: R^T R is the mean of x x^T."""
    posterior = loaded.posterior
    if posterior is None:
        return {}
    covariances = {user: posterior.covariance(user) for user in posterior.users_A.tolist()}
    return {user: ((root_RK @ S_KK) * root_RK).sum().clamp(min=0).sqrt().item() for user, S_KK in covariances.items()}


def row_deviations(loaded: Loaded, comparisons: Sequence[EncodedComparison]) -> dict[int, float]:
    """The same where rewards are not linear in the users' rows: to first order around where a new user begins."""
    posterior = loaded.posterior
    if posterior is None:
        return {}
    task, total = task_of(loaded, list(comparisons)), dict.fromkeys(posterior.users_A.tolist(), 0.0)
    rows_NV = trained_rows(loaded).base_V.expand(len(comparisons), -1)
    for part in margin_slopes(task, range(len(comparisons)), rows_NV):
        for user in total:
            total[user] += posterior.row_variances([user] * len(part.indices), part.slopes_NV).sum().item()
    return {user: (variance / len(comparisons)) ** 0.5 for user, variance in total.items()}


def nearest(points_MR: Tensor) -> list[list[tuple[int, float]]]:
    """The NEAREST other users of each, by row, with their distances."""
    M, found = len(points_MR), []
    for start in range(0, M, step := max(1, DISTANCES // max(M, 1))):
        rows = points_MR[start : start + step]
        distances_BM = torch.cdist(rows, points_MR)
        distances_BM[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf  # not oneself
        near = distances_BM.topk(min(NEAREST, M - 1), dim=1, largest=False)
        found += [list(zip(*pair)) for pair in zip(near.indices.tolist(), near.values.tolist())]
    return found


def directions(points_MR: Tensor) -> tuple[Tensor, float]:
    """Points on the two directions in which users are furthest from the generic user, (M, 2), and their share of the squares."""
    U_MR, S_R, _ = torch.linalg.svd(points_MR, full_matrices=False)
    points_M2 = U_MR[:, :2] * S_R[:2]
    if points_M2.shape[1] < 2:
        points_M2 = torch.nn.functional.pad(points_M2, (0, 2 - points_M2.shape[1]))
    total = S_R.square().sum().item()
    return points_M2, S_R[:2].square().sum().item() / total if total else 0.0
