"""What a training will take, before anything is loaded: python train.py --config NAME.yaml --dry-run

The real model, without values, computes the two largest micro-batches of the training's largest update and the optimiser's
step on fake tensors (`allocations`); what is counted there is what the real ones take. Where nothing runs, formulas do:

    N processes (FSDP)  weights, gradients and moments / N, and whole what `gathered_bytes` says; user tables and
                        activations are each process's own
    a GPU               FlexAttention keeps what causal attention without a mask keeps; Triton's log-probs take a tile of
                        logits (`logprobs_triton.ROWS` x `TILE`) instead of a chunk
    this process        what it holds after imports, data and a toy update, which has touched the code that training runs
    glibc's heap        what it takes for the same tensors in the same order beside what is in use (`heap.growth`)

Memory is in bytes, in use at once, but for the heap's.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prlhf import backbones, logprobs, personalized
from prlhf.allocations import Allocations, give_fake_storage
from prlhf.backbones import DTYPES, blocks, byte_tokenizer, empty_backbone, head, takes_flex_attention, weight_files
from prlhf.batching import PreferenceBatch, micro_batches
from prlhf.config import Config
from prlhf.distributed import FILE_BYTES, check_processes, sharded
from prlhf.encoding import EncodedComparison, TrainingData
from prlhf.errors import UserError
from prlhf.heap import growth, twice
from prlhf.logprobs import HeadGradients, Pass, Softmax
from prlhf.loop import Item, epoch_updates, make_optimizer, part_loss, schedule, update_parts
from prlhf.lora import LoRALinear
from prlhf.losses import ResponseLogProbs, needs_reference
from prlhf.personalized import PersonalizedModel, build_model
from prlhf.reference import keeps_states, readings_of
from prlhf.scoring import tree_keys

TRITON_LOGITS = 1024 * 2048  # positions and vocabulary of Triton's tile
CUDA_CONTEXT = 600_000_000  # what CUDA and its libraries hold on a GPU, which torch's own count leaves out
CUBLAS_WORKSPACE = 32 * 2**20  # of 8 buffers of 4 MB, the deterministic choice
CANDIDATES = 8  # updates that are looked at closely for the largest
STATES_COPIES = 3  # of all kept hidden states beside themselves, until they are gathered and in the cache
READING = 1000  # bytes of Python's for a response whose hidden state is kept, beside its tokens


class Count(NamedTuple):
    """Parameters of a part of the model."""

    all: int
    trained: int


@dataclass(frozen=True)
class Memory:
    """What one process holds, in bytes. `peak`s: all that is in use at once in that phase, the process included."""

    process: int  # Python and libraries; on a GPU CUDA's context
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


@dataclass(frozen=True)
class Prediction:
    """What a training will be: parameters by part, the data, the updates, and the memory of one process."""

    device: str
    processes: int
    available: int | None  # bytes that each process has, None: unknown
    parameters: dict[str, Count]
    data: dict[str, str]
    known_users: int
    updates: int
    updates_per_epoch: int
    tokens_per_epoch: int
    largest: tuple[int, int]  # rows and positions of the largest micro-batch
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
    comparisons = data.train.comparisons
    gpu = device == "cuda"
    process = CUDA_CONTEXT if gpu else resident_after_a_toy_update(config)
    computing = replace(config.model, dtype=config.model.compute_dtype or config.model.dtype)
    backbone = empty_backbone(computing, tokenizer)
    layout = config.model.layout
    if layout == "auto":
        layout = "packed" if gpu and takes_flex_attention(backbone) else "tree"
    log_probs = "torch" if config.model.log_probs == "torch" else "chunked"
    config = replace(config, model=replace(computing, layout=layout, log_probs=log_probs, compile=False))
    allocations = Allocations()
    with allocations.fake():
        give_fake_storage(backbone)
        model = build_model(config, tokenizer, len(data.users), backbone)
    model.check_lengths(comparisons)
    steps = schedule(config.optim, len(comparisons))
    update, parts = largest_parts(config, model, comparisons, processes)
    with gpu_stand_ins(config) if gpu else contextlib.nullcontext():
        whole = counted_update(config, model, data.train.comparisons, allocations, update, parts, gpu)
        memory = predicted_memory(config, model, data, allocations, whole, parts, process, processes, gpu)
    rows, positions = max((shape(model, comparisons, part) for part in parts), key=math.prod)
    checkpoint = whole.gradients + bytes_of(model.user_model.tables) + whole.moments
    checkpoints = config.train.keep_checkpoints + 1 + (data.valid is not None)
    reports = {"train": data.train.report.lines()}
    if data.valid is not None:
        reports["valid"] = data.valid.report.lines()
    return Prediction(
        device, processes, available, count_parameters(model), reports, len(data.users),
        steps.total, steps.per_epoch, sum(c.length for c in comparisons), (rows, positions), memory, checkpoint, checkpoints,
        keys_to_change(config, memory, processes),
    )  # fmt: skip


def count_parameters(model: PersonalizedModel) -> dict[str, Count]:
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
        title: Count(sum(p.numel() for p in of), sum(p.numel() for p in of if p.requires_grad))
        for title, of in parts.items()
        if of
    }


def bytes_of(parameters: Any, trained: bool = False) -> int:
    """Bytes of parameters, or of the trained ones among them."""
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad or not trained)


def shape(model: PersonalizedModel, comparisons: Sequence[EncodedComparison], items: Sequence[Item]) -> tuple[int, int]:
    """Rows and positions of a micro-batch."""
    return tuple(collated(model, comparisons, items).input_ids_RT.shape)  # type: ignore[return-value]


def collated(
    model: PersonalizedModel, comparisons: Sequence[EncodedComparison], items: Sequence[Item]
) -> PreferenceBatch:
    """A micro-batch as training lays it out."""
    return model.collate([comparisons[item.index] for item in items], [item.user for item in items])


def largest_parts(
    config: Config, model: PersonalizedModel, comparisons: Sequence[EncodedComparison], processes: int
) -> tuple[list[int], list[list[Item]]]:
    """Of all the updates that `processes` share the one with the largest micro-batch, and its two largest, in their order."""
    per_epoch, total = schedule(config.optim, len(comparisons))
    updates: list[list[int]] = []
    for epoch in range(math.ceil(total / per_epoch)):
        updates += epoch_updates(config, comparisons, epoch)[: total - len(updates)]
    size = sum if config.model.layout == "packed" else max
    updates.sort(key=lambda update: size(comparisons[i].length for i in update), reverse=True)

    best: tuple[int, list[int], list[list[Item]]] | None = None
    for update in updates[:CANDIDATES]:
        parts = update_parts(config, model, comparisons, update, processes)
        sizes = [math.prod(shape(model, comparisons, part)) for part in parts]
        if best is None or max(sizes) > best[0]:
            two = sorted(sorted(range(len(parts)), key=lambda n: -sizes[n])[:2])
            best = max(sizes), update, [parts[n] for n in two]
    assert best is not None
    return best[1], best[2]


class Counted(NamedTuple):
    """Bytes that an update of the whole model takes in one process that holds all of it."""

    weights: int
    gradients: int  # of what is not a table, of which few rows move
    moments: int
    activations: int  # of the largest micro-batch, at the end of its forward pass
    extra: int  # the most that a micro-batch takes beside weights, moments and gradients
    peak: int  # the most that all micro-batches take beside weights and moments
    step: int  # what clipping and the optimiser take beside all these
    lost: int | None  # what glibc's heap takes beside `peak`; 0 on a GPU, None where the heap is another
    saving: int  # what its heap has grown to when a checkpoint is written; 0 where `lost` is 0 or None


def counted_update(
    config: Config,
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    allocations: Allocations,
    update: Sequence[int],
    parts: Sequence[Sequence[Item]],
    gpu: bool,
) -> Counted:
    """Run an update on fake tensors and count."""
    reference = None
    if needs_reference(config):
        lengths = torch.ones(len(comparisons), dtype=torch.long)
        zeros = torch.zeros(len(comparisons))
        reference = ResponseLogProbs(zeros, zeros, lengths, lengths)
    if keeps_states(model):
        some = readings_of([comparisons[item.index] for part in parts for item in part])
        with allocations.fake():
            state_D = model.backbone.get_input_embeddings().weight[0]
            model.known_states.update((reading, torch.empty_like(state_D)) for reading in some)
    weights = bytes_of(model.parameters())
    gradients = bytes_of(model.parameters(), trained=True) - bytes_of(model.user_model.tables)
    model.train()
    with allocations.fake():
        before = allocations.now
        optimizer = make_optimizer(config, model, total_steps=1)
        moments = allocations.now - before
        start = allocations.restart()
        activations = peak = extra = 0
        with contextlib.nullcontext([]) if gpu else allocations.written_down() as events:
            if not gpu:  # as the loop does
                optimizer.keep_gradients()
            for items in parts:
                before, earlier = allocations.restart(), bytes_of_gradients(model)
                loss, margins = part_loss(config, model, comparisons, reference, items, len(update))
                activations = max(activations, allocations.now - before)
                loss.backward()
                del loss, margins
                allocations.graph_ends()
                peak = max(peak, allocations.peak - start)
                extra = max(extra, allocations.peak - before - (bytes_of_gradients(model) - earlier))
        before = allocations.restart()
        torch.nn.utils.clip_grad_norm_(optimizer.dense_parameters, config.optim.max_grad_norm or math.inf)
        optimizer.dense.step()
        step = allocations.peak - before
    lost, saving = 0, 0
    if not gpu:
        update_events = twice(events)
        # A checkpoint's file is there twice while it is written (`distributed.write_tensors`), each time as one piece.
        file = min(FILE_BYTES, gradients + moments)
        pieces = [("storage", len(events) + n, file) for n in range(2)]
        grown, then = growth(update_events, kept=True), growth([*update_events, *pieces], kept=True)
        lost = None if grown is None else max(0, grown - peak)
        saving = then or 0
    if config.model.compute_dtype:  # what was counted is of that type, and is kept in float32
        more = bytes_of(model.backbone.parameters(), trained=True)
        weights, gradients, moments, step = weights + more, gradients + more, moments + 2 * more, step + more
    return Counted(weights, gradients, moments, activations, extra, peak, step, lost, saving)


def predicted_memory(
    config: Config,
    model: PersonalizedModel,
    data: TrainingData,
    allocations: Allocations,
    whole: Counted,
    parts: Sequence[Sequence[Item]],
    process: int,
    processes: int,
    gpu: bool,
) -> Memory:
    """What each of the processes holds of what a whole update takes; see the module for what is a formula."""
    comparisons = data.train.comparisons
    scoring = scoring_peak(config, model, data, allocations, gpu)
    states = known_states(model, [*comparisons, *(data.valid.comparisons if data.valid is not None else ())])
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
    file = min(FILE_BYTES, held(whole.gradients + whole.moments, 0))  # twice in memory while it is written
    return Memory(
        process, weights, gradients, moments, gathered, whole.activations,
        max(0, in_update - gradients - gathered - whole.activations),
        log_prob_bytes(config, model, comparisons, parts, allocations), whole.lost, states, host,
        {
            "loading": process + (weights if gpu else whole.weights + file_bytes_beside(config)),
            "reference and evaluation": waiting + gathered + max(scoring, STATES_COPIES * states),
            "forward and backward": static + in_update + (whole.lost or 0),
            "optimiser's step": static + gradients + held(whole.step, 0),
            "saving": max(waiting + (0 if gpu else 2 * file), static + (0 if spread else whole.saving)),
        },
    )  # fmt: skip


def bytes_of_gradients(model: nn.Module) -> int:
    """Bytes of the gradients that are there."""
    return bytes_of(p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse)


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


def scoring_peak(
    config: Config, model: PersonalizedModel, data: TrainingData, allocations: Allocations, gpu: bool
) -> int:
    """What the largest forward pass without gradients takes beside weights and moments: of the reference, of an evaluation,
    or of a frozen backbone whose hidden states are computed once. On a CPU with what its heap takes for that."""
    size = config.evaluate.batch_size
    datasets = [data.train.comparisons] + ([] if data.valid is None else [data.valid.comparisons])

    def taken(forward: Callable[[], Any], training: bool) -> int:
        with allocations.fake(), contextlib.nullcontext([]) if gpu else allocations.written_down() as events:
            before = allocations.restart()
            outputs = forward()
            peak = allocations.peak - before
            del outputs
        # Freed memory is kept from the training loop on.
        return max(peak, 0 if gpu else growth(twice(events), kept=training) or 0)

    def scored(comparisons: Sequence[EncodedComparison], users: Sequence[int] | None) -> int:
        trees = tree_keys(model, comparisons, users)
        first = micro_batches(trees, [c.length for c in comparisons], size)[0]
        batch = model.collate([comparisons[i] for i in first], users and [users[i] for i in first])
        model.eval()
        with model.as_reference() if users is None else torch.no_grad():
            return taken(lambda: model(batch), training=users is not None)

    peaks = [0]
    if needs_reference(config):
        peaks += [scored(comparisons, None) for comparisons in datasets]
    if keeps_states(model):
        readings = [readings_of(comparisons) for comparisons in datasets]
        batches = [some[start : start + size] for some in readings for start in range(0, len(some), size)]
        largest = max(batches, key=lambda some: len(some) * max(len(r.prefix) + len(r.response) for r in some))
        peaks.append(taken(lambda: model.states_of(largest), training=False))
    elif data.valid is not None:
        peaks.append(scored(data.valid.comparisons, [c.user for c in data.valid.comparisons]))
    return max(peaks)


def known_states(model: PersonalizedModel, comparisons: Sequence[EncodedComparison]) -> int:
    """Bytes of the hidden states that are kept, and of the responses by which they are found."""
    if not keeps_states(model):
        return 0
    weight_VD = model.backbone.get_input_embeddings().weight
    readings = readings_of(comparisons)
    tokens = sum(len(c.prefix) for c in comparisons) + sum(len(reading.response) for reading in readings)
    return len(readings) * (weight_VD.shape[1] * weight_VD.element_size() + READING) + 8 * tokens


def log_prob_bytes(
    config: Config,
    model: PersonalizedModel,
    comparisons: Sequence[EncodedComparison],
    parts: Sequence[Sequence[Item]],
    allocations: Allocations,
) -> int:
    """What log-probabilities and their backward pass take for the largest micro-batch, beside hidden states and head."""
    if config.method != "pdpo":
        return 0
    targets_N = max((collated(model, comparisons, part).targets_N for part in parts), key=len)
    with allocations.fake():
        weight_VD, bias_V = head(model.backbone)
        hidden_ND = torch.empty(len(targets_N), weight_VD.shape[1], dtype=weight_VD.dtype, requires_grad=True)
        before = allocations.restart()
        log_p_N = logprobs.log_probs(hidden_ND, weight_VD, bias_V, targets_N, config.model.log_probs)
        trained = [hidden_ND, *(t for t in (weight_VD, bias_V) if t is not None and t.requires_grad)]
        gradients = torch.autograd.grad(log_p_N.sum(), trained)
        del gradients
        return allocations.peak - before


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
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def file_bytes_beside(config: Config) -> int:
    """The safetensors of a local model whose type is not config.model.dtype: mapped into memory while they are converted.

    Files of the same type are the weights themselves. Only their headers' types would say so surely; config.json does.
    """
    folder = Path(config.model.name or "").expanduser()
    files = [file for file in weight_files(folder) if file.is_file()] if config.model.name and folder.is_dir() else []
    total = sum(file.stat().st_size for file in files)
    if not files or same_type(config):
        return 0
    return total


def same_type(config: Config) -> bool:
    """Whether a model's files hold config.model.dtype, by its config.json."""
    from transformers import AutoConfig

    described = AutoConfig.from_pretrained(str(Path(config.model.name or "").expanduser()), trust_remote_code=False)
    return described.dtype is None or described.dtype == DTYPES[config.model.dtype]


