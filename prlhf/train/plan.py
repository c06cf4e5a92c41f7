"""The plan of an update: which user reads each comparison, its weight in the loss, and its micro-batch.

The number of processes changes only the size of the micro-batches. Each process computes some of them.
"""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.batch.order import even_micro_batches, micro_batches, updates_of_epoch
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config, OptimConfig
from prlhf.method.losses import branch_weights
from prlhf.method.users import is_personal
from prlhf.parallel.ranks import share, world_size
from prlhf.score.score import tree_keys
from prlhf.score.task import Task


class Part(NamedTuple):
    """A micro-batch. Each row is a comparison in one branch of the loss: read by its user, or by the generic user."""

    indices: list[int]  # which comparison
    branches: list[str]  # "user" or "generic"
    users: list[int]  # which user reads it, 0 the generic one
    weights_B: Tensor  # its loss weight, float64; all 0 in a part that only keeps a process in step with the others

    def of(self, rows: Sequence[int]) -> "Part":
        """The part of these rows alone."""
        return Part(
            indices=[self.indices[row] for row in rows],
            branches=[self.branches[row] for row in rows],
            users=[self.users[row] for row in rows],
            weights_B=self.weights_B[list(rows)],
        )


def plan_update(task: Task, update: Sequence[int], processes: int | None = None) -> list[Part]:
    """Cut an update (indices of comparisons) into parts, in the order in which they are computed.

    A known user's comparison has a row of weight alpha, read by that user, and one of weight 1 - alpha, read by user 0. An
    unknown user's has one row of weight 1, read by user 0. Rows of weight 0 are left out. A part may have rows of both
    branches. The parts are a multiple of `processes` (default: this run's) and alike in size, so that none waits long.
    """
    config, model, update = task.config, task.model, list(update)
    users, n = [task.comparisons[i].user for i in update], len(update)
    alpha = config.loss.alpha
    weights = branch_weights(torch.tensor(users), alpha, is_personal(model.user_model, alpha))
    both = Part(update * 2, ["user"] * n + ["generic"] * n, users + [0] * n, torch.cat(weights))
    rows = both.of([row for row in range(2 * n) if both.weights_B[row]])
    comparisons = [task.comparisons[i] for i in rows.indices]
    trees = tree_keys(model, comparisons, rows.users)
    size, W = config.optim.micro_batch_size, processes or world_size()
    if config.optim.group_by == "response":  # neighbours share most, so they keep their order
        groups = micro_batches(trees, [0] * len(trees), min(size, math.ceil(len(set(trees)) / W)))
    else:
        lengths = [model.vectors + c.length for c in comparisons]
        groups = even_micro_batches(trees, lengths, size, W, model.layout.kind == "packed")
    return [rows.of(some) for some in groups]


def parts_of_this_process(parts: Sequence[Part]) -> list[Part]:
    """This process's parts. All processes have equally many: where one lacks a part, it gets one of weight 0."""
    mine = share(parts)
    return [part if real else part._replace(weights_B=torch.zeros_like(part.weights_B)) for part, real in mine]


class Schedule(NamedTuple):
    """The number of updates in an epoch and in the whole training."""

    per_epoch: int
    total: int


def schedule(config: OptimConfig, comparisons: int) -> Schedule:
    """The number of updates for a training set of this many comparisons."""
    per_epoch = math.ceil(comparisons / config.batch_size)
    return Schedule(per_epoch, min(per_epoch * config.epochs, config.max_steps or sys.maxsize))


def epoch_updates(config: Config, comparisons: Sequence[EncodedComparison], epoch: int) -> list[list[int]]:
    """The updates of an epoch, as indices of comparisons."""
    return updates_of_epoch(comparisons, config.optim.batch_size, config.seed, epoch, config.optim.group_by)
