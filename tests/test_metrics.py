import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import random_comparisons, tiny_config, tiny_model

from prlhf.data.check.rules import fit
from prlhf.data.comparisons import Comparison
from prlhf.data.sets.splits import Shares, judged, split_by_response
from prlhf.evaluate.accuracy import Scores, reward_margins, score_users, shuffled, summarize
from prlhf.evaluate.report import accuracy_curve, markdown, write_margins, write_report
from prlhf.evaluate.stats.intervals import std_interval, worst_user_interval
from prlhf.evaluate.stats.metrics import (
    by_user,
    correct,
    exact_sign_flip_test,
    expected_calibration_error,
    holm,
    mean_interval,
    pooled,
    pooled_difference_interval,
    pooled_interval,
    sign_flip_test,
)
from prlhf.evaluate.stats.paired import alike
from prlhf.method.losses import ResponseLogProbs
from prlhf.score.task import Task


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


def summary(true, generic, other, users, names, rules=None):
    reference = log_probs([0.0] * len(true))
    scores = Scores(log_probs(true), log_probs(generic), log_probs(other))
    config = tiny_config("evaluate.bootstrap=500")
    margins = reward_margins(Task(config, None, (), reference), scores)
    return summarize(config.evaluate, margins, users, names, rules)


def test_users_whose_names_differ_in_what_cannot_be_seen_are_different():
    counts = by_user(["a", "a\0", "a "], np.array([1.0, -1.0, 1.0]))
    assert counts.users == ["a", "a\0", "a "] and counts.correct.tolist() == [1, 0, 1]


def test_report_by_hand():
    """Users a (2 of 2 right) and b (1 of 4), three unknown comparisons (2 of 3) scored as the generic user."""
    users = [1, 1, 2, 2, 2, 2, 0, 0, 0]
    names = ["a", "a", "b", "b", "b", "b", "x", "x", None]
    true = [1, 1, 1, -1, -1, -1, 1, 1, -1]
    generic = [1, -1, 1, -1, -1, 1, 1, 1, -1]
    other = [-1, -1, -1, -1, -1, 0, 1, 1, -1]
    rules = {"longer": [1, 1, 0.5, 0, 0, 0, 1, 0, 0]}
    report = summary(true, generic, other, users, names, rules)
    assert report["accuracy"]["top"] == 3 / 6
    assert report["accuracy"]["average_mean"] == pytest.approx((1 + 0.25) / 2)
    assert report["accuracy"]["average_std"] == pytest.approx(0.375)
    assert report["accuracy"]["worst_user"] == 0.25
    assert report["accuracy"]["generic"] == pytest.approx(2 / 3)
    assert report["controls"]["generic_user"]["accuracy"] == 3 / 6
    assert report["controls"]["shuffled_users"]["accuracy"] == pytest.approx(0.5 / 6)
    gains = [report["controls"][k]["accuracy"] for k in ("gain_over_generic", "placebo_gain", "personalisation_gain")]
    assert gains == pytest.approx([0, -2.5 / 6, 2.5 / 6])
    assert report["rules"] == {"longer": {"known_users": 2.5 / 6, "unknown_users": pytest.approx(1 / 3)}}
    assert report["per_user"]["b"] == {"n": 4, "accuracy": 0.25, "generic_user": 0.5, "shuffled_users": 0.125}
    assert set(report["interval"]) == set(report["accuracy"])
    for name, value in report["accuracy"].items():
        low, high = report["interval"][name]
        assert 0 <= low <= value <= high <= 1, name
    text = markdown({"checkpoint": "c", "data": "d", **report})
    assert "| Personalisation gain: the first less the placebo | 41.67 |" in text
    assert "| this model | 50.00 | 66.67 |" in text
    assert "| the response with more words wins | 41.67 | 33.33 |" in text
    without_rules = markdown({"checkpoint": "c", "data": "d", **summary(true, generic, other, users, names)})
    assert "trivial rules" not in without_rules


