"""What is said of a file's users whom a run does not know, of a file without users, and of users whose names look alike."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from prlhf.config.keys import DataConfig
from prlhf.data.files import read_records
from prlhf.data.names import ALIKE, folded, quoted
from prlhf.data.users import UserIndex
from prlhf.errors import UserError

OTHER_FIELDS = {"prompt", "chosen", "rejected", "response", "user_text", "id", "margin", "first"}
USERS_FIELD = re.compile(
    r"(.*[^a-z])?(usr|user|worker|annotator|participant|rater|voter|labell?er|judge|evaluator|reviewer|respondent|author|"
    r"person|persona|human)s?[^a-z]*(id|name|number|key|hash|uuid)?"
)
LONGEST = 64  # characters of a name


def check_users(
    file: str | Path, names: Sequence[str | None], users: UserIndex, form: DataConfig, unit: str = "comparison"
) -> str | None:
    """What to say of those users of a file whom a run does not know, in a sentence; None where there is nothing to say.

    names: the user of each comparison (or other `unit`). UserError, unless form.new_users, where the run knows users and the
    file has none of them: other users alone, or no user at all but a field that looks like their names.
    """
    if not users.names:
        return None
    if not any(names):
        found = users_fields(file, form if unit == "comparison" else replace(form, format="jsonl"))
        said = without_users(file, form, found, unit)
        if found.named and not found.column and not form.new_users:
            raise UserError(f"{said}; expected users, or data.new_users=true for a file without")
        return said
    unknown = Counter(name for name in names if name is not None and not users.number(name))
    if not unknown:
        return None
    share = f"{unknown.total():,} of {len(names):,} {unit}s"
    said = f"{file}: users who are not known: {len(unknown):,} ({quoted(unknown)}), with {share}"
    if near := users.near(unknown):
        pairs = [f"{name!r} (known: {known!r})" for name, known in near.items()]
        more = f" and {len(near) - 3:,} more" if len(near) > 3 else ""
        said += f"; known but for {ALIKE}: {', '.join(pairs[:3])}{more}"
    if unknown.total() == sum(name is not None for name in names) and not form.new_users:
        expected = f"expected some of the {len(users):,} known users ({quoted(users.names)})"
        raise UserError(f"{said}. Nobody in it is known; {expected}, or data.new_users=true for a file of new users")
    return said


class UsersFields(NamedTuple):
    """Fields of records that may name the user: by their own name, or else because their values recur."""

    named: list[str]
    recurring: list[str]
    column: bool  # whether a record has the field data.user_column, if only as null


def users_fields(file: str | Path, form: DataConfig) -> UsersFields:
    """The fields of a file that may name the user, short texts or numbers. form: its format and user_column."""
    values: dict[str, Counter[str]] = defaultdict(Counter)
    column = False
    for _, _, record in read_records(file, form.format):
        column = column or form.user_column in record
        for name, value in record.items():
            if name not in OTHER_FIELDS | {form.user_column} and type(value) in (str, int, float) and value != "":
                values[name][str(value)] += 1
    short = {name: counts for name, counts in values.items() if max(map(len, counts)) <= LONGEST}
    named = [name for name in short if USERS_FIELD.fullmatch(name.lower())]
    return UsersFields(
        named, [name for name, counts in short.items() if 2 <= len(counts) <= counts.total() / 2], column
    )


def without_users(
    file: str | Path, form: DataConfig, found: UsersFields | None = None, unit: str = "comparison"
) -> str:
    """That no comparison (or other `unit`) of a file has a user, and the fields that may name them."""
    named, recurring, _ = found or users_fields(file, form)
    hint, how = "", "(data.user_column, or --user-column of split, says which)"
    if named:
        hint = f"; fields that look like users: {quoted(named, 5)} {how}"
    elif recurring:
        hint = f"; fields whose values recur, which may be users: {quoted(recurring, 5)} {how}"
    return f"{file}: no {unit} has a user, in the field {form.user_column!r}{hint}"


def alike(file: str | Path, names: Iterable[str | None]) -> str | None:
    """Which users of a file have names that look the same, in a sentence; None where all look different."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted({name for name in names if name is not None}):
        groups[folded(name)].append(name)
    found = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    more = f" (and {len(found) - 3:,} more)" if len(found) > 3 else ""
    return (
        f"{file}: different users whose names differ only in {ALIKE}: {', '.join(found[:3])}{more}" if found else None
    )
