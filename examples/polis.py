"""Which statement does a voter agree with? The grid behind the Polis tables of docs/results.md.

    python -m examples.polis --data FOLDER [--config polis_prm.yaml] [--out runs/polis] [--seeds 0 1 2] [--set key=value ...]

Trains a vanilla reward model and each user model for every seed (train.py). Evaluates each (evaluate.py) on known voters' unseen
votes, on statements that occur in no training comparison, and on unknown voters. Compares them (prlhf.compare). Arms whose name
ends in _paper have the paper's form: no prior, AdamW, the last token's state. The same command again continues where it
stopped. --config polis_lora_prm.yaml trains the backbone too.

The accuracy that can be reached without reading the text: python -m examples.factorisation --data FOLDER
"""

from pathlib import Path

from examples import grid
from prlhf.errors import run_command
from prlhf.evaluate import compare

PAPER = (
    "user_model.prior=null", "user_model.rank=null", "user_model.init=zero", "model.pooling=last", "user_model.lr=0.03",
    "optim.epochs=10", "optim.batch_size=128", "optim.micro_batch_size=128",
)  # fmt: skip
ARMS = {
    "vanilla": ("user_model.kind=uniform", "user_model.rank=null"),
    "individual": ("user_model.kind=individual", "user_model.rank=null"),
    "rank4": ("user_model.kind=individual", "user_model.rank=4"),
    "cluster5": ("user_model.kind=cluster", "user_model.rank=null", "user_model.clusters=5"),
    "vanilla_paper": ("user_model.kind=uniform", *PAPER),
    "individual_paper": ("user_model.kind=individual", *PAPER),
    "cluster5_paper": ("user_model.kind=cluster", "user_model.clusters=5", *PAPER),
}
HELD_OUT = ("valid_seen_statements", "valid_new_statements", "unseen_users_test")


def main() -> None:
    """Run every arm and seed, then the three comparisons."""
    parser = grid.options(__doc__, "runs/polis")
    parser.add_argument("--data", required=True, help=f"the folder of train.jsonl, {', '.join(HELD_OUT)}.jsonl")
    parser.add_argument(
        "--config", default="polis_prm.yaml", metavar="NAME", help="of every run (default: %(default)s)"
    )
    args = parser.parse_args()
    arms = {name: grid.Arm(args.config, keys) for name, keys in ARMS.items()}
    data = (f"data.train={args.data}/train.jsonl", "data.valid=null")
    evaluations = grid.run_grid(args, arms, data, {split: f"{args.data}/{split}.jsonl" for split in HELD_OUT})
    for split, found in evaluations.items():
        if len(found) > 1:  # a single arm has nothing to compare with
            names = [f"{arm}={','.join(map(str, folders))}" for arm, folders in found.items()]
            grid.call(compare.main, *names, "--out", str(Path(args.out) / f"comparison_{split}"))


if __name__ == "__main__":
    run_command(main)
