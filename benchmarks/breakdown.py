"""Where the time of a training step goes, by kind of operation.

    python benchmarks/breakdown.py [the arguments of benchmarks/step.py; --arms selects the arms] [--out FILE.json]

On a CPU: self time of torch's operations, by torch.profiler. On a GPU: time of the kernels, beside wall-clock time, which
includes waiting between kernels. Forward, backward and optimiser together; the head's products are among the matrix products.
The profiler itself adds to the times it shows. First, arms that compute the same thing must agree, as in benchmarks/step.py.
"""

import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from arms import Arm, computing_type, made, surroundings
from step import arguments, check_equal, comparisons_of, device_name, labels, versions
from torch.profiler import ProfilerActivity, profile

from prlhf.errors import run_command
from prlhf.train.process import keep_freed_memory

REST = "elementwise, reductions, the rest"
# A name is of the first kind whose pattern it matches: torch's operations on a CPU, kernels on a GPU. Attention comes first,
# as its names contain those of its products.
KINDS = {
    "attention": r"flash|fmha|flex_attention|sdpa|_attention|aten::_softmax|softmax_warp",
    "matrix products": r"aten::(mm|addmm|bmm|baddbmm|linear)_?$|gemm|gemv|nvjet|cutlass|splitK|triton_tem|_fused_values",
    "log-probs, beside their products": r"_softmax_step|_logits_gradient",
    "optimiser and clipping": r"_foreach|_fused_adam|Optimizer|multi_tensor_apply",
    "copies and layout": r"aten::(copy_|cat|contiguous|clone|index|index_select|index_copy_?|fill_|zero_)$|Memcpy|Memset"
    r"|copy_kernel|CatArray|FillFunctor|split_with_sizes|chunk_cat|gather_kernel|index\w*_kernel|indexSelect|indexFunc|indexCopy",
}


def kind(operation: str) -> str:
    """The kind of an operation or kernel, by its name."""
    return next((name for name, parts in KINDS.items() if re.search(parts, operation)), REST)


class Times(NamedTuple):
    """Seconds of a step: by the wall clock, and by kind of operation."""

    clock: float
    kinds: dict[str, float]


def times_by_kind(arm: Arm) -> Times:
    """The times of the arm's second step."""
    cuda = torch.cuda.is_available()
    arm.step()
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        started = time.perf_counter()
        arm.step()
        if cuda:
            torch.cuda.synchronize()
        clock = time.perf_counter() - started
    kinds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if not cuda:
            kinds[kind(event.key)] += event.self_cpu_time_total / 1e6
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:  # kernels
            kinds[kind(event.key)] += event.self_device_time_total / 1e6
    return Times(clock, kinds)


def report(found: dict[str, Times]) -> None:
    """Print the table: each kind's share of the operations' time, and that time."""
    totals = {name: sum(times.kinds.values()) for name, times in found.items()}
    print("| | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for label in (*KINDS, REST):
        shares = [f"{100 * times.kinds.get(label, 0.0) / totals[name]:.0f}%" for name, times in found.items()]
        print(f"| {label} | " + " | ".join(shares) + " |")
    print("| all, seconds | " + " | ".join(f"{total:.3f}" for total in totals.values()) + " |")
    print("| by the clock, seconds | " + " | ".join(f"{times.clock:.3f}" for times in found.values()) + " |")


def main() -> None:
    args = arguments(__doc__)
    keep_freed_memory()
    comparisons = comparisons_of(args)
    found, computed = {}, {}
    for name in labels(args):
        with surroundings(name, args):
            arm = made(name, args, comparisons)
            computed[name] = arm.computed()
            found[name] = times_by_kind(arm)
            del arm  # the next one may not fit beside it
    check_equal(computed, computing_type(args))
    report(found)
    print(f"\n{device_name()}")
    if args.out:
        arms = {name: times._asdict() | computed[name]._asdict() for name, times in found.items()}
        written = {"arguments": vars(args), "device": device_name(), "versions": versions(), "arms": arms}
        Path(args.out).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
