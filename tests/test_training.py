"""Whole runs of the tiny config through the public commands, in this process unless one is to be killed."""

import errno
import fcntl
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import gradients, random_comparisons, tiny_config, tiny_model
from safetensors.torch import load_file

from prlhf.config import load as config
from prlhf.data.comparisons import read_comparisons
from prlhf.data.users import UserIndex
from prlhf.errors import TrainingError, UserError
from prlhf.score.score import score
from prlhf.score.task import Task
from prlhf.store import checkpoints as checkpoint
from prlhf.store.files import checksum
from prlhf.store.final import load_final
from prlhf.store.runs import open_run
from prlhf.train import __main__ as train_script
from prlhf.train import loop
from prlhf.train import step as updates
from prlhf.train.log import Sums
from prlhf.train.optimizer import learning_rate_factor
from prlhf.train.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "model.width=32", "model.heads=2", "optim.epochs=2", "data.limit=24", "data.valid_limit=8", "optim.batch_size=4",
    "train.save_every=2", "train.eval_every=5", "train.log_every=3", "lora.rank=2", "lora.dropout=0.3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def command(run_dir, *overrides, flags=()):
    return ["train.py", "--config", "tiny.yaml", "--set", f"run_dir={run_dir}", *SHORT, *overrides, *flags]


def run(monkeypatch, run_dir, *overrides, flags=()):
    monkeypatch.setattr(sys, "argv", command(run_dir, *overrides, flags=flags))
    train_script.main()


def weights(run_dir):
    final = Path(run_dir) / "final"
    return {f"{p.name}:{k}": v for p in sorted(final.glob("*.safetensors")) for k, v in load_file(p).items()}


def step_tensors(path):
    """What a checkpoint of one process holds, by name."""
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def records(run_dir):
    found = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    clock = {"comparisons_per_s", "tokens_per_s", "peak_memory_gb"}
    return [{k: v for k, v in r.items() if k not in clock} for r in found]


def test_a_run_leaves_what_it_promises(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "a")
    found = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    for name in ("config.yaml", "metrics.jsonl", "final/users.safetensors", "final/users.json", "final/config.yaml",
                 "final/adapter_model.safetensors", "final/tokenizer.json"):  # fmt: skip
        assert name in found
    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in log if not r.get("eval")]
    assert steps == [3, 6, 9, 12] and [r["step"] for r in log if r.get("eval")] == [5, 10, 12]
    for key in ("step", "loss", "lr", "grad_norm", "user_margin", "generic_margin", "user_accuracy", "generic_accuracy",
                "comparisons_per_s", "tokens_per_s", "peak_memory_gb"):  # fmt: skip
        assert key in log[0]
    assert not list((tmp_path / "a").rglob("*partial*"))


def test_a_loss_that_is_not_finite_is_not_the_best(monkeypatch, tmp_path):
    losses = iter([math.nan, 0.5, 0.6])
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args: {**evaluate(*args), "loss": next(losses)})
    run(monkeypatch, tmp_path / "a", "train.final=best")
    state = json.loads((tmp_path / "a" / "checkpoints" / "step_12" / "state.json").read_text())
    best = state["best"]
    assert (best["step"], best["loss"]) == (10, 0.5)


def test_a_run_whose_best_checkpoint_is_damaged_can_be_finished(monkeypatch, tmp_path, capsys):
    losses = iter([0.5, 0.6, 0.7])
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args: {**evaluate(*args), "loss": next(losses)})
    run(monkeypatch, tmp_path / "a", "train.final=best")
    best, last = (tmp_path / "a" / "checkpoints" / f"step_{step}" for step in (5, 12))
    shutil.rmtree(tmp_path / "a" / "final")
    (best / "users.json").write_text("[]")
    with pytest.raises(UserError, match=r"step_5: damaged checkpoint .*; remove it to go on"):
        run(monkeypatch, tmp_path / "a", "train.final=best")
    shutil.rmtree(best)
    capsys.readouterr()
    run(monkeypatch, tmp_path / "a", "train.final=best")
    assert "step_5, the best checkpoint, is gone" in capsys.readouterr().err
    users = load_file(tmp_path / "a" / "final" / "users.safetensors")
    assert torch.equal(users["user_model.e_UD"], step_tensors(last)["model.user_model.e_UD"])


