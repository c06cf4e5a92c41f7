"""The configuration: frozen dataclasses, merged as defaults < YAML < --set, with all faults told at once.

Every key is declared once, here, with its default, its range and one sentence about it; the README's table is made
from these declarations.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prlhf.errors import UserError, did_you_mean

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


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


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts, as config.yaml holds it."""
    plain = {"dict_factory": lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}}
    return dataclasses.asdict(config, **plain)


def dump(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differing_keys(one: Config, other: Config) -> list[str]:
    """'optim.lr: 0.001 -> 0.01' for every key in which two configs differ."""
    a, b = _flatten(to_dict(one)), _flatten(to_dict(other))
    return [f"{name}: {a[name]!r} -> {b[name]!r}" for name in KEYS if a[name] != b[name]]


def find(name: str) -> Path:
    """The config file `name`, as given or in configs/. UserError where there is none."""
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    raise UserError(f"config {name!r} not found, neither as given nor in {CONFIGS}{did_you_mean(name, known)}")


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read defaults < YAML file < ['optim.lr=1e-4', ...]. UserError with *all* faults, each with file, line and key."""
    faults: list[str] = []
    values: dict[str, tuple[Any, str]] = {}  # dotted key -> (value, where it was said)
    if path is not None:
        values.update(_read_yaml(Path(path), faults))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            faults.append(f"--set {text}: expected key=value")
            continue
        try:
            values[name.strip()] = (yaml.safe_load(value), f"--set {text}")
        except (yaml.YAMLError, ValueError):
            faults.append(f"--set {text}: {value!r} is not a YAML value")

    good: dict[str, Any] = {}
    for name, (value, where) in values.items():
        try:
            good[name] = _checked(name, value)
        except ValueError as error:
            faults.append(f"{where}: {error}")
    config = _build(good)
    faults += _cross_faults(config, {name: where for name, (_, where) in values.items()})
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{count} in the config:\n" + "\n".join(f"  {fault}" for fault in faults))
    return config


def load_resolved(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A config.yaml that a run wrote, with every key that there was.

    Before there was user_model.rank, shared: true stood in each of them, and counted for `individual` alone: null, now.
    """
    said = {name: value for name, (value, _) in _read_yaml(Path(path), []).items()}
    early = "user_model.rank" not in said and said.get("user_model.shared") is True
    return load(path, [*(["user_model.shared=null"] if early else []), *overrides])


def _flatten(nested: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat


def _build(flat: dict[str, Any]) -> Config:
    groups: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in flat.items():
        group, dot, inner = name.partition(".")
        if dot:
            groups.setdefault(group, {})[inner] = value
        else:
            top[name] = value
    default = Config()
    return dataclasses.replace(
        default, **top, **{name: dataclasses.replace(getattr(default, name), **group) for name, group in groups.items()}
    )


def _read_yaml(path: Path, faults: list[str]) -> dict[str, tuple[Any, str]]:
    """Dotted key -> (value, 'file, line n, key'), straight from the YAML nodes, which know their lines."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    values: dict[str, tuple[Any, str]] = {}
    if root is None:
        return values
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line 1: expected `key: value` lines, found a {root.id}")
    constructor = yaml.SafeLoader("")

    def visit(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            name = prefix + str(key_node.value)
            where = f"{path}, line {key_node.start_mark.line + 1}, {name}"
            if name in values:
                faults.append(f"{where}: given twice")
            if isinstance(value_node, yaml.MappingNode) and not prefix:
                if name not in _group_names():
                    faults.append(f"{where}: no such group{did_you_mean(name, _group_names())}")
                else:
                    visit(value_node, f"{name}.")
            else:
                try:
                    values[name] = (constructor.construct_object(value_node, deep=True), where)
                except (yaml.YAMLError, ValueError):
                    faults.append(f"{where}: {getattr(value_node, 'value', '')!r} is not a plain YAML value")

    visit(root, "")
    return values


def _group_names() -> list[str]:
    return [outer.name for outer in dataclasses.fields(Config) if dataclasses.is_dataclass(outer.type)]


def _checked(name: str, value: Any) -> Any:
    """`value` in the type of the key `name`; ValueError with what was found and expected."""
    if name not in KEYS:
        if name in _group_names():
            raise ValueError(f"{name} is a group of keys, found {value!r}")
        raise ValueError(f"no such key{did_you_mean(name, KEYS)}")
    declared = KEYS[name]
    expected = type_name(declared)
    options = typing.get_args(declared.type) if isinstance(declared.type, types.UnionType) else (declared.type,)
    value = _coerced(value, options)
    allowed = tuple({typing.get_origin(o) or o for o in options})
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ValueError(f"found {value!r}, expected {expected}")
    if value is None or isinstance(value, bool):
        return value
    limits = declared.metadata
    if limits["choices"] and isinstance(value, str) and value not in limits["choices"]:
        raise ValueError(f"found {value!r}, expected {expected}{did_you_mean(str(value), limits['choices'])}")
    if isinstance(value, (int, float)):
        if not abs(value) < float("inf"):
            raise ValueError(f"found {value!r}, expected a finite number")
        for bound, fails, words in (
            ("low", lambda b: value < b, "at least"),
            ("high", lambda b: value > b, "at most"),
            ("above", lambda b: value <= b, "more than"),
        ):
            if limits[bound] is not None and fails(limits[bound]):
                raise ValueError(f"found {value!r}, expected {words} {limits[bound]}")
    return value


def _coerced(value: Any, options: Sequence[Any]) -> Any:
    """YAML's near misses: 1 for 1.0, '5e-5' (a string to YAML 1.1), a list of names for a tuple."""
    if float in options and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return value


def _cross_faults(config: Config, where: dict[str, str]) -> list[str]:
    """Faults that lie between keys."""
    faults = []

    def fault(name: str, text: str) -> None:
        faults.append(f"{where.get(name, name)}: {text}")

    if (config.model.name is None) == (config.model.family is None):
        fault("model.name", "expected either model.name (a folder or hub name) or model.family (random weights)")
    if config.model.family and config.model.width % (2 * config.model.heads):
        fault("model.width", f"found {config.model.width}, expected a multiple of 2 * model.heads")
    full = config.lora.rank == 0 and not config.model.frozen
    if config.model.dtype != "float32" and full and not config.model.pure_half:
        fault(
            "model.dtype",
            f"found {config.model.dtype!r}, in which the small updates of full fine-tuning round to "
            "nothing; expected float32 (with model.compute_dtype bfloat16), lora.rank > 0, model.frozen or "
            "model.pure_half",
        )
    if config.model.compute_dtype is not None and (config.model.dtype != "float32" or not full):
        fault(
            "model.compute_dtype",
            f"found {config.model.compute_dtype!r}, expected null with LoRA, a frozen model or half-type weights, which "
            "compute in model.dtype; or float32 weights and full fine-tuning",
        )
    if config.model.recompute == "elementwise" and config.model.compile:
        fault(
            "model.recompute",
            "found 'elementwise', expected 'blocks' with model.compile, whose blocks are one operation",
        )
    if config.lora.targets == ():
        fault("lora.targets", "found no names, expected some, or null for all of the family's")
    if config.user_model.tokens == 0 and config.user_model.kind != "uniform":
        fault("user_model.tokens", f"found 0, expected at least 1 for user_model.kind {config.user_model.kind!r}")
    if config.user_model.tokens == 0 and config.user_model.aggregator == "linear":
        fault("user_model.tokens", "found 0, expected at least 1 for user_model.aggregator 'linear'")
    if config.loss.label_smoothing and config.loss.kind not in ("sigmoid", "robust"):
        fault("loss.label_smoothing", f"not part of loss.kind {config.loss.kind!r}, expected 0")
    if config.model.frozen and config.lora.rank:
        fault("lora.rank", f"found {config.lora.rank}, expected 0 with model.frozen")
    if config.model.frozen and config.method != "prm" and config.user_model.tokens == 0:
        fault("user_model.tokens", "found 0, with which a frozen model has nothing to train; expected at least 1")
    _method_faults(config, fault)
    _user_faults(config, fault)
    if config.data.min_prompt_tokens > config.data.max_prompt_tokens:
        fault("data.min_prompt_tokens", "expected at most data.max_prompt_tokens")
    _train_faults(config, fault)
    return faults


def _train_faults(config: Config, fault: Callable[[str, str], None]) -> None:
    """Faults of keys that need evaluations."""
    train = config.train
    for name, value, asked in (("final", "best", train.final), ("best_by", "accuracy", train.best_by)):
        if asked == value and train.eval_every is None and not train.eval_last:
            fault(f"train.{name}", f"{value!r} needs evaluations: train.eval_every or train.eval_last")
        if asked == value and config.data.valid is None:
            fault(f"train.{name}", f"{value!r} needs data.valid")
    if train.patience is not None and train.eval_every is None:
        fault("train.patience", f"found {train.patience}, which needs evaluations during training: train.eval_every")
    if train.patience is not None and config.data.valid is None:
        fault("train.patience", f"found {train.patience}, which needs data.valid")


def _method_faults(config: Config, fault: Callable[[str, str], None]) -> None:
    """Faults of keys that the method has no use for."""
    method, loss, user_model = config.method, config.loss, config.user_model
    if method == "pdpo":
        for name, value in (("margin", loss.margin), ("center", loss.center)):
            if value:
                fault(f"loss.{name}", f"found {value:g}, expected 0: it is part of reward models")
        return
    if loss.kind != "sigmoid":
        fault("loss.kind", f"found {loss.kind!r}, expected 'sigmoid' (Bradley-Terry) for method {method}")
    if loss.nll:
        fault("loss.nll", f"found {loss.nll:g}, expected 0: method {method} has no likelihood of responses")
    if method == "pairwise" and loss.center:
        fault("loss.center", f"found {loss.center:g}, expected 0: method pairwise has no rewards to centre")
    if method == "prm" and user_model.aggregator == "linear" and user_model.tokens != 1:
        fault("user_model.tokens", f"found {user_model.tokens}, expected 1: the linear reward head is one vector e_u")
    if method == "pairwise" and user_model.aggregator == "linear":
        fault("user_model.aggregator", "found 'linear', expected 'soft_prompt' for method pairwise")


def is_linear(config: Config) -> bool:
    """Whether the reward is linear in the user's vector: a reward model with a linear head."""
    return config.method == "prm" and config.user_model.aggregator == "linear"


def solves_exactly(config: Config) -> bool:
    """Whether a run of this config is an exact solution, without updates."""
    has_priors = None not in (config.user_model.prior, config.user_model.shared_prior)
    return is_linear(config) and config.model.frozen and has_priors and config.optim.solver != "adamw"


def _user_faults(config: Config, fault: Callable[[str, str], None]) -> None:
    """Faults of user models, their prior, and the exact solver."""
    users, linear, exact = config.user_model, is_linear(config), solves_exactly(config)
    if users.kind == "individual" and users.rank is not None and users.shared is False:
        fault("user_model.shared", "found false, expected true or null with user_model.rank: what users share is e_0")
    if config.model.pooling != "last" and config.method != "prm":
        fault("model.pooling", f"found {config.model.pooling!r}, expected 'last' for method {config.method}")
    without = [f"user_model.{name}" for name in ("prior", "shared_prior") if getattr(users, name) is None]
    if users.init == "solved" and not linear:
        fault("user_model.init", "found 'solved', expected another: only a linear reward head (method prm) is solved")
    elif users.init == "solved" and without:
        fault("user_model.init", f"found 'solved', which needs a prior; expected {' and '.join(without)}")
    if config.optim.solver == "exact" and not exact:
        needs = [] if linear else ["method prm with user_model.aggregator linear"]
        needs += [] if config.model.frozen else ["model.frozen"]
        fault("optim.solver", f"found 'exact', which needs {', '.join([*needs, *without])}; expected these, or adamw")
    if users.kind == "cluster" and users.shared and users.softmax and users.prior is not None:
        fault("user_model.softmax", "found true, expected false with user_model.shared and a prior: weights of sum 1 are never 0, "
              "so that nobody would be the generic user")  # fmt: skip
    if exact and config.train.patience is not None:
        fault(
            "train.patience", f"found {config.train.patience}, expected null: an exact solution has no updates to stop"
        )
    if exact and config.train.final == "best":
        fault("train.final", "found 'best', expected 'last': an exact solution has no updates to choose from")
    if exact and users.weight_decay:
        fault("user_model.weight_decay", f"found {users.weight_decay:g}, expected 0: an exact solution has the prior")
