"""Preference losses: pure functions of response log-probs or rewards, one value per comparison. Tensors are (B,).

y1 is chosen, y2 rejected, h = [log pi(y1|x) - log ref(y1|x)] - [log pi(y2|x) - log ref(y2|x)], and log p(y|x) is a sum over
y's tokens, EOS included. The personalised loss (paper, eq. 5) applies one loss to two branches of the same comparison,

    alpha * loss(h(u_t, u_p)) + (1 - alpha) * loss(h(u_t, 0)).

`branch_weights` gives the two weights. A mean over comparisons is then exact for any grouping of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prlhf.config.keys import Config, LossConfig

REFERENCE_FREE = ("simpo", "orpo")  # of method pdpo; reward models have no reference either


class ResponseLogProbs(NamedTuple):
    """log p(y|x) of both responses, and their lengths in tokens, all (B,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


class Rewards(NamedTuple):
    """r(x, y) of both responses, and the margin that the comparison requires, all (B,)."""

    chosen: Tensor
    rejected: Tensor
    required: Tensor  # in units of loss.margin; 1 where the comparison has no `margin` of its own


class Answers(NamedTuple):
    """A pairwise model's logit of y1 over y2 in both orders, and the margin that the comparison requires, all (B,)."""

    y1_first: Tensor
    y1_second: Tensor
    required: Tensor


Outputs = ResponseLogProbs | Rewards | Answers


class BranchWeights(NamedTuple):
    """The weights of each comparison's user-branch loss and generic-branch loss, both (B,). They add up to 1."""

    user: Tensor
    generic: Tensor


def branch_weights(users_B: Tensor, alpha: float, personal: bool = True) -> BranchWeights:
    """alpha and 1 - alpha for a known user; 0 and 1 for the unknown user, whose two branches are one.

    personal=False (a uniform user model): 0 and 1 for every user.
    """
    user_B = alpha * ((users_B > 0) & personal).double()
    return BranchWeights(user_B, 1.0 - user_B)


def log_ratio_margin(policy: ResponseLogProbs, reference: ResponseLogProbs) -> Tensor:
    """h, the difference of the two responses' log-ratios. DPO's implicit reward margin is beta h."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def sigmoid_loss(h: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, -log sigma(beta h) (Rafailov et al. 2023, eq. 7).

    With label smoothing e, conservative DPO: -(1-e) log sigma(beta h) - e log sigma(-beta h) (Mitchell 2023).
    """
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)


def robust_loss(h: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, unbiased under labels flipped with probability e (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12):

    [-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e).
    """
    e = label_smoothing
    return (-(1 - e) * logsigmoid(beta * h) + e * logsigmoid(-beta * h)) / (1 - 2 * e)


def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta h) (SLiC-HF, Zhao et al. 2023, on DPO's margin as in Liu et al. 2023, RSO)."""
    return torch.relu(1 - beta * h)


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17), h of summed log-probs as in the paper."""
    return (h - 1 / (2 * beta)) ** 2


def simpo_loss(policy: ResponseLogProbs, beta: float, gamma: float) -> Tensor:
    """-log sigma(beta log p(y1)/|y1| - beta log p(y2)/|y2| - gamma) (Meng et al. 2024, arXiv 2405.14734, eq. 6)."""
    return -logsigmoid(beta * average_margin(policy) - gamma)


def orpo_loss(policy: ResponseLogProbs, beta: float) -> Tensor:
    """NLL(y1) - beta log sigma(log odds(y1) - log odds(y2)) (Hong et al. 2024, arXiv 2403.07691, eq. 6).

    NLL is the mean over y1's tokens; odds(y) = P/(1-P) with P the geometric mean of y's token probabilities.
    """
    chosen = policy.chosen / policy.chosen_length
    rejected = policy.rejected / policy.rejected_length
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return chosen_nll(policy) - beta * logsigmoid(log_odds)


def bradley_terry_loss(rewards: Rewards, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """-log sigma(r1 - r2 - m), m = margin * required (Touvron et al. 2023, Llama 2, eq. 2); smoothed as `sigmoid_loss`."""
    return sigmoid_loss(rewards.chosen - rewards.rejected - margin * rewards.required, 1.0, label_smoothing)


def centering(rewards: Rewards) -> Tensor:
    """(r1 + r2)^2, which fixes the constant that Bradley-Terry leaves open (Eisenstein et al. 2023, 2312.09244)."""
    return (rewards.chosen + rewards.rejected) ** 2


def answer_loss(answers: Answers, margin: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Mean over both orders of -log P(y1's letter), next-token cross-entropy on A or B (Dong et al. 2024).

    -log of the averaged probability would stop learning where the model always answers A.
    """
    required = margin * answers.required
    first, second = (sigmoid_loss(z - required, 1.0, label_smoothing) for z in (answers.y1_first, answers.y1_second))
    return (first + second) / 2


