"""The personalised models: a batch of comparisons -> log-probs or rewards of their responses.

    PersonalizedLM            log pi_P(y | x, u)   (paper, section 4.2)
    PersonalizedRewardModel   r_P(x, y, u)
    PairwisePreferenceModel   P_P(y1 over y2 | x, u)   (`pairwise`)

`plain` defines them on one sequence at a time. Here a batch is rows of preference trees (`batch.trees`), and each reading,
a response as one user reads it, is computed once. Each comparison then takes the values of its two readings.

Shape suffixes: B comparisons, M readings, S trees, R rows, T positions, U user vectors, D width, N response tokens,
W pooled width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedModel

from prlhf.backbone.attention import attention_mask, takes_flex_attention
from prlhf.backbone.families import check_positions, check_tokens, embeddings, head, hidden_states
from prlhf.backbone.lora import adapters_off
from prlhf.backbone.toys import DTYPES
from prlhf.batch.tokens import EncodedComparison
from prlhf.batch.trees import Layout, PreferenceBatch, Reading, ReadingBatch, collate, lay_out
from prlhf.config.keys import ModelConfig
from prlhf.kernels.log_probs import log_probs
from prlhf.kernels.passes import Passes
from prlhf.method.losses import ResponseLogProbs, Rewards
from prlhf.method.prior import Prior


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


class Computation(NamedTuple):
    """What devices compute differently. The dry run has one that takes memory as a GPU does."""

    attention_mask: Callable[[ReadingBatch], Tensor | BlockMask | None] = attention_mask
    log_probs: str | Passes | None = None  # the `impl` of log_probs


class Core(NamedTuple):
    """What all personalised models are made of."""

    backbone: PreTrainedModel
    user_model: nn.Module
    users: int  # known users, numbered 1..users
    user_slot: int  # how many tokens of a tree precede the user vectors: BOS, or 0
    config: ModelConfig  # layout, sharing, pooling
    compute: Computation = Computation()
    place: str = "before_prompt"  # where the vectors of a soft prompt stand (user_model.place)


def automatic_layout(backbone: PreTrainedModel, config: ModelConfig, device: str) -> Literal["packed", "tree"]:
    """packed on a GPU (`device` "cuda") that computes in a half type, where FlexAttention takes the backbone; else tree.
    In float32 FlexAttention's kernels have no registers left, and spill."""
    half = DTYPES[config.compute_dtype or config.dtype].itemsize == 2
    return "packed" if device == "cuda" and half and takes_flex_attention(backbone) else "tree"