def test_a_full_disk_while_the_model_for_use_is_written(monkeypatch, tmp_path):
    """No file may grow as large as one of safetensors, or of tokenizers: a message, and the next start finishes the run."""
    run(monkeypatch, tmp_path / "a", "optim.epochs=1")
    before_that = weights(tmp_path / "a")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "a" / "final").iterdir()}
    shutil.rmtree(tmp_path / "a" / "final")
    save_final = train_script.save_final

    def with_less_room(limit, *args):
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            save_final(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    assert sizes["users.safetensors"] < sizes["tokenizer.json"]
    for file in ("users.safetensors", "tokenizer.json"):
        monkeypatch.setattr(train_script, "save_final", partial(with_less_room, sizes[file] - 1))
        with pytest.raises(
            TrainingError, match=r"cannot be written \(.*File too large.*checkpoints before it are good"
        ):
            run(monkeypatch, tmp_path / "a", "optim.epochs=1")
        assert not (tmp_path / "a" / "final").exists() and not list((tmp_path / "a").rglob("*.partial"))
    monkeypatch.setattr(train_script, "save_final", save_final)
    run(monkeypatch, tmp_path / "a", "optim.epochs=1")
    assert same(weights(tmp_path / "a"), before_that)


def test_a_gpu_without_memory_ends_with_what_to_change(monkeypatch, tmp_path, call):
    def take_step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    monkeypatch.setattr(loop, "take_step", take_step)
    status, _, err = call(train_script.main, *command(tmp_path / "a")[1:])
    assert status == 1 and err.splitlines()[-1].startswith("stopped: ") and "Tried to allocate 2.00 GiB." in err
    for word in ("--dry-run", "optim.micro_batch_size", "model.recompute=blocks", "--nproc_per_node"):
        assert word in err
    assert "Traceback" not in err


def test_how_processes_share_the_work_may_change_between_two_starts(tmp_path):
    def opened(*overrides):
        keys = config.load_config(None, [f"run_dir={tmp_path / 'a'}", "model.family=llama", *overrides])
        run = open_run(keys, "a")
        run.begin(keys, overwrite=False)
        run.lock.close()
        return run

    opened("fsdp.replicas=2").log({"step": 1})
    opened("fsdp.replicas=4", "fsdp.offload=true")
    with pytest.raises(UserError, match="another config:\n  optim.lr"):
        opened("fsdp.replicas=4", "optim.lr=0.5")


def test_newest_and_best_checkpoints_stay(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "a", "train.keep_checkpoints=2", "train.final=best")
    evals = [r for r in records(tmp_path / "a") if r.get("eval")]
    best = min(evals, key=lambda r: r["loss"])["step"]
    assert set(checkpoint.steps(tmp_path / "a" / "checkpoints")) == {10, 12, best}
    kept = step_tensors(tmp_path / "a" / "checkpoints" / f"step_{best}")
    assert torch.equal(
        kept["model.user_model.e_UD"], load_file(tmp_path / "a/final/users.safetensors")["user_model.e_UD"]
    )


@pytest.mark.parametrize("mode", ["lora", "full", "mixed", "prompt_end"])
def test_resuming_from_every_checkpoint_ends_bit_for_bit_alike(monkeypatch, tmp_path, mode):
    more = {
        "lora": (),
        "full": ("lora.rank=0",),
        "prompt_end": ("user_model.place=prompt_end", "data.template=chat"),
        "mixed": ("model.recompute=blocks", "user_model.kind=cluster", "user_model.aggregator=linear",
                  "model.family=gptj", "train.final=best", "train.best_by=accuracy", "model.dtype=bfloat16"),
    }[mode]  # fmt: skip
    run(monkeypatch, tmp_path / "whole", *more)
    assert [-1 <= r["overfitting"] <= 1 for r in records(tmp_path / "whole") if r.get("eval")] == [True] * 3
    save = loop.save_step
    for stop in (2, 6, 10):

        def stop_after(folder, model, optimizer, users, state, stop=stop):
            path = save(folder, model, optimizer, users, state)
            if state["step"] == stop:
                raise KeyboardInterrupt
            return path

        monkeypatch.setattr(loop, "save_step", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, tmp_path / f"cut{stop}", *more)
        monkeypatch.setattr(loop, "save_step", save)
        run(monkeypatch, tmp_path / f"cut{stop}", *more)
        assert same(weights(tmp_path / f"cut{stop}"), weights(tmp_path / "whole"))
        assert records(tmp_path / f"cut{stop}") == records(tmp_path / "whole")


def patch_evaluations(monkeypatch, **fields):
    """Evaluations say, of these fields, what is given for their step: loss={2: 0.5, 4: 0.4}."""
    evaluate = loop.evaluate

    def patched(valid, step):
        return {**evaluate(valid, step), **{name: by_step[step] for name, by_step in fields.items()}}

    monkeypatch.setattr(loop, "evaluate", patched)


WORSENING = {2: 0.5, 4: 0.4, 6: 0.6, 8: 0.45}  # of updates: the second is best, and two more end the run
EARLY = ("train.eval_every=2", "train.save_every=null", "train.final=best", "optim.schedule=constant")


def test_a_run_that_no_longer_improves_stops_early_with_its_best_weights(monkeypatch, tmp_path, capsys):
    patch_evaluations(monkeypatch, loss=WORSENING)
    run(monkeypatch, tmp_path / "a", *EARLY, "train.patience=2")
    expected = (
        "stopped early, after update 8 of 12: evaluations without a new best: 2 (train.patience); the best is that of"
    )
    assert capsys.readouterr().err.count(f"{expected} update 4\n") == 1
    log = records(tmp_path / "a")
    assert [r["step"] for r in log if r.get("eval")] == [2, 4, 6, 8]
    assert log[-1] == {"step": 8, "stopped_early": True, "best_step": 4}
    assert set(checkpoint.steps(tmp_path / "a" / "checkpoints")) == {4, 8}
    run(monkeypatch, tmp_path / "short", *EARLY, "optim.max_steps=4")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "short"))
    run(monkeypatch, tmp_path / "a", *EARLY, "train.patience=2")
    assert "is finished" in capsys.readouterr().out and records(tmp_path / "a") == log


