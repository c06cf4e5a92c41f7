"""The personalised models: backbone + user model + aggregator, from a batch of comparisons to what the loss takes.

PersonalizedLM, pi_P(y | x, u) (paper, section 4.2). The soft-prompt aggregator puts e_u = f_im(u_p) before the
prompt's embeddings (after BOS); the linear one computes h' = W [h; e_u] + b and lets the head read h'. With users=None
the model is the reference pi_SFT: no e_u, no aggregator, adapters off.

PersonalizedRewardModel, r_P(x, y, u), reads the last hidden state h of the response's last token (EOS). Soft prompt:
r = v . h, and the backbone has seen e_u; linear head: r = e_u . h, and the backbone knows nothing of the user.

PairwisePreferenceModel, P_P(y1 over y2 | x, u), reads both responses and answers A or B, in both orders.

Shape suffixes: B comparisons, M = 2 B responses, R rows, T positions, U user vectors, D width, N response tokens.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from prlhf.backbones import check_positions, head, hidden_states, load_backbone, lora_targets
from prlhf.batching import (
    DistinctResponses,
    PreferenceBatch,
    Response,
    Row,
    collate,
    collate_responses,
    distinct_responses,
    insert_user_vectors,
    lay_out,
    tree_mask,
)
from prlhf.config import Config
from prlhf.encoding import EncodedComparison, PairQuestion, bos_ids, pair_question
from prlhf.logprobs import log_probs
from prlhf.lora import adapters_off, add_lora
from prlhf.losses import Answers, ResponseLogProbs, Rewards
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


class PersonalizedModel(nn.Module):
    """What the models share: a backbone that may read user vectors before the prompt."""

    def __init__(self, backbone: PreTrainedModel, user_model: nn.Module, users: int, user_slot: int):
        super().__init__()
        self.users = users  # known ones, numbered 1..users
        self.user_slot = user_slot  # where in a row the user vectors go: behind BOS, or 0
        self.backbone = backbone
        self.user_model = user_model

    @property
    def device(self) -> torch.device:
        """Where the backbone's weights are."""
        return self.backbone.device

    @property
    def backbone_reads_users(self) -> bool:
        """Whether e_u goes before the prompt (soft prompt); otherwise it meets the hidden states behind the backbone."""
        return True

    @property
    def shares_states(self) -> bool:
        """Whether `states_shared` saves work: forward passes for several users have hidden states in common."""
        return False

    def user_parameters(self) -> list[nn.Parameter]:
        """The weights with the user model's learning rate."""
        return list(self.user_model.parameters())

    @property
    def vectors(self) -> int:
        """T_u where they take positions before the prompt, else 0."""
        return self.user_model.tokens if self.backbone_reads_users else 0

    def check_lengths(self, comparisons: Sequence[EncodedComparison]) -> None:
        """UserError where a comparison has more positions than the backbone reads."""
        longest = max(len(c.prefix) + max(len(c.chosen), len(c.rejected)) for c in comparisons)
        check_positions(self.backbone, longest + self.vectors)

    def collate(self, comparisons: Sequence[EncodedComparison], layout: str = "tree", reference: bool = False):
        """Comparisons as the batch that `forward` takes."""
        return collate(comparisons, layout, reference)

    @contextlib.contextmanager
    def states_shared(self) -> Iterator[None]:
        """Within the context, what does not depend on the user is computed once for all forward passes."""
        yield

    def states(self, embeddings_RTD: Tensor, mask: Tensor, positions_RT: Tensor, cache: Cache | None = None) -> Tensor:
        """The backbone's last hidden states (R, T, D)."""
        return hidden_states(self.backbone, embeddings_RTD, mask, positions_RT, cache)

    def states_at(self, batch: PreferenceBatch, at_N: Tensor, user_BUD: Tensor | None) -> Tensor:
        """Last hidden states (N, D) at flat positions of the batch's rows, each with its user vectors, if any, in."""
        user_RUD = None if user_BUD is None else user_BUD[batch.comparison_R]
        embeddings_RTD = self.backbone.get_input_embeddings()(batch.input_ids_RT)
        rows = insert_user_vectors(embeddings_RTD, batch, user_RUD, self.user_slot)
        hidden_RTD = self.states(rows.embeddings_RTD, tree_mask(rows.segments_RT), rows.positions_RT)
        T, inserted = batch.input_ids_RT.shape[1], hidden_RTD.shape[1] - batch.input_ids_RT.shape[1]
        moved_N = at_N + (at_N // T + 1) * inserted  # these positions are all behind the user vectors
        return hidden_RTD.flatten(0, 1).index_select(0, moved_N)


class PersonalizedLM(PersonalizedModel):
    """A language model that answers each known user as that user prefers, and user 0 as is commonly preferred."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        user_model: nn.Module,
        aggregator: LinearAggregator | None,
        users: int,
        user_slot: int,
    ):
        super().__init__(backbone, user_model, users, user_slot)
        self.aggregator = aggregator  # None: soft prompt

    @property
    def backbone_reads_users(self) -> bool:
        """True for the soft prompt."""
        return self.aggregator is None

    def user_parameters(self) -> list[nn.Parameter]:
        """The weights with the user model's learning rate: the user model and the linear aggregator."""
        aggregator = [] if self.aggregator is None else list(self.aggregator.parameters())
        return super().user_parameters() + aggregator

    def soft_prompt(self, user_BUD: Tensor | None) -> Tensor | None:
        """The user vectors that go before the prompt: all of them, or None with the linear aggregator."""
        return user_BUD if self.aggregator is None else None

    def read_out(self, hidden_ND: Tensor, user_NUD: Tensor | None) -> Tensor:
        """The hidden states that the head reads: h' = W [h; e_u] + b with the linear aggregator, h otherwise."""
        if self.aggregator is None or user_NUD is None:
            return hidden_ND
        return self.aggregator(hidden_ND, user_NUD)

    def forward(self, batch: PreferenceBatch, users_B: Tensor | None) -> ResponseLogProbs:
        """log pi_P(y | x, u) of both responses of each comparison; users_B (B,), or None for no user at all."""
        user_BUD = None if users_B is None else self.user_model(users_B)
        hidden_ND = self.states_at(batch, batch.predicted_at_N, self.soft_prompt(user_BUD))
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


class PersonalizedRewardModel(PersonalizedModel):
    """A reward model that knows who asks: r_P(x, y, u), and r_P(x, y, u_0) for the unknown user.

    With the linear head the hidden states do not depend on the user: each distinct response of a batch is computed
    once, whatever the number of users and branches that read it, and with a frozen backbone once for all.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        user_model: nn.Module,
        value_head: nn.Linear | None,
        users: int,
        user_slot: int,
        frozen: bool = False,
    ):
        super().__init__(backbone, user_model, users, user_slot)
        self.value_head = value_head  # None: linear head, e_u itself
        self.frozen = frozen
        self.known_states: dict[Response, Tensor] | None = {} if frozen else None

    @property
    def backbone_reads_users(self) -> bool:
        """True for the soft prompt."""
        return self.value_head is not None

    def user_parameters(self) -> list[nn.Parameter]:
        """The weights with the user model's learning rate: the user model and the scalar head."""
        value_head = [] if self.value_head is None else list(self.value_head.parameters())
        return super().user_parameters() + value_head

    @property
    def shares_states(self) -> bool:
        """True for the linear head."""
        return self.value_head is None

    def collate(self, comparisons: Sequence[EncodedComparison], layout: str = "tree", reference: bool = False):
        """Trees or rows for the soft prompt, distinct responses for the linear head."""
        if self.backbone_reads_users:
            return super().collate(comparisons, layout, reference)
        return distinct_responses(comparisons)

    @contextlib.contextmanager
    def states_shared(self) -> Iterator[None]:
        """Within the context the hidden states of a response are kept (linear head); weights must not change in it."""
        before = self.known_states
        if before is None:
            self.known_states = {}
        try:
            yield
        finally:
            self.known_states = before

    @torch.no_grad()
    def states_of(self, responses: Sequence[Response], batch_size: int) -> Tensor:
        """Last hidden states (M, D), on the CPU, of responses without any user and in eval mode."""
        training = self.training
        self.eval()
        parts = []
        for start in tqdm(range(0, len(responses), batch_size), desc="hidden states", leave=False, disable=None):
            rows = collate_responses(responses[start : start + batch_size]).to(self.device)
            parts.append(self.states_at(rows, rows.last_at_M, None).cpu())
        self.train(training)
        return torch.cat(parts)

    def response_states(self, batch: DistinctResponses) -> Tensor:
        """Last hidden states of both responses' last tokens (B, 2, D), without any user."""
        known = {} if self.known_states is None else self.known_states
        missing = [response for response in batch.responses if response not in known]
        if missing:
            if self.frozen:
                states_MD = self.states_of(missing, len(missing)).to(self.device)
            else:
                rows = collate_responses(missing).to(self.device)
                states_MD = self.states_at(rows, rows.last_at_M, None)
            known.update(zip(missing, states_MD.unbind()))
        return torch.stack([known[response] for response in batch.responses])[batch.index_B2]

    def forward(self, batch: PreferenceBatch | DistinctResponses, users_B: Tensor) -> Rewards:
        """r_P(x, y, u) of both responses of each comparison; users_B (B,)."""
        user_BUD = self.user_model(users_B)
        if isinstance(batch, DistinctResponses):
            states_B2D = self.response_states(batch)
        else:
            states_B2D = self.states_at(batch, batch.last_at_M, user_BUD).unflatten(0, (-1, 2))
        rewards_B2 = self.read_reward(states_B2D, user_BUD)
        return Rewards(rewards_B2[:, 0], rewards_B2[:, 1], batch.margin_B.to(rewards_B2))

    def rewards(self, prefixes: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], users_B: Tensor) -> Tensor:
        """r_P(x, y, u) of single responses, (B,)."""
        rows = [Row(b, prefix, [(b, ids)]) for b, (prefix, ids) in enumerate(zip(prefixes, responses))]
        check_positions(self.backbone, max(len(row.prefix) + len(row.responses[0][1]) for row in rows) + self.vectors)
        batch, user_BUD = lay_out(rows, []).to(self.device), self.user_model(users_B)
        states_BD = self.states_at(batch, batch.last_at_M, user_BUD if self.backbone_reads_users else None)
        return self.read_reward(states_BD[:, None], user_BUD)[:, 0]

    def read_reward(self, states_BMD: Tensor, user_BUD: Tensor) -> Tensor:
        """v . h for the soft prompt, e_u . h for the linear head (U = 1): M states of each of B users -> (B, M)."""
        if self.value_head is None:
            return (states_BMD.to(user_BUD.dtype) * user_BUD).sum(dim=-1)
        return self.value_head(states_BMD.to(self.value_head.weight.dtype)).squeeze(-1)


