"""The prior in a run: choose its strength and, if the reward is linear in the user's vector, solve the user model.

A linear reward head (r = e_u . h) reads the hidden states of the backbone as it is before training. On those of all training
responses the prior's strength is chosen (`strength`) and the user model is solved (`linear`). For a frozen backbone this is the
whole training. With user_model.init=solved it is where training starts: a linear probe, then fine-tuning (Kumar et al. 2022,
arXiv 2202.10054). Other models take the strength from the config.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config, is_linear, solves_exactly
from prlhf.errors import UserError
from prlhf.method.build import read_words
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.method.prior import Prior, Strength, counts_of, embedding_scale, stated_strength
from prlhf.parallel.ranks import from_main, on_main, say, text_from_main
from prlhf.parallel.tensors import full, named_parameters, put
from prlhf.score.states import readings_of, response_states
from prlhf.solve.linear import LinearProblem, linear_problem, scaled_copy, solve, unscaled
from prlhf.solve.strength import USERS, choose

LARGEST = 10**8  # rewards (users times responses) that are computed at once
STEEP = 1e-4  # a larger gradient at the end of the search is worth a warning
NARROW = min(s for s in USERS if s)  # the prior of updates if the chosen one is 0: nobody differs


class Solution(NamedTuple):
    """What to log, and the user model's parameters if it is solved."""

    record: dict[str, Any]
    values: dict[str, Tensor]


def starts_solved(config: Config) -> bool:
    """Whether the user model is solved, before the first update or in place of updates."""
    return solves_exactly(config) or config.user_model.init == "solved"


def needs_solver(config: Config) -> bool:
    """Whether all users' rewards of all responses are computed at once, to choose a prior or to solve."""
    users = config.user_model
    has_prior = is_linear(config) and users.prior is not None
    return has_prior and (starts_solved(config) or "auto" in (users.prior, users.shared_prior))


def check_size(users: int, responses: int) -> None:
    """UserError if their rewards are too many to be computed at once."""
    if (users + 1) * responses > LARGEST:
        raise UserError(
            f"user_model.prior: {users:,} users and {responses:,} responses are too many to be solved at once; "
            "expected fewer (data.limit, data.known_users), or optim.solver=adamw with numbers for user_model.prior and "
            "user_model.shared_prior"
        )


def set_prior(
    config: Config, model: PersonalizedModel, comparisons: Sequence[EncodedComparison], base: str
) -> dict[str, Any] | None:
    """Give the model its prior, if the config has one, and the exact solution, if the config asks for it; what to log of both.

    base: fingerprint of the backbone's weights. UserError if the strength cannot be chosen or the problem is too large.
    """
    if config.user_model.prior is None:
        return None
    counts = counts_of([c.user for c in comparisons], model.users)
    if not is_linear(config):
        strength = stated_strength(config.user_model)
        embedding = model.backbone.get_input_embeddings()
        weight_VD = full(embedding.weight.detach()).to(model.device)
        scale_W = embedding_scale(read_words(embedding, weight_VD, torch.arange(len(weight_VD))))
        model.prior = Prior(strength, scale_W, len(comparisons), counts)
        return {"prior": strength.users, "shared_prior": strength.shared}
    assert isinstance(model, PersonalizedRewardModel)
    if needs_solver(config):
        check_size(model.users, len(readings_of(comparisons)))
    readings, states_SW = response_states(model, comparisons, config.evaluate.batch_size, base)
    responses = (readings, states_SW.to(model.device))
    problem = linear_problem(config.loss, model.user_model, comparisons, responses, model.users)
    parameters = named_parameters(model.user_model)
    values = {name: full(p.detach()) for name, p in parameters.items()}
    found = on_main(lambda: solution(config, problem, scaled_copy(model.user_model, values, problem.scale_W)))
    record = json.loads(text_from_main(lambda: json.dumps(found.record)))
    s = record["prior"] or (0.0 if solves_exactly(config) else NARROW)
    model.prior = Prior(Strength(s, record["shared_prior"]), problem.scale_W.cpu(), len(comparisons), counts)
    if starts_solved(config):
        for name, parameter in parameters.items():
            value = from_main(found.values[name] if found else None)
            # Updates could not separate users whose directions and coordinates are both zero: these keep their start.
            if value.any() or solves_exactly(config):
                put(parameter, value)
    return {**record, "prior_of_updates": s} if s != record["prior"] else record


def solution(config: Config, problem: LinearProblem, user_model: nn.Module) -> Solution:
    """Choose the strength, and solve the user model, in the problem's coordinates, if the config asks for it."""
    if "auto" in (config.user_model.prior, config.user_model.shared_prior):
        say("user_model.prior: choosing its strength by cross-validation")
    choice = choose(problem, user_model, config.user_model, config.seed)
    if not starts_solved(config):
        return Solution(choice.record, {})
    optimum = solve(problem, user_model, choice.strength)
    if optimum.largest_gradient > STEEP:
        found = f"the objective's largest gradient is {optimum.largest_gradient:.1e}, expected below {STEEP:.0e}"
        say(f"warning: the solution is not exact: {found}")
    record = {**choice.record, **optimum._asdict(), **fit_record(problem, user_model)}
    return Solution(record, unscaled(user_model, problem.scale_W))


@torch.no_grad()
def fit_record(problem: LinearProblem, user_model: nn.Module) -> dict[str, float | None]:
    """The mean training loss, and each branch's accuracy on the training comparisons; ties count one half."""
    vectors_MW, own_N = problem.vectors(user_model), problem.own_N > 0
    right = [((r.chosen > r.rejected) + 0.5 * (r.chosen == r.rejected)).double() for r in problem.rewards(vectors_MW)]
    return {
        "loss": problem.losses(vectors_MW).sum().item() / len(problem.users_N),
        "user_accuracy": right[0][own_N].mean().item() if own_N.any() else None,
        "generic_accuracy": right[1].mean().item(),
    }
