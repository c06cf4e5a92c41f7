"""The training loop: every comparison is seen by the user branch and the generic branch in the same update.

    gradient = d/dtheta  1/|update| sum_c [ alpha loss(h_c(u_t, u_p)) + (1 - alpha) loss(h_c(u_t, 0)) ]

accumulated over micro-batches and branches, which therefore change memory and speed but never the update.
"""

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf import checkpoint
from prlhf.batching import collate, length_bucketed_updates, micro_batches
from prlhf.config import Config, OptimConfig
from prlhf.encoding import Dataset, EncodedComparison
from prlhf.errors import TrainingError, UserError
from prlhf.evaluation import mixed_loss, score_users, summarize
from prlhf.losses import ResponseLogProbs, branch_weights, preference_loss, reward_margin
from prlhf.personalized import PersonalizedLM
from prlhf.reference import data_fingerprint
from prlhf.runs import Run, prune_checkpoints
from prlhf.scoring import select
from prlhf.user_models import UniformUsers


class Split(NamedTuple):
    """A data set and its comparisons' reference log-probs (None for the reference-free losses)."""

    data: Dataset
    reference: ResponseLogProbs | None


class Branch(NamedTuple):
    """One forward pass: which comparisons, as which users, and what each one's loss counts."""

    name: str
    indices: list[int]
    users_B: Tensor
    weights_B: Tensor


def branches(indices: Sequence[int], users: Sequence[int], alpha: float, personal: bool) -> list[Branch]:
    """The user branch and the generic branch of some comparisons, each without those that count nothing in it.

    users: the user number of each of `indices`; personal=False: the user model is uniform, one branch serves all.
    """
    users_B = torch.tensor(users)
    weights = branch_weights(users_B, alpha, personal)
    found = []
    for name, as_users_B, weights_B in (
        ("user", users_B, weights.user),
        ("generic", torch.zeros_like(users_B), weights.generic),
    ):
        kept = weights_B.nonzero()[:, 0]
        if len(kept):
            found.append(Branch(name, [indices[i] for i in kept.tolist()], as_users_B[kept], weights_B[kept]))
    return found


@dataclass
class Sums:
    """What metrics.jsonl is made of, summed since the last record; all of it in a checkpoint too."""

    loss: float = 0.0
    updates: int = 0
    comparisons: int = 0
    tokens: int = 0
    seconds: float = 0.0
    margin: dict[str, float] = field(default_factory=lambda: {"user": 0.0, "generic": 0.0})
    right: dict[str, float] = field(default_factory=lambda: {"user": 0.0, "generic": 0.0})
    seen: dict[str, int] = field(default_factory=lambda: {"user": 0, "generic": 0})

    def add_branch(self, branch: Branch, margins_B: Tensor) -> None:
        """Count a branch's reward margins and how many are positive."""
        self.margin[branch.name] += margins_B.sum().item()
        self.right[branch.name] += ((margins_B > 0) + 0.5 * (margins_B == 0)).sum().item()
        self.seen[branch.name] += len(margins_B)


def accumulate_gradients(
    config: Config,
    model: PersonalizedLM,
    comparisons: Sequence[EncodedComparison],
    reference: ResponseLogProbs | None,
    update: Sequence[int],
    user_slot: int,
    sums: Sums,
) -> float:
    """Add the gradient of the mean loss over `update` (indices of comparisons) to the weights; returns that loss."""
    lengths = [c.length for c in comparisons]
    personal = not isinstance(model.user_model, UniformUsers)
    total = 0.0
    for indices in micro_batches(update, lengths, config.optim.micro_batch_size):
        for branch in branches(indices, [comparisons[i].user for i in indices], config.loss.alpha, personal):
            batch = collate([comparisons[i] for i in branch.indices], user_slot, config.model.layout).to(model.device)
            policy = model(batch, branch.users_B.to(model.device))
            branch_reference = select(reference, branch.indices, model.device)
            losses_B = preference_loss(config.loss, policy, branch_reference)
            loss = (branch.weights_B.to(losses_B) * losses_B).sum() / len(update)
            loss.backward()
            total += loss.item()
            sums.add_branch(branch, reward_margin(config.loss, policy, branch_reference).detach())
    sums.comparisons += len(update)
    sums.tokens += sum(lengths[i] for i in update)
    return total


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


