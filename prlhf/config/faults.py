"""Faults between config keys: values that are good by themselves and do not go together."""

from collections.abc import Iterator

from prlhf.config.keys import Config, is_linear, solves_exactly

Fault = tuple[str, str]  # the key, and what is wrong with it


def cross_faults(config: Config) -> Iterator[Fault]:
    """Every fault that lies between keys."""
    model, lora = config.model, config.lora
    full = lora.rank == 0 and not model.frozen
    if (model.name is None) == (model.family is None):
        yield "model.name", "expected either model.name (a folder or hub name) or model.family (random weights)"
    if model.family and model.width % (2 * model.heads):
        yield "model.width", f"found {model.width}, expected a multiple of 2 * model.heads"
    if model.dtype != "float32" and full and not model.pure_half:
        better = "float32 (with model.compute_dtype bfloat16), lora.rank > 0, model.frozen or model.pure_half"
        yield "model.dtype", f"found {model.dtype!r}, which loses full fine-tuning's small updates; expected {better}"
    if model.compute_dtype is not None and (model.dtype != "float32" or not full):
        yield "model.compute_dtype", f"found {model.compute_dtype!r}, expected null, or full fine-tuning in float32"
    if model.recompute == "elementwise" and model.compile:
        yield "model.recompute", "found 'elementwise', expected 'blocks' with model.compile (a block is one operation)"
    if model.frozen and lora.rank:
        yield "lora.rank", f"found {lora.rank}, expected 0 with model.frozen"
    if lora.targets == ():
        yield "lora.targets", "found no names, expected some, or null for all of the family's"
    if model.pooling != "last" and config.method != "prm":
        yield "model.pooling", f"found {model.pooling!r}, expected 'last' for method {config.method}"
    if config.data.min_prompt_tokens > config.data.max_prompt_tokens:
        yield "data.min_prompt_tokens", "expected at most data.max_prompt_tokens"
    yield from _method_faults(config)
    yield from _user_faults(config)
    yield from _training_faults(config)


def _method_faults(config: Config) -> Iterator[Fault]:
    """What the method has no use for."""
    method, loss = config.method, config.loss
    if loss.label_smoothing and loss.kind not in ("sigmoid", "robust"):
        yield "loss.label_smoothing", f"not part of loss.kind {loss.kind!r}, expected 0"
    for name, value in (("margin", loss.margin), ("center", loss.center)):
        if method == "pdpo" and value:
            yield f"loss.{name}", f"found {value:g}, expected 0: it is part of reward models"
    if method != "pdpo" and loss.kind != "sigmoid":
        yield "loss.kind", f"found {loss.kind!r}, expected 'sigmoid' (Bradley-Terry) for method {method}"
    if method != "pdpo" and loss.nll:
        yield "loss.nll", f"found {loss.nll:g}, expected 0: method {method} has no likelihood of responses"
    if method == "pairwise" and loss.center:
        yield "loss.center", f"found {loss.center:g}, expected 0: method pairwise has no rewards to centre"
    if method == "pairwise" and config.user_model.aggregator == "linear":
        yield "user_model.aggregator", "found 'linear', expected 'soft_prompt' for method pairwise"


def _user_faults(config: Config) -> Iterator[Fault]:
    """What the user model, its prior and the exact solver need."""
    users, linear = config.user_model, is_linear(config)
    if users.tokens == 0 and users.kind != "uniform":
        yield "user_model.tokens", f"found 0, expected at least 1 for user_model.kind {users.kind!r}"
    if users.tokens == 0 and users.aggregator == "linear":
        yield "user_model.tokens", "found 0, expected at least 1 for user_model.aggregator 'linear'"
    if users.tokens == 0 and config.model.frozen and config.method != "prm":
        yield "user_model.tokens", "found 0, with which a frozen model has nothing to train; expected at least 1"
    if users.tokens != 1 and linear:
        yield "user_model.tokens", f"found {users.tokens}, expected 1: the linear reward head is one vector e_u"
    soft = config.method != "pairwise" and users.aggregator == "soft_prompt"
    if users.place != "before_prompt" and not soft:
        who = (
            "method pairwise"
            if config.method == "pairwise"
            else "user_model.aggregator 'linear', which has no soft prompt"
        )
        yield "user_model.place", f"found {users.place!r}, expected 'before_prompt' with {who}"
    elif users.place == "response_end" and config.method != "prm":
        yield (
            "user_model.place",
            f"found 'response_end', expected another for method {config.method}: it is for rewards",
        )
    elif users.place == "response_end" and config.model.pooling != "last":
        pooling = "expected 'last' with user_model.place 'response_end': the response does not read the user"
        yield "model.pooling", f"found {config.model.pooling!r}, {pooling}"
    if users.kind == "individual" and users.rank is not None and users.shared is False:
        yield "user_model.shared", "found false, expected true or null with user_model.rank: what users share is e_0"
    if users.kind == "cluster" and users.shared and users.softmax and users.prior is not None:
        generic = "weights that sum to 1 are never 0, as the generic user's must be"
        yield "user_model.softmax", f"found true, expected false with user_model.shared and a prior: {generic}"
    without = [f"user_model.{name}" for name in ("prior", "shared_prior") if getattr(users, name) is None]
    if users.init == "solved" and not linear:
        yield "user_model.init", "found 'solved', expected another: only a linear reward head (method prm) is solved"
    elif users.init == "solved" and without:
        yield "user_model.init", f"found 'solved', which needs a prior; expected {' and '.join(without)}"
    if config.optim.solver == "exact" and not solves_exactly(config):
        needs = [] if linear else ["method prm with user_model.aggregator linear"]
        needs += [] if config.model.frozen else ["model.frozen"]
        yield "optim.solver", f"found 'exact', which needs {', '.join([*needs, *without])}; expected these, or adamw"
    if solves_exactly(config) and users.weight_decay:
        yield "user_model.weight_decay", f"found {users.weight_decay:g}, expected 0: an exact solution has the prior"


def _training_faults(config: Config) -> Iterator[Fault]:
    """What needs evaluations, or updates."""
    train, valid = config.train, config.data.valid
    for name, value, asked in (("final", "best", train.final), ("best_by", "accuracy", train.best_by)):
        if asked == value and train.eval_every is None and not train.eval_last:
            yield f"train.{name}", f"{value!r} needs evaluations: train.eval_every or train.eval_last"
        if asked == value and valid is None:
            yield f"train.{name}", f"{value!r} needs data.valid"
    if train.patience is not None and train.eval_every is None:
        yield "train.patience", f"found {train.patience}, which needs evaluations during training: train.eval_every"
    if train.patience is not None and valid is None:
        yield "train.patience", f"found {train.patience}, which needs data.valid"
    if train.patience is not None and solves_exactly(config):
        yield "train.patience", f"found {train.patience}, expected null: an exact solution has no updates to stop"
    if train.final == "best" and solves_exactly(config):
        yield "train.final", "found 'best', expected 'last': an exact solution has no updates to choose from"
