"""Parameters and tensors that may be sharded: read, written, gathered, set."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from prlhf.backbone.loading import weight_files
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import rank, reason, world_size

FILE_BYTES = 2**28  # of a checkpoint's files


def load_weights_into(model: PersonalizedModel, folder: Path, device: str, weights_on: str) -> None:
    """Give a sharded model that has parameters on meta their values from the safetensors in `folder`, each rank its own rows.

    weights_on: where they wait, if not on the `device` that computes.
    What has values already (buffers, LoRA, user model) keeps them. UserError where a weight is missing in the files.
    """
    backbone = model.backbone
    kept = {name: t.detach().clone() for name, t in _tensors(backbone) if not t.is_meta}
    backbone.to_empty(device=weights_on)
    for module in backbone.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    tensors = {name: t.detach() for name, t in _tensors(backbone)}
    for name, values in kept.items():
        tensors[name].copy_(values)
    wanted = {name.replace(".base.", "."): t for name, t in tensors.items() if name not in kept}
    read_tensors(wanted, folder, weight_files(folder))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def read_tensors(values: dict[str, Tensor], folder: Path, files: Sequence[Path] | None = None) -> None:
    """Fill tensors, sharded or not, from the safetensors `files` in a folder (all that there are) by their names; each rank
    reads its own rows.

    UserError where one is missing or has another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    if files is not None:
        reader.fs.ls = lambda _: [str(file) for file in files]  # else torch takes every one that it lists
    try:
        with _silence():
            dcp.load(values, storage_reader=reader, no_dist=world_size() == 1)
    except CheckpointException as error:
        raise UserError(f"{folder}: not the weights that this model has ({reason(error)})") from None


def write_tensors(values: dict[str, Tensor], folder: Path) -> None:
    """Write tensors, sharded or not, as safetensors into a folder, each rank files of what it holds.

    OSError where that fails on any rank. The writer holds a file two times over, beside the tensors, while it writes it: hence files of some FILE_BYTES.
    """
    file, size, file_of = 1, 0.0, {}
    for name, tensor in values.items():  # the same names in the same order on every rank
        held = tensor.numel() * tensor.element_size() / (world_size() if isinstance(tensor, DTensor) else 1)
        if size and size + held > FILE_BYTES:
            file, size = file + 1, 0.0
        file_of[name], size = file, size + held
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    try:
        with _silence():
            dcp.save(values, storage_writer=writer, no_dist=world_size() == 1)
    except CheckpointException as error:
        raise OSError(reason(error)) from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the warning that there is but one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name, those that the optimiser has: sharded where the model is."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, sharded or not, gathered one by one onto rank 0's CPU; other ranks get none."""
    found = {}
    for name, tensor in tensors.items():
        values = full(tensor.detach())
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


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every rank; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The norm of all tensors together, sharded ones and others, as if they were one vector."""
    sharded = [t for t in tensors if isinstance(t, DTensor)]
    others = [t for t in tensors if not isinstance(t, DTensor)]
    parts = [full(get_total_norm(part)).cpu() for part in (sharded, others) if part]
    return torch.stack(parts).norm().item() if parts else 0.0
