"""How sure the model is of users whose rewards are not linear in their rows, the prior of such rows, and questions for them."""

import pytest
import torch
from helpers import random_comparisons
from test_prompts import CLUSTER, LINEAR, RANK, RM, SOFTMAX, Given
from torch.distributions import Bernoulli
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from prlhf.adapt import gauss_newton
from prlhf.adapt.ask import Candidates, ask
from prlhf.adapt.gauss_newton import Basis, search
from prlhf.adapt.reading import task_of
from prlhf.adapt.rows import RowLaw, TrainedRows, cross_validated, held_out, predicted
from prlhf.batch.trees import Reading
from prlhf.method.losses import pairwise_margin, reward_margin
from prlhf.method.posterior import Law, Posterior
from prlhf.score.score import score
from prlhf.score.slopes import margin_slopes, reward_slopes, user_rows

FORMS = {
    "P-DPO": (),
    "behind the prompt": ("user_model.place=prompt_end",),
    "SimPO, rank": ("loss.kind=simpo", "loss.beta=2", RANK),
    "clusters": ("loss.beta=1", *CLUSTER),
    "P-RM": (RM,),
    "P-RM, linear head, softmax": (RM, LINEAR, "user_model.tokens=1", *CLUSTER, SOFTMAX),
}


@pytest.fixture(autouse=True)
def attention_with_second_derivatives():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keys", FORMS.values(), ids=FORMS)
def test_margins_and_their_slopes_are_the_plain_methods(keys):
    """Each comparison at a row of its own, in batches of two, against autograd through the plain method."""
    given = Given(*keys)
    task, t_NR = given.task(), randn(4, given.basis_VR.shape[1])
    rows_NV = given.prior.base_V + t_NR @ given.basis_VR.T
    before = user_rows(given.model.user_model, [1, 2, 3, 4])
    margins_N, slopes_NV = torch.zeros(4).double(), torch.zeros_like(rows_NV)
    for part in margin_slopes(task, range(4), rows_NV):
        margins_N[part.indices], slopes_NV[part.indices] = part.values_N, part.slopes_NV

    def plain(t_R):
        y1_N, y2_N = given.outputs(t_R).T
        lengths = [[len(getattr(c, side)) for c in given.comparisons] for side in ("chosen", "rejected")]
        outputs = (
            type(score(given.model, given.comparisons, [0] * 4, 4))(y1_N, y2_N, *torch.tensor(lengths))[:4]
            if given.config.method == "pdpo"
            else (y1_N, y2_N)
        )
        if given.config.method == "prm":
            return y1_N - y2_N
        if given.config.loss.kind == "simpo":
            return 2 * (y1_N / outputs[2] - y2_N / outputs[3])
        reference = task.reference
        return given.config.loss.beta * ((y1_N - reference.chosen) - (y2_N - reference.rejected))

    for n in range(4):
        assert margins_N[n].item() == pytest.approx(plain(t_NR[n])[n].item(), abs=1e-9)
        slope_R = torch.autograd.functional.jacobian(plain, t_NR[n])[n]
        assert (slopes_NV[n] @ given.basis_VR - slope_R).abs().max() < 1e-9 < 1e-4 < slope_R.abs().max()
    assert torch.equal(before, user_rows(given.model.user_model, [1, 2, 3, 4]))


def test_a_pairwise_models_slopes_are_differences_of_its_margins():
    given = Given("method=pairwise", RANK)
    task, row_V, line_V = given.task(), randn(2, seed=1), randn(2, seed=2)
    slopes_NV = torch.zeros(4, 2).double()
    for part in margin_slopes(task, range(4), row_V.repeat(4, 1)):
        slopes_NV[part.indices] = part.slopes_NV

    def margins(at_V):
        given.model.user_model.z_MK.data[0] = at_V
        return pairwise_margin(score(given.model, given.comparisons, [1] * 4, 4)).double()

    differences_N = (margins(row_V + 1e-4 * line_V) - margins(row_V - 1e-4 * line_V)) / 2e-4
    assert (slopes_NV @ line_V - differences_N).abs().max() < 1e-6 < 1e-3 < differences_N.abs().max()


@pytest.mark.parametrize("keys", [(RM,), (RM, LINEAR, "user_model.tokens=1", *CLUSTER, SOFTMAX)])
def test_rewards_slopes_are_differences_of_rewards(keys):
    given = Given(*keys)
    readings = [Reading(1 + n % 2, tuple(c.prefix), tuple(c.chosen)) for n, c in enumerate(given.comparisons)]
    slopes_NV, table = (
        reward_slopes(given.model, readings),
        given.model.user_model.get_parameter(given.model.user_model.table),
    )
    line = randn(*table.shape, seed=2)
    with torch.no_grad():
        ahead, behind = (given.model.rewards(readings) for step in (1e-5, -2e-5) if table.add_(step * line) is not None)
    lines_NV = line.flatten(1)[[r.user - given.model.user_model.first_user for r in readings]]
    expected_N = ((ahead - behind) / 2e-5).detach()
    assert ((slopes_NV * lines_NV).sum(dim=1) - expected_N).abs().max() < 1e-6 < 1e-3 < expected_N.abs().max()


