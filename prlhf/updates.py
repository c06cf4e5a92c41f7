"""One update: every comparison is seen by the user branch and the generic branch, in the same step.

    gradient = d/dtheta  1/|update| ( sum_c [ alpha loss(h_c(u_t, u_p)) + (1 - alpha) loss(h_c(u_t, 0)) ]  +  prior of c's user )

accumulated over micro-batches, which therefore change memory and speed but never the update; clipped; and AdamW. The prior on
the user model, if there is one, is charged by the comparison (`prior.Prior.penalty`).
"""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prlhf.batching import micro_batches, updates_of_epoch
from prlhf.config import Config, OptimConfig, UserModelConfig
from prlhf.data.files import fingerprint_of
from prlhf.distributed import named_parameters, rank, share, sum_rows, world_size
from prlhf.encoding import Dataset, EncodedComparison
from prlhf.losses import ResponseLogProbs, branch_weights, preference_loss, reward_margin
from prlhf.optim import Optimizers, RowAdamW, clip
from prlhf.personalized import PersonalizedModel
from prlhf.scoring import select, tree_keys
from prlhf.training_log import Sums
from prlhf.user_models import is_personal


class Split(NamedTuple):
    """A data set and its comparisons' reference log-probs (None for the reference-free losses)."""

    data: Dataset
    reference: ResponseLogProbs | None


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


def learning_rate_factor(step: int, total: int, config: OptimConfig) -> float:
    """What both learning rates are multiplied by at update `step` (from 0): linear warm-up, then linear or cosine
    decay to 0 at `total`, or constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def seed_of(seed: int, step: int) -> int:
    """A seed for an update's dropout on this rank."""
    return int(fingerprint_of(seed, step, rank())[:15], 16)


def make_optimizer(config: Config, model: PersonalizedModel, total_steps: int) -> Optimizers:
    """AdamW in up to three groups: the backbone or its LoRA at optim.lr; at user_model.lr what users share, and the
    user model's tables, by rows. No more than total_steps steps can be taken."""
    parameters = named_parameters(model).values()
    user_ids = {id(p) for p in model.user_parameters()}
    tables = [table for table in model.user_model.tables if table.numel()]
    table_ids = {id(p) for p in model.user_model.tables}
    rest = [p for p in parameters if p.requires_grad and id(p) not in user_ids]
    shared = [p for p in model.user_parameters() if p.numel() and id(p) not in table_ids]

    def group(parameters: list[nn.Parameter], keys: OptimConfig | UserModelConfig) -> dict[str, Any]:
        return {"params": parameters, "lr": keys.lr, "base_lr": keys.lr, "weight_decay": keys.weight_decay}

    betas = (config.optim.beta1, config.optim.beta2)
    groups = [g for g in (group(rest, config.optim), group(shared, config.user_model)) if g["params"]]
    dense = torch.optim.AdamW(groups, betas=betas, fused=True)
    for p in (p for group in dense.param_groups for p in group["params"]):  # at once: checkpoints are read into it
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        dense.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    by_rows = RowAdamW([group(tables, config.user_model)], total_steps, betas=betas) if tables else None
    return Optimizers(dense, by_rows)


class Step(NamedTuple):
    """What is known of an update: its sums, the gradient's norm before clipping, and whether the weights were changed."""

    sums: Sums
    norm: float
    applied: bool


def take_step(
    config: Config,
    model: PersonalizedModel,
    optimizer: Optimizers,
    training: Split,
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
