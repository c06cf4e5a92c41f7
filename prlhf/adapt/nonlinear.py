"""New rows for the table of users where no reward is linear in their coordinates: soft prompts, P-DPO, softmax clusters.

Only a user's row is learnt (`gauss_newton`). The language model, its adapters, the aggregator, the head, what users share and
all other rows stay. A new user's row has the prior

    row = base + D^T c,   c ~ N(0, C)

base is the unknown user's. For z, w and a softmax's logits D is the identity and C the covariance of the `population`. Full offsets
(T_u x D numbers) have the covariance of those of the M trained users, sum_i o_i o_i^T / M: C is the identity, and D = S V^T of
the singular value decomposition of the o_i / sqrt(M), at most MOST_DIRECTIONS of it. A new user is then a mixture of trained ones,
and no matrix is larger than the table. What no trained user has, no new one gets. The scale of either prior is 1; it is not
chosen from data.

With --update a known user's prior is what the model knows of them, as in `users`, around their row.

Shape suffixes: M trained users, V numbers in a row of the table, K directions, R whitened coordinates, Q told directions.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.gauss_newton import UserProblem, evaluate, parts_of, search, zeros
from prlhf.adapt.population import population, second_moment
from prlhf.adapt.users import Adapted, training_is_gone
from prlhf.adapt.variational import Gaussian
from prlhf.batch.tokens import EncodedComparison
from prlhf.data.users import UserIndex
from prlhf.method.losses import needs_reference
from prlhf.method.posterior import Law, Posterior
from prlhf.method.users import ClusterUsers, IndividualUsers
from prlhf.score.agreement import check_agreement
from prlhf.score.reference import computes_on, reference_log_probs
from prlhf.score.task import Task
from prlhf.store.final import Loaded, base_fingerprint, reference_model

MOST_DIRECTIONS = 256
AT_ONCE = 256  # comparisons searched for together: the hidden states of so many are in memory


class RowPrior(NamedTuple):
    """The prior of a new user's row."""

    base_V: Tensor
    prior_KK: Tensor  # C
    directions_KV: Tensor | None  # D; None: the identity

    def basis(self, root_KR: Tensor) -> Tensor:
        """D^T L, (V, R)."""
        return root_KR if self.directions_KV is None else self.directions_KV.T @ root_KR


def row_prior(loaded: Loaded) -> RowPrior:
    """As of the users adapted before, if any; else the population of trained users.

    A softmax does not change where all logits grow alike: they are taken less their mean. Where the unknown user is no mixture
    (user_model.shared), a softmax's new users begin at equal weights.
    """
    user_model, config = loaded.model.user_model, loaded.config.user_model
    table_V = user_model.get_parameter(user_model.table).detach().flatten(1).cpu().double()
    if config.softmax:
        table_V = table_V - table_V.mean(dim=1, keepdim=True)
    if isinstance(user_model, ClusterUsers):
        base_V, users_MV = table_V[0], table_V[1:]
    else:
        alone = isinstance(user_model, IndividualUsers) and not user_model.shared
        base_V = user_model.e_UD.detach().flatten().cpu().double() if alone else torch.zeros_like(table_V[0])
        users_MV = table_V
    if loaded.posterior is not None:
        return RowPrior(base_V, loaded.posterior.prior_KK, loaded.posterior.directions_KV)
    away_MV = users_MV - base_V
    if isinstance(user_model, IndividualUsers):
        _, S_K, Vt_KV = torch.linalg.svd(away_MV / len(away_MV) ** 0.5, full_matrices=False)
        directions_KV = (S_K[:, None] * Vt_KV)[:MOST_DIRECTIONS]
        return RowPrior(base_V, torch.eye(len(directions_KV), dtype=torch.float64), directions_KV)
    standard = config.prior is not None and not config.softmax
    return RowPrior(base_V, population(second_moment(away_MV), len(away_MV), standard).covariance_KK, None)


class KnownUser(NamedTuple):
    """What is known of a user already: the root of the covariance, which is the prior's less Y Y^T, and Y."""

    root_KR: Tensor
    told_KQ: Tensor


