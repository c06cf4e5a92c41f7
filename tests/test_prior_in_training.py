"""The prior's part of an update, against its formula written out; and the prior of updates if nobody differs."""

import random
from collections import Counter

import pytest
import torch
from helpers import (
    USERS,
    assert_same,
    gradients,
    random_comparisons,
    tiny_config,
    tiny_model,
)

from prlhf.method.plain import user_vectors
from prlhf.method.prior import Prior, Strength, counts_of
from prlhf.score.reference import weights_fingerprint
from prlhf.score.task import Task
from prlhf.solve import strength as strength_module
from prlhf.solve.run import set_prior
from prlhf.train.step import accumulate_gradients

SOFT = ("method=prm",)
LINEAR = ("method=prm", "user_model.aggregator=linear", "user_model.tokens=1")
DPO = ("loss.kind=orpo",)
SHARED = ("user_model.kind=cluster", "user_model.shared=true")
FORMS = {
    "uniform": ("user_model.kind=uniform",),
    "individual": (),
    "individual alone": ("user_model.shared=false",),
    "low rank": ("user_model.rank=2",),
    "cluster": ("user_model.kind=cluster",),
    "softmax": ("user_model.kind=cluster", "user_model.softmax=true"),
    "shared clusters": SHARED,
    "shared softmax": (*SHARED, "user_model.softmax=true"),
}
S, S_0 = 0.7, 1.9


def charged(model, comparisons, update, s, s_0, scale_W):
    """The mean over the update of |z_u|^2 / (2 n_u), and (|e_0|^2 / (2 s_0^2) + K |B|^2 / (2 s^2)) / N, written out.

    z_u: an offset over s, coordinates, or softmax(w_u); zero for user 0. For clusters: minus that of user 0, with e_0 = V w_0.
    """
    users, n = model.user_model, Counter(c.user for c in comparisons)

    def size(vector):
        return ((vector * scale_W) ** 2).sum()

    def weights(row):
        return torch.exp(row) / torch.exp(row).sum() if users.softmax else row

    total = 0.0
    for i in update:
        u = comparisons[i].user
        if hasattr(users, "offsets_MUD") and u:
            offset = users.offsets_MUD[u - 1] - (0 if users.shared else users.e_UD)
            total = total + size(offset) / s**2 / (2 * n[u])
        elif hasattr(users, "z_MK") and u:
            total = total + (weights(users.z_MK[u - 1]) ** 2).sum() / (2 * n[u])
        elif hasattr(users, "w_MK"):
            total = total + ((weights(users.w_MK[u]) - weights(users.w_MK[0])) ** 2).sum() / (2 * n[u])
    e_0 = user_vectors(users, 0)
    shared = size(e_0) / (2 * s_0**2)
    if hasattr(users, "w_MK") and not users.softmax:
        shared = s**2 / s_0**2 * (users.w_MK[0] ** 2).sum() / 2
    for name in ("B_KUD", "V_KUD"):
        if hasattr(users, name):
            basis = getattr(users, name)
            basis = basis - e_0 if name == "V_KUD" and users.softmax else basis
            shared = shared + len(basis) * size(basis) / (2 * s**2)
    return total / len(update) + shared / len(comparisons)


