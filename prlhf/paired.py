"""Paired statistics of two or more models on the same comparisons: which differences are more than chance?

Models are compared on users, with all their comparisons, and on both models' answers to the same comparison. Every
random number comes from one seed, so that two identical models have identical numbers.
"""

from typing import Any, NamedTuple

import numpy as np

from prlhf.metrics import (
    UserCounts,
    accuracies,
    correct,
    holm,
    mean,
    mean_difference_interval,
    mean_interval,
    pooled,
    pooled_difference_interval,
    pooled_interval,
    right_by_user,
    sign_flip_test,
    user_labels,
)

SAMPLES = 2000  # bootstrap samples
FLIPS = 10_000  # sign flips of a user's test, at least; with many users more, or none could stay below 5% after Holm
SEED = 0
LEVEL = 0.05


class Comparisons(NamedTuple):
    """What was compared, in order of id: ids, users, hashes of the texts, and whether the model knows the user."""

    ids: list[str]
    users: list[str | None]
    texts: list[str]
    known_B: np.ndarray


class Model(NamedTuple):
    """A model of one or more seeds: what each got `correct` (a known user as themselves), (seeds, B)."""

    name: str
    folders: list[str]
    right_SB: np.ndarray


class Groups(NamedTuple):
    """What was right, by user: of known users, and of unknown users."""

    known: UserCounts
    unknown: UserCounts


def groups(comparisons: Comparisons, right_B: np.ndarray) -> Groups:
    """What is right, by user; comparisons of nobody in particular stand for themselves."""
    labels = np.asarray(user_labels(comparisons.users), dtype=object)
    return Groups(*(right_by_user(labels[rows], right_B[rows]) for rows in (comparisons.known_B, ~comparisons.known_B)))


def summary(comparisons: Comparisons, model: Model) -> dict[str, Any]:
    """Accuracies: mean and standard deviation over seeds, and the interval over users of the mean over seeds."""
    seeds = [accuracies(*groups(comparisons, right_B)) for right_B in model.right_SB]
    both = groups(comparisons, model.right_SB.mean(axis=0))
    found = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    return {
        "folders": model.folders,
        "seeds": len(seeds),
        "accuracy": {name: None if None in values else float(np.mean(values)) for name, values in found.items()},
        "std_over_seeds": {
            name: None if None in values or len(seeds) < 2 else float(np.std(values, ddof=1))
            for name, values in found.items()
        },
        "interval": {
            "top": pooled_interval(both.known, SAMPLES, np.random.default_rng(SEED)),
            "average_mean": mean_interval(both.known, SAMPLES, np.random.default_rng(SEED)),
            "generic": pooled_interval(both.unknown, SAMPLES, np.random.default_rng(SEED)),
        },
    }


def difference(comparisons: Comparisons, baseline: Model, model: Model) -> dict[str, Any]:
    """The model's accuracies less the baseline's, with intervals that resample users with both, and win rates.

    win_rate: share of comparisons that the model gets right more often (over seeds) than the baseline, 1/2 where equal.
    different: whether the interval leaves out 0.
    """
    right_B, baseline_B = (m.right_SB.mean(axis=0) for m in (model, baseline))
    a, b = groups(comparisons, right_B), groups(comparisons, baseline_B)
    wins_B = correct(np.round(right_B - baseline_B, 9))
    found = {}
    for name, value, interval, x, y, rows in (
        ("top", pooled, pooled_difference_interval, a.known, b.known, comparisons.known_B),
        ("average_mean", mean, mean_difference_interval, a.known, b.known, None),
        ("generic", pooled, pooled_difference_interval, a.unknown, b.unknown, ~comparisons.known_B),
    ):
        between = interval(x, y, SAMPLES, np.random.default_rng(SEED))
        found[name] = {
            "difference": value(x) - value(y) if x.users else None,
            "interval": between,
            "different": between is not None and not between.low <= 0 <= between.high,
            "win_rate": float(wins_B[rows].mean()) if rows is not None and rows.any() else None,
        }
    return found


def per_user(comparisons: Comparisons, baseline: Model, model: Model) -> dict[str, Any]:
    """Each known user's difference, its p-value by `sign_flip_test`, and after `holm` over users; largest first.

    better, worse: how many users' difference is significant at 5% after Holm.
    """
    difference_B = (model.right_SB.mean(axis=0) - baseline.right_SB.mean(axis=0))[comparisons.known_B]
    users_B = np.asarray(comparisons.users, dtype=object)[comparisons.known_B].astype(str)
    users, index, counts = np.unique(users_B, return_inverse=True, return_counts=True)
    rows = np.split(difference_B[np.argsort(index, kind="stable")], np.cumsum(counts)[:-1]) if len(users) else []
    flips, rng = max(FLIPS, 40 * len(users)), np.random.default_rng(SEED)
    p = np.array([sign_flip_test(differences, flips, rng) for differences in rows])
    table = [
        {"user": str(user), "n": len(d), "difference": float(d.mean()), "p": float(raw), "p_holm": float(adjusted)}
        for user, d, raw, adjusted in zip(users, rows, p, holm(p))
    ]
    table.sort(key=lambda row: -abs(row["difference"]))
    significant = [row["difference"] for row in table if row["p_holm"] <= LEVEL]
    return {"better": sum(d > 0 for d in significant), "worse": sum(d < 0 for d in significant), "users": table}


def compare(comparisons: Comparisons, models: list[Model]) -> dict[str, Any]:
    """The numbers of report.json."""
    baseline, *others = models
    return {
        "comparisons": {"known_users": int(comparisons.known_B.sum()), "unknown_users": int((~comparisons.known_B).sum())},
        "baseline": baseline.name,
        "models": {model.name: summary(comparisons, model) for model in models},
        "differences": {model.name: difference(comparisons, baseline, model) for model in others},
        "per_user": {model.name: per_user(comparisons, baseline, model) for model in others},
    }  # fmt: skip
