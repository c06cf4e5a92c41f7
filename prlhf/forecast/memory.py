"""What one process of a training holds in memory, phase by phase, before anything is loaded.

`phases` counts what a process takes that holds the whole model. With FSDP each of N processes holds 1/N of the weights,
gradients and moments, its own activations and all of the user tables, and it gathers some weights whole (`gathered_bytes`).
All sizes are in bytes.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import AutoConfig

from prlhf.backbone.families import blocks
from prlhf.backbone.loading import weight_files
from prlhf.backbone.toys import DTYPES
from prlhf.config.keys import Config, FSDPConfig, solves_exactly
from prlhf.errors import expanded
from prlhf.forecast.phases import (
    CountedUpdate,
    FakeTraining,
    bytes_kept_in_float32,
    bytes_of,
    scoring_peak,
    solver_bytes,
    states_bytes,
)
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import sharded
from prlhf.parallel.tensors import FILE_BYTES
from prlhf.train.log import peak_memory_gb

CUDA_CONTEXT = 600_000_000  # what CUDA and its libraries hold on a GPU; torch's own count leaves it out
CUBLAS_WORKSPACE = 32 * 2**20  # 8 buffers of 4 MB, the deterministic choice
STATES_COPIES = 3  # of all hidden states beside themselves, while they are gathered and cached
HEAP_SHARE = 5  # on a CPU a fifth more than the tensors in use: what the C library's heap wastes (docs/scaling.md)


@dataclass(frozen=True)
class Memory:
    """What one process holds, in bytes."""

    process: int  # Python, libraries and data; on a GPU CUDA's context
    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    whole_blocks: int  # FSDP: weights and gradients that are gathered whole; 0 for one process
    activations: int  # kept by the largest micro-batch for its backward pass
    temporaries: int  # beside all these at the peak of an update, or of the solver
    states: int  # a frozen backbone's hidden states for all responses
    host: int  # fsdp.offload on a GPU: weights, gradients and moments that wait in host memory
    heap: int  # on a CPU: what is added to the largest phase for the heap
    peaks: dict[str, int]  # phase -> all that is in use at once in it, with the process and the heap

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.peaks.values())


def predicted_memory(fake: FakeTraining, update: CountedUpdate | None, processes: int) -> Memory:
    """What each of the processes holds. update: None where the user model is solved.

    Call it after the update was counted: what this process holds then is what a training on a CPU holds beside its tensors.
    """
    config, gpu = fake.config, fake.gpu
    spread = processes > 1 or sharded(config)
    share = config.fsdp.replicas / processes if spread else 1.0
    weights, gradients, moments, host = kept_by_each(fake, update, share)
    gathered = gathered_bytes(fake.model, config.fsdp) if spread else 0
    whole = whole_bytes(fake.model, config.fsdp) if spread else 0
    states, solver = states_bytes(fake), solver_bytes(fake)
    static = weights + states + moments  # moments are there from the second update on
    waiting = static + (0 if gpu else gradients)  # between updates; a GPU's gradients are dropped
    by_rows = spread and fake.by_rows
    loading = weights if gpu or by_rows else bytes_of(fake.model.parameters()) + bytes_kept_in_float32(fake)
    phases = {
        "loading": loading + (0 if gpu else file_bytes_beside(config, by_rows)),
        "reference, states, evaluation": waiting + gathered + max(scoring_peak(fake), STATES_COPIES * states),
    }
    if solver:
        phases["solving" if solves_exactly(config) else "choosing the prior"] = weights + states + solver
    activations, temporaries = 0, solver
    if update is not None:
        file = 0 if gpu else min(FILE_BYTES, math.ceil((update.gradients + update.moments) * share))
        phases["forward and backward"] = static + whole + gradients + update.micro_batch
        phases["optimiser's step"] = static + gradients + math.ceil(update.step * share)
        phases["saving"] = waiting + 2 * file  # the writer holds a file twice
        activations = update.activations
        temporaries = max(0, update.micro_batch - activations)  # activations may be gone when gradients are there
    process = CUDA_CONTEXT + CUBLAS_WORKSPACE if gpu else resident_bytes()
    heap = {phase: 0 if gpu else size // HEAP_SHARE for phase, size in phases.items()}
    peaks = {phase: process + size + heap[phase] for phase, size in phases.items()}
    waste = max(heap.values())
    return Memory(
        process=process,
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        whole_blocks=whole,
        activations=activations,
        temporaries=temporaries,
        states=states,
        host=host,
        heap=waste,
        peaks=peaks,
    )


def kept_by_each(fake: FakeTraining, update: CountedUpdate | None, share: float) -> tuple[int, int, int, int]:
    """Weights, gradients and moments of a process that has a `share` of them and all user tables; and which of them wait in
    host memory in place of the GPU's (fsdp.offload). Without an update, weights alone."""
    tables = bytes_of(fake.model.user_model.tables)

    def held(total: int, replicated: int) -> int:
        return math.ceil((total - replicated) * share) + replicated

    weights = held(bytes_of(fake.model.parameters()) + bytes_kept_in_float32(fake), tables)
    if update is None:
        return weights, 0, 0, 0
    gradients, moments = held(update.gradients, 0), held(update.moments, 2 * tables)
    if fake.gpu and fake.config.fsdp.offload:
        return tables, 0, 2 * tables, weights + gradients + moments - 3 * tables
    return weights, gradients, moments, 0


