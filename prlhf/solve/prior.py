"""A prior in a run: its strength is chosen, and where the reward is linear in the user's vector, the model is solved.

For a linear reward head (r = e_u . h) the hidden states of all training responses are taken as the backbone has them before
training. On them the strength of the prior is chosen (`strength`) and the user model solved (`solve`): that is all of the
training of a frozen backbone, and with user_model.init=solved where the training of another one begins (a linear probe, then
fine-tuning; Kumar et al. 2022, arXiv 2202.10054). Other models have the strength that the config states.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config, is_linear, solves_exactly
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.method.prior import Prior, Strength, counts_of, embedding_scale, stated_strength
from prlhf.parallel.ranks import from_main, on_main, say, text_from_main
from prlhf.parallel.tensors import full, named_parameters, put
from prlhf.score.states import readings_of, response_states
from prlhf.solve.linear import (
    LinearProblem,
    blank_copy,
    largest_gradient,
    linear_problem,
    solve,
    unscaled,
    vectors_of_all,
)
from prlhf.solve.strength import USERS, choose

LARGEST = 10**8  # rewards, of each user for each response, that are computed at once
STEEP = 1e-4  # a gradient above this is told: the search has not come to its end
NARROW = min(s for s in USERS if s)  # the prior of updates where the chosen one is that nobody differs


def starts_solved(config: Config) -> bool:
    """Whether the user model is solved before any update, or in place of them."""
    return solves_exactly(config) or config.user_model.init == "solved"


def needs_solver(config: Config) -> bool:
    """Whether all users' rewards of all responses are computed at once: to choose a prior, or to solve."""
    users = config.user_model
    has_prior = is_linear(config) and users.prior is not None
    return has_prior and (starts_solved(config) or "auto" in (users.prior, users.shared_prior))


class Solution(NamedTuple):
    """What `set_prior` found: a record for metrics.jsonl, and the user model's values where it is solved."""

    record: dict[str, Any]
    values: dict[str, Tensor]


def set_prior(
    config: Config, model: PersonalizedModel, comparisons: Sequence[EncodedComparison], base: str
) -> dict[str, Any] | None:
    """Give a model its prior, if the config has one, and the solution where that is asked for; returns what to log of it.

    base: the fingerprint of the backbone's weights. UserError where the strength cannot be chosen, or the problem is too large.
    """
    if config.user_model.prior is None:
        return None
    counts = counts_of([c.user for c in comparisons], model.users)
    if not is_linear(config):
        strength = stated_strength(config.user_model)
        scale_W = embedding_scale(full(model.backbone.get_input_embeddings().weight))
        model.prior = Prior(strength, scale_W, len(comparisons), counts)
        return {"prior": strength.users, "shared_prior": strength.shared}
    assert isinstance(model, PersonalizedRewardModel)
    if needs_solver(config):
        check_size(model.users, len(readings_of(comparisons)))
    readings, states_SW = response_states(model, comparisons, config.evaluate.batch_size, base)
    states_SW = states_SW.to(model.device)
    problem = linear_problem(config, model.user_model, comparisons, readings, states_SW, model.users)
    names = {p: name.removeprefix("user_model.") for name, p in named_parameters(model).items()}
    values = {names[p]: full(p.detach()) for p in model.user_model.parameters()}
    found = on_main(lambda: solution(config, model, problem, values))
    record = json.loads(text_from_main(lambda: json.dumps(found.record)))
    s = record["prior"] or (0.0 if solves_exactly(config) else NARROW)
    model.prior = Prior(Strength(s, record["shared_prior"]), problem.scale_W.cpu(), len(comparisons), counts)
    if starts_solved(config):
        for p in model.user_model.parameters():
            values_of_p = from_main(found.values[names[p]] if found else None)
            # Zero directions with zero coordinates would hold users alike in all updates.
            if values_of_p.any() or solves_exactly(config):
                put(p, values_of_p)
    return {**record, "prior_of_updates": s} if s != record["prior"] else record


def check_size(users: int, responses: int) -> None:
    """UserError where all rewards of so many are too many to be computed at once."""
    if (users + 1) * responses > LARGEST:
        raise UserError(
            f"user_model.prior: {users:,} users and {responses:,} responses are too many to be solved at once; "
            "expected fewer (data.limit, data.known_users), or optim.solver=adamw with numbers for user_model.prior and "
            "user_model.shared_prior"
        )


def solution(
    config: Config, model: PersonalizedRewardModel, problem: LinearProblem, values: dict[str, Tensor]
) -> Solution:
    """Choose the strength, and solve where that is asked for. values: of the user model's parameters, whole."""
    start = blank_copy(model.user_model, values, problem.scale_W)
    if "auto" in (config.user_model.prior, config.user_model.shared_prior):
        say("user_model.prior: choosing its strength by cross-validation")
    choice = choose(problem, start, config.user_model, config.seed)
    if not starts_solved(config):
        return Solution(choice.record(), {})
    least = solve(problem, start, choice.strength)
    slope = largest_gradient(problem, start, choice.strength)
    if slope > STEEP:
        say(
            f"warning: the solution is not exact: the objective's largest gradient is {slope:.1e}, expected below {STEEP:.0e}"
        )
    found = {"objective": least, "largest_gradient": slope, **fit_record(problem, start)}
    return Solution({**choice.record(), **found}, unscaled(start, problem.scale_W))


@torch.no_grad()
def fit_record(problem: LinearProblem, user_model: nn.Module) -> dict[str, float | None]:
    """The mean training loss, and both branches' accuracy on the training comparisons."""
    vectors_MW = vectors_of_all(user_model, problem.known)
    right = [((r.chosen > r.rejected) + 0.5 * (r.chosen == r.rejected)).double() for r in problem.rewards(vectors_MW)]
    own_N = problem.own_N > 0
    accuracy = right[0][own_N].mean().item() if own_N.any() else None
    return {
        "loss": problem.loss_sum(vectors_MW).item() / len(problem.users_N),
        "user_accuracy": accuracy,
        "generic_accuracy": right[1].mean().item(),
    }
