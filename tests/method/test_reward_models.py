"""Reward models against plain forward passes of Hugging Face's model, one sequence at a time, in float64."""

import math

import pytest
import torch
from helpers import (
    ALPHA,
    KINDS,
    LAYOUTS,
    TOKENIZER,
    assert_same,
    assert_updates_are_plain,
    gradients,
    plain_backbone,
    random_comparisons,
    swapped,
    tiny_config,
    tiny_model,
    votes,
)

from prlhf.batch.questions import pair_question
from prlhf.batch.tokens import Encoder, EncodingReport
from prlhf.batch.trees import Reading, lay_out
from prlhf.data.comparisons import Comparison
from prlhf.data.users import UserIndex
from prlhf.evaluate.accuracy import score_users
from prlhf.method.losses import (
    Answers,
    Rewards,
    answer_loss,
    bradley_terry_loss,
    centering,
    pairwise_margin,
    preference_loss,
    reward_margin,
)
from prlhf.method.plain import embeddings, hidden_states, p_rm, reward, user_vectors
from prlhf.score.reference import weights_fingerprint
from prlhf.score.score import score
from prlhf.score.states import fixed_states
from prlhf.score.task import Task
from prlhf.train.step import accumulate_gradients

SOFT = ("method=prm",)
LINEAR = ("method=prm", "user_model.aggregator=linear", "user_model.tokens=1")
PAIRWISE = ("method=pairwise",)


def some_comparisons():
    """A pair on which users disagree, one of them unknown, another pair, and prompts with and without user text."""
    return [*votes(1, 4, 0), *random_comparisons(4, seed=5, user_text=True)[1:]]


def questions(comparisons):
    """Comparisons as a pairwise model reads them: both orders of the question about their responses."""
    question = pair_question(TOKENIZER)
    asked = [(question.ask(c.chosen, c.rejected), question.ask(c.rejected, c.chosen)) for c in comparisons]
    return [c._replace(chosen=first, rejected=second) for c, (first, second) in zip(comparisons, asked)]


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("base", [SOFT, LINEAR])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_a_reward_model_is_that_of_plain_sequences(kind, base, family):
    """Rewards, loss and gradients: r = v . h of the response's last token, which has seen e_u, or r = e_u . h."""

    def value_vector(model):
        return None if model.value_head is None else model.value_head.weight[0]

    def read(model, backbone, c, e_UD):
        return [reward(backbone, c.prefix, y, [], e_UD, value_vector(model)) for y in (c.chosen, c.rejected)]

    def loss_of(model, backbone, plain):
        return p_rm(backbone, model.user_model, plain, ALPHA, value_vector(model))

    assert_updates_are_plain((*base, *KINDS[kind]), family, some_comparisons(), read, loss_of)


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_a_pairwise_model_is_that_of_plain_sequences(kind, family):
    """Answers, loss and gradients: the logit of y1's letter against y2's; y1 is A in one order and B in the other."""
    a, b = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "AB")

    def answers(backbone, x, u_t, asked, e_UD):
        first, second = (backbone(inputs_embeds=embeddings(backbone, x, q, u_t, e_UD)).logits[0, -1] for q in asked)
        return first[a] - first[b], second[b] - second[a]

    def read(model, backbone, c, e_UD):
        return answers(backbone, c.prefix, [], (c.chosen, c.rejected), e_UD)

    def loss_of(model, backbone, plain):
        losses = []
        for x, q1, q2, u_t, u_p in plain:
            for u, weight in ((u_p, ALPHA), (0, 1 - ALPHA)):
                both = answers(backbone, x, u_t, (q1, q2), user_vectors(model.user_model, u))
                losses += [-weight * torch.log(torch.sigmoid(z)) / 2 for z in both]
        return sum(losses) / len(plain)

    assert_updates_are_plain((*PAIRWISE, *KINDS[kind]), family, questions(some_comparisons()), read, loss_of)