class PairwisePreferenceModel(PersonalizedModel):
    """P(y1 over y2 | x, u) of a language model that reads both responses, in both orders, and answers A or B.

    The pairwise preference model of Dong et al. 2024 (arXiv 2405.07863, section 2.2) with a user model.
    """

    def __init__(
        self, backbone: PreTrainedModel, user_model: nn.Module, question: PairQuestion, users: int, user_slot: int
    ):
        super().__init__(backbone, user_model, users, user_slot)
        self.answers = [question.answer_a, question.answer_b]

    def forward(self, batch: PreferenceBatch, users_B: Tensor) -> Answers:
        """The logit of y1's letter against y2's in both orders; users_B (B,)."""
        hidden_MD = self.states_at(batch, batch.last_at_M, self.user_model(users_B))
        weight_VD, bias_V = head(self.backbone)
        dtype = torch.promote_types(hidden_MD.dtype, torch.float32)
        bias_2 = None if bias_V is None else bias_V[self.answers].to(dtype)
        logits_M2 = nn.functional.linear(hidden_MD.to(dtype), weight_VD[self.answers].to(dtype), bias_2)
        a_over_b_B2 = (logits_M2[:, 0] - logits_M2[:, 1]).view(-1, 2)  # y1 is A in the first order, B in the second
        return Answers(a_over_b_B2[:, 0], -a_over_b_B2[:, 1], batch.margin_B.to(a_over_b_B2))


