"""The exact solution of a linear reward head, the prior on users and its strength, against oracles written here.

The oracles use the coordinates x = e * rms, in which differences of hidden states have a mean square of 1 in each of their W
dimensions, and a coordinate of e_0 has variance s_0^2 / W (see prlhf/method/prior.py).

Shape suffixes: N comparisons, M known users, S responses, W width, K rank.
"""

import math
from typing import NamedTuple

import pytest
import torch
from helpers import tiny_config
from torch import Tensor
from torch.nn.functional import logsigmoid

from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import Reading
from prlhf.config.keys import Config
from prlhf.errors import TrainingError, UserError
from prlhf.method.prior import Prior, Strength, counts_of, difference_scale
from prlhf.method.users import ClusterUsers, IndividualUsers, LowRankUsers, UniformUsers
from prlhf.solve.linear import LinearProblem, linear_problem, scaled_copy, solve, unscaled
from prlhf.solve.strength import FOLDS, Choice, Fold, choose, folds, held_out_losses

AUTO = ("user_model.prior=auto", "user_model.shared_prior=auto")


class Case(NamedTuple):
    """Comparisons of responses with known hidden states."""

    states_SW: Tensor
    pairs_N3: Tensor  # user, chosen, rejected
    known: int
    required_N: Tensor

    @property
    def rms_W(self) -> Tensor:
        """Root mean square of h(y1) - h(y2) in each dimension."""
        _, y1_N, y2_N = self.pairs_N3.T
        return (self.states_SW[y1_N] - self.states_SW[y2_N]).square().mean(dim=0).sqrt()


def case_of(states_SW: Tensor, pairs_N3: Tensor, known: int) -> Case:
    """The required margins differ between comparisons."""
    return Case(states_SW, pairs_N3, known, 0.5 + torch.arange(len(pairs_N3), dtype=torch.float64) % 3)


