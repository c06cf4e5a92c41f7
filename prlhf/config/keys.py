"""Every config key: its type, its default, the values it takes, and what it means. docs/config.md is made from this file."""

import dataclasses
import datetime
import operator
from dataclasses import dataclass, field
from typing import Any, Literal

# The bounds of a key: how a value compares to one, its sign in the table, its words in an error.
BOUNDS = {
    "low": (operator.ge, ">=", "at least"),
    "high": (operator.le, "<=", "at most"),
    "above": (operator.gt, ">", "more than"),
}


def key(default: Any, doc: str, **bounds: float) -> Any:
    """A config key: its default, what it means, and its BOUNDS. In a Literal, N stands for any positive int."""
    return field(default=default, metadata={"doc": doc, "bounds": bounds})


@dataclass(frozen=True)
class ModelConfig:
    """The backbone."""

    name: str | None = key(None, "Folder or Hub name of a Hugging Face causal LM in safetensors.")
    family: Literal["llama", "gptj"] | None = key(None, "Without `model.name`: random weights of this family.")
    layers: int = key(2, "Blocks of a random-weight model.", low=1)
    width: int = key(64, "Hidden size of a random-weight model.", low=16)
    heads: int = key(4, "Attention heads of a random-weight model.", low=1)
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "float32", "Type of the backbone's weights; half types are for LoRA. User model and LoRA are always float32."
    )
    compute_dtype: Literal["bfloat16"] | None = key(
        None, "Mixed precision for full fine-tuning: passes compute in this, weights and moments keep `model.dtype`."
    )
    pure_half: bool = key(False, "Full fine-tuning in a half type: half the memory; small updates round to nothing.")
    layout: Literal["auto", "tree", "packed", "rows"] = key(
        "auto",
        "tree: a prompt and its responses in one row; packed: all trees of a forward pass in one row, without padding; "
        "rows: one response a row, each a sequence of the model's own forward pass; slower, and right for recurrent models. "
        "auto: packed on a GPU that computes in a half type, else tree. The numbers are the same; a model of which that is "
        "not true is refused.",
    )
    share_trees: bool = key(True, "Compute once what comparisons of a forward pass share; the same numbers.")
    log_probs: Literal["torch", "chunked", "triton"] | None = key(
        None, "How to compute log-probs; only torch holds (tokens, vocabulary). null: triton on a GPU, else chunked."
    )
    recompute: Literal["none", "cheap", "elementwise", "blocks", "every:N"] = key(
        "cheap",
        "What the backward pass recomputes to save memory: none; cheap: RMSNorms and the elementwise part of MLPs, without "
        "`model.compile`; elementwise: all of a block but attention and matrix products (LoRA's B is recomputed); blocks: "
        "whole blocks (gradient checkpointing); every:N: every N-th block, the others as cheap.",
    )
    compile: bool = key(False, "torch.compile each block: the first steps are slow, and a CPU needs a C++ compiler.")
    frozen: bool = key(False, "Train the user model and the reward head alone; the backbone stays as it is.")
    pooling: Literal["last", "mean", "both"] = key(
        "last", "What a reward model reads: the last token's hidden state (the paper), the response's mean, or both."
    )


@dataclass(frozen=True)
class UserModelConfig:
    """The user model, and how the language model reads it."""

    kind: Literal["uniform", "individual", "cluster"] = key("individual", "f_im: one e for all, e_0 + o_i, or V w_i.")
    tokens: int = key(10, "T_u, vectors per user; 0 only with `uniform` (plain DPO).", low=0)
    clusters: int = key(5, "K, for `cluster`.", low=1)
    softmax: bool = key(False, "For `cluster`: softmax(w_i) as the weights.")
    rank: int | None = key(
        None, "For `individual`: f(i) = e_0 + B z_i with z_i in R^rank; null: full offsets o_i (the paper).", low=1
    )
    shared: bool | None = key(
        None, "Add e_0, which users share, to o_i or V w_i. null: for individual, not for cluster (the paper)."
    )
    init: Literal["vocabulary", "zero", "random", "solved"] = key(
        "vocabulary",
        "Start from sampled word embeddings (the paper, A.3), from no differences between users, from noise, or from the "
        "exact solution for the backbone before training (solved; needs a linear reward head and a prior).",
    )
    aggregator: Literal["soft_prompt", "linear"] = key(
        "soft_prompt",
        "How the LM meets e_u: soft_prompt puts vectors among its inputs; linear reads the last hidden state and e_u, by a "
        "linear layer over both (pdpo) or by their inner product (prm).",
    )
    place: Literal["before_prompt", "prompt_end", "response_end"] = key(
        "before_prompt",
        "Where a soft prompt stands: before_prompt (the paper); prompt_end: behind the prompt's content, before what the chat "
        "template puts between that and the answer, so that the prompt is computed once for all users and both branches; "
        "response_end (reward models): behind the response, which is then computed once for all users.",
    )
    lr: float = key(1e-3, "Learning rate of the user model, linear aggregator and scalar reward head.", above=0)
    weight_decay: float = key(0.0, "AdamW's decay of what `user_model.lr` trains.", low=0)
    prior: float | Literal["auto"] | None = key(
        None,
        "Gaussian prior on user differences: the standard deviation of a user's reward margins around the generic user's; for "
        "soft prompts and pdpo in units of the word embeddings' standard deviation. auto: by cross-validation on the training "
        "data for a linear reward head, else 1. null: none (the paper).",
        above=0,
    )
    shared_prior: float | Literal["auto"] | None = key(
        "auto", "With a `prior`, the same for e_0. auto: chosen with it for a linear reward head, else none.", above=0
    )


