"""Which of two systems' responses do users prefer, by a judge? python -m prlhf.judge A.jsonl B.jsonl --judge JUDGE --out DIR

A and B are what generate.py wrote, or comparisons, whose chosen responses are taken: the same prompts of the same users in both.
JUDGE is rule:shorter or rule:longer (by words); prm:RUN, a reward model of prlhf, by each user's own reward; or openai:MODEL, on
any OpenAI-compatible server. Each pair is judged in both orders. Writes report.json, report.md, users.csv, verdicts.jsonl and
win_rate.png: win rates of A against B, with intervals over users. docs/judge.md has more.

What is a policy like for its users, before and after training? python -m prlhf.judge --report RUN --out DIR
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from prlhf.errors import UserError, check_range, run_command
from prlhf.evaluate.held_out import encoder_of
from prlhf.generate.__main__ import asked_names
from prlhf.generate.decode import Decoding
from prlhf.judge.judges import find_judge
from prlhf.judge.pairs import read_pairs
from prlhf.judge.policy import answer_all, asked_by, policy_report, prompts_of, texts_of
from prlhf.judge.policy_page import check_policy_out, policy_markdown, write_policy
from prlhf.judge.report import check_out, judgement, markdown, write
from prlhf.judge.server import add_options, server_of
from prlhf.judge.verdicts import decide
from prlhf.parallel.ranks import check_started_alone
from prlhf.store.final import load_final


def main() -> None:
    """Judge two files of responses; print the report, and write it. With --report: that of a policy."""
    if any(argument.partition("=")[0] == "--report" for argument in sys.argv[1:]):
        report_policy()
        return
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


def report_policy() -> None:
    """Let a policy and its reference answer prompts as several users; print the report, and write it."""
    parser = argparse.ArgumentParser(
        description="What a P-DPO policy is like for its users, before and after training."
    )
    parser.add_argument("--report", required=True, metavar="RUN", help="a run's directory or its final/")
    parser.add_argument("--prompts", help="as for generate.py; by default the different ones of the run's data.valid")
    parser.add_argument("--users", default="@all", help="as for generate.py; by default all known users and generic")
    parser.add_argument("--limit", type=int, default=32, help="the first so many prompts (32)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="1: the log-ratio estimates the KL; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", required=True, help="a folder")
    args = parser.parse_args()
    for name in ("limit", "max_new_tokens", "batch_size"):
        check_range(f"--{name.replace('_', '-')}", getattr(args, name), low=1)
    check_range("--temperature", args.temperature, low=0)

    check_started_alone("prlhf.judge")
    out = Path(args.out)
    check_policy_out(out)
    loaded = load_final(args.report)
    if loaded.config.method != "pdpo":
        raise UserError(f"{loaded.path}: a model of method {loaded.config.method} does not generate, expected pdpo")
    names = asked_names(args.users, loaded.users)
    if not names:
        raise UserError("--users @own: not for --report, which asks each prompt as each user; expected names or @all")
    prompts = prompts_of(loaded, args.prompts, args.limit)
    texts = {} if args.prompts else texts_of(loaded)
    encoder, decoding = encoder_of(loaded), Decoding(args.max_new_tokens, args.temperature, seed=args.seed)
    asked = asked_by(loaded, encoder, prompts, list(dict.fromkeys(names)), texts)
    sides = answer_all(loaded, asked, encoder, decoding, args.batch_size)
    source = args.prompts or loaded.config.data.valid
    report = {
        "policy": str(loaded.path),
        "prompts": {"source": str(source), "n": len(prompts)},
        "decoding": asdict(decoding),
        **policy_report(loaded, asked, sides),
    }
    if not write_policy(out, report, loaded, asked, sides):
        print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
    print(f"{policy_markdown(report)}\nwritten to {out}")


if __name__ == "__main__":
    run_command(main)
