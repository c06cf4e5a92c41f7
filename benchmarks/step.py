"""Seconds of a training step, against TRL's DPOTrainer on the same comparisons.

    pip install -c constraints.txt -e '.[bench]' && make model
    python benchmarks/step.py [--shape tldr | chat] [--rounds 5] [--comparisons 4] [--lora 0] [--out FILE.json]

One step is one update: forward and backward passes over the same comparisons in the same order, clipping, AdamW. The arms are
those of benchmarks/arms.py: prlhf, "prlhf pdpo", "prlhf pdpo prompt_end", rows, "rows once", trl. They take turns within a run, and medians over the
rounds are compared, since separate runs on a shared machine differ by up to a factor of two. First, arms that compute the same
thing must agree on the update's loss and on each comparison's reward margin in each branch (`check_equal`).

Each arm runs in a process of its own, as its users would run it, and waits while the others work. Peak memory is that of the
process; on a CPU this includes imports, of which TRL has more. On a GPU an arm frees its cached memory after its turn, and
takes one step that is not timed before the next. If the arms do not fit side by side, --one-at-a-time runs them one after the other.

The table has the prediction of `train.py --dry-run` (without saving) beside our arms' peak memory. The share of the matmul rate
is the FLOPs that an update must spend (`shapes.useful_flops`) per second, over the rate of a large matrix product of the same
type, measured in the same run. Models of real shapes: benchmarks/random_model.py. Runs for a GPU: benchmarks/gpu.sh.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arms import ARMS, BEHIND, OURS, USERS, Computed, computing_type, config_of, is_plain, made, surroundings
from shapes import SHAPES, random_comparisons, training_data, useful_flops
from transformers import AutoConfig

from prlhf.backbone.loading import choose_device, load_tokenizer
from prlhf.backbone.toys import DTYPES
from prlhf.batch.tokens import EncodedComparison
from prlhf.config import load as config_module
from prlhf.errors import expanded, run_command
from prlhf.forecast.dry_run import predict
from prlhf.forecast.memory import CUDA_CONTEXT
from prlhf.train.log import peak_memory_gb
from prlhf.train.process import keep_freed_memory

# The allowed difference between arms, relative to the largest reward margin. float32: a margin of about 1 is beta times the
# difference of sums of a hundred to a few thousand, each exact to 1e-7 of itself, so rounding is 1e-5 to 1e-4 of the margin
# (measured: 1e-5 to 6e-5); a change of 1% in one layer's weights gives 2e-3. bfloat16: rounding hidden states to 2^-9 in each
# block changes a logit by 1 to 2%.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel")


def check_equal(computed: dict[str, Computed], dtype: str) -> None:
    """Check that all plain DPO arms compute the same, and all P-DPO arms with users before the prompt.

    SystemExit if the update's loss or a reward margin differs between arms by more than TOLERANCE times the largest margin, or
    is not finite. The margins tell arms apart; a loss is near log 2 for any weights.
    """
    plain = {label: found for label, found in computed.items() if is_plain(label)}
    behind = {label: found for label, found in computed.items() if label == BEHIND}  # alone: checks that it is finite
    personal = {label: found for label, found in computed.items() if label not in (*plain, BEHIND)}
    for group in (plain, behind, personal):
        if not group:
            continue
        found = torch.tensor([[loss, *margins] for loss, margins in group.values()], dtype=torch.float64)
        allowed = TOLERANCE[dtype] * found[0, 1:].abs().max()
        apart = (found - found[0]).abs().max()
        if not apart <= allowed:  # true for NaN too
            raise SystemExit(f"the arms do not compute the same: {apart:.1e} apart, expected {allowed:.1e}: {group}")


class WorkerDied(Exception):
    """A worker's process has ended; its messages are on stderr."""


