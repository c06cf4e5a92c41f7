"""What the phases of a training take, in bytes, in a process that holds the whole model.

The real code runs on fake tensors (`allocations`), and what they take is counted. No weights are read.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from prlhf.backbone.attention import takes_flex_attention, use_tree_attention
from prlhf.backbone.loading import empty_backbone, weight_names
from prlhf.backbone.toys import DTYPES
from prlhf.backbone.weights import stored_as_named
from prlhf.batch.datasets import TrainingData
from prlhf.batch.order import micro_batches
from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import PreferenceBatch
from prlhf.config.keys import Config
from prlhf.forecast.allocations import Allocations, give_fake_storage
from prlhf.forecast.gpu import computation_on_gpu
from prlhf.method.build import build_model
from prlhf.method.losses import ResponseLogProbs, needs_reference
from prlhf.method.models import Computation, PersonalizedModel, PersonalizedRewardModel
from prlhf.score.score import tree_keys
from prlhf.score.states import States, has_fixed_states, readings_of
from prlhf.score.task import Task
from prlhf.solve.linear import MEMORY
from prlhf.solve.run import needs_solver
from prlhf.train.optimizer import Optimizers, make_optimizer
from prlhf.train.plan import Part, epoch_updates, plan_update, schedule
from prlhf.train.step import part_loss

CANDIDATES = 8  # updates among which the one with the largest micro-batch is looked for
READING = 1000  # bytes of Python objects for a response whose hidden state is kept, beside its tokens


@dataclass(frozen=True)
class FakeTraining:
    """A training without values."""

    config: Config
    model: PersonalizedModel  # its weights have the type that is computed in
    comparisons: list[EncodedComparison]
    datasets: list[list[EncodedComparison]]  # these, and those of the validation if there is one
    allocations: Allocations
    gpu: bool  # whether it stands for a training on a GPU
    by_rows: bool  # whether each of several processes reads its rows alone, as the model's files allow it


def fake_training(config: Config, tokenizer: PreTrainedTokenizerBase, data: TrainingData, gpu: bool) -> FakeTraining:
    """A training's model and data, without weights. UserError where a comparison is too long for the model."""
    keys = replace(config.model, dtype=config.model.compute_dtype or config.model.dtype, compile=False)
    backbone = empty_backbone(keys, tokenizer)
    folder = Path(keys.name or "").expanduser()
    names = weight_names(folder) if keys.name and folder.is_dir() else None
    by_rows = keys.name is not None and stored_as_named(backbone, names or None, DTYPES[config.model.dtype])
    if gpu:
        if keys.layout == "auto":
            keys = replace(keys, layout="packed" if takes_flex_attention(backbone) else "tree")
        use_tree_attention(backbone, as_on_gpu=True)
        compute = computation_on_gpu(keys.layout, keys.log_probs)
    else:
        compute = Computation(log_probs="torch" if keys.log_probs == "torch" else "chunked")
    allocations = Allocations()
    with allocations.fake():
        give_fake_storage(backbone)
        model = build_model(replace(config, model=keys), tokenizer, len(data.users), backbone, compute=compute)
    model.check_lengths(data.train.comparisons)
    datasets = [file.comparisons for file in (data.train, data.valid) if file is not None]
    return FakeTraining(config, model, data.train.comparisons, datasets, allocations, gpu, by_rows)


def bytes_of(parameters: Iterable[nn.Parameter], trained: bool = False) -> int:
    """Bytes of parameters, or of the trained ones among them."""
    return sum(p.nbytes for p in parameters if p.requires_grad or not trained)


def bytes_kept_in_float32(fake: FakeTraining) -> int:
    """What trained weights, kept in float32, take beyond model.compute_dtype, a half type, in which they are counted here."""
    return bytes_of(fake.model.backbone.parameters(), trained=True) if fake.config.model.compute_dtype else 0


class CountedUpdate(NamedTuple):
    """What the training's largest update takes, in bytes. Gradients of user tables are left out: few rows have any."""

    largest: tuple[int, int]  # rows and positions of its largest micro-batch
    gradients: int
    moments: int  # of AdamW
    activations: int  # of the largest micro-batch, at the end of its forward pass
    micro_batch: int  # the most that one micro-batch takes beside weights, moments and gradients
    step: int  # what clipping and AdamW take beside weights, moments and gradients


def counted_update(fake: FakeTraining, processes: int) -> CountedUpdate:
    """Run the two largest micro-batches of the largest update, clipping and AdamW's step on fake tensors."""
    config, model, allocations = fake.config, fake.model, fake.allocations
    update, parts = largest_parts(fake, processes)
    gradients = bytes_of(model.parameters(), trained=True) - bytes_of(model.user_model.tables)
    ones = torch.ones(len(fake.comparisons))  # in place of the reference's log-probs
    reference = ResponseLogProbs(ones, ones, ones, ones) if needs_reference(config) else None
    activations = micro_batch = 0
    model.train()
    with allocations.fake():
        states = None
        if has_fixed_states(model):
            some = readings_of([fake.comparisons[i] for part in parts for i in part.indices])
            states = States(some, torch.empty(len(some), model.state_width, dtype=model.state_dtype))
        task = Task(config, model, fake.comparisons, reference, states)
        before = allocations.now
        optimizer = make_optimizer(config, model, total_steps=1)
        moments = allocations.now - before
        if not fake.gpu:  # as `train.loop` does
            optimizer.keep_gradients()
        for part in parts:
            before, earlier = allocations.restart(), bytes_of_gradients(model)
            loss, margins = part_loss(task, part, len(update))
            activations = max(activations, allocations.now - before)
            loss.backward()
            del loss, margins  # so that the graph is gone when the next one is made
            micro_batch = max(micro_batch, allocations.peak - before - (bytes_of_gradients(model) - earlier))
    step = allocations.peak_of(clip_and_step, config, optimizer)
    more = bytes_kept_in_float32(fake)
    largest = max((shape(fake, part) for part in parts), key=math.prod)
    return CountedUpdate(largest, gradients + more, moments + 2 * more, activations, micro_batch, step + more)