@pytest.mark.parametrize("moment", ["best saved", "stop not saved", "stop saved"])
def test_a_run_that_stops_early_is_resumed_bit_for_bit(monkeypatch, tmp_path, moment):
    patch_evaluations(monkeypatch, loss=WORSENING)
    keys = (*EARLY, "train.patience=2", "train.log_every=1")
    run(monkeypatch, tmp_path / "whole", *keys)
    save, take_step, steps = loop.save_step, loop.take_step, []

    def cut_short(folder, model, optimizer, users, state):
        if (moment, state["step"]) == ("stop not saved", 8):
            raise KeyboardInterrupt
        save(folder, model, optimizer, users, state)
        if (moment, state["step"]) in (("best saved", 4), ("stop saved", 8)):
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_step", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "cut", *keys)
    monkeypatch.setattr(loop, "save_step", save)
    monkeypatch.setattr(loop, "take_step", lambda *args: steps.append(args[-2]) or take_step(*args))
    run(monkeypatch, tmp_path / "cut", *keys)
    assert steps == ([] if moment == "stop saved" else [4, 5, 6, 7])
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_patience_that_ends_with_the_last_update_is_no_early_stop(monkeypatch, tmp_path):
    patch_evaluations(monkeypatch, loss=WORSENING)
    run(monkeypatch, tmp_path / "a", *EARLY, "train.patience=2", "optim.max_steps=8")
    assert not any("stopped_early" in r for r in records(tmp_path / "a"))


@pytest.mark.parametrize("patched", [True, False])
def test_the_best_by_accuracy_has_the_highest_accuracy_and_of_equals_the_lowest_loss(monkeypatch, tmp_path, patched):
    if patched:
        accuracies, losses = (0.5, 0.75, 0.625, 0.75, 0.75, 0.625), (0.5, 0.6, 0.4, 0.5, 0.55, 0.1)
        steps = range(2, 14, 2)
        patch_evaluations(monkeypatch, accuracy_top=dict(zip(steps, accuracies)), loss=dict(zip(steps, losses)))
    run(monkeypatch, tmp_path / "a", *EARLY, "train.best_by=accuracy", "train.keep_checkpoints=1")
    evals = [r for r in records(tmp_path / "a") if r.get("eval")]
    highest = max(r["accuracy_top"] for r in evals)
    best = min((r for r in evals if r["accuracy_top"] == highest), key=lambda r: r["loss"])["step"]
    assert best == 8 or not patched
    assert set(checkpoint.steps(tmp_path / "a" / "checkpoints")) == {best, 12}
    kept = step_tensors(tmp_path / "a" / "checkpoints" / f"step_{best}")["model.user_model.e_UD"]
    assert torch.equal(kept, load_file(tmp_path / "a/final/users.safetensors")["user_model.e_UD"])


