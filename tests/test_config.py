import dataclasses
import datetime

import pytest

from prlhf.config import load as config_module
from prlhf.config.keys import KEYS
from prlhf.config.load import CONFIGS, load_config
from prlhf.errors import UserError


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def message(path, *overrides):
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    return str(error.value)


def test_defaults_then_yaml_then_set(tmp_path):
    path = write(tmp_path, "model: {family: gptj}\noptim:\n  lr: 1.0e-4\n  epochs: 3\n")
    config = load_config(path, ["optim.lr=2e-5", "data.limit=7"])
    assert (config.optim.lr, config.optim.epochs, config.optim.batch_size, config.data.limit) == (2e-5, 3, 32, 7)
    assert config.model.family == "gptj"


def test_all_faults_are_told_at_once_with_file_line_and_key(tmp_path):
    path = write(
        tmp_path,
        "model:\n  family: lama\n"  # line 2: near match
        "loss:\n  alhpa: 0.5\n"  # line 4: no such key
        "  beta: strong\n"  # line 5: wrong type
        "optim:\n  batch_size: 0\n"  # line 7: out of range
        "lorra:\n  rank: 8\n"  # line 8: no such group
        "seed: true\n",  # line 10: bool is not int
    )
    text = message(path, "loss.alpha=1.5", "data.limt=3", "nonsense")
    for part in (
        f"{path}, line 2, model.family: found 'lama', expected llama | gptj or null (did you mean 'llama'?)",
        f"{path}, line 4, loss.alhpa: no such key (did you mean 'loss.alpha'?)",
        f"{path}, line 5, loss.beta: found 'strong', expected number",
        f"{path}, line 7, optim.batch_size: found 0, expected at least 1",
        f"{path}, line 8, lorra: no such group (did you mean 'lora'?)",
        f"{path}, line 10, seed: found True, expected int",
        "--set loss.alpha=1.5: found 1.5, expected at most 1",
        "--set data.limt=3: no such key (did you mean 'data.limit'?)",
        "--set nonsense: expected key=value",
    ):
        assert part in text
    assert text.startswith("10 faults")  # the nine, and that neither model.name nor a right model.family is given


def test_a_mapping_and_a_date_come_back_from_the_file_that_a_run_writes(tmp_path):
    text = "model: {family: llama}\ndata:\n  template_date: 2024-07-26\n  template_args: {enable_thinking: false, depth: 3}\n"
    config = load_config(write(tmp_path, text))
    assert config.data.template_date == datetime.date(2024, 7, 26)
    assert config.data.template_args == {"enable_thinking": False, "depth": 3}
    assert load_config(write(tmp_path, config_module.dump(config))) == config
    assert load_config(write(tmp_path, text.replace("2024-07-26", "'2024-07-26'"))) == config
    faults = message(write(tmp_path, text), "data.template_date=today", "data.template_args=[a]")
    assert "found 'today', expected date or null" in faults and "expected names with values or null" in faults


@pytest.mark.parametrize(
    "value, good", [("5e-5", 5e-5), ("1", 1.0), (".inf", None), (".nan", None), ("true", None), ("[1]", None)]
)
def test_numbers(value, good):
    overrides = ["model.family=llama", f"optim.lr={value}"]
    if good is None:
        with pytest.raises(UserError, match="optim.lr"):
            load_config(None, overrides)
    else:
        assert load_config(None, overrides).optim.lr == good


LINEAR_HEAD = ("user_model.aggregator=linear", "user_model.tokens=1")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], "expected either model.name"),
        (["model.family=llama", "model.name=x"], "expected either model.name"),
        (["model.family=llama", "user_model.tokens=0"], "expected at least 1 for user_model.kind 'individual'"),
        (["model.family=llama", "loss.kind=ipo", "loss.label_smoothing=0.1"], "loss.label_smoothing"),
        (["model.family=llama", "train.final=best"], "'best' needs data.valid"),
        (["model.family=llama", "train.best_by=accuracy"], "train.best_by=accuracy: 'accuracy' needs data.valid"),
        (["model.family=llama", "train.best_by=f1"], "found 'f1', expected loss | accuracy"),
        (["model.family=llama", "train.patience=0"], "found 0, expected at least 1"),
        (
            ["model.family=llama", "model.compile=true", "model.recompute=elementwise"],
            "expected 'blocks' with model.compile",
        ),
        (["model.family=llama", "model=3"], "model is a group of keys"),
        (["model.family=llama", "lora.targets=q_proj"], "expected list of strings or null"),
        (
            ["model.family=llama", "user_model.place=response_end"],
            "expected another for method pdpo: it is for rewards",
        ),
        (
            ["model.family=llama", "method=prm", "user_model.place=response_end", "model.pooling=both"],
            "model.pooling=both: found 'both', expected 'last' with user_model.place 'response_end'",
        ),
        (
            ["model.family=llama", "method=pairwise", "user_model.place=prompt_end"],
            "user_model.place=prompt_end: found 'prompt_end', expected 'before_prompt' with method pairwise",
        ),
        (
            ["model.family=llama", "user_model.place=prompt_end", "user_model.aggregator=linear"],
            "found 'prompt_end', expected 'before_prompt' with user_model.aggregator 'linear', which has no soft prompt",
        ),
        (
            ["model.family=llama", "method=prm", *LINEAR_HEAD, "user_model.place=response_end"],
            "found 'response_end', expected 'before_prompt' with user_model.aggregator 'linear'",
        ),
    ],
)
def test_faults_between_keys(overrides, expected):
    with pytest.raises(UserError, match=expected):
        load_config(None, overrides)


