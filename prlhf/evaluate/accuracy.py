"""Implicit-reward accuracy of a model on held-out comparisons, with the controls that show whether it is personal.

A comparison counts as right when the chosen response has the larger implicit reward. Known users' comparisons are
scored three times: with the true user, the generic user, and another known user drawn at random. Where personalisation
is real, the first is well above the other two.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from prlhf.config.keys import EvaluateConfig
from prlhf.errors import UserError
from prlhf.evaluate.stats import metrics
from prlhf.evaluate.stats.intervals import std_interval, worst_user_interval
from prlhf.evaluate.stats.metrics import UserCounts, by_user, correct, pooled, pooled_difference_interval
from prlhf.method.losses import Outputs, branch_weights, preference_loss, reward_margin
from prlhf.method.users import is_personal
from prlhf.score.score import score_readers
from prlhf.score.task import Task


class Scores(NamedTuple):
    """What the model says of the same comparisons, read by the true, the generic and a random other user."""

    true_user: Outputs
    generic_user: Outputs
    shuffled_users: Outputs


def shuffled(users: Sequence[int], known: int, seed: int) -> list[int]:
    """For every known user's comparison another known user, drawn uniformly; 0 stays 0, and so does a single user."""
    rng = random.Random(seed)
    draw = [rng.randrange(1, known) if known > 1 else 1 for _ in users]
    return [0 if u == 0 else d + (known > 1 and d >= u) for u, d in zip(users, draw)]


def score_users(task: Task, controls: bool = True) -> Scores:
    """Score all comparisons as each of the three users reads them. Nothing is computed twice.

    Where training gave users no vectors of their own (uniform users, alpha = 0) all are user 0.
    controls=False leaves `shuffled_users` as `true_user` and saves a pass.
    """
    config, model, users = task.config, task.model, task.users
    others = shuffled(users, model.users, config.evaluate.seed) if controls else users
    nobody = [0] * len(users)
    personal = is_personal(model.user_model, config.loss.alpha)
    readers = {"generic_user": nobody, "true_user": users, "shuffled_users": others}
    as_read = {name: users if personal else nobody for name, users in readers.items()}
    return Scores(**score_readers(model, task.comparisons, as_read, config.evaluate.batch_size, task.states))


def mixed_loss(task: Task, scores: Scores) -> float:
    """The training objective on scored comparisons: mean of alpha loss(true user) + (1 - alpha) loss(generic user)."""
    config = task.config.loss
    weights = branch_weights(torch.tensor(task.users), config.alpha)
    own_B, generic_B = (preference_loss(config, branch, task.reference) for branch in scores[:2])
    return (weights.user * own_B + weights.generic * generic_B).mean().item()


def reward_margins(task: Task, scores: Scores) -> np.ndarray:
    """(3, B): reward margins, chosen less rejected, under true, generic and shuffled users. UserError if not finite."""
    margins = np.stack([reward_margin(task.config.loss, branch, task.reference).numpy() for branch in scores])
    bad = ~np.isfinite(margins).all(axis=0)
    if bad.any():
        raise UserError(f"{bad.sum()} of {len(bad)} comparisons' reward margins are not finite: a broken model?")
    return margins


def summarize(
    config: EvaluateConfig,
    margins: np.ndarray,
    users: Sequence[int],
    names: Sequence[str | None],
    rules: Mapping[str, Sequence[float]] | None = None,
    others: bool = True,
) -> dict[str, Any]:
    """The numbers of report.json: accuracies, intervals, calibration, controls, rules, and a row for each known user.

    margins: (3, B), as `reward_margins`; users: numbers, 0 unknown; names: who chose, to resample unknown users by;
    rules: what each trivial rule gets right of every comparison (1, 0, or 0.5), and own_record what it explains;
    others: whether the model knows more than one user. Without them nobody is shuffled, and what needs that is None.
    """
    samples, rng = config.bootstrap, np.random.default_rng(config.seed)
    known, labels = np.asarray(users) > 0, np.asarray(metrics.user_labels(names), dtype=object)
    true, generic, other = (by_user(labels[known], values[known]) for values in margins)
    strangers = by_user(labels[~known], margins[1][~known])
    report: dict[str, Any] = {
        "comparisons": {"known_users": int(known.sum()), "unknown_users": int((~known).sum())},
        "accuracy": metrics.accuracies(true, strangers),
        "interval": {
            "top": metrics.pooled_interval(true, samples, rng),
            "average_mean": metrics.mean_interval(true, samples, rng),
            "average_std": std_interval(true.accuracy()),
            "generic": metrics.pooled_interval(strangers, samples, rng),
            "worst_user": worst_user_interval(true.correct, true.n),
        },
        "calibration": {
            "top": metrics.expected_calibration_error(margins[0][known]),
            "generic": metrics.expected_calibration_error(margins[1][~known]),
        },
        "controls": _controls(true, generic, other, samples, rng),
        "per_user": _per_user(true, generic, other),
    }
    if not others:
        for name in ("shuffled_users", "placebo_gain", "personalisation_gain"):
            report["controls"][name] = {"accuracy": None, "interval": None}
        for row in report["per_user"].values():
            row["shuffled_users"] = None
    if rules is None:
        return report
    own = np.asarray(rules["own_record"])[known] if "own_record" in rules and known.any() else None
    explained = None if own is None else own_record_summary(own, labels[known], margins[:2, known], samples, rng)
    return {**report, "rules": _rules(rules, known), "own_record": explained}


