"""Runs that an earlier version wrote, whose config.yaml lacks later keys and says `shared: true` of every user model."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prlhf.evaluate import __main__ as evaluate
from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
LATER = {
    "model": ["pooling"],
    "user_model": ["rank", "prior", "shared_prior", "place"],
    "optim": ["solver"],
    "train": ["best_by", "patience"],
}
SMALL = (
    "model.width=32", "model.heads=2", "optim.max_steps=4", "train.save_every=2", "method=prm", "data.limit=16",
    "data.valid_limit=8", "evaluate.bootstrap=100", "user_model.kind=cluster", "optim.group_by=pair",  # the default then
)  # fmt: skip


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def as_it_was(path):
    """Make a config.yaml what the earlier version wrote for the same keys."""
    described = yaml.safe_load(path.read_text())
    for group, keys in LATER.items():
        for name in keys:
            del described[group][name]
    assert described["model"].pop("recompute") == "cheap"
    described["model"] |= {"gradient_checkpointing": False, "checkpoint_every": 1, "recompute": "blocks"}
    assert described["user_model"]["shared"] is None
    described["user_model"]["shared"] = True
    path.write_text(yaml.safe_dump(described, sort_keys=False))


def test_an_earlier_run_is_evaluated_left_finished_and_resumed(call, tmp_path):
    run, command = tmp_path / "run", ("--config", "tiny", "--set", *SMALL)
    assert call(train.main, *command, f"run_dir={run}")[0] == 0
    whole = load_file(run / "final" / "users.safetensors")
    assert call(evaluate.main, "--checkpoint", run)[0] == 0
    margins = (run / "eval" / "margins.jsonl").read_text()

    for path in (run / "config.yaml", run / "final" / "config.yaml"):
        as_it_was(path)
    status, _, err = call(evaluate.main, "--checkpoint", run, "--out", tmp_path / "again")
    assert status == 0, err
    assert (tmp_path / "again" / "margins.jsonl").read_text() == margins
    status, out, err = call(train.main, *command, f"run_dir={run}")
    assert status == 0 and "is finished" in out, err

    for gone in (run / "final", run / "checkpoints" / "step_4"):
        shutil.rmtree(gone)
    status, _, err = call(train.main, *command, f"run_dir={run}")
    assert status == 0 and "resuming after update 2" in err, err
    resumed = load_file(run / "final" / "users.safetensors")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("shared: null", "shared: true"))
    status, _, err = call(train.main, *command, f"run_dir={run}")  # said by a version that knows the later keys
    assert status == 2 and "user_model.shared: True -> None" in err
