"""Which of two systems' responses do users prefer, by a judge? python -m prlhf.judge A.jsonl B.jsonl --judge JUDGE --out DIR

A and B are what generate.py wrote, or comparisons, whose chosen responses are taken: the same prompts of the same users in both.
JUDGE is rule:shorter or rule:longer (by words); simulated:FILE, whichever of these each simulated user of FILE follows; or
prm:RUN, a reward model of prlhf, by each user's own reward. Each pair is judged in both orders. Writes report.json, report.md,
users.csv, verdicts.jsonl and win_rate.png: win rates of A against B, with intervals over users. Of more than two files the last
is the baseline, which each of the others is judged against: a table, and a folder of these files for each. docs/judge.md has more.
"""

import argparse
from pathlib import Path

from prlhf.errors import UserError, run_command
from prlhf.judge.judges import find_judge
from prlhf.judge.pairs import read_pairs
from prlhf.judge.report import check_out, judgement, markdown, write
from prlhf.judge.table import judge_systems, systems_markdown
from prlhf.judge.verdicts import decide


def main() -> None:
    """Judge files of responses; print the report, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A.jsonl", nargs="+", help="responses; of several systems, a file each")
    parser.add_argument("b", metavar="B.jsonl", help="responses to the same prompts for the same users")
    judges = "rule:shorter, rule:longer, simulated:FILE or prm:RUN"
    parser.add_argument("--judge", required=True, metavar="JUDGE", help=judges)
    parser.add_argument("--out", required=True, help="a folder")
    args = parser.parse_args()

    several = len(args.a) > 1
    out, asked = Path(args.out), {"judge": args.judge, "a": args.a if several else args.a[0], "b": args.b}
    check_out(out, asked)
    pairs = {file: read_pairs(file, args.b) for file in args.a}
    if len(pairs) < len(args.a):
        raise UserError(f"{' '.join(args.a)}: found a file twice, expected each system once")
    judge = find_judge(args.judge, [pair.user for pair in pairs[args.a[0]]])
    if several:
        print(systems_markdown(judge_systems(out, asked, judge, pairs)))
    else:
        (own,) = pairs.values()
        decisions = decide(own, judge)
        report = {**asked, "said": judge.said, **judgement(own, decisions)}
        if not write(out, report, own, decisions):
            print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
        print(markdown(report))
    print(f"written to {out}")


if __name__ == "__main__":
    run_command(main)
