"""FSDP2 around a finished model, which knows nothing of it."""

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
from prlhf.backbone.loading import empty_backbone, weights_folder, word_embeddings
from prlhf.backbone.toys import DTYPES
from prlhf.config.keys import Config
from prlhf.method.build import build_model
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.parallel.ranks import sharded, world_size
from prlhf.parallel.tensors import load_weights_into


def shard(model: PersonalizedModel, config: Config, device: str) -> None:
    """Shard a model's parameters over the ranks (FSDP2), in place: each block, and the rest together.

    Gradients are summed, in float32. model.compute_dtype: what the backbone computes in; fsdp.replicas: hybrid sharding, a
    whole model on every W / replicas neighbours; fsdp.offload: parameters, gradients and moments wait in host memory.
    Parameters of the backbone may be on the device meta; `load_weights_into` gives them values.
    """
    model.device = torch.device(device)
    for part in model.children():
        if part is not model.backbone:
            part.to(device)
    compute = DTYPES[config.model.compute_dtype] if config.model.compute_dtype else None
    options = {
        "mesh": device_mesh(config, device),
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda") if config.fsdp.offload else OffloadPolicy(),
    }
    ours = [part for part in model.children() if part is not model.backbone]  # in float32, whatever the backbone's type
    unsharded = {p for part in ours for p in part.parameters() if p.numel() == 0} | set(model.user_model.tables)
    for part in ours:
        if set(part.parameters()) - unsharded:
            in_float32 = options | {"mp_policy": MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)}
            fully_shard(part, **in_float32, ignored_params=unsharded)
    for block in blocks(model.backbone):
        fully_shard(block, **options)
    fully_shard(model, **options, ignored_params=unsharded)
    if isinstance(model, PersonalizedRewardModel):
        register_fsdp_forward_method(model, "states_of")  # which computes without `forward`
    if isinstance(model.user_model, FSDPModule):
        register_fsdp_forward_method(model.user_model, "parts")  # so does the prior
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def training_model(config: Config, tokenizer: PreTrainedTokenizerBase, users: int, device: str) -> PersonalizedModel:
    """The model of a config for `users` known users on `device`; sharded over the ranks where it is `sharded`.

    Of a sharded model with a name no rank ever holds all weights: it is described first and then read, shard by shard.
    """
    if not sharded(config):
        return build_model(config, tokenizer, users).to(device)
    if config.model.name is None:
        model = build_model(config, tokenizer, users)
        shard(model, config, device)
        return model
    folder = weights_folder(config.model.name)
    backbone = empty_backbone(config.model, tokenizer)
    model = build_model(config, tokenizer, users, backbone, word_embeddings(backbone, folder))
    shard(model, config, device)
    load_weights_into(model, folder, device, "cpu" if config.fsdp.offload else device)
    return model


def device_mesh(config: Config, device: str) -> DeviceMesh:
    """The ranks in a row, or, with fsdp.replicas > 1, as (replicas, shards).

    GPUs get groups of their own, with torch's patience: 10 minutes for NCCL, 30 where gloo sums what is offloaded. That of
    the processes, which wait for each other's files and evaluations, would leave a hung NCCL silent for PATIENCE.
    """
    replicas = config.fsdp.replicas
    shape, names = (world_size(),), None
    if replicas > 1:
        shape, names = (replicas, world_size() // replicas), ("replicate", "shard")
    own = None
    if device == "cuda":
        own = dict.fromkeys(range(len(shape)), "cpu:gloo,cuda:nccl" if config.fsdp.offload else "nccl")
    return init_device_mesh(device, shape, mesh_dim_names=names, backend_override=own)
