import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    """Passes here are tiny: where cores are busy, two threads mostly wait for each other."""
    torch.set_num_threads(1)
