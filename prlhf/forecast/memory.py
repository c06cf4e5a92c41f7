"""What one process of a training holds in memory, phase by phase, before anything is loaded.

What the tensors of its phases take in a process that holds the whole model is counted (`phases`), and what Python and its
libraries hold is measured in this process, after a toy update, which has touched the code that training runs. Of N processes
(FSDP) each holds

    weights, gradients and moments / N, and whole what `gathered_bytes` says; user tables and activations of its own

Memory is in bytes, in use at once, but for the heap's.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from prlhf.backbone.families import blocks
from prlhf.backbone.loading import weight_files
from prlhf.backbone.toys import DTYPES, byte_tokenizer
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import Config
from prlhf.forecast.phases import Counted, FakeTraining, bytes_of, log_prob_bytes, scoring_peak
from prlhf.method.build import build_model
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.parallel.ranks import sharded
from prlhf.parallel.tensors import FILE_BYTES
from prlhf.score.states import has_fixed_states, readings_of
from prlhf.solve.linear import MEMORY
from prlhf.solve.run import needs_solver
from prlhf.train.log import peak_memory_gb
from prlhf.train.optimizer import make_optimizer
from prlhf.train.plan import Part

CUDA_CONTEXT = 600_000_000  # what CUDA and its libraries hold on a GPU, which torch's own count leaves out
CUBLAS_WORKSPACE = 32 * 2**20  # of 8 buffers of 4 MB, the deterministic choice
STATES_COPIES = 3  # of all kept hidden states beside themselves, until they are gathered and in the cache
READING = 1000  # bytes of Python's for a response whose hidden state is kept, beside its tokens


@dataclass(frozen=True)
class Memory:
    """What one process holds, in bytes. `peak`s: all that is in use at once in that phase, the process included."""

    process: int  # Python, libraries and data; on a GPU CUDA's context
    weights: int
    gradients: int
    optimizer: int  # AdamW's two moments
    whole_blocks: int  # FSDP: what is gathered of other processes' weights; 0 for one process
    activations: int  # kept by the largest micro-batch for its backward pass
    temporaries: int  # beside all these at the peak of an update
    log_probs: int  # of these, what log-probabilities alone take at most
    heap: int | None  # on a CPU what glibc's heap takes beside what is in use in an update; None where it is another
    states: int  # of a frozen backbone: its hidden states for all responses, known before the training
    host: int  # fsdp.offload: weights, gradients and moments that wait in host memory, beside the process; else 0
    peaks: dict[str, int]  # phase -> bytes, the heap's loss included

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.peaks.values())


def predicted_memory(
    config: Config, fake: FakeTraining, whole: Counted, parts: Sequence[Part], process: int, processes: int
) -> Memory:
    """What each of the processes holds of what a whole update takes.

    config: as it was given, where `fake.config` is spelled out. parts: the largest micro-batches. process: what one holds
    before anything is loaded.
    """
    model, gpu = fake.model, fake.gpu
    scoring, states = scoring_peak(fake), known_states(fake)
    spread = processes > 1 or sharded(config)
    share = config.fsdp.replicas / processes if spread else 1.0
    gathered = gathered_bytes(model) if spread else 0
    tables = bytes_of(model.user_model.tables)

    def held(total: int, replicated: int) -> int:
        return math.ceil((total - replicated) * share) + replicated

    weights, gradients = held(whole.weights, tables), held(whole.gradients, 0)
    moments, host = held(whole.moments, 2 * tables), 0
    if gpu and config.fsdp.offload:
        host = weights + gradients + moments - 3 * tables
        weights, gradients, moments = tables, 0, 2 * tables
    if gpu:
        process += CUBLAS_WORKSPACE
    static = process + weights + states + moments  # moments are there from the second update on
    waiting = static + (0 if gpu else gradients)  # between updates
    in_update = gradients + whole.extra + gathered if spread else whole.peak
    loading = weights if gpu or (spread and config.model.name) else whole.weights
    file = min(FILE_BYTES, held(whole.gradients + whole.moments, 0))  # twice in memory while it is written
    return Memory(
        process, weights, gradients, moments, gathered, whole.activations,
        max(0, in_update - gradients - gathered - whole.activations),
        log_prob_bytes(fake, parts), whole.lost, states, host,
        {
            "loading": process + loading + (0 if gpu else file_bytes_beside(config, spread)),
            "reference and evaluation": waiting + gathered + max(scoring, STATES_COPIES * states),
            "forward and backward": static + in_update + (whole.lost or 0),
            "optimiser's step": static + gradients + held(whole.step, 0),
            **({"choosing the prior": process + weights + states + solver_bytes(fake)} if needs_solver(config) else {}),
            "saving": max(waiting + (0 if gpu else 2 * file), static + (0 if spread else whole.saving)),
        },
    )  # fmt: skip


def solved_memory(config: Config, fake: FakeTraining, process: int, processes: int) -> Memory:
    """What each of the processes holds where the user model is solved (`exact`): nothing that updates take."""
    model, spread = fake.model, processes > 1 or sharded(config)
    tables, whole = bytes_of(model.user_model.tables), bytes_of(model.parameters())
    share = config.fsdp.replicas / processes if spread else 1.0
    weights, gathered = math.ceil((whole - tables) * share) + tables, gathered_bytes(model) if spread else 0
    states, solver = known_states(fake), solver_bytes(fake)
    static = process + weights + states
    loading = weights if fake.gpu or (spread and config.model.name) else whole
    return Memory(
        process, weights, 0, 0, gathered, 0, solver, 0, 0, states, 0,
        {
            "loading": process + loading + (0 if fake.gpu else file_bytes_beside(config, spread)),
            "hidden states and evaluation": static + gathered + max(scoring_peak(fake), STATES_COPIES * states),
            "solving": static + solver,
        },
    )  # fmt: skip


def solver_bytes(fake: FakeTraining) -> int:
    """What choosing a prior and solving take (`exact`, `solve`), all in float64: the states of S responses, twice; rewards of M
    users and their gradients; L-BFGS's memory of P parameters; and before that the differences of N comparisons' states.

        8 max(4 N W,  2 S W + 4 (M + 1) S + (2 MEMORY + 10) P)
    """
    model, N = fake.model, len(fake.comparisons)
    assert isinstance(model, PersonalizedRewardModel)
    S, W = len(readings_of(fake.comparisons)), model.state_width
    P = sum(p.numel() for p in model.user_model.parameters())
    return 8 * max(4 * N * W, 2 * S * W + 4 * (model.users + 1) * S + (2 * MEMORY + 10) * P)


def gathered_bytes(model: PersonalizedModel) -> int:
    """What FSDP holds whole of the backbone, at most: within its blocks, or after them.

        within  weights and gradients outside the blocks, two blocks' weights (one is fetched ahead), a block's gradients,
                and those of the block behind it once more in float32, which the reduce-scatter sends
        after   gradients outside the blocks, and these once more in float32; weights are freed by then

    (torch 2.13, FSDPParamGroup.post_backward and foreach_reduce.)
    """
    of_blocks = [list(b.parameters()) for b in blocks(model.backbone)]
    inside = {id(p) for block in of_blocks for p in block}
    root = [p for p in model.backbone.parameters() if id(p) not in inside]
    reduced = max(bytes_of(block, trained=True) + bytes_sent(block) for block in of_blocks)
    two = sum(sorted(bytes_of(block) for block in of_blocks)[-2:])
    within = bytes_of(root) + bytes_of(root, trained=True) + two + reduced
    return max(within, bytes_of(root, trained=True) + bytes_sent(root))


def bytes_sent(parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of the trained parameters' gradients in float32, in which they are summed (`distributed.shard`)."""
    return sum(4 * p.numel() for p in parameters if p.requires_grad)


