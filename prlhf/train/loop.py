"""The training loop: update after update (`step`), with the evaluations, records and checkpoints that the config asks for.

It starts from the newest checkpoint, if there is one. When it ends, the model has the weights for final/.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config
from prlhf.data.files import fingerprint_of
from prlhf.data.users import UserIndex
from prlhf.errors import Stopped, TrainingError, UserError
from prlhf.evaluate.accuracy import mixed_loss, reward_margins, score_users, summarize
from prlhf.method.models import PersonalizedModel
from prlhf.method.users import is_personal
from prlhf.parallel.ranks import on_any, on_main, rank, text_from_main
from prlhf.score.task import Task
from prlhf.store.checkpoints import load_step, read_state, save_step, steps
from prlhf.store.runs import Run, prune_checkpoints
from prlhf.train.log import Sums, TrainingLog
from prlhf.train.optimizer import Optimizers, make_optimizer
from prlhf.train.plan import epoch_updates, schedule
from prlhf.train.process import keep_freed_memory, termination_noted
from prlhf.train.progress import Progress, held_out_accuracy
from prlhf.train.step import Step, take_step


@dataclass
class Job:
    """What the functions of the loop share: the run, its data, and its state."""

    run: Run
    users: UserIndex
    training: Task
    valid: Task | None
    optimizer: Optimizers
    progress: Progress
    total: int  # updates, if it does not stop early
    log: TrainingLog

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.training.config

    @property
    def stopped_early(self) -> bool:
        """Whether train.patience ends the training before its last update."""
        return self.progress.step < self.total and self.progress.out_of_patience(self.config.train.patience)


def train(
    run: Run, users: UserIndex, training: Task, valid: Task | None, base: str, prior: dict[str, Any] | None = None
) -> None:
    """Train the model of `training` in place, from the run's newest checkpoint or from the start.

    base: fingerprint of the weights to start from. prior: its numbers, for the log. TrainingError as for `refuse`.
    Stopped after SIGTERM, once the current update is saved.
    """
    config, model, comparisons = training.config, training.model, training.comparisons
    total = schedule(config.optim, len(comparisons)).total
    optimizer = make_optimizer(config, model, total)
    seen = [c if c.tail else c[:-1] for c in comparisons]  # without a tail as versions that knew none
    progress = resume(run, model, optimizer, fingerprint_of(base, users.names, seen))
    log = TrainingLog(config, run, progress.step, total)
    job = Job(run, users, training, valid, optimizer, progress, total, log)
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
            step = take_step(training, optimizer, update, progress.step, total)
            record(job, step, epoch)
            saved = evaluate_and_save(job)
            if on_any(told_to_stop.is_set()) and progress.step < total:
                if not saved:
                    save(job)
                log.close()
                raise Stopped(f"told to (SIGTERM), after update {progress.step}; it is saved, the same command goes on")
    log.close()
    finish(job)


def record(job: Job, step: Step, epoch: int) -> None:
    """Count an update, and log a record every train.log_every updates. TrainingError as for `refuse`."""
    progress, groups = job.progress, job.optimizer.param_groups
    progress.step += 1
    job.log.bar.update()
    if step.applied:
        progress.add(step.sums)
    else:
        refuse(job, step.sums.loss, step.norm)
    if progress.step % job.config.train.log_every == 0 or progress.step == job.total:
        rates = {"lr": groups[0]["lr"], "user_lr": groups[-1]["lr"]}
        where = {"step": progress.step, "epoch": epoch, **rates, "grad_norm": step.norm}
        job.log.write({**where, **progress.sums.record()})
        progress.sums = Sums()


def log_solution(run: Run, config: Config, valid: Task | None, solution: dict[str, Any]) -> None:
    """Log a run without updates: the exact solution, and its evaluation."""
    on_main(lambda: run.forget_after(-1))
    log = TrainingLog(config, run, 0, 1)
    log.write({"step": 1, "solver": "exact", **solution})
    log.bar.update()
    if valid is not None and config.train.eval_last:
        found = evaluate(valid, 1)
        personal = None not in (solution["user_accuracy"], found["accuracy_top"])
        training = solution["user_accuracy" if personal else "generic_accuracy"]
        held_out = held_out_accuracy(found)
        gap = None if held_out is None else training - held_out
        log.write({**found, "training_accuracy": training, "overfitting": gap})
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
    """Give the model the weights for final/: those of the last update or, with train.final=best, of the best evaluation."""
    progress = job.progress
    job.optimizer.catch_up()
    if job.stopped_early and rank() == 0:
        best = f"; the best is that of update {progress.best_step}" if progress.best else ""
        print(
            f"stopped early, after update {progress.step} of {job.total}: evaluations without a new best: "
            f"{progress.since_best} (train.patience){best}",
            file=sys.stderr,
        )
    if job.config.train.final == "best":
        forget_best_if_gone(job.run, progress)
        if progress.best is not None:
            path = job.run.checkpoints / f"step_{progress.best_step}"
            read_state(path)  # UserError if it is damaged
            load_step(path, job.training.model)


def resume(run: Run, model: PersonalizedModel, optimizer: Optimizers, started_from: str) -> Progress:
    """Load the newest checkpoint, if any; drop later metrics. UserError if its base weights, users or data differ."""
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
    """Forget the best evaluation if its checkpoint was removed. (Users are told to remove a damaged one.)"""
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
    """Log an update that was not applied (see `Step`). TrainingError after optim.max_skipped_steps of them in a row."""
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
    """Evaluate if it is time; save if it is time, at a new best, and at the end. Returns whether it saved."""
    keys, step, last = job.config.train, job.progress.step, job.progress.step == job.total

    def due(every: int | None, at_last: bool = True) -> bool:
        return (last and at_last) or (every is not None and step % every == 0)

    improved = job.valid is not None and due(keys.eval_every, keys.eval_last) and evaluate_and_judge(job, job.valid)
    saving = improved or job.stopped_early or due(keys.save_every)
    if saving:
        save(job)
    return saving


def evaluate_and_judge(job: Job, valid: Task) -> bool:
    """Evaluate, and log the result, any overfitting and an early stop. Returns whether the result is the best so far."""
    config, log, progress = job.config, job.log, job.progress
    job.optimizer.catch_up()
    found = evaluate(valid, progress.step)
    personal = is_personal(valid.model.user_model, config.loss.alpha) and found["accuracy_top"] is not None
    found |= progress.generalisation(found, "user" if personal else "generic")
    log.write(found)
    if warning := progress.overfitting_warning(found):
        log.say(warning)
    improved = progress.judge(found, config.train.best_by)
    if job.stopped_early:
        log.write({"step": progress.step, "stopped_early": True, "best_step": progress.best_step})
    return improved


def save(job: Job) -> None:
    """Write a checkpoint, and remove those that are no longer kept."""
    run, progress = job.run, job.progress
    save_step(run.checkpoints, job.training.model, job.optimizer.state, job.users, asdict(progress))
    on_main(lambda: prune_checkpoints(run, job.config.train.keep_checkpoints, progress.best_step))


def evaluate(valid: Task, step: int) -> dict[str, Any]:
    """An eval record of metrics.jsonl: the training loss and the accuracies on held-out comparisons."""
    scores = score_users(valid, controls=False)
    report = summarize(valid.config.evaluate, reward_margins(valid, scores), valid.users, valid.names)
    return {
        "step": step,
        "eval": True,
        "loss": mixed_loss(valid, scores),
        **{f"accuracy_{name}": value for name, value in report["accuracy"].items()},
        "accuracy_top_as_generic": report["controls"]["generic_user"]["accuracy"],
    }
