"""The training loop: from the newest checkpoint or from the start, update after update (`updates`), evaluated, logged and
saved where the config has it, to the weights for final/.
"""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from prlhf.batch.datasets import Dataset
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config
from prlhf.data.files import fingerprint_of
from prlhf.data.users import UserIndex
from prlhf.errors import Stopped, TrainingError, UserError
from prlhf.evaluate.accuracy import mixed_loss, score_users, summarize
from prlhf.method.losses import needs_reference
from prlhf.method.models import PersonalizedModel
from prlhf.method.users import is_personal
from prlhf.parallel.ranks import on_any, on_main, rank, text_from_main
from prlhf.score.reference import computes_on, reference_log_probs
from prlhf.score.states import remember_states
from prlhf.store.checkpoints import load_step, read_state, save_step, steps
from prlhf.store.runs import Run, prune_checkpoints
from prlhf.train.log import Sums, TrainingLog
from prlhf.train.malloc import keep_freed_memory
from prlhf.train.optimizer import Optimizers, make_optimizer
from prlhf.train.plan import epoch_updates, schedule
from prlhf.train.progress import Progress, held_out_accuracy
from prlhf.train.step import Referenced, take_step


def reproducible(config: Config, device: str) -> None:
    """Seed torch; on a GPU also choose deterministic kernels, so that a resumed run ends bit for bit alike."""
    torch.manual_seed(config.seed)
    if device == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def with_reference(config: Config, model: PersonalizedModel, data: Dataset, base: str) -> Referenced:
    """The data with its reference log-probs, which reward models and the reference-free losses do without."""
    batch_size = config.evaluate.batch_size
    remember_states(model, data.comparisons, batch_size, base)
    if not needs_reference(config):
        return Referenced(data, None)
    where = computes_on(config.model, model.device.type)
    return Referenced(data, reference_log_probs(lambda: model, data.comparisons, batch_size, base, where))


