"""Where the time of a training step goes, by kind of operation.

    python benchmarks/breakdown.py [the arguments of benchmarks/step.py; --arms names what is looked at]

Self time of torch's operations, forward, backward and optimiser together, from torch.profiler; the head is part of the
matrix products. The profiler itself costs some of what it shows.
"""

from collections import defaultdict

import torch
from step import Arm, arguments, comparisons_of, group_of, labels, made
from torch.profiler import ProfilerActivity, profile

from prlhf.errors import run_command
from prlhf.loop import keep_freed_memory

KINDS = {
    "matrix products": (
        "aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear", "aten::baddbmm", "gemm", "nvjet", "cutlass",
    ),
    "attention": ("attention", "flex", "flash", "aten::_softmax"),
    "optimiser": ("_foreach", "_fused_adam", "Optimizer"),
    "copies and layout": ("aten::copy_", "aten::cat", "aten::contiguous", "aten::clone", "aten::index", "aten::fill_"),
}  # fmt: skip


def kind(operation: str) -> str:
    """The kind of an operation, by its name."""
    for name, parts in KINDS.items():
        if any(operation == part if part.startswith("aten::") else part in operation for part in parts):
            return name
    return "elementwise, reductions, the rest"


def main() -> None:
    args = arguments(__doc__)
    keep_freed_memory()
    comparisons = comparisons_of(args)
    for name in labels(args):
        with group_of(name, args):
            times = times_by_kind(made(name, args, comparisons))
        total = sum(times.values())
        shares = sorted(times.items(), key=lambda item: -item[1])
        print(f"{name}: " + ", ".join(f"{label} {100 * t / total:.0f}%" for label, t in shares))


def times_by_kind(arm: Arm) -> dict[str, float]:
    """Microseconds of a step, the second one, by kind of operation."""
    cuda = torch.cuda.is_available()
    arm.step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        arm.step()
    times: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if not cuda:
            times[kind(event.key)] += event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:  # the kernels themselves
            times[kind(event.key)] += event.self_device_time_total
    return times


if __name__ == "__main__":
    run_command(main)