class Worker:
    """An arm in a process of its own, which works only when asked."""

    MARK = "answer: "

    def __init__(self, label: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", label],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The process's next answer."""
        for line in self.process.stdout:
            if line.startswith(self.MARK):
                return json.loads(line[len(self.MARK) :])
        raise WorkerDied

    def ask(self, what: str) -> dict[str, Any]:
        """ "start": reference_s; "check": loss, margins (`Computed`); "step": seconds, peak_gb."""
        with contextlib.suppress(BrokenPipeError):  # `answer` then finds the end of the output
            self.process.stdin.write(what + "\n")
        return self.answer()

    def end(self) -> None:
        """Close the process's input and wait for its end."""
        self.process.communicate()


def work(label: str, args: argparse.Namespace, comparisons: list[EncodedComparison]) -> None:
    """A worker's loop: read a line, print an answer."""
    cuda = torch.cuda.is_available()
    for line in sys.stdin:
        what = line.strip()
        if what == "start":
            arm = made(label, args, comparisons)
            found = {"reference_s": arm.reference_s}
        elif what == "check":
            found = arm.computed()._asdict()
        else:
            if cuda:
                arm.step()  # allocates the freed memory again
                torch.cuda.synchronize()
            started = time.perf_counter()
            arm.step()
            if cuda:
                torch.cuda.synchronize()
            found = {"seconds": time.perf_counter() - started, "peak_gb": peak_memory_gb()}
        if cuda:
            torch.cuda.empty_cache()
        print(Worker.MARK + json.dumps(found), flush=True)


@dataclass
class Measured:
    """The measurements of an arm."""

    reference_s: float
    computed: Computed | None = None
    seconds: list[float] = field(default_factory=list)
    peak_gb: float = math.nan


def measure(labels: Sequence[str], rounds: int, dtype: str) -> dict[str, Measured]:
    """Start all arms, check them, and let each take one step per round.

    A batch size of TRL whose process dies (too little memory) is left out.
    """
    workers = {label: Worker(label) for label in labels}
    found: dict[str, Measured] = {}
    for what in ("start", "check", *["step"] * rounds):
        for label in list(workers):
            try:
                answer = workers[label].ask(what)
            except WorkerDied:
                if not label.startswith("trl"):
                    raise SystemExit(f"the worker of {label} died; its messages are above") from None
                print(f"{label} is left out: its worker died; the messages are above", flush=True)
                del workers[label]
                found.pop(label, None)
                continue
            if what == "start":
                found[label] = Measured(**answer)
            elif what == "check":
                found[label].computed = Computed(**answer)
            else:
                found[label].seconds.append(answer["seconds"])
                found[label].peak_gb = answer["peak_gb"]
        if what == "check":
            check_equal({label: arm.computed for label, arm in found.items()}, dtype)
    for worker in workers.values():
        worker.end()
    return found


def arguments(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/prlhf/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", default="tldr", choices=SHAPES)
    parser.add_argument("--comparisons", type=int, default=4, help="per update")
    parser.add_argument("--micro-batch", type=int, default=1, help="trees per forward pass")
    parser.add_argument("--trl-batch", type=int, nargs="+", default=[1, 2, 4], help="sizes that divide --comparisons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 is full fine-tuning")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--arms", nargs="+", default=[*ARMS, "trl"], choices=[*ARMS, "trl"])
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for the prlhf arms")
    parser.add_argument("--one-at-a-time", action="store_true", help="for models that do not fit in memory together")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="also write the table as JSON")
    return parser.parse_args()


def labels(args: argparse.Namespace) -> list[str]:
    """The labels of the arms asked for; TRL has one per batch size."""
    trl = [f"trl, batch {size}" for size in args.trl_batch]
    return [label for arm in args.arms for label in (trl if arm == "trl" else [arm])]


def comparisons_of(args: argparse.Namespace) -> list[EncodedComparison]:
    """The comparisons of the update: random tokens of the model's vocabulary."""
    vocabulary = len(load_tokenizer(config_module.load_config(None, [f"model.name={args.model}"]).model))
    return random_comparisons(args.shape, args.comparisons, vocabulary, USERS, args.seed)


def main() -> None:
    args = arguments(__doc__)
    comparisons = comparisons_of(args)
    if args.worker:
        if args.worker in OURS:
            keep_freed_memory()  # as train.py does
        with surroundings(args.worker, args):
            work(args.worker, args, comparisons)
        return

    dtype, found = computing_type(args), {}
    for group in [[label] for label in labels(args)] if args.one_at_a_time else [labels(args)]:
        found |= measure(group, args.rounds, dtype)
    check_equal({label: arm.computed for label, arm in found.items()}, dtype)
    rate = matmul_rate(AutoConfig.from_pretrained(str(expanded(args.model))).hidden_size, DTYPES[dtype])
    report(args, comparisons, found, Machine(device_name(), rate, dtype, versions()))


class Machine(NamedTuple):
    """The machine of the measurement, and package versions (None: not installed)."""

    device: str
    matmul_rate: float  # FLOPs a second
    dtype: str  # of the matrix product
    versions: dict[str, str | None]


def device_name() -> str:
    """The GPU's name, or the processor's and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """The installed version of each of PACKAGES."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def matmul_rate(width: int, dtype: torch.dtype, rounds: int = 7) -> float:
    """FLOPs per second of (8192, D) x (D, 4 D) on a GPU, with a quarter of the rows on a CPU; median of the rounds."""
    device = choose_device("auto")
    rows = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(*size, device=device).to(dtype) for size in ((rows, width), (width, 4 * width)))
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 8 * rows * width**2 / statistics.median(times[1:])


