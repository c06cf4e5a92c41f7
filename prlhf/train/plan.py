"""The plan of an update: which user reads each comparison, its weight in the loss, and its micro-batch.

The number of processes changes only the size of the micro-batches. Each process computes some of them.
"""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.batch.order import micro_batches, updates_of_epoch
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
    unknown user's has one row of weight 1, read by user 0. Rows of weight 0 are left out. Parts are small enough that
    each of `processes` (default: this run's) has some.
    """
    config, model, update = task.config, task.model, list(update)
    users, n = [task.comparisons[i].user for i in update], len(update)
    alpha = config.loss.alpha
    weights = branch_weights(torch.tensor(users), alpha, is_personal(model.user_model, alpha))
    both = Part(update * 2, ["user"] * n + ["generic"] * n, users + [0] * n, torch.cat(weights))
    rows = [[row for row in branch if both.weights_B[row]] for branch in (range(n), range(n, 2 * n))]
    if model.users_share:
        rows = [rows[0] + rows[1]]  # both branches of a comparison in one pass of the backbone
    parts = []
    for branch in (both.of(some) for some in rows if some):
        comparisons = [task.comparisons[i] for i in branch.indices]
        trees = tree_keys(model, comparisons, branch.users)
        size = min(config.optim.micro_batch_size, math.ceil(len(set(trees)) / (processes or world_size())))
        # With group_by=response neighbours share most, so they keep their order. Else similar lengths go together.
        lengths = [0 if config.optim.group_by == "response" else c.length for c in comparisons]
        parts += [branch.of(some) for some in micro_batches(trees, lengths, size)]
    return parts


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