def test_a_reward_model_takes_its_users_at_each_place():
    for place in ("before_prompt", "prompt_end", "response_end"):
        keys = ("model.family=llama", "method=prm", f"user_model.place={place}")
        assert load_config(None, keys).user_model.place == place
    assert load_config(None, keys[:2]).user_model.place == "before_prompt"


def test_early_stopping_needs_evaluations_and_says_all_that_is_missing(tmp_path):
    path = write(
        tmp_path,
        "model: {family: llama}\ntrain:\n  patience: 2\n  eval_last: false\n  best_by: accuracy\n  final: best\n",
    )
    text = message(path)
    for part in (
        f"{path}, line 3, train.patience: found 2, which needs evaluations during training: train.eval_every",
        f"{path}, line 3, train.patience: found 2, which needs data.valid",
        f"{path}, line 5, train.best_by: 'accuracy' needs evaluations: train.eval_every or train.eval_last",
        f"{path}, line 5, train.best_by: 'accuracy' needs data.valid",
        f"{path}, line 6, train.final: 'best' needs evaluations: train.eval_every or train.eval_last",
        f"{path}, line 6, train.final: 'best' needs data.valid",
    ):
        assert part in text
    assert text.startswith("6 faults")
    load_config(path, ["train.eval_every=5", "data.valid=held_out.jsonl"])


FROZEN_HEAD = "method: prm\nmodel: {family: llama, frozen: true}\nuser_model:\n  tokens: 1\n  aggregator: linear\n"


def test_faults_of_user_models_are_told_at_once(tmp_path):
    path = write(
        tmp_path,
        "model: {family: llama, pooling: mean}\n"
        "user_model:\n  kind: individual\n  rank: 3\n  shared: false\n  init: solved\n"
        "optim:\n  solver: exact\n",
    )
    text = message(path)
    for part in (
        f"{path}, line 5, user_model.shared: found false, expected true or null with user_model.rank: what users share is e_0",
        f"{path}, line 1, model.pooling: found 'mean', expected 'last' for method pdpo",
        f"{path}, line 6, user_model.init: found 'solved', expected another: only a linear reward head (method prm) is solved",
        f"{path}, line 8, optim.solver: found 'exact', which needs method prm with user_model.aggregator linear, "
        "model.frozen, user_model.prior; expected these, or adamw",
    ):
        assert part in text
    assert text.startswith("4 faults")


def test_faults_of_an_exact_solution_are_told_at_once(tmp_path):
    path = write(
        tmp_path,
        FROZEN_HEAD + "  prior: auto\n  weight_decay: 0.1\ndata: {valid: held_out.jsonl}\ntrain:\n  final: best\n",
    )
    text = message(path)
    for part in (
        f"{path}, line 7, user_model.weight_decay: found 0.1, expected 0: an exact solution has the prior",
        f"{path}, line 10, train.final: found 'best', expected 'last': an exact solution has no updates to choose from",
    ):
        assert part in text
    assert text.startswith("2 faults")
    load_config(path, ["optim.solver=adamw"])
    load_config(path, ["user_model.weight_decay=0", "train.final=last"])


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            ["optim.solver=exact"],
            "optim.solver=exact: found 'exact', which needs user_model.prior; expected these, or adamw",
        ),
        (["optim.solver=exact", "user_model.prior=1", "model.frozen=false"], "which needs model.frozen; expected"),
        (
            ["optim.solver=exact", "user_model.prior=1", "user_model.shared_prior=null"],
            "which needs user_model.shared_prior;",
        ),
        (["user_model.init=solved"], "found 'solved', which needs a prior; expected user_model.prior"),
        (
            ["user_model.init=solved", "user_model.shared_prior=null"],
            "expected user_model.prior and user_model.shared_prior",
        ),
    ],
)
def test_faults_of_what_a_solution_needs(tmp_path, overrides, expected):
    text = message(write(tmp_path, FROZEN_HEAD), *overrides)
    assert expected in text and text.startswith("1 fault in")