def random_case(seed: int = 0, M: int = 4, S: int = 14, W: int = 4, N: int = 60, unknown: bool = True) -> Case:
    """Random votes of users whose tastes share a common direction; users 0 and 1 vote most."""
    generator = torch.Generator().manual_seed(seed)
    states_SW = (
        torch.randn(S, W, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.2, 1.0])[:W] + 0.5
    )
    taste_MW = torch.randn(M + 1, W, generator=generator, dtype=torch.float64) + 1
    rows = []
    for n in range(N):
        u = n % (M + 1) if n % 2 else n % 2 + (n // 2) % 2  # users 0 and 1 more often
        u = u if unknown else max(u, 1)
        a, b = torch.randperm(S, generator=generator)[:2].tolist()
        z = (taste_MW[u] / states_SW.std(dim=0)) @ (states_SW[a] - states_SW[b])
        wins = torch.rand((), generator=generator, dtype=torch.float64) < torch.sigmoid(z)
        rows.append((u, a, b) if wins else (u, b, a))
    return case_of(states_SW, torch.tensor(rows), M)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def user_model(form: str, M: int, W: int, K: int = 2):
    """A user model as `build_user_model` makes it for a linear reward head with init=zero, with the same kinds of noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "uniform": lambda: UniformUsers(zeros(1, W)),
        "individual": lambda: IndividualUsers(zeros(1, W), zeros(M, 1, W)),
        "individual alone": lambda: IndividualUsers(zeros(1, W), zeros(M, 1, W), shared=False),
        "rank": lambda: LowRankUsers(zeros(1, W), noise(K, 1, W), zeros(M, K)),
        "cluster": lambda: ClusterUsers(zeros(K, 1, W), (1 + noise(M + 1, K)) / K, softmax=False),
        "cluster shared": lambda: LowRankUsers(zeros(1, W), zeros(K, 1, W), (1 + noise(M, K)) / K),
        "softmax": lambda: ClusterUsers(zeros(K, 1, W), (1 + noise(M + 1, K)) / K, softmax=True),
        "softmax shared": lambda: LowRankUsers(zeros(1, W), zeros(K, 1, W), (1 + noise(M, K)) / K, softmax=True),
    }[form]()


FORMS = (
    "uniform", "individual", "individual alone", "rank", "cluster", "cluster shared", "softmax", "softmax shared",
)  # fmt: skip


class Solved(NamedTuple):
    """The solution of the code under test, in the coordinates of hidden states."""

    objective: float
    values: dict[str, Tensor]
    vectors_MW: Tensor  # e_u of user 0 and the known ones

    def rewards(self, states_SW: Tensor) -> Tensor:
        """r_u(y) = e_u . h(y), (M + 1, S)."""
        return self.vectors_MW @ states_SW.T


def problem_of(case: Case, model, *keys: str) -> tuple[Config, LinearProblem]:
    config = tiny_config("method=prm", "user_model.aggregator=linear", "user_model.tokens=1", *keys)
    comparisons = [
        EncodedComparison([1], [1], [y1], [y2], user, required)
        for (user, y1, y2), required in zip(case.pairs_N3.tolist(), case.required_N.tolist())
    ]
    readings = [Reading(0, (1,), (s,)) for s in range(len(case.states_SW))]
    return config, linear_problem(config.loss, model, comparisons, (readings, case.states_SW), case.known)


def start_of(model, problem: LinearProblem):
    return scaled_copy(model, dict(model.named_parameters()), problem.scale_W)


def read_out(objective: float, model, solution, problem: LinearProblem) -> Solved:
    values = unscaled(solution, problem.scale_W)
    model.load_state_dict(values)
    return Solved(objective, values, model(torch.arange(problem.known + 1))[:, 0].detach())


def solved(case: Case, form: str, strength: Strength, *keys: str, K: int = 2) -> Solved:
    model = user_model(form, case.known, case.states_SW.shape[1], K)
    _, problem = problem_of(case, model, *keys)
    solution = start_of(model, problem)
    return read_out(solve(problem, solution, strength).objective, model, solution, problem)


def chosen_and_solved(case: Case, form: str, K: int = 2, *keys: str) -> tuple[Choice, Solved]:
    """The same with the strength chosen by cross-validation."""
    model = user_model(form, case.known, case.states_SW.shape[1], K)
    config, problem = problem_of(case, model, *AUTO, *keys)
    solution = start_of(model, problem)
    choice = choose(problem, solution, config.user_model, 0)
    return choice, read_out(solve(problem, solution, choice.strength).objective, model, solution, problem)


# The objective, written out.


class Loss(NamedTuple):
    """The keys of the loss that the tests vary."""

    alpha: float = 0.5
    label_smoothing: float = 0.0
    margin: float = 0.0
    center: float = 0.0

    @property
    def keys(self) -> list[str]:
        return [f"loss.{name}={value}" for name, value in self._asdict().items()]


def plain_loss_sum(case: Case, loss: Loss, x_MW: Tensor, personal: bool = True) -> Tensor:
    """sum_c alpha loss(r_u) + (1 - alpha) loss(r_0) with r_u = (x_u / rms) . h; user 0 has only the generic loss."""
    rewards_MS = (x_MW / case.rms_W) @ case.states_SW.T
    u_N, y1_N, y2_N = case.pairs_N3.T

    def branch(user_N: Tensor) -> Tensor:
        r1, r2 = rewards_MS[user_N, y1_N], rewards_MS[user_N, y2_N]
        z = r1 - r2 - loss.margin * case.required_N
        e = loss.label_smoothing
        return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z) + loss.center * (r1 + r2) ** 2

    alpha_N = loss.alpha * (u_N > 0).double() * personal
    return (alpha_N * branch(u_N) + (1 - alpha_N) * branch(torch.zeros_like(u_N))).sum()


def plain_vectors(form: str, x: dict[str, Tensor]) -> Tensor:
    """f(u) of user 0 and of each known one, (M + 1, W), from the parameters."""
    if form == "uniform":
        return x["e_UD"]
    if form == "individual alone":
        return torch.cat([x["e_UD"], x["offsets_MUD"][:, 0]])
    if form == "individual":
        return torch.cat([x["e_UD"], x["e_UD"] + x["offsets_MUD"][:, 0]])
    if form in ("cluster", "softmax"):
        w_MK = torch.softmax(x["w_MK"], dim=1) if form == "softmax" else x["w_MK"]
        return w_MK @ x["V_KUD"][:, 0]
    z_MK = torch.softmax(x["z_MK"], dim=1) if form == "softmax shared" else x["z_MK"]
    return torch.cat([x["e_UD"], x["e_UD"] + z_MK @ x["B_KUD"][:, 0]])


def plain_penalty(form: str, x: dict[str, Tensor], strength: Strength) -> Tensor:
    """-log p without its constant: e_0 ~ N(0, s_0^2 / W), and so on."""
    s, s_0 = strength
    f_MW = plain_vectors(form, x)
    W = f_MW.shape[1]
    shared = W * f_MW[0].square().sum() / (2 * s_0**2)
    if form == "uniform":
        return shared
    if form.startswith("individual"):
        return shared + W * (f_MW[1:] - f_MW[0]).square().sum() / (2 * s**2)
    if form == "cluster":
        basis_KW, z_MK = x["V_KUD"][:, 0], x["w_MK"][1:] - x["w_MK"][0]
        shared = s**2 * x["w_MK"][0].square().sum() / (2 * s_0**2)
    elif form == "softmax":
        w_MK = torch.softmax(x["w_MK"], dim=1)
        basis_KW, z_MK = x["V_KUD"][:, 0] - f_MW[0], w_MK[1:] - w_MK[0]
    else:
        basis_KW = x["B_KUD"][:, 0]
        z_MK = torch.softmax(x["z_MK"], dim=1) if form == "softmax shared" else x["z_MK"]
    K = len(basis_KW)
    return shared + K * W * basis_KW.square().sum() / (2 * s**2) + z_MK.square().sum() / 2


def plain_objective(form: str, case: Case, loss: Loss, strength: Strength, x: dict[str, Tensor]) -> Tensor:
    f_MW = plain_vectors(form, x)
    f_MW = f_MW.expand(case.known + 1, -1) if form == "uniform" else f_MW
    total = plain_loss_sum(case, loss, f_MW, form != "uniform") + plain_penalty(form, x, strength)
    return total / len(case.pairs_N3)


def in_x(case: Case, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters in the coordinates x = e * rms; w and z are no vectors, and stay."""
    return {name: value.clone() if name in ("w_MK", "z_MK") else value * case.rms_W for name, value in values.items()}


def newton(function, start: Tensor) -> Tensor:
    """The minimum of a convex function by Newton's method, halving steps that do not descend."""
    x = start
    for _ in range(50):
        gradient, hessian = torch.func.grad(function)(x), torch.func.hessian(function)(x)
        step, value, t = torch.linalg.solve(hessian, gradient), function(x), 1.0
        while t > 1e-8 and not function(x - t * step) <= value:
            t /= 2
        x = x - t * step
        if step.abs().max() < 1e-12:
            break
    return x


# 1. Convex problems.

CONVEX = [
    ("uniform", Loss(0.3)),
    ("uniform", Loss(0.5, 0.1, 0.4, 0.05)),
    ("individual", Loss(0.0)),
    ("individual", Loss(0.3, label_smoothing=0.2)),
    ("individual", Loss(0.5, margin=0.7)),
    ("individual", Loss(1.0, center=0.1)),
    ("individual alone", Loss(0.0, center=0.1)),
    ("individual alone", Loss(0.3, margin=0.7)),
    ("individual alone", Loss(0.5, 0.1, 0.4, 0.05)),
    ("individual alone", Loss(1.0)),
]


@pytest.mark.parametrize("form, loss", CONVEX)
def test_convex_users_are_where_newtons_method_ends(form, loss):
    case, strength = random_case(), Strength(1.5, 2.5)
    M, W = case.known, case.states_SW.shape[1]
    rows = 1 if form == "uniform" else M + 1

    def function(flat: Tensor) -> Tensor:
        x_MW = flat.view(rows, W)
        offsets = x_MW[1:, None] if form == "individual alone" else x_MW[1:, None] - x_MW[:1]
        return plain_objective(form, case, loss, strength, {"e_UD": x_MW[:1], "offsets_MUD": offsets})

    expected = newton(function, zeros(rows * W))
    found = solved(case, form, strength, *loss.keys)
    assert found.objective == pytest.approx(function(expected).item(), abs=1e-10)
    assert (found.vectors_MW * case.rms_W - expected.view(rows, W)).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["uniform", "individual", "rank", "cluster"])
