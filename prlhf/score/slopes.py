"""How outputs change with the row of the user who reads: for the search for new users' rows, and for how sure it is of them.

Each comparison, or response, is read by a row of its own: the table of users is replaced by rows 1, 2, ... of those who read, and
one backward pass gives the derivatives of all.

Shape suffixes: N comparisons or responses, V numbers in a row of the table.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prlhf.batch.order import micro_batches
from prlhf.batch.trees import PreferenceBatch, Reading
from prlhf.method.losses import Outputs, reward_margin
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.method.users import UserModel
from prlhf.score.score import tree_keys
from prlhf.score.task import Task


class SlopePart(NamedTuple):
    """The comparisons of one forward pass, by their place in a task: the n-th is read by user n + 1."""

    indices: list[int]
    batch: PreferenceBatch
    states: tuple[Tensor, ...]  # what the backbone computes of them, where it reads no user


class Slopes(NamedTuple):
    """Numbers of some comparisons, and their derivatives by the row of the user who reads: float64, on the CPU."""

    indices: list[int]
    values_N: Tensor
    slopes_NV: Tensor


def user_rows(user_model: UserModel, users_N: Sequence[int]) -> Tensor:
    """These users' rows of the table, (N, V), in float64 on the CPU."""
    table = user_model.get_parameter(user_model.table).detach()
    rows_N = torch.tensor(users_N, device=table.device) - user_model.first_user
    return table[rows_N].flatten(1).cpu().double()


@contextmanager
def read_by(user_model: UserModel, rows_NV: Tensor) -> Iterator[nn.Parameter]:
    """Within it user n + 1 has row n of these. Gives the table that holds them."""
    table = user_model.get_parameter(user_model.table)
    others = table[: 1 - user_model.first_user].detach()
    rows = nn.Parameter(torch.cat([others, rows_NV.to(table).view(-1, *table.shape[1:])]))
    setattr(user_model, user_model.table, rows)
    try:
        yield rows
    finally:
        setattr(user_model, user_model.table, table)


def slopes(values_N: Tensor, rows: Tensor, user_model: UserModel) -> Tensor:
    """d value_n / d row_n (N, V), of values that depend on a row each, in float64 on the CPU. The graph stays."""
    (gradient,) = torch.autograd.grad(values_N.sum(), rows, retain_graph=True)
    return gradient.to_dense()[1 - user_model.first_user :].flatten(1).cpu().double()


def parts_of(task: Task, indices: Sequence[int]) -> list[SlopePart]:
    """Comparisons in batches of optim.micro_batch_size trees, which share what different users share."""
    return [part_of(task, some) for some in grouped(task, indices)]


def grouped(task: Task, indices: Sequence[int]) -> list[list[int]]:
    """Which comparisons go into one forward pass, each read by a user of its own."""
    comparisons = [task.comparisons[i] for i in indices]
    trees = tree_keys(task.model, comparisons, range(1, len(comparisons) + 1))
    batches = micro_batches(trees, [c.length for c in comparisons], task.config.optim.micro_batch_size)
    return [[indices[n] for n in some] for some in batches]


def part_of(task: Task, indices: list[int]) -> SlopePart:
    """These comparisons as one."""
    batch = task.model.collate([task.comparisons[i] for i in indices], range(1, len(indices) + 1))
    return SlopePart(indices, batch, user_free_states(task.model, batch))


@torch.no_grad()
def user_free_states(model: PersonalizedModel, batch: PreferenceBatch) -> tuple[Tensor, ...]:
    """The hidden states that `forward` takes in place of computing them, where the backbone reads no user; else nothing."""
    if model.backbone_reads_users:
        return ()
    if isinstance(model, PersonalizedRewardModel):
        return (model.pooled_states(batch),)
    return (model.states_at(batch, batch.predicted_at_N),)


def margin_slopes(task: Task, indices: Sequence[int], rows_NV: Tensor) -> Iterator[Slopes]:
    """Reward margins of comparisons as users with these rows read them, one row a comparison, and their derivatives.

    A batch at a time, in any order; `indices` of the result count from 0 in the order given. The model's weights take no gradients.
    """
    row_of = dict(zip(indices, range(len(indices))))
    model = task.model.requires_grad_(False)
    for some in grouped(task, indices):
        part, places = part_of(task, some), [row_of[i] for i in some]
        with torch.enable_grad(), read_by(model.user_model, rows_NV[places]) as rows:
            outputs: Outputs = model(part.batch, *part.states)
            outputs = type(outputs)(*(output.cpu().double() for output in outputs))
            margins_N = reward_margin(task.config.loss, outputs, task.reference_of(some))
            yield Slopes(places, margins_N.detach(), slopes(margins_N, rows, model.user_model))


def reward_slopes(model: PersonalizedRewardModel, readings: Sequence[Reading]) -> Tensor:
    """d r(x, y, u) / d row of u (N, V), of single responses in one forward pass. The model's weights take no gradients."""
    model.requires_grad_(False)
    own_NV = user_rows(model.user_model, [reading.user for reading in readings])
    with torch.enable_grad(), read_by(model.user_model, own_NV) as rows:
        rewards_N = model.rewards([reading._replace(user=n) for n, reading in enumerate(readings, 1)])
        return slopes(rewards_N, rows, model.user_model)
