"""Which of two systems' responses do users prefer, by a judge? python -m prlhf.judge A.jsonl B.jsonl --judge JUDGE --out DIR

A and B are what generate.py wrote, or comparisons, whose chosen responses are taken: the same prompts of the same users in both.
JUDGE is one of
  rule:shorter, rule:longer   by words
  simulated:FILE              whichever of these rules each simulated user of FILE follows
  prm:RUN                     a reward model of prlhf, by each user's own reward
  hf:PATH                     a local language model, by the log-probabilities of its answer letters
  openai:MODEL                a language model on any OpenAI-compatible server
Each pair is judged in both orders.
Writes report.json, report.md, users.csv, verdicts.jsonl and win_rate.png: win rates of A against B, with intervals over users.
Of more than two files the last is the baseline, which each other one is judged against: one table, and a folder of these files
for each.

Is the judge to be believed? python -m prlhf.judge --validate comparisons.jsonl --judge JUDGE --out DIR
How often it agrees with the users' own choices, beside the same judge without anything of the user, and as another user. Writes
validation.json and validation.md, which --validation DIR quotes in a report of win rates.
What is a policy like for its users, before and after training? python -m prlhf.judge --report RUN --out DIR (--report RUN --help)
docs/judge.md has more.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from prlhf.data.comparisons import read_comparisons
from prlhf.errors import UserError, check_range, run_command
from prlhf.evaluate.held_out import encoder_of
from prlhf.generate.asked import asked_names
from prlhf.generate.decode import Decoding
from prlhf.judge.judges import find_judge
from prlhf.judge.pairs import read_pairs
from prlhf.judge.policy import answer_all, asked_by, policy_report, prompts_of, texts_of
from prlhf.judge.policy_page import check_policy_out, policy_markdown, write_policy
from prlhf.judge.prompting import ASKED_JUDGES, Prompting, add_prompting_options, prompting_of
from prlhf.judge.queries import Query
from prlhf.judge.report import check_out, judgement, markdown, write
from prlhf.judge.server import add_options, server_of
from prlhf.judge.table import judge_systems, systems_markdown
from prlhf.judge.validation import choices, validation
from prlhf.judge.validation_report import check_validation_out, read_validation, validation_markdown, write_validation
from prlhf.judge.verdicts import decide, queries_of
from prlhf.parallel.ranks import check_started_alone
from prlhf.store.final import load_final


def main() -> None:
    """Judge files of responses, validate a judge, or report on a policy; print the report, and write it."""
    if any(argument.partition("=")[0] == "--report" for argument in sys.argv[1:]):
        return report_policy()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files",
        metavar="FILE.jsonl",
        nargs="*",
        help="responses to the same prompts for the same users; the last is the baseline",
    )
    parser.add_argument(
        "--judge",
        required=True,
        metavar="JUDGE",
        help="rule:shorter, rule:longer, simulated:FILE, prm:RUN, hf:PATH or openai:MODEL",
    )
    parser.add_argument("--out", required=True, help="a folder")
    parser.add_argument(
        "--validate", metavar="FILE", help="comparisons: does the judge agree with their users' own choices?"
    )
    parser.add_argument("--limit", type=int, help="with --validate: a seeded sample of so many comparisons")
    parser.add_argument(
        "--validation", metavar="DIR", help="what --validate wrote of this judge, for the report to quote"
    )
    add_prompting_options(parser)
    add_options(parser)
    args = parser.parse_args()

    if (args.validate and args.files) or (not args.validate and len(args.files) < 2):
        expected = "none beside --validate" if args.validate else "two of responses at least, or --validate FILE"
        raise UserError(f"found {len(args.files)} files, expected {expected}")
    for name, of_validate in (("limit", True), ("validation", False)):
        if getattr(args, name) is not None and of_validate != bool(args.validate):
            raise UserError(f"--{name}: {'only' if of_validate else 'not'} with --validate")
    check_range("--limit", 1 if args.limit is None else args.limit, low=1)
    prompting = prompting_of(args)
    if args.seed and not args.validate and args.judge.partition(":")[0] not in ASKED_JUDGES:
        expected = f"{' or '.join(f'{kind}:...' for kind in ASKED_JUDGES)}, or --validate"
        raise UserError(f"--seed: not for --judge {args.judge}, expected {expected}")
    (validate if args.validate else judge_files)(args, prompting)


def judge_files(args: argparse.Namespace, prompting: Prompting) -> None:
    """Judge one or several files of responses against the last one."""
    *systems, baseline = args.files
    several = len(systems) > 1
    out, asked = Path(args.out), {"judge": args.judge, "a": systems if several else systems[0], "b": baseline}
    asked |= {"settings": prompting.settings} if prompting.settings else {}
    check_out(out, asked)
    pairs = {file: read_pairs(file, baseline) for file in systems}
    if len(pairs) < len(systems):
        raise UserError(f"{' '.join(systems)}: found a file twice, expected each system once")
    first = pairs[systems[0]]
    if args.show:
        return show(prompting, queries_of(first[:1]))
    server = server_of(args, prompting.asked)
    judge = find_judge(args.judge, [pair.user for pair in first], prompting, server, queries_of(first))
    validated = {}
    if args.validation:
        validated = {"validation": read_validation(args.validation, judge, prompting.settings)}
    if server and server.dry_run:
        for own in pairs.values():
            decide(own, judge)
        return print(server.forecast())
    if several:
        print(systems_markdown(judge_systems(out, asked, judge, pairs, validated)))
    else:
        decisions = decide(first, judge)
        report = {**asked, "said": judge.said, **validated, **judgement(first, decisions)}
        if not write(out, report, first, decisions):
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
    loaded = load_final(args.report)
    if loaded.config.method != "pdpo":
        raise UserError(f"{loaded.path}: a model of method {loaded.config.method} does not generate, expected pdpo")
    names = list(dict.fromkeys(asked_names(args.users, loaded.users)))
    if not names:
        raise UserError("--users @own: not for --report, which asks each prompt as each user; expected names or @all")
    prompts = prompts_of(loaded, args.prompts, args.limit)
    encoder, decoding = encoder_of(loaded), Decoding(args.max_new_tokens, args.temperature, seed=args.seed)
    source = {
        "policy": str(loaded.path),
        "prompts": {"source": str(args.prompts or loaded.config.data.valid), "n": len(prompts)},
        "decoding": asdict(decoding),
    }
    out = Path(args.out)
    check_policy_out(out, {**source, "users": names})
    asked = asked_by(loaded, encoder, prompts, names, texts_of(loaded))
    sides = answer_all(loaded, asked, encoder, decoding, args.batch_size)
    report = {**source, **policy_report(loaded, asked, sides)}
    if not write_policy(out, report, loaded, asked, sides):
        print("no figure: matplotlib is not installed (pip install 'prlhf[plots]')")
    print(f"{policy_markdown(report)}\nwritten to {out}")


def validate(args: argparse.Namespace, prompting: Prompting) -> None:
    """Hold a judge against users' own choices."""
    asked = {
        "judge": args.judge,
        "data": args.validate,
        "limit": args.limit,
        "seed": args.seed,
        "settings": prompting.settings,
    }
    out = Path(args.out)
    check_validation_out(out, asked)
    comparisons = read_comparisons(args.validate).sample(args.limit, args.seed).comparisons
    if args.show:
        return show(prompting, choices(comparisons)[:1])
    server = server_of(args, prompting.asked)
    judge = find_judge(args.judge, [c.user for c in comparisons], prompting, server, choices(comparisons))
    found = validation(comparisons, judge, args.seed)
    if server and server.dry_run:
        return print(server.forecast())
    report = {
        **asked,
        "version": judge.version,
        "said": judge.said,
        **found,
    }
    write_validation(out, report)
    print(validation_markdown(report))
    print(f"written to {out}")


def show(prompting: Prompting, queries: list[Query]) -> None:
    """Print what the judge reads."""
    for messages in prompting.conversations(queries):
        print("\n\n".join(message["content"] for message in messages))


if __name__ == "__main__":
    run_command(main)