@contextlib.contextmanager
def gpu_stand_ins(config: Config) -> Iterator[None]:
    """Within the context, what runs on a GPU alone is replaced by what allocates alike."""
    mask, passes, grouped = personalized.attention_mask, logprobs._passes, backbones.takes_grouped_keys
    backbones.takes_grouped_keys = lambda query: False
    if config.model.layout == "packed":
        personalized.attention_mask = lambda batch: None  # a BlockMask is small
    if config.model.log_probs == "chunked":
        logprobs._passes = lambda impl: (_tile_pass, _tile_head_gradients)
    try:
        yield
    finally:
        personalized.attention_mask, logprobs._passes, backbones.takes_grouped_keys = mask, passes, grouped


def _tile_pass(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, slope: bool) -> Pass:
    """What Triton's pass allocates: its outputs and a tile of logits, once more in a half type."""
    log_p_N, max_N, sum_N = torch.empty(3, len(hidden_ND), dtype=torch.float32).unbind()
    slope_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32) if slope else None
    tile = torch.empty(TRITON_LOGITS, dtype=torch.float32)
    tile.to(hidden_ND.dtype)
    return Pass(log_p_N.clone(), Softmax(max_N.clone(), sum_N.clone()), slope_ND)


def _tile_head_gradients(
    grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softmax: Softmax
) -> HeadGradients:
    """What Triton's head gradients allocate: themselves and a tile."""
    tile = torch.empty(TRITON_LOGITS, dtype=torch.float32)
    tile.to(hidden_ND.dtype)
    return HeadGradients(torch.empty_like(weight_VD), None if bias_V is None else torch.empty_like(bias_V))


