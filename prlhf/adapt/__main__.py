"""Users whom training did not know, from a few of their comparisons, with the language model as it is.

    python -m prlhf.adapt --checkpoint RUN --data new.jsonl --out DIR [--update]
    python -m prlhf.adapt --checkpoint RUN --ask K --candidates pairs.jsonl --user NAME [--out FILE]
    python -m prlhf.adapt users RUN [--data FILE] [--out DIR] [--forget NAME]        (the same as prlhf.users)

The first writes to DIR the same model with vectors for the users of the file, and how sure it is of them
(posterior.safetensors). DIR is a model for evaluate.py, generate.py and prlhf.load. What does not change is linked, not copied.
If DIR is the checkpoint's own folder, it is replaced. Known users stay as they are, bit for bit. One comparison of a user is
enough. Refused: a user who chose both responses of one pair, and with --update a pair that the user has told of before.

The second prints the K comparisons of pairs.jsonl whose answers would tell most about a user, known or new, most first: what
they tell in nats, with those above them in mind, and the probability that the first response is preferred. The order of the two
responses and the file's users mean nothing; `responses`: [a, b] may stand for chosen and rejected. --out FILE writes them as
JSON lines, with `responses`, to be answered with chosen and rejected.

The third shows who the users are to any personal model, or forgets one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prlhf.adapt import look
from prlhf.adapt.ask import ask, check_new, read_candidates, table, to_answer
from prlhf.adapt.evidence import judgements
from prlhf.adapt.nonlinear import adapt_nonlinear
from prlhf.adapt.reading import training_comparisons, training_judgements
from prlhf.adapt.rows import new_rows_prior
from prlhf.adapt.told import told_after
from prlhf.adapt.users import Adapted, adapt, check_adaptable, new_users_prior
from prlhf.backbone.loading import choose_device
from prlhf.batch.tokens import EncodedComparison
from prlhf.config.keys import has_linear_coordinates
from prlhf.data.comparisons import GENERIC, read_comparisons
from prlhf.data.files import write_json_lines
from prlhf.data.names import canonical, quoted
from prlhf.data.unknown import alike, without_users
from prlhf.data.users import UserIndex, ranked
from prlhf.errors import UserError, check_range, expanded, run_command
from prlhf.evaluate.held_out import encoded
from prlhf.parallel.ranks import check_started_alone
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final, save_adapted


def main() -> None:
    """Run what the command line names."""
    if sys.argv[1:2] == ["users"]:
        return look.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    parser.add_argument("--data", help="comparisons of new users")
    parser.add_argument("--out", help="a new folder, or the checkpoint's own; with --ask a file for the questions")
    parser.add_argument("--update", action="store_true", help="go on learning users of the file who are known already")
    parser.add_argument("--ask", type=int, metavar="K", help="which K comparisons to ask a user about")
    parser.add_argument("--candidates", metavar="FILE", help="with --ask: comparisons to choose from")
    parser.add_argument("--user", metavar="NAME", help="with --ask: whom to ask, a known or a new user")
    args = parser.parse_args()
    check_options(args)
    check_started_alone("prlhf.adapt")
    run_ask(args) if args.ask is not None else run_adapt(args)


def check_options(args: argparse.Namespace) -> None:
    """UserError for an option that is lacking, or is not for what is asked."""
    asks = args.ask is not None
    needed, foreign = ("data", "out"), ("candidates", "user")
    if asks:
        needed, foreign = foreign, ("data", "update")
        check_range("--ask", args.ask, low=1)
    for name in needed:
        if getattr(args, name) is None:
            raise UserError(f"--{name}: not given; expected it" + (" with --ask" if asks else ", or --ask K"))
    for name in foreign:
        if getattr(args, name):
            raise UserError(f"--{name}: not for --ask" if asks else f"--{name}: for --ask alone")


def run_adapt(args: argparse.Namespace) -> None:
    """Adapt the model to the users of a file."""
    loaded = load_final(args.checkpoint)
    check_adaptable(loaded)
    out = folder_for(args.out, loaded.path)
    data = encoded(loaded, read_comparisons(args.data, loaded.config.data))
    users = with_new_users(loaded, args.data, data.names, args.update)
    told = told_after(loaded, users, data.raw)
    print(f"{args.data}: {data.report.lines()}")
    check_agreement(loaded.model.to(choose_device(loaded.config.device)))
    comparisons = [c._replace(user=users.number(name)) for c, name in zip(data.comparisons, data.names)]
    rows, posterior = adapted(loaded, users, comparisons)
    save_adapted(out, loaded.path, users, loaded.model.user_model.table, rows, posterior, told)
    added, updated = (
        len(users) - len(loaded.users),
        sum(0 < user <= len(loaded.users) for user in {c.user for c in comparisons}),
    )
    print(
        f"{out}: {added:,} new users" + (f", {updated:,} updated" if updated else "") + f"; knows {len(users):,} users"
    )


def adapted(loaded: Loaded, users: UserIndex, comparisons: list[EncodedComparison]) -> Adapted:
    """The new table and the posterior: by `variational` where rewards are linear in users' coordinates, else by a search."""
    known = sorted({c.user for c in comparisons} & set(range(1, len(loaded.users) + 1)))
    if not has_linear_coordinates(loaded.config):
        training = training_comparisons(loaded) if known or loaded.posterior is None else None
        row_prior = new_rows_prior(loaded, training)
        print(f"prior of a new user: {row_prior.said}")
        return adapt_nonlinear(loaded, users, comparisons, training, row_prior)
    judged = judgements(loaded, comparisons)
    new_ones = [judged.apart(user) for user in judged.rows if user > len(loaded.users)]
    judged_before = training_judgements(loaded, known)
    prior = new_users_prior(loaded, judged_before, new_ones)
    print(f"prior of a new user: {prior.said}")
    return adapt(loaded, judged, judged_before, prior)


