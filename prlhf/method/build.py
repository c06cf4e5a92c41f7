"""The model of a config: backbone, LoRA, user model, aggregator."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prlhf.backbone.families import lora_targets
from prlhf.backbone.loading import load_backbone
from prlhf.backbone.lora import add_lora
from prlhf.backbone.recompute import prepare_blocks
from prlhf.batch.questions import pair_question
from prlhf.batch.tokens import bos_ids
from prlhf.config.keys import Config, UserModelConfig, is_linear
from prlhf.method.models import (
    Computation,
    Core,
    LinearAggregator,
    PersonalizedLM,
    PersonalizedModel,
    PersonalizedRewardModel,
)
from prlhf.method.pairwise import PairwisePreferenceModel
from prlhf.method.users import ClusterUsers, IndividualUsers, LowRankUsers, UniformUsers, UserModel


@torch.no_grad()
def read_words(embedding: nn.Module, weight_VD: Tensor, ids: Tensor) -> Tensor:
    """Word embeddings (*ids, D) as the input embedding puts them out when its weight is weight_VD."""
    return functional_call(embedding, {"weight": weight_VD}, (ids.to(weight_VD.device),))


class InitialValues:
    """The values that a user model starts from, by `init` (user_model.init), in float32 at least.

    vocabulary: word embeddings drawn at random (paper, A.3). random: Gaussian noise. zero: users do not differ, and share
    word embeddings or, with a linear reward head, zero. solved: as zero, until the solution is put in.

    embedding: the backbone's input embedding, which some families scale (Gemma 3: by sqrt(D)), with the weight weight_VD:
    words are drawn as the blocks read them. What a family does to these later (Granite), it does to user vectors too.
    reward_head: how many hidden states side by side a linear reward head reads; 0: there is no such head. With one, e_u meets
    hidden states, e_u . h, as the rows of a tied LM head do: words are then the weight's rows.
    """

    def __init__(
        self, init: str, embedding: nn.Module, weight_VD: Tensor, generator: torch.Generator, reward_head: int = 0
    ):
        self.init, self.embedding, self.weight_VD, self.generator = init, embedding, weight_VD.detach(), generator
        self.dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        self.reward_head, self.width = reward_head, max(1, reward_head)  # in hidden states
        self.from_zero = init in ("zero", "solved")

    def noise(self, *shape: int) -> Tensor:
        """Gaussian noise of the word embeddings' standard deviation, (*shape, W)."""
        V, D = self.weight_VD.shape
        values = torch.randn(*shape, self.width * D, generator=self.generator, dtype=self.dtype)
        return values * self._words(torch.arange(V)).std().cpu()

    def vectors(self, *shape: int) -> Tensor:
        """Word embeddings, noise, or zero where rewards start at 0, (*shape, W)."""
        if self.init == "random":
            return self.noise(*shape)
        V, D = self.weight_VD.shape
        if self.from_zero and self.reward_head:
            return torch.zeros(*shape, self.width * D, dtype=self.dtype)
        drawn = torch.randint(V, (*shape, self.width), generator=self.generator)
        return self._words(drawn).to("cpu", self.dtype).flatten(-2)

    def _words(self, ids: Tensor) -> Tensor:
        if self.reward_head:
            return self.weight_VD[ids.to(self.weight_VD.device)]
        return read_words(self.embedding, self.weight_VD, ids)

    def weights(self, rows: int, K: int, mean: float) -> Tensor:
        """Coordinates around `mean` (rows, K), with noise of size 1/K where users differ or archetypes are zero."""
        values = torch.full((rows, K), mean, dtype=self.dtype)
        if not self.from_zero or (self.reward_head and mean):
            values += torch.randn(rows, K, generator=self.generator, dtype=self.dtype) / K
        return values


