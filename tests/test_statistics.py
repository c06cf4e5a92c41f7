"""Intervals and tests on simulated data whose truth is known: they miss as often as they say, or less.

Two intervals miss less by design: that of the standard deviation for few users, and the worst user's, which holds bounds for
every user at once.

The population: a user makes n comparisons, 5 to 60, uniformly; model a alone, b alone, both or neither are right with
probabilities of the user's own, from a Dirichlet distribution which is another for users of many comparisons. So users'
accuracies are beta distributed, users differ in size, and the pooled accuracy E[correct] / E[n] is not the mean over
users E[accuracy].
"""

import math
from typing import NamedTuple

import numpy as np
import pytest

from prlhf.evaluate.stats.intervals import (
    beta_cdf,
    beta_quantile,
    exact_bound,
    std_interval,
    student_t_quantile,
    worst_user_interval,
)
from prlhf.evaluate.stats.metrics import (
    UserCounts,
    holm,
    mean_interval,
    pooled_difference_interval,
    pooled_interval,
    sign_flip_test,
)
from prlhf.evaluate.stats.paired import alike

DRAWS = 1000
SAMPLES = 500
SIZES = np.arange(5, 61)
FEW, MANY = np.array([8, 6, 2, 4]), np.array([8, 4, 3, 5])  # both right, a alone, b alone, neither


class Draw(NamedTuple):
    """A sample of users: n comparisons each, of which both, only a, only b or neither are right."""

    p: np.ndarray  # (users, 4)
    outcomes: np.ndarray  # (users, 4)

    def counts(self, model: str) -> UserCounts:
        column = {"a": 1, "b": 2}[model]
        n = self.outcomes.sum(axis=1)
        return UserCounts([str(i) for i in range(len(n))], self.outcomes[:, 0] + self.outcomes[:, column], n)


class Truth(NamedTuple):
    """The population's values of the statistics, of model a or of a minus b."""

    pooled: float
    mean: float
    std: float
    pooled_difference: float
    mean_difference: float


def draw(users: int, rng: np.random.Generator) -> Draw:
    n = rng.choice(SIZES, size=users)
    gammas = rng.gamma(np.where((n > SIZES.mean())[:, None], MANY, FEW))
    p = gammas / gammas.sum(axis=1, keepdims=True)
    return Draw(p, rng.multinomial(n, p))


def truth() -> Truth:
    """By the beta distribution's moments, summed over the sizes. Var(k/n) = Var(p) + E[p (1-p)] / n for a given n."""
    alpha = np.where((SIZES.mean() < SIZES)[:, None], MANY, FEW)
    total = alpha.sum(axis=1)
    a, b = (alpha[:, 0] + alpha[:, column] for column in (1, 2))
    p, q = a / total, b / total
    variance = p * (1 - p) / (total + 1)
    second_moment = variance + p**2 + (p - p**2 - variance) / SIZES
    return Truth(
        pooled=(SIZES * p).sum() / SIZES.sum(),
        mean=p.mean(),
        std=math.sqrt(second_moment.mean() - p.mean() ** 2),
        pooled_difference=(SIZES * (p - q)).sum() / SIZES.sum(),
        mean_difference=(p - q).mean(),
    )


def covers(interval, value: float) -> bool:
    return interval.low <= value <= interval.high


INTERVALS = {
    "pooled": lambda d, rng: pooled_interval(d.counts("a"), SAMPLES, rng),
    "mean": lambda d, rng: mean_interval(d.counts("a"), SAMPLES, rng),
    "std": lambda d, rng: std_interval(d.counts("a").accuracy()),
    "pooled_difference": lambda d, rng: pooled_difference_interval(d.counts("a"), d.counts("b"), SAMPLES, rng),
    "mean_difference": lambda d, rng: pooled_difference_interval(
        alike(d.counts("a")), alike(d.counts("b")), SAMPLES, rng
    ),
}


@pytest.mark.parametrize("users", [10, 40])
@pytest.mark.parametrize("statistic", INTERVALS)
def test_intervals_over_users_cover_the_populations_value(statistic, users):
    rng = np.random.default_rng(0)
    value = getattr(truth(), statistic)
    covered = np.mean([covers(INTERVALS[statistic](draw(users, rng), rng), value) for _ in range(DRAWS)])
    print(f"{statistic}, {users} users: {covered:.3f}")
    assert 0.93 <= covered <= (0.985 if statistic == "std" else 0.97)  # std: conservative


