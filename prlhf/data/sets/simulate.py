"""Simulated annotators (paper, section 3.1): relabel comparisons so that each user prefers longer or shorter text.

    python -m prlhf.simulate FILE --out OUT [--workers 10] [--seed 3456] [--shorter 0.3]

Each user, in order of number of comparisons, draws a preference: shorter with probability 0.3, longer otherwise. With numpy's
RandomState and the paper's seed 3456, users 4, 5 and 6 of the first ten prefer shorter. Length is in words; pairs of equal
length are dropped and counted. --workers N first gives the comparisons to worker1 ... workerN, evenly and at random: a file
without users becomes one with users.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from prlhf.data.comparisons import Comparison, read_parsed, words
from prlhf.data.files import Record, write_json_lines
from prlhf.data.users import ranked
from prlhf.errors import UserError, check_range

Responses = tuple[str, str]
OTHER = {"chosen": "rejected", "rejected": "chosen"}


def preferences(users: int, shorter: float, seed: int) -> list[bool]:
    """Whether user 1, 2, ... prefers the shorter response: one draw each with probability `shorter`."""
    return np.random.RandomState(seed).choice([False, True], size=users, p=[1 - shorter, shorter]).tolist()


def assign_workers(count: int, workers: int, seed: int) -> list[str]:
    """worker1 ... workerN for `count` comparisons: as evenly as possible, in a random order."""
    names = [f"worker{i % workers + 1}" for i in range(count)]
    random.Random(seed).shuffle(names)
    return names


def relabel(responses: Responses, prefers_shorter: bool, length: Callable[[str], int] = words) -> Responses | None:
    """The two responses as (chosen, rejected) by the user's preference; None where they are equally long."""
    first, second = responses
    if length(first) == length(second):
        return None
    return (first, second) if (length(first) < length(second)) == prefers_shorter else (second, first)


def simulate(
    records: list[tuple[Record, Comparison]], workers: int | None, shorter: float, seed: int
) -> tuple[list[Record], dict[str, bool], int]:
    """The relabelled records (other fields kept), each user's preference (True: shorter), and the number of ties dropped."""
    if workers:
        names: list[str | None] = list(assign_workers(len(records), workers, seed))
        order = [f"worker{i + 1}" for i in range(workers)]
    else:
        names = [comparison.user for _, comparison in records]
        order = ranked(names)
    if not order:
        raise UserError("no comparison has a user; expected users in the file or --workers N")
    prefers_shorter = dict(zip(order, preferences(len(order), shorter, seed)))
    kept, ties = [], 0
    for (record, c), name in zip(records, names):
        if name is None:
            continue
        labelled = relabel((c.chosen, c.rejected), prefers_shorter[name])
        if labelled is None:
            ties += 1
            continue
        changed = {"chosen": labelled[0], "rejected": labelled[1]}
        if c.first is not None:  # the response that was shown first stays the same one
            changed["first"] = c.first if labelled[0] == c.chosen else OTHER[c.first]
        kept.append({**record, **changed, "user": name})
    return kept, prefers_shorter, ties


def rules_of(comparisons: Iterable[Comparison]) -> dict[str, tuple[bool, int]]:
    """Each simulated user's rule, read back from their comparisons, and how many these are: (True, n) prefers shorter.

    UserError, with the line, where a comparison has no user, responses of equal length, or another preference than its user's
    comparisons before: nobody simulated chose it.
    """
    found: dict[str, tuple[bool, int]] = {}
    for c in comparisons:
        difference = words(c.chosen) - words(c.rejected)
        if c.user is None or difference == 0:
            what = "no user" if c.user is None else "responses of equal length"
            raise UserError(f"{c.where}: found {what}, expected a comparison as prlhf.simulate writes it")
        shorter, count = found.get(c.user, (difference < 0, 0))
        if shorter != (difference < 0):
            raise UserError(
                f"{c.where}: user {c.user!r} chose the {'longer' if shorter else 'shorter'} response here, and the other before; "
                "expected a simulated user, who always prefers one of these"
            )
        found[c.user] = shorter, count + 1
    return found


def main() -> None:
    """Relabel a file of comparisons, and print each user's preference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="comparisons, with or without users")
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, help="give the comparisons to this many new users")
    parser.add_argument("--shorter", type=float, default=0.3, help="probability that a user prefers shorter responses")
    parser.add_argument("--seed", type=int, default=3456)
    args = parser.parse_args()
    check_range("--shorter", args.shorter, low=0, high=1)
    check_range("--seed", args.seed, low=0, high=2**32 - 1)
    check_range("--workers", 1 if args.workers is None else args.workers, low=1)

    records = [(record, comparison) for _, record, comparison in read_parsed(args.file)]
    kept, prefers_shorter, ties = simulate(records, args.workers, args.shorter, args.seed)
    write_json_lines(args.out, kept)
    counts = Counter(record["user"] for record in kept)
    for user, shorter in prefers_shorter.items():
        print(f"{user}: {counts[user]} comparisons, prefers {'shorter' if shorter else 'longer'}")
    majority = sum(counts[user] for user, shorter in prefers_shorter.items() if not shorter)
    share = max(majority, len(kept) - majority) / max(1, len(kept))
    print(f"{args.out}: {len(kept)} comparisons, {ties} ties dropped; the majority's preference covers {share:.4f}")