def test_the_scale_of_hidden_states_changes_no_reward(form):
    """The rewards e . h do not depend on the units of the hidden states' dimensions."""
    case, strength = random_case(), Strength(3.0, 2.0)
    units_W = torch.tensor([1e3, 1e-3, 1.0, 17.0], dtype=torch.float64)
    one = solved(case, form, strength).rewards(case.states_SW)
    other = solved(case._replace(states_SW=case.states_SW * units_W), form, strength).rewards(case.states_SW * units_W)
    assert one.abs().max() > 0.1
    assert (one - other).abs().max() < 1e-6


# 2. Low rank and clusters.

LOW_RANK = [
    ("rank", 1),
    ("rank", 2),
    ("cluster", 2),
    ("cluster", 3),
    ("cluster shared", 2),
    ("softmax", 2),
    ("softmax shared", 3),
]


def best_of_restarts(function, values: dict[str, Tensor], restarts: int) -> float:
    """The least value that L-BFGS finds from random starts."""
    generator = torch.Generator().manual_seed(1)
    least = math.inf
    for _ in range(restarts):
        x = {
            name: torch.randn(v.shape, generator=generator, dtype=v.dtype).requires_grad_()
            for name, v in values.items()
        }
        optimizer = torch.optim.LBFGS(
            list(x.values()), max_iter=300, tolerance_grad=1e-8, tolerance_change=1e-13, line_search_fn="strong_wolfe"
        )

        def closure(optimizer: torch.optim.Optimizer = optimizer, x: dict[str, Tensor] = x) -> Tensor:
            optimizer.zero_grad()
            value = function(x)
            value.backward()
            return value

        optimizer.step(closure)
        least = min(least, function(x).item())
    return least


