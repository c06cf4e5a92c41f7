import pytest
import torch
from helpers import tiny_config

from prlhf.user_models import ClusterUsers, IndividualUsers, UniformUsers, build_user_model


def build(*overrides, users=3):
    table = torch.arange(40.0, dtype=torch.float64).view(10, 4)
    config = tiny_config("user_model.tokens=2", *overrides).user_model
    return build_user_model(config, users, table, torch.Generator().manual_seed(0)), table


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


def test_vocabulary_initialisation_takes_word_embeddings():
    for overrides in (("user_model.kind=individual",), ("user_model.kind=cluster",), ("user_model.kind=uniform",)):
        model, table = build(*overrides)
        rows = {tuple(row) for row in table.tolist()}
        for name, p in model.named_parameters():
            if name != "w_MK":
                assert all(tuple(v) in rows for v in p.detach().flatten(0, -2).tolist()), name


def test_zero_initialisation_makes_all_users_equal():
    for kind in ("individual", "cluster"):
        model, _ = build("user_model.init=zero", f"user_model.kind={kind}")
        out = model(torch.tensor([0, 1, 3]))
        assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2]) and out.abs().max() > 0


def test_random_initialisation_has_the_embeddings_scale():
    table = 0.05 * torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    config = tiny_config("user_model.tokens=10", "user_model.init=random").user_model
    model = build_user_model(config, 100, table, torch.Generator().manual_seed(0))
    assert model.offsets_MUD.std().item() == pytest.approx(0.05, rel=0.05)


def test_the_same_seed_gives_the_same_user_model():
    one, other = build()[0], build()[0]
    assert torch.equal(one.offsets_MUD, other.offsets_MUD)


def test_no_known_user_at_all():
    model, _ = build(users=0)
    assert torch.equal(model(torch.tensor([0]))[0], model.e_UD)


@pytest.mark.parametrize("kind", ["individual", "individual alone", "cluster"])
def test_a_tables_gradient_is_the_rows_read_and_that_of_the_dense_table(kind):
    """Two backward passes, in which some users come twice, against the same tensors read by plain indexing."""
    shared, table = torch.randn(3, 2, 4), torch.randn(6, 3) if kind == "cluster" else torch.randn(5, 2, 4)
    model = {
        "individual": lambda: IndividualUsers(shared[0], table.clone()),
        "individual alone": lambda: IndividualUsers(shared[0], table.clone(), shared=False),
        "cluster": lambda: ClusterUsers(shared, table.clone(), softmax=True),
    }[kind]()
    dense = table.clone().requires_grad_()
    for users in ([4, 1, 4, 0], [1, 2]):
        weights = torch.randn(len(users), 2, 4)
        (model(torch.tensor(users)) * weights).sum().backward()
        for user, weight in zip(users, weights):
            if kind == "cluster":
                out = sum(w * v for w, v in zip(dense[user].softmax(0), shared))
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
    uniform = build("user_model.kind=uniform")[0]
    assert uniform.tables == [] and uniform.rows_of([0, 2]).tolist() == []
