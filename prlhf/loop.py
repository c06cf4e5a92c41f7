"""The training loop: every comparison is seen by the user branch and the generic branch in the same update.

    gradient = d/dtheta  1/|update| sum_c [ alpha loss(h_c(u_t, u_p)) + (1 - alpha) loss(h_c(u_t, 0)) ]

accumulated over micro-batches, which therefore change memory and speed but never the update.
"""

import ctypes
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prlhf import checkpoint
from prlhf.batching import length_bucketed_updates, micro_batches, pair_of
from prlhf.config import Config, OptimConfig
from prlhf.data import UserIndex
from prlhf.encoding import Dataset, EncodedComparison
from prlhf.errors import TrainingError, UserError
from prlhf.evaluation import mixed_loss, score_users, summarize
from prlhf.losses import ResponseLogProbs, branch_weights, preference_loss, reward_margin
from prlhf.personalized import PersonalizedModel
from prlhf.reference import fingerprint_of
from prlhf.runs import Run, prune_checkpoints
from prlhf.scoring import select, tree_keys
from prlhf.training_log import Sums, TrainingLog
from prlhf.user_models import is_personal

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


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
    personal = is_personal(model.user_model, config.loss.alpha)
    plan = branches(update, [comparisons[i].user for i in update], config.loss.alpha, personal)
    if not model.backbone_reads_users:
        plan = [[item for branch in plan for item in branch]]  # one backbone pass serves both branches and all users

    losses: list[Tensor] = []
    margins: list[tuple[Sequence[str], Tensor]] = []
    for items in plan:
        of_items = [comparisons[item.index] for item in items]
        trees = tree_keys(model, of_items, [item.user for item in items])
        for part in micro_batches(trees, [c.length for c in of_items], config.optim.micro_batch_size):
            indices, names, users, weights = zip(*(items[i] for i in part))
            outputs = model(model.collate([comparisons[i] for i in indices], users))
            part_reference = select(reference, indices, model.device)
            losses_B = preference_loss(config.loss, outputs, part_reference)
            loss = (torch.tensor(weights, dtype=torch.float64).to(losses_B) * losses_B).sum() / len(update)
            loss.backward()
            losses.append(loss.detach())
            margins.append((names, reward_margin(config.loss, outputs, part_reference).detach()))
    sums.loss = torch.stack(losses).sum().item()  # read here, once: a GPU need not wait for it in between
    for names, margins_B in margins:
        sums.add_margins(names, margins_B)
    return sums


def keep_freed_memory() -> None:
    """With glibc, keep freed memory in the process, so that a step on a CPU does not ask for the same pages again.

    Large tensors are otherwise mapped and unmapped one by one: a quarter of the time of a small model's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


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


def make_optimizer(config: Config, model: PersonalizedModel) -> torch.optim.AdamW:
    """AdamW with two groups: the backbone or its LoRA at optim.lr, and the user model at user_model.lr."""
    user = model.user_parameters()
    user_ids = {id(p) for p in user}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in user_ids]
    groups = [
        {"params": rest, "base_lr": config.optim.lr, "weight_decay": config.optim.weight_decay},
        {
            "params": [p for p in user if p.numel()],
            "base_lr": config.user_model.lr,
            "weight_decay": config.user_model.weight_decay,
        },
    ]
    betas = (config.optim.beta1, config.optim.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.optim.lr, betas=betas, fused=True)


@dataclass
class Progress:
    """Where training is: what a checkpoint's state.json holds."""

    started_from: str  # fingerprint of base weights, users and training data
    step: int = 0
    skipped: int = 0  # updates refused in a row
    best: dict[str, float] | None = None  # step and loss
    sums: Sums = field(default_factory=Sums)  # since the last record of metrics.jsonl


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
    lengths = [c.length for c in comparisons]
    pairs = [pair_of(c) for c in comparisons] if config.optim.pair_updates else None
    per_epoch = math.ceil(len(comparisons) / config.optim.batch_size)
    total = min(per_epoch * config.optim.epochs, config.optim.max_steps or sys.maxsize)
    optimizer = make_optimizer(config, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    progress = resume(run, model, optimizer, fingerprint_of(base, users.names, comparisons))
    log = TrainingLog(config, run, progress.step, total)
    if model.device.type == "cpu":
        keep_freed_memory()
    model.train()

    while progress.step < total:
        epoch, first = divmod(progress.step, per_epoch)
        updates = length_bucketed_updates(lengths, config.optim.batch_size, config.seed, epoch, pairs)
        for update in updates[first : first + total - progress.step]:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate_factor(progress.step, total, config.optim)

            sums = accumulate_gradients(config, model, comparisons, training.reference, update)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm or math.inf).item()
            applied = math.isfinite(sums.loss) and math.isfinite(norm)
            if applied:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            log.bar.update()
            if applied:
                progress.skipped = 0
                sums.seconds = time.perf_counter() - started
                progress.sums.add(sums)
            else:
                refuse(config, run, log, progress, sums.loss, norm)
            if progress.step % config.train.log_every == 0 or progress.step == total:
                lr, user_lr = optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]
                where = {"step": progress.step, "epoch": epoch, "lr": lr, "user_lr": user_lr, "grad_norm": norm}
                log.write({**where, **progress.sums.record()})
                progress.sums = Sums()
            evaluate_and_save(config, run, log, model, users, optimizer, progress, valid, last=progress.step == total)
    log.close()
    if config.train.final == "best" and progress.best is not None:
        checkpoint.load_step(run.checkpoints / f"step_{progress.best['step']}", model)


def resume(run: Run, model: PersonalizedModel, optimizer: torch.optim.Optimizer, started_from: str) -> Progress:
    """Load the newest checkpoint, if any, and drop metrics of later updates.

    UserError where it started from other base weights, users or data than those at hand.
    """
    found = checkpoint.steps(run.checkpoints)
    if not found:
        run.forget_after(0)
        return Progress(started_from)
    path = found[max(found)]
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
    run.forget_after(progress.step)
    print(f"resuming after update {progress.step}", file=sys.stderr)
    return progress


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
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    valid: Split | None,
    last: bool,
) -> None:
    """After an update: evaluate where that is due, and save where that is due, or the evaluation is the best so far."""

    def due(every: int | None, at_last: bool = True) -> bool:
        return (last and at_last) or (every is not None and progress.step % every == 0)

    improved = False
    if valid is not None and due(config.train.eval_every, config.train.eval_last):
        record = evaluate(config, model, valid, progress.step)
        log.write(record)
        improved = progress.best is None or record["loss"] < progress.best["loss"]
        if improved:
            progress.best = {"step": progress.step, "loss": record["loss"]}
    if improved or due(config.train.save_every):
        checkpoint.save_step(run.checkpoints, model, optimizer, users, asdict(progress))
        prune_checkpoints(run, config.train.keep_checkpoints, int(progress.best["step"]) if progress.best else None)


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