@pytest.mark.parametrize("form, K", LOW_RANK)
def test_low_rank_users_are_stationary_and_as_good_as_the_best_of_random_starts(form, K):
    case, strength, loss = random_case(seed=3, M=5, W=3), Strength(4.0, 2.0), Loss(0.6, margin=0.2)

    def function(x: dict[str, Tensor]) -> Tensor:
        return plain_objective(form, case, loss, strength, x)

    found = solved(case, form, strength, *loss.keys, K=K)
    x = in_x(case, found.values)
    assert function(x).item() == pytest.approx(found.objective, abs=1e-10)
    gradients = torch.func.grad(function)(x)
    assert max(g.abs().max() for g in gradients.values()) < 1e-6
    assert (found.vectors_MW[1:] - found.vectors_MW[0]).abs().max() > 0.01
    assert found.objective <= best_of_restarts(function, found.values, restarts=4) + 1e-8


def offset_gradient(case: Case, loss: Loss, f_MW: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the summed loss for e_0, (W,), and for the users' offsets, (M, W)."""
    gradient_MW = torch.func.grad(lambda x_MW: plain_loss_sum(case, loss, x_MW))(f_MW)
    return gradient_MW.sum(dim=0), gradient_MW[1:]


@pytest.mark.parametrize("s, K", [(0.6, 3), (1.5, 3), (4.0, 3), (4.0, 6)])
def test_users_of_a_sufficient_rank_are_the_optimum_of_the_nuclear_norm(s, K):
    """min over O of L(e_0, O) + c |O|_*, c = sqrt(K W) / s, is convex. At its optimum the gradient G for O has no singular
    value above c, and <G, O> = -c |O|_*."""
    case, loss, s_0 = random_case(seed=3, M=5, W=3, N=90), Loss(0.7), 2.0
    found = solved(case, "rank", Strength(s, s_0), *loss.keys, K=K)
    f_MW, W = found.vectors_MW * case.rms_W, 3
    shared_W, G_MW = offset_gradient(case, loss, f_MW)
    O_MW, c = f_MW[1:] - f_MW[0], math.sqrt(K * W) / s
    assert (shared_W + W * f_MW[0] / s_0**2).abs().max() < 1e-4
    assert torch.linalg.matrix_norm(G_MW, 2) <= c * (1 + 1e-5)
    nuclear = torch.linalg.matrix_norm(O_MW, "nuc")
    assert (G_MW * O_MW).sum().item() == pytest.approx(-c * nuclear.item(), abs=1e-4)
    least = (plain_loss_sum(case, loss, f_MW) + W * f_MW[0].square().sum() / (2 * s_0**2) + c * nuclear) / 90
    assert found.objective == pytest.approx(least.item(), abs=1e-9)


def test_a_prior_too_strong_for_any_direction_makes_all_users_exactly_the_generic_one():
    """Just below and above the s at which the gradient's first singular value at the generic optimum is sqrt(K W) / s."""
    case, loss, W = random_case(seed=3, M=5, W=3, N=90), Loss(0.7), 3
    generic = solved(case, "rank", Strength(0.0, 2.0), *loss.keys)
    assert torch.equal(generic.vectors_MW, generic.vectors_MW[:1].expand(6, -1))
    _, G_MW = offset_gradient(case, loss, generic.vectors_MW * case.rms_W)
    for K in (1, 2):
        threshold = math.sqrt(K * W) / torch.linalg.matrix_norm(G_MW, 2).item()
        below = solved(case, "rank", Strength(0.99 * threshold, 2.0), *loss.keys, K=K)
        above = solved(case, "rank", Strength(1.05 * threshold, 2.0), *loss.keys, K=K)
        assert torch.equal(below.vectors_MW, generic.vectors_MW)
        assert (above.vectors_MW[1:] - above.vectors_MW[0]).abs().max() > 1e-3


# 5. Folds.


def test_folds_hold_out_each_users_responses_and_never_train_on_them():
    case = random_case(M=4, S=30, N=300)
    _, problem = problem_of(case, user_model("individual", 4, 4))
    pairs = case.pairs_N3.tolist()
    found = folds(problem, seed=3)
    assert len(found) == FOLDS
    held_out_of = {}  # the fold of each user's response, found from the scored pairs
    for k, fold in enumerate(found):
        assert not (fold.train_N & fold.held_out_N).any()
        trained = {(u, y) for (u, *ys), train in zip(pairs, fold.train_N.tolist()) if train and u for y in ys}
        scored = {(u, y) for (u, *ys), held in zip(pairs, fold.held_out_N.tolist()) if held and u for y in ys}
        assert scored and not trained & scored
        for vote in scored:
            assert held_out_of.setdefault(vote, k) == k
        for (u, *ys), train, held in zip(pairs, fold.train_N.tolist(), fold.held_out_N.tolist()):
            if u == 0:
                assert train != held  # in each fold it is scored or trained on
            elif not train and not held:
                sides = [(u, y) in trained for y in ys]
                assert not all(sides)  # it straddles: one response is held out
    scored_N = sum(fold.held_out_N.int() for fold in found)
    assert scored_N.max() == 1 and all(scored_N[case.pairs_N3[:, 0] == 0] == 1)
    again = folds(problem, seed=3)
    assert all(torch.equal(a, b) for one, other in zip(found, again) for a, b in zip(one, other))
    assert any(not torch.equal(one.train_N, other.train_N) for one, other in zip(found, folds(problem, seed=4)))


def test_a_users_responses_are_dealt_out_nearly_equally():
    """Each user judges all pairs of 12 responses. A fold of 2 or 3 responses scores 1 or 3 pairs and trains on those of the rest."""
    rows = [(u, a, b) for u in (1, 2) for a in range(12) for b in range(a)]
    case = case_of(random_case(S=12).states_SW, torch.tensor(rows), 2)
    _, problem = problem_of(case, user_model("individual", 2, 4))
    for user in (1, 2):
        of_user = case.pairs_N3[:, 0] == user
        scored = sorted(fold.held_out_N[of_user].sum().item() for fold in folds(problem, seed=0))
        trained = sorted(fold.train_N[of_user].sum().item() for fold in folds(problem, seed=0))
        assert scored == [1, 1, 1, 3, 3] and trained == [36, 36, 45, 45, 45]


def test_where_nothing_can_be_held_out_that_is_said():
    case = case_of(random_case().states_SW, torch.tensor([(1, 0, 1), (1, 0, 1), (2, 3, 4)]), 2)
    _, problem = problem_of(case, user_model("individual", 2, 4))
    with pytest.raises(UserError, match=r"user_model.shared_prior: 3 comparisons are too few.*expected more"):
        folds(problem, seed=0)


@pytest.mark.parametrize("form", ["individual", "rank", "cluster", "softmax"])
def test_what_is_fitted_for_a_strength_does_not_depend_on_those_before(form):
    """At s = 1 one of two directions is used, at s = 2 both."""
    case = random_case(M=6, N=120)
    model = user_model(form, 6, 4)
    _, problem = problem_of(case, model, "loss.alpha=0.6")
    all_of_it = [Fold(problem.users_N >= 0, problem.users_N >= 0)]
    along, alone = (
        held_out_losses(problem, start_of(model, problem), {s: Strength(s, 2.0) for s in candidates}, all_of_it)
        for candidates in ((0.0, 0.5, 1.0, 2.0), (2.0,))
    )
    assert along[2.0] == pytest.approx(alone[2.0], abs=1e-5)


# 6. The prior.


def tiny_users(form: str):
    """A shared number and two users by hand: W = 1, M = 2."""

    def t(*values, shape) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).view(shape)

    third = math.log(2.0)  # softmax of (log 2, 0) is (2/3, 1/3)
    return {
        "uniform": lambda: UniformUsers(t(2.0, shape=(1, 1))),
        "individual": lambda: IndividualUsers(t(2.0, shape=(1, 1)), t(1.0, -3.0, shape=(2, 1, 1))),
        "individual alone": lambda: IndividualUsers(t(2.0, shape=(1, 1)), t(3.0, -1.0, shape=(2, 1, 1)), shared=False),
        "rank": lambda: LowRankUsers(t(2.0, shape=(1, 1)), t(1.0, 2.0, shape=(2, 1, 1)), t(1, 0, 2, 1, shape=(2, 2))),
        "cluster": lambda: ClusterUsers(t(1.0, 2.0, shape=(2, 1, 1)), t(1, 1, 2, 1, 3, 2, shape=(3, 2)), False),
        "softmax": lambda: ClusterUsers(t(3.0, 0.0, shape=(2, 1, 1)), t(third, 0, 0, 0, 0, third, shape=(3, 2)), True),
        "softmax shared": lambda: LowRankUsers(
            t(2.0, shape=(1, 1)), t(1.0, 2.0, shape=(2, 1, 1)), t(third, 0, 0, 0, shape=(2, 2)), softmax=True
        ),
    }[form]()


