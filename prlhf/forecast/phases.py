"""What the phases of a training take in memory: the real code runs on fake tensors (`allocations`), and is counted.

Fake tensors are on a CPU. What a GPU alone runs is replaced by what allocates alike (`computation_on_gpu`):

    FlexAttention           keeps what causal attention without a mask keeps
    Triton's log-probs      take a tile of logits (`logprobs_triton.ROWS` x `TILE`) instead of a chunk

On a CPU glibc's heap is asked what it takes for the same tensors in the same order beside what is in use (`heap.growth`).
All sizes are in bytes.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prlhf.backbone.attention import attention_mask, takes_flex_attention, use_tree_attention
from prlhf.backbone.families import head
from prlhf.backbone.loading import empty_backbone
from prlhf.batch.datasets import TrainingData
from prlhf.batch.order import micro_batches
from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import PreferenceBatch
from prlhf.config.keys import Config, ModelConfig
from prlhf.forecast.allocations import Allocations, give_fake_storage
from prlhf.forecast.heap import Event, growth, twice
from prlhf.kernels.log_probs import log_probs
from prlhf.kernels.passes import HeadGradients, Pass, Passes, Softmax
from prlhf.method.build import build_model
from prlhf.method.losses import ResponseLogProbs, needs_reference
from prlhf.method.models import Computation, PersonalizedModel
from prlhf.parallel.tensors import FILE_BYTES
from prlhf.score.score import tree_keys
from prlhf.score.states import States, has_fixed_states, readings_of
from prlhf.score.task import Task
from prlhf.train.optimizer import make_optimizer
from prlhf.train.plan import Part, epoch_updates, plan_update, schedule
from prlhf.train.step import part_loss

TRITON_LOGITS = 1024 * 2048  # positions and vocabulary of Triton's tile
CANDIDATES = 8  # updates that are looked at closely for the largest


@dataclass(frozen=True)
class FakeTraining:
    """A training without values: what all of its phases need."""

    config: Config  # with what a device chooses itself spelled out, and the weights in the type that is computed in
    model: PersonalizedModel
    comparisons: list[EncodedComparison]
    valid: list[EncodedComparison] | None
    allocations: Allocations
    gpu: bool  # whether it stands for one on a GPU

    @property
    def datasets(self) -> list[list[EncodedComparison]]:
        """All comparisons, those of the training and of the validation."""
        return [self.comparisons] + ([] if self.valid is None else [self.valid])


def fake_training(config: Config, tokenizer: PreTrainedTokenizerBase, data: TrainingData, gpu: bool) -> FakeTraining:
    """The model of a training and its data, without weights. UserError where a comparison is too long for the model."""
    model_config = replace(config.model, dtype=config.model.compute_dtype or config.model.dtype)
    backbone = empty_backbone(model_config, tokenizer)
    layout = model_config.layout
    if layout == "auto":
        layout = "packed" if gpu and takes_flex_attention(backbone) else "tree"
    log_probs = "torch" if model_config.log_probs == "torch" else "chunked"
    config = replace(config, model=replace(model_config, layout=layout, log_probs=log_probs, compile=False))
    compute = computation_on_gpu(config.model) if gpu else None
    if gpu:
        use_tree_attention(backbone, as_on_gpu=True)
    allocations = Allocations()
    with allocations.fake():
        give_fake_storage(backbone)
        model = build_model(config, tokenizer, len(data.users), backbone, compute=compute)
    model.check_lengths(data.train.comparisons)
    valid = data.valid.comparisons if data.valid is not None else None
    return FakeTraining(config, model, data.train.comparisons, valid, allocations, gpu)


def collated(fake: FakeTraining, part: Part) -> PreferenceBatch:
    """A micro-batch as training lays it out."""
    return fake.model.collate([fake.comparisons[i] for i in part.indices], part.users)


def shape(fake: FakeTraining, part: Part) -> tuple[int, int]:
    """Rows and positions of a micro-batch."""
    return tuple(collated(fake, part).input_ids_RT.shape)  # type: ignore[return-value]


def largest_parts(fake: FakeTraining, processes: int) -> tuple[list[int], list[Part]]:
    """Of all the updates that `processes` share the one with the largest micro-batch, and its two largest, in their order."""
    config, comparisons = fake.config, fake.comparisons
    per_epoch, total = schedule(config.optim, len(comparisons))
    updates: list[list[int]] = []
    for epoch in range(math.ceil(total / per_epoch)):
        updates += epoch_updates(config, comparisons, epoch)[: total - len(updates)]
    size = sum if config.model.layout == "packed" else max
    updates.sort(key=lambda update: size(comparisons[i].length for i in update), reverse=True)

    best: tuple[int, list[int], list[Part]] | None = None
    task = Task(config, fake.model, comparisons)
    for update in updates[:CANDIDATES]:
        parts = plan_update(task, update, processes)
        sizes = [math.prod(shape(fake, part)) for part in parts]
        if best is None or max(sizes) > best[0]:
            two = sorted(sorted(range(len(parts)), key=lambda n: -sizes[n])[:2])
            best = max(sizes), update, [parts[n] for n in two]
    assert best is not None
    return best[1], best[2]


def bytes_of(parameters: Any, trained: bool = False) -> int:
    """Bytes of parameters, or of the trained ones among them."""
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad or not trained)


def bytes_of_gradients(model: nn.Module) -> int:
    """Bytes of the gradients that are there."""
    return bytes_of(p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse)


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


def counted_update(fake: FakeTraining, update: Sequence[int], parts: Sequence[Part]) -> Counted:
    """Run these micro-batches of an update, clipping and the optimiser's step, and count."""
    config, model, allocations = fake.config, fake.model, fake.allocations
    weights = bytes_of(model.parameters())
    gradients = bytes_of(model.parameters(), trained=True) - bytes_of(model.user_model.tables)
    reference = _reference_of_zeros(len(fake.comparisons)) if needs_reference(config) else None
    states = None
    if has_fixed_states(model):
        some = readings_of([fake.comparisons[i] for part in parts for i in part.indices])
        with allocations.fake():
            states = States(some, torch.empty(len(some), model.state_width, dtype=model.state_dtype))
    task = Task(config, model, fake.comparisons, reference, states)
    model.train()
    with allocations.fake():
        before = allocations.now
        optimizer = make_optimizer(config, model, total_steps=1)
        moments = allocations.now - before
        start = allocations.restart()
        activations = peak = extra = 0
        with events_for_heap(fake) as events:
            if not fake.gpu:  # as the loop does
                optimizer.keep_gradients()
            for part in parts:
                before, earlier = allocations.restart(), bytes_of_gradients(model)
                loss, margins = part_loss(task, part, len(update))
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
    lost, saving = (0, 0) if fake.gpu else heap_of_update(events, peak, min(FILE_BYTES, gradients + moments))
    if config.model.compute_dtype:  # what was counted is of that type, and is kept in float32
        more = bytes_of(model.backbone.parameters(), trained=True)
        weights, gradients, moments, step = weights + more, gradients + more, moments + 2 * more, step + more
    return Counted(weights, gradients, moments, activations, extra, peak, step, lost, saving)


