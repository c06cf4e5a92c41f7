"""In context: the frozen model reads what a new user preferred as text, and nothing is learnt.

    x y1          a comparison that the user made: the prompt and the chosen response
    Not: y2

    x y           the response that is scored, behind all of these

It is scored in two ways: e_0 . h(y), the checkpoint's generic head on hidden states that have seen the context; and
log p(y | context, x), the language model's own. A context that is longer than the model reads loses its oldest part.

Shape suffixes: N response tokens or comparisons, M readings, D width, W pooled width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from examples.new_users.setting import Row, Setting, Turn
from prlhf.batch.tokens import EncodedComparison, Encoder, EncodingReport
from prlhf.batch.trees import Reading, lay_out
from prlhf.data.comparisons import Comparison
from prlhf.data.files import fingerprint_of
from prlhf.data.sources import cache_dir
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedRewardModel
from prlhf.score.cache import from_cache


def with_context(told: Sequence[Comparison], comparison: Comparison) -> Comparison:
    """The comparison with these before its prompt. UserError for a prompt of messages."""
    if not isinstance(comparison.prompt, str) or not all(isinstance(c.prompt, str) for c in told):
        raise UserError(f"{comparison.where}, prompt: found messages, expected text, which a context can stand before")
    shown = "".join(f"{c.prompt} {c.chosen.strip()}\nNot: {c.rejected.strip()}\n\n" for c in told)
    return replace(comparison, prompt=shown + comparison.prompt)


class Read(NamedTuple):
    """What the model makes of M responses: pooled hidden states, and log p of each."""

    states_MW: Tensor
    log_p_M: Tensor


@torch.no_grad()
def read(model: PersonalizedRewardModel, readings: Sequence[Reading]) -> Read:
    """All of these responses in one pass, as one tree for each prefix: the prefix is read once."""
    most = max(len(r.prefix) for r in readings) + sum(len(r.response) for r in readings)
    batch = lay_out(readings, model.layout, tree_tokens=most).to(model.device)
    hidden_ND = model.states_at(batch, torch.cat([batch.predicted_at_N, batch.response_at_N]))
    before_ND, states_ND = hidden_ND.tensor_split(2)
    tokens_N = model.token_log_probs(before_ND, batch.targets_N)
    M = len(readings)
    log_p_M = tokens_N.new_zeros(M).index_add(0, batch.reading_N, tokens_N)
    last_MD = states_ND[batch.lengths_M.cumsum(0) - 1]
    mean_MD = states_ND.new_zeros(M, states_ND.shape[1]).index_add(0, batch.reading_N, states_ND)
    mean_MD = mean_MD / batch.lengths_M[:, None]
    states_MW = {"last": last_MD, "mean": mean_MD, "both": torch.cat([last_MD, mean_MD], dim=1)}[model.config.pooling]
    return Read(states_MW.cpu(), log_p_M.cpu())


class InContext:
    """Margins in context, by the generic head and by the language model."""

    def __init__(self, setting: Setting):
        loaded = setting.loaded
        assert isinstance(loaded.model, PersonalizedRewardModel)
        self.setting, self.model, self.weights = setting, loaded.model, loaded.backbone_weights()
        most = getattr(loaded.model.backbone.config, "max_position_embeddings", 4096)
        data = replace(loaded.config.data, max_tokens=most, max_prompt_tokens=most)
        self.encoder = Encoder(loaded.tokenizer, data, loaded.config.method, loaded.config.user_model.place)

    def encoded(self, turn: Turn) -> list[EncodedComparison]:
        """What is predicted, behind what is learnt from."""
        raw, report, nobody = self.setting.raw[turn.user], EncodingReport(), UserIndex([])
        told = [raw[row] for row in turn.learn]
        found = [self.encoder.encode(with_context(told, raw[row]), nobody, report) for row in turn.predict]
        if None in found:
            raise UserError(f"{raw[0].where}: a response is longer than the model reads; expected shorter ones")
        return [c for c in found if c is not None]

    def read(self, readings: Sequence[Reading]) -> Read:
        """As `read`, from the cache where it has them."""
        seen = [(r.prefix, r.response) for r in readings]
        name = fingerprint_of(self.weights, self.model.device.type, self.model.config.pooling, seen)
        path = cache_dir() / "in_context" / f"{name}.safetensors"

        def both() -> Tensor:
            states_MW, log_p_M = read(self.model, readings)
            return torch.cat([states_MW.float(), log_p_M.float()[:, None]], dim=1)

        both_MW = from_cache(path, self.model.state_width + 1, both)
        return Read(both_MW[:, :-1], both_MW[:, -1])

    def margins(self, turns: Sequence[Turn], by_head: bool) -> list[Tensor]:
        """Of what is predicted of each user."""
        found = []
        for turn in tqdm(turns, desc="in context", leave=False, disable=None):
            pairs = self.encoded(turn)
            sides = [[Reading(0, tuple(c.prefix), tuple(y)) for c in pairs for y in (c.chosen, c.rejected)]]
            readings = list(dict.fromkeys(sides[0]))
            states_MW, log_p_M = self.read(readings)
            score_M = states_MW.double() @ self.setting.new.shared_W if by_head else log_p_M.double()
            row = {reading: m for m, reading in enumerate(readings)}
            y1_N, y2_N = torch.tensor([row[reading] for reading in sides[0]]).view(-1, 2).T
            found.append(score_M[y1_N] - score_M[y2_N])
        return found

    def by_head(self) -> Row:
        """e_0 . h(y) in context."""
        return lambda turns: self.margins(turns, by_head=True)

    def by_likelihood(self) -> Row:
        """log p(y | context, x)."""
        return lambda turns: self.margins(turns, by_head=False)