def pairwise_margin(answers: Answers) -> Tensor:
    """logit of P(y1 over y2) = [sigma(y1_first) + sigma(y1_second)] / 2, the answers to both orders averaged.

    Swapping the responses negates and exchanges the two logits, which negates the result exactly:
    P(y1 over y2) + P(y2 over y1) = 1.
    """
    first, second = answers.y1_first, answers.y1_second
    wins = torch.logaddexp(logsigmoid(first), logsigmoid(second))
    return wins - torch.logaddexp(logsigmoid(-first), logsigmoid(-second))


def chosen_nll(policy: ResponseLogProbs) -> Tensor:
    """-log p(y1|x) / |y1|, the term that RPO adds to DPO against sinking likelihoods (Pang et al. 2024, 2404.19733)."""
    return -policy.chosen / policy.chosen_length


def average_margin(policy: ResponseLogProbs) -> Tensor:
    """log p(y1)/|y1| - log p(y2)/|y2|, the margin of the reference-free losses."""
    return policy.chosen / policy.chosen_length - policy.rejected / policy.rejected_length


def needs_reference(config: Config) -> bool:
    """Whether the loss is made of log-ratios to a reference model."""
    return config.method == "pdpo" and config.loss.kind not in REFERENCE_FREE


def reward_margin(config: LossConfig, outputs: Outputs, reference: ResponseLogProbs | None) -> Tensor:
    """By how much y1's reward exceeds y2's, (B,): r1 - r2 of a reward model, logit P(y1 over y2) of a pairwise model.

    A language model's reward is implicit: beta h, or beta times the average margin for the reference-free losses.
    """
    if isinstance(outputs, Rewards):
        return outputs.chosen - outputs.rejected
    if isinstance(outputs, Answers):
        return pairwise_margin(outputs)
    if config.kind in REFERENCE_FREE:
        return config.beta * average_margin(outputs)
    assert reference is not None
    return config.beta * log_ratio_margin(outputs, reference)


def preference_loss(config: LossConfig, outputs: Outputs, reference: ResponseLogProbs | None) -> Tensor:
    """The loss of each comparison, (B,): Bradley-Terry for a reward model, cross-entropy for a pairwise model.

    For a language model it is that of config.kind plus config.nll NLL(y1). Reference-free kinds take reference=None.
    """
    if isinstance(outputs, Answers):
        return answer_loss(outputs, config.margin, config.label_smoothing)
    if isinstance(outputs, Rewards):
        loss_B = bradley_terry_loss(outputs, config.margin, config.label_smoothing)
        return loss_B + config.center * centering(outputs) if config.center else loss_B
    if config.kind == "simpo":
        loss_B = simpo_loss(outputs, config.beta, config.gamma)
    elif config.kind == "orpo":
        loss_B = orpo_loss(outputs, config.beta)
    else:
        assert reference is not None
        loss_B = _margin_loss(config, log_ratio_margin(outputs, reference))
    return loss_B + config.nll * chosen_nll(outputs) if config.nll else loss_B


def _margin_loss(config: LossConfig, h: Tensor) -> Tensor:
    if config.kind == "robust":
        return robust_loss(h, config.beta, config.label_smoothing)
    if config.kind == "hinge":
        return hinge_loss(h, config.beta)
    if config.kind == "ipo":
        return ipo_loss(h, config.beta)
    return sigmoid_loss(h, config.beta, config.label_smoothing)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 without cancellation (Maechler 2012), kept finite at x = 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near_zero = x > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, near, far)