def make_optimizer(config: Config, model: PersonalizedLM) -> torch.optim.AdamW:
    """AdamW with two groups: the backbone or its LoRA at optim.lr, and the user model at user_model.lr, undecayed."""
    user = model.user_parameters()
    user_ids = {id(p) for p in user}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in user_ids]
    groups = [
        {"params": rest, "base_lr": config.optim.lr, "weight_decay": config.optim.weight_decay},
        {"params": [p for p in user if p.numel()], "base_lr": config.user_model.lr, "weight_decay": 0.0},
    ]
    betas = (config.optim.beta1, config.optim.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.optim.lr, betas=betas)


def train(
    config: Config, run: Run, model: PersonalizedLM, user_slot: int, known: int, training: Split, valid: Split | None
) -> None:
    """Train `model` in place, from the newest checkpoint of the run or from the start, to the weights for final/.

    known: the number of known users. TrainingError after config.optim.max_skipped_steps updates in a row whose loss or
    gradient is not finite; such an update never reaches the weights.
    """
    comparisons = training.data.comparisons
    lengths = [c.length for c in comparisons]
    per_epoch = math.ceil(len(comparisons) / config.optim.batch_size)
    total = min(per_epoch * config.optim.epochs, config.optim.max_steps or sys.maxsize)
    optimizer = make_optimizer(config, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    progress = resume(run, model, optimizer, data_fingerprint(comparisons))
    writer = _tensorboard(config, run)
    bar = tqdm(total=total, initial=progress.step, desc="training", unit="update", disable=None)
    model.train()

    while progress.step < total:
        epoch, first = divmod(progress.step, per_epoch)
        updates = length_bucketed_updates(lengths, config.optim.batch_size, config.seed, epoch)
        for update in updates[first : first + total - progress.step]:
            started, sums = time.perf_counter(), progress.sums
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate_factor(progress.step, total, config.optim)

            loss = accumulate_gradients(config, model, comparisons, training.reference, update, user_slot, sums)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm or math.inf).item()
            applied = math.isfinite(loss) and math.isfinite(norm)
            if applied:
                optimizer.step()
                sums.loss += loss
                sums.updates += 1
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            progress.skipped = 0 if applied else progress.skipped + 1
            sums.seconds += time.perf_counter() - started
            bar.update()
            if not applied:
                _refuse(run, progress, config, loss, norm)
            if progress.step % config.train.log_every == 0 or progress.step == total:
                _log(run, writer, bar, _record(sums, progress.step, epoch, optimizer, norm))
                progress.sums = Sums()
            _evaluate_and_save(config, run, model, optimizer, progress, total, user_slot, known, valid, writer, bar)
    bar.close()
    if config.train.final == "best" and progress.best is not None:
        checkpoint.load_step(run.checkpoints / f"step_{progress.best['step']}", model)


@dataclass
class Progress:
    """Where training is: what a checkpoint's state.json holds."""

    data: str  # fingerprint of the training data
    step: int = 0
    skipped: int = 0
    best: dict[str, float] | None = None
    sums: Sums = field(default_factory=Sums)


def resume(run: Run, model: PersonalizedLM, optimizer: torch.optim.Optimizer, data: str) -> Progress:
    """Load the newest checkpoint, if any, and drop metrics of later updates. UserError where the data changed."""
    found = checkpoint.steps(run.checkpoints)
    if not found:
        run.forget_after(0)
        return Progress(data)
    path = found[max(found)]
    state = checkpoint.load_step(path, model, optimizer)
    progress = Progress(**{**state, "sums": Sums(**state["sums"])})
    if progress.data != data:
        raise UserError(
            f"data.train: the data are not those that {path} was trained on; restore them or use --overwrite"
        )
    run.forget_after(progress.step)
    print(f"resuming after update {progress.step}", file=sys.stderr)
    return progress


