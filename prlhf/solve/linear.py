"""The exact solution of a linear reward head on a frozen backbone: no learning rate, no data order, no steps.

The hidden states h(y) are fixed, so only the user model is unknown. Its objective is the one that training minimises,

    1/N ( sum_c [ alpha loss(r_u(y1) - r_u(y2)) + (1 - alpha) loss(r_0(y1) - r_0(y2)) ]  -  log p(user model) ),

with r_u(y) = e_u . h(y); all rewards are one matrix product R = E H^T. L-BFGS minimises it in float64, in coordinates in which
differences of hidden states have the same size in every dimension (`difference_scale`).

For uniform and individual users this is convex. For low-rank users it is not, but their penalty K |B|^2 / (2 s^2) + |z|^2 / 2
is that of a nuclear norm (Srebro et al. 2005): users differ only if the loss's gradient for their offsets has singular values
above sqrt(K) / s. The search starts along these directions; if there are none, all users are the generic one.

Shape suffixes: N comparisons, M known users, S responses, W pooled width, U = 1 vector a user, K rank or clusters.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import Reading
from prlhf.config.keys import LossConfig
from prlhf.errors import TrainingError
from prlhf.method.losses import Rewards, branch_weights, preference_loss
from prlhf.method.prior import Prior, Strength, difference_scale
from prlhf.method.users import ClusterUsers, IndividualUsers, LowRankUsers, UniformUsers, is_personal

TOLERANCE = 1e-7  # L-BFGS stops when no entry of the objective's gradient is larger
ITERATIONS = 2000
MEMORY = 30  # updates that L-BFGS remembers
START = 0.3  # distance of low-rank users from the generic one at the start, in standard deviations of the prior


@dataclass(frozen=True)
class LinearProblem:
    """Comparisons of responses with known hidden states, and the weight of each branch's loss."""

    loss: LossConfig
    states_SW: Tensor  # float64, each dimension divided by scale_W
    scale_W: Tensor
    chosen_N: Tensor  # row of states_SW
    rejected_N: Tensor
    users_N: Tensor
    required_N: Tensor  # the margin by which y1 must win, in units of loss.margin
    own_N: Tensor  # weight of the user branch; the rest, to 1, is the generic branch's
    known: int  # M

    def of(self, comparisons_N: Tensor) -> "LinearProblem":
        """The problem of some of the comparisons; (N,) boolean."""
        names = (field.name for field in fields(self) if field.name.endswith("_N"))
        return replace(self, **{name: getattr(self, name)[comparisons_N] for name in names})

    def vectors(self, user_model: nn.Module) -> Tensor:
        """e_u of user 0 and of every known user, (M + 1, W)."""
        return user_model(torch.arange(self.known + 1, device=self.users_N.device))[:, 0]

    def rewards(self, vectors_MW: Tensor) -> tuple[Rewards, Rewards]:
        """Rewards of each comparison's responses, read by its user and by user 0."""
        rewards_MS = vectors_MW @ self.states_SW.T

        def read_by(users_N: Tensor) -> Rewards:
            # index_select, as the backward pass of indexing adds up equal indices in no fixed order.
            row_N, flat = users_N * len(self.states_SW), rewards_MS.flatten()
            chosen_N, rejected_N = (flat.index_select(0, row_N + y_N) for y_N in (self.chosen_N, self.rejected_N))
            return Rewards(chosen_N, rejected_N, self.required_N)

        return read_by(self.users_N), read_by(torch.zeros_like(self.users_N))

    def losses(self, vectors_MW: Tensor) -> Tensor:
        """alpha loss(user) + (1 - alpha) loss(generic) of each comparison, (N,)."""
        own_N, generic_N = (preference_loss(self.loss, rewards, None) for rewards in self.rewards(vectors_MW))
        return self.own_N * own_N + (1 - self.own_N) * generic_N

    @property
    def users_differ(self) -> bool:
        """Whether any loss reads a user's own vector."""
        return bool((self.own_N > 0).any())


