"""The exact solution of a linear reward head on a frozen backbone: no learning rate, no order of the data, no steps.

Hidden states h do not change, so that the user model alone is unknown, and its objective is that of the training,

    1/N  ( sum_c [ alpha loss(r_u(y1) - r_u(y2)) + (1 - alpha) loss(r_0(y1) - r_0(y2)) ]  -  log p(user model) ),   r_u(y) = e_u . h(y),

all users' rewards of all responses at once: R = E H^T. It is minimised by L-BFGS in float64, in coordinates in which all
dimensions of hidden-state differences have one scale (`prior.difference_scale`). For uniform and individual users it is
convex. For low-rank users it is not, but the penalty K |B|^2 / (2 s^2) + |z|^2 / 2 is that of a nuclear norm (Srebro et al.
2005): users differ only as far as the gradient for their offsets has singular values above sqrt(K) / s, and along these
directions the search starts. If it has none the generic user is the solution, and is what is returned.

Shape suffixes: N comparisons, M known users, S responses, W pooled width, K rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import Reading
from prlhf.config.keys import Config, LossConfig
from prlhf.errors import TrainingError
from prlhf.method.losses import Rewards, branch_weights, preference_loss
from prlhf.method.prior import Prior, Strength, counts_of, difference_scale
from prlhf.method.users import ClusterUsers, IndividualUsers, LowRankUsers, UniformUsers, is_personal

TOLERANCE = 1e-7  # largest entry of the mean objective's gradient at the solution
ITERATIONS = 2000
MEMORY = 30  # updates that L-BFGS remembers
START = 0.3  # how far low-rank users are from the generic one at first, in standard deviations of the prior


@dataclass(frozen=True)
class LinearProblem:
    """Comparisons as indices of responses with known hidden states, and what each counts."""

    loss: LossConfig
    states_SW: Tensor  # float64, each dimension divided by scale_W
    scale_W: Tensor
    chosen_N: Tensor
    rejected_N: Tensor
    users_N: Tensor
    required_N: Tensor  # the margin by which y1 must win, in units of loss.margin
    own_N: Tensor  # weight of the user branch
    generic_N: Tensor  # weight of the generic branch
    known: int  # M

    def of(self, comparisons_N: Tensor) -> "LinearProblem":
        """The same with some of the comparisons, (N,) boolean."""
        names = ("chosen_N", "rejected_N", "users_N", "required_N", "own_N", "generic_N")
        return replace(self, **{name: getattr(self, name)[comparisons_N] for name in names})

    def rewards(self, vectors_MW: Tensor) -> tuple[Rewards, Rewards]:
        """Of both responses of each comparison, as its user and as user 0 reads them, of user vectors (M + 1, W)."""
        rewards_MS = vectors_MW @ self.states_SW.T
        S = len(self.states_SW)

        def read(users_N: Tensor) -> Rewards:
            # Not by indexing, whose backward pass adds up equal indices in any order.
            sides = (
                rewards_MS.flatten().index_select(0, users_N * S + y_N) for y_N in (self.chosen_N, self.rejected_N)
            )
            return Rewards(*sides, self.required_N)

        return read(self.users_N), read(torch.zeros_like(self.users_N))

    def losses(self, vectors_MW: Tensor) -> Tensor:
        """alpha loss(user) + (1 - alpha) loss(generic) of each comparison, (N,)."""
        own_N, generic_N = (preference_loss(self.loss, rewards, None) for rewards in self.rewards(vectors_MW))
        return self.own_N * own_N + self.generic_N * generic_N

    def loss_sum(self, vectors_MW: Tensor) -> Tensor:
        """The losses of all comparisons together, ()."""
        return self.losses(vectors_MW).sum()


def linear_problem(
    config: Config,
    user_model: nn.Module,
    comparisons: Sequence[EncodedComparison],
    readings: Sequence[Reading],
    states_SW: Tensor,
    known: int,
) -> LinearProblem:
    """The problem of these comparisons, whose responses are `readings` with pooled hidden states `states_SW`.

    TrainingError where these are not finite.
    """
    if not states_SW.isfinite().all():
        raise TrainingError(
            "user_model.prior: a response's hidden state is not finite; expected finite ones (model.dtype)"
        )
    at = {(reading.prefix, reading.response): s for s, reading in enumerate(readings)}
    device, states = states_SW.device, states_SW.double()

    def responses(side: str) -> Tensor:
        return torch.tensor([at[tuple(c.prefix), tuple(getattr(c, side))] for c in comparisons], device=device)

    chosen_N, rejected_N = responses("chosen"), responses("rejected")
    users_N = torch.tensor([c.user for c in comparisons], device=device)
    weights = branch_weights(users_N, config.loss.alpha, is_personal(user_model, config.loss.alpha))
    scale_W = difference_scale(states[chosen_N] - states[rejected_N])
    required_N = torch.tensor([c.margin for c in comparisons], device=device, dtype=torch.float64)
    return LinearProblem(config.loss, states / scale_W, scale_W, chosen_N, rejected_N, users_N, required_N,
                         weights.user, weights.generic, known)  # fmt: skip


def prior_of(problem: LinearProblem, strength: Strength) -> Prior:
    """The prior in the problem's coordinates, in which all dimensions have one scale."""
    one = torch.ones(1, dtype=torch.float64)
    return Prior(strength, one, len(problem.users_N), counts_of(problem.users_N.tolist(), problem.known))