def votes_and_another(*users):
    """One pair judged by several users, and one other pair."""
    return [*votes(*users), random_comparisons(2)[1]]


def test_responses_to_one_prompt_share_rows_and_see_only_the_prompt():
    """Nine responses to two prompts in rows of 12 tokens: each last state is that of the response alone."""
    config = tiny_config(*LINEAR)
    model, plain = tiny_model(config), plain_backbone(config)
    prefixes = ((1, 5, 6), (1, 7))
    readings = [Reading(i % 3, prefixes[i % 2], tuple(range(10 + i, 12 + i + i % 4))) for i in range(9)]
    batch = lay_out(readings, model.layout, tree_tokens=12)
    assert batch.input_ids_RT.shape[0] < 9 and batch.input_ids_RT.shape[1] <= 12
    states_MD = model.states_at(batch, batch.last_at_M)
    for (_, prefix, response, _), state in zip(readings, states_MD):
        assert (state - hidden_states(plain, prefix, response, [], None)[-1]).abs().max() < 1e-10


def test_both_branches_and_all_users_of_a_pair_share_one_backbone_pass():
    model = tiny_model(tiny_config(*LINEAR), noise=0.05)
    positions = []
    model.backbone.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    comparisons = votes_and_another(1, 2, 3, 0)
    accumulate_gradients(Task(tiny_config(*LINEAR), model, comparisons), range(5))
    (pair, *_, other) = comparisons
    responses = [len(ids) for c in (pair, other) for ids in (c.chosen, c.rejected)]
    assert len(positions) == 1 and positions[0] <= 2 * max(pair.length, other.length)
    assert sum(responses) < positions[0] < 5 * pair.length


def test_vanilla_is_the_bradley_terry_loop():
    """Uniform user without tokens: -log sigma(v.h1 - v.h2), one sequence at a time, gradients of all weights."""
    config = tiny_config(*SOFT, "user_model.kind=uniform", "user_model.tokens=0", "optim.micro_batch_size=2")
    model = tiny_model(config, noise=0.05)
    policy = plain_backbone(config)
    policy.load_state_dict(model.backbone.state_dict())
    v = model.value_head.weight.detach().clone().requires_grad_()
    comparisons = random_comparisons(5)
    for c in comparisons:
        h1, h2 = (hidden_states(policy, c.prefix, y, [], None)[-1] for y in (c.chosen, c.rejected))
        (torch.log(1 + torch.exp(-(v[0] @ h1 - v[0] @ h2))) / 5).backward()
    accumulate_gradients(Task(config, model, comparisons), list(range(5)))
    assert_same(gradients(model.backbone), gradients(policy))
    assert (model.value_head.weight.grad - v.grad).abs().max() < 1e-10


def test_margin_and_centering_by_hand():
    """r1 - r2 = 1, required 2 * 0.5: -log sigma(0) = log 2; and (r1 + r2)^2 = 9."""
    rewards = Rewards(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([2.0]))
    assert bradley_terry_loss(rewards, margin=0.5).item() == pytest.approx(math.log(2))
    assert centering(rewards).item() == 9.0
    loss = tiny_config("method=prm", "loss.margin=0.5", "loss.center=0.1").loss
    assert preference_loss(loss, rewards, None).item() == pytest.approx(math.log(2) + 0.9)
    assert reward_margin(loss, rewards, None).item() == 1.0  # what is required is no part of the accuracy


def test_a_comparisons_margin_reaches_the_loss():
    comparison = Comparison("p", "a", "b", None, None, "1", margin=3.0)
    config = tiny_config("method=prm", "loss.margin=1.0", "user_model.kind=uniform")
    encoded = Encoder(TOKENIZER, config.data).encode(comparison, UserIndex([]), EncodingReport())
    model = tiny_model(config)  # its value head is zero: r1 = r2
    loss = accumulate_gradients(Task(config, model, [encoded]), [0]).loss
    assert loss == pytest.approx(math.log(1 + math.exp(3)))


