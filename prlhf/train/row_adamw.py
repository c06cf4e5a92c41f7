"""AdamW for user tables, of which an update changes only a few rows.

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) at step t, with the gradient g_t and the learning rate lr_t:

    m_t = b1 m_(t-1) + (1 - b1) g_t        v_t = b2 v_(t-1) + (1 - b2) g_t^2
    p_t = (1 - lr_t wd) p_(t-1)  -  lr_t / (1 - b1^t)  m_t / (sqrt(v_t / (1 - b2^t)) + eps)

A row whose last gradient came at step s has g = 0 since then, so m_t = b1^(t-s) m_s and v_t = b2^(t-s) v_s. The steps
that it missed depend only on the row and on the learning rates. They are taken when the row is next read.

Shape suffixes: R rows, W numbers in a row, N missed steps.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEGLECTED = 1e-7  # times the largest learning rate: how far a row may be from AdamW's after one gap without gradients
WORKING_SET = 2**20  # missed steps are computed for this many numbers at a time


def momentum_steps(beta1: float, beta2: float) -> int:
    """K, the number of steps for which momentum still moves a row after its last gradient. Later movement is neglected.

    With r = b1 / sqrt(b2), k steps after a gradient |m| / sqrt(v) <= c r^k where, by the Cauchy-Schwarz inequality over
    all earlier gradients, c = (1 - b1) / sqrt((1 - b2) (1 - r^2)). K is the smallest with sum_(k > K) c r^k =
    c r^(K+1) / (1 - r) <= NEGLECTED: 194 for the usual betas. For r >= 1 there is no such bound, and no step is neglected.
    """
    if beta1 == 0:
        return 0
    r = beta1 / math.sqrt(beta2) if beta2 else math.inf
    if r >= 1:
        return sys.maxsize
    c = (1 - beta1) / math.sqrt((1 - beta2) * (1 - r * r))
    return max(0, math.ceil(math.log(NEGLECTED * (1 - r) / c) / math.log(r)) - 1)


class RowAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW (amsgrad off) for tables. It costs only as much as the rows that have a gradient or are read.

    A table is a contiguous parameter of shape (rows, ...) with sparse gradients (COO over dim 0). Each step() is a step of
    AdamW in which rows without a gradient have a gradient of zero. After `catch_up` a row equals AdamW's up to rounding,
    and up to NEGLECTED times the largest learning rate for each gap of more than `momentum_steps`.

    Catching up in several parts gives the same bits, with one exception. Before a row's first gradient, and more than
    `momentum_steps` after its last, weight decay is one factor for the whole gap, which rounds differently.

    State of a table. Counters and history are on the CPU.
    - step (): the steps taken.
    - current (rows,): the step up to which the row is AdamW's.
    - last_gradient (rows,): the step of the row's last gradient, 0 for none.
    - exp_avg, exp_avg_sq (rows, ...): m and v at the step of the last gradient.
    - history (3, total_steps + 1): for each step lr, 1 - lr wd, and the log of the product of all 1 - lr wd so far.
    """

    def __init__(
        self,
        params: Iterable[Any],
        total_steps: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        """total_steps: the most steps that will be taken. Their learning rates are kept."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.beta1, self.beta2 = betas
        self.eps, self.total_steps = eps, total_steps
        self.momentum_steps = min(momentum_steps(*betas), total_steps)
        exponents = torch.arange(total_steps + 1, dtype=torch.float64)
        self.powers1, self.powers2 = self.beta1**exponents, self.beta2**exponents
        for group in self.param_groups:
            for table in group["params"]:
                self.state[table] = {
                    "step": torch.tensor(0),
                    "current": torch.zeros(len(table), dtype=torch.int32),
                    "last_gradient": torch.zeros(len(table), dtype=torch.int32),
                    "exp_avg": torch.zeros_like(table),
                    "exp_avg_sq": torch.zeros_like(table),
                    "history": torch.zeros(3, total_steps + 1, dtype=torch.float64),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Rows with a gradient catch up and move. ValueError after total_steps, for a dense gradient, or lr wd >= 1."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None and not table.grad.is_sparse:
                    raise ValueError("a table's gradient is dense, expected a sparse one")
                grad = None if table.grad is None else table.grad.coalesce()
                rows_R = torch.zeros(0, dtype=torch.long) if grad is None else grad.indices()[0].cpu()
                self.catch_up(table, rows_R)
                self._begin_step(table, group["lr"], group["weight_decay"])
                if grad is not None:
                    self._move(table, rows_R, grad.values().flatten(1) if grad.dense_dim() else grad.values()[:, None])

    @torch.no_grad()
    def catch_up(self, table: Tensor, rows_R: Tensor | None = None) -> None:
        """Take the steps that rows of a table missed. rows_R: distinct numbers; None for all rows, in time linear in the table."""
        state = self.state[table]
        if rows_R is None:
            rows_R = (state["current"] < state["step"]).nonzero()[:, 0]
        for part in rows_R.cpu().split(max(1, WORKING_SET // max(table[0].numel(), self.momentum_steps))):
            self._catch_up(table, part)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, but counters and history keep their type and stay on the CPU."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for i, table in zip(saved, tables):
            for name in ("current", "last_gradient", "history"):
                self.state[table][name] = state_dict["state"][i][name].cpu()

    def _begin_step(self, table: Tensor, lr: float, weight_decay: float) -> None:
        """Count a step, and write its learning rate and decay into the history."""
        state = self.state[table]
        t = int(state["step"]) + 1
        if t > self.total_steps:
            raise ValueError(f"step {t} of an optimiser made for total_steps={self.total_steps}")
        if lr * weight_decay >= 1:
            raise ValueError(f"lr * weight_decay: found {lr * weight_decay:g}, expected less than 1")
        state["step"] += 1
        log_decay = float(state["history"][2, t - 1]) + math.log1p(-lr * weight_decay)
        state["history"][:, t] = torch.tensor([lr, 1 - lr * weight_decay, log_decay], dtype=torch.float64)

    def _move(self, table: Tensor, rows_R: Tensor, grad_RW: Tensor) -> None:
        """AdamW's current step for rows that are up to date with the step before."""
        state = self.state[table]
        t = int(state["step"])
        lr, keep, _ = state["history"][:, t].tolist()
        gap_R = t - state["last_gradient"][rows_R].long()
        at_R = rows_R.to(table.device)
        p_MW, m_MW, v_MW = (flat(x) for x in (table, state["exp_avg"], state["exp_avg_sq"]))
        m_RW = m_MW[at_R] * column(self.powers1[gap_R], grad_RW) + (1 - self.beta1) * grad_RW
        v_RW = v_MW[at_R] * column(self.powers2[gap_R], grad_RW) + (1 - self.beta2) * grad_RW**2
        denominator_RW = v_RW.sqrt() / math.sqrt(1 - self.powers2[t]) + self.eps
        p_RW = keep * p_MW[at_R] - lr / (1 - float(self.powers1[t])) * m_RW / denominator_RW
        for all_MW, some_RW in ((p_MW, p_RW), (m_MW, m_RW), (v_MW, v_RW)):
            all_MW.index_copy_(0, at_R, some_RW)
        state["current"][rows_R] = state["last_gradient"][rows_R] = t

    def _catch_up(self, table: Tensor, rows_R: Tensor) -> None:
        """Take the missed steps of some rows: one by one while momentum moves them, then the weight decay of the rest at once."""
        state = self.state[table]
        t = int(state["step"])
        since_R, touched_R = state["current"][rows_R].long(), state["last_gradient"][rows_R].long()
        moves_until_R = (touched_R + self.momentum_steps).clamp(max=t).where(touched_R > 0, since_R).maximum(since_R)
        moving_R = moves_until_R > since_R
        if moving_R.any():
            self._replay(table, *(x_R[moving_R] for x_R in (rows_R, since_R, moves_until_R, touched_R)))
        log_decay = state["history"][2]
        decay_R = (log_decay[t] - log_decay[moves_until_R]).exp()
        decaying_R = decay_R < 1
        if decaying_R.any():
            at_R = rows_R[decaying_R].to(table.device)
            p_MW = flat(table)
            p_MW.index_copy_(0, at_R, p_MW[at_R] * column(decay_R[decaying_R], p_MW))
        state["current"][rows_R] = t

    def _replay(self, table: Tensor, rows_R: Tensor, since_R: Tensor, until_R: Tensor, touched_R: Tensor) -> None:
        """AdamW's steps since_R + 1 to until_R without a gradient, for rows whose last gradient came at step touched_R."""
        state = self.state[table]
        at_R = rows_R.to(table.device)
        p_RW, m_RW, v_RW = (flat(x)[at_R] for x in (table, state["exp_avg"], state["exp_avg_sq"]))
        steps = int((until_R - since_R).max())
        step_NR = since_R + torch.arange(1, steps + 1)[:, None]
        missed_NR = step_NR <= until_R
        step_NR = step_NR.minimum(until_R)
        gap_NR = step_NR - touched_R
        # A coefficient depends only on the step and on the row's last gradient, and each operation below is elementwise.
        # So a row's values depend neither on which other rows catch up with it nor on when.
        lr_NR, keep_NR = state["history"][0, step_NR], state["history"][1, step_NR]
        rate_NR = lr_NR / (1 - self.powers1[step_NR]) * self.powers1[gap_NR] * missed_NR
        root_NR = (self.powers2[gap_NR] / (1 - self.powers2[step_NR])).sqrt()
        rate_NR1, root_NR1 = column(rate_NR, p_RW), column(root_NR, p_RW)
        keep_NR1 = column(keep_NR.where(missed_NR, 1.0), p_RW)
        decays = bool((keep_NR < 1).any())
        root_v_RW = v_RW.sqrt()
        together = max(1, WORKING_SET // p_RW.numel())
        for part in (slice(first, first + together) for first in range(0, steps, together)):
            moves_NRW = m_RW * rate_NR1[part] / (root_v_RW * root_NR1[part] + self.eps)
            for keep_R1, move_RW in zip(keep_NR1[part], moves_NRW):
                if decays:
                    p_RW *= keep_R1
                p_RW -= move_RW
        flat(table).index_copy_(0, at_R, p_RW)


def flat(table: Tensor) -> Tensor:
    """View (rows, ...) as (rows, W)."""
    return table.view(len(table), -1)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(..., R) -> (..., R, 1), on the device of `like` and in its type."""
    return values.to(like)[..., None]
