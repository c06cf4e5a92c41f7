"""Every config key, declared once: its default, its range and one sentence about it. docs/config.md is made from these."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


def key(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A config key: its default, one sentence about it, and what values it takes (low <= value <= high, > above)."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high, "above": above})


@dataclass(frozen=True)
class ModelConfig:
    """The backbone."""

    name: str | None = key(None, "Folder or hub name of a Hugging Face causal LM (safetensors).")
    family: str | None = key(
        None, "With no `model.name`: a small random-weight model of this family.", choices=("llama", "gptj")
    )
    layers: int = key(2, "Blocks of a random-weight model.", low=1)
    width: int = key(64, "Hidden size of a random-weight model.", low=16)
    heads: int = key(4, "Attention heads of a random-weight model.", low=1)
    dtype: str = key(
        "float32",
        "Type of the backbone's weights; half types are for LoRA. User model and LoRA are float32 in any case.",
        choices=("float32", "bfloat16", "float16"),
    )
    compute_dtype: str | None = key(
        None,
        "With full fine-tuning: the type that forward and backward passes compute in (mixed precision: weights, sums of "
        "gradients and moments keep model.dtype), evaluation and generation too. null: model.dtype.",
        choices=("bfloat16",),
    )
    pure_half: bool = key(
        False, "Full fine-tuning of weights of half type: half the memory, and small updates round to nothing."
    )
    layout: str = key(
        "auto",
        "tree: prompt once, its responses in one row; packed: all trees of a forward pass in one row, without padding; "
        "rows: one response a row, the plain layout (same numbers, slower). auto: packed on a GPU, else tree.",
        choices=("auto", "tree", "packed", "rows"),
    )
    share_trees: bool = key(
        True, "Compute once what comparisons of a forward pass have in common; same numbers either way."
    )
    log_probs: str | None = key(
        None,
        "How log-probs are computed, without (tokens, vocabulary) in memory except by torch. null: triton on a GPU, else "
        "chunked.",
        choices=("torch", "chunked", "triton"),
    )
    gradient_checkpointing: bool = key(False, "Recompute blocks in the backward pass to save memory.")
    checkpoint_every: int = key(1, "Of which blocks: every n-th.", low=1)
    recompute: str = key(
        "blocks",
        "What of them: all, or only what is neither attention nor a matrix product (but LoRA's B), for more memory and less "
        "time.",
        choices=("blocks", "elementwise"),
    )
    compile: bool = key(False, "torch.compile each block (needs a C++ compiler on a CPU; the first steps are slow).")
    frozen: bool = key(False, "Leave the backbone as it is: the user model and the reward head alone are trained.")
    pooling: str = key(
        "last",
        "What a reward model reads of a response's hidden states: the last token's (the paper), the mean over the response's "
        "tokens, or both side by side.",
        choices=("last", "mean", "both"),
    )


@dataclass(frozen=True)
class UserModelConfig:
    """Who users are to the model, and how that meets the language model."""

    kind: str = key(
        "individual",
        "f_im: uniform (vanilla, user-blind), individual e_0 + o_i, or cluster V w_i.",
        choices=("uniform", "individual", "cluster"),
    )
    tokens: int = key(10, "T_u, vectors per user; 0 only with `uniform` (plain DPO).", low=0)
    clusters: int = key(5, "K, for `cluster`.", low=1)
    softmax: bool = key(False, "For `cluster`: use softmax(w_i) as the weights.")
    rank: int | None = key(
        None, "For `individual`: f(i) = e_0 + B z_i with z_i in R^rank; null: full offsets o_i (the paper).", low=1
    )
    shared: bool | None = key(
        None,
        "Whether f(i) has a shared component e_0: `individual` e_0 + o_i or o_i, `cluster` e_0 + V w_i or V w_i. null: true "
        "for individual, false for cluster (the paper).",
    )
    init: str = key(
        "vocabulary",
        "Start from sampled word embeddings (paper, A.3), from no differences between users, from noise, or (linear reward "
        "head, with a prior) from the exact solution for the backbone as it is before training.",
        choices=("vocabulary", "zero", "random", "solved"),
    )
    aggregator: str = key(
        "soft_prompt",
        "How e_u meets the LM: vectors before the prompt; or `linear`, behind the backbone: a linear layer over "
        "[last hidden state; e_u] (pdpo), the inner product of e_u and the last token's hidden state (prm).",
        choices=("soft_prompt", "linear"),
    )
    lr: float = key(
        1e-3, "Learning rate of the user model, of a linear aggregator and of a scalar reward head.", above=0
    )
    weight_decay: float = key(0.0, "AdamW's decay of what user_model.lr trains.", low=0)
    prior: float | str | None = key(
        None,
        "Gaussian prior on how users differ: by how much (a standard deviation) a user's reward margins lie from the generic "
        "user's; for soft prompts and pdpo in units of the word embeddings' standard deviation. auto: by cross-validation "
        "within the training data for a linear reward head, else 1. null: none (the paper).",
        choices=("auto",), above=0,
    )  # fmt: skip
    shared_prior: float | str | None = key(
        "auto",
        "The same for what users share, e_0, where there is a `prior`; auto: chosen with it for a linear reward head, else none.",
        choices=("auto",), above=0,
    )  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how much of it becomes tokens."""

    train: str | None = key(None, "Comparisons to learn from.")
    valid: str | None = key(None, "Held-out comparisons, for evaluation.")
    format: str = key(
        "auto",
        "JSON Lines or CSV, plain or .gz, or parquet (needs pyarrow); auto: by the file's name.",
        choices=("auto", "jsonl", "csv", "parquet"),
    )
    user_column: str = key("user", "Which field names the user.")
    attributes: tuple[str, ...] | None = key(
        None,
        "Make the user text of these of the record's `attributes` ({name: text}); null: the record's `user_text`.",
    )
    limit: int | None = key(None, "Train on a seeded sample of this many comparisons.", low=1)
    valid_limit: int | None = key(None, "Evaluate on a seeded sample of this many comparisons.", low=1)
    known_users: int | None = key(
        None, "Only the n users with most comparisons in data.train are known, all others are user 0; null: all.", low=1
    )
    template: str = key(
        "auto",
        "auto: message lists through the tokenizer's chat template, strings as they are; chat: a string becomes one user "
        "message; tulu, llama3: the same through that family's template, whatever the tokenizer's.",
        choices=("auto", "chat", "tulu", "llama3"),
    )
    user_text: bool = key(True, "Put `user_text` before the prompt where a comparison has one.")
    user_text_in_reference: bool = key(True, "The reference sees `user_text` too (the paper's code; false: eq. of 4).")
    max_prompt_tokens: int = key(512, "Longer prompts lose their oldest text.", low=1)
    min_prompt_tokens: int = key(16, "A prompt is never cut below this; the comparison is dropped instead.", low=1)
    max_user_text_tokens: int = key(256, "Longer user texts lose their end.", low=1)
    max_tokens: int = key(1024, "Most tokens of user text, prompt and the longer response together.", low=4)


