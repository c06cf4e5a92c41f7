import numpy as np
import pytest
import torch
from helpers import random_comparisons, tiny_config, tiny_model

from prlhf.evaluation import Scores, score_users, shuffled, summarize
from prlhf.losses import ResponseLogProbs
from prlhf.metrics import by_user, correct, pooled, pooled_interval, worst_user_interval


def test_a_tie_counts_one_half():
    assert correct(np.array([2.0, -1.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_by_user_by_hand():
    counts = by_user(["b", "a", "b", "b"], np.array([1.0, -1.0, 0.0, 3.0]))
    assert counts.users == ["a", "b"]
    assert counts.accuracy().tolist() == [0.0, 2.5 / 3]
    assert pooled(counts) == 2.5 / 4


def log_probs(margins):
    """Log-probs whose DPO margin against a reference of zeros is `margins`."""
    m = torch.tensor(margins, dtype=torch.float64)
    zeros, ones = torch.zeros_like(m), torch.ones_like(m)
    return ResponseLogProbs(m, zeros, ones, ones)


def summary(true, generic, other, users, names):
    reference = log_probs([0.0] * len(true))
    scores = Scores(log_probs(true), log_probs(generic), log_probs(other))
    return summarize(tiny_config("evaluate.bootstrap=500"), scores, reference, users, names)


def test_report_by_hand():
    """Users a (2 of 2 right) and b (1 of 4), three unknown comparisons (2 of 3) scored as the generic user."""
    users = [1, 1, 2, 2, 2, 2, 0, 0, 0]
    names = ["a", "a", "b", "b", "b", "b", "x", "x", None]
    true = [1, 1, 1, -1, -1, -1, 1, 1, -1]
    generic = [1, -1, 1, -1, -1, 1, 1, 1, -1]
    other = [-1, -1, -1, -1, -1, 0, 1, 1, -1]
    report = summary(true, generic, other, users, names)
    assert report["accuracy"]["top"] == 3 / 6
    assert report["accuracy"]["average_mean"] == pytest.approx((1 + 0.25) / 2)
    assert report["accuracy"]["average_std"] == pytest.approx(0.375)
    assert report["accuracy"]["worst_user"] == 0.25
    assert report["accuracy"]["generic"] == pytest.approx(2 / 3)
    assert report["controls"]["generic_user"]["accuracy"] == 3 / 6
    assert report["controls"]["shuffled_users"]["accuracy"] == pytest.approx(0.5 / 6)
    assert report["controls"]["gain_over_shuffled"]["accuracy"] == pytest.approx(2.5 / 6)
    assert report["per_user"]["b"] == {"n": 4, "accuracy": 0.25, "generic_user": 0.5, "shuffled_users": 0.125}
    assert set(report["interval"]) == set(report["accuracy"])


def test_nothing_to_count_is_null():
    only_unknown = summary([1.0], [1.0], [1.0], [0], [None])
    assert only_unknown["accuracy"] == {
        "top": None, "average_mean": None, "average_std": None, "generic": 1.0, "worst_user": None,
    }  # fmt: skip
    assert only_unknown["interval"]["top"] is None
    assert summary([1.0], [1.0], [1.0], [1], ["a"])["accuracy"]["generic"] is None


def test_pooled_interval_contains_the_truth_as_often_as_it_says():
    """40 users whose accuracies vary: the 95% interval of pooled accuracy covers the mean in about 95 of 100 draws."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        p = rng.beta(14, 6, size=40)
        n = np.full(40, 25)
        margins = np.concatenate([np.where(rng.random(25) < q, 1.0, -1.0) for q in p])
        interval = pooled_interval(by_user(np.repeat(np.arange(40), n).astype(str), margins), 400, rng)
        covered += interval.low <= 0.7 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


def test_worst_user_interval_of_perfect_users_is_one():
    counts = by_user(["a", "b"], np.array([1.0, 1.0]))
    assert worst_user_interval(counts, 100, np.random.default_rng(0)) == (1.0, 1.0)


def test_shuffled_ids_are_other_known_users_uniformly():
    users = [1, 2, 3, 0] * 3000
    other = shuffled(users, known=3, seed=0)
    assert all((o == 0) if u == 0 else (o in (1, 2, 3) and o != u) for u, o in zip(users, other))
    for u in (1, 2, 3):
        drawn = [o for v, o in zip(users, other) if v == u]
        for o in {1, 2, 3} - {u}:
            assert drawn.count(o) / len(drawn) == pytest.approx(0.5, abs=0.03)
    assert shuffled([1, 1, 0], known=1, seed=0) == [1, 1, 0]


def test_without_a_user_branch_known_users_are_scored_as_the_generic_user():
    """alpha = 0 leaves the offsets at their random start: they must not count against the vanilla arm."""
    comparisons = [c._replace(user=1 + i % 4) for i, c in enumerate(random_comparisons(4))]
    for alpha, same in ((0.0, True), (0.5, False)):
        config = tiny_config(f"loss.alpha={alpha}")
        scores = score_users(config, tiny_model(config), comparisons)
        assert torch.equal(scores.true_user.chosen, scores.generic_user.chosen) == same
