"""Generation with user vectors: many users in one left-padded batch, with a KV cache, greedy or sampled.

What a row says does not depend on who else is in the batch: padding is masked, positions count from each row's own first
token, and each row draws from its own random generator, seeded by its name. That leaves rounding: kernels add in another order
for another number of rows. In float32 it decides between near ties alone, in half types many an answer; a row alone is exact.
"""

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from prlhf.backbone.families import embeddings, head
from prlhf.batch.moves import moved
from prlhf.batch.tokens import EncodedComparison
from prlhf.errors import UserError
from prlhf.method.models import PersonalizedLM
from prlhf.score.agreement import in_float32, tried

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


class Response(NamedTuple):
    """Token ids without the one that ended them, and whether that came (or max_new_tokens did)."""

    ids: list[int]
    finished: bool


class Decoder:
    """The state of decoding a batch of requests: KV cache, padding, each row's user vectors."""

    def __init__(self, model: PersonalizedLM, requests: Sequence[Request]):
        self.model = model
        self.user_BUD, rows = read_prompts(model, requests)
        self.columns = max(map(len, rows))  # of the batch so far, padding included
        padding = [self.columns - len(row) for row in rows]
        self.embeddings_BTD = torch.stack([pad(row, (0, 0, left, 0)) for row, left in zip(rows, padding)])
        self.padding_B = torch.tensor(padding, device=model.device)
        # Keeps every position, for models with a sliding window too: check_length refuses what would leave it.
        self.cache = DynamicCache()

    def prefill(self) -> Tensor:
        """Read the prompts; logits (B, V) of each row's first response token, in float32."""
        column_T = torch.arange(self.columns, device=self.model.device)
        real_BT = column_T >= self.padding_B[:, None]
        causal_TT = column_T[:, None] >= column_T
        itself_TT = column_T[:, None] == column_T  # padding attends to itself: a row without any would be NaN
        mask_BTT = (causal_TT & real_BT[:, None]) | itself_TT
        positions_BT = (column_T - self.padding_B[:, None]).clamp(min=0)
        return self._logits(self.embeddings_BTD, mask_BTT, positions_BT)

    def decode_one_token(self, token_B: Tensor) -> Tensor:
        """Append one token to every row; logits (B, V) of the next."""
        positions_B1 = (self.columns - self.padding_B)[:, None]
        self.columns += 1
        real_BT = torch.arange(self.columns, device=token_B.device) >= self.padding_B[:, None]
        return self._logits(embeddings(self.model.backbone, token_B[:, None]), real_BT[:, None], positions_B1)

    def _logits(self, embeddings_BSD: Tensor, mask_BST: Tensor, positions_BS: Tensor) -> Tensor:
        hidden_BD = self.model.states(embeddings_BSD, mask_BST[:, None], positions_BS, self.cache)[:, -1]
        return head(self.model.backbone).logits(self.model.read_out(hidden_BD, self.user_BUD))


class Rereader:
    """As `Decoder`, for layout rows: each token reads all before it again, by the model's own forward pass. There is no
    cache, since families that need this layout have caches of their own, which left padding would spoil."""

    def __init__(self, model: PersonalizedLM, requests: Sequence[Request]):
        self.model = model
        self.user_BUD, self.rows = read_prompts(model, requests)

    def prefill(self) -> Tensor:
        """Logits (B, V) of each row's next token, in float32."""
        lengths_B = torch.tensor([len(row) for row in self.rows], device=self.model.device)
        embeddings_BTD = pad_sequence(self.rows, batch_first=True)
        mask_BT = torch.arange(embeddings_BTD.shape[1], device=self.model.device) < lengths_B[:, None]
        hidden_BTD = self.model.states(embeddings_BTD, mask_BT, mask_BT.cumsum(dim=1) - 1)
        hidden_BD = hidden_BTD[torch.arange(len(self.rows)), lengths_B - 1]
        return head(self.model.backbone).logits(self.model.read_out(hidden_BD, self.user_BUD))

    def decode_one_token(self, token_B: Tensor) -> Tensor:
        """Append one token to every row; logits (B, V) of the next."""
        self.rows = [
            torch.cat([row, token]) for row, token in zip(self.rows, embeddings(self.model.backbone, token_B[:, None]))
        ]
        return self.prefill()