def test_pairwise_probabilities_of_both_orders_add_up_to_one_exactly():
    generator = torch.Generator().manual_seed(0)
    a, b = 20 * torch.randn(2, 1000, generator=generator)
    answers, swapped = Answers(a, b, torch.ones(1000)), Answers(-b, -a, torch.ones(1000))
    assert torch.equal(pairwise_margin(answers), -pairwise_margin(swapped))
    p = (torch.sigmoid(a.double()) + torch.sigmoid(b.double())) / 2
    assert (torch.sigmoid(pairwise_margin(Answers(a.double(), b.double(), p))) - p).abs().max() < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_who_is_named_first_changes_no_bit_of_a_pairwise_model(family, layout):
    """In float32: comparisons and the same ones swapped, all or some of them, have exactly opposite margins."""
    config = tiny_config(*PAIRWISE, f"model.layout={layout}", family=family)
    model = tiny_model(config, noise=0.1).float()
    comparisons = questions([*votes(1, 4, 0), *random_comparisons(12, seed=5)])
    users = [c.user for c in comparisons]

    def margins(comparisons):
        with torch.no_grad():
            return reward_margin(config.loss, model(model.collate(comparisons, users)), None)

    m = margins(comparisons)
    others = [swapped(c) for c in comparisons]
    assert m.dtype == torch.float32 and len(m.unique()) == 15
    assert torch.equal(margins(others), -m)
    assert torch.equal(torch.sigmoid(m) + (1 - torch.sigmoid(-margins(others))), torch.ones_like(m))
    some = [other if i % 3 else c for i, (c, other) in enumerate(zip(comparisons, others))]
    assert torch.equal(margins(some), torch.where(torch.arange(len(m)) % 3 > 0, -m, m))


def test_a_model_that_always_answers_a_still_learns():
    """z = +8 with y1 first and -8 with y1 second: the wrong order's gradient is -sigma(8) / 2."""
    z = torch.tensor([[8.0], [-8.0]], dtype=torch.float64, requires_grad=True)
    answer_loss(Answers(z[0], z[1], torch.ones(1))).backward()
    assert z.grad[1].item() == pytest.approx(-0.5 / (1 + math.exp(-8)))
    assert answer_loss(
        Answers(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(1.0)), margin=1.0
    ).item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_pairwise_model_averages_the_answers_to_both_orders(family):
    config = tiny_config(*PAIRWISE, family=family)
    model, plain = tiny_model(config, noise=0.05), plain_backbone(config)
    plain.load_state_dict(model.backbone.state_dict())
    encoder = Encoder(TOKENIZER, config.data, "pairwise")
    users = UserIndex(["u1", "u2"])
    comparison = Comparison("Hi", "yes", "no way", "u2", "likes brevity", "1")
    encoded = encoder.encode(comparison, users, EncodingReport())
    question = "\n\nResponse A:\n{}\n\nResponse B:\n{}\n\nThe better response is Response "
    assert TOKENIZER.decode(encoded.chosen) == question.format("yes", "no way")
    assert TOKENIZER.decode(encoded.rejected) == question.format("no way", "yes")

    e_UD = model.user_model(torch.tensor([2]))[0]
    wins = []
    for first, second, y1 in (("yes", "no way", "A"), ("no way", "yes", "B")):
        text = "likes brevity\nHi" + question.format(first, second)
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        embed = plain.get_input_embeddings()(torch.tensor(ids))
        logits = plain(inputs_embeds=torch.cat([embed[:1], e_UD, embed[1:]])[None]).logits[0, -1]
        answer = {x: logits[TOKENIZER.convert_tokens_to_ids(x)] for x in "AB"}
        wins.append((answer[y1].exp() / (answer["A"].exp() + answer["B"].exp())).item())
    margin = reward_margin(config.loss, score(model, [encoded], [2], 1), None)
    assert torch.sigmoid(margin).item() == pytest.approx(sum(wins) / 2, abs=1e-10)


