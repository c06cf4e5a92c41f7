"""FSDP2 around a finished model. The model knows nothing of it."""

import sys

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedTokenizerBase

from prlhf.backbone.families import blocks
from prlhf.backbone.loading import empty_backbone, weight_names, weights_folder, word_embeddings
from prlhf.backbone.toys import DTYPES
from prlhf.backbone.weights import stored_as_named
from prlhf.config.keys import Config
from prlhf.method.build import build_model
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.parallel.ranks import rank, sharded, world_size
from prlhf.parallel.tensors import load_weights_into


def training_model(config: Config, tokenizer: PreTrainedTokenizerBase, users: int, device: str) -> PersonalizedModel:
    """The model of a config for `users` known users on `device`, sharded over the ranks where `sharded` says so. Where the
    files of a named model hold its weights as they are, no rank ever holds all of them: the model is built empty, sharded,
    and each rank reads its rows. Any other model is whole on every rank while it is loaded, as one without a name is."""
    if not sharded(config):
        return build_model(config, tokenizer, users).to(device)
    if config.model.name is not None:
        folder = weights_folder(config.model.name)
        backbone = empty_backbone(config.model, tokenizer)
        if stored_as_named(backbone, weight_names(folder), DTYPES[config.model.dtype]):
            model = build_model(config, tokenizer, users, backbone, word_embeddings(backbone, folder))
            shard(model, config, device)
            load_weights_into(model, folder, device, "cpu" if config.fsdp.offload else device)
            return model
        if rank() == 0:
            print(
                f"{folder}: not stored weight by weight as the model has them (docs/scaling.md); every process holds the whole "
                "model once while it loads",
                file=sys.stderr,
            )
    model = build_model(config, tokenizer, users)
    shard(model, config, device)
    return model


def shard(model: PersonalizedModel, config: Config, device: str) -> None:
    """Shard a model's parameters over the ranks (FSDP2), in place: each block, and the rest together.

    Gradients are summed in float32. model.compute_dtype is the type that the backbone computes in. fsdp.replicas: hybrid
    sharding, one whole model on every W / replicas neighbours. fsdp.offload: parameters, gradients and the optimiser's
    moments wait in host memory. fsdp.reshard_after_forward: whether blocks are gathered again for the backward pass. The backbone's parameters may be on meta; `load_weights_into` gives them values.
    """
    model.device = torch.device(device)
    compute = DTYPES[config.model.compute_dtype] if config.model.compute_dtype else None
    options = {
        "mesh": device_mesh(config, device),
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda") if config.fsdp.offload else OffloadPolicy(),
    }
    in_float32 = options | {"mp_policy": MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)}
    ours = [part.to(device) for part in model.children() if part is not model.backbone]
    unsharded = {p for part in ours for p in part.parameters() if p.numel() == 0} | set(model.user_model.tables)
    for part in ours:
        if set(part.parameters()) - unsharded:
            fully_shard(part, **in_float32, ignored_params=unsharded)
    for block in blocks(model.backbone):
        fully_shard(block, **options, reshard_after_forward=config.fsdp.reshard_after_forward)
    fully_shard(model, **options, ignored_params=unsharded)
    # FSDP gathers parameters around `forward`; these methods compute with them too.
    register_fsdp_forward_method(model, "within_forward")
    if isinstance(model, PersonalizedRewardModel):
        register_fsdp_forward_method(model, "states_of")
    if isinstance(model.user_model, FSDPModule):
        register_fsdp_forward_method(model.user_model, "parts")
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums over ranks, not means
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def sum_gradients_after_this(model: PersonalizedModel, summed: bool) -> None:
    """Whether the next backward pass of a sharded model sums gradients over ranks. Where not, they are added up, whole and in
    float32, on each rank until a pass that does. Does nothing to a model that is not sharded."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(summed)


def device_mesh(config: Config, device: str) -> DeviceMesh:
    """The ranks in a row, or as (replicas, shards) where fsdp.replicas > 1."""
    replicas = config.fsdp.replicas
    shape = (replicas, world_size() // replicas) if replicas > 1 else (world_size(),)
    names = ("replicate", "shard") if replicas > 1 else None
    backends = None
    if device == "cuda":
        # Groups of their own, with torch's timeouts (NCCL 10 minutes, gloo 30): with PATIENCE, which is for waiting on
        # files and evaluations, a hung NCCL would go unnoticed for hours. Gloo sums what is offloaded.
        backends = dict.fromkeys(range(len(shape)), "cpu:gloo,cuda:nccl" if config.fsdp.offload else "nccl")
    return init_device_mesh(device, shape, mesh_dim_names=names, backend_override=backends)
