"""The papers' tables of win rates: P-DPO, vanilla DPO and baselines that train nothing, on PRISM or Personalized Soups.

    python -m examples.win_rates prism|psoups --data FOLDER [--judge "JUDGE [OPTIONS]"] [--out runs/table_NAME] [--seeds 0]
        [--arms ARM ...] [--checkpoint ARM=RUN ...] [--max-new-tokens 256] [--limit N] [--set key=value ...]

FOLDER is what `python -m prlhf.data prepare NAME` writes. Trains each arm (train.py with configs/NAME_pdpo.yaml) but those whose
finished run --checkpoint names, lets each and the baselines answer FOLDER/prompts.jsonl greedily (generate.py), each prompt as
the user who asked it or, where nobody did, as every known user, and has all judged against vanilla DPO and, where the prompts
have them, against the responses that their users chose (prlhf.judge). Writes OUT/win_rates.md and win_rates.json, beside the
paper's numbers where those are known. JUDGE and OPTIONS are those of prlhf.judge, as in --judge "openai:MODEL --profiles FILE".
Without --judge it ends with the responses; with --dry-run or --show among OPTIONS with what those say. The same command again continues where it
stopped. --set applies to every run.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

from examples.grid import Arm, call, options, run_grid
from prlhf.data.check.tables import markdown_table
from prlhf.data.comparisons import read_prompts
from prlhf.data.files import fingerprint_of, read_json_lines, write_json, write_json_lines
from prlhf.errors import UserError, check_range, did_you_mean, run_command
from prlhf.generate import __main__ as generate
from prlhf.judge import __main__ as judge
from prlhf.judge.prompting import ASKED_JUDGES, add_prompting_options, prompting_of
from prlhf.judge.report import rate_text
from prlhf.judge.server import add_options, server_of
from prlhf.judge.table import notes, rate_cell
from prlhf.store.final import find_final

VANILLA, CHOSEN = "vanilla_dpo", "chosen"
UNIFORM = ("user_model.kind=uniform", "user_model.tokens=0")


class Published(NamedTuple):
    """The paper's win rates of an arm in %, ties counted as wins of both sides: by pairs, and by users."""

    per_sample: float
    per_user: float


class DataSet(NamedTuple):
    """A table's data set. arms: config keys by arm, vanilla DPO first; paper: by opponent and arm, where it is known; about: how
    baselines find the text about a user that training is without."""

    title: str
    config: str
    arms: dict[str, tuple[str, ...]]
    paper: dict[str, dict[str, Published]]
    source: str | None
    about: tuple[str, ...] = ()


PRISM = DataSet(
    "PRISM",
    "prism_pdpo.yaml",
    {
        VANILLA: (*UNIFORM, "data.user_text=false"),
        "pdpo_individual": ("user_model.kind=individual",),
        "pdpo_cluster10": ("user_model.kind=cluster", "user_model.clusters=10"),
        "pdpo_cluster100": ("user_model.kind=cluster", "user_model.clusters=100"),
    },
    {
        VANILLA: {
            "pdpo_individual": Published(64.47, 60),
            "pdpo_cluster10": Published(61.84, 60),
            "pdpo_cluster100": Published(65.79, 65),
        },
        CHOSEN: {
            VANILLA: Published(42.11, 25),
            "pdpo_individual": Published(60.52, 55),
            "pdpo_cluster10": Published(61.84, 70),
            "pdpo_cluster100": Published(60.52, 60),
        },
    },
    "arXiv 2402.05133v3, short form, Table 1: a language model as the judge, ties counted as wins of both sides",
)
PSOUPS = DataSet(
    "Personalized Soups",
    "psoups_pdpo.yaml",
    {VANILLA: UNIFORM, "pdpo_individual": ("user_model.kind=individual",)},
    paper={},
    source=None,
    about=("--set", "data.attributes=[preference]"),
)
DATA_SETS = {"prism": PRISM, "psoups": PSOUPS}
BASELINES = ("base", "roleplay", "fewshot:4")  # of generate.py --baseline


