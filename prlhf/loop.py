"""The training loop: every comparison is seen by the user branch and the generic branch in the same update.

    gradient = d/dtheta  1/|update| sum_c [ alpha loss(h_c(u_t, u_p)) + (1 - alpha) loss(h_c(u_t, 0)) ]

accumulated over micro-batches, which therefore change memory and speed but never the update.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prlhf import checkpoint
from prlhf.batching import micro_batches, updates_of_epoch
from prlhf.config import Config, OptimConfig, UserModelConfig
from prlhf.data import UserIndex
from prlhf.data.files import fingerprint_of
from prlhf.distributed import (
    named_parameters,
    on_any,
    on_main,
    rank,
    share,
    sum_rows,
    text_from_main,
    world_size,
)
from prlhf.encoding import Dataset, EncodedComparison
from prlhf.errors import Stopped, TrainingError, UserError
from prlhf.evaluation import mixed_loss, score_users, summarize
from prlhf.heap import keep_freed_memory
from prlhf.losses import ResponseLogProbs, branch_weights, needs_reference, preference_loss, reward_margin
from prlhf.optim import Optimizers, RowAdamW, clip
from prlhf.personalized import PersonalizedModel
from prlhf.reference import computes_on, reference_log_probs, remember_states
from prlhf.runs import Run, prune_checkpoints
from prlhf.scoring import select, tree_keys
from prlhf.training_log import Sums, TrainingLog
from prlhf.user_models import is_personal


class Split(NamedTuple):
    """A data set and its comparisons' reference log-probs (None for the reference-free losses)."""

    data: Dataset
    reference: ResponseLogProbs | None


def reproducible(config: Config, device: str) -> None:
    """Seed torch; on a GPU also choose deterministic kernels, so that a resumed run ends bit for bit alike."""
    torch.manual_seed(config.seed)
    if device == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def with_reference(config: Config, model: PersonalizedModel, data: Dataset, base: str) -> Split:
    """The data with its reference log-probs, which reward models and the reference-free losses do without."""
    batch_size = config.evaluate.batch_size
    remember_states(model, data.comparisons, batch_size, base)
    if not needs_reference(config):
        return Split(data, None)
    where = computes_on(config.model, model.device.type)
    return Split(data, reference_log_probs(lambda: model, data.comparisons, batch_size, base, where))


@contextlib.contextmanager
def out_of_memory_explained(config: Config) -> Iterator[None]:
    """Within the context a GPU that has no more memory ends with what to change (TrainingError)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"process {rank()} has no GPU memory left ({str(error).splitlines()[0]}). Lower optim.micro_batch_size (now "
            f"{config.optim.micro_batch_size}) or evaluate.batch_size (now {config.evaluate.batch_size}), set "
            "model.gradient_checkpointing=true, or use more GPUs (torchrun --nproc_per_node N); the same command with "
            "--dry-run says what each would hold. Checkpoints are good"
        ) from None


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
    for table in model.user_model.tables:
        sum_rows(table)
    sums.loss = sum(loss.item() for loss in losses)  # read here: a GPU need not wait for it in between
    for names, margins_B in margins:
        sums.add_margins(names, margins_B)
    sums.over_ranks()
    return sums


@contextlib.contextmanager
def termination_noted() -> Iterator[threading.Event]:
    """Within the context SIGTERM does not end the process, but sets the event."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


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


@dataclass
class Progress:
    """Where training is: what a checkpoint's state.json holds."""

    started_from: str  # fingerprint of base weights, users and training data
    step: int = 0
    skipped: int = 0  # updates refused in a row
    best: dict[str, float] | None = None  # step and loss
    sums: Sums = field(default_factory=Sums)  # since the last record of metrics.jsonl


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


def train(
    config: Config,
    run: Run,
    model: PersonalizedModel,
    users: UserIndex,
    base: str,
    training: Split,
    valid: Split | None,
) -> None:
    """Train `model` in place, from the newest checkpoint of the run or from the start, to the weights for final/.

    base: the fingerprint of the weights that training starts from. TrainingError after config.optim.max_skipped_steps
    updates in a row whose loss or gradient is not finite; such an update never reaches the weights.
    """
    comparisons = training.data.comparisons
    per_epoch, total = schedule(config.optim, len(comparisons))
    optimizer = make_optimizer(config, model, total)
    progress = resume(run, model, optimizer, fingerprint_of(base, users.names, comparisons))
    log = TrainingLog(config, run, progress.step, total)
    if model.device.type == "cpu":
        keep_freed_memory()
        optimizer.keep_gradients()
    model.train()
    with termination_noted() as told_to_stop:
        while progress.step < total:
            epoch, first = divmod(progress.step, per_epoch)
            for update in epoch_updates(config, comparisons, epoch)[first : first + total - progress.step]:
                sums, norm, applied = take_step(config, model, optimizer, training, update, progress.step, total)
                progress.step += 1
                log.bar.update()
                if applied:
                    progress.skipped = 0
                    progress.sums.add(sums)
                else:
                    refuse(config, run, log, progress, sums.loss, norm)
                if progress.step % config.train.log_every == 0 or progress.step == total:
                    lr, user_lr = optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]
                    where = {"step": progress.step, "epoch": epoch, "lr": lr, "user_lr": user_lr, "grad_norm": norm}
                    log.write({**where, **progress.sums.record()})
                    progress.sums = Sums()
                saved = evaluate_and_save(
                    config, run, log, model, users, optimizer, progress, valid, last=progress.step == total
                )
                if on_any(told_to_stop.is_set()) and progress.step < total:
                    if not saved:
                        save(config, run, model, users, optimizer, progress)
                    log.close()
                    raise Stopped(
                        f"told to (SIGTERM), after update {progress.step}; it is saved, the same command goes on"
                    )
    log.close()
    optimizer.catch_up()
    if config.train.final == "best":
        forget_best_if_gone(run, progress)
    if config.train.final == "best" and progress.best is not None:
        best = run.checkpoints / f"step_{progress.best['step']}"
        checkpoint.read_state(best)  # whether it is whole
        checkpoint.load_step(best, model)


