"""The training loop: from the newest checkpoint or from the start, update after update (`updates`), evaluated, logged and
saved where the config has it, to the weights for final/.
"""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from prlhf import checkpoint
from prlhf.config import Config
from prlhf.data import UserIndex
from prlhf.data.files import fingerprint_of
from prlhf.distributed import on_any, on_main, rank, text_from_main
from prlhf.encoding import Dataset
from prlhf.errors import Stopped, TrainingError, UserError
from prlhf.evaluation import mixed_loss, score_users, summarize
from prlhf.heap import keep_freed_memory
from prlhf.losses import needs_reference
from prlhf.optim import Optimizers
from prlhf.personalized import PersonalizedModel
from prlhf.reference import computes_on, reference_log_probs, remember_states
from prlhf.runs import Run, prune_checkpoints
from prlhf.training_log import Sums, TrainingLog
from prlhf.updates import Split, epoch_updates, make_optimizer, schedule, take_step


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


@contextlib.contextmanager
def termination_noted() -> Iterator[threading.Event]:
    """Within the context SIGTERM does not end the process, but sets the event."""
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


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
