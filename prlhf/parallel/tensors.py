"""Parameters and tensors that may be sharded: read, written, gathered, set."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from prlhf.backbone.loading import weight_files
from prlhf.backbone.weights import check_finite, not_finite, stored_tensors
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import rank, reason, summed, world_size

FILE_BYTES = 2**28  # about the size of a checkpoint's files: the writer holds a file twice in memory


def load_weights_into(model: PersonalizedModel, folder: Path, device: str, weights_on: str) -> None:
    """Fill a sharded model, whose parameters are on meta, from the safetensors in `folder`; each rank reads its own rows.
    weights_on: the device that the weights wait on; buffers go to `device`, which computes. What the files do not hold
    (rotary tables, LoRA, user model) keeps its values. UserError where a weight is missing in the files, or not finite."""
    backbone = model.backbone
    buffers = dict(backbone.named_buffers()).keys() & stored_tensors(backbone).keys()
    has_values = {name: t for name, t in _tensors(backbone).items() if not t.is_meta and name not in buffers}
    kept = {name: t.detach().clone() for name, t in has_values.items()}
    backbone.to_empty(device=weights_on)
    for module in backbone.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    tensors = _tensors(backbone)
    for name, values in kept.items():
        tensors[name].detach().copy_(values)
    wanted = {name.replace(".base.", "."): t.detach() for name, t in tensors.items() if name not in kept}
    read_tensors(wanted, folder, weight_files(folder))
    own = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in wanted.items()}
    on_this_rank = not_finite(own)
    bad = summed(torch.tensor([float(name in on_this_rank) for name in wanted]))
    check_finite(str(folder), [name for name, count in zip(wanted, bad.tolist()) if count])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def read_tensors(values: dict[str, Tensor], folder: Path, files: Sequence[Path] | None = None) -> None:
    """Fill tensors, sharded or not, by their names from safetensors in a folder; each rank reads its own rows.
    files: the ones to read, by default all. UserError where a tensor is missing or has another shape."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    if files is not None:
        reader.fs.ls = lambda _: [str(file) for file in files]  # torch reads every file that this lists
    try:
        _quietly(dcp.load, values, storage_reader=reader)
    except CheckpointException as error:
        raise UserError(f"{folder}: not the weights that this model has ({reason(error)})") from None


def write_tensors(values: dict[str, Tensor], folder: Path) -> None:
    """Write tensors, sharded or not, as safetensors of about FILE_BYTES into a folder; each rank writes its own rows.
    OSError where that fails on any rank."""
    file, size, file_of = 1, 0.0, {}
    for name, tensor in values.items():  # the same names in the same order on every rank
        held = tensor.numel() * tensor.element_size() / (world_size() if isinstance(tensor, DTensor) else 1)
        if size and size + held > FILE_BYTES:
            file, size = file + 1, 0.0
        file_of[name], size = file, size + held
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    try:
        _quietly(dcp.save, values, storage_writer=writer)
    except CheckpointException as error:
        raise OSError(reason(error)) from None


def _quietly(transfer: Callable[..., Any], values: dict[str, Tensor], **storage: Any) -> None:
    """dcp.load or dcp.save without the warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        transfer(values, no_dist=world_size() == 1, **storage)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name, as the optimiser has them: sharded where the model is."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards the model's weights."""
    return isinstance(model, FSDPModule)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """All that a model's files hold, by name: `named_parameters`, and the persistent buffers."""
    named_parameters(model)  # puts a sharded model into its sharded state
    return stored_tensors(model)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, sharded or not, gathered one by one onto rank 0's CPU; other ranks get none."""
    found = {}
    for name, tensor in tensors.items():
        values = full(tensor.detach())  # on every rank, as it is a collective operation
        if rank() == 0:
            found[name] = values.cpu().contiguous()
    return found


@torch.no_grad()
def put(parameter: nn.Parameter, values: Tensor) -> None:
    """Set a parameter, sharded or not, to whole values that every rank has."""
    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The norm of all tensors together, sharded or not, as if they were one vector."""
    sharded = [t for t in tensors if isinstance(t, DTensor)]
    others = [t for t in tensors if not isinstance(t, DTensor)]
    parts = [full(get_total_norm(part)).cpu() for part in (sharded, others) if part]
    return torch.stack(parts).norm().item() if parts else 0.0