def linear_problem(
    loss: LossConfig,
    user_model: nn.Module,
    comparisons: Sequence[EncodedComparison],
    responses: tuple[Sequence[Reading], Tensor],
    known: int,
) -> LinearProblem:
    """The problem of these comparisons. responses: all of them and their pooled hidden states (S, W), on the device to use.

    TrainingError if a hidden state is not finite.
    """
    readings, states_SW = responses
    if not states_SW.isfinite().all():
        raise TrainingError("user_model.prior: a response's hidden state is not finite, expected finite (model.dtype)")
    row_of = {(reading.prefix, reading.response): s for s, reading in enumerate(readings)}
    device, states_SW = states_SW.device, states_SW.double()
    chosen_N = torch.tensor([row_of[tuple(c.prefix), tuple(c.chosen)] for c in comparisons], device=device)
    rejected_N = torch.tensor([row_of[tuple(c.prefix), tuple(c.rejected)] for c in comparisons], device=device)
    users_N = torch.tensor([c.user for c in comparisons], device=device)
    required_N = torch.tensor([c.margin for c in comparisons], device=device, dtype=torch.float64)
    own_N = branch_weights(users_N, loss.alpha, is_personal(user_model, loss.alpha)).user
    scale_W = difference_scale(states_SW[chosen_N] - states_SW[rejected_N])
    states_SW = states_SW / scale_W
    return LinearProblem(loss, states_SW, scale_W, chosen_N, rejected_N, users_N, required_N, own_N, known)


def objective(problem: LinearProblem, user_model: nn.Module, strength: Strength) -> Tensor:
    """The loss of all comparisons plus -log p(user model), divided by N, ()."""
    N, known = len(problem.users_N), torch.arange(1, problem.known + 1, device=problem.users_N.device)
    # The problem's coordinates are scaled already. Counts are not read: each known user is charged once.
    prior = Prior(strength, scale_W=torch.ones(1, dtype=torch.float64), comparisons=N, counts=torch.empty(0))
    penalty = prior.negative_log_density(user_model, known, torch.ones_like(known), 1.0)
    return (problem.losses(problem.vectors(user_model)).sum() + penalty) / N


class Optimum(NamedTuple):
    """The objective where the search ended, and the largest entry of its gradient: 0 at an exact optimum."""

    objective: float
    largest_gradient: float


def solve(problem: LinearProblem, user_model: nn.Module, strength: Strength, warm: bool = False) -> Optimum:
    """Set a float64 user model, in the problem's coordinates, to the optimum.

    warm: start from the user model as it is, not near the generic user's optimum. TrainingError if the search diverges.
    """
    if not strength.users or not problem.users_differ:
        generic, optimum = solve_generic(problem, strength)
        set_all_to_generic(user_model, generic.e_UD.data)
        return optimum
    if not warm:
        start(problem, user_model, strength)
    return minimise(problem, user_model, strength)


def solve_generic(problem: LinearProblem, strength: Strength) -> tuple[UniformUsers, Optimum]:
    """The optimum if no user differs from the generic one."""
    users = UniformUsers(problem.scale_W.new_zeros(1, len(problem.scale_W)))
    return users, minimise(problem, users, strength)


@torch.no_grad()
def set_all_to_generic(user_model: nn.Module, e_UW: Tensor) -> None:
    """Give every user of a user model the vector e."""
    for parameter in user_model.parameters():
        parameter.zero_()
    user_model.vectors[0].copy_(e_UW)  # the generic user's vector, or all archetypes
    if isinstance(user_model, ClusterUsers):
        user_model.w_MK[:, 0] = 1.0
    if isinstance(user_model, IndividualUsers) and not user_model.shared:
        user_model.offsets_MUD.copy_(e_UW)


def start(problem: LinearProblem, user_model: nn.Module, strength: Strength) -> None:
    """Set a user model near the optimum, which the search then finds from there."""
    if isinstance(user_model, ClusterUsers) and not user_model.softmax:
        return start_clusters(problem, user_model, strength)
    e_UW = solve_generic(problem, strength)[0].e_UD.data
    if isinstance(user_model, ClusterUsers):
        user_model.V_KUD.data.add_(e_UW)  # every archetype is the generic user, plus its initial noise
        return
    user_model.e_UD.data.copy_(e_UW)
    if isinstance(user_model, LowRankUsers) and not user_model.softmax:
        start_along_gradient(problem, user_model, strength.users)


