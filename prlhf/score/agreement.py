"""Are a model's numbers those of its own forward pass? A short comparison is computed both ways before anything else is.

Layouts put several responses into one row and divide them by a mask. Most families honour it, but a recurrent layer carries
what it read of one response into the next, and other families compute what no mask reaches. So each model is asked, not
its name: hidden states and log-probs in the run's layout, against each sequence alone by the forward pass of the model's
class, as Hugging Face wrote it.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from prlhf.backbone import visible
from prlhf.backbone.attention import as_hugging_face_has_it, dense_mask
from prlhf.backbone.families import COUNT_BY_ROW, base, blocks, embeddings
from prlhf.backbone.toys import DTYPES
from prlhf.batch.trees import Layout, Reading, lay_out
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedModel, PersonalizedRewardModel
from prlhf.parallel.tensors import is_sharded

AGREEMENT = 1e-3  # in float32: of the length of a hidden state; of a log-prob, or in nats where that is below 1
HALF_AGREEMENT = 16.0  # where the computation stays in half precision, in units of the type's eps
LENGTHS = ((7, 2, (5, 3)), (4, 0, (2, 6)))  # tokens of the prefixes, of their tails, and of the responses
CHECKED_BLOCK = 4  # queries: so few that these rows are computed as long ones are


class TokenStates(NamedTuple):
    """Of N response tokens: the hidden states that predict them, and after these the last one of each sequence, (N + M, D); and
    their log-probs (N,), None for a reward model."""

    hidden_ND: Tensor
    log_probs_N: Tensor | None


Computed = TypeVar("Computed")
Model = TypeVar("Model", bound=PersonalizedModel)


def check_agreement(model: Model) -> Model:
    """The model itself. UserError where its layout does not compute what its own forward pass does, with a layout that does.

    In float32; sharded and compiled models in their own type. A collective operation where the model is sharded.
    """
    kind = model.backbone.config.model_type
    if kind in COUNT_BY_ROW and model.layout.kind != "rows":
        what: str | None = "it counts positions by the row"
    else:
        what = _difference(model, model.layout)
    if what is None:
        return model
    if model.layout.kind == "rows" or _difference(model, model.layout._replace(kind="rows")):
        raise UserError(
            f"model.name: a {kind} model cannot be computed right here ({what}); docs/models.md lists the families that can"
        )
    raise UserError(
        f"model.layout: found {model.config.layout!r}, in which a {kind} model does not compute what it computes alone ({what}); "
        "expected 'rows', where each response is a sequence of the model's own forward pass"
    )


def _difference(model: PersonalizedModel, layout: Layout) -> str | None:
    """What differs in this layout, for the reference or for a user; None where nothing does."""
    rng, vocabulary = random.Random(0), model.backbone.get_input_embeddings().weight.shape[0]

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(count))

    pairs = [(prefix, ids(n), tail) for length, tail, ns in LENGTHS for prefix in [ids(length)] for n in ns]
    training, found = model.training, None
    model.eval()
    user = min(1, model.users)
    for readers in ([None], [user, 0] if model.users_share else [user]):
        as_read = layout._replace(vectors=0 if None in readers else layout.vectors)
        if found is None and (None in readers or layout.vectors):
            found = _differs_for([Reading(reader, *pair) for reader in readers for pair in pairs], model, as_read)
    model.train(training)
    return found


@torch.no_grad()
def _differs_for(readings: Sequence[Reading], model: PersonalizedModel, layout: Layout) -> str | None:
    with in_float32(model) as tolerance:
        own = tried(lambda: by_own_forward(model, readings, layout))
        if isinstance(own, str):
            return f"its own forward pass on {'embeddings' if layout.vectors else 'tokens'} fails: {own}"
        with visible.in_blocks_of(CHECKED_BLOCK):
            ours = tried(lambda: by_layout(model, readings, layout))
    if isinstance(ours, str):
        return f"layout {layout.kind} fails: {ours}"
    if not own.hidden_ND.isfinite().all():
        return "its hidden states are not finite; are its weights?"
    if _uses_head(model) and _reads_ahead(own, readings) > tolerance:
        return "it reads what it should predict, as encoders do"
    states = ((ours.hidden_ND - own.hidden_ND).norm(dim=1) / own.hidden_ND.norm(dim=1)).max().item()
    if not states <= tolerance:
        return f"hidden states differ by {states:.1g} of their length"
    if own.log_probs_N is not None and ours.log_probs_N is not None:
        nats_N = (ours.log_probs_N - own.log_probs_N).abs()
        if not (nats_N / own.log_probs_N.abs().clamp(min=1)).max() <= tolerance:
            return f"log-probs differ by up to {nats_N.max():.1g} nats from equal hidden states: what follows its head is not known"
    return None


def _reads_ahead(own: TokenStates, readings: Sequence[Reading]) -> float:
    """How far a state that predicts a response's first token depends on the response. Neighbours share their prefix."""
    starts = [0, *itertools.accumulate(len(reading.response) for reading in readings[:-1])]
    first_MD, second_MD = own.hidden_ND[starts[0::2]], own.hidden_ND[starts[1::2]]
    return ((first_MD - second_MD).norm(dim=1) / first_MD.norm(dim=1)).max().item()


