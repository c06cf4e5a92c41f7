"""Hidden states of a backbone that does not change, computed once for all responses."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import Reading
from prlhf.data.files import fingerprint_of
from prlhf.data.sources import cache_dir
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.parallel.ranks import gathered_rows, rank, share, world_size
from prlhf.score.cache import from_cache


def response_states(
    model: PersonalizedRewardModel, comparisons: Sequence[EncodedComparison], batch_size: int, weights: str
) -> tuple[list[Reading], Tensor]:
    """All responses, each once, and their pooled hidden states (M, W) on the CPU, from the cache where it holds exactly these.

    Of a backbone that does not read the user, as it is now. Arguments as of `reference_log_probs`.
    """
    readings = readings_of(comparisons)
    pooling = model.config.pooling
    parts = (weights, model.device.type, readings, *([] if pooling == "last" else [pooling]))
    path = cache_dir() / "states" / f"{fingerprint_of(*parts)}.safetensors"
    states = from_cache(path, len(readings), lambda: _states(model, readings, batch_size).T)
    return readings, states.T.contiguous()


def remember_states(
    model: PersonalizedModel, comparisons: Sequence[EncodedComparison], batch_size: int, weights: str
) -> None:
    """Give a reward model with a frozen backbone and a linear head the hidden states of all responses; others need none."""
    if remembers_states(model):
        readings, states = response_states(model, comparisons, batch_size, weights)
        model.known_states.update(zip(readings, states.to(model.device).unbind()))


def remembers_states(model: PersonalizedModel) -> TypeGuard[PersonalizedRewardModel]:
    """Whether the hidden states of all responses are computed before the training, and kept."""
    return isinstance(model, PersonalizedRewardModel) and model.keeps_states


def readings_of(comparisons: Sequence[EncodedComparison]) -> list[Reading]:
    """All responses, each once, as nobody in particular reads them."""
    prefixes = (tuple(c.prefix) for c in comparisons)
    both = ((prefix, response) for prefix, c in zip(prefixes, comparisons) for response in (c.chosen, c.rejected))
    return list(dict.fromkeys(Reading(0, prefix, tuple(response)) for prefix, response in both))


def _states(model: PersonalizedRewardModel, readings: Sequence[Reading], batch_size: int) -> Tensor:
    """Last hidden states (M, D), of which each rank computes some."""
    rows: list[int] = []
    parts: list[Tensor] = []
    bar = tqdm(total=len(readings), desc="hidden states", leave=False, disable=None if rank() == 0 else True)
    for start, counts in share(range(0, len(readings), batch_size)):
        some = readings[start : start + batch_size]
        states = model.states_of(some)
        parts.append(states[: len(some) * counts])
        rows += range(start, start + len(some) * counts)
        bar.update(len(some) * world_size())
    bar.close()
    return gathered_rows(rows, torch.cat(parts), len(readings))