def start_clusters(problem: LinearProblem, user_model: ClusterUsers, strength: Strength) -> None:
    """K archetypes from low-rank users of rank K - 1: f(i) = e_0 + B z_i = V w_i with V = (c e_0, B) and w_i = (1 / c, z_i).

    c makes the prior of V and that of w_0 equally large.
    """
    s, s_0 = strength
    K, W, zeros = len(user_model.V_KUD), len(problem.scale_W), problem.scale_W.new_zeros
    users = LowRankUsers(zeros(1, W), zeros(K - 1, 1, W), zeros(problem.known, K - 1))
    solve(problem, users, strength)
    e_UW, B_KUW = users.e_UD.data, users.B_KUD.data
    c = (s**4 / (K * (s_0 or s) ** 2 * max(e_UW.square().sum().item(), 1e-6))) ** 0.25
    user_model.V_KUD.data.copy_(torch.cat([c * e_UW[None], B_KUW]))
    user_model.w_MK.data.zero_()
    user_model.w_MK.data[:, 0] = 1 / c
    user_model.w_MK.data[1:, 1:] = users.z_MK


def start_along_gradient(problem: LinearProblem, user_model: LowRankUsers, s: float) -> None:
    """Set low-rank users to the directions in which the loss falls fastest from the generic optimum.

    The gradient G (M, W) for offsets at zero is U diag(g) Q^T; so z = -c U and B = c' Q^T. If no g is above sqrt(K) / s, z = 0
    and B = 0, which is stationary: the search stays there.
    """
    K, M = len(user_model.B_KUD), problem.known
    offsets_MW = problem.scale_W.new_zeros(M + 1, len(problem.scale_W)).requires_grad_()
    loss = problem.losses(user_model.e_UD.detach() + offsets_MW).sum()
    (gradient_MW,) = torch.autograd.grad(loss, offsets_MW)
    U, g, Qt = torch.linalg.svd(gradient_MW[1:], full_matrices=False)
    rank = min(K, len(g))
    user_model.z_MK.data.zero_()
    user_model.B_KUD.data.zero_()
    if K and g[0] > math.sqrt(K) / s:
        user_model.z_MK.data[:, :rank] = -START * math.sqrt(M) * U[:, :rank]
        user_model.B_KUD.data[:rank, 0] = START * s / math.sqrt(K) * Qt[:rank]


def minimise(problem: LinearProblem, user_model: nn.Module, strength: Strength) -> Optimum:
    """Search by L-BFGS from the user model as it is. TrainingError if the objective is not finite where it ends."""
    end = {"max_iter": ITERATIONS, "max_eval": 2 * ITERATIONS, "tolerance_grad": TOLERANCE, "tolerance_change": 0.0}
    optimizer = torch.optim.LBFGS(user_model.parameters(), **end, history_size=MEMORY, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(problem, user_model, strength)
        value.backward()
        return value

    optimizer.step(closure)
    value = closure().item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the exact solution was not found: the objective is {value:g}; expected hidden states that are finite, and a "
            "user_model.shared_prior, or optim.solver=adamw"
        )
    return Optimum(value, max(p.grad.to_dense().abs().max().item() for p in user_model.parameters() if p.numel()))


def scaled_copy(user_model: nn.Module, values: dict[str, Tensor], scale_W: Tensor) -> nn.Module:
    """A user model of the same form with these values, in float64, in a problem's coordinates and on its device.

    values: whole parameters, as those of the user model itself may be sharded.
    """
    forms = (UniformUsers, IndividualUsers, LowRankUsers, ClusterUsers)
    form = next(form for form in forms if isinstance(user_model, form))  # FSDP makes the model's class one of its own
    flags = {name: getattr(user_model, name) for name in ("shared", "softmax") if hasattr(user_model, name)}
    values = {name: value.to(scale_W.device, torch.float64, copy=True) for name, value in values.items()}
    copied = form(**values, **flags)
    for vectors in copied.vectors:
        vectors.data.mul_(scale_W)
    return copied


def unscaled(solution: nn.Module, scale_W: Tensor) -> dict[str, Tensor]:
    """The parameters of a solution, out of the problem's coordinates and on the CPU."""
    solution = copy.deepcopy(solution)
    for vectors in solution.vectors:
        vectors.data.div_(scale_W)
    return {name: parameter.detach().cpu() for name, parameter in solution.named_parameters()}
