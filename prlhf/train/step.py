"""One update. Both branches, user and generic, compute every comparison in the same step:

    loss = 1/N sum_c [ alpha loss(h_c(u_t, u_p)) + (1 - alpha) loss(h_c(u_t, 0)) ],   N comparisons c

(paper, eq. 5). Reward models have r(y1) - r(y2) in place of h. The plan cuts an update into parts (micro-batches), and
each process computes some. Parts change memory and speed, never the update. A prior on the user model adds its penalty.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.batch.moves import moved
from prlhf.data.files import fingerprint_of
from prlhf.method.losses import ResponseLogProbs, preference_loss, reward_margin
from prlhf.parallel.ranks import rank, sum_rows
from prlhf.parallel.shard import sum_gradients_after_this
from prlhf.score.task import Task
from prlhf.train.log import Sums
from prlhf.train.optimizer import Optimizers, clip, learning_rate_factor
from prlhf.train.plan import Part, parts_of_this_process, plan_update


class PartLoss(NamedTuple):
    """A part's share of the update's mean loss, (), and the reward margin of each of its rows, (B,)."""

    loss: Tensor
    margins_B: Tensor


def part_loss(task: Task, part: Part, N: int) -> PartLoss:
    """The forward pass of a part. N: comparisons in the update. loss = sum over the part's rows of weight * loss / N."""
    config, reference = task.config.loss, task.reference_of(part.indices)
    # Before the forward pass, so that a GPU has them when it has done that.
    weights_B, *rows = moved([part.weights_B, *(reference or ())], task.model.device)
    reference = ResponseLogProbs(*rows) if rows else None
    outputs = task.outputs(part.indices, part.users)
    losses_B = preference_loss(config, outputs, reference)
    loss = (weights_B.to(losses_B) * losses_B).sum() / N
    return PartLoss(loss, reward_margin(config, outputs, reference).detach())


def accumulate_gradients(task: Task, update: Sequence[int]) -> Sums:
    """Add the gradient of the mean loss over `update` (indices of comparisons) to the weights'. Returns log sums."""
    model, N = task.model, len(update)
    comparisons = [task.comparisons[i] for i in update]
    done: list[tuple[Part, PartLoss]] = []
    parts = parts_of_this_process(plan_update(task, update))
    for n, part in enumerate(parts, start=1):
        sum_gradients_after_this(model, task.config.fsdp.sync == "every" or n == len(parts))
        loss, margins_B = part_loss(task, part, N)
        loss.backward()
        loss = loss.detach()  # frees the graph before the next one is made
        if part.weights_B.any():
            done.append((part, PartLoss(loss, margins_B)))
    if model.prior is not None:
        users_B = torch.tensor([c.user for c in comparisons], device=model.device)
        counted = 1 / N if rank() == 0 else 0.0  # all processes compute the same penalty
        (counted * model.prior.penalty(model.user_model, users_B)).backward()
    for table in model.user_model.tables:
        sum_rows(table)

    sums = Sums(updates=1, comparisons=N, tokens=sum(c.length for c in comparisons))
    for part, (loss, margins_B) in done:  # read only now, so that a GPU does not wait between parts
        sums.loss += loss.item()
        sums.add_margins(part.branches, margins_B)
    sums.over_ranks()
    return sums


class Step(NamedTuple):
    """The result of an update: its sums, the gradient's norm before clipping, and whether it was applied."""

    sums: Sums
    norm: float
    applied: bool


def take_step(task: Task, optimizer: Optimizers, update: Sequence[int], number: int, total: int) -> Step:
    """Update `number` (from 0) of `total`. If the loss or the gradient is not finite, the weights stay as they are."""
    config, model = task.config, task.model
    started = time.perf_counter()
    optimizer.scale_learning_rates(learning_rate_factor(number, total, config.optim))
    optimizer.catch_up(model.user_model.rows_of([0, *(task.comparisons[i].user for i in update)]))
    torch.manual_seed(seed_of(config.seed, number))  # dropout depends on the update alone: resuming is exact
    sums = accumulate_gradients(task, update)
    norm = clip(optimizer.parameters, config.optim.max_grad_norm or math.inf)
    applied = math.isfinite(sums.loss) and math.isfinite(norm)
    if applied:
        optimizer.step()
    optimizer.zero_grad()
    sums.seconds = time.perf_counter() - started
    return Step(sums, norm, applied)


def seed_of(seed: int, number: int) -> int:
    """The seed of an update's dropout on this process."""
    return int(fingerprint_of(seed, number, rank())[:15], 16)
