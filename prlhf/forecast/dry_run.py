"""What a training will take, before anything is loaded: python train.py --config NAME.yaml --dry-run

The real model, without values, computes the two largest micro-batches of the training's largest update and the optimiser's
step. What is counted there (`phases`) is what the real ones take; `memory` says what each process holds of it, and when. A
user model that is solved (`exact`) has no updates.
"""

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from prlhf.backbone.lora import LoRALinear
from prlhf.batch.datasets import TrainingData
from prlhf.config.keys import Config, solves_exactly
from prlhf.errors import UserError
from prlhf.forecast.memory import CUDA_CONTEXT, Memory, predicted_memory, resident_after_a_toy_update, solved_memory
from prlhf.forecast.phases import bytes_of, counted_update, fake_training, largest_parts, shape
from prlhf.method.models import PersonalizedModel
from prlhf.parallel.ranks import check_processes
from prlhf.score.states import readings_of
from prlhf.solve.run import check_size, needs_solver
from prlhf.train.plan import Schedule, schedule


class ParameterCount(NamedTuple):
    """Parameters of a part of the model."""

    all: int
    trained: int


@dataclass(frozen=True)
class Prediction:
    """What a training will be: parameters by part, the data, the updates, and the memory of one process."""

    device: str
    processes: int
    available: int | None  # bytes that each process has, None: unknown
    parameters: dict[str, ParameterCount]
    data: dict[str, str]
    known_users: int
    updates: int  # 0: the user model is solved (`exact`)
    updates_per_epoch: int
    tokens_per_epoch: int
    largest: tuple[int, int] | None  # rows and positions of the largest micro-batch; None without updates
    memory: Memory
    checkpoint: int  # bytes of a checkpoint on disk, by all processes: trained weights and moments
    checkpoints: int  # how many there are at most: those kept, the best one, and the one being written
    change: list[str]  # keys that would save memory, the most promising first

    @property
    def fits(self) -> bool:
        """Whether the peak is within what there is."""
        return self.available is None or self.memory.peak <= self.available


def predict(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    device: str,
    processes: int = 1,
    available: int | None = None,
) -> Prediction:
    """The prediction for a config and its data on `device` (cpu or cuda, which need not be there).

    No weights are read, and nothing is written. available: bytes that each process has. UserError where so many
    processes do not fit fsdp.replicas.
    """
    check_processes(config, processes)
    gpu = device == "cuda"
    process = CUDA_CONTEXT if gpu else resident_after_a_toy_update(config)
    fake = fake_training(config, tokenizer, data, gpu)
    if needs_solver(config):
        check_size(len(data.users), len(readings_of(fake.comparisons)))
    exact, checkpoint, largest = solves_exactly(config), 0, None
    if exact:
        memory = solved_memory(config, fake, process, processes)
    else:
        update, parts = largest_parts(fake, processes)
        whole = counted_update(fake, update, parts)
        memory = predicted_memory(config, fake, whole, parts, process, processes)
        largest = max((shape(fake, part) for part in parts), key=math.prod)
        checkpoint = whole.gradients + bytes_of(fake.model.user_model.tables) + whole.moments
    steps = Schedule(0, 0) if exact else schedule(config.optim, len(fake.comparisons))
    reports = {"train": data.train.report.lines()}
    if data.valid is not None:
        reports["valid"] = data.valid.report.lines()
    return Prediction(
        device=device,
        processes=processes,
        available=available,
        parameters=count_parameters(fake.model),
        data=reports,
        known_users=len(data.users),
        updates=steps.total,
        updates_per_epoch=steps.per_epoch,
        tokens_per_epoch=sum(c.length for c in fake.comparisons),
        largest=largest,
        memory=memory,
        checkpoint=checkpoint,
        checkpoints=0 if exact else config.train.keep_checkpoints + 1 + (data.valid is not None),
        change=keys_to_change(config, memory, processes),
    )


def count_parameters(model: PersonalizedModel) -> dict[str, ParameterCount]:
    """Parameters by part: backbone, its LoRA, the user model, and an aggregator or a reward head where there is one."""
    adapters = {id(p) for m in model.modules() if isinstance(m, LoRALinear) for p in (m.lora_A, m.lora_B)}
    parts = {
        "backbone": [p for p in model.backbone.parameters() if id(p) not in adapters],
        "LoRA": [p for p in model.backbone.parameters() if id(p) in adapters],
        "user model": list(model.user_model.parameters()),
    }
    for title, name in (("aggregator", "aggregator"), ("reward head", "value_head")):
        module = getattr(model, name, None)
        parts[title] = [] if module is None else list(module.parameters())
    return {
        title: ParameterCount(sum(p.numel() for p in of), sum(p.numel() for p in of if p.requires_grad))
        for title, of in parts.items()
        if of
    }