def keys_to_change(config: Config, memory: Memory, processes: int) -> list[str]:
    """The keys that would save memory, those first whose part is the largest."""
    options: list[tuple[int, str]] = []
    activations = memory.activations + memory.temporaries
    if config.optim.micro_batch_size > 1:
        options.append((activations, f"optim.micro_batch_size (now {config.optim.micro_batch_size})"))
    if not config.model.gradient_checkpointing:
        options.append((activations, "model.gradient_checkpointing=true"))
    elif config.model.recompute == "elementwise":
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
    lines += [
        f"{p.updates:,} updates ({p.updates_per_epoch:,} an epoch), {p.tokens_per_epoch:,} tokens an epoch", "",
        f"  {'parameters':<34} {'all':>14} {'trained':>14}",
    ]  # fmt: skip
    rows = [*p.parameters.items(), ("together", Count(*(sum(n) for n in zip(*p.parameters.values()))))]
    lines += [line(name, f"{count.all:,}") + f" {count.trained:>14,}" for name, count in rows]
    lines += [
        "", line(f"memory of each of {p.processes} ({p.device})", "GB"),
        gb("CUDA" if p.device == "cuda" else "Python, libraries and data", m.process),
        gb("weights", m.weights), gb("gradients", m.gradients), gb("AdamW's moments", m.optimizer),
    ]  # fmt: skip
    if m.whole_blocks:
        lines.append(gb("gathered for the block at work", m.whole_blocks))
    lines += [
        gb(f"activations, {p.largest[0]} x {p.largest[1]} positions", m.activations),
        gb("temporaries at the peak", m.temporaries), gb("log-probs alone take at most", m.log_probs),
        *([gb("hidden states of all responses", m.states)] if m.states else []),
        *([gb("glibc's heap beside these", m.heap)] if m.heap else []),
        *([gb("waiting in host memory, each", m.host)] if m.host else []),
        gb("a checkpoint on disk", p.checkpoint), line("checkpoints at once, at most", str(p.checkpoints)),
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
