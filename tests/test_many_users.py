"""Evaluations of very many users: the bootstrap does little more for them, reports stay a page, and all are in users.csv."""

import csv
import json

import numpy as np
import pytest

from prlhf.config.keys import EvaluateConfig
from prlhf.data.comparisons import Comparison
from prlhf.evaluate import compare
from prlhf.evaluate.accuracy import summarize
from prlhf.evaluate.report import markdown, write_margins, write_report
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


def rows_of(text):
    return [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| user ")]


def test_the_report_shows_the_worst_and_the_best_and_the_file_has_all(tmp_path):
    """100 users: i mod 6 = 5 has none right (5, 11, ...: 16 users), then 4 (4, 10, ...); 0 has all (0, 6, ...: 17), then 1."""
    report = evaluated(100)
    text = markdown(report)
    expected = [*range(5, 100, 6), *(4, 10, 16, 22), *(13, 7, 1), *range(96, -1, -6)]
    assert rows_of(text)[1:] == [f"user {i:05}" for i in expected]  # after the header
    assert "The 20 worst and the 20 best of 100 users; users.csv has the other 60 too." in text
    report["per_user"] |= {'a "b", c\nd': {"n": 1, "accuracy": 1 / 3, "generic_user": 0.0, "shuffled_users": None}}
    write_report(report, tmp_path)
    with open(tmp_path / "users.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 101 and list(rows[0]) == ["user", "n", "accuracy", "generic_user", "shuffled_users"]
    assert rows[3] == {
        "user": "user 00003",
        "n": "5",
        "accuracy": "0.4",
        "generic_user": "0.6",
        "shuffled_users": "0.6",
    }
    assert rows[-1]["user"] == 'a "b", c\nd' and float(rows[-1]["accuracy"]) == 1 / 3 and not rows[-1]["shuffled_users"]
    assert len(json.loads((tmp_path / "report.json").read_text())["per_user"]) == 101


def test_of_equal_users_those_with_more_comparisons_are_shown():
    report = evaluated(60)
    for row in report["per_user"].values():
        row["accuracy"] = 0.5
    report["per_user"]["user 00044"]["n"] = 9
    assert rows_of(markdown(report))[1] == "user 00044"


def test_forty_users_are_all_shown_in_order():
    text = markdown(evaluated(40))
    assert rows_of(text)[1:] == [f"user {i:05}" for i in range(40)] and "users.csv" not in text


def test_a_comparison_shows_the_worst_and_the_best_and_the_file_has_all(call, tmp_path):
    """300 users of 4: user i loses i mod 5 comparisons of those that the baseline has right, or wins them if i is odd."""
    names = [f"user {i:03}" for i in range(300) for _ in range(4)]
    comparisons = [Comparison("Hi?", f"yes {n}", f"no {n}", name, None, str(n)) for n, name in enumerate(names)]
    base = np.repeat(np.where(np.arange(300) % 2, -1.0, 1.0), 4)
    changed = np.concatenate([np.arange(4) < i % 5 for i in range(300)])
    for folder, margins in (("base", base), ("other", np.where(changed, -base, base))):
        (tmp_path / folder).mkdir()
        write_margins(tmp_path / folder, comparisons, [True] * 1200, np.stack([margins] * 3))
    models = (f"{name}={tmp_path / name}" for name in ("base", "other"))
    status, out, _ = call(compare.main, *models, "--out", tmp_path / "out")
    shown = rows_of(out)[1:]
    assert status == 0 and len(shown) == 40 and "The 20 worst and the 20 best of 300 users" in out
    assert shown[:20] == [f"user {i:03}" for i in range(4, 200, 10)]  # even, 4 of 5 lost: -1
    assert shown[20:] == [f"user {i:03}" for i in range(199, 0, -10)]  # odd, 4 won: +1
    with open(tmp_path / "out" / "users.csv", encoding="utf-8", newline="") as file:
        rows = {row["user"]: row for row in csv.DictReader(file)}
    assert len(rows) == 300 and rows["user 003"]["model"] == "other" and float(rows["user 003"]["difference"]) == 0.75
    assert float(rows["user 003"]["p"]) == pytest.approx(2 * 0.5**3)  # all three differences one way


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
