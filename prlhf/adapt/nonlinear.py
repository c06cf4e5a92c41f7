"""New rows for the table of users where no reward is linear in their coordinates: soft prompts, P-DPO, softmax clusters.

Only a user's row is learnt (`gauss_newton`), from the prior of `rows`. The language model, its adapters, the aggregator, the head,
what users share and all other rows stay. With --update a known user's prior is what the model knows of them, as in `users`,
around their row. What comparisons tell of the prior's floor moves the row, but is not kept: there the covariance stays the
prior's, so the model is said to be less sure than it is. Told directions of the whole row would be V numbers a comparison.

Shape suffixes: V numbers in a row of the table, K directions, Q told directions.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.gauss_newton import UserProblem, evaluate, search
from prlhf.adapt.reading import task_of
from prlhf.adapt.rows import RowPrior
from prlhf.adapt.users import Adapted, law_of, training_is_gone
from prlhf.adapt.variational import Gaussian
from prlhf.batch.order import whole_groups
from prlhf.batch.tokens import EncodedComparison
from prlhf.data.users import UserIndex
from prlhf.method.posterior import Law, Posterior
from prlhf.score.slopes import parts_of, user_rows
from prlhf.store.final import Loaded

AT_ONCE = 256  # comparisons searched for together: the hidden states of so many are in memory


class KnownUser(NamedTuple):
    """What is known of a user before: the row, the root of the coordinates' covariance, scale C - Y Y^T, and Y."""

    row_V: Tensor
    root_KK: Tensor
    told_KQ: Tensor
    scale: float


def adapt_nonlinear(
    loaded: Loaded,
    users: UserIndex,
    comparisons: Sequence[EncodedComparison],
    training: Sequence[EncodedComparison] | None,
    prior: RowPrior,
) -> Adapted:
    """The table with all `users`, known ones first, after these comparisons, and the posterior of all adapted users.

    training: training's comparisons, for users known from it; None: they are not there. UserError: see `known_user` and
    `task_of`. UserError and TrainingError of `search`.
    """
    user_model, earlier = loaded.model.user_model, loaded.posterior
    task = task_of(loaded, [c for c in comparisons if c.user])
    table = user_model.get_parameter(user_model.table).detach().cpu()
    rows = torch.cat([table, table.new_zeros(len(users) - len(loaded.users), *table.shape[1:])])
    before, problems = {}, {}
    for user in sorted({c.user for c in task.comparisons}):
        before[user] = known_user(loaded, user, prior, training)
        indices = [n for n, c in enumerate(task.comparisons) if c.user == user]
        problems[user] = UserProblem(
            users.names[user - 1], indices, before[user].row_V, prior.basis(before[user].root_KK, before[user].scale)
        )
    told = {} if earlier is None else {u: earlier.told(u) for u in earlier.users_A.tolist() if u not in problems}
    for group in groups_of(problems):
        for user, at in search(task, group).items():
            rows[user - user_model.first_user] = problems[user].row(at.t_R).to(rows).view(rows.shape[1:])
            told[user] = torch.cat([before[user].told_KQ, before[user].root_KK @ told_of(at.told(), prior)], dim=1)
    new = Law(prior.scale, 1.0)
    laws = {0: new, **{user: law_of(loaded, user, new) for user in told}}
    posterior = Posterior.of(prior.prior_KK, told, prior.directions_KV is not None, laws)
    floor = torch.tensor(prior.floor, dtype=torch.float64) if prior.floor else None
    return Adapted(rows, posterior._replace(directions_KV=prior.directions_KV, floor=floor))


def told_of(told_RQ: Tensor, prior: RowPrior) -> Tensor:
    """Of the coordinates alone, (K, Q): a part of a Gaussian's covariance is the covariance of that part."""
    return told_RQ[: len(prior.prior_KK)]


def known_user(loaded: Loaded, user: int, prior: RowPrior, training: Sequence[EncodedComparison] | None) -> KnownUser:
    """The prior of a new user. Of one adapted before, what that left; of training, what its comparisons tell around the row.

    UserError where training's comparisons are gone.
    """
    posterior, zero_K, known = loaded.posterior, torch.zeros_like(prior.prior_KK[0]), user <= len(loaded.users)
    scale = law_of(loaded, user, Law(prior.scale, 1.0)).scale
    row_V = user_rows(loaded.model.user_model, [user])[0] if known else prior.base_V
    if known and posterior is not None and user in posterior.users_A:
        root_KK = Gaussian.of(zero_K, posterior.covariance(user)).root_KK
        return KnownUser(row_V, root_KK, posterior.told(user), scale)
    new = Gaussian.of(zero_K, scale * prior.prior_KK)
    fresh = KnownUser(row_V, new.root_KK, new.root_KK[:, :0], scale)
    if not known:
        return fresh
    own = [c for c in training or () if c.user == user]
    if not own:
        raise training_is_gone(loaded, user)
    task = task_of(loaded, own)
    problem = UserProblem("", list(range(len(own))), row_V, prior.basis(fresh.root_KK, scale))
    at = evaluate(task, parts_of(task, problem.indices), {user: problem}, {user: problem.basis.zeros})[user]
    told_KQ = new.root_KK @ told_of(at.told(), prior)
    return fresh._replace(root_KK=Gaussian.of(zero_K, new.covariance_KK - told_KQ @ told_KQ.T).root_KK, told_KQ=told_KQ)


def groups_of(problems: Mapping[int, UserProblem]) -> list[dict[int, UserProblem]]:
    """The users in groups of at most AT_ONCE comparisons, or of one user who has more."""
    users = list(problems)
    batches = whole_groups([len(problems[user].indices) for user in users], AT_ONCE)
    return [{users[n]: problems[users[n]] for n in some} for some in batches]