def test_pair_question_needs_answers_of_one_token():
    question = pair_question(TOKENIZER)
    assert TOKENIZER.convert_ids_to_tokens([question.answer_a, question.answer_b]) == ["A", "B"]


def test_a_frozen_backbone_computes_each_response_once_and_never_moves():
    config = tiny_config(*LINEAR, "model.frozen=true")
    model = tiny_model(config, noise=0.05)
    calls = []
    model.backbone.base_model.register_forward_hook(lambda *_: calls.append(1))
    comparisons = votes_and_another(1, 2, 3)
    states = fixed_states(model, comparisons, 64, weights_fingerprint(model.backbone))
    task = Task(config, model, comparisons, states=states)
    for _ in range(2):
        accumulate_gradients(task, range(4))
    score_users(task)
    assert len(calls) == 1
    assert all(p.grad is None for p in model.backbone.parameters())

    thawed = tiny_model(tiny_config(*LINEAR), noise=0.0)
    thawed.user_model.load_state_dict(model.user_model.state_dict())
    for _ in range(2):
        accumulate_gradients(Task(config, thawed, comparisons), range(4))
    assert_same(gradients(model.user_model), gradients(thawed.user_model))


@pytest.mark.parametrize("base", [SOFT, LINEAR])
def test_single_responses_have_the_rewards_of_comparisons(base):
    config = tiny_config(*base)
    model = tiny_model(config, noise=0.05)
    comparisons = random_comparisons(5)
    users = [c.user for c in comparisons]
    expected = score(model, comparisons, users, 5)
    with torch.no_grad():
        readings = [Reading(c.user, tuple(c.prefix), tuple(c.rejected)) for c in comparisons]
        found = model.rewards(readings)
    assert (found - expected.rejected).abs().max() < 1e-10


def test_without_a_shared_component_known_users_stand_alone():
    config = tiny_config(*LINEAR, "user_model.shared=false", "user_model.init=random")
    model = tiny_model(config)
    e_BUD = model.user_model(torch.tensor([0, 2]))
    assert torch.equal(e_BUD[0], model.user_model.e_UD)
    assert torch.equal(e_BUD[1], model.user_model.offsets_MUD[1])


def test_zero_initialised_reward_heads_start_at_zero():
    for kind in ("uniform", "individual", "cluster"):
        model = tiny_model(tiny_config(*LINEAR, "user_model.init=zero", f"user_model.kind={kind}"))
        found = score(model, random_comparisons(3), [0, 1, 2], 3)
        assert found.chosen.abs().max() == 0 and found.rejected.abs().max() == 0


def test_hidden_states_of_a_frozen_backbone_are_cached_under_what_they_depend_on(tmp_path, monkeypatch):
    """A second model finds them; other tokens, another weight or a damaged file are computed anew, and rightly."""
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path))
    config = tiny_config(*LINEAR, "model.frozen=true")
    comparisons, computed = random_comparisons(4), []

    def remembered(comparisons, change=0.0):
        model = tiny_model(config)
        with torch.no_grad():
            model.backbone.get_input_embeddings().weight += change
        expected = score(model, comparisons, [c.user for c in comparisons], 4)
        model.backbone.base_model.register_forward_hook(lambda *_: computed.append(1))
        states = fixed_states(model, comparisons, 64, weights_fingerprint(model.backbone))
        found = score(model, comparisons, [c.user for c in comparisons], 4, states=states)
        assert (found.chosen - expected.chosen).abs().max() < 1e-12
        times = len(computed)
        computed.clear()
        return times

    assert remembered(comparisons) == 1
    assert remembered(comparisons) == 0
    assert remembered(comparisons, change=0.1) == 1
    assert remembered([c._replace(prefix=[*c.prefix, 7]) for c in comparisons]) == 1
    for path in (tmp_path / "states").iterdir():
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    assert remembered(comparisons) == 1