def resume(run: Run, model: PersonalizedModel, optimizer: Optimizers, started_from: str) -> Progress:
    """Load the newest checkpoint, if any, and drop metrics of later updates.

    UserError where it started from other base weights, users or data than those at hand.
    """
    newest = int(text_from_main(lambda: str(max(checkpoint.steps(run.checkpoints), default=0))))
    if not newest:
        on_main(lambda: run.forget_after(0))
        return Progress(started_from)
    path = run.checkpoints / f"step_{newest}"
    state = checkpoint.read_state(path)
    try:
        progress = Progress(**{**state, "sums": Sums(**state["sums"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'}: damaged checkpoint ({error}); remove {path.name}") from None
    if progress.started_from != started_from:
        raise UserError(
            f"data.train: the comparisons, users or base model are not those that {path} was trained with; "
            "restore them or use --overwrite"
        )
    checkpoint.load_step(path, model, optimizer)
    on_main(lambda: run.forget_after(progress.step))
    if rank() == 0:
        print(f"resuming after update {progress.step}", file=sys.stderr)
    forget_best_if_gone(run, progress)
    return progress


def forget_best_if_gone(run: Run, progress: Progress) -> None:
    """Let a best checkpoint that was removed (as one is told to that is damaged) no longer be the best."""
    if progress.best is None:
        return
    name = f"step_{int(progress.best['step'])}"
    if on_any(rank() == 0 and not (run.checkpoints / name).is_dir()):
        progress.best = None
        if rank() == 0:
            print(
                f"{name}, the best checkpoint, is gone; with train.final=best the best of later evaluations is taken, or "
                "without one the last weights",
                file=sys.stderr,
            )


def refuse(config: Config, run: Run, log: TrainingLog, progress: Progress, loss: float, norm: float) -> None:
    """Record an update that was not applied; TrainingError when there were too many in a row."""
    progress.skipped += 1
    log.write({"step": progress.step, "skipped": True, "loss": loss, "grad_norm": norm})
    if progress.skipped >= config.optim.max_skipped_steps:
        raise TrainingError(
            f"{progress.skipped} updates in a row were not finite (update {progress.step}: loss {loss}, gradient norm "
            f"{norm}); none of them was applied. Lower optim.lr or user_model.lr; the last checkpoint in "
            f"{run.checkpoints} is good"
        )


def evaluate_and_save(
    config: Config,
    run: Run,
    log: TrainingLog,
    model: PersonalizedModel,
    users: UserIndex,
    optimizer: Optimizers,
    progress: Progress,
    valid: Split | None,
    last: bool,
) -> bool:
    """After an update: evaluate where that is due, and save where that is due, or the evaluation is the best so far.

    Returns whether there is a checkpoint of this update now.
    """

    def due(every: int | None, at_last: bool = True) -> bool:
        return (last and at_last) or (every is not None and progress.step % every == 0)

    improved = False
    if valid is not None and due(config.train.eval_every, config.train.eval_last):
        optimizer.catch_up()
        record = evaluate(config, model, valid, progress.step)
        log.write(record)
        improved = math.isfinite(record["loss"]) and (progress.best is None or record["loss"] < progress.best["loss"])
        if improved:
            progress.best = {"step": progress.step, "loss": record["loss"]}
    saving = improved or due(config.train.save_every)
    if saving:
        save(config, run, model, users, optimizer, progress)
    return saving


def save(
    config: Config,
    run: Run,
    model: PersonalizedModel,
    users: UserIndex,
    optimizer: Optimizers,
    progress: Progress,
) -> None:
    """Write a checkpoint, and remove those that are not to be kept."""
    checkpoint.save_step(run.checkpoints, model, optimizer, users, asdict(progress))
    best = int(progress.best["step"]) if progress.best else None
    on_main(lambda: prune_checkpoints(run, config.train.keep_checkpoints, best))


def evaluate(config: Config, model: PersonalizedModel, valid: Split, step: int) -> dict[str, Any]:
    """The eval record of metrics.jsonl: the training loss and the accuracies on held-out comparisons."""
    comparisons = valid.data.comparisons
    users = [c.user for c in comparisons]
    scores = score_users(config, model, comparisons, controls=False)
    report = summarize(config, scores, valid.reference, users, valid.data.names)
    return {
        "step": step,
        "eval": True,
        "loss": mixed_loss(config.loss, scores, valid.reference, users),
        **{f"accuracy_{name}": value for name, value in report["accuracy"].items()},
        "accuracy_top_as_generic": report["controls"]["generic_user"]["accuracy"],
    }