def integrated_calibration(margins_B: np.ndarray, logits_B: np.ndarray) -> dict[str, float | int | None]:
    """The calibration error of adapted users' probabilities: of the margins, and of logits integrated over the posterior."""
    return {
        "comparisons": len(margins_B),
        "plug_in": metrics.expected_calibration_error(margins_B),
        "integrated": metrics.expected_calibration_error(logits_B),
    }


def own_record_summary(
    right_B: np.ndarray, users: np.ndarray, margins: np.ndarray, samples: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Whether a rule that only remembers each user's own record of the very responses explains what the model gains.

    right_B: what own_record gets right of known users' comparisons, 1/2 where it does not decide; margins: (2, B), as the
    true and as the generic user. The gain (true less generic accuracy) is computed apart where the rule decides and where
    it does not. The rule explains it if there is a gain, the rule is right on more than half, most of the gain lies where
    it decides, and none is shown where it does not: the interval reaches 0, or there is too little data for one.
    """
    decides = right_B != 0.5

    def gain(rows: np.ndarray) -> dict[str, Any]:
        true, generic = (by_user(users[rows], values[rows]) for values in margins)
        return {
            "accuracy": pooled(true) - pooled(generic) if true.users else None,
            "interval": pooled_difference_interval(true, generic, samples, rng),
            "comparisons": int(rows.sum()),
        }

    silent, gains_B = gain(~decides), correct(margins[0]) - correct(margins[1])
    not_shown = silent["interval"] is None or silent["interval"].low <= 0
    mostly = gains_B.sum() > 0 and gains_B[decides].sum() >= gains_B.sum() / 2
    return {
        "decided": float(decides.mean()),
        "accuracy": float(right_B.mean()),
        "gain_over_generic": {"where_it_decides": gain(decides), "where_it_does_not": silent},
        "explains_gain": bool(mostly and right_B.mean() > 0.5 and not_shown),
    }


def _controls(
    true: UserCounts, generic: UserCounts, other: UserCounts, samples: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Known users' accuracy under the generic and a random other user, and what knowing the true user gains.

    personalisation_gain = gain_over_generic - placebo_gain = (true - generic) - (shuffled - generic), which is true -
    shuffled: what any user's vectors gain over none is not personal.
    """
    found: dict[str, Any] = {}
    for name, control in (("generic_user", generic), ("shuffled_users", other)):
        found[name] = {"accuracy": pooled(control), "interval": metrics.pooled_interval(control, samples, rng)}
    gains = {
        "gain_over_generic": (true, generic), "placebo_gain": (other, generic), "personalisation_gain": (true, other)
    }  # fmt: skip
    for name, (a, b) in gains.items():
        gain = pooled(a) - pooled(b) if true.users else None
        found[name] = {"accuracy": gain, "interval": pooled_difference_interval(a, b, samples, rng)}
    return found


def _rules(rules: Mapping[str, Sequence[float]], known: np.ndarray) -> dict[str, Any]:
    """What each rule gets right of known and of unknown users' comparisons; None where there are none."""

    def share(right: Sequence[float], rows: np.ndarray) -> float | None:
        return float(np.asarray(right)[rows].mean()) if rows.any() else None

    return {k: {"known_users": share(v, known), "unknown_users": share(v, ~known)} for k, v in rules.items()}


def _per_user(true: UserCounts, generic: UserCounts, other: UserCounts) -> dict[str, Any]:
    """The table of known users (the paper's Tables 3 and 4): n, and accuracy as themselves and under both controls."""
    columns = zip(true.users, true.n, true.accuracy(), generic.accuracy(), other.accuracy())
    return {
        user: {"n": int(n), "accuracy": float(a), "generic_user": float(g), "shuffled_users": float(o)}
        for user, n, a, g, o in columns
    }