def build_user_model(config: UserModelConfig, users: int, start: InitialValues) -> UserModel:
    """The user model for `users` known users. Where all start alike, the first gradient makes them differ."""
    U, K = config.tokens, config.clusters
    if config.kind == "uniform":
        return UniformUsers(start.vectors(U))
    if config.kind == "cluster" and not config.shared:
        w_MK = start.weights(users + 1, K, 1 / K)
        return ClusterUsers(start.vectors(K, U), w_MK, config.softmax)
    e_UD = start.vectors(U)
    if config.kind == "cluster":
        V_KUD = start.vectors(K, U)
        if start.from_zero:
            V_KUD -= V_KUD.mean(dim=0)  # weights of 1/K then add nothing to e_0
        return LowRankUsers(e_UD, V_KUD, start.weights(users, K, 1 / K), config.softmax)
    if config.rank is not None:  # directions never start at zero, where coordinates would have no gradient
        B_KUD = start.noise(config.rank, U) if start.from_zero else start.vectors(config.rank, U)
        return LowRankUsers(e_UD, B_KUD, start.weights(users, config.rank, 0.0))
    offsets_MUD = e_UD.new_zeros(users, *e_UD.shape) if start.from_zero else start.vectors(users, U)
    return IndividualUsers(e_UD, offsets_MUD, shared=config.shared is not False)


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    users: int,
    backbone: PreTrainedModel | None = None,
    vocabulary_VD: Tensor | None = None,
    compute: Computation | None = None,
) -> PersonalizedModel:
    """The model of a config for `users` known users: backbone (loaded unless given), LoRA, user model, aggregator.

    vocabulary_VD: the weight of the input embedding, from which user vectors start, where the given backbone has no values.
    compute: by default as this device computes.
    """
    backbone = backbone if backbone is not None else load_backbone(config.model, tokenizer, config.seed)
    embedding = backbone.get_input_embeddings()
    D, dtype = embedding.weight.shape[1], torch.promote_types(embedding.weight.dtype, torch.float32)
    linear = config.user_model.aggregator == "linear"
    pooled = 2 if config.model.pooling == "both" else 1  # hidden states side by side
    weight_VD = embedding.weight if vocabulary_VD is None else vocabulary_VD.to(embedding.weight.dtype)  # files differ
    generator = torch.Generator().manual_seed(config.seed)
    head = pooled if is_linear(config) else 0
    start = InitialValues(config.user_model.init, embedding, weight_VD, generator, head)
    user_model = build_user_model(config.user_model, users, start)
    choose_trained_weights(config, backbone)
    prepare_blocks(backbone, config.model, config.lora.rank)
    compute = compute or Computation(log_probs=config.model.log_probs)
    core = Core(backbone, user_model, users, len(bos_ids(tokenizer)), config.model, compute, config.user_model.place)
    if config.method == "pairwise":
        return PairwisePreferenceModel(core, pair_question(tokenizer))
    if config.method == "pdpo":
        return PersonalizedLM(core, LinearAggregator(D, config.user_model.tokens, dtype) if linear else None)
    value_head = None if linear else nn.Linear(pooled * D, 1, bias=False, dtype=dtype)
    if value_head is not None:
        nn.init.zeros_(value_head.weight)  # every reward starts at 0
    return PersonalizedRewardModel(core, value_head)


def choose_trained_weights(config: Config, backbone: PreTrainedModel) -> None:
    """Freeze the backbone, or add LoRA to it, or train all that the method uses."""
    if config.model.frozen:
        backbone.requires_grad_(False)
    elif config.lora.rank:
        add_lora(backbone, config.lora, lora_targets(backbone, config.lora.targets), config.seed)
    elif (
        config.method == "prm" and backbone.get_output_embeddings().weight is not backbone.get_input_embeddings().weight
    ):
        backbone.get_output_embeddings().requires_grad_(False)  # a reward model does not use the LM head


def without_users(model: PersonalizedModel, backbone: PreTrainedModel) -> PersonalizedLM:
    """A backbone as a language model that reads no user vectors, laid out and computed as the model."""
    nobody = UniformUsers(torch.zeros(0, backbone.config.hidden_size, device=backbone.device))
    return PersonalizedLM(Core(backbone, nobody, 0, model.user_slot, model.config, model.compute), None).eval()