def keys_to_change(config: Config, memory: Memory, processes: int) -> list[str]:
    """The keys that would save memory, those first whose part is the largest."""
    if solves_exactly(config):
        static = [] if config.model.dtype != "float32" else ["model.dtype=bfloat16"]
        return ["data.limit", f"evaluate.batch_size (now {config.evaluate.batch_size})", *static]
    options: list[tuple[int, str]] = []
    activations = memory.activations + memory.temporaries
    if config.optim.micro_batch_size > 1:
        options.append((activations, f"optim.micro_batch_size (now {config.optim.micro_batch_size})"))
    if config.model.recompute not in ("blocks", "every:1"):
        options.append((activations, "model.recompute=blocks"))
    options.append((activations // 2, f"data.max_tokens (now {config.data.max_tokens})"))
    if config.lora.rank == 0 and not config.model.frozen:
        options.append((memory.gradients + memory.optimizer, "lora.rank (now 0, full fine-tuning), e.g. 16"))
    elif config.model.dtype == "float32":
        options.append((memory.weights // 2, "model.dtype=bfloat16"))
    static = memory.weights + memory.gradients + memory.optimizer
    if not config.fsdp.offload:
        options.append((static // 3, "fsdp.offload=true (slow)"))
    options.append((static // 2, f"more processes (now {processes}): --world-size"))
    return [text for _, text in sorted(options, key=lambda option: -option[0])]


def available_memory(device: str, gigabytes: float | None, processes: int = 1) -> int | None:
    """Bytes that each process has: `gigabytes` if given, else the GPU's, else its part of this machine's RAM.

    UserError for a GPU that is not here and whose memory is not given.
    """
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--memory: torch sees no GPU to ask; expected what each has in GB, e.g. --memory 80")
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    except (ValueError, OSError):
        return None


def render(prediction: Prediction) -> str:
    """The prediction as a readable table, the verdict last. GB are 1e9 bytes, as in metrics.jsonl."""
    p, m = prediction, prediction.memory

    def line(name: str, value: str) -> str:
        return f"  {name:<34} {value:>14}"

    def gb(name: str, size: int) -> str:
        return line(name, f"{size / 1e9:.3f}")

    lines = [*(f"{name}: {text}" for name, text in p.data.items()), f"{p.known_users:,} known users"]
    updates = f"{p.updates:,} updates ({p.updates_per_epoch:,} an epoch), {p.tokens_per_epoch:,} tokens an epoch"
    lines += [
        updates if p.updates else "solved exactly (optim.solver): no updates", "",
        f"  {'parameters':<34} {'all':>14} {'trained':>14}",
    ]  # fmt: skip
    rows = [*p.parameters.items(), ("together", ParameterCount(*(sum(n) for n in zip(*p.parameters.values()))))]
    lines += [line(name, f"{count.all:,}") + f" {count.trained:>14,}" for name, count in rows]
    lines += [
        "", line(f"memory of each of {p.processes} ({p.device})", "GB"),
        gb("CUDA" if p.device == "cuda" else "Python, libraries and data", m.process),
        gb("weights", m.weights),
        *([gb("gradients", m.gradients), gb("AdamW's moments", m.optimizer)] if p.updates else []),
    ]  # fmt: skip
    if m.whole_blocks:
        lines.append(gb("gathered for the block at work", m.whole_blocks))
    if p.largest is None:
        lines.append(gb("the solver", m.temporaries))
    else:
        lines += [
            gb(f"activations, {p.largest[0]} x {p.largest[1]} positions", m.activations),
            gb("temporaries at the peak", m.temporaries), gb("log-probs alone take at most", m.log_probs),
        ]  # fmt: skip
    lines += [
        *([gb("hidden states of all responses", m.states)] if m.states else []),
        *([gb("glibc's heap beside these", m.heap)] if m.heap else []),
        *([gb("waiting in host memory, each", m.host)] if m.host else []),
        *([gb("a checkpoint on disk", p.checkpoint)] if p.checkpoints else []),
        *([line("checkpoints at once, at most", str(p.checkpoints))] if p.checkpoints else []),
        "", line("at once, at most", "GB"), *(gb(phase, size) for phase, size in m.peaks.items()), "",
    ]  # fmt: skip
    if m.heap is None:
        lines.append("what the C library's heap takes beside these is not counted: it is not glibc's, or refused")
    elif m.heap:
        lines.append("what the heap takes beside these is not the same in every run: docs/scaling.md")
    if p.available is None:
        return "\n".join([*lines, f"peak: {m.peak / 1e9:.2f} GB"])
    verdict = f"{m.peak / 1e9:.2f} GB of {p.available / 1e9:.2f} GB"
    if p.fits:
        return "\n".join([*lines, f"fits: {verdict}"])
    return "\n".join([*lines, f"does not fit: {verdict}; change one of:", *(f"  {text}" for text in p.change)])
