"""New rows for the table of users: the posterior mean of each user's coordinates, and how sure it is.

A new user's prior is the population of trained users (`population`). With --update a known user's prior is what the model
knows of that user already, and the new comparisons must be new: one that is told twice counts twice.
- Who was adapted before has a posterior, which becomes the prior: Bayes' rule, one comparison after the other.
- Who was trained has a vector but no covariance. Their training comparisons give it, as the best Gaussian around the vector as
  it is. Where the training file is gone they are refused: the population's covariance around their vector would count all that
  they said in training as nothing.

Shape suffixes: M + 1 rows of all users, 0 the generic one, A adapted users, K coordinates, R directions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.evidence import Evidence, Judgements
from prlhf.adapt.population import population, second_moment
from prlhf.adapt.scale import held_out, plain, tune
from prlhf.adapt.variational import Fit, Gaussian, Whitened, fit, fits, told_by, whitened
from prlhf.config.keys import LossConfig
from prlhf.errors import UserError
from prlhf.method.posterior import Law, Posterior
from prlhf.method.users import IndividualUsers, UserModel, is_personal
from prlhf.store.final import Loaded

USERS_AT_ONCE = 256  # new users in one batch
ROWS_AT_ONCE = 2**16  # known users whose coordinates are in memory at once


class Coordinates(NamedTuple):
    """A user model as coordinates of some of its users, and the way back to rows of its table."""

    users_MK: Tensor
    origin_K: Tensor  # a user's row less its coordinates
    full: bool  # whether coordinates are whole vectors


def check_personal(loaded: Loaded) -> None:
    """UserError for a model whose users have no vectors of their own."""
    config, users = loaded.config, loaded.config.user_model
    if not is_personal(loaded.model.user_model, config.loss.alpha):
        key = "loss.alpha=0" if config.loss.alpha == 0 else f"user_model.kind={users.kind}"
        raise UserError(
            f"{loaded.path}: found {key}, which gives users no vectors of their own; expected personal users"
        )


def check_adaptable(loaded: Loaded) -> None:
    """UserError for a model whose users cannot be adapted here."""
    check_personal(loaded)
    if loaded.config.method == "pdpo" and loaded.config.loss.kind == "hinge":
        raise UserError(
            f"{loaded.path}: found loss.kind=hinge, whose most probable users lie at kinks, where no gradient vanishes; "
            "expected another loss"
        )


def coordinates(user_model: UserModel, users_M: Sequence[int]) -> Coordinates:
    """The coordinates of these known users, in float64 on the CPU."""
    device = user_model.vectors[0].device
    shared_UD, basis_KUD, users, origin_K = user_model.parts(torch.tensor(users_M, dtype=torch.long, device=device))
    assert users is not None
    users_MK = users.detach().flatten(1).cpu().double()
    if isinstance(user_model, IndividualUsers) and not user_model.shared:
        origin_K = shared_UD[0]
    origin_K = torch.zeros(users_MK.shape[1]) if origin_K is None else origin_K.detach().cpu()
    return Coordinates(users_MK, origin_K.double(), basis_KUD is None)


def moments(user_model: UserModel, known: int) -> Tensor:
    """sum_i c_i c_i^T over all known users, (K, K), ROWS_AT_ONCE at a time."""
    blocks = [range(start, min(start + ROWS_AT_ONCE, known + 1)) for start in range(1, known + 1, ROWS_AT_ONCE)]
    return sum(second_moment(coordinates(user_model, block).users_MK) for block in blocks)


class NewUsersPrior(NamedTuple):
    """What is presumed of new users: N(0, C), scale and sharpness, and how both were found."""

    population: Gaussian
    law: Law
    said: str

    @property
    def gaussian(self) -> Gaussian:
        """N(0, scale C)."""
        return self.population.scaled(self.law.scale)


class TrainedPopulation(NamedTuple):
    """The users of training as new users' prior at scale 1, and what each of them said first, held out (`scale.held_out`)."""

    loss: LossConfig
    gaussian: Gaussian
    held_out: list[Whitened]

    def prior(self, new: Sequence[Evidence]) -> NewUsersPrior:
        """With the scale and sharpness that fit these new users' comparisons that are `apart`, and those of training."""
        if not self.held_out:
            said = "scale 1, sharpness 1 (no comparisons of two trained users are there to choose them by)"
            return NewUsersPrior(self.gaussian, Law(1.0, 1.0), f"the population of trained users, {said}")
        law = tune(self.loss, [whitened(self.loss, each, self.gaussian) for each in new], self.held_out)
        said = f"scale {law.scale:g}, sharpness {law.sharpness:g} (by marginal likelihood"
        said += f" of {len(new):,} new and {len(self.held_out):,} trained users)"
        return NewUsersPrior(self.gaussian, law, f"the population of trained users, {said}")


def trained_population(loaded: Loaded, training: Judgements | None) -> TrainedPopulation:
    """Of all trained users, and those whose comparisons are there."""
    config, user_model, posterior = loaded.config, loaded.model.user_model, loaded.posterior
    judges = [] if training is None else sorted(training.rows)
    users_MK, _, full = coordinates(user_model, judges)
    standard = not full and config.user_model.prior is not None
    known = len(loaded.users) - (0 if posterior is None else len(posterior.users_A))
    gaussian = before_first(posterior) if posterior else population(moments(user_model, known), known, standard)
    loss = plain(config.loss)
    first = [] if training is None else held_out(loss, training, users_MK, standard, known)
    return TrainedPopulation(loss, gaussian, first)


