"""The cost of log-probs, relative to the matrix products that they consist of.

    python benchmarks/logprob.py [--positions 8192 --width 4096 --vocabulary 128256 --dtype bfloat16] [--out FILE.json]

forward: log p of every target without gradients (reference, evaluation), over one matrix product of that size.
training: forward, and backward for the hidden states with a frozen head (LoRA), over three such products.
The implementations take turns, and medians over the rounds are compared. First, all must agree with float64 on a part of the
positions, ours in the hidden states' gradient too; the table has both errors. Extra memory, on a GPU only, is what is allocated
beyond the inputs and the hidden states' gradient. Others are measured if they are installed: cut-cross-entropy, liger-kernel,
and torch's own F.linear_cross_entropy.

prlhf triton         as the models call it: both designs of prlhf/kernels/triton.py, each for its purpose
prlhf triton, fused  values by the fused kernel alone (half types); in training all slopes come in the backward pass, by tiles
prlhf triton, tiles  the vendor's products on tiles of the vocabulary alone; in training all slopes are kept from the forward
                     pass (for the backward pass there is no fused kernel)
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from prlhf.errors import run_command
from prlhf.kernels import log_probs as logprobs
from prlhf.kernels.log_probs import log_probs
from prlhf.kernels.passes import accumulation_type
from prlhf.train.process import keep_freed_memory

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), targets (N,) -> (N,)
Call = Callable[[], object]
# Largest relative error against float64 that is rounding, not another function. Half types round the gradient itself.
MOST_ERROR, MOST_GRADIENT_ERROR = 1e-2, 3e-2


def full_logits(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The obvious way: logits in the inputs' type, their softmax in float32 (float64 for float64)."""
    logits_NV = (hidden_ND @ weight_VD.T).to(accumulation_type(hidden_ND.dtype))
    return logits_NV.log_softmax(dim=-1).gather(1, targets_N[:, None])[:, 0]