def objective(problem: LinearProblem, user_model: nn.Module, prior: Prior) -> Tensor:
    """The loss of all comparisons and -log p of the user model, per comparison, ()."""
    known = torch.arange(1, problem.known + 1, device=problem.users_N.device)
    penalty = prior.negative_log_density(user_model, known, torch.ones_like(known), 1.0)
    return (problem.loss_sum(vectors_of_all(user_model, problem.known)) + penalty) / len(problem.users_N)


def solve(problem: LinearProblem, user_model: nn.Module, strength: Strength, warm: bool = False) -> float:
    """Set a float64 user model, in the problem's coordinates, to the optimum; returns the objective there.

    warm: start where the user model is, not at the generic user's optimum.
    """
    prior = prior_of(problem, strength)
    if not strength.users or not (problem.own_N > 0).any():
        return solve_alike(problem, user_model, prior)
    if not warm and not start(problem, user_model, prior):
        return objective(problem, user_model, prior).item()
    return minimise(lambda: objective(problem, user_model, prior), list(user_model.parameters()))


def start(problem: LinearProblem, user_model: nn.Module, prior: Prior) -> bool:
    """Put a user model near the optimum. False where it is put there: all users are the generic one."""
    if isinstance(user_model, ClusterUsers) and not user_model.softmax:
        start_clusters(problem, user_model, prior)
        return True
    e_UD = alike(problem, prior).e_UD.data
    if isinstance(user_model, ClusterUsers):
        user_model.V_KUD.data.add_(e_UD)  # every archetype is the generic user, but for noise
        return True
    user_model.e_UD.data.copy_(e_UD)
    if isinstance(user_model, LowRankUsers) and not user_model.softmax:
        return along_gradient(problem, user_model, prior.strength)
    return True


def start_clusters(problem: LinearProblem, user_model: ClusterUsers, prior: Prior) -> None:
    """K archetypes from low-rank users of rank K - 1: f(i) = e_0 + B z_i = V w_i with V = (c e_0, B) and w_i = (1 / c, z_i).

    c makes the prior of V and of w_0 equally large.
    """
    s, s_0 = prior.strength
    K, W = len(user_model.V_KUD), len(problem.scale_W)
    like = {"dtype": torch.float64, "device": problem.scale_W.device}
    users = LowRankUsers(
        torch.zeros(1, W, **like), torch.zeros(K - 1, 1, W, **like), torch.zeros(problem.known, K - 1, **like)
    )
    if K > 1:
        solve(problem, users, prior.strength)
    else:
        users.e_UD.data.copy_(alike(problem, prior).e_UD.data)
    with torch.no_grad():
        size = max(float(users.e_UD.square().sum()), 1e-6)
        c = (s**4 / (K * (s_0 or s) ** 2 * size)) ** 0.25
        user_model.V_KUD.copy_(torch.cat([c * users.e_UD[None], users.B_KUD]))
        user_model.w_MK.zero_()
        user_model.w_MK[:, 0] = 1 / c
        user_model.w_MK[1:, 1:] = users.z_MK


def alike(problem: LinearProblem, prior: Prior) -> UniformUsers:
    """The optimum where nobody differs: every user is the generic one."""
    users = UniformUsers(torch.zeros(1, len(problem.scale_W), dtype=torch.float64, device=problem.users_N.device))
    minimise(lambda: objective(problem, users, prior), list(users.parameters()))
    return users