def shares_of_rate(
    args: argparse.Namespace, comparisons: Sequence[EncodedComparison], seconds: dict[str, float], rate: float
) -> dict[str, float]:
    """Each arm's useful FLOPs per second, as a share of the matmul rate."""
    config = AutoConfig.from_pretrained(str(expanded(args.model)))
    found = {}
    for name, time_taken in seconds.items():
        vectors, branches = (0, 1) if is_plain(name) else (10, 2)
        flops = useful_flops(config, comparisons, vectors, branches, args.lora > 0, shared_prompt=name == BEHIND)
        found[name] = flops / (time_taken * rate)
    return found


def predicted_gb(name: str, args: argparse.Namespace, comparisons: list[EncodedComparison]) -> float:
    """An arm's peak memory as the dry run predicts it, in 1e9 bytes, counted as in `peak_memory_gb`; without the saving of a
    checkpoint, which no arm does."""
    config, device = config_of(name, args), choose_device("auto")
    memory = predict(config, load_tokenizer(config.model), training_data(comparisons, USERS), device).memory
    peak = max(size for phase, size in memory.peaks.items() if phase != "saving")
    return (peak - (CUDA_CONTEXT if device == "cuda" else 0)) / 1e9


def report(
    args: argparse.Namespace, comparisons: list[EncodedComparison], found: dict[str, Measured], machine: Machine
) -> None:
    """Print the table, and write it as JSON if --out is given."""
    medians = {name: statistics.median(arm.seconds) for name, arm in found.items()}
    trl = {name: t for name, t in medians.items() if name.startswith("trl")}
    best = min(trl, key=lambda name: trl[name]) if trl else None
    useful = sum(c.length for c in comparisons)
    shares = shares_of_rate(args, comparisons, medians, machine.matmul_rate)
    rows = []
    for name, median in medians.items():
        arm = found[name]
        rows.append(
            {
                "arm": name,
                "comparisons_per_s": len(comparisons) / median,
                "useful_tokens_per_s": useful / median,
                "slowest_over_fastest_round": max(arm.seconds) / min(arm.seconds),
                "times_trl": medians[best] / median if best else None,
                "memory_gb": arm.peak_gb,
                "predicted_gb": predicted_gb(name, args, comparisons) if name in OURS else None,
                "memory_over_trl": arm.peak_gb / found[best].peak_gb if best else None,
                "reference_in_steps": arm.reference_s / median,
                "share_of_matmul_rate": shares[name],
                "loss": arm.computed.loss,
                "margins": arm.computed.margins,
            }
        )
    print("| | comparisons/s | useful tokens/s | speed over TRL's best | peak GB | by the dry run | over TRL's "
          "| reference, in steps | share of the matmul rate |")  # fmt: skip
    print("|---" * 9 + "|")
    for r in rows:
        cells = [f"{r['comparisons_per_s']:.3f}", f"{r['useful_tokens_per_s']:.0f}"]
        cells += ["-" if r["times_trl"] is None else f"{r['times_trl']:.2f}"]
        cells += [f"{r['memory_gb']:.2f}", "-" if r["predicted_gb"] is None else f"{r['predicted_gb']:.2f}"]
        cells += ["-" if r["memory_over_trl"] is None else f"{r['memory_over_trl']:.2f}"]
        print(
            f"| {r['arm']} | "
            + " | ".join([*cells, f"{r['reference_in_steps']:.2f}"])
            + f" | {r['share_of_matmul_rate']:.2f} |"
        )
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine.versions.items())
    rate = f"{machine.matmul_rate / 1e12:.3f} TFLOP/s, {machine.dtype}"
    print(f"\nmatmul rate: {rate}, measured in this run, while no arm was working\n{machine.device}; {packages}")
    if args.out:
        seconds = {name: arm.seconds for name, arm in found.items()}
        written = {"arguments": vars(args), **machine._asdict(), "seconds": seconds, "rows": rows}
        Path(args.out).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