def adapt_nonlinear(
    loaded: Loaded,
    users: UserIndex,
    comparisons: Sequence[EncodedComparison],
    training: Sequence[EncodedComparison] | None,
) -> Adapted:
    """The table with all `users`, known ones first, after these comparisons, and the posterior of all adapted users.

    training: training's comparisons, for users known from it; None: they are not there. UserError: see `known_user` and
    `task_of`. UserError and TrainingError of `search`.
    """
    user_model, earlier = loaded.model.user_model, loaded.posterior
    prior, task = row_prior(loaded), task_of(loaded, [c for c in comparisons if c.user])
    table = user_model.get_parameter(user_model.table).detach().cpu()
    rows = torch.cat([table, table.new_zeros(len(users) - len(loaded.users), *table.shape[1:])])
    root_KR = Gaussian.of(zeros_of(prior), prior.prior_KK).root_KK
    before, problems = {}, {}
    for user in sorted({c.user for c in task.comparisons}):
        base_V, before[user] = prior.base_V, KnownUser(root_KR, root_KR[:, :0])
        if user <= len(loaded.users):
            base_V = table[user - user_model.first_user].flatten().double()
            before[user] = known_user(loaded, user, base_V, prior, training)
        indices = [n for n, c in enumerate(task.comparisons) if c.user == user]
        problems[user] = UserProblem(users.names[user - 1], indices, base_V, prior.basis(before[user].root_KR))
    told = {} if earlier is None else {u: earlier.told(u) for u in earlier.users_A.tolist() if u not in problems}
    for group in groups_of(problems):
        for user, at in search(task, group).items():
            row_V = problems[user].base_V + problems[user].basis_VR @ at.t_R
            rows[user - user_model.first_user] = row_V.to(rows).view(rows.shape[1:])
            told[user] = torch.cat([before[user].told_KQ, before[user].root_KR @ at.told()], dim=1)
    laws = dict.fromkeys([0, *told], Law(1.0, 1.0))
    posterior = Posterior.of(prior.prior_KK, told, prior.directions_KV is not None, laws)
    return Adapted(rows, posterior._replace(directions_KV=prior.directions_KV))


def zeros_of(prior: RowPrior) -> Tensor:
    """c = 0, the prior's mean."""
    return prior.prior_KK.new_zeros(len(prior.prior_KK))


def known_user(
    loaded: Loaded, user: int, base_V: Tensor, prior: RowPrior, training: Sequence[EncodedComparison] | None
) -> KnownUser:
    """As adapted before; of training, what its comparisons tell around the row as it is. UserError where these are gone."""
    posterior, zero_K = loaded.posterior, zeros_of(prior)
    if posterior is not None and user in posterior.users_A:
        return KnownUser(Gaussian.of(zero_K, posterior.covariance(user)).root_KK, posterior.told(user))
    own = [c for c in training or () if c.user == user]
    if not own:
        raise training_is_gone(loaded, user)
    task, root_KR = task_of(loaded, own), Gaussian.of(zero_K, prior.prior_KK).root_KK
    problem = UserProblem("", list(range(len(own))), base_V, prior.basis(root_KR))
    at = evaluate(task, parts_of(task, problem.indices), {user: problem}, {user: zeros(problem)})[user]
    told_KQ = root_KR @ at.told()
    return KnownUser(Gaussian.of(zero_K, prior.prior_KK - told_KQ @ told_KQ.T).root_KK, told_KQ)


def task_of(loaded: Loaded, comparisons: list[EncodedComparison]) -> Task:
    """The comparisons with the reference's log-probs, as training computes them; the model's weights take no gradients.

    UserError for a comparison that is too long.
    """
    config, model = loaded.config, loaded.model.requires_grad_(False)
    model.check_lengths(comparisons)
    reference = None
    if needs_reference(config):
        reference = reference_log_probs(
            lambda: check_agreement(reference_model(loaded).to(model.device)), comparisons, config.evaluate.batch_size,
            base_fingerprint(loaded.path), computes_on(config.model, model.device.type),
        )  # fmt: skip
    return Task(config, model, comparisons, reference)


def groups_of(problems: Mapping[int, UserProblem]) -> list[dict[int, UserProblem]]:
    """The users in groups of at most AT_ONCE comparisons, or of one user who has more."""
    groups: list[dict[int, UserProblem]] = []
    room = 0
    for user, problem in problems.items():
        if len(problem.indices) > room:
            groups.append({})
            room = AT_ONCE
        groups[-1][user] = problem
        room -= len(problem.indices)
    return groups