class PersonalizedModel(nn.Module):
    """What the models share: a backbone that may read user vectors."""

    def __init__(self, core: Core, backbone_reads_users: bool = True):
        """backbone_reads_users: e_u stands among its inputs (soft prompt). Otherwise the head reads it beside hidden states."""
        super().__init__()
        self.backbone_reads_users = backbone_reads_users
        self.config, self.compute = core.config, core.compute
        self.users, self.user_slot, self.place = core.users, core.user_slot, core.place
        self.backbone, self.user_model = core.backbone, core.user_model
        self.prior: Prior | None = None  # on the user model, in training
        self._device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes: where the backbone's weights are, unless it was set (offloaded weights wait elsewhere)."""
        return self._device or self.backbone.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._device = device

    def user_parameters(self) -> list[nn.Parameter]:
        """The weights with the user model's learning rate: all outside the backbone."""
        return [p for part in self.children() if part is not self.backbone for p in part.parameters()]

    @property
    def vectors(self) -> int:
        """How many positions the user vectors take among the backbone's inputs: T_u, or 0."""
        return self.user_model.tokens if self.backbone_reads_users else 0

    @property
    def users_share(self) -> bool:
        """Whether users who read one prompt share its computation: the backbone reads none of them, or reads them behind it."""
        return not self.backbone_reads_users or self.place != "before_prompt"

    def check_lengths(self, comparisons: Sequence[EncodedComparison]) -> None:
        """UserError where a comparison has more positions than the backbone reads, or a token that it has no embedding of."""
        self.check_length(max(len(c.prefix) + max(len(c.chosen), len(c.rejected)) for c in comparisons))
        check_tokens(
            self.backbone, max(max(ids) for c in comparisons for ids in (c.prefix, c.chosen, c.rejected) if ids)
        )

    def check_length(self, tokens: int) -> None:
        """UserError where a sequence of so many tokens has more positions than the backbone reads."""
        check_positions(self.backbone, tokens + self.vectors, windows=self.layout.kind != "rows")

    @property
    def layout(self) -> Layout:
        """How readings become rows; "auto" as `automatic_layout` says."""
        kind = self.config.layout
        if kind == "auto":
            kind = automatic_layout(self.backbone, self.config, self.device.type)
        return Layout(kind, self.vectors, self.user_slot, self.config.share_trees, self.place)

    def collate(self, comparisons: Sequence[EncodedComparison], users: Sequence[int] | None) -> PreferenceBatch:
        """The batch that `forward` takes: each comparison as its entry of `users` reads it; None: for the reference."""
        return self.on_the_host(comparisons, users).to(self.device)

    def on_the_host(self, comparisons: Sequence[EncodedComparison], users: Sequence[int] | None) -> PreferenceBatch:
        """The batch of `collate`, on the CPU."""
        layout = self.layout if users is not None else self.layout._replace(vectors=0)
        return collate(comparisons, users, layout)

    def states(
        self, embeddings_RTD: Tensor, mask: Tensor | BlockMask, positions_RT: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """The backbone's last hidden states (R, T, D)."""
        return hidden_states(self.backbone, embeddings_RTD, mask, positions_RT, cache)

    def within_forward(self, compute: Callable[[], Any]) -> Any:
        """compute(), as part of a forward pass: a sharded model gathers its weights around it."""
        return compute()

    def states_at(
        self, batch: ReadingBatch, at_N: Tensor, mask: Callable[[ReadingBatch], Tensor] | None = None
    ) -> Tensor:
        """Last hidden states (N, D) at flat positions of the batch's rows, user vectors in their places.
        mask: what positions see, by default as the device computes it."""
        embeddings_RTD = embeddings(self.backbone, batch.input_ids_RT)
        if batch.vectors_at_SU.numel():
            vectors_ND = self.user_model(batch.users_S).to(embeddings_RTD.dtype).flatten(0, 1)
            flat_ND = embeddings_RTD.flatten(0, 1).index_copy(0, batch.vectors_at_SU.flatten(), vectors_ND)
            embeddings_RTD = flat_ND.view_as(embeddings_RTD)
        mask = mask or self.compute.attention_mask
        hidden_RTD = self.states(embeddings_RTD, mask(batch), batch.positions_RT)
        return hidden_RTD.flatten(0, 1).index_select(0, at_N)

    def token_log_probs(self, read_ND: Tensor, targets_N: Tensor) -> Tensor:
        """log p of tokens (N,), given what the LM head reads where it predicts them."""
        weight_VD, bias_V, scale, softcap = head(self.backbone)
        if scale != 1:
            read_ND, bias_V = read_ND * scale, None if bias_V is None else bias_V * scale
        return log_probs(read_ND, weight_VD, bias_V, targets_N, self.compute.log_probs, softcap)


class PersonalizedLM(PersonalizedModel):
    """pi_P(y | x, u): a language model that answers known users as they prefer, and user 0 as is commonly preferred."""

    def __init__(self, core: Core, aggregator: LinearAggregator | None):
        super().__init__(core, backbone_reads_users=aggregator is None)
        self.aggregator = aggregator  # None: soft prompt

    def soft_prompt(self, user_BUD: Tensor | None) -> Tensor | None:
        """The user vectors that the backbone reads; None with the linear aggregator."""
        return user_BUD if self.aggregator is None else None

    def read_out(self, hidden_ND: Tensor, user_NUD: Tensor | None) -> Tensor:
        """What the LM head reads: h' = W [h; e_u] + b with the linear aggregator, else the hidden states h."""
        if self.aggregator is None or user_NUD is None:
            return hidden_ND
        return self.aggregator(hidden_ND, user_NUD)

    def forward(self, batch: PreferenceBatch, hidden_ND: Tensor | None = None) -> ResponseLogProbs:
        """log pi_P(y | x, u) of both responses of each comparison; of a batch without users, log pi(y | x).

        hidden_ND: the hidden states that predict the response tokens, where they are known.
        """
        hidden_ND = self.states_at(batch, batch.predicted_at_N) if hidden_ND is None else hidden_ND
        user_NUD = None
        if self.aggregator is not None and batch.users_M is not None:
            user_NUD = self.user_model(batch.users_M).index_select(0, batch.reading_N)
        read_ND = self.read_out(hidden_ND, user_NUD)
        return sum_by_response(self.token_log_probs(read_ND, batch.targets_N), batch)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the context, `forward` of a batch without users gives pi_SFT: no adapters, no dropout, no gradient."""
        training = self.training
        self.eval()
        try:
            with adapters_off(self.backbone), torch.no_grad():
                yield
        finally:
            self.train(training)


class PersonalizedRewardModel(PersonalizedModel):
    """r_P(x, y, u): the reward that user u gives response y; u_0 is the unknown user.

    With the linear head and a frozen backbone, hidden states depend on no user and never change. Each is computed once.
    """

    def __init__(self, core: Core, value_head: nn.Linear | None):
        super().__init__(core, backbone_reads_users=value_head is not None)
        self.value_head = value_head  # None: linear head, e_u itself

    @property
    def state_width(self) -> int:
        """W, the width of a pooled hidden state."""
        return self.backbone.get_input_embeddings().weight.shape[1] * (2 if self.config.pooling == "both" else 1)

    @property
    def state_dtype(self) -> torch.dtype:
        """The type of a pooled hidden state: the backbone's for the last token's state, else float32 at least."""
        own = self.backbone.get_input_embeddings().weight.dtype
        return own if self.config.pooling == "last" else torch.promote_types(own, torch.float32)

    def pooled_states(self, batch: ReadingBatch) -> Tensor:
        """h (M, W) of each reading: the last token's state (with place response_end the last user vector's), the mean over the
        response's tokens (EOS included), or both."""
        pooling = self.config.pooling
        if pooling == "last":
            return self.states_at(batch, batch.last_at_M)
        states_ND = self.states_at(batch, batch.response_at_N)
        states_ND = states_ND.to(torch.promote_types(states_ND.dtype, torch.float32))
        sums_MD = states_ND.new_zeros(len(batch.readings), states_ND.shape[1]).index_add(0, batch.reading_N, states_ND)
        mean_MD = sums_MD / batch.lengths_M[:, None]
        if pooling == "mean":
            return mean_MD
        return torch.cat([states_ND.index_select(0, batch.lengths_M.cumsum(0) - 1), mean_MD], dim=1)

    @torch.no_grad()
    def states_of(self, readings: Sequence[Reading]) -> Tensor:
        """Pooled hidden states (M, W) on the CPU, in eval mode, where the backbone reads no user."""
        training = self.training
        self.eval()
        states_MW = self.pooled_states(lay_out(readings, self.layout).to(self.device)).cpu()
        self.train(training)
        return states_MW

    def read_rewards(self, batch: ReadingBatch, states_MW: Tensor | None = None) -> Tensor:
        """r_P(x, y, u) of each reading, (M,): v . h for the soft prompt, e_u . h for the linear head (U = 1).

        states_MW: the pooled states h, where they are known.
        """
        states_MW = self.pooled_states(batch) if states_MW is None else states_MW
        if self.value_head is not None:
            return self.value_head(states_MW.to(self.value_head.weight.dtype))[:, 0]
        user_MW = self.user_model(batch.users_M)[:, 0]
        return (states_MW.to(user_MW.dtype) * user_MW).sum(dim=-1)

    def forward(self, batch: PreferenceBatch, states_MW: Tensor | None = None) -> Rewards:
        """r_P(x, y, u) of both responses of each comparison. states_MW as for `read_rewards`."""
        chosen_B, rejected_B = of_comparisons(self.read_rewards(batch, states_MW), batch)
        return Rewards(chosen_B, rejected_B, batch.margin_B.to(chosen_B))

    def rewards(self, readings: Sequence[Reading]) -> Tensor:
        """r_P(x, y, u) of single responses, (M,)."""
        self.check_length(max(len(r.prefix) + len(r.response) for r in readings))
        return self.read_rewards(lay_out(readings, self.layout).to(self.device))


def of_comparisons(values_M: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """The values of each comparison's chosen reading, (B,), and of its rejected one, (B,).

    Indexing would add up the gradients of equal indices in any order, and resuming must be exact.
    """
    chosen_B, rejected_B = batch.chosen_rejected_B2.unbind(dim=1)
    return values_M.index_select(0, chosen_B), values_M.index_select(0, rejected_B)


def sum_by_response(token_log_probs_N: Tensor, batch: PreferenceBatch) -> ResponseLogProbs:
    """log p(y|x), the sum of the tokens' log-probs, of both responses of each comparison."""
    zeros_M = token_log_probs_N.new_zeros(len(batch.readings))
    sums_M, lengths_M = zeros_M.index_add(0, batch.reading_N, token_log_probs_N), batch.lengths_M.to(zeros_M)
    return ResponseLogProbs(*of_comparisons(sums_M, batch), *of_comparisons(lengths_M, batch))
