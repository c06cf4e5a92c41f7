"""Make a model know new users from their comparisons: python -m prlhf.adapt --checkpoint RUN --data new.jsonl --out DIR

Writes to DIR the same model with vectors for the users of the file, and how sure it is of them (posterior.safetensors). DIR is
a model for evaluate.py, generate.py and prlhf.load. What does not change is linked, not copied. If DIR is the checkpoint's own
folder, it is replaced. Known users stay as they are, bit for bit.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from prlhf.adapt.evidence import Judgements, judgements
from prlhf.adapt.nonlinear import adapt_nonlinear
from prlhf.adapt.users import Adapted, adapt, check_adaptable, new_users_prior
from prlhf.backbone.loading import choose_device
from prlhf.batch.datasets import Dataset, encode_file
from prlhf.batch.tokens import EncodedComparison, Encoder
from prlhf.config.keys import has_linear_coordinates
from prlhf.data.comparisons import ComparisonFile, read_comparisons
from prlhf.data.names import quoted
from prlhf.data.unknown import alike, without_users
from prlhf.data.users import UserIndex, ranked
from prlhf.errors import UserError, expanded, run_command
from prlhf.parallel.ranks import check_started_alone
from prlhf.score.agreement import check_agreement
from prlhf.store.final import Loaded, load_final, save_adapted


def main() -> None:
    """Adapt the model that the command line names to the users of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory or its final/")
    parser.add_argument("--data", required=True, help="comparisons of new users")
    parser.add_argument("--out", required=True, help="a new folder, or the checkpoint's own")
    parser.add_argument("--update", action="store_true", help="go on learning users of the file who are known already")
    args = parser.parse_args()

    check_started_alone("prlhf.adapt")
    loaded = load_final(args.checkpoint)
    check_adaptable(loaded)
    out = folder_for(args.out, loaded.path)
    data = encoded(loaded, read_comparisons(args.data, loaded.config.data))
    users = with_new_users(loaded, args.data, data.names, args.update)
    print(f"{args.data}: {data.report.lines()}")
    check_agreement(loaded.model.to(choose_device(loaded.config.device)))
    comparisons = [c._replace(user=users.number(name)) for c, name in zip(data.comparisons, data.names)]
    rows, posterior = adapted(loaded, users, comparisons, args.update)
    save_adapted(out, loaded.path, users, loaded.model.user_model.table, rows, posterior)
    new, updated = (
        len(users) - len(loaded.users),
        sum(0 < user <= len(loaded.users) for user in {c.user for c in comparisons}),
    )
    print(f"{out}: {new:,} new users" + (f", {updated:,} updated" if updated else "") + f"; knows {len(users):,} users")


def adapted(loaded: Loaded, users: UserIndex, comparisons: list[EncodedComparison], update: bool) -> Adapted:
    """The new table and the posterior: exact where rewards are linear in users' coordinates, else by a search."""
    if not has_linear_coordinates(loaded.config):
        new = "the population of trained users, scale 1"
        print(f"prior of a new user: {new if loaded.posterior is None else 'as of the users adapted before'}")
        return adapt_nonlinear(loaded, users, comparisons, training_comparisons(loaded) if update else None)
    judged, training = judgements(loaded, comparisons), training_judgements(loaded, update)
    prior, said = new_users_prior(loaded, training)
    print(f"prior of a new user: {said}")
    return adapt(loaded, judged, training, prior)


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


def encoded(loaded: Loaded, file: ComparisonFile) -> Dataset:
    """The comparisons as tokens."""
    config = loaded.config
    return encode_file(
        file, Encoder(loaded.tokenizer, config.data, config.method, config.user_model.place), loaded.users
    )


def training_judgements(loaded: Loaded, update: bool) -> Judgements | None:
    """What the users of training said in it, if that file is there and needed."""
    if loaded.posterior is not None and not update:
        return None
    comparisons = training_comparisons(loaded)
    return None if comparisons is None else judgements(loaded, comparisons)


def training_comparisons(loaded: Loaded) -> list[EncodedComparison] | None:
    """What training learnt from, if that file is there."""
    config = loaded.config
    if config.data.train is None or not expanded(config.data.train).is_file():
        return None
    file = read_comparisons(config.data.train, config.data).sample(config.data.limit, config.seed)
    return encoded(loaded, file).comparisons


if __name__ == "__main__":
    run_command(main)
