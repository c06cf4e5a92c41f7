"""Comparisons as evidence on users' coordinates: hidden states once for all responses, projected on what users differ in.

Shape suffixes: S responses, N comparisons, K coordinates, W pooled width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import has_linear_coordinates
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedRewardModel
from prlhf.score.states import response_states
from prlhf.solve.linear import LinearProblem, linear_problem
from prlhf.store.final import Loaded


class Evidence(NamedTuple):
    """A user's N comparisons of responses with rewards r = shared + features . c, in float64."""

    chosen_N: Tensor  # e_0 . h(y1)
    rejected_N: Tensor
    chosen_NK: Tensor  # B h(y1)
    rejected_NK: Tensor
    required_N: Tensor  # in units of loss.margin

    def of(self, rows: Tensor | slice) -> "Evidence":
        """Some of the comparisons."""
        return Evidence(*(part[rows] for part in self))

    def times(self, sharpness: float) -> "Evidence":
        """With all rewards times `sharpness`."""
        rewards = {name: part * sharpness for name, part in self._asdict().items() if name != "required_N"}
        return self._replace(**rewards)

    @property
    def generic_N(self) -> Tensor:
        """The generic user's margins."""
        return self.chosen_N - self.rejected_N

    @property
    def features_NK(self) -> Tensor:
        """What the coordinates are multiplied with in the margins."""
        return self.chosen_NK - self.rejected_NK


def apart(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The rows of the first pairs that share no response with one before them."""
    seen: set[int] = set()
    rows = []
    for row, pair in enumerate(pairs):
        if seen.isdisjoint(pair):
            rows.append(row)
            seen.update(pair)
    return rows


class Judgements(NamedTuple):
    """What users said of responses, whose rewards are e_0 . h + c . B h, on the CPU in float64."""

    problem: LinearProblem
    shared_W: Tensor  # e_0
    basis_KW: Tensor | None  # B; None: coordinates are whole vectors
    rows: dict[int, list[int]]  # by user number: the rows of the user's comparisons

    def of(self, user: int) -> Evidence:
        """A user's comparisons."""
        problem, rows = self.problem, self.rows[user]
        chosen_NW, rejected_NW = (
            problem.states_SW[y[rows]] * problem.scale_W for y in (problem.chosen_N, problem.rejected_N)
        )
        states = (chosen_NW, rejected_NW)
        chosen_NK, rejected_NK = states if self.basis_KW is None else [h_NW @ self.basis_KW.T for h_NW in states]
        required_N = problem.required_N[rows]
        return Evidence(chosen_NW @ self.shared_W, rejected_NW @ self.shared_W, chosen_NK, rejected_NK, required_N)

    @property
    def states_SW(self) -> Tensor:
        """h of all responses."""
        return self.problem.states_SW * self.problem.scale_W

    def pairs(self, user: int) -> list[tuple[int, int]]:
        """The responses chosen and rejected in each comparison of a user."""
        rows = self.rows[user]
        return list(zip(self.problem.chosen_N[rows].tolist(), self.problem.rejected_N[rows].tolist()))

    def apart(self, user: int) -> Evidence:
        """Those of a user's comparisons that are `apart`."""
        return self.of(user).of(torch.tensor(apart(self.pairs(user))))


def judgements(loaded: Loaded, comparisons: Sequence[EncodedComparison]) -> Judgements:
    """The comparisons of each user; those of user 0 tell of nobody.

    TrainingError for a hidden state that is not finite. UserError for a model whose rewards are not linear in users' coordinates.
    """
    model, users = loaded.model, loaded.config.user_model
    if not has_linear_coordinates(loaded.config):
        other = f"method={loaded.config.method}, user_model.aggregator={users.aggregator}, softmax={users.softmax}"
        raise UserError(f"{loaded.path}: found {other}; expected method=prm with aggregator=linear and softmax=False")
    assert isinstance(model, PersonalizedRewardModel)
    model.check_lengths(comparisons)
    readings, states_SW = response_states(
        model, comparisons, loaded.config.evaluate.batch_size, loaded.backbone_weights()
    )
    known = max((c.user for c in comparisons), default=0)
    problem = linear_problem(loaded.config.loss, model.user_model, comparisons, (readings, states_SW.cpu()), known)
    shared_UD, basis_KUD, *_ = model.user_model.parts(torch.zeros(1, dtype=torch.long, device=model.device))
    basis_KW = None if basis_KUD is None else basis_KUD.detach()[:, 0].cpu().double()
    rows: dict[int, list[int]] = {}
    for row, c in enumerate(comparisons):
        if c.user:
            rows.setdefault(c.user, []).append(row)
    return Judgements(problem, shared_UD.detach()[0].cpu().double(), basis_KW, rows)
