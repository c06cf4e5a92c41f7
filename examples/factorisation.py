"""What can be reached without reading a word: matrix factorisation of who chose which response.

    python -m examples.factorisation --data FOLDER [--rank 4] [--seeds 0 1 2]

A response's reward is b_y for everybody, and b_y + z_u . v_y for user u, whatever its text: a linear reward head whose hidden
state is one dimension a response, with the same prior, cross-validation and solver as a model that reads (`prlhf.solve`).
Prints the accuracy on known users' held-out comparisons of responses that others judged in training, as themselves and as the
generic user, and on unknown users'. On responses that nobody judged it is one half by construction.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from prlhf.config.keys import LossConfig, UserModelConfig
from prlhf.data.check.rules import as_read, response_keys
from prlhf.data.check.tables import percent
from prlhf.data.comparisons import CANONICAL, Comparison, read_comparisons
from prlhf.data.users import UserIndex
from prlhf.errors import UserError, run_command
from prlhf.method.users import LowRankUsers
from prlhf.solve.linear import LinearProblem, solve, vectors_of_all
from prlhf.solve.strength import choose

ALPHA = 0.5


class Factorisation:
    """The responses of training comparisons by number, and what was fitted to them."""

    def __init__(self, train: Sequence[Comparison], users: UserIndex, rank: int, seed: int):
        keys = [key for c in train for key in response_keys(as_read(c))]
        self.number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.users = users
        S, M = len(self.number), len(users)
        y = torch.tensor([self.number[key] for key in keys]).view(-1, 2)
        users_N = torch.tensor([users.number(c.user) for c in train])
        own_N = ALPHA * (users_N > 0).double()
        like = {"dtype": torch.float64}
        states_SS = torch.eye(S, **like) / 2**0.5  # the difference of two has a square of 1
        problem = LinearProblem(LossConfig(alpha=ALPHA), states_SS, torch.ones(S, **like), y[:, 0], y[:, 1], users_N,
                                torch.ones(len(train), **like), own_N, 1 - own_N, M)  # fmt: skip
        model = LowRankUsers(torch.zeros(1, S, **like), torch.zeros(rank, 1, S, **like), torch.zeros(M, rank, **like))
        config = UserModelConfig(rank=rank, prior="auto", shared_prior="auto")
        self.strength = choose(problem, model, config, seed).strength
        solve(problem, model, self.strength)
        self.rewards_MS = (vectors_of_all(model, M) @ states_SS.T).detach().numpy()

    def accuracy(self, comparisons: Sequence[Comparison], generic: bool = False) -> float:
        """The share of comparisons whose chosen response has the larger reward; ties, and what is new, count one half."""
        right = []
        for c in map(as_read, comparisons):
            row = self.rewards_MS[0 if generic else self.users.number(c.user)]
            chosen, rejected = (row[self.number[k]] if k in self.number else 0.0 for k in response_keys(c))
            right.append(0.5 + 0.5 * np.sign(chosen - rejected))
        return float(np.mean(right))


def main() -> None:
    """A row a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the Polis files")
    parser.add_argument("--rank", type=int, default=4, help="of the user factors (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of the folds")
    args = parser.parse_args()
    if args.rank < 1:
        raise UserError(f"--rank: found {args.rank}, expected at least 1")
    train, seen, unseen = (
        read_comparisons(str(Path(args.data) / f"{name}.jsonl"), CANONICAL).comparisons
        for name in ("train", "valid_seen_statements", "unseen_users_test")
    )
    users = UserIndex.from_comparisons(train, None)
    print("| seed | prior | known users | as the generic user | unknown users |\n|---|---|---|---|---|")
    for seed in args.seeds:
        found = Factorisation(train, users, args.rank, seed)
        cells = (found.accuracy(seen), found.accuracy(seen, generic=True), found.accuracy(unseen))
        print(
            f"| {seed} | {found.strength.users:g}, {found.strength.shared:g} | {' | '.join(map(percent, cells))} |",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