def read_prompts(model: PersonalizedLM, requests: Sequence[Request]) -> tuple[Tensor, list[Tensor]]:
    """Each request's user vectors, (B, U, D), and what the backbone reads of it, (T, D), user vectors in their place."""
    user_BUD = model.user_model(torch.tensor([r.user for r in requests], device=model.device))
    prompt_BUD = model.soft_prompt(user_BUD)
    rows = []
    for b, request in enumerate(requests):
        row_TD = embeddings(model.backbone, torch.tensor(request.ids, device=model.device))
        if prompt_BUD is not None:
            before, after = row_TD[: model.user_slot], row_TD[model.user_slot :]
            row_TD = torch.cat([before, prompt_BUD[b].to(row_TD.dtype), after])
        rows.append(row_TD)
    return user_BUD, rows


def decoder_of(model: PersonalizedLM) -> type[Decoder] | type[Rereader]:
    """How this model's layout decodes."""
    return Rereader if model.layout.kind == "rows" else Decoder


@torch.inference_mode()
def check_decoding(model: PersonalizedLM) -> None:
    """UserError where decoding, of rows of unequal lengths, gives a response another probability than the model's `forward`.
    That `forward` is the model's own forward pass is for `check_agreement`."""
    user, response = min(1, model.users), [11, 7, 5, 3]
    pairs = [EncodedComparison(ids, ids, response, response, user) for ids in ([2, 4, 6, 8, 10], [9, 12])]
    training = model.training
    model.eval()

    def decode() -> Tensor:
        decoder = decoder_of(model)(model, [Request(pair.prefix, user, "") for pair in pairs])
        logits_BV, log_p_B = decoder.prefill(), 0.0
        for token in response:
            log_p_B = log_p_B + logits_BV.log_softmax(dim=-1)[:, token]
            logits_BV = decoder.decode_one_token(torch.full((2,), token, device=model.device))
        return log_p_B

    with in_float32(model) as tolerance:
        expected_B, found_B = model(model.collate(pairs, [user, user])).chosen, tried(decode)
    model.train(training)
    if isinstance(found_B, Tensor):
        difference = ((found_B - expected_B).abs() / expected_B.abs().clamp(min=1)).max().item()
        if difference <= tolerance:
            return
        found_B = f"its log-probs differ from those of training by {difference:.1g}"
    advice = "; expected --set model.layout=rows, which reads all again for each token"
    raise UserError(
        f"model.layout: a {model.backbone.config.model_type} model cannot be decoded in layout {model.layout.kind} "
        f"({found_B}){advice if model.layout.kind != 'rows' else ''}"
    )


@torch.inference_mode()
def generate(
    model: PersonalizedLM, requests: Sequence[Request], ends: Container[int], decoding: Decoding
) -> list[Response]:
    """One response to each request, in their order, up to any token of `ends`. The model should be in eval mode."""
    model.check_length(max(len(r.ids) for r in requests) + decoding.max_new_tokens)
    decoder = decoder_of(model)(model, requests)
    generators = [_generator(decoding.seed, r.name) for r in requests]
    responses: list[list[int]] = [[] for _ in requests]
    finished = [False] * len(requests)
    logits_BV = decoder.prefill()
    for count in range(1, decoding.max_new_tokens + 1):
        token_B = choose(logits_BV, decoding, generators)
        for b, token in enumerate(token_B.tolist()):
            finished[b] = finished[b] or token in ends
            if not finished[b]:
                responses[b].append(token)
        if all(finished) or count == decoding.max_new_tokens:
            break
        logits_BV = decoder.decode_one_token(token_B)
    return [Response(ids, done) for ids, done in zip(responses, finished)]


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