@contextlib.contextmanager
def out_of_memory_explained(config: Config) -> Iterator[None]:
    """Within the context a GPU that has no more memory ends with what to change (TrainingError)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"process {rank()} has no GPU memory left ({str(error).splitlines()[0]}). Lower optim.micro_batch_size (now "
            f"{config.optim.micro_batch_size}) or evaluate.batch_size (now {config.evaluate.batch_size}), set "
            "model.recompute=blocks, or use more GPUs (torchrun --nproc_per_node N); the same command with "
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
class Job:
    """A run at work: what the functions of the loop share."""

    config: Config
    run: Run
    model: PersonalizedModel
    users: UserIndex
    valid: Referenced | None
    optimizer: Optimizers
    progress: Progress
    total: int  # updates, if it is not stopped early
    log: TrainingLog

    @property
    def stopped_early(self) -> bool:
        """Whether updates are left, but the last evaluations say that they bring nothing."""
        return self.progress.step < self.total and self.progress.out_of_patience(self.config.train.patience)


def train(
    config: Config,
    run: Run,
    model: PersonalizedModel,
    users: UserIndex,
    base: str,
    training: Referenced,
    valid: Referenced | None,
    prior: dict[str, Any] | None = None,
) -> None:
    """Train `model` in place, from the newest checkpoint of the run or from the start, to the weights for final/.

    base: the fingerprint of the weights that training starts from; prior: what to log of the prior. TrainingError after
    config.optim.max_skipped_steps updates in a row whose loss or gradient is not finite; such an update never reaches the
    weights.
    """
    comparisons = training.data.comparisons
    total = schedule(config.optim, len(comparisons)).total
    optimizer = make_optimizer(config, model, total)
    progress = resume(run, model, optimizer, fingerprint_of(base, users.names, comparisons))
    log = TrainingLog(config, run, progress.step, total)
    job = Job(config, run, model, users, valid, optimizer, progress, total, log)
    if prior is not None and progress.step == 0:
        log.write({"step": 0, **prior})
    if model.device.type == "cpu":
        keep_freed_memory()
        optimizer.keep_gradients()
    model.train()
    with termination_noted() as told_to_stop:
        for epoch, update in updates_left(config, comparisons, progress.step):
            if job.stopped_early:
                break
            sums, norm, applied = take_step(config, model, optimizer, training, update, progress.step, total)
            progress.step += 1
            log.bar.update()
            if applied:
                progress.add(sums)
            else:
                refuse(job, sums.loss, norm)
            if progress.step % config.train.log_every == 0 or progress.step == total:
                lr, user_lr = optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]
                where = {"step": progress.step, "epoch": epoch, "lr": lr, "user_lr": user_lr, "grad_norm": norm}
                log.write({**where, **progress.sums.record()})
                progress.sums = Sums()
            saved = evaluate_and_save(job)
            if on_any(told_to_stop.is_set()) and progress.step < total:
                if not saved:
                    save(job)
                log.close()
                raise Stopped(f"told to (SIGTERM), after update {progress.step}; it is saved, the same command goes on")
    log.close()
    finish(job)


def log_solution(
    config: Config, run: Run, model: PersonalizedModel, valid: Referenced | None, solution: dict[str, Any]
) -> None:
    """The records of a run without updates (`exact`): the solution, and its evaluation."""
    on_main(lambda: run.forget_after(-1))
    log = TrainingLog(config, run, 0, 1)
    log.write({"step": 1, "solver": "exact", **solution})
    log.bar.update()
    if valid is not None and config.train.eval_last:
        record = evaluate(config, model, valid, 1)
        personal = None not in (solution["user_accuracy"], record["accuracy_top"])
        training = solution["user_accuracy" if personal else "generic_accuracy"]
        held_out = held_out_accuracy(record)
        gap = None if held_out is None else training - held_out
        log.write({**record, "training_accuracy": training, "overfitting": gap})
    log.close()


def updates_left(
    config: Config, comparisons: Sequence[EncodedComparison], step: int
) -> Iterator[tuple[int, list[int]]]:
    """The updates after the first `step`, each with its epoch, as indices of comparisons."""
    per_epoch, total = schedule(config.optim, len(comparisons))
    for epoch in range(step // per_epoch, math.ceil(total / per_epoch)):
        first = epoch * per_epoch
        for update in epoch_updates(config, comparisons, epoch)[max(0, step - first) : total - first]:
            yield epoch, update


def finish(job: Job) -> None:
    """Leave in the model the weights for final/, of the last update or of the best evaluation."""
    job.optimizer.catch_up()
    if job.stopped_early and rank() == 0:
        best = f"; the best is that of update {job.progress.best_step}" if job.progress.best else ""
        print(
            f"stopped early, after update {job.progress.step} of {job.total}: evaluations without a new best: "
            f"{job.progress.since_best} (train.patience){best}",
            file=sys.stderr,
        )
    if job.config.train.final == "best":
        forget_best_if_gone(job.run, job.progress)
    if job.config.train.final == "best" and job.progress.best is not None:
        path = job.run.checkpoints / f"step_{job.progress.best_step}"
        read_state(path)  # whether it is whole
        load_step(path, job.model)


def resume(run: Run, model: PersonalizedModel, optimizer: Optimizers, started_from: str) -> Progress:
    """Load the newest checkpoint, if any, and drop metrics of later updates.

    UserError where it started from other base weights, users or data than those at hand.
    """
    newest = int(text_from_main(lambda: str(max(steps(run.checkpoints), default=0))))
    if not newest:
        on_main(lambda: run.forget_after(-1))
        return Progress(started_from)
    path = run.checkpoints / f"step_{newest}"
    state = read_state(path)
    try:
        progress = Progress.from_state(state)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'}: damaged checkpoint ({error}); remove {path.name}") from None
    if progress.started_from != started_from:
        raise UserError(
            f"data.train: the comparisons, users or base model are not those that {path} was trained with; "
            "restore them or use --overwrite"
        )
    load_step(path, model, optimizer.state)
    on_main(lambda: run.forget_after(progress.step))
    if rank() == 0:
        print(f"resuming after update {progress.step}", file=sys.stderr)
    forget_best_if_gone(run, progress)
    return progress


def forget_best_if_gone(run: Run, progress: Progress) -> None:
    """Let a best checkpoint that was removed (as one is told to that is damaged) no longer be the best."""
    if progress.best is None:
        return
    name = f"step_{progress.best_step}"
    if on_any(rank() == 0 and not (run.checkpoints / name).is_dir()):
        progress.best = None
        if rank() == 0:
            print(
                f"{name}, the best checkpoint, is gone; with train.final=best the best of later evaluations is taken, or "
                "without one the last weights",
                file=sys.stderr,
            )


def refuse(job: Job, loss: float, norm: float) -> None:
    """Record an update that was not applied; TrainingError when there were too many in a row."""
    progress = job.progress
    progress.skipped += 1
    job.log.write({"step": progress.step, "skipped": True, "loss": loss, "grad_norm": norm})
    if progress.skipped >= job.config.optim.max_skipped_steps:
        raise TrainingError(
            f"{progress.skipped} updates in a row were not finite (update {progress.step}: loss {loss}, gradient norm "
            f"{norm}); none of them was applied. Lower optim.lr or user_model.lr; the last checkpoint in "
            f"{job.run.checkpoints} is good"
        )


def evaluate_and_save(job: Job) -> bool:
    """After an update: evaluate where that is due, and save where that is due, or the evaluation is the best so far or
    ends the run.

    Returns whether there is a checkpoint of this update now.
    """
    keys, step, last = job.config.train, job.progress.step, job.progress.step == job.total

    def due(every: int | None, at_last: bool = True) -> bool:
        return (last and at_last) or (every is not None and step % every == 0)

    improved = False
    if job.valid is not None and due(keys.eval_every, keys.eval_last):
        improved = evaluate_and_judge(job, job.valid)
    saving = improved or job.stopped_early or due(keys.save_every)
    if saving:
        save(job)
    return saving


def evaluate_and_judge(job: Job, valid: Referenced) -> bool:
    """Log an evaluation, and what it says of overfitting and of stopping early; whether it is the best so far."""
    config, log, progress = job.config, job.log, job.progress
    job.optimizer.catch_up()
    record = evaluate(config, job.model, valid, progress.step)
    personal = is_personal(job.model.user_model, config.loss.alpha) and record["accuracy_top"] is not None
    branch = "user" if personal else "generic"
    record |= progress.generalisation(record, branch)
    log.write(record)
    if warning := progress.overfitting_warning(record):
        log.say(warning)
    improved = progress.judge(record, config.train.best_by)
    if job.stopped_early:
        log.write({"step": progress.step, "stopped_early": True, "best_step": progress.best_step})
    return improved


def save(job: Job) -> None:
    """Write a checkpoint, and remove those that are not to be kept."""
    run, progress = job.run, job.progress
    save_step(run.checkpoints, job.model, job.optimizer.state, job.users, asdict(progress))
    on_main(lambda: prune_checkpoints(run, job.config.train.keep_checkpoints, progress.best_step))


def evaluate(config: Config, model: PersonalizedModel, valid: Referenced, step: int) -> dict[str, Any]:
    """The eval record of metrics.jsonl, but for what `Progress.generalisation` adds: the training loss and the accuracies
    on held-out comparisons."""
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
