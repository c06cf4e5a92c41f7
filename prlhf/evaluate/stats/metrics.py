"""The statistics of an evaluation: accuracies per user and over users, calibration, and tests of differences.

Definitions after the paper (section 5): Accuracy-top is the accuracy on all comparisons of known users, each with
their own user vectors. Accuracy-average is the mean (and standard deviation) over known users of each one's accuracy.
Accuracy-generic is the accuracy on comparisons of unknown users, with user 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prlhf.evaluate.stats.intervals import Interval, ratio_interval


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


def user_labels(names: Sequence[str | None]) -> list[str]:
    """The users' names; each comparison without a user gets a name of its own."""
    return [name or f"unnamed {i}" for i, name in enumerate(names)]


def distinct(users: Sequence[str] | np.ndarray) -> tuple[list[str], np.ndarray]:
    """The distinct users in order of name, and the index of each entry's user among them."""
    names = sorted(set(users))  # np.unique would take names for equal that differ in a last \0
    number = {name: i for i, name in enumerate(names)}
    return names, np.fromiter(map(number.__getitem__, users), dtype=int, count=len(users))


def by_user(users: Sequence[str] | np.ndarray, margins: np.ndarray) -> UserCounts:
    """Group margins by user, users in order of name."""
    return right_by_user(users, correct(margins))


def right_by_user(users: Sequence[str] | np.ndarray, right: np.ndarray) -> UserCounts:
    """As `by_user`, from what is `correct` of each comparison (or its mean over seeds)."""
    names, index = distinct(users)
    sums = np.bincount(index, weights=right, minlength=len(names))
    return UserCounts(names, sums, np.bincount(index, minlength=len(names)))


def pooled(counts: UserCounts) -> float | None:
    """Share of correct comparisons over all users; None where there is none."""
    return float(counts.correct.sum() / counts.n.sum()) if counts.users else None


def mean(counts: UserCounts) -> float | None:
    """Mean over users of each one's accuracy; None where there is none."""
    return float(counts.accuracy().mean()) if counts.users else None


def accuracies(known: UserCounts, unknown: UserCounts) -> dict[str, float | None]:
    """The headline numbers of known users with their own vectors, and of unknown users; None where there is nobody.

    average_std divides by the number of users; worst_user is the lowest accuracy of a known user.
    """
    of_users = known.accuracy()
    return {
        "top": pooled(known),
        "average_mean": mean(known),
        "average_std": float(of_users.std()) if known.users else None,
        "generic": pooled(unknown),
        "worst_user": float(of_users.min()) if known.users else None,
    }


def pooled_interval(counts: UserCounts, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of `pooled` over the users there could have been, E[correct] / E[n], by `ratio_interval`."""
    return ratio_interval(counts.correct, counts.n, samples, rng, accuracy=True)


def mean_interval(counts: UserCounts, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of `mean` over the users there could have been, E[accuracy], by `ratio_interval`."""
    return ratio_interval(counts.accuracy(), np.ones(len(counts.n)), samples, rng, accuracy=True)


def pooled_difference_interval(a: UserCounts, b: UserCounts, samples: int, rng: np.random.Generator) -> Interval | None:
    """Interval of pooled(a) - pooled(b) for two scorings of the same comparisons, users resampled with both."""
    return ratio_interval(a.correct - b.correct, a.n, samples, rng, accuracy=False)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """s(x) = 1 / (1 + exp(-x)), which does not overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def expected_calibration_error(margins: np.ndarray, bins: int = 15) -> float | None:
    """ECE = sum over bins of |bin| / n * |accuracy - mean confidence| (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    The model says that the chosen response wins with p = sigma(margin). Its confidence is max(p, 1 - p), in `bins` bins of
    equal width on [1/2, 1], open to the left; it is right where p > 1/2, one half for a tie. None for no comparisons.
    """
    if not len(margins):
        return None
    confidence = sigmoid(np.abs(margins))
    index = np.clip(np.ceil((confidence - 0.5) * 2 * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=correct(margins) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(margins))


def sign_flip_test(differences: np.ndarray, samples: int, rng: np.random.Generator) -> float:
    """P-value of a paired permutation test: (1 + #{|T*| >= |T|}) / (1 + samples), T the sum of the differences.

    Under the null hypothesis either model could have been either, so T* flips each difference's sign at random (Good
    2005, Permutation, Parametric and Bootstrap Tests of Hypotheses). k differences of one size v are flipped at once:
    v (2 Binomial(k, 1/2) - k).
    """
    sizes, counts = np.unique(np.round(np.abs(differences[differences != 0]), 9), return_counts=True)
    flipped = (2 * rng.binomial(counts, 0.5, size=(samples, len(sizes))) - counts) @ sizes
    return float((1 + (np.abs(flipped) >= abs(differences.sum()) - 1e-6).sum()) / (1 + samples))


def exact_sign_flip_test(differences: np.ndarray, step: float) -> float:
    """P(|T*| >= |T|) of `sign_flip_test` over all flips: T* has the distribution of a sum of binomials.

    The differences are whole multiples of `step`: 1/2 for a tie, and S times finer for a mean over S seeds. k differences
    of one size v contribute v (2 Binomial(k, 1/2) - k); the distribution of their sum is the convolution of theirs.
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


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values adjusted for there being m of them: the j-th smallest becomes max over i <= j of min(1, (m - i + 1) p_(i)).

    Keeps the probability of any false rejection at the level (Holm 1979, Scandinavian Journal of Statistics 6).
    """
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)))
    return adjusted