# s = 2, s_0 = 4, and vectors are scaled by 10: e = 2 becomes 20, and 20^2 / (2 s_0^2) = 400 / 32 = 12.5.
BY_HAND = {
    "uniform": 12.5,
    "individual": 12.5 + 100 / 8 + 900 / 8,  # offsets 1 and -3
    "individual alone": 12.5 + 100 / 8 + 900 / 8,
    "rank": 12.5 + 2 * 500 / 8 + (1 + 5) / 2,  # |B|^2 = 1 + 4, z = (1, 0) and (2, 1)
    "cluster": 4 * 2 / 32 + 2 * 500 / 8 + (1 + 5) / 2,  # w_0 = (1, 1): s^2 |w_0|^2 / (2 s_0^2); w - w_0 as z above
    # f(0) = 2, so V - f(0) = (1, -2); w - w_0 = (-1/6, 1/6) and (-1/3, 1/3)
    "softmax": 12.5 + 2 * 500 / 8 + (2 / 36 + 2 / 9) / 2,
    "softmax shared": 12.5 + 2 * 500 / 8 + (5 / 9 + 1 / 2) / 2,
}


@pytest.mark.parametrize("form", BY_HAND)
@pytest.mark.parametrize(
    "users, batches", [([1, 1, 1, 2, 0], [5]), ([1, 2, 1, 0, 1], [2, 1, 2]), ([2, 1, 2, 2, 2, 1], [1] * 6)]
)
def test_batches_are_charged_with_the_prior_once_altogether(form, users, batches):
    prior = Prior(Strength(2.0, 4.0), torch.tensor([10.0], dtype=torch.float64), len(users), counts_of(users, 2))
    model, charged = tiny_users(form), 0.0
    for some in torch.tensor(users).split(batches):
        charged += prior.penalty(model, some).item()
    assert charged == pytest.approx(BY_HAND[form], abs=1e-12)


