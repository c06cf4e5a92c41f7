from dataclasses import replace

import pytest
import torch
from helpers import tiny_config

from prlhf.method.build import InitialValues, build_user_model
from prlhf.method.plain import user_vectors
from prlhf.method.users import ClusterUsers, IndividualUsers, LowRankUsers, UniformUsers
from prlhf.train.row_adamw import RowAdamW


def build(*overrides, users=3):
    table = torch.arange(40.0, dtype=torch.float64).view(10, 4)
    config = tiny_config("user_model.tokens=2", *overrides).user_model
    return build_user_model(config, users, starting(config, table)), table


def starting(config, table, reward_head=0):
    embedding = torch.nn.Embedding.from_pretrained(table)
    return InitialValues(config.init, embedding, table, torch.Generator().manual_seed(0), reward_head)


def test_uniform():
    e = torch.randn(2, 4)
    out = UniformUsers(e)(torch.tensor([0, 3]))
    assert torch.equal(out[0], e) and torch.equal(out[1], e)
    assert UniformUsers(torch.zeros(0, 4))(torch.tensor([1])).shape == (1, 0, 4)


def test_individual_is_shared_plus_offset_and_user_zero_is_shared_alone():
    e, o = torch.randn(2, 4), torch.randn(3, 2, 4)
    out = IndividualUsers(e, o)(torch.tensor([0, 1, 3]))
    assert torch.equal(out, torch.stack([e, e + o[0], e + o[2]]))


def test_an_unknown_user_never_moves_an_offset():
    model = IndividualUsers(torch.randn(2, 4), torch.randn(3, 2, 4))
    model(torch.tensor([0, 2])).sum().backward()
    grad = model.offsets_MUD.grad.to_dense()
    assert grad[[0, 2]].abs().max() == 0  # users 1 and 3 were not there, user 0 has no offset
    assert torch.equal(grad[1], torch.ones(2, 4))
    assert torch.equal(model.e_UD.grad, 2 * torch.ones(2, 4))


@pytest.mark.parametrize("softmax", [False, True])
def test_cluster_is_a_mixture_of_archetypes(softmax):
    V, w = torch.randn(3, 2, 4), torch.randn(5, 3)
    out = ClusterUsers(V, w, softmax)(torch.tensor([4, 0]))
    for row, user in zip(out, (4, 0)):
        weights = [x / sum(w[user].exp()) for x in w[user].exp()] if softmax else w[user]
        expected = sum(weights[k] * V[k] for k in range(3))
        assert torch.allclose(row, expected, atol=1e-6)


@pytest.mark.parametrize("softmax", [False, True])
def test_low_rank_is_shared_plus_a_mixture_of_directions_and_user_zero_is_shared_alone(softmax):
    e, B, z = torch.randn(2, 4), torch.randn(3, 2, 4), torch.randn(5, 3)
    out = LowRankUsers(e, B, z, softmax)(torch.tensor([5, 0, 1]))
    for row, user in zip(out, (5, 0, 1)):
        weights = z[user - 1].exp() / z[user - 1].exp().sum() if softmax else z[user - 1]
        expected = e + sum(weights[k] * B[k] for k in range(3)) if user else e
        assert torch.allclose(row, expected, atol=1e-6)


