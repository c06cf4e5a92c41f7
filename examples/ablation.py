"""The paper's ablations at small scale: the effect of alpha, the number of clusters, the shared component and T_u.

    make length-data model && python -m examples.ablation [linear | tokens] [--out runs/ablation] [--seeds 0 1 2]
                                                          [--set key=value ...]

Simulated length preferences (configs/length_prm.yaml): ten workers, of whom 4, 5 and 6 prefer the shorter response.
linear: P-RM with a linear head on a frozen SmolLM2-135M, minutes on a CPU. tokens: T_u, the number of a user's vectors, in the
soft prompt of a P-RM with LoRA. Prints a table. The same command again continues where it stopped.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples import grid
from prlhf.errors import run_command

LINEAR = {
    "vanilla (uniform)": ("user_model.kind=uniform",),
    "individual, alpha 0": ("loss.alpha=0",),
    "individual, alpha 0.25": ("loss.alpha=0.25",),
    "individual, alpha 0.5": ("loss.alpha=0.5",),
    "individual, alpha 0.75": ("loss.alpha=0.75",),
    "individual, alpha 1": ("loss.alpha=1",),
    "individual, alpha 0.5, not shared": ("loss.alpha=0.5", "user_model.shared=false"),
    "cluster, K = 1": ("user_model.kind=cluster", "user_model.clusters=1"),
    "cluster, K = 2": ("user_model.kind=cluster", "user_model.clusters=2"),
    "cluster, K = 5": ("user_model.kind=cluster", "user_model.clusters=5"),
    "cluster, K = 10": ("user_model.kind=cluster", "user_model.clusters=10"),
}
SOFT_PROMPT = (
    "model.frozen=false", "lora.rank=8", "optim.lr=1e-3", "optim.batch_size=8", "optim.micro_batch_size=8", "optim.epochs=1",
    "user_model.aggregator=soft_prompt", "user_model.init=vocabulary", "user_model.lr=1e-2",
)  # fmt: skip
TOKENS = {f"individual, T_u = {tokens}": (f"user_model.tokens={tokens}",) for tokens in (1, 4, 16)}
TABLES = {"linear": (LINEAR, ()), "tokens": (TOKENS, SOFT_PROMPT)}  # arms, and the keys that all of them have


def main() -> None:
    """Run every arm and seed, then print the table."""
    parser = grid.options(__doc__, "runs/ablation")
    parser.add_argument("table", nargs="?", default="linear", choices=list(TABLES))
    args = parser.parse_args()
    arms, keys = TABLES[args.table]
    evaluations = grid.run_grid(args, {name: grid.Arm("length_prm.yaml", own) for name, own in arms.items()}, keys)
    print("| | Accuracy-top | as the generic user | as another worker | personalisation gain |\n|---|---|---|---|---|")
    for arm, folders in evaluations[""].items():
        print(row(arm, [json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in folders]))


def row(arm: str, reports: Sequence[dict[str, Any]]) -> str:
    """The arm's accuracies and gain in %: mean ± standard deviation over seeds; with one seed, the gain's interval."""
    cells = [_cell([report["accuracy"]["top"] for report in reports])]
    for name in ("generic_user", "shuffled_users", "personalisation_gain"):
        cells.append(_cell([report["controls"].get(name, {}).get("accuracy") for report in reports]))
    interval = reports[0]["controls"].get("personalisation_gain", {}).get("interval")
    if len(reports) == 1 and interval:
        cells[-1] += f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    return f"| {arm} | {' | '.join(cells)} |"


def _cell(values: Sequence[float | None]) -> str:
    if None in values:
        return "-"
    std = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{std}"


if __name__ == "__main__":
    run_command(main)