def test_counts_and_scales():
    assert counts_of([2, 0, 2, 1], 3).tolist() == [1, 1, 2, 0]
    differences_NW = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 1.0]], dtype=torch.float64)
    never = math.sqrt((25 + 2) / 6)  # where responses never differ: from the mean of all squares
    expected = [math.sqrt(12.5 * 3), never * math.sqrt(3), math.sqrt(3)]
    assert difference_scale(differences_NW).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("form", ["individual", "rank", "cluster shared"])
def test_users_with_fewer_comparisons_end_nearer_to_what_users_share(form):
    """Five users judge the same pair alike, 1, 2, 4, 8 and 16 times; unknown users judge it the other way."""
    times = [1, 2, 4, 8, 16]
    rows = [(u, 0, 1) for u, n in enumerate(times, start=1) for _ in range(n)] + [(0, 1, 0)] * 40
    case = case_of(random_case(S=2).states_SW, torch.tensor(rows), 5)
    found = solved(case, form, Strength(4.0, 4.0), K=1)
    distances = (found.vectors_MW[1:] - found.vectors_MW[0]).norm(dim=1).tolist()
    assert distances[0] > 0 and all(near < 0.98 * far for near, far in zip(distances, distances[1:]))


# 3 and 4. Simulated users.


class Simulated(NamedTuple):
    """Users drawn from the prior, their votes on some responses, and their votes on others."""

    case: Case
    rewards_MS: Tensor  # true rewards
    offsets_MW: Tensor  # of x_i from x_0
    fresh_N3: Tensor  # user, chosen, rejected; of responses that are not in the user's training comparisons