def gathered_bytes(model: PersonalizedModel, keys: FSDPConfig) -> int:
    """The most that FSDP holds whole of the backbone, either within its blocks or after them.

        within  weights and gradients outside the blocks, the weights of two blocks (one is fetched ahead; of all, where
                fsdp.reshard_after_forward is false), the gradients of one, and those of the block behind it once more in
                float32, which the reduce-scatter sends
        after   gradients outside the blocks, and these once more in float32; the weights are freed by then

    (torch 2.13, FSDPParamGroup.post_backward and foreach_reduce.)
    """
    of_blocks = [list(block.parameters()) for block in blocks(model.backbone)]
    inside = {p for block in of_blocks for p in block}
    outside = [p for p in model.backbone.parameters() if p not in inside]
    gathered = sum(sorted(bytes_of(block) for block in of_blocks)[-2 if keys.reshard_after_forward else 0 :])
    within = bytes_of(outside) + bytes_of(outside, trained=True) + gathered + max(map(bytes_reduced, of_blocks))
    return max(within, bytes_reduced(outside))


def whole_bytes(model: PersonalizedModel, keys: FSDPConfig) -> int:
    """What an update holds whole: `gathered_bytes`, and with fsdp.sync=last all of the backbone's gradients in float32."""
    added_up = sum(4 * p.numel() for p in model.backbone.parameters() if p.requires_grad)
    return gathered_bytes(model, keys) + (added_up if keys.sync == "last" else 0)


def less_sent(fake: FakeTraining, memory: Memory, available: float, processes: int) -> str:
    """A line with the values of fsdp.sync and fsdp.reshard_after_forward that send least among those that fit, where they are
    not set. Empty where there are none, or nothing is sent between GPUs."""
    now = fake.config.fsdp
    if not (fake.gpu and memory.whole_blocks and processes > 1):
        return ""
    both = replace(now, sync="last", reshard_after_forward=False)
    options = [both, replace(now, sync="last"), replace(now, reshard_after_forward=False)]
    for keys in options[: options.index(now)] if now in options else options:
        peak = memory.peak + whole_bytes(fake.model, keys) - whole_bytes(fake.model, now)
        if peak <= available:
            reshard = str(keys.reshard_after_forward).lower()
            return (
                f"less is sent, in {peak / 1e9:.2f} GB, with fsdp.sync={keys.sync} fsdp.reshard_after_forward={reshard}"
            )
    return ""


def bytes_reduced(parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of the trained parameters' gradients, and of these once more in float32, in which they are summed."""
    return sum(p.nbytes + 4 * p.numel() for p in parameters if p.requires_grad)


def file_bytes_beside(config: Config, by_rows: bool) -> int:
    """Bytes of a local model's safetensors that are mapped into memory beside its weights while it is loaded.

    All files where their type is not config.model.dtype; files of that type are the weights themselves. by_rows: each of
    several processes reads its rows alone, file by file: then the largest file, whatever its type.
    """
    folder = expanded(config.model.name or "")
    if config.model.name is None or not folder.is_dir():
        return 0
    sizes = [file.stat().st_size for file in weight_files(folder) if file.is_file()]
    if by_rows:
        return max(sizes, default=0)
    described = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).dtype
    return 0 if described in (None, DTYPES[config.model.dtype]) else sum(sizes)


def resident_bytes() -> int:
    """What this process holds now: imports, data and the code that training runs; not on Linux, the most it has held."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return round(peak_memory_gb() * 1e9)
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