RANK, SHARED = "user_model.rank=3", ("user_model.kind=cluster", "user_model.shared=true")
FORMS = {
    "uniform": ("user_model.kind=uniform",),
    "individual": (),
    "individual alone": ("user_model.shared=false",),
    "low rank": (RANK,),
    "cluster": ("user_model.kind=cluster",),
    "softmax": ("user_model.kind=cluster", "user_model.softmax=true"),
    "shared clusters": SHARED,
    "shared softmax": (*SHARED, "user_model.softmax=true"),
}


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_the_user_model_in_the_form_that_the_prior_measures(form):
    """shared + basis . coordinates is f(u) for every user; what all share is f(0), from which user 0 does not differ."""
    model, _ = build(*FORMS[form], "user_model.init=random", users=4)
    users = torch.tensor([3, 0, 4, 3])
    shared, basis, coordinates, origin = model.parts(users)
    f = torch.stack([user_vectors(model, user) for user in users.tolist()])
    assert torch.allclose(shared, f[1], atol=1e-12)
    if origin is not None:
        assert form == "cluster" and torch.allclose(sum(w * V for w, V in zip(origin, basis)), shared, atol=1e-12)
    if coordinates is None:
        assert form == "uniform" and basis is None
        return
    assert coordinates[1].abs().max() == 0 and coordinates[[0, 2]].abs().min() > 0
    if basis is None:
        assert torch.allclose(shared + coordinates, f, atol=1e-12)
    else:
        assert torch.allclose(shared + torch.einsum("bk,kud->bud", coordinates, basis), f, atol=1e-12)


def test_vocabulary_initialisation_takes_word_embeddings():
    for form in ("individual", "cluster", "uniform", "low rank", "shared clusters"):
        model, table = build(*FORMS[form])
        rows = {tuple(row) for row in table.tolist()}
        for name, p in model.named_parameters():
            if name not in ("w_MK", "z_MK"):
                assert all(tuple(v) in rows for v in p.detach().flatten(0, -2).tolist()), name


def test_zero_initialisation_makes_all_users_equal():
    for kind in ("individual", "cluster"):
        model, _ = build("user_model.init=zero", f"user_model.kind={kind}")
        out = model(torch.tensor([0, 1, 3]))
        assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2]) and out.abs().max() > 0


@pytest.mark.parametrize("reward_head", [0, 1, 2])
@pytest.mark.parametrize("init", ["zero", "solved"])
@pytest.mark.parametrize("form", ["low rank", "shared clusters", "shared softmax"])
def test_from_zero_users_are_equal_but_learn_to_differ(form, init, reward_head):
    """f(i) = f(0) for all users, and zero as a reward head; yet the first gradient makes known users differ."""
    table = torch.randn(50, 4, dtype=torch.float64)
    config = replace(tiny_config("user_model.tokens=1", *FORMS[form]).user_model, init=init)
    model = build_user_model(config, 3, starting(config, table, reward_head))
    users = torch.tensor([0, 1, 3])
    out = model(users)
    assert out.shape == (3, 1, 4 * max(1, reward_head)) and out.dtype == torch.float64
    assert torch.allclose(out[0], out[1], atol=1e-12) and torch.allclose(out[0], out[2], atol=1e-12)
    assert (out.abs().max() == 0) == (reward_head > 0)
    target = torch.randn(out.shape, dtype=torch.float64)
    (out * target).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad.to_dense()
    moved = model(users).flatten(1)
    assert (torch.cdist(moved, moved) + torch.eye(3)).min() > 1e-6  # they were equal to 1e-12


def test_random_initialisation_has_the_embeddings_scale():
    table = 0.05 * torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    config = tiny_config("user_model.tokens=10", "user_model.init=random").user_model
    model = build_user_model(config, 100, starting(config, table))
    assert model.offsets_MUD.std().item() == pytest.approx(0.05, rel=0.05)


def test_the_same_seed_gives_the_same_user_model():
    one, other = build()[0], build()[0]
    assert torch.equal(one.offsets_MUD, other.offsets_MUD)


@pytest.mark.parametrize("form", ["individual", "low rank", "shared softmax"])
def test_no_known_user_at_all(form):
    model, _ = build(*FORMS[form], users=0)
    assert torch.equal(model(torch.tensor([0]))[0], model.e_UD)
    parts = model.parts(torch.tensor([0, 0]))
    assert torch.equal(parts.shared_UD, model.e_UD) and not parts.coordinates_B.any()