def runs_of(args: Any, data_set: DataSet) -> dict[str, dict[str, Path]]:
    """By seed, each arm's finished run: what --checkpoint names, else trained. UserError before anything is trained."""
    arms = {name: Arm(data_set.config, keys) for name, keys in data_set.arms.items()}
    taken = dict(text.partition("=")[::2] for text in args.checkpoint)
    for name, run in taken.items():
        if name not in arms:
            raise UserError(
                f"--checkpoint {name}: no such arm{did_you_mean(name, arms)}, expected ARM=RUN of {', '.join(arms)}"
            )
        find_final(run)
    asked = list(dict.fromkeys([*taken, *(args.arms or arms)]))
    if VANILLA not in asked and args.judge:
        raise UserError(f"--arms: all is judged against {VANILLA}, expected it among the arms or in --checkpoint")
    seeds = list(dict.fromkeys(args.seeds))
    trained: dict[str, list[Path]] = {}
    args.arms = [name for name in asked if name not in taken]
    if args.arms:
        keys = (f"data.train={args.data}/train.jsonl", f"data.valid={args.data}/valid.jsonl", "train.eval_last=false")
        trained = run_grid(args, arms, keys)[""]
    return {
        seed: {name: Path(taken[name]) if name in taken else trained[name][n].parent for name in arms if name in asked}
        for n, seed in enumerate(seeds)
    }


def answers_of(args: Any, data_set: DataSet, runs: dict[str, Path], seed: str) -> dict[str, Path]:
    """The files of responses of each arm and baseline; baselines have the base of the first arm but vanilla, if any."""
    prompts = Path(args.data) / "prompts.jsonl"
    users = "@own"
    if not any(prompt.user for prompt in read_prompts(prompts)):
        users = ",".join(json.loads((Path(args.data) / "split.json").read_text(encoding="utf-8"))["known_users"])
    limit = ("--limit", str(args.limit)) if args.limit else ()
    common = ("--prompts", str(prompts), "--users", users, "--max-new-tokens", str(args.max_new_tokens), *limit)
    base = next((run for name, run in runs.items() if name != VANILLA), runs.get(VANILLA))
    systems = {name: (run, ()) for name, run in runs.items()}
    systems |= {
        name.partition(":")[0]: (base, ("--baseline", name, "--seed", seed, *data_set.about)) for name in BASELINES
    }
    files = {}
    for name, (run, more) in systems.items():
        files[name] = Path(args.out) / "responses" / f"{name}_seed{seed}.jsonl"
        call(generate.main, "--checkpoint", str(run), *common, *more, "--out", str(files[name]))
    return files


def chosen_file(args: Any, answers: Path) -> Path | None:
    """The comparisons whose prompts were answered as their users, for the chosen responses; None if prompts are of no comparison."""
    asked = {record["id"] for _, record in read_json_lines(answers)}
    found = [record for _, record in read_json_lines(Path(args.data) / "valid.jsonl") if record["id"] in asked]
    if {record["id"] for record in found} != asked:
        return None
    path = Path(args.out) / "responses" / f"{CHOSEN}.jsonl"
    write_json_lines(path, found)
    return path


class AskedJudge(NamedTuple):
    """The judge of --judge and its options; its name in a folder's; whether the options keep it from judging."""

    options: list[str]
    folder: str
    only_told: bool


def judge_of(args: Any) -> AskedJudge:
    """What --judge says. A language model reads the training comparisons, which tell it whom it plays, unless OPTIONS say otherwise.

    The folder is NAME_FINGERPRINT, of all by which a judgement is another one: the judge's whole name, what it reads, its server.
    UserError for an option that the judge does not have.
    """
    parser = argparse.ArgumentParser(prog="--judge", add_help=False)
    add_prompting_options(parser)
    add_options(parser)
    try:
        name, *more = shlex.split(args.judge)
    except ValueError as error:
        raise UserError(f'--judge {args.judge}: {error}, expected "JUDGE [OPTIONS]"') from None
    kind, _, model = name.partition(":")
    if kind in ASKED_JUDGES and parser.parse_known_args(more)[0].profiles is None:
        more += ["--profiles", f"{args.data}/train.jsonl"]
    found = parser.parse_known_args(more, argparse.Namespace(judge=name, out=args.out))[0]
    prompting = prompting_of(found)
    server = server_of(found, prompting.asked)
    mark = fingerprint_of(name, prompting.settings, server.url if server else "")[:8]
    return AskedJudge(["--judge", name, *more], f"{kind}_{Path(model).name}_{mark}", found.dry_run or found.show)


def judged(args: Any, answers: dict[str, Path], against: str, seed: str, by: AskedJudge) -> dict[str, Any]:
    """Each system's report of prlhf.judge against one of them, by name; {} where the judge is only told of."""
    opponent = answers[against]
    own = {name: str(file) for name, file in answers.items() if name not in (against, CHOSEN)}
    out = Path(args.out) / f"judged_{against}_seed{seed}_{by.folder}"
    call(judge.main, *own.values(), str(opponent), *by.options, "--out", str(out))
    if by.only_told:
        return {}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    systems = report["systems"] if len(own) > 1 else {report["a"]: report}
    return {name: systems[file] for name, file in own.items()}


