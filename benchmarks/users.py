"""The cost of the number of users m: a training step, its memory, saving and loading, and a late user against the first.

    python benchmarks/users.py [--users 10 10000 1000000] [--width 64] [--rounds 30] [--out FILE.json]

Takes P-DPO steps of a small random model for individual users (T_u = 1) and for K = 100 clusters at each m, by the functions
that the training loop calls. All updates have the same texts; their users come back every --gap updates if there are enough of
them. The default is just above the number of steps for which momentum moves a row (194), all of which are then caught up. The
warm-up takes --gap updates, all but the last two without the backbone. The arms take turns. The ratio to the smallest m is the
median over rounds of the round's ratio. A step's memory is its peak minus what was held before it, so without the table and its
moments. Saving and loading use safetensors, as for final/. The vectors of a late user (987,654 of a million) and of the first,
and answers of --new-tokens tokens to them, are timed in turn.
"""

import argparse
import ctypes
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shapes import SHAPES, random_comparisons

from prlhf.backbone.loading import choose_device, load_tokenizer
from prlhf.batch.tokens import EncodedComparison
from prlhf.config import load as config_module
from prlhf.errors import run_command
from prlhf.generate.decode import Decoding, Request, generate
from prlhf.method.build import build_model
from prlhf.score.score import score
from prlhf.score.task import Task
from prlhf.train.optimizer import clip, make_optimizer
from prlhf.train.step import accumulate_gradients

KINDS = {
    "individual": ("user_model.kind=individual", "user_model.tokens=1"),
    "cluster": ("user_model.kind=cluster", "user_model.tokens=1", "user_model.clusters=100"),
}


