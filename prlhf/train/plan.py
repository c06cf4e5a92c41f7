"""The plan of an update: which user reads each comparison, its weight in the loss, and its micro-batch.

The plan is the same for any number of processes, but for the size of the micro-batches; each computes some of its parts.
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
    """A micro-batch: comparisons, each in one of the two branches of the loss."""

    indices: list[int]  # of comparisons
    branches: list[str]  # "user" or "generic"
    users: list[int]  # which user reads each
    weights_B: Tensor  # of its loss, float64; all 0 in a part that only keeps a process busy

    def of(self, rows: Sequence[int]) -> "Part":
        """Some of its rows."""
        return Part(
            indices=[self.indices[row] for row in rows],
            branches=[self.branches[row] for row in rows],
            users=[self.users[row] for row in rows],
            weights_B=self.weights_B[list(rows)],
        )


def plan_update(task: Task, update: Sequence[int], processes: int | None = None) -> list[Part]:
    """The parts of an update (indices of comparisons), in the order in which they are computed.

    The user branch reads each known user's comparisons with weight alpha, the generic branch all with the rest; a row of
    weight 0 is left out. Parts are small enough that each of `processes` (by default as many as there are) has some.
    """
    config, model, update = task.config, task.model, list(update)
    users, n = [task.comparisons[i].user for i in update], len(update)
    alpha = config.loss.alpha
    weights = branch_weights(torch.tensor(users), alpha, is_personal(model.user_model, alpha))
    both = Part(update * 2, ["user"] * n + ["generic"] * n, users + [0] * n, torch.cat(weights))
    rows = [[row for row in branch if both.weights_B[row]] for branch in (range(n), range(n, 2 * n))]
    if not model.backbone_reads_users:
        rows = [rows[0] + rows[1]]  # one pass of the backbone serves both branches and all users
    parts = []
    for branch in (both.of(some) for some in rows if some):
        comparisons = [task.comparisons[i] for i in branch.indices]
        trees = tree_keys(model, comparisons, branch.users)
        size = min(config.optim.micro_batch_size, math.ceil(len(set(trees)) / (processes or world_size())))
        # Grouped by response, neighbours share most, and keep their order. Else comparisons of one length go together.
        lengths = [0 if config.optim.group_by == "response" else c.length for c in comparisons]
        parts += [branch.of(some) for some in micro_batches(trees, lengths, size)]
    return parts


def parts_of_this_process(parts: Sequence[Part]) -> list[Part]:
    """This process's parts, as many as any other's has; one that fills up has weight 0."""
    mine = share(parts)
    return [part if real else part._replace(weights_B=torch.zeros_like(part.weights_B)) for part, real in mine]


class Schedule(NamedTuple):
    """How many updates an epoch has, and how many the training."""

    per_epoch: int
    total: int


def schedule(config: OptimConfig, comparisons: int) -> Schedule:
    """The number of updates that so many comparisons make."""
    per_epoch = math.ceil(comparisons / config.batch_size)
    return Schedule(per_epoch, min(per_epoch * config.epochs, config.max_steps or sys.maxsize))


def epoch_updates(config: Config, comparisons: Sequence[EncodedComparison], epoch: int) -> list[list[int]]:
    """The updates of an epoch, as indices of comparisons."""
    return updates_of_epoch(comparisons, config.optim.batch_size, config.seed, epoch, config.optim.group_by)