@dataclass(frozen=True)
class DataConfig:
    """Which comparisons are read, and how they become tokens."""

    train: str | None = key(None, "Comparisons to learn from.")
    valid: str | None = key(None, "Held-out comparisons, for evaluation.")
    format: Literal["auto", "jsonl", "csv", "parquet"] = key("auto", "auto: by the file's name. parquet needs pyarrow.")
    user_column: str = key("user", "The field that names the user.")
    new_users: bool = key(
        False, "Held-out files, prompts and responses to score may be of new users alone; else refused."
    )
    attributes: tuple[str, ...] | None = key(
        None, "Which of a record's `attributes` ({name: text}) make its user text; null: its `user_text`."
    )
    limit: int | None = key(None, "Train on a seeded sample of this many comparisons.", low=1)
    valid_limit: int | None = key(None, "Evaluate on a seeded sample of this many comparisons.", low=1)
    known_users: int | None = key(
        None, "Know only the n users with most comparisons in data.train; all others are user 0. null: all.", low=1
    )
    template: Literal["auto", "chat", "tulu", "llama3"] = key(
        "auto",
        "auto: message lists through the tokenizer's chat template, strings as they are; chat: strings too, as one user "
        "message; tulu, llama3: as chat, by that family's template.",
    )
    template_args: dict[str, Any] | None = key(
        None, "What the chat template is told besides, such as {enable_thinking: false} or {date_string: 26 Jul 2024}."
    )
    template_date: datetime.date | None = key(
        None,
        "What the chat template takes for today, YYYY-MM-DD. null: the day on which the run began; the run keeps it.",
    )
    user_text: bool = key(True, "Put `user_text` before the prompt where a comparison has one.")
    user_text_in_reference: bool = key(
        True, "The reference sees `user_text` too (the paper's code; its section 4: no)."
    )
    max_prompt_tokens: int = key(512, "Longer prompts lose their oldest text.", low=1)
    min_prompt_tokens: int = key(16, "A comparison whose prompt would be cut below this is dropped.", low=1)
    max_user_text_tokens: int = key(256, "Longer user texts lose their end.", low=1)
    max_tokens: int = key(1024, "Most tokens of user text, prompt and the longer response together.", low=4)


@dataclass(frozen=True)
class LossConfig:
    """The preference loss and the weights of its two branches."""

    kind: Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"] = key(
        "sigmoid", "Preference loss on the log-probs, the same in both branches; reward models take sigmoid."
    )
    alpha: float = key(
        0.5,
        "Weight of the user branch; the generic branch has 1 - alpha. At 1 it learns from unknown users alone.",
        low=0,
        high=1,
    )
    beta: float = key(0.1, "Strength of the KL constraint (ORPO: odds-ratio weight); unused by reward models.", above=0)
    label_smoothing: float = key(0.0, "Assumed share of flipped labels (sigmoid, robust).", low=0, high=0.499)
    nll: float = key(0.0, "Weight of an added NLL(y1) per token, which keeps chosen responses likely (RPO).", low=0)
    gamma: float = key(0.5, "SimPO's target margin.", low=0)
    margin: float = key(0.0, "Reward models: y1 must win by this times the comparison's `margin` (1 if none).", low=0)
    center: float = key(0.0, "Reward models: weight of (r1 + r2)^2, which keeps rewards around zero.", low=0)


