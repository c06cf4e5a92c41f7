"""95% confidence intervals for accuracies of users who differ, honest for as few as ten users.

Users are the sample: a user's comparisons stand or fall together. docs/evaluation.md says how much of the truth each
interval covers in simulations, and where one is too sure; tests/test_statistics.py holds most of these numbers.
"""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

MISSED = 0.05  # the share of 95% intervals that miss
Z = NormalDist().inv_cdf(1 - MISSED / 2)
DRAWN_SINGLY = 1000  # so many users at most are drawn one by one


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


def ratio_interval(
    numerator_U: np.ndarray, denominator_U: np.ndarray, samples: int, rng: np.random.Generator, accuracy: bool
) -> Interval | None:
    """Interval of r = sum of numerators / sum of denominators over U users; None for fewer than two users.

    Users are drawn with replacement `samples` times, which gives r* and V = m / (m-1) var(r*). The factor corrects the
    bootstrap's narrowness (Hesterberg 2015); m = (sum d)^2 / sum d^2 is the effective number of users with denominators d
    (Kish 1965), U where all are equal. t = t_{m-1, 0.975}.

    accuracy: r is in [0, 1]. The interval is Clopper and Pearson's of r n right among n = r (1-r) / V (z / t)^2
    independent comparisons (Korn and Graubard 1998, Survey Methodology 24); U of U where all users are all right or wrong.

    Else r is a difference of accuracies, and the interval r +- t sqrt(m / (m-1) (var(r*) + 2 (s / sum d)^2)), as if each
    model alone were right in one comparison more, since few disagreements tell little about how many there are (after
    Agresti and Min 2005, Statistics in Medicine 24, who add one half). s, one comparison, is the least difference of a
    user other than 0, at most 1.

    `_alike_interval` stands for both where all users have one ratio that is not 0 (nor 1, of accuracies).
    """
    users = len(numerator_U)
    if users < 2:
        return None
    total = float(denominator_U.sum())
    ratio = float(numerator_U.sum()) / total
    effective = total**2 / float((denominator_U.astype(float) ** 2).sum())
    if accuracy and ratio in (0, 1):
        return exact_interval(ratio * users, users)
    if (accuracy or ratio != 0) and np.allclose(numerator_U, ratio * denominator_U, rtol=1e-12):
        return _alike_interval(ratio, effective, lowest=0.0 if accuracy else -1.0)
    variance = float(_resampled(numerator_U, denominator_U, samples, rng).var())
    widening = math.sqrt(effective / (effective - 1)) * student_t_quantile(1 - MISSED / 2, effective - 1)
    if accuracy:
        n = ratio * (1 - ratio) / variance * (Z / widening) ** 2
        return exact_interval(ratio * n, n)
    sizes_U = np.abs(numerator_U)
    least = min(1.0, sizes_U[sizes_U > 1e-9].min(initial=1.0))
    half = widening * math.sqrt(variance + 2 * (least / total) ** 2)
    return Interval(max(-1.0, ratio - half), min(1.0, ratio + half))


def _alike_interval(ratio: float, users: float, lowest: float) -> Interval | None:
    """Interval of a mean over users where all users seen have the same ratio r, so that resampling does not vary it.

    q^U >= 0.025 bounds the share q of users with ratio r (Clopper and Pearson 1934). The others have at least `lowest`
    and at most 1: [q r + (1 - q) lowest, q r + 1 - q]. None for fewer than six users, who may all agree by chance: the
    sign test's p-value 2 / 2^U is above 5%.
    """
    if 2 ** (1 - users) > MISSED:
        return None
    q = exact_bound(users, users, MISSED / 2)
    return Interval(q * ratio + (1 - q) * lowest, q * ratio + 1 - q)


def _resampled(
    numerator_U: np.ndarray, denominator_U: np.ndarray, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """The ratio in each of `samples` draws of U users with replacement, in blocks that bound the memory.

    Users of the same numerator and denominator are exchangeable, so only how many of each kind are drawn matters: among
    many users, that is drawn at once. Few users are drawn one by one, which keeps the draws that published numbers have.
    """
    users = len(numerator_U)
    counts = np.ones(users, dtype=int)
    if users > DRAWN_SINGLY:
        kinds, counts = np.unique(np.stack([numerator_U, denominator_U]), axis=1, return_counts=True)
        numerator_U, denominator_U = kinds
    block, ratios = max(1, 2_000_000 // len(counts)), []
    for start in range(0, samples, block):
        drawn = rng.multinomial(users, counts / users, size=min(block, samples - start))
        ratios.append((drawn @ numerator_U) / (drawn @ denominator_U))
    return np.concatenate(ratios)


def std_interval(values_U: np.ndarray) -> Interval | None:
    """Interval of sigma, the standard deviation of observed accuracies over all users of whom these U are a sample:

        exp(ln(c s^2) +- z c sqrt((k - (U-3)/U) / (U-1))) ^ (1/2),   c = U / (U - z),   at most 1/2,

    s^2 the unbiased variance, k the kurtosis about the median (Bonett 2006, Computational Statistics & Data Analysis 50;
    the median, which is wider, after Niwitpong and Kirdwichai 2008). sigma contains the noise of each user's few
    comparisons. None for fewer than two users, and where all have the same accuracy.
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

    [min_i low_i, min_i high_i], with Clopper and Pearson's bounds of each user. low_i misses with 2.5%: only the worst
    user's must hold. high_i misses with 1 - 0.975^(1/U) (Sidak 1967): all must hold together. Conservative.
    """
    if not len(n_U):
        return None
    pairs = {(float(k), int(n)) for k, n in zip(correct_U, n_U)}
    miss = 1 - (1 - MISSED / 2) ** (1 / len(n_U))
    low = min(exact_bound(k, n, MISSED / 2) for k, n in pairs)
    return Interval(low, min(1 - exact_bound(n - k, n, miss) for k, n in pairs))


def exact_interval(correct: float, n: float) -> Interval:
    """Clopper and Pearson's (1934) interval of a proportion, `correct` of `n` independent comparisons."""
    return Interval(exact_bound(correct, n, MISSED / 2), 1 - exact_bound(n - correct, n, MISSED / 2))


@cache
def exact_bound(correct: float, n: float, miss: float) -> float:
    """Clopper and Pearson's lower bound of a proportion, above the truth with probability `miss` at most.

    The `miss` quantile of Beta(k, n - k + 1) for k = `correct`, which need not be whole; 0 for k = 0.
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
    """The point between low and high from which on `reached` is true, to a relative 1e-10, or below 1e-300."""
    while high - low > 1e-10 * high and high > 1e-300:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
