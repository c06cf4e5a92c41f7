"""What a training will take, before anything is loaded: python train.py --config NAME.yaml --dry-run

The real model, without values, computes the two largest micro-batches of the training's largest update, and AdamW's step.
`phases` counts what that takes, and `memory` says what each process holds of it. A user model that is solved has no updates.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from prlhf.batch.datasets import TrainingData
from prlhf.config.keys import Config, solves_exactly
from prlhf.errors import UserError
from prlhf.forecast.memory import Memory, less_sent, predicted_memory
from prlhf.forecast.phases import bytes_of, counted_update, fake_training
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import check_processes
from prlhf.score.states import readings_of
from prlhf.solve.run import check_size, needs_solver
from prlhf.train.plan import schedule

# Of model.recompute; what recomputes least is the fastest.
RECOMPUTE: tuple[Literal["none", "cheap", "elementwise", "blocks"], ...] = ("none", "cheap", "elementwise", "blocks")


class ParameterCount(NamedTuple):
    """Parameters of a part of the model."""

    all: int
    trained: int


@dataclass(frozen=True)
class Prediction:
    """What a training will be: parameters by part, the data, the updates, and the memory of one process."""

    device: str
    processes: int
    available: float  # bytes that each process has
    data: list[str]  # what was read, dropped and cut, by file; users, updates and tokens
    parameters: dict[str, ParameterCount]
    updates: int  # 0: the user model is solved
    largest: tuple[int, int] | None  # rows and positions of the largest micro-batch; None without updates
    memory: Memory
    checkpoint: int  # bytes on disk, by all processes: trained weights and moments
    checkpoints: int  # how many there are at most: those kept, the best one, and the one being written
    change: list[str]  # keys that would save memory, the most promising first
    less_sent: str  # fsdp keys that would send less and still fit; empty where there are none

    @property
    def fits(self) -> bool:
        """Whether the peak is within what there is."""
        return self.memory.peak <= self.available


def predict(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    device: str,
    processes: int = 1,
    available: float = math.inf,
) -> Prediction:
    """The prediction for a config and its data on `device` (cpu or cuda, which need not be there).

    No weights are read, and nothing is written. available: bytes that each process has. UserError where `processes` do not
    divide into fsdp.replicas, or where a prior's problem is too large.
    """
    check_processes(config, processes)
    fake = fake_training(config, tokenizer, data, device == "cuda")
    if needs_solver(config):
        check_size(len(data.users), len(readings_of(fake.comparisons)))
    files = {"train": data.train, "valid": data.valid}
    lines = [f"{name}: {file.report.lines()}" for name, file in files.items() if file is not None]
    lines.append(f"{len(data.users):,} known users")
    update, updates, checkpoint, checkpoints = None, 0, 0, 0
    if solves_exactly(config):
        lines.append("solved exactly (optim.solver): no updates")
    else:
        update = counted_update(fake, processes)
        per_epoch, updates = schedule(config.optim, len(fake.comparisons))
        tokens = sum(c.length for c in fake.comparisons)
        lines.append(f"{updates:,} updates ({per_epoch:,} an epoch), {tokens:,} tokens an epoch")
        checkpoint = update.gradients + bytes_of(fake.model.user_model.tables) + update.moments
        checkpoints = config.train.keep_checkpoints + 1 + (data.valid is not None)
    memory = predicted_memory(fake, update, processes)
    parameters, change = count_parameters(fake.model), keys_to_change(config, memory, processes)
    largest = update.largest if update else None
    return Prediction(
        device=device,
        processes=processes,
        available=available,
        data=lines,
        parameters=parameters,
        updates=updates,
        largest=largest,
        memory=memory,
        checkpoint=checkpoint,
        checkpoints=checkpoints,
        change=change,
        less_sent=less_sent(fake, memory, available, processes),
    )


def count_parameters(model: PersonalizedModel) -> dict[str, ParameterCount]:
    """Parameters by part: backbone, its LoRA, user model, and an aggregator or a value head where there is one."""
    counts: dict[str, ParameterCount] = {}
    for name, p in model.named_parameters():
        part = "LoRA" if ".lora_" in name else name.partition(".")[0].replace("_", " ")
        before = counts.get(part, ParameterCount(0, 0))
        counts[part] = ParameterCount(before.all + p.numel(), before.trained + p.numel() * p.requires_grad)
    return counts


def keys_to_change(config: Config, memory: Memory, processes: int) -> list[str]:
    """The keys that would save memory, those first that would save the most."""
    half = "model.dtype=bfloat16"
    if solves_exactly(config):
        dtype = [half] if config.model.dtype == "float32" else []
        return ["data.limit", f"evaluate.batch_size (now {config.evaluate.batch_size})", *dtype]
    keys, optim = config.model, config.optim
    full = config.lora.rank == 0 and not keys.frozen
    activations = memory.activations + memory.temporaries
    trained = memory.gradients + memory.optimizer
    static = memory.weights + trained
    options = [  # whether it can be changed, roughly what it saves, the key
        (optim.micro_batch_size > 1, activations, f"optim.micro_batch_size (now {optim.micro_batch_size})"),
        (keys.recompute not in ("blocks", "every:1"), activations, "model.recompute=blocks"),
        (True, activations // 2, f"data.max_tokens (now {config.data.max_tokens})"),
        (full, trained, "lora.rank (now 0, full fine-tuning), e.g. 16"),
        (not full and keys.dtype == "float32", memory.weights // 2, half),
        (not config.fsdp.offload, static // 3, "fsdp.offload=true (slow)"),
        (True, static // 2, f"more processes (now {processes}): --world-size"),
    ]
    possible = [(saved, key) for is_possible, saved, key in options if is_possible]
    return [key for _, key in sorted(possible, key=lambda option: -option[0])]


def fastest_recompute(config: Config, prediction: Prediction, predicted: Callable[[Config], Prediction]) -> str:
    """A line with the value of model.recompute that computes least again among those that fit. prediction: of `config`;
    predicted: gives that of a config which differs in this key."""
    if not prediction.updates:
        return ""
    for what in RECOMPUTE:
        if what == "elementwise" and config.model.compile:
            continue
        keys = replace(config.model, recompute=what)
        same = what == config.model.recompute
        try:
            found = prediction if same else predicted(replace(config, model=keys))
        except UserError:  # a family whose blocks cannot be computed again
            continue
        if found.fits:
            gb = f"{found.memory.peak / 1e9:.2f} GB"
            return f"the fastest model.recompute that fits: {what}, {gb}" + (
                "" if same else f" (now {config.model.recompute})"
            )
    return "no value of model.recompute fits"


def available_memory(device: str, gigabytes: float | None, processes: int = 1) -> int:
    """Bytes that each process has: `gigabytes` if given, else the GPU's, else its part of this machine's RAM.

    UserError for a GPU that is not here and whose memory is not given.
    """
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    if device != "cuda":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    if not torch.cuda.is_available():
        raise UserError("--memory: torch sees no GPU to ask; expected what each has in GB, e.g. --memory 80")
    return torch.cuda.get_device_properties(0).total_memory


def render(prediction: Prediction) -> str:
    """The prediction as a readable table, the verdict last. GB are 1e9 bytes, as in metrics.jsonl."""
    p, m = prediction, prediction.memory
    together = ParameterCount(*(sum(counts) for counts in zip(*p.parameters.values())))
    activations = "activations, {} x {} positions".format(*p.largest or (0, 0))
    parts = {
        "CUDA" if p.device == "cuda" else "Python, libraries and data": m.process,
        "weights": m.weights,
        "gradients": m.gradients,
        "AdamW's moments": m.optimizer,
        "gathered for the block at work": m.whole_blocks,
        activations: m.activations,
        "temporaries at the peak" if p.updates else "the solver": m.temporaries,
        "hidden states of all responses": m.states,
        "a fifth more: waste of the heap": m.heap,
        "waiting in host memory, each": m.host,
        f"a checkpoint on disk, {p.checkpoints} at most": p.checkpoint,
    }
    lines = [*p.data, "", _row("parameters", "all", "trained")]
    lines += [_row(name, f"{n.all:,}", f"{n.trained:,}") for name, n in (p.parameters | {"together": together}).items()]
    lines += ["", _row(f"memory of each of {p.processes} ({p.device})", "GB")]
    lines += [_row(name, f"{size / 1e9:.3f}") for name, size in parts.items() if size]
    lines += ["", _row("at once, at most", "GB")]
    lines += [_row(phase, f"{size / 1e9:.3f}") for phase, size in m.peaks.items()]
    if m.heap:
        lines.append("  beside the process each has a fifth more, which the C library's heap wastes (docs/scaling.md)")
    verdict = f"{m.peak / 1e9:.2f} GB of {p.available / 1e9:.2f} GB"
    if p.fits:
        return "\n".join([*lines, "", f"fits: {verdict}", *([p.less_sent] if p.less_sent else [])])
    return "\n".join([*lines, "", f"does not fit: {verdict}; change one of:", *(f"  {key}" for key in p.change)])


def _row(name: str, *values: str) -> str:
    return " ".join([f"  {name:<34}", *(f"{value:>14}" for value in values)])