def _reference_of_zeros(count: int) -> ResponseLogProbs:
    zeros, ones = torch.zeros(count), torch.ones(count, dtype=torch.long)
    return ResponseLogProbs(zeros, zeros, ones, ones)


def heap_of_update(events: Sequence[Event], peak: int, file: int) -> tuple[int | None, int]:
    """What glibc's heap takes beside the `peak` of an update, and what it has grown to when a checkpoint is written after it,
    whose `file` is there twice (`distributed.write_tensors`), each time as one piece. (None, 0) where the heap is another."""
    update = twice(events)
    pieces = [("storage", len(events) + n, file) for n in range(2)]
    grown, then = growth(update, kept=True), growth([*update, *pieces], kept=True)
    return None if grown is None else max(0, grown - peak), then or 0


def events_for_heap(fake: FakeTraining) -> contextlib.AbstractContextManager[list[Event]]:
    """Within the context it is written down what is made and freed, for glibc's heap to be asked; for a GPU, nothing is."""
    return contextlib.nullcontext([]) if fake.gpu else fake.allocations.written_down()


def scoring_peak(fake: FakeTraining) -> int:
    """What the largest forward pass without gradients takes beside weights and moments: of the reference, of an evaluation,
    or of a frozen backbone whose hidden states are computed once. On a CPU with what its heap takes for that."""
    model = fake.model.eval()
    peaks = [0]
    if needs_reference(fake.config):
        for comparisons in fake.datasets:
            batch = _first_batch(fake, comparisons, None)
            with model.as_reference():
                peaks.append(forward_peak(fake, model, batch))
    if has_fixed_states(model):
        size = fake.config.evaluate.batch_size
        readings = [readings_of(comparisons) for comparisons in fake.datasets]
        batches = [some[start : start + size] for some in readings for start in range(0, len(some), size)]
        largest = max(batches, key=lambda some: len(some) * max(len(r.prefix) + len(r.response) for r in some))
        peaks.append(forward_peak(fake, model.states_of, largest))
    elif fake.valid is not None:
        batch = _first_batch(fake, fake.valid, [c.user for c in fake.valid])
        with torch.no_grad():
            peaks.append(forward_peak(fake, model, batch, training=True))
    return max(peaks)