def sum_by_response(token_log_probs_N: Tensor, batch: PreferenceBatch) -> ResponseLogProbs:
    """log p(y|x) = sum of its tokens' log-probs, for every response of the batch."""
    zeros = token_log_probs_N.new_zeros(2 * batch.size)
    sums = zeros.index_add(0, batch.response_N, token_log_probs_N).view(batch.size, 2)
    lengths = zeros.index_add(0, batch.response_N, torch.ones_like(token_log_probs_N.detach())).view(batch.size, 2)
    return ResponseLogProbs(sums[:, 0], sums[:, 1], lengths[:, 0], lengths[:, 1])


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, users: int, backbone: PreTrainedModel | None = None
) -> PersonalizedModel:
    """The model of a config for `users` known users: backbone (loaded unless given), LoRA, user model, aggregator."""
    backbone = backbone if backbone is not None else load_backbone(config.model, tokenizer, config.seed)
    vocabulary_VD = backbone.get_input_embeddings().weight
    width, linear = vocabulary_VD.shape[1], config.user_model.aggregator == "linear"
    dtype = torch.promote_types(vocabulary_VD.dtype, torch.float32)
    user_model = build_user_model(
        config.user_model, users, vocabulary_VD, torch.Generator().manual_seed(config.seed),
        reward_head=config.method == "prm" and linear,
    )  # fmt: skip
    if config.model.frozen:
        backbone.requires_grad_(False)
    elif config.lora.rank:
        add_lora(backbone, config.lora, lora_targets(backbone, config.lora.targets), config.seed)
    elif config.method == "prm" and backbone.get_output_embeddings().weight is not vocabulary_VD:
        backbone.get_output_embeddings().requires_grad_(False)  # the LM head, of which a reward model has no use
    if config.model.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    slot = len(bos_ids(tokenizer))
    if config.method == "pairwise":
        return PairwisePreferenceModel(backbone, user_model, pair_question(tokenizer), users, slot)
    if config.method == "prm":
        value_head = None if linear else nn.Linear(width, 1, bias=False, dtype=dtype)
        if value_head is not None:
            nn.init.zeros_(value_head.weight)  # every reward starts at 0
        return PersonalizedRewardModel(backbone, user_model, value_head, users, slot, config.model.frozen)
    aggregator = LinearAggregator(width, config.user_model.tokens, dtype) if linear else None
    return PersonalizedLM(backbone, user_model, aggregator, users, slot)