def simulated(
    seed: int, s: float, s_0: float, rank: int, M: int = 16, S: int = 40, W: int = 4, each: int = 50
) -> Simulated:
    """x_0 ~ N(0, s_0^2 / W), x_i = x_0 + B z_i, B ~ N(0, s^2 / (rank W)), z ~ N(0, 1); P(y1 over y2) = sigma(r1 - r2)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def pairs_among(responses: Tensor, user: int, count: int) -> list[tuple[int, int, int]]:
        orders = [responses[torch.randperm(len(responses), generator=generator)[:2]].tolist() for _ in range(count)]
        return [(user, a, b) for a, b in orders]

    states_SW, judged, fresh = normal(S, W) * torch.exp(normal(W)), [], []
    for user in range(1, M + 1):
        order = torch.randperm(S, generator=generator)
        judged += pairs_among(order[: S // 2], user, each)
        fresh += pairs_among(order[S // 2 :], user, 100)
    case = case_of(states_SW, torch.tensor(judged), M)
    x_0W, offsets_MW = s_0 / math.sqrt(W) * normal(W), normal(M, rank) @ (s / math.sqrt(rank * W) * normal(rank, W))
    rewards_MS = (torch.cat([x_0W[None], x_0W + offsets_MW]) / case.rms_W) @ states_SW.T

    def judge(pairs: list[tuple[int, int, int]]) -> Tensor:
        u_N, a_N, b_N = torch.tensor(pairs).T
        z_N = rewards_MS[u_N, a_N] - rewards_MS[u_N, b_N]
        wins_N = torch.rand(len(pairs), generator=generator, dtype=torch.float64) < torch.sigmoid(z_N)
        return torch.stack([u_N, torch.where(wins_N, a_N, b_N), torch.where(wins_N, b_N, a_N)], dim=1)

    return Simulated(case._replace(pairs_N3=judge(judged)), rewards_MS, offsets_MW, judge(fresh))


def right_N(rewards_MS: Tensor, pairs_N3: Tensor) -> Tensor:
    """Whether a user's chosen response has the higher reward."""
    u_N, y1_N, y2_N = pairs_N3.T
    return (rewards_MS[u_N, y1_N] > rewards_MS[u_N, y2_N]).double()


def principal_cosines(one_MW: Tensor, other_MW: Tensor, rank: int) -> Tensor:
    """Cosines of the angles between the first `rank` right singular directions of two matrices."""
    bases = [torch.linalg.svd(x_MW, full_matrices=False).Vh[:rank] for x_MW in (one_MW, other_MW)]
    return torch.linalg.svdvals(bases[0] @ bases[1].T)


@pytest.fixture
def coarse(monkeypatch):
    """Stop the search earlier, for tests that do not need seven digits of the solution."""
    monkeypatch.setattr("prlhf.solve.linear.TOLERANCE", 1e-4)


@pytest.mark.parametrize("K", [2, 4])
def test_low_rank_users_of_a_chosen_strength_recover_simulated_ones(K, coarse):
    s = 3.0
    world = simulated(0, s, s_0=2.0, rank=2)
    choice, found = chosen_and_solved(world.case, "rank", K)
    rewards_MS = found.rewards(world.case.states_SW)
    own, true = (right_N(r, world.fresh_N3).mean().item() for r in (rewards_MS, world.rewards_MS))
    generic = right_N(rewards_MS[:1].expand_as(rewards_MS), world.fresh_N3).mean().item()
    assert own > generic + 0.05 and own > true - 0.03, (generic, own, true)
    x_MW = found.vectors_MW * world.case.rms_W
    assert principal_cosines(x_MW[1:] - x_MW[0], world.offsets_MW, 2).min() > 0.9
    assert s / 3 <= choice.strength.users <= 3 * s


@pytest.mark.parametrize("form, K", [("individual", 0), ("rank", 4), ("cluster", 3), ("cluster shared", 3)])
def test_where_users_do_not_differ_no_user_model_is_worse_than_vanilla(form, K, coarse):
    """All users have one reward vector. On fresh pairs the user model is within noise of the uniform one (paired)."""
    world = simulated(0, 0.0, s_0=2.0, rank=1, M=8, S=30, W=3, each=50)
    _, vanilla = chosen_and_solved(world.case, "uniform")
    choice, found = chosen_and_solved(world.case, form, K)
    assert choice.strength.users == 0
    vanilla_MS = vanilla.rewards(world.case.states_SW).expand_as(world.rewards_MS)
    d_N = right_N(found.rewards(world.case.states_SW), world.fresh_N3) - right_N(vanilla_MS, world.fresh_N3)
    assert abs(d_N.mean()) <= 2.5 * d_N.std() / math.sqrt(len(d_N))