@pytest.mark.parametrize("base", [SOFT, LINEAR, DPO], ids=["soft prompt", "linear head", "pdpo"])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_an_update_is_that_of_the_loss_and_the_prior(form, base):
    """For any order and micro-batches, with users who occur twice, once or not at all in the update."""
    comparisons, update = random_comparisons(9, seed=2), [4, 0, 7, 2, 5]
    assert 0 in {comparisons[i].user for i in update}
    assert Counter(comparisons[i].user for i in update) != Counter(c.user for c in comparisons)
    scale = (
        torch.rand(32 if base == LINEAR else 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
    )
    plain, twin = (tiny_model(tiny_config(*base, *FORMS[form]), noise=0.05) for _ in range(2))
    loss = accumulate_gradients(Task(tiny_config(*base, *FORMS[form]), plain, comparisons), update).loss
    charged(twin, comparisons, update, S, S_0, scale).backward()
    of_prior = gradients(twin)
    assert of_prior and all(name.startswith("user_model") for name in of_prior)
    expected = gradients(plain)
    for name, gradient in of_prior.items():
        expected[name] = expected[name] + gradient

    for size in (1, 3):
        config = tiny_config(*base, *FORMS[form], f"optim.micro_batch_size={size}")
        model = tiny_model(config, noise=0.05)
        model.prior = Prior(Strength(S, S_0), scale, 9, counts_of([c.user for c in comparisons], USERS))
        random.Random(size).shuffle(update)
        found = accumulate_gradients(Task(config, model, comparisons), update)
        assert found.loss == pytest.approx(loss, abs=1e-12)  # what is logged is the loss alone
        assert_same(gradients(model), expected)


def test_without_a_shared_prior_what_users_share_is_free():
    comparisons = random_comparisons(6)
    config = tiny_config(*SOFT)
    model = tiny_model(config, noise=0.05)
    prior = Prior(Strength(S, None), torch.ones(1), 6, counts_of([c.user for c in comparisons], USERS))
    prior.penalty(model.user_model, torch.tensor([c.user for c in comparisons])).backward()
    assert model.user_model.e_UD.grad is None and model.user_model.offsets_MUD.grad.to_dense().abs().max() > 0


def test_all_updates_of_an_epoch_together_charge_the_whole_prior_once():
    """-log p of the user model: each known user's coordinates once, for any number of comparisons of the user."""
    comparisons = random_comparisons(11, seed=1)
    model = tiny_model(tiny_config(*SOFT, "user_model.rank=2"), noise=0.3)
    prior = Prior(Strength(S, S_0), torch.ones(1), 11, counts_of([c.user for c in comparisons], USERS))
    users = model.user_model
    there = sorted({c.user for c in comparisons} - {0})
    expected = (users.z_MK[[u - 1 for u in there]] ** 2).sum() / 2 + (users.e_UD**2).sum() / (2 * S_0**2)
    expected = expected + 2 * (users.B_KUD**2).sum() / (2 * S**2)
    found = sum(prior.penalty(users, torch.tensor([c.user for c in comparisons[i : i + 4]])) for i in (0, 4, 8))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(
    "keys, expected", [(("prior=auto",), (1.0, None)), (("prior=0.3", "shared_prior=2"), (0.3, 2.0))]
)
def test_a_soft_prompts_prior_is_in_units_of_the_word_embeddings(keys, expected):
    config = tiny_config(*SOFT, *(f"user_model.{key}" for key in keys))
    model = tiny_model(config, noise=0.05)
    comparisons = random_comparisons(7)
    record = set_prior(config, model, comparisons, weights_fingerprint(model.backbone))
    assert (record["prior"], record["shared_prior"]) == expected
    table = model.backbone.get_input_embeddings().weight.detach()
    spread = ((table - table.mean()) ** 2).mean().sqrt().item()
    assert model.prior.scale_W.tolist() == pytest.approx([1 / spread], rel=1e-3)
    assert model.prior.comparisons == 7
    users = Counter(c.user for c in comparisons)
    assert model.prior.counts.tolist() == [users[u] for u in range(USERS + 1)]


def test_without_a_prior_a_model_has_none():
    config = tiny_config(*SOFT)
    model = tiny_model(config)
    assert set_prior(config, model, random_comparisons(3), "") is None and model.prior is None


@pytest.mark.parametrize("init", ["vocabulary", "solved"])
def test_where_nobody_is_found_to_differ_updates_have_a_narrow_prior(init, monkeypatch):
    """0 is chosen, so solved users are all alike; updates cannot use a standard deviation of 0."""
    monkeypatch.setattr(strength_module, "USERS", (0.0,))
    keys = (*LINEAR, "user_model.rank=2", "user_model.prior=auto", "lora.rank=2", f"user_model.init={init}")
    config = tiny_config(*keys)
    comparisons = [c._replace(user=1 + i % 2) for i, c in enumerate(random_comparisons(30))]
    comparisons = comparisons + [c._replace(rejected=other.chosen) for c, other in zip(comparisons, comparisons[2:])]
    model = tiny_model(config)
    record = set_prior(config, model, comparisons, weights_fingerprint(model.backbone))
    assert record["prior"] == 0 and model.prior.strength.users == 0.25
    with torch.no_grad():
        vectors = model.user_model(torch.arange(USERS + 1))
    assert init == "vocabulary" or torch.equal(vectors, vectors[:1].expand_as(vectors))