def solve_alike(problem: LinearProblem, user_model: nn.Module, prior: Prior) -> float:
    """Make every user of a user model the generic one, at the optimum; returns the objective there."""
    generic = alike(problem, prior)
    with torch.no_grad():
        for parameter in user_model.parameters():
            parameter.zero_()
        if isinstance(user_model, ClusterUsers):
            user_model.w_MK[:, 0] = 1.0
            user_model.V_KUD.copy_(generic.e_UD)  # f(u) is a mixture of equals; without softmax w_u = (1, 0, ...)
        else:
            user_model.e_UD.copy_(generic.e_UD)
        if isinstance(user_model, IndividualUsers) and not user_model.shared:
            user_model.offsets_MUD.copy_(generic.e_UD.expand_as(user_model.offsets_MUD))
    return objective(problem, generic, prior).item()


def along_gradient(problem: LinearProblem, user_model: LowRankUsers, strength: Strength) -> bool:
    """Start low-rank users at the directions in which the loss falls fastest: the gradient G (M, W) for the offsets at zero is
    U diag(g) Q^T, so z = -c U and B = c' Q^T. False where no g is above sqrt(K) / s: nobody differs then."""
    K = len(user_model.B_KUD)
    offsets_MW = torch.zeros(
        problem.known + 1, len(problem.scale_W), dtype=torch.float64, device=problem.users_N.device
    )
    offsets_MW.requires_grad_()
    (gradient_MW,) = torch.autograd.grad(problem.loss_sum(user_model.e_UD.detach() + offsets_MW), offsets_MW)
    U, g, Qt = torch.linalg.svd(gradient_MW[1:], full_matrices=False)
    rank = min(K, len(g))
    with torch.no_grad():
        user_model.z_MK.zero_()
        user_model.B_KUD.zero_()
        if not len(g) or g[0] <= math.sqrt(K) / strength.users:
            return False
        user_model.z_MK[:, :rank] = -START * math.sqrt(problem.known) * U[:, :rank]
        user_model.B_KUD[:rank, 0] = START * strength.users / math.sqrt(K) * Qt[:rank]
    return True


def minimise(objective: Callable[[], Tensor], parameters: list[nn.Parameter]) -> float:
    """Minimise over float64 parameters by L-BFGS with strong Wolfe line searches, until the gradient's largest entry is below
    TOLERANCE or ITERATIONS are over; returns the least value. TrainingError where it is not finite."""
    parameters = [p for p in parameters if p.numel()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, max_eval=2 * ITERATIONS, tolerance_grad=TOLERANCE, tolerance_change=0.0,
        history_size=MEMORY, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    value = objective().item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the exact solution was not found: the objective is {value:g}; expected hidden states that are finite, and a "
            "user_model.shared_prior, or optim.solver=adamw"
        )
    return value


def largest_gradient(problem: LinearProblem, user_model: nn.Module, strength: Strength) -> float:
    """The largest entry of the objective's gradient, which is 0 at an optimum; where nobody may differ, the generic user's."""
    if not strength.users:
        user_model = UniformUsers(vectors_of_all(user_model, problem.known)[:1].detach())
    value = objective(problem, user_model, prior_of(problem, strength))
    found = torch.autograd.grad(value, [p for p in user_model.parameters() if p.numel()], allow_unused=True)
    return max(g.to_dense().abs().max().item() for g in found if g is not None)


def vectors_of_all(user_model: nn.Module, known: int) -> Tensor:
    """e_u of user 0 and every known one, (known + 1, W)."""
    return user_model(torch.arange(known + 1, device=next(user_model.parameters()).device))[:, 0]


def blank_copy(user_model: nn.Module, values: dict[str, Tensor], scale_W: Tensor) -> nn.Module:
    """A user model of the same form with these values, in float64 and in a problem's coordinates, on its device.

    The model itself may be spread over processes.
    """
    forms = (UniformUsers, IndividualUsers, LowRankUsers, ClusterUsers)
    form = next(form for form in forms if isinstance(user_model, form))
    flags = {name: getattr(user_model, name) for name in ("shared", "softmax") if hasattr(user_model, name)}
    copied = form(
        **{name: value.to(scale_W.device, torch.float64, copy=True) for name, value in values.items()}, **flags
    )
    with torch.no_grad():
        for vectors in copied.vectors:
            vectors.mul_(scale_W)
    return copied


def unscaled(solution: nn.Module, scale_W: Tensor) -> dict[str, Tensor]:
    """The parameters of a solution, out of a problem's coordinates, on the CPU."""
    vectors = {id(p) for p in solution.vectors}
    return {
        name: (p.detach() / scale_W if id(p) in vectors else p.detach()).cpu()
        for name, p in solution.named_parameters()
    }
