"""Trivial rules on ten votes that are counted by hand. The responses A, B, C, D, E have 3, 2, 1, 2 and 4 words."""

import pytest

from prlhf.data.check.rules import RULES, as_read, conflicts, fit, majority_share
from prlhf.data.comparisons import parse_comparison

A, B, C, D, E = "one two three", "four five", "six", "seven eight", "nine ten eleven twelve"


def vote(user, chosen, rejected, prompt="p", **extra):
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user": user, **extra}
    return parse_comparison(record, "f, line 1", "f:1")


# Longer minus shorter: ann 2 - 1, bob 0 - 2, cid 1 - 1, dee none (B and D are equally long), all 4 - 5: shorter.
TRAIN = [
    vote("ann", A, B), vote("ann", A, C), vote("ann", C, B),
    vote("bob", B, A), vote("bob", C, A),
    vote("cid", C, B), vote("cid", A, B),
    vote("dee", B, D),
    vote(None, B, C), vote(None, C, A),
]  # fmt: skip
# Pairs: {A, B} 2:1, {A, C} 1:2, {B, C} 1:2, {B, D} 1:0.
# Shares: A (3+1)/(3+3+2) = 1/2, B (3+1)/(3+4+2) = 4/9, C (4+1)/(4+2+2) = 5/8, D 1/3, E 1/2.
# Own records: ann A +2, B -2, C 1 - 1 = 0; bob A -2, B +1, C +1; cid A +1, B -2, C +1; dee B +1, D -1.
HELD_OUT = [  # comparison, then: longer, own_length, pair_majority, response_share, own_record
    (vote("ann", A, B), 1, 1, 1, 1, 1),  # 2 - -2
    (vote("bob", A, C), 1, 0, 0, 0, 0),  # -2 - 1
    (vote("cid", A, C), 1, 0, 0, 0, 0.5),  # even in training: as all users, shorter; own records 1 - 1
    (vote("zed", C, A), 0, 1, 1, 1, 0.5),  # not in training: as all users, and without a record
    (vote(None, B, D), 0.5, 0.5, 1, 1, 0.5),  # nobody's record, whatever the unnamed votes
    (vote("dee", A, D), 1, 0, 0.5, 1, 1),  # a new pair of known responses; no length preference of dee's own; 0 - -1
    (vote("bob", E, B), 1, 0, 0.5, 1, 0),  # E is new; 0 - 1
    (vote("ann", A, B, prompt="q"), 1, 1, 0.5, 0.5, 0.5),  # under another prompt both are new
]
ALL = ("longer", "own_length", "pair_majority", "response_share", "own_record")


@pytest.mark.parametrize("position, rule", enumerate(ALL, 1))
def test_each_rule_on_each_comparison(position, rule):
    right = fit(TRAIN).right([row[0] for row in HELD_OUT])
    assert right[rule] == [row[position] for row in HELD_OUT]


def test_a_rule_that_does_not_apply_is_left_out():
    assert list(fit([]).right(TRAIN)) == ["longer"]
    assert tuple(fit(TRAIN).right(TRAIN)) == ALL
    assert fit(TRAIN).right([]) == {rule: [] for rule in ALL}


def test_the_first_response_where_the_records_say_which_it_was():
    shown = [vote("ann", A, B, first="chosen"), vote("ann", B, A, first="rejected"), vote("ann", A, B)]
    assert fit([]).right(shown) == {"longer": [1, 0, 1], "first": [1, 0, 0.5]}
    assert set(fit(shown).right(shown)) == set(RULES)


def test_even_votes_decide_nothing():
    even = [vote("ann", A, B), vote("bob", B, A)]  # bob and ann have preferences for length, all users have none
    right = fit(even).right([vote("ann", A, B), vote("bob", A, B), vote("zed", A, B)])
    assert right["own_length"] == [1, 0, 0.5]
    assert right["pair_majority"] == right["response_share"] == [0.5, 0.5, 0.5]


def test_an_even_record_is_a_judgement_that_decides_nothing():
    rules = fit([vote("ann", A, B), vote("ann", C, A)])  # A 1 - 1, B -1, C +1
    asked = [vote("ann", A, D), vote("ann", B, C), vote("ann", D, E), vote("bob", A, B), vote(None, A, B)]
    assert rules.right(asked)["own_record"] == [0.5, 0, 0.5, 0.5, 0.5]
    assert [len(rules.judged(as_read(c))) for c in asked] == [1, 2, 0, 0, 0]


def test_message_prompts_are_compared_by_content():
    hello = [{"role": "user", "content": "hello"}]
    rules = fit([vote("ann", A, B, prompt=hello)])
    other = [{"role": "system", "content": "hello"}]
    asked = [vote("bob", B, A, prompt=p) for p in (hello, other, "hello")]
    assert rules.right(asked)["pair_majority"] == [0, 0.5, 0]  # a text is a message of the user


def test_texts_that_read_the_same_are_the_same():
    """Two spaces, a space at the end, and an accent composed or not: by ann and bob A over B, once each way by ann."""
    votes = [
        vote("ann", "caf\u00e9  ", "no"),
        vote("ann", "no ", "cafe\u0301"),
        vote("bob", "caf\u00e9", " no", prompt=" p\n"),
    ]
    found = conflicts(votes)
    assert found[:3] == (0, 1, 1) and found.example.id == votes[0].id
    assert majority_share(votes) == (pytest.approx(2 / 3), 1, 1)
    right = fit([votes[0], votes[2]]).right([votes[1], vote("zed", "caf\u00e9", "no")])
    assert right["pair_majority"] == right["response_share"] == [0, 1]
    assert right["own_record"] == [0, 0.5]  # ann chose the other one; zed said nothing
    assert conflicts([vote("ann", "no", "no "), vote("ann", "no ", "no")]) == (0, 0, 0, None)  # no choice


def test_majority_share():
    # {A, B} 2, {A, C} 2, {B, C} 2 and {B, D} 1 of ten votes are the majority's; three pairs have both.
    assert majority_share(TRAIN) == (0.7, 3, 3)
    assert majority_share([vote("ann", A, B), vote("bob", A, B), vote("ann", A, B, prompt="q")]) == (1.0, 1, 0)
    assert majority_share([]) == (None, 0, 0)


def test_conflicts():
    # ann votes A over B twice and once the other way; bob agrees with the one and with the other; cid votes alone.
    votes = [vote("ann", A, B), vote("ann", A, B), vote("ann", B, A), vote("bob", A, B), vote("cid", A, C)]
    assert conflicts(votes) == (1, 1, 1, as_read(votes[0]))
    assert conflicts(votes[:2]) == (1, 0, 0, None)
    assert conflicts(votes[1:3]) == (0, 1, 0, as_read(votes[1]))  # with oneself is no dispute between users
    assert conflicts([votes[2], votes[3]]) == (0, 0, 1, None)
    assert conflicts([vote(None, A, B), vote(None, A, B), vote(None, B, A)]) == (0, 0, 0, None)  # nobody knows who