def test_with_a_floor_the_search_ends_at_the_optimum_in_the_whole_row(monkeypatch):
    """J over all numbers of a row, with the dense inverse of D^T D + floor I, by autograd through the plain method."""
    monkeypatch.setattr(gauss_newton, "LAST_GRADIENT", 1e-7)
    given = Given(RM)
    prior = TrainedRows(given.prior.base_V, randn(4, 96, seed=5) / 4, True, False).prior().by(RowLaw(1.0, 0.3))
    span_VK = prior.directions_KV.T
    problem = given.problem()._replace(basis=Basis(span_VK, prior.floor))
    at = search(given.task(), {5: problem})[5]
    covariance_VV = span_VK @ span_VK.T + prior.floor * torch.eye(96, dtype=torch.float64)
    assert covariance_VV.trace().item() == pytest.approx((randn(4, 96, seed=5) / 4).square().sum().item() / 4)
    given.basis_VR = torch.eye(96, dtype=torch.float64)  # the row itself
    row_V = (problem.row(at.t_R) - given.prior.base_V).requires_grad_()
    objective = given.losses(given.outputs(row_V)).sum() + row_V @ torch.linalg.solve(covariance_VV, row_V) / 2
    (gradient_V,) = torch.autograd.grad(objective, row_V)
    assert gradient_V.abs().max() < 1e-5 and row_V.norm() > 0.1
    assert objective.item() == pytest.approx(at.value.item(), abs=1e-8)
    outside = row_V.detach() - span_VK @ torch.linalg.lstsq(span_VK, row_V.detach()).solution
    assert outside.norm() > 1e-3


@pytest.mark.parametrize("floor", [None, 0.2])
def test_the_variance_of_a_row_is_that_of_its_dense_covariance(floor):
    directions_KV, told_KQ, slopes_NV = randn(3, 7, seed=1), randn(3, 2, seed=2) / 4, randn(4, 7, seed=3)
    laws = {0: Law(1.0, 1.0), 5: Law(2.0, 1.0)}
    posterior = Posterior.of(torch.eye(3, dtype=torch.float64), {5: told_KQ}, True, laws)._replace(
        directions_KV=directions_KV, floor=None if floor is None else torch.tensor(floor).double()
    )
    inner_KK = 2 * torch.eye(3, dtype=torch.float64) - told_KQ @ told_KQ.T
    dense_VV = directions_KV.T @ inner_KK @ directions_KV + 2 * (floor or 0) * torch.eye(7, dtype=torch.float64)
    found_N = posterior.row_variances([5, 5, 2, 5], slopes_NV)
    expected_N = torch.einsum("nv,vw,nw->n", slopes_NV, dense_VV, slopes_NV)
    assert torch.allclose(found_N[[0, 1, 3]], expected_N[[0, 1, 3]]) and found_N[2].isnan()