@dataclass(frozen=True)
class OptimConfig:
    """Updates: how many, of how many comparisons, how large."""

    solver: Literal["auto", "adamw", "exact"] = key(
        "auto", "exact: the optimum by L-BFGS (frozen backbone, linear reward head, priors). auto: exact if possible."
    )
    lr: float = key(1e-6, "Learning rate of the backbone or its LoRA.", above=0)
    batch_size: int = key(32, "Comparisons per update, over all ranks.", low=1)
    micro_batch_size: int = key(8, "Comparisons per forward pass (a tree counts once); no update depends on it.", low=1)
    group_by: Literal["none", "pair", "response"] = key(
        "none",
        "Which comparisons come into the same update to share work (`model.share_trees`): pair, those of the same two "
        "responses; response, those of one prompt and few of its responses. Less is learned from an update of few responses.",
    )
    epochs: int = key(1, "Passes over the training data.", low=1)
    max_steps: int | None = key(None, "Stop after this many updates.", low=1)
    warmup_steps: int = key(0, "Updates of linear warm-up.", low=0)
    schedule: Literal["linear", "cosine", "constant"] = key("linear", "Learning rate after the warm-up.")
    weight_decay: float = key(0.0, "AdamW's decay of the backbone or its LoRA.", low=0)
    beta1: float = key(0.9, "AdamW's first-moment decay.", low=0, high=0.9999)
    beta2: float = key(0.999, "AdamW's second-moment decay.", low=0, high=0.99999)
    max_grad_norm: float | None = key(1.0, "Clip the gradient of all trained weights to this norm.", above=0)
    max_skipped_steps: int = key(3, "Stop when this many updates in a row are not finite.", low=1)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters, or none."""

    rank: int = key(0, "Rank; 0 is full fine-tuning.", low=0)
    alpha: float = key(16.0, "Scale: the update is alpha / rank * B A x.", above=0)
    dropout: float = key(0.0, "Dropout on the adapter's input.", low=0, high=0.99)
    targets: tuple[str, ...] | None = key(None, "Names of the linear layers to adapt; null: all of the family's.")


@dataclass(frozen=True)
class FSDPConfig:
    """How a model is spread over the processes that torchrun starts (FSDP2)."""

    replicas: int = key(1, "Hybrid sharding: so many whole models, each over neighbouring processes (a node).", low=1)
    offload: bool = key(False, "Keep weights, gradients and moments in host memory: slower, for small GPUs.")
    sync: Literal["every", "last"] = key(
        "every",
        "After which micro-batches of an update gradients are summed over processes. last: once, so least is sent, and each "
        "process holds all gradients in float32 until then.",
    )
    reshard_after_forward: bool = key(
        True, "Free a block's gathered weights after its forward pass. false: keep them for the backward pass."
    )


@dataclass(frozen=True)
class TrainConfig:
    """What a training run writes, and when."""

    log_every: int = key(10, "Updates between records in metrics.jsonl.", low=1)
    eval_every: int | None = key(None, "Updates between evaluations; null: only after the last.", low=1)
    eval_last: bool = key(True, "Evaluate after the last update too.")
    save_every: int | None = key(100, "Updates between checkpoints; null: only at the end.", low=1)
    keep_checkpoints: int = key(2, "Newest checkpoints to keep, beside the best.", low=1)
    final: Literal["last", "best"] = key("last", "Which weights become RUN_DIR/final.")
    best_by: Literal["loss", "accuracy"] = key(
        "loss", "The best evaluation has the lowest loss, or known users' highest accuracy (ties: the lower loss)."
    )
    patience: int | None = key(
        None, "Stop after so many evaluations in a row without a new best; the lr schedule stays. null: never.", low=1
    )
    tensorboard: bool = key(False, "Also write TensorBoard events to RUN_DIR/tensorboard.")


@dataclass(frozen=True)
class EvaluateConfig:
    """How an evaluation is computed."""

    batch_size: int = key(16, "Comparisons per forward pass.", low=1)
    bootstrap: int = key(2000, "Bootstrap samples (of users) behind each 95% interval.", low=100)
    seed: int = key(0, "Seed of the bootstrap and of the shuffled user ids.", low=0, high=2**32 - 1)


@dataclass(frozen=True)
class Config:
    """All that determines a run, beside the data and the base model."""

    method: Literal["pdpo", "prm", "pairwise"] = key(
        "pdpo", "pdpo: language model; prm: Bradley-Terry reward model; pairwise: reads both responses, answers A or B."
    )
    run_dir: str | None = key(None, "Where the run lives; null: runs/NAME of the config.")
    seed: int = key(0, "Seed of everything random.", low=0, high=2**32 - 1)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda where there is one, else cpu.")
    deterministic: bool = key(True, "On a GPU, deterministic kernels: resuming is exact, at some cost in speed.")
    model: ModelConfig = ModelConfig()
    user_model: UserModelConfig = UserModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoRAConfig = LoRAConfig()
    fsdp: FSDPConfig = FSDPConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


GROUPS = {outer.name: outer.type for outer in dataclasses.fields(Config) if dataclasses.is_dataclass(outer.type)}
# 'optim.lr' -> its dataclass field, for every key, in order of declaration.
KEYS = {outer.name: outer for outer in dataclasses.fields(Config) if outer.name not in GROUPS} | {
    f"{group}.{inner.name}": inner for group, of in GROUPS.items() for inner in dataclasses.fields(of)
}


def is_linear(config: Config) -> bool:
    """Whether the reward is linear in the user's vector: a reward model with a linear head."""
    return config.method == "prm" and config.user_model.aggregator == "linear"


def has_linear_coordinates(config: Config) -> bool:
    """Whether the reward is linear in the coordinates by which users differ: a linear reward head, and no softmax of them."""
    return is_linear(config) and not config.user_model.softmax


def solves_exactly(config: Config) -> bool:
    """Whether a run of this config is an exact solution, without updates."""
    has_priors = None not in (config.user_model.prior, config.user_model.shared_prior)
    return is_linear(config) and config.model.frozen and has_priors and config.optim.solver != "adamw"
