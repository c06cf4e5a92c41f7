"""New rows for the table of users: the most probable coordinates of each user of a file, and how sure they are.

A new user's prior is the population of trained users (`population`). With --update a known user's prior is what the model
knows of that user already, and the new comparisons must be new: one that is told twice counts twice.
- Who was adapted before has a posterior, which becomes the prior: Bayes' rule, one comparison after the other.
- Who was trained has a vector but no covariance. Their training comparisons give it, by Laplace's approximation around the
  vector as it is. Where the training file is gone they are refused: the population's covariance around their vector would
  count all that they said in training as nothing.

Shape suffixes: M + 1 rows of all users, 0 the generic one, A adapted users, K coordinates, R directions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.evidence import Judgements
from prlhf.adapt.newton import Gaussian, fit, told_by
from prlhf.adapt.population import population
from prlhf.adapt.scale import held_out_losses
from prlhf.errors import UserError
from prlhf.method.posterior import Posterior
from prlhf.method.users import IndividualUsers, UserModel, is_personal
from prlhf.store.final import Loaded


class Coordinates(NamedTuple):
    """A user model as coordinates of its known users, and the way back to rows of its table."""

    users_MK: Tensor  # user i's in row i - 1
    origin_K: Tensor  # a user's row less its coordinates
    full: bool  # whether coordinates are whole vectors


def check_adaptable(loaded: Loaded) -> None:
    """UserError for a model whose users cannot be adapted here."""
    config, users = loaded.config, loaded.config.user_model
    if not is_personal(loaded.model.user_model, config.loss.alpha):
        key = "loss.alpha=0" if config.loss.alpha == 0 else f"user_model.kind={users.kind}"
        raise UserError(
            f"{loaded.path}: found {key}, which gives users no vectors of their own; expected personal users"
        )
    if config.method == "pdpo" and config.loss.kind == "hinge":
        raise UserError(
            f"{loaded.path}: found loss.kind=hinge, whose most probable users lie at kinks, where no gradient vanishes; "
            "expected another loss"
        )


def coordinates(user_model: UserModel, known: int) -> Coordinates:
    """The coordinates of all known users, in float64 on the CPU."""
    device = user_model.vectors[0].device
    shared_UD, basis_KUD, users, origin_K = user_model.parts(torch.arange(1, known + 1, device=device))
    assert users is not None
    users_MK = users.detach().flatten(1).cpu().double()
    if isinstance(user_model, IndividualUsers) and not user_model.shared:
        origin_K = shared_UD[0]
    origin_K = torch.zeros(users_MK.shape[1]) if origin_K is None else origin_K.detach().cpu()
    return Coordinates(users_MK, origin_K.double(), basis_KUD is None)


class NewUsersPrior(NamedTuple):
    """What is known of a new user, and how its scale was found."""

    gaussian: Gaussian
    said: str


def new_users_prior(loaded: Loaded, training: Judgements | None) -> NewUsersPrior:
    """As of the users adapted before, if any. Else the population times a scale, cross-validated if training's file is there."""
    if loaded.posterior is not None:
        prior_KK = loaded.posterior.prior_KK
        return NewUsersPrior(Gaussian.of(torch.zeros_like(prior_KK[0]), prior_KK), "as of the users adapted before")
    config, (users_MK, _, full) = loaded.config, coordinates(loaded.model.user_model, len(loaded.users))
    standard = full is False and config.user_model.prior is not None
    losses = {} if training is None else held_out_losses(config.loss, users_MK, standard, training)
    scale = min(losses, key=losses.__getitem__) if losses else 1.0
    if losses:
        said = f"cross-validated over trained users: loss {losses[scale]:.4f}, at scale 1 {losses[1.0]:.4f}"
    elif training is None:
        said = f"data.train: {config.data.train} is not there to choose it by"
    else:
        said = "too few trained users have comparisons that share no response to choose it by"
    return NewUsersPrior(
        population(users_MK, standard).scaled(scale), f"the population of trained users, scale {scale:g} ({said})"
    )


def prior_of(
    loaded: Loaded, user: int, vector_K: Tensor, prior: Gaussian, training: Judgements | None
) -> tuple[Gaussian, Tensor]:
    """What is known of a known user, around the vector as it is, and Y (K, R): its covariance is the prior's less Y Y^T.

    UserError for a user of training whose training comparisons are gone.
    """
    posterior = loaded.posterior
    if posterior is not None and user in posterior.users_A:
        return Gaussian.of(vector_K, posterior.covariance(user)), posterior.told(user)
    if training is None or user not in training.pairs:
        raise UserError(
            f"{loaded.path}: user {loaded.users.names[user - 1]!r} is known from training, but data.train: "
            f"{loaded.config.data.train} is not there to say how well; expected that file, or other users"
        )
    told_KR = told_by(loaded.config.loss, training.of(user), prior._replace(mean_K=vector_K))
    return Gaussian.of(vector_K, prior.covariance_KK - told_KR @ told_KR.T), told_KR


class Adapted(NamedTuple):
    """The user model's new table, and the posterior of all adapted users."""

    rows: Tensor
    posterior: Posterior


def adapt(loaded: Loaded, judged: Judgements, training: Judgements | None, prior: Gaussian) -> Adapted:
    """The table with the users of `judged`, whose numbers go on from the known ones. UserError: see `prior_of`."""
    user_model, known, earlier = loaded.model.user_model, len(loaded.users), loaded.posterior
    users_MK, origin_K, full = coordinates(user_model, known)
    table = user_model.get_parameter(user_model.table).detach().cpu()
    rows = torch.cat([table, table.new_zeros(max([known, *judged.pairs]) - known, *table.shape[1:])])
    kept = [] if earlier is None else [user for user in earlier.users_A.tolist() if user not in judged.pairs]
    told = {user: earlier.told(user) for user in kept}
    for user in judged.pairs:
        before, told_KR = prior, prior.root_KK[:, :0]
        if user <= known:
            before, told_KR = prior_of(loaded, user, users_MK[user - 1], prior, training)
        found = fit(loaded.config.loss, judged.of(user), before)
        rows[user - user_model.first_user] = (origin_K + found.mean_K).to(rows).view(rows.shape[1:])
        told[user] = torch.cat([told_KR, found.told_KR], dim=1)
    return Adapted(rows, Posterior.of(prior.covariance_KK, told, full))
