"""Accuracy that can be reached without reading the text: matrix factorisation of who chose which response.

    python -m examples.factorisation --data FOLDER [--rank 4] [--seeds 0 1 2]

The reward of response y, whatever its text, is b_y for the generic user and b_y + z_u . v_y for user u. This is a linear reward
head whose hidden states have one dimension per response; prior, cross-validation and solver are those of a model that reads
(`prlhf.solve`). Prints the accuracy on held-out comparisons of responses that were judged in training: of known users (as
themselves, and as the generic user) and of unknown users. On responses that nobody judged it is 50% by construction.
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
from prlhf.solve.linear import LinearProblem, solve
from prlhf.solve.strength import choose

ALPHA = 0.5


class Factorisation:
    """Factors fitted to training comparisons, and the rewards of all their responses (M + 1, S)."""

    def __init__(self, train: Sequence[Comparison], users: UserIndex, rank: int, seed: int):
        keys = [key for c in train for key in response_keys(as_read(c))]
        self.number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.users = users
        S, M = len(self.number), len(users)
        y = torch.tensor([self.number[key] for key in keys]).view(-1, 2)
        users_N = torch.tensor([users.number(c.user) for c in train])
        own_N = ALPHA * (users_N > 0).double()
        states_SS = torch.eye(S, dtype=torch.float64) / 2**0.5  # a difference of two rows has length 1
        ones, zeros = states_SS.new_ones, states_SS.new_zeros
        problem = LinearProblem(
            LossConfig(alpha=ALPHA), states_SS, ones(S), y[:, 0], y[:, 1], users_N, ones(len(train)), own_N, M
        )
        model = LowRankUsers(zeros(1, S), zeros(rank, 1, S), zeros(M, rank))
        config = UserModelConfig(rank=rank, prior="auto", shared_prior="auto")
        self.strength = choose(problem, model, config, seed).strength
        solve(problem, model, self.strength)
        self.rewards_MS = (problem.vectors(model) @ states_SS.T).detach().numpy()

    def accuracy(self, comparisons: Sequence[Comparison], generic: bool = False) -> float:
        """Share of comparisons whose chosen response has the larger reward. Ties count 1/2; an unseen response has reward 0."""
        right = []
        for c in map(as_read, comparisons):
            row = self.rewards_MS[0 if generic else self.users.number(c.user)]
            chosen, rejected = (row[self.number[k]] if k in self.number else 0.0 for k in response_keys(c))
            right.append(0.5 + 0.5 * np.sign(chosen - rejected))
        return float(np.mean(right))


def main() -> None:
    """Print one row per seed."""
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