@dataclass(frozen=True)
class LossConfig:
    """The preference loss and its two branches."""

    kind: str = key(
        "sigmoid",
        "Preference loss on the log-probs, applied to both branches (reward models: sigmoid).",
        choices=("sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"),
    )
    alpha: float = key(
        0.5,
        "Weight of the user branch; the generic branch has 1 - alpha. At 1 user 0 learns from unknown users, and in what all users share.",
        low=0,
        high=1,
    )
    beta: float = key(
        0.1, "Strength of the KL constraint (ORPO: weight of the odds-ratio term); no part of reward models.", above=0
    )
    label_smoothing: float = key(0.0, "Assumed share of flipped labels (sigmoid, robust).", low=0, high=0.499)
    nll: float = key(0.0, "Weight of an added NLL(y1) per token, which keeps the chosen responses likely (RPO).", low=0)
    gamma: float = key(0.5, "SimPO's target margin.", low=0)
    margin: float = key(0.0, "Reward models: y1 must win by this times the comparison's `margin` (1 if none).", low=0)
    center: float = key(0.0, "Reward models: weight of (r1 + r2)^2, which keeps rewards around zero.", low=0)


@dataclass(frozen=True)
class OptimConfig:
    """Updates: how many, of how many comparisons, how large."""

    solver: str = key(
        "auto",
        "exact: the optimum by L-BFGS, without a learning rate (frozen backbone and linear reward head, which need a prior); "
        "adamw; auto: exact where it can be.",
        choices=("auto", "adamw", "exact"),
    )
    lr: float = key(1e-6, "Learning rate of the backbone or its LoRA.", above=0)
    batch_size: int = key(32, "Comparisons per update, over all ranks.", low=1)
    micro_batch_size: int = key(
        8, "Comparisons per forward pass (those that are one tree count once); never changes the update.", low=1
    )
    group_by: str = key(
        "pair",
        "Which comparisons come into the same update, where they share work (`model.share_trees`): those of the same two "
        "responses; those of the same prompt and of few of its responses; or none.",
        choices=("none", "pair", "response"),
    )
    epochs: int = key(1, "Passes over the training data.", low=1)
    max_steps: int | None = key(None, "Stop after this many updates.", low=1)
    warmup_steps: int = key(0, "Updates of linear warm-up.", low=0)
    schedule: str = key("linear", "Learning rate after the warm-up.", choices=("linear", "cosine", "constant"))
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

    replicas: int = key(
        1, "Hybrid sharding: whole models, each spread over processes / replicas neighbours (a node, say).", low=1
    )
    offload: bool = key(
        False, "Weights, gradients and moments wait in host memory: slower, for GPUs that are too small."
    )


