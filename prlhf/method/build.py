"""The model of a config: backbone, LoRA, user model, aggregator."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prlhf.backbone.families import lora_targets
from prlhf.backbone.loading import load_backbone
from prlhf.backbone.lora import add_lora
from prlhf.backbone.recompute import prepare_blocks
from prlhf.batch.tokens import bos_ids, pair_question
from prlhf.config.keys import Config, UserModelConfig
from prlhf.method.models import (
    Computation,
    Core,
    LinearAggregator,
    PersonalizedLM,
    PersonalizedModel,
    PersonalizedRewardModel,
)
from prlhf.method.pairwise import PairwisePreferenceModel
from prlhf.method.users import ClusterUsers, IndividualUsers, LowRankUsers, UniformUsers


def build_user_model(
    config: UserModelConfig,
    users: int,
    vocabulary_VD: Tensor,
    generator: torch.Generator,
    reward_head: int = 0,
    read_as: torch.dtype | None = None,
) -> nn.Module:
    """The user model for `users` known users, in float32 at least, initialised by config.init:

    vocabulary: every vector is a word embedding drawn at random (paper, A.3); zero: the shared vectors are, and the
    differences between users start at zero; random: Gaussian noise of the embeddings' standard deviation.
    Cluster weights start at 1/K, with noise of that size unless init is zero; coordinates in place of offsets likewise, around
    zero.

    reward_head: with a linear reward head (e_u is what pooled hidden states are multiplied with) how many hidden states lie
    side by side, else 0. There zero is all zero, so that every reward starts at 0, but for what differences are made of:
    cluster weights are noisy, and so are the directions of low-rank users. So is `solved`, which is put in later.

    read_as: the type that the word embeddings have in the model, where the file at hand holds them in another.
    """
    V, D = vocabulary_VD.shape
    read_as = read_as or vocabulary_VD.dtype
    dtype = torch.promote_types(read_as, torch.float32)
    from_zero = config.init in ("zero", "solved")

    def noise(*shape: int) -> Tensor:
        width = D * max(1, reward_head)
        values = torch.randn(*shape, width, generator=generator, dtype=dtype)
        return values * vocabulary_VD.detach().to(read_as).std().cpu()

    def vectors(*shape: int) -> Tensor:
        if config.init == "random":
            return noise(*shape)
        if from_zero and reward_head:
            return torch.zeros(*shape, D * reward_head, dtype=dtype)
        drawn = torch.randint(V, (*shape, max(1, reward_head)), generator=generator)
        return vocabulary_VD.detach()[drawn.to(vocabulary_VD.device)].to("cpu", read_as).to(dtype).flatten(-2)

    def weights(rows: int, K: int, around: float) -> Tensor:
        values = torch.full((rows, K), around, dtype=dtype)
        if not from_zero or (reward_head and around):
            values += torch.randn(rows, K, generator=generator, dtype=dtype) / K
        return values

    U, K = config.tokens, config.clusters
    if config.kind == "uniform":
        return UniformUsers(vectors(U))
    if config.kind == "individual" and config.rank is None:
        e_UD = vectors(U)
        offsets = torch.zeros(users, *e_UD.shape, dtype=dtype) if from_zero else vectors(users, U)
        return IndividualUsers(e_UD, offsets, shared=config.shared is not False)
    if config.kind == "individual":
        e_UD, B_KUD = vectors(U), noise(config.rank, U) if from_zero else vectors(config.rank, U)
        return LowRankUsers(e_UD, B_KUD, weights(users, config.rank, 0.0))
    if config.shared:
        e_UD, V_KUD = vectors(U), vectors(K, U)
        if from_zero:
            V_KUD -= V_KUD.mean(dim=0)  # of which weights of 1/K make nothing
        return LowRankUsers(e_UD, V_KUD, weights(users, K, 1 / K), config.softmax)
    w_MK = weights(users + 1, K, 1 / K)
    return ClusterUsers(vectors(K, U), w_MK, config.softmax)


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    users: int,
    backbone: PreTrainedModel | None = None,
    vocabulary_VD: Tensor | None = None,
    compute: Computation | None = None,
) -> PersonalizedModel:
    """The model of a config for `users` known users: backbone (loaded unless given), LoRA, user model, aggregator.

    vocabulary_VD: the word embeddings that user vectors start from, where the backbone given has no values yet.
    compute: by default as this device computes.
    """
    backbone = backbone if backbone is not None else load_backbone(config.model, tokenizer, config.seed)
    embeddings_VD = backbone.get_input_embeddings().weight
    width, linear = embeddings_VD.shape[1], config.user_model.aggregator == "linear"
    dtype = torch.promote_types(embeddings_VD.dtype, torch.float32)
    pooled = 2 if config.model.pooling == "both" else 1
    user_model = build_user_model(
        config.user_model, users, embeddings_VD if vocabulary_VD is None else vocabulary_VD, torch.Generator().manual_seed(config.seed),
        reward_head=pooled if config.method == "prm" and linear else 0, read_as=embeddings_VD.dtype,
    )  # fmt: skip
    if config.model.frozen:
        backbone.requires_grad_(False)
    elif config.lora.rank:
        add_lora(backbone, config.lora, lora_targets(backbone, config.lora.targets), config.seed)
    elif config.method == "prm" and backbone.get_output_embeddings().weight is not embeddings_VD:
        backbone.get_output_embeddings().requires_grad_(False)  # the LM head, of which a reward model has no use
    prepare_blocks(backbone, config.model, config.lora.rank)
    compute = compute or Computation(log_probs=config.model.log_probs)
    core = Core(backbone, user_model, users, len(bos_ids(tokenizer)), config.model, compute)
    if config.method == "pairwise":
        return PairwisePreferenceModel(core, pair_question(tokenizer))
    if config.method == "prm":
        value_head = None if linear else nn.Linear(pooled * width, 1, bias=False, dtype=dtype)
        if value_head is not None:
            nn.init.zeros_(value_head.weight)  # every reward starts at 0
        return PersonalizedRewardModel(core, value_head)
    aggregator = LinearAggregator(width, config.user_model.tokens, dtype) if linear else None
    return PersonalizedLM(core, aggregator)
