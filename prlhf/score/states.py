"""Hidden states of a frozen backbone, computed once for all responses and cached on disk.

With a linear reward head (r = e_u . h) no user changes the hidden state h; with a frozen backbone no training does.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf.batch.moves import moved
from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import Reading
from prlhf.data.files import fingerprint_of
from prlhf.data.sources import cache_dir
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.parallel.ranks import gathered_rows, rank, share, world_size
from prlhf.score.cache import from_cache


class States:
    """Pooled hidden states (M, W) of M responses, looked up by response."""

    def __init__(self, readings: Sequence[Reading], states_MW: Tensor):
        self.states_MW = states_MW
        self._row = {reading: m for m, reading in enumerate(readings)}

    def of(self, readings: Sequence[Reading]) -> Tensor:
        """The states (R, W) of R readings; their users do not matter. KeyError for a response that has no state here."""
        rows = [self._row[reading._replace(user=0)] for reading in readings]
        (rows_R,) = moved([torch.tensor(rows)], self.states_MW.device)
        return self.states_MW.index_select(0, rows_R)

    def of_pairs(self, comparisons: Sequence[EncodedComparison]) -> tuple[Tensor, Tensor]:
        """The states of each comparison's chosen and of its rejected response, both (N, W)."""
        prefixes = [tuple(c.prefix) for c in comparisons]
        chosen = [Reading(0, prefix, tuple(c.chosen)) for prefix, c in zip(prefixes, comparisons)]
        rejected = [Reading(0, prefix, tuple(c.rejected)) for prefix, c in zip(prefixes, comparisons)]
        return self.of(chosen), self.of(rejected)


def readings_of(comparisons: Sequence[EncodedComparison]) -> list[Reading]:
    """All responses, each once, read by user 0."""
    prefixes = (tuple(c.prefix) for c in comparisons)
    both = ((prefix, response) for prefix, c in zip(prefixes, comparisons) for response in (c.chosen, c.rejected))
    return list(dict.fromkeys(Reading(0, prefix, tuple(response)) for prefix, response in both))


def has_fixed_states(model: PersonalizedModel) -> TypeGuard[PersonalizedRewardModel]:
    """Whether hidden states depend on neither training nor user: a frozen backbone and a linear reward head."""
    return isinstance(model, PersonalizedRewardModel) and model.config.frozen and not model.backbone_reads_users


def fixed_states(
    model: PersonalizedModel, comparisons: Sequence[EncodedComparison], batch_size: int, weights: str
) -> States | None:
    """The states of all responses on the model's device; None where they are not fixed. Arguments: see `response_states`."""
    if not has_fixed_states(model):
        return None
    readings, states_MW = response_states(model, comparisons, batch_size, weights)
    return States(readings, states_MW.to(model.device))


def response_states(
    model: PersonalizedRewardModel, comparisons: Sequence[EncodedComparison], batch_size: int, weights: str
) -> tuple[list[Reading], Tensor]:
    """All M responses, each once, and their pooled hidden states (M, W) on the CPU. Taken from the cache where it has them.

    The backbone must not read the user. batch_size: responses per pass. weights: the backbone's `weights_fingerprint`.
    """
    readings = readings_of(comparisons)
    pooling = model.config.pooling
    seen = [(r.user, r.prefix, r.response) for r in readings]
    parts = (weights, model.device.type, seen, *([] if pooling == "last" else [pooling]))
    path = cache_dir() / "states" / f"{fingerprint_of(*parts)}.safetensors"
    states = from_cache(path, len(readings), lambda: _compute(model, readings, batch_size).T)
    return readings, states.T.contiguous()


def _compute(model: PersonalizedRewardModel, readings: Sequence[Reading], batch_size: int) -> Tensor:
    """Pooled hidden states (M, W). Ranks share the work, and all receive the result."""
    rows: list[int] = []
    parts: list[Tensor] = []
    bar = tqdm(total=len(readings), desc="hidden states", leave=False, disable=None if rank() == 0 else True)
    for start, is_mine in share(range(0, len(readings), batch_size)):
        some = readings[start : start + batch_size]
        count = len(some) if is_mine else 0
        parts.append(model.states_of(some)[:count])
        rows += range(start, start + count)
        bar.update(len(some) * world_size())
    bar.close()
    return gathered_rows(rows, torch.cat(parts), len(readings))
