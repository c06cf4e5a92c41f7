"""Evaluations of very many users: the bootstrap does little more for them, and no test is made twice."""

import json

import numpy as np
import pytest

from prlhf.config.keys import EvaluateConfig
from prlhf.data.comparisons import Comparison
from prlhf.evaluate import compare
from prlhf.evaluate.accuracy import summarize
from prlhf.evaluate.report import write_margins
from prlhf.evaluate.stats.intervals import DRAWN_SINGLY, _resampled
from prlhf.evaluate.stats.metrics import UserCounts, exact_sign_flip_test, mean_interval, pooled_interval


def resampled_one_by_one(numerator_U, denominator_U, samples, rng):
    """The bootstrap as it was for any number of users."""
    users = len(numerator_U)
    block, ratios = max(1, 2_000_000 // users), []
    for start in range(0, samples, block):
        drawn = rng.multinomial(users, np.full(users, 1 / users), size=min(block, samples - start))
        ratios.append((drawn @ numerator_U) / (drawn @ denominator_U))
    return np.concatenate(ratios)


def ratios(users, seed, sizes=(1, 60)):
    """Numerators and denominators of users: how many of their comparisons are right, by halves."""
    rng = np.random.default_rng(seed)
    n_U = rng.integers(*sizes, size=users)
    return rng.binomial(2 * n_U, rng.beta(4, 2, size=users)) / 2, n_U


@pytest.mark.parametrize("users", [2, 10, 60, DRAWN_SINGLY])
def test_few_users_are_drawn_as_ever(users):
    """To the last bit, whole counts or not, and the generator is left in the same state."""
    right_U, n_U = ratios(users, seed=users)
    for numerator_U, denominator_U in ((right_U, n_U), (right_U / n_U, np.ones(users)), (right_U / 3, n_U / 7)):
        one, other = np.random.default_rng(1), np.random.default_rng(1)
        expected = resampled_one_by_one(numerator_U, denominator_U, 2100, one)
        assert np.array_equal(_resampled(numerator_U, denominator_U, 2100, other), expected)
        assert one.random() == other.random()


@pytest.mark.parametrize("sizes", [(5, 6), (1, 8)])
def test_many_users_vary_as_users_drawn_one_by_one_do(sizes):
    """Var(r*) = sum (x_u - r d_u)^2 / (sum d)^2, exactly for equal d, else with an error of order 1/U (Cochran 1977, 6.4).
    20,000 draws give a variance to within 4 sqrt(2 / 20000) = 4%, and the mean to within 4 standard errors."""
    x_U, d_U = ratios(DRAWN_SINGLY + 500, seed=3, sizes=sizes)
    r = x_U.sum() / d_U.sum()
    variance = ((x_U - r * d_U) ** 2).sum() / d_U.sum() ** 2
    found = _resampled(x_U, d_U, 20_000, np.random.default_rng(0))
    assert found.var() == pytest.approx(variance, rel=0.04)
    assert found.mean() == pytest.approx(r, abs=4 * (variance / 20_000) ** 0.5)


class Counting:
    """A random generator that counts what it is asked for: the entries of all multinomial draws."""

    def __init__(self, rng):
        self.rng, self.entries = rng, 0

    def multinomial(self, n, p, size):
        self.entries += len(p) * size
        return self.rng.multinomial(n, p, size=size)


def test_the_bootstrap_draws_kinds_of_users():
    """Of 5 comparisons each a user is right in 0, 1/2, ... 5: 11 kinds, 11 numbers a draw, for any number of users."""
    for users in (2_000, 200_000):
        rng = Counting(np.random.default_rng(0))
        right_U, n_U = ratios(users, seed=1, sizes=(5, 6))
        counts = UserCounts([""] * users, right_U, n_U)
        found = pooled_interval(counts, 500, rng), mean_interval(counts, 500, rng)
        assert rng.entries <= 2 * 500 * 11
        for low, high in found:
            half = 1.96 * (right_U / 5).std() / users**0.5
            assert (low, high) == pytest.approx((right_U.mean() / 5 - half, right_U.mean() / 5 + half), abs=half / 5)


def evaluated(users):
    """The report of `users` known users of 5 comparisons each. User i is right in all but i mod 6."""
    labels = [f"user {i:05}" for i in range(users) for _ in range(5)]
    true = np.concatenate([np.where(np.arange(5) < i % 6, -1.0, 1.0) for i in range(users)])
    numbers = np.repeat(np.arange(users) + 1, 5).tolist()
    found = summarize(EvaluateConfig(bootstrap=200), np.stack([true, -true, np.roll(true, 3)]), numbers, labels)
    return {"checkpoint": "runs/x", "data": "y.jsonl", **found}


def test_an_evaluation_of_many_users_draws_little(monkeypatch):
    """Every interval of report.json together: 3,000 users of 5 comparisons take no more than 11 x 11 kinds each."""
    made, make = [], np.random.default_rng

    def counting(seed):
        made.append(Counting(make(seed)))
        return made[-1]

    monkeypatch.setattr(np.random, "default_rng", counting)
    report = evaluated(3_000)
    assert report["accuracy"]["top"] == pytest.approx(0.5) and len(report["per_user"]) == 3_000
    assert 0 < sum(rng.entries for rng in made) <= 8 * 200 * 121


def test_many_users_with_the_same_differences_are_tested_once(call, tmp_path, monkeypatch):
    """300 users whose four differences are +, +, -, 0 in any order: one test, p = 1."""
    calls = []

    def counted(differences, step):
        calls.append(differences)
        return exact_sign_flip_test(differences, step)

    monkeypatch.setattr("prlhf.evaluate.stats.metrics.exact_sign_flip_test", counted)
    rng = np.random.default_rng(0)
    base = np.tile([-1.0, -1.0, 1.0, 1.0], (300, 1))
    other = np.tile([1.0, 1.0, -1.0, 1.0], (300, 1))
    order = rng.permuted(np.tile(np.arange(4), (300, 1)), axis=1)
    names = [f"user {i:03}" for i in range(300) for _ in range(4)]
    comparisons = [Comparison("Hi?", f"yes {n}", f"no {n}", name, None, f"{n:04}") for n, name in enumerate(names)]
    for folder, margins in (("base", base), ("other", other)):
        (tmp_path / folder).mkdir()
        values = np.take_along_axis(margins, order, axis=1).ravel()
        write_margins(tmp_path / folder, comparisons, [True] * 1200, np.stack([values] * 3))
    models = (f"{name}={tmp_path / name}" for name in ("base", "other"))
    call(compare.main, *models, "--out", tmp_path / "out")
    users = json.loads((tmp_path / "out" / "report.json").read_text())["per_user"]["other"]["users"]
    assert len(calls) == 1 and {row["p"] for row in users} == {1.0}
