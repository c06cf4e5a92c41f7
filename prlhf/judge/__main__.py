"""Which of two systems' responses do users prefer, by a judge? python -m prlhf.judge A.jsonl B.jsonl --judge JUDGE --out DIR

A and B are what generate.py wrote, or comparisons, whose chosen responses are taken: the same prompts of the same users in both.
JUDGE is rule:shorter or rule:longer (by words); prm:RUN, a reward model of prlhf, by each user's own reward; or openai:MODEL, on
any OpenAI-compatible server. Each pair is judged in both orders. Writes report.json, report.md, users.csv, verdicts.jsonl and
win_rate.png: win rates of A against B, with intervals over users. docs/judge.md has more.
"""

import argparse
from pathlib import Path

from prlhf.errors import run_command
from prlhf.judge.judges import find_judge
from prlhf.judge.pairs import read_pairs
from prlhf.judge.report import check_out, judgement, markdown, write
from prlhf.judge.server import add_options, server_of
from prlhf.judge.verdicts import decide


def main() -> None:
    """Judge two files of responses; print the report, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A.jsonl", help="responses")
    parser.add_argument("b", metavar="B.jsonl", help="responses to the same prompts for the same users")
    parser.add_argument(
        "--judge", required=True, metavar="JUDGE", help="rule:shorter, rule:longer, prm:RUN or openai:MODEL"
    )
    parser.add_argument("--out", required=True, help="a folder")
    add_options(parser)
    args = parser.parse_args()

    server = server_of(args)
    out, asked = Path(args.out), {"judge": args.judge, "a": args.a, "b": args.b}
    check_out(out, asked)
    pairs = read_pairs(args.a, args.b)
    judge = find_judge(args.judge, [pair.user for pair in pairs], server)
    decisions = decide(pairs, judge)
    if server and server.dry_run:
        print(server.forecast())
        return
    report = {**asked, "said": judge.said, **judgement(pairs, decisions)}
    if not write(out, report, pairs, decisions):
        print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
    print(markdown(report))
    print(f"written to {out}")


if __name__ == "__main__":
    run_command(main)