class Arm:
    """A model of one kind for m users, in training."""

    def __init__(self, kind: str, users: int, args: argparse.Namespace):
        keys = ("model.family=llama", f"model.width={args.width}", f"optim.micro_batch_size={args.comparisons}")
        self.kind, self.users, self.updates = kind, users, 0
        self.config = config_module.load_config(None, [*keys, *KINDS[kind]])
        tokenizer = load_tokenizer(self.config.model)
        self.model = build_model(self.config, tokenizer, users).to(choose_device("auto"))
        self.texts = random_comparisons(args.shape, args.comparisons, len(tokenizer), 1, args.seed)
        self.reference = score(self.model, self.texts, None, args.comparisons)
        self.optimizer = make_optimizer(self.config, self.model, args.gap + args.rounds + 1)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        everyone = min(users, args.comparisons * args.gap)
        self.turns = random.Random(args.seed).sample(range(1, users + 1), everyone)
        self.model.train()

    def batch(self) -> list[EncodedComparison]:
        """The next update: the same texts, with the next users."""
        first = self.updates * len(self.texts)
        return [c._replace(user=self.turns[(first + i) % len(self.turns)]) for i, c in enumerate(self.texts)]

    def step(self, backbone: bool = True) -> None:
        """One update, as in the training loop; backbone=False, for the warm-up: a cheap gradient of the user vectors."""
        comparisons = self.batch()
        users = [c.user for c in comparisons]
        self.optimizer.catch_up(self.model.user_model.rows_of([0, *users]))
        if backbone:
            accumulate_gradients(Task(self.config, self.model, comparisons, self.reference), range(len(comparisons)))
        else:
            self.model.user_model(torch.tensor(users, device=self.model.device)).square().mean().backward()
        clip(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    @property
    def table_mb(self) -> float:
        """Size of the table and its two moments, in MB."""
        return 3 * sum(table.nbytes for table in self.model.user_model.tables) / 1e6

    def file_us(self) -> tuple[float, float]:
        """Microseconds per user to save the user model, and to load it."""
        state = {name: p.detach().cpu().contiguous() for name, p in self.model.user_model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "users.safetensors"
            saving = seconds(lambda: save_file(state, path))
            loading = seconds(lambda: self.model.user_model.load_state_dict(load_file(path)))
        return saving / self.users * 1e6, loading / self.users * 1e6

    def read(self, user: int) -> None:
        """Compute one user's vectors."""
        with torch.no_grad():
            self.model.user_model(torch.tensor([user], device=self.model.device))

    def answer(self, user: int, tokens: int) -> None:
        """Generate a response for the user."""
        generate(self.model, [Request(self.texts[0].prefix, user, "x")], (), Decoding(max_new_tokens=tokens))


def seconds(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def extra_mb(call: Callable[[], object]) -> float | None:
    """Peak memory of a call, minus what was held before, in MB; None if the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): forget the peak of resident memory
    except (OSError, AttributeError):
        return None
    before = resident_kb("VmRSS")
    call()
    return (resident_kb("VmHWM") - before) / 1e3


def resident_kb(name: str) -> int:
    """VmRSS (resident memory) or VmHWM (its peak) of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def late_over_first(call: Callable[[int], object], late: int, rounds: int) -> float:
    """Median time of a call for user `late`, over that for user 1; the two take turns."""
    times = [(seconds(lambda: call(late)), seconds(lambda: call(1))) for _ in range(rounds)]
    return statistics.median(t for t, _ in times) / statistics.median(t for _, t in times)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10, 10_000, 1_000_000], help="m, the smallest first")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--shape", default="short", choices=SHAPES)
    parser.add_argument("--comparisons", type=int, default=8, help="per update")
    parser.add_argument("--gap", type=int, default=200, help="updates until a user comes back; as many are warm-up")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--reads", type=int, default=2000, help="of a late user's vectors and of the first one's")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="also write the table as JSON")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    arms = [Arm(kind, users, args) for kind in KINDS for users in args.users]
    for arm in arms:
        for left in reversed(range(args.gap)):
            arm.step(backbone=left < 2)
    times = [[seconds(arm.step) for arm in arms] for _ in range(args.rounds)]
    rows = []
    for i, arm in enumerate(arms):
        smallest = i - i % len(args.users)
        late = round(0.987654 * arm.users)
        saving, loading = arm.file_us()
        arm.model.eval()
        rows.append(
            {
                "kind": arm.kind,
                "users": arm.users,
                "step_ms": statistics.median(found[i] for found in times) * 1e3,
                "over_smallest": statistics.median(found[i] / found[smallest] for found in times),
                "table_mb": arm.table_mb,
                "extra_mb": extra_mb(arm.step),
                "save_us_per_user": saving,
                "load_us_per_user": loading,
                "late_user": late,
                "read_late_over_first": late_over_first(arm.read, late, args.reads),
                "answer_late_over_first": late_over_first(
                    lambda user, arm=arm: arm.answer(user, args.new_tokens), late, args.rounds
                ),
            }
        )
    report(args, rows, times)


def report(args: argparse.Namespace, rows: list[dict], times: list[list[float]]) -> None:
    """Print the table, and write it as JSON if --out is given."""
    print(
        "| users | m | step, ms | over the smallest m | table and moments, MB | a step's memory beside, MB | "
        "save, us/user | load, us/user | late user over first: vectors | answer |"
    )
    print("|---" * 10 + "|")
    for r in rows:
        extra = "-" if r["extra_mb"] is None else f"{r['extra_mb']:.0f}"
        cells = [r["kind"], f"{r['users']}", f"{r['step_ms']:.1f}", f"{r['over_smallest']:.2f}", f"{r['table_mb']:.1f}"]
        cells += [extra, f"{r['save_us_per_user']:.2f}", f"{r['load_us_per_user']:.2f}"]
        cells += [f"{r['read_late_over_first']:.2f}", f"{r['answer_late_over_first']:.2f}"]
        print("| " + " | ".join(cells) + " |")
    if args.out:
        found = {"arguments": vars(args), "seconds": times, "rows": rows}
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
