"""The plan of an update: which comparison is read by whom, with which weight, in which micro-batch."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from prlhf.batch.order import micro_batches, updates_of_epoch
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config, OptimConfig
from prlhf.method.losses import branch_weights
from prlhf.method.models import PersonalizedModel
from prlhf.method.users import is_personal
from prlhf.parallel.ranks import world_size
from prlhf.score.score import tree_keys


class Item(NamedTuple):
    """One comparison in one branch: as whom it is read, and what its loss counts."""

    index: int
    branch: str
    user: int
    weight: float


def branches(indices: Sequence[int], users: Sequence[int], alpha: float, personal: bool) -> list[list[Item]]:
    """The user branch and the generic branch of some comparisons, each without those that count nothing in it.

    users: the user number of each of `indices`; personal=False: the user model is uniform, one branch serves all.
    """
    weights = branch_weights(torch.tensor(users), alpha, personal)
    user = [Item(i, "user", u, w) for i, u, w in zip(indices, users, weights.user.tolist()) if w]
    generic = [Item(i, "generic", 0, w) for i, w in zip(indices, weights.generic.tolist()) if w]
    return [branch for branch in (user, generic) if branch]


def update_parts(
    config: Config,
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    update: Sequence[int],
    processes: int | None = None,
) -> list[list[Item]]:
    """The micro-batches of an update (indices of comparisons), in the order in which they are computed; small enough to
    give each of `processes` (those there are) some."""
    personal = is_personal(model.user_model, config.loss.alpha)
    plan = branches(update, [comparisons[i].user for i in update], config.loss.alpha, personal)
    if not model.backbone_reads_users:
        plan = [[item for branch in plan for item in branch]]  # one backbone pass serves both branches and all users
    parts = []
    for items in plan:
        of_items = [comparisons[item.index] for item in items]
        trees = tree_keys(model, of_items, [item.user for item in items])
        size = min(config.optim.micro_batch_size, math.ceil(len(set(trees)) / (processes or world_size())))
        # Grouped by response, neighbours in the update share most: its order stays. Else those of one length go together.
        lengths = [0 if config.optim.group_by == "response" else c.length for c in of_items]
        groups = micro_batches(trees, lengths, size)
        parts += [[items[i] for i in group] for group in groups]
    return parts


class Schedule(NamedTuple):
    """How many updates an epoch has, and the training altogether."""

    per_epoch: int
    total: int


def schedule(config: OptimConfig, comparisons: int) -> Schedule:
    """The updates that so many comparisons make."""
    per_epoch = math.ceil(comparisons / config.batch_size)
    return Schedule(per_epoch, min(per_epoch * config.epochs, config.max_steps or sys.maxsize))


def epoch_updates(config: Config, comparisons: Sequence[EncodedComparison], epoch: int) -> list[list[int]]:
    """The updates of an epoch, as indices of comparisons."""
    return updates_of_epoch(comparisons, config.optim.batch_size, config.seed, epoch, config.optim.group_by)
