"""The statistics of an evaluation: accuracies per user and over users, with bootstrap intervals.

Definitions after the paper (section 5): Accuracy-top is the accuracy on all comparisons of known users, each with
their own user vectors; Accuracy-average is the mean (and standard deviation) over known users of each one's accuracy;
Accuracy-generic is the accuracy on comparisons of unknown users, with user 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """The 2.5th and 97.5th percentile of a bootstrap distribution."""

    low: float
    high: float


class UserCounts(NamedTuple):
    """What each user of a group got right: correct (users,), a tie counting one half, of n (users,)."""

    users: list[str]
    correct: np.ndarray
    n: np.ndarray

    def accuracy(self) -> np.ndarray:
        """Each user's accuracy."""
        return self.correct / self.n


def correct(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen response has the larger reward, 0 where the rejected one has, 1/2 for a tie."""
    return (margins > 0) + 0.5 * (margins == 0)


def by_user(users: Sequence[str], margins: np.ndarray) -> UserCounts:
    """Group margins by user, users in order of name."""
    names, index = np.unique(np.asarray(users, dtype=object).astype(str), return_inverse=True)
    right = np.bincount(index, weights=correct(margins), minlength=len(names))
    return UserCounts([str(name) for name in names], right, np.bincount(index, minlength=len(names)))


def pooled(counts: UserCounts) -> float | None:
    """Share of correct comparisons over all users; None where there is none."""
    return float(counts.correct.sum() / counts.n.sum()) if len(counts.users) else None


def bootstrap_over_users(
    statistic: Callable[[np.ndarray], np.ndarray], users: int, samples: int, rng: np.random.Generator
) -> Interval | None:
    """Percentile interval of a statistic when users are drawn with replacement; None for fewer than two users.

    statistic: (samples, users) counts of how often each user was drawn -> (samples,) values.
    """
    if users < 2:
        return None
    drawn = rng.multinomial(users, np.full(users, 1 / users), size=samples)
    return _interval(statistic(drawn))


def pooled_interval(counts: UserCounts, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of `pooled`, users resampled with all their comparisons."""
    return bootstrap_over_users(
        lambda drawn: (drawn @ counts.correct) / (drawn @ counts.n), len(counts.users), samples, rng
    )


def mean_interval(values: np.ndarray, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of a mean over users."""
    return bootstrap_over_users(lambda drawn: (drawn @ values) / len(values), len(values), samples, rng)


def std_interval(values: np.ndarray, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of the (population) standard deviation over users."""

    def std(drawn: np.ndarray) -> np.ndarray:
        mean = (drawn @ values) / len(values)
        return np.sqrt(np.maximum((drawn @ values**2) / len(values) - mean**2, 0))

    return bootstrap_over_users(std, len(values), samples, rng)


def worst_user_interval(counts: UserCounts, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of the lowest accuracy among users, each user's comparisons resampled (ties kept at one half)."""
    if not len(counts.users):
        return None
    drawn = rng.binomial(counts.n, counts.accuracy(), size=(samples, len(counts.users))) / counts.n
    return _interval(drawn.min(axis=1))


def difference_interval(a: UserCounts, b: UserCounts, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of pooled(a) - pooled(b) for two scorings of the same comparisons, users resampled together."""
    return bootstrap_over_users(
        lambda drawn: (drawn @ (a.correct - b.correct)) / (drawn @ a.n), len(a.users), samples, rng
    )


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))
