"""Each loss against its paper's equation, computed here with Python's math or mpmath-like high precision by hand."""

import math

import pytest
import torch

from prlhf.config import load as config_module
from prlhf.method.losses import (
    Answers,
    ResponseLogProbs,
    Rewards,
    hinge_loss,
    ipo_loss,
    log_ratio_margin,
    orpo_loss,
    preference_loss,
    reward_margin,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


POLICY = ResponseLogProbs(tensor(-4.0, -10.0), tensor(-6.0, -3.0), tensor(4.0, 5.0), tensor(3.0, 2.0))
REFERENCE = ResponseLogProbs(tensor(-5.0, -9.5), tensor(-5.5, -4.0), tensor(4.0, 5.0), tensor(3.0, 2.0))
H = [(-4.0 + 5.0) - (-6.0 + 5.5), (-10.0 + 9.5) - (-3.0 + 4.0)]  # 1.5 and -1.5


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_margin_by_hand():
    assert log_ratio_margin(POLICY, REFERENCE).tolist() == H == [1.5, -1.5]


@pytest.mark.parametrize(
    "loss, expected",
    [
        (lambda h: sigmoid_loss(h, 0.2), lambda h: -math.log(sigma(0.2 * h))),
        (
            lambda h: sigmoid_loss(h, 0.2, 0.1),
            lambda h: -0.9 * math.log(sigma(0.2 * h)) - 0.1 * math.log(sigma(-0.2 * h)),
        ),
        (
            lambda h: robust_loss(h, 0.2, 0.1),
            lambda h: (-0.9 * math.log(sigma(0.2 * h)) + 0.1 * math.log(sigma(-0.2 * h))) / 0.8,
        ),
        (lambda h: hinge_loss(h, 0.2), lambda h: max(0.0, 1 - 0.2 * h)),
        (lambda h: ipo_loss(h, 0.2), lambda h: (h - 2.5) ** 2),
    ],
)
def test_margin_losses(loss, expected):
    h = tensor(1.5, -1.5, 0.0, 7.0, -30.0)
    assert loss(h).tolist() == pytest.approx([expected(x) for x in h.tolist()], rel=1e-12)


def test_known_values():
    assert sigmoid_loss(tensor(0.0), 0.5).item() == pytest.approx(math.log(2))
    assert hinge_loss(tensor(10.0), 0.1).item() == 0.0
    assert ipo_loss(tensor(5.0), 0.1).item() == 0.0  # the minimum lies at h = 1 / (2 beta)


def test_simpo_uses_averages_and_a_target_margin():
    expected = [
        -math.log(sigma(2 * (-4 / 4) - 2 * (-6 / 3) - 0.3)),
        -math.log(sigma(2 * (-10 / 5) - 2 * (-3 / 2) - 0.3)),
    ]
    assert simpo_loss(POLICY, 2.0, 0.3).tolist() == pytest.approx(expected, rel=1e-12)


def test_orpo_from_probabilities():
    """The paper's odds, P / (1 - P), with P the geometric mean of token probabilities."""

    def expected(chosen, n, rejected, m):
        p, q = math.exp(chosen / n), math.exp(rejected / m)
        return -chosen / n - 0.1 * math.log(sigma(math.log(p / (1 - p)) - math.log(q / (1 - q))))

    found = orpo_loss(POLICY, 0.1).tolist()
    assert found == pytest.approx([expected(-4, 4, -6, 3), expected(-10, 5, -3, 2)], rel=1e-12)


def test_orpo_stays_finite_for_a_certain_response():
    certain = ResponseLogProbs(tensor(0.0), tensor(-1e-9), tensor(3.0), tensor(3.0))
    certain.chosen.requires_grad_()
    loss = orpo_loss(certain, 0.1)
    loss.backward()
    assert math.isfinite(loss.item()) and math.isfinite(certain.chosen.grad.item())


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"])
def test_gradients_match_finite_differences(kind):
    config = config_module.load_config(None, ("model.family=llama", f"loss.kind={kind}", "loss.beta=0.3")).loss

    def total(chosen, rejected):
        return preference_loss(config, POLICY._replace(chosen=chosen, rejected=rejected), REFERENCE).sum()

    assert torch.autograd.gradcheck(
        total, (POLICY.chosen.clone().requires_grad_(), POLICY.rejected.clone().requires_grad_())
    )


def test_reward_margin_is_scaled_by_beta():
    config = config_module.load_config(None, ("model.family=llama", "loss.beta=0.3")).loss
    assert reward_margin(config, POLICY, REFERENCE).tolist() == pytest.approx([0.45, -0.45])
    simpo = config_module.load_config(None, ("model.family=llama", "loss.beta=0.3", "loss.kind=simpo")).loss
    assert reward_margin(simpo, POLICY, None).tolist() == pytest.approx([0.3 * (-1 + 2), 0.3 * (-2 + 1.5)])


def test_an_added_nll_is_per_token():
    plain = config_module.load_config(None, ("model.family=llama",)).loss
    added = config_module.load_config(None, ("model.family=llama", "loss.nll=0.5")).loss
    difference = preference_loss(added, POLICY, REFERENCE) - preference_loss(plain, POLICY, REFERENCE)
    assert difference.tolist() == pytest.approx([0.5 * 4 / 4, 0.5 * 10 / 5])


def test_label_smoothing_of_reward_models_by_hand():
    """Margins of 2 - 1 = 1 and of 1.5; an error of 0.1 swaps the label."""
    config = config_module.load_config(None, ("model.family=llama", "method=prm", "loss.label_smoothing=0.1")).loss
    expected = -0.9 * math.log(sigma(1)) - 0.1 * math.log(sigma(-1))
    rewards = Rewards(tensor(2.0), tensor(1.0), tensor(1.0))
    assert preference_loss(config, rewards, None).item() == pytest.approx(expected)
    other = -0.9 * math.log(sigma(1.5)) - 0.1 * math.log(sigma(-1.5))
    answers = Answers(tensor(1.0), tensor(1.5), tensor(1.0))
    assert preference_loss(config, answers, None).item() == pytest.approx((expected + other) / 2)
