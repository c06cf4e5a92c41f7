"""The alpha-mixed objective against plain loops, and its independence of how an update is cut up."""

import random

import pytest
import torch
from helpers import (
    ALPHA,
    KINDS,
    assert_same,
    assert_updates_are_plain,
    gradients,
    plain_backbone,
    random_comparisons,
    tiny_config,
    tiny_model,
    votes,
)

from prlhf.method.losses import branch_weights
from prlhf.method.plain import log_prob, p_dpo
from prlhf.score.score import score
from prlhf.score.task import Task
from prlhf.train.optimizer import make_optimizer
from prlhf.train.plan import plan_update
from prlhf.train.step import accumulate_gradients


def run(config, comparisons, order=None, model=None):
    """Loss and gradients of one update over `comparisons`."""
    model = model or tiny_model(config, noise=0.01)
    reference = score(model, comparisons, None, 4)
    order = order or list(range(len(comparisons)))
    loss = accumulate_gradients(Task(config, model, comparisons, reference), order).loss
    return loss, gradients(model)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_vanilla_is_the_dpo_papers_loop(family):
    """Uniform user, T_u = 0: -log sigma(beta [(log pi/ref)(y1) - (log pi/ref)(y2)]), one pair at a time."""
    vanilla = ("user_model.kind=uniform", "user_model.tokens=0", "loss.beta=0.2", "optim.micro_batch_size=2")
    config = tiny_config(*vanilla, family=family)
    comparisons = random_comparisons(5)
    policy, reference = plain_backbone(config), plain_backbone(config)
    model = tiny_model(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a policy that has moved away from its reference
        for a, b in zip(policy.parameters(), model.backbone.parameters()):
            step = 0.02 * torch.randn(a.shape, generator=generator, dtype=a.dtype)
            a += step
            b += step

    total = 0.0
    for c in comparisons:
        ratio = []
        for y in (c.chosen, c.rejected):
            with torch.no_grad():
                log_ref = log_prob(reference, c.prefix, y, [], None)
            ratio.append(log_prob(policy, c.prefix, y, [], None) - log_ref)
        loss = -torch.log(torch.sigmoid(0.2 * (ratio[0] - ratio[1]))) / len(comparisons)
        loss.backward()
        total += loss.item()

    reference_scores = score(tiny_model(config), comparisons, None, 4)
    found = accumulate_gradients(Task(config, model, comparisons, reference_scores), list(range(5))).loss
    assert found == pytest.approx(total, abs=1e-10)
    assert_same(gradients(model.backbone), gradients(policy))


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"])
@pytest.mark.parametrize("user_model", ["individual", "cluster"])
def test_alpha_half_is_the_mean_of_the_two_branches(kind, user_model):
    """On known users: the alpha = 1 and the alpha = 0 update, each computed alone, average to the alpha = 0.5 one."""
    comparisons = [c._replace(user=1 + i % 4) for i, c in enumerate(random_comparisons(6))]
    results = [
        run(tiny_config(f"loss.kind={kind}", f"loss.alpha={alpha}", f"user_model.kind={user_model}"), comparisons)
        for alpha in (0.0, 0.5, 1.0)
    ]
    (generic, generic_grad), (mixed, mixed_grad), (user, user_grad) = results
    assert mixed == pytest.approx((user + generic) / 2, abs=1e-10)
    zero = {name: torch.zeros_like(g) for name, g in mixed_grad.items()}
    generic_grad, user_grad = zero | generic_grad, zero | user_grad
    assert_same(mixed_grad, {name: (user_grad[name] + generic_grad[name]) / 2 for name in mixed_grad})
    assert abs(user - generic) > 1e-6  # the branches do differ


@pytest.mark.parametrize("aggregator", ["soft_prompt", "linear"])
def test_any_order_micro_batch_and_layout_give_the_same_update(aggregator):
    comparisons = random_comparisons(9, user_text=True)
    assert {0} < {c.user for c in comparisons}
    base = (f"user_model.aggregator={aggregator}", "lora.rank=2", "optim.batch_size=9")
    expected_loss, expected = run(tiny_config(*base, "optim.micro_batch_size=9"), comparisons)
    for size, layout, seed in ((1, "tree", 0), (2, "rows", 1), (4, "packed", 2), (7, "tree", 3)):
        order = list(range(9))
        random.Random(seed).shuffle(order)
        config = tiny_config(*base, f"optim.micro_batch_size={size}", f"model.layout={layout}")
        loss, found = run(config, comparisons, order)
        assert loss == pytest.approx(expected_loss, abs=1e-10)
        assert_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_that_of_plain_sequences(kind, aggregator, family):
    """Log-probs, loss and gradients of a policy that has moved away from its reference."""
    keys = (*KINDS[kind], f"user_model.aggregator={aggregator}", "loss.beta=0.2")
    comparisons = [*votes(1, 4, 0), *random_comparisons(3, seed=5, user_text=True)]
    config = tiny_config(*keys, family=family)
    sft = plain_backbone(config)

    def linear(model):
        return None if model.aggregator is None else model.aggregator.linear

    def read(model, backbone, c, e_UD):
        return [log_prob(backbone, c.prefix, y, [], e_UD, linear(model)) for y in (c.chosen, c.rejected)]

    def loss_of(model, backbone, plain):
        return p_dpo(backbone, sft, model.user_model, plain, ALPHA, 0.2, linear(model))

    reference = score(tiny_model(config), comparisons, None, 4)
    assert_updates_are_plain(keys, family, comparisons, read, loss_of, reference)


def test_unknown_users_count_once_with_weight_one():
    weights = branch_weights(torch.tensor([0, 3, 0, 1]), alpha=0.25)
    assert weights.user.tolist() == [0, 0.25, 0, 0.25]
    assert weights.generic.tolist() == [1, 0.75, 1, 0.75]


def test_no_pass_is_run_for_nothing():
    comparisons = [c._replace(user=user) for c, user in zip(random_comparisons(7), [0, 0, 0, 0, 0, 1, 2])]

    def planned(alpha, update=(5, 6), kind="individual"):
        config = tiny_config(f"loss.alpha={alpha}", f"user_model.kind={kind}")
        return plan_update(Task(config, tiny_model(config), comparisons), update)

    branches = [sorted(branch for part in planned(alpha) for branch in part.branches) for alpha in (0.0, 0.5, 1.0)]
    assert branches == [["generic"] * 2, ["generic"] * 2 + ["user"] * 2, ["user"] * 2]
    (both,) = planned(1.0, (5, 0))  # alpha 1: an unknown user's comparison is computed once
    assert sorted(zip(*both[:3])) == [(0, "generic", 0), (5, "user", 1)]
    assert both.weights_B.tolist() == [1.0, 1.0]
    (only,) = planned(0.5, kind="uniform")  # a uniform user model has one branch
    assert only.users == [0, 0] and only.weights_B.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("aggregator", ["soft_prompt", "linear"])
def test_the_votes_on_a_pair_share_what_their_users_do_not_change(aggregator):
    """Trees per backbone pass: five voters of one pair, one of them unknown, and the reference."""
    config = tiny_config(f"user_model.aggregator={aggregator}", "optim.micro_batch_size=8")
    comparisons = votes(1, 2, 3, 4, 0)
    model, rows = tiny_model(config), []
    model.backbone.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    reference = score(model, comparisons, None, 4)
    assert rows == [1]
    accumulate_gradients(Task(config, model, comparisons, reference), range(5))
    assert rows[1:] == ([5] if aggregator == "soft_prompt" else [1])


def test_sharing_leaves_the_loss_curve_as_it_is():
    """Ten updates over pairs with several votes: the losses with and without sharing agree to rounding."""
    rng = random.Random(0)
    pairs = random_comparisons(4)
    comparisons = [c._replace(user=1 + rng.randrange(4)) for c in pairs for _ in range(4)]
    curves = []
    for share in (True, False):
        config = tiny_config(f"model.share_trees={share}", "optim.lr=1e-2", "user_model.lr=1e-2")
        model, losses = tiny_model(config), []
        optimizer = make_optimizer(config, model, total_steps=10)
        reference = score(model, comparisons, None, 4)
        for step in range(10):
            optimizer.catch_up()
            losses.append(
                accumulate_gradients(Task(config, model, comparisons, reference), range(step % 4, 16, 2)).loss
            )
            optimizer.step()
            optimizer.zero_grad()
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-9)
    assert curves[0][-1] < 0.7 * curves[0][0]


def test_a_fresh_linear_aggregator_changes_nothing():
    config = tiny_config("user_model.aggregator=linear")
    model = tiny_model(config)
    comparisons = random_comparisons(3)
    with model.as_reference():
        reference = model(model.collate(comparisons, None))
    found = model(model.collate(comparisons, [1, 2, 0]))
    assert torch.allclose(found.chosen, reference.chosen, atol=1e-12)


def test_the_reference_sees_user_text_or_not_by_its_prefix():
    model = tiny_model(tiny_config())
    (c,) = random_comparisons(1, user_text=True)
    assert c.prefix != c.reference_prefix
    scored = score(model, [c], None, 1)
    assert scored.chosen.item() == pytest.approx(
        log_prob(model.backbone, c.reference_prefix, c.chosen, [], None).item()
    )