def _evaluate_and_save(config, run, model, optimizer, progress, total, user_slot, known, valid, writer, bar) -> None:
    step, plan = progress.step, config.train
    last = step == total
    improved = False
    if valid is not None and (last or (plan.eval_every and step % plan.eval_every == 0)):
        record = evaluate(config, model, valid, known, user_slot, step)
        _log(run, writer, bar, record)
        improved = progress.best is None or record["loss"] < progress.best["loss"]
        if improved:
            progress.best = {"step": step, "loss": record["loss"]}
    if last or improved or (plan.save_every and step % plan.save_every == 0):
        checkpoint.save_step(run.checkpoints, model, optimizer, asdict(progress))
        prune_checkpoints(run, plan.keep_checkpoints, int(progress.best["step"]) if progress.best else None)


def evaluate(
    config: Config, model: PersonalizedLM, valid: Split, known: int, user_slot: int, step: int
) -> dict[str, Any]:
    """The eval record of metrics.jsonl: the training loss and the accuracies on held-out comparisons."""
    comparisons = valid.data.comparisons
    users = [c.user for c in comparisons]
    scores = score_users(config, model, comparisons, known, user_slot, controls=False)
    report = summarize(config, scores, valid.reference, users, valid.data.names)
    return {
        "step": step,
        "eval": True,
        "loss": mixed_loss(config.loss, scores, valid.reference, users),
        **{f"accuracy_{name}": value for name, value in report["accuracy"].items()},
        "accuracy_top_as_generic": report["controls"]["generic_user"]["accuracy"],
    }


def _refuse(run: Run, progress: Progress, config: Config, loss: float, norm: float) -> None:
    """Record an update that was not applied; TrainingError when there were too many in a row."""
    # JSON has no inf and nan: they are written as text
    run.log({"step": progress.step, "skipped": True, "loss": str(loss), "grad_norm": str(norm)})
    if progress.skipped >= config.optim.max_skipped_steps:
        raise TrainingError(
            f"{progress.skipped} updates in a row were not finite (update {progress.step}: loss {loss}, gradient norm "
            f"{norm}); none of them was applied. Lower optim.lr or user_model.lr; the last checkpoint in "
            f"{run.checkpoints} is good"
        )


def _record(sums: Sums, step: int, epoch: int, optimizer: torch.optim.Optimizer, norm: float) -> dict[str, Any]:
    def mean(total: float, count: int) -> float | None:
        return total / count if count else None

    return {
        "step": step,
        "epoch": epoch,
        "loss": mean(sums.loss, sums.updates),
        "lr": optimizer.param_groups[0]["lr"],
        "user_lr": optimizer.param_groups[-1]["lr"],
        "grad_norm": norm,
        **{f"{name}_margin": mean(sums.margin[name], sums.seen[name]) for name in sums.seen},
        **{f"{name}_accuracy": mean(sums.right[name], sums.seen[name]) for name in sums.seen},
        "comparisons_per_s": sums.comparisons / sums.seconds,
        "tokens_per_s": sums.tokens / sums.seconds,
        "peak_memory_gb": peak_memory_gb(),
    }


def peak_memory_gb() -> float:
    """The most memory used so far, in 1e9 bytes: allocated on the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _log(run: Run, writer, bar: tqdm, record: dict[str, Any]) -> None:
    run.log(record)
    numbers = {k: v for k, v in record.items() if isinstance(v, float)}
    if writer is not None:
        group = "eval" if record.get("eval") else "train"
        for name, value in numbers.items():
            writer.add_scalar(f"{group}/{name}", value, record["step"])
    shown = ("loss", "user_accuracy", "generic_accuracy", "accuracy_top", "accuracy_generic")
    text = ", ".join(f"{name} {numbers[name]:.3f}" for name in shown if name in numbers)
    bar.write(f"{'eval  ' if record.get('eval') else 'update'} {record['step']}: {text}", file=sys.stderr)


def _tensorboard(config: Config, run: Run):
    if not config.train.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("train.tensorboard: TensorBoard is not installed: pip install 'prlhf[tensorboard]'") from None
    return SummaryWriter(run.path / "tensorboard")
