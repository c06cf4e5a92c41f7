"""The plain method by numbers derived by hand, and against Hugging Face's own forward pass and loss."""

import math
import types

import pytest
import torch
from helpers import KINDS, USERS, as_plain, plain_backbone, random_comparisons, tiny_config, tiny_model
from torch import nn

from prlhf.method.plain import (
    HERE,
    embeddings,
    hidden_states,
    log_prob,
    margin,
    p_dpo,
    p_rm,
    pooled,
    reward,
    user_vectors,
)
from prlhf.method.users import ClusterUsers, IndividualUsers, LowRankUsers, UniformUsers

BOS, A, B = 0, 1, 2


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


class SumLM(nn.Module):
    """An LM of width 2 whose hidden state is the sum of the embeddings so far, and whose logits are (0, h_1, h_2).

    BOS reads as (0, 0), A as (1, 0), B as (0, 1).
    """

    device = torch.device("cpu")

    def __init__(self, bias=0.0):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(tensor([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]))
        self.head = nn.Linear(2, 3, bias=False, dtype=torch.float64)
        self.head.weight = nn.Parameter(tensor([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]))
        self.bias = bias  # of B's logit

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return lambda states: self.head(states) + tensor(0.0, 0.0, self.bias)

    def base_model(self, inputs_embeds):
        return types.SimpleNamespace(last_hidden_state=inputs_embeds.cumsum(dim=1))

    def forward(self, inputs_embeds):
        states = self.base_model(inputs_embeds).last_hidden_state
        return types.SimpleNamespace(logits=self.get_output_embeddings()(states))


def p(token, *state, bias=0.0):
    """Of SumLM, written out."""
    weights = [1.0, math.exp(state[0]), math.exp(state[1] + bias)]
    return weights[token] / sum(weights)


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_user_models_by_hand():
    e, o = tensor([1.0, 2.0]), tensor([[10.0, 0.0]], [[0.0, 10.0]])
    V, w = tensor([[1.0, 0.0]], [[0.0, 4.0]]), tensor([0.5, 0.5], [2.0, -1.0])
    assert user_vectors(UniformUsers(e), 2).tolist() == [[1, 2]]
    individual, alone = IndividualUsers(e, o), IndividualUsers(e, o, shared=False)
    assert [user_vectors(individual, u).tolist() for u in (0, 1, 2)] == [[[1, 2]], [[11, 2]], [[1, 12]]]
    assert [user_vectors(alone, u).tolist() for u in (0, 1)] == [[[1, 2]], [[10, 0]]]
    assert [user_vectors(ClusterUsers(V, w, False), u).tolist() for u in (0, 1)] == [[[0.5, 2]], [[2, -4]]]
    low_rank = LowRankUsers(e, V, w)  # w: coordinates of users 1 and 2
    assert [user_vectors(low_rank, u).tolist() for u in (0, 1, 2)] == [[[1, 2]], [[1.5, 4]], [[3, -2]]]
    share = 1 / (1 + math.exp(-3))  # softmax of (2, -1)
    assert user_vectors(ClusterUsers(V, w, True), 1)[0].tolist() == pytest.approx([share, 4 * (1 - share)])
    assert user_vectors(LowRankUsers(e, V, w, True), 2)[0].tolist() == pytest.approx([1 + share, 2 + 4 * (1 - share)])


def test_the_lm_reads_bos_the_users_vectors_the_users_text_the_prompt_and_the_response():
    read = embeddings(SumLM(), [BOS, A], [B, BOS], u_t=[B], e_UD=tensor([5.0, 6.0], [7.0, 8.0]))
    assert read.tolist() == [[[0, 0], [5, 6], [7, 8], [0, 1], [1, 0], [0, 1], [0, 0]]]
    assert embeddings(SumLM(), [BOS, A], [B], [], None).tolist() == [[[0, 0], [1, 0], [0, 1]]]


def test_the_users_vectors_stand_where_x_or_y_has_here():
    e = tensor([5.0, 6.0])
    behind_a = embeddings(SumLM(), [BOS, A, HERE, B], [A, BOS], u_t=[B], e_UD=e)
    assert behind_a.tolist() == [[[0, 0], [0, 1], [1, 0], [5, 6], [0, 1], [1, 0], [0, 0]]]
    at_the_end = embeddings(SumLM(), [BOS, A], [B, BOS, HERE], u_t=[], e_UD=e)
    assert at_the_end.tolist() == [[[0, 0], [1, 0], [0, 1], [0, 0], [5, 6]]]
    assert embeddings(SumLM(), [BOS, HERE, A], [B], [], None).tolist() == [[[0, 0], [1, 0], [0, 1]]]
    # y = (A) behind x = (BOS, B, e): the state that predicts it is the last vector's.
    assert log_prob(SumLM(), [BOS, B, HERE], [A], [], e).item() == pytest.approx(math.log(p(A, 5, 7)))
    # the reward reads the state of the last vector, which has seen x and y
    assert reward(SumLM(), [BOS, A], [B, HERE], [], e, tensor(2.0, 1.0)).item() == 2 * (1 + 5) + (1 + 6)


def test_log_probs_by_hand():
    """y = (A, B) after x = (BOS, B): the states before its tokens are (0, 1) and (1, 1), with e = (2, 3) added or not."""
    x, y, e = [BOS, B], [A, B], tensor([2.0, 3.0])
    assert log_prob(SumLM(), x, y, [], None).item() == pytest.approx(math.log(p(A, 0, 1) * p(B, 1, 1)))
    assert log_prob(SumLM(), x, y, [], e).item() == pytest.approx(math.log(p(A, 2, 4) * p(B, 3, 4)))
    assert log_prob(SumLM(), x, y, [A], e).item() == pytest.approx(math.log(p(A, 3, 4) * p(B, 4, 4)))


