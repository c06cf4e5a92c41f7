"""What a heap takes for given tensors, counted by hand. Against whole trainings: test_dry_run.py."""

import gc
import platform
import subprocess
import sys

import pytest
import torch

from prlhf.forecast import heap
from prlhf.forecast.allocations import Allocations
from prlhf.forecast.heap import growth, twice

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap")
MB = 1_000_000


@glibc
def test_what_is_in_use_at_once_is_what_the_heap_grows_by():
    made = [("storage", n, MB) for n in range(30)]
    assert 30 * MB <= growth(made, kept=True) <= 30.5 * MB
    assert 30 * MB <= growth(twice(made), kept=True) <= 30.5 * MB  # what stays is made once


@glibc
def test_places_are_used_again_where_what_lies_between_is_gone():
    """Of thirty tensors every other one stays: between them is no place for one of 10 MB. Where all go, there is, though glibc
    keeps seven freed small objects of a size for the next who asks, and with them the first places apart."""
    made, large = [("storage", n, MB) for n in range(30)], ("storage", 30, 10 * MB)
    apart = [*made, *(("freed", n, 0) for n in range(0, 30, 2)), large]
    together = [*made, *(("freed", n, 0) for n in range(30)), large]
    assert 40 * MB <= growth(apart, kept=True) <= 40.5 * MB
    assert 30 * MB <= growth(together, kept=True) <= 30.5 * MB


@glibc
def test_a_sum_takes_the_place_of_a_summand_that_is_freed_at_once():
    two = [("storage", 0, 5 * MB), ("storage", 1, 5 * MB)]
    in_place = [*two, ("sum", 2, 5 * MB), ("tensor", 3, 0), ("freed", 0, 0), ("storage", 4, 5 * MB), ("freed", 2, 0)]
    beside = [*two, ("sum", 2, 5 * MB), ("storage", 4, 5 * MB), ("freed", 0, 0), ("freed", 2, 0)]
    assert 15 * MB <= growth(in_place, kept=True) <= 15.5 * MB
    assert 20 * MB <= growth(beside, kept=True) <= 20.5 * MB


@glibc
def test_large_storages_that_are_mapped_one_by_one_are_gone_when_they_are_freed():
    turns = [(what, n, size) for n in range(5) for what, size in (("storage", 40 * MB), ("freed", 0))]
    assert 40 * MB <= growth(turns, kept=False) <= 41 * MB


def test_another_heap_is_not_asked(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", ""))
    assert growth([("storage", 0, MB)], kept=True) is None


@glibc
def test_a_heap_that_refuses_is_not_counted():
    assert growth([("storage", 0, 2**62)], kept=True) is None


def test_what_is_written_down_of_a_computation():
    """y = x w, by hand: the parameter's node and place are older; a product's node, storage and tensor; all end."""
    allocations = Allocations()
    with allocations.fake():
        x, w = torch.zeros(3, 4), torch.nn.Parameter(torch.zeros(4, 5))
        with allocations.written_down() as events:
            y = x @ w
            with torch.no_grad():
                z = y + 1
            del y, z
            allocations.graph_ends()
            gc.collect()
    assert events[:5] == [("node", 0, 0), ("storage", 1, 60), ("tensor", 2, 0), ("storage", 3, 60), ("tensor", 4, 0)]
    assert sorted(events[5:]) == [("freed", n, 0) for n in range(5)]


def test_the_scratch_process_needs_nothing_but_python():
    """It is started with -I, on the file alone."""
    done = subprocess.run([sys.executable, "-I", "-S", heap.__file__, "kept"], input="", capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) == 0, done.stderr