def own_summary(own, true, generic, users, known=True):
    """The report, and its text, where the rule own_record gets `own` right of the comparisons of these (known) users."""
    numbers = [1 + sorted(set(users)).index(user) if known else 0 for user in users]
    report = summary(true, generic, generic, numbers, users, {"own_record": own})
    return report, markdown({"checkpoint": "c", "data": "d", **report})


EIGHT = [f"u{i}" for i in range(8) for _ in range(3)]  # three comparisons each: the rule decides, decides, is silent


def test_a_gain_only_where_the_rule_decides_is_explained_by_it():
    """The gain is 1 where the rule decides and 0 elsewhere: 2/3 over all. Eight users without a difference in 8 comparisons:
    +- t_7 sqrt(8 / 7 * 2) / 8 with t_7 = 2.365."""
    report, text = own_summary([1, 1, 0.5] * 8, [1.0, 1.0, 1.0] * 8, [-1.0, -1.0, 1.0] * 8, EIGHT)
    found = report["own_record"]
    assert report["controls"]["gain_over_generic"]["accuracy"] == pytest.approx(2 / 3)
    assert (found["decided"], found["accuracy"]) == (pytest.approx(2 / 3), pytest.approx(2.5 / 3))
    gains = found["gain_over_generic"]
    assert (gains["where_it_decides"]["accuracy"], gains["where_it_decides"]["comparisons"]) == (1, 16)
    assert (gains["where_it_does_not"]["accuracy"], gains["where_it_does_not"]["comparisons"]) == (0, 8)
    half = 2.365 * math.sqrt(8 / 7 * 2) / 8
    assert gains["where_it_does_not"]["interval"] == pytest.approx((-half, half), abs=1e-4)
    q = 0.025 ** (1 / 8)  # all alike, see `test_many_users_who_are_all_equal_by_hand`
    assert gains["where_it_decides"]["interval"] == pytest.approx((2 * q - 1, 1))
    assert found["explains_gain"] is True
    lines = text.splitlines()
    controls = next(i for i, line in enumerate(lines) if line.startswith("| Personalisation gain"))
    assert lines[controls + 1] == "" and lines[controls + 2] == (
        "A rule that only remembers each user's own record of the two responses in training (own_record) decides 66.67% of "
        "known users' comparisons and reaches 83.33%; this model reaches 100.00%. The gain of the true over the generic user "
        "is 100.00 (interval 26.12 to 100.00, 16 comparisons) where the rule decides, and 0.00 (interval -44.69 to 44.69, "
        "8 comparisons) where it does not. So the rule can explain all of the gain: where it is silent, none is shown."
    )


@pytest.mark.parametrize(
    "own, true, generic, explains, said",
    [
        # Silent in the third comparison of each: the gain there is 1, from 2 * 0.025^(1/8) - 1 = 26% on.
        ([1, 1, 0.5], [1, 1, 1], [-1, -1, -1], False, "does not explain the gain: most of it lies, or one is shown, where it is silent."),
        ([1, 1, 1], [1, 1, 1], [-1, -1, 1], True, "not known (0 comparisons) where it does not. So the rule can explain all of the gain"),
        ([0, 0, 1], [1, 1, 1], [-1, -1, 1], False, "does not explain the gain: it is right on no more than half."),
        ([1, 1, 0.5], [1, 1, 1], [1, 1, 1], False, "There is no gain to explain."),
        ([0.5, 0.5, 0.5], [1, 1, 1], [-1, -1, 1], False, "decides nothing here: there is nothing to remember."),
    ],
)  # fmt: skip
def test_when_the_own_record_explains_a_gain(own, true, generic, explains, said):
    report, text = own_summary(own * 8, [float(m) for m in true] * 8, [float(m) for m in generic] * 8, EIGHT)
    assert report["own_record"]["explains_gain"] is explains
    assert said in text


def test_a_silent_comparison_of_one_user_shows_no_gain():
    users = ["a", "a", "b", "b"]
    report, text = own_summary([1, 0.5, 1, 1], [1.0] * 4, [-1.0] * 4, users)
    assert report["own_record"]["gain_over_generic"]["where_it_does_not"] == {
        "accuracy": 1, "interval": None, "comparisons": 1
    }  # fmt: skip
    assert report["own_record"]["explains_gain"] is True
    assert "and 100.00 (no interval, 1 comparison) where it does not. So the rule can explain all of the gain" in text