def test_best_by_accuracy_is_refused_where_nobody_held_out_is_known(monkeypatch, tmp_path):
    strangers = tmp_path / "strangers.jsonl"
    lines = [json.loads(line) for line in (ROOT / "examples/tiny/valid.jsonl").read_text().splitlines()]
    strangers.write_text("".join(json.dumps({**line, "user": "nobody we know"}) + "\n" for line in lines))
    monkeypatch.setattr(train_script, "training_model", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=r"strangers.jsonl: found 8 comparisons, none by a user whom .*best_by=loss"):
        run(monkeypatch, tmp_path / "a", f"data.valid={strangers}", "train.best_by=accuracy", "data.new_users=true")


@pytest.mark.parametrize("kind, branch", [("individual", "user"), ("uniform", "generic")])
def test_training_accuracy_is_that_of_the_updates_since_the_last_evaluation(monkeypatch, tmp_path, kind, branch):
    take_step, counts = loop.take_step, []

    def counted(task, optimizer, update, *rest):
        users = [task.comparisons[i].user for i in update]
        counts.append(sum(user > 0 for user in users) if branch == "user" else len(users))
        return take_step(task, optimizer, update, *rest)

    monkeypatch.setattr(loop, "take_step", counted)
    run(monkeypatch, tmp_path / "a", "train.log_every=1", f"user_model.kind={kind}")
    log = records(tmp_path / "a")
    accuracy = {r["step"]: r[f"{branch}_accuracy"] for r in log if not r.get("eval")}
    evals = [r for r in log if r.get("eval")]
    assert [r["step"] for r in evals] == [5, 10, 12]
    assert branch == "generic" or len(set(counts)) > 1  # so that a mean of the records would be another number
    for r, steps in zip(evals, (range(1, 6), range(6, 11), range(11, 13))):
        expected = sum(accuracy[n] * counts[n - 1] for n in steps) / sum(counts[n - 1] for n in steps)
        assert r["training_accuracy"] == pytest.approx(expected)
        assert r["overfitting"] == pytest.approx(expected - r["accuracy_top"])


def test_overfitting_that_grows_is_said_once_an_evaluation(monkeypatch, tmp_path, capsys):
    patch_evaluations(monkeypatch, accuracy_top={5: 1.0, 10: 0.0, 12: 0.5})  # behind only at 10; risen at 12
    run(monkeypatch, tmp_path / "a")
    said = [line for line in capsys.readouterr().err.splitlines() if "overfitting" in line]
    (reached,) = [r["training_accuracy"] for r in records(tmp_path / "a") if r.get("eval") and r["step"] == 10]
    assert len(said) == 1 and f"at update 10: training accuracy {reached:.3f}, held-out accuracy 0.000" in said[0]
    for key in ("train.final", "train.patience", "user_model.prior"):
        assert key in said[0]


def test_when_overfitting_is_worth_a_sentence():
    def said(*evaluations):
        """Of (training, known users' held-out, unknown users' held-out accuracy), whether the last one was."""
        progress = Progress("base")
        for training, top, generic in evaluations:
            if training is not None:
                sums = Sums(seen={"user": 100, "generic": 0}, right={"user": 100 * training, "generic": 0.0})
                progress.add(sums)
            record = {"step": 1, "accuracy_top": top, "accuracy_generic": generic}
            record |= progress.generalisation(record, "user")
            text = progress.overfitting_warning(record)
        return text is not None

    assert said((0.75, 0.75, 0.5), (0.875, 0.75, 0.5))  # the gap grew from 0 to 0.125, held-out accuracy stayed
    assert not said((0.875, 0.5, 0.5))  # nothing to compare with
    assert not said((0.75, 0.75, 0.5), (0.8, 0.75, 0.5))  # a small gap
    assert not said((0.75, 0.5, 0.5), (0.875, 0.625, 0.5))  # both rise
    assert not said((0.875, 0.5, 0.5), (0.875, 0.5, 0.5))  # the gap stays
    assert said((0.75, None, 0.75), (0.875, None, 0.5))  # of unknown users, where nobody is known
    assert not said((None, 0.75, 0.5), (0.875, 0.5, 0.5)) and not said((0.75, 0.75, 0.5), (None, 0.5, 0.5))
    assert not said((0.75, None, None), (0.875, None, None))


