"""One update: every comparison is seen by the user branch and the generic branch, in the same step.

    gradient = d/dtheta  1/|update| ( sum_c [ alpha loss(h_c(u_t, u_p)) + (1 - alpha) loss(h_c(u_t, 0)) ]  +  prior of c's user )

accumulated over micro-batches, which therefore change memory and speed but never the update; clipped; and AdamW. The prior on
the user model, if there is one, is charged by the comparison (`prior.Prior.penalty`).
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.batch.datasets import Dataset
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config
from prlhf.data.files import fingerprint_of
from prlhf.method.losses import ResponseLogProbs, preference_loss, reward_margin
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import rank, share, sum_rows
from prlhf.score.score import select
from prlhf.train.log import Sums
from prlhf.train.optimizer import Optimizers, clip, learning_rate_factor
from prlhf.train.plan import Item, update_parts


class Referenced(NamedTuple):
    """A data set and its comparisons' reference log-probs (None for the reference-free losses)."""

    data: Dataset
    reference: ResponseLogProbs | None


def part_loss(
    config: Config,
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    reference: ResponseLogProbs | None,
    items: Sequence[Item],
    of_update: int,
) -> tuple[Tensor, Tensor]:
    """What some items of an update of `of_update` comparisons add to its mean loss, (), and their reward margins (B,)."""
    indices, _, users, weights = zip(*items)
    outputs = model(model.collate([comparisons[i] for i in indices], users))
    part_reference = select(reference, indices, model.device)
    losses_B = preference_loss(config.loss, outputs, part_reference)
    loss = (torch.tensor(weights, dtype=torch.float64).to(losses_B) * losses_B).sum() / of_update
    return loss, reward_margin(config.loss, outputs, part_reference).detach()


def accumulate_gradients(
    config: Config,
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    reference: ResponseLogProbs | None,
    update: Sequence[int],
) -> Sums:
    """Add the gradient of the mean loss over `update` (indices of comparisons) to the weights' gradients.

    reference: of all comparisons. Returns that loss and what else the log wants to know.
    """
    sums = Sums(updates=1, comparisons=len(update), tokens=sum(comparisons[i].length for i in update))
    losses: list[Tensor] = []
    margins: list[tuple[Sequence[str], Tensor]] = []
    for items, counts in share(update_parts(config, model, comparisons, update)):
        loss, margins_B = part_loss(config, model, comparisons, reference, items, len(update))
        (loss * counts).backward()
        loss = loss.detach()  # the graph goes now, not when the next one is there
        if counts:
            losses.append(loss)
            margins.append(([item.branch for item in items], margins_B))
    if model.prior is not None:
        users = torch.tensor([comparisons[i].user for i in update], device=model.device)
        for _, counts in share([users]):  # ranks compute it alike, one of them counts
            (model.prior.penalty(model.user_model, users) * (counts / len(update))).backward()
    for table in model.user_model.tables:
        sum_rows(table)
    sums.loss = sum(loss.item() for loss in losses)  # read here: a GPU need not wait for it in between
    for names, margins_B in margins:
        sums.add_margins(names, margins_B)
    sums.over_ranks()
    return sums


def seed_of(seed: int, step: int) -> int:
    """A seed for an update's dropout on this rank."""
    return int(fingerprint_of(seed, step, rank())[:15], 16)


class Step(NamedTuple):
    """What is known of an update: its sums, the gradient's norm before clipping, and whether the weights were changed."""

    sums: Sums
    norm: float
    applied: bool


def take_step(
    config: Config,
    model: PersonalizedModel,
    optimizer: Optimizers,
    training: Referenced,
    update: Sequence[int],
    number: int,
    total: int,
) -> Step:
    """Update `number` (from 0) of `total`: the gradient of the mean loss over `update` (indices of comparisons), clipped,
    and AdamW.

    A loss or gradient that is not finite leaves the weights as they are.
    """
    started = time.perf_counter()
    factor = learning_rate_factor(number, total, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    comparisons = training.data.comparisons
    optimizer.catch_up(model.user_model.rows_of([0, *(comparisons[i].user for i in update)]))
    torch.manual_seed(seed_of(config.seed, number))  # whatever was drawn before: resuming is exact
    sums = accumulate_gradients(config, model, comparisons, training.reference, update)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip(parameters, config.optim.max_grad_norm or math.inf)
    applied = math.isfinite(sums.loss) and math.isfinite(norm)
    if applied:
        optimizer.step()
    optimizer.zero_grad()
    sums.seconds = time.perf_counter() - started
    return Step(sums, norm, applied)
