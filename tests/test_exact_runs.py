"""Runs that solve a linear reward head, in place of updates or before the first one, through the public commands."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TOKENIZER, tiny_config
from safetensors.torch import load_file

from prlhf.batch.datasets import encode_training_data
from prlhf.data.comparisons import read_comparisons
from prlhf.errors import UserError
from prlhf.evaluate import __main__ as evaluate
from prlhf.forecast.dry_run import predict, render
from prlhf.generate import __main__ as generate
from prlhf.score.score import score
from prlhf.solve import linear as solve
from prlhf.solve import strength
from prlhf.solve.run import LARGEST, check_size
from prlhf.store.final import load_final
from prlhf.train import __main__ as train
from prlhf.train import loop

ROOT = Path(__file__).resolve().parent.parent
HEAD = (
    "model.width=32", "model.heads=2", "method=prm", "user_model.aggregator=linear", "user_model.tokens=1", "user_model.rank=2",
    "model.pooling=both", "evaluate.bootstrap=100",
)  # fmt: skip
GIVEN = (*HEAD, "user_model.prior=2", "user_model.shared_prior=1")
EXACT = (*GIVEN, "model.frozen=true")
SOLVED = (
    *GIVEN,
    "user_model.init=solved",
    "lora.rank=2",
    "lora.dropout=0.2",
    "optim.max_steps=4",
    "train.save_every=2",
    "train.log_every=1",
)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def command(run, *overrides):
    return ("--config", "tiny", "--set", f"run_dir={run}", *overrides)


def records(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = {"comparisons_per_s", "tokens_per_s", "peak_memory_gb"}
    return [{k: v for k, v in r.items() if k not in clock} for r in found]


def test_an_exact_run_through_all_commands(call, tmp_path, monkeypatch):
    monkeypatch.setattr(strength, "USERS", (0.0, 1.0, 4.0))
    monkeypatch.setattr(strength, "SHARED", (1.0, 4.0))
    run, keys = tmp_path / "run", (*HEAD, "model.frozen=true", "user_model.prior=auto")
    status, _, err = call(train.main, *command(run, *keys))
    assert status == 0, err
    assert not (run / "checkpoints").exists()
    solved, held_out = records(run)
    assert (solved["step"], solved["solver"], held_out["step"], held_out["eval"]) == (1, "exact", 1, True)
    losses = solved["held_out_loss_by_prior"]
    assert set(losses) == {"0", "1", "4"} and solved["prior"] > 0
    assert losses[f"{solved['prior']:g}"] == min(losses.values())
    assert held_out["training_accuracy"] == solved["user_accuracy"]
    assert held_out["overfitting"] == pytest.approx(solved["user_accuracy"] - held_out["accuracy_top"])

    assert call(evaluate.main, "--checkpoint", run)[0] == 0
    report = json.loads((run / "eval" / "report.json").read_text())
    assert held_out["accuracy_top"] == report["accuracy"]["top"]
    # What is logged of the training data is what the saved model says of them, in float32.
    assert (
        call(evaluate.main, "--checkpoint", run, "--data", "examples/tiny/train.jsonl", "--out", tmp_path / "train")[0]
        == 0
    )
    margins = [json.loads(line) for line in (tmp_path / "train" / "margins.jsonl").read_text().splitlines()]
    own = [m["true"] for m in margins if m["known"]]
    assert sum(m > 0 for m in own) / len(own) == pytest.approx(solved["user_accuracy"])

    responses, out = tmp_path / "responses.jsonl", tmp_path / "rewards.jsonl"
    lines = [json.loads(line) for line in Path("examples/tiny/train.jsonl").read_text().splitlines()][:4]
    rows = [
        {**r, "id": f"{i} {side}", "response": r[side]} for i, r in enumerate(lines) for side in ("chosen", "rejected")
    ]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(generate.main, "--checkpoint", run, "--score", responses, "--out", out)[0] == 0
    rewards = {r["id"]: r["reward"] for r in map(json.loads, out.read_text().splitlines())}
    for i, m in enumerate(margins[:4]):
        assert rewards[f"{i} chosen"] - rewards[f"{i} rejected"] == pytest.approx(m["true"], abs=1e-4)
    status, said, _ = call(train.main, *command(run, *keys))
    assert status == 0 and "is finished" in said and len(records(run)) == 2
    status, _, err = call(train.main, *command(run, *keys, "user_model.prior=1"))
    assert status == 2 and "another config" in err and "user_model.prior: 'auto' -> 1.0" in err


@pytest.mark.parametrize("moment", ["solving", "evaluating", "saving"])
def test_an_exact_run_that_is_killed_starts_anew(call, tmp_path, monkeypatch, moment):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call(train.main, *command(whole, *EXACT))[0] == 0
    module, name = {"solving": (train, "set_prior"), "evaluating": (loop, "evaluate"), "saving": (train, "save_final")}[
        moment
    ]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        assert call(train.main, *command(run, *EXACT))[0] == 130
    if moment != "solving":
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 1, "ev')  # cut short
    assert call(train.main, *command(run, *EXACT))[0] == 0
    assert records(run) == records(whole) and len(records(run)) == 2
    one, other = (load_file(folder / "final" / "users.safetensors") for folder in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_solution_that_the_search_has_not_reached_is_told(call, tmp_path, monkeypatch):
    """A search of one iteration gives a warning. Users who may not differ give none, whatever their own gradients are."""
    status, said, _ = call(train.main, *command(tmp_path / "whole", *EXACT))
    assert status == 0 and "not exact" not in said and records(tmp_path / "whole")[0]["largest_gradient"] < 1e-6
    monkeypatch.setattr(strength, "USERS", (0.0,))
    status, said, _ = call(train.main, *command(tmp_path / "alike", *EXACT, "user_model.prior=auto"))
    assert status == 0 and "not exact" not in said and records(tmp_path / "alike")[0]["prior"] == 0
    monkeypatch.setattr(solve, "ITERATIONS", 1)
    status, said, _ = call(train.main, *command(tmp_path / "cut", *EXACT))
    slope = records(tmp_path / "cut")[0]["largest_gradient"]
    assert status == 0 and slope > 1e-4 and f"the objective's largest gradient is {slope:.1e}" in said


def test_a_training_that_starts_solved_has_the_rewards_of_the_exact_solution(call, tmp_path, monkeypatch):
    """For all training comparisons, read by their users and by user 0, before the first update."""
    exact, run, found = tmp_path / "exact", tmp_path / "run", {}
    take_step = loop.take_step

    def noted(task, *rest):
        model, comparisons = task.model, task.comparisons
        for name, users in (("own", [c.user for c in comparisons]), ("generic", [0] * len(comparisons))):
            found.setdefault(name, score(model, comparisons, users, 16))
        return take_step(task, *rest)

    monkeypatch.setattr(loop, "take_step", noted)
    assert call(train.main, *command(exact, *EXACT))[0] == 0 and not found
    assert call(train.main, *command(run, *SOLVED))[0] == 0 and found
    loaded = load_final(exact)
    file = read_comparisons("examples/tiny/train.jsonl", loaded.config.data)
    _, encoded, _ = encode_training_data(loaded.config, loaded.tokenizer, file, None)
    for name, own in (("own", True), ("generic", False)):
        expected = score(loaded.model, encoded.comparisons, [c.user * own for c in encoded.comparisons], 16)
        assert expected.chosen.abs().max() > 0.1
        for side in ("chosen", "rejected"):
            assert (getattr(found[name], side) - getattr(expected, side)).abs().max() < 1e-5
    first, *others = records(run)
    assert first["step"] == 0 and first["prior"] == 2 and "solver" not in first
    assert [r["step"] for r in others if not r.get("eval")] == [1, 2, 3, 4]
    solved = records(exact)[0]
    assert all(first[key] == solved[key] for key in ("objective", "loss", "user_accuracy"))


def test_a_training_that_starts_solved_is_resumed_bit_for_bit(call, tmp_path, monkeypatch):
    assert call(train.main, *command(tmp_path / "whole", *SOLVED))[0] == 0
    save, run = loop.save_step, tmp_path / "cut"

    def stop_after(folder, model, optimizer, users, state):
        save(folder, model, optimizer, users, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_step", stop_after)
        assert call(train.main, *command(run, *SOLVED))[0] == 130
    status, _, err = call(train.main, *command(run, *SOLVED))
    assert status == 0 and "resuming after update 2" in err
    for file in ("users.safetensors", "adapter_model.safetensors"):
        one, other = (load_file(folder / "final" / file) for folder in (run, tmp_path / "whole"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert records(run) == records(tmp_path / "whole") and [r["step"] for r in records(run)].count(0) == 1


def prediction_of(*overrides):
    config = tiny_config(
        "data.train=examples/tiny/train.jsonl", "data.valid=examples/tiny/valid.jsonl", *HEAD, *overrides
    )
    files = (read_comparisons(path, config.data) for path in (config.data.train, config.data.valid))
    data = encode_training_data(config, TOKENIZER, *files)
    return config, data, predict(config, TOKENIZER, data, "cpu", available=10**12)


def test_a_dry_run_of_an_exact_solution_has_no_updates(tmp_path, call):
    _, data, prediction = prediction_of("user_model.prior=auto", "model.frozen=true", "model.dtype=bfloat16")
    memory, P = prediction.memory, 64 + 2 * 64 + len(data.users) * 2
    both = [*data.train.comparisons, *data.valid.comparisons]
    responses = {(tuple(c.prefix), tuple(y)) for c in both for y in (c.chosen, c.rejected)}
    assert memory.states > len(responses) * 64 * 4  # in float32, whatever the backbone's type
    assert memory.temporaries > 0
    assert (memory.gradients, memory.optimizer, memory.activations, memory.host) == (0, 0, 0, 0)
    assert (prediction.updates, prediction.largest, prediction.checkpoint, prediction.checkpoints) == (0, None, 0, 0)
    assert prediction.parameters["user model"] == (P, P) and prediction.parameters["backbone"].trained == 0
    said = render(prediction)
    assert "solved exactly (optim.solver): no updates" in said and "fits: " in said
    assert not any(word in said for word in ("gradients", "AdamW", "activations", "checkpoint", "an epoch"))

    run = tmp_path / "run"
    status, said, err = call(train.main, *command(run, *EXACT), "--dry-run")
    assert status == 0 and "solved exactly (optim.solver): no updates" in said and not run.exists(), err


def test_a_dry_run_of_a_training_that_chooses_its_prior_counts_that():
    small = ("lora.rank=2", "data.limit=8", "optim.batch_size=4", "optim.micro_batch_size=2", "evaluate.batch_size=2")
    _, _, chosen = prediction_of("user_model.prior=auto", *small)
    _, _, without = prediction_of(*small)
    assert chosen.memory.peaks["choosing the prior"] > chosen.memory.process
    assert "choosing the prior" not in without.memory.peaks and chosen.updates == without.updates > 0


def test_more_rewards_than_can_be_solved_at_once_are_refused():
    check_size(9, LARGEST // 10)
    with pytest.raises(
        UserError, match=r"user_model.prior: 10 users and .* are too many to be solved at once.*data.limit"
    ):
        check_size(10, LARGEST // 10)
