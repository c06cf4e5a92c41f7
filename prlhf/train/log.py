"""The log of a training: metrics.jsonl, the progress bar, and TensorBoard if the config asks for it."""

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf.config.keys import Config
from prlhf.errors import UserError
from prlhf.parallel.ranks import rank, summed
from prlhf.store.runs import Run

SHOWN_NUMBERS = ("loss", "user_accuracy", "generic_accuracy", "accuracy_top", "accuracy_generic")


@dataclass
class Sums:
    """Sums over updates. A record of metrics.jsonl is made of them. Every checkpoint holds them."""

    loss: float = 0.0
    updates: int = 0
    comparisons: int = 0
    tokens: int = 0
    seconds: float = 0.0
    margin: dict[str, float] = field(default_factory=lambda: {"user": 0.0, "generic": 0.0})
    right: dict[str, float] = field(default_factory=lambda: {"user": 0.0, "generic": 0.0})
    seen: dict[str, int] = field(default_factory=lambda: {"user": 0, "generic": 0})

    def add_margins(self, branches: Sequence[str], margins_B: Tensor) -> None:
        """Add the reward margin of each row to its branch. A positive margin is right; a tie counts one half."""
        for name, margin in zip(branches, margins_B.tolist()):
            self.margin[name] += margin
            self.right[name] += 0.5 if margin == 0 else float(margin > 0)
            self.seen[name] += 1

    def add(self, other: "Sums") -> None:
        """Add other sums to these."""
        for name in ("loss", "updates", "comparisons", "tokens", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("margin", "right", "seen"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for branch in mine:
                mine[branch] += theirs[branch]

    def over_ranks(self) -> None:
        """Sum loss, margins and counts of one update over all processes."""
        mine: tuple[dict[str, Any], ...] = (self.margin, self.right, self.seen)
        values = torch.tensor([self.loss, *(counts[name] for counts in mine for name in counts)], dtype=torch.float64)
        self.loss, *rest = summed(values).tolist()
        for counts in mine:
            for name in counts:
                counts[name] = type(counts[name])(rest.pop(0))

    def accuracy(self, branch: str) -> float | None:
        """The share of a branch's comparisons whose margin was positive; None where there were none."""
        return _per(self.right[branch], self.seen[branch])

    def record(self) -> dict[str, Any]:
        """Means over the updates and over each branch's comparisons; null where nothing was counted."""
        return {
            "loss": _per(self.loss, self.updates),
            **{f"{name}_margin": _per(self.margin[name], self.seen[name]) for name in self.seen},
            **{f"{name}_accuracy": self.accuracy(name) for name in self.seen},
            "comparisons_per_s": _per(self.comparisons, self.seconds),
            "tokens_per_s": _per(self.tokens, self.seconds),
            "peak_memory_gb": peak_memory_gb(),
        }


def _per(total: float, count: float) -> float | None:
    return total / count if count else None


def peak_memory_gb() -> float:
    """The peak of memory so far, in 1e9 bytes: what torch allocated on the GPU; without one, what this process held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage's peak includes that of the program that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class TrainingLog:
    """Writes records to metrics.jsonl, to the screen above the progress bar, and to TensorBoard. Only rank 0 writes."""

    def __init__(self, config: Config, run: Run, first: int, total: int):
        self.run = run
        self.speaks = rank() == 0
        self.writer = _tensorboard(run, first) if config.train.tensorboard and self.speaks else None
        hidden = None if self.speaks else True  # None: where there is no terminal
        self.bar = tqdm(total=total, initial=first, desc="training", unit="update", disable=hidden)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record. It must have "step". A number that is not finite becomes text, because JSON has none."""
        if not self.speaks:
            return
        plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.run.log(plain)
        numbers = {k: v for k, v in plain.items() if isinstance(v, float)}
        kind = "eval" if record.get("eval") else "train"
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(f"{kind}/{name}", value, record["step"])
        text = ", ".join(f"{name} {numbers[name]:.3f}" for name in SHOWN_NUMBERS if name in numbers)
        if text:
            self.say(f"{kind:5} {record['step']:>6}: {text}")

    def say(self, text: str) -> None:
        """Print a line on stderr, above the progress bar."""
        if self.speaks:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the progress bar and flush TensorBoard."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


def _tensorboard(run: Run, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("train.tensorboard: TensorBoard is not installed: pip install 'prlhf[tensorboard]'") from None
    return SummaryWriter(str(run.path / "tensorboard"), purge_step=first + 1)
