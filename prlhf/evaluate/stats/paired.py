"""Paired statistics of two or more models on the same comparisons: which differences are more than chance?

Models are compared on users, with all their comparisons, and on both models' answers to the same comparison. Every
random number comes from one seed, so that two identical models have identical numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prlhf.evaluate.stats.metrics import (
    UserCounts,
    accuracies,
    correct,
    distinct,
    holm,
    mean,
    mean_interval,
    pooled,
    pooled_difference_interval,
    pooled_interval,
    right_by_user,
    sign_flip_test,
    user_labels,
)

BOOTSTRAP_SAMPLES = 2000  # bootstrap samples
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
    """A model of one or more seeds: what each got `correct` (a known user as themselves), (seeds, B), what else its
    evaluation reported, by name, and whether it says that own_record explains the gain (None: it says nothing)."""

    name: str
    folders: list[str]
    right_SB: np.ndarray
    reported: list[dict[str, float | None]]
    explained: list[bool | None]


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
    accuracy, reported = over_seeds(seeds), over_seeds(model.reported)
    return {
        "folders": model.folders,
        "seeds": len(seeds),
        "accuracy": accuracy.mean,
        "std_over_seeds": accuracy.std,
        "reported": reported.mean,
        "reported_std_over_seeds": reported.std,
        "own_record_explains_gain": model.explained,  # of each seed
        "interval": {
            "top": pooled_interval(both.known, BOOTSTRAP_SAMPLES, np.random.default_rng(SEED)),
            "average_mean": mean_interval(both.known, BOOTSTRAP_SAMPLES, np.random.default_rng(SEED)),
            "generic": pooled_interval(both.unknown, BOOTSTRAP_SAMPLES, np.random.default_rng(SEED)),
        },
    }


class OverSeeds(NamedTuple):
    """Means and standard deviations (dividing by seeds - 1) over seeds, by name; None where a seed has no number."""

    mean: dict[str, float | None]
    std: dict[str, float | None]


def over_seeds(seeds: Sequence[Mapping[str, float | None]]) -> OverSeeds:
    """Each number's mean and standard deviation over seeds; no standard deviation of one seed."""
    found = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    means = {name: None if None in values else float(np.mean(values)) for name, values in found.items()}
    some = {name: len(values) > 1 and None not in values for name, values in found.items()}
    return OverSeeds(means, {name: float(np.std(found[name], ddof=1)) if some[name] else None for name in found})


def difference(comparisons: Comparisons, baseline: Model, model: Model) -> dict[str, Any]:
    """The model's accuracies less the baseline's, with intervals that resample users with both, and win rates.

    win_rate: share of comparisons that the model gets right more often (over seeds) than the baseline, 1/2 where equal.
    different: whether the interval leaves out 0. Its width is never 0, and two models that agree have a symmetric one.
    """
    right_B, baseline_B = (m.right_SB.mean(axis=0) for m in (model, baseline))
    a, b = groups(comparisons, right_B), groups(comparisons, baseline_B)
    wins_B = correct(np.round(right_B - baseline_B, 9))
    found = {}
    for name, value, x, y, rows in (
        ("top", pooled, a.known, b.known, comparisons.known_B),
        ("average_mean", mean, alike(a.known), alike(b.known), None),
        ("generic", pooled, a.unknown, b.unknown, ~comparisons.known_B),
    ):
        between = pooled_difference_interval(x, y, BOOTSTRAP_SAMPLES, np.random.default_rng(SEED))
        found[name] = {
            "difference": value(x) - value(y) if x.users else None,
            "interval": between,
            "different": between is not None and not between.low <= 0 <= between.high,
            "win_rate": float(wins_B[rows].mean()) if rows is not None and rows.any() else None,
        }
    return found


def alike(counts: UserCounts) -> UserCounts:
    """Users of the same accuracies who all have the mean number of comparisons: `pooled` of them is the `mean`."""
    n = counts.n.sum() / max(1, len(counts.n))
    return UserCounts(counts.users, n * counts.accuracy(), np.full(len(counts.n), n))


def per_user(comparisons: Comparisons, baseline: Model, model: Model) -> dict[str, Any]:
    """Each known user's difference, its p-value by `sign_flip_test`, and after `holm` over users; largest first.

    p is at least 1 / (1 + FLIPS), which with many users Holm's factor would lift above 5%: for more than FLIPS / 40 users it
    is the exact one, `exact_sign_flip_test`. Holm demands of each p-value alone that P(p <= x) <= x where the models are
    equal, and it holds for both tests, so it matters not which one a number of users calls for.

    better, worse: how many users' difference is significant at 5% after Holm.
    """
    difference_B = (model.right_SB.mean(axis=0) - baseline.right_SB.mean(axis=0))[comparisons.known_B]
    users, index = distinct(np.asarray(comparisons.users, dtype=object)[comparisons.known_B])
    counts = np.bincount(index, minlength=len(users))
    rows = np.split(difference_B[np.argsort(index, kind="stable")], np.cumsum(counts)[:-1]) if len(users) else []
    rng, step = np.random.default_rng(SEED), 0.5 / math.lcm(len(model.right_SB), len(baseline.right_SB))
    if 40 * len(users) <= FLIPS:
        p = np.array([sign_flip_test(differences, FLIPS, rng) for differences in rows])
    else:
        p = np.array([exact_sign_flip_test(differences, step) for differences in rows])
    table = [
        {"user": user, "n": len(d), "difference": float(d.mean()), "p": float(raw), "p_holm": float(adjusted)}
        for user, d, raw, adjusted in zip(users, rows, p, holm(p))
    ]
    table.sort(key=lambda row: -abs(row["difference"]))
    significant = [row["difference"] for row in table if row["p_holm"] <= LEVEL]
    return {"better": sum(d > 0 for d in significant), "worse": sum(d < 0 for d in significant), "users": table}


def exact_sign_flip_test(differences: np.ndarray, step: float) -> float:
    """P(|T*| >= |T|) of `sign_flip_test`, summed over all flips: T* has the distribution of a sum of binomials.

    The differences are whole multiples of `step`: 1/2 is a tie, and a mean over S seeds has S times as many. Each size v,
    k times, contributes v (2 Binomial(k, 1/2) - k), and the sum's probabilities are the convolution of theirs.
    """
    steps = np.round(differences / step).astype(int)
    sizes, counts = np.unique(np.abs(steps[steps != 0]), return_counts=True)
    p_T = np.ones(1)  # of T* = -n, 2 - n, ..., n steps, n the sum of the sizes
    for size, count in zip(sizes.tolist(), counts.tolist()):
        logs = [math.lgamma(count + 1) - math.lgamma(j + 1) - math.lgamma(count - j + 1) for j in range(count + 1)]
        of_size = np.zeros(size * count + 1)
        of_size[::size] = np.exp(np.array(logs) - count * math.log(2))
        p_T = np.convolve(p_T, of_size)
    sums = np.arange(len(p_T)) * 2 - (len(p_T) - 1)
    return min(1.0, float(p_T[np.abs(sums) >= abs(steps.sum())].sum()))


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
