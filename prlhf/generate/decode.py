"""Generation with user vectors: many users and prompts in one batch, greedy or sampled.

What a row says does not depend on who else is in the batch: it sees nothing else, positions count along its own path (`decoder`),
and each request draws from its own random generator, seeded by its name. That leaves rounding: kernels add in another order for
another number of rows. In float32 it decides between near ties alone, in half types many an answer; a request alone is exact.
"""

import hashlib
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prlhf.backbone import visible
from prlhf.backbone.families import embeddings
from prlhf.backbone.lora import adapters_merged
from prlhf.batch.moves import moved
from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import Reading, Segment
from prlhf.errors import UserError
from prlhf.generate.decoder import Context, Decoder, Rereader
from prlhf.method.models import PersonalizedLM
from prlhf.score.agreement import CHECKED_BLOCK, in_float32, tried

# splitmix64's constants, as int64.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens: temperature 0 is greedy; top_p keeps the fewest tokens with that much probability."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Request(NamedTuple):
    """A prefix [BOS] u_t x, the user who reads the answer (0: unknown), and a name that seeds its randomness."""

    ids: list[int]
    user: int
    name: str
    tail: int = 0  # how many of the ids stand behind the prompt's content


class Response(NamedTuple):
    """Token ids without the one that ended them, and whether that came (or max_new_tokens did), and which it was."""

    ids: list[int]
    finished: bool
    end: int | None = None


def read_prompts(model: PersonalizedLM, requests: Sequence[Request]) -> tuple[Tensor, list[Context]]:
    """Each request's user vectors, (B, U, D), and what the backbone reads of it, user vectors in their place."""
    user_BUD = model.user_model(torch.tensor([r.user for r in requests], device=model.device))
    layout, shared, contexts = model.layout, dict[Segment, Tensor](), []

    def read(segment: Segment, b: int) -> Tensor:
        row_TD = embeddings(model.backbone, torch.tensor(segment.tokens, dtype=torch.long, device=model.device))
        e_UD = user_BUD[b, : segment.vectors].to(row_TD.dtype)
        return torch.cat([row_TD[: segment.slot], e_UD, row_TD[segment.slot :]])

    for b, request in enumerate(requests):
        first, *rest, _ = layout.path(Reading(request.user, tuple(request.ids), (), request.tail))
        if first not in shared:
            shared[first] = read(first, b)
        own = [read(segment, b) for segment in rest]
        contexts.append(Context(first, shared[first], torch.cat([shared[first][:0], *own])))
    return user_BUD, contexts


def decoder_of(model: PersonalizedLM, requests: Sequence[Request]) -> Decoder | Rereader:
    """The state of decoding these requests, as the model's layout decodes."""
    return (Rereader if model.layout.kind == "rows" else Decoder)(model, *read_prompts(model, requests))


@torch.inference_mode()
def check_decoding(model: PersonalizedLM) -> None:
    """UserError where decoding, of rows of unequal lengths, gives a response another probability than the model's `forward`.
    That `forward` is the model's own forward pass is for `check_agreement`."""
    user, responses = min(1, model.users), ([11, 7, 5, 3], [5, 12, 7, 2])
    prefixes = ([2, 4, 6, 8, 10], 2), ([9, 12], 0)  # and their tails
    pairs = [EncodedComparison(ids, ids, *responses, user, tail=tail) for ids, tail in prefixes]
    training = model.training
    model.eval()

    def decode() -> Tensor:
        """log pi_P of both responses to both prompts, (2, 2), of four requests."""
        with adapters_merged(model.backbone):
            decoder = decoder_of(
                model, [Request(pair.prefix, user, "", pair.tail) for pair in pairs for _ in responses]
            )
            logits_BV, log_p_B = decoder.prefill(), torch.zeros((), device=model.device)
            for tokens in zip(*responses):
                token_B = torch.tensor(tokens * len(pairs), device=model.device)
                log_p_B = log_p_B + logits_BV.log_softmax(dim=-1).gather(1, token_B[:, None])[:, 0]
                logits_BV = decoder.decode_one_token(token_B)
        return log_p_B.view(2, 2)

    with in_float32(model) as tolerance, visible.in_blocks_of(CHECKED_BLOCK):
        outputs = model(model.collate(pairs, [user, user]))
        expected, found = torch.stack([outputs.chosen, outputs.rejected], dim=1), tried(decode)
    model.train(training)
    if isinstance(found, Tensor):
        difference = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
        if difference <= tolerance:
            return
        found = f"its log-probs differ from those of training by {difference:.1g}"
    advice = "; expected --set model.layout=rows, which reads all again for each token"
    raise UserError(
        f"model.layout: a {model.backbone.config.model_type} model cannot be decoded in layout {model.layout.kind} "
        f"({found}){advice if model.layout.kind != 'rows' else ''}"
    )


