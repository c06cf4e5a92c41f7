"""AdamW for what every update changes, and by rows for user tables; clipping and the learning rate."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prlhf.config.keys import Config, OptimConfig, UserModelConfig
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.tensors import named_parameters, norm_of
from prlhf.train.row_adamw import RowAdamW


class Optimizers:
    """AdamW for what every update changes and RowAdamW for the user tables, if any, as one optimiser."""

    def __init__(self, dense: torch.optim.Optimizer, tables: RowAdamW | None):
        self.dense = dense
        self.tables = tables
        self.keeps_gradients = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [*self.dense.param_groups, *(self.tables.param_groups if self.tables else ())]

    @property
    def dense_parameters(self) -> list[nn.Parameter]:
        """All but the tables."""
        return [p for group in self.dense.param_groups for p in group["params"]]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Both optimisers' state, by parameter."""
        return {**self.dense.state, **(self.tables.state if self.tables else {})}

    def catch_up(self, rows_R: Tensor | None = None) -> None:
        """Make rows of the tables, or all, what AdamW would have made them by now; to be called before they are read."""
        for group in self.tables.param_groups if self.tables else ():
            for table in group["params"]:
                self.tables.catch_up(table, rows_R)

    def step(self) -> None:
        """A step of both."""
        self.dense.step()
        if self.tables:
            self.tables.step()

    def keep_gradients(self) -> None:
        """Make the gradients of all that is dense now, and from now on set them to 0 in place of dropping them.

        For a CPU, where gradients that each update makes anew lie between its activations, and break up the room that these
        leave to the next.
        """
        self.keeps_gradients = True
        for p in self.dense_parameters:
            p.grad = torch.zeros_like(p)

    def zero_grad(self) -> None:
        """Drop all gradients, or set to 0 those that are kept."""
        for p in self.dense_parameters:
            if self.keeps_gradients:
                p.grad.zero_()
            else:
                p.grad = None
        for group in self.tables.param_groups if self.tables else ():
            for table in group["params"]:
                table.grad = None


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients g, dense, sharded or sparse, by min(1, max_norm / (|g| + 1e-6)) and return |g|, all together's.

    As torch.nn.utils.clip_grad_norm_, which takes neither sparse gradients nor some that are sharded and some that are not.
    """
    parameters = [p for p in parameters if p.grad is not None]
    for table in (p for p in parameters if p.grad.is_sparse):
        table.grad = table.grad.coalesce()
    gradients = [p.grad.values() if p.grad.is_sparse else p.grad for p in parameters]
    norm = norm_of(gradients)
    factor = min(1.0, max_norm / (norm + 1e-6))
    for gradient in gradients if factor < 1 else ():
        gradient.mul_(factor)
    return norm


def learning_rate_factor(step: int, total: int, config: OptimConfig) -> float:
    """What both learning rates are multiplied by at update `step` (from 0): linear warm-up, then linear or cosine
    decay to 0 at `total`, or constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def make_optimizer(config: Config, model: PersonalizedModel, total_steps: int) -> Optimizers:
    """AdamW in up to three groups: the backbone or its LoRA at optim.lr; at user_model.lr what users share, and the
    user model's tables, by rows. No more than total_steps steps can be taken."""
    parameters = named_parameters(model).values()
    user_ids = {id(p) for p in model.user_parameters()}
    tables = [table for table in model.user_model.tables if table.numel()]
    table_ids = {id(p) for p in model.user_model.tables}
    rest = [p for p in parameters if p.requires_grad and id(p) not in user_ids]
    shared = [p for p in model.user_parameters() if p.numel() and id(p) not in table_ids]

    def group(parameters: list[nn.Parameter], keys: OptimConfig | UserModelConfig) -> dict[str, Any]:
        return {"params": parameters, "lr": keys.lr, "base_lr": keys.lr, "weight_decay": keys.weight_decay}

    betas = (config.optim.beta1, config.optim.beta2)
    groups = [g for g in (group(rest, config.optim), group(shared, config.user_model)) if g["params"]]
    dense = torch.optim.AdamW(groups, betas=betas, fused=True)
    for p in (p for group in dense.param_groups for p in group["params"]):  # at once: checkpoints are read into it
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        dense.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    by_rows = RowAdamW([group(tables, config.user_model)], total_steps, betas=betas) if tables else None
    return Optimizers(dense, by_rows)