@pytest.mark.parametrize("kind", ["individual", "individual alone", "low rank", "shared softmax", "cluster"])
def test_a_tables_gradient_is_the_rows_read_and_that_of_the_dense_table(kind):
    """Two backward passes, in which some users come twice, against the same tensors read by plain indexing."""
    low_rank, weights_of = (
        kind in ("low rank", "shared softmax"),
        (lambda z: z) if kind == "low rank" else (lambda z: z.softmax(0)),
    )
    shared = torch.randn(3, 2, 4)
    table = torch.randn(5, 3) if low_rank else torch.randn(6, 3) if kind == "cluster" else torch.randn(5, 2, 4)
    model = {
        "individual": lambda: IndividualUsers(shared[0], table.clone()),
        "individual alone": lambda: IndividualUsers(shared[0], table.clone(), shared=False),
        "low rank": lambda: LowRankUsers(shared[0], shared.clone(), table.clone()),
        "shared softmax": lambda: LowRankUsers(shared[0], shared.clone(), table.clone(), softmax=True),
        "cluster": lambda: ClusterUsers(shared, table.clone(), softmax=True),
    }[kind]()
    dense = table.clone().requires_grad_()
    for users in ([4, 1, 4, 0], [1, 2]):
        weights = torch.randn(len(users), 2, 4)
        (model(torch.tensor(users)) * weights).sum().backward()
        for user, weight in zip(users, weights):
            if kind == "cluster":
                out = sum(w * v for w, v in zip(dense[user].softmax(0), shared))
            elif low_rank and user:
                out = sum(w * v for w, v in zip(weights_of(dense[user - 1]), shared))
            elif low_rank:
                out = torch.zeros(2, 4)
            else:
                out = dense[user - 1] if user else torch.zeros(2, 4)
            if out.requires_grad:
                (out * weight).sum().backward()
    (found,) = model.tables
    assert found.grad.is_sparse and found.grad.sparse_dim() == 1
    assert torch.allclose(found.grad.to_dense(), dense.grad, atol=1e-6)
    read = set(found.grad.coalesce().indices()[0].tolist())
    assert set(model.rows_of([4, 1, 4, 0, 1, 2]).tolist()) == set(dense.grad.flatten(1).any(1).nonzero()[:, 0].tolist())
    assert read == set(model.rows_of([4, 1, 0, 2]).tolist())


def test_rows_of_users():
    individual, cluster = build()[0], build("user_model.kind=cluster")[0]
    assert individual.rows_of([3, 0, 1, 3]).tolist() == [0, 2]
    assert cluster.rows_of([3, 0, 1, 3]).tolist() == [0, 1, 3]
    for form in ("low rank", "shared clusters"):
        assert build(*FORMS[form])[0].rows_of([3, 0, 1, 3]).tolist() == [0, 2]
    uniform = build("user_model.kind=uniform")[0]
    assert uniform.tables == [] and uniform.rows_of([0, 2]).tolist() == []


@pytest.mark.parametrize("form", ["low rank", "shared softmax"])
def test_coordinates_move_as_those_of_dense_adamw(form):
    """Twelve updates, each by few users, against torch's AdamW on dense gradients of f(u) written out."""
    model, twin = (build(*FORMS[form], "user_model.init=random", users=6)[0] for _ in range(2))
    by_rows = RowAdamW(model.tables, total_steps=12, lr=0.1)
    dense = torch.optim.AdamW(twin.tables, lr=0.1, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(12):
        users = torch.randint(0, 7, (3,), generator=generator)
        weights = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
        by_rows.catch_up(model.z_MK, model.rows_of(users.tolist()))
        (model(users) * weights).sum().backward()
        sum((user_vectors(twin, user) * weight).sum() for user, weight in zip(users.tolist(), weights)).backward()
        twin.z_MK.grad = torch.zeros_like(twin.z_MK) if twin.z_MK.grad is None else twin.z_MK.grad
        for optimizer in (by_rows, dense):
            optimizer.step()
            optimizer.zero_grad()
    by_rows.catch_up(model.z_MK)
    assert (model.z_MK - twin.z_MK).abs().max() < 1e-12
