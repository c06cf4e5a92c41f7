"""Rows of the table that are no vector of the checkpoint: user-blind rules, and training from the start.

Shape suffixes: N comparisons, S responses, W width, K vectors, M users.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.new_users.setting import Row, Setting, Turn
from prlhf.adapt.evidence import Judgements
from prlhf.data.check.rules import as_read, fit
from prlhf.data.comparisons import read_comparisons
from prlhf.data.files import fingerprint_of, read_json_lines
from prlhf.data.sources import cache_dir
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedRewardModel
from prlhf.method.prior import Strength
from prlhf.score.cache import bytes_of_tensor, from_cache
from prlhf.score.states import response_states
from prlhf.solve.linear import LinearProblem, linear_problem, scaled_copy, solve, solve_generic
from prlhf.store.final import weights_checksum


def vote_share(setting: Setting) -> Row:
    """The response with the larger share of training votes, (wins + 1) / (wins + losses + 2); no user, no text."""
    data = setting.loaded.config.data
    assert data.train is not None
    rules = fit(read_comparisons(data.train, data).comparisons)

    def margins(turns: Sequence[Turn]) -> list[Tensor]:
        predicted = [[as_read(setting.raw[turn.user][row]) for row in turn.predict] for turn in turns]
        return [torch.tensor([rules.margins(c)["response_share"] for c in some]).double() for some in predicted]

    return margins


def differences(judged: Judgements, user: int, rows: Sequence[int], rewards_SK: Tensor) -> Tensor:
    """r_k(chosen) - r_k(rejected) of some of a user's comparisons, (N, K)."""
    pairs = [judged.pairs(user)[row] for row in rows]
    y1_N, y2_N = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
    return rewards_SK[y1_N] - rewards_SK[y2_N]


def cached(setting: Setting, parts: Any, count: int, compute: Callable[[], Tensor]) -> Tensor:
    """What was computed from a setting and these plain values, (_, count); from the cache where it has it."""
    judged = (setting.training, setting.new)
    states = [hashlib.blake2b(bytes_of_tensor(each.states_SW.float())).hexdigest() for each in judged]
    said = []
    for each in judged:
        required = [(user, each.problem.required_N[rows].tolist()) for user, rows in sorted(each.rows.items())]
        said.append([[(user, each.pairs(user)) for user in sorted(each.rows)], required])
    name = fingerprint_of(weights_checksum(setting.loaded.path), states, said, parts)
    return from_cache(cache_dir() / "new_users" / f"{name}.safetensors", count, compute)


def strength_of(setting: Setting) -> Strength:
    """The strength of the prior that the checkpoint's own training chose. UserError where its metrics.jsonl is not there."""
    path = setting.loaded.path.parent / "metrics.jsonl"
    for _, record in read_json_lines(path) if path.is_file() else ():
        if "prior" in record:
            return Strength(record["prior"], record["shared_prior"])
    raise UserError(f"{path}: no record of user_model.prior; expected the folder of a run that was solved exactly")


def problem_of(setting: Setting, turns: Sequence[Turn]) -> LinearProblem:
    """Training's problem, and what the turns learn from beside it; new users' numbers follow those of the known ones."""
    loaded, known, comparisons = setting.loaded, len(setting.loaded.users), list(setting.trained)
    for turn in turns:
        told = setting.told[turn.user]
        comparisons += [told[row]._replace(user=known + turn.user) for row in turn.learn]
    size, weights = loaded.config.evaluate.batch_size, loaded.backbone_weights()
    assert isinstance(loaded.model, PersonalizedRewardModel)
    new = [c for told in setting.told.values() for c in told]
    both = [response_states(loaded.model, some, size, weights) for some in (setting.trained, new)]
    responses = ([reading for readings, _ in both for reading in readings], torch.cat([states for _, states in both]))
    known += max((turn.user for turn in turns), default=0)
    return linear_problem(loaded.config.loss, loaded.model.user_model, comparisons, responses, known)


def user_blind(setting: Setting) -> Row:
    """A vanilla reward model: one vector for all, solved on the same training file with the same prior."""
    problem = problem_of(setting, ())
    vector_W = solve_generic(problem, strength_of(setting))[0].e_UD.detach()[0] / problem.scale_W
    rewards_S1 = setting.new.states_SW.double() @ vector_W[:, None]

    def margins(turns: Sequence[Turn]) -> list[Tensor]:
        return [differences(setting.new, turn.user, turn.predict, rewards_S1)[:, 0] for turn in turns]

    return margins


def from_the_start(setting: Setting) -> Row:
    """The ceiling: trained again, exactly, on the training file and what everybody said; without that, the generic user."""
    loaded, strength, width = setting.loaded, strength_of(setting), setting.training.states_SW.shape[1]

    def vectors(turns: Sequence[Turn]) -> Tensor:
        problem = problem_of(setting, turns)
        values = {name: p.detach() for name, p in loaded.model.user_model.named_parameters()}
        table = values[loaded.model.user_model.table]
        more = problem.known - len(loaded.users)
        values[loaded.model.user_model.table] = torch.cat([table, table.new_zeros(more, *table.shape[1:])])
        found = scaled_copy(loaded.model.user_model, values, problem.scale_W)
        solve(problem, found, strength)
        with torch.no_grad():
            return problem.vectors(found) / problem.scale_W

    def margins(turns: Sequence[Turn]) -> list[Tensor]:
        told = [(turn.user, turn.learn) for turn in turns]
        vectors_MW = cached(setting, ["start", strength, told], width, lambda: vectors(turns))
        known, found = len(loaded.users), []
        for turn in turns:
            vector_W = vectors_MW[known + turn.user if turn.learn else 0]
            rewards_S1 = setting.new.states_SW.double() @ vector_W[:, None]
            found.append(differences(setting.new, turn.user, turn.predict, rewards_S1)[:, 0])
        return found

    return margins