def before_first(posterior: Posterior) -> Gaussian:
    """N(0, C), the population as it was before any user was adapted."""
    return Gaussian.of(torch.zeros_like(posterior.prior_KK[0]), posterior.prior_KK)


def new_users_prior(loaded: Loaded, training: Judgements | None, new: Sequence[Evidence] = ()) -> NewUsersPrior:
    """Of the `TrainedPopulation`, for these users. Without training's comparisons, as of the users who were added last, if any.

    UserError where training found that users do not differ.
    """
    if training is None and (posterior := loaded.posterior) is not None:
        return NewUsersPrior(before_first(posterior), posterior.law, "as of the users who were added last")
    user_model = loaded.model.user_model
    if not all(parameter.any() for parameter in (user_model.vectors[-1], *user_model.tables)):
        raise UserError(f"{loaded.path}: its users do not differ, as training found; expected users who do")
    return trained_population(loaded, training).prior(new)


def prior_of(loaded: Loaded, user: int, population: Gaussian, training: Judgements | None) -> tuple[Gaussian, Tensor]:
    """What is known of a known user, around the vector as it is, and Y (K, R): its covariance is the prior's less Y Y^T.

    A trained user's prior is the population at scale 1: they are of it. UserError for one whose training comparisons are gone.
    """
    posterior, vector_K = loaded.posterior, coordinates(loaded.model.user_model, [user]).users_MK[0]
    if posterior is not None and posterior.row(user) is not None:
        return Gaussian.of(vector_K, posterior.covariance(user)), posterior.told(user)
    if training is None or user not in training.rows:
        raise training_is_gone(loaded, user)
    told_KR = told_by(loaded.config.loss, training.of(user), population._replace(mean_K=vector_K))
    return Gaussian.of(vector_K, population.covariance_KK - told_KR @ told_KR.T), told_KR


def training_is_gone(loaded: Loaded, user: int) -> UserError:
    """The error for --update of a user of training whose training comparisons are gone."""
    return UserError(
        f"{loaded.path}: user {loaded.users.names[user - 1]!r} is known from training, but data.train: "
        f"{loaded.config.data.train} is not there to say how well; expected that file, or other users"
    )


def law_of(loaded: Loaded, user: int, new: Law) -> Law:
    """Of an adapted user, as they were adapted; of a user of training scale and sharpness 1; `new` of a new user."""
    posterior = loaded.posterior
    if posterior is not None and posterior.row(user) is not None:
        return posterior.law_of(user)
    return Law(1.0, 1.0) if user <= len(loaded.users) else new


class Adapted(NamedTuple):
    """The user model's new table, and the posterior of all adapted users."""

    rows: Tensor
    posterior: Posterior


def adapt(loaded: Loaded, judged: Judgements, training: Judgements | None, prior: NewUsersPrior) -> Adapted:
    """The table with the users of `judged`, whose numbers go on from the known ones. UserError: see `prior_of`."""
    user_model, known, earlier = loaded.model.user_model, len(loaded.users), loaded.posterior
    _, origin_K, full = coordinates(user_model, [])
    table = user_model.get_parameter(user_model.table).detach().cpu()
    rows = torch.cat([table, table.new_zeros(max([known, *judged.rows]) - known, *table.shape[1:])])
    kept = [] if earlier is None else [user for user in earlier.users_A.tolist() if user not in judged.rows]
    told = {user: earlier.told(user) for user in kept}
    for user, fitted in fit_each(loaded, judged, training, prior).items():
        rows[user - user_model.first_user] = (origin_K + fitted.mean_K).to(rows).view(rows.shape[1:])
        told[user] = fitted.told_KR
    laws = {0: prior.law, **{user: law_of(loaded, user, prior.law) for user in told}}
    prior_KK = prior.population.covariance_KK if earlier is None else earlier.prior_KK
    posterior = Posterior.of(prior_KK, told, full, laws)
    if posterior.covariance_AKK is not None and earlier is not None:
        for user in kept:  # bit for bit
            posterior.covariance_AKK[posterior.row(user)] = earlier.covariance(user)
    return Adapted(rows, posterior)


def fit_each(loaded: Loaded, judged: Judgements, training: Judgements | None, prior: NewUsersPrior) -> dict[int, Fit]:
    """The posterior of each user of `judged`: new users USERS_AT_ONCE at a time, known ones from what is known of them."""
    loss, known = loaded.config.loss, len(loaded.users)
    new = [user for user in judged.rows if user > known]
    found: dict[int, Fit] = {}
    for start in range(0, len(new), USERS_AT_ONCE):
        some = new[start : start + USERS_AT_ONCE]
        problems = [whitened(loss, judged.of(user), prior.population).scaled(*prior.law) for user in some]
        found.update(zip(some, fits(loss, problems)))
    for user in set(judged.rows) - set(new):
        before, told_KR = prior_of(loaded, user, prior.population, training)
        fitted = fit(loss, judged.of(user), before, law_of(loaded, user, prior.law).sharpness)
        found[user] = fitted._replace(told_KR=torch.cat([told_KR, fitted.told_KR], dim=1))
    return found
