"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), in files that PEFT reads.

    y = W x + b + (alpha / rank) B A dropout(x),   A of shape (rank, in), B of shape (out, rank), B = 0 at the start

With the adapters off the model is the reference again: it needs no second copy of the weights.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prlhf.config.keys import LoRAConfig
from prlhf.errors import UserError, did_you_mean

PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, which `adapters_off` leaves out."""

    def __init__(self, base: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base = base
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.enabled = True
        self.merged: Tensor | None = None  # W + (alpha / rank) B A, within `adapters_merged`
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        where = {"dtype": dtype, "device": "cpu" if base.weight.is_meta else base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). A and B are cast to x's type, so half-precision rows stay half-precision."""
        if self.enabled and self.merged is not None:
            return nn.functional.linear(x, self.merged, self.base.bias)
        y = self.base(x)
        if not self.enabled:
            return y
        lora_A, lora_B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + (self.scale * (self.dropout(x) @ lora_A.T)) @ lora_B.T


def add_lora(model: PreTrainedModel, config: LoRAConfig, targets: tuple[str, ...], seed: int) -> list[str]:
    """Freeze `model` and adapt every linear layer named in `targets`; returns their paths. A is drawn from `seed`.
    UserError where a name fits no linear layer of the model, or its head: log-probs read the head as a matrix."""
    head = model.get_output_embeddings()
    named = model.named_modules()
    linear = {path: layer for path, layer in named if isinstance(layer, nn.Linear) and layer is not head}
    names = {path.rsplit(".", 1)[-1] for path in linear}
    for target in targets:
        if target not in names:
            raise UserError(
                f"lora.targets: no linear layer {target!r} in this model that takes an adapter{did_you_mean(target, names)}; "
                f"expected some of {sorted(names)} (not the head, which takes none)"
            )
    model.requires_grad_(False)
    paths = [path for path in linear if path.rsplit(".", 1)[-1] in targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in paths:
            model.set_submodule(path, LoRALinear(linear[path], config))
    return paths


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes with its original weights."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def remove_lora(model: nn.Module) -> None:
    """Take the adapters off for good: the model has its original layers again."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base)


@contextlib.contextmanager
def adapters_merged(model: nn.Module) -> Iterator[None]:
    """Within the context each adapted layer is one product, x (W + (alpha / rank) B A)^T + b, for models in eval mode.

    It saves two products and their sum for every token, and costs the adapted weights once more. W is left as it is. The two
    ways differ by float32's rounding. A half type would round the sum to two or three digits of W, and an adapter adds less
    than that to many weights: there the layers stay as they are.
    """
    layers = [layer for layer in lora_layers(model).values() if layer.base.weight.dtype.itemsize >= 4]
    try:
        with torch.no_grad():
            for layer in layers:
                A, B = layer.lora_A.to(layer.base.weight.dtype), layer.lora_B.to(layer.base.weight.dtype)
                layer.merged = torch.addmm(layer.base.weight, B, A, alpha=layer.scale)
        yield
    finally:
        for layer in layers:
            layer.merged = None


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights under PEFT's names."""
    return {
        f"{PEFT_PREFIX}{path}.{part}.weight": getattr(layer, part).detach()
        for path, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }


def save_lora(
    model: nn.Module, config: LoRAConfig, base_name: str | None, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write adapter_model.safetensors and adapter_config.json; `PeftModel.from_pretrained` reads them too.
    state: the adapters' whole weights (`lora_state`) where the model's are sharded."""
    state = lora_state(model) if state is None else state
    state = {name: tensor.to("cpu").contiguous() for name, tensor in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in lora_layers(model)}),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=1) + "\n")


def load_lora(model: nn.Module, folder: Path) -> None:
    """Read adapters' weights that `save_lora` or PEFT wrote. UserError where they are of other layers."""
    path = folder / "adapter_model.safetensors"
    state, own = load_file(path), lora_state(model)
    if state.keys() != own.keys():
        raise UserError(f"{path}: does not fit the model's adapters (e.g. {min(state.keys() ^ own.keys())})")
    for name, tensor in own.items():
        tensor.copy_(state[name])
