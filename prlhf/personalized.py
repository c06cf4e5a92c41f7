"""PersonalizedLM: backbone + user model + aggregator, from a batch of comparisons to response log-probs.

pi_P(y | x, u) (paper, section 4.2). The soft-prompt aggregator puts e_u = f_im(u_p) before the prompt's embeddings
(after BOS); the linear one computes h' = W [h; e_u] + b and lets the head read h'. With users=None the model is the
reference pi_SFT: no e_u, no aggregator, adapters off.

Shape suffixes: B comparisons, R rows, T positions, U user vectors, D width, N response tokens.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from prlhf.backbones import check_positions, head, hidden_states, load_backbone, lora_targets
from prlhf.batching import PREFIX, PreferenceBatch, tree_mask
from prlhf.config import Config
from prlhf.encoding import EncodedComparison, bos_ids
from prlhf.logprobs import log_probs
from prlhf.lora import adapters_off, add_lora
from prlhf.losses import ResponseLogProbs
from prlhf.user_models import build_user_model


class LinearAggregator(nn.Module):
    """h' = W [h; e_u] + b, the hidden state that the LM head reads; starts as h' = h."""

    def __init__(self, width: int, tokens: int, dtype: torch.dtype):
        super().__init__()
        self.linear = nn.Linear(width + tokens * width, width, dtype=dtype)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.weight[:, :width] = torch.eye(width)
            self.linear.bias.zero_()

    def forward(self, hidden_ND: Tensor, user_NUD: Tensor) -> Tensor:
        """Hidden states (N, D) and each one's user vectors (N, U, D) -> (N, D), in the hidden states' type."""
        both = torch.cat([hidden_ND.to(user_NUD.dtype), user_NUD.flatten(1)], dim=1)
        return self.linear(both).to(hidden_ND.dtype)


class PersonalizedLM(nn.Module):
    """A language model that answers each known user as that user prefers, and user 0 as is commonly preferred."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        user_model: nn.Module,
        aggregator: LinearAggregator | None,
        users: int,
        user_slot: int,
    ):
        super().__init__()
        self.users = users  # known ones, numbered 1..users
        self.user_slot = user_slot  # where in a row the user vectors go: behind BOS, or 0
        self.backbone = backbone
        self.user_model = user_model
        self.aggregator = aggregator  # None: soft prompt

    @property
    def device(self) -> torch.device:
        """Where the backbone's weights are."""
        return self.backbone.device

    def user_parameters(self) -> list[nn.Parameter]:
        """The weights with the user model's learning rate: the user model and the linear aggregator."""
        parts = [self.user_model] + ([self.aggregator] if self.aggregator is not None else [])
        return [p for part in parts for p in part.parameters()]

    @property
    def vectors(self) -> int:
        """T_u where they take positions before the prompt, 0 with the linear aggregator."""
        return 0 if self.aggregator is not None else self.user_model.tokens

    def check_lengths(self, comparisons: Sequence[EncodedComparison]) -> None:
        """UserError where a comparison has more positions than the backbone reads."""
        longest = max(len(c.prefix) + max(len(c.chosen), len(c.rejected)) for c in comparisons)
        check_positions(self.backbone, longest + self.vectors)

    def soft_prompt(self, user_BUD: Tensor | None) -> Tensor | None:
        """The user vectors that go before the prompt: all of them, or None with the linear aggregator."""
        return user_BUD if self.aggregator is None else None

    def states(self, embeddings_RTD: Tensor, mask: Tensor, positions_RT: Tensor, cache: Cache | None = None) -> Tensor:
        """The backbone's last hidden states (R, T, D)."""
        return hidden_states(self.backbone, embeddings_RTD, mask, positions_RT, cache)

    def read_out(self, hidden_ND: Tensor, user_NUD: Tensor | None) -> Tensor:
        """The hidden states that the head reads: h' = W [h; e_u] + b with the linear aggregator, h otherwise."""
        if self.aggregator is None or user_NUD is None:
            return hidden_ND
        return self.aggregator(hidden_ND, user_NUD)

    def forward(self, batch: PreferenceBatch, users_B: Tensor | None) -> ResponseLogProbs:
        """log pi_P(y | x, u) of both responses of each comparison; users_B (B,), or None for no user at all."""
        user_BUD = None if users_B is None else self.user_model(users_B)
        prompt_BUD = self.soft_prompt(user_BUD)
        soft_RUD = None if prompt_BUD is None else prompt_BUD[batch.comparison_R]
        embeddings_RTD = self.backbone.get_input_embeddings()(batch.input_ids_RT)
        rows = insert_user_vectors(embeddings_RTD, batch, soft_RUD, self.user_slot)
        hidden_RTD = self.states(rows.embeddings_RTD, tree_mask(rows.segments_RT), rows.positions_RT)
        hidden_ND = hidden_RTD.flatten(0, 1).index_select(0, rows.predicted_at_N)
        user_NUD = None if user_BUD is None or self.aggregator is None else user_BUD[batch.response_N // 2]
        weight_VD, bias_V = head(self.backbone)
        token_log_probs_N = log_probs(self.read_out(hidden_ND, user_NUD), weight_VD, bias_V, batch.targets_N)
        return sum_by_response(token_log_probs_N, batch)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the context, `forward(batch, None)` is pi_SFT: adapters off, no dropout, no gradient."""
        training = self.training
        self.eval()
        try:
            with adapters_off(self.backbone), torch.no_grad():
                yield
        finally:
            self.train(training)


class Rows(NamedTuple):
    """Rows as the backbone takes them, user vectors in place, and where response tokens are predicted (flat)."""

    embeddings_RTD: Tensor
    segments_RT: Tensor
    positions_RT: Tensor
    predicted_at_N: Tensor


def insert_user_vectors(embeddings_RTD: Tensor, batch: PreferenceBatch, user_RUD: Tensor | None, slot: int) -> Rows:
    """Put each row's U user vectors at column `slot`, as part of the prefix; what follows moves on by U."""
    if user_RUD is None or user_RUD.shape[1] == 0:
        return Rows(embeddings_RTD, batch.segments_RT, batch.positions_RT, batch.predicted_at_N)
    s, (R, T, _), U = slot, embeddings_RTD.shape, user_RUD.shape[1]
    embeddings = torch.cat([embeddings_RTD[:, :s], user_RUD.to(embeddings_RTD.dtype), embeddings_RTD[:, s:]], dim=1)
    segments = torch.cat(
        [batch.segments_RT[:, :s], batch.segments_RT.new_full((R, U), PREFIX), batch.segments_RT[:, s:]], 1
    )
    slots = torch.arange(s, s + U, device=embeddings.device).expand(R, U)
    positions = torch.cat([batch.positions_RT[:, :s], slots, batch.positions_RT[:, s:] + U], dim=1)
    row, column = batch.predicted_at_N // T, batch.predicted_at_N % T
    predicted_at = row * (T + U) + column + U  # every response is predicted from behind the user vectors
    return Rows(embeddings, segments, positions, predicted_at)


def sum_by_response(token_log_probs_N: Tensor, batch: PreferenceBatch) -> ResponseLogProbs:
    """log p(y|x) = sum of its tokens' log-probs, for every response of the batch."""
    zeros = token_log_probs_N.new_zeros(2 * batch.size)
    sums = zeros.index_add(0, batch.response_N, token_log_probs_N).view(batch.size, 2)
    lengths = zeros.index_add(0, batch.response_N, torch.ones_like(token_log_probs_N.detach())).view(batch.size, 2)
    return ResponseLogProbs(sums[:, 0], sums[:, 1], lengths[:, 0], lengths[:, 1])


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, users: int, backbone: PreTrainedModel | None = None
) -> PersonalizedLM:
    """The model of a config for `users` known users: backbone (loaded unless given), LoRA, user model, aggregator."""
    backbone = backbone if backbone is not None else load_backbone(config.model, tokenizer, config.seed)
    vocabulary_VD = backbone.get_input_embeddings().weight
    user_model = build_user_model(
        config.user_model, users, vocabulary_VD, torch.Generator().manual_seed(config.seed)
    )  # fmt: skip
    if config.lora.rank:
        add_lora(backbone, config.lora, lora_targets(backbone, config.lora.targets), config.seed)
    if config.model.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    aggregator = None
    if config.user_model.aggregator == "linear":
        dtype = torch.promote_types(vocabulary_VD.dtype, torch.float32)
        aggregator = LinearAggregator(vocabulary_VD.shape[1], config.user_model.tokens, dtype)
    return PersonalizedLM(backbone, user_model, aggregator, users, len(bos_ids(tokenizer)))