def by_layout(model: PersonalizedModel, readings: Sequence[Reading], layout: Layout) -> TokenStates:
    """The readings' response tokens as the model's `forward` computes them (without a linear aggregator)."""
    batch = lay_out(readings, layout).to(model.device)

    def compute() -> TokenStates:
        hidden_ND = model.states_at(batch, torch.cat([batch.predicted_at_N, batch.last_at_M]), dense_mask)
        predict_ND = hidden_ND[: len(batch.targets_N)]
        return TokenStates(hidden_ND, model.token_log_probs(predict_ND, batch.targets_N) if _uses_head(model) else None)

    return model.within_forward(compute)


def by_own_forward(model: PersonalizedModel, readings: Sequence[Reading], layout: Layout) -> TokenStates:
    """The same, each sequence alone by the forward pass of the model's class: of token ids where it reads no user."""
    backbone = model.backbone

    def compute() -> TokenStates:
        hidden, last, log_probs = [], [], []
        for reading in readings:
            response_N, slot, prompt = torch.tensor(reading.response), layout.slot_of(reading), len(reading.prefix)
            start = prompt + (layout.vectors if slot <= prompt else 0)  # of the response
            at_N = slice(start - 1, start - 1 + len(response_N))
            inputs = {"input_ids": torch.tensor([[*reading.prefix, *reading.response]], device=model.device)}
            if layout.vectors:
                row_TD = embeddings(backbone, inputs["input_ids"])[0]
                e_UD = model.user_model(torch.tensor([reading.user], device=model.device))[0].to(row_TD.dtype)
                inputs = {"inputs_embeds": torch.cat([row_TD[:slot], e_UD, row_TD[slot:]])[None]}
            seen: list[Tensor] = []
            hook = base(backbone).register_forward_hook(lambda *call, seen=seen: seen.append(call[-1][0]))
            if _uses_head(model):
                logits_NV = backbone(**inputs, use_cache=False).logits[0, at_N]
                log_probs.append(logits_NV.double().log_softmax(dim=-1)[torch.arange(len(response_N)), response_N])
            if not seen:  # a reward model, or a causal LM that goes around its base model (OPT)
                base(backbone)(**inputs, use_cache=False)
            hook.remove()
            hidden_TD = seen[-1][0]
            hidden.append(hidden_TD[at_N])
            last.append(hidden_TD[-1:])
        return TokenStates(torch.cat([*hidden, *last]), torch.cat(log_probs) if log_probs else None)

    with as_hugging_face_has_it(backbone):
        return model.within_forward(compute)


def _uses_head(model: PersonalizedModel) -> bool:
    return not isinstance(model, PersonalizedRewardModel)


def tried(compute: Callable[[], Computed]) -> Computed | str:
    """The result, or the first line of any error: a model that does not fit may raise all kinds of them."""
    try:
        return compute()
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def in_float32(model: PersonalizedModel) -> Iterator[float]:
    """Within the context a half-precision backbone computes in float32, of which one block at a time is in memory; a sharded
    or compiled one stays as it is. Yields the tolerance that belongs to the type."""
    dtype = model.backbone.get_input_embeddings().weight.dtype
    if is_sharded(model) or model.config.compile:
        dtype = DTYPES[model.config.compute_dtype] if model.config.compute_dtype else dtype
        yield AGREEMENT if dtype.itemsize > 2 else HALF_AGREEMENT * torch.finfo(dtype).eps
        return
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            if p.dtype.itemsize == 2:
                narrow[p], p.data = p.data, p.data.float()

    def restore(parameters: Sequence[nn.Parameter]) -> None:
        for p in parameters:
            if p in narrow:
                p.data = narrow.pop(p)

    hooks, inside = [], set()
    for block in blocks(model.backbone) if dtype.itemsize == 2 else ():
        own = list(block.parameters())
        inside.update(own)
        hooks.append(block.register_forward_pre_hook(lambda *_, own=own: widen(own)))
        hooks.append(block.register_forward_hook(lambda *_, own=own: restore(own), always_call=True))
    widen([p for p in model.backbone.parameters() if p not in inside])
    try:
        yield AGREEMENT
    finally:
        for hook in hooks:
            hook.remove()
        restore(list(narrow))