def test_the_linear_aggregator_by_hand():
    """h' = h + 0.5 (e_2, e_1) + (0, 1): the head reads the user, the LM does not."""
    aggregator = nn.Linear(4, 2, dtype=torch.float64)
    aggregator.weight = nn.Parameter(tensor([1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.5, 0.0]))
    aggregator.bias = nn.Parameter(tensor(0.0, 1.0))
    found = log_prob(SumLM(), [BOS, B], [A, B], [], tensor([2.0, 4.0]), aggregator)
    assert found.item() == pytest.approx(math.log(p(A, 0 + 2, 1 + 1 + 1) * p(B, 1 + 2, 1 + 1 + 1)))


def test_p_dpo_by_hand():
    """Responses A and B to x = BOS; the policy likes B less than the reference does; e_0 = (1, 0), e_1 = (1, 3)."""
    policy, sft = SumLM(bias=-0.5), SumLM()
    users = IndividualUsers(tensor([1.0, 0.0]), tensor([[0.0, 3.0]]))
    h = {}
    for u, (e_1, e_2) in enumerate(((1, 0), (1, 3))):
        chosen = math.log(p(A, e_1, e_2, bias=-0.5)) - math.log(1 / 3)
        h[u] = chosen - (math.log(p(B, e_1, e_2, bias=-0.5)) - math.log(1 / 3))
        comparison = ([BOS], [A], [B], [], u)
        assert margin(policy, sft, comparison, user_vectors(users, u)).item() == pytest.approx(h[u])
    assert h == pytest.approx({0: 1 + 0.5, 1: 1 - 3 + 0.5})  # the logits' difference; the reference's is 0
    found = p_dpo(policy, sft, users, [([BOS], [A], [B], [], 1), ([BOS], [B], [A], [], 0)], alpha=0.3, beta=2.0)
    known = -0.3 * math.log(sigma(2 * -1.5)) - 0.7 * math.log(sigma(2 * 1.5))
    assert found.item() == pytest.approx((known - math.log(sigma(2 * -1.5))) / 2)  # user 0: both terms are one
    assert p_dpo(policy, sft, users, [([BOS], [A], [B], [], 1)], 1.0, 2.0).item() == pytest.approx(
        -math.log(sigma(2 * -1.5))
    )


def test_an_untrained_policy_has_a_loss_of_log_2():
    nobody = UniformUsers(torch.zeros(0, 2, dtype=torch.float64))
    found = p_dpo(SumLM(), SumLM(), nobody, [([BOS, A], [A, B], [B], [], 1)], alpha=0.5, beta=0.1)
    assert found.item() == pytest.approx(math.log(2))


def test_rewards_and_p_rm_by_hand():
    """x = (BOS, A), y = (B, B): states (1, 1) and (1, 2) of y's tokens. e_0 = (1, 1), e_1 = (1, -1), v = (2, 1)."""
    lm, x, y = SumLM(), [BOS, A], [B, B]
    users = IndividualUsers(tensor([1.0, 1.0]), tensor([[0.0, -2.0]]))
    e_1, v = user_vectors(users, 1), tensor(2.0, 1.0)
    assert hidden_states(lm, x, y, [], None).tolist() == [[0, 0], [1, 0], [1, 1], [1, 2]]
    assert reward(lm, x, y, [], e_1, None).item() == 1 - 2
    assert reward(lm, x, y, [], e_1, None, "mean").item() == 1 - 1.5
    assert reward(lm, x, y, [], e_1, v).item() == 2 * (1 + 1) + (2 - 1)  # the LM has read e_1
    assert reward(lm, x, y, [B], e_1, v).item() == 2 * (1 + 1) + (2 + 1 - 1)  # and the user's text
    assert pooled(tensor([9.0, 9.0], [1.0, 1.0], [1.0, 2.0]), 2, "both").tolist() == [1, 2, 1, 1.5]
    # Linear head, y1 = (B, B), y2 = (A): rewards -1 and 2 for user 1, 3 and 2 for user 0.
    found = p_rm(lm, users, [(x, y, [A], [], 1)], alpha=0.25, v=None)
    assert found.item() == pytest.approx(-0.25 * math.log(sigma(-3)) - 0.75 * math.log(sigma(1)))


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("user_text", [False, True])
def test_log_prob_is_hugging_faces_loss(user_text, family):
    """Its loss is the mean over the labels of -log p, computed in float32."""
    lm = plain_backbone(tiny_config(family=family))
    for c in random_comparisons(3, user_text=user_text):
        x, y, _, u_t, _ = as_plain(c)
        labels = [-100] * len(c.prefix) + y
        found = lm(torch.tensor([c.prefix + y]), labels=torch.tensor([labels])).loss
        assert log_prob(lm, x, y, u_t, None).item() == pytest.approx(-len(y) * found.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_user_vectors_are_those_of_the_user_model(kind):
    users = tiny_model(tiny_config(*KINDS[kind]), noise=0.1).user_model
    plain = torch.stack([user_vectors(users, u) for u in range(USERS + 1)])
    assert (users(torch.arange(USERS + 1)) - plain).abs().max() < 1e-12
