"""Paired statistics of two or more models on the same comparisons: which differences are more than chance?

Models are compared on users, with all their comparisons, and on both models' answers to the same comparison. Every
random number comes from one seed, so that two identical models have identical numbers.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from prlhf.evaluate.stats import metrics
from prlhf.evaluate.stats.metrics import UserCounts, pooled_difference_interval, right_by_user

BOOTSTRAP_SAMPLES = 2000
FLIPS = 10_000  # sign flips of a user's test
SEED = 0
LEVEL = 0.05


class Comparisons(NamedTuple):
    """What was compared, in order of id: ids, users, hashes of the texts, and whether the model knows the user."""

    ids: list[str]
    users: list[str | None]
    texts: list[str]
    known_B: np.ndarray


class Model(NamedTuple):
    """A model of one or more seeds, each an evaluation."""

    name: str
    folders: list[str]
    right_SB: np.ndarray  # what each seed got `correct`, a known user as themselves
    reported: list[dict[str, float | None]]  # the other numbers, by name
    explained: list[bool | None]  # whether own_record explains the gain; None where the evaluation does not say


class Groups(NamedTuple):
    """What was right, by user: of known users, and of unknown users."""

    known: UserCounts
    unknown: UserCounts


def compare(comparisons: Comparisons, models: list[Model]) -> dict[str, Any]:
    """The numbers of report.json; the first model is the baseline."""
    baseline, *others = models
    known_B = comparisons.known_B
    return {
        "comparisons": {"known_users": int(known_B.sum()), "unknown_users": int((~known_B).sum())},
        "baseline": baseline.name,
        "models": {model.name: summary(comparisons, model) for model in models},
        "differences": {model.name: difference(comparisons, baseline, model) for model in others},
        "per_user": {model.name: per_user(comparisons, baseline, model) for model in others},
    }


def groups(comparisons: Comparisons, right_B: np.ndarray) -> Groups:
    """What is right, by user; each comparison without a user is a user of its own."""
    labels = np.asarray(metrics.user_labels(comparisons.users), dtype=object)
    return Groups(*(right_by_user(labels[rows], right_B[rows]) for rows in (comparisons.known_B, ~comparisons.known_B)))


def summary(comparisons: Comparisons, model: Model) -> dict[str, Any]:
    """Accuracies: mean and standard deviation over seeds, and the interval over users of the mean over seeds."""
    accuracy = over_seeds([metrics.accuracies(*groups(comparisons, right_B)) for right_B in model.right_SB])
    reported = over_seeds(model.reported)
    both = groups(comparisons, model.right_SB.mean(axis=0))
    return {
        "folders": model.folders,
        "seeds": len(model.right_SB),
        "accuracy": accuracy.mean,
        "std_over_seeds": accuracy.std,
        "reported": reported.mean,
        "reported_std_over_seeds": reported.std,
        "own_record_explains_gain": model.explained,  # of each seed
        "interval": {
            "top": metrics.pooled_interval(both.known, BOOTSTRAP_SAMPLES, _rng()),
            "average_mean": metrics.mean_interval(both.known, BOOTSTRAP_SAMPLES, _rng()),
            "generic": metrics.pooled_interval(both.unknown, BOOTSTRAP_SAMPLES, _rng()),
        },
    }


def _rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


class OverSeeds(NamedTuple):
    """Means and standard deviations (dividing by seeds - 1) over seeds, by name; None where a seed has no number."""

    mean: dict[str, float | None]
    std: dict[str, float | None]


def over_seeds(seeds: Sequence[Mapping[str, float | None]]) -> OverSeeds:
    """Each number's mean and standard deviation over seeds; no standard deviation of one seed."""
    found = OverSeeds({}, {})
    for name in seeds[0]:
        values = [seed[name] for seed in seeds]
        known = None not in values
        found.mean[name] = float(np.mean(values)) if known else None
        found.std[name] = float(np.std(values, ddof=1)) if known and len(values) > 1 else None
    return found


def difference(comparisons: Comparisons, baseline: Model, model: Model) -> dict[str, Any]:
    """The model's accuracies less the baseline's, with intervals that resample users with both, and win rates.

    win_rate: share of comparisons that the model gets right more often (over seeds) than the baseline, 1/2 where equal.
    different: whether the interval leaves out 0. Its width is never 0, and two models that agree have a symmetric one.
    """
    right_B, baseline_B = (m.right_SB.mean(axis=0) for m in (model, baseline))
    a, b = groups(comparisons, right_B), groups(comparisons, baseline_B)
    wins_B = metrics.correct(np.round(right_B - baseline_B, 9))
    found = {}
    for name, value, x, y, rows in (
        ("top", metrics.pooled, a.known, b.known, comparisons.known_B),
        ("average_mean", metrics.mean, alike(a.known), alike(b.known), None),
        ("generic", metrics.pooled, a.unknown, b.unknown, ~comparisons.known_B),
    ):
        interval = pooled_difference_interval(x, y, BOOTSTRAP_SAMPLES, _rng())
        found[name] = {
            "difference": value(x) - value(y) if x.users else None,
            "interval": interval,
            "different": interval is not None and not interval.low <= 0 <= interval.high,
            "win_rate": float(wins_B[rows].mean()) if rows is not None and rows.any() else None,
        }
    return found


def alike(counts: UserCounts) -> UserCounts:
    """Users of the same accuracies who all have the mean number of comparisons: `pooled` of them is the `mean`."""
    n = counts.n.sum() / max(1, len(counts.n))
    return UserCounts(counts.users, n * counts.accuracy(), np.full(len(counts.n), n))


def per_user(comparisons: Comparisons, baseline: Model, model: Model) -> dict[str, Any]:
    """Each known user's difference, its p-value, and that after `holm` over users; the largest difference first.

    p is that of `sign_flip_test`, at least 1 / (1 + FLIPS). With more than FLIPS / 40 users Holm's factor would lift that
    above 5%, and p is that of `exact_sign_flip_test`. better, worse: how many users' difference is significant at LEVEL.
    """
    difference_B = (model.right_SB.mean(axis=0) - baseline.right_SB.mean(axis=0))[comparisons.known_B]
    users, index = metrics.distinct(np.asarray(comparisons.users, dtype=object)[comparisons.known_B])
    order, counts = np.argsort(index, kind="stable"), np.bincount(index, minlength=len(users))
    rows = np.split(difference_B[order], np.cumsum(counts)[:-1]) if users else []
    if 40 * len(users) <= FLIPS:
        rng = _rng()
        p = [metrics.sign_flip_test(differences, FLIPS, rng) for differences in rows]
    else:
        step = 0.5 / math.lcm(len(model.right_SB), len(baseline.right_SB))
        # Of many users most share their differences, up to order, with others.
        tested = cache(lambda differences: metrics.exact_sign_flip_test(np.array(differences), step))
        p = [tested(tuple(np.sort(differences).tolist())) for differences in rows]
    table: list[dict[str, Any]] = [
        {"user": user, "n": len(d), "difference": float(d.mean()), "p": float(raw), "p_holm": float(adjusted)}
        for user, d, raw, adjusted in zip(users, rows, p, metrics.holm(np.array(p)))
    ]
    table.sort(key=lambda row: -abs(row["difference"]))
    significant = [row["difference"] for row in table if row["p_holm"] <= LEVEL]
    return {"better": sum(d > 0 for d in significant), "worse": sum(d < 0 for d in significant), "users": table}
