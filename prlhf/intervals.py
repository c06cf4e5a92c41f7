"""95% confidence intervals for accuracies of users who differ, honest for as few as ten users.

Users are the sample: a user's comparisons stand or fall together. For the accuracies of ten users in the simulations of
tests/test_statistics.py, the percentile bootstrap covers the truth in 88 to 91% of cases; with percentiles expanded as
Hesterberg (2015, arXiv 1411.5279) proposes, in 93 to 95%, less where accuracies are high and users of unequal size;
`ratio_interval`, which takes the bootstrap's standard error to Student's t on a variance-stabilising scale, in 95%. Where most
users are near 100% it is too sure: with accuracies drawn from Beta(4.5, 0.5) it covers the mean of ten users in 92% of cases, with
Beta(9, 1) in 93 to 94% (2,000 draws each, 5 to 60 comparisons a user).
"""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

MISSED = 0.05  # the share of 95% intervals that miss
Z = NormalDist().inv_cdf(1 - MISSED / 2)


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


def ratio_interval(
    numerator_U: np.ndarray, denominator_U: np.ndarray, samples: int, rng: np.random.Generator, accuracy: bool
) -> Interval | None:
    """Interval of r = sum of numerators / sum of denominators over U users; None for fewer than two users.

    None also where all users have the same ratio other than 0, which tells nothing of how they spread.

    accuracy: r is in [0, 1] and g(r) = arcsin(sqrt(r)), which stabilises a proportion's variance; else r is a
    difference of accuracies and g the identity. Users are drawn with replacement `samples` times, which gives r*, and

        g(r) +- t_{m-1, 0.975} sqrt(m / (m-1)) std(g(r*)),

    where sqrt(m / (m-1)) corrects the bootstrap's narrowness (Hesterberg 2015) and m = (sum d)^2 / sum d^2 is the
    effective number of users with denominators d (Kish 1965): U where all count the same.
    """
    users = len(numerator_U)
    if users < 2:
        return None
    to, back = (_arcsine, _from_arcsine) if accuracy else (np.asarray, _as_difference)
    ratio = float(numerator_U.sum() / denominator_U.sum())
    if ratio != 0 and np.allclose(numerator_U, ratio * denominator_U, rtol=1e-12):
        return None
    center = to(ratio)
    spread = float(to(_resampled(numerator_U, denominator_U, samples, rng)).std())
    effective = float(denominator_U.sum()) ** 2 / float((denominator_U.astype(float) ** 2).sum())
    half = 0.0
    if spread > 0:
        half = spread * math.sqrt(effective / (effective - 1)) * student_t_quantile(1 - MISSED / 2, effective - 1)
    return Interval(min(ratio, back(center - half)), max(ratio, back(center + half)))


def _resampled(
    numerator_U: np.ndarray, denominator_U: np.ndarray, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """The ratio in each of `samples` draws of U users with replacement, a block of draws at a time to bound memory."""
    users = len(numerator_U)
    block, ratios = max(1, 2_000_000 // users), []
    for start in range(0, samples, block):
        drawn = rng.multinomial(users, np.full(users, 1 / users), size=min(block, samples - start))
        ratios.append((drawn @ numerator_U) / (drawn @ denominator_U))
    return np.concatenate(ratios)


def std_interval(values_U: np.ndarray) -> Interval | None:
    """Interval of sigma, the standard deviation of an observed accuracy over all users of whom these U are a sample.

        exp(ln(c s^2) +- z c sqrt((k - (U-3)/U) / (U-1))) ^ (1/2),   c = U / (U - z),

    s^2 the unbiased variance, k the kurtosis with fourth powers about the median (Bonett 2006, Computational Statistics
    & Data Analysis 50; about the median, which is wider, after Niwitpong and Kirdwichai 2008). sigma contains the noise
    of each user's few comparisons, as the reported standard deviation does. At most 1/2, the most for accuracies. None
    for fewer than two users, and where all have the same accuracy, which tells nothing of how they spread.
    """
    users = len(values_U)
    if users < 2 or np.ptp(values_U) == 0:
        return None
    squares = ((values_U - values_U.mean()) ** 2).sum()
    kurtosis = users * ((values_U - np.median(values_U)) ** 4).sum() / squares**2
    c = users / (users - Z)
    middle = math.log(c * squares / (users - 1))
    half = Z * c * math.sqrt(max(0.0, kurtosis - (users - 3) / users) / (users - 1))
    return Interval(min(0.5, math.exp((middle - half) / 2)), min(0.5, math.exp((middle + half) / 2)))


def worst_user_interval(correct_U: np.ndarray, n_U: np.ndarray) -> Interval | None:
    """Interval of min_i p_i, the lowest true accuracy among these very users; None where there are none.

    From Clopper and Pearson's exact bounds of each user, [min_i low_i, min_i high_i]. low_i misses with 2.5%: it is
    enough that the worst user's own holds. high_i misses with 1 - 0.975^(1/U) (Sidak 1967): all must hold together.
    Conservative (it covers in more than 95% of cases), since bounds of discrete counts are, and since any user's bound
    may be the lowest.
    """
    if not len(n_U):
        return None
    pairs = [(float(k), int(n)) for k, n in zip(correct_U, n_U)]
    miss = 1 - (1 - MISSED / 2) ** (1 / len(pairs))
    return Interval(min(exact_bound(k, n, MISSED / 2) for k, n in pairs),
                    min(1 - exact_bound(n - k, n, miss) for k, n in pairs))  # fmt: skip


@cache
def exact_bound(correct: float, n: int, miss: float) -> float:
    """Clopper and Pearson's (1934) lower bound of a proportion, above the truth with probability `miss` at most.

    The `miss` quantile of Beta(k, n - k + 1), 0 for k = 0, where k = `correct` may be a half. The upper bound is 1 minus
    the lower bound of what is wrong.
    """
    return beta_quantile(miss, correct, n - correct + 1) if correct > 0 else 0.0


@cache
def student_t_quantile(q: float, freedom: float) -> float:
    """t with P(T <= t) = q > 1/2 for Student's T with `freedom` > 0 degrees of freedom, which need not be whole.

    From P(|T| > t) = I_x(freedom/2, 1/2), x = freedom / (freedom + t^2); infinite above 1e6.
    """

    def reached(t: float) -> bool:
        return beta_cdf(freedom / (freedom + t * t), freedom / 2, 0.5) < 2 * (1 - q)

    high = 4.0
    while not reached(high):
        high *= 2
        if high > 1e6:
            return math.inf
    return _bisect(reached, 0.0, high)


def beta_quantile(q: float, a: float, b: float) -> float:
    """x with I_x(a, b) = q."""
    return _bisect(lambda x: beta_cdf(x, a, b) >= q, 0.0, 1.0)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22) after Lentz."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - beta_cdf(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(1, 10_000):
        m = i // 2
        top = -(a + m) * (a + b + m) if i % 2 else m * (b - m)
        term = top * x / ((a + i - 1) * (a + i))
        c, d = _not_zero(1 + term / c), 1 / _not_zero(1 + term * d)
        fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return math.exp(front) / fraction


def _not_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300


def _bisect(reached: Callable[[float], bool], low: float, high: float) -> float:
    """The point between low and high from which on `reached` is true, to a relative 1e-10."""
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _arcsine(accuracy: float | np.ndarray) -> np.ndarray:
    return np.arcsin(np.sqrt(np.clip(accuracy, 0, 1)))


def _from_arcsine(value: float) -> float:
    return math.sin(min(max(value, 0.0), math.pi / 2)) ** 2


def _as_difference(value: float) -> float:
    return min(max(float(value), -1.0), 1.0)