def one_design(fused: bool) -> LogProbs:
    """One of the two Triton designs alone, as far as possible (see above)."""
    from prlhf.kernels import triton as logprobs_triton

    def values(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        if fused:
            return logprobs_triton._fused(hidden_ND, weight_VD, None, targets_N).log_p_N
        chunks = zip(hidden_ND.split(logprobs_triton.ROWS), targets_N.split(logprobs_triton.ROWS))
        return torch.cat([logprobs_triton._tiled(h, weight_VD, None, t, None).log_p_N for h, t in chunks])

    def function(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        if not hidden_ND.requires_grad:
            return values(hidden_ND, weight_VD, targets_N)
        with patch.object(logprobs, "KEPT_SLOPES", 0 if fused else hidden_ND.numel()):
            return log_probs(hidden_ND, weight_VD, None, targets_N, "triton")

    return function


def implementations(cuda: bool) -> dict[str, LogProbs]:
    """The implementations that can run here, by name."""
    found: dict[str, LogProbs] = {
        "full logits": full_logits,
        "torch.compile of full logits": torch.compile(full_logits),
        "prlhf torch": lambda h, w, t: log_probs(h, w, None, t, "torch"),
        "prlhf chunked": lambda h, w, t: log_probs(h, w, None, t, "chunked"),
    }
    if cuda or os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter shows that it runs, not how fast
        found["prlhf triton"] = lambda h, w, t: log_probs(h, w, None, t, "triton")
        found["prlhf triton, fused"], found["prlhf triton, tiles"] = one_design(fused=True), one_design(fused=False)
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        from torch.nn.functional import linear_cross_entropy

        found["F.linear_cross_entropy"] = lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="none")
    if cuda and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = lambda h, w, t: -cut(h, w, t, reduction="none")
    if cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        found["Liger"] = lambda h, w, t: (
            -Liger.apply(h, w, t, None, None, -100, 0.0, 0.0, "none")[0]  # its gradient assumes equal weights
        )
    return found


class Inputs(NamedTuple):
    """The inputs of log-probs, and the gradient of the loss for them."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    grad_N: Tensor


def training(function: LogProbs, inputs: Inputs) -> Tensor:
    """Forward and backward pass; returns the hidden states' gradient."""
    leaf_ND = inputs.hidden_ND.detach().requires_grad_()
    log_p_N = function(leaf_ND, inputs.weight_VD, inputs.targets_N)
    log_p_N.backward(inputs.grad_N.to(log_p_N.dtype))
    return leaf_ND.grad


def three_products(inputs: Inputs) -> None:
    """The matrix products of a forward pass, a second one of the logits, and the hidden states' gradient."""
    for _ in range(2):
        logits_NV = inputs.hidden_ND @ inputs.weight_VD.T
    logits_NV @ inputs.weight_VD


def seconds(function: Call) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def extra_memory_mb(function: Call) -> float:
    """Peak GPU memory of a call, minus what was allocated before, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|."""
    return ((found.double() - truth).norm() / truth.norm()).item()


class Errors(NamedTuple):
    """Relative errors against float64, of log p and of its gradient for the hidden states."""

    values: float
    gradient: float


def checked(arms: dict[str, LogProbs], inputs: Inputs) -> dict[str, Errors]:
    """Each arm's errors on 64 positions; arms that do not run here are removed from `arms`.

    SystemExit if the values are those of another function, or the gradient of one of ours is. Others' gradients are not
    checked: Liger assumes that the incoming gradient is the same at all positions.
    """
    hidden_ND, _, targets_N, grad_N = (t[:64] for t in inputs)
    part = Inputs(hidden_ND, inputs.weight_VD, targets_N, grad_N)
    exact = Inputs(hidden_ND.double(), inputs.weight_VD.double(), targets_N, grad_N.double())
    truth, truth_grad = full_logits(*exact[:3]), training(full_logits, exact)
    errors = {}
    for name, function in list(arms.items()):
        ours = name.startswith(("prlhf", "full"))
        try:
            with torch.no_grad():
                found = function(hidden_ND, inputs.weight_VD, targets_N)
            errors[name] = Errors(relative_error(found, truth), relative_error(training(function, part), truth_grad))
        except Exception as error:  # another project's kernel that does not run on this machine
            if ours:
                raise
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            del arms[name]
            continue
        if errors[name].values > MOST_ERROR or (ours and errors[name].gradient > MOST_GRADIENT_ERROR):
            raise SystemExit(f"{name}: {errors[name]} against float64: not the same function")
    return errors


def measured(calls: dict[str, tuple[Call, Call]], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each arm's forward pass and training, by round, after one warm-up round; the arms take turns."""
    times: dict[str, list[list[float]]] = {name: [[], []] for name in calls}
    for number in range(rounds + 1):
        for name, (forward, both) in calls.items():
            with torch.no_grad():
                forward_s = seconds(forward)
            both_s = seconds(both)
            if number:
                times[name][0].append(forward_s)
                times[name][1].append(both_s)
    return times


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    print("| | forward / 1 product | training / 3 products | extra MB, forward | extra MB, training | relative error "
          "| of the gradient |")  # fmt: skip
    print("|---" * 7 + "|")
    for row in rows:
        memory = [f"{row[key]:.0f}" if key in row else "-" for key in ("forward_mb", "training_mb")]
        errors = ["-" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "gradient_error")]
        print(f"| {row['name']} | {row['forward']:.2f} | {row['training']:.2f} | {' | '.join([*memory, *errors])} |")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192 if cuda else 560)
    parser.add_argument("--width", type=int, default=4096 if cuda else 576)
    parser.add_argument("--vocabulary", type=int, default=128256 if cuda else 49152)
    parser.add_argument(
        "--dtype", default="bfloat16" if cuda else "float32", choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="also write the table as JSON")
    args = parser.parse_args()
    keep_freed_memory()
    device, dtype = "cuda" if cuda else "cpu", getattr(torch, args.dtype)
    N, D, V = args.positions, args.width, args.vocabulary
    generator = torch.Generator(device).manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator, device=device).to(dtype)
    weight_VD = (torch.randn(V, D, generator=generator, device=device) / D**0.5).to(dtype)
    targets_N = torch.randint(V, (N,), generator=generator, device=device)
    inputs = Inputs(hidden_ND, weight_VD, targets_N, torch.randn(N, generator=generator, device=device))
    arms = implementations(cuda)
    errors = checked(arms, inputs)
    calls = {"matrix products alone": (lambda: hidden_ND @ weight_VD.T, lambda: three_products(inputs))}
    for name, function in arms.items():
        calls[name] = (
            lambda f=function: f(hidden_ND, weight_VD, targets_N), lambda f=function: training(f, inputs)
        )  # fmt: skip
    times = measured(calls, args.rounds)
    bare = [statistics.median(t) for t in times["matrix products alone"]]
    rows = []
    for name, (forward, both) in calls.items():
        forward_ratio, training_ratio = (statistics.median(t) / b for t, b in zip(times[name], bare))
        error, gradient_error = errors.get(name, (None, None))
        row = {"name": name, "forward": forward_ratio, "training": training_ratio}
        row |= {"error": error, "gradient_error": gradient_error}
        if cuda:
            with torch.no_grad():
                row["forward_mb"] = extra_memory_mb(forward)
            row["training_mb"] = extra_memory_mb(both) - hidden_ND.nbytes / 1e6
        rows.append(row)
    machine = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"N = {N}, D = {D}, V = {V}, {args.dtype}, {machine}, torch {torch.__version__}")
    report(rows)
    if args.out:
        found = {"arguments": vars(args), "device": machine, "torch": torch.__version__, "seconds": times, "rows": rows}
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