def test_a_checkpoint_of_the_form_before_early_stopping_is_resumed(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "a")
    log, before = records(tmp_path / "a"), weights(tmp_path / "a")
    for gone in ("final", "checkpoints/step_12"):
        shutil.rmtree(tmp_path / "a" / gone)
    step = tmp_path / "a" / "checkpoints" / "step_10"
    state = json.loads((step / "state.json").read_text())
    for name in ("since_best", "latest", "since_evaluation"):
        del state[name]
    del state["best"]["accuracy"]
    (step / "state.json").write_text(json.dumps(state))
    (checksums,) = step.glob("checksums-*.json")
    listed = json.loads(checksums.read_text())
    checksums.write_text(json.dumps({**listed, "state.json": checksum(step / "state.json")}))
    run(monkeypatch, tmp_path / "a")
    assert records(tmp_path / "a") == log and same(weights(tmp_path / "a"), before)


def test_killed_at_random_moments_a_run_ends_bit_for_bit_alike(monkeypatch, tmp_path):
    """SIGKILL at random moments, saves included: nothing half-written is ever taken for whole."""
    long = ("train.save_every=1", "optim.epochs=8")
    run(monkeypatch, tmp_path / "whole", *long)
    killed, rng = tmp_path / "killed", random.Random(0)
    for _ in range(2):
        reached = max(checkpoint.steps(killed / "checkpoints"), default=0)
        process = subprocess.Popen(
            [sys.executable, *command(killed, *long)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and max(checkpoint.steps(killed / "checkpoints"), default=0) <= reached:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.2))
        assert process.poll() is None, "ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(monkeypatch, killed, *long)
    assert same(weights(killed), weights(tmp_path / "whole"))
    assert records(killed) == records(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is_another_config_is_refused_and_overwrite_starts_anew(
    monkeypatch, tmp_path, capsys
):
    run(monkeypatch, tmp_path / "a")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file() and p.name != ".lock"}
    run(monkeypatch, tmp_path / "a")
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another config:\n  loss.beta: 0.5 -> 0.9\n"):
        run(monkeypatch, tmp_path / "a", "loss.beta=0.9")
    assert before == {p: p.stat().st_mtime_ns for p in before}
    run(monkeypatch, tmp_path / "a", "loss.beta=0.9", flags=["--overwrite"])
    assert "beta: 0.9" in (tmp_path / "a" / "final" / "config.yaml").read_text()


def test_overwrite_loses_nothing_before_training_can_begin(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "a")
    before = weights(tmp_path / "a")
    for fault in ("lora.targets=[nothing]", "data.max_tokens=20"):
        with pytest.raises(UserError):
            run(monkeypatch, tmp_path / "a", fault, flags=["--overwrite"])
        assert same(weights(tmp_path / "a"), before)


def test_a_config_that_never_began_does_not_stand_in_the_way(monkeypatch, tmp_path):
    with pytest.raises(UserError):
        run(monkeypatch, tmp_path / "a", "lora.targets=[nothing]")
    run(monkeypatch, tmp_path / "a")
    assert (tmp_path / "a" / "final").exists()


