import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # models are tiny: two threads mostly wait for each other; commands inherit it
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; no test needs the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prlhf.errors import run_command


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command; its exit status and what it wrote to stdout and stderr."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        try:
            run_command(main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def low_rank(tmp_path_factory):
    """A small reward model of rank 2, which no test changes."""
    from tiny_runs import trained_run

    return trained_run(tmp_path_factory.mktemp("low_rank") / "run", "low rank")
