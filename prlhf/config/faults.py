"""Faults that lie between config keys."""

from collections.abc import Callable

from prlhf.config.keys import Config, is_linear, solves_exactly


def cross_faults(config: Config, where: dict[str, str]) -> list[str]:
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