def _first_batch(
    fake: FakeTraining, comparisons: Sequence[EncodedComparison], users: Sequence[int] | None
) -> PreferenceBatch:
    """The first batch of an evaluation, which is of the longest comparisons."""
    trees = tree_keys(fake.model, comparisons, users)
    first = micro_batches(trees, [c.length for c in comparisons], fake.config.evaluate.batch_size)[0]
    return fake.model.collate([comparisons[i] for i in first], users and [users[i] for i in first])


def forward_peak(fake: FakeTraining, forward: Callable[[Any], Any], batch: Any, training: bool = False) -> int:
    """What a forward pass takes at once. training: during the training, when the heap keeps freed memory."""
    with fake.allocations.fake(), events_for_heap(fake) as events:
        before = fake.allocations.restart()
        outputs = forward(batch)
        peak = fake.allocations.peak - before
        del outputs
    return max(peak, 0 if fake.gpu else growth(twice(events), kept=training) or 0)


def log_prob_bytes(fake: FakeTraining, parts: Sequence[Part]) -> int:
    """What log-probabilities and their backward pass take for the largest micro-batch, beside hidden states and head."""
    if fake.config.method != "pdpo":
        return 0
    allocations = fake.allocations
    targets_N = max((collated(fake, part).targets_N for part in parts), key=len)
    with allocations.fake():
        weight_VD, bias_V = head(fake.model.backbone)
        hidden_ND = torch.empty(len(targets_N), weight_VD.shape[1], dtype=weight_VD.dtype, requires_grad=True)
        before = allocations.restart()
        log_p_N = log_probs(hidden_ND, weight_VD, bias_V, targets_N, fake.model.compute.log_probs)
        trained = [hidden_ND, *(t for t in (weight_VD, bias_V) if t is not None and t.requires_grad)]
        gradients = torch.autograd.grad(log_p_N.sum(), trained)
        del gradients
        return allocations.peak - before


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


TILES = Passes(_tile_pass, _tile_head_gradients)


def computation_on_gpu(config: ModelConfig) -> Computation:
    """What takes memory as a GPU's computation does: no mask for a packed row, whose blocks are small, and log-probs by tiles."""
    mask = (lambda batch: None) if config.layout == "packed" else attention_mask
    return Computation(mask, TILES if config.log_probs == "chunked" else config.log_probs)
