"""Comparisons as evidence on users' coordinates: hidden states once for all responses, projected on what users differ in.

Shape suffixes: S responses, N comparisons of a user, K coordinates, W pooled width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.adapt.newton import Evidence
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import has_linear_coordinates
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedRewardModel
from prlhf.score.states import response_states
from prlhf.store.final import Loaded


class Judgements(NamedTuple):
    """What users said of S responses, whose rewards are e_0 . h + c . B h."""

    states_SW: Tensor  # h
    shared_W: Tensor  # e_0; float64, as the basis
    basis_KW: Tensor | None  # B; None: coordinates are whole vectors
    pairs: dict[int, list[tuple[int, int]]]  # by user number: the responses chosen and rejected
    required: dict[int, list[float]]  # by how much, in units of loss.margin

    def of(self, user: int) -> Evidence:
        """A user's comparisons."""
        states = [self.states_SW[y_N].double() for y_N in torch.tensor(self.pairs[user]).T]
        chosen_NK, rejected_NK = states if self.basis_KW is None else [h_NW @ self.basis_KW.T for h_NW in states]
        required_N = torch.tensor(self.required[user], dtype=torch.float64)
        return Evidence(states[0] @ self.shared_W, states[1] @ self.shared_W, chosen_NK, rejected_NK, required_N)


def judgements(loaded: Loaded, comparisons: Sequence[EncodedComparison]) -> Judgements:
    """The comparisons of each user; those of user 0 tell of nobody.

    UserError for a hidden state that is not finite, and for a model whose rewards are not linear in users' coordinates.
    """
    model, users = loaded.model, loaded.config.user_model
    if not has_linear_coordinates(loaded.config):
        other = f"method={loaded.config.method}, user_model.aggregator={users.aggregator}, softmax={users.softmax}"
        raise UserError(f"{loaded.path}: found {other}; expected method=prm with aggregator=linear and softmax=False")
    assert isinstance(model, PersonalizedRewardModel)
    comparisons = [c for c in comparisons if c.user]
    model.check_lengths(comparisons)
    size = loaded.config.evaluate.batch_size
    readings, states_SW = response_states(model, comparisons, size, loaded.backbone_weights())
    if not states_SW.isfinite().all():
        raise UserError(f"{loaded.path}: a response's hidden state is not finite, expected finite (model.dtype)")
    number_of = {(reading.prefix, reading.response): s for s, reading in enumerate(readings)}
    shared_UD, basis_KUD, *_ = model.user_model.parts(torch.zeros(1, dtype=torch.long, device=model.device))
    basis_KW = None if basis_KUD is None else basis_KUD.detach()[:, 0].cpu().double()
    found = Judgements(states_SW, shared_UD.detach()[0].cpu().double(), basis_KW, {}, {})
    for c in comparisons:
        y1, y2 = (number_of[tuple(c.prefix), tuple(response)] for response in (c.chosen, c.rejected))
        found.pairs.setdefault(c.user, []).append((y1, y2))
        found.required.setdefault(c.user, []).append(c.margin)
    return found
