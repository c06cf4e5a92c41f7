"""Which statement does a voter agree with? The grid behind the Polis table of docs/results.md.

    python -m examples.polis --data FOLDER [--config polis_prm.yaml] [--out runs/polis] [--seeds 0 1 2] [--set key=value ...]

Trains a vanilla reward model, individual users, and 5 and 10 clusters with both values of alpha, for every seed, by
train.py; evaluates each on the three held-out files by evaluate.py; and compares them by prlhf.compare. The same command
again goes on where it stopped. --config polis_lora_prm.yaml is the one of the longer LoRA runs, polis_soft_prm.yaml the
other aggregator; --set reaches every run, and `model.frozen=true lora.rank=0` is the frozen-backbone table.

For a machine on which all of it takes too long, --statements N keeps the comparisons of the N statements that are in most
of the training comparisons (the new statements stay), --voters N the first N known voters and the first N unknown ones,
--comparisons N the first N of each known voter in training, and --held-out N the first N of each voter in each held-out
file.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from examples import grid
from prlhf import compare
from prlhf.data.files import read_json_lines, write_json_lines
from prlhf.errors import check_range, run_command

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


Records = list[dict[str, Any]]


def first_of(records: Records, voters: int | None, each: int | None) -> Records:
    """The first `each` records of each of the first `voters` voters, in their order; None: all."""
    kept = set(list(dict.fromkeys(record["user"] for record in records))[:voters])
    seen: Counter[str] = Counter()
    first = []
    for record in records:
        seen[record["user"]] += 1
        if record["user"] in kept and (each is None or seen[record["user"]] <= each):
            first.append(record)
    return first


def smaller(
    folder: Path, out: Path, statements: int | None, voters: int | None, comparisons: int | None, held_out: int | None
) -> Path:
    """Write the files of `folder` into `out`, with fewer records: those of the `statements` most compared ones in training,
    of the first `voters` known voters and as many unknown ones, the first `comparisons` of each in training and the first
    `held_out` of each in every held-out file; None: all."""

    def records(name: str) -> Records:
        return [record for _, record in read_json_lines(folder / f"{name}.jsonl")]

    def among(kept: set[str], records: Records) -> Records:
        return [record for record in records if {record["chosen"], record["rejected"]} <= kept]

    out.mkdir(parents=True, exist_ok=True)
    train = records("train")
    counts = Counter(record[side] for record in train for side in ("chosen", "rejected"))
    kept = {statement for statement, _ in counts.most_common(statements)}
    train = first_of(among(kept, train), voters, comparisons)
    known = {record["user"] for record in train}
    write_json_lines(out / "train.jsonl", train)
    for split in HELD_OUT:
        of_file = records(f"valid_{split}")
        if statements is not None and split != "new_statements":
            of_file = among(kept, of_file)
        if split != "unseen_users":
            of_file = [record for record in of_file if record["user"] in known]
        write_json_lines(out / f"valid_{split}.jsonl", first_of(of_file, voters, held_out))
    return out


def main() -> None:
    """Every arm and seed, then the three comparisons."""
    parser = grid.options(__doc__, "runs/polis")
    parser.add_argument("--data", required=True, help="the folder of train.jsonl and valid_*.jsonl")
    parser.add_argument(
        "--config", default="polis_prm.yaml", metavar="NAME", help="of every run (default: %(default)s)"
    )
    for name, what in (
        ("statements", "the N statements that are compared most"), ("voters", "the first N known and N unknown voters"),
        ("comparisons", "each voter's first N in training"), ("held-out", "each voter's first N in each held-out file"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"keep {what} (default: all)")
    args = parser.parse_args()
    sizes = {name: vars(args)[name] for name in ("statements", "voters", "comparisons", "held_out")}
    kept = {name: size for name, size in sizes.items() if size is not None}
    for name, size in kept.items():
        check_range(f"--{name.replace('_', '-')}", size, low=1)
    if kept:  # by its sizes, so that runs on other data are other runs
        folder = "_".join(["data", *(f"{name}{size}" for name, size in kept.items())])
        args.data = smaller(Path(args.data), Path(args.out) / folder, *sizes.values())
    arms = {name: grid.Arm(args.config, keys) for name, keys in ARMS.items()}
    data = (f"data.train={args.data}/train.jsonl", "data.valid=null")
    held_out = {split: f"{args.data}/valid_{split}.jsonl" for split in HELD_OUT}
    evaluations = grid.run_grid(args, arms, data, held_out)
    for split, found in evaluations.items():
        if len(found) > 1:  # one arm has nothing to be compared with
            names = [f"{arm}={','.join(map(str, folders))}" for arm, folders in found.items()]
            grid.call(compare.main, *names, "--out", str(Path(args.out) / f"comparison_{split}"))


if __name__ == "__main__":
    run_command(main)
