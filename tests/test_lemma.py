"""Lemma 3.1 of the paper (arXiv 2402.05133): what vanilla and personalised reward models learn from opposing votes."""

import math

from examples import lemma


def test_a_vanilla_reward_model_recovers_the_logit_of_the_vote_share():
    vanilla = lemma.fitted(lemma.lemma_config("user_model.kind=uniform"), lemma.votes())
    for chosen, margin in zip(lemma.votes(), lemma.margins(vanilla, lemma.votes(), [0] * 28)):
        count = lemma.VOTES_FOR_FIRST[chosen.prefix[1] - 10]
        share = count / 7 if chosen.chosen[0] < 40 else 1 - count / 7
        assert abs(margin - math.log(share / (1 - share))) < 1e-3


def test_personalised_reward_models_recover_each_users_choice():
    comparisons = lemma.votes()
    users = [c.user for c in comparisons]
    for kind in ("user_model.kind=individual", "user_model.kind=cluster"):
        personal = lemma.fitted(lemma.lemma_config(kind, "user_model.clusters=7"), comparisons, decay=1e-4)
        assert all(margin > 0 for margin in lemma.margins(personal, comparisons, users))


def test_the_generic_branch_of_a_personalised_model_is_the_vote_share():
    """alpha mixes two losses, each with its own vectors: user 0's part is the vanilla loss."""
    config = lemma.lemma_config("user_model.kind=individual", "user_model.shared=false")
    personal = lemma.fitted(config, lemma.votes(), decay=1e-8)
    for comparison, margin in zip(lemma.votes(), lemma.margins(personal, lemma.votes(), [0] * 28)):
        count = lemma.VOTES_FOR_FIRST[comparison.prefix[1] - 10]
        share = count / 7 if comparison.chosen[0] < 40 else 1 - count / 7
        assert abs(margin - math.log(share / (1 - share))) < 1e-3
