"""Whom does a model fail: those who agree with others, or those who do not?

    python -m examples.conformity TRAIN NAME=EVAL_DIR[,EVAL_DIR...] [NAME=... ...] [--groups 3]

A user's conformity is the share of their training comparisons in which they chose the response with the larger share of the
*others'* votes, (wins + 1) / (votes + 2), a tie counting one half. Users are cut into groups of equal size by it, and each
model's Accuracy-average in each group is printed, the mean over seeds where NAME has the folders of several.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from prlhf.data.check.rules import prompt_key
from prlhf.data.check.tables import percent
from prlhf.data.comparisons import Comparison, read_comparisons
from prlhf.errors import UserError, check_range, run_command
from prlhf.evaluate.compare import parse_models
from prlhf.evaluate.margins import read_margins


def conformity(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Each user's agreement with the others, in [0, 1]."""
    wins, votes = Counter(), Counter()  # by response, and by user and response
    for c in comparisons:
        for response in (c.chosen, c.rejected):
            key = (prompt_key(c.prompt), response)
            votes.update([key, (c.user, key)])
            if response == c.chosen:
                wins.update([key, (c.user, key)])

    def others_share(user: str | None, key: tuple) -> float:
        own = (user, key)
        return (wins[key] - wins[own] + 1) / (votes[key] - votes[own] + 2)

    agreed = defaultdict(list)
    for c in comparisons:
        if c.user:
            chosen, rejected = (others_share(c.user, (prompt_key(c.prompt), r)) for r in (c.chosen, c.rejected))
            agreed[c.user].append((chosen > rejected) + 0.5 * (chosen == rejected))
    return {user: float(np.mean(values)) for user, values in agreed.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("models", nargs="+", metavar="NAME=EVAL_DIR[,EVAL_DIR...]")
    parser.add_argument("--groups", type=int, default=3)
    args = parser.parse_args()
    agreement = conformity(read_comparisons(args.train).comparisons)
    if not agreement:
        raise UserError(f"{args.train}: no comparison has a user, expected some with one")
    check_range("--groups", args.groups, low=1, high=len(agreement))
    groups = np.array_split(sorted(agreement, key=lambda user: (agreement[user], user)), args.groups)
    ends = [f"{percent(agreement[group[0]])} to {percent(agreement[group[-1]])}" for group in groups]
    print("| conformity, % | " + " | ".join(ends) + " |\n" + "|---" * (args.groups + 1) + "|")
    for name, folders in parse_models(args.models).items():
        of_user = defaultdict(list)
        for folder in folders:
            comparisons, right_B = read_margins(folder)
            for user, right in zip(comparisons.users, right_B):
                of_user[user].append(right)
        means = [np.mean([np.mean(of_user[user]) for user in group if user in of_user]) for group in groups]
        print(f"| {name} | " + " | ".join(percent(mean) for mean in means) + " |")


if __name__ == "__main__":
    run_command(main)
