"""Users' most probable coordinates where no reward is linear in them, by gradients through the model: Gauss-Newton.

A comparison's loss is a function of two outputs: log pi(y | x, u) or r(x, y, u) of both responses, or a pairwise model's answers
to both orders. Only a user's row of the table is learnt. With row = base + B t,

    minimise  J(t) = sum_n loss(outputs_n(t)) + |t|^2 / 2,    t ~ N(0, I)

Each comparison weighs in full, as in `variational`. J's Hessian, but for the outputs' own curvature, is

    H = I + sum_n X_n^T C_n X_n,   X_n = d outputs_n / d t  (2, R),   C_n = d^2 loss / d outputs_n^2  (2, 2)

and where a loss is not convex (robust, orpo) C_n loses its negative part. Each round tries t - s G grad J, and halves s where J does
not fall. G is H^-1, corrected for the outputs' curvature by what earlier rounds have seen of it (L-BFGS). J need not be convex:
the search begins at t = 0 and ends where the gradient vanishes. The posterior there is N(t, H^-1). For a loss that is no -log p
(ipo, simpo, orpo, nll) that is the curvature of what is minimised, and no more.

One forward and two backward passes give X of all comparisons in a batch: each comparison reads a row of its own.

Shape suffixes: N comparisons, V numbers in a row of the table, R whitened coordinates, T = 2 N, Q singular values.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf.errors import TrainingError, UserError
from prlhf.method.losses import Outputs, ResponseLogProbs, preference_loss
from prlhf.score.slopes import SlopePart, parts_of, read_by, slopes
from prlhf.score.task import Task

MOST_ROUNDS = 200
MOVES = 10  # that the approximation of J's Hessian remembers
LEAST_CURVATURE = 0.1  # along a move that it remembers; the prior's own is 1
LONGEST_STEP = 2.0  # in standard deviations of the prior
LAST_GRADIENT = (
    1e-2  # a search ends there: the gradient of J, per standard deviation of the prior, or as a share of the first one
)


class Basis(NamedTuple):
    """B = [span, sqrt(floor) I], a row's directions: B t for t ~ N(0, I) has the covariance span span^T + floor I."""

    span_VK: Tensor
    floor: float = 0.0  # 0: the span alone, R = K; else R = K + V

    def row(self, t_R: Tensor) -> Tensor:
        """B t, (V,)."""
        known_V = self.span_VK @ t_R[: self.span_VK.shape[1]]
        return known_V + self.floor**0.5 * t_R[self.span_VK.shape[1] :] if self.floor else known_V

    def pull(self, slopes_NV: Tensor) -> Tensor:
        """Derivatives by the row as derivatives by t, (N, R)."""
        along_NK = slopes_NV @ self.span_VK
        return torch.cat([along_NK, self.floor**0.5 * slopes_NV], dim=-1) if self.floor else along_NK

    @property
    def zeros(self) -> Tensor:
        """t = 0, the prior's mean."""
        return self.span_VK.new_zeros(self.span_VK.shape[1] + (len(self.span_VK) if self.floor else 0))


class UserProblem(NamedTuple):
    """A user's comparisons (indices into a task's), and the user's row: base + B t, t ~ N(0, I)."""

    name: str
    indices: list[int]
    base_V: Tensor
    basis: Basis

    def row(self, t_R: Tensor) -> Tensor:
        """The row at t, (V,)."""
        return self.base_V + self.basis.row(t_R)


class Expansion(NamedTuple):
    """The losses of N comparisons around their rows: values, gradients, and roots A of their Hessians, sum over both of A A^T."""

    losses_N: Tensor
    gradient_NV: Tensor
    curvature_N2V: Tensor