@torch.inference_mode()
def generate(
    model: PersonalizedLM, requests: Sequence[Request], ends: Container[int], decoding: Decoding
) -> list[Response]:
    """One response to each request, in their order, up to any token of `ends`. The model should be in eval mode."""
    model.check_length(max(len(r.ids) for r in requests) + decoding.max_new_tokens)
    generators = [_generator(decoding.seed, r.name) for r in requests]
    responses = [Response([], False) for _ in requests]
    going = list(range(len(requests)))  # the requests whose responses go on, in the order of the decoder's rows
    with adapters_merged(model.backbone):
        decoder = decoder_of(model, requests)
        logits_BV = decoder.prefill()
        for count in range(1, decoding.max_new_tokens + 1):
            token_B = choose(logits_BV, decoding, [generators[b] for b in going])
            kept = []
            for row, (b, token) in enumerate(zip(going, token_B.tolist())):
                if token in ends:
                    responses[b] = responses[b]._replace(finished=True, end=token)
                else:
                    responses[b].ids.append(token)
                    kept.append(row)
            if not kept or count == decoding.max_new_tokens:
                break
            if len(kept) < len(going):
                going, token_B = [going[row] for row in kept], token_B[kept]
                decoder.keep(kept)
            logits_BV = decoder.decode_one_token(token_B)
    return responses


def batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """The numbers of the requests, in batches of `size`. Requests with one prompt stand together, and among them those of one
    user: they share what they read (`Decoder`). Otherwise in their order."""
    first: dict[Hashable, int] = {}
    keys = [[first.setdefault((*r.ids, "of", user), n) for user in (None, r.user)] for n, r in enumerate(requests)]
    order = sorted(range(len(requests)), key=keys.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def choose(logits_BV: Tensor, decoding: Decoding, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of every row, (B,): the most likely, or a draw from softmax(logits / temperature) within top_p."""
    if decoding.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV = (logits_BV / decoding.temperature).softmax(dim=-1)
    if decoding.top_p < 1:
        ordered, order = probs_BV.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= decoding.top_p  # the mass before a token already suffices
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    keys = torch.cat([torch.randint(2**62, (1,), generator=g) for g in generators])
    (key_B,) = moved([keys], logits_BV.device)
    return (probs_BV.double().log() + gumbel_noise(key_B, probs_BV.shape[1])).argmax(dim=-1)


def gumbel_noise(key_B: Tensor, V: int) -> Tensor:
    """-log(-log u), (B, V), u uniform in (0, 1): the argmax of log p plus it is a draw from p (Gumbel 1954).

    u is number v + 1 of splitmix64 (Steele, Lea and Flood 2014, fig. 17) from the state key_b, by its counter: a row's noise
    depends on its key alone, neither on the rest of the batch nor on the device.
    """
    z_BV = key_B[:, None] + GOLDEN * torch.arange(1, V + 1, device=key_B.device)
    for shift, factor in MIX:
        z_BV = (z_BV ^ _shifted(z_BV, shift)) * factor
    u_BV = (_shifted(z_BV ^ _shifted(z_BV, 31), 12).double() + 0.5) * 2.0**-52  # 52 bits: neither 0 nor 1
    return -torch.log(-torch.log(u_BV))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """int64 shifted right, as if it had no sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