def test_a_folder_of_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for config_of_another_program in (None, "theme: dark\n"):
        if config_of_another_program:
            (tmp_path / "config.yaml").write_text(config_of_another_program)
        with pytest.raises(UserError, match="not a run's"):
            open_run(tiny_config(f"run_dir={tmp_path}"), "x", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_overwrite_removes_what_a_run_writes_and_nothing_else(tmp_path):
    config = tiny_config(f"run_dir={tmp_path / 'a'}")
    opened = open_run(config, "x")
    opened.begin(config, overwrite=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (opened.path / "final").symlink_to(tmp_path / "elsewhere")
    (opened.path / "notes.txt").touch()
    (opened.path / "checkpoints").mkdir()
    opened.begin(config, overwrite=True)
    assert {p.name for p in opened.path.iterdir()} == {".lock", "config.yaml", "notes.txt"}
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_a_run_in_use_is_refused(tmp_path):
    held = open_run(tiny_config(f"run_dir={tmp_path / 'a'}"), "x")
    with pytest.raises(UserError, match="in use by another process"):
        open_run(tiny_config(f"run_dir={tmp_path / 'a'}"), "x")
    held.lock.close()


def test_only_a_lock_that_another_holds_is_one_in_use(monkeypatch, tmp_path, capsys):
    def says(number):
        def flock(*_):
            raise OSError(number, "no lock")  # Python makes it the subclass of the number

        monkeypatch.setattr(fcntl, "flock", flock)
        opened = open_run(tiny_config(f"run_dir={tmp_path / 'a'}"), "x")
        opened.lock.close()

    for without_locks in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        says(without_locks)
        assert "cannot be locked (no lock)" in capsys.readouterr().err
    for held in (errno.EAGAIN, errno.EACCES):
        with pytest.raises(UserError, match="in use by another process"):
            says(held)
    with pytest.raises(OSError, match="no lock"):
        says(errno.EIO)


def test_changed_data_and_a_damaged_checkpoint_are_refused(monkeypatch, tmp_path):
    def unfinished(name):
        run(monkeypatch, tmp_path / name)
        for file in (tmp_path / name / "final").iterdir():
            file.unlink()
        (tmp_path / name / "final").rmdir()
        return tmp_path / name / "checkpoints" / "step_12"

    source = ROOT / "examples" / "tiny" / "train.jsonl"
    for number, (old, new) in enumerate((("alice", "zoe"), ('"bob"', "null"), ("Certainly", "Sure"))):
        unfinished(f"a{number}")
        changed = tmp_path / "train.jsonl"
        changed.write_text(source.read_text().replace(old, new))
        monkeypatch.setattr(
            train_script, "read_comparisons", lambda path, config, changed=changed: read_comparisons(changed)
        )
        with pytest.raises(UserError, match="users or base model are not those"):
            run(monkeypatch, tmp_path / f"a{number}")
        monkeypatch.setattr(train_script, "read_comparisons", read_comparisons)
    names = [file.name for file in unfinished("names").iterdir()]
    assert {name.partition("-")[0] for name in names} == {"shard", "checksums", "state.json", "users.json"}
    for name in names:
        whole = (step := unfinished(name)).joinpath(name).read_bytes()
        flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
        for damaged in (whole[:-10], flipped, None):
            (step / name).unlink()
            if damaged is not None:
                (step / name).write_bytes(damaged)
            with pytest.raises(UserError, match=r"damaged checkpoint .*; remove it to go on from another: .*step_10"):
                run(monkeypatch, tmp_path / name)
            (step / name).write_bytes(whole)
        run(monkeypatch, tmp_path / name)


def test_a_checkpoint_reads_no_file_outside_its_folder(monkeypatch, tmp_path):
    """Files are those that lie in it; a list of checksums that names another place is not followed."""
    run(monkeypatch, tmp_path / "a")
    step = tmp_path / "a" / "checkpoints" / "step_12"
    (tmp_path / "a" / "checkpoints" / "outside").write_text("x")
    listed = step / "checksums-0.json"
    listed.write_text(json.dumps({**json.loads(listed.read_text()), "../outside": "0"}))
    opened = []
    monkeypatch.setattr(checkpoint, "checksum", lambda *files: opened.extend(files))
    with pytest.raises(UserError, match=r"step_12: damaged checkpoint .*missing.*\.\./outside"):
        checkpoint.read_state(step)
    assert not opened


def toy_task(config, model, count=8):
    comparisons = random_comparisons(count)
    return Task(
        config, model, comparisons, score(model, comparisons, None, 4), None, [str(c.user) for c in comparisons]
    )


def test_a_step_that_is_not_finite_never_reaches_the_weights(tmp_path):
    config = tiny_config(
        f"run_dir={tmp_path / 'a'}", "optim.batch_size=4", "optim.epochs=4", "optim.max_skipped_steps=3"
    )
    model = tiny_model(config)
    task = toy_task(config, model)
    task.reference.chosen.fill_(math.nan)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match="3 updates in a row"):
        loop.train(open_run(config, "x"), UserIndex(["a", "b", "c", "d"]), task, None, "base")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in log] == [True] * 3