def largest_parts(fake: FakeTraining, processes: int) -> tuple[list[int], list[Part]]:
    """The update with the largest micro-batch, where `processes` share each, and its two largest, in their order."""
    config, comparisons = fake.config, fake.comparisons
    per_epoch, total = schedule(config.optim, len(comparisons))
    epochs = range(math.ceil(total / per_epoch))
    updates = [update for epoch in epochs for update in epoch_updates(config, comparisons, epoch)][:total]
    length = sum if fake.model.layout.kind == "packed" else max
    updates.sort(key=lambda update: length(comparisons[i].length for i in update), reverse=True)

    def size(part: Part) -> int:
        return math.prod(shape(fake, part))

    task = Task(config, fake.model, comparisons)
    plans = [(update, plan_update(task, update, processes)) for update in updates[:CANDIDATES]]
    update, parts = max(plans, key=lambda plan: max(map(size, plan[1])))
    two = heapq.nlargest(2, range(len(parts)), key=lambda n: size(parts[n]))
    return update, [parts[n] for n in sorted(two)]


def shape(fake: FakeTraining, part: Part) -> tuple[int, int]:
    """Rows and positions of a micro-batch."""
    batch = fake.model.collate([fake.comparisons[i] for i in part.indices], part.users)
    rows, positions = batch.input_ids_RT.shape
    return rows, positions


def bytes_of_gradients(model: nn.Module) -> int:
    """Bytes of the dense gradients that there are."""
    return bytes_of(p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse)


def clip_and_step(config: Config, optimizer: Optimizers) -> None:
    """Clipping and AdamW's step for all but the user tables, of which few rows change."""
    torch.nn.utils.clip_grad_norm_(optimizer.dense_parameters, config.optim.max_grad_norm or math.inf)
    optimizer.dense.step()


def scoring_peak(fake: FakeTraining) -> int:
    """The most that a forward pass without gradients takes beside weights and moments: for the reference, for an evaluation,
    or for the hidden states of a frozen backbone."""
    model, size = fake.model.eval(), fake.config.evaluate.batch_size
    peaks = [0]
    if needs_reference(fake.config):
        for comparisons in fake.datasets:
            batch = first_batch(fake, comparisons, None)
            with model.as_reference():
                peaks.append(fake.allocations.peak_of(model, batch))
    if has_fixed_states(model):
        readings = [readings_of(comparisons) for comparisons in fake.datasets]
        batches = [some[start : start + size] for some in readings for start in range(0, len(some), size)]
        largest = max(batches, key=lambda some: len(some) * max(len(r.prefix) + len(r.response) for r in some))
        peaks.append(fake.allocations.peak_of(model.states_of, largest))
    else:
        for valid in fake.datasets[1:]:
            places = [*enumerate(c.user for c in valid)]
            if model.users_share:  # the generic user reads the same in the same pass
                places = [*dict.fromkeys([*((i, 0) for i, _ in places), *places])]
            batch = first_batch(fake, [valid[i] for i, _ in places], [user for _, user in places])
            with torch.no_grad():
                peaks.append(fake.allocations.peak_of(model, batch))
    return max(peaks)


def first_batch(fake: FakeTraining, data: Sequence[EncodedComparison], users: Sequence[int] | None) -> PreferenceBatch:
    """The first batch that is scored, which has the longest comparisons. users: None for the reference."""
    trees = tree_keys(fake.model, data, users)
    first = micro_batches(trees, [c.length for c in data], fake.config.evaluate.batch_size)[0]
    return fake.model.collate([data[i] for i in first], users and [users[i] for i in first])


def states_bytes(fake: FakeTraining) -> int:
    """A frozen backbone's hidden states for all responses, and the responses by which they are found; else 0."""
    if not has_fixed_states(fake.model):
        return 0
    comparisons = [c for dataset in fake.datasets for c in dataset]
    readings = readings_of(comparisons)
    tokens = sum(len(c.prefix) for c in comparisons) + sum(len(reading.response) for reading in readings)
    return len(readings) * (fake.model.state_width * fake.model.state_dtype.itemsize + READING) + 8 * tokens


def solver_bytes(fake: FakeTraining) -> int:
    """What choosing a prior and solving take, all in float64; 0 where neither is done.

        8 max(4 N W,  2 S W + 4 (M + 1) S + (2 MEMORY + 10) P)

    N comparisons' differences of states of width W, before the rest is there; then the S responses' states, twice; the
    rewards of M users, and their gradients; L-BFGS's memory of P parameters.
    """
    model, N = fake.model, len(fake.comparisons)
    if not needs_solver(fake.config):
        return 0
    assert isinstance(model, PersonalizedRewardModel)
    S, W = len(readings_of(fake.comparisons)), model.state_width
    P = sum(p.numel() for p in model.user_model.parameters())
    return 8 * max(4 * N * W, 2 * S * W + 4 * (model.users + 1) * S + (2 * MEMORY + 10) * P)
