import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; no test needs the network

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("PRLHF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