# 7. Unusual data.


def unusual(name: str) -> Case:
    """A case of four dimensions."""
    case = random_case(N=30)
    states_SW, pairs_N3 = case.states_SW, case.pairs_N3
    users_N = pairs_N3[:, :1]
    return {
        "one known user": lambda: random_case(N=30, M=1),
        "users without comparisons": lambda: case._replace(known=7),
        "a constant dimension": lambda: case._replace(states_SW=torch.cat([states_SW[:, :3], torch.ones(14, 1)], dim=1)),
        "two responses": lambda: case._replace(pairs_N3=torch.cat([users_N, users_N % 2, 1 - users_N % 2], dim=1)),
        "float16": lambda: case._replace(states_SW=(100 * states_SW).half()),
        "bfloat16": lambda: case._replace(states_SW=states_SW.bfloat16()),
        "one user's comparisons": lambda: case._replace(pairs_N3=torch.cat([0 * users_N + 2, pairs_N3[:, 1:]], dim=1)),
        "all unknown": lambda: case._replace(pairs_N3=torch.cat([0 * users_N, pairs_N3[:, 1:]], dim=1)),
        "nobody known": lambda: case._replace(pairs_N3=torch.cat([0 * users_N, pairs_N3[:, 1:]], dim=1), known=0),
        "no pair that differs": lambda: case._replace(states_SW=states_SW[:1].expand(14, 4)),
    }[name]()  # fmt: skip


UNUSUAL = (
    "one known user", "users without comparisons", "a constant dimension", "two responses", "float16", "bfloat16",
    "one user's comparisons", "all unknown", "nobody known", "no pair that differs",
)  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("form", FORMS)
def test_unusual_data_have_a_sensible_solution(name, form):
    case = unusual(name)
    found = solved(case, form, Strength(2.0, 2.0), K=3)
    assert math.isfinite(found.objective) and found.vectors_MW.isfinite().all()
    # |z|^2 / 2 of users at (1, 1, 1) / 3
    on_simplex = case.known / 6 / len(case.pairs_N3) if form == "softmax shared" else 0
    assert found.objective <= math.log(2) + on_simplex + 1e-9  # the objective of e = 0
    if form in ("individual", "individual alone", "rank"):
        without = [u for u in range(case.known + 1) if u not in case.pairs_N3[:, 0]]
        assert (found.vectors_MW[without] - found.vectors_MW[0]).abs().le(1e-4).all()


@pytest.mark.parametrize("name", ["one known user", "two responses", "all unknown", "no pair that differs"])
def test_unusual_data_have_a_strength_or_that_is_refused(name, coarse):
    case = unusual(name)
    if name == "two responses":
        with pytest.raises(UserError, match="too few to choose"):
            chosen_and_solved(case._replace(pairs_N3=case.pairs_N3[case.pairs_N3[:, 0] > 0]), "rank")
        return
    choice, found = chosen_and_solved(case, "rank")
    assert found.vectors_MW.isfinite().all()
    record = choice.record
    losses = [*record["held_out_loss_by_prior"].values(), *record["held_out_loss_by_shared_prior"].values()]
    assert losses and all(map(math.isfinite, losses))


def test_states_that_are_not_finite_are_an_error_for_people():
    case = random_case()
    case.states_SW[3, 1] = math.nan
    with pytest.raises(TrainingError, match="hidden state is not finite"):
        solved(case, "cluster", Strength(2.0, 2.0))


def test_two_solutions_are_the_same_bits(monkeypatch, coarse):
    monkeypatch.setattr("prlhf.solve.strength.USERS", (0.0, 1.0, 4.0))
    case = random_case(M=2, N=40)
    one, other = (chosen_and_solved(case, "individual", 0, "user_model.shared_prior=2.0") for _ in range(2))
    assert one[0].record == other[0].record
    for form in ("individual", "cluster", "softmax"):
        one, other = (solved(case, form, Strength(2.0, 2.0)) for _ in range(2))
        assert one.objective == other.objective
        assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)


def test_one_cluster_is_one_direction():
    """K = 1: f(u) = w_u v, so all users' vectors are parallel; they differ in length."""
    case = random_case()
    found = solved(case, "cluster", Strength(2.0, 2.0), K=1)
    assert torch.linalg.svdvals(found.vectors_MW)[1] < 1e-8
    assert (found.vectors_MW[1:] - found.vectors_MW[0]).abs().max() > 0.01