def ties_as_wins(report: dict[str, Any]) -> Published:
    """What the paper counts, in %: (wins + ties) / pairs, over all pairs, and the mean over users of each one's."""
    users = report["per_user"].values()
    shares = [(row["wins"] + row["ties"]) / row["n"] for row in users]
    return Published(
        100 * sum(row["wins"] + row["ties"] for row in users) / sum(row["n"] for row in users),
        100 * sum(shares) / len(shares),
    )


def table(data_set: DataSet, against: str, systems: dict[str, Any]) -> str:
    """The systems' win rates against one opponent, beside the paper's."""
    paper = data_set.paper.get(against, {})
    rows = []
    for name, report in systems.items():
        row: list[str | float] = [name]
        for measure in ("per_sample", "per_user"):
            row.append(rate_cell(report, measure))
            if paper:
                theirs = ties_as_wins(report) if report["per_user"] else None, paper.get(name)
                row += [f"{getattr(rates, measure):.2f}" if rates else "-" for rates in theirs]
        row.append(rate_text(report, "length_controlled"))
        row += [
            f"{report['verdicts']['ties']:,} of {report['pairs']['judged']:,}",
            report["pairs"]["unparsed"],
            report["words"]["a"],
            report["words"]["b"],
        ]
        rows.append(row)
    columns = ("ties as wins, %", "paper, %") if paper else ()
    title = {VANILLA: "vanilla DPO", CHOSEN: "the responses that users chose"}[against]
    rates = ("per sample, %", *columns, "per user, %", *columns)
    header = ("", *rates, "at equal length, %", "ties", "unparsed", "words", "words of the opponent")
    return "\n\n".join([f"## Against {title}", markdown_table(header, rows), *notes(list(systems.values()))])


def write(args: Any, data_set: DataSet, command: str, found: dict[str, dict[str, Any]]) -> None:
    """Write win_rates.md and win_rates.json, and print the former. found: by seed and opponent, `judged`."""
    prompts = f"{args.data}/prompts.jsonl, at most {args.max_new_tokens} new tokens, greedy"
    parts = [f"# Win rates on {data_set.title}"]
    for seed, opponents in found.items():
        parts += [f"Seed {seed}."] if len(found) > 1 else []
        parts += [table(data_set, against, systems) for against, systems in opponents.items()]
    source = (
        f"paper: {data_set.source}." if data_set.source else "No win rates of the paper are at hand for this data set."
    )
    parts += ["95% intervals over users in parentheses; a tie counts one half. " + source]
    parts += [f"- Command: `{command}`\n- Judge: `{args.judge}`\n- Prompts: {prompts}\n- Seeds: {', '.join(found)}"]
    text, out = "\n\n".join(parts) + "\n", Path(args.out)
    paper = {against: {n: row._asdict() for n, row in rows.items()} for against, rows in data_set.paper.items()}
    write_json(
        out / "win_rates.json", {"command": command, "judge": args.judge, "paper_percent": paper, "seeds": found}
    )
    (out / "win_rates.md").write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {out}")


def main() -> None:
    """Train, answer and judge, then write the table."""
    command = shlex.join(["python", "-m", "examples.win_rates", *sys.argv[1:]])
    parser = options(__doc__, "runs/table_NAME")
    parser.add_argument("name", choices=list(DATA_SETS))
    parser.add_argument("--data", required=True, help="the folder of train.jsonl, valid.jsonl and prompts.jsonl")
    parser.add_argument("--judge", metavar='"JUDGE [OPTIONS]"', help="as of prlhf.judge; default: stop before it")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="ARM=RUN", help="finished runs, for these arms")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, help="the first so many prompts")
    parser.set_defaults(seeds=["0"], out=None)
    args = parser.parse_args()
    check_range("--max-new-tokens", args.max_new_tokens, low=1)
    args.out, data_set = args.out or f"runs/table_{args.name}", DATA_SETS[args.name]
    by, found = judge_of(args) if args.judge else None, {}
    for seed, runs in runs_of(args, data_set).items():
        answers = answers_of(args, data_set, runs, seed)
        if by:
            chosen = chosen_file(args, next(iter(answers.values())))
            opponents = {VANILLA: answers, **({CHOSEN: {**answers, CHOSEN: chosen}} if chosen else {})}
            found[seed] = {against: judged(args, files, against, seed, by) for against, files in opponents.items()}
    if by and by.only_told:
        print("no table: --judge was told to judge nothing")
    elif by:
        write(args, data_set, command, found)
    else:
        print(f"responses are in {args.out}/responses; expected --judge to judge them, e.g. --judge openai:MODEL")


if __name__ == "__main__":
    run_command(main)
