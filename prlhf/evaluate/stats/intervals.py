"""95% confidence intervals for accuracies of users who differ, honest for as few as ten users.

Users are the sample: a user's comparisons stand or fall together. What `ratio_interval` covers of the truth, in simulations
of 1,000 to 4,000 draws each (in part those of tests/test_statistics.py), for ten users unless said otherwise:

| truth | covered, % |
|---|---|
| accuracies of users who differ, 5 to 60 comparisons each | 95 to 96 (percentile bootstrap: 88 to 91) |
| users nearly all right: accuracies from Beta(9, 1) | 94 to 95 |
| Beta(4.5, 0.5) | 93 to 94; 40 users: 94 to 96 |
| Beta(2.25, 0.25): half above 97%, one in nine below 70% | 91 to 92, too sure; 40 users: 94 to 95 |
| sizes lognormal, sigma 1.5, accuracy falling with them: pooled | 85 to 90, too sure, as with 40 or 100 users; mean over users 96 to 97 |
| differences of two models | 94 to 96 |
| models that disagree in 2% of 14 comparisons of every user | 99.8, conservative; 40 users: 94 to 98 |
| the same of 5 to 60 comparisons | 94 to 99; 40 users: 92 to 97 |
| the same, rates from Beta(0.1, 4.9): a tenth of users have most | 73 (one model wins them all) to 100; 40 users: 83 to 99 |

So where few users make nearly all of a difference, or most of the comparisons, it is too sure: no sample that may lack them
shows it. The mean over users (Accuracy-average) does not mind who makes many comparisons.
`std_interval` (97%) and `worst_user_interval` (99.8%) are conservative by design.
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

    Users are drawn with replacement `samples` times, which gives r* and the variance V = m / (m-1) var(r*), where
    m / (m-1) corrects the bootstrap's narrowness (Hesterberg 2015) and m = (sum d)^2 / sum d^2 is the effective number of
    users with denominators d (Kish 1965): U where all count the same. t = t_{m-1, 0.975}.

    accuracy: r is in [0, 1], and the interval Clopper and Pearson's of r n right among n = r (1-r) / V (z / t)^2
    independent comparisons (Korn and Graubard 1998, Survey Methodology 24).

    Else r is a difference of accuracies, and the interval

        r +- t sqrt(m / (m-1) (var(r*) + 2 (s / sum d)^2)),

    as if each model alone were right in one comparison more: so few disagreements say little of how many there are, and
    none not that there are none (after Agresti and Min 2005, Statistics in Medicine 24, who add one half). s is the
    least difference of a user other than 0, at most 1: one comparison, where the denominators count these.

    Where all users have the same ratio other than a difference of 0, see `_alike_interval`.
    """
    if len(numerator_U) < 2:
        return None
    total = float(denominator_U.sum())
    ratio, effective = float(numerator_U.sum()) / total, total**2 / float((denominator_U.astype(float) ** 2).sum())
    if (accuracy or ratio != 0) and np.allclose(numerator_U, ratio * denominator_U, rtol=1e-12):
        return _alike_interval(ratio, effective, lowest=0.0 if accuracy else -1.0)
    variance = float(_resampled(numerator_U, denominator_U, samples, rng).var())
    widening = math.sqrt(effective / (effective - 1)) * student_t_quantile(1 - MISSED / 2, effective - 1)
    if accuracy:
        n = ratio * (1 - ratio) / variance * (Z / widening) ** 2
        return Interval(exact_bound(ratio * n, n, MISSED / 2), 1 - exact_bound(n - ratio * n, n, MISSED / 2))
    sizes_U = np.abs(numerator_U)
    least = min(1.0, sizes_U[sizes_U > 1e-9].min(initial=1.0))
    half = widening * math.sqrt(variance + 2 * (least / total) ** 2)
    return Interval(max(-1.0, ratio - half), min(1.0, ratio + half))


def _alike_interval(ratio: float, users: float, lowest: float) -> Interval | None:
    """Interval of a mean over users of whom all that were seen have this same ratio, which no resampling varies.

    Clopper and Pearson's (1934), a user being one draw: q^U >= 0.025 for the share q of such users, and the others have
    at least `lowest` and at most 1: [q r + (1 - q) lowest, q r + 1 - q]. Whatever ratios there are, it misses in fewer than
    0.025^((U-1)/U) < 5% of samples. None for fewer than six users, of whom all may agree by chance: the sign test's p-value
    2 / 2^U is above 5%.
    """
    if 2 ** (1 - users) > MISSED:
        return None
    q = exact_bound(users, users, MISSED / 2)
    return Interval(q * ratio + (1 - q) * lowest, q * ratio + 1 - q)


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
def exact_bound(correct: float, n: float, miss: float) -> float:
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
    """The point between low and high from which on `reached` is true, to a relative 1e-10, or below 1e-300."""
    while high - low > 1e-10 * high and high > 1e-300:
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