@pytest.mark.parametrize("n", [14, None])
def test_an_interval_over_users_who_are_nearly_all_right_covers_their_mean(n):
    """Ten users' accuracies from Beta(4.5, 0.5): half of them are above 0.94, one in twelve is below 0.7."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(DRAWS):
        n_U = np.full(10, n) if n else rng.choice(SIZES, size=10)
        right_U = rng.binomial(n_U, rng.beta(4.5, 0.5, size=10)).astype(float)
        covered += covers(mean_interval(UserCounts([*"abcdefghij"], right_U, n_U), SAMPLES, rng), 0.9)
    print(f"mean of high accuracies, {n or '5 to 60'} comparisons: {covered / DRAWS:.3f}")
    assert 0.93 <= covered / DRAWS <= 0.97


def test_where_few_users_make_most_of_the_comparisons_and_are_right_least_the_mean_over_users_is_covered():
    """Sizes lognormal, mean log 2.5, deviation 1.5; logit accuracy falls by 0.5 a deviation. Pooled intervals are too sure."""
    rng = np.random.default_rng(1)

    def population(size):
        z = rng.standard_normal(size)
        return np.maximum(1, np.round(np.exp(2.5 + 1.5 * z))).astype(int), 1 / (1 + np.exp(0.5 * z - 0.8))

    n, mu = population(2_000_000)
    pooled_truth, mean_truth = (n * mu).sum() / n.sum(), mu.mean()
    covered = {"pooled": 0, "mean": 0}
    for _ in range(DRAWS):
        n, mu = population(40)
        right = rng.binomial(n, rng.beta(10 * mu, 10 * (1 - mu))).astype(float)
        counts = UserCounts([str(i) for i in range(40)], right, n)
        covered["pooled"] += covers(pooled_interval(counts, SAMPLES, rng), pooled_truth)
        covered["mean"] += covers(mean_interval(counts, SAMPLES, rng), mean_truth)
    assert 0.93 <= covered["mean"] / DRAWS <= 0.98 and 0.8 <= covered["pooled"] / DRAWS <= 0.92


@pytest.mark.parametrize("better, worse", [(0.015, 0.005), (0.02, 0.0), (0.01, 0.01)])
@pytest.mark.parametrize("users", [10, 40])
def test_a_difference_of_models_that_seldom_disagree_is_covered(users, better, worse):
    """In 2% of 14 comparisons a user, whoever it is. Conservative for few users, who have hardly a disagreement each."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(DRAWS):
        a, b, both, _ = rng.multinomial([14] * users, [better, worse, 0.7, 0.28], size=users).T.astype(float)
        names, n = list(map(str, range(users))), np.full(users, 14)
        found = pooled_difference_interval(UserCounts(names, both + a, n), UserCounts(names, both + b, n), SAMPLES, rng)
        covered += covers(found, better - worse)
    print(f"rare disagreement, {users} users, {better} and {worse}: {covered / DRAWS:.3f}")
    assert covered / DRAWS >= 0.93


@pytest.mark.parametrize("users", [10, 40])
def test_worst_user_interval_covers_these_users_lowest_true_accuracy(users):
    """Conservative: see `worst_user_interval`."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(DRAWS):
        sample = draw(users, rng)
        counts = sample.counts("a")
        covered += covers(worst_user_interval(counts.correct, counts.n), sample.p[:, :2].sum(axis=1).min())
    print(f"worst user, {users} users: {covered / DRAWS:.3f}")
    assert covered / DRAWS >= 0.93


def test_student_t_quantiles_are_those_of_tables():
    """Percentage points as in any table of Student's t; at freedom 1 (Cauchy) and 2 there are closed forms."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 39: 2.023, 120: 1.980}
    for freedom, expected in table.items():
        assert student_t_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-4)
    assert student_t_quantile(0.95, 7) == pytest.approx(1.895, abs=5e-4)
    assert student_t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)
    assert student_t_quantile(0.975, 2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-9)
    assert student_t_quantile(0.975, 0.01) == math.inf


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 7), (30, 4), (5, 200)])
def test_beta_cdf_is_the_binomials_tail(a, b):
    """I_x(a, b) = P(Binomial(a + b - 1, x) >= a) for whole a and b."""
    for x in (0.01, 0.2, 0.5, 0.9):
        tail = sum(math.comb(a + b - 1, k) * x**k * (1 - x) ** (a + b - 1 - k) for k in range(a, a + b))
        assert beta_cdf(x, a, b) == pytest.approx(tail, rel=1e-9, abs=1e-14)
    assert beta_cdf(beta_quantile(0.3, a, b), a, b) == pytest.approx(0.3, rel=1e-7)


def test_exact_bounds_are_clopper_and_pearsons():
    """8 of 10: 0.4439 to 0.9748 (Clopper and Pearson 1934); all of n: the lower bound is 0.025^(1/n)."""
    assert exact_bound(8, 10, 0.025) == pytest.approx(0.4439, abs=5e-5)
    assert 1 - exact_bound(2, 10, 0.025) == pytest.approx(0.9748, abs=5e-5)
    assert exact_bound(10, 10, 0.025) == pytest.approx(0.025**0.1)
    assert exact_bound(0, 10, 0.025) == 0
    assert exact_bound(1e-6, 1e-5, 0.025) < 1e-299  # about 0.025^(1e6)


def test_holm_keeps_the_familywise_error():
    """Ten users for whom two models are equally often right: at most 5% of evaluations call any user different."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(DRAWS):
        n = rng.choice(SIZES, size=10)
        users = [rng.choice([-1, 0, 1], size=size, p=[0.25, 0.5, 0.25]) for size in n]
        wrong += (holm(np.array([sign_flip_test(d, 999, rng) for d in users])) <= 0.05).any()
    print(f"family-wise error: {wrong / DRAWS:.3f}")
    assert wrong / DRAWS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / DRAWS)


def test_a_single_users_test_is_wrong_in_five_percent():
    """With five seeds averaged the sums have many values, and 5% is nearly reached."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(DRAWS):
        right = rng.random((2, 5, 40)) < 0.7
        wrong += sign_flip_test(right[0].mean(axis=0) - right[1].mean(axis=0), 999, rng) <= 0.05
    print(f"one user's error: {wrong / DRAWS:.3f}")
    assert 0.02 <= wrong / DRAWS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / DRAWS)