class At(NamedTuple):
    """A user's J at t: its value and gradient, and H = I + A^T A."""

    t_R: Tensor
    value: Tensor
    gradient_R: Tensor
    curvature_TR: Tensor  # A

    def told(self) -> Tensor:
        """Y (R, Q) with H^-1 = I - Y Y^T."""
        _, S_Q, Vt_QR = torch.linalg.svd(self.curvature_TR, full_matrices=False)
        return Vt_QR.T * (S_Q / (1 + S_Q.square()).sqrt())

    def step(self, moves: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """G grad J, (R,), with G the L-BFGS inverse Hessian of these moves (of t, of the gradient) on top of H^-1.

        The two-loop recursion of Nocedal and Wright 2006, Numerical Optimization, algorithm 7.4.
        """
        step_R, shares = self.gradient_R, []
        for s_R, y_R in reversed(moves):
            shares.append((s_R @ step_R) / (s_R @ y_R))
            step_R = step_R - shares[-1] * y_R
        told_RQ = self.told()
        step_R = step_R - told_RQ @ (told_RQ.T @ step_R)
        for (s_R, y_R), share in zip(moves, reversed(shares)):
            step_R = step_R + (share - (y_R @ step_R) / (s_R @ y_R)) * s_R
        return step_R


def search(task: Task, problems: Mapping[int, UserProblem], enough: float | None = None) -> dict[int, At]:
    """A stationary point of each user's J. Each user's steps are their own; the forward passes are shared.

    It ends where the gradient's norm is at most `enough`, by default LAST_GRADIENT, times that at t = 0 where this is below 1.
    In half types `enough` is what their rounding allows, at least.
    UserError for outputs that are not finite; TrainingError, with a user's name, where no such point is found.
    """
    parts = parts_of(task, [i for problem in problems.values() for i in problem.indices])
    at = evaluate(task, parts, problems, {user: problem.basis.zeros for user, problem in problems.items()})
    bad = [problems[user].name for user, point in at.items() if not point.value.isfinite()]
    if bad:
        raise UserError(
            f"user {bad[0]!r}: the loss of their comparisons is not finite, expected a finite one (model.dtype)"
        )
    eps = torch.finfo(task.model.backbone.get_input_embeddings().weight.dtype).eps
    enough, sizes = max(enough or LAST_GRADIENT, eps**0.5), dict.fromkeys(problems, 1.0)
    last = {user: enough * min(1.0, point.gradient_R.norm().item()) for user, point in at.items()}
    moves: dict[int, list[tuple[Tensor, Tensor]]] = {user: [] for user in problems}
    bar = tqdm(range(MOST_ROUNDS), desc="search", unit="round", disable=None, leave=False)
    for _ in bar:
        left = [user for user, point in at.items() if not point.gradient_R.norm() <= last[user]]
        if not left:
            bar.close()
            return at
        bar.set_postfix_str(f"{len(left)} of {len(at)} users")
        if task.model.backbone_reads_users:  # else the parts hold what is computed
            parts = parts_of(task, [i for user in left for i in problems[user].indices])
        steps_R = {user: no_longer_than(LONGEST_STEP, at[user].step(moves[user])) for user in left}
        tried = evaluate(task, parts, problems, {user: at[user].t_R - sizes[user] * steps_R[user] for user in left})
        for user in left:
            gain, rounding = sizes[user] * (at[user].gradient_R @ steps_R[user]), 10 * eps * at[user].value.abs()
            if tried[user].value <= at[user].value - 1e-4 * gain + rounding:
                move = tried[user].t_R - at[user].t_R, tried[user].gradient_R - at[user].gradient_R
                if move[0] @ move[1] > LEAST_CURVATURE * move[0].square().sum():
                    moves[user] = [*moves[user], move][-MOVES:]
                at[user], sizes[user] = tried[user], 1.0
            else:
                sizes[user] /= 2
    raise TrainingError(
        f"user {problems[left[0]].name!r}: the search for the most probable vectors has not ended after {MOST_ROUNDS} rounds; "
        f"expected a gradient of {last[left[0]]:.1g} at most, found {at[left[0]].gradient_R.norm():.1g}"
    )


def no_longer_than(length: float, step_R: Tensor) -> Tensor:
    """The step, shortened to this length where it is longer."""
    return step_R * min(1.0, length / max(step_R.norm().item(), 1e-12))


def evaluate(
    task: Task, parts: Sequence[SlopePart], problems: Mapping[int, UserProblem], t: Mapping[int, Tensor]
) -> dict[int, At]:
    """J of each user in `t`, at their t. Parts without their comparisons are left out."""
    user_of = {i: user for user in t for i in problems[user].indices}
    rows_V = {user: problems[user].row(t_R) for user, t_R in t.items()}
    values = {user: t_R.square().sum() / 2 for user, t_R in t.items()}
    gradients_R = dict(t)
    curvatures: dict[int, list[Tensor]] = {user: [] for user in t}
    for part in parts:
        asked = {n: user_of[i] for n, i in enumerate(part.indices) if i in user_of}
        if not asked:
            continue
        anyone = next(iter(asked.values()))  # reads the comparisons of users who are not in t
        rows_NV = torch.stack([rows_V[asked.get(n, anyone)] for n in range(len(part.indices))])
        expansion = expand(task, part, rows_NV)
        for user in dict.fromkeys(asked.values()):
            own, basis = [n for n in asked if asked[n] == user], problems[user].basis
            losses_N, gradient_NV, curvature_N2V = (x[own] for x in expansion)
            values[user] = values[user] + losses_N.sum()
            gradients_R[user] = gradients_R[user] + basis.pull(gradient_NV.sum(dim=0))
            curvatures[user].append(basis.pull(curvature_N2V.flatten(0, 1)))
    return {user: At(t[user], values[user], gradients_R[user], torch.cat(curvatures[user])) for user in t}


def expand(task: Task, part: SlopePart, rows_NV: Tensor) -> Expansion:
    """The losses of a part's comparisons around these rows, in float64 on the CPU."""
    with read_by(task.model.user_model, rows_NV) as rows:
        outputs: Outputs = task.model(part.batch, *part.states)
        jacobian_N2V = torch.stack([slopes(side, rows, task.model.user_model) for side in outputs[:2]], dim=1)
    losses_N, slopes_N2, curvature_N22 = derivatives(task, outputs, task.reference_of(part.indices))
    shares_N2, axes_N22 = torch.linalg.eigh(curvature_N22.nan_to_num())
    roots_N22 = axes_N22 * shares_N2.clamp(min=0).sqrt()[:, None]
    gradient_NV = torch.einsum("no,nov->nv", slopes_N2, jacobian_N2V)
    return Expansion(losses_N, gradient_NV, torch.einsum("noa,nov->nav", roots_N22, jacobian_N2V))


def derivatives(task: Task, outputs: Outputs, reference: ResponseLogProbs | None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each comparison (N,), its gradient (N, 2) and Hessian (N, 2, 2) by the outputs."""
    y1_N, y2_N, *others = (part.detach().cpu().double() for part in outputs)
    both = [y1_N.requires_grad_(), y2_N.requires_grad_()]
    losses_N = preference_loss(task.config.loss, type(outputs)(*both, *others), reference)
    slopes = torch.autograd.grad(losses_N.sum(), both, create_graph=True)
    rows = [torch.autograd.grad(slope.sum(), both, retain_graph=True, materialize_grads=True) for slope in slopes]
    curvature_N22 = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    return losses_N.detach(), torch.stack(slopes, dim=1).detach(), curvature_N22.detach()
