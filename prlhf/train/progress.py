"""The progress of a training, and what its evaluations decide: the best one, when to stop, whether it overfits.

Every checkpoint holds all of it, so a resumed run decides like an uninterrupted one.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from prlhf.train.log import Sums

GAP = 0.1  # a warning only where training accuracy is further than this above held-out accuracy


@dataclass
class Progress:
    """The state of a training, as in a checkpoint's state.json."""

    started_from: str  # fingerprint of base weights, users and training data
    step: int = 0
    skipped: int = 0  # updates refused in a row
    best: dict[str, Any] | None = None  # step, loss and accuracy_top of the best evaluation
    since_best: int = 0  # evaluations since the best one
    latest: dict[str, Any] | None = None  # the last evaluation's held-out accuracy and overfitting
    sums: Sums = field(default_factory=Sums)  # since the last record of metrics.jsonl
    since_evaluation: Sums = field(default_factory=Sums)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        """From the content of state.json. KeyError or TypeError where a field is missing or unknown."""
        # Checkpoints from before early stopping have fewer fields. Their training accuracy starts anew.
        sums, since = Sums(**state["sums"]), Sums(**state.get("since_evaluation", {}))
        return cls(**{**state, "sums": sums, "since_evaluation": since})

    @property
    def best_step(self) -> int | None:
        """The update of the best evaluation, if there is one."""
        return int(self.best["step"]) if self.best else None

    def add(self, sums: Sums) -> None:
        """Count an update that was applied."""
        self.skipped = 0
        self.sums.add(sums)
        self.since_evaluation.add(sums)

    def judge(self, record: dict[str, Any], best_by: str) -> bool:
        """Note an eval record. Returns whether it is the best so far."""
        improved = is_better(record, self.best, best_by)
        if improved:
            self.best = {"step": self.step, "loss": record["loss"], "accuracy": record["accuracy_top"]}
        self.since_best = 0 if improved else self.since_best + 1
        return improved

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations brought no new best. Never if patience is None."""
        return patience is not None and self.since_best >= patience

    def generalisation(self, record: dict[str, Any], branch: str) -> dict[str, float | None]:
        """Training accuracy since the last evaluation, and overfitting. Starts to count training accuracy anew.

        training_accuracy: of the branch ("user" or "generic"); each comparison is scored before the model learns from it.
        overfitting: training accuracy less held-out accuracy, in [-1, 1]. Either is None where nothing was counted.
        """
        training, held_out = self.since_evaluation.accuracy(branch), held_out_accuracy(record)
        self.since_evaluation = Sums()
        gap = None if training is None or held_out is None else training - held_out
        return {"training_accuracy": training, "overfitting": gap}

    def overfitting_warning(self, record: dict[str, Any]) -> str | None:
        """A warning if overfitting has grown since the last evaluation and held-out accuracy has not; else None."""
        before, now = self.latest, {"accuracy": held_out_accuracy(record), "overfitting": record["overfitting"]}
        self.latest = now  # to compare the next one with
        if before is None or None in (*before.values(), *now.values()):
            return None
        if not (now["overfitting"] > max(GAP, before["overfitting"]) and now["accuracy"] <= before["accuracy"]):
            return None
        return (
            f"warning: overfitting at update {record['step']}: training accuracy {record['training_accuracy']:.3f}, "
            f"held-out accuracy {now['accuracy']:.3f} (before: {before['accuracy']:.3f}); see train.final, train.patience and "
            "user_model.prior"
        )


def held_out_accuracy(record: dict[str, Any]) -> float | None:
    """An eval record's accuracy on known users; on unknown users where there are no known ones."""
    known = record["accuracy_top"]
    return record["accuracy_generic"] if known is None else known


def is_better(record: dict[str, Any], best: dict[str, Any] | None, best_by: str) -> bool:
    """Whether an eval record is better than the best so far (None: there is none yet).

    By "loss": a lower loss. By "accuracy": a higher accuracy_top, or an equal one and a lower loss.
    """
    if not math.isfinite(record["loss"]) or best is None:  # a loss that is not finite is never better
        return math.isfinite(record["loss"])
    if best_by == "accuracy" and record["accuracy_top"] != best["accuracy"]:
        return record["accuracy_top"] > best["accuracy"]
    return record["loss"] < best["loss"]
