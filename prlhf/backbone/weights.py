"""Which weights a model has, which its files hold, and what is refused where the two differ.

A weight is what a file must hold: a parameter, or a persistent buffer (a router's correction bias, a layer's scale).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from prlhf.errors import UserError

# What DDP, torch.compile, FSDP1, checkpointing and PEFT put into a name.
WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
)
# Masks and rotary tables, which earlier versions of transformers wrote. The model computes its own.
TABLES = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|masked_bias|causal_mask)$|rotary|inv_freq|position_ids$")


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name: its parameters, tied ones once, and its persistent buffers."""
    stored = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in stored}}


def check_keys(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """UserError where from_pretrained filled in a weight, or left one out, that makes it another model than the files'.

    info: what from_pretrained found, with output_loading_info=True.
    """
    missing, others = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        found = f"; they have {_some(others)}" if others else ""
        if wrapper := next(filter(None, map(WRAPPER.search, others)), None):
            found += f": take {wrapper[0]!r} out of every name, and save them anew"
        raise UserError(f"model {name!r}: its files lack {_some(missing)}, expected every weight of the model{found}")
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"model {name!r}: found {key} of shape {tuple(found)} in its files, expected {tuple(expected)} by its config.json"
        )
    if extra := left_out(model, others):
        raise UserError(
            f"model {name!r}: its files have {_some(extra)}, for which the model of its config.json has no place; expected "
            "a config.json that belongs to these files (as many layers, the same biases)"
        )


def left_out(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Of a file's `names` that no weight of the model has, those of a layer that it has. It would compute something else
    than the file's model. Parts of their own, such as a vision tower, a value head or heads for later tokens, are no loss."""
    modules = {path for path, _ in model.named_modules()}

    def owner(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return sorted(n for n in names if owner(n) not in ("", model.base_model_prefix) and not TABLES.search(n))


def stored_as_named(model: PreTrainedModel, names: Collection[str] | None, dtype: torch.dtype) -> bool:
    """Whether files with these `names` hold exactly the model's weights, each under its own name and in `dtype`, so that a
    process may read parts of them. Otherwise from_pretrained alone knows how they are read: it merges experts, renames,
    unties a head that is stored too, and keeps some weights in float32. names: None where the files are not at hand."""
    weights = stored_tensors(model)
    in_float32 = any(getattr(model, f"_keep_in_fp32_modules{end}", None) for end in ("", "_strict"))
    if get_model_conversion_mapping(model, add_legacy=False):
        return False
    if dtype != torch.float32 and (in_float32 or any(not isinstance(w, nn.Parameter) for w in weights.values())):
        return False
    if names is None:
        return True
    others = set(names) - weights.keys()
    tied = others & model.state_dict().keys()
    return weights.keys() <= set(names) and not tied and not left_out(model, others)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with a value that is NaN or infinite."""
    with torch.no_grad():
        extremes = {name: torch.stack(torch.aminmax(t)) for name, t in tensors.items() if t.numel()}
    return [name for name, ends in extremes.items() if not ends.isfinite().all()]  # with a NaN both ends are NaN


def check_finite(name: str, names: Sequence[str]) -> None:
    """UserError where a model has weights that are `not_finite`."""
    if names:
        raise UserError(
            f"model {name!r}: NaN or infinite values in {_some(names)}, as model.dtype reads them; expected finite "
            "weights: its files are damaged or from a failed training, or the values are too large for float16"
        )


def _some(names: Sequence[str]) -> str:
    """'a, b, c and 7 more'."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