def run_ask(args: argparse.Namespace) -> None:
    """Print the questions worth asking a user, and write them to --out."""
    name = canonical(args.user)
    if not name or name == GENERIC:
        raise UserError(
            f"--user: found {args.user!r}, who is nobody to learn of; expected the name of a known or a new user"
        )
    if args.out and (Path(args.out).exists() or not Path(args.out).resolve().parent.is_dir()):
        raise UserError(
            f"--out: {args.out} exists, or its folder does not; expected a new file in a folder that is there"
        )
    loaded = load_final(args.checkpoint)
    check_adaptable(loaded)
    candidates = read_candidates(args.candidates, loaded)
    check_new(loaded, candidates, name, args.ask)
    if not loaded.users.number(name) and (said := near(loaded, "--user", [name])):
        print(said)
    check_agreement(loaded.model.to(choose_device(loaded.config.device)))
    asked, said = ask(loaded, candidates, name, args.ask)
    print(f"{name!r}: {said}\n{table(candidates, asked)}")
    if args.out:
        write_json_lines(args.out, to_answer(candidates, asked, name))


def folder_for(out: str, source: Path) -> Path:
    """Where the new model goes. UserError for a folder that holds something else."""
    path = expanded(out)
    for own in (path, path / "final"):
        if own.exists() and own.samefile(source):
            return source
    if path.exists():
        raise UserError(f"{out}: exists; expected a new folder, or the checkpoint's own, {source}")
    return path


def with_new_users(loaded: Loaded, source: str, chose: Sequence[str | None], update: bool) -> UserIndex:
    """The known users and then the others of those who chose, most active first. UserError where none is new, or some are known."""
    names = ranked(chose)
    if not names:
        raise UserError(f"{without_users(source, loaded.config.data)}; expected new users")
    known = [name for name in names if loaded.users.number(name)]
    if known and not update:
        who = f"{len(known):,} of its {len(names):,} users ({quoted(known)})"
        raise UserError(f"{source}: {who} are known already; expected new users, or --update")
    new = [name for name in names if not loaded.users.number(name)]
    for said in (alike(source, names), near(loaded, source, new)):
        if said:
            print(said)
    return UserIndex([*loaded.users.names, *new])


def near(loaded: Loaded, source: str, new: list[str]) -> str | None:
    """Which new users may be known ones, in a sentence."""
    pairs = [f"{name!r} (known: {known!r})" for name, known in loaded.users.near(new).items()]
    return f"{source}: new users whose names look like known ones: {', '.join(pairs[:3])}" if pairs else None


if __name__ == "__main__":
    run_command(main)