def test_one_bad_step_is_skipped_and_training_goes_on(tmp_path):
    config = tiny_config(f"run_dir={tmp_path / 'a'}", "optim.batch_size=1", "optim.max_skipped_steps=2")
    model = tiny_model(config)
    task = toy_task(config, model)
    task.reference.chosen[3] = math.inf
    loop.train(open_run(config, "x"), UserIndex(["a", "b", "c", "d"]), task, None, "base")
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    log = [json.loads(line) for line in text.splitlines()]
    assert sum(r.get("skipped", False) for r in log) == 1 and "NaN" not in text and "Infinity" not in text


def test_gradient_clipping_and_adamw_against_torch_by_hand(tmp_path):
    """One update equals AdamW on the clipped gradient, computed here with torch on the same gradient."""
    config = tiny_config(
        f"run_dir={tmp_path / 'a'}", "optim.batch_size=8", "optim.max_grad_norm=0.01", "optim.lr=1e-3",
        "user_model.lr=1e-2", "optim.schedule=constant", "optim.weight_decay=0.1",
    )  # fmt: skip
    model, twin = tiny_model(config), tiny_model(config)
    task = toy_task(config, model)
    updates.accumulate_gradients(Task(config, twin, task.comparisons, task.reference), range(8))
    grads = gradients(twin)
    norm = math.sqrt(sum((g**2).sum().item() for g in grads.values()))
    assert norm > 0.01
    loop.train(open_run(config, "x"), UserIndex(["a", "b", "c", "d"]), task, None, "base")
    after = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        g = grads[name] * 0.01 / (norm + 1e-6)  # clip_grad_norm_'s documented epsilon
        lr, decay = (1e-2, 0.0) if name.startswith("user_model.") else (1e-3, 0.1)
        expected = p.detach() * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)  # Adam's first step is g / (|g| + eps)
        assert torch.allclose(after[name], expected, atol=1e-12), name


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2)]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    config = tiny_config("optim.warmup_steps=2", f"optim.schedule={schedule}").optim
    assert [learning_rate_factor(step, 6, config) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["robust", "hinge", "ipo", "simpo", "orpo"])
def test_every_loss_and_user_model_trains_and_evaluates(monkeypatch, tmp_path, kind):
    more = (
        "optim.epochs=1",
        f"loss.kind={kind}",
        "user_model.kind=cluster",
        "user_model.aggregator=linear",
        "lora.rank=0",
    )
    run(monkeypatch, tmp_path / "a", *more)
    final = [r for r in records(tmp_path / "a") if r.get("eval")][-1]
    assert math.isfinite(final["loss"]) and 0 <= final["accuracy_top"] <= 1
    loaded = load_final(tmp_path / "a")
    trained = load_file(tmp_path / "a" / "final" / "users.safetensors")
    assert torch.equal(loaded.model.user_model.V_KUD, trained["user_model.V_KUD"])


def test_vanilla_dpo_is_the_uniform_user_without_vectors(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path / "a", "optim.epochs=1", "user_model.kind=uniform", "user_model.tokens=0")
    log = records(tmp_path / "a")
    assert log[0]["user_accuracy"] is None and log[0]["generic_accuracy"] is not None  # one branch serves all
    assert load_final(tmp_path / "a").model.user_model.e_UD.shape == (0, 32)


def test_tensorboard_is_written_where_it_is_installed_and_asked_for_where_not(monkeypatch, tmp_path):
    short = ("optim.epochs=1", "train.tensorboard=true")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="TensorBoard is not installed"):
        run(monkeypatch, tmp_path / "a", *short)
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(folder)
            assert purge_step == 1  # nothing was trained before

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(monkeypatch, tmp_path / "a", *short)
    assert written[0] == str(tmp_path / "a" / "tensorboard") and written[-1] == "closed"
    assert ("train/loss", 3) in written and ("eval/accuracy_top", 6) in written
