"""Tables of users in the reports: of many, those at the two ends; all of them are in users.csv beside it."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prlhf.data.files import replace_text

USERS_CSV = "users.csv"
SHOWN = 20  # users at each end

Row = Mapping[str, Any]  # user, n, ...


class Ends(NamedTuple):
    """The users of a table, and the sentence that says which they are: empty where they are all."""

    rows: list[Row]
    said: str


def ends(rows: Sequence[Row], value: str) -> Ends:
    """All rows as they come or, of more than 2 SHOWN, those of the SHOWN users with the lowest and the highest `value`.

    Of equal users those with more comparisons n, who show more, and then in order of name.
    """
    if len(rows) <= 2 * SHOWN:
        return Ends(list(rows), "")
    worst = sorted(rows, key=lambda row: (row[value], -row["n"], row["user"]))[:SHOWN]
    best = sorted(rows, key=lambda row: (-row[value], -row["n"], row["user"]))[:SHOWN]
    rest = len(rows) - 2 * SHOWN
    said = f"The {SHOWN} worst and the {SHOWN} best of {len(rows):,} users; {USERS_CSV} has the other {rest:,} too."
    return Ends(worst + best[::-1], said)


def write_users(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Write all users as CSV: shares in [0, 1], an empty cell for what is not known. Complete or not there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_text(path, text.getvalue())