def test_a_law_predicts_trained_users_by_others_from_a_few_of_their_comparisons(monkeypatch):
    """Rewards that are linear in two coordinates: each user's optimum by L-BFGS under a prior written here, and what it predicts."""
    given = Given(RM, LINEAR, "user_model.tokens=1", RANK)
    training = [c._replace(user=1 + n % 4) for n, c in enumerate(random_comparisons(40, seed=4))]
    trained = TrainedRows(given.prior.base_V, user_rows(given.model.user_model, [1, 2, 3, 4]), False, True)
    monkeypatch.setattr("prlhf.adapt.rows.ROUGHLY", 1e-6)
    comparisons, users = held_out(training)
    task = task_of(given.loaded, comparisons)
    assert sorted(user.row for user in users) == [0, 1, 2, 3]
    table, z_MK = given.model.user_model.z_MK, trained.away_MV

    def margins(at_K):
        table.data[0] = at_K
        return reward_margin(
            given.config.loss, score(given.model, task.comparisons, [1] * len(task.comparisons), 8), None
        )

    generic_N = margins(torch.zeros(2)).double()
    x_NK = torch.stack([margins(axis_K).double() - generic_N for axis_K in torch.eye(2)], dim=1)
    table.data[0] = z_MK[0]
    found_H = predicted(task, users, [trained.without(user.row).prior() for user in users], RowLaw(4.0, 0.0))
    assert held_out(training[:4])[1] == held_out([])[1] == []  # one comparison of each tells nothing of the rest
    moved = []
    for user, found in zip(users, found_H):
        own = [task.comparisons[i] for i in (*user.learn, *user.predict)]
        assert {c.user for c in own} == {user.row + 1} and len(user.learn) == 3 and 0 < len(user.predict) <= 6
        texts = [(*c.prefix, -1, *y) for c in own for y in (c.chosen, c.rejected)]
        assert len(set(texts)) == len(texts)
        others_MK = z_MK[[m for m in range(4) if m != user.row]]
        covariance_KK = (
            4 * (3 * torch.eye(2) + others_MK.T @ others_MK) / 6
        )  # the standard prior is worth min(K, M) + 1 users
        precision_KK = torch.linalg.inv(covariance_KK)
        c_K = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([c_K], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure(user=user, precision_KK=precision_KK, optimiser=optimiser, c_K=c_K):
            optimiser.zero_grad()
            loss = softplus(-(generic_N + x_NK @ c_K)[user.learn]).sum() + c_K @ precision_KK @ c_K / 2
            loss.backward()
            return loss

        optimiser.step(closure)
        expected = softplus(-(generic_N + x_NK @ c_K)[user.predict]).mean().item()
        generic = softplus(-generic_N[user.predict]).mean().item()
        assert found.item() == pytest.approx(expected, abs=1e-6)
        moved.append(abs(expected - generic))
    assert max(moved) > 1e-2


def test_scale_and_floor_change_for_more_than_two_standard_errors_alone():
    """Losses of four users, by hand: a gain of 0.1 in each, or of 0.3 in the mean with a standard error of 0.4."""
    clear, doubtful = torch.full((4,), 0.9), torch.tensor([0.0, 0.0, 1.4, 1.4])
    one = torch.ones(4)

    def choose(losses, full=True):
        return cross_validated(RowLaw(1.0, 0.1), lambda law: losses.get(tuple(law), one), full)

    assert choose({}) == (1.0, 0.1)
    assert choose({(4.0, 0.1): clear}) == (4.0, 0.1)
    assert choose({(4.0, 0.1): doubtful}) == (1.0, 0.1)
    assert choose({(0.25, 0.1): clear, (4.0, 0.1): clear - 0.2, (4.0, 0.0): clear - 0.4}) == (4.0, 0.0)
    assert choose({(1.0, 0.0): clear}, full=False) == (1.0, 0.1)
    assert choose({(1.0, 0.1): None}) == (0.25, 0.1)  # whose search ends, at least
    assert choose({(1.0, 0.1): clear, (0.25, 0.1): None, (4.0, 0.1): None}) == (1.0, 0.1)


def test_information_of_a_soft_prompt_is_that_of_a_posterior_sample():
    """400 rows of a narrow posterior, their margins by the model itself: mutual information of answer and row, by counting."""
    given = Given("user_model.tokens=1", "model.width=16")
    table = given.model.user_model.offsets_MUD
    root_KV, told = randn(2, table[0].numel(), seed=3) / 50, torch.zeros(2, 0).double()
    posterior = Posterior.of(torch.eye(2).double(), {2: told}, True, {0: Law(1.0, 1.0), 2: Law(1.0, 1.0)})
    loaded = given.loaded._replace(posterior=posterior._replace(directions_KV=root_KV))
    tokens = [c._replace(user=0) for c in given.comparisons]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prlhf.adapt.ask.task_of", lambda loaded, comparisons: given.task(list(comparisons)))
        asked, said = ask(loaded, Candidates([], [], tokens), "b", 4)
    assert said == "adapted"
    draws_S2 = randn(400, 2, seed=7)
    rows = table[1].flatten() + draws_S2 @ root_KV
    task = given.task(tokens)
    margins_SN = torch.stack([margin_at(given, task, row_V) for row_V in rows])
    p_SN = margins_SN.sigmoid()
    exact_N = Bernoulli(p_SN.mean(dim=0)).entropy() - Bernoulli(p_SN).entropy().mean(dim=0)
    first = asked[0]
    assert exact_N[first.row] > 0.8 * exact_N.max() and exact_N.max() > 1e-4
    assert first.information == pytest.approx(exact_N[first.row].item(), rel=0.2)
    for q in asked:
        assert q.probability == pytest.approx(p_SN.mean(dim=0)[q.row].item(), abs=0.005)


def margin_at(given, task, row_V):
    """The margins of a task's comparisons as a user with this row has them."""
    given.model.user_model.offsets_MUD.data[3] = row_V.view_as(given.model.user_model.offsets_MUD[3])
    outputs = score(given.model, task.comparisons, [4] * len(task.comparisons), 8)
    return reward_margin(given.config.loss, outputs, task.reference).double()
