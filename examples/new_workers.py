"""Comparisons of new simulated workers for a checkpoint of the length demo (docs/results.md):

    python -m examples.new_workers --checkpoint RUN --shots 1 2 5 10 --draws 3 --out new.jsonl
    python -m examples.new_workers --checkpoint RUN --shots 1 2 5 10 --draws 3 --held-out FILE 8 --out held_out.jsonl

short0_n5 prefers the shorter response of 5 pairs, long0_n5 the longer one of 5 others. Pairs are of RUN's training file, drawn at
random from those that RUN did not learn from; a worker's first ones are those of the same draw with fewer. No new worker has a
pair of the held-out prompts. With --held-out FILE N each has N pairs of FILE in place of those to learn from.
"""

import argparse
import random

from prlhf.config.load import load_resolved
from prlhf.data.comparisons import read_comparisons, read_parsed, words
from prlhf.data.files import write_json_lines
from prlhf.data.sets.simulate import relabel
from prlhf.errors import UserError, run_command
from prlhf.store.final import find_final

PREFERS_SHORTER = {"short": True, "long": False}


def main() -> None:
    """Write the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    parser.add_argument("--shots", type=int, nargs="+", required=True, help="how many comparisons a worker has")
    parser.add_argument("--draws", type=int, default=1, help="draws of pairs")
    parser.add_argument("--out", required=True)
    parser.add_argument("--held-out", nargs=2, metavar=("FILE", "N"), help="pairs to predict, from this file")
    args = parser.parse_args()
    config = load_resolved(find_final(args.checkpoint) / "config.yaml")
    path = config.data.train or ""
    learnt = {c.id for c in read_comparisons(path, config.data).sample(config.data.limit, config.seed).comparisons}
    most = max(args.shots)
    if args.held_out:
        path, most, learnt = args.held_out[0], int(args.held_out[1]), set()
    others = [
        (record, c) for _, record, c in read_parsed(path) if c.id not in learnt and words(c.chosen) != words(c.rejected)
    ]
    if len(others) < most:
        raise UserError(f"{path}: the run left out {len(others)} pairs of two lengths, expected {most} or more")
    lines = []
    for draw in range(args.draws):
        for kind, shorter in PREFERS_SHORTER.items():
            drawn = random.Random(f"{kind}{draw}").sample(others, most)
            for shots in args.shots:
                name = f"{kind}{draw}_n{shots}"
                for record, c in drawn if args.held_out else drawn[:shots]:
                    chosen, rejected = relabel((c.chosen, c.rejected), shorter) or ("", "")
                    new = {"chosen": chosen, "rejected": rejected, "user": name, "id": f"{name}_{c.id}"}
                    lines.append({**record, **new})
    write_json_lines(args.out, lines)


if __name__ == "__main__":
    run_command(main)
