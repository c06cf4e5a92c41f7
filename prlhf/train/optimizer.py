"""The optimiser of the whole model, gradient clipping, and the learning rate's schedule."""

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
    """AdamW for the dense parameters, which every update changes, and RowAdamW for the user tables, if there are any."""

    def __init__(self, dense: torch.optim.Optimizer, tables: RowAdamW | None):
        self.dense, self.tables = dense, tables
        self.keeps_gradients = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of both optimisers."""
        return [*self.dense.param_groups, *(self.tables.param_groups if self.tables else ())]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters: the dense ones, then the tables."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def dense_parameters(self) -> list[nn.Parameter]:
        """All parameters but the tables."""
        return [p for group in self.dense.param_groups for p in group["params"]]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of both optimisers, by parameter."""
        return {**self.dense.state, **(self.tables.state if self.tables else {})}

    def scale_learning_rates(self, factor: float) -> None:
        """Set each group's learning rate to factor times the config's."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def catch_up(self, rows_R: Tensor | None = None) -> None:
        """Take the steps that these rows of the tables missed (None: all rows). Must come before the rows are read."""
        for group in self.tables.param_groups if self.tables else ():
            for table in group["params"]:
                self.tables.catch_up(table, rows_R)

    def step(self) -> None:
        """A step of both optimisers."""
        self.dense.step()
        if self.tables:
            self.tables.step()

    def keep_gradients(self) -> None:
        """Allocate the dense gradients now. From here on `zero_grad` sets them to 0 and does not free them."""
        # On a CPU, gradients allocated anew in each update lie between its activations and fragment the memory.
        self.keeps_gradients = True
        for p in self.dense_parameters:
            p.grad = torch.zeros_like(p)

    def zero_grad(self) -> None:
        """Free all gradients, or set to 0 those that `keep_gradients` allocated."""
        for p in self.parameters:
            if p.grad is not None and self.keeps_gradients and not p.grad.is_sparse:
                p.grad.zero_()
            else:
                p.grad = None


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients by min(1, max_norm / (|g| + 1e-6)) and return |g|, their norm as one vector.

    Like torch.nn.utils.clip_grad_norm_, but also for sparse gradients and for a mixture of sharded and whole ones.
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
    """The learning rates' factor at update `step` (from 0): linear warm-up, then constant or decay to 0 at `total`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0


def make_optimizer(config: Config, model: PersonalizedModel, total_steps: int) -> Optimizers:
    """The optimisers of a model, for at most `total_steps` steps, with up to three groups.

    At optim.lr the backbone or its LoRA; at user_model.lr the parameters that all users share and, by rows, the tables.
    """
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
    for p in (p for g in groups for p in g["params"]):  # made now: a checkpoint is read into it
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        dense.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    by_rows = RowAdamW([group(tables, config.user_model)], total_steps, betas=betas) if tables else None
    return Optimizers(dense, by_rows)