@pytest.mark.parametrize(
    "value, expected",
    [
        ("Auto", "found 'Auto', expected number or auto or null (did you mean 'auto'?)"),
        ("strong", "found 'strong', expected number or auto or null"),
        ("0", "found 0.0, expected more than 0"),
        ("-1", "found -1.0, expected more than 0"),
        (".inf", "found inf, expected a finite number"),
        (".nan", "found nan, expected a finite number"),
        ("true", "found True, expected number or auto or null"),
        ("[1]", "found [1], expected number or auto or null"),
        ("'1.0'", 1.0),  # as every number that YAML takes for a string
        ("2", 2.0),
        ("auto", "auto"),
        ("null", None),
    ],
)
@pytest.mark.parametrize("name", ["prior", "shared_prior"])
def test_the_priors_values(name, value, expected):
    overrides = ["model.family=llama", f"user_model.{name}={value}"]
    if isinstance(expected, str) and expected != "auto":
        assert f"--set user_model.{name}={value}: {expected}" in message(None, *overrides)
    else:
        assert getattr(load_config(None, overrides).user_model, name) == expected


def test_a_config_that_a_run_wrote_before_there_were_shared_clusters(tmp_path):
    path = write(tmp_path, "model: {family: llama}\nuser_model: {kind: cluster, shared: true}\n")
    assert load_config(path).user_model.shared is True
    assert config_module.load_resolved(path).user_model.shared is None
    path = write(tmp_path, "model: {family: llama}\nuser_model: {kind: cluster, rank: null, shared: true}\n")
    assert config_module.load_resolved(path).user_model.shared is True
    path = write(tmp_path, "model: {family: llama}\nuser_model: {shared: false}\n")
    assert config_module.load_resolved(path).user_model.shared is False


REPLACED_KEYS = [  # what earlier configs said, and the value of model.recompute that does the same
    ("gradient_checkpointing: false", "cheap"),
    ("gradient_checkpointing: false\n  checkpoint_every: 2\n  recompute: elementwise", "cheap"),
    ("gradient_checkpointing: false\n  checkpoint_every: 1\n  recompute: blocks", "cheap"),
    ("gradient_checkpointing: true", "blocks"),
    ("gradient_checkpointing: true\n  checkpoint_every: 1\n  recompute: blocks", "blocks"),
    ("gradient_checkpointing: true\n  checkpoint_every: 3\n  recompute: blocks", "every:3"),
    ("gradient_checkpointing: true\n  checkpoint_every: 2\n  recompute: elementwise", "elementwise"),
]


@pytest.mark.parametrize("said, now", REPLACED_KEYS)
def test_replaced_keys_are_refused_with_the_new_one_and_read_in_a_runs_config(tmp_path, said, now):
    path = write(tmp_path, f"model:\n  family: llama\n  {said}\n")
    where = f"{path}, line 3, model.gradient_checkpointing: replaced by `model.recompute: {now}`, which does the same"
    assert where in message(path)
    assert config_module.load_resolved(path).model.recompute == now
    assert config_module.load_resolved(path, ["model.recompute=none"]).model.recompute == "none"
    with pytest.raises(UserError, match="--set model.checkpoint_every=2: replaced by `model.recompute: "):
        config_module.load_resolved(path, ["model.checkpoint_every=2"])


def test_every_nth_block(tmp_path):
    overrides = ["model.family=llama", "model.recompute=every:12"]
    path = write(tmp_path, "model: {family: llama, recompute: every:12}")
    assert load_config(None, overrides) == load_config(path)
    assert load_config(path).model.recompute == "every:12"
    for value in ("every:0", "every:N", "every:-1", "every", "every:2.5"):
        text = message(None, "model.family=llama", f"model.recompute={value}")
        assert f"found '{value}', expected none | cheap | elementwise | blocks | every:N" in text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: [1", "line 1"),
        ("- 1\n", "expected `key: value`"),
        ("seed: 1\nseed: 2\nmodel: {family: llama}", "given twice"),
    ],
)
def test_broken_yaml(tmp_path, text, expected):
    assert expected in message(write(tmp_path, text))


def test_not_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(path)


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(None, ["model.family=llama", "lora.targets=[q_proj]", "optim.lr=3e-7", "run_dir=/tmp/x"])
    path = write(tmp_path, config_module.dump(config))
    assert load_config(path) == config


def test_differing_keys():
    one, other = load_config(None, ["model.family=llama"]), load_config(None, ["model.family=gptj", "loss.beta=0.3"])
    assert config_module.differing_keys(one, other) == ["model.family: 'llama' -> 'gptj'", "loss.beta: 0.1 -> 0.3"]


def test_a_config_is_found_in_configs_or_named_with_a_near_match():
    assert config_module.find_config("tiny.yaml") == config_module.find_config("tiny") == CONFIGS / "tiny.yaml"
    with pytest.raises(UserError, match="did you mean 'tiny.yaml'"):
        config_module.find_config("tinny.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_of_the_project_loads(path):
    load_config(path)


def test_configs_are_frozen_and_every_key_has_a_sentence():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(None, ["model.family=llama"]).seed = 3
    assert all(declared.metadata["doc"].endswith(".") for declared in KEYS.values())