@dataclass(frozen=True)
class TrainConfig:
    """What a training run writes, and when."""

    log_every: int = key(10, "Updates between records in metrics.jsonl.", low=1)
    eval_every: int | None = key(None, "Updates between evaluations; null: only after the last.", low=1)
    eval_last: bool = key(True, "Evaluate after the last update too.")
    save_every: int | None = key(100, "Updates between checkpoints; null: only at the end.", low=1)
    keep_checkpoints: int = key(2, "Newest checkpoints to keep, beside the best.", low=1)
    final: str = key("last", "Which weights become RUN_DIR/final.", choices=("last", "best"))
    best_by: str = key(
        "loss",
        "What makes an evaluation the best: the lower held-out loss, or known users' higher held-out accuracy (where equal, "
        "the lower loss).",
        choices=("loss", "accuracy"),
    )
    patience: int | None = key(
        None,
        "Early stopping: stop after this many evaluations in a row without a new best; null: never. The learning rate's "
        "schedule stays that of all updates.",
        low=1,
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
    """Everything a run is determined by, beside the data and the base model."""

    method: str = key(
        "pdpo",
        "pdpo: a personalised language model; prm: a personalised reward model (Bradley-Terry); "
        "pairwise: a preference model that reads both responses and answers A or B.",
        choices=("pdpo", "prm", "pairwise"),
    )
    run_dir: str | None = key(None, "Where the run lives; null: runs/NAME of the config.")
    seed: int = key(0, "Seed of everything random.", low=0, high=2**32 - 1)
    device: str = key("auto", "auto is cuda where there is one, else cpu.", choices=("auto", "cpu", "cuda"))
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


def keys() -> Iterator[tuple[str, dataclasses.Field]]:
    """All keys as ('optim.lr', its dataclass field), in order of declaration."""
    for outer in dataclasses.fields(Config):
        if dataclasses.is_dataclass(outer.type):
            for inner in dataclasses.fields(outer.type):
                yield f"{outer.name}.{inner.name}", inner
        else:
            yield outer.name, outer


KEYS = dict(keys())


def type_name(declared: dataclasses.Field) -> str:
    """'int or null', 'float', 'llama | gptj': what a value may be, in words."""
    options = typing.get_args(declared.type) if isinstance(declared.type, types.UnionType) else (declared.type,)
    words = []
    for option in options:
        if option is str and declared.metadata["choices"]:
            words.append(" | ".join(declared.metadata["choices"]))
        elif option is types.NoneType:
            words.append("null")
        else:
            words.append(
                {str: "string", bool: "true | false", int: "int", float: "number"}.get(option, "list of strings")
            )
    return " or ".join(words)


def is_linear(config: Config) -> bool:
    """Whether the reward is linear in the user's vector: a reward model with a linear head."""
    return config.method == "prm" and config.user_model.aggregator == "linear"


def solves_exactly(config: Config) -> bool:
    """Whether a run of this config is an exact solution, without updates."""
    has_priors = None not in (config.user_model.prior, config.user_model.shared_prior)
    return is_linear(config) and config.model.frozen and has_priors and config.optim.solver != "adamw"
