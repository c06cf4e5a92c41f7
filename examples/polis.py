"""Which statement does a voter agree with? The grid behind the Polis table of docs/results.md.

    python -m examples.polis --data FOLDER [--out runs/polis] [--seeds 0 1 2] [--voters N] [--set key=value ...]

Trains a vanilla reward model, individual users, and 5 and 10 clusters with both values of alpha, for every seed, by
train.py; evaluates each on the three held-out files by evaluate.py; and compares them by prlhf.compare. The same command
again goes on where it stopped. --set reaches every run: `model.frozen=true lora.rank=0` is the frozen-backbone table,
`user_model.aggregator=soft_prompt user_model.tokens=4 user_model.init=vocabulary` the other aggregator. --voters N keeps
the first N known voters and the first N unknown ones, for a machine on which all of them take too long.
"""

from pathlib import Path
from typing import Any

from examples import grid
from prlhf import compare
from prlhf.data.files import read_json_lines, write_json_lines
from prlhf.errors import run_command

ARMS = {
    "vanilla": ("user_model.kind=uniform",),
    "individual_a0.5": ("user_model.kind=individual", "loss.alpha=0.5"),
    "individual_a1": ("user_model.kind=individual", "loss.alpha=1"),
    "cluster5_a0.5": ("user_model.kind=cluster", "user_model.clusters=5", "loss.alpha=0.5"),
    "cluster5_a1": ("user_model.kind=cluster", "user_model.clusters=5", "loss.alpha=1"),
    "cluster10_a0.5": ("user_model.kind=cluster", "user_model.clusters=10", "loss.alpha=0.5"),
    "cluster10_a1": ("user_model.kind=cluster", "user_model.clusters=10", "loss.alpha=1"),
}
HELD_OUT = ("seen_statements", "new_statements", "unseen_users")


def first_voters(folder: Path, count: int, out: Path) -> Path:
    """Write the comparisons of the first `count` voters of train.jsonl, and as many unknown ones, into `out`."""

    def records(name: str) -> list[dict[str, Any]]:
        return [record for _, record in read_json_lines(folder / f"{name}.jsonl")]

    out.mkdir(parents=True, exist_ok=True)
    known = list(dict.fromkeys(record["user"] for record in records("train")))[:count]
    unknown = list(dict.fromkeys(record["user"] for record in records("valid_unseen_users")))[:count]
    for name in ("train", *(f"valid_{split}" for split in HELD_OUT)):
        kept = (record for record in records(name) if record["user"] in (*known, *unknown))
        write_json_lines(out / f"{name}.jsonl", kept)
    return out


def main() -> None:
    """Every arm and seed, then the three comparisons."""
    parser = grid.options(__doc__, "runs/polis")
    parser.add_argument("--data", required=True, help="the folder of train.jsonl and valid_*.jsonl")
    parser.add_argument("--voters", type=int, help="keep this many known and unknown voters (default: all)")
    args = parser.parse_args()
    if args.voters:
        args.data = first_voters(Path(args.data), args.voters, Path(args.out) / "data")
    arms = {name: grid.Arm("polis_prm.yaml", keys) for name, keys in ARMS.items()}
    data = (f"data.train={args.data}/train.jsonl", "data.valid=null")
    held_out = {split: f"{args.data}/valid_{split}.jsonl" for split in HELD_OUT}
    evaluations = grid.run_grid(args, arms, data, held_out)
    for split, found in evaluations.items():
        if len(found) > 1:  # one arm has nothing to be compared with
            names = [f"{arm}={','.join(map(str, folders))}" for arm, folders in found.items()]
            grid.call(compare.main, *names, "--out", str(Path(args.out) / f"comparison_{split}"))


if __name__ == "__main__":
    run_command(main)