def known_states(fake: FakeTraining) -> int:
    """Bytes of the hidden states that are kept, and of the responses by which they are found."""
    if not has_fixed_states(fake.model):
        return 0
    comparisons = [c for dataset in fake.datasets for c in dataset]
    readings = readings_of(comparisons)
    tokens = sum(len(c.prefix) for c in comparisons) + sum(len(reading.response) for reading in readings)
    return len(readings) * (fake.model.state_width * fake.model.state_dtype.itemsize + READING) + 8 * tokens


def resident_after_a_toy_update(config: Config) -> int:
    """Bytes of this process once a model of one small block has been updated: imports, data, and the code it touches."""
    family = "gptj" if config.model.family == "gptj" else "llama"
    small = replace(config.model, name=None, family=family, width=64, heads=4, layers=1, compile=False)
    toy = replace(config, model=small, lora=replace(config.lora, targets=None), method="pdpo")
    some = [EncodedComparison([1] * 8, [1] * 8, [2] * 8, [3] * 8, user=0)] * 2
    with torch.random.fork_rng(devices=[]):
        model = build_model(toy, byte_tokenizer(), 1)
        optimizer = make_optimizer(toy, model, total_steps=1)
        outputs = model(model.collate(some, [0, 0]))
        (outputs.chosen - outputs.rejected).sum().backward()
        optimizer.step()
    return resident_bytes()


def resident_bytes() -> int:
    """What this process holds now (Linux), or has held at most."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return round(peak_memory_gb() * 1e9)


def file_bytes_beside(config: Config, spread: bool) -> int:
    """The safetensors of a local model that are mapped into memory beside its weights while it is loaded.

    All of them where their type is not config.model.dtype; files of the same type are the weights themselves. A model that
    is spread over processes is read into its shards one file after another: the largest of them, whatever its type.
    """
    folder = Path(config.model.name or "").expanduser()
    if config.model.name is None or not folder.is_dir():
        return 0
    sizes = [file.stat().st_size for file in weight_files(folder) if file.is_file()]
    if spread:
        return max(sizes, default=0)
    return 0 if same_type(config) else sum(sizes)


def same_type(config: Config) -> bool:
    """Whether a model's files hold config.model.dtype, by its config.json."""
    from transformers import AutoConfig

    described = AutoConfig.from_pretrained(str(Path(config.model.name or "").expanduser()), trust_remote_code=False)
    return described.dtype is None or described.dtype == DTYPES[config.model.dtype]