def test_the_own_record_where_nothing_is_known_of_it():
    report, text = own_summary([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], ["x", "y"], known=False)
    assert report["own_record"] is None and "remembers" not in text  # no known users
    report = summary([1.0], [1.0], [1.0], [1], ["a"], {"longer": [1.0]})
    assert report["own_record"] is None
    text = markdown({"checkpoint": "c", "data": "d", **report})
    assert "may explain the gain: not known, for the training comparisons are not there." in text


VOTERS = [f"voter{i}" for i in range(8)]


def voters_pairs(likes="abcd", dislikes="wxyz"):
    """Eight voters who agreed with the same four statements and disagreed with four: all sixteen pairs of each."""
    pairs = [(voter, good, bad) for voter in VOTERS for good in likes for bad in dislikes]
    return [Comparison("Agree?", good, bad, voter, None, f"{voter} {good}{bad}") for voter, good, bad in pairs]


def told(train, held_out):
    """The report on a model that knows everything of its known users, and nothing, a coin's worth, as the generic user."""
    rules = fit(train).right(held_out)
    true, generic = [1.0] * len(held_out), [1.0, -1.0] * (len(held_out) // 2)
    users = [1 + VOTERS.index(c.user) for c in held_out]
    report = summary(true, generic, generic, users, [c.user for c in held_out], rules)
    return report, markdown({"checkpoint": "c", "data": "d", **report})


def test_pairs_of_votes_that_are_divided_by_pair_are_remembered():
    """Held out are aw, bx, cy and dz of each: each response has three pairs left in training, a record of +3 or -3."""
    pairs = voters_pairs()
    held_out = [c for c in pairs if c.chosen + c.rejected in ("aw", "bx", "cy", "dz")]
    report, text = told([c for c in pairs if c not in held_out], held_out)
    assert report["rules"]["own_record"]["known_users"] == 1
    assert report["own_record"]["decided"] == 1 and report["own_record"]["explains_gain"] is True
    assert "So the rule can explain all of the gain" in text


def test_the_same_votes_divided_by_response_cannot_be_remembered():
    pairs = voters_pairs()
    records = [{"id": c.id, "user": c.user} for c in pairs]
    # 5 of a voter's 8 statements are trained on: 4 + 1, 3 + 2, 2 + 3 or 1 + 4 of either kind, and 4 or 6 of the pairs.
    made = split_by_response(records, [judged(c) for c in pairs], Shares(1.0, 0.7), seed=0)
    by_id = {c.id: c for c in pairs}
    held_out = [by_id[record["id"]] for record in made.valid]
    report, text = told([by_id[record["id"]] for record in made.train], held_out)
    assert len(held_out) > 8 and report["rules"]["own_record"]["known_users"] == 0.5
    assert report["own_record"]["decided"] == 0 and report["own_record"]["explains_gain"] is False
    assert "there is nothing to remember" in text


def test_one_known_user_has_nobody_to_be_shuffled_with(tmp_path):
    scores = Scores(log_probs([1.0, 1.0]), log_probs([-1.0, -1.0]), log_probs([1.0, 1.0]))
    config, names = tiny_config("evaluate.bootstrap=100"), ["a|$b^c$^d"] * 2
    margins = reward_margins(Task(config, None, (), log_probs([0.0, 0.0])), scores)
    report = summarize(config.evaluate, margins, [1, 1], names, others=False)
    controls = {name: row["accuracy"] for name, row in report["controls"].items()}
    assert controls == {
        "generic_user": 0, "gain_over_generic": 1,
        "shuffled_users": None, "placebo_gain": None, "personalisation_gain": None,
    }  # fmt: skip
    write_report({"checkpoint": "c", "data": "d", **report}, tmp_path)  # a name that is a formula, and ends a cell
    assert "| a\\|$b^c$^d | 2 | 100.00 | 0.00 | - |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["per_user"][names[0]]["shuffled_users"] is None


def test_nothing_to_count_is_null():
    only_unknown = summary([1.0], [1.0], [1.0], [0], [None])
    assert only_unknown["accuracy"] == {
        "top": None, "average_mean": None, "average_std": None, "generic": 1.0, "worst_user": None,
    }  # fmt: skip
    assert only_unknown["interval"]["top"] is None
    assert summary([1.0], [1.0], [1.0], [1], ["a"])["accuracy"]["generic"] is None


def counts(correct_of_n):
    """by_user of users 0, 1, ... who are right in `correct` of `n` comparisons."""
    users = [str(i) for i, (_, n) in enumerate(correct_of_n) for _ in range(n)]
    return by_user(users, np.concatenate([np.repeat([1.0, -1.0], [k, n - k]) for k, n in correct_of_n]))


def test_interval_of_a_mean_of_two_users_by_hand():
    """Users at 1/2 and 1, of whom the bootstrap draws 1/2, 3/4, 1 with 1/4, 1/2, 1/4: variance 1/32, for two users 1/16.

    t_1 = 12.7 makes 3/4 (1 - 3/4) / (1/16) = 3 independent comparisons 0.07, which tell nothing.
    """
    rng = np.random.default_rng(0)
    assert mean_interval(counts([(1, 2), (2, 2)]), 1000, rng) == pytest.approx((0, 1))


def test_interval_of_a_mean_is_exact_for_as_many_independent_comparisons():
    """20 users, ten at 0.5 and ten at 0.7: the variance of the mean 0.6 is 0.1^2 / 19, as of 0.24 / that = 456 comparisons.

    t_19 = 2.093 in place of z makes 399.9 of these: 239.9 are right. 240 of 400: each end is where a tail has 2.5%.
    """
    low, high = mean_interval(counts([(5, 10)] * 10 + [(7, 10)] * 10), 50_000, np.random.default_rng(0))

    def above(p, k):
        """P(Binomial(400, p) >= k), by its terms."""
        return sum(math.comb(400, i) * p**i * (1 - p) ** (400 - i) for i in range(k, 401))

    ends = np.arange(0.5, 0.7, 0.0005)
    assert low == pytest.approx(next(p for p in ends if above(p, 240) >= 0.025), abs=0.002)
    assert high == pytest.approx(next(p for p in ends if above(p, 241) >= 0.975), abs=0.002)


def test_few_users_who_are_all_equal_tell_nothing_of_how_users_spread():
    rng = np.random.default_rng(0)
    for k in range(1, 10):
        assert mean_interval(counts([(k, 10)] * 3), 100, rng) is None
        assert pooled_interval(counts([(k, 10)] * 5), 100, rng) is None
    a, b = counts([(2, 3), (2, 3)]), counts([(1, 3), (1, 3)])
    assert pooled_difference_interval(a, b, 100, rng) is None  # six comparisons are no evidence
    assert pooled_difference_interval(a, a, 100, rng) == (-1, 1)


def test_many_users_who_are_all_equal_by_hand():
    """0.025^(1/60) = 0.9404: as small may be the share of such users; the others, 0.0596, may be anywhere.

    Half right: (0.9404 / 2, 0.9404 / 2 + 0.0596). Always right against always wrong: (0.9404 - 0.0596, 1).
    """
    rng = np.random.default_rng(0)
    half = counts([(25, 50)] * 60)
    assert mean_interval(half, 100, rng) == pytest.approx((0.4702, 0.5298), abs=1e-4)
    assert pooled_interval(half, 100, rng) == pytest.approx((0.4702, 0.5298), abs=1e-4)
    right, wrong = counts([(50, 50)] * 60), counts([(0, 50)] * 60)
    assert pooled_difference_interval(right, wrong, 100, rng) == pytest.approx((0.8808, 1), abs=1e-4)
    assert pooled_difference_interval(wrong, right, 100, rng) == pytest.approx((-1, -0.8808), abs=1e-4)
    q = 0.025 ** (1 / 6)  # six are the fewest: 2 / 2^6 < 5%
    assert mean_interval(counts([(5, 10)] * 6), 100, rng) == pytest.approx((q / 2, q / 2 + 1 - q))


def test_models_that_agree_in_everything_may_yet_differ_by_hand():
    """20 users of 5 comparisons: as if each were once right alone, +- t_19 sqrt(20 / 19 * 2) / 100 with t_19 = 2.093."""
    a = counts([(2, 5)] * 10 + [(4, 5)] * 10)
    found = pooled_difference_interval(a, a, 100, np.random.default_rng(0))
    half = 2.093 * math.sqrt(20 / 19 * 2) / 100
    assert found == pytest.approx((-half, half), abs=1e-5) and found.low == -found.high


def test_users_alike_have_the_mean_in_place_of_the_pooled_accuracy():
    """Accuracies 1/2 and 1 of 2 and 4 comparisons: 3 each, of which 1.5 and 3 are right."""
    users = alike(counts([(1, 2), (4, 4)]))
    assert users.n.tolist() == [3, 3] and users.correct.tolist() == [1.5, 3]
    assert pooled(users) == 0.75
    assert alike(by_user([], np.array([]))).users == []


def test_intervals_where_everything_is_right():
    """Clopper and Pearson's, a user being one draw: with nobody wrong of two users the lower bound is 0.025^(1/2)."""
    perfect, rng = counts([(3, 3), (5, 5)]), np.random.default_rng(0)
    assert pooled_interval(perfect, 100, rng) == pytest.approx((0.025 ** (1 / 2), 1))
    assert mean_interval(perfect, 100, rng) == pytest.approx((0.025 ** (1 / 2), 1))
    assert std_interval(perfect.accuracy()) is None
    assert pooled_interval(counts([(3, 3)]), 100, rng) is None
    low, high = worst_user_interval(perfect.correct, perfect.n)
    assert low == pytest.approx(0.025 ** (1 / 3)) and high == 1


def test_worst_user_interval_by_hand():
    """Two users, 0 of 1 and 1 of 1. Low: 0. High: 1 - miss^(1/1) of the first, miss = 1 - sqrt(0.975)."""
    assert worst_user_interval(np.array([0.0, 1.0]), np.array([1, 1])) == pytest.approx((0, np.sqrt(0.975)))


def test_std_interval_by_hand():
    """Accuracies 0.2, 0.4, 0.6, 0.8: s^2 = 1/15, kurtosis 4 * 2 (0.3^4 + 0.1^4) / 0.2^2 = 1.64, c = 4 / (4 - 1.96)."""
    c = 4 / (4 - 1.959964)
    half = 1.959964 * c * np.sqrt((1.64 - 1 / 4) / 3)
    expected = np.sqrt(c / 15 * np.exp([-half, half]))
    assert expected[1] > 0.5
    assert std_interval(np.array([0.2, 0.4, 0.6, 0.8])) == pytest.approx((expected[0], 0.5))


def test_expected_calibration_error_by_hand():
    """p = 0.6, 0.6, 0.8, 0.4 that the chosen one wins; confidences 0.6, 0.6, 0.8, 0.6 in two bins of 15.

    (3/4) |2/3 - 0.6| + (1/4) |1 - 0.8| = 0.1.
    """
    margins = np.log([0.6 / 0.4, 0.6 / 0.4, 0.8 / 0.2, 0.4 / 0.6])
    assert expected_calibration_error(margins) == pytest.approx(0.1)
    assert expected_calibration_error(np.zeros(3)) == 0  # a tie is half right with confidence 1/2
    assert expected_calibration_error(np.array([1e9, -1e9])) == 0.5  # sure, and right in half
    assert expected_calibration_error(np.array([])) is None


def test_calibrated_predictions_have_no_calibration_error():
    rng = np.random.default_rng(0)
    margins = np.abs(rng.normal(size=200_000))
    right = rng.random(len(margins)) < 1 / (1 + np.exp(-margins))
    assert expected_calibration_error(np.where(right, margins, -margins)) < 0.01


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and never less than the one before."""
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]
    assert holm(np.array([])).tolist() == []


@pytest.mark.parametrize(
    "differences", [[1, 1, 1, 1, -1, 0], [1 / 3, 2 / 3, 1, -1 / 3, 0.5], [0.1 + 0.2, -0.3], [1] * 10]
)
def test_sign_flip_test_is_exact_enumeration(differences):
    """All 2^n flips of the signs give the p-value that random flips estimate; 0.1 + 0.2 - 0.3 is no difference."""
    flips = np.array(list(itertools.product([-1, 1], repeat=len(differences)))) @ np.abs(differences)
    exact = (np.abs(flips) >= abs(sum(differences)) - 1e-9).mean()
    p = sign_flip_test(np.array(differences), 20_000, np.random.default_rng(0))
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


@pytest.mark.parametrize(
    "differences, step",
    [([1, 1, 1, 1, -1, 0], 0.5), ([1 / 3, 2 / 3, 1, -1 / 3, 0.5], 1 / 6), ([0.1 + 0.2, -0.3], 0.1), ([-1] * 10, 0.5)],
)
def test_exact_sign_flip_test_is_enumeration(differences, step):
    flips = np.array(list(itertools.product([-1, 1], repeat=len(differences)))) @ np.abs(differences)
    exact = (np.abs(flips) >= abs(sum(differences)) - 1e-9).mean()
    assert exact_sign_flip_test(np.array(differences), step) == pytest.approx(exact, rel=1e-12)


def test_exact_sign_flip_test_by_hand():
    """Always better: only the two flips that leave all signs equal reach |T|. Much better: the binomial's tails."""
    assert exact_sign_flip_test(np.ones(300), 0.5) == pytest.approx(2.0**-299, rel=1e-9)
    tail = sum(math.comb(200, k) for k in range(150, 201)) / 2**200  # 150 of 200 better: |T| = 100
    assert exact_sign_flip_test(np.repeat([1.0, -1.0], [150, 50]), 0.5) == pytest.approx(2 * tail, rel=1e-9)
    assert exact_sign_flip_test(np.array([1e-17, 0, 0.5 - 0.5]), 0.5) == 1
    assert exact_sign_flip_test(np.array([]), 0.5) == 1


def test_no_difference_has_p_one():
    assert sign_flip_test(np.zeros(5), 100, np.random.default_rng(0)) == 1
    assert sign_flip_test(np.array([]), 100, np.random.default_rng(0)) == 1


def test_margins_file(tmp_path):
    comparisons = [Comparison("p", "c", "r", "a", "text", "1"), Comparison("p", "r", "c", None, None, "2")]
    write_margins(tmp_path, comparisons, [True, False], np.array([[1, 2], [3, 4], [5, 6]], dtype=float))
    lines = [json.loads(line) for line in (tmp_path / "margins.jsonl").read_text().splitlines()]
    assert lines[0].pop("text") != lines[1].pop("text")
    assert lines == [
        {"id": "1", "user": "a", "known": True, "true": 1, "generic": 3, "shuffled": 5},
        {"id": "2", "user": None, "known": False, "true": 2, "generic": 4, "shuffled": 6},
    ]


def test_accuracy_curve(tmp_path):
    metrics, out = tmp_path / "metrics.jsonl", tmp_path / "curve.png"
    metrics.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "user_accuracy": null}\n')
    assert not accuracy_curve(metrics, out) and not out.exists()
    metrics.write_text(
        '{"step": 1, "user_accuracy": 0.5, "generic_accuracy": "nan"}\n'
        '{"step": 1, "eval": true, "accuracy_top": 0.6, "accuracy_generic": null}\n'
    )
    pytest.importorskip("matplotlib")
    assert accuracy_curve(metrics, out) and out.stat().st_size > 1000


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
        scores = score_users(Task(config, tiny_model(config), comparisons))
        assert torch.equal(scores.true_user.chosen, scores.generic_user.chosen) == same
