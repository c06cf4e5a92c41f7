"""A user is forgotten: what the model's folder has of them is removed, and what else may have something is said."""

import re
from pathlib import Path

import torch

from prlhf.adapt.told import read_told
from prlhf.data.sources import cache_dir
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.evaluate.held_out import training_file
from prlhf.method.posterior import Posterior
from prlhf.store.final import POSTERIOR, Loaded, save_adapted

TEXTS = (".csv", ".json", ".jsonl", ".md")


def forget(loaded: Loaded, name: str) -> list[str]:
    """Remove a user from the model's folder, in place and at once: row, name, posterior, hashes of what they told.

    The numbers of later users move up by one; their vectors, and all other weights, stay bit for bit. Returns what was done and
    what still holds their comparisons, in sentences. UserError for an unknown name, with a near one.
    """
    user = loaded.users.required_number(name)
    if not user:
        raise UserError(
            f"user {name!r} is the unknown user, who is nobody; expected one of its {len(loaded.users)} users"
        )
    name, user_model = loaded.users.names[user - 1], loaded.model.user_model
    table = user_model.get_parameter(user_model.table).detach().cpu()
    row = user - user_model.first_user
    left = UserIndex([other for other in loaded.users.names if other != name])
    told = {other: pairs for other, pairs in read_told(loaded).items() if other != name}
    others = still_there(loaded, name, user)
    kept = torch.cat([table[:row], table[row + 1 :]])
    save_adapted(loaded.path, loaded.path, left, user_model.table, kept, without(loaded.posterior, user), told)
    return [f"{loaded.path}: user {name!r} is forgotten; knows {len(left):,} users. What is left of them:", *others]


def without(posterior: Posterior | None, user: int) -> Posterior | None:
    """The posterior of the other users, whose numbers move up; None where there are none."""
    if posterior is None:
        return None
    keep = posterior.users_A != user
    if not keep.any():
        return None
    users_A, scale_A, sharpness_A = (part[keep] for part in posterior[:3])
    covariance_AKK, told_ARK = (
        None if part is None else part[keep] for part in (posterior.covariance_AKK, posterior.told_ARK)
    )
    users_A = users_A - (users_A > user).long()
    return posterior._replace(
        users_A=users_A, scale_A=scale_A, sharpness_A=sharpness_A, covariance_AKK=covariance_AKK, told_ARK=told_ARK
    )


def still_there(loaded: Loaded, name: str, user: int) -> list[str]:
    """What holds a user's comparisons, or their name, beside the model's own files: one sentence each."""
    config, path, said = loaded.config, loaded.path, []
    run_dir = path.parent if path.name == "final" else path
    file = training_file(loaded)
    count = sum(loaded.users.number(c.user) == user for c in file.comparisons) if file else 0
    if file is None:
        said.append(f"- data.train: {config.data.train} is not there; whoever has it may have their comparisons")
    elif count:
        said.append(
            f"- data.train: {config.data.train} holds {count:,} of their comparisons, and prlhf.adapt reads them for the "
            "prior of new users; take them out of it"
        )
    adapted = loaded.posterior is not None and loaded.posterior.row(user) is not None
    if count or file is None or not adapted:
        perhaps = "" if count or not adapted else "if they were a user of training, "
        said.append(
            f"- weights: {perhaps}those that all users share, and from them the prior of new users, were trained with their "
            "comparisons; only training again without them undoes that"
        )
    if not adapted and loaded.posterior is not None:
        said.append(
            f"- {path / POSTERIOR}: the prior of new users was made of all trained users' vectors; whoever has the others' can "
            "compute theirs from it"
        )
    if (run_dir / "checkpoints").is_dir():
        said.append(f"- {run_dir / 'checkpoints'}: training's checkpoints hold their vectors and name")
    said += [f"- {file}: has the word {name!r}" for file in texts_with(name, run_dir, path)]
    said.append(f"- {cache_dir()}: what was computed for the texts of comparisons, without names")
    said.append("- files that they were adapted with, held-out files, and other folders that were made from this model")
    return said


def texts_with(name: str, folder: Path, model: Path) -> list[Path]:
    """The text files in a run's folder with this name as a word, but for those of checkpoints/ and the model's own."""
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in TEXTS and path.is_file() and path.parent != model and "checkpoints" not in path.parts:
            with open(path, encoding="utf-8", errors="replace") as file:
                if any(word.search(line) for line in file):
                    found.append(path)
    return found
